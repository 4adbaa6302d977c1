"""The end checks over real sockets: a file whose digest is wrong never gets its name, whoever named the digest."""

import base64
import hashlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from blake3 import blake3

import bits_async as bits
from bits_async.jobs import transfer
from bits_async.transport import lane
from tests.peers import HONEST, Fault, Hold, Origin
from tests.waiting import until

SIZE, HALF = 300_000, 170_000
BODY, BAD = os.urandom(SIZE), os.urandom(SIZE)
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
DIGESTS: dict[str, Callable[[bytes], str]] = {
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
    "sha512": lambda data: hashlib.sha512(data).hexdigest(),
    "blake3": lambda data: blake3(data).hexdigest(),
}


def said(name: str, data: bytes, algorithm: str = "sha-256") -> tuple[str, str]:
    raw = hashlib.new(algorithm.replace("-", ""), data).digest()
    return name, f"{algorithm}=:{base64.b64encode(raw).decode()}:"


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch, memory_dir: Path) -> None:
    monkeypatch.setattr(transfer, "WRITE_BATCH", 64 << 10)
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.01,) * transfer.RECONNECTS)
    monkeypatch.setenv("XDG_STATE_HOME", str(memory_dir / "state"))


@pytest.fixture
def moved_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "DETACH_FROM", 1)


@dataclass
class Visit:
    origin: Origin
    out: Path
    url: str

    async def get(self, **options: str) -> bytes:
        path = await bits.download(self.url, self.out, ssl=NO_TLS, **options)  # type: ignore[arg-type]
        return path.read_bytes()

    async def refused(self, **options: str) -> bits.ValidationFailed:
        with pytest.raises(bits.ValidationFailed) as caught:
            await self.get(**options)
        assert caught.value.code == bits.ErrorCode.BG_E_VALIDATION_FAILED
        assert os.listdir(self.out.parent) == [], "neither the file nor a part of it"
        return caught.value

    @property
    def wire(self) -> list[str | None]:
        return [seen.range for seen in self.origin.requests]


@pytest.fixture
async def visit(memory_dir):
    (memory_dir / "out").mkdir()
    async with Origin() as origin:
        yield Visit(origin, memory_dir / "out" / "file", origin.serve("/file", BODY))


# -- the caller's


@pytest.mark.parametrize("name", DIGESTS)
async def test_a_file_with_the_callers_digest_arrives(visit, name):
    assert await visit.get(**{name: DIGESTS[name](BODY).upper()}) == BODY


@pytest.mark.parametrize("name", DIGESTS)
async def test_a_wrong_digest_is_an_error_after_a_second_look_past_the_caches(visit, name):
    error = await visit.refused(**{name: DIGESTS[name](BAD)})
    assert DIGESTS[name](BAD) in str(error)
    assert DIGESTS[name](BODY) in str(error)
    assert visit.wire == [None, None], "the same wrong bytes twice are no accident"
    assert [seen.header("Cache-Control") for seen in visit.origin.requests] == [None, "no-cache"]


async def test_each_of_several_digests_must_be_right(visit):
    right = {name: digest(BODY) for name, digest in DIGESTS.items()}
    assert await visit.get(**right) == BODY
    visit.out.unlink()
    for name in DIGESTS:
        await visit.refused(**{**right, name: DIGESTS[name](BAD)})


async def test_bytes_that_were_wrong_once_are_fetched_anew(visit):
    visit.origin.serve("/file", BAD)
    visit.origin.fault("/file", Fault(then=lambda: visit.origin.serve("/file", BODY)))
    assert await visit.get(sha256=DIGESTS["sha256"](BODY)) == BODY
    assert visit.wire == [None, None]


async def test_bytes_that_are_wrong_in_another_way_each_time_are_fetched_a_bounded_number_of_times(visit):
    number = 0

    def change() -> None:
        nonlocal number
        number += 1
        visit.origin.serve("/file", BAD + b"%d" % number)
        visit.origin.fault("/file", Fault(then=change))

    change()
    await visit.refused(sha256=DIGESTS["sha256"](BODY))
    assert len(visit.wire) == 1 + transfer.REFETCHES


async def test_a_resumed_job_gets_as_many_tries_again(visit, memory_dir):
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS) as manager:
        job = await manager.create_job("digests", priority=bits.JobPriority.FOREGROUND)
        await job.add_file(visit.url, visit.out, sha512=DIGESTS["sha512"](BAD))
        for number in (2, 4):
            await job.resume()
            with pytest.raises(bits.ValidationFailed):
                await job.wait()
            assert len(visit.wire) == number
            assert job.state is bits.JobState.ERROR
        visit.origin.serve("/file", BAD)
        await job.resume()
        await job.wait()
        await job.complete()
    assert visit.out.read_bytes() == BAD


@pytest.mark.parametrize("name", DIGESTS)
async def test_after_a_restart_of_the_program_the_head_is_read_again(visit, memory_dir, name):
    hold = Hold(after=HALF)
    visit.origin.fault("/file", Fault(hold=hold))
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS) as manager:
        job = await manager.create_job("digests", priority=bits.JobPriority.FOREGROUND)
        await job.add_file_set([bits.FileInfo(visit.url, visit.out, **{name: DIGESTS[name](BODY)})])
        await job.resume()
        await hold.reached.wait()
        await until(lambda: job.progress.bytes_transferred > 0)
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS) as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        await job.wait()
        await job.complete()
    assert visit.out.read_bytes() == BODY
    first, second = visit.wire
    assert first is None
    assert second is not None, "it went on where it stopped"


async def test_a_digest_that_the_next_call_names_holds_for_what_the_first_one_fetched(visit):
    visit.origin.fault("/file", Fault(cut_after=HALF), Fault(status=404))
    with pytest.raises(bits.RemoteFileError):
        await visit.get()
    await visit.refused(blake3=DIGESTS["blake3"](BAD))


async def test_of_a_file_of_ranges_the_digest_is_that_of_the_local_file(visit, memory_dir):
    expected = BODY[1000:2000] + BODY[:10]
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS) as manager:
        job = await manager.create_job("digests", priority=bits.JobPriority.FOREGROUND)
        visit.origin.always("/file", Fault(headers=(said("Repr-Digest", BODY),)))
        ranges = [bits.FileRange(1000, 1000), bits.FileRange(0, 10)]
        await job.add_file_with_ranges(visit.url, visit.out, ranges, sha512=DIGESTS["sha512"](expected))
        await job.resume()
        await job.wait()
        await job.complete()
    assert visit.out.read_bytes() == expected


async def test_wrong_bytes_on_demand_are_thrown_away_and_fetched_anew(visit, memory_dir):
    def mend() -> None:
        visit.origin.serve("/file", BODY)

    visit.origin.serve("/file", BAD)
    visit.origin.fault("/file", Fault(then=mend))
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS) as manager:
        job = await manager.create_job("digests", priority=bits.JobPriority.FOREGROUND)
        file = await job.add_file(visit.url, visit.out, sha256=DIGESTS["sha256"](BODY))
        await job.set_on_demand_mode(True)
        await file.request_file_ranges([bits.FileRange(HALF, SIZE - HALF), bits.FileRange(0, HALF)])
        await job.resume()
        await job.wait()
        await job.complete()
    assert visit.out.read_bytes() == BODY


# -- the server's


@pytest.mark.parametrize("algorithm", ["sha-256", "sha-512"])
@pytest.mark.parametrize("name", ["Repr-Digest", "Content-Digest"])
@pytest.mark.parametrize("way", [HONEST, Fault(chunked=True)], ids=["length", "chunked"])
async def test_bytes_that_are_not_what_the_server_said_they_hash_to_are_refused(visit, name, algorithm, way):
    visit.origin.always("/file", Fault(chunked=way.chunked, headers=(said(name, BAD, algorithm),)))
    error = await visit.refused()
    assert "the server said" in str(error)
    visit.origin.always("/file", Fault(chunked=way.chunked, headers=(said(name, BODY, algorithm),)))
    assert await visit.get() == BODY


async def test_bytes_that_were_damaged_on_the_way_are_fetched_anew(visit):
    visit.origin.serve("/file", BAD)
    mend = Fault(headers=(said("Repr-Digest", BODY),), then=lambda: visit.origin.serve("/file", BODY))
    visit.origin.fault("/file", mend)
    assert await visit.get() == BODY
    assert visit.wire == [None, None]


async def test_the_same_where_a_thread_moves_the_bytes(visit, moved_by_threads):
    await test_bytes_that_were_damaged_on_the_way_are_fetched_anew(visit)


async def test_after_a_cut_the_digest_of_the_first_answer_still_holds(visit):
    digest = (said("Repr-Digest", BODY),)
    visit.origin.fault("/file", Fault(cut_after=HALF, headers=digest))
    assert await visit.get() == BODY
    visit.out.unlink()
    visit.origin.fault("/file", *[Fault(cut_after=HALF, headers=(said("Repr-Digest", BAD),)), HONEST] * 2)
    await visit.refused()


async def test_a_digest_that_comes_with_the_second_answer_is_of_the_head_too(visit):
    visit.origin.fault("/file", *[Fault(cut_after=HALF), Fault(headers=(said("Repr-Digest", BAD),))] * 2)
    await visit.refused()


@pytest.mark.parametrize("mover", ["loop", "thread"])
async def test_a_part_that_is_not_what_its_own_digest_says_is_thrown_away_with_the_rest(visit, mover, monkeypatch):
    monkeypatch.setattr(lane, "DETACH_FROM", 1 if mover == "thread" else 1 << 30)
    visit.origin.fault("/file", Fault(cut_after=HALF), Fault(headers=(said("Content-Digest", BAD[HALF:]),)))
    assert await visit.get() == BODY
    assert visit.wire == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
async def test_the_same_of_several_parts_at_once(visit, memory_dir, wrong, monkeypatch):
    monkeypatch.setattr(transfer, "SEGMENT", 60_000)
    original = visit.origin._judge

    def described(seen, version, fault):
        headers, body = original(seen, version, fault)
        return [*headers, said("Content-Digest", BAD if wrong and len(visit.wire) == 3 else bytes(body))], body

    visit.origin._judge = described
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS) as manager:
        job = await manager.create_job("digests", priority=bits.JobPriority.FOREGROUND)
        await job.add_file(visit.url, visit.out, sha256=DIGESTS["sha256"](BODY))
        await job.set_segments(3)
        await job.resume()
        await job.wait()
        await job.complete()
    assert visit.out.read_bytes() == BODY
    assert sum(each is None or each.startswith("bytes=0-") for each in visit.wire) == 1 + wrong


async def test_a_part_that_is_what_its_own_digest_says_is_kept(visit):
    visit.origin.fault("/file", Fault(cut_after=HALF), Fault(headers=(said("Content-Digest", BODY[HALF:]),)))
    assert await visit.get() == BODY
    assert visit.wire == [None, f"bytes={HALF}-"]


async def test_a_whole_file_digest_that_changes_between_two_ranges_is_another_version(visit):
    def change() -> None:
        visit.origin.serve("/file", BAD)  # under the same ETag
        visit.origin.always("/file", Fault(headers=(said("Repr-Digest", BAD),)))

    visit.origin.fault("/file", Fault(cut_after=HALF, headers=(said("Repr-Digest", BODY),), then=change))
    assert await visit.get() == BAD
    assert visit.wire == [None, f"bytes={HALF}-", None]


async def test_the_callers_word_weighs_more_than_the_servers(visit):
    visit.origin.always("/file", Fault(headers=(said("Repr-Digest", BAD),)))
    assert await visit.get(sha256=DIGESTS["sha256"](BODY)) == BODY


async def test_digests_that_nobody_trusts_any_more_are_not_looked_at(visit):
    old = base64.b64encode(hashlib.md5(BAD).digest()).decode()
    visit.origin.always("/file", Fault(headers=(("Repr-Digest", f"md5=:{old}:"), ("Content-MD5", old), ("Digest", f"md5={old}"))))
    assert await visit.get() == BODY


async def test_the_journal_keeps_the_servers_digest(visit, memory_dir):
    hold = Hold(after=HALF)
    visit.origin.fault("/file", Fault(hold=hold, headers=(said("Repr-Digest", BAD),)))
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS) as manager:
        job = await manager.create_job("digests", priority=bits.JobPriority.FOREGROUND)
        await job.add_file(visit.url, visit.out)
        await job.resume()
        await hold.reached.wait()
        await until(lambda: job.progress.bytes_transferred > 0)
    async with bits.BitsManager(store=memory_dir / "queue.db", ssl=NO_TLS) as manager:
        (job,) = [each async for each in manager.enum_jobs()]
        await job.wait()
    first, second, third = visit.wire
    assert second is not None
    assert (first, third) == (None, None), "what was fetched did not hash to what the first answer said"


# -- in the trailers of a chunked body, which aiohttp drops


@pytest.mark.parametrize("field", ["Repr-Digest", "Content-Digest", "Digest"])
@pytest.mark.parametrize("hashed", [BODY, BAD], ids=["right", "wrong"])
async def test_a_digest_in_the_trailers_is_not_asked_for_and_says_nothing(visit, field, hashed):
    visit.origin.always("/file", Fault(chunked=True, headers=(("Trailer", field),), trailers=(said(field, hashed),)))
    assert await visit.get() == BODY
    assert visit.origin.requests[0].header("TE") is None


async def test_a_file_whose_digest_comes_in_the_trailers_is_held_to_that_of_the_caller(visit):
    visit.origin.always("/file", Fault(chunked=True, trailers=(said("Repr-Digest", BODY),)))
    assert await visit.get(sha256=hashlib.sha256(BODY).hexdigest()) == BODY
    visit.out.unlink()
    await visit.refused(sha256=hashlib.sha256(BAD).hexdigest())


async def test_a_digest_in_the_head_of_a_chunked_body_counts(visit):
    visit.origin.always("/file", Fault(chunked=True, headers=(said("Repr-Digest", BAD),), trailers=(said("Repr-Digest", BODY),)))
    await visit.refused()
