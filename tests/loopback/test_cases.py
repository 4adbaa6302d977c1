"""What servers do, case by case, over real sockets; the judge's table in `tests/transport/test_answers.py` has the same without them.

Where the other cases of the product's first promise are:

    changed between ranges, runs and managers (ETag, date, size, weak ETag, a validator that goes or comes)   test_versions.py
    If-Range ignored, 200 to a range, 416 on a changed file, shorter, longer, empty                           test_versions.py
    several ranges of a file, several files, and connections that break among them                            test_side_by_side.py
    a file of ranges, on demand, no length                                                                     test_files.py
    an ETag that two mirrors share, redirect loops, heads of 64 KiB, framing told twice, chunk bombs          test_hostile.py
    digests, in heads and in trailers                                                                         test_digests.py
    killed at any point                                                                                       ../process/test_kill.py
    all of it at random, of one file and of several in several ranges                                         ../integrity/
    the same on nginx, Apache and through Squid; 416, compressed variants, 5 GiB, HEAD refused                ../realm/test_versions.py
    no progress for too long                                                                                  ../jobs/test_life_cycle.py
    what the command says of each refusal                                                                     ../cli/
"""

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import ErrorCode
from bits_async.jobs import transfer
from bits_async.transport import lane
from tests.peers import HONEST, Fault, Hold, Origin, answer, redirect
from tests.waiting import until

SIZE, HALF = 300_000, 170_000
OLD, NEW = os.urandom(SIZE), os.urandom(SIZE)
STAMP = 1_700_000_000.0
DATE = formatdate(STAMP, usegmt=True)
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
CUT = Fault(cut_after=HALF)
REST = f"bytes={HALF}-"


@dataclass
class Visit:
    origin: Origin
    out: Path
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.origin.url("/file")

    async def get(self) -> bytes:
        path = await bits.download(self.url, self.out, ssl=NO_TLS, retry_for=0, **self.options)
        assert os.listdir(self.out.parent) == ["file"]
        return path.read_bytes()

    async def get_twice(self) -> tuple[bytes, bits.BitsError | None]:
        """What arrives, by a second call where the first one fails; and why that failed."""
        try:
            return await self.get(), None
        except bits.BitsError as error:
            assert not self.out.exists()
            return await self.get(), error

    async def error(self) -> bits.BitsError:
        with pytest.raises(bits.BitsError) as caught:
            await self.get()
        assert not self.out.exists()
        return caught.value

    @property
    def wire(self) -> list[tuple[str | None, str | None]]:
        return [(seen.range, seen.header("If-Range")) for seen in self.origin.requests]

    @property
    def ranges(self) -> list[str | None]:
        return [seen.range for seen in self.origin.requests]


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch, memory_dir: Path) -> None:
    monkeypatch.setattr(transfer, "WRITE_BATCH", 64 << 10)
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.01,) * transfer.RECONNECTS)
    monkeypatch.setenv("XDG_STATE_HOME", str(memory_dir / "state"))


@pytest.fixture
async def visit(memory_dir: Path) -> AsyncIterator[Visit]:
    (memory_dir / "out").mkdir()
    async with Origin() as origin:
        origin.serve("/file", OLD, last_modified=STAMP)
        yield Visit(origin, memory_dir / "out" / "file")


# -- If-Range answered 200 though nothing changed


async def test_a_server_that_heeds_only_dates_is_asked_by_the_date(visit):
    visit.origin.fault("/file", CUT, Fault(ignore_range=True))
    assert await visit.get() == OLD
    assert visit.wire == [(None, None), (REST, '"v1"'), (REST, DATE)]


SEAM = f"bytes={HALF - transfer.SEAM}-"


async def test_a_server_that_heeds_no_if_range_is_asked_without_and_the_bytes_at_the_seam_are_compared(visit):
    visit.origin.fault("/file", CUT, *[Fault(ignore_range=True)] * 2)
    assert await visit.get() == OLD
    assert visit.wire == [(None, None), (REST, '"v1"'), (REST, DATE), (SEAM, None)]


async def test_a_seam_that_does_not_fit_is_another_version_whatever_the_headers_say(visit):
    visit.origin.fault("/file", CUT, *[Fault(ignore_range=True)] * 2)
    original = visit.origin._judge

    def lying(seen, version, fault):
        headers, body = original(seen, version, fault)
        if seen.range == SEAM:
            body = memoryview(NEW)[HALF - transfer.SEAM :]
        return headers, body

    visit.origin._judge = lying
    assert await visit.get() == OLD
    assert visit.ranges == [None, REST, REST, SEAM, None]


async def test_a_seam_is_looked_at_again_after_each_cut(visit):
    ignored = Fault(ignore_range=True)
    visit.origin.fault("/file", CUT, ignored, ignored, Fault(cut_after=transfer.SEAM + 10_000))
    assert await visit.get() == OLD
    assert visit.ranges[3:] == [SEAM, f"bytes={HALF + 10_000 - transfer.SEAM}-"]


async def test_a_file_that_changed_while_a_weaker_condition_was_tried_is_fetched_anew(visit):
    def change() -> None:
        visit.origin.serve("/file", NEW, etag='"v2"', last_modified=STAMP + 60)

    for fault in (Fault(ignore_range=True), Fault(ignore_range=True, ignore_if_range=True)):
        visit.origin.serve("/file", OLD, last_modified=STAMP)
        visit.out.unlink(missing_ok=True)
        visit.origin.fault("/file", CUT, replace(fault, then=change))
        assert await visit.get() == NEW


async def test_a_server_without_ranges_is_asked_a_bounded_number_of_times(visit):
    visit.origin.always("/file", Fault(ignore_range=True))
    visit.origin.fault("/file", CUT)
    assert await visit.get() == OLD
    assert visit.ranges == [None, REST, REST, SEAM, None]


async def test_a_server_that_says_it_has_no_ranges_is_believed(visit):
    visit.origin.always("/file", Fault(ignore_range=True, headers=(("Accept-Ranges", "none"),)))
    visit.origin.fault("/file", CUT)
    assert await visit.get() == OLD
    assert visit.ranges == [None, REST, None]


# -- a part that is none


@pytest.mark.parametrize(
    "fault",
    [
        Fault(shift=5),
        Fault(shift=-5),
        Fault(content_range=f"bytes {HALF}-{SIZE + 5}/{SIZE + 6}"),
        Fault(content_range=f"bytes {HALF}-{SIZE - 1}/{SIZE + 1}"),
        Fault(content_range=f"bytes {HALF}-{SIZE - 2}/{SIZE}"),
        Fault(content_range=""),
        Fault(content_range="bytes */300000"),
        Fault(content_range=f"lines {HALF}-{SIZE - 1}/{SIZE}"),
        Fault(headers=(("Content-Type", "multipart/byteranges; boundary=x"),)),
        Fault(headers=(("Content-Encoding", "gzip"),)),
        Fault(length_off=-10),
        Fault(length_off=10),
    ],
    ids=["later", "earlier", "beyond", "total", "end", "unsaid", "416's", "unit", "multipart", "encoded", "longer", "shorter"],
)
async def test_a_part_that_is_not_the_one_that_was_asked_for_is_never_written(visit, fault):
    visit.origin.fault("/file", CUT, fault)
    found, _ = await visit.get_twice()
    assert found == OLD, "it went on, or anew"
    assert visit.ranges[-1] in (REST, None)


@pytest.mark.parametrize("fault", [Fault(shift=5), Fault(content_range=""), Fault(length_off=-10), Fault(length_off=10)])
async def test_the_same_where_a_thread_would_move_it(visit, fault, monkeypatch):
    monkeypatch.setattr(lane, "DETACH_FROM", 1)
    await test_a_part_that_is_not_the_one_that_was_asked_for_is_never_written(visit, fault)


async def test_a_total_that_is_not_told_is_taken_from_before(visit):
    visit.origin.fault("/file", CUT, Fault(content_range=f"bytes {HALF}-{SIZE - 1}/*"))
    assert await visit.get() == OLD
    assert visit.ranges == [None, REST]


async def test_a_server_that_sends_less_of_a_range_than_was_asked_for_is_asked_for_the_rest(visit):
    original = visit.origin._judge

    def short(seen, version, fault):
        headers, body = original(seen, version, fault)
        if seen.range != REST:
            return headers, body
        told = ("Content-Range", f"bytes {HALF}-{HALF + 999}/{SIZE}")
        return [*((name, value) for name, value in headers if name != "Content-Range"), told], body[:1000]

    visit.origin._judge = short
    visit.origin.fault("/file", CUT)
    assert await visit.get() == OLD
    assert visit.ranges == [None, REST, f"bytes={HALF + 1000}-"]


# -- bodies that end too early, too late, or in pieces


HEAD = b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\nETag: "v1"\r\n\r\n' % SIZE


@pytest.mark.parametrize(
    "raw",
    [b"", b"HTT", HEAD[:30], HEAD[:-2], HEAD, HEAD + OLD[:1], HEAD + OLD[:-1]],
    ids=["nothing", "status line", "in a header", "at the end of the head", "at the first byte", "one byte", "all but one"],
)
async def test_a_connection_may_end_at_any_byte_and_what_came_is_kept(visit, raw):
    visit.origin.fault("/file", Fault(raw=raw))
    body = len(raw) - len(HEAD)
    found, error = await visit.get_twice()
    assert found == OLD
    assert error is None or error.transient
    assert visit.ranges == [None, f"bytes={body}-" if body > 0 else None]


@pytest.mark.parametrize("thread", [False, True], ids=["loop", "thread"])
async def test_a_part_file_that_somebody_makes_longer_meanwhile_is_thrown_away(visit, thread, monkeypatch):
    monkeypatch.setattr(lane, "DETACH_FROM", 1 if thread else 1 << 30)
    hold = Hold(after=HALF)
    visit.origin.fault("/file", Fault(hold=hold))
    call = asyncio.ensure_future(visit.error())
    await hold.reached.wait()
    await until(lambda: [each for each in visit.out.parent.iterdir() if each.stat().st_size])
    (part,) = visit.out.parent.iterdir()
    os.truncate(part, SIZE + 1)
    hold.release()
    assert (await call).code == ErrorCode.BG_E_VALIDATION_FAILED
    assert os.listdir(visit.out.parent) == []


@pytest.mark.parametrize("way", [HONEST, Fault(chunked=True), Fault(chunked=True, trailers=(("X-Checked", "yes"), ("ETag", '"v9"')))])
async def test_chunks_with_and_without_trailers(visit, way):
    visit.origin.always("/file", way)
    assert await visit.get() == OLD
    visit.out.unlink()
    visit.origin.fault("/file", replace(way, cut_after=HALF))
    assert await visit.get() == OLD


async def test_416_on_a_file_of_unknown_length_that_was_complete_already(visit, monkeypatch):
    monkeypatch.setattr(transfer, "WRITE_BATCH", 1)
    hold = Hold(after=SIZE)
    visit.origin.fault("/file", Fault(chunked=True, hold=hold))
    call = asyncio.ensure_future(visit.get())
    await until(lambda: [each.stat().st_size for each in visit.out.parent.iterdir()] == [SIZE])
    visit.origin.drop_connections()  # before the last chunk
    assert await call == OLD
    assert visit.ranges == [None, f"bytes={SIZE}-"]
    assert visit.origin.requests[-1].status == 416


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
async def test_a_file_that_is_encoded_though_that_was_not_asked_for_is_refused(visit, encoding):
    visit.origin.always("/file", Fault(headers=(("Content-Encoding", encoding),)))
    assert (await visit.error()).code == ErrorCode.BG_E_INVALID_SERVER_RESPONSE
    assert visit.origin.requests[0].header("Accept-Encoding") == "identity"


async def test_an_etag_that_changes_with_the_compression_is_another_version_and_never_mixed(visit):
    visit.origin.fault("/file", CUT, Fault(ignore_if_range=True, headers=(("ETag", '"v1-gzip"'),)))
    assert await visit.get() == OLD
    assert visit.ranges == [None, REST, None]


@pytest.mark.parametrize("status", [304, 412, 500, 503, 502, 404, 403])
async def test_an_answer_that_is_no_file_is_never_written_and_what_was_fetched_is_kept_or_dropped_whole(visit, status):
    visit.origin.fault("/file", CUT, answer(status, b"" if status == 304 else b"not the file"))
    found, error = await visit.get_twice()
    assert found == OLD
    assert (None if error is None else error.http_status) == (None if status == 412 else status)
    assert visit.ranges[-1] == (None if status == 412 else REST)


# -- elsewhere


async def test_a_redirect_that_expires_is_resolved_again_from_the_name_that_was_given(visit):
    """Each signed link is good for one request."""
    number = 0

    def sign() -> None:
        nonlocal number
        number += 1
        visit.origin.serve(f"/signed{number}", OLD, last_modified=STAMP)
        visit.origin.always(f"/signed{number - 1}", answer(403))
        visit.origin.always("/file", redirect(f"/signed{number}"))
        visit.origin.fault(f"/signed{number}", Fault(cut_after=HALF // 2, then=sign) if number < 3 else HONEST)

    sign()
    assert await visit.get() == OLD
    assert [seen.target for seen in visit.origin.requests] == [each for n in (1, 2, 3) for each in ("/file", f"/signed{n}")]


async def test_a_reported_redirect_that_has_expired_is_resolved_again_from_the_name_that_was_given(visit, memory_dir):
    visit.origin.serve("/signed1", OLD, last_modified=STAMP)
    visit.origin.serve("/signed2", OLD, last_modified=STAMP)
    visit.origin.fault("/file", redirect("/signed1"), redirect("/signed2"))

    def expire() -> None:
        visit.origin.always("/signed1", answer(403))

    visit.origin.fault("/signed1", Fault(cut_after=HALF, then=expire))
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS) as manager:
        job = await manager.create_job("signed", priority=bits.JobPriority.FOREGROUND)
        await job.set_security_flags(bits.SecurityFlags.HTTP_REDIRECT_POLICY_ALLOW_REPORT)
        file = await job.add_file(visit.url, visit.out)
        await job.resume()
        await job.wait()
        assert file.remote_name == visit.origin.url("/signed2")
        await job.complete()
    assert visit.out.read_bytes() == OLD
    assert [seen.target for seen in visit.origin.requests] == ["/file", "/signed1", "/signed1", "/file", "/signed2"]
    assert visit.ranges[-1] == REST


# -- something else in place of the file


FILE, PAGE = (("Content-Type", "application/octet-stream"),), (("Content-Type", "text/html; charset=utf-8"),)


@pytest.mark.parametrize("way", ["page", "redirected"])
async def test_a_login_page_in_place_of_the_rest_is_an_error_that_may_pass_and_drops_nothing(visit, way):
    visit.origin.always("/login", answer(200, b"<html>", Content_Type="text/html"))
    page = Fault(status=200, body=b"<html>please log in</html>", headers=PAGE) if way == "page" else redirect("/login")
    visit.origin.fault("/file", Fault(cut_after=HALF, headers=FILE), page)
    error = await visit.error()
    assert error.transient
    assert "web page" in str(error)
    assert await visit.get() == OLD
    assert visit.ranges[-1] == REST, "what was fetched before was kept"


async def test_a_file_that_is_a_web_page_may_change(visit):
    visit.origin.fault("/file", Fault(cut_after=HALF, headers=PAGE, then=lambda: visit.origin.serve("/file", NEW, etag='"v2"')))
    visit.origin.always("/file", Fault(headers=PAGE))
    assert await visit.get() == NEW


@pytest.mark.parametrize("way", [HONEST, Fault(chunked=True), Fault(no_validator=True)], ids=["length", "chunked", "no validator"])
async def test_an_empty_file_is_a_file(visit, way):
    visit.origin.serve("/file", b"")
    visit.origin.always("/file", way)
    assert await visit.get() == b""
    assert visit.ranges == [None]


# -- clocks


@pytest.mark.parametrize("skew", [-86400 * 3650, -3600, 3600, 86400 * 3650], ids=["ten years slow", "slow", "fast", "ten years fast"])
@pytest.mark.parametrize("etag", [True, False], ids=["ETag", "date alone"])
async def test_a_server_whose_clock_is_wrong_is_resumed_like_any_other(visit, skew, etag):
    here = time.time() + skew
    visit.origin.serve("/file", OLD, etag='"v1"' if etag else None, last_modified=here - 5)
    dated = Fault(headers=(("Date", formatdate(here, usegmt=True)),))
    visit.origin.always("/file", dated)
    visit.origin.fault("/file", replace(dated, cut_after=HALF))
    assert await visit.get() == OLD
    assert visit.ranges == [None, REST]


async def test_a_date_that_is_ahead_of_the_servers_own_clock_was_set_by_somebody_and_counts(visit):
    visit.origin.serve("/file", OLD, etag=None, last_modified=STAMP + 86400)
    dated = Fault(headers=(("Date", DATE),))
    visit.origin.always("/file", dated)
    visit.origin.fault("/file", replace(dated, cut_after=HALF))
    assert await visit.get() == OLD
    assert visit.ranges == [None, REST]


# -- slow


@pytest.mark.parametrize("thread", [False, True], ids=["loop", "thread"])
async def test_a_server_that_sends_byte_after_byte_is_given_up_on_and_its_bytes_are_kept(visit, memory_dir, thread, monkeypatch):
    monkeypatch.setattr(lane, "DETACH_FROM", 1 if thread else 1 << 30)
    monkeypatch.setattr(transfer, "RECONNECTS", 0)
    visit.origin.always("/file", Fault(rate=40))
    timeouts = bits.Timeouts(low_speed_limit=1000, low_speed_time=0.5)
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS, timeouts=timeouts) as manager:
        job = await manager.create_job("slow", priority=bits.JobPriority.FOREGROUND)
        await job.add_file(visit.url, visit.out)
        await job.resume()
        await until(lambda: job.state is bits.JobState.TRANSIENT_ERROR)
        assert job.error.code == ErrorCode.ERROR_WINHTTP_TIMEOUT
        assert "too slow" in job.error.message
        assert 0 < job.progress.bytes_transferred < 1000
        visit.origin.always("/file", HONEST)
        await job.resume()
        await job.wait()
        await job.complete()
    assert visit.out.read_bytes() == OLD
    assert visit.ranges[-1] is not None
