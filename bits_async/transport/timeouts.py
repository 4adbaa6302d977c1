"""How long the wire may be silent, and how slow.

Pure: these are numbers; who waits and what is closed afterwards is `connector` and `lane`. There is no total timeout: a
large file on a slow line takes as long as it takes.
"""

import math
from dataclasses import dataclass, fields

from ..errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds after which the wire is given up on, and how slow it may be; each a positive, finite number.

    Attributes:
        connect: until TCP and TLS stand, the proxy's part included.
        response: from the request until the head of its answer is complete.
        idle: without a byte of a body.
        auth: for one leg of a login, the draining of its body included.
        low_speed_limit: bytes a second of a body, as an average over `low_speed_time` seconds spent waiting for it. A peer that sends less
            is given up on (a transient error): one that sends a byte a minute is never silent. Time that a bandwidth limit of ours
            takes does not count.

    Raises:
        InvalidArgument: a number that is not positive and finite.
    """

    connect: float = 30.0
    response: float = 300.0
    idle: float = 60.0
    auth: float = 30.0
    low_speed_limit: float = 10.0
    low_speed_time: float = 120.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not (math.isfinite(seconds) and seconds > 0):
                raise InvalidArgument(f"the {field.name} timeout must be a positive number")


class Pace:
    """How fast a body comes, told by whoever waits for it. Not safe from several threads."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._limit, self._window = timeouts.low_speed_limit, timeouts.low_speed_time
        self._waited = 0.0
        self._count = 0
        self.too_slow = False  # over one window it was

    @property
    def told(self) -> str:
        """What is too slow, for people."""
        return f"less than {self._limit:g} bytes a second for {self._window:g} seconds"

    def waited(self, seconds: float) -> None:
        """So long nothing was there to read."""
        self._waited += seconds
        if self._waited >= self._window:
            self.too_slow = self._count < self._limit * self._waited
            self._waited, self._count = 0.0, 0

    def came(self, count: int) -> None:
        """So many bytes came."""
        self._count += count
