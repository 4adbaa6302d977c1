"""Who can act: `Token`, the pair of tokens a job has, and the identity that surrounds a call.

A token is two answers: how a thread becomes it (`local`) and what to show a server (`network`). The ambient identity
(`impersonate`) is a context variable; it never touches the operating system, whose identity is worn by the threads of
`identity.threads` alone.
Pure: this module does not know how a token is made (`logon`) or worn (`threads`), and asks the operating system for nothing.
"""

import enum
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from contextvars import Token as Undo
from dataclasses import dataclass
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn, Protocol, Self, final

from ..errors import TokenRequired, show_text

if TYPE_CHECKING:
    import spnego


class ImpersonationLevel(enum.Enum):
    """SECURITY_IMPERSONATION_LEVEL: how far the holder of a token may go with it."""

    ANONYMOUS = 0
    IDENTIFY = 1
    IMPERSONATE = 2
    DELEGATE = 3


class HelperTokenFlags(enum.Flag):
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
    """Someone who can act. Made by `for_process`, `for_user` and `for_network`; never changed, stored or sent.

    Attributes:
        name: For people: the local user's name, or the principal of a token made by `for_network`.
        sid: Who this is: "uid:1000", with network credentials "uid:1000:alice@REALM"; on Windows a SID.
        elevated: An administrator, or the process itself where it has an administrator's powers.
        level: How far the holder may go.
        local: How a thread becomes it.
        principal: The name its network credential claims; None without one, or when it is whoever the process is.
        has_credentials: Its maker gave it network credentials of its own.
        session: The logon session it ends with; None: it is not tied to one.
        fake: Made for tests; a real manager refuses it.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_network",
        "_release",
        "_shared",
        "elevated",
        "fake",
        "has_credentials",
        "level",
        "local",
        "name",
        "principal",
        "session",
        "sid",
    )

    name: str
    sid: str
    elevated: bool
    level: ImpersonationLevel
    local: LocalIdentity
    principal: str | None
    has_credentials: bool
    session: str | None
    fake: bool
    _network: "Callable[[], spnego.Credential] | None"
    _closed: bool
    _shared: bool
    _release: "weakref.finalize[[], Token]"

    def __init__(self) -> None:
        raise TypeError("a Token is made by Token.for_process(), Token.for_user() or Token.for_network()")

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
        level: ImpersonationLevel = ImpersonationLevel.IMPERSONATE,
        session: str | None = None,
        fake: bool = False,
    ) -> "Token":
        """For the makers in `logon` and `testing`.

        `default_network` makes it the token that everybody shares; it is asked at the first use, because it loads spnego.
        """
        self = object.__new__(cls)
        values = {
            "name": name or local.name,
            "sid": f"{local.key}:{principal}" if principal else local.key,
            "elevated": local.elevated,
            "level": level,
            "local": local,
            "principal": principal,
            "has_credentials": network is not None,
            "session": session,
            "fake": fake,
            "_network": default_network if network is None else lambda: network,
            "_closed": False,
            "_shared": default_network is not None,
            "_release": weakref.finalize(self, local.close),
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
    def for_network(cls, network: "spnego.Credential") -> "Token":
        """This process on the machine, that credential on the network. Needs no privilege."""
        from .logon import for_network

        return for_network(network)

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


# -- the ambient identity ---------------------------------------------------------------------------------------------

_ambient: ContextVar[Token | None] = ContextVar("bits_async_identity", default=None)


def current_token() -> Token:
    """The token of the innermost `impersonate()`, else the process's own."""
    return _ambient.get() or Token.for_process()


def impersonation() -> Token | None:
    """The token of the enclosing `impersonate()`; None outside of one and inside `revert_to_self()`."""
    return _ambient.get()


def impersonate(token: Token) -> AbstractContextManager[Token]:
    """Within `with impersonate(token):` jobs are made, opened and given helpers as `token`.

    It flows to tasks as context variables do, nests, and is undone when the block ends. `open()` and all else still run as
    the process.

    Raises:
        RuntimeError: It is entered twice, or from an async generator: a generator's block is shared with whoever iterates
            it, so its caller would silently act as `token` (T11).
    """
    if not isinstance(token, Token):
        raise TypeError(f"impersonate() takes a Token, not {type(token).__name__}")
    return _Impersonation(token, "impersonate")


def revert_to_self() -> AbstractContextManager[Token]:
    """Within `with revert_to_self():` the process's own identity is the ambient one again, whatever surrounds the block."""
    return _Impersonation(None, "revert_to_self")


class _Impersonation:
    """What impersonate() and revert_to_self() return: to be entered once, with `with`."""

    __slots__ = ("_entered", "_token", "_undo", "_what")

    def __init__(self, token: Token | None, what: str) -> None:
        self._token = token
        self._what = what
        self._entered = False
        self._undo: Undo[Token | None] | None = None

    def __enter__(self) -> Token:
        if self._entered:
            raise RuntimeError(f"{self._what}() is entered once; call it again")
        self._entered = True
        if _entered_by_async_generator(sys._getframe(1)):
            raise RuntimeError(f"{self._what}() cannot be entered in an async generator: its caller would get the identity too")
        token = self._token or Token.for_process()
        self._undo = _ambient.set(self._token)
        return token

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        undo, self._undo = self._undo, None
        if undo is None:
            return
        try:
            _ambient.reset(undo)
        except ValueError:
            raise RuntimeError(f"{self._what}() was left in another task than it was entered in") from None

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(f"{self._what}() was never entered: write `with {self._what}(...):`", RuntimeWarning, stacklevel=2, source=self)


def _entered_by_async_generator(frame: FrameType | None) -> bool:
    """Whether the block belongs to an async generator, directly or through contextlib's stacks and generators."""
    return any(each.f_code.co_flags & CO_ASYNC_GENERATOR for each in _with_statements(frame))


def _with_statements(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        hands_on = frame.f_code.co_flags & CO_GENERATOR or frame.f_globals.get("__name__") == "contextlib"
        frame = frame.f_back if hands_on else None
