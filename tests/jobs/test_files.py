"""The files of a job: ranges of remote files, other names, judgements on content, sizes, and how a job may be fetched.

Real manager, real journal, real files; network, identities and time are fake.
"""

import hashlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

import bits_async as bits
from bits_async import ErrorCode, FileRange, JobState
from bits_async.jobs import transfer
from bits_async.jobs.arguments import is_reserved_on_windows
from bits_async.jobs.model import FileRecord
from bits_async.testing import FakeNetwork, fake_token
from bits_async.transport.ranges import Slice
from tests.waiting import until

URL, OTHER = "https://files.example.test/a/big.bin", "https://mirror.example.test/b/big.bin"
BODY = os.urandom(400_000)
NEW = os.urandom(400_000)
MONDAY, TUESDAY = "Mon, 02 Nov 2026 10:00:00 GMT", "Tue, 03 Nov 2026 10:00:00 GMT"
RANGES = [FileRange(300_000, 50_000), FileRange(50, 10), FileRange(100_000, 100_000), FileRange(399_000)]


def joined(body: bytes, ranges: Sequence[FileRange] = RANGES) -> bytes:
    return b"".join(body[each.initial_offset : each.end] for each in ranges)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "WRITE_BATCH", 32 << 10)


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as fake:
        fake.serve(URL, BODY)
        yield fake


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


@pytest.fixture
async def manager(network: FakeNetwork, store: Path) -> AsyncIterator[bits.BitsManager]:
    async with bits.BitsManager(store=store) as opened:
        yield opened


@pytest.fixture
async def job(manager: bits.BitsManager) -> bits.Job:
    return await manager.create_job("files", priority=bits.JobPriority.FOREGROUND)


async def stopped_at(network: FakeNetwork, job: bits.Job, after: int, total: int) -> None:
    """Resume the job, let it come so far in the body of one answer, until `total` bytes of the job are there, and suspend it."""
    network.clock.freeze()  # nobody has waited for too long meanwhile; here and below
    network.pause(after=after)
    await job.resume()
    await until(lambda: job.progress.bytes_transferred >= total)
    await job.suspend()
    network.resume()
    network.clock.thaw()


async def finished(job: bits.Job) -> bytes:
    if job.state in (JobState.SUSPENDED, JobState.ERROR):
        await job.resume()
    await job.wait()
    (path,) = await job.complete()
    assert os.listdir(path.parent) == [path.name]
    return path.read_bytes()


async def failed(job: bits.Job) -> bits.BitsError:
    await job.resume()
    with pytest.raises(bits.BitsError) as caught:
        await job.wait()
    assert job.state is JobState.ERROR
    assert caught.value.job_id == job.id
    assert caught.value.advice
    return caught.value


def asked(network: FakeNetwork) -> list[tuple[int, int | None]]:
    return [(each.start, each.end) for each in network.requests]


# -- ranges ---------------------------------------------------------------------------------------------------------------------------


async def test_ranges_are_joined_in_the_order_in_which_they_are_given(network, job, out):
    file = await job.add_file_with_ranges(URL, out / "f", RANGES)
    assert file.ranges == tuple(RANGES)
    assert file.progress.bytes_total is None, "one goes to the end of a file whose size is not known"
    assert await finished(job) == joined(BODY)
    assert asked(network) == [(300_000, 350_000), (50, 60), (100_000, 200_000), (399_000, 400_000)]
    assert file.progress == bits.FileProgress(151_010, 151_010, True)


async def test_the_size_of_a_file_of_ranges_is_their_sum_and_known_at_once(network, job, out):
    await job.add_file_with_ranges(URL, out / "f", [FileRange(10, 20), FileRange(100, 5)])
    assert job.progress == bits.JobProgress(25, 0, 1, 0)
    assert len(await finished(job)) == 25


async def test_a_file_without_ranges_has_none(network, job, out):
    assert (await job.add_file(URL, out / "f")).ranges == ()


async def test_neighbours_are_fetched_by_one_request(network, job, out):
    await job.add_file_with_ranges(URL, out / "f", [FileRange(100, 50), FileRange(150, 50), FileRange(0, 100)])
    assert await finished(job) == BODY[100:200] + BODY[:100]
    assert asked(network) == [(100, 200), (0, 100)]


async def test_the_whole_file_may_be_a_range(network, job, out):
    await job.add_file_with_ranges(URL, out / "f", [FileRange(0)])
    assert await finished(job) == BODY
    assert asked(network) == [(0, None)]


async def test_an_empty_file_has_a_range_that_is_all_of_it(network, job, out):
    network.serve(URL, b"")
    await job.add_file_with_ranges(URL, out / "f", [FileRange(0)])
    assert await finished(job) == b""


async def test_the_digest_of_a_file_of_ranges_is_that_of_the_local_file(network, job, out):
    await job.add_file_with_ranges(URL, out / "f", RANGES, sha256=hashlib.sha256(joined(BODY)).hexdigest())
    await stopped_at(network, job, 70_000, 90_000)
    assert await finished(job) == joined(BODY)


@pytest.mark.parametrize(
    ("ranges", "code"),
    [
        ([], ErrorCode.E_INVALIDARG),
        ([FileRange(0, 10), FileRange(20, 0)], ErrorCode.E_INVALIDARG),
        ([FileRange(0, 10), FileRange(0, 0)], ErrorCode.BG_E_OVERLAPPING_RANGES),
        ([FileRange(0, 10), FileRange(5, 10)], ErrorCode.BG_E_OVERLAPPING_RANGES),
        ([FileRange(0, 10), FileRange(0, 10)], ErrorCode.BG_E_OVERLAPPING_RANGES),
        ([FileRange(2**64 - 1)], ErrorCode.BG_E_INVALID_RANGE),
    ],
)
async def test_ranges_that_cannot_be_meant_are_refused_and_nothing_is_added(job, out, ranges, code):
    with pytest.raises(bits.InvalidArgument) as caught:
        await job.add_file_with_ranges(URL, out / "f", ranges)
    assert caught.value.code == code
    assert job.files == ()


async def test_a_file_has_as_many_ranges_as_the_limits_allow_and_the_elevated_have_more(network, store, out):
    ranges = [FileRange(2 * number, 1) for number in range(501)]
    async with bits.BitsManager(store=store, limits=bits.Limits.windows()) as manager:
        job = await manager.create_job("alice's", owner=fake_token("alice"))
        await job.add_file_with_ranges(URL, out / "a", ranges[:500])
        with pytest.raises(bits.AccessDenied) as caught:
            await job.add_file_with_ranges(URL, out / "b", ranges)
        assert caught.value.code == ErrorCode.BG_E_TOO_MANY_RANGES_IN_FILE
        assert len(job.files) == 1
        admins = await manager.create_job("admin's", owner=fake_token("admin", elevated=True))
        await admins.add_file_with_ranges(URL, out / "b", ranges)


@pytest.mark.parametrize(
    ("ranges", "requests"),
    [
        ([FileRange(400_000, 1)], 1),  # the server says so
        ([FileRange(400_000)], 1),
        ([FileRange(399_990, 20)], 1),  # the first answer tells the size
        ([FileRange(0, 10), FileRange(500_000, 10)], 1),
        ([FileRange(0, 10), FileRange(400_000)], 1),
    ],
)
async def test_a_range_that_is_not_in_the_file_stops_the_job_before_a_byte_is_kept(network, job, out, ranges, requests):
    await job.add_file_with_ranges(URL, out / "f", ranges)
    error = await failed(job)
    assert (error.code, type(error)) == (ErrorCode.BG_E_INVALID_RANGE, bits.RemoteFileError)
    assert len(network.requests) == requests
    assert os.listdir(out) == []


async def test_a_server_without_ranges_stops_the_job_and_one_with_ranges_lets_it_go_on(network, job, out):
    network.serve(URL, BODY, ranges=False)
    await job.add_file_with_ranges(URL, out / "f", RANGES)
    error = await failed(job)
    assert (error.code, type(error)) == (ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT, bits.RemoteFileError)
    network.serve(URL, BODY)
    assert await finished(job) == joined(BODY)


async def test_ranges_that_nothing_proves_to_be_of_one_version_are_not_joined(network, job, out):
    network.serve(URL, BODY, etag=None)
    await job.add_file_with_ranges(URL, out / "f", RANGES)
    error = await failed(job)
    assert error.code == ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT
    assert "validator" in error.message


async def test_one_range_needs_no_validator(network, job, out):
    network.serve(URL, BODY, etag=None, cut_after=50_000)
    await job.add_file_with_ranges(URL, out / "f", [FileRange(1000, 200_000)])
    assert await finished(job) == BODY[1000:201_000]
    assert asked(network) == [(1000, 201_000)] * 2, "what was cut is fetched anew"


async def test_a_connection_that_breaks_in_a_range_goes_on_there_with_the_same_version(network, job, out):
    network.serve(URL, BODY, cut_after=40_000)
    await job.add_file_with_ranges(URL, out / "f", RANGES)
    assert await finished(job) == joined(BODY)
    assert asked(network)[:3] == [(300_000, 350_000), (340_000, 350_000), (50, 60)]
    assert [each.if_range is not None for each in network.requests] == [False, True, True, True, True]


@pytest.mark.parametrize("reopened", [False, True], ids=["resumed", "by another manager"])
async def test_a_job_of_ranges_goes_on_where_it_stopped(network, store, out, reopened):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("ranges")
        await job.add_file_with_ranges(URL, out / "f", RANGES)
        await stopped_at(network, job, 60_000, 90_000)
        (part,) = out.iterdir()
        size = part.stat().st_size
        assert 90_000 <= size < 150_010
        if not reopened:
            assert await finished(job) == joined(BODY)
    if reopened:
        async with bits.BitsManager(store=store) as manager:
            job = await manager.get_job(job.id)
            assert job.files[0].ranges == tuple(RANGES)
            assert await finished(job) == joined(BODY)
    assert asked(network)[-2:] == [(100_000 + size - 50_010, 200_000), (399_000, 400_000)]


async def test_a_file_that_changes_between_two_ranges_is_wholly_the_new_version(network, job, out):
    await job.add_file_with_ranges(URL, out / "f", RANGES)
    stream = job.events()
    await stopped_at(network, job, 60_000, 90_000)
    network.serve(URL, NEW)
    assert await finished(job) == joined(NEW)
    assert "the file has changed" in next(event.reason for event in [e async for e in stream] if isinstance(event, bits.FileRestarted))


async def test_a_file_that_becomes_too_short_for_a_later_range_stops_the_job(network, job, out):
    await job.add_file_with_ranges(URL, out / "f", RANGES)
    await stopped_at(network, job, 60_000, 90_000)
    network.serve(URL, NEW[:360_000])
    assert (await failed(job)).code == ErrorCode.BG_E_INVALID_RANGE


# -- other names ----------------------------------------------------------------------------------------------------------------------


async def test_an_unfinished_file_goes_on_at_another_url_where_it_is_the_same(network, job, out):
    network.serve(URL, BODY, last_modified=MONDAY)
    network.serve(OTHER, BODY, etag='"mirror"', last_modified=MONDAY)
    file = await job.add_file(URL, out / "f")
    await stopped_at(network, job, 100_000, 90_000)
    position = file.progress.bytes_transferred
    await file.set_remote_name(OTHER)
    assert file.remote_name == OTHER
    assert await finished(job) == BODY
    assert [(each.url, each.start) for each in network.requests] == [(URL, 0), (OTHER, position)]


@pytest.mark.parametrize(
    "served",
    [
        {"body": NEW, "last_modified": TUESDAY},
        {"body": NEW[:-1], "last_modified": MONDAY},
        {"body": NEW, "last_modified": None},
    ],
    ids=["another time", "another size", "no time"],
)
async def test_an_unfinished_file_begins_anew_where_another_url_does_not_prove_to_be_the_same(network, job, out, served):
    network.serve(URL, BODY, etag='"1"', last_modified=MONDAY)
    network.serve(OTHER, etag='"1"', **served)
    file = await job.add_file(URL, out / "f")
    await stopped_at(network, job, 100_000, 90_000)
    await file.set_remote_name(OTHER)
    assert await finished(job) == served["body"]


async def test_the_same_etag_at_another_url_proves_nothing(network, job, out):
    network.serve(URL, BODY, etag='"1"')
    network.serve(OTHER, NEW, etag='"1"')
    file = await job.add_file(URL, out / "f")
    await stopped_at(network, job, 100_000, 90_000)
    await file.set_remote_name(OTHER)
    assert await finished(job) == NEW
    assert [each.start for each in network.requests] == [0, 0]


async def test_a_url_that_is_signed_again_goes_on_by_its_etag(network, job, out):
    for query in ("?sig=1", "?sig=2"):
        network.serve(URL + query, BODY)
    file = await job.add_file(URL + "?sig=1", out / "f")
    await stopped_at(network, job, 100_000, 90_000)
    await file.set_remote_name(URL + "?sig=2")
    assert await finished(job) == BODY
    assert network.requests[-1].start >= 90_000


async def test_a_running_job_goes_over_to_the_new_name_at_once(network, job, out):
    network.serve(OTHER, NEW)
    file = await job.add_file(URL, out / "f")
    network.clock.freeze()
    network.pause(after=100_000)
    await job.resume()
    await until(lambda: job.progress.bytes_transferred)
    await file.set_remote_name(OTHER)
    network.resume()
    assert await finished(job) == NEW


async def test_a_name_that_failed_can_be_changed_and_the_job_resumed(network, job, out):
    file = await job.add_file(URL + "-gone", out / "f")
    assert (await failed(job)).http_status == 404
    await file.set_remote_name(URL)
    assert await finished(job) == BODY


async def test_a_new_name_survives_a_restart(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("renamed")
        file = await job.add_file(URL + "-gone", out / "f")
        await file.set_remote_name(URL + "?token=s3cret")
    async with bits.BitsManager(store=store) as manager:
        assert (await manager.get_job(job.id)).files[0].remote_name == URL + "?token=s3cret"
    assert b"s3cret" not in store.read_bytes()


@pytest.mark.parametrize("url", ["ftp://h/x", "http://u:p@h/x", "x", "http://h/" + "a" * 2200])
async def test_a_new_name_is_checked_as_the_first_one_was(job, out, url):
    file = await job.add_file(URL, out / "f")
    with pytest.raises(bits.InvalidArgument):
        await file.set_remote_name(url)
    assert file.remote_name == URL


async def test_a_prefix_is_replaced_in_every_url_that_begins_with_it(network, job, out):
    names = [URL, "https://FILES.example.test/a/x", "https://files.example.test/c/y"]
    files = [await job.add_file(name, out / f"f{number}") for number, name in enumerate(names)]
    assert await job.replace_remote_prefix("https://files.example.test/a/", "https://mirror.example.test/b/") is True
    assert [file.remote_name for file in files] == [OTHER, *names[1:]]
    assert await job.replace_remote_prefix("https://files.example.test/a/", "https://mirror.example.test/b/") is False


@pytest.mark.parametrize(
    ("old", "new"), [("", "http://x/"), ("https://", ""), ("https://", "https://h/" + "a" * 2200), ("https://", "ftp://")]
)
async def test_a_prefix_that_cannot_be_meant_is_refused_and_no_name_is_changed(job, out, old, new):
    file = await job.add_file(URL, out / "f")
    with pytest.raises(bits.InvalidArgument) as caught:
        await job.replace_remote_prefix(old, new)
    assert caught.value.code == ErrorCode.E_INVALIDARG
    assert file.remote_name == URL


async def test_finished_files_are_not_fetched_again_under_their_new_names(network, job, out):
    network.serve(OTHER, NEW)
    await job.add_file(URL, out / "first")
    await job.add_file(URL + "-gone", out / "second")
    await failed(job)
    network.serve(OTHER + "-gone", NEW)
    assert await job.replace_remote_prefix("https://files.example.test/a/", "https://mirror.example.test/b/")
    await job.resume()
    await job.wait()
    await job.complete()
    assert ((out / "first").read_bytes(), (out / "second").read_bytes()) == (BODY, NEW)
    assert [each.url for each in network.requests] == [URL, URL + "-gone", OTHER + "-gone"]


async def test_t19_a_new_origin_gets_no_credentials_until_they_are_set_again(network, job, out):
    seen: list[set[str]] = []
    honest = network.get

    def get(party, question):
        seen.append({origin.host for grant in party.grants for origin in grant.origins})
        return honest(party, question)

    network.get = get
    network.serve(OTHER, BODY, cut_after=100_000)
    file = await job.add_file(URL + "-gone", out / "f")
    await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "u", "p")
    await failed(job)
    await file.set_remote_name(OTHER + "-gone")
    await failed(job)
    await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "u", "p")
    await failed(job)
    assert seen == [{"files.example.test"}, {"files.example.test"}, {"mirror.example.test"}]


async def test_names_are_as_short_as_the_limits_want_them(network, store, out):
    long = "x" * 261
    async with bits.BitsManager(store=store, limits=bits.Limits.windows()) as manager:
        job = await manager.create_job("alice's", owner=fake_token("alice"))
        for url, path in [(f"https://h.test/{long}/a", "/srv/a"), ("https://h.test/a", f"/srv/{long}")]:
            with pytest.raises(bits.InvalidArgument) as caught:
                await job.add_file(url, path)
            assert caught.value.code == ErrorCode.BG_E_STRING_TOO_LONG
        file = await job.add_file(f"https://h.test/a?{long}", "/srv/a")
        with pytest.raises(bits.InvalidArgument):
            await file.set_remote_name(f"https://h.test/{long}")
        with pytest.raises(bits.InvalidArgument):
            await job.replace_remote_prefix("https://h.test/", f"https://h.test/{long}/")
        assert [each.remote_name for each in job.files] == [f"https://h.test/a?{long}"]
    async with bits.BitsManager(store=out / "default.db") as manager:
        job = await manager.create_job("anybody's", owner=fake_token("alice"))
        await job.add_file(f"https://h.test/{long}", f"/srv/{long}")


async def test_the_temporary_name_is_that_of_the_part_file_beside_the_destination(network, job, out):
    file = await job.add_file(URL, out / "f")
    assert file.temporary_name is None
    await job.resume()
    await job.wait()
    assert file.temporary_name is not None
    assert file.temporary_name.parent == out
    assert file.temporary_name.read_bytes() == BODY
    await job.complete()
    assert file.temporary_name is None


async def test_every_byte_comes_from_the_origin(job, out):
    assert (await job.add_file(URL, out / "f")).is_downloaded_from_peer is False


# -- judgements on content ------------------------------------------------------------------------------------------------------------


async def test_content_that_is_refused_stops_the_job_and_a_resume_fetches_it_anew(network, job, out):
    first, second = await job.add_file(URL, out / "f"), await job.add_file(OTHER, out / "g")
    network.serve(OTHER, NEW)
    await job.resume()
    await job.wait()
    await first.set_validation_state(True)
    await second.set_validation_state(False)
    assert job.state is JobState.ERROR
    assert (job.error.code, type(job.error), job.error.path) == (ErrorCode.BG_E_VALIDATION_FAILED, bits.ValidationFailed, out / "g")
    assert job.error_count == 1
    assert (first.validation_state, second.validation_state) == (True, False)
    assert (first.progress.bytes_transferred, second.progress.bytes_transferred) == (400_000, 0)
    assert job.progress.files_transferred == 1
    assert second.temporary_name is None
    assert len(os.listdir(out)) == 1
    await job.resume()
    await job.wait()
    assert await job.complete() == (out / "f", out / "g")
    assert [each.url for each in network.requests] == [URL, OTHER, OTHER]


async def test_a_file_can_be_refused_while_the_job_is_still_transferring_the_next_one(network, job, out):
    first = await job.add_file(URL, out / "f")
    await job.add_file(OTHER, out / "g")
    network.serve(OTHER, NEW * 2)
    network.clock.freeze()
    network.pause(after=500_000)
    await job.resume()
    await until(lambda: job.progress.bytes_transferred > 600_000)
    await first.set_validation_state(False)
    network.resume()
    assert (job.state, job.error.code) == (JobState.ERROR, ErrorCode.BG_E_VALIDATION_FAILED)
    await job.resume()
    await job.wait()
    await job.complete()
    assert ((out / "f").read_bytes(), (out / "g").read_bytes()) == (BODY, NEW * 2)
    assert [each.start > 0 for each in network.requests] == [False, False, False, True], "the second goes on where it was"


@pytest.mark.parametrize("valid", [True, False])
async def test_a_file_is_judged_when_it_is_finished_and_not_before(job, out, valid):
    file = await job.add_file(URL, out / "f")
    with pytest.raises(bits.InvalidState) as caught:
        await file.set_validation_state(valid)
    assert caught.value.code == ErrorCode.E_PENDING
    assert file.validation_state is False
    with pytest.raises(bits.InvalidArgument):
        await file.set_validation_state("yes")


async def test_completing_a_job_says_that_its_files_are_right(network, job, out):
    file = await job.add_file(URL, out / "f")
    await job.resume()
    await job.wait()
    assert file.validation_state is False
    await job.complete()
    assert file.validation_state is True


async def test_a_judgement_survives_a_restart(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        jobs = [await manager.create_job(name, priority=bits.JobPriority.FOREGROUND) for name in ("right", "wrong")]
        for number, job in enumerate(jobs):
            file = await job.add_file(URL, out / f"f{number}")
            await job.resume()
            await job.wait()
            await file.set_validation_state(number == 0)
    async with bits.BitsManager(store=store) as manager:
        right, wrong = [await manager.get_job(job.id) for job in jobs]
        assert right.files[0].validation_state is True
        assert (wrong.state, wrong.error.code, wrong.progress.bytes_transferred) == (JobState.ERROR, ErrorCode.BG_E_VALIDATION_FAILED, 0)


# -- how much, and how ----------------------------------------------------------------------------------------------------------------


async def test_a_job_that_would_get_more_than_it_may_stops_before_the_first_byte_too_many(network, job, out):
    await job.set_maximum_download_size(500_000)
    assert job.maximum_download_size == 500_000
    await job.add_file(URL, out / "f")
    await job.add_file(URL, out / "g")
    error = await failed(job)
    assert (error.code, type(error)) == (ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_LIMIT_REACHED, bits.RemoteFileError)
    assert job.progress.bytes_transferred == 400_000


async def test_a_job_may_have_exactly_its_maximum_download_size(network, job, out):
    await job.set_maximum_download_size(400_000)
    await job.add_file(URL, out / "f")
    assert await finished(job) == BODY


async def test_of_a_job_with_a_maximum_download_size_each_file_costs_the_same_however_many_there_are(network, manager, out, monkeypatch):
    asked, honest = 0, FileRecord.size

    def counted(file: FileRecord) -> int | None:
        nonlocal asked
        asked += 1
        return honest.fget(file)

    async def cost(count: int) -> float:
        nonlocal asked
        job = await manager.create_job("many", priority=bits.JobPriority.FOREGROUND)
        await job.set_maximum_download_size(count * len(BODY))
        await job.add_file_set([bits.FileInfo(URL, out / f"{count}-{number}") for number in range(count)])
        asked = 0
        await job.resume()
        await job.wait()
        return asked / count

    monkeypatch.setattr(FileRecord, "size", property(counted))
    assert await cost(24) <= 1.5 * await cost(4)


@pytest.mark.parametrize("size", [0, -1, 2**64, 1.5, "1", True])
async def test_a_maximum_download_size_is_a_whole_number_of_bytes(job, size):
    with pytest.raises(bits.InvalidArgument) as caught:
        await job.set_maximum_download_size(size)
    assert caught.value.code == ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE


@pytest.mark.parametrize("name", ["maximum_download_size", "dynamic_content"])
async def test_what_is_set_before_the_first_resume_stays_as_it_is_afterwards(network, job, out, name):
    value = 10**6 if name == "maximum_download_size" else True
    await getattr(job, f"set_{name}")(value)
    await job.add_file(URL, out / "f")
    await job.resume()
    await job.wait()
    with pytest.raises(bits.InvalidState) as caught:
        await getattr(job, f"set_{name}")(value)
    assert caught.value.code == ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME
    assert getattr(job, name) == value


async def test_dynamic_content_begins_anew_after_every_interruption(network, job, out, monkeypatch):
    monkeypatch.setattr(transfer, "RECONNECT_DELAYS", (0.0,) * transfer.RECONNECTS)
    network.serve(URL, BODY, cut_after=100_000)
    await job.set_dynamic_content(True)
    await job.add_file(URL, out / "f")
    await stopped_at(network, job, 150_000, 110_000)
    assert await finished(job) == BODY
    assert asked(network) == [(0, None)] * len(network.requests)
    assert [each.if_range for each in network.requests] == [None] * len(network.requests)
    assert len(network.requests) == 3


async def test_dynamic_content_is_transferred_in_the_foreground_only(network, manager, out):
    job = await manager.create_job("dynamic")
    await job.set_dynamic_content(True)
    await job.add_file(URL, out / "f")
    await job.resume()
    assert job.waiting.reason is bits.WaitingReason.NOT_FOREGROUND
    assert network.requests == []
    network.clock.freeze()
    network.pause(after=100_000)
    await job.set_priority(bits.JobPriority.FOREGROUND)
    await until(lambda: job.progress.bytes_transferred)
    await job.set_priority(bits.JobPriority.HIGH)
    assert (job.state, job.waiting.reason) == (JobState.QUEUED, bits.WaitingReason.NOT_FOREGROUND)
    network.resume()
    await job.set_priority(bits.JobPriority.FOREGROUND)
    assert await finished(job) == BODY
    assert [each.start for each in network.requests] == [0, 0]


async def test_dynamic_content_and_ranges_do_not_go_together(manager, job, out):
    await job.add_file_with_ranges(URL, out / "f", RANGES)
    other = await manager.create_job("other")
    await other.set_dynamic_content(True)
    for refused in (job.set_dynamic_content(True), other.add_file_with_ranges(URL, out / "g", RANGES)):
        with pytest.raises(bits.InvalidState) as caught:
            await refused
        assert caught.value.code == ErrorCode.BG_E_UNSUPPORTED_JOB_CONFIGURATION
    assert (job.dynamic_content, other.files) == (False, ())


async def test_high_performance_journals_nothing_on_the_way_and_still_goes_on_in_the_same_boot(network, job, out, monkeypatch):
    monkeypatch.setattr(transfer, "CHECKPOINT_BYTES", 1)
    saved: list[Sequence[Slice]] = []
    engine = job._desk.engine
    honest = engine.save

    async def save(*changes, **more):
        saved.extend(change.slices for change in changes if hasattr(change, "slices"))
        await honest(*changes, **more)

    monkeypatch.setattr(engine, "save", save)
    await job.set_high_performance(True)
    await job.add_file(URL, out / "f")
    await stopped_at(network, job, 300_000, 200_000)
    assert {piece.durable for slices in saved for piece in slices} == {0}
    assert await finished(job) == BODY
    assert network.requests[-1].start >= 200_000


async def test_high_performance_is_chosen_before_the_first_file(job, out):
    await job.set_high_performance(True)
    await job.set_high_performance(False)
    await job.add_file(URL, out / "f")
    with pytest.raises(bits.InvalidState) as caught:
        await job.set_high_performance(True)
    assert caught.value.code == ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE
    assert job.high_performance is False


async def test_high_performance_keeps_the_old_file_until_the_new_one_is_whole(network, job, out):
    (out / "f").write_bytes(b"yesterday's")
    await job.set_high_performance(True)
    await job.add_file(URL, out / "f")
    await stopped_at(network, job, 300_000, 200_000)
    assert (out / "f").read_bytes() == b"yesterday's"
    await job.cancel()
    assert os.listdir(out) == ["f"]


# -- the end --------------------------------------------------------------------------------------------------------------------------


async def test_a_file_has_the_time_of_the_remote_one(network, job, out):
    network.serve(URL, BODY, last_modified=MONDAY)
    await job.add_file(URL, out / "f")
    await job.add_file_with_ranges(URL, out / "g", RANGES)
    await job.resume()
    await job.wait()
    await job.complete()
    assert {(out / name).stat().st_mtime for name in "fg"} == {1793613600.0}


async def test_completing_a_whole_job_is_ok(network, job, out):
    await job.add_file(URL, out / "f")
    await job.resume()
    await job.wait()
    done = await job.complete()
    assert (done, done.code, done.left_behind) == ((out / "f",), ErrorCode.S_OK, ())
    assert isinstance(done, bits.Completion)


async def test_completing_a_part_of_a_job_says_so(network, job, out):
    await job.add_file(URL, out / "f")
    await job.add_file(URL + "-gone", out / "g")
    await failed(job)
    done = await job.complete(partial=True)
    assert (done, done.code, done.left_behind) == ((out / "f",), ErrorCode.BG_S_PARTIAL_COMPLETE, ())
    assert os.listdir(out) == ["f"]


async def test_t17_part_files_that_cannot_be_deleted_are_named_and_not_deleted_as_somebody_else(network, manager, job, out):
    await job.add_file(URL, out / "f")
    options = await job.token_options()
    helper = fake_token("helper")
    with bits.impersonate(helper):
        await options.set_helper_token()
    await options.set_helper_token_flags(bits.HelperTokenFlags.LOCAL_FILE)
    await stopped_at(network, job, 100_000, 90_000)
    await options.clear_helper_token()
    done = await job.complete(partial=True)
    (left,) = out.iterdir()
    assert (done, done.code, done.left_behind) == ((), ErrorCode.BG_S_UNABLE_TO_DELETE_FILES, (left,))
    assert job.state is JobState.ACKNOWLEDGED


async def with_helper(job: bits.Job) -> bits.TokenOptions:
    """The job's files are made by another identity than its owner."""
    options = await job.token_options()
    with bits.impersonate(fake_token("helper")):
        await options.set_helper_token()
    await options.set_helper_token_flags(bits.HelperTokenFlags.LOCAL_FILE)
    return options


async def test_t17_a_cancel_names_the_part_files_that_it_could_not_delete(network, manager, job, out):
    await job.add_file(URL, out / "f")
    options = await with_helper(job)
    await stopped_at(network, job, 100_000, 90_000)
    await options.clear_helper_token()
    await options.set_helper_token_flags(bits.HelperTokenFlags.NONE)  # now the owner would act, and may: it is not asked to
    done = await job.cancel()
    (left,) = out.iterdir()
    assert (done.code, done.left_behind) == (ErrorCode.BG_S_UNABLE_TO_DELETE_FILES, (left,))
    assert job.state is JobState.CANCELLED


async def test_a_cancel_that_left_nothing_is_ok(network, job, out):
    await job.add_file(URL, out / "f")
    await stopped_at(network, job, 100_000, 90_000)
    done = await job.cancel()
    assert (done.code, done.left_behind, os.listdir(out)) == (ErrorCode.S_OK, (), [])


@pytest.mark.parametrize("finished_before", [False, True], ids=["under way", "finished"])
async def test_t15_a_part_file_of_another_identity_is_not_gone_on_with_and_none_is_left(network, job, out, finished_before):
    """The helper made it and may still have it open; from now on the owner acts on files."""
    await job.add_file(URL, out / "f")
    options = await with_helper(job)
    if finished_before:
        await job.resume()
        await job.wait()
        await options.set_helper_token_flags(bits.HelperTokenFlags.NONE)
        with pytest.raises(bits.LocalFileError) as caught:
            await job.complete()
        assert caught.value.code == ErrorCode.BG_E_LOCAL_FILE_CHANGED
    else:
        await stopped_at(network, job, 100_000, 90_000)
        await options.set_helper_token_flags(bits.HelperTokenFlags.NONE)
    network.requests.clear()
    await job.resume()
    assert await finished(job) == BODY
    assert asked(network)[0][0] == 0


# -- on demand ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def demanded(job: bits.Job, out: Path) -> bits.JobFile:
    await job.set_on_demand_mode(True)
    assert job.on_demand_mode
    return await job.add_file(URL, out / "f")


async def supplied(job: bits.Job) -> None:
    await job.resume()
    await job.wait()


def holds(file: bits.JobFile, body: bytes = BODY) -> bool:
    """Whether the part file has the bytes of the ranges that are said to be there."""
    there = file.temporary_name.read_bytes() if file.temporary_name else b""
    ranges = [(each.initial_offset, each.end) for each in file.filled_file_ranges]
    return all(there[start:end] == body[start:end] and len(there[start:end]) == end - start for start, end in ranges)


async def test_only_what_is_asked_for_is_fetched_and_then_the_job_is_suspended(network, job, demanded):
    await demanded.request_file_ranges([FileRange(100_000, 50_000), FileRange(10, 90)])
    await supplied(job)
    assert job.state is JobState.SUSPENDED
    assert asked(network) == [(10, 100), (100_000, 150_000)]
    assert demanded.filled_file_ranges == (FileRange(10, 90), FileRange(100_000, 50_000))
    assert demanded.progress == bits.FileProgress(400_000, 50_090, False)
    assert holds(demanded)


async def test_ranges_that_overlap_what_is_there_are_split_and_nothing_is_fetched_twice(network, job, demanded):
    await demanded.request_file_ranges([FileRange(100_000, 50_000)])
    await supplied(job)
    await demanded.request_file_ranges([FileRange(90_000, 70_000), FileRange(155_000, 5_000)])
    await supplied(job)
    assert asked(network) == [(100_000, 150_000), (90_000, 100_000), (150_000, 160_000)]
    assert demanded.filled_file_ranges == (FileRange(90_000, 70_000),)
    assert holds(demanded)


async def test_when_all_of_the_file_is_there_the_job_is_transferred(network, job, demanded, out):
    await demanded.request_file_ranges([FileRange(200_000)])
    await supplied(job)
    assert job.state is JobState.SUSPENDED
    await demanded.request_file_ranges([FileRange(0, 200_000)])
    await supplied(job)
    assert job.state is JobState.TRANSFERRED
    assert await finished(job) == BODY
    assert asked(network) == [(200_000, None), (0, 200_000)]


async def test_a_file_that_is_asked_for_as_a_whole_is_fetched_as_a_whole(network, job, demanded):
    await demanded.request_file_ranges([FileRange(0)])
    assert await finished(job) == BODY
    assert asked(network) == [(0, None)]


async def test_an_empty_file_is_there_when_it_is_asked_for(network, job, demanded):
    network.serve(URL, b"")
    await demanded.request_file_ranges([FileRange(0)])
    assert await finished(job) == b""


async def test_the_digest_of_a_file_that_came_out_of_order_is_checked(network, job, out):
    await job.set_on_demand_mode(True)
    right = await job.add_file(URL, out / "f", sha256=hashlib.sha256(BODY).hexdigest())
    for offset in (300_000, 100_000, 0):
        await right.request_file_ranges([FileRange(offset)])
        await supplied(job)
    assert job.state is JobState.TRANSFERRED
    wrong = await job.add_file(URL, out / "g", sha256=hashlib.sha256(NEW).hexdigest())
    await wrong.request_file_ranges([FileRange(0)])
    assert (await failed(job)).code == ErrorCode.BG_E_VALIDATION_FAILED


async def test_the_download_position_says_what_comes_first(network, job, demanded):
    await demanded.request_file_ranges([FileRange(0, 100_000), FileRange(200_000, 100_000)])
    await demanded.update_download_position(250_000)
    await supplied(job)
    assert asked(network) == [(250_000, 300_000), (0, 100_000), (200_000, 250_000)]
    assert holds(demanded)


async def test_a_running_job_turns_to_what_is_asked_for_now(network, job, demanded):
    await demanded.request_file_ranges([FileRange(0, 300_000)])
    network.clock.freeze()
    network.pause(after=100_000)
    await job.resume()
    await until(lambda: job.progress.bytes_transferred >= 90_000)
    await demanded.request_file_ranges([FileRange(350_000, 1000)])
    await demanded.update_download_position(350_000)
    network.resume()
    await job.wait()
    there = asked(network)[-1][0]
    assert asked(network)[-2:] == [(350_000, 351_000), (there, 300_000)]
    assert there >= 90_000
    assert demanded.filled_file_ranges == (FileRange(0, 300_000), FileRange(350_000, 1000))
    assert holds(demanded)


async def test_a_cut_in_the_middle_of_a_range_goes_on_there(network, job, demanded):
    network.serve(URL, BODY, cut_after=40_000)
    await demanded.request_file_ranges([FileRange(100_000, 100_000), FileRange(0, 10)])
    await supplied(job)
    assert asked(network) == [(0, 10), (100_000, 200_000), (140_000, 200_000)]
    assert holds(demanded)


@pytest.mark.parametrize("fast", [False, True])
async def test_what_is_there_and_what_was_asked_for_survive_a_restart(network, store, out, fast):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("on demand")
        await job.set_on_demand_mode(True)
        await job.set_high_performance(fast)
        file = await job.add_file(URL, out / "f")
        await file.request_file_ranges([FileRange(300_000, 100), FileRange(100_000, 100_000), FileRange(0, 10)])
        await stopped_at(network, job, 50_000, 40_000)
    async with bits.BitsManager(store=store) as manager:
        job = await manager.get_job(job.id)
        (file,) = job.files
        there = job.progress.bytes_transferred
        assert there >= 40_000
        assert holds(file)
        await supplied(job)
        assert file.filled_file_ranges == (FileRange(0, 10), FileRange(100_000, 100_000), FileRange(300_000, 100))
        assert holds(file)
    assert asked(network)[2:] == [(100_000 + there - 10, 200_000), (300_000, 300_100)]


async def test_a_file_that_changes_between_two_requests_is_fetched_anew_as_far_as_it_was_asked_for(network, job, demanded):
    await demanded.request_file_ranges([FileRange(300_000, 100), FileRange(100, 10)])
    await supplied(job)
    network.serve(URL, NEW)
    await demanded.request_file_ranges([FileRange(200, 10)])
    await supplied(job)
    assert demanded.filled_file_ranges == (FileRange(100, 10), FileRange(200, 10), FileRange(300_000, 100))
    assert holds(demanded, NEW)


async def test_nothing_asked_for_is_nothing_fetched(network, job, demanded):
    await supplied(job)
    assert (job.state, network.requests) == (JobState.SUSPENDED, [])


async def test_of_several_files_each_gets_what_was_asked_for(network, job, demanded, out):
    network.serve(OTHER, NEW)
    second = await job.add_file(OTHER, out / "g")
    await job.add_file(URL, out / "h")
    await second.request_file_ranges([FileRange(5, 5)])
    await demanded.request_file_ranges([FileRange(0)])
    await supplied(job)
    assert job.state is JobState.SUSPENDED
    assert [file.filled_file_ranges for file in job.files] == [(FileRange(0, 400_000),), (FileRange(5, 5),), ()]
    done = await job.complete(partial=True)
    assert (done, done.code) == ((out / "f",), ErrorCode.BG_S_PARTIAL_COMPLETE)
    assert os.listdir(out) == ["f"]


@pytest.mark.parametrize("served", [{"ranges": False}, {"etag": None}], ids=["no ranges", "no validator"])
async def test_a_server_that_knows_no_random_access_stops_the_job(network, job, demanded, served):
    network.serve(URL, BODY, **served)
    await demanded.request_file_ranges([FileRange(5, 5), FileRange(100, 5)])
    error = await failed(job)
    assert (error.code, type(error)) == (ErrorCode.BG_E_RANDOM_ACCESS_NOT_SUPPORTED, bits.RemoteFileError)


async def test_a_range_beyond_the_end_stops_the_job_or_is_refused_when_the_size_is_known(network, job, demanded):
    await demanded.request_file_ranges([FileRange(10, 10)])
    await supplied(job)
    for refused in (demanded.request_file_ranges([FileRange(399_999, 2)]), demanded.update_download_position(400_000)):
        with pytest.raises(bits.InvalidArgument) as caught:
            await refused
        assert caught.value.code == ErrorCode.BG_E_INVALID_RANGE
    other = await job.add_file(URL + "2", demanded.local_name.with_name("g"))
    network.serve(URL + "2", b"short")
    await other.request_file_ranges([FileRange(3, 10)])
    assert (await failed(job)).code == ErrorCode.BG_E_INVALID_RANGE


async def test_only_a_job_in_on_demand_mode_takes_requests(job, out):
    file = await job.add_file(URL, out / "f")
    for refused in (file.request_file_ranges([FileRange(0, 1)]), file.update_download_position(0)):
        with pytest.raises(bits.InvalidState):
            await refused
    assert file.filled_file_ranges == ()


async def test_what_does_not_go_together_with_on_demand_is_refused(manager, job, demanded, out):
    dynamic = await manager.create_job("dynamic")
    await dynamic.set_dynamic_content(True)
    ranged = await manager.create_job("ranged")
    await ranged.add_file_with_ranges(URL, out / "r", RANGES)
    for refused in (
        job.set_dynamic_content(True),
        job.add_file_with_ranges(URL, out / "g", RANGES),
        dynamic.set_on_demand_mode(True),
        ranged.set_on_demand_mode(True),
    ):
        with pytest.raises(bits.InvalidState) as caught:
            await refused
        assert caught.value.code == ErrorCode.BG_E_UNSUPPORTED_JOB_CONFIGURATION
    posted = await manager.create_job("posted")
    await posted.set_http_method("POST")
    for refused in (posted.set_on_demand_mode(True), posted.set_dynamic_content(True), job.set_http_method("POST")):
        with pytest.raises(bits.InvalidState) as caught:
            await refused
        assert caught.value.code == ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD


async def test_a_job_that_leaves_on_demand_mode_forgets_what_was_asked_for(network, job, demanded):
    await demanded.request_file_ranges([FileRange(5, 5)])
    await job.set_on_demand_mode(False)
    assert await finished(job) == BODY
    assert asked(network) == [(0, None)]


async def test_the_filled_ranges_of_any_file_are_those_of_the_remote_one(network, manager, job, out):
    ranged = await job.add_file_with_ranges(URL, out / "f", RANGES)
    plain = await job.add_file(URL, out / "g")
    assert (ranged.filled_file_ranges, plain.filled_file_ranges) == ((), ())
    await job.resume()
    await job.wait()
    assert ranged.filled_file_ranges == (
        FileRange(50, 10),
        FileRange(100_000, 100_000),
        FileRange(300_000, 50_000),
        FileRange(399_000, 1000),
    )
    assert plain.filled_file_ranges == (FileRange(0, 400_000),)


async def test_a_lost_connection_while_on_demand_is_retried_later(network, job, demanded):
    network.fail(times=1)
    await demanded.request_file_ranges([FileRange(5, 5)])
    await supplied(job)
    assert demanded.filled_file_ranges == (FileRange(5, 5),)
    assert job.error_count == 1


# -- names of files on Windows


@pytest.mark.parametrize("name", ["file.", "file ", "file:stream", "a<b", "a|b", "what?", "*", "nul", "Con.txt", "com1", "LPT9 .x", "COM²"])
def test_a_name_that_means_something_else_on_windows_is_known(name: str) -> None:
    assert is_reserved_on_windows(name)


@pytest.mark.parametrize("name", ["file.iso", ".file", "a b", "console", "com10", "nul1", "auxiliary.txt", "größe", "con-1"])
def test_a_name_that_a_file_may_have_on_windows_is_known(name: str) -> None:
    assert not is_reserved_on_windows(name)
