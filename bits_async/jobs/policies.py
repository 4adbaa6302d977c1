"""What the administrator and the network's price allow: group policy, bandwidth schedules, cost. Pure: it is told the time and answers.

Group policy is BITS's ("Group Policies"), as TOML; the caller reads the file. All keys are optional, an unknown key is an error. BITS's
name is the key in CamelCase unless a comment says another:

    max_jobs_per_user = 60
    max_jobs_per_machine = 300
    max_files_per_job = 200
    max_ranges_per_file = 500
    max_download_time = 7776000           # seconds; for jobs that set none of their own
    job_inactivity_timeout = 7776000      # seconds

    [max_internet_bandwidth]              # all background jobs together
    limit = 512                           # kbit/s, or "unlimited"; 0: background jobs wait; 1 counts as 2
    from = 8                              # hour 0 to 23, or a time of day (08:30:00); leave out from, to and limit_outside: always
    to = 17                               # may be 24; earlier than from: over midnight; the same: the whole day
    limit_outside = "unlimited"

    [[bandwidth_limits.work]]             # EnableBandwidthLimits; any number of these, the first that fits counts
    days = ["mon", "tue", "wed", "thu", "fri"]   # on which it begins
    from = 8
    to = 17
    limits = { high = 1024, normal = 512, low = 0 }    # kbit/s, all three

    [bandwidth_limits.non_work]           # when no work time fits; left out: max_internet_bandwidth counts
    high = "unlimited"
    normal = 2048
    low = 2048

    [[maintenance_limits]]                # EnableMaintenanceLimits; like work, and above it
    days = ["sat", "sun"]
    from = 22
    to = 6
    limits = { high = "unlimited", normal = "unlimited", low = "unlimited" }

Maintenance goes before work, work before non-work, non-work before max_internet_bandwidth; FOREGROUND is exempt from all four. A rule
holds while the wall clock shows a time inside it: a time that a change to summer time leaves out begins with the change, a time that is
shown twice counts both times. Limits on numbers (`effective_limits`) are not for administrators and service identities: the caller
passes None for them.
"""

import enum
import tomllib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from ..errors import BitsError, ErrorCode, ErrorContext, InvalidArgument, make_error, show_text
from .model import CostFlags, JobPriority

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    LimitsT = TypeVar("LimitsT", bound=DataclassInstance)

SLOWEST: Final = 2  # kbit/s: BITS's "less than 2 counts as 2"
BYTES_PER_KBIT: Final = 125
UNLIMITED: Final = "unlimited"
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_LARGEST: Final = 2**31 - 1
_HORIZON: Final = 15  # days: a week, twice, because a change to summer time can leave out the only change of a week

# -- the values -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """Times of day on some days of the week, as the wall clock shows them.

    Attributes:
        days: on which it begins; 0 is Monday.
        start: its first moment.
        end: the moment after its last; not later than `start`: on the next day.
    """

    days: frozenset[int]
    start: time
    end: time

    def __post_init__(self) -> None:
        if not self.days <= set(range(7)) or self.start.tzinfo is not None or self.end.tzinfo is not None:
            raise InvalidArgument("a Window has days from 0 to 6 and naive times")

    def __contains__(self, local: datetime) -> bool:
        now, today = local.time(), local.weekday()
        if self.start < self.end:
            return today in self.days and self.start <= now < self.end
        return (today in self.days and now >= self.start) or ((today - 1) % 7 in self.days and now < self.end)


@dataclass(frozen=True, slots=True)
class PriorityLimits:
    """kbit/s for each background priority; None: unlimited, 0: blocked."""

    high: int | None
    normal: int | None
    low: int | None

    def __post_init__(self) -> None:
        for name in ("high", "normal", "low"):
            _check_speed(name, getattr(self, name))

    def of(self, priority: JobPriority) -> int | None:
        return {JobPriority.HIGH: self.high, JobPriority.NORMAL: self.normal, JobPriority.LOW: self.low}[priority]


@dataclass(frozen=True, slots=True)
class ScheduledLimits:
    """Limits that hold in a window."""

    window: Window
    limits: PriorityLimits


@dataclass(frozen=True, slots=True)
class InternetBandwidth:
    """MaxInternetBandwidth: kbit/s for all background jobs together; None: unlimited, 0: blocked.

    Attributes:
        limit: inside the window.
        window: None: always.
        outside: outside the window.
    """

    limit: int | None
    window: Window | None = None
    outside: int | None = None

    def __post_init__(self) -> None:
        _check_speed("limit", self.limit)
        _check_speed("outside", self.outside)

    def at(self, local: datetime) -> int | None:
        return self.limit if self.window is None or local in self.window else self.outside


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPolicy:
    """What an administrator has set; None and empty: not set. See the module for what each value means. Times are seconds.

    Attributes:
        max_jobs_per_user: unfinished jobs of one owner.
        max_jobs_per_machine: unfinished jobs of all owners.
        max_files_per_job: files of one job.
        max_ranges_per_file: ranges of one file.
        max_download_time: MaximumDownloadTime of jobs that set none; a job's own value goes before it.
        job_inactivity_timeout: a job without progress or change for so long is cancelled.
        max_internet_bandwidth: see `InternetBandwidth`.
        work: limits of work times, the first that fits counts.
        non_work: limits of all other times; None: not set.
        maintenance: limits of maintenance times, which go before all others.
    """

    max_jobs_per_user: int | None = None
    max_jobs_per_machine: int | None = None
    max_files_per_job: int | None = None
    max_ranges_per_file: int | None = None
    max_download_time: int | None = None
    job_inactivity_timeout: int | None = None
    max_internet_bandwidth: InternetBandwidth | None = None
    work: tuple[ScheduledLimits, ...] = ()
    non_work: PriorityLimits | None = None
    maintenance: tuple[ScheduledLimits, ...] = ()

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None:
                _whole(name, value, 1)

    @classmethod
    def from_toml(cls, text: str) -> "GroupPolicy":
        """Read the policy from the text of a TOML file.

        Raises:
            InvalidArgument: it is not TOML, or a key is unknown, missing or has a wrong value; the message names the key.
        """
        try:
            table = _Table("", tomllib.loads(text))
        except (ValueError, RecursionError) as exc:
            raise InvalidArgument(f"the group policy is not TOML: {show_text(str(exc))}") from exc
        numbers = {name: _whole(name, value, 1) for name in _NUMBERS if (value := table.take(name)) is not None}
        internet = table.take("max_internet_bandwidth")
        work, non_work = _bandwidth_limits(table.take("bandwidth_limits"))
        maintenance = _scheduled("maintenance_limits", table.take("maintenance_limits"))
        table.finish()
        return cls(
            **numbers,
            max_internet_bandwidth=None if internet is None else _internet_bandwidth(internet),
            work=work,
            non_work=non_work,
            maintenance=maintenance,
        )


_NUMBERS: Final = (
    "max_jobs_per_user",
    "max_jobs_per_machine",
    "max_files_per_job",
    "max_ranges_per_file",
    "max_download_time",
    "job_inactivity_timeout",
)

# -- from TOML ----------------------------------------------------------------------------------------------------------------------------


def _refuse(where: str, wanted: str, value: object) -> InvalidArgument:
    return InvalidArgument(f"group policy: {where} takes {wanted}, not {show_text(repr(value), 60)}")


class _Table:
    """One table being read: what nobody took is unknown."""

    def __init__(self, path: str, value: object) -> None:
        if not isinstance(value, dict):
            raise _refuse(path, "a table", value)
        self._path = path
        self._left: dict[str, object] = dict(value)
        self._known: list[str] = []

    def where(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def take(self, key: str) -> object:
        """The value of a key; None: it is not there (TOML has no null)."""
        self._known.append(key)
        return self._left.pop(key, None)

    def need(self, key: str) -> object:
        value = self.take(key)
        if value is None:
            raise InvalidArgument(f"group policy: {self.where(key)} is missing")
        return value

    def finish(self) -> None:
        for key in self._left:
            raise InvalidArgument(f"group policy: {show_text(self.where(key))} is unknown; possible are {', '.join(self._known)}")


def _whole(where: str, value: object, least: int, most: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _refuse(where, f"a whole number from {least} to {most}", value)
    return value


def _check_speed(where: str, value: object) -> None:
    if value is not None:
        _whole(where, value, 0)


def _speed(where: str, value: object) -> int | None:
    if value == UNLIMITED:
        return None
    if isinstance(value, str):
        raise _refuse(where, f'kbit/s, or "{UNLIMITED}"', value)
    return _whole(where, value, 0)


def _clock_time(where: str, value: object, latest: int) -> time:
    if isinstance(value, time):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= latest:
        raise _refuse(where, f"an hour from 0 to {latest}, or a time such as 08:30:00", value)
    return time(value % 24)


def _days(where: str, value: object) -> frozenset[int]:
    if not isinstance(value, list) or not value or any(day not in DAYS for day in value):
        raise _refuse(where, f"a list of {', '.join(DAYS)}", value)
    return frozenset(DAYS.index(day) for day in value)


def _priority_limits(where: str, value: object) -> PriorityLimits:
    table = _Table(where, value)
    high, normal, low = (_speed(table.where(name), table.need(name)) for name in ("high", "normal", "low"))
    table.finish()
    return PriorityLimits(high, normal, low)


def _scheduled(where: str, value: object) -> tuple[ScheduledLimits, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _refuse(where, f"tables of the form [[{where}]]", value)
    return tuple(_one_scheduled(f"{where}[{number}]", item) for number, item in enumerate(value))


def _one_scheduled(where: str, value: object) -> ScheduledLimits:
    table = _Table(where, value)
    days = _days(table.where("days"), table.need("days"))
    start = _clock_time(table.where("from"), table.need("from"), 23)
    end = _clock_time(table.where("to"), table.need("to"), 24)
    limits = _priority_limits(table.where("limits"), table.need("limits"))
    table.finish()
    return ScheduledLimits(Window(days, start, end), limits)


def _bandwidth_limits(value: object) -> tuple[tuple[ScheduledLimits, ...], PriorityLimits | None]:
    if value is None:
        return (), None
    table = _Table("bandwidth_limits", value)
    work = _scheduled(table.where("work"), table.take("work"))
    rest = table.take("non_work")
    table.finish()
    return work, None if rest is None else _priority_limits(table.where("non_work"), rest)


def _internet_bandwidth(value: object) -> InternetBandwidth:
    table = _Table("max_internet_bandwidth", value)
    limit = _speed(table.where("limit"), table.need("limit"))
    if not isinstance(value, dict) or not {"from", "to", "limit_outside"} & value.keys():
        table.finish()
        return InternetBandwidth(limit)
    start = _clock_time(table.where("from"), table.need("from"), 23)
    end = _clock_time(table.where("to"), table.need("to"), 24)
    outside = _speed(table.where("limit_outside"), table.need("limit_outside"))
    table.finish()
    return InternetBandwidth(limit, Window(frozenset(range(7)), start, end), outside)


# -- bandwidth ----------------------------------------------------------------------------------------------------------------------------


class Rule(enum.Enum):
    """Which part of the policy a limit comes from."""

    MAINTENANCE = "maintenance_limits"
    WORK = "bandwidth_limits.work"
    NON_WORK = "bandwidth_limits.non_work"
    INTERNET = "max_internet_bandwidth"


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What group policy allows now.

    Attributes:
        limit: bytes per second; None: no limit, 0: blocked.
        until: aware UTC, when it will be another; None: never.
        rule: where it comes from; None: no rule applies.
    """

    limit: float | None
    until: datetime | None = None
    rule: Rule | None = None

    @property
    def blocked(self) -> bool:
        return self.limit == 0

    @property
    def shared(self) -> bool:
        """The limit is one for all background jobs together, not one for each priority."""
        return self.rule is Rule.INTERNET

    def error(self) -> BitsError:
        """Why a blocked job does not run. Transient: it is queued again at `until`."""
        rule = self.rule.value if self.rule else "group policy"
        until = f" until {self.until:%Y-%m-%d %H:%M} UTC" if self.until else ""
        message = f"{rule} lets background jobs of this priority wait{until}"
        return make_error(ErrorCode.BG_E_BLOCKED_BY_POLICY, ErrorContext.GENERAL_QUEUE_MANAGER, message, transient=True)


def bandwidth(policy: GroupPolicy | None, priority: JobPriority, local: datetime) -> Bandwidth:
    """What the policy allows a job of this priority at that moment, and until when.

    Args:
        policy: None: there is none.
        priority: FOREGROUND is never limited.
        local: now, aware. Its zone is the one the schedules are in and must know its changes to and from summer time: a `ZoneInfo` or
            `MachineZone()`; not the fixed offset that `datetime.astimezone()` gives.

    Raises:
        InvalidArgument: `local` is naive.
    """
    zone = local.tzinfo
    if zone is None or local.utcoffset() is None:
        raise InvalidArgument("bandwidth() takes an aware datetime in the local time zone")
    if policy is None or priority is JobPriority.FOREGROUND:
        return Bandwidth(None)
    now = local.astimezone(UTC)
    found = _allowed(policy, priority, now.astimezone(zone))
    for moment in _changes(policy, now, zone):
        later = _allowed(policy, priority, moment.astimezone(zone))
        if later.limit != found.limit or (later.limit and later.shared != found.shared):
            return replace(found, until=moment)
    return found


def _allowed(policy: GroupPolicy, priority: JobPriority, local: datetime) -> Bandwidth:
    """The first rule that has something to say."""
    for rule, scheduled in ((Rule.MAINTENANCE, policy.maintenance), (Rule.WORK, policy.work)):
        for entry in scheduled:
            if local in entry.window:
                return _in_bytes(entry.limits.of(priority), rule)
    if policy.non_work is not None:
        return _in_bytes(policy.non_work.of(priority), Rule.NON_WORK)
    if policy.max_internet_bandwidth is not None:
        return _in_bytes(policy.max_internet_bandwidth.at(local), Rule.INTERNET)
    return Bandwidth(None)


def _in_bytes(kbits: int | None, rule: Rule) -> Bandwidth:
    if kbits is None or kbits == 0:
        return Bandwidth(None if kbits is None else 0.0, None, rule)
    return Bandwidth(float(max(SLOWEST, kbits) * BYTES_PER_KBIT), None, rule)


def _changes(policy: GroupPolicy, now: datetime, zone: tzinfo) -> list[datetime]:
    """The moments (UTC) after now at which another rule may begin to hold, in order; between two of them none does."""
    windows = [entry.window for entry in (*policy.maintenance, *policy.work)]
    if policy.max_internet_bandwidth is not None and policy.max_internet_bandwidth.window is not None:
        windows.append(policy.max_internet_bandwidth.window)
    if not windows:
        return []
    edges = {edge for window in windows for edge in (window.start, window.end, time())}  # midnight: another day of the week
    first = now.astimezone(zone).date()
    moments = {moment for day in range(_HORIZON) for moment in _moments(first + timedelta(day), edges, zone)}
    moments.update(_clock_changes(now, zone))
    return sorted(moment for moment in moments if moment > now)


def _moments(day: date, edges: Collection[time], zone: tzinfo) -> Iterator[datetime]:
    """When the wall clock shows these times on that day: once, twice, or (a harmless moment elsewhere) never."""
    for edge in edges:
        for fold in (0, 1):
            yield datetime.combine(day, edge, zone).replace(fold=fold).astimezone(UTC)


def _clock_changes(now: datetime, zone: tzinfo) -> Iterator[datetime]:
    """The moments (UTC, whole seconds) at which the wall clock is put forward or back."""
    begin = now.replace(microsecond=0)
    for day in range(_HORIZON):
        low, high = begin + timedelta(day), begin + timedelta(day + 1)
        before = low.astimezone(zone).utcoffset()
        if before == high.astimezone(zone).utcoffset():
            continue
        while high - low > timedelta(seconds=1):
            middle = (low + (high - low) / 2).replace(microsecond=0)
            if middle.astimezone(zone).utcoffset() == before:
                low = middle
            else:
                high = middle
        yield high


class MachineZone(tzinfo):
    """The time zone of this machine, with its changes to and from summer time."""

    def utcoffset(self, dt: datetime | None) -> timedelta | None:
        return None if dt is None else dt.replace(tzinfo=None).astimezone().utcoffset()

    def dst(self, dt: datetime | None) -> timedelta | None:
        return None  # the machine does not say

    def tzname(self, dt: datetime | None) -> str | None:
        return None if dt is None else dt.replace(tzinfo=None).astimezone().tzname()

    def fromutc(self, dt: datetime) -> datetime:
        there = dt.replace(tzinfo=UTC).astimezone()
        shown = there.replace(tzinfo=self, fold=0)
        return shown if shown.utcoffset() == there.utcoffset() else shown.replace(fold=1)


# -- numbers ------------------------------------------------------------------------------------------------------------------------------


def _numbers(policy: GroupPolicy) -> Mapping[str, int]:
    """The fields of `Limits` that the policy sets."""
    values = {
        "jobs_per_user": policy.max_jobs_per_user,
        "jobs_per_machine": policy.max_jobs_per_machine,
        "files_per_job": policy.max_files_per_job,
        "ranges_per_file": policy.max_ranges_per_file,
        "job_inactivity_timeout": policy.job_inactivity_timeout,
    }
    return {name: value for name, value in values.items() if value is not None}


def effective_limits(limits: "LimitsT", policy: GroupPolicy | None) -> "LimitsT":
    """The limits (`scheduler.Limits`) with the policy's numbers in the place of their own, larger or smaller.

    Args:
        limits: what the application has set.
        policy: None: there is none, or the owner is an administrator or a service identity.

    Raises:
        TypeError: the policy sets a number that `limits` has no field for: it would not be kept.
    """
    numbers = _numbers(policy) if policy is not None else {}
    return replace(limits, **numbers) if numbers else limits


def overrides(policy: GroupPolicy | None) -> frozenset[str]:
    """Settings that may be set, but with BG_S_OVERRIDDEN_BY_POLICY: the policy's value is what counts.

    Names of fields of `Limits`, and "bandwidth" (a job's or the manager's own limit still counts where it is stricter). Not
    "max_download_time": there a job's own value goes before the policy.
    """
    if policy is None:
        return frozenset()
    names = set(_numbers(policy))
    if policy.max_internet_bandwidth is not None or policy.work or policy.non_work is not None or policy.maintenance:
        names.add("bandwidth")
    return frozenset(names)


# -- cost ---------------------------------------------------------------------------------------------------------------------------------


_COSTS: Final = CostFlags.TRANSFER_ALWAYS & ~CostFlags.IGNORE_CONGESTION


def runnable(cost_policy: CostFlags, current_cost: CostFlags) -> bool:
    """Whether a job with that policy may run at that cost: all of its bits are in the policy. An unknown cost (no bit) stops nobody."""
    costs = current_cost & _COSTS
    return costs & cost_policy == costs


def cost_error(current_cost: CostFlags) -> BitsError:
    """Why a job that is not `runnable` does not run. Transient: it is queued again when the cost changes."""
    costs = ", ".join(flag.name or "" for flag in current_cost & _COSTS)
    message = f"the job's transfer policy does not allow a connection that costs {costs}"
    code, context = ErrorCode.BG_E_BLOCKED_BY_COST_TRANSFER_POLICY, ErrorContext.GENERAL_QUEUE_MANAGER
    return make_error(code, context, message, transient=True)


class CostSource(Protocol):
    """Who knows what the connection costs: a platform's network service, or the application."""

    def watch(self) -> AsyncIterator[CostFlags]:
        """The cost now, at once, and then each change of it; the end means that the last one stays."""
        ...
