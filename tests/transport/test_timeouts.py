"""The four numbers of `Timeouts`."""

import pytest

from bits_async.errors import ErrorCode, InvalidArgument
from bits_async.transport.timeouts import Timeouts


def test_defaults_are_those_of_the_design() -> None:
    assert Timeouts() == Timeouts(connect=30, response=300, idle=60, auth=30)


@pytest.mark.parametrize("field", ["connect", "response", "idle", "auth"])
@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), None, "30", True])
def test_a_timeout_that_is_not_positive_and_finite_is_refused_by_name(field: str, seconds: object) -> None:
    with pytest.raises(InvalidArgument, match=field) as caught:
        Timeouts(**{field: seconds})  # type: ignore[arg-type]
    assert caught.value.code == ErrorCode.E_INVALIDARG


def test_timeouts_are_values() -> None:
    assert hash(Timeouts(connect=0.5)) == hash(Timeouts(connect=0.5))
    with pytest.raises(AttributeError):
        Timeouts().connect = 1  # type: ignore[misc]
