"""Telling the application what became of a job: callbacks and notification commands (BITS: SetNotifyInterface, SetNotifyCmdLine).

What nobody may miss (a file is transferred, a job is transferred or in error) is marked as owed in the journal by the very transaction in
which it happens, and the mark goes when somebody was told: at least once, restarts included. What may be merged (modifications, ranges
that have come) is kept in memory and told at most once in the job's interval.

One task per job tells one thing after the other, files before the job's end, so a job's notifications keep their order; a command runs
where there is no callback, or the callback failed. Of one user at most `AT_ONCE` callbacks and as many commands are at work.

Races this module answers: what is told of happens again meanwhile (`turns`: only what was told is owed no longer); the callback completes
its own job (a job that has left the queue is told of no more); a callback or a command is replaced while it waits for its place (it is
looked for again when the place is there); a command is replaced by somebody else's (a token counts for the setter it was brought for).

Nothing here knows the handles that a callback is given, or how a command is run.
"""

import asyncio
import contextlib
import contextvars
import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import PurePath
from types import TracebackType
from typing import Any, Final, Protocol

from ..clock import Clock, sooner
from ..errors import BitsError, TokenRequired, show_text
from ..identity.tokens import Token
from ..transport.ranges import FileRange, joined
from .model import JOB_ENDS, FileRecord, JobRecord, NotifyFlags, OwnerKey, Waiting, WaitingReason

AT_ONCE: Final = 4  # notifications of one user (BITS: BG_NOTIFY)
FIRST_RETRY: Final = 5.0  # seconds after a callback failed; doubled each time, up to the job's MinimumRetryDelay
ONCE_AT_LEAST: Final = JOB_ENDS | NotifyFlags.FILE_TRANSFERRED
GRACE: Final = 15.0  # seconds for what was cancelled to end: a command's own way out takes as long

log = logging.getLogger("bits_async.jobs")

RunCommand = Callable[[Token, str, Sequence[str], Mapping[str, str]], Awaitable[int]]
"""Runs a program as the token: (token, program, whole argv, variables named BITS_...) -> exit status."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A callback, the handles it is given, and the context in which it was set, which it runs in.

    `user` is the sid of who set it.
    """

    callback: Any
    job: object
    file: Callable[[int], object]
    user: str
    context: contextvars.Context = field(repr=False)

    async def tell(self, what: NotifyFlags, *arguments: object) -> None:
        """Calls the method of that name, and awaits what it returns if that can be awaited. Raises whatever the callback does."""
        loop = asyncio.get_running_loop()
        await loop.create_task(self._call(what, arguments), name="bits-callback", context=self.context.copy())

    async def _call(self, what: NotifyFlags, arguments: Sequence[object]) -> None:
        assert what.name is not None
        answer = getattr(self.callback, what.name.lower())(self.job, *arguments)
        if inspect.isawaitable(answer):
            await answer


@dataclass(eq=False, slots=True)
class Outbox:
    """What a job has to tell, beside what its records say is owed, and to whom."""

    listener: Listener | None = None
    commander: tuple[OwnerKey, Token] | None = None  # who set the command, and the token it runs as
    modified: bool = False  # since the callback was told last
    ranges: dict[int, tuple[FileRange, ...]] = field(default_factory=dict)  # have come since then, by file
    turns: dict[int | None, int] = field(default_factory=lambda: defaultdict(int))  # how often a file (None: the job) was owed
    quiet_until: float = -math.inf  # monotonic: until then nothing is told that may be merged
    retry_at: float = -math.inf  # monotonic: until then nothing is told that is owed
    failures: int = 0  # in a row
    trouble: str = ""  # the last of them
    until: datetime | None = None  # when it is tried again
    task: asyncio.Task[None] | None = None
    telling: bool = False  # somebody is being told at this moment
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def recovered(self) -> None:
        """Somebody was told, or is to be asked anew: earlier failures count no more."""
        self.retry_at, self.failures, self.trouble, self.until = -math.inf, 0, "", None


class Subject(Protocol):
    """A job as this module sees it."""

    @property
    def job(self) -> JobRecord: ...

    @property
    def files(self) -> Sequence[FileRecord]: ...

    @property
    def owner(self) -> Token | None: ...

    @property
    def outbox(self) -> Outbox: ...


def commander(subject: Subject) -> Token | None:
    """The token that the job's command runs as: its setter's; None: there is none now."""
    setter, found = subject.job.notify_setter, subject.outbox.commander
    if found is not None and found[0] == setter and not found[1].closed:
        return found[1]
    return subject.owner if setter == subject.job.owner and subject.owner is not None and not subject.owner.closed else None


@dataclass(frozen=True, slots=True)
class Due:
    """What is told next: of a file, or of the job (file None)."""

    what: NotifyFlags
    file: int | None = None


def owed(subject: Subject) -> Due | None:
    """What must be told first: of the files in their order, then of the job. None: nothing, or there is nobody who wants to hear it."""
    job, listener = subject.job, subject.outbox.listener
    if job.state.is_final or (listener is None and job.notify_cmd_line is None):
        return None
    if listener is not None and NotifyFlags.FILE_TRANSFERRED in job.notify_flags:
        for file in subject.files:
            if file.owed and file.transferred:
                return Due(NotifyFlags.FILE_TRANSFERRED, file.index)
    for end in job.owed & job.notify_flags & JOB_ENDS:
        return Due(end)
    return None


def _mergeable(subject: Subject) -> Due | None:
    """What may wait and is told once for all that happened meanwhile."""
    box, flags = subject.outbox, subject.job.notify_flags
    if box.listener is None or subject.job.state.is_final:
        return None
    if box.ranges and NotifyFlags.FILE_RANGES_TRANSFERRED in flags:
        return Due(NotifyFlags.FILE_RANGES_TRANSFERRED, min(box.ranges))
    return Due(NotifyFlags.JOB_MODIFICATION) if box.modified and NotifyFlags.JOB_MODIFICATION in flags else None


def next_due(subject: Subject, now: float, *, commands: bool) -> Due | float:
    """What to tell now, or the monotonic time when something is; infinity: nothing until something happens."""
    box, first, other = subject.outbox, owed(subject), _mergeable(subject)
    if box.listener is None and not (commands and commander(subject) is not None):
        first = None  # only a command could be told, and it cannot run
    if first is not None and box.retry_at <= now:
        # ranges that have come belong before it; a modification that is pending is told with it
        return other if other is not None and other.what is NotifyFlags.FILE_RANGES_TRANSFERRED else first
    if other is not None and box.quiet_until <= now:
        return other
    return min(math.inf if first is None else box.retry_at, math.inf if other is None else box.quiet_until)


class Notifier:
    """Tells the listeners of all jobs of one engine, and runs their commands.

    Args:
        clock: the engine's.
        task: starts a task in an empty context.
        told: journals that somebody was told of a file, or (None) of the job's end, unless it was owed again since (by its turn).
        changed: what a job waits for has changed.
        run_command: how a command is run.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        task: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        told: Callable[[Any, int | None, int], Awaitable[None]],
        changed: Callable[[Any], None],
        run_command: RunCommand,
    ) -> None:
        self.commands = False  # whether commands are run
        self._clock = clock
        self._task = task
        self._told = told
        self._changed = changed
        self._run_command = run_command
        self._closing = False
        self._places: dict[tuple[str, str], asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE))
        self._at_work: dict[asyncio.Task[None], Outbox] = {}

    # -- what happened ----------------------------------------------------------------------------------------------------------------

    def look(self, subject: Subject) -> None:
        """Something of the job, of who listens to it or of the tokens has changed: whatever can be told now is."""
        box = subject.outbox
        if self._closing:
            return
        if box.task is not None:
            box.news.set()
        elif not (box.listener is None and subject.job.notify_cmd_line is None) and self._next(subject) != math.inf:
            box.task = self._task(self._serve(subject), f"bits-notify-{subject.job.id}")
            self._at_work[box.task] = box
            box.task.add_done_callback(self._at_work.pop)

    def modified(self, subject: Subject) -> None:
        """The job has changed: a property, its state (but for TRANSFERRED and ERROR), or how many bytes there are."""
        if subject.outbox.listener is not None and NotifyFlags.JOB_MODIFICATION in subject.job.notify_flags:
            subject.outbox.modified = True
            self.look(subject)

    def arrived(self, subject: Subject, index: int, ranges: Iterable[FileRange]) -> None:
        """On demand: these bytes of a file are there for good."""
        box = subject.outbox
        if box.listener is not None and NotifyFlags.FILE_RANGES_TRANSFERRED in subject.job.notify_flags:
            box.ranges[index] = joined((*box.ranges.get(index, ()), *ranges))
            self.look(subject)

    def listen(self, subject: Subject, listener: Listener | None) -> None:
        """Another callback, or none; what is owed is told at once."""
        box = subject.outbox
        box.listener = listener
        box.modified = False
        box.ranges.clear()
        box.recovered()
        self.look(subject)

    def commanded(self, subject: Subject) -> None:
        """Another command, or another token for it."""
        subject.outbox.recovered()
        self.look(subject)

    def waiting(self, subject: Subject) -> Waiting | None:
        """Why something that is owed was not told yet; None: nothing is, or it is on its way."""
        due, box, setter = owed(subject), subject.outbox, subject.job.notify_setter
        if due is None:
            return None
        trouble, without = box.trouble, setter is not None and commander(subject) is None
        if setter is not None and without and due.what in JOB_ENDS and (box.listener is None or trouble):
            waits = f"the command waits for the token of {setter.name}"
            trouble = f"{trouble}; {waits}" if trouble else waits
        return Waiting(WaitingReason.NOTIFICATION, box.until, trouble) if trouble else None

    def waits_for_owner(self, subject: Subject) -> bool:
        """Whether a command is owed that runs as the job's owner, whose token is not here."""
        job, due = subject.job, owed(subject)
        mine = job.notify_setter is not None and job.notify_setter == job.owner
        return self.commands and mine and due is not None and due.what in JOB_ENDS and commander(subject) is None

    def halt(self) -> None:
        """Begin to tell nothing more; what is being told is told to its end."""
        self._closing = True

    def go_on(self) -> None:
        """Tell again. Whose news are to be looked at says the engine: also what was told and could not be journalled as told."""
        self._closing = False

    async def stop(self, grace: float) -> None:
        """Tell nobody any more. Callbacks and commands that are at work have `grace` seconds to end, and are then cancelled; what they
        were told of stays owed."""
        self.halt()
        for task, box in self._at_work.items():
            if not box.telling:
                task.cancel()
        for patience in (grace, GRACE):
            if self._at_work:
                await asyncio.wait(list(self._at_work), timeout=patience)
            for task in self._at_work:
                log.warning("a notification did not end within %.1f s", patience)
                task.cancel()

    # -- telling ----------------------------------------------------------------------------------------------------------------------

    async def _serve(self, subject: Subject) -> None:
        """Tell what is to be told, until there is nothing more."""
        box = subject.outbox
        try:
            while not self._closing:
                box.news.clear()
                due = self._next(subject)
                if isinstance(due, Due):
                    await self._deliver(subject, due)
                elif due == math.inf:
                    break
                else:
                    await sooner(box.news, self._timer(due))
        except BitsError:
            pass  # the journal cannot be used: it is told again when it can, in this process or in the next
        except Exception as error:
            log.error("job %s: a defect in bits_async ended its notifications", subject.job.id, exc_info=error)
        finally:
            box.task = None

    async def _timer(self, moment: float) -> None:
        await self._clock.sleep(moment - self._clock.monotonic())  # less than was left when the moment was found

    async def _deliver(self, subject: Subject, due: Due) -> None:
        """To the callback; where there is none or it failed, a job's end to the command. What is owed is tried again later."""
        box, turn = subject.outbox, subject.outbox.turns[due.file]
        failures: list[str] = []
        if box.listener is not None:
            failure = await self._to_callback(subject, due)
            if not failure:
                if failure is not None and due.what in ONCE_AT_LEAST:
                    await self._settle(subject, due, turn)
                return
            failures.append(failure)
        if due.what in JOB_ENDS:
            failure = await self._to_command(subject, due)
            if failure == "":
                await self._settle(subject, due, turn)
                return
            failures += [failure] if failure else []
        if failures and owed(subject) == due:
            self._failed(subject, due, "; ".join(failures))

    async def _settle(self, subject: Subject, due: Due, turn: int) -> None:
        trouble = subject.outbox.trouble
        subject.outbox.recovered()
        with _at_work(subject.outbox):
            await self._told(subject, due.file, turn)
        if trouble and not subject.job.state.is_final:
            self._changed(subject)

    async def _to_callback(self, subject: Subject, due: Due) -> str | None:
        """What went wrong; nothing (""); None: nothing was told, because something changed while it waited for its place."""
        listener = subject.outbox.listener
        assert listener is not None
        async with self._places["callback", listener.user]:
            if self._closing or subject.outbox.listener is not listener or self._next(subject) != due:
                return None
            return await self._call(subject, listener, due)

    async def _to_command(self, subject: Subject, due: Due) -> str | None:
        """As `_to_callback`."""
        token = commander(subject)
        if token is None or not self.commands:
            return None
        async with self._places["command", token.sid]:
            if self._closing or commander(subject) is not token or not self._may_command(subject) or owed(subject) != due:
                return None
            return await self._command(subject, token, due)

    def _next(self, subject: Subject) -> Due | float:
        return next_due(subject, self._clock.monotonic(), commands=self.commands)

    def _may_command(self, subject: Subject) -> bool:
        return self.commands and subject.job.notify_cmd_line is not None and commander(subject) is not None

    async def _call(self, subject: Subject, listener: Listener, due: Due) -> str:
        """Calls the callback; returns what went wrong, in a few words without a secret."""
        box, job = subject.outbox, subject.job
        arguments: list[object] = [] if due.file is None else [listener.file(due.file)]
        if due.what is NotifyFlags.JOB_ERROR:
            arguments.append(job.error)
        elif due.what is NotifyFlags.FILE_RANGES_TRANSFERRED:
            assert due.file is not None
            arguments.append(box.ranges.pop(due.file))
        if due.what in (NotifyFlags.FILE_RANGES_TRANSFERRED, NotifyFlags.JOB_MODIFICATION):
            box.quiet_until = self._clock.monotonic() + job.minimum_notification_interval
        if due.what is not NotifyFlags.FILE_RANGES_TRANSFERRED and due.file is None:
            box.modified = False  # whoever looks at the job now sees it
        try:
            with _at_work(box):
                await listener.tell(due.what, *arguments)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            failure = "it was cancelled"
        except Exception as error:  # an application's callback may raise anything
            failure = _shown(error)
        else:
            return ""
        assert due.what.name is not None
        log.warning("job %s: its callback's %s failed: %s", job.id, due.what.name.lower(), failure)
        return f"the callback failed: {failure}"

    async def _command(self, subject: Subject, token: Token, due: Due) -> str:
        """Runs the command; returns what went wrong, in a few words without a secret."""
        job = subject.job
        line = job.notify_cmd_line
        assert line is not None
        error = f"0x{job.error.code:08X}" if job.error is not None and due.what is NotifyFlags.JOB_ERROR else "0x00000000"
        variables = {"BITS_JOB_ID": str(job.id), "BITS_JOB_STATE": job.state.name, "BITS_JOB_ERROR": error}
        try:
            with _at_work(subject.outbox):
                status = await self._run_command(token, line.program, line.parameters, variables)
        except BitsError as exc:
            failure = "its setter's token is gone" if isinstance(exc, TokenRequired) else show_text(exc.message, 200)
        else:
            if status == 0:
                log.info("job %s: its notification command has run as %s", job.id, token.name)
                return ""
            failure = f"it ended with status {status}"
        log.warning("job %s: its notification command failed: %s", job.id, failure)
        return f"the command failed: {failure}"

    def _failed(self, subject: Subject, due: Due, failure: str) -> None:
        box, delay = subject.outbox, subject.job.minimum_retry_delay
        if due.what not in JOB_ENDS or not self._may_command(subject):  # a callback alone
            delay = min(FIRST_RETRY * 2 ** min(box.failures, 30), delay)
        box.failures += 1
        box.trouble = failure
        box.retry_at = self._clock.monotonic() + delay
        box.until = self._clock.now() + timedelta(seconds=delay)
        self._changed(subject)


@contextlib.contextmanager
def _at_work(box: Outbox) -> Any:
    box.telling = True
    try:
        yield
    finally:
        box.telling = False


def _shown(error: Exception) -> str:
    """The error without its text, which may hold secrets (those of this package are written without), and where it was raised."""
    if isinstance(error, BitsError):
        return show_text(error.message, 200)
    trace: TracebackType | None = error.__traceback__
    where = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        where = f" ({PurePath(code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return type(error).__name__ + where
