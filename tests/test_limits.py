import heapq
import itertools
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bits_async.errors import InvalidArgument
from bits_async.limits import LARGEST_CHUNK, LONGEST_REST, SLACK, Bucket, Chain, largest_chunk, limiter

MB = 1e6


class FakeClock:
    def __init__(self) -> None:
        self.now = 1e6  # as on a machine that has been up for days

    def __call__(self) -> float:
        return self.now


class Transfer:
    """Takes as fast as it may; `bite` bytes at once or as many as it is advised to, and sleeps `late` seconds too long."""

    def __init__(self, chain, *, bite=None, late=0.0, asks_again=True, longest=LONGEST_REST):
        self.chain, self.bite, self.late, self.asks_again, self.longest = chain, bite, late, asks_again, longest
        self.moved = 0
        self.rests = iter(())
        self.ended = False

    def step(self) -> float:
        """Go on until the next sleep; its length."""
        while True:
            for seconds in self.rests:
                return seconds + self.late
            bite = self.bite or self.chain.chunk
            self.moved += bite
            self.rests = self.chain.rests(bite, self.longest) if self.asks_again else iter([self.chain.acquire(bite)])


def run(clock, transfers, seconds, at=()):
    """Let the transfers run for so long; `at`: pairs of (seconds from now, what then happens)."""
    begin, numbers = clock.now, itertools.count()
    queue = [(begin, next(numbers), transfer.step, transfer) for transfer in transfers]
    queue += [(begin + moment, next(numbers), happens, None) for moment, happens in at]
    heapq.heapify(queue)
    while queue and queue[0][0] <= begin + seconds:
        clock.now, _, go, transfer = heapq.heappop(queue)
        if transfer is None:
            go()
        elif not transfer.ended:
            heapq.heappush(queue, (clock.now + go(), next(numbers), go, transfer))
    clock.now = begin + seconds


@pytest.fixture
def clock():
    return FakeClock()


# -- the rate


@pytest.mark.parametrize("count", [1, 4, 16, 100])
@pytest.mark.parametrize("rate", [1 * MB, 100 * MB])
@pytest.mark.parametrize("late", [0.0, 0.001, 0.01], ids=["punctual", "1 ms late", "10 ms late"])
def test_the_rate_is_kept_to_5_percent_over_10_seconds(clock, rate, count, late):
    bucket = Bucket(rate, clock)
    transfers = [Transfer(limiter(bucket), late=late) for _ in range(count)]
    run(clock, transfers, 10)
    assert sum(transfer.moved for transfer in transfers) == pytest.approx(10 * rate, rel=0.05)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("rate", [1 * MB, 100 * MB])
def test_the_rate_is_kept_by_transfers_that_sleep_through_what_they_were_told(clock, rate, count):
    bucket = Bucket(rate, clock)
    transfers = [Transfer(limiter(bucket), asks_again=False) for _ in range(count)]
    run(clock, transfers, 10)
    assert sum(transfer.moved for transfer in transfers) == pytest.approx(10 * rate, rel=0.05)


@pytest.mark.parametrize("rate", [1 * MB, 100 * MB])
def test_rounding_makes_nobody_pay_twice(clock, rate):
    clock.now = 0.0
    transfer = Transfer(limiter(Bucket(rate, clock)), bite=1 << 20)
    run(clock, [transfer], 100)
    assert transfer.moved == pytest.approx(rate * 100, rel=0.02)


def test_bites_of_any_size_are_paid_in_the_end(clock):
    transfer = Transfer(limiter(Bucket(250, clock)), bite=1000)
    run(clock, [transfer], 1000)
    assert transfer.moved == pytest.approx(250 * 1000, rel=0.01)


def test_a_pause_is_made_up_for_only_by_a_tenth_of_a_second(clock):
    transfer = Transfer(limiter(Bucket(1 * MB, clock)))
    run(clock, [transfer], 1)
    moved, clock.now = transfer.moved, clock.now + 3600
    run(clock, [transfer], 1)
    assert transfer.moved - moved <= (1 + SLACK + 0.05) * MB


def test_a_clock_that_stands_or_goes_back_pays_nothing(clock):
    chain = limiter(Bucket(1000, clock))
    assert chain.acquire(1000) == pytest.approx(1)
    clock.now -= 100
    assert chain.acquire(0) == pytest.approx(1)
    clock.now += 100
    assert chain.acquire(0) == pytest.approx(1)


@given(
    st.floats(1, 1e9),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 22), st.floats(0, 2)), min_size=1, max_size=60),
)
def test_never_more_is_paid_than_the_rate_allows_and_nothing_is_forgotten(rate, steps):
    clock = FakeClock()
    bucket, begin, taken = Bucket(rate, clock), clock.now, 0
    chains = [limiter(bucket) for _ in range(4)]
    for who, count, pause in steps:
        taken += count
        chains[who].acquire(count)
        clock.now += pause
    for _ in range(100):
        left = max(chain.acquire(0) for chain in chains)
        if not left:
            break
        clock.now += left
    assert not left
    assert taken <= rate * (clock.now - begin + 1e-5) + 1  # a rest below a microsecond is rounding


# -- levels


@pytest.mark.parametrize("rates", list(itertools.permutations([300e3, 1 * MB, 5 * MB])))
def test_every_byte_pays_at_every_level(clock, rates):
    transfer = Transfer(limiter(*(Bucket(rate, clock) for rate in rates)))
    run(clock, [transfer], 10)
    assert transfer.moved == pytest.approx(10 * 300e3, rel=0.05)


def test_what_one_job_may_not_use_is_left_to_the_others_of_the_machine(clock):
    machine, slow = Bucket(1 * MB, clock), Bucket(100e3, clock)
    low, free = Transfer(limiter(machine, None, slow)), Transfer(limiter(machine, None, None))
    run(clock, [low, free], 10)
    assert low.moved == pytest.approx(1 * MB, rel=0.05)
    assert free.moved == pytest.approx(9 * MB, rel=0.05)


def test_a_priority_limits_all_its_jobs_together(clock):
    machine, low = Bucket(10 * MB, clock), Bucket(1 * MB, clock)
    jobs = [Transfer(limiter(machine, low, Bucket(800e3, clock))) for _ in range(3)]
    run(clock, jobs, 10)
    assert sum(job.moved for job in jobs) == pytest.approx(10 * MB, rel=0.05)
    assert [job.moved for job in jobs] == pytest.approx([10 * MB / 3] * 3, rel=0.05)


# -- fairness


@pytest.mark.parametrize("bites", [(16_000, 16_000, 16_000), (16_000, 4_000, 1_000), (60_000, 1_000, 500, 16_000)])
def test_transfers_on_one_bucket_get_equal_shares_whatever_the_size_of_their_bites(clock, bites):
    bucket = Bucket(1 * MB, clock)
    transfers = [Transfer(limiter(bucket), bite=bite) for bite in bites]
    run(clock, transfers, 20)
    assert [transfer.moved for transfer in transfers] == pytest.approx([20 * MB / len(bites)] * len(bites), rel=0.05)


def test_a_transfer_that_ended_leaves_its_share_to_the_others(clock):
    bucket = Bucket(1 * MB, clock)
    first, second = Transfer(limiter(bucket)), Transfer(limiter(bucket))
    run(clock, [first, second], 10, at=[(5, lambda: setattr(first, "ended", True))])
    assert first.moved == pytest.approx(2.5 * MB, rel=0.05)
    assert second.moved == pytest.approx(7.5 * MB, rel=0.05)


def test_a_large_bite_of_one_transfer_does_not_hold_up_the_others(clock):
    bucket = Bucket(1 * MB, clock)
    greedy, modest = limiter(bucket), limiter(bucket)
    greedy.acquire(100_000_000)
    assert modest.acquire(1000) == pytest.approx(0.002)


def test_what_an_ended_transfer_has_taken_still_counts(clock):
    bucket = Bucket(1 * MB, clock)
    limiter(bucket).acquire(5_000_000)
    transfer = Transfer(limiter(bucket))
    run(clock, [transfer], 10)
    assert transfer.moved == pytest.approx(5 * MB, rel=0.05)


# -- changes


def test_no_rest_is_longer_than_a_second_and_all_together_are_as_long_as_needed(clock):
    rests = []
    for seconds in limiter(Bucket(1000, clock)).rests(5500):
        rests.append(seconds)
        clock.now += seconds
    assert max(rests) <= LONGEST_REST
    assert sum(rests) == pytest.approx(5.5)


@pytest.mark.parametrize("rate", [1 * MB, None], ids=["higher", "none"])
def test_a_raised_limit_reaches_a_sleeper_within_a_second(clock, rate):
    bucket = Bucket(250, clock)
    begin = clock.now
    for number, seconds in enumerate(limiter(bucket).rests(1_000_000)):
        clock.now += seconds
        if number == 2:
            bucket.set_rate(rate)
            changed = clock.now
    assert changed == pytest.approx(begin + 3)
    assert clock.now - changed <= 1.01


def test_a_lowered_limit_counts_at_once(clock):
    bucket = Bucket(10 * MB, clock)
    transfer = Transfer(limiter(bucket))
    run(clock, [transfer], 20, at=[(10, lambda: bucket.set_rate(100e3))])
    assert transfer.moved == pytest.approx(101 * MB, rel=0.01)


def test_bytes_of_a_fast_time_are_not_paid_at_the_slow_rate(clock):
    bucket = Bucket(100 * MB, clock)
    fast, other = limiter(bucket), limiter(bucket)
    fast.acquire(1_000_000)
    other.acquire(500_000)
    bucket.set_rate(250)
    assert fast.acquire(0) <= 0.03
    clock.now += 0.016
    assert fast.acquire(0) == other.acquire(0) == 0
    assert fast.acquire(250) == pytest.approx(1, rel=0.01)


def test_lifting_the_limit_forgives_all_debts(clock):
    bucket = Bucket(250, clock)
    chain = limiter(bucket)
    chain.acquire(1_000_000)
    bucket.set_rate(None)
    assert chain.acquire(1_000_000) == 0
    clock.now += 5
    bucket.set_rate(250)
    assert chain.acquire(0) == 0
    assert chain.acquire(250) == pytest.approx(1)


@given(st.lists(st.tuples(st.sampled_from([None, 250.0, 1e6, 1e8]), st.integers(0, 1 << 21), st.floats(0, 5)), max_size=40))
def test_whatever_changes_a_sleeper_always_wakes(steps):
    clock = FakeClock()
    bucket = Bucket(1e6, clock)
    chains = [Chain(bucket), Chain(bucket)]
    for rate, count, pause in steps:
        for chain in chains:
            rest = chain.acquire(count)
            assert 0 <= rest < 1e6
        clock.now += pause
        bucket.set_rate(rate)
    bucket.set_rate(1e9)
    for chain in chains:
        for seconds in itertools.islice(chain.rests(0), 10_000):
            clock.now += seconds
        assert chain.acquire(0) == 0


# -- without limits


def test_nothing_set_is_no_limiter_at_all():
    assert limiter() is None
    assert limiter(None, None, None) is None
    assert limiter(Bucket(), None, Bucket(None)) is None


def test_a_chain_takes_up_a_limit_that_is_set_later(clock):
    machine, job = Bucket(None, clock), Bucket(None, clock)
    chain = Chain(machine, job)
    assert not chain.limited
    assert chain.acquire(1 << 40) == 0
    assert list(chain.rests(1 << 40)) == []
    assert chain.chunk == LARGEST_CHUNK
    clock.now += 60
    job.set_rate(1000)
    assert chain.limited
    assert chain.acquire(1000) == pytest.approx(1)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), True, "fast"])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(InvalidArgument):
        Bucket(rate)
    with pytest.raises(InvalidArgument):
        Bucket(1).set_rate(rate)


# -- advice


@given(st.floats(60, 1e12), st.integers(1, 1000))
def test_a_chunk_is_at_most_a_sixtieth_of_a_second(rate, sharing):
    assert 1 <= largest_chunk(rate, sharing) <= max(1, rate / 60)
    assert largest_chunk(rate, sharing) <= LARGEST_CHUNK


def test_chunks_get_smaller_when_very_many_share_a_bucket(clock):
    bucket = Bucket(1 * MB, clock)
    assert limiter(bucket).chunk == 16_666
    for _ in range(99):
        limiter(bucket).acquire(1000)
    assert limiter(bucket, Bucket(50 * MB, clock)).chunk == 2500


# -- threads


@pytest.fixture
def nervous_interpreter():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(count, work):
    """Run `work(number)` in so many threads, begun together."""
    gate, errors = threading.Barrier(count), []

    def go(number):
        try:
            gate.wait(10)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=go, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors


@pytest.mark.usefixtures("nervous_interpreter")
def test_bytes_that_threads_take_at_the_same_time_are_all_counted(clock):
    bucket = Bucket(1 * MB, clock)
    chain = limiter(bucket)
    in_threads(8, lambda _: [chain.acquire(1000) for _ in range(1000)])
    assert chain.acquire(0) == pytest.approx(8)


class Hesitant(float):
    """A moment; who works out how long ago another one was lets the other threads go first."""

    def __sub__(self, other):
        difference = float(self) - other
        time.sleep(1e-4)
        return difference


def test_time_that_passes_while_threads_take_is_paid_with_once():
    ticks = itertools.count()
    bucket = Bucket(1000, lambda: Hesitant(next(ticks) * 0.001))  # every look at the clock is one byte's worth
    chains = [limiter(bucket) for _ in range(4)]
    in_threads(4, lambda number: [chains[number].acquire(100) for _ in range(100)])
    left = sum(account.due - bucket._level for chain in chains for _, account in chain._levels)
    assert left == pytest.approx(40_000 - (next(ticks) - 1), abs=1)


@pytest.mark.usefixtures("nervous_interpreter")
def test_the_rate_may_change_while_threads_take():
    bucket = Bucket(1 * MB)
    chains = [Chain(bucket) for _ in range(4)]

    def work(number):
        for turn in range(500):
            if number == 0:
                bucket.set_rate((None, 250.0, 1 * MB, 1e9)[turn % 4])
            assert chains[number].acquire(1000) >= 0

    in_threads(4, work)
    bucket.set_rate(None)
    assert all(chain.acquire(0) == 0 for chain in chains)


def test_threads_that_sleep_keep_the_rate():
    bucket, moved = Bucket(20 * MB), [0] * 4
    begin = time.monotonic()

    def work(number):
        chain = limiter(bucket)
        while time.monotonic() - begin < 1:
            bite = chain.chunk
            moved[number] += bite
            for seconds in chain.rests(bite):
                time.sleep(seconds)

    in_threads(4, work)
    allowed = 20 * MB * (time.monotonic() - begin + SLACK)
    assert sum(moved) <= allowed
    assert all(moved)  # how much less it may be is a matter of how late a busy machine wakes them
