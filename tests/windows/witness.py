"""A plugin of pytest for Windows: writes the diary of a run, and ends a process in which a test stands still, having said where.

It takes no part in how a test goes. The diary's path, and a file that lists the tests not to run because they have ended in an earlier
process, and the seconds that a test may take come in the environment: BITS_DIARY, BITS_LEAVE_OUT, BITS_LIMIT.
"""

import asyncio
import faulthandler
import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

from tests.windows.diary import Diary

STOOD_STILL: Final = 3  # the exit code
NUDGE: Final = 5.0  # seconds that a loop has to answer
FRAMES: Final = 12  # of each thread, the innermost: those before them are pytest's
GO_ON: Final = 3.0  # and that a test has to end then


def pytest_configure(config: pytest.Config) -> None:
    leave_out = frozenset(json.loads(Path(os.environ["BITS_LEAVE_OUT"]).read_text(encoding="utf-8")))
    witness = Witness(Diary(Path(os.environ["BITS_DIARY"])), leave_out, float(os.environ["BITS_LIMIT"]))
    config.pluginmanager.register(witness, "witness-of-tests")


class Witness:
    """The hooks, and a thread that looks once a second."""

    def __init__(self, diary: Diary, leave_out: frozenset[str], limit: float) -> None:
        self._diary = diary
        self._leave_out = leave_out
        self._limit = limit
        self._test: tuple[str, float] | None = None  # and when it began
        self._stood_still = False
        self._failures: list[str] = []
        self._stacks = diary.stacks.open("w", encoding="utf-8")
        threading.Thread(target=self._watch, name="witness", daemon=True).start()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self._leave_out])
        items[:] = [item for item in items if item.nodeid not in self._leave_out]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, bool | None, bool | None]:
        self._failures.clear()
        self._diary.begun(item.nodeid)
        faulthandler.dump_traceback_later(self._limit + 2 * NUDGE + GO_ON, exit=True, file=self._stacks)  # if no Python code runs any more
        self._test = item.nodeid, time.monotonic()
        done = yield
        self._test = None
        while self._stood_still:  # what comes of it now does not count: the process is about to end
            time.sleep(1.0)
        faulthandler.cancel_dump_traceback_later()
        self._diary.ended(item.nodeid, "\n".join(self._failures) or None)
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failures.append(f"{report.when}: {report.longreprtext}")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        yield
        sys.stdout.flush()
        self._diary.over(int(session.exitstatus))

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._limit / 4))
            test = self._test
            if test is not None and time.monotonic() - test[1] > self._limit:
                self._stood_still = True
                told = "\n".join(_where_everybody_is())
                answers = _nudge_loops()
                end = time.monotonic() + GO_ON
                while self._test is test and time.monotonic() < end:
                    time.sleep(0.05)
                if self._test is not test:
                    answers += "; and the test went on: a wake-up of the loop had been lost"
                self._diary.stood_still(test[0], f"{told}\n\n{answers}")
                os._exit(STOOD_STILL)


# -- where everybody is


def _where_everybody_is() -> Iterator[str]:
    """The stack of each thread, and what each task of each loop waits for."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"-- thread {names.get(ident, ident)}"
        yield "".join(traceback.format_stack(frame, FRAMES)).rstrip()
    for task in _tasks():
        yield f"-- task {task!r}"
        yield from _waits_for(task.get_coro())


def _tasks() -> list["asyncio.Task[Any]"]:
    """Those that are not done, of all loops: asyncio tells only of the running one."""
    return [each for each in gc.get_objects() if isinstance(each, asyncio.Task) and not each.done()]


def _waits_for(awaited: Any) -> Iterator[str]:
    """From the outermost coroutine down to the future."""
    while awaited is not None:
        frame: FrameType | None = next(
            (found for name in ("cr_frame", "gi_frame", "ag_frame") if (found := getattr(awaited, name, None))), None
        )
        if frame is None:
            yield f"  {awaited!r}"
            return
        yield f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}'
        awaited = next((found for name in ("cr_await", "gi_yieldfrom", "ag_await") if (found := getattr(awaited, name, None))), None)


def _nudge_loops() -> str:
    """Whether the running loops come to what another thread asks them to do."""
    loops = {loop for task in _tasks() if (loop := task.get_loop()).is_running()}
    answered = []
    for loop in loops:
        answer = threading.Event()
        loop.call_soon_threadsafe(answer.set)
        answered.append(answer.wait(NUDGE))
    return f"{len(loops)} running event loops, of which {answered.count(True)} do what another thread asks them to do"
