"""Whatever versions a server has, however its answers go wrong, wherever the client is killed: the destination is absent, or byte for
byte one version that the server served, and what the call returned or raised says which."""

import asyncio
import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings

import bits_async as bits
from bits_async.jobs import transfer
from bits_async.transport import lane
from tests.integrity.schedules import CHANGED, NAMED, Row, Schedule, load, schedules
from tests.integrity.stage import Outcome, Stage

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # reads no file, unlike the usual one
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same in small: files of 10 kB are written in a few batches, and nobody waits."""
    monkeypatch.setattr(transfer, "WRITE_BATCH", 2 << 10)
    monkeypatch.setattr(transfer, "WRITE_AFTER", 0.01)
    monkeypatch.setattr(transfer, "SEAM", 1 << 10)
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.0,) * transfer.RECONNECTS)
    return


class Crash:
    """What `kill -9` would leave at this moment, put back when the client has closed: part files under the same inode, and the journal.

    The client's loop stands still meanwhile, its threads do not: what one of them removes just now is gone.
    """

    def __init__(self, place: Path, aside: Path) -> None:
        self._place = place
        self._links: dict[Path, Path] = {}
        for number, path in enumerate([path for path in place.rglob("*") if path.is_file() and not path.name.endswith("-shm")]):
            with suppress(FileNotFoundError):
                os.link(path, aside / str(number))
                self._links[path] = aside / str(number)
        self._bytes = {path: link.read_bytes() for path, link in self._links.items()}

    def put_back(self) -> None:
        for path in [path for path in self._place.rglob("*") if path.is_file()]:
            path.unlink()
        for path, link in self._links.items():
            link.rename(path)
            path.write_bytes(self._bytes[path])


async def one_run(stage: Stage, place: Path, aside: Path) -> BaseException | None:
    """Start the client; it ends, or is killed where the schedule says. What it raised, None for nothing."""
    destination = place / "out" / "file"
    call = asyncio.ensure_future(bits.download(stage.file_url, destination, ssl=NO_TLS, retry_for=0, store=place / "queue" / "jobs.db"))
    killing = asyncio.ensure_future(stage.killing.wait())
    await asyncio.wait({call, killing}, return_when=asyncio.FIRST_COMPLETED)
    crash = None
    if killing.done() and not call.done():
        for _ in range((stage.row.kill or 0) // 20):  # the client has had some of it, and has done something with some of that
            await asyncio.sleep(0)
        crash = Crash(place, aside) if stage.row.crash else None
        call.cancel()
    killing.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait({call, killing})
    stage.killed()
    if crash is not None:
        crash.put_back()
    return asyncio.CancelledError() if call.cancelled() or crash is not None else call.exception()


async def play(schedule: Schedule) -> None:
    with tempfile.TemporaryDirectory(prefix="bits-test-", dir=MEMORY) as directory:
        place, aside = Path(directory) / "place", Path(directory) / "aside"
        for each in (place / "out", place / "queue", aside):
            each.mkdir(parents=True, mode=0o700)
        async with Stage(schedule) as stage:
            for _ in range(schedule.runs):
                raised = await one_run(stage, place, aside)
                check(stage, place / "out" / "file", raised)
                if raised is None:
                    break


def check(stage: Stage, destination: Path, raised: BaseException | None) -> None:
    assert raised is None or isinstance(raised, bits.BitsError | asyncio.CancelledError)
    if raised is None:
        assert stage.judge(destination, claims_success=True) in (Outcome.RIGHT, Outcome.PAGE)
        assert os.listdir(destination.parent) == ["file"], "nothing else is left"
    elif destination.exists():  # killed between the rename and the end of the call
        assert isinstance(raised, asyncio.CancelledError)
        assert destination.read_bytes() in stage.served["/file"]


def run(schedule: Schedule) -> None:
    asyncio.run(play(schedule))


def _settings(count: int, *, new: bool = False) -> settings:
    """`new`: others at each run."""
    hushed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=not new, suppress_health_check=hushed)


@pytest.mark.timeout(600)  # a few seconds on an idle machine
@_settings(150)
@given(schedules)
def test_random_schedules_end_with_one_version_or_none(schedule: Schedule) -> None:
    run(schedule)


@pytest.mark.parametrize("number", range(len(NAMED)))
def test_the_schedules_that_people_meet_end_with_one_version(number: int) -> None:
    run(NAMED[number])


@pytest.mark.timeout(600)
@_settings(20)
@given(schedules)
@example(Schedule(CHANGED, (Row(0, cut=500), Row(1, "If-Range ignored"))))
def test_the_same_where_threads_move_the_bytes(schedule: Schedule) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane, "DETACH_FROM", 1)
        run(schedule)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@_settings(2500, new=True)
@given(schedules)
def test_thousands_of_random_schedules_end_with_one_version_or_none(schedule: Schedule) -> None:
    run(schedule)


def test_the_file_of_schedules_can_be_read_and_has_every_named_one() -> None:
    assert load()[: len(NAMED)] == list(NAMED)
