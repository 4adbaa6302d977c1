"""The identity that surrounds a call: `impersonate()`, `revert_to_self()`, and how far they reach.

It is a context variable and never touches the operating system, whose identity is worn by the threads of `identity.threads` alone.
Nothing of the standard library is patched: where a context variable does not go, `carry()` takes the identity along.
"""

import asyncio
import enum
import functools
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from contextvars import Token as Undo
from dataclasses import dataclass
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from ..errors import ImpersonationFailed
from .tokens import Token

P = ParamSpec("P")
T = TypeVar("T")


class TokenFlow(enum.Enum):
    """How far an identity reaches beyond the code that took it on; of the whole process, see `set_token_flow`.

    It mirrors the two switches of .NET (`legacyImpersonationPolicy`, `alwaysFlowImpersonationPolicy`). Where an identity does not reach
    there is none: `current_token()` raises, and nothing falls back to the process's own (T10).

    |         | in `impersonate()` | tasks, callbacks, `to_thread` begun there | in `run_as()` | tasks, callbacks begun there |
    |---------|--------------------|----------------------------------------|---------------|------------------------------|
    | NEVER   | yes                | no                                     | yes           | no                           |
    | MANAGED | yes                | yes                                    | yes           | no                           |
    | ALWAYS  | yes                | yes                                    | yes           | yes                          |
    """

    NEVER = "never"
    MANAGED = "managed"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an identity was taken on: a thread, and in it a task, a loop's callback, or neither."""

    thread: int
    task: "weakref.ref[asyncio.Task[Any]] | None"
    looping: bool

    @classmethod
    def here(cls) -> "_Place":
        try:
            task, looping = asyncio.current_task(), True
        except RuntimeError:  # no loop runs in this thread
            task, looping = None, False
        return cls(threading.get_ident(), None if task is None else weakref.ref(task), looping)


class _Block:
    """A `with` block. Two callbacks of a loop are in one place: only its end tells the one that took an identity on from a later one."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = False


@dataclass(frozen=True, slots=True)
class _Worn:
    """A token that surrounds a call; `native`: the thread is the token, for the operating system too."""

    token: Token
    place: _Place
    block: _Block
    native: bool

    @property
    def reaches_here(self) -> bool:
        flows = _flow is TokenFlow.ALWAYS or (_flow is TokenFlow.MANAGED and not self.native)
        return flows or (not self.block.left and self.place == _Place.here())


_ambient: ContextVar[_Worn | None] = ContextVar("bits_async_identity", default=None)
_flow = TokenFlow.MANAGED


def set_token_flow(flow: TokenFlow) -> TokenFlow:
    """Decide for this process how far identities reach; returns what was decided before. Call it once, at the start."""
    global _flow
    if not isinstance(flow, TokenFlow):
        raise TypeError(f"set_token_flow() takes a TokenFlow, not {type(flow).__name__}")
    before, _flow = _flow, flow
    return before


def current_token() -> Token:
    """The token of the innermost `impersonate()` or `run_as()`, else the process's own.

    Raises:
        ImpersonationFailed: that identity does not flow here (`TokenFlow`).
    """
    return impersonation() or Token.for_process()


def impersonation() -> Token | None:
    """The token of the enclosing `impersonate()`; None outside of one and inside `revert_to_self()`.

    Raises:
        ImpersonationFailed: that identity does not flow here (`TokenFlow`).
    """
    worn = _ambient.get()
    if worn is None:
        return None
    if not worn.reaches_here:
        message = f"by the token flow policy {_flow.name} no identity flows to this task or thread; take it along with carry()"
        raise ImpersonationFailed(message, identity=worn.token.name)
    return worn.token


def impersonate(token: Token) -> AbstractContextManager[Token]:
    """Within `with impersonate(token):` jobs are made, opened and given helpers as `token`.

    It flows to tasks as context variables do (`TokenFlow`), nests, and is undone when the block ends. `open()` and all else still run as
    the process.

    Raises:
        RuntimeError: It is entered twice, or from an async generator: a generator's block is shared with whoever iterates
            it, so its caller would silently act as `token` (T11).
    """
    if not isinstance(token, Token):
        raise TypeError(f"impersonate() takes a Token, not {type(token).__name__}")
    return _Impersonation(token, "impersonate")


def worn_by_thread(token: Token) -> AbstractContextManager[Token]:
    """`impersonate()` for a thread that the operating system knows as the token, too."""
    return _Impersonation(token, "run_as", native=True)


def revert_to_self() -> AbstractContextManager[Token]:
    """Within `with revert_to_self():` the process's own identity is the ambient one again, whatever surrounds the block."""
    return _Impersonation(None, "revert_to_self")


def carry(func: Callable[P, T]) -> Callable[P, T]:
    """The function, to be called elsewhere under the identity that is the ambient one now; a coroutine function stays one.

    For what no context variable reaches: `threading.Thread`, `loop.run_in_executor`, a pool. It also goes where the flow policy lets
    nothing go: calling it is the decision. Without an enclosing `impersonate()` the function runs under the process's own.

    Raises:
        ImpersonationFailed: no identity flows to where `carry()` was called.
    """
    token = impersonation()

    def identity() -> AbstractContextManager[Token]:
        return revert_to_self() if token is None else impersonate(token)

    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def carried_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
            with identity():
                return await func(*args, **kwargs)

        return cast(Callable[P, T], carried_coroutine)
    if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        raise TypeError("carry() takes no generator function: its caller would get the identity between two items")

    @functools.wraps(func)
    def carried(*args: P.args, **kwargs: P.kwargs) -> T:
        with identity():
            return func(*args, **kwargs)

    return carried


class _Impersonation:
    """What impersonate() and revert_to_self() return: to be entered once, with `with`."""

    __slots__ = ("_block", "_entered", "_native", "_token", "_undo", "_what")

    def __init__(self, token: Token | None, what: str, *, native: bool = False) -> None:
        self._token = token
        self._what = what
        self._native = native
        self._entered = False
        self._block = _Block()
        self._undo: Undo[_Worn | None] | None = None

    def __enter__(self) -> Token:
        if self._entered:
            raise RuntimeError(f"{self._what}() is entered once; call it again")
        self._entered = True
        if _entered_by_async_generator(sys._getframe(1)):
            raise RuntimeError(f"{self._what}() cannot be entered in an async generator: its caller would get the identity too")
        token = self._token or Token.for_process()
        self._undo = _ambient.set(None if self._token is None else _Worn(self._token, _Place.here(), self._block, self._native))
        return token

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        undo, self._undo = self._undo, None
        self._block.left = True
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
