"""What a job is: its states as one table, its priorities, and the records the journal keeps of it.

Pure: nothing here waits, opens or sends. A row of `NEXT` is a sentence ("a TRANSFERRING job that was suspended is SUSPENDED"); a pair
without a row is an error of the caller (`InvalidState`). The states are those of BITS ("Life Cycle of a BITS Job"); the life cycle as a
diagram is drawn from the table by `mermaid()`.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self, final
from uuid import UUID

from ..auth.policy import AuthScheme, AuthTarget, Grant, Origin
from ..errors import BitsError, ErrorCode, InvalidState
from ..identity.tokens import HelperTokenFlags
from ..transport.digests import NO_DIGESTS, Digests
from ..transport.options import HttpOptions
from ..transport.proxies import ProxySettings
from ..transport.ranges import FileRange, Slice, Validator, complete, filled, local_size, missing

if TYPE_CHECKING:
    from ..files.records import PartRecord

RETRY_DELAY: Final = 600.0  # seconds between a transient error and the next attempt
RETRY_DELAY_FLOOR: Final = 5.0
NO_PROGRESS_TIMEOUT: Final = 14 * 86400.0
MAX_DOWNLOAD_TIME: Final = 90 * 86400.0
MOST_SECONDS: Final = 2**32 - 1  # BITS counts them in 32 bits; a date that is further away than this is in no calendar
NOTIFICATION_INTERVAL: Final = 0.5  # seconds between two modifications that a callback is told of


class JobState(enum.Enum):
    """BG_JOB_STATE."""

    QUEUED = 0
    CONNECTING = 1
    TRANSFERRING = 2
    SUSPENDED = 3
    ERROR = 4
    TRANSIENT_ERROR = 5
    TRANSFERRED = 6
    ACKNOWLEDGED = 7
    CANCELLED = 8

    @property
    def is_final(self) -> bool:
        """The job has left the queue: ACKNOWLEDGED or CANCELLED."""
        return self in (JobState.ACKNOWLEDGED, JobState.CANCELLED)

    @property
    def is_settled(self) -> bool:
        """Nothing more happens by itself: final, TRANSFERRED or ERROR."""
        return self.is_final or self in (JobState.TRANSFERRED, JobState.ERROR)

    @property
    def is_active(self) -> bool:
        """An attempt is running: CONNECTING or TRANSFERRING."""
        return self in (JobState.CONNECTING, JobState.TRANSFERRING)


class JobPriority(enum.Enum):
    """BG_JOB_PRIORITY. FOREGROUND jobs all run at once; of the others one runs at a time, HIGH before NORMAL before LOW."""

    FOREGROUND = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class CostFlags(enum.Flag, boundary=enum.STRICT):
    """BITS_COST_STATE: what a connection costs, and, as a set of these, at which costs a job may run (the five TRANSFER_ values)."""

    UNRESTRICTED = 0x1
    CAPPED_USAGE_UNKNOWN = 0x2
    BELOW_CAP = 0x4
    NEAR_CAP = 0x8
    OVERCAP_CHARGED = 0x10
    OVERCAP_THROTTLED = 0x20
    USAGE_BASED = 0x40
    ROAMING = 0x80
    RESERVED = 0x40000000
    IGNORE_CONGESTION = 0x80000000

    TRANSFER_UNRESTRICTED = 0x80000021
    TRANSFER_STANDARD = 0x80000067
    TRANSFER_NO_SURCHARGE = 0x8000006F
    TRANSFER_NOT_ROAMING = 0x8000007F
    TRANSFER_ALWAYS = 0x800000FF


class Command(enum.Enum):
    """What a caller asks of a job."""

    RESUME = "resume"
    RESUME_UNFINISHED = "resume, with a file that is not yet transferred"
    SUSPEND = "suspend"
    CANCEL = "cancel"
    COMPLETE = "complete"


class Outcome(enum.Enum):
    """What the engine reports of a job."""

    PICKED = "picked by the scheduler"
    ANSWERED = "the server answered"
    ALL_FILES_DONE = "all files done"
    RANGES_DONE = "all that was asked for on demand is there"
    YIELDED = "time slice over, pre-empted or manager closing"
    FAILED_FOR_NOW = "recoverable error"
    FAILED = "fatal error"
    RETRY_DUE = "retry delay over"
    NETWORK_BACK = "network back"
    ALLOWED = "policy and cost allow it"
    REOPENED = "journal opened"


class NotifyFlags(enum.Flag, boundary=enum.STRICT):
    """BG_NOTIFY: what a job tells its callback of; a command is told of JOB_TRANSFERRED and JOB_ERROR only."""

    JOB_TRANSFERRED = 1
    JOB_ERROR = 2
    DISABLE = 4  # nothing; stands alone
    JOB_MODIFICATION = 8
    FILE_TRANSFERRED = 0x10
    FILE_RANGES_TRANSFERRED = 0x20


NOTHING: Final = NotifyFlags(0)


class WaitingReason(enum.Enum):
    """Why nothing moves."""

    SUSPENDED = "suspended"
    QUEUE = "waiting for its turn"
    NOT_FOREGROUND = "dynamic content is fetched at FOREGROUND priority only"
    NO_OWNER_TOKEN = "waiting for the owner's token"  # noqa: S105 - a sentence, not a secret
    RETRY = "retry"
    NETWORK = "waiting for the network"
    POLICY = "held up by group policy"
    COST = "held up by the cost of the connection"
    MANAGER_CLOSED = "the manager runs no transfers"
    JOURNAL = "waiting for the journal"
    NOTIFICATION = "a notification is owed"


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a job does not move, and until when (aware UTC, None: until something happens)."""

    reason: WaitingReason
    until: datetime | None = None
    detail: str = ""

    def __str__(self) -> str:
        if self.reason is WaitingReason.RETRY:
            at = f" at {self.until.astimezone():%H:%M}" if self.until else ""
            return f"retry {self.detail.partition(':')[0]}{at}:{self.detail.partition(':')[2]}"
        if self.reason is WaitingReason.POLICY and self.until is not None:
            return f"{self.reason.value} until {self.until.astimezone():%Y-%m-%d %H:%M}"
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value


@dataclass(frozen=True, slots=True)
class JobProgress:
    """BG_JOB_PROGRESS: `bytes_total` is None while any file's size is unknown; `bytes_transferred` falls when a file starts anew."""

    bytes_total: int | None
    bytes_transferred: int
    files_total: int
    files_transferred: int


@dataclass(frozen=True, slots=True)
class FileProgress:
    """BG_FILE_PROGRESS: `completed` is true when the file stands at its destination."""

    bytes_total: int | None
    bytes_transferred: int
    completed: bool


@dataclass(frozen=True, slots=True)
class JobTimes:
    """BG_JOB_TIMES, aware UTC. `transfer_completion_time`: when TRANSFERRED was last reached, None before."""

    creation_time: datetime
    modification_time: datetime
    transfer_completion_time: datetime | None


@dataclass(frozen=True, slots=True)
class Cancellation:
    """What `Job.cancel()` left.

    Attributes:
        left_behind: part files that could not be deleted, because the identity that made them is gone or may not.
    """

    left_behind: tuple[Path, ...] = ()

    @property
    def code(self) -> ErrorCode:
        """S_OK, or BG_S_UNABLE_TO_DELETE_FILES."""
        return ErrorCode.BG_S_UNABLE_TO_DELETE_FILES if self.left_behind else ErrorCode.S_OK


@final
class Completion(tuple[Path, ...]):
    """What `Job.complete()` did: the files that stand at their destinations now, in the order in which they were added.

    Attributes:
        code: S_OK; BG_S_PARTIAL_COMPLETE: files that were not finished were dropped; BG_S_UNABLE_TO_DELETE_FILES: so they were, but
            their part files could not all be deleted.
        left_behind: these part files.
    """

    code: ErrorCode
    left_behind: tuple[Path, ...]

    def __new__(cls, paths: Iterable[Path] = (), left_behind: Iterable[Path] = (), *, partial: bool = False) -> Self:
        completion = super().__new__(cls, paths)
        completion.left_behind = tuple(left_behind)
        completion.code = ErrorCode.BG_S_PARTIAL_COMPLETE if partial else ErrorCode.S_OK
        if completion.left_behind:
            completion.code = ErrorCode.BG_S_UNABLE_TO_DELETE_FILES
        return completion


S, C, O = JobState, Command, Outcome  # noqa: E741 - the table below reads better with short names

NEXT: Final[Mapping[tuple[JobState, Command | Outcome], JobState]] = MappingProxyType(
    {
        (S.SUSPENDED, C.RESUME): S.QUEUED,
        (S.SUSPENDED, C.RESUME_UNFINISHED): S.QUEUED,
        (S.SUSPENDED, C.SUSPEND): S.SUSPENDED,
        (S.SUSPENDED, C.CANCEL): S.CANCELLED,
        (S.SUSPENDED, C.COMPLETE): S.ACKNOWLEDGED,
        (S.SUSPENDED, O.FAILED): S.ERROR,
        (S.QUEUED, C.RESUME): S.QUEUED,
        (S.QUEUED, C.RESUME_UNFINISHED): S.QUEUED,
        (S.QUEUED, C.SUSPEND): S.SUSPENDED,
        (S.QUEUED, C.CANCEL): S.CANCELLED,
        (S.QUEUED, C.COMPLETE): S.ACKNOWLEDGED,
        (S.QUEUED, O.PICKED): S.CONNECTING,
        (S.QUEUED, O.FAILED_FOR_NOW): S.TRANSIENT_ERROR,
        (S.QUEUED, O.FAILED): S.ERROR,
        (S.QUEUED, O.REOPENED): S.QUEUED,
        (S.CONNECTING, C.RESUME): S.CONNECTING,
        (S.CONNECTING, C.RESUME_UNFINISHED): S.CONNECTING,
        (S.CONNECTING, C.SUSPEND): S.SUSPENDED,
        (S.CONNECTING, C.CANCEL): S.CANCELLED,
        (S.CONNECTING, C.COMPLETE): S.ACKNOWLEDGED,
        (S.CONNECTING, O.ANSWERED): S.TRANSFERRING,
        (S.CONNECTING, O.ALL_FILES_DONE): S.TRANSFERRED,
        (S.CONNECTING, O.RANGES_DONE): S.SUSPENDED,
        (S.CONNECTING, O.YIELDED): S.QUEUED,
        (S.CONNECTING, O.FAILED_FOR_NOW): S.TRANSIENT_ERROR,
        (S.CONNECTING, O.FAILED): S.ERROR,
        (S.CONNECTING, O.REOPENED): S.QUEUED,
        (S.TRANSFERRING, C.RESUME): S.TRANSFERRING,
        (S.TRANSFERRING, C.RESUME_UNFINISHED): S.TRANSFERRING,
        (S.TRANSFERRING, C.SUSPEND): S.SUSPENDED,
        (S.TRANSFERRING, C.CANCEL): S.CANCELLED,
        (S.TRANSFERRING, C.COMPLETE): S.ACKNOWLEDGED,
        (S.TRANSFERRING, O.ANSWERED): S.TRANSFERRING,
        (S.TRANSFERRING, O.ALL_FILES_DONE): S.TRANSFERRED,
        (S.TRANSFERRING, O.RANGES_DONE): S.SUSPENDED,
        (S.TRANSFERRING, O.YIELDED): S.QUEUED,
        (S.TRANSFERRING, O.FAILED_FOR_NOW): S.TRANSIENT_ERROR,
        (S.TRANSFERRING, O.FAILED): S.ERROR,
        (S.TRANSFERRING, O.REOPENED): S.QUEUED,
        (S.TRANSIENT_ERROR, C.RESUME): S.QUEUED,
        (S.TRANSIENT_ERROR, C.RESUME_UNFINISHED): S.QUEUED,
        (S.TRANSIENT_ERROR, C.SUSPEND): S.SUSPENDED,
        (S.TRANSIENT_ERROR, C.CANCEL): S.CANCELLED,
        (S.TRANSIENT_ERROR, C.COMPLETE): S.ACKNOWLEDGED,
        (S.TRANSIENT_ERROR, O.RETRY_DUE): S.QUEUED,
        (S.TRANSIENT_ERROR, O.NETWORK_BACK): S.QUEUED,
        (S.TRANSIENT_ERROR, O.ALLOWED): S.QUEUED,
        (S.TRANSIENT_ERROR, O.FAILED): S.ERROR,
        (S.ERROR, C.RESUME): S.QUEUED,
        (S.ERROR, C.RESUME_UNFINISHED): S.QUEUED,
        (S.ERROR, C.SUSPEND): S.SUSPENDED,
        (S.ERROR, C.CANCEL): S.CANCELLED,
        (S.ERROR, C.COMPLETE): S.ACKNOWLEDGED,
        (S.TRANSFERRED, C.RESUME): S.TRANSFERRED,
        (S.TRANSFERRED, C.RESUME_UNFINISHED): S.QUEUED,
        (S.TRANSFERRED, C.CANCEL): S.CANCELLED,
        (S.TRANSFERRED, C.COMPLETE): S.ACKNOWLEDGED,
        (S.TRANSFERRED, O.FAILED): S.ERROR,
    }
)


def advance(state: JobState, event: Command | Outcome) -> JobState:
    """The state after an event.

    Raises:
        InvalidState: the table has no such row.
    """
    try:
        return NEXT[state, event]
    except KeyError:
        raise InvalidState(f"a job in state {state.name} cannot be told: {event.value}") from None


JOB_ENDS: Final = NotifyFlags.JOB_TRANSFERRED | NotifyFlags.JOB_ERROR


def owed_in(state: JobState, flags: NotifyFlags) -> NotifyFlags:
    """What the application is owed to hear when a job has come to this state: of its end, if the flags name it. What was owed before is
    over."""
    end = {JobState.TRANSFERRED: NotifyFlags.JOB_TRANSFERRED, JobState.ERROR: NotifyFlags.JOB_ERROR}.get(state, NOTHING)
    return end & flags


def mermaid() -> str:
    """The life cycle as a Mermaid state diagram, drawn from `NEXT`; loops that keep the state are left out, and rows that say the same."""
    rows = [
        f"    {before.name} --> {after.name}: {event.name}"
        for (before, event), after in NEXT.items()
        if before is not after and (event is not C.RESUME_UNFINISHED or NEXT[before, C.RESUME] is not after)
    ]
    return "\n".join(["stateDiagram-v2", "    [*] --> SUSPENDED", *rows, "    ACKNOWLEDGED --> [*]", "    CANCELLED --> [*]"])


@dataclass(frozen=True, slots=True)
class OwnerKey:
    """What the journal keeps of an owner. Never a token.

    Attributes:
        sid: the token's sid ("uid:1000", "uid:1000:alice@REALM", a Windows SID).
        name: the local user's name, for people.
        local: the local half of the sid ("uid:1000").
        principal: the network half, None without network credentials.
        proof: keyed fingerprint of the network credential's secret (threat model T7); None without network credentials.
        process: the owner was the process itself, with its default credentials.
        elevated: the token was elevated when the job was made.
        session: the logon session that the token was tied to; None: it was to none. Not who the owner is, so it is not compared.
    """

    sid: str
    name: str
    local: str
    principal: str | None
    proof: str | None
    process: bool
    elevated: bool
    session: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class NotifyCmdLine:
    """A job's notification command: a program by its full path, and its whole argv, of which the first word is the program.

    Every user of the machine can read a running program's argv; still it is not shown where nobody asked for it.
    """

    program: str
    parameters: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One job as the journal keeps it. Times are aware UTC; durations are seconds."""

    id: UUID
    display_name: str
    owner: OwnerKey
    created: datetime
    modified: datetime
    description: str = ""
    priority: JobPriority = JobPriority.NORMAL
    state: JobState = JobState.SUSPENDED
    resumed: bool = False  # left SUSPENDED at least once: from then on credentials are bound to origins (T19)
    completed: datetime | None = None  # when TRANSFERRED was reached
    helper_flags: HelperTokenFlags = HelperTokenFlags.NONE
    proxy: ProxySettings = field(default_factory=ProxySettings.no_proxy)
    http: HttpOptions = field(default_factory=HttpOptions)
    minimum_retry_delay: float = RETRY_DELAY
    no_progress_timeout: float = NO_PROGRESS_TIMEOUT
    maximum_download_time: float = MAX_DOWNLOAD_TIME
    own_download_time: bool = False  # the job set it, so that it goes before group policy
    cost_flags: CostFlags = CostFlags.TRANSFER_ALWAYS
    maximum_bandwidth: float | None = None  # bytes per second; None: no limit of its own
    maximum_download_size: int | None = None  # bytes of all files together; None: any number
    dynamic_content: bool = False  # fetched in one go or anew; FOREGROUND only
    high_performance: bool = False  # no checkpoints while a file is fetched
    on_demand_mode: bool = False  # of its files only what was asked for is fetched
    files_at_once: int = 1  # each on a connection of its own
    segments: int = 1  # of one file, fetched at once, each on a connection of its own
    error: BitsError | None = None
    error_file: int | None = None  # index of the file the error is about
    error_count: int = 0
    retry_number: int = 0  # transient errors in a row
    retry_at: datetime | None = None  # wall clock; None: no attempt is due by itself
    gives_up_at: datetime | None = None  # wall clock: so long the job waits for an event; without one, for ever
    stalled: float = 0.0  # seconds since the first transient error without progress
    active: float = 0.0  # seconds spent CONNECTING and TRANSFERRING
    notify_flags: NotifyFlags = NotifyFlags.JOB_TRANSFERRED | NotifyFlags.JOB_ERROR
    notify_cmd_line: NotifyCmdLine | None = None
    notify_setter: OwnerKey | None = None  # who set the command, and whom it runs as
    minimum_notification_interval: float = NOTIFICATION_INTERVAL
    owed: NotifyFlags = NOTHING  # JOB_TRANSFERRED or JOB_ERROR: has happened, and nobody has been told yet
    turn: int = 0  # grows each time the job begins to run: in its class those with the least are next

    @property
    def may_run(self) -> bool:
        """Dynamic content cannot be interrupted, so it is fetched only where nothing pre-empts it."""
        return not self.dynamic_content or self.priority is JobPriority.FOREGROUND


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of a job as the journal keeps it.

    `url` is where the file is fetched from; `original_url` what the application named (redirects never change it). Slices are absolute
    positions, with `ranges` those of the local file; the journal keeps their `durable` position only. `validator` is of the remote file.
    """

    job_id: UUID
    index: int
    original_url: str = field(repr=False)  # their queries may be secrets (T14)
    url: str = field(repr=False)
    path: Path
    digests: Digests = NO_DIGESTS  # what the caller says the local file hashes to
    ranges: tuple[FileRange, ...] = ()  # what the local file is made of, in this order; none: the whole remote file
    wanted: tuple[FileRange, ...] = ()  # on demand: what was asked for, in the order of the file
    position: int = 0  # on demand: where to begin with what is wanted
    validator: Validator | None = None
    part: "PartRecord | None" = None
    draft: str = ""  # of the next part file's name: journalled before it is made, so that a crash leaves no stray; "": none yet
    slices: tuple[Slice, ...] = ()
    boot_id: str | None = None  # of the boot in which the part file was last written
    restarts: int = 0
    refetches: int = 0  # times it was fetched anew because its digest was wrong
    wrong_digest: str | None = None  # what it hashed to the last time
    transferred: bool = False  # every byte is in the part file, durable and checked
    committed: bool = False  # renamed to `path`
    validated: bool = False  # the application said that the content is right
    owed: bool = False  # it was transferred, and no callback has been told yet

    @property
    def size(self) -> int | None:
        """Bytes of the local file, None while unknown."""
        return local_size(self.ranges, self.validator.size if self.validator else None)

    def evolve(self, **changes: Any) -> "FileRecord":
        """As `dataclasses.replace`, at half the cost: each of many small files is changed twice."""
        changed = object.__new__(FileRecord)
        for put, value in zip(_PUT, _VALUES(self), strict=True):
            put(changed, value)
        for name, value in changes.items():
            object.__setattr__(changed, name, value)
        return changed

    @property
    def outstanding(self) -> bool:
        """On demand: something that was asked for is not there yet, or all of the file is and nobody has said so."""
        if self.transferred or not self.wanted:
            return False
        size = self.validator.size if self.validator else None
        return missing(self.wanted, self.slices, size) is not None or (size is not None and complete(filled(self.slices), size))


_NAMES: Final = tuple(each.name for each in fields(FileRecord))
_VALUES: Final = attrgetter(*_NAMES)
_PUT: Final = tuple(getattr(FileRecord, name).__set__ for name in _NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantRecord:
    """One `set_credentials` of a job. `origins` None: not resumed yet, bound at the first resume (T19)."""

    job_id: UUID
    target: AuthTarget
    scheme: AuthScheme
    user_name: str | None
    password: str | None = field(repr=False)
    origins: frozenset[Origin] | None = None

    def grant(self) -> Grant:
        """What the wire may do with it now."""
        return Grant(self.target, self.scheme, self.user_name, self.password, self.origins or frozenset())


@dataclass(frozen=True, slots=True)
class JobRemoved:
    """A change for the journal: the job has left the queue."""

    job_id: UUID


@dataclass(frozen=True, slots=True)
class GrantRemoved:
    """A change for the journal: `remove_credentials`."""

    job_id: UUID
    target: AuthTarget
    scheme: AuthScheme


@dataclass(frozen=True, slots=True)
class FileCommitted:
    """A change for the journal: the file has its name, and nothing else of it is new. Cheaper than the whole `FileRecord`."""

    job_id: UUID
    index: int


@dataclass(frozen=True, slots=True)
class FileWhole:
    """A change for the journal: a file of which nothing was there is whole in its part file, and nothing else of it is new.

    Cheaper than the whole `FileRecord`. `file` is the record as it is now.
    """

    file: FileRecord


def shortest_change(before: FileRecord, now: FileRecord) -> FileRecord | FileWhole:
    """What the journal, which has the file as it was before, is to be told."""
    came_whole = now.transferred and now.part is not None and before.part is None and not before.slices and len(now.slices) == 1
    return FileWhole(now) if came_whole and _kept_by_whole(before) == _kept_by_whole(now) else now


_kept_by_whole: Final = attrgetter(  # what a `FileWhole` leaves as it is
    *("job_id", "index", "original_url", "url", "path", "digests", "ranges", "wanted", "position"),
    *("restarts", "refetches", "wrong_digest", "committed"),
)


Change = JobRecord | FileRecord | FileWhole | FileCommitted | GrantRecord | JobRemoved | GrantRemoved


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job with its files (in order) and grants, as read from the journal."""

    job: JobRecord
    files: tuple[FileRecord, ...]
    grants: tuple[GrantRecord, ...]
