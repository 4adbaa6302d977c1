"""kill -9 at random moments of a run of 20 jobs: 10 finish, 5 are cancelled, 5 fail.

After each kill: no job is lost, no state that was reported is lost, and no part file is there that the journal does not know. After the
last run: each file is whole, and nothing else is left.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bits_async import JobState
from tests.peers import Fault, Origin, answer
from tests.process import queue_run
from tests.process.queue_run import CANCELLED, FAILING, FINISHING, JOBS
from tests.waiting import until

WORKING = {JobState.QUEUED, JobState.CONNECTING, JobState.TRANSFERRING, JobState.TRANSIENT_ERROR}
LINES_PER_LIFE = 9  # on average, so that twenty kills are spread over two or three whole runs


class Nursery:
    def __init__(self) -> None:
        self._process = queue_run.start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    async def life(self, **order: object) -> int:
        self._orders.write(queue_run.json.dumps(order) + "\n")
        self._orders.flush()
        return int((await asyncio.to_thread(self._answers.readline)).removeprefix("pid "))

    async def end(self) -> int:
        return int((await asyncio.to_thread(self._answers.readline)).removeprefix("ended "))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Run:
    """One journal and one directory, from the first process to the one that is not killed."""

    def __init__(self, directory: Path, origin: Origin, chance: random.Random) -> None:
        self._chance = chance
        self.store = directory / "queue.db"
        self.out = directory / "out"
        self.report = directory / "report"
        self.copy = directory / "copy"
        self.out.mkdir(parents=True)
        self.report.touch()
        self.bodies = {number: [os.urandom(chance.randrange(1, 200_000)) for _ in range(1 + number % 2)] for number in JOBS}
        self.files = [self._served(origin, directory.name, number) for number in JOBS]

    def _served(self, origin: Origin, where: str, number: int) -> list[tuple[str, str]]:
        served = []
        for index, body in enumerate(self.bodies[number]):
            path = f"/{where}/{number}.{index}"
            served.append((origin.serve(path, body), str(self.out / f"{number}.{index}")))
            # slow enough to be killed in the middle of it; those that fail do so after their first file, if they have two
            refused = number in FAILING and index == len(self.bodies[number]) - 1
            origin.always(path, answer(404) if refused else Fault(rate=1 << 20))
        return served

    def said(self) -> list[tuple[str, int]]:
        whole = self.report.read_text().split("\n")[:-1]  # a line is written in one go
        return [(verb, int(number)) for verb, number in (line.split() for line in whole)]

    def gone(self) -> list[int]:
        """Jobs that have left the queue, or may have."""
        queue, said = self.queue(), self.said()
        return [n for n in JOBS if n not in queue and {("completing", n), ("cancelling", n)} & set(said)]

    def queue(self) -> dict[int, tuple[JobState, bool, set[str], set[str]]]:
        """Job by number: its state, whether it has files, its part files, and the names that its next ones will have (in part).

        Read from a copy: the journal itself is recovered by the next process.
        """
        shutil.rmtree(self.copy, ignore_errors=True)
        self.copy.mkdir()
        for each in self.store.parent.glob("queue.db*"):
            if not each.name.endswith("-shm"):
                shutil.copy(each, self.copy / each.name)
        found: dict[int, tuple[JobState, bool, set[str], set[str]]] = {}
        database = sqlite3.connect(self.copy / "queue.db")
        try:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if "jobs" not in tables:
                return {}
            ((jobs, names),) = database.execute("SELECT count(*), count(DISTINCT display_name) FROM jobs")
            sql = "SELECT display_name, state, part_name, part_draft FROM jobs LEFT JOIN files ON files.job_id = jobs.id"
            rows = database.execute(sql).fetchall()
        finally:
            database.close()
        assert jobs == names, "no job is there twice"
        for name, state, part, draft in rows:
            _, _, parts, drafts = found.setdefault(int(name), (JobState(state), draft is not None, set(), set()))
            parts.update({part} - {None})
            drafts.update({draft} - {None, ""})
        return found

    def check(self) -> None:
        queue, said = self.queue(), self.said()
        last = {number: verb for verb, number in said if verb != "opened"}
        for number, verb in last.items():
            state, has_files, _, _ = queue.get(number, (None, False, set(), set()))
            story = f"job {number}: {[v for v, n in said if n == number]}, and now {state}"
            if verb in ("completing", "cancelling"):
                continue  # it was not said what came of it
            if verb in ("completed", "cancelled"):
                assert state is None, story
            elif verb == "created":  # an earlier life may have gone further than it could say
                assert state is JobState.SUSPENDED or has_files, story
            elif verb == "added":
                assert state is not None, story
                assert has_files, story
            elif verb == "resumed":
                assert state in WORKING | {JobState.TRANSFERRED, JobState.ERROR}, story
            elif verb == "transferred":  # and killed before it said what it does with it
                assert state is JobState.TRANSFERRED, story
            elif verb == "failed":
                assert state is JobState.ERROR, story
            else:
                raise AssertionError(story)
            if verb == "completed":
                self.check_files(number)
        self.check_parts(queue)

    def check_parts(self, queue: dict[int, tuple[JobState, bool, set[str], set[str]]]) -> None:
        parts = {name for _, _, names, _ in queue.values() for name in names}
        drafts = {name for _, _, _, names in queue.values() for name in names}
        for path in self.out.glob(".*"):
            expected = path.name.rsplit(".", 2)[1] in drafts  # just made; the next process knows it
            assert path.name in parts or expected, f"a stray part file: {path.name}"

    def check_files(self, number: int) -> None:
        for index, body in enumerate(self.bodies[number]):
            assert (self.out / f"{number}.{index}").read_bytes() == body

    def check_end(self) -> None:
        self.check()
        assert {number: state for number, (state, *_) in self.queue().items()} == dict.fromkeys(FAILING, JobState.ERROR)
        for number in FINISHING:
            self.check_files(number)
        kept = {f"{number}.{index}" for number in FINISHING for index in range(len(self.bodies[number]))}
        parts = {name for _, _, names, _ in self.queue().values() for name in names}
        assert {path.name for path in self.out.iterdir()} == kept | {name for name in parts if (self.out / name).exists()}
        assert not set(CANCELLED) & set(self.queue())

    async def killed(self, nursery: Nursery) -> bool:
        """One process. False: it came to its end before it was killed."""
        lines, late = int(self._chance.expovariate(1 / LINES_PER_LIFE)), self._chance.uniform(0, 0.02)
        before = len(self.said())
        order = {"store": str(self.store), "report": str(self.report), "files": self.files}
        pid = await nursery.life(**order, seed=self._chance.random(), gone=self.gone())
        ended = asyncio.ensure_future(nursery.end())
        await until(lambda: ended.done() or len(self.said()) - before >= lines)
        await asyncio.wait({ended}, timeout=late)
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):  # at this very moment it came to its end
                os.kill(pid, signal.SIGKILL)
        status = await ended
        assert status in (0, -signal.SIGKILL)
        return status != 0


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    found = Nursery()
    yield found
    found.close()


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as found:
        yield found


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
async def test_killed_again_and_again_no_job_and_no_reported_state_is_lost_and_nothing_stray_is_left(nursery, origin, tmp_path, kills):
    seed = 1 if kills == 20 else random.randrange(1 << 32)  # those who land a change kill at the same moments
    print(f"seed {seed}")
    chance, done, runs = random.Random(seed), 0, 0
    while done < kills:
        runs += 1
        run = Run(tmp_path / f"run{runs}", origin, chance)
        while await run.killed(nursery):
            done += 1
            run.check()
        run.check_end()
    print(f"{done} kills in {runs} runs")
