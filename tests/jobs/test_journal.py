"""The journal through the API: damaged, used twice, and without its key."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import bits_async as bits
from bits_async import AuthScheme, AuthTarget, ErrorCode, JobState
from bits_async.testing import FakeNetwork

URL = "https://files.example.test/a.bin"
BODY = bytes(range(256)) * 64


@pytest.fixture
def network() -> Iterator[FakeNetwork]:
    with FakeNetwork() as fake:
        fake.serve(URL, BODY)
        yield fake


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


async def leave_a_job(store: Path, path: Path, *, password: bool = False) -> None:
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("left", priority=bits.JobPriority.FOREGROUND)
        await job.add_file(URL, path)
        if password:
            await job.set_credentials(AuthTarget.SERVER, AuthScheme.BASIC, "alice", "hunter2")


async def test_a_manager_whose_journal_is_damaged_begins_a_new_one_and_says_where_the_old_one_is(network, store, tmp_path, caplog):
    await leave_a_job(store, tmp_path / "f")
    with store.open("r+b") as file:
        file.write(b"\xff" * 100)
    async with bits.BitsManager(store=store) as manager:
        assert [job async for job in manager.enum_jobs()] == []
        aside = manager.set_aside
        assert aside is not None
        assert str(aside) in caplog.text
        assert await leave_and_complete(manager, tmp_path / "f") == BODY
    assert aside.exists()
    async with bits.BitsManager(store=store) as manager:
        assert manager.set_aside is None


async def leave_and_complete(manager: bits.BitsManager, path: Path) -> bytes:
    job = await manager.create_job("new")
    await job.add_file(URL, path)
    await job.resume()
    await job.wait()
    await job.complete()
    return path.read_bytes()


async def test_a_second_manager_on_a_journal_is_refused_and_told_who_has_it(network, store):
    async with bits.BitsManager(store=store) as first:
        with pytest.raises(bits.StoreError, match="in use by another manager, process") as caught:
            async with bits.BitsManager(store=store):
                pass
        assert caught.value.code == ErrorCode.ERROR_SHARING_VIOLATION
        assert "close that manager first" in caught.value.advice
        await first.create_job("the first one goes on")


async def test_a_job_whose_secret_went_with_the_key_says_so_until_it_is_given_again(network, store, tmp_path):
    await leave_a_job(store, tmp_path / "f", password=True)
    await leave_a_job(store, tmp_path / "g")
    store.with_name("queue.db.key").unlink()
    async with bits.BitsManager(store=store) as manager:
        needs, other = [job async for job in manager.enum_jobs()]
        assert (needs.state, other.state) == (JobState.ERROR, JobState.SUSPENDED)
        assert needs.error.code == ErrorCode.BG_E_INVALID_CREDENTIALS
        assert "key" in needs.error.message
        assert "set the job's credentials again" in needs.error.advice
        await needs.set_credentials(AuthTarget.SERVER, AuthScheme.BASIC, "alice", "hunter2")
        for job in (needs, other):
            await job.resume()
            await job.wait()
            await job.complete()
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes() == BODY
