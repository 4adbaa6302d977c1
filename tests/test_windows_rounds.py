"""What becomes of a test that stands still under Wine, and of those beside it: `tests.windows`, with this machine in Wine's place."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.windows.diary import Diary
from tests.windows.rounds import Ended, run

ROOT = Path(__file__).parents[1]
LIMIT = 6.0  # seconds: the tests of the suite end at once, but for a busy machine

SUITE = """
    import asyncio, os, pathlib, signal, threading, time

    HERE = pathlib.Path(__file__).parent

    def count(name):
        with (HERE / name).open("a") as file:
            file.write("x")
        return (HERE / name).stat().st_size

    def test_first():
        assert count("first") == 1

    def test_that_fails():
        count("fails")
        assert 2 + 2 == 5

    async def wait_for_nobody():
        await asyncio.get_running_loop().create_future()

    async def miss():
        future = asyncio.get_running_loop().create_future()
        threading.Timer(0.1, future.set_result, [None]).start()  # from another thread, and not threadsafe
        await future

    def test_in_the_middle():
        {middle}

    def test_last():
        count("last")
"""


class Wine:
    """Runs pytest on a suite whose test in the middle is given."""

    def __init__(self, directory: Path, middle: str) -> None:
        self.directory = directory
        self.said: list[str] = []
        (directory / "pytest.ini").write_text("[pytest]\n")
        (directory / "test_suite.py").write_text(textwrap.dedent(SUITE).format(middle=middle))

    def run(self, leeway: float = 30.0) -> int:
        return run(self._process, self.directory, limit=LIMIT, leeway=leeway, say=self.said.append)

    def count(self, name: str) -> int:
        path = self.directory / name
        return path.stat().st_size if path.exists() else 0

    @property
    def told(self) -> str:
        return "\n".join(self.said)

    def _process(self, diary: Path, leave_out: Path, is_lost: Callable[[], bool]) -> Ended:
        told = {"BITS_DIARY": str(diary), "BITS_LEAVE_OUT": str(leave_out), "BITS_LIMIT": str(LIMIT)}
        quick = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.windows.witness"]
        with subprocess.Popen(
            command, cwd=self.directory, env={**os.environ, **told, **quick}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while True:
                try:
                    return Ended(process.wait(0.05))
                except subprocess.TimeoutExpired:
                    if is_lost():
                        process.kill()
                        return Ended(process.wait(), lost=True)


def test_a_test_that_stands_still_once_is_named_and_run_again_and_what_failed_before_it_stays_failed(tmp_path: Path) -> None:
    wine = Wine(tmp_path, 'asyncio.run(miss()) if count("middle") == 1 else None')
    assert wine.run() == 1
    assert {name: wine.count(name) for name in ("first", "fails", "middle", "last")} == {"first": 1, "fails": 1, "middle": 2, "last": 1}
    assert "STOOD STILL: test_suite.py::test_in_the_middle" in wine.told
    assert "-- thread MainThread" in wine.told
    assert "the test went on: a wake-up of the loop had been lost" in wine.told
    assert "STOOD STILL ONCE, AND WAS RUN AGAIN: test_suite.py::test_in_the_middle" in wine.told
    assert "FAILED: test_suite.py::test_that_fails" in wine.told
    assert "2 + 2" in wine.told, "the assertion itself"


def test_a_test_that_stands_still_again_fails_the_run(tmp_path: Path) -> None:
    wine = Wine(tmp_path, 'count("middle"); asyncio.run(wait_for_nobody())')
    assert wine.run() == 1
    assert (wine.count("middle"), wine.count("last")) == (2, 0)
    assert "when it was run again, too" in wine.told
    assert "in wait_for_nobody" in wine.told, "where each task waits"
    assert "1 running event loops, of which 1 do what another thread asks them to do" in wine.told
    assert "went on" not in wine.told


@pytest.mark.parametrize(("silent", "code"), [(1, 0), (2, 1)])
def test_a_process_that_stands_still_before_the_first_test_is_ended_and_started_once_more(tmp_path: Path, silent: int, code: int) -> None:
    """Played: how long a process may take to begin is more than a test has."""
    said: list[str] = []
    starts: list[Path] = []

    def process(diary: Path, leave_out: Path, is_lost: Callable[[], bool]) -> Ended:
        starts.append(diary)
        if len(starts) <= silent:
            return Ended(0, lost=True)
        Diary(diary).over(0)
        return Ended(0)

    assert run(process, tmp_path, say=said.append) == code
    assert len(starts) == 2
    assert "STOOD STILL: before the first test" in "\n".join(said)


def test_a_process_that_goes_away_has_failed_and_its_test_is_not_run_again(tmp_path: Path) -> None:
    wine = Wine(tmp_path, 'count("middle"); os._exit(0)')
    assert wine.run() == 1
    assert (wine.count("middle"), wine.count("last")) == (1, 0)
    assert "PYTEST DID NOT COME TO ITS END (exit code 0) in test_suite.py::test_in_the_middle" in wine.told
    assert "FAILED: test_suite.py::test_that_fails" in wine.told


def test_a_process_that_is_silent_is_ended_from_outside(tmp_path: Path) -> None:
    wine = Wine(tmp_path, 'count("middle") == 1 and os.kill(os.getpid(), signal.SIGSTOP)')
    assert wine.run(leeway=4) == 1
    assert (wine.count("middle"), wine.count("last")) == (2, 1)
    assert "Nothing could be learned of its threads" in wine.told


def test_the_exit_code_is_pytests(tmp_path: Path) -> None:
    wine = Wine(tmp_path, '__import__("pytest").exit("enough", 7)')
    assert wine.run() == 7
    assert wine.told == ""


def test_a_process_that_stays_when_all_tests_are_over_is_ended(tmp_path: Path) -> None:
    wine = Wine(tmp_path, "threading.Thread(target=time.sleep, args=[600]).start()")
    assert wine.run(leeway=4) == 1
    assert wine.count("last") == 1
    assert "All tests were over, but the process did not end by itself" in wine.told
