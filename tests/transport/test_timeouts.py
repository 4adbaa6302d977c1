"""The numbers of `Timeouts`, and a pace held to two of them."""

import pytest

from bits_async.errors import ErrorCode, InvalidArgument
from bits_async.transport.timeouts import Pace, Timeouts


def test_defaults_are_those_of_the_design() -> None:
    assert Timeouts() == Timeouts(connect=30, response=300, idle=60, auth=30, low_speed_limit=10, low_speed_time=120)


@pytest.mark.parametrize("field", ["connect", "response", "idle", "auth", "low_speed_limit", "low_speed_time"])
@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), None, "30", True])
def test_a_timeout_that_is_not_positive_and_finite_is_refused_by_name(field: str, seconds: object) -> None:
    with pytest.raises(InvalidArgument, match=field) as caught:
        Timeouts(**{field: seconds})  # type: ignore[arg-type]
    assert caught.value.code == ErrorCode.E_INVALIDARG


def test_timeouts_are_values() -> None:
    assert hash(Timeouts(connect=0.5)) == hash(Timeouts(connect=0.5))
    with pytest.raises(AttributeError):
        Timeouts().connect = 1  # type: ignore[misc]


def paced(*steps: tuple[float, int]) -> bool:
    pace = Pace(Timeouts(low_speed_limit=10, low_speed_time=60))
    for seconds, count in steps:
        pace.waited(seconds)
        pace.came(count)
    return pace.too_slow


def test_a_pace_is_an_average_over_the_time_that_was_waited() -> None:
    assert paced(*[(6, 59)] * 10 + [(1, 0)])
    assert not paced(*[(6, 70)] * 10 + [(1, 0)])
    assert not paced((59, 0)), "the window is not over"
    assert paced((61, 0))
    assert not paced((0, 1_000_000), *[(10, 0)] * 6), "a burst counts for its window"
    assert paced((0, 1_000_000), *[(10, 0)] * 13), "and for no later one"
