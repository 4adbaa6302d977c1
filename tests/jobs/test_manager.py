"""The API over a real journal and real files; network, identities and time are fake."""

import asyncio
import contextlib
import gc
import sqlite3
import threading
from pathlib import Path
from uuid import uuid4

import pytest
import spnego

import bits_async as bits
from bits_async.files import part as part_file
from bits_async.jobs.engine import Engine
from bits_async.testing import FakeNetwork, fake_token
from tests.waiting import let_things_happen, until

URL = "https://files.example.test/a.bin"
BODY = bytes(range(256)) * 1024


@pytest.fixture
def network():
    with FakeNetwork() as fake:
        fake.serve(URL, BODY)
        yield fake


@pytest.fixture
def store(tmp_path):
    return tmp_path / "queue.db"


def parts(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name.endswith(".bits-part"))


@pytest.fixture
def out(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


async def make_job(manager, out, url=URL, name="a.bin", **kwargs):
    job = await manager.create_job("test", **kwargs)
    await job.add_file(url, out / name)
    return job


# -- the life of a job ---------------------------------------------------------------------------------------------------------------


async def test_a_job_goes_from_create_to_complete(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        assert job.state is bits.JobState.SUSPENDED
        assert job.progress == bits.JobProgress(None, 0, 1, 0)
        await job.resume()
        await job.wait()
        assert job.state is bits.JobState.TRANSFERRED
        assert not (out / "a.bin").exists()
        assert len(parts(out)) == 1
        assert await job.complete() == (out / "a.bin",)
        assert (out / "a.bin").read_bytes() == BODY
        assert parts(out) == []
        assert job.state is bits.JobState.ACKNOWLEDGED
        await job.wait()
        with pytest.raises(bits.NotFound):
            await manager.get_job(job.id)
        with pytest.raises(bits.InvalidState):
            await job.resume()


async def test_files_of_a_job_go_one_after_the_other_and_one_rename_each(network, store, out):
    for n in range(3):
        network.serve(f"{URL}?{n}", bytes([n]) * 100_000)
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("three")
        files = await job.add_file_set([bits.FileInfo(f"{URL}?{n}", out / f"f{n}") for n in range(3)])
        await job.resume()
        await job.wait()
        assert [r.url for r in network.requests] == [f"{URL}?{n}" for n in range(3)]
        assert job.progress == bits.JobProgress(300_000, 300_000, 3, 3)
        assert [f.progress.bytes_total for f in files] == [100_000] * 3
        await job.complete()
        assert [f.progress.completed for f in files] == [True] * 3


async def test_many_files_are_completed_in_few_transactions_and_one_that_is_damaged_is_named(network, store, out):
    """Those before it have their names; those after it follow once it was fetched anew."""
    for n in range(9):
        network.serve(f"{URL}?{n}", bytes([n]) * 1000)
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("nine")
        await job.add_file_set([bits.FileInfo(f"{URL}?{n}", out / f"f{n}") for n in range(9)])
        await job.resume()
        await job.wait()
        next(out.glob(".f5.*")).unlink()
        with pytest.raises(bits.LocalFileError) as caught:
            await job.complete()
        assert (caught.value.path, caught.value.code) == (out / "f5", bits.ErrorCode.BG_E_LOCAL_FILE_CHANGED)
        assert sorted(path.name for path in out.glob("f*")) == [f"f{n}" for n in range(5)]
        await job.resume()
        await job.wait()
        assert len(await job.complete()) == 9
    assert {n: (out / f"f{n}").read_bytes() for n in (0, 5, 8)} == {n: bytes([n]) * 1000 for n in (0, 5, 8)}


async def test_one_resume_fetches_all_that_was_lost_however_many_they_are(network, store, out):
    """Not one resume for each of them: somebody may have emptied the directory of a job of ten thousand files."""
    for n in range(6):
        network.serve(f"{URL}?{n}", bytes([n]) * 1000)
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("six")
        await job.add_file_set([bits.FileInfo(f"{URL}?{n}", out / f"f{n}") for n in range(6)])
        await job.resume()
        await job.wait()
        for n in (1, 3, 5):
            next(out.glob(f".f{n}.*")).unlink()
        with pytest.raises(bits.LocalFileError, match="2 more of the job's files") as caught:
            await job.complete()
        assert caught.value.path == out / "f1"
        await job.resume()
        await job.wait()
        assert len(await job.complete()) == 6
    assert [(out / f"f{n}").read_bytes() for n in range(6)] == [bytes([n]) * 1000 for n in range(6)]


async def test_who_completes_too_early_hears_how_to_keep_what_is_finished(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("early")
        await job.add_file(URL, out / "f")
        with pytest.raises(bits.InvalidState, match=r"SUSPENDED is not transferred.*complete\(partial=True\)"):
            await job.complete()


@pytest.mark.parametrize("name", ["new/", "new/.", "new/..", ""])
async def test_what_can_only_be_a_directory_is_no_destination(network, store, out, name):
    """`download(url, "downloads/")` made a file of that name where the directory was missing."""
    network.serve(URL, BODY)
    path = f"{out}/{name}"
    with pytest.raises(bits.InvalidArgument, match="not a directory"):
        await bits.download(URL, path, store=store)
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("where")
        with pytest.raises(bits.InvalidArgument, match="not a directory"):
            await job.add_file(URL, path)
    assert list(out.iterdir()) == []


async def test_text_in_the_place_of_a_value_is_refused_with_what_is_meant(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("text")
        with pytest.raises(bits.InvalidArgument, match=r"not str: ProxySettings\.override\(\)"):
            await job.set_proxy_settings("http://proxy.test:8080")
        with pytest.raises(bits.InvalidArgument, match="given as FileInfo, not tuple"):
            await job.add_file_set([(URL, out / "f")])


async def test_a_policy_that_is_not_there_is_called_by_its_name(store, tmp_path):
    with pytest.raises(bits.LocalFileError, match="cannot read the group policy: No such file") as caught:
        async with bits.BitsManager(store=store, policy=tmp_path / "policy.toml"):
            pass
    assert caught.value.advice == "name a file that this user may read"


async def test_a_job_without_files_cannot_be_resumed_and_one_never_resumed_cannot_be_waited_for(network, store):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("empty")
        with pytest.raises(bits.InvalidState) as caught:
            await job.resume()
        assert caught.value.code == bits.ErrorCode.BG_E_EMPTY
        with pytest.raises(bits.InvalidState, match="never resumed"):
            await job.wait()


@pytest.mark.parametrize(
    "url",
    ["ftp://h/x", "http://u:p@h/x", "http://h/a b", "http://h/\r\nX: y", "http:///x", "", "http://h/" + "a" * 2200],
)
async def test_a_url_that_cannot_be_meant_is_refused_and_nothing_is_added(network, store, out, url):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("x")
        with pytest.raises(bits.InvalidArgument):
            await job.add_file_set([bits.FileInfo(URL, out / "ok"), bits.FileInfo(url, out / "x")])
        assert job.files == ()


@pytest.mark.parametrize("path", ["relative/x", "/", "x\0y"])
async def test_a_path_that_cannot_be_meant_is_refused(network, store, path):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("x")
        with pytest.raises(bits.InvalidArgument):
            await job.add_file(URL, path)


async def test_an_empty_file_and_an_escaped_url_arrive_as_they_are(network, store, out):
    network.serve("https://h.test/a%2Fb?x=%20", b"")
    async with bits.BitsManager(store=store) as manager:
        assert (await manager.download("https://h.test/a%2Fb?x=%20", out / "e")).read_bytes() == b""
    assert network.requests[0].url == "https://h.test/a%2Fb?x=%20"


async def test_complete_before_transferred_is_refused_and_partial_keeps_what_is_finished(network, store, out):
    network.serve(URL + "2", BODY, status=404)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.add_file(URL + "2", out / "b.bin")
        with pytest.raises(bits.InvalidState):
            await job.complete()
        await job.resume()
        with pytest.raises(bits.RemoteFileError):
            await job.wait()
        assert await job.complete(partial=True) == (out / "a.bin",)
        assert sorted(p.name for p in out.iterdir()) == ["a.bin"]


async def test_cancel_leaves_nothing_behind(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.resume()
        await job.wait()
        await job.cancel()
        assert list(out.iterdir()) == []
        with pytest.raises(bits.JobCancelled):
            await job.wait()


@pytest.mark.parametrize("command", ["cancel", "complete"])
async def test_an_attempt_that_is_told_to_stop_while_it_fails_leaves_no_part_file_that_nobody_knows_of(
    network, store, out, command, monkeypatch
):
    """The first checkpoint, which brings the part file into the journal, is made when nothing more comes."""
    begun, go_on = threading.Event(), threading.Event()
    sync = part_file._sync

    def late_sync(handles):
        begun.set()
        go_on.wait(30)
        return sync(handles)

    monkeypatch.setattr(part_file, "_sync", late_sync)
    network.serve(URL, BODY, cut_after=100)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out, priority=bits.JobPriority.FOREGROUND)
        network.clock.freeze()
        network.pause(after=50)
        await job.resume()
        await until(lambda: job.progress.bytes_transferred == 50)
        network.fail(URL)  # the connection breaks, and there is no other
        network.resume()
        network.clock.thaw()
        await until(begun.is_set)
        stopping = asyncio.create_task(job.cancel() if command == "cancel" else job.complete(partial=True))
        await let_things_happen()
        go_on.set()
        await stopping
        assert list(out.iterdir()) == []


async def test_suspend_stops_and_resume_goes_on_from_there(network, store, out):
    network.serve(URL, BODY * 40)
    network.clock.freeze()
    network.pause(after=3_000_000)  # so that it has not come to its end
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.resume()
        async with job.events() as stream:
            async for event in stream:
                if isinstance(event, bits.Progress) and event.bytes_transferred > 0:
                    break
        await job.suspend()
        network.resume()
        assert job.state is bits.JobState.SUSPENDED
        (part,) = parts(out)
        size = (out / part).stat().st_size
        await asyncio.sleep(0.05)
        assert (out / part).stat().st_size == size
        assert 0 < size < len(BODY) * 40
        await job.resume()
        await job.wait()
        await job.complete()
        assert (out / "a.bin").read_bytes() == BODY * 40
        assert network.requests[-1].start == size


async def test_a_broken_connection_is_reopened_at_once_where_it_broke(network, store, out):
    network.serve(URL, BODY, cut_after=100_000)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        stream = job.events()
        await job.resume()
        events = [e async for e in stream]
        assert job.state is bits.JobState.TRANSFERRED
        assert [e.number for e in events if isinstance(e, bits.Retrying)] == [1]
        assert bits.JobState.TRANSIENT_ERROR not in {e.state for e in events if isinstance(e, bits.JobChanged)}
        assert [(r.start, r.if_range is not None) for r in network.requests] == [(0, False), (100_000, True)]


async def test_without_a_validator_a_broken_file_is_fetched_anew(network, store, out):
    network.serve(URL, BODY, etag=None, cut_after=100_000)
    async with bits.BitsManager(store=store) as manager:
        path = await manager.download(URL, out / "a.bin")
    assert path.read_bytes() == BODY
    assert [r.start for r in network.requests] == [0, 0]


async def test_a_file_that_changes_in_the_middle_is_wholly_the_new_version(network, store, out):
    network.serve(URL, BODY, cut_after=100_000)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        stream = job.events()
        await job.resume()
        async for event in stream:
            if isinstance(event, bits.Retrying):
                network.serve(URL, BODY[::-1])
        await job.complete()
    assert (out / "a.bin").read_bytes() == BODY[::-1]


async def test_a_file_that_never_stops_changing_is_given_up(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        network.serve(URL, BODY, etag='"0"', cut_after=70_000)
        stream, n = job.events(), 0
        await job.resume()
        async for event in stream:
            if isinstance(event, bits.Retrying):
                n += 1
                network.serve(URL, BODY, etag=f'"{n}"', cut_after=70_000)
        assert job.error.code == bits.ErrorCode.BG_E_REMOTE_FILE_CHANGED
        network.serve(URL, BODY)
        await job.resume()
        await job.wait()


# -- errors and retries --------------------------------------------------------------------------------------------------------------


async def test_a_transient_error_is_retried_after_the_delay_and_says_so(network, store, out):
    network.serve(URL, BODY, status=503)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.resume()
        with pytest.raises(bits.RemoteFileError) as caught:
            await job.wait(transient=True)
        assert caught.value.http_status == 503
        assert job.state is bits.JobState.TRANSIENT_ERROR
        assert job.waiting.reason is bits.WaitingReason.RETRY
        assert job.waiting.until is not None
        assert str(job.waiting).startswith("retry 1 at ")
        assert str(job.waiting).endswith(": HTTP 503")
        before = network.clock.monotonic()
        network.serve(URL, BODY)
        await job.wait()
        assert network.clock.monotonic() - before >= 500


async def test_a_cancelled_job_still_says_how_far_it_had_come(network, store, out):
    network.serve(URL, BODY)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.resume()
        await job.wait()
        before = job.progress
        await job.cancel()
        assert (job.progress, before.files_transferred) == (before, 1)
        assert list(out.iterdir()) == []


async def test_no_progress_ends_the_retries(network, store, out):
    network.serve(URL, BODY, status=503)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.set_minimum_retry_delay(5)
        await job.set_no_progress_timeout(60)
        await job.resume()
        with pytest.raises(bits.RemoteFileError) as caught:
            await job.wait()
        assert caught.value.code == bits.ErrorCode.BG_E_NO_PROGRESS
        assert caught.value.http_status == 503
        assert 10 <= len(network.requests) <= 13


async def test_a_fatal_error_stops_the_job_and_resume_tries_again(network, store, out):
    network.serve(URL, BODY, status=404)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.resume()
        with pytest.raises(bits.RemoteFileError) as caught:
            await job.wait()
        assert caught.value.code == 0x80190194
        assert caught.value.job_id == job.id
        with pytest.raises(bits.RemoteFileError) as again:
            await job.wait()
        assert again.value is not caught.value
        network.serve(URL, BODY)
        await job.resume()
        await job.wait()
        assert job.error is None


async def test_a_wrong_digest_is_refused_thrown_away_and_fetched_anew_on_resume(network, store, out):
    import hashlib

    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("digest")
        await job.add_file(URL, out / "a.bin", sha256=hashlib.sha256(BODY[::-1]).hexdigest().upper())
        await job.resume()
        with pytest.raises(bits.ValidationFailed):
            await job.wait()
        assert job.progress.bytes_transferred == 0
        assert parts(out) == []
        network.serve(URL, BODY[::-1], cut_after=70_000)
        await job.resume()
        await job.wait()
        await job.complete()


async def test_a_missing_directory_is_a_local_error_that_names_path_and_identity(network, store, tmp_path):
    async with bits.BitsManager(store=store) as manager:
        with pytest.raises(bits.LocalFileError) as caught:
            await manager.download(URL, tmp_path / "none" / "x")
        assert caught.value.path == tmp_path / "none" / "x"
        assert caught.value.identity
        assert caught.value.context is bits.ErrorContext.LOCAL_FILE
        assert [job async for job in manager.enum_jobs()] == []


async def test_the_network_lost_and_back(network, store, out):
    network.disconnect()
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.resume()
        with pytest.raises(bits.NetworkError) as caught:
            await job.wait(transient=True)
        assert caught.value.code == bits.ErrorCode.BG_E_NETWORK_DISCONNECTED
        network.reconnect()
        await job.wait()


# -- scheduling ----------------------------------------------------------------------------------------------------------------------


async def test_one_background_job_runs_at_a_time_and_all_foreground_jobs(network, store, out):
    most = {"background": 0, "foreground": 0}
    network.clock.freeze()  # nobody's turn ends
    network.pause(after=1)  # until as many run side by side as may
    async with bits.BitsManager(store=store) as manager:
        jobs = []
        for n in range(4):
            priority = bits.JobPriority.FOREGROUND if n < 2 else bits.JobPriority.LOW
            network.serve(f"{URL}?{n}", BODY * 8)
            jobs.append(await make_job(manager, out, f"{URL}?{n}", f"f{n}", priority=priority))
        kinds = {job.id: "foreground" if job.priority is bits.JobPriority.FOREGROUND else "background" for job in jobs}
        stream = manager.events()
        for job in jobs:
            await job.resume()
        active = set()
        while not all(job.state.is_settled for job in jobs):
            event = await anext(stream)
            if isinstance(event, bits.JobChanged):
                (active.add if event.state in (bits.JobState.CONNECTING, bits.JobState.TRANSFERRING) else active.discard)(event.job_id)
                for kind in most:
                    most[kind] = max(most[kind], sum(kinds[j] == kind for j in active))
                if len(active) == 3:
                    network.resume()
        await stream.aclose()
    assert most == {"background": 1, "foreground": 2}


async def test_a_high_job_takes_the_place_of_a_running_low_one_which_loses_no_byte(network, store, out):
    network.serve(URL + "low", BODY * 160)
    network.clock.freeze()
    network.pause(after=3_000_000)  # so that it has not come to its end; the other one is smaller
    async with bits.BitsManager(store=store) as manager:
        low = await make_job(manager, out, URL + "low", "low", priority=bits.JobPriority.LOW)
        high = await make_job(manager, out, priority=bits.JobPriority.HIGH)
        await low.resume()
        async with low.events() as stream:
            async for event in stream:
                if isinstance(event, bits.Progress) and event.bytes_transferred:
                    break
        await high.resume()
        await high.wait()
        assert low.state is not bits.JobState.TRANSFERRED
        network.resume()
        await low.wait()
        starts = [r.start for r in network.requests if r.url == URL + "low"]
        assert len(starts) == 2
        assert starts[1] > 0


async def test_join_returns_when_nothing_can_move(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await make_job(manager, out, name="suspended")
        await job.resume()
        await manager.join()
        assert job.state is bits.JobState.TRANSFERRED


async def test_join_waits_until_a_job_shows_the_end_that_the_journal_knows_already(network, store, out, monkeypatch):
    reached, go_on, settle = asyncio.Event(), asyncio.Event(), Engine._settle

    async def later(*arguments) -> None:
        reached.set()
        await go_on.wait()
        await settle(*arguments)

    monkeypatch.setattr(Engine, "_settle", later)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.resume()
        await reached.wait()
        joined = asyncio.create_task(manager.join())
        await asyncio.wait({joined}, timeout=0.2)
        assert (job.state, joined.done()) == (bits.JobState.TRANSFERRING, False)
        go_on.set()
        await joined
        assert job.state is bits.JobState.TRANSFERRED


# -- restart -------------------------------------------------------------------------------------------------------------------------


async def test_unfinished_jobs_continue_when_the_manager_is_opened_again(network, store, out):
    network.disconnect()
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.resume()
        with contextlib.suppress(bits.NetworkError):
            await job.wait(transient=True)
    network.reconnect()
    async with bits.BitsManager(store=store) as manager:
        again = await manager.get_job(str(job.id))
        assert again == job
        assert hash(again) == hash(job)
        assert again.error is None or isinstance(again.error, bits.NetworkError)
        await again.wait()
        await again.complete()
    assert (out / "a.bin").read_bytes() == BODY


async def test_an_error_has_the_same_class_and_fields_after_a_restart(network, store, out):
    network.serve(URL, BODY, status=403)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.resume()
        with pytest.raises(bits.RemoteFileError):
            await job.wait()
        before = job.error
    async with bits.BitsManager(store=store) as manager:
        after = (await manager.get_job(job.id)).error
        assert type(after) is type(before)
        assert after.fields() == before.fields()


async def test_waiting_ends_with_manager_closed_and_calls_afterwards_too(network, store, out):
    network.disconnect()
    manager = bits.BitsManager(store=store)
    async with manager:
        job = await make_job(manager, out)
        await job.resume()
        waiter = asyncio.ensure_future(job.wait())
        await asyncio.sleep(0)
        await manager.aclose()
        with pytest.raises(bits.ManagerClosed):
            await waiter
        with pytest.raises(bits.ManagerClosed):
            await job.suspend()
        await manager.aclose()
    with pytest.raises(RuntimeError, match="entered once"):
        async with manager:
            pass


async def test_run_false_edits_and_transfers_nothing(network, store, out):
    async with bits.BitsManager(store=store, run=False) as manager:
        job = await make_job(manager, out)
        await job.resume()
        await asyncio.sleep(0.05)
        assert job.state is bits.JobState.QUEUED
    assert network.requests == []


@pytest.mark.parametrize("option", ["limits", "timeouts", "auth_rules", "key", "logon"])
def test_an_option_of_another_kind_is_refused_at_once_and_named(option):
    with pytest.raises(bits.InvalidArgument, match=f"{option}= takes"):
        bits.BitsManager(**{option: 3})


async def test_a_second_manager_on_the_same_journal_is_refused(network, store):
    async with bits.BitsManager(store=store):
        with pytest.raises(bits.StoreError):
            async with bits.BitsManager(store=store):
                pass


async def test_a_journal_that_breaks_stops_everything_with_one_clear_error(network, store, out):
    with pytest.raises(bits.StoreError):
        async with bits.BitsManager(store=store) as manager:
            job = await make_job(manager, out)
            network.disconnect()
            await job.resume()
            with contextlib.suppress(bits.NetworkError):
                await job.wait(transient=True)
            waiter = asyncio.ensure_future(job.wait())
            db = sqlite3.connect(store)
            db.execute("DROP TABLE files")
            db.execute("DROP TABLE jobs")
            db.commit()
            db.close()
            network.reconnect()
            with pytest.raises(bits.StoreError):
                await waiter


async def test_another_event_loop_is_refused(network, store):
    async with bits.BitsManager(store=store) as manager:
        caught = []

        def elsewhere():
            try:
                asyncio.run(manager.join())
            except RuntimeError as error:
                caught.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.get_running_loop().run_in_executor(None, thread.join)
        assert "event loop" in str(caught[0])
    with pytest.raises(RuntimeError, match="not open"):
        await bits.BitsManager(store=store).join()


# -- who may -------------------------------------------------------------------------------------------------------------------------


async def test_a_job_is_opened_by_its_owner_and_by_the_elevated_only(network, store, out):
    alice, bob, root = fake_token("alice"), fake_token("bob"), fake_token("root", elevated=True)
    async with bits.BitsManager(store=store) as manager:
        with bits.impersonate(alice):
            job = await make_job(manager, out)
        assert (job.owner, job.owner_name) == (alice.sid, "alice")
        with bits.impersonate(bob):
            with pytest.raises(bits.AccessDenied):
                await manager.get_job(job.id)
            with pytest.raises(bits.AccessDenied):
                await job.token_options()
            assert [j async for j in manager.enum_jobs()] == []
            with pytest.raises(bits.AccessDenied):
                [j async for j in manager.enum_jobs(all_users=True)]
        with bits.impersonate(root):
            assert await manager.get_job(job.id) == job
            assert [j async for j in manager.enum_jobs(all_users=True)] == [job]


async def test_t11_the_ambient_identity_is_read_at_the_call(network, store, out):
    alice = fake_token("alice")
    async with bits.BitsManager(store=store) as manager:
        with bits.impersonate(alice):
            creating = manager.create_job("alice's")
            listing = manager.enum_jobs()
        job = await creating
        assert job.owner == alice.sid
        assert [j async for j in listing] == [job]


async def test_the_helper_acts_on_the_network_and_nothing_of_it_survives_a_restart(network, store, out):
    alice, helper = fake_token("alice"), fake_token("helper")
    network.serve(URL, BODY, require="helper")
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out, owner=alice)
        with bits.impersonate(alice):
            options = await job.token_options()
        assert options.helper_token_sid is None
        with pytest.raises(bits.ImpersonationFailed):
            await options.set_helper_token()
        with bits.impersonate(helper):
            await options.set_helper_token()
            await options.set_helper_token_flags(bits.HelperTokenFlags.NETWORK)
        assert options.helper_token_sid == helper.sid
        await job.resume()
        await job.wait()
        assert network.requests[-1].identity == "helper"
        unfinished = await make_job(manager, out, name="b", owner=alice)
        with bits.impersonate(alice):
            await (await unfinished.token_options()).set_helper_token_flags(bits.HelperTokenFlags.NETWORK)
    async with bits.BitsManager(store=store) as manager:
        with bits.impersonate(alice):
            lost = await manager.get_job(unfinished.id)
            done = await manager.get_job(job.id)
            assert (await lost.token_options()).helper_token_flags is bits.HelperTokenFlags.NETWORK
            assert (await lost.token_options()).helper_token_sid is None
        assert lost.state is bits.JobState.ERROR
        assert lost.error.code == bits.ErrorCode.BG_E_TOKEN_REQUIRED
        assert done.state is bits.JobState.TRANSFERRED


async def test_flags_without_a_token_fail_at_the_first_use(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await (await job.token_options()).set_helper_token_flags(bits.HelperTokenFlags.LOCAL_FILE)
        await job.resume()
        with pytest.raises(bits.TokenRequired):
            await job.wait()
        await (await job.token_options()).set_helper_token_flags(bits.HelperTokenFlags.NONE)
        await job.resume()
        await job.wait()


async def test_an_elevated_helper_is_refused_to_a_caller_that_is_not(network, store, out):
    alice, admin = fake_token("alice"), fake_token("admin", elevated=True)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out, owner=alice)
        with bits.impersonate(alice):
            options = await job.token_options()
        with bits.impersonate(admin), pytest.raises(bits.AccessDenied):
            await options.set_helper_token()


async def test_t07_after_a_restart_the_owner_must_come_back_itself(network, store, out):
    alice, asked = fake_token("alice"), []
    async with bits.BitsManager(store=store, run=False) as manager:
        job = await make_job(manager, out, owner=alice)
        await job.resume()

    async def logon(job):
        asked.append(job.owner_name)
        return fake_token("mallory")

    async with bits.BitsManager(store=store, logon=logon) as manager:
        with bits.impersonate(fake_token("root", elevated=True)):
            seen = await manager.get_job(job.id)
        await until(lambda: asked and "not the owner" in str(seen.waiting))
        assert seen.waiting.reason is bits.WaitingReason.NO_OWNER_TOKEN
        assert asked == ["alice"]
        assert network.requests == []
        with bits.impersonate(fake_token("alice")):
            await manager.get_job(job.id)
        await seen.wait()


async def test_t07_a_real_manager_refuses_fake_tokens(store):
    async with bits.BitsManager(store=store) as manager:
        with pytest.raises(bits.ImpersonationFailed):
            await manager.create_job("x", owner=fake_token("alice"))
        with bits.impersonate(fake_token("alice", elevated=True)):
            with pytest.raises(bits.ImpersonationFailed):
                await manager.create_job("x")


async def test_t07_a_real_manager_shows_a_fake_token_nothing(store):
    async with bits.BitsManager(store=store) as manager:
        await manager.create_job("x")
        with bits.impersonate(fake_token("admin", elevated=True)):
            with pytest.raises(bits.ImpersonationFailed):
                [job async for job in manager.enum_jobs(all_users=True)]
            with pytest.raises(bits.ImpersonationFailed):
                manager.events()


async def test_t07_a_principal_that_nobody_proved_has_none_of_the_powers_of_the_process(store, monkeypatch):
    process = bits.Token.for_process()
    monkeypatch.setattr(type(process.local), "elevated", property(lambda self: True), raising=False)
    mine, guess = (bits.Token.for_network(spnego.Password("alice@REALM", secret)) for secret in ("right", "guess"))
    assert guess.elevated
    async with bits.BitsManager(store=store, run=False) as manager:
        hers, his = await manager.create_job("alice's", owner=mine), await manager.create_job("the process's")
        with bits.impersonate(guess):
            for job in (hers, his):
                with pytest.raises(bits.AccessDenied):
                    await manager.get_job(job.id)
                with pytest.raises(bits.AccessDenied):
                    await job.token_options()
                with pytest.raises(bits.AccessDenied):
                    await job.take_ownership()
            with pytest.raises(bits.AccessDenied):
                [job async for job in manager.enum_jobs(all_users=True)]
            assert [job async for job in manager.enum_jobs()] == []
        with bits.impersonate(mine):
            assert await manager.get_job(hers.id) == hers
            assert [job async for job in manager.enum_jobs()] == [hers]


async def test_a_listener_whose_token_was_closed_does_no_harm_to_the_queue(store):
    token = bits.Token.for_network(spnego.Password("carol@REALM", "secret"))
    async with bits.BitsManager(store=store, run=False) as manager:
        with bits.impersonate(token):
            stream, job = manager.events(), await manager.create_job("hers")
        token.close()
        await manager.create_job("somebody else's")
        await job.set_description("still told")
        assert [(await anext(stream)).job_id] == [job.id]


# -- download() ----------------------------------------------------------------------------------------------------------------------


async def test_download_replaces_the_file_at_once_and_leaves_nothing_else(network, out, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (out / "a.bin").write_bytes(b"old")
    seen = []
    assert await bits.download(URL, out / "a.bin", progress=seen.append) == out / "a.bin"
    assert (out / "a.bin").read_bytes() == BODY
    assert [p.name for p in out.iterdir()] == ["a.bin"]
    assert [p for p in (tmp_path / "state").rglob("*") if p.is_file()] == []
    assert seen[-1].state is bits.JobState.TRANSFERRED
    assert seen[-1].bytes_transferred == len(BODY)


async def test_download_resolves_against_the_working_directory(network, out, monkeypatch):
    monkeypatch.chdir(out)
    monkeypatch.setenv("XDG_STATE_HOME", str(out / "state"))
    assert await bits.download(URL, "here.bin") == out / "here.bin"


async def test_a_cancelled_download_goes_on_in_the_next_call(network, out, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    network.serve(URL, BODY * 40)
    task = asyncio.ensure_future(bits.download(URL, out / "a.bin"))
    while not any((out / part).stat().st_size for part in parts(out)):
        assert not task.done(), task
        await asyncio.sleep(0)
    network.disconnect()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    network.reconnect()
    (part,) = parts(out)
    size = (out / part).stat().st_size
    assert 0 < size < len(BODY) * 40
    await bits.download(URL, out / "a.bin")
    assert network.requests[-1].start == size
    assert (out / "a.bin").read_bytes() == BODY * 40
    assert parts(out) == []


async def test_another_url_for_the_same_path_drops_the_old_part(network, out, store):
    network.serve(URL, BODY * 40, cut_after=1_500_000)
    network.serve(URL + "new", b"new")
    async with bits.BitsManager(store=store) as manager:
        network.fail(times=0)
        task = asyncio.ensure_future(manager.download(URL, out / "a.bin"))
        async for event in manager.events():
            if isinstance(event, bits.Progress) and event.bytes_transferred:
                break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(parts(out)) == 1
        await manager.download(URL + "new", out / "a.bin")
    assert [p.name for p in out.iterdir()] == ["a.bin"]


async def test_two_downloads_to_one_destination_are_not_possible_at_once(network, out, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    first = asyncio.ensure_future(bits.download(URL, out / "a.bin"))
    await asyncio.sleep(0)
    results = await asyncio.gather(first, bits.download(URL, out / "a.bin"), return_exceptions=True)
    refused = [r for r in results if isinstance(r, bits.LocalFileError)]
    assert [r.code for r in refused] == [bits.ErrorCode.BG_E_DESTINATION_LOCKED]


@pytest.mark.parametrize("home", ["a file is in its place", "nobody knows it"])
async def test_a_download_with_a_journal_of_its_own_needs_no_state_directory(network, out, store, monkeypatch, tmp_path, home):
    (tmp_path / "no home").write_bytes(b"")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "no home" / "state"))
    if home == "nobody knows it":
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr("platformdirs.user_state_path", no_home)
    first = asyncio.ensure_future(bits.download(URL, out / "a.bin", store=store))
    await asyncio.sleep(0)
    results = await asyncio.gather(first, bits.download(URL, out / "a.bin", store=store), return_exceptions=True)
    assert [result.code for result in results if isinstance(result, bits.LocalFileError)] == [bits.ErrorCode.BG_E_DESTINATION_LOCKED]
    assert (out / "a.bin").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".lock" and path.name.count(".") > 2] == []
    with pytest.raises(bits.StoreError) as caught:
        await bits.download(URL, out / "b.bin")
    assert "set HOME or XDG_STATE_HOME" in caught.value.advice


def no_home(*_, **__):
    raise RuntimeError("Could not determine home directory.")


async def test_what_progress_raises_leaves_download_and_the_job_is_kept(network, out, store):
    class Stop(Exception):
        pass

    def progress(p):
        raise Stop

    async with bits.BitsManager(store=store) as manager:
        with pytest.raises(Stop):
            await manager.download(URL, out / "a.bin", progress=progress)
        (job,) = [job async for job in manager.enum_jobs()]
        assert job.state in (bits.JobState.SUSPENDED, bits.JobState.TRANSFERRED)


async def test_the_first_error_is_final_when_no_retry_is_wanted(network, out, store):
    network.serve(URL, BODY, status=503)
    async with bits.BitsManager(store=store) as manager:
        with pytest.raises(bits.RemoteFileError) as caught:
            await manager.download(URL, out / "a.bin", retry_for=0)
        assert caught.value.code == 0x801901F7
        assert [job async for job in manager.enum_jobs()] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"helper": fake_token("h")},
        {"helper_flags": bits.HelperTokenFlags.NETWORK},
        {"sha256": "abc"},
        {"retry_for": -1},
        {"retry_for": float("nan")},
        {"proxy": "http://u:p@proxy:1"},
        {"proxy": "socks5://proxy:1"},
        {"priority": 3},
        {"credentials": ["x"]},
    ],
)
async def test_arguments_that_cannot_be_meant_are_refused(network, out, wrong):
    with pytest.raises(bits.InvalidArgument):
        await bits.download(URL, out / "x", **wrong)


async def test_a_coroutine_function_is_no_progress_function(network, out):
    async def progress(p):
        pass

    with pytest.raises(TypeError):
        await bits.download(URL, out / "x", progress=progress)


# -- nothing is left -----------------------------------------------------------------------------------------------------------------


async def test_a_closed_manager_leaves_no_thread_task_or_descriptor(network, store, out):
    import os

    gc.collect()

    def there() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(asyncio.all_tasks())

    before = there()
    async with bits.BitsManager(store=store) as manager:
        await manager.download(URL, out / "a.bin")
        job = await make_job(manager, out)
        await job.resume()
    await until(lambda: there() == before)


async def test_an_unknown_job_and_a_wrong_id_are_told_apart(network, store):
    async with bits.BitsManager(store=store) as manager:
        with pytest.raises(bits.NotFound):
            await manager.get_job(uuid4())
        with pytest.raises(bits.InvalidArgument):
            await manager.get_job("no id")


# -- properties and limits -----------------------------------------------------------------------------------------------------------


async def test_properties_are_durable_when_set_and_checked_with_bits_codes(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.set_description("for people")
        await job.set_maximum_download_time(3600)
        await job.set_minimum_retry_delay(1)
        await job.set_no_progress_timeout(0)
        await job.set_priority(bits.JobPriority.LOW)
        with pytest.raises(bits.InvalidArgument) as caught:
            await job.set_description("x" * 1025)
        assert caught.value.code == bits.ErrorCode.BG_E_STRING_TOO_LONG
        for wrong in (-1, float("nan"), float("inf"), True, "5"):
            with pytest.raises(bits.InvalidArgument):
                await job.set_maximum_download_time(wrong)
        created = job.times.creation_time
        assert job.times.modification_time >= created
        assert job.times.transfer_completion_time is None
    async with bits.BitsManager(store=store) as manager:
        again = await manager.get_job(job.id)
        assert (again.description, again.maximum_download_time) == ("for people", 3600)
        assert (again.minimum_retry_delay, again.no_progress_timeout, again.priority) == (5, 0, bits.JobPriority.LOW)
        await again.resume()
        await again.wait()
        assert again.times.transfer_completion_time is not None
        assert again.times.creation_time == created


async def test_a_name_that_is_empty_or_too_long_is_refused(network, store):
    async with bits.BitsManager(store=store) as manager:
        for name in ("", "x" * 257, None):
            with pytest.raises(bits.InvalidArgument):
                await manager.create_job(name)


async def test_a_job_that_transfers_for_too_long_fails_and_resume_counts_anew(network, store, out):
    network.serve(URL, BODY, cut_after=100_000)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out)
        await job.set_maximum_download_time(0.1)  # shorter than the pause before a broken connection is opened again
        await job.resume()
        with pytest.raises(bits.NetworkError) as caught:
            await job.wait()
        assert caught.value.code == bits.ErrorCode.BG_E_MAXDOWNLOAD_TIMEOUT
        await job.set_maximum_download_time(3600)
        await job.resume()
        await job.wait()
        assert network.requests[-1].start == 100_000
        assert job.error_count == 1


async def test_limits_of_jobs_and_files_do_not_bind_the_elevated(network, store, out):
    alice, admin = fake_token("alice"), fake_token("admin", elevated=True)
    limits = bits.Limits(jobs_per_user=1, jobs_per_machine=2, files_per_job=1)
    async with bits.BitsManager(store=store, limits=limits) as manager:
        job = await make_job(manager, out, owner=alice)
        with pytest.raises(bits.AccessDenied) as caught:
            await manager.create_job("second", owner=alice)
        assert caught.value.code == bits.ErrorCode.BG_E_TOO_MANY_JOBS_PER_USER
        with pytest.raises(bits.AccessDenied) as caught:
            await job.add_file(URL, out / "b")
        assert caught.value.code == bits.ErrorCode.BG_E_TOO_MANY_FILES_IN_JOB
        await manager.create_job("bob's", owner=fake_token("bob"))
        with pytest.raises(bits.AccessDenied) as caught:
            await manager.create_job("third", owner=fake_token("carol"))
        assert caught.value.code == bits.ErrorCode.BG_E_TOO_MANY_JOBS_PER_MACHINE
        many = await manager.create_job("admin's", owner=admin)
        await many.add_file_set([bits.FileInfo(URL, out / f"f{n}") for n in range(3)])


async def test_a_job_that_nobody_touches_is_cancelled_with_its_part_files(network, store, out):
    async with bits.BitsManager(store=store, limits=bits.Limits(job_inactivity_timeout=3600)) as manager:
        job = await make_job(manager, out)
        await job.resume()
        await job.wait()
        assert len(parts(out)) == 1
        await until(lambda: job.state is bits.JobState.CANCELLED)
        assert parts(out) == []


async def test_taking_a_job_over_drops_what_the_old_owner_entrusted_to_it(network, store, out):
    alice, admin = fake_token("alice"), fake_token("admin", elevated=True)
    async with bits.BitsManager(store=store) as manager:
        job = await make_job(manager, out, owner=alice)
        await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "u", "p")
        with bits.impersonate(alice), pytest.raises(bits.AccessDenied):
            await job.take_ownership()
        with bits.impersonate(alice):
            options, hers = await job.token_options(), await manager.get_job(job.id)
        with bits.impersonate(fake_token("helper")):
            await options.set_helper_token()
        await job.resume()
        await job.wait()
        with bits.impersonate(admin):
            await job.take_ownership()
        assert (job.owner, job.owner_name) == (admin.sid, "admin")
        assert options.helper_token_sid is None
        for call in (hers.add_file(URL, out / "b.bin"), hers.resume(), hers.cancel(), hers.files[0].set_remote_name(URL + "?evil")):
            with pytest.raises(bits.InvalidState):  # the handle is the old owner's: it would be the new one who writes
                await call
        with bits.impersonate(alice), pytest.raises(bits.InvalidState):
            await options.set_helper_token()
        assert [event.state async for event in hers.events()] == [bits.JobState.CANCELLED]
        assert (await manager.get_job(job.id)).state is job.state is bits.JobState.SUSPENDED
        assert not await job.remove_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC)
        assert parts(out) == []
        with bits.impersonate(alice), pytest.raises(bits.AccessDenied):
            await manager.get_job(job.id)
        await job.resume()
        await job.wait()
        await job.complete()
        assert (out / "a.bin").read_bytes() == BODY


# -- what people hand in by mistake ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"store": 5}, "store= takes the path of a file, not 5"),
        ({"store": b"/queue.db"}, "store= takes the path of a file, not b'/queue.db'"),
        ({"store": ""}, "store= takes the path of a file, not ''"),
        ({"policy": 5}, "policy= takes the path of a file, not 5"),
        ({"cost_source": "cheap"}, "cost_source= takes a CostSource, not str"),
    ],
)
def test_a_manager_names_the_argument_that_cannot_be_meant(arguments, says):
    with pytest.raises(bits.InvalidArgument) as refused:
        bits.BitsManager(**arguments)
    assert refused.value.message == says


async def test_what_cannot_be_meant_is_refused_in_words_about_it(network, store, out):
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("test")
        with pytest.raises(bits.InvalidArgument, match=r"a path has no NUL character in it; file .*a[?]b"):
            await job.add_file(URL, f"{out}/a\0b")
        with pytest.raises(bits.InvalidArgument, match="user name and password are text"):
            await job.set_credentials(bits.AuthTarget.PROXY, bits.AuthScheme.BASIC, b"alice", b"secret")
        alice = bits.AuthCredentials(bits.AuthTarget.SERVER, bits.AuthScheme.DIGEST, "alice", "secret")
        with pytest.raises(bits.InvalidArgument, match="credentials= takes AuthCredentials, in a list even if there is one"):
            await manager.download(URL, out / "a.bin", credentials=alice)
        with pytest.raises(bits.NotFound, match=r"or it has left the queue; job "):
            await manager.get_job(uuid4())
        with pytest.raises(bits.ImpersonationFailed, match=r"there is none; job .*; call it within `with impersonate"):
            await (await job.token_options()).set_helper_token()


@pytest.mark.parametrize("ending", ["", "-wal", "-shm", "-journal", ".lock", ".key", ".key.new", ".damaged-20260101T000000Z.key"])
async def test_t13_no_job_replaces_a_file_of_the_journal(network, store, ending):
    """A service that downloads into the journal's directory, under names of its callers' choice, would let them write the journal."""
    target = store.with_name(store.name + ending)
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("forged")
        for path in (target, store.parent / "below" / ".." / target.name):
            with pytest.raises(bits.InvalidArgument, match="belongs to the journal"):
                await job.add_file(URL, path)
            with pytest.raises(bits.InvalidArgument, match="belongs to the journal"):
                await manager.download(URL, path)
    with pytest.raises(bits.InvalidArgument, match="belongs to the journal"):
        await bits.download(URL, target, store=store)


@pytest.mark.parametrize("name", ["queue.db2", "queue.db.zip", "queue.db-2026.csv", "my-queue.db", ".lock"])
async def test_a_file_may_lie_beside_the_journal_under_a_name_like_its_own(network, store, name):
    async with bits.BitsManager(store=store) as manager:
        assert (await manager.download(URL, store.with_name(name))).read_bytes() == BODY
