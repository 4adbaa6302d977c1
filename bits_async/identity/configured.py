r"""A fixed identity from a configuration file: TOML that says who, and where the key or the encrypted secret is; never a password.

    [identity]
    user = "svc-fetch@CORP.EXAMPLE"                  # or 'CORP\svc-fetch'
    keytab = "/etc/fetch.keytab"                     # or one of these two, instead:
    password = { systemd_credential = "fetch" }      # LoadCredentialEncrypted=fetch in the unit
    password = { keyring = "fetcher" }               # the entry of this user under that service in the system's keyring
    local_user = "fetch"                             # who acts on files; without it the process does

The file is opened as whoever asks, and counts only if nobody but that identity's user or root may write it (T27). Of another user than the
process, who is no administrator, it makes nobody but himself: he wrote it, and the process could be anybody. His keytab is opened as him,
and the secrets of the process are not for him.
"""

import os
import tomllib
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..errors import AccessDenied, ErrorCode, ErrorContext, InvalidArgument, make_error, show_text
from .ambient import current_token
from .logon import for_network, for_user
from .threads import in_own_thread, wear
from .tokens import Token
from .trusted import read_trusted
from .vault import ask_keyring, systemd_credential

if TYPE_CHECKING:
    import spnego

LARGEST_SECRET: Final = 64 << 10
_KEYS: Final = frozenset({"user", "keytab", "password", "local_user"})


async def from_configuration(path: str | os.PathLike[str]) -> Token:
    """See `Token.from_configuration`."""
    name, caller = os.fspath(path), current_token()
    local = caller.local
    read = partial(read_trusted, name, "the configuration of an identity")
    values = _identity(await (in_own_thread(read) if local.is_process else wear(local, read)), name)
    if not (local.is_process or caller.elevated):
        return await _for_himself(caller, values, name)
    credential = await in_own_thread(_credential, values, name)
    local_user = values.get("local_user")
    return for_network(credential) if local_user is None else await for_user(local_user, credential)


async def _for_himself(caller: Token, values: Mapping[str, Any], path: str) -> Token:
    """What a user's own file makes of him (T27): the process lends him neither its secrets nor anybody's identity."""
    local = caller.local
    if "keytab" not in values:
        message = f"the secrets of this program are not for {caller.name}"
        raise AccessDenied(message, path=path, identity=caller.name, advice="name a keytab, which is opened as that user")
    token = await for_user(values.get("local_user", local.name), await in_own_thread(_credential, values, path))
    if token.local.key != local.key:
        token.close()
        message = f"{caller.name} may be no other user of this machine than himself"
        raise AccessDenied(message, path=path, identity=caller.name, advice="leave local_user out")
    return token


def _identity(content: str, path: str) -> Mapping[str, Any]:
    try:
        table = tomllib.loads(content)
    except tomllib.TOMLDecodeError:
        raise InvalidArgument("the configuration of an identity is not TOML", path=path) from None  # the text may hold a secret
    values = table.get("identity")
    if not isinstance(values, dict):
        raise InvalidArgument("the configuration of an identity has a table [identity]", path=path)
    if unknown := sorted(set(values) - _KEYS):
        raise InvalidArgument(f"[identity] does not know {show_text(', '.join(unknown), 100)}", path=path)
    if isinstance(values.get("password"), str):
        raise InvalidArgument(
            "a password does not stand in a configuration file",
            path=path,
            advice="use keytab, or encrypt it (systemd-creds encrypt --name=NAME - FILE, in the unit LoadCredentialEncrypted=NAME)"
            ' and write password = { systemd_credential = "NAME" }',
        )
    for key in ("user", "keytab", "local_user"):
        if key in values and (not isinstance(values[key], str) or not values[key]):
            raise InvalidArgument(f"{key} in [identity] is text", path=path)
    if "user" not in values or ("keytab" in values) == ("password" in values):
        raise InvalidArgument("[identity] has a user, and either a keytab or a password", path=path)
    if "keytab" in values and not os.path.isabs(values["keytab"]):
        raise InvalidArgument("keytab in [identity] is an absolute path", path=path)
    return values


def _credential(values: Mapping[str, Any], path: str) -> "spnego.Credential":
    import spnego

    if "keytab" in values:
        return spnego.KerberosKeytab(values["keytab"], values["user"])
    return spnego.Password(values["user"], _secret(values["password"], values["user"], path))


def _secret(where: Any, user: str, path: str) -> str:
    if not isinstance(where, dict) or len(where) != 1 or not all(isinstance(each, str) and each for each in where.values()):
        raise InvalidArgument("password in [identity] names one place: { systemd_credential = ... } or { keyring = ... }", path=path)
    ((kind, name),) = where.items()
    if kind == "systemd_credential":
        return _from_systemd(name, path)
    if kind == "keyring":
        return _from_keyring(name, user, path)
    raise InvalidArgument(f"a password cannot be kept by {show_text(kind, 40)}", path=path)


def _from_systemd(name: str, path: str) -> str:
    if "/" in name or name in (".", ".."):
        raise InvalidArgument("a credential of systemd has a plain name", path=path)
    try:
        return systemd_credential(name, LARGEST_SECRET).decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise InvalidArgument(f"the credential {show_text(name, 80)} is no text", path=path) from None


def _from_keyring(service: str, user: str, path: str) -> str:
    found = ask_keyring(lambda keyring: keyring.get_password(service, user))
    if not found:
        message = f"the keyring has no entry of {show_text(user, 80)} under {show_text(service, 80)}"
        advice = f"keyring set {service} {user}"
        raise make_error(ErrorCode.BG_E_INVALID_CREDENTIALS, ErrorContext.GENERAL_QUEUE_MANAGER, message, path=path, advice=advice)
    return str(found)
