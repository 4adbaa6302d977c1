"""How long the wire may be silent.

Pure: these are four numbers; who waits and what is closed afterwards is `connector` and `lane`. There is no total timeout: a
large file on a slow line takes as long as it takes.
"""

import math
from dataclasses import dataclass, fields

from ..errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds without which the wire is given up on; each a positive, finite number.

    Attributes:
        connect: until TCP and TLS stand, the proxy's part included.
        response: from the request until the head of its answer is complete.
        idle: without a byte of a body.
        auth: for one leg of a login, the draining of its body included.

    Raises:
        InvalidArgument: a number that is not positive and finite.
    """

    connect: float = 30.0
    response: float = 300.0
    idle: float = 60.0
    auth: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not (math.isfinite(seconds) and seconds > 0):
                raise InvalidArgument(f"the {field.name} timeout must be a positive number of seconds")
