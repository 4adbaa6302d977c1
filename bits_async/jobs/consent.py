"""What a helper saw before it set its token: a change of it that the helper does not make itself takes the token from the job (T8)."""

import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from ..errors import ImpersonationFailed, show_text
from ..identity.ambient import impersonation
from ..identity.tokens import Token
from .desk import Desk
from .roster import Entry

log = logging.getLogger("bits_async.jobs")


class _Handle(Protocol):
    """What setters belong to."""

    def _called_by(self, changer: Token | None) -> Self: ...


H = TypeVar("H", bound=_Handle)
P = ParamSpec("P")
T = TypeVar("T")
Setter = Callable[Concatenate[H, P], Coroutine[Any, Any, T]]


def seen_by_the_helper(setter: Setter[H, P, T]) -> Setter[H, P, T]:
    """Marks a setter of something that a helper saw before it set its token (T8), and that reads or writes otherwise as the helper.

    Who calls is found at the call itself (T11): the enclosing `impersonate()`. Without one it is nobody: a service whose code forgot it,
    or that holds a handle which somebody else opened, does not speak for its own token.
    """

    @functools.wraps(setter)
    def call(self: H, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        return setter(self._called_by(impersonated()), *args, **kwargs)

    return call


def impersonated() -> Token | None:
    """The token of the enclosing `impersonate()`; None: there is none, or it does not flow here."""
    try:
        return impersonation()
    except ImpersonationFailed:
        return None


async def change_what_the_helper_saw(desk: Desk, entry: Entry, changer: Token | None, what: str) -> None:
    """For a command that changes what a job reads, sends and writes. The helper agreed to what it saw: a change that it does not make
    itself, under its own identity, takes its token from the job (T8: else the owner drives the helper)."""
    helper = entry.helper
    if helper is None or (changer is not None and desk.door.is_same(changer, helper)):
        return
    log.warning(
        "job %s: %s changed, and the helper token of %s is dropped: it was set before that", entry.job.id, what, show_text(helper.name)
    )
    await desk.engine.replace_helper(entry, None)
