import asyncio
import contextlib
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from bits_async.auth.policy import AuthScheme, AuthTarget, Origin
from bits_async.errors import ErrorCode, ErrorContext, InvalidState, NotFound, StoreError, make_error
from bits_async.files.records import PartRecord
from bits_async.identity.tokens import HelperTokenFlags
from bits_async.jobs import statements
from bits_async.jobs import store as store_module
from bits_async.jobs.model import (
    FileRecord,
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
from bits_async.jobs.schema import APPLICATION_ID, SCHEMA
from bits_async.jobs.secrets import make_private
from bits_async.jobs.store import Outlook, SqliteStore, Store
from bits_async.transport.digests import Digests
from bits_async.transport.options import HttpOptions
from bits_async.transport.proxies import ProxySettings
from bits_async.transport.ranges import Slice, Validator
from tests.contracts import ALICE, BOB, Journal, StoreContract, a_file, a_grant, a_job, look
from tests.waiting import until

RELEASED = Path(__file__).parent / "journals"
RELEASED_SCHEMAS = 4  # each has its journal; entries of SCHEMA beyond are not released yet
RELEASED_KEY = bytes(range(32))
SOMEBODY = 54321
SIDES = ("", "-wal", "-shm", ".lock", ".key")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state" / "jobs.db"


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(path)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def refused(path: Path) -> StoreError:
    """The error of opening; nothing may be left open after it."""
    with pytest.raises(StoreError) as caught:
        await SqliteStore(path).open()
    await until(lambda: not store_threads())
    return caught.value


def side(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def store_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bits-store") or "connection_worker" in thread.name]


@contextlib.contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db


class TestSqliteStore(StoreContract):
    """The journal in a file keeps every promise of a journal."""

    @pytest.fixture
    def journal(self, path: Path) -> Journal:
        def make() -> Store:
            return SqliteStore(path)

        return make


# -- the files


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777], ids=oct)
async def test_t13_every_file_of_the_journal_is_for_its_owner_only_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "made" / "jobs.db"
    before = os.umask(umask)
    try:
        for _ in range(2):  # SQLite makes some of them anew
            async with opened(path) as store:
                await store.save(a_job())
                assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()} == {
                    side(path, suffix).name: 0o600 for suffix in SIDES
                }
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("suffix", [*SIDES, "-journal"])
@pytest.mark.parametrize("fault", ["writable", "link", "dangling"])
async def test_t13_a_file_that_somebody_else_could_have_written_is_refused(path: Path, suffix: str, fault: str) -> None:
    async with opened(path) as store:
        await store.save(a_job())
    suspect, elsewhere = side(path, suffix), path.parent / "elsewhere"
    if fault == "writable":
        make_private(suspect)
        suspect.chmod(0o620)
    else:
        if suspect.exists():
            suspect.rename(elsewhere)
        elif fault == "link":
            make_private(elsewhere)
        if fault == "dangling":
            elsewhere.unlink(missing_ok=True)
        suspect.symlink_to(elsewhere)
    error = await refused(path)
    assert (error.path, error.code) == (suspect, ErrorCode.ERROR_DIRECTORY)
    assert str(suspect) in str(error)
    assert "another journal" in str(error) or "real path" in str(error)
    assert elsewhere.exists() == (fault == "link")


@pytest.mark.privileged
@pytest.mark.parametrize("suffix", SIDES)
async def test_t13_a_file_of_somebody_else_is_refused_for_root_too(path: Path, suffix: str) -> None:
    async with opened(path):
        pass
    make_private(side(path, suffix))
    os.chown(side(path, suffix), SOMEBODY, SOMEBODY)
    error = await refused(path)
    assert error.path == side(path, suffix)
    assert f"belongs to uid {SOMEBODY}" in str(error)


@pytest.mark.privileged
async def test_t13_a_forged_journal_in_a_directory_of_somebody_else_is_refused_for_root_too(path: Path) -> None:
    async with opened(path) as store:
        await store.save(a_job())
    os.chown(path.parent, SOMEBODY, SOMEBODY)
    error = await refused(path)
    assert error.path == path.parent


async def test_t13_nothing_is_opened_or_made_before_the_directory_was_checked(path: Path) -> None:
    path.parent.chmod(0o777)
    assert (await refused(path)).path == path.parent
    assert os.listdir(path.parent) == []


async def test_t13_what_the_schema_names_is_not_trusted_and_what_is_removed_is_overwritten(path: Path) -> None:
    async with opened(path) as store:
        values = {name: await statements.pragma(store._db, name) for name in ("trusted_schema", "secure_delete", "foreign_keys")}
        assert values == {"trusted_schema": 0, "secure_delete": 1, "foreign_keys": 1}
        assert await statements.pragma(store._db, "journal_mode") == "wal"
        assert await statements.pragma(store._db, "synchronous") == 2  # FULL


@pytest.mark.parametrize("column", ["password_secret", "url_secret"])
async def test_t13_a_secret_that_was_moved_to_another_job_does_not_open(path: Path, column: str) -> None:
    victim, thief = a_job(), a_job(owner=BOB)
    async with opened(path) as store:
        for job in (victim, thief):
            await store.save(job, a_file(job), a_grant(job, password=f"of {job.owner.name}"))
    table = "grants" if column == "password_secret" else "files"
    with raw(path) as db:
        db.execute(
            f"UPDATE {table} SET {column} = (SELECT {column} FROM {table} WHERE job_id = ?) WHERE job_id = ?",
            (str(victim.id), str(thief.id)),
        )
    async with opened(path) as store:
        first, second = await store.load()
        assert store.lost_secrets == {thief.id}
    assert first.grants[0].password == "of alice"
    assert second.grants == (() if table == "grants" else (a_grant(thief, password="of bob"),))
    assert second.files[0].url == ("http://files.example/0" if table == "files" else a_file(thief).url)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE jobs SET owner_sid = 'uid:0'",
        "UPDATE grants SET target = 2",
        "UPDATE grants SET scheme = 1",
        "UPDATE files SET original_url_secret = url_secret",
        "UPDATE files SET file_index = 5",
    ],
)
async def test_t13_a_secret_whose_row_was_altered_does_not_open(path: Path, change: str) -> None:
    job = a_job()
    async with opened(path) as store:
        await store.save(job, a_file(job), a_grant(job))
    with raw(path) as db:
        db.execute(change)
    async with opened(path) as store:
        await store.load()
        assert store.lost_secrets == {job.id}


async def test_the_files_carry_the_name_of_the_journal_and_only_they_are_left(path: Path) -> None:
    async with opened(path) as store:
        await store.save(a_job())
    assert sorted(os.listdir(path.parent)) == ["jobs.db", "jobs.db.key", "jobs.db.lock"]


async def test_a_relative_path_means_the_directory_of_its_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    store = SqliteStore(Path("jobs.db"))
    monkeypatch.chdir("/")
    assert store.path == path


async def test_making_a_store_touches_no_file(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "missing" / "jobs.db")
    assert os.listdir(tmp_path) == []


# -- secrets


SECRETS = ("hunter2-geheim", "query-s3cret", "redirect-t0ken", "userinfo-pw", "fragment-x7", "proxy-pass-99", "header-v4lue")


def a_secretive_job() -> tuple[Any, ...]:
    error = make_error(ErrorCode.BG_E_CONNECTION_CLOSED, ErrorContext.GENERAL_TRANSPORT, url="http://h/p?sig=query-s3cret")
    job = a_job(error=error, http=HttpOptions(headers=(("X-Tenant", "header-v4lue"),)))
    file = a_file(
        job,
        original_url="http://files.example/a?sig=query-s3cret#fragment-x7",
        url="http://me:userinfo-pw@cdn.example/a?t=redirect-t0ken",
    )
    proxy = a_grant(job, target=AuthTarget.PROXY, scheme=AuthScheme.BASIC, password="proxy-pass-99")
    return job, file, a_grant(job, password="hunter2-geheim"), proxy


async def test_t14_no_password_and_no_query_is_in_any_file_or_log_of_the_journal(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    job, file, *grants = a_secretive_job()
    async with opened(path) as store:
        await store.save(job, file, *grants)
        await store.save(replace(file, restarts=1), replace(job, owner=BOB))
        loaded = await store.load()
        on_disk = {p.name: p.read_bytes() for p in path.parent.iterdir()}
        shown = repr(store) + repr(vars(store)) + caplog.text + "".join(repr(record.args) for record in caplog.records)
    on_disk["closed"] = path.read_bytes()
    assert loaded[0].files == (replace(file, restarts=1),)
    assert loaded[0].grants == tuple(grants)
    assert on_disk["jobs.db-wal"]
    assert any("SELECT * FROM grants" in record.getMessage() for record in caplog.records)  # aiosqlite logs what passes through it
    for secret in SECRETS:
        assert [name for name, content in on_disk.items() if secret.encode() in content] == []
        assert secret not in shown


async def test_t14_what_may_be_read_is_in_the_clear(path: Path) -> None:
    async with opened(path) as store:
        await store.save(*a_secretive_job())
    with raw(path) as db:
        assert db.execute("SELECT original_url, url FROM files").fetchall() == [("http://files.example/a", "http://cdn.example/a")]
        assert db.execute("SELECT DISTINCT user_name FROM grants").fetchall() == [("DOM\\alice",)]


@pytest.mark.parametrize("fault", ["full", "unknown job", "damaged"])
async def test_t14_no_error_of_the_journal_holds_a_secret(path: Path, fault: str) -> None:
    job, file, *grants = a_secretive_job()
    async with opened(path) as store:
        with pytest.raises((StoreError, NotFound)) as caught:
            if fault == "full":
                await fill(store)
                await store.save(job, file, *(replace(grant, user_name="x" * 100_000) for grant in grants))
            elif fault == "unknown job":
                await store.save(file, *grants)
            else:
                await store.save(job, file, *grants)
                await store._db.execute_fetchall("UPDATE jobs SET state = 99")
                await store.load()
    error: BaseException | None = caught.value
    seen = "".join(traceback.format_exception(caught.value))
    while error is not None:
        seen += repr(error) + str(error) + repr(vars(error))
        error = error.__cause__
    for secret in SECRETS:
        assert secret not in seen


# -- a key that is lost


async def test_a_journal_whose_key_is_lost_opens_and_names_the_jobs_that_need_a_secret(path: Path) -> None:
    plain, query, password = a_job(), a_job(), a_job()
    implicit = a_grant(plain, scheme=AuthScheme.NEGOTIATE, user_name=None, password=None)
    async with opened(path) as store:
        await store.save(plain, a_file(plain, original_url="http://h/p", url="http://h/p"), implicit)
        await store.save(query, a_file(query))
        await store.save(password, a_grant(password), a_grant(password, target=AuthTarget.PROXY, password=None))
        before = store.fingerprint_key
    side(path, ".key").unlink()
    async with opened(path) as store:
        first, second, third = await store.load()
        assert store.lost_secrets == {query.id, password.id}
        assert store.fingerprint_key != before
    assert (first.files[0].url, first.grants) == ("http://h/p", (implicit,))
    assert second.files[0].url == second.files[0].original_url == "http://files.example/0"
    assert third.grants == (a_grant(password, target=AuthTarget.PROXY, password=None),)


async def test_a_key_that_is_brought_back_brings_the_secrets_back(path: Path) -> None:
    job = a_job()
    async with opened(path) as store:
        await store.save(job, a_file(job), a_grant(job))
    side(path, ".key").rename(path.parent / "backup")
    async with opened(path) as store:
        (stored,) = await store.load()
        failed = replace(stored.job, state=JobState.ERROR)
        await store.save(failed, replace(stored.files[0], restarts=1))  # as the manager does: what it knows of the job
        assert store.lost_secrets == {job.id}
    (path.parent / "backup").rename(side(path, ".key"))
    async with opened(path) as store:
        assert look((await store.load())[0]) == look(StoredJob(failed, (replace(a_file(job), restarts=1),), (a_grant(job),)))
        assert store.lost_secrets == frozenset()


async def test_a_job_is_no_longer_lost_when_its_secrets_were_given_anew(path: Path) -> None:
    job, other = a_job(), a_job()
    async with opened(path) as store:
        await store.save(job, a_file(job), a_grant(job), a_grant(job, target=AuthTarget.PROXY), other, a_file(other))
    side(path, ".key").unlink()
    async with opened(path) as store:
        await store.load()
        await store.save(a_grant(job, password="new"))
        await store.save(GrantRemoved(job.id, AuthTarget.PROXY, AuthScheme.NTLM))
        assert store.lost_secrets == {job.id, other.id}
        await store.save(a_file(job), JobRemoved(other.id))
        assert store.lost_secrets == frozenset()
    async with opened(path) as store:
        assert look((await store.load())[0]) == look(StoredJob(job, (a_file(job),), (a_grant(job, password="new"),)))


async def test_custom_headers_whose_key_is_lost_are_unknown_until_it_is_brought_back_or_they_are_set_anew(path: Path) -> None:
    job, other, plain = (a_job(http=HttpOptions(headers=headers)) for headers in ((("X", "1"),), (("X", "2"),), ()))
    async with opened(path) as store:
        await store.save(job, other, plain)
    side(path, ".key").rename(path.parent / "backup")
    async with opened(path) as store:
        stored = [each.job for each in await store.load()]
        assert [each.http.headers for each in stored] == [None, None, ()]
        assert store.lost_secrets == {job.id, other.id}
        await store.save(replace(stored[0], error_count=1))  # what is sealed stays
        await store.save(replace(stored[1], http=HttpOptions()))
        assert store.lost_secrets == {job.id}
    (path.parent / "backup").rename(side(path, ".key"))
    async with opened(path) as store:
        assert [each.job.http.headers for each in await store.load()] == [(("X", "1"),), (), ()]


async def test_t13_custom_headers_that_were_moved_to_another_job_do_not_open(path: Path) -> None:
    victim, thief = a_job(http=HttpOptions(headers=(("X", "1"),))), a_job()
    async with opened(path) as store:
        await store.save(victim, thief)
    with raw(path) as db:
        db.execute("UPDATE jobs SET custom_headers_secret = (SELECT custom_headers_secret FROM jobs WHERE number = 1)")
    async with opened(path) as store:
        assert [each.job.http.headers for each in await store.load()] == [(("X", "1"),), None]
        assert store.lost_secrets == {thief.id}


async def test_a_save_that_failed_loses_no_secret(path: Path) -> None:
    job = a_job()
    async with opened(path) as store:
        await store.save(job, a_grant(job))
    side(path, ".key").unlink()
    async with opened(path) as store:
        await store.load()
        with pytest.raises(NotFound):
            await store.save(a_grant(job), a_file(a_job()))
        assert store.lost_secrets == {job.id}


# -- schemas


def released_jobs() -> list[StoredJob]:
    """What `journals/v1.sql` holds."""
    job = a_job(
        id=UUID(int=1),
        priority=JobPriority.FOREGROUND,
        state=JobState.TRANSIENT_ERROR,
        resumed=True,
        helper_flags=HelperTokenFlags.NETWORK,
        proxy=ProxySettings.override("proxy.example:3128", [".example"]),
        error=make_error(0x80190000 | 503, ErrorContext.REMOTE_FILE, "busy", url="http://h/", http_status=503, retry_after=3.0),
        error_file=0,
        error_count=2,
        retry_number=1,
        retry_at=a_job().created,
        stalled=4.5,
        active=60.25,
    )
    file = a_file(
        job,
        digests=Digests("ab" * 32),
        validator=Validator('"v1"', "Sun, 01 Mar 2026 00:00:00 GMT", 1000),
        part=PartRecord("/srv/in", ".0.bits-part", 64769, 2, 64769, 2**64 - 3, 1000),
        slices=(Slice(0, 500, 100, 100), Slice(500, 1000, 600, 600)),
        boot_id="boot-1",
        restarts=1,
    )
    plain = a_job(id=UUID(int=2), owner=BOB)
    grant = a_grant(job, origins=frozenset({Origin("http", "files.example", 80)}))
    finished = a_file(plain, url="http://h/p", original_url="http://h/p", transferred=True, committed=True)
    return [StoredJob(job, (file,), (grant,)), StoredJob(plain, (finished,), ())]


def schema_of(path: Path) -> list[tuple[str, str, str]]:
    with raw(path) as db:
        rows = db.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name").fetchall()
        return [(kind, name, " ".join(sql.replace('"', "").split())) for kind, name, sql in rows]


def restore(path: Path, version: int) -> None:
    """A journal as the program that released this schema left it."""
    make_private(path)
    with raw(path) as db:
        db.executescript((RELEASED / f"v{version}.sql").read_text())
    make_private(side(path, ".key"))
    side(path, ".key").write_bytes(RELEASED_KEY)


@pytest.mark.parametrize("version", range(1, RELEASED_SCHEMAS + 1))
async def test_a_journal_of_every_released_schema_is_read(path: Path, version: int) -> None:
    restore(path, version)
    async with opened(path) as store:
        assert [look(stored) for stored in await store.load()] == [look(stored) for stored in released_jobs()]
        assert store.lost_secrets == frozenset()
        assert await statements.pragma(store._db, "user_version") == len(SCHEMA)
        assert (await store.load())[1].job.owner.session == ("c2" if version >= 4 else None)


async def test_a_released_schema_is_never_edited(path: Path) -> None:
    restore(path.with_name("released.db"), 1)
    with raw(path) as db:
        db.executescript(SCHEMA[0])
    assert schema_of(path) == schema_of(path.with_name("released.db"))


async def test_a_newer_journal_is_refused_and_left_alone(path: Path) -> None:
    async with opened(path) as store:
        await store.save(a_job())
    with raw(path) as db:
        db.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    error = await refused(path)
    assert "version 99" in str(error)
    assert "newer program" in error.advice
    assert error.path == path
    assert path.read_bytes() == before


async def test_an_interrupted_migration_never_happened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore(path, 1)
    monkeypatch.setattr(store_module, "SCHEMA", (*SCHEMA, "ALTER TABLE jobs ADD COLUMN extra TEXT; SELECT broken;"))
    await refused(path)
    with raw(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(SCHEMA),)
        assert "extra" not in str(schema_of(path))
    monkeypatch.undo()
    async with opened(path) as store:
        assert len(await store.load()) == 2


async def test_a_migration_adds_to_what_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore(path, 1)
    monkeypatch.setattr(store_module, "SCHEMA", (*SCHEMA, "ALTER TABLE jobs ADD COLUMN extra TEXT;"))
    async with opened(path) as store:
        assert len(await store.load()) == 2
        assert await statements.pragma(store._db, "user_version") == len(SCHEMA) + 1


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
async def test_the_database_of_another_program_is_refused_and_left_alone(path: Path, journal_mode: str) -> None:
    make_private(path)
    with raw(path) as db:
        db.execute(f"PRAGMA journal_mode={journal_mode}")
        db.executescript("CREATE TABLE theirs (x); INSERT INTO theirs VALUES (1)")
    before = path.read_bytes()
    error = await refused(path)
    assert "not a journal" in str(error)
    assert path.read_bytes() == before
    assert set(os.listdir(path.parent)) == {"jobs.db", "jobs.db.lock"}


async def test_a_crash_between_making_the_file_and_the_schema_is_healed(path: Path) -> None:
    make_private(path)
    with raw(path) as db:
        db.execute("PRAGMA journal_mode=WAL")
    assert path.stat().st_size > 0
    async with opened(path) as store:
        assert await store.load() == []
    with raw(path) as db:
        assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)


# -- asked of all jobs


async def test_those_who_come_next_are_the_longest_waiting_of_their_class(path: Path) -> None:
    turns = {"b": 3, "a": 0, "d": 7, "c": 3}
    queued = [a_job(display_name=name, state=JobState.QUEUED, turn=turn) for name, turn in turns.items()]
    others = [a_job(state=JobState.SUSPENDED), a_job(state=JobState.QUEUED, priority=JobPriority.LOW)]
    async with opened(path) as store:
        await store.save(*others, *queued)
        names = {job.id: job.display_name for job in queued}
        line = await store.in_line(JobPriority.NORMAL, dynamic=False, absent=[], count=3)
        assert [names[job_id] for job_id in line] == ["a", "b", "c"]


async def test_at_its_opening_a_journal_says_what_there_is_to_look_for(path: Path) -> None:
    now, waits = a_job().created, {"state": JobState.TRANSIENT_ERROR}
    gone = make_error(ErrorCode.BG_E_TOKEN_REQUIRED, ErrorContext.GENERAL_QUEUE_MANAGER, "it is gone")
    async with opened(path) as store:
        assert await store.recover(now, gone) == Outlook(0, frozenset(), None, awaiting=False, owing=False)
        await store.save(a_job(state=JobState.SUSPENDED, turn=7), a_job(**waits, retry_at=now + timedelta(seconds=9)))
        await store.save(a_job(state=JobState.TRANSFERRING, priority=JobPriority.HIGH), a_job(state=JobState.QUEUED))
        await store.save(a_job(**waits, retry_at=now + timedelta(seconds=7)))
        moment = now + timedelta(seconds=7)
        queued = frozenset({JobPriority.HIGH, JobPriority.NORMAL})
        assert await store.recover(now, gone) == Outlook(7, queued, moment, awaiting=False, owing=False)
        command = NotifyCmdLine("/bin/true", ())
        await store.save(a_job(**waits), a_job(notify_cmd_line=command, owed=NotifyFlags.JOB_TRANSFERRED))
        assert await store.recover(now, gone) == Outlook(7, queued, moment, awaiting=True, owing=True)


async def test_jobs_of_absent_owners_and_dynamic_content_are_passed_over(path: Path) -> None:
    nearly = replace(ALICE, proof="another secret")
    whose = [ALICE, BOB, nearly, BOB]
    jobs = [a_job(owner=owner, state=JobState.QUEUED, dynamic_content=number == 1) for number, owner in enumerate(whose)]
    async with opened(path) as store:
        await store.save(*jobs)

        async def line(*absent: OwnerKey, dynamic: bool = False) -> list[int]:
            found = await store.in_line(JobPriority.NORMAL, dynamic=dynamic, absent=absent, count=9)
            return [[job.id for job in jobs].index(job_id) for job_id in found]

        assert await line() == [0, 2, 3]
        assert await line(dynamic=True) == [0, 1, 2, 3]
        assert await line(ALICE) == [2, 3]
        assert await line(BOB, nearly) == [0]
        assert await line(*[replace(BOB, name=str(number)) for number in range(5000)]) == [0, 2, 3]


async def test_retries_come_due_in_their_order_and_follow_the_wall_clock(path: Path) -> None:
    now = a_job().created
    jobs = [a_job(state=JobState.TRANSIENT_ERROR, retry_at=now + timedelta(seconds=left)) for left in (30, 10, 20)]
    async with opened(path) as store:
        await store.save(*jobs, a_job(state=JobState.SUSPENDED))
        assert await store.due(now + timedelta(seconds=20), 9) == [jobs[1].id, jobs[2].id]
        assert await store.due(now + timedelta(seconds=20), 1) == [jobs[1].id]
        assert await store.next_due(now + timedelta(seconds=20)) == jobs[0].retry_at
        assert await store.next_due(now + timedelta(seconds=30)) is None
        await store.shift_retries(timedelta(hours=-1, microseconds=-1))
        (stored, *_) = await store.load([jobs[0].id])
        assert stored.job.retry_at == now + timedelta(seconds=30, hours=-1, microseconds=-1)
        await store.hasten_retries(now - timedelta(days=1))
        assert len(await store.due(now - timedelta(days=1), 9)) == 3


async def test_jobs_that_wait_for_an_event_are_found_in_their_order_and_when_they_have_waited_too_long(path: Path) -> None:
    now = a_job().created
    jobs = [a_job(state=JobState.TRANSIENT_ERROR, gives_up_at=given) for given in (None, now + timedelta(days=1), now)]
    late = replace(jobs[2], id=uuid4(), retry_at=now + timedelta(days=9))
    async with opened(path) as store:
        await store.save(a_job(), *jobs, late)
        first = await store.awaiting(0, 2)
        assert [job_id for _, job_id in first] == [jobs[0].id, jobs[1].id]
        assert [job_id for _, job_id in await store.awaiting(first[-1][0], 9)] == [jobs[2].id]
        assert await store.due(now, 9) == [jobs[2].id]
        assert await store.next_due(now) == now + timedelta(days=1)


async def test_what_the_last_manager_left_behind_is_put_in_order(path: Path) -> None:
    now, far = a_job().created, a_job().created + timedelta(days=400)
    error = make_error(0x80190000 | 503, ErrorContext.REMOTE_FILE, "busy", retry_after=3600.0)
    states = {state: a_job(state=state, helper_flags=HelperTokenFlags.NETWORK) for state in JobState if not state.is_final}
    running = a_job(state=JobState.TRANSFERRING)
    retrying = a_job(state=JobState.TRANSIENT_ERROR, retry_at=far, minimum_retry_delay=60)
    asked = a_job(state=JobState.TRANSIENT_ERROR, retry_at=far, minimum_retry_delay=60, error=error)
    soon = a_job(state=JobState.TRANSIENT_ERROR, retry_at=now + timedelta(seconds=59))
    awaiting = a_job(state=JobState.TRANSIENT_ERROR, gives_up_at=now, no_progress_timeout=100.0, stalled=40.0)
    gone = make_error(ErrorCode.BG_E_TOKEN_REQUIRED, ErrorContext.GENERAL_QUEUE_MANAGER, "it is gone")
    async with opened(path) as store:
        await store.save(*states.values(), running, retrying, asked, soon, awaiting)
        await store.recover(now, gone)
        found = {stored.job.id: stored.job for stored in await store.load()}
    assert found[running.id] == replace(running, state=JobState.QUEUED)
    assert found[retrying.id].retry_at == now + timedelta(seconds=60)
    assert found[asked.id].retry_at == now + timedelta(hours=1)
    assert found[soon.id] == soon
    assert found[awaiting.id].gives_up_at == now + timedelta(seconds=60)
    for state, before in states.items():
        after = found[before.id]
        if state.is_settled:
            assert after == before
        else:
            assert (after.state, after.error_count, after.retry_at) == (JobState.ERROR, 1, None)
            assert type(after.error) is type(gone)
            assert after.error.fields() == gone.fields() | {"job_id": before.id}


async def test_jobs_are_counted_and_numbered_by_owner(path: Path) -> None:
    jobs = [a_job(owner=owner) for owner in (ALICE, BOB, ALICE, ALICE)]
    async with opened(path) as store:
        assert (await store.last_number(), await store.is_busy()) == (0, False)
        await store.save(*jobs)
        assert [await store.count(owner_sid=sid, most=most) for sid, most in ((None, 9), (None, 2), (ALICE.sid, 9))] == [4, 2, 3]
        first = await store.numbered(0, owner_sid=ALICE.sid, count=2)
        assert [job_id for _, job_id in first] == [jobs[0].id, jobs[2].id]
        assert await store.numbered(first[-1][0], owner_sid=ALICE.sid, count=2) == [(await store.last_number(), jobs[3].id)]
        assert len(await store.numbered(0, owner_sid=None, count=9)) == 4
        assert not await store.is_busy()
        await store.save(replace(jobs[0], state=JobState.TRANSIENT_ERROR))
        assert await store.is_busy()


async def test_the_jobs_with_a_destination_are_found_whatever_its_name(path: Path) -> None:
    jobs = [a_job(), a_job(), a_job(owner=BOB)]
    where = Path("/srv/\udcff?*")
    async with opened(path) as store:
        await store.save(*jobs, *(a_file(job, index, path=where) for job in jobs for index in (0, 1)))
        assert await store.with_destination(where, owner_sid=ALICE.sid) == [jobs[0].id, jobs[1].id]
        assert await store.with_destination(Path("/srv"), owner_sid=ALICE.sid) == []


async def test_jobs_are_changed_last_in_the_order_of_their_changes(path: Path) -> None:
    jobs = [a_job(modified=a_job().created + timedelta(seconds=age)) for age in (30, 10, 20)]
    async with opened(path) as store:
        await store.save(*jobs)
        assert await store.longest_untouched(2, elevated=False) == [(jobs[1].id, jobs[1].modified), (jobs[2].id, jobs[2].modified)]


async def test_what_is_asked_of_all_jobs_is_answered_by_an_index_without_sorting(path: Path) -> None:
    plans: dict[str, str] = {}
    async with opened(path) as store:
        honest = statements.fetch

        async def explained(db: Any, sql: str, values: Any = ()) -> Any:
            plans[sql] = "; ".join(row["detail"] for row in await honest(db, f"EXPLAIN QUERY PLAN {sql}", values))
            return await honest(db, sql, values)

        now = a_job().created
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(statements, "fetch", explained)
            await store.in_line(JobPriority.NORMAL, dynamic=False, absent=[ALICE], count=64)
            await store.recover(now, make_error(ErrorCode.BG_E_TOKEN_REQUIRED, ErrorContext.GENERAL_QUEUE_MANAGER, "it is gone"))
            await store.is_busy()
            await store.due(now, 64)
            await store.next_due(now)
            await store.shift_retries(timedelta())
            await store.hasten_retries(now)
            await store.awaiting(0, 64)
            await store.longest_untouched(64, elevated=True)
            await store.numbered(0, owner_sid=None, count=64)
            await store.numbered(0, owner_sid="", count=64)
            await store.last_number()
            await store.count(owner_sid="", most=64)
            await store.with_destination(Path("/srv"), owner_sid="")
            await store.load([a_job().id])
    assert len(plans) == 19
    for sql, plan in plans.items():
        limited = ("SCAN json_each", "SCAN CONSTANT", "SCAN (subquery", "SCAN jobs USING INDEX jobs_by_change")
        assert not [step for step in plan.split("; ") if step.startswith("SCAN ") and not step.startswith(limited)], (sql, plan)
        if "IN (SELECT" not in sql and "DISTINCT" not in sql:  # at most so many as were asked for are sorted
            assert "TEMP B-TREE" not in plan, (sql, plan)
    assert any("USING COVERING INDEX jobs_by_turn" in plan for sql, plan in plans.items() if "ORDER BY turn" in sql)


# -- faults


async def fill(store: SqliteStore) -> None:
    """From now on the volume is full."""
    pages = await statements.pragma(store._db, "page_count")
    await store._db.execute_fetchall(f"PRAGMA max_page_count={pages}")


async def test_a_full_disk_is_a_clear_error_and_the_journal_stays_as_it_was(path: Path) -> None:
    job = a_job()
    async with opened(path) as store:
        await store.save(job)
        await fill(store)
        with pytest.raises(StoreError) as caught:
            await store.save(replace(job, display_name="changed"), *(a_job(display_name="x" * 5000) for _ in range(10)))
        assert (caught.value.code, caught.value.path, caught.value.transient) == (ErrorCode.ERROR_DISK_FULL, path, True)
        assert "make room" in caught.value.advice
        assert [stored.job for stored in await store.load()] == [job]
        await store._db.execute_fetchall("PRAGMA max_page_count=1000000")
        await store.save(replace(job, display_name="changed"))
        assert [stored.job.display_name for stored in await store.load()] == ["changed"]


async def test_a_probe_finds_a_full_disk_though_nothing_is_to_be_saved_and_one_that_broke_off_harms_nothing(path: Path) -> None:
    job = a_job()
    async with opened(path) as store:
        await store.save(job)
        key = store.fingerprint_key
        await fill(store)
        with pytest.raises(StoreError) as caught:
            await store.probe()
        assert (caught.value.code, caught.value.transient) == (ErrorCode.ERROR_DISK_FULL, True)
        await store._db.execute_fetchall("PRAGMA max_page_count=1000000")
        await store.probe()
        await store._db.execute_fetchall(statements.PROBE, {"size": 100})  # and then the process dies
    async with opened(path) as store:
        assert store.fingerprint_key == key
        assert [stored.job for stored in await store.load()] == [job]
        await store.probe()


async def test_a_journal_that_cannot_be_written_is_a_clear_error(path: Path) -> None:
    async with opened(path) as store:
        await store._db.execute_fetchall("PRAGMA query_only=ON")
        with pytest.raises(StoreError, match="cannot be written") as caught:
            await store.save(a_job())
    assert (caught.value.code, caught.value.path) == (ErrorCode.ERROR_WRITE_FAULT, path)


@pytest.mark.parametrize("content", [b"this is a text file, not a database\n" * 100, b"SQLite format 3\x00" + b"\xff" * 4080])
async def test_a_file_that_is_no_database_is_refused_and_kept(path: Path, content: bytes) -> None:
    make_private(path)
    path.write_bytes(content)
    error = await refused(path)
    assert (error.code, error.path) == (ErrorCode.BG_E_DATABASE_CORRUPT, path)
    assert path.read_bytes() == content


# -- a damaged journal is set aside


def garbage(page: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(page * 4096)
            file.write(os.urandom(300))

    return damage


def half_a_schema(path: Path) -> None:
    with raw(path) as db:
        db.executescript("PRAGMA foreign_keys=OFF; DROP TABLE slices")


def torn(path: Path) -> None:
    """Half of the file never reached the disk."""
    os.truncate(path, path.stat().st_size // 2)


async def a_journal_in_use(path: Path) -> Path:
    """A copy of the files of a journal that a process has open, as a power cut would leave them: it has a log."""
    async with opened(path) as store:
        await store.save(*(a_job(display_name="x" * 500) for _ in range(200)))
        copy = path.with_name("copy.db")
        await store._db.execute_fetchall("PRAGMA wal_checkpoint(PASSIVE)")
        await store.save(a_job())
        for name in ("", "-wal", ".key"):
            make_private(side(copy, name))
            side(copy, name).write_bytes(side(path, name).read_bytes())
    return copy


@pytest.mark.parametrize("damage", [garbage(0), garbage(5), half_a_schema, torn], ids=["header", "page", "schema", "torn"])
async def test_a_journal_that_is_found_damaged_is_set_aside_whole_and_a_new_one_is_begun(
    path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    copy = await a_journal_in_use(path)
    damage(copy)
    before = {name: side(copy, name).read_bytes() for name in ("-wal", ".key") if side(copy, name).exists()}
    job = a_job()
    async with opened(copy) as store:
        assert await store.load() == []
        await store.save(job)
        aside = store.set_aside
    assert aside is not None
    assert aside.name.startswith("copy.db.damaged-")
    assert {name: side(aside, name).read_bytes() for name in before} == before
    assert aside.stat().st_size >= copy.stat().st_size > 0
    assert side(copy, ".key").read_bytes() != before[".key"]
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert str(aside) in record.getMessage()
    assert str(copy.name) in record.getMessage()
    async with opened(copy) as store:
        assert [stored.job for stored in await store.load()] == [job]
        assert store.set_aside is None


async def test_what_is_set_aside_can_be_opened_as_a_journal_when_it_is_whole_again(path: Path) -> None:
    copy = await a_journal_in_use(path)
    with copy.open("rb") as file:
        page = file.read(4096)
    garbage(0)(copy)
    async with opened(copy) as store:
        aside = store.set_aside
    assert aside is not None
    with aside.open("r+b") as file:
        file.write(page)
    async with opened(aside) as store:
        assert len(await store.load()) == 201
        assert store.lost_secrets == frozenset()


async def test_two_journals_that_are_set_aside_in_one_second_have_two_names(path: Path) -> None:
    for _ in range(3):
        async with opened(path):
            pass
        garbage(0)(path)
    async with opened(path):
        pass
    assert len([name for name in os.listdir(path.parent) if ".damaged-" in name and name.endswith(".key")]) == 3


async def test_damage_found_in_use_fails_the_manager_and_the_journal_is_set_aside_when_it_is_closed(path: Path) -> None:
    async with opened(path) as store:
        await store.save(*(a_job(display_name="x" * 500) for _ in range(200)))
    content = bytearray(path.read_bytes())
    for page in range(len(content) // 8192, len(content) // 4096):  # behind the schema
        content[page * 4096 : page * 4096 + 200] = os.urandom(200)
    path.write_bytes(content)
    store = SqliteStore(path)
    await store.open()
    with pytest.raises(StoreError) as caught:
        await store.load()
    assert (caught.value.code, caught.value.path) == (ErrorCode.BG_E_DATABASE_CORRUPT, path)
    assert "damaged" in str(caught.value)
    assert path.exists()
    await store.close()
    assert store.set_aside is not None
    assert store.set_aside.read_bytes() == bytes(content)
    async with opened(path) as store:
        assert await store.load() == []


async def test_a_fault_that_was_not_the_disks_sets_nothing_aside(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job()
    store = SqliteStore(path)
    await store.open()
    await store.save(job)

    def broken(*_: object) -> None:
        error = sqlite3.DatabaseError("a bit fell over in memory")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="damaged"):
        patch.setattr(statements, "fetch", broken)
        await store.load()
    await store.close()
    assert store.set_aside is None
    async with opened(path) as store:
        assert [stored.job for stored in await store.load()] == [job]


async def test_t13_the_copy_of_a_key_is_never_readable_for_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("no links here")

    copy, modes = shutil.copyfile, []

    def watched(old: Path, new: Path) -> None:
        copy(old, new)
        modes.append(stat.S_IMODE(new.stat().st_mode))

    async with opened(path):
        pass
    garbage(0)(path)
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(shutil, "copyfile", watched)
    before = os.umask(0)
    try:
        async with opened(path) as store:
            assert store.set_aside is not None
    finally:
        os.umask(before)
    assert modes
    assert set(modes) == {0o600}


async def test_a_file_system_without_links_keeps_a_copy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    async with opened(path) as store:
        await store.save(a_job())
    garbage(0)(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "link", no_links)
    async with opened(path) as store:
        assert store.set_aside is not None
        assert store.set_aside.read_bytes() == before
        assert stat.S_IMODE(store.set_aside.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE jobs SET state = 99",
        "UPDATE jobs SET created = 'yesterday'",
        "UPDATE jobs SET id = 'no uuid'",
        "UPDATE jobs SET proxy_list = '{'",
        "UPDATE jobs SET helper_flags = 64",
        "UPDATE jobs SET error_code = 1, error_context = 77",
        "UPDATE slices SET durable = -5",
        "UPDATE files SET part_name = 'x', part_inode = 'y'",
        "UPDATE grants SET origins = '[[1]]'",
        "UPDATE grants SET scheme = 9",
    ],
)
async def test_a_record_that_makes_no_sense_is_an_error_that_names_the_journal(path: Path, damage: str) -> None:
    job = a_job()
    async with opened(path) as store:
        await store.save(job, a_file(job, slices=(Slice(0, 10, 5, 5),)), a_grant(job))
    with raw(path) as db:
        db.execute(damage)
    async with opened(path) as store:
        with pytest.raises(StoreError) as caught:
            await store.load()
    assert (caught.value.code, caught.value.path) == (ErrorCode.BG_E_DATABASE_CORRUPT, path)
    assert "damaged" in str(caught.value)


async def test_a_journal_that_is_held_by_another_program_is_a_clear_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BUSY_TIMEOUT", 0.01)
    async with opened(path) as store:
        with raw(path) as db:
            db.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="another program") as caught:
                await store.save(a_job())
            db.execute("ROLLBACK")
        assert caught.value.code == ErrorCode.ERROR_SHARING_VIOLATION
        await store.save(a_job())


async def test_a_cancelled_save_that_failed_tells_why(path: Path) -> None:
    async with opened(path) as store:
        saving = asyncio.ensure_future(store.save(a_file(a_job())))
        await asyncio.sleep(0)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await saving
    assert isinstance(caught.value.__cause__, NotFound)


async def test_saves_that_wait_while_one_is_written_share_one_transaction(path: Path) -> None:
    """A sync of the disk costs more than all else; many jobs at once need few of them."""
    jobs, statements = [a_job() for _ in range(20)], list[str]()
    async with opened(path) as store:
        await store._db.set_trace_callback(statements.append)
        await asyncio.gather(*(store.save(job) for job in jobs))
        await store._db.set_trace_callback(lambda _: None)
        assert {each.job for each in await store.load()} == set(jobs)
    assert statements.count("COMMIT") == statements.count("BEGIN IMMEDIATE") == 2, "the first one, then all that had waited for it"


async def test_a_save_that_shares_a_transaction_with_a_wrong_one_is_made_without_it(path: Path) -> None:
    first, second = a_job(), a_job()
    async with opened(path) as store:
        one, wrong, other = await asyncio.gather(store.save(first), store.save(a_file(a_job())), store.save(second), return_exceptions=True)
        assert (one, other) == (None, None)
        assert isinstance(wrong, NotFound)
        assert {each.job for each in await store.load()} == {first, second}


def test_what_was_saved_is_there_after_kill_9(path: Path) -> None:
    script = (
        "import asyncio, sys, os, signal; sys.path.insert(0, sys.argv[2])\n"
        "from tests.contracts import *\n"
        "from bits_async.jobs.store import SqliteStore\n"
        "async def main():\n"
        "    store = SqliteStore(Path(sys.argv[1])); await store.open()\n"
        "    job = a_job(); await store.save(job, a_file(job))\n"
        "    for n in range(1, 10**9):\n"
        "        await store.save(a_file(job, slices=(Slice(0, None, n, n),))); print(n, flush=True)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path), str(Path(__file__).parents[2])], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            line = writer.stdout.readline()
        writer.kill()
        last = [line, *writer.stdout.readlines()][-1]

    async def durable() -> int:
        async with opened(path) as store:
            return (await store.load())[0].files[0].slices[0].durable

    assert asyncio.run(durable()) >= int(last)


# -- load and leaks


@pytest.mark.usefixtures("blocked_loop_is_an_error")
async def test_the_event_loop_is_never_blocked(path: Path) -> None:
    jobs = [a_job() for _ in range(50)]
    async with opened(path) as store:
        for job in jobs:
            await store.save(job, a_file(job), a_grant(job))
        await store.load()
    with pytest.raises(StoreError):
        await SqliteStore(path / "not a directory" / "jobs.db").open()
    assert not await SqliteStore(path).remove()


async def test_nothing_runs_in_the_default_executor(path: Path) -> None:
    loop: Any = asyncio.get_running_loop()
    async with opened(path) as store:
        await store.save(a_job())
        assert any(name.startswith("bits-store") for name in store_threads())
    assert loop._default_executor is None


async def test_closing_leaves_no_thread_and_no_descriptor(path: Path) -> None:
    def descriptors() -> set[str]:
        return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")}

    async with opened(path) as store:
        await store.save(a_job())
        assert any(str(path) in name for name in descriptors())
    await until(lambda: not store_threads())
    assert [name for name in descriptors() if str(path) in name] == []


@pytest.mark.parametrize("count", [1, 300])
async def test_jobs_are_read_by_one_query_for_each_table_however_many_they_are(path: Path, count: int) -> None:
    jobs = [a_job(display_name=str(number), state=JobState.QUEUED) for number in range(300)]
    changes: list[JobRecord | FileRecord] = []
    for job in jobs:
        changes += [job, a_file(job, slices=(Slice(0, None, 0, 0),))]
    async with opened(path) as store:
        await store.save(*changes)
    async with opened(path) as store:
        queries: list[str] = []
        await store._db.set_trace_callback(queries.append)
        stored = await store.load([job.id for job in jobs[-count:]])
        await store._db.set_trace_callback(lambda _: None)
    assert len(queries) == 5
    assert [each.job.display_name for each in stored] == [str(number) for number in range(300 - count, 300)]
    assert stored[-1].files == (a_file(jobs[-1], slices=(Slice(0, None, 0, 0),)),)


async def test_one_save_takes_as_many_statements_for_two_thousand_files_as_for_two(path: Path) -> None:
    counts = []
    async with opened(path) as store:
        for number in (2, 2000):
            job = a_job()
            calls: list[str] = []
            put = statements.each

            def counted(db: Any, sql: str, rows: Any, calls: list[str] = calls, put: Any = put) -> None:
                calls.append(sql)
                put(db, sql, rows)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(statements, "each", counted)
                await store.save(job, *(a_file(job, index) for index in range(number)))
            counts.append(len(calls))
    assert counts[0] == counts[1]


# -- removal


async def test_a_journal_without_jobs_can_be_removed_whole(path: Path) -> None:
    job = a_job()
    async with opened(path) as store:
        await store.save(job)
        await store.save(JobRemoved(job.id))
        assert await store.remove()
        assert os.listdir(path.parent) == []
        with pytest.raises(InvalidState):
            await store.save(job)


async def test_a_closed_journal_can_be_removed_too(path: Path) -> None:
    async with opened(path) as store:
        pass
    assert await store.remove()
    assert os.listdir(path.parent) == []


async def test_a_journal_with_a_job_is_not_removed(path: Path) -> None:
    job = a_job()
    async with opened(path) as store:
        await store.save(job)
    assert not await store.remove()
    async with opened(path) as store:
        assert [stored.job for stored in await store.load()] == [job]


async def test_a_journal_that_another_manager_uses_is_not_removed(path: Path) -> None:
    async with opened(path) as store:
        assert not await SqliteStore(path).remove()
        await store.save(a_job())


async def test_the_owner_key_is_stored_whole(path: Path) -> None:
    async with opened(path) as store:
        await store.save(a_job(owner=ALICE), a_job(owner=BOB))
    async with opened(path) as store:
        assert [stored.job.owner for stored in await store.load()] == [ALICE, BOB]
