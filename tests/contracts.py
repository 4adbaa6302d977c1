"""What every implementation of a seam promises. A test class inherits the contract and says how to make one.

Knows no implementation. `StoreContract` wants a fixture `journal`: a function that makes a new, closed store on the
same journal each time.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from bits_async.auth.policy import AuthScheme, AuthTarget, Origin
from bits_async.errors import BitsError, ErrorCode, ErrorContext, InvalidState, NotFound, StoreError, make_error
from bits_async.files.records import PartRecord
from bits_async.identity.tokens import HelperTokenFlags
from bits_async.jobs.model import (
    CostFlags,
    FileCommitted,
    FileRecord,
    FileWhole,
    GrantRecord,
    GrantRemoved,
    JobPriority,
    JobRecord,
    JobRemoved,
    JobState,
    NotifyCmdLine,
    NotifyFlags,
    OwnerKey,
    StoredJob,
)
from bits_async.jobs.store import Store
from bits_async.transport.digests import Digests
from bits_async.transport.options import ClientCertificate, HttpOptions, SecurityFlags
from bits_async.transport.proxies import ProxySettings, resolve
from bits_async.transport.ranges import FileRange, Slice, Validator

Journal = Callable[[], Store]

ALICE = OwnerKey(
    sid="uid:1000:alice@REALM",
    name="alice",
    local="uid:1000",
    principal="alice@REALM",
    proof="ab12",
    process=False,
    elevated=False,
)
BOB = OwnerKey(sid="uid:1001", name="bob", local="uid:1001", principal=None, proof=None, process=True, elevated=True)


def a_job(**fields: Any) -> JobRecord:
    """A job as it is when it was just created."""
    now = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
    return JobRecord(**{"id": uuid4(), "display_name": "nightly", "owner": ALICE, "created": now, "modified": now, **fields})


def a_file(job: JobRecord, index: int = 0, **fields: Any) -> FileRecord:
    """A file as it is when it was just added."""
    url = f"http://files.example/{index}?sig=query-{index}"
    values = {"job_id": job.id, "index": index, "original_url": url, "url": url, "path": Path(f"/srv/in/{index}"), **fields}
    return FileRecord(**values)


def a_grant(job: JobRecord, **fields: Any) -> GrantRecord:
    """A password for the server, not bound yet."""
    values = {"target": AuthTarget.SERVER, "scheme": AuthScheme.NTLM, "user_name": "DOM\\alice", "password": "hunter2", **fields}
    return GrantRecord(job_id=job.id, **values)


def look(stored: StoredJob) -> Any:
    """A value to compare: errors have no equality of their own."""
    error = stored.job.error
    return replace(stored.job, error=None), error and (type(error), error.fields()), stored.files, stored.grants


class StoreContract:
    """What the manager relies on."""

    @pytest.fixture
    def journal(self) -> Journal:
        raise NotImplementedError("a fixture `journal` says how to make a store")

    @pytest.fixture
    async def again(self, journal: Journal) -> Any:
        """Opens the journal anew, as a later process does, and tells what is in it."""

        async def load() -> list[StoredJob]:
            store = journal()
            await store.open()
            try:
                return await store.load()
            finally:
                await store.close()

        return load

    @pytest.fixture
    async def store(self, journal: Journal) -> Any:
        store = journal()
        await store.open()
        yield store
        await store.close()

    async def test_an_owner_s_sessions_are_known_after_a_restart_and_are_not_who_he_is(self, store: Store, again: Any) -> None:
        for session in ("c1", "7", "7", None):
            await store.save(a_job(owner=replace(ALICE, session=session)))
        await store.save(a_job(owner=replace(BOB, session="9")))
        assert await store.sessions_of(owner_sid=ALICE.sid) == {"c1", "7"}
        assert await store.sessions_of(owner_sid="uid:4711") == frozenset()
        await store.close()
        assert [stored.job.owner.session for stored in await again()] == ["c1", "7", "7", None, "9"]
        assert replace(ALICE, session="c1") == ALICE

    async def test_a_new_journal_holds_no_job(self, store: Store) -> None:
        assert await store.load() == []
        assert store.lost_secrets == frozenset()

    async def test_everything_of_a_job_is_there_after_a_restart(self, store: Store, again: Any) -> None:
        when = datetime(2026, 3, 1, 23, 59, 59, 999999, tzinfo=UTC)
        job = a_job(
            display_name="Größe \x00 \udc80 ‮ x",
            priority=JobPriority.HIGH,
            state=JobState.TRANSIENT_ERROR,
            resumed=True,
            completed=when,
            helper_flags=HelperTokenFlags.LOCAL_FILE | HelperTokenFlags.NETWORK,
            proxy=ProxySettings.override("proxy.example:3128", ["*.example", "10.0.0.0/8"]),
            minimum_retry_delay=5.5,
            no_progress_timeout=0.0,
            maximum_download_time=1e9,
            http=HttpOptions(
                method="POST",
                headers=(("X-Tenant", "s3cret: value"), ("X-Empty", ""), ("X-Tenant", "2")),
                headers_write_only=True,
                header_origins=frozenset({Origin("http", "files.example", 80)}),
                flags=SecurityFlags.SSL_ENABLE_CRL_CHECK | SecurityFlags.HTTP_REDIRECT_POLICY_ALLOW_REPORT,
                crl_source=Path("/etc/\udcff/revoked"),
                validates_certificates=True,
                client_certificate=ClientCertificate(
                    source=Path("/etc/\udcff/me.p12"), thumbprint=b"\0\xff" * 10, subject_name="Ü, x", password_file=Path("/etc/p\udcff")
                ),
                certificate_origins=frozenset({Origin("https", "files.example", 443)}),
            ),
            error=make_error(ErrorCode.BG_E_CONNECTION_CLOSED, ErrorContext.GENERAL_TRANSPORT, "cut", url="http://h/p?x=1"),
            error_file=1,
            error_count=7,
            retry_number=3,
            retry_at=when + timedelta(seconds=600),
            stalled=12.25,
            active=3600.5,
            notify_flags=NotifyFlags.JOB_ERROR | NotifyFlags.FILE_RANGES_TRANSFERRED,
            notify_cmd_line=NotifyCmdLine("/srv/\udcff x", ("/srv/\udcff x", "", 'a "b" \\', "ü€")),
            notify_setter=BOB,
            minimum_notification_interval=0.25,
            owed=NotifyFlags.JOB_TRANSFERRED,
        )
        first = a_file(
            job,
            0,
            original_url="http://files.example/a%20b?x=1&sig=s3cret#part",
            url="https://mirror.example:8443/a?token=t0ken",
            path=Path("/srv/in/\udcff name"),
            digests=Digests("0" * 64, "5" * 128, "b" * 64),
            validator=Validator('"v1"', "Sun, 01 Mar 2026 00:00:00 GMT", 2**40, Digests("1" * 64, "2" * 128), "text/plain"),
            part=PartRecord("/srv/in", ".\udcff.bits-part", 2**64 - 1, 2**64 - 2, 2**63, 7, 1000, "uid:\udcff"),
            draft="0123456789abcdef",
            slices=(Slice(0, 2**31, 100, 100), Slice(2**31, 2**40, 2**31, 2**31)),
            boot_id="boot-1",
            restarts=2,
            refetches=1,
            wrong_digest="3" * 64,
            transferred=True,
            committed=True,
            owed=True,
        )
        second = a_file(job, 1, url="http://files.example/plain", validator=Validator(), slices=(Slice(0, None, 0, 0),))
        grants = (
            a_grant(job, origins=frozenset({Origin("http", "files.example", 80), Origin("https", "::1", 8443)})),
            a_grant(job, target=AuthTarget.PROXY, scheme=AuthScheme.NEGOTIATE, user_name=None, password=None, origins=frozenset()),
            a_grant(job, target=AuthTarget.PROXY, scheme=AuthScheme.BASIC, user_name="ü", password="pass\udc80\x00word €"),
        )
        await store.save(job, first, second, *grants)
        await store.close()
        (stored,) = await again()
        by_place = sorted(grants, key=lambda grant: (grant.target.value, grant.scheme.value))
        assert look(stored) == look(StoredJob(job, (first, second), tuple(by_place)))

    async def test_of_a_file_that_got_its_name_nothing_else_changes(self, store: Store, again: Any) -> None:
        """In whatever transaction it comes, and in whatever order: the last word counts."""
        job = a_job()
        files = [a_file(job, index, restarts=index, slices=(Slice(0, 5, 5, 5),)) for index in range(4)]
        await store.save(job, *files)
        await store.save(FileCommitted(job.id, 0), FileCommitted(job.id, 1))
        await store.save(replace(files[2], restarts=7), FileCommitted(job.id, 2), FileCommitted(job.id, 3), files[3])
        await store.close()
        (stored,) = await again()
        named = {"committed": True, "validated": True}
        wanted = (replace(files[0], **named), replace(files[1], **named), replace(files[2], restarts=7, **named), files[3])
        assert look(stored) == look(StoredJob(job, wanted, ()))

    async def test_of_a_file_that_came_whole_what_was_fetched_is_kept_and_nothing_else_changes(self, store: Store, again: Any) -> None:
        """In whatever transaction it comes, and in whatever order: the last word counts."""
        job = a_job()
        files = [a_file(job, index, url=f"http://files.example/{index}?token=t0ken", restarts=index) for index in range(4)]
        part = PartRecord("/srv/in", ".x.bits-part", 2**64 - 1, 2**64 - 2, 2**63, 7, 1000, "uid:\udcff")
        fetched = {
            "validator": Validator('"v1"', "Sun, 01 Mar 2026 00:00:00 GMT", 5, Digests("1" * 64, "2" * 128), "text/plain"),
            "part": part,
            "draft": "fedcba9876543210",
            "slices": (Slice(0, 5, 5, 5),),
            "boot_id": "boot-1",
            "transferred": True,
            "owed": True,
        }
        whole = [replace(file, **fetched) for file in files]
        await store.save(job, *files)
        await store.save(FileWhole(whole[0]), FileWhole(whole[1]), FileCommitted(job.id, 1))
        await store.save(replace(files[2], refetches=7), FileWhole(whole[2]), FileWhole(whole[3]), files[3])
        await store.close()
        (stored,) = await again()
        named = replace(whole[1], committed=True, validated=True)
        wanted = (whole[0], named, replace(whole[2], refetches=7), files[3])
        assert look(stored) == look(StoredJob(job, wanted, ()))

    async def test_a_file_that_is_not_in_the_journal_does_not_come_whole(self, store: Store, again: Any) -> None:
        job = a_job()
        await store.save(job, a_file(job, 0))
        with pytest.raises(NotFound):
            await store.save(FileWhole(a_file(job, 0, restarts=1)), FileWhole(a_file(job, 1)))
        await store.close()
        (stored,) = await again()
        assert look(stored) == look(StoredJob(job, (a_file(job, 0),), ()))

    async def test_a_file_of_a_job_that_is_gone_gets_no_name(self, store: Store) -> None:
        job = a_job()
        await store.save(job, a_file(job, 0))
        await store.save(FileCommitted(job.id, 0), JobRemoved(job.id))
        with pytest.raises(NotFound):
            await store.save(FileCommitted(job.id, 0))

    async def test_the_ranges_of_a_file_and_the_switches_of_a_job_are_there_after_a_restart(self, store: Store, again: Any) -> None:
        job = a_job(
            maximum_bandwidth=0.5,
            own_download_time=True,
            cost_flags=CostFlags.TRANSFER_NO_SURCHARGE,
            maximum_download_size=2**63,
            dynamic_content=True,
            high_performance=True,
            on_demand_mode=True,
            files_at_once=3,
            segments=4,
        )
        ranges = (FileRange(2**62, 1), FileRange(0, 100), FileRange(2**62 + 1))
        file, plain = a_file(job, ranges=ranges, validated=True), a_file(job, 1, wanted=ranges, position=2**62)
        await store.save(job, file, plain)
        await store.save(replace(file, slices=(Slice(0, None, 5, 5),)))
        await store.close()
        (stored,) = await again()
        assert (stored.job, stored.files) == (job, (replace(file, slices=(Slice(0, None, 5, 5),)), plain))

    @pytest.mark.parametrize(
        "proxy",
        [
            ProxySettings.no_proxy(),
            ProxySettings.preconfig(),
            ProxySettings.autodetect(),
            resolve(ProxySettings.preconfig(), {"http_proxy": "http://p:1", "no_proxy": "a,b"}),
        ],
        ids=["none", "preconfig", "autodetect", "resolved"],
    )
    async def test_proxy_settings_come_back_as_they_were(self, store: Store, again: Any, proxy: ProxySettings) -> None:
        await store.save(a_job(proxy=proxy))
        await store.close()
        assert [stored.job.proxy for stored in await again()] == [proxy]

    @pytest.mark.parametrize("state", JobState)
    @pytest.mark.parametrize("priority", JobPriority)
    async def test_states_and_priorities_come_back(self, store: Store, state: JobState, priority: JobPriority) -> None:
        await store.save(a_job(state=state, priority=priority))
        (stored,) = await store.load()
        assert (stored.job.state, stored.job.priority) == (state, priority)

    @pytest.mark.parametrize(
        "error",
        [
            make_error(ErrorCode.BG_E_TOKEN_REQUIRED, ErrorContext.GENERAL_QUEUE_MANAGER, "gone", identity="alice"),
            make_error(ErrorCode.E_ACCESSDENIED, ErrorContext.LOCAL_FILE, "no", path="/srv/\udcff", identity="bob"),
            make_error(ErrorCode.E_ACCESSDENIED, ErrorContext.GENERAL_QUEUE_MANAGER),
            make_error(0x80190000 | 503, ErrorContext.REMOTE_FILE, "busy", url="http://h/?q", http_status=503, retry_after=1.5),
            make_error(0x80190000 | 407, ErrorContext.GENERAL_TRANSPORT, http_status=407, transient=True, advice="ask"),
            make_error(ErrorCode.BG_E_VALIDATION_FAILED, ErrorContext.REMOTE_FILE, job_id=UUID(int=5)),
            make_error(0x8007FFFF, ErrorContext.UNKNOWN, "a code that has no name"),
        ],
        ids=lambda error: f"{type(error).__name__}-{error.code:x}-{error.context.name}",
    )
    async def test_an_error_comes_back_with_its_class_and_fields(self, store: Store, again: Any, error: BitsError) -> None:
        await store.save(a_job(error=error))
        await store.close()
        (stored,) = await again()
        assert type(stored.job.error) is type(error)
        assert stored.job.error.fields() == error.fields()
        assert str(stored.job.error) == str(error)

    async def test_an_error_that_is_over_leaves_nothing(self, store: Store) -> None:
        job = a_job(error=make_error(ErrorCode.BG_E_CONNECTION_CLOSED, ErrorContext.GENERAL_TRANSPORT))
        await store.save(job)
        await store.save(replace(job, error=None))
        assert (await store.load())[0].job.error is None

    async def test_jobs_come_in_the_order_of_their_creation(self, store: Store, again: Any) -> None:
        jobs = [a_job(display_name=str(number)) for number in range(20)]
        await store.save(*jobs[:10])
        for job in jobs[10:]:
            await store.save(job)
        await store.save(replace(jobs[3], state=JobState.QUEUED), JobRemoved(jobs[5].id))
        await store.close()
        assert [stored.job.display_name for stored in await again()] == [str(n) for n in range(20) if n != 5]

    async def test_files_come_in_their_order(self, store: Store) -> None:
        job = a_job()
        files = [a_file(job, index) for index in range(12)]
        await store.save(job, *reversed(files))
        assert (await store.load())[0].files == tuple(files)

    async def test_only_durable_positions_are_kept(self, store: Store) -> None:
        job = a_job()
        await store.save(job, a_file(job, slices=(Slice(0, 100, 60, 40),)))
        assert (await store.load())[0].files[0].slices == (Slice(0, 100, 40, 40),)

    async def test_what_is_saved_is_what_was_there_at_the_call(self, store: Store) -> None:
        job, piece = a_job(), Slice(0, 100, 40, 40)
        saving = asyncio.ensure_future(store.save(job, a_file(job, slices=(piece,))))
        await asyncio.sleep(0)
        piece.written = piece.durable = 80
        await saving
        assert (await store.load())[0].files[0].slices == (Slice(0, 100, 40, 40),)

    async def test_a_file_gets_other_slices(self, store: Store) -> None:
        job = a_job()
        await store.save(job, a_file(job, slices=(Slice(0, 10, 0, 0), Slice(10, 20, 10, 10))))
        await store.save(a_file(job, slices=(Slice(5, None, 6, 6),)))
        assert (await store.load())[0].files[0].slices == (Slice(5, None, 6, 6),)

    async def test_a_size_that_no_disk_has_does_not_break_the_journal(self, store: Store) -> None:
        job = a_job()
        await store.save(job, a_file(job, validator=Validator(size=10**19), slices=(Slice(0, 10**19, 5, 5),)))
        file = (await store.load())[0].files[0]
        assert (file.size, file.slices) == (10**19, (Slice(0, 10**19, 5, 5),))

    async def test_a_removed_job_takes_its_files_and_grants_along(self, store: Store, again: Any) -> None:
        gone, kept = a_job(), a_job()
        await store.save(gone, a_file(gone), a_grant(gone), kept, a_file(kept), a_grant(kept))
        await store.save(JobRemoved(gone.id))
        await store.save(replace(gone, display_name="same id again"))
        await store.close()
        first, second = await again()
        assert (first.job.id, len(first.files), len(first.grants)) == (kept.id, 1, 1)
        assert (second.job.id, second.files, second.grants) == (gone.id, (), ())

    async def test_a_grant_can_be_replaced_and_removed(self, store: Store) -> None:
        job = a_job()
        server, proxy = a_grant(job), a_grant(job, target=AuthTarget.PROXY)
        await store.save(job, server, proxy)
        await store.save(replace(server, password="new"))
        assert (await store.load())[0].grants == (replace(server, password="new"), proxy)
        await store.save(GrantRemoved(job.id, AuthTarget.SERVER, AuthScheme.NTLM))
        assert (await store.load())[0].grants == (proxy,)

    async def test_of_several_changes_of_one_thing_the_last_one_counts(self, store: Store) -> None:
        job = a_job()
        await store.save(
            replace(job, display_name="old"),
            job,
            a_file(job, slices=(Slice(0, 9, 1, 1), Slice(9, 19, 9, 9))),
            a_file(job, slices=(Slice(0, 9, 5, 5),)),
            a_grant(job),
            GrantRemoved(job.id, AuthTarget.SERVER, AuthScheme.NTLM),
        )
        (stored,) = await store.load()
        assert (stored.job, stored.files[0].slices, stored.grants) == (job, (Slice(0, 9, 5, 5),), ())
        await store.save(replace(job, display_name="changed"), a_file(job, 1), JobRemoved(job.id))
        assert await store.load() == []

    async def test_many_changes_are_saved_together_or_not_at_all(self, store: Store) -> None:
        kept, unknown = a_job(), a_job()
        await store.save(kept)
        with pytest.raises(NotFound) as caught:
            await store.save(replace(kept, display_name="changed"), a_job(), a_file(unknown))
        assert caught.value.job_id == unknown.id
        assert [stored.job for stored in await store.load()] == [kept]

    async def test_a_grant_of_an_unknown_job_is_refused(self, store: Store) -> None:
        job = a_job()
        with pytest.raises(NotFound):
            await store.save(a_grant(job))
        await store.save(GrantRemoved(job.id, AuthTarget.SERVER, AuthScheme.NTLM), JobRemoved(job.id))  # nothing to remove: no error

    async def test_a_job_with_another_owner_keeps_its_secrets(self, store: Store, again: Any) -> None:
        job = a_job()
        await store.save(job, a_file(job), a_file(job, 1), a_grant(job))
        await store.save(replace(job, owner=BOB), a_file(job, 1, url="http://new.example/?sig=new"))
        await store.close()
        (stored,) = await again()
        assert stored.job.owner == BOB
        assert stored.files == (a_file(job), a_file(job, 1, url="http://new.example/?sig=new"))
        assert stored.grants == (a_grant(job),)

    async def test_saves_at_the_same_time_are_all_kept(self, store: Store, again: Any) -> None:
        jobs = [a_job() for _ in range(30)]
        await asyncio.gather(*(store.save(job, a_file(job), a_grant(job)) for job in jobs))
        await store.close()
        assert {stored.job.id for stored in await again()} == {job.id for job in jobs}

    @pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13])
    async def test_a_cancelled_save_is_finished_before_the_cancel_goes_on(self, store: Store, turns: int) -> None:
        job = a_job()
        saving = asyncio.ensure_future(store.save(job, a_file(job), a_grant(job)))
        for _ in range(turns):
            await asyncio.sleep(0)
        started = turns > 0 and not saving.done()
        cancelled = saving.cancel()
        if cancelled:
            with pytest.raises(asyncio.CancelledError):
                await saving
        stored = await store.load()
        assert [s.job for s in stored] == ([job] if started or not cancelled else [])
        assert all((s.files, s.grants) == ((a_file(job),), (a_grant(job),)) for s in stored)

    async def test_a_save_that_is_cancelled_twice_is_finished_too(self, store: Store) -> None:
        job = a_job()
        saving = asyncio.ensure_future(store.save(job))
        await asyncio.sleep(0)
        saving.cancel()
        await asyncio.sleep(0)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        assert [stored.job for stored in await store.load()] == [job]

    async def test_a_cancelled_open_leaves_the_journal_free(self, journal: Journal) -> None:
        opening = asyncio.ensure_future(journal().open())
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        store = journal()
        await store.open()
        await store.close()

    async def test_close_waits_for_a_save_that_is_under_way(self, store: Store, again: Any) -> None:
        job = a_job()
        saving = asyncio.ensure_future(store.save(job))
        await asyncio.sleep(0)
        await store.close()
        try:
            await saving
            saved = [job]
        except InvalidState:
            saved = []
        assert [stored.job for stored in await again()] == saved

    async def test_a_second_manager_is_refused_until_the_first_one_is_done(self, store: Store, journal: Journal) -> None:
        second = journal()
        with pytest.raises(StoreError, match="in use") as caught:
            await second.open()
        assert caught.value.path == store.path
        assert caught.value.code == ErrorCode.ERROR_SHARING_VIOLATION
        job = a_job()
        await store.save(job)  # the first one is not disturbed
        await store.close()
        await second.open()
        try:
            assert [stored.job for stored in await second.load()] == [job]
        finally:
            await second.close()

    async def test_a_journal_can_be_opened_again_after_it_was_closed(self, store: Store) -> None:
        job = a_job()
        await store.save(job)
        await store.close()
        await store.close()
        await store.open()
        assert [stored.job for stored in await store.load()] == [job]

    @pytest.mark.parametrize("use", [lambda store: store.save(a_job()), lambda store: store.load()], ids=["save", "load"])
    async def test_a_closed_journal_says_so(self, journal: Journal, use: Callable[[Store], Awaitable[Any]]) -> None:
        with pytest.raises(InvalidState):
            await use(journal())

    async def test_a_probe_leaves_nothing_behind(self, store: Store, again: Any) -> None:
        job = a_job()
        await store.save(job)
        await store.probe()
        await store.close()
        assert [stored.job for stored in await again()] == [job]

    async def test_the_fingerprint_key_outlives_a_restart(self, store: Store, journal: Journal) -> None:
        key = store.fingerprint_key
        assert len(key) == 32
        await store.close()
        later = journal()
        await later.open()
        try:
            assert later.fingerprint_key == key
        finally:
            await later.close()
        assert key.hex() not in repr(store)
