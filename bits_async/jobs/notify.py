"""What happened to a job, and who hears of it.

Events are frozen values; a stream is one reader's queue of them. The engine never waits for a reader: unread progress of a job is merged
into its newest, and a reader who falls 1,000 other events behind is told how many it lost and how the job stands now.
"""

import asyncio
import enum
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import UUID

from ..errors import BitsError, code_name
from .model import JobProgress, JobState, Waiting

UNREAD_EVENTS: Final = 1000


@dataclass(frozen=True, kw_only=True)
class _Happened:
    time: datetime
    job_id: UUID

    def as_dict(self) -> dict[str, Any]:
        """The event as JSON-ready values; `event` is the name of its class."""
        return {"event": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


def _plain(value: Any) -> Any:
    if isinstance(value, BitsError):
        where = {"url": value.url, "path": _plain(value.path), "identity": value.identity, "http_status": value.http_status}
        code = {"code": f"0x{value.code:08X}", "name": code_name(value.code), "context": value.context.name}
        return {**code, "message": value.message, "transient": value.transient, **where, "advice": value.advice}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID | Path | Waiting):
        return str(value)
    if isinstance(value, JobProgress):
        return {name: getattr(value, name) for name in ("bytes_total", "bytes_transferred", "files_total", "files_transferred")}
    return value


@dataclass(frozen=True, kw_only=True)
class JobChanged(_Happened):
    """The job's state, or what it waits for, has changed; the first item of every stream is one."""

    state: JobState
    waiting: Waiting | None
    error: BitsError | None
    progress: JobProgress


@dataclass(frozen=True, kw_only=True)
class Progress(_Happened):
    """Bytes have arrived. Unread ones are merged into the newest. `waiting`: why nothing moves, if nothing does."""

    state: JobState
    waiting: Waiting | None = None
    bytes_total: int | None
    bytes_transferred: int
    files_total: int
    files_transferred: int


@dataclass(frozen=True, kw_only=True)
class FileTransferred(_Happened):
    """Every byte of a file is in its part file, durable and checked. `url` is shown without its query."""

    url: str
    path: Path
    size: int


@dataclass(frozen=True, kw_only=True)
class FileRestarted(_Happened):
    """A file is fetched anew from its first byte, because the remote file changed or the part file could not be used."""

    url: str
    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Retrying(_Happened):
    """A connection broke after new bytes and is opened again at once (`delay` seconds); the job is still TRANSFERRING."""

    number: int
    delay: float
    error: BitsError


@dataclass(frozen=True, kw_only=True)
class EventsLost(_Happened):
    """The reader was too slow: `count` events of this job were dropped. A `JobChanged` with the job as it is follows."""

    count: int


Event = JobChanged | Progress | FileTransferred | FileRestarted | Retrying | EventsLost
"""One thing that happened, as an `EventStream` gives it; match on its class. `time` is aware UTC."""


class EventStream(AsyncIterator[Event], AbstractAsyncContextManager["EventStream"]):
    """Events of one job, or of many, from the moment it was asked for. Close it, or leave its `async with`, to stop listening."""

    def __init__(
        self,
        *,
        wants: Callable[[UUID], bool],
        snapshot: Callable[[UUID], Awaitable[JobChanged | None]],
        ends: Callable[[JobState], bool],
        closed: Callable[["EventStream"], None],
    ) -> None:
        self._wants = wants
        self._snapshot = snapshot
        self._ends = ends
        self._closed = closed
        self._queue: deque[Event | UUID] = deque()  # a job's id stands for its merged progress
        self._progress: dict[UUID, Progress] = {}
        self._unread = 0
        self._lost: dict[UUID, int] = {}
        self._ended = False
        self._failure: BitsError | None = None
        self._ready = asyncio.Event()

    def publish(self, event: Event) -> None:
        """Hand an event to the reader; never waits, never raises."""
        if self._ended or not self._wants(event.job_id):
            return
        if isinstance(event, Progress):
            if event.job_id not in self._progress:
                self._queue.append(event.job_id)
            self._progress[event.job_id] = event
        else:
            self._push(event)
        self._ready.set()

    def _push(self, event: Event) -> None:
        if self._unread >= UNREAD_EVENTS:
            self._drop_unread()
        if self._lost:
            self._lost[event.job_id] = self._lost.get(event.job_id, 0) + 1
        else:
            # progress that is still unread keeps its place before this event; later progress queues behind it
            if event.job_id in self._progress:
                self._queue[self._queue.index(event.job_id)] = self._progress.pop(event.job_id)
            self._queue.append(event)
            self._unread += 1
        if isinstance(event, JobChanged) and self._ends(event.state):
            self._ended = True

    def _drop_unread(self) -> None:
        for item in self._queue:
            if not isinstance(item, UUID | Progress):
                self._lost[item.job_id] = self._lost.get(item.job_id, 0) + 1
        self._queue.clear()
        self._progress.clear()
        self._unread = 0

    def finish(self, failure: BitsError | None = None) -> None:
        """No more events; a failure is raised to the reader once it has read what is there."""
        self._ended = True
        self._failure = failure
        self._ready.set()

    async def __anext__(self) -> Event:
        while True:
            if self._lost and not self._queue:
                await self._recover()
            event = self._next()
            if event is not None:
                return event
            if self._ended:
                self._leave()
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()

    def _next(self) -> Event | None:
        if not self._queue:
            return None
        item = self._queue.popleft()
        if isinstance(item, UUID):
            return self._progress.pop(item)
        if not isinstance(item, Progress):
            self._unread -= 1
        return item

    async def _recover(self) -> None:
        for job_id in list(self._lost):
            now = await self._snapshot(job_id)
            count = self._lost.pop(job_id, 0)  # what came while the job was read is in the snapshot, or lost with the others
            if now is not None and count:
                self._queue += [EventsLost(time=now.time, job_id=job_id, count=count), now]
                self._unread += 2

    def _leave(self) -> None:
        self._ended = True
        self._closed(self)

    async def aclose(self) -> None:
        """Stop listening; what is unread is dropped."""
        self._queue.clear()
        self._progress.clear()
        self._lost.clear()
        self._leave()
        self._ready.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        await self.aclose()
