"""The remote file changes between two halves of its download: what arrives is wholly one version, byte for byte.

Each change is met in three ways: a connection is cut and opened again inside the attempt; the job is suspended and resumed; the
manager is closed and another one opens the journal.
"""

import hashlib
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path

import pytest

import bits_async as bits
from bits_async.jobs import transfer
from bits_async.transport import lane
from tests.peers import HONEST, Fault, Hold, Origin, answer
from tests.waiting import until

BATCH = 64 << 10
SIZE = 300_000
HALF = 170_000  # more than one write batch, so that the part file has bytes of the old version
STAMP = 1_700_000_000.0

Body = bytes | Callable[[int], bytes]


@dataclass(frozen=True)
class Version:
    """What the server has. `body` may depend on how far the download was when the file changed."""

    body: Body
    etag: str | None = None
    last_modified: float | None = None
    fault: Fault = HONEST  # of every answer that brings this version

    def put_on(self, origin: Origin, position: int) -> bytes:
        body = self.body(position) if callable(self.body) else self.body
        origin.serve("/file", body, etag=self.etag, last_modified=self.last_modified)
        origin.always("/file", self.fault)
        return body


OLD, NEW = os.urandom(SIZE), os.urandom(SIZE)
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # reads no file, unlike the usual one


# -- the ways to meet a change


@dataclass
class Visit:
    """One download with a change in its middle."""

    origin: Origin
    out: Path
    store: Path
    url: str

    @property
    def part(self) -> Path:
        (found,) = self.out.glob(".*.bits-part")
        return found

    def manager(self) -> bits.BitsManager:
        return bits.BitsManager(store=self.store, ssl=NO_TLS)

    async def job(self, manager: bits.BitsManager) -> bits.Job:
        job = await manager.create_job("versions", priority=bits.JobPriority.FOREGROUND)
        await job.add_file(self.url, self.out / "file")
        await job.resume()
        return job

    async def arrived(self, hold: Hold, job: bits.Job) -> None:
        """The origin has stopped at the hold, and bytes of the old version are in the part file."""
        await hold.reached.wait()
        await until(lambda: job.progress.bytes_transferred > 0)

    async def finish(self, job: bits.Job) -> bytes:
        await job.wait()
        (path,) = await job.complete()
        assert [each.name for each in self.out.iterdir()] == ["file"], "nothing else is left"
        return path.read_bytes()


Change = Callable[[int], None]
Way = Callable[[Visit, Version, Change], Awaitable[bytes]]


async def reopened(visit: Visit, old: Version, change: Change) -> bytes:
    """The connection is cut, the file changes, the same attempt goes on."""
    visit.origin.fault("/file", replace(old.fault, cut_after=HALF, then=lambda: change(HALF)))
    async with visit.manager() as manager:
        return await visit.finish(await visit.job(manager))


async def resumed(visit: Visit, old: Version, change: Change) -> bytes:
    """The job is suspended, the file changes, the job is resumed."""
    hold = Hold(after=HALF)
    visit.origin.fault("/file", replace(old.fault, hold=hold))
    async with visit.manager() as manager:
        job = await visit.job(manager)
        await visit.arrived(hold, job)
        await job.suspend()
        change(visit.part.stat().st_size)
        await job.resume()
        return await visit.finish(job)


async def opened_again(visit: Visit, old: Version, change: Change) -> bytes:
    """The manager is closed, the file changes, the next manager continues what it finds in the journal."""
    hold = Hold(after=HALF)
    visit.origin.fault("/file", replace(old.fault, hold=hold))
    async with visit.manager() as manager:
        await visit.arrived(hold, await visit.job(manager))
    change(visit.part.stat().st_size)
    async with visit.manager() as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        return await visit.finish(job)


WAYS = [reopened, resumed, opened_again]


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in small: a hundred of these tests have better things to do than to wait."""
    monkeypatch.setattr(transfer, "WRITE_BATCH", BATCH)
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.01,) * transfer.RECONNECTS)


@pytest.fixture
async def visit(memory_dir: Path) -> AsyncIterator[Visit]:
    out = memory_dir / "out"
    out.mkdir()
    async with Origin() as origin:
        yield Visit(origin, out, memory_dir / "queue.db", origin.url("/file"))


async def fetch(visit: Visit, way: Way, old: Version, new: Version) -> tuple[bytes, bytes]:
    """(the new version's body, what arrived)"""
    served: list[bytes] = []
    old.put_on(visit.origin, 0)
    found = await way(visit, old, lambda position: served.append(new.put_on(visit.origin, position)))
    return served[0], found


# -- the changes

E1, E2 = Version(OLD, '"v1"'), Version(NEW, '"v2"')
M1, M2 = Version(OLD, None, STAMP), Version(NEW, None, STAMP + 60)
IN_ONE_SECOND = Version(OLD, None, STAMP, Fault(headers=(("Date", formatdate(STAMP, usegmt=True)),)))  # written and served
IGNORES_IF_RANGE = Fault(ignore_if_range=True)
IGNORES_RANGE = Fault(ignore_range=True)
CHUNKED = Fault(chunked=True)


def shorter_than(position: int) -> bytes:
    return NEW[: position // 2]


def as_long_as(position: int) -> bytes:
    """The new version ends exactly where the download of the old one stopped."""
    return NEW[:position]


CHANGES = {
    "same length, new ETag": (E1, E2),
    "same length, new Last-Modified, no ETag": (M1, M2),
    "both validators new": (replace(E1, last_modified=STAMP), replace(E2, last_modified=STAMP + 1)),
    "If-Range ignored, 206 with the new ETag": (E1, replace(E2, fault=IGNORES_IF_RANGE)),
    "If-Range ignored, 206 with the new Last-Modified": (M1, replace(M2, fault=IGNORES_IF_RANGE)),
    "If-Range ignored, 206 with no validator any more": (E1, Version(NEW, fault=IGNORES_IF_RANGE)),
    "If-Range ignored, 206 with a weak ETag": (E1, Version(NEW, 'W/"v1"', fault=IGNORES_IF_RANGE)),
    "200 to every range": (E1, replace(E2, fault=IGNORES_RANGE)),
    "200 to every range, Last-Modified": (M1, replace(M2, fault=IGNORES_RANGE)),
    "weak ETag new, Last-Modified the same": (Version(OLD, 'W/"v1"', STAMP), Version(NEW, 'W/"v2"', STAMP)),
    "weak ETag alone, and the same": (Version(OLD, 'W/"v"'), Version(NEW, 'W/"v"')),
    "no validator at all": (Version(OLD), Version(NEW)),
    "no validator, then one": (Version(OLD), E2),
    "no validator, shorter": (Version(OLD), Version(shorter_than)),
    "no validator and no length, shorter": (Version(OLD, fault=CHUNKED), Version(shorter_than, fault=CHUNKED)),
    "no validator and no length, longer": (Version(OLD, fault=CHUNKED), Version(NEW + OLD, fault=CHUNKED)),
    "no length, new ETag": (replace(E1, fault=CHUNKED), replace(E2, fault=CHUNKED)),
    "no length, new ETag, shorter": (replace(E1, fault=CHUNKED), Version(shorter_than, '"v2"', fault=CHUNKED)),
    "written twice in one second (Date and Last-Modified the same)": (IN_ONE_SECOND, replace(IN_ONE_SECOND, body=NEW)),
    "only the size: ETag the same": (E1, Version(NEW[: SIZE - 1], '"v1"')),
    "only the size: Last-Modified the same": (M1, Version(NEW + b"!", None, STAMP)),
    "longer": (E1, Version(NEW + OLD, '"v2"')),
    "longer, If-Range ignored": (E1, Version(NEW + OLD, '"v2"', fault=IGNORES_IF_RANGE)),
    "shorter": (E1, Version(NEW[:200_000], '"v2"')),
    "shorter, If-Range ignored": (M1, Version(NEW[:200_000], None, STAMP + 60, IGNORES_IF_RANGE)),
    "shorter than what was fetched": (E1, Version(shorter_than, '"v2"')),
    "shorter than what was fetched: 416": (E1, Version(shorter_than, '"v2"', fault=IGNORES_IF_RANGE)),
    "ends where we stopped: 416": (E1, Version(as_long_as, '"v2"', fault=IGNORES_IF_RANGE)),
    "ends where we stopped, only the size tells: 416": (M1, Version(as_long_as, None, STAMP, IGNORES_IF_RANGE)),
    "empty now": (E1, Version(b"", '"v2"')),
    "empty now: 416": (E1, Version(b"", '"v2"', fault=IGNORES_IF_RANGE)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("old", "new"), CHANGES.values(), ids=list(CHANGES))
async def test_a_file_that_changes_in_the_middle_arrives_wholly_in_its_new_version(visit, way, old, new):
    expected, found = await fetch(visit, way, old, new)
    assert found == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [name for name in CHANGES if name.startswith(("same", "If-Range ignored, 206", "shorter", "200"))])
async def test_the_same_when_a_thread_moves_the_bytes_as_it_does_with_large_bodies(visit, way, change, monkeypatch):
    monkeypatch.setattr(lane, "DETACH_FROM", 1)
    expected, found = await fetch(visit, way, *CHANGES[change])
    assert found == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "version",
    [E1, M1, Version(OLD, 'W/"v1"', STAMP), replace(E1, fault=CHUNKED), replace(E1, fault=IGNORES_IF_RANGE)],
    ids=["ETag", "Last-Modified", "weak ETag and Last-Modified", "chunked", "If-Range ignored"],
)
async def test_a_file_that_did_not_change_goes_on_where_it_stopped(visit, way, version):
    stopped_at = []
    version.put_on(visit.origin, 0)
    assert await way(visit, version, stopped_at.append) == OLD
    first, second = visit.origin.requests
    assert first.range is None
    assert second.range == f"bytes={stopped_at[0]}-"
    assert second.header("If-Range") in (version.etag, formatdate(STAMP, usegmt=True))
    assert (second.status, second.sent) == (206, SIZE - stopped_at[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("old", [Version(OLD), Version(OLD, 'W/"v"'), IN_ONE_SECOND], ids=["nothing", "weak ETag", "too fresh"])
async def test_what_nothing_pins_is_never_asked_for_in_the_middle(visit, way, old):
    expected, found = await fetch(visit, way, old, replace(old, body=NEW))
    assert found == expected
    assert [seen.range for seen in visit.origin.requests] == [None, None]


@pytest.mark.parametrize("way", WAYS)
async def test_a_server_without_ranges_sends_the_same_version_again_and_it_is_not_appended(visit, way):
    version = replace(E1, fault=IGNORES_RANGE)
    expected, found = await fetch(visit, way, version, version)
    assert found == expected == OLD
    assert visit.origin.requests[1].status == 200


@pytest.mark.parametrize("way", WAYS)
async def test_a_last_modified_that_is_older_than_the_answer_is_a_validator(visit, way):
    dated = Fault(headers=(("Date", formatdate(STAMP + 1, usegmt=True)),))
    _, found = await fetch(visit, way, replace(M1, fault=dated), replace(M1, fault=dated))
    assert found == OLD
    assert visit.origin.requests[-1].status == 206


@pytest.mark.parametrize("way", WAYS)
async def test_a_validator_that_comes_with_the_second_answer_pins_the_version_of_the_second_answer(visit, way):
    """First no validator, then ETags: the third request goes on in the second version."""
    second, third = replace(E2, fault=Fault()), []

    def change(position: int) -> None:
        second.put_on(visit.origin, position)
        visit.origin.fault("/file", Fault(cut_after=HALF, then=lambda: third.append(True)))

    Version(OLD).put_on(visit.origin, 0)
    assert await way(visit, Version(OLD), change) == NEW
    assert third
    assert [seen.range for seen in visit.origin.requests] == [None, None, f"bytes={HALF}-"]


async def test_bytes_that_nothing_pins_are_never_taken_for_the_pinned_version_that_came_after(visit):
    """The part file has bytes of the first version when the second answer pins the second one and stops at once."""
    Version(OLD, fault=CHUNKED).put_on(visit.origin, 0)
    async with visit.manager() as manager:
        first, second = Hold(after=HALF), Hold(after=1000)
        visit.origin.fault("/file", replace(CHUNKED, hold=first))
        job = await visit.job(manager)
        await visit.arrived(first, job)
        await job.suspend()
        E2.put_on(visit.origin, 0)
        visit.origin.fault("/file", Fault(hold=second))
        await job.resume()
        await second.reached.wait()
        await until(lambda: job.state is bits.JobState.TRANSFERRING)
        await job.suspend()
        await job.resume()
        assert await visit.finish(job) == NEW


@pytest.mark.parametrize("way", WAYS)
async def test_a_file_that_changes_after_each_half_ends_with_an_error_and_a_resume_fetches_the_last_version(visit, way):
    number = 1

    def change(_: int) -> None:
        nonlocal number
        number += 1
        Version(NEW, f'"v{number}"').put_on(visit.origin, 0)
        visit.origin.fault("/file", Fault(cut_after=HALF, then=lambda: change(0)))

    E1.put_on(visit.origin, 0)
    with pytest.raises(bits.RemoteFileError) as caught:
        await way(visit, E1, change)
    assert caught.value.code == bits.ErrorCode.BG_E_REMOTE_FILE_CHANGED
    visit.origin._next.clear()
    async with visit.manager() as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        assert job.state is bits.JobState.ERROR
        await job.resume()
        assert await visit.finish(job) == NEW


@pytest.mark.parametrize("way", WAYS)
async def test_the_listeners_hear_of_the_restart(visit, way, caplog):
    caplog.set_level("INFO", "bits_async")
    expected, found = await fetch(visit, way, E1, E2)
    assert found == expected
    assert [record.message for record in caplog.records if "is fetched anew: the file has changed" in record.message]


# -- one call


@pytest.fixture
def private_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


async def test_a_digest_of_the_new_version_holds_after_the_change(visit, private_state):
    E1.put_on(visit.origin, 0)
    visit.origin.fault("/file", Fault(cut_after=HALF, then=lambda: E2.put_on(visit.origin, 0)))
    path = await bits.download(visit.url, visit.out / "file", ssl=NO_TLS, sha256=hashlib.sha256(NEW).hexdigest())
    assert path.read_bytes() == NEW


async def test_a_digest_of_the_old_version_refuses_the_new_one_and_nothing_is_left(visit, private_state):
    E1.put_on(visit.origin, 0)
    visit.origin.fault("/file", Fault(cut_after=HALF, then=lambda: E2.put_on(visit.origin, 0)))
    with pytest.raises(bits.ValidationFailed):
        await bits.download(visit.url, visit.out / "file", ssl=NO_TLS, sha256=hashlib.sha256(OLD).hexdigest())
    assert list(visit.out.iterdir()) == []


async def test_a_digest_holds_over_a_head_that_another_call_fetched(visit, private_state):
    E1.put_on(visit.origin, 0)
    visit.origin.fault("/file", Fault(cut_after=HALF), answer(404))
    with pytest.raises(bits.RemoteFileError):
        await bits.download(visit.url, visit.out / "file", ssl=NO_TLS)
    path = await bits.download(visit.url, visit.out / "file", ssl=NO_TLS, sha256=hashlib.sha256(OLD).hexdigest())
    assert path.read_bytes() == OLD
    assert [seen.range for seen in visit.origin.requests] == [None, *[f"bytes={HALF}-"] * 2]


async def test_the_destination_keeps_its_old_file_until_the_new_version_is_whole(visit, private_state):
    (visit.out / "file").write_bytes(b"yesterday's")
    seen_there: list[bytes] = []

    def change() -> None:
        seen_there.append((visit.out / "file").read_bytes())
        E2.put_on(visit.origin, 0)

    E1.put_on(visit.origin, 0)
    visit.origin.fault("/file", Fault(cut_after=HALF, then=change))
    path = await bits.download(visit.url, visit.out / "file", ssl=NO_TLS)
    assert seen_there == [b"yesterday's"]
    assert path.read_bytes() == NEW


async def test_the_files_time_is_that_of_the_version_that_arrived(visit, private_state):
    M1.put_on(visit.origin, 0)
    visit.origin.fault("/file", Fault(cut_after=HALF, then=lambda: M2.put_on(visit.origin, 0)))
    path = await bits.download(visit.url, visit.out / "file", ssl=NO_TLS)
    assert path.stat().st_mtime == STAMP + 60 < time.time()
