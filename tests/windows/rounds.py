"""Runs tests in a process that may stand still, and goes on with the others in a new one.

Under Wine a test has stood still that never did otherwise: so rarely that it says nothing of the test, and for so long that nobody can
wait for it. What becomes of each test:

- It ended, well or badly: that is its outcome, and it is never run again.
- Its process was ended because it stood still: that is said loudly, with the stacks of all threads and tasks, and it is run again once, in
  a new process that has all tests which have not ended. If it stands still again, or if more than `MOST` tests do, the run has failed. A
  process that stands still before its first test counts as one of them.
- Its process went away in any other manner: the run has failed.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from tests.windows.diary import Diary, Told

LIMIT: Final = 180.0
"""Seconds for one test with its fixtures. The slowest takes 5 s, and 20 s where seven processes wait for each processor."""

MOST: Final = 2
LEEWAY: Final = 30.0
"""Seconds without an event, beyond a test's limit, if not even `witness` could say so; and for a process to go that said it was over."""

START: Final = 600.0  # seconds until the first test begins, all modules collected: ten on an idle machine
BEFORE: Final = "before the first test"  # what stands still where no test has begun


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended. `lost`: it was made to, for silence. The code says nothing then; Wine may also say 0 for one that broke."""

    code: int
    lost: bool = False


class Process(Protocol):
    """Runs pytest with the plugin `witness`."""

    def __call__(self, diary: Path, leave_out: Path, is_lost: Callable[[], bool]) -> Ended:
        """Returns when it has ended, which this sees to once `is_lost`. `leave_out`: a file that lists the tests not to run."""
        ...


def run(process: Process, directory: Path, *, limit: float = LIMIT, leeway: float = LEEWAY, say: Callable[[str], None] = print) -> int:
    """Runs all tests. What failed is told at the end, whatever became of the processes. Returns the exit code."""
    ended: dict[str, str | None] = {}
    stood: list[str] = []
    while True:
        diary = Diary(directory / f"diary-{len(stood)}")
        leave_out = directory / f"ended-{len(stood)}"
        leave_out.write_text(json.dumps([*ended]), encoding="utf-8")
        how = process(diary.path, leave_out, _Patience(diary, limit, leeway).is_lost)
        told = diary.read()
        if told.code is not None:
            return _verdict(told.code, how, ended, stood, say)
        ended |= told.ended
        victim = told.stood_still or told.running or (BEFORE if how.lost and not diary.size() else None)
        if not _may_go_on(victim, told, how, stood, say):
            say(f"{len(ended)} tests had ended; not all were run.")
            _tell_failures(ended, say)
            say(f"The run has failed in {victim or 'no test'}: see above.")  # last, where one looks first
            return 1
        assert victim is not None
        stood.append(victim)


class _Patience:
    """How long to wait for the next line of a diary."""

    def __init__(self, diary: Diary, limit: float, leeway: float) -> None:
        self._diary, self._limit, self._leeway = diary, limit, leeway
        self._size, self._since = 0, time.monotonic()

    def is_lost(self) -> bool:
        """No line has come for so long that none will; or the last one has, and the process stays."""
        size = self._diary.size()
        if size != self._size:
            self._size, self._since = size, time.monotonic()
        return time.monotonic() - self._since > self._allowed()

    def _allowed(self) -> float:
        if not self._size:
            return START
        return self._leeway if self._diary.read().code is not None else self._limit + self._leeway


def _may_go_on(victim: str | None, told: Told, how: Ended, stood: list[str], say: Callable[[str], None]) -> bool:
    if victim is None or not (told.stacks or how.lost):
        say(_framed(f"PYTEST DID NOT COME TO ITS END (exit code {how.code}) in {victim or 'no test'}"))
        return False
    say(told.stacks or "Nothing could be learned of its threads.")
    say(_framed(f"STOOD STILL: {victim}"))
    if victim in stood:
        say("It did so when it was run again, too.")
    elif len(stood) == MOST:
        say(f"So did {' and '.join(stood)}: no more are forgiven.")
    else:
        say("It is run again, once, in a new process, with all that have not ended.\n")
        return True
    return False


def _verdict(code: int, how: Ended, ended: dict[str, str | None], stood: list[str], say: Callable[[str], None]) -> int:
    """Of the last process, which came to its end and told its own failures; `ended` are the tests of those before it."""
    if how.lost:
        say("All tests were over, but the process did not end by itself.")
    for test in stood:
        say(_framed(f"STOOD STILL ONCE, AND WAS RUN AGAIN: {test}"))
    if stood:
        say(f"{len(ended)} tests had ended before the last process.")
    _tell_failures(ended, say)
    return code or int(any(ended.values()))


def _tell_failures(ended: dict[str, str | None], say: Callable[[str], None]) -> None:
    for test, failure in ended.items():
        if failure is not None:
            say(f"{_framed(f'FAILED: {test}')}\n{failure}")


def _framed(text: str) -> str:
    return f"{'!' * 20} {text} {'!' * 20}"
