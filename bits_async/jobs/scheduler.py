"""Who runs next, and when a failed job tries again. Pure: it is told the time and answers.

BITS's rules ("About BITS", "Life Cycle of a BITS Job"): every FOREGROUND job runs at once; of the others `Limits.background_jobs` run, HIGH
before NORMAL before LOW, those of one class in turn, a time slice each. A job of a higher class takes the place of a running lower one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from ..errors import BitsError, InvalidArgument
from .model import MOST_SECONDS, RETRY_DELAY_FLOOR, JobPriority, JobState

TIME_SLICE: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may happen at once.

    Attributes:
        background_jobs: jobs below FOREGROUND that transfer at the same time, 1 or more.
        time_slice: seconds after which a running background job lets another one of its priority go on, if one waits.
        connections_per_host: connections to one host and port (of the proxy, where there is one), 1 or more.
        jobs_per_user: unfinished jobs of one owner; None: any number. Elevated owners are exempt from this and the next three.
        jobs_per_machine: unfinished jobs in the queue; None: any number.
        files_per_job: None: any number.
        ranges_per_file: ranges of one file (`Job.add_file_with_ranges`); None: any number.
        name_length: characters of a local name, and of each segment of a URL's path; None: as many as the system takes.
        job_inactivity_timeout: seconds without progress or change after which a job is cancelled, its part files with it; None: never.
        disk_reserve: bytes of a volume that are never preallocated for a file; what has arrived is written there all the same.
    """

    background_jobs: int = 1
    time_slice: float = TIME_SLICE
    connections_per_host: int = 8
    jobs_per_user: int | None = None
    jobs_per_machine: int | None = None
    files_per_job: int | None = None
    ranges_per_file: int | None = None
    name_length: int | None = None
    job_inactivity_timeout: float | None = None
    disk_reserve: int = 64 << 20

    def __post_init__(self) -> None:
        counts = ("background_jobs", "connections_per_host", "jobs_per_user", "jobs_per_machine", "files_per_job")
        for name in (*counts, "ranges_per_file", "name_length"):
            value = getattr(self, name)
            unlimited = value is None and name not in ("background_jobs", "connections_per_host")
            if not unlimited and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidArgument(f"Limits({name}=) takes a whole number from 1, not {value!r}")
        if isinstance(self.disk_reserve, bool) or not isinstance(self.disk_reserve, int) or self.disk_reserve < 0:
            raise InvalidArgument(f"Limits(disk_reserve=) takes bytes, 0 or more, not {self.disk_reserve!r}")
        timeout = self.job_inactivity_timeout
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= MOST_SECONDS):
            raise InvalidArgument(
                f"Limits(job_inactivity_timeout=) takes seconds, more than 0 and at most {MOST_SECONDS:,}, not {timeout!r}"
            )
        if isinstance(self.time_slice, bool) or not isinstance(self.time_slice, int | float) or not self.time_slice > 0:
            raise InvalidArgument("Limits(time_slice=) takes a positive number of seconds")

    @classmethod
    def windows(cls) -> "Limits":
        """BITS's own limits ("Group Policies"): 60 jobs per user, 300 per machine, 200 files per job, 500 ranges per file, names of 260
        characters, 90 days without activity."""
        return cls(
            jobs_per_user=60,
            jobs_per_machine=300,
            files_per_job=200,
            ranges_per_file=500,
            name_length=260,
            job_inactivity_timeout=90 * 86400.0,
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the scheduler knows of a job. `turn` grows each time the job has had its time slice."""

    id: UUID
    state: JobState
    priority: JobPriority
    turn: int
    ready: bool  # its owner's token is there
    slice_over: bool = False  # it is running and its time slice has ended


@dataclass(frozen=True, slots=True)
class Choice:
    """Jobs to start now, and running jobs that must yield first."""

    start: tuple[UUID, ...]
    yield_: tuple[UUID, ...]


def choose(jobs: Iterable[Candidate], limits: Limits) -> Choice:
    """Which queued jobs start, and which running background jobs go back to the queue."""
    start: list[UUID] = []
    running: list[Candidate] = []
    waiting: list[Candidate] = []
    for job in jobs:
        if job.state is JobState.QUEUED and job.ready:
            if job.priority is JobPriority.FOREGROUND:
                start.append(job.id)
            else:
                waiting.append(job)
        elif job.state.is_active and job.priority is not JobPriority.FOREGROUND:
            running.append(job)
    waiting.sort(key=_order)
    running.sort(key=_order)
    free = limits.background_jobs - len(running)
    start += [job.id for job in waiting[: max(0, free)]]
    return Choice(tuple(start), tuple(_yielding(running, waiting[max(0, free) :], max(0, -free))))


def _order(job: Candidate) -> tuple[int, int]:
    return job.priority.value, job.turn


def _yielding(running: Sequence[Candidate], waiting: Sequence[Candidate], surplus: int) -> list[UUID]:
    """The running jobs that make room: the least important first, for a more important waiter or for an equal one after the time slice."""
    out = [job.id for job in running[len(running) - surplus :]] if surplus else []
    rest = list(running[: len(running) - surplus])
    for waiter in waiting:
        if not rest:
            break
        last = rest[-1]
        if waiter.priority.value < last.priority.value:
            out.append(rest.pop().id)
            continue
        over = next((job for job in rest if job.slice_over and job.priority is waiter.priority), None)
        if over is None:
            break
        rest.remove(over)
        out.append(over.id)
    return out


def retry_delay(minimum: float, error: BitsError) -> float:
    """Seconds until the next attempt: the job's delay (5 s at least), or longer when the server asked for it (RFC 9110, 10.2.3)."""
    delay = max(minimum, RETRY_DELAY_FLOOR)
    if error.retry_after is not None and math.isfinite(error.retry_after):
        delay = max(delay, error.retry_after)
    return delay


def may_retry(error: BitsError, *, stalled: float, delay: float, no_progress_timeout: float) -> bool:
    """Whether a transient error is followed by another attempt.

    BITS ("SetNoProgressTimeout"): 0 makes every error fatal, and a job whose delay is longer than what is left of the timeout does not
    wait for it.
    """
    return error.transient and no_progress_timeout > 0 and stalled + delay <= no_progress_timeout
