"""Debian's own servers, and a file of theirs that changes under the download, or that they serve in ways of their own.

A proxy of ours stands before them where the connection has to be cut at a certain byte. The same cases with faults that no real server
makes on demand are in `tests/loopback/`.
"""

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

import bits_async as bits
from bits_async import AuthCredentials, AuthScheme, AuthTarget, ErrorCode
from bits_async.jobs import transfer
from examples.embedded import HOP_BY_HOP, Head, body_pieces, port_of
from tests.peers import Connection, Cut, Proxy, Seen
from tests.realms import PASSWORDS, Apache, Nginx, Squid
from tests.waiting import DEADLINE

pytestmark = pytest.mark.realm

SIZE, HALF = 300_000, 170_000
OLD, NEW = os.urandom(SIZE), os.urandom(SIZE)
HOUR_AGO = 1_700_000_000
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Scissors(Proxy):
    """Cuts the first answer after HALF of its body, and says so before anybody can ask again."""

    def __init__(self, cut: Callable[[], None] = lambda: None) -> None:
        super().__init__(forward_cut=HALF)
        self._cut = cut

    async def _pass_on(self, connection: Connection, seen: Seen, piece: bytes) -> None:
        try:
            await super()._pass_on(connection, seen, piece)
        except Cut:
            self._cut()
            raise


class Vague(Proxy):
    """Passes the first answer on without its length, in chunks, and hangs up before the last one: all bytes came, and nobody knows."""

    def __init__(self, cut: Callable[[], None]) -> None:
        super().__init__()
        self._cut = cut

    async def _forward(self, connection: Connection, seen: Seen, extra: list[tuple[str, str]]) -> bool:
        if len(self.requests) > 1:
            return await super()._forward(connection, seen, extra)
        path = urlsplit(seen.target).path
        request = Head(f"GET {path} HTTP/1.1", seen.head.headers).without(HOP_BY_HOP)
        found = await self._ask(connection, port_of(seen.target), request.encode())
        assert found is not None
        head, source = found
        told = head.without({*HOP_BY_HOP, "content-length"}).headers
        connection.writer.write(Head(head.first, [*told, ("Transfer-Encoding", "chunked")]).encode())
        async for piece in body_pieces(head, source, answers="GET"):
            connection.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await connection.writer.drain()
        self._cut()
        connection.end(reset=False)
        raise Cut


@dataclass
class Place:
    """A file that a server serves, and where it goes."""

    file: Path
    out: Path

    def put(self, body: bytes, version: int = 1) -> None:
        """Replaced as publishers do it, by a rename, so that no request sees both."""
        fresh = self.file.with_name("fresh")
        fresh.write_bytes(body)
        os.utime(fresh, (HOUR_AGO + 60 * version,) * 2)
        fresh.chmod(0o644)
        fresh.rename(self.file)

    async def get(self, url: str, **options: object) -> bytes:
        path = await bits.download(url, self.out, ssl=NO_TLS, retry_for=0, **options)  # type: ignore[arg-type]
        assert os.listdir(self.out.parent) == ["file"]
        return path.read_bytes()


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transfer, "WRITE_BATCH", 64 << 10)
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.01,) * transfer.RECONNECTS)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(params=["nginx", "apache"])
def server(request: pytest.FixtureRequest) -> Nginx | Apache:
    found: Nginx | Apache = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def place(server: Nginx | Apache, tmp_path: Path) -> AsyncIterator[Place]:
    (tmp_path / "out").mkdir()
    name = f"changing-{tmp_path.name}"
    found = Place(server.root / name, tmp_path / "out" / "file")
    found.put(OLD)
    if isinstance(server, Apache):
        for way in ("pub", "dated", "zipped", "packed"):
            (server.root / way / name).symlink_to(found.file)
    yield found
    for each in server.root.rglob(f"{name}*"):
        each.unlink()


def wire(server: Nginx | Apache, count: int) -> list[tuple[int, str | None]]:
    return [(hit.status, hit.range) for hit in server.hits(expect=count)]


def url_of(server: Nginx | Apache, place: Place, way: str = "pub") -> str:
    return server.url(f"/{way}/{place.file.name}")


@pytest.mark.parametrize("way", ["pub", "dated"])
async def test_a_file_that_did_not_change_goes_on_where_it_stopped(server, place, way):
    async with Scissors() as proxy:
        assert await place.get(url_of(server, place, way), proxy=proxy.url) == OLD
    assert wire(server, 2) == [(200, None), (206, f"bytes={HALF}-")]


@pytest.mark.parametrize("way", ["pub", "dated"])
@pytest.mark.parametrize(
    "new", [NEW, NEW + OLD, NEW[:HALF], NEW[: HALF // 2], b""], ids=["same size", "longer", "as cut", "shorter", "empty"]
)
async def test_a_file_that_changes_between_two_ranges_arrives_wholly_in_its_new_version(server, place, way, new):
    async with Scissors(lambda: place.put(new, 2)) as proxy:
        assert await place.get(url_of(server, place, way), proxy=proxy.url) == new


@pytest.mark.parametrize("way", ["pub", "dated"])
async def test_a_file_that_changes_between_two_runs_arrives_wholly_in_its_new_version(server, place, way, monkeypatch):
    monkeypatch.setattr(transfer, "RECONNECTS", 0)
    async with Scissors() as proxy:
        with pytest.raises(bits.NetworkError):
            await place.get(url_of(server, place, way), proxy=proxy.url)
        place.put(NEW, 2)
        assert await place.get(url_of(server, place, way), proxy=proxy.url) == NEW


async def test_a_file_that_was_just_written_may_be_written_again_unseen_and_is_never_continued(server, place):
    """Of one size and within one second: Apache's ETag says that it is weak, nginx's is the same for both and says nothing."""

    def write(body: bytes) -> None:
        place.put(body)
        os.utime(place.file, (now, now))

    now = int(time.time()) + 20  # a clock that is ahead, so that the second does not pass meanwhile
    write(OLD)
    async with Scissors(lambda: write(NEW)) as proxy:
        assert await place.get(url_of(server, place), proxy=proxy.url) == NEW
    assert wire(server, 2) == [(200, None)] * 2


async def test_an_empty_file_is_a_file(server, place):
    place.put(b"", 2)
    assert await place.get(url_of(server, place)) == b""


@pytest.mark.parametrize("server", ["nginx"], indirect=True)
@pytest.mark.parametrize("way", ["unpinned", "chunked", "whole"])
@pytest.mark.parametrize("new", [OLD, NEW, NEW[:HALF]], ids=["the same", "same size", "shorter"])
async def test_what_nothing_pins_or_no_range_continues_is_fetched_anew(server, place, way, new):
    async with Scissors(lambda: None if new is OLD else place.put(new, 2)) as proxy:
        assert await place.get(url_of(server, place, way), proxy=proxy.url) == new
    assert {status for status, _ in wire(server, 2)} == {200}


# -- 416


@pytest.mark.parametrize("way", ["pub", "dated"])
async def test_416_of_a_real_server_names_no_version_and_proves_no_file_of_unknown_length_complete(server, place, way):
    async with Vague(lambda: None) as proxy:
        assert await place.get(url_of(server, place, way), proxy=proxy.url) == OLD
    assert wire(server, 3) == [(200, None), (416, f"bytes={SIZE}-"), (200, None)]


@pytest.mark.parametrize("way", ["pub", "dated"])
async def test_a_file_that_was_complete_and_has_changed_is_fetched_anew(server, place, way):
    async with Vague(lambda: place.put(NEW, 2)) as proxy:
        assert await place.get(url_of(server, place, way), proxy=proxy.url) == NEW
    assert wire(server, 3) == [(200, None), (200, f"bytes={SIZE}-"), (200, None)]


@pytest.mark.parametrize("size", [HALF, HALF // 2, 0])
@pytest.mark.parametrize("broken", [Scissors, Vague], ids=["cut", "complete"])
async def test_416_on_a_file_that_is_shorter_now_and_kept_its_date_is_another_version(server, place, size, broken):
    def shorten() -> None:
        place.put(NEW[:size])

    async with broken(shorten) as proxy:
        assert await place.get(url_of(server, place, "dated"), proxy=proxy.url) == NEW[:size]
    began = HALF if broken is Scissors else SIZE
    if size:  # to Apache every range of an empty file is the whole of it
        assert wire(server, 3) == [(200, None), (416, f"bytes={began}-"), (200, None)]


# -- files that are compressed for others


async def asked_as_browsers_do(
    url: str, proxy: str | None = None, headers: Mapping[str, str] | None = None
) -> tuple[str | None, str | None]:
    """(the coding that it came with, its ETag)"""
    asked = {"Accept-Encoding": "gzip", **(headers or {})}
    async with aiohttp.ClientSession(auto_decompress=False) as session, session.get(url, headers=asked, proxy=proxy) as answer:
        assert answer.status == 200
        await answer.read()
        return answer.headers.get("Content-Encoding"), answer.headers.get("ETag")


async def test_a_file_that_others_get_compressed_under_another_etag_comes_as_it_is_and_goes_on(server, place):
    url = url_of(server, place, "zipped")
    coding, etag = await asked_as_browsers_do(url)
    assert coding == "gzip"
    assert etag is not None
    assert etag.startswith("W/") or etag.endswith('-gzip"')
    async with Scissors() as proxy:
        assert await place.get(url, proxy=proxy.url) == OLD
    assert wire(server, 3)[1:] == [(200, None), (206, f"bytes={HALF}-")]


async def test_a_file_that_others_get_compressed_arrives_wholly_in_its_new_version(server, place):
    async with Scissors(lambda: place.put(NEW, 2)) as proxy:
        assert await place.get(url_of(server, place, "zipped"), proxy=proxy.url) == NEW


async def test_a_file_that_comes_compressed_though_it_was_not_asked_for_so_is_refused(server, place):
    place.file.with_name(f"{place.file.name}.gz").write_bytes(b"\x1f\x8b" + OLD)
    with pytest.raises(bits.RemoteFileError) as caught:
        await place.get(url_of(server, place, "packed"))
    assert caught.value.code == ErrorCode.BG_E_INVALID_SERVER_RESPONSE
    assert os.listdir(place.out.parent) == []


@pytest.mark.parametrize("server", ["nginx"], indirect=True)
async def test_a_server_that_refuses_head_is_not_asked_for_one(server, place):
    assert await place.get(url_of(server, place, "getonly")) == OLD


async def on_demand(place: Place, url: str, store: Path, ranges: list[bits.FileRange]) -> tuple[int, list[bytes]]:
    """(size of the remote file, the bytes of the ranges)"""
    async with bits.BitsManager(store=store, ssl=NO_TLS) as manager:
        job = await manager.create_job("on demand", priority=bits.JobPriority.FOREGROUND)
        file = await job.add_file(url, place.out)
        await job.set_on_demand_mode(True)
        await file.request_file_ranges(ranges)
        await job.resume()
        async with asyncio.timeout(DEADLINE):
            while job.state is not bits.JobState.SUSPENDED:
                assert job.error is None
                await asyncio.sleep(0.01)
        size = file.progress.bytes_total
        with file.temporary_name.open("rb") as part:
            found = [os.pread(part.fileno(), each.length or 1 << 20, each.initial_offset) for each in ranges]
        await job.cancel()
    assert size is not None
    return size, found


async def test_a_file_of_5_gib_is_counted_in_whole_bytes(server, place, tmp_path):
    """Its end and a stretch across the 4 GiB boundary; what lies between is a hole at both sides, and nobody moves it."""
    size, edge = 5 << 30, 4 << 30
    with place.file.open("r+b") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), b"across the boundary", edge - 10)
        os.pwrite(file.fileno(), b"the end", size - 7)
    os.utime(place.file, (HOUR_AGO, HOUR_AGO))  # Apache's ETag of a file that is not a second old is weak
    ranges = [bits.FileRange(edge - 10, 19), bits.FileRange(size - 7)]
    assert await on_demand(place, url_of(server, place), tmp_path / "queue.db", ranges) == (size, [b"across the boundary", b"the end"])


# -- through Squid

ALICE = (AuthCredentials(AuthTarget.PROXY, AuthScheme.DIGEST, "alice", PASSWORDS["alice"]),)


@pytest.mark.parametrize("server", ["nginx"], indirect=True)
@pytest.mark.parametrize("new", [OLD, NEW], ids=["the same", "changed"])
async def test_through_squid_a_file_goes_on_or_arrives_wholly_in_its_new_version(server, place, squid_digest: Squid, new, tmp_path):
    old, new = OLD * 5, new * 5  # more than nginx sends in its first second
    place.put(old)
    async with bits.BitsManager(store=tmp_path / "queue.db", ssl=NO_TLS) as manager:
        job = await manager.create_job("squid", priority=bits.JobPriority.FOREGROUND)
        await job.set_proxy_settings(bits.ProxySettings.override(squid_digest.url))
        await job.set_credentials(AuthTarget.PROXY, AuthScheme.DIGEST, "alice", PASSWORDS["alice"])
        await job.add_file(url_of(server, place, "slow"), place.out)
        await job.resume()
        async with asyncio.timeout(DEADLINE):
            while not job.progress.bytes_transferred:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.002)
        await job.suspend()
        stopped_at = job.progress.bytes_transferred
        assert 0 < stopped_at < len(old)
        if new != old:
            place.put(new, 2)
        await job.resume()
        await job.wait()
        await job.complete()
    assert place.out.read_bytes() == new
    if new == old:
        assert wire(server, 2)[-1] == (206, f"bytes={stopped_at}-")


async def test_through_squid_every_way_of_a_whole_file_arrives(server, place, squid_digest: Squid):
    for way in ("pub", "dated"):
        assert await place.get(url_of(server, place, way), proxy=squid_digest.url, credentials=ALICE) == OLD
        place.out.unlink()


async def test_what_squid_has_compressed_for_others_is_not_taken_for_the_file(server, place, squid_basic: Squid, tmp_path):
    url = f"{url_of(server, place, 'zipped')}?cached"
    proof = {"Proxy-Authorization": aiohttp.encode_basic_auth("alice", PASSWORDS["alice"])}
    for _ in range(2):
        coding, _ = await asked_as_browsers_do(url, proxy=squid_basic.url, headers=proof)
        assert coding == "gzip"
    assert len(wire(server, 1)) == 1, "the second answer came from the cache"
    rules = bits.AuthRules(basic_over_http=frozenset({AuthTarget.PROXY}))
    async with bits.BitsManager(store=tmp_path / "queue.db", ssl=NO_TLS, auth_rules=rules) as manager:
        job = await manager.create_job("squid", priority=bits.JobPriority.FOREGROUND)
        await job.set_proxy_settings(bits.ProxySettings.override(squid_basic.url))
        await job.set_credentials(AuthTarget.PROXY, AuthScheme.BASIC, "alice", PASSWORDS["alice"])
        await job.add_file(url, place.out)
        await job.resume()
        await job.wait()
        await job.complete()
    assert place.out.read_bytes() == OLD
