"""Who can act: `Token`, and the pair of tokens a job has.

A token is two answers: how a thread becomes it (`local`) and what to show a server (`network`).
Pure: this module does not know how a token is made (`logon`), worn (`threads`) or surrounds a call (`ambient`), and asks the operating
system for nothing.
"""

import enum
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, Self, final

from ..errors import InvalidArgument, TokenRequired, show_text

if TYPE_CHECKING:
    import os

    import spnego


OWN_CACHES: Final = "MEMORY:bits-"


def is_own_cache(name: str) -> bool:
    """Whether a ticket cache's name is one that the package made: nobody can guess it, so whoever has it was given it (T4)."""
    return re.fullmatch(re.escape(OWN_CACHES) + "[0-9a-f]{32}", name) is not None


class ImpersonationLevel(enum.Enum):
    """SECURITY_IMPERSONATION_LEVEL: how far the holder of a token may go with it."""

    ANONYMOUS = 0
    IDENTIFY = 1
    IMPERSONATE = 2
    DELEGATE = 3


class HelperTokenFlags(enum.Flag, boundary=enum.STRICT):
    """BG_TOKEN: where a job's helper acts instead of its owner."""

    NONE = 0
    LOCAL_FILE = 1
    NETWORK = 2


class LocalIdentity(Protocol):
    """The platform half of a token: how a thread becomes it."""

    @property
    def name(self) -> str:
        """For logs and errors: "alice"."""

    @property
    def key(self) -> str:
        """What access checks compare: "uid:1000", or a SID."""

    @property
    def elevated(self) -> bool:
        """Belongs to an administrator."""

    @property
    def is_process(self) -> bool:
        """The running process's own identity."""

    def assume(self) -> None:
        """Becomes this identity, once, on a new thread; raises ImpersonationFailed."""

    def check(self) -> None:
        """Raises ImpersonationFailed when the calling thread no longer wears this identity (T1)."""

    def fresh(self) -> "LocalIdentity":
        """The identity as the user database has it now; blocks. Raises TokenRequired when the account is gone."""

    def close(self) -> None:
        """Releases what the platform holds for it."""


@final
class Token:
    """Someone who can act. Made by `for_process`, `for_user`, `for_network`, `from_delegated`, `logon_user()` and `s4u_logon()`;
    never changed, stored or sent. What its attributes mean, each says itself (`help(Token)`).
    """

    __slots__ = {
        "name": "For people: the local user's name, or the principal of a token that has one.",
        "sid": 'Who this is: "uid:1000", with a principal "uid:1000:alice@REALM", "network:alice@REALM" for somebody who is nobody on '
        "this machine; on Windows a SID.",
        "elevated": "An administrator, or the process itself where it has an administrator's powers.",
        "level": "How far the holder may go.",
        "local": "How a thread becomes it.",
        "security": "Whose threads make its security contexts: `local`, or the process where it is nobody on this machine.",
        "principal": "Who it is on the network; None without a name there, or when it is whoever the process is.",
        "proved": "A KDC or an acceptor vouched for the principal, and a key of ours for them; otherwise it is a mere claim.",
        "delegates": "Whom it may hand its ticket-granting ticket.",
        "has_credentials": "Its maker gave it network credentials of its own.",
        "logged_on": "Its threads are logged on for the network by themselves: an access token of Windows.",
        "session": "The logon session it ends with; None: it is not tied to one.",
        "fake": "Made for tests; a real manager refuses it.",
    } | dict.fromkeys(("__weakref__", "_closed", "_network", "_release", "_shared"), "")

    name: str
    sid: str
    elevated: bool
    level: ImpersonationLevel
    local: LocalIdentity
    security: LocalIdentity
    principal: str | None
    proved: bool
    delegates: "tuple[DelegationTarget, ...]"
    has_credentials: bool
    logged_on: bool
    session: str | None
    fake: bool
    _network: "Callable[[], spnego.Credential] | None"
    _closed: bool
    _shared: bool
    _release: "weakref.finalize[[], Token]"

    def __init__(self) -> None:
        raise TypeError("a Token is made by Token.for_process(), Token.for_user(), Token.for_network(), logon_user() and their like")

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("Token is final")

    @classmethod
    def _make(
        cls,
        local: LocalIdentity,
        *,
        name: str | None = None,
        network: "spnego.Credential | None" = None,
        default_network: "Callable[[], spnego.Credential] | None" = None,
        principal: str | None = None,
        proved: bool = False,
        level: ImpersonationLevel = ImpersonationLevel.IMPERSONATE,
        session: str | None = None,
        fake: bool = False,
        security: LocalIdentity | None = None,
        delegates: "tuple[DelegationTarget, ...]" = (),
        logged_on: bool = False,
        release: Callable[[], None] | None = None,
    ) -> "Token":
        """For the makers in `logon` and `testing`.

        `default_network` makes it the token that everybody shares; it is asked at the first use, because it loads spnego.
        `release` gives back what the credential holds, once nobody has the token any more or it is closed.
        """
        self = object.__new__(cls)
        values = {
            "name": name or local.name,
            "sid": f"{local.key}:{principal}" if principal else local.key,
            "elevated": local.elevated,
            "level": level,
            "local": local,
            "security": security or local,
            "principal": principal,
            "proved": proved,
            "delegates": delegates,
            "has_credentials": network is not None,
            "logged_on": logged_on,
            "session": session,
            "fake": fake,
            "_network": default_network if network is None else lambda: network,
            "_closed": False,
            "_shared": default_network is not None,
            "_release": weakref.finalize(self, _release_all, local.close, release),
        }
        for attribute, value in values.items():
            object.__setattr__(self, attribute, value)
        self._release.atexit = False
        return self

    @property
    def network(self) -> "spnego.Credential | None":
        """What to show a server or a proxy; None: nothing. Raises TokenRequired when the token was closed."""
        if self._closed:
            raise TokenRequired("the token was closed", identity=self.name)
        return None if self._network is None else self._network()

    @property
    def closed(self) -> bool:
        """Nothing can be done as this token any more."""
        return self._closed

    @classmethod
    def for_process(cls) -> "Token":
        """Whoever runs this program, with its default network credentials.

        Every call gives the same token while the process's ids stay.
        """
        from .logon import for_process

        return for_process()

    @classmethod
    async def for_user(cls, user: str | int, *, network: "spnego.Credential | None" = None) -> "Token":
        """A user of this machine, with the network credential given, or none.

        Raises:
            ImpersonationFailed: The user database does not know the user, the process lacks the privilege (the message names the
                capability), or the credential is of a kind that the kernel does not guard against other users (T4).
        """
        from .logon import for_user

        return await for_user(user, network)

    @classmethod
    async def for_session(cls, session: str, *, network: "spnego.Credential | None" = None) -> "Token":
        """The user of a logon session of this machine (logind's name of it: `loginctl list-sessions`; on Windows its number:
        `query session`), tied to it: when the session ends, the token does, and jobs that need it hear of it (BITS: log-off).

        On Windows the token is the session's own, with its own network credentials; only LocalSystem may have it.

        Raises:
            ImpersonationFailed: There is no such session, nobody who knows (no logind, or dbus-fast is not installed), or as `for_user`.
        """
        from .logon import for_session

        return await for_session(session, network)

    @classmethod
    async def for_handle(cls, handle: int, *, level: ImpersonationLevel = ImpersonationLevel.IMPERSONATE) -> "Token":
        """Whoever an access token of Windows is about, with the network credentials of its logon session.

        It is duplicated (DuplicateTokenEx): the handle stays the caller's, and may be closed at once.

        Args:
            handle: An open access token, primary or impersonation, with TOKEN_QUERY and TOKEN_DUPLICATE.
            level: How far the holder may go; no further than an impersonation token itself does.

        Raises:
            ImpersonationFailed: It is no token, is of a lower level, or this process may not impersonate it.
            BitsError: E_NOTIMPL: this is not Windows.
        """
        from .logon import for_handle

        return await for_handle(handle, level)

    @classmethod
    def for_thread(cls) -> "Token | None":
        """Whom the calling thread impersonates for Windows (a pipe's client, an RPC caller); None: nobody. As `for_handle`.

        What `impersonate()` surrounds a call with is not looked at: that is `current_token()`.
        """
        from .logon import for_thread

        return for_thread()

    @classmethod
    async def from_configuration(cls, path: "str | os.PathLike[str]") -> "Token":
        """The fixed identity that a TOML file describes: who, and where the keytab or the encrypted secret is (`identity.configured`).

        The file is opened as the ambient identity. Nothing is asked of a KDC yet. Under `impersonate()` of another user who is no
        administrator it makes him and nobody else: with his keytab, which is opened as him, and without the secrets of the process.

        Raises:
            InvalidArgument: Not such a file; a password stands in it.
            AccessDenied: Others may write it; or it names another user, or a secret of the process, and is such a user's. LocalFileError:
                It cannot be read.
            BitsError: The secret cannot be had. ImpersonationFailed: as `for_user`.
        """
        from .configured import from_configuration

        return await from_configuration(path)

    @classmethod
    def for_network(cls, network: "spnego.Credential") -> "Token":
        """This process on the machine, that credential on the network. Needs no privilege.

        Tickets are renewed in time, or got anew with the password or key. A cache that is named here stays as it is: what is renewed
        is kept in memory, and only while the cache has tickets of the same principal.
        """
        from .logon import for_network

        return for_network(network)

    @classmethod
    async def from_delegated(
        cls,
        context: object,
        *,
        local_user: "LocalUser | str | int | None" = None,
        delegate_to: "Iterable[DelegationTarget | str]" = (),
    ) -> "Token":
        """Whoever logged on to this service by Kerberos and let it act for him.

        Args:
            context: The service's own side of the login: a `gssapi.SecurityContext` with usage "accept", complete. The client
                delegated to it (a forwarded ticket), or the service's account may act for its callers (constrained delegation: its
                credentials have usage "both").
            local_user: Who he is on this machine; else nobody: he acts on the network only. See `LocalUser`.
            delegate_to: Origins that may be handed his forwarded ticket in turn. See `DelegationTarget`.

        Raises:
            ImpersonationFailed: It is no accepted login, nothing was delegated, the tickets are somebody else's, or `local_user`
                is refused.
        """
        from .logon import from_delegated

        return await from_delegated(context, local_user, delegate_to)

    def close(self) -> None:
        """Gives the token up early.

        Every later use raises TokenRequired. Running calls end first. The process's own token stays.
        """
        if self._shared:
            return  # for_process() hands the same token to everybody; one holder may not take it from the others
        object.__setattr__(self, "_closed", True)
        object.__setattr__(self, "_network", None)
        self._release()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a Token is never changed ({name})")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Token is never changed ({name})")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Token cannot be pickled: it is an authority of this process")

    def __repr__(self) -> str:
        return f"<Token {show_text(self.name)}>"


def _release_all(close: Callable[[], None], release: Callable[[], None] | None) -> None:
    try:
        close()
    finally:
        if release is not None:
            release()


@dataclass(frozen=True, slots=True)
class DelegationTarget:
    """Somebody who may be handed a ticket-granting ticket, and with it everything its user can do on the network (T20).

    Attributes:
        url: The origin, https: scheme, host and port.
        ok_as_delegate_only: Only while the realm itself marks the host's account as trusted for delegation.

    Raises:
        InvalidArgument: It is not https.
    """

    url: str
    ok_as_delegate_only: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not self.url.lower().startswith("https://"):
            raise InvalidArgument("a ticket-granting ticket is handed to https origins only", url=str(self.url))


@dataclass(frozen=True, slots=True)
class LocalUser:
    """Which user of this machine somebody from the network is: never guessed, always said (T9).

    Attributes:
        user: A name or a uid.
        realms: Whose principals may be mapped at all. Empty: those of the machine's default realm.
        system: Accounts below UID_MIN, root included, may be taken too.

    Raises:
        InvalidArgument: One of them is of another kind. (A realm that is one text would let in every realm whose name is a part of it.)
    """

    user: str | int
    realms: frozenset[str] = frozenset()
    system: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.user, bool) or not isinstance(self.user, str | int):
            raise InvalidArgument(f"a local user is a name or a uid, not {type(self.user).__name__}")
        if not isinstance(self.realms, frozenset) or not all(isinstance(each, str) for each in self.realms):
            raise InvalidArgument('realms is a frozenset of text: frozenset({"REALM"})')
        if not isinstance(self.system, bool):
            raise InvalidArgument(f"system is True or False, not {self.system!r}")


@dataclass(slots=True)
class TokenPair:
    """The two identities of a job, and which acts where."""

    owner: Token | None
    helper: Token | None = None
    use: HelperTokenFlags = HelperTokenFlags.NONE

    def acting_for(self, use: HelperTokenFlags) -> Token:
        """The token that acts for one of the two uses.

        Raises TokenRequired when that token is gone: it never falls back to the other.
        """
        who, token = ("helper", self.helper) if use & self.use else ("owner", self.owner)
        if token is None:
            raise TokenRequired(f"the {who}'s token, which acts for {use.name}, is gone")
        if token.closed:
            raise TokenRequired(f"the {who}'s token, which acts for {use.name}, was closed", identity=token.name)
        return token

    def check_today(self, token: Token, today: LocalIdentity) -> None:
        """Whether a token may still act, by what the machine says of its user today (T12).

        Raises TokenRequired when an owner who is no administrator would act by a helper that has become one since it set its token: he
        would not have been given that token (T10). An owner who became one acts by himself.
        """
        owner = self.owner
        if owner is None or token is owner or owner.elevated or token.elevated or not today.elevated:
            return
        message = "the helper has become an administrator since its token was made, and the owner is none"
        raise TokenRequired(message, identity=token.name, advice="let an elevated identity set the helper token anew, then resume the job")
