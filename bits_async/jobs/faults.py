"""A journal that cannot be used for now (its volume is full, say): since when and why, when it is tried again, and how often that is said.

Values and decisions only: the engine pauses the transfers, tries the journal and goes on. Times are monotonic seconds.
"""

import math
from dataclasses import dataclass
from typing import Final

from ..errors import StoreError

FIRST_TRY: Final = 1.0  # seconds after the fault; each later try is after twice as long
LONGEST_PAUSE: Final = 60.0
CALM: Final = 60.0  # usable for less than this, the next fault counts as the same one: else what comes and goes is tried every second
REMINDER: Final = 900.0  # so often the log says that it lasts


@dataclass(slots=True)
class JournalFault:
    """The fault that lasts; `error` is None while there is none."""

    error: StoreError | None = None
    since: float = 0.0
    next_try: float = 0.0
    _tries: int = 0
    _ended: float = -math.inf
    _said: float = 0.0

    def begin(self, error: StoreError, now: float) -> None:
        """The journal cannot be used."""
        if now - self._ended >= CALM:
            self._tries = 0
        self.error, self.since, self._said = error, now, now
        self._plan(now)

    def again(self, error: StoreError, now: float) -> bool:
        """It was tried in vain. True: the log is to say so."""
        self.error = error
        self._plan(now)
        if now - self._said < REMINDER:
            return False
        self._said = now
        return True

    def _plan(self, now: float) -> None:
        self.next_try = now + min(FIRST_TRY * 2 ** min(self._tries, 10), LONGEST_PAUSE)
        self._tries += 1

    def end(self, now: float) -> None:
        """It can be used again."""
        self.error, self._ended = None, now
