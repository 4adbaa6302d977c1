"""Plays a schedule to a client: an origin that answers by its rows, and what came of it, judged.

async with Stage(schedule) as stage:
    ...                                  # somebody fetches stage.url, and is killed when `stage.killing` says so
    stage.judge(path, claims_success=True)

Several files (`files`) are of the same versions, each with its own bytes; the rows go to whoever asks next, for whichever file.
"""

import asyncio
import base64
import hashlib
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path

from tests.certificates import ServerTls
from tests.integrity.schedules import FAULTS, PAGE, Row, Schedule
from tests.peers import HONEST, Connection, Fault, Hold, Origin, Seen, Version, redirect


class Outcome(Enum):
    """What a client has made of a schedule."""

    RIGHT = "right"  # it says that the file is there, and it is a version that the server had
    FAILED = "failed"  # it says that it failed
    PAGE = "login page"  # it says that the file is there, and it is the login page
    SHORT = "cut short"  # it says that the file is there, and it is the beginning of a version
    MIXED = "mixed"  # it says that the file is there, and these bytes were never a file
    MISSING = "missing"  # it says that the file is there, and it is not


class Stage(Origin):
    """The origin of one schedule, and of one client.

    Args:
        schedule: the story.
        scale: times the sizes in it.
        files: how many there are: `/file`, `/file1`, and so on.
        told: a field of RFC 9530 that each answer with bytes of a file has, and tells the truth in.
        tls: the server's certificate.
    """

    def __init__(
        self, schedule: Schedule, scale: int = 1, *, files: int = 1, told: str | None = None, tls: ServerTls | None = None
    ) -> None:
        super().__init__(tls=tls)
        self.schedule = schedule
        self.paths = ["/file", *(f"/file{number}" for number in range(1, files))]
        self.bodies = {
            path: [schedule.version(index, scale, file) for index in range(len(schedule.versions))] for file, path in enumerate(self.paths)
        }
        self.answered = 0
        self.served: dict[str, set[bytes]] = {path: set() for path in self.paths}
        self.killing = asyncio.Event()  # the client is to be killed now; `killed` goes on
        self.row = Row()  # the one that kills it
        self._told = told
        self._holds = set[Hold]()

    @property
    def file_url(self) -> str:
        return self.url("/file")

    async def __aexit__(self, *details: object) -> None:
        self.killed()
        await super().__aexit__(*details)

    def killed(self) -> None:
        """The client is dead, the server goes on."""
        self.killing.clear()
        while self._holds:
            self._holds.pop().release()

    async def _send(self, connection: Connection, seen: Seen, extra: list[tuple[str, str]], path: str, fault: Fault) -> bool:
        if path.startswith("/elsewhere"):  # on the way to a file; no answer of the schedule
            return await super()._send(connection, seen, extra, path, redirect(path.removeprefix("/elsewhere")))
        row = self.schedule.row(self.answered)
        version = self.bodies[path][row.version]
        self._files[path] = version
        if seen.method == "HEAD":  # who asks first gets no more answers than others
            return await super()._send(connection, seen, extra, path, HONEST)
        self.answered += 1
        fault = FAULTS[row.fault]
        if fault.status is None:
            self.served[path].add(version.body)
        elif fault.body == PAGE:
            self.served[path].add(PAGE)
        elif fault.status == 302:
            fault = redirect(f"{path}?moved")
        size = len(version.body)
        cut = None if row.cut is None or fault.status else size * row.cut // 1000
        if row.kill is None or fault.status:
            return await super()._send(connection, seen, extra, path, replace(fault, cut_after=cut, reset=row.reset))
        hold = Hold(size * row.kill // 1000)
        self._holds.add(hold)
        watch = asyncio.ensure_future(self._announce(hold, row))
        try:
            return await super()._send(connection, seen, extra, path, replace(fault, cut_after=cut, reset=row.reset, hold=hold))
        finally:
            self._holds.discard(hold)
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _announce(self, hold: Hold, row: Row) -> None:
        await hold.reached.wait()
        if hold in self._holds:  # else it was another answer that killed the client
            self.row = row
            self.killing.set()

    def _judge(self, seen: Seen, version: Version, fault: Fault) -> tuple[list[tuple[str, str]], memoryview]:
        headers, body = super()._judge(seen, version, fault)
        if self._told is None or seen.status not in (200, 206):
            return headers, body
        hashed = hashlib.sha256(body if self._told == "Content-Digest" else version.body).digest()
        return [*headers, (self._told, f"sha-256=:{base64.b64encode(hashed).decode()}:")], body

    def judge(self, path: Path, *, claims_success: bool, name: str = "/file") -> Outcome:
        """What became of the file with that name on the server."""
        if not claims_success:
            return Outcome.FAILED
        if not path.exists():
            return Outcome.MISSING
        found, served = path.read_bytes(), self.served[name]
        if found == PAGE and PAGE in served:
            return Outcome.PAGE
        if found in served:
            return Outcome.RIGHT
        return Outcome.SHORT if any(body.startswith(found) for body in served) else Outcome.MIXED
