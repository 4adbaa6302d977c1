import time as system_time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bits_async.errors import ErrorCode, ErrorContext, InvalidArgument
from bits_async.jobs import policies
from bits_async.jobs.model import JobPriority
from bits_async.jobs.policies import (
    Bandwidth,
    CostFlags,
    GroupPolicy,
    InternetBandwidth,
    MachineZone,
    PriorityLimits,
    Rule,
    ScheduledLimits,
    Window,
    bandwidth,
    cost_error,
    effective_limits,
    overrides,
    runnable,
)
from bits_async.jobs.scheduler import Limits

F, H, N, L = JobPriority
BERLIN, LORD_HOWE, NEW_YORK = ZoneInfo("Europe/Berlin"), ZoneInfo("Australia/Lord_Howe"), ZoneInfo("America/New_York")
ALL_DAYS = frozenset(range(7))
WORKDAYS = frozenset(range(5))


def example():
    """The example of the module's docstring."""
    text = policies.__doc__ or ""
    return "\n".join(line for line in text.splitlines() if line.startswith("    "))


# -- reading ------------------------------------------------------------------------------------------------------------------------------


def test_the_example_in_the_documentation_is_read_as_it_says():
    policy = GroupPolicy.from_toml(example().replace("    ", "", 1))
    assert policy == GroupPolicy(
        max_jobs_per_user=60,
        max_jobs_per_machine=300,
        max_files_per_job=200,
        max_ranges_per_file=500,
        max_download_time=90 * 86400,
        job_inactivity_timeout=90 * 86400,
        max_internet_bandwidth=InternetBandwidth(512, Window(ALL_DAYS, time(8), time(17)), None),
        work=(ScheduledLimits(Window(WORKDAYS, time(8), time(17)), PriorityLimits(1024, 512, 0)),),
        non_work=PriorityLimits(None, 2048, 2048),
        maintenance=(ScheduledLimits(Window(frozenset({5, 6}), time(22), time(6)), PriorityLimits(None, None, None)),),
    )


def test_an_empty_file_sets_nothing():
    assert GroupPolicy.from_toml("") == GroupPolicy()


def test_a_limit_without_hours_holds_always():
    policy = GroupPolicy.from_toml("max_internet_bandwidth = { limit = 100 }")
    assert bandwidth(policy, N, datetime(2024, 1, 1, tzinfo=BERLIN)) == Bandwidth(12_500.0, None, Rule.INTERNET)


def test_times_of_day_may_be_given_to_the_minute_and_24_is_midnight():
    toml = "[max_internet_bandwidth]\nlimit = 1\nfrom = 08:30:00\nto = 24\nlimit_outside = 0"
    assert GroupPolicy.from_toml(toml).max_internet_bandwidth == InternetBandwidth(1, Window(ALL_DAYS, time(8, 30), time(0)), 0)


WORK = '[[bandwidth_limits.work]]\ndays = ["mon"]\nfrom = 8\nto = 17\n'
REFUSED = [
    ("max_jobs_per_user = 0", "max_jobs_per_user"),
    ("max_jobs_per_machine = true", "max_jobs_per_machine"),
    ("max_files_per_job = 1.5", "max_files_per_job"),
    ('max_ranges_per_file = "500"', "max_ranges_per_file"),
    ("max_download_time = -1", "max_download_time"),
    ("job_inactivity_timeout = 99999999999999999999", "job_inactivity_timeout"),
    ("MaxJobsPerUser = 60", "MaxJobsPerUser is unknown; possible are max_jobs_per_user"),
    ("max_internet_bandwidth = 512", "max_internet_bandwidth takes a table"),
    ("[max_internet_bandwidth]", "max_internet_bandwidth.limit is missing"),
    ("[max_internet_bandwidth]\nlimit = -1", "max_internet_bandwidth.limit"),
    ('[max_internet_bandwidth]\nlimit = "none"', "max_internet_bandwidth.limit"),
    ("[max_internet_bandwidth]\nlimit = 1\nfrom = 8", "max_internet_bandwidth.to is missing"),
    ("[max_internet_bandwidth]\nlimit = 1\nfrom = 8\nto = 17", "max_internet_bandwidth.limit_outside is missing"),
    ("[max_internet_bandwidth]\nlimit = 1\nfrom = 24\nto = 3\nlimit_outside = 0", "max_internet_bandwidth.from"),
    ("[max_internet_bandwidth]\nlimit = 1\nfrom = 1\nto = 25\nlimit_outside = 0", "max_internet_bandwidth.to"),
    ("[max_internet_bandwidth]\nlimit = 1\nfrom = true\nto = 3\nlimit_outside = 0", "max_internet_bandwidth.from"),
    ("[max_internet_bandwidth]\nlimit = 1\nuntil = 3", "max_internet_bandwidth.until is unknown"),
    ("bandwidth_limits = 3", "bandwidth_limits takes a table"),
    ("[bandwidth_limits]\nworking = 1", "bandwidth_limits.working is unknown; possible are work, non_work"),
    ("[bandwidth_limits.work]\nfrom = 8", "[[bandwidth_limits.work]]"),
    ("[bandwidth_limits]\nwork = [8]", "bandwidth_limits.work[0] takes a table"),
    (WORK, "bandwidth_limits.work[0].limits is missing"),
    (WORK + "limits = { high = 1, normal = 1 }", "bandwidth_limits.work[0].limits.low is missing"),
    (WORK + "limits = { high = 1, normal = 1, low = 1, foreground = 1 }", "bandwidth_limits.work[0].limits.foreground is unknown"),
    (WORK + "limits = { high = 1, normal = 1, low = [] }", "bandwidth_limits.work[0].limits.low"),
    (WORK.replace("mon", "monday") + "limits = { high = 1, normal = 1, low = 1 }", "bandwidth_limits.work[0].days"),
    (WORK.replace('"mon"', "") + "limits = { high = 1, normal = 1, low = 1 }", "bandwidth_limits.work[0].days"),
    (WORK.replace('"mon"', "1") + "limits = { high = 1, normal = 1, low = 1 }", "bandwidth_limits.work[0].days"),
    ("bandwidth_limits.non_work.high = 1", "bandwidth_limits.non_work.normal is missing"),
    ("[maintenance_limits]", "[[maintenance_limits]]"),
    ('"\\u001b[2J" = 1', "is unknown"),
    ("max_jobs_per_user = ", "not TOML"),
    ("a = 1\na = 2", "not TOML"),
    ("a = " + "9" * 5000, "not TOML"),
    ("a = " + "[" * 100_000, "not TOML"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_in_a_policy_is_named(text, says):
    with pytest.raises(InvalidArgument) as caught:
        GroupPolicy.from_toml(text)
    assert says in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_policy_made_in_python_is_checked_too():
    with pytest.raises(InvalidArgument):
        GroupPolicy(max_files_per_job=0)
    with pytest.raises(InvalidArgument):
        PriorityLimits(1, 1, -1)
    with pytest.raises(InvalidArgument):
        InternetBandwidth(1, None, -1)
    with pytest.raises(InvalidArgument):
        Window(frozenset({7}), time(1), time(2))
    with pytest.raises(InvalidArgument):
        Window(ALL_DAYS, time(1, tzinfo=UTC), time(2))


# -- bandwidth: which rule ----------------------------------------------------------------------------------------------------------------

FULL = GroupPolicy(
    max_internet_bandwidth=InternetBandwidth(8, Window(ALL_DAYS, time(8), time(17)), 16),
    work=(
        ScheduledLimits(Window(WORKDAYS, time(8), time(17)), PriorityLimits(1000, 100, 0)),
        ScheduledLimits(Window(frozenset({5}), time(9), time(12)), PriorityLimits(2000, 200, 1)),
    ),
    maintenance=(ScheduledLimits(Window(frozenset({4}), time(22), time(6)), PriorityLimits(None, 5000, 4000)),),
)


def at(text, zone=BERLIN):
    return datetime.fromisoformat(text).replace(tzinfo=zone)


# 2024-01-01 is a Monday
RULES = [
    ("work: high", H, "2024-01-01T08:00", 125_000, "2024-01-01T17:00", Rule.WORK),
    ("work: normal", N, "2024-01-01T12:00", 12_500, "2024-01-01T17:00", Rule.WORK),
    ("work: 0 blocks", L, "2024-01-01T12:00", 0, "2024-01-01T17:00", Rule.WORK),
    ("foreground is exempt", F, "2024-01-01T12:00", None, None, None),
    ("outside work the limit of the internet counts", N, "2024-01-01T17:00", 2000, "2024-01-02T08:00", Rule.INTERNET),
    ("the second work time", H, "2024-01-06T09:00", 250_000, "2024-01-06T12:00", Rule.WORK),
    ("less than 2 kbit/s counts as 2", L, "2024-01-06T11:59:59", 250, "2024-01-06T12:00", Rule.WORK),
    ("on Sunday only the internet's", L, "2024-01-07T12:00", 1000, "2024-01-07T17:00", Rule.INTERNET),
    ("maintenance", N, "2024-01-05T22:00", 625_000, "2024-01-06T06:00", Rule.MAINTENANCE),
    ("maintenance goes on after midnight", L, "2024-01-06T05:59", 500_000, "2024-01-06T06:00", Rule.MAINTENANCE),
    ("maintenance without limit", H, "2024-01-06T00:00", None, "2024-01-06T06:00", Rule.MAINTENANCE),
    ("no maintenance in Friday's first hours", N, "2024-01-05T05:00", 2000, "2024-01-05T08:00", Rule.INTERNET),
]


@pytest.mark.parametrize(("what", "priority", "when", "limit", "until", "rule"), RULES, ids=[row[0] for row in RULES])
def test_which_limit_holds_and_until_when(what, priority, when, limit, until, rule):
    found = bandwidth(FULL, priority, at(when))
    assert found == Bandwidth(limit, until and at(until).astimezone(UTC), rule)


def both(kind_of_work):
    return GroupPolicy(
        max_internet_bandwidth=InternetBandwidth(8),
        non_work=PriorityLimits(16, 16, 16),
        work=(ScheduledLimits(Window(ALL_DAYS, time(8), time(17)), PriorityLimits(24, 24, 24)),),
        maintenance=(ScheduledLimits(Window(ALL_DAYS, time(10), time(12)), PriorityLimits(32, 32, 32)),) if kind_of_work else (),
    )


@pytest.mark.parametrize(
    ("maintenance", "hour", "limit"),
    [(True, 11, 4000), (True, 9, 3000), (True, 7, 2000), (False, 11, 3000), (False, 18, 2000)],
)
def test_maintenance_goes_before_work_before_non_work_before_the_internet(maintenance, hour, limit):
    assert bandwidth(both(maintenance), L, datetime(2024, 1, 1, hour, tzinfo=BERLIN)).limit == limit


def test_only_the_limit_of_the_internet_is_shared_by_all_priorities():
    assert bandwidth(FULL, N, at("2024-01-01T20:00")).shared
    assert not bandwidth(FULL, N, at("2024-01-01T12:00")).shared


def test_work_limits_supersede_the_internet_s_even_when_they_are_unlimited():
    policy = GroupPolicy(max_internet_bandwidth=InternetBandwidth(8), non_work=PriorityLimits(None, None, None))
    assert bandwidth(policy, N, at("2024-01-01T12:00")).limit is None


def test_no_policy_is_no_limit():
    assert bandwidth(None, L, at("2024-01-01T12:00")) == Bandwidth(None)
    assert bandwidth(GroupPolicy(), L, at("2024-01-01T12:00")) == Bandwidth(None)


def test_blocked_for_good_has_no_end():
    found = bandwidth(GroupPolicy(max_internet_bandwidth=InternetBandwidth(0, Window(ALL_DAYS, time(8), time(17)), 0)), N, at("2024-01-01"))
    assert found.blocked
    assert found.until is None


def test_a_block_ends_when_something_moves_again_not_at_the_next_rule_that_blocks():
    policy = GroupPolicy(
        max_internet_bandwidth=InternetBandwidth(100),
        work=(ScheduledLimits(Window(ALL_DAYS, time(8), time(17)), PriorityLimits(0, 0, 0)),),
        maintenance=(ScheduledLimits(Window(ALL_DAYS, time(17), time(19)), PriorityLimits(0, 0, 0)),),
    )
    assert bandwidth(policy, N, at("2024-01-01T12:00")).until == at("2024-01-01T19:00")


def test_a_blocked_job_is_told_by_which_rule_and_until_when():
    error = bandwidth(FULL, L, at("2024-01-01T12:00")).error()
    assert (error.code, error.context) == (ErrorCode.BG_E_BLOCKED_BY_POLICY, ErrorContext.GENERAL_QUEUE_MANAGER)
    assert error.transient
    assert "bandwidth_limits.work" in str(error)
    assert "until 2024-01-01 16:00 UTC" in str(error)


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(InvalidArgument):
        bandwidth(FULL, N, datetime(2024, 1, 1))


# -- bandwidth: clocks that are changed ---------------------------------------------------------------------------------------------------


def nightly(start, end, limit=0, days=ALL_DAYS):
    return GroupPolicy(maintenance=(ScheduledLimits(Window(days, start, end), PriorityLimits(limit, limit, limit)),))


# Berlin 2024: 31 March 02:00 -> 03:00, 27 October 03:00 -> 02:00. Lord Howe 2024: 7 April 02:00 -> 01:30.
CLOCK_CHANGES = [
    ("a night of 23 hours", nightly(time(22), time(6)), BERLIN, "2024-03-30T21:00Z", True, "2024-03-31T04:00Z"),
    ("a night of 25 hours", nightly(time(22), time(6)), BERLIN, "2024-10-26T20:00Z", True, "2024-10-27T05:00Z"),
    ("waiting for a night that is an hour off", nightly(time(4), time(6)), BERLIN, "2024-03-30T12:00Z", False, "2024-03-31T02:00Z"),
    ("a start that is left out is the change", nightly(time(2, 30), time(6)), BERLIN, "2024-03-31T00:00Z", False, "2024-03-31T01:00Z"),
    ("an end that is left out is the change", nightly(time(0), time(2, 30)), BERLIN, "2024-03-31T00:00Z", True, "2024-03-31T01:00Z"),
    ("a window that is left out", nightly(time(2, 10), time(2, 50)), BERLIN, "2024-03-30T12:00Z", False, "2024-04-01T00:10Z"),
    ("shown twice: first", nightly(time(2, 10), time(2, 50)), BERLIN, "2024-10-27T00:20Z", True, "2024-10-27T00:50Z"),
    ("shown twice: between", nightly(time(2, 10), time(2, 50)), BERLIN, "2024-10-27T00:55Z", False, "2024-10-27T01:10Z"),
    ("shown twice: again", nightly(time(2, 10), time(2, 50)), BERLIN, "2024-10-27T01:20Z", True, "2024-10-27T01:50Z"),
    ("the change itself goes back over an edge", nightly(time(2, 30), time(6)), BERLIN, "2024-10-27T00:45Z", True, "2024-10-27T01:00Z"),
    ("half an hour back", nightly(time(1, 45), time(5)), LORD_HOWE, "2024-04-06T14:50Z", True, "2024-04-06T15:00Z"),
    (
        "the only window of a week is left out",
        nightly(time(2, 10), time(2, 50), days=frozenset({6})),
        BERLIN,
        "2024-03-25T12:00Z",
        False,
        "2024-04-07T00:10Z",
    ),
]


@pytest.mark.parametrize(("what", "policy", "zone", "now", "blocked", "until"), CLOCK_CHANGES, ids=[row[0] for row in CLOCK_CHANGES])
def test_schedules_follow_the_wall_clock_through_its_changes(what, policy, zone, now, blocked, until):
    found = bandwidth(policy, N, datetime.fromisoformat(now).astimezone(zone))
    assert (found.blocked, found.until) == (blocked, datetime.fromisoformat(until))


windows = st.builds(
    Window,
    st.frozensets(st.integers(0, 6), min_size=1),
    st.builds(time, st.integers(0, 23), st.sampled_from([0, 10, 30])),
    st.builds(time, st.integers(0, 23), st.sampled_from([0, 10, 30])),
)
speeds = st.sampled_from([None, 0, 1, 100])
scheduled = st.lists(st.builds(ScheduledLimits, windows, st.builds(PriorityLimits, speeds, speeds, speeds)), max_size=2).map(tuple)
some_policy = st.builds(
    GroupPolicy,
    max_internet_bandwidth=st.none() | st.builds(InternetBandwidth, speeds, st.none() | windows, speeds),
    work=scheduled,
    maintenance=scheduled,
)
near_a_change = st.sampled_from(
    [
        (BERLIN, datetime(2024, 3, 31, 1, tzinfo=UTC)),
        (BERLIN, datetime(2024, 10, 27, 1, tzinfo=UTC)),
        (LORD_HOWE, datetime(2024, 4, 6, 15, tzinfo=UTC)),
        (NEW_YORK, datetime(2024, 11, 3, 6, tzinfo=UTC)),
        (BERLIN, datetime(2024, 7, 1, tzinfo=UTC)),
    ]
)


@settings(max_examples=40, deadline=None)
@given(some_policy, near_a_change, st.integers(-24 * 60, 24 * 60))
def test_nothing_changes_before_the_moment_that_is_named_and_something_does_then(policy, where, minutes):
    zone, change = where
    now = change + timedelta(minutes=minutes)
    found = bandwidth(policy, N, now.astimezone(zone))
    probe = now
    while probe < min(found.until or now + timedelta(days=2), now + timedelta(days=2)):
        assert bandwidth(policy, N, probe.astimezone(zone)).limit == found.limit
        probe += timedelta(minutes=20)
    if found.until is not None:
        assert found.until > now
        before, after = (bandwidth(policy, N, (found.until - timedelta(seconds=back)).astimezone(zone)) for back in (1, 0))
        assert before.limit == found.limit
        assert (after.limit, after.shared) != (found.limit, found.shared)


@given(some_policy, st.datetimes(datetime(2023, 1, 1), datetime(2025, 1, 1)))
def test_a_limit_depends_on_nothing_but_what_the_wall_clock_shows(policy, wall):
    here, there = (bandwidth(policy, N, wall.replace(tzinfo=zone)) for zone in (UTC, ZoneInfo("Asia/Tokyo")))
    assert (here.limit, here.rule) == (there.limit, there.rule)


def test_a_whole_day_is_a_window_that_ends_where_it_begins():
    sunday = nightly(time(0), time(0), days=frozenset({6}))
    assert bandwidth(sunday, N, at("2024-01-07T00:00")).until == at("2024-01-08T00:00")
    assert not bandwidth(sunday, N, at("2024-01-08T00:00")).blocked
    assert not bandwidth(sunday, N, at("2024-01-06T23:59:59")).blocked


@pytest.fixture
def machine_in_berlin(monkeypatch):
    if not hasattr(system_time, "tzset"):
        return  # Windows: the zone of the machine is what it is
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    system_time.tzset()
    yield
    monkeypatch.undo()
    system_time.tzset()


@pytest.mark.usefixtures("machine_in_berlin")
@pytest.mark.posix  # tzset
def test_the_machine_s_own_zone_knows_its_summer_time():
    zone = MachineZone()
    for hours in range(24 * 366):
        moment = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=hours)
        local = moment.astimezone(zone)
        assert local.replace(tzinfo=None) == moment.astimezone().replace(tzinfo=None)
        assert local.astimezone(UTC) == moment
    if hasattr(system_time, "tzset"):
        night = bandwidth(nightly(time(22), time(6)), N, datetime(2024, 10, 26, 20, tzinfo=UTC).astimezone(zone))
        assert night.until == datetime(2024, 10, 27, 5, tzinfo=UTC)
        assert datetime(2024, 7, 1, tzinfo=zone).tzname() == "CEST"


# -- numbers ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllLimits:
    background_jobs: int = 1
    jobs_per_user: int | None = None
    jobs_per_machine: int | None = None
    files_per_job: int | None = None
    ranges_per_file: int | None = None
    job_inactivity_timeout: float | None = None


def test_the_policy_s_numbers_take_the_place_of_the_application_s():
    policy = GroupPolicy(
        max_jobs_per_user=100, max_jobs_per_machine=300, max_files_per_job=20, max_ranges_per_file=5, job_inactivity_timeout=86400
    )
    assert effective_limits(AllLimits(2, jobs_per_user=10, files_per_job=50), policy) == AllLimits(2, 100, 300, 20, 5, 86400)


def test_a_number_that_nobody_would_keep_is_not_passed_over():
    @dataclass(frozen=True)
    class Few:
        files_per_job: int | None = None

    with pytest.raises(TypeError):
        effective_limits(Few(), GroupPolicy(max_ranges_per_file=5))


def test_a_policy_fits_the_scheduler_s_limits_and_changes_nothing_that_it_does_not_set():
    assert effective_limits(Limits.windows(), GroupPolicy(max_files_per_job=20)) == replace(Limits.windows(), files_per_job=20)
    assert effective_limits(Limits.windows(), GroupPolicy()) == Limits.windows()


def test_no_policy_or_an_exempt_owner_keeps_the_limits():
    assert effective_limits(Limits.windows(), None) == Limits.windows()


OVERRIDES = [
    (None, set()),
    (GroupPolicy(), set()),
    (GroupPolicy(max_jobs_per_user=1, max_ranges_per_file=2), {"jobs_per_user", "ranges_per_file"}),
    (GroupPolicy(max_download_time=3600), set()),
    (GroupPolicy(job_inactivity_timeout=3600), {"job_inactivity_timeout"}),
    (GroupPolicy(max_internet_bandwidth=InternetBandwidth(None)), {"bandwidth"}),
    (GroupPolicy(non_work=PriorityLimits(1, 1, 1)), {"bandwidth"}),
    (FULL, {"bandwidth"}),
]


@pytest.mark.parametrize(("policy", "names"), OVERRIDES, ids=range(len(OVERRIDES)))
def test_what_a_policy_overrides(policy, names):
    assert overrides(policy) == names


# -- cost ---------------------------------------------------------------------------------------------------------------------------------

BITS_OF_COST = {
    "UNRESTRICTED": 0x1,
    "CAPPED_USAGE_UNKNOWN": 0x2,
    "BELOW_CAP": 0x4,
    "NEAR_CAP": 0x8,
    "OVERCAP_CHARGED": 0x10,
    "OVERCAP_THROTTLED": 0x20,
    "USAGE_BASED": 0x40,
    "ROAMING": 0x80,
    "RESERVED": 0x40000000,
    "IGNORE_CONGESTION": 0x80000000,
    "TRANSFER_UNRESTRICTED": 0x80000021,
    "TRANSFER_STANDARD": 0x80000067,
    "TRANSFER_NO_SURCHARGE": 0x8000006F,
    "TRANSFER_NOT_ROAMING": 0x8000007F,
    "TRANSFER_ALWAYS": 0x800000FF,
}


def test_cost_flags_have_the_values_of_bits():
    assert {name: flag.value for name, flag in CostFlags.__members__.items()} == BITS_OF_COST


C = CostFlags
COSTS = (C.UNRESTRICTED, C.CAPPED_USAGE_UNKNOWN, C.BELOW_CAP, C.NEAR_CAP, C.OVERCAP_CHARGED, C.OVERCAP_THROTTLED, C.USAGE_BASED, C.ROAMING)
# which of COSTS each policy allows
ALLOWED = {
    C.TRANSFER_UNRESTRICTED: "x____x__",
    C.TRANSFER_STANDARD: "xxx__xx_",
    C.TRANSFER_NO_SURCHARGE: "xxxx_xx_",
    C.TRANSFER_NOT_ROAMING: "xxxxxxx_",
    C.TRANSFER_ALWAYS: "xxxxxxxx",
}


@pytest.mark.parametrize("policy", ALLOWED, ids=lambda policy: policy.name)
def test_a_job_runs_at_the_costs_its_policy_names(policy):
    assert "".join("x" if runnable(policy, cost) else "_" for cost in COSTS) == ALLOWED[policy]


def test_every_part_of_a_cost_must_be_allowed():
    assert not runnable(C.TRANSFER_NOT_ROAMING, C.UNRESTRICTED | C.ROAMING)
    assert runnable(C.TRANSFER_ALWAYS, C.UNRESTRICTED | C.ROAMING)


def test_congestion_and_an_unknown_cost_stop_nobody():
    assert runnable(C.UNRESTRICTED, C.UNRESTRICTED | C.IGNORE_CONGESTION | C.RESERVED)
    assert runnable(C.TRANSFER_UNRESTRICTED, C(0))


def test_a_job_that_costs_too_much_is_told_what_it_would_cost():
    error = cost_error(C.USAGE_BASED | C.ROAMING)
    assert error.code == ErrorCode.BG_E_BLOCKED_BY_COST_TRANSFER_POLICY
    assert error.transient
    assert "USAGE_BASED, ROAMING" in str(error)
