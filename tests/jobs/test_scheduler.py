import pytest

from bits_async.errors import InvalidArgument, NetworkError
from bits_async.jobs.model import JobPriority, JobState
from bits_async.jobs.scheduler import Candidate, Limits, choose, may_retry, retry_delay

F, H, N, L = JobPriority
Q, T = JobState.QUEUED, JobState.TRANSFERRING
ONE = Limits()


def job(name, state, priority, turn=0, ready=True, over=False):
    return Candidate(name, state, priority, turn, ready, over)


TABLE = [
    ("every foreground job and one background job run", [job("a", Q, F), job("b", Q, F), job("c", Q, N), job("d", Q, N, 1)], "abc", ""),
    ("high goes before normal before low", [job("l", Q, L), job("n", Q, N), job("h", Q, H)], "h", ""),
    ("of one class the one that waited longest", [job("a", Q, N, 5), job("b", Q, N, 2)], "b", ""),
    ("a job without its owner's token is passed over", [job("a", Q, H, ready=False), job("b", Q, L)], "b", ""),
    ("a running job keeps its place in its time slice", [job("r", T, N), job("w", Q, N)], "", ""),
    ("after its time slice it yields to its own class", [job("r", T, N, over=True), job("w", Q, N)], "", "r"),
    ("but not to a lower class", [job("r", T, N, over=True), job("w", Q, L)], "", ""),
    ("a higher class pre-empts at once", [job("r", T, N), job("w", Q, H)], "", "r"),
    ("foreground pre-empts nobody", [job("r", T, L), job("f", Q, F)], "f", ""),
    ("suspended and failed jobs are left alone", [job("s", JobState.SUSPENDED, F), job("e", JobState.ERROR, F)], "", ""),
    ("more running than allowed: the least important yields", [job("a", T, H), job("b", T, L)], "", "b"),
]


@pytest.mark.parametrize(("rule", "jobs", "start", "out"), TABLE, ids=[row[0] for row in TABLE])
def test_who_runs_next(rule, jobs, start, out):
    choice = choose(jobs, ONE)
    assert ("".join(choice.start), "".join(choice.yield_)) == (start, out)


def test_more_background_jobs_run_when_the_limits_say_so():
    choice = choose([job("a", T, N), job("b", Q, N), job("c", Q, L)], Limits(background_jobs=3))
    assert set(choice.start) == {"b", "c"}


def test_the_retry_delay_has_a_floor_and_honours_the_server():
    assert retry_delay(1, NetworkError()) == 5
    assert retry_delay(600, NetworkError(retry_after=30)) == 600
    assert retry_delay(5, NetworkError(retry_after=30)) == 30
    assert retry_delay(5, NetworkError(retry_after=float("inf"))) == 5


@pytest.mark.parametrize(
    ("stalled", "delay", "timeout", "expected"),
    [(0, 600, 1209600, True), (0, 600, 0, False), (0, 600, 300, False), (296, 5, 300, False), (295, 5, 300, True)],
)
def test_a_transient_error_is_retried_while_the_no_progress_timeout_allows(stalled, delay, timeout, expected):
    assert may_retry(NetworkError(transient=True), stalled=stalled, delay=delay, no_progress_timeout=timeout) is expected
    assert not may_retry(NetworkError(transient=False), stalled=stalled, delay=delay, no_progress_timeout=timeout)


@pytest.mark.parametrize(
    "wrong",
    [
        {"background_jobs": 0},
        {"background_jobs": None},
        {"connections_per_host": -1},
        {"files_per_job": 1.5},
        {"files_per_job": True},
        {"disk_reserve": -1},
        {"job_inactivity_timeout": 0},
        {"job_inactivity_timeout": 2**32},
        {"job_inactivity_timeout": "90"},
    ],
)
def test_limits_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(InvalidArgument):
        Limits(**wrong)


def test_windows_limits_are_those_of_bits():
    assert (Limits.windows().jobs_per_user, Limits.windows().files_per_job) == (60, 200)
