"""How tokens are made: from the process, from the user database, from a network credential.

Here stands which credential a token may carry: only what the kernel guards by the thread's own identity is accepted for
another user (T4). A credential's principal is what it claims, not what was proved (T7); who it opens doors for is decided
elsewhere.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, get_args

from ..errors import ImpersonationFailed, InvalidArgument, scrub, show_text
from . import native
from .threads import in_own_thread, prepare, wear, wearing
from .tokens import LocalIdentity, Token

if TYPE_CHECKING:
    import spnego

# Of the places for tickets and keys only files are guarded by the thread's fsuid; what is in memory was put there by this
# process.
_GUARDED: Final = frozenset({"FILE", "WRFILE", "MEMORY"})

_process: tuple[object, Token] | None = None


def for_process() -> Token:
    """The process's own token: one instance, until the process's ids change."""
    global _process
    if wearing() is not None:  # a token thread sees its own groups, not the process's
        if _process is None:
            raise ImpersonationFailed("the process's own token was not made before a thread of another identity asked for it")
        return _process[1]
    key = native.process_key()
    if _process is None or _process[0] != key:
        _process = key, Token._make(native.process_identity(), default_network=_default_credential)
    return _process[1]


def _default_credential() -> "spnego.CredentialCache":
    import spnego

    return spnego.CredentialCache()


async def for_user(user: str | int, network: "spnego.Credential | None") -> Token:
    """See `Token.for_user`."""
    if isinstance(user, bool) or not isinstance(user, str | int):
        raise TypeError(f"a user is a name or a uid, not {type(user).__name__}")
    credential = _own_copy(network)
    local = await in_own_thread(_find, user)
    if credential is not None and not local.is_process:
        _refuse_unguarded(credential, local.name)
    # Worn once before the token exists: what would fail at the first file fails here, and the principal is read by whom it
    # belongs to.
    principal = await wear(local, _principal, credential)
    return Token._make(local, network=_named(credential, principal), principal=principal)


def _find(user: str | int) -> LocalIdentity:
    local: LocalIdentity = native.user_identity(user)
    if not local.is_process:
        prepare()  # here, because it takes half a second and this thread is nobody else's
    return local


def for_network(network: "spnego.Credential") -> Token:
    """See `Token.for_network`."""
    credential = _own_copy(network)
    if credential is None:
        raise TypeError("for_network() takes a credential of spnego")
    local = for_process().local
    principal = _principal(credential)
    return Token._make(local, name=principal, network=_named(credential, principal), principal=principal)


# -- credentials ------------------------------------------------------------------------------------------------------


def _own_copy(credential: "spnego.Credential | None") -> "spnego.Credential | None":
    """A copy: spnego's credentials can be changed by whoever holds them, a token cannot."""
    if credential is None:
        return None
    import spnego

    if not isinstance(credential, get_args(spnego.Credential)):
        raise TypeError(f"network credentials are a credential of spnego, not {type(credential).__name__}")
    copy: spnego.Credential = dataclasses.replace(credential)
    return copy


def _named(credential: "spnego.Credential | None", principal: str | None) -> "spnego.Credential | None":
    """The credential with the principal that was read from it: whoever replaces the file does not replace the identity."""
    if credential is None:
        return None
    import spnego

    if isinstance(credential, spnego.KerberosCCache | spnego.KerberosKeytab):
        return dataclasses.replace(credential, principal=principal)
    return credential


def _refuse_unguarded(credential: "spnego.Credential", name: str) -> None:
    import spnego

    if isinstance(credential, spnego.CredentialCache):
        raise ImpersonationFailed(
            f"{name} cannot have the default credential cache: it is the process's, whoever the thread is",
            identity=name,
            advice="name a FILE: cache or a keytab of this user",
        )
    if isinstance(credential, spnego.KerberosCCache | spnego.KerberosKeytab):
        place = credential.ccache if isinstance(credential, spnego.KerberosCCache) else credential.keytab
        kind = _kind_of(place)
        if kind not in _GUARDED:
            raise ImpersonationFailed(
                f"{name} cannot have a {show_text(kind, 20)}: credential: only files are guarded by the thread's identity",
                identity=name,
                advice="name a FILE: cache or a keytab of this user",
            )


def _kind_of(place: str) -> str:
    """The type of a cache's or keytab's name, "FILE" when none is written."""
    kind, colon, _ = place.partition(":")
    return kind if colon and "/" not in kind else "FILE"


def _principal(credential: "spnego.Credential | None") -> str | None:
    """Who a credential claims to be. Runs as the identity that the credential is for, because it may read that user's files."""
    if credential is None:
        return None
    import spnego

    if isinstance(credential, spnego.KerberosCCache):
        return _plain(credential.principal or _read("the credential cache", credential.ccache, _principal_of_cache))
    if isinstance(credential, spnego.KerberosKeytab):
        return _plain(credential.principal or _read("the keytab", credential.keytab, _principal_of_keytab))
    if isinstance(credential, spnego.CredentialCache) and credential.username is None:
        return None  # whoever the process is
    return _plain(credential.username)


def _plain(principal: str | None) -> str:
    if not principal or show_text(principal, 1000) != principal:
        raise InvalidArgument("a credential needs a user name or principal, without control characters")
    return principal


def _read(what: str, place: str, reader: Callable[[str], str]) -> str:
    try:
        return reader(place)
    except ImportError as exc:
        raise ImpersonationFailed(f"cannot read whose {what} is", advice="install bits-async[kerberos], or name its principal") from scrub(
            exc
        )
    except Exception as exc:  # krb5's errors, which name the file and the reason
        raise ImpersonationFailed(
            f"cannot read whose {what} is: {show_text(str(exc))}", advice="check the file, or name its principal"
        ) from scrub(exc)


def _principal_of_cache(place: str) -> str:
    import krb5

    context = krb5.init_context()
    return _text(krb5.cc_get_principal(context, krb5.cc_resolve(context, place.encode())).name)


def _principal_of_keytab(place: str) -> str:
    import krb5

    context = krb5.init_context()
    entry = next(iter(krb5.kt_resolve(context, place.encode())))  # held: its principal is freed with it
    return _text(entry.principal.name)


def _text(name: bytes | None) -> str:
    return (name or b"").decode("utf-8", "replace")
