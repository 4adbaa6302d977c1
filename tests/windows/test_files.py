"""What a part file promises on Windows, where an open file is in everybody's way. The volume is Wine's drive Z, this machine's files."""

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

import bits_async as bits
from bits_async import ErrorCode, JobPriority, JobState, LocalFileError, Token
from bits_async.files.part import PartFile
from bits_async.identity.threads import TokenExecutor
from bits_async.transport.ranges import Slice
from tests.windows.stage import stage

JOB = UUID("00112233445566778899aabbccddeeff")


@pytest.fixture
async def files() -> AsyncIterator[TokenExecutor]:
    executor = TokenExecutor(Token.for_process())
    yield executor
    await executor.aclose()


@pytest.fixture
async def part(files: TokenExecutor, tmp_path: Path) -> AsyncIterator[PartFile]:
    part = await PartFile.create(files, tmp_path / "file.iso", JOB)
    yield part
    await part.close()


async def test_a_part_file_becomes_the_file_with_its_time(part: PartFile, tmp_path: Path) -> None:
    await part.append(Slice.fresh(4), [b"efgh"])
    await part.append(Slice.fresh(0), [b"ab", b"cd"])
    assert await part.commit(mtime=1_700_000_000.5) == tmp_path / "file.iso"
    assert os.listdir(tmp_path) == ["file.iso"]
    assert (tmp_path / "file.iso").read_bytes() == b"abcdefgh"
    assert (tmp_path / "file.iso").stat().st_mtime == 1_700_000_000.5


async def test_others_may_look_at_it_while_it_is_written(part: PartFile) -> None:
    await part.append(Slice.fresh(0), [b"so far"])
    assert part.path.read_bytes() == b"so far"
    await part.append(Slice.fresh(6), [b", so good"])


async def test_a_file_that_is_there_is_replaced(part: PartFile, tmp_path: Path) -> None:
    (tmp_path / "file.iso").write_bytes(b"older, and longer than the new one")
    await part.append(Slice.fresh(0), [b"new"])
    await part.commit(mtime=None)
    assert (tmp_path / "file.iso").read_bytes() == b"new"


async def test_a_file_that_is_in_use_is_not_replaced_and_can_be_when_it_is_free(part: PartFile, tmp_path: Path) -> None:
    (tmp_path / "file.iso").write_bytes(b"in use")
    await part.append(Slice.fresh(0), [b"new"])
    with (tmp_path / "file.iso").open("rb"):
        with pytest.raises(LocalFileError, match="another program has the file open") as caught:
            await part.commit(mtime=None)
        assert caught.value.code == ErrorCode.ERROR_SHARING_VIOLATION
    await part.commit(mtime=None)
    assert (tmp_path / "file.iso").read_bytes() == b"new"


async def test_a_transfer_goes_on_in_the_part_file(files: TokenExecutor, tmp_path: Path) -> None:
    part = await PartFile.create(files, tmp_path / "file.iso", JOB)
    await part.append(Slice.fresh(0), [b"first half, "])
    await part.close()
    again = await PartFile.reopen(files, tmp_path / "file.iso", part.record)
    assert again is not None
    await again.append(Slice.fresh(12), [b"second half"])
    await again.commit(mtime=None)
    assert (tmp_path / "file.iso").read_bytes() == b"first half, second half"


async def test_a_queue_is_kept_over_a_restart(tmp_path: Path) -> None:
    store, path = tmp_path / "queue.db", tmp_path / "big"
    async with bits.BitsManager(store=store) as manager:
        job = await manager.create_job("restart", priority=JobPriority.FOREGROUND)
        await job.add_file(stage().url + "/pub/big?restart", path)
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        await job.set_no_progress_timeout(0)  # an error is told, and not waited out
        name = job.id
    async with bits.BitsManager(store=store) as manager:
        job = await manager.get_job(name)
        await job.resume()
        await job.wait()
        assert (job.state, job.error) == (JobState.TRANSFERRED, None)
        await job.complete()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == stage().sha256


async def test_a_journal_has_one_manager(tmp_path: Path) -> None:
    async with bits.BitsManager(store=tmp_path / "queue.db"):
        with pytest.raises(bits.StoreError, match="in use by another manager"):
            async with bits.BitsManager(store=tmp_path / "queue.db"):
                pass


async def test_passwords_are_sealed_in_the_journal(tmp_path: Path) -> None:
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await manager.create_job("sealed")
        await job.add_file(stage().url + "/basic/big", tmp_path / "big")
        await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.NTLM, "BITS\\alice", "sealed-password")
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert b"sealed-password" not in written
    assert "sealed-password".encode("utf-16-le") not in written


@pytest.mark.parametrize("name", ["queue.db.", "file.iso:stream", "nul", "file.iso "])
async def test_t13_a_destination_that_is_another_files_name_or_a_device_is_refused(tmp_path: Path, name: str) -> None:
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await manager.create_job("a job")
        with pytest.raises(bits.InvalidArgument, match="on Windows"):
            await job.add_file("https://files.example.test/file", tmp_path / name)
        assert job.files == ()
