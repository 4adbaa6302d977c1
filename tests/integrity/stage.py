"""Plays a schedule to a client: an origin that answers by its rows, and what came of it, judged.

async with Stage(schedule) as stage:
    ...                                  # somebody fetches stage.url, and is killed when `stage.killing` says so
    stage.judge(path, claims_success=True)
"""

import asyncio
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path

from tests.integrity.schedules import FAULTS, PAGE, Row, Schedule
from tests.peers import Connection, Fault, Hold, Origin, Seen


class Outcome(Enum):
    """What a client has made of a schedule."""

    RIGHT = "right"  # it says that the file is there, and it is a version that the server had
    FAILED = "failed"  # it says that it failed
    PAGE = "login page"  # it says that the file is there, and it is the login page
    SHORT = "cut short"  # it says that the file is there, and it is the beginning of a version
    MIXED = "mixed"  # it says that the file is there, and these bytes were never a file
    MISSING = "missing"  # it says that the file is there, and it is not


class Stage(Origin):
    """The origin of one schedule, and of one client."""

    def __init__(self, schedule: Schedule, scale: int = 1) -> None:
        super().__init__()
        self.schedule = schedule
        self.bodies = [schedule.version(index, scale) for index in range(len(schedule.versions))]
        self.answered = 0
        self.served = set[bytes]()
        self.killing = asyncio.Event()  # the client is to be killed now; `killed` goes on
        self.row = Row()
        self._hold: Hold | None = None

    @property
    def file_url(self) -> str:
        return self.url("/file")

    async def __aexit__(self, *details: object) -> None:
        self.killed()
        await super().__aexit__(*details)

    def killed(self) -> None:
        """The client is dead, the server goes on."""
        self.killing.clear()
        if self._hold is not None:
            self._hold.release()

    async def _send(self, connection: Connection, seen: Seen, extra: list[tuple[str, str]], path: str, fault: Fault) -> bool:
        self.row = row = self.schedule.row(self.answered)
        self.answered += 1
        version = self.bodies[row.version]
        self._files["/file"] = version
        fault = FAULTS[row.fault]
        if fault.status is None:
            self.served.add(version.body)
        elif fault.body == PAGE:
            self.served.add(PAGE)
        size = len(version.body)
        cut = None if row.cut is None or fault.status else size * row.cut // 1000
        self._hold = None if row.kill is None or fault.status else Hold(size * row.kill // 1000)
        told = replace(fault, cut_after=cut, reset=row.reset, hold=self._hold)
        if self._hold is None:
            return await super()._send(connection, seen, extra, path, told)
        watch = asyncio.ensure_future(self._announce(self._hold))
        try:
            return await super()._send(connection, seen, extra, path, told)
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _announce(self, hold: Hold) -> None:
        await hold.reached.wait()
        self.killing.set()

    def judge(self, path: Path, *, claims_success: bool) -> Outcome:
        """What became of the file."""
        if not claims_success:
            return Outcome.FAILED
        if not path.exists():
            return Outcome.MISSING
        found = path.read_bytes()
        if found == PAGE and PAGE in self.served:
            return Outcome.PAGE
        if found in self.served:
            return Outcome.RIGHT
        return Outcome.SHORT if any(body.startswith(found) for body in self.served) else Outcome.MIXED
