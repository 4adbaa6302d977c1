"""A part file is made, found again, and thrown away; a name in the directory is nobody's promise."""

import errno
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bits_async.errors import ErrorCode, ErrorContext, InvalidState, LocalFileError
from bits_async.files.leftovers import committed_length, discard_part
from bits_async.files.part import PartFile
from bits_async.files.records import PartRecord
from bits_async.identity.threads import TokenExecutor
from bits_async.identity.tokens import Token
from tests.files.putting import JOB, open_below, write


async def refused(files: TokenExecutor, destination: Path) -> LocalFileError:
    """The error of `create`, after making sure that it left nothing."""
    before = sorted(os.listdir(destination.parent)) if destination.parent.is_dir() else None
    with pytest.raises(LocalFileError) as caught:
        await PartFile.create(files, destination, JOB)
    assert (sorted(os.listdir(destination.parent)) if destination.parent.is_dir() else None) == before
    error = caught.value
    assert error.context is ErrorContext.LOCAL_FILE
    assert error.path == destination
    assert error.identity == files.token.name
    assert open_below(destination.parent) == []
    return error


# -- making --------------------------------------------------------------------------------------------------------------------


async def test_a_new_part_file_is_private_and_beside_its_destination(part: PartFile, tmp_path: Path) -> None:
    found = part.path.stat()
    assert part.path.parent == tmp_path
    assert part.path.name.startswith(f".file.iso.{JOB.hex}.")
    assert part.path.name.endswith(".bits-part")
    assert (stat.S_IMODE(found.st_mode), found.st_size, found.st_uid) == (0o600, 0, os.geteuid())
    where = tmp_path.stat()
    record = part.record
    uid = os.geteuid()
    inodes = (where.st_dev, where.st_ino, found.st_dev, found.st_ino)
    assert record == PartRecord(str(tmp_path), part.path.name, *inodes, uid, f"uid:{uid}")
    assert record.path == part.path
    assert not (tmp_path / "file.iso").exists()


async def test_two_part_files_of_one_job_and_destination_have_different_names(files: TokenExecutor, tmp_path: Path) -> None:
    one = await PartFile.create(files, tmp_path / "x", JOB)
    two = await PartFile.create(files, tmp_path / "x", JOB)
    assert one.path != two.path
    await one.discard()
    assert two.path.exists()
    await two.discard()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("n" * 255, id="longest"),
        pytest.param("é" * 127, id="two bytes a character"),
        pytest.param("x" + "é" * 127, id="two bytes, odd"),
        pytest.param("😀" * 63, id="four bytes a character"),
        pytest.param("a" + "😀" * 63, id="four bytes, one off"),
        pytest.param("ab" + "😀" * 63, id="four bytes, two off"),
        pytest.param("line\nbreak\x1b", id="control characters"),
        pytest.param(os.fsdecode(b"latin-\xe9" + b"\xff" * 240), id="not UTF-8"),
    ],
)
async def test_part_names_fit_the_directory_and_are_text(files: TokenExecutor, tmp_path: Path, name: str) -> None:
    part = await PartFile.create(files, tmp_path / name, JOB)
    await write(part, 0, [b"x"])
    assert part.record.name in os.listdir(tmp_path)
    assert len(os.fsencode(part.record.name)) <= 255
    part.record.name.encode("utf-8")  # the journal keeps it as text
    assert await part.commit(mtime=None) == tmp_path / name
    assert os.listdir(tmp_path) == [name]
    await part.close()


async def test_a_short_name_is_told_whole(files: TokenExecutor, tmp_path: Path) -> None:
    part = await PartFile.create(files, tmp_path / "größe.txt", JOB)
    assert part.path.name.startswith(f".größe.txt.{JOB.hex}.")
    await part.discard()


async def test_a_missing_directory_is_a_local_file_error(files: TokenExecutor, tmp_path: Path) -> None:
    error = await refused(files, tmp_path / "missing" / "file")
    assert error.code == ErrorCode.ERROR_PATH_NOT_FOUND
    assert "No such file or directory" in str(error)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == errno.ENOENT


async def test_a_file_in_place_of_the_directory_is_a_local_file_error(files: TokenExecutor, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert (await refused(files, tmp_path / "file" / "x")).code == ErrorCode.ERROR_PATH_NOT_FOUND


async def test_a_destination_that_is_a_directory_is_refused_before_any_byte(files: TokenExecutor, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert (await refused(files, tmp_path / "there")).code == ErrorCode.ERROR_FILE_EXISTS


async def test_a_destination_that_links_to_a_directory_is_refused(files: TokenExecutor, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert (await refused(files, tmp_path / "link")).code == ErrorCode.ERROR_FILE_EXISTS


@pytest.mark.parametrize("destination", ["/", "/tmp/.."])
async def test_a_destination_without_a_name_is_refused(files: TokenExecutor, destination: str) -> None:
    with pytest.raises(LocalFileError):
        await PartFile.create(files, Path(destination), JOB)


async def test_a_destination_that_is_a_pipe_is_never_replaced(files: TokenExecutor, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert (await refused(files, tmp_path / "pipe")).code == ErrorCode.ERROR_FILE_EXISTS


async def test_a_name_that_is_too_long_fails_before_the_download(files: TokenExecutor, tmp_path: Path) -> None:
    assert (await refused(files, tmp_path / ("n" * 256))).code == ErrorCode.ERROR_FILENAME_EXCED_RANGE


async def test_a_path_with_a_null_character_opens_nothing_else(files: TokenExecutor, tmp_path: Path) -> None:
    with pytest.raises(LocalFileError) as caught:
        await PartFile.create(files, Path(f"{tmp_path}\0/etc/file"), JOB)
    assert caught.value.code == ErrorCode.E_INVALIDARG
    assert os.listdir(tmp_path) == []


async def test_t15_a_directory_is_not_opened_through_a_magic_link(files: TokenExecutor, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(LocalFileError):
            await PartFile.create(files, Path(f"/proc/self/fd/{fd}/file"), JOB)
    finally:
        os.close(fd)
    assert os.listdir(tmp_path) == []


# -- finding again -------------------------------------------------------------------------------------------------------------


async def left_behind(files: TokenExecutor, destination: Path, data: bytes = b"0123456789") -> PartRecord:
    part = await PartFile.create(files, destination, JOB)
    await write(part, 0, [data])
    await part.close()
    return part.record


async def test_a_part_file_goes_on_where_it_was_left(files: TokenExecutor, tmp_path: Path) -> None:
    record = await left_behind(files, tmp_path / "file")
    part = await PartFile.reopen(files, tmp_path / "file", record)
    assert part is not None
    assert part.record == record
    assert await part.length() == 10
    await write(part, 10, [b"abc"])
    await part.close()
    assert record.path.read_bytes() == b"0123456789abc"


async def test_a_missing_part_file_means_start_anew(files: TokenExecutor, tmp_path: Path) -> None:
    record = await left_behind(files, tmp_path / "file")
    record.path.unlink()
    assert await PartFile.reopen(files, tmp_path / "file", record) is None
    assert open_below(tmp_path) == []


def by_symlink(name: Path, other: Path) -> None:
    name.symlink_to(other)


def by_hardlink(name: Path, other: Path) -> None:
    name.hardlink_to(other)


def by_fifo(name: Path, other: Path) -> None:
    os.mkfifo(name)


def by_directory(name: Path, other: Path) -> None:
    name.mkdir()


def by_another_file(name: Path, other: Path) -> None:
    name.write_bytes(b"another ")


@pytest.mark.parametrize("replace_part", [by_symlink, by_hardlink, by_fifo, by_directory, by_another_file])
async def test_t15_a_part_file_replaced_by_something_else_is_neither_used_nor_unlinked(
    files: TokenExecutor, tmp_path: Path, replace_part: object
) -> None:
    record = await left_behind(files, tmp_path / "file")
    precious = tmp_path / "precious"
    precious.write_bytes(b"do not touch")
    record.path.rename(tmp_path / "kept")  # so that its inode number is not given to the replacement
    assert callable(replace_part)
    replace_part(record.path, precious)
    before = record.path.lstat()
    assert await PartFile.reopen(files, tmp_path / "file", record) is None
    assert not await discard_part(files, tmp_path / "file", record)
    assert (record.path.lstat().st_ino, record.path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert precious.read_bytes() == b"do not touch"
    assert open_below(tmp_path) == []


async def test_t15_a_part_file_that_became_a_link_to_itself_is_not_used(files: TokenExecutor, tmp_path: Path) -> None:
    record = await left_behind(files, tmp_path / "file")
    record.path.rename(tmp_path / "moved")
    record.path.symlink_to("moved")
    assert await PartFile.reopen(files, tmp_path / "file", record) is None
    assert (tmp_path / "moved").exists()


async def test_t15_a_part_file_with_a_second_link_is_not_used(files: TokenExecutor, tmp_path: Path) -> None:
    record = await left_behind(files, tmp_path / "file")
    (tmp_path / "second").hardlink_to(record.path)
    assert await PartFile.reopen(files, tmp_path / "file", record) is None
    assert sorted(os.listdir(tmp_path)) == sorted([record.name, "second"])


async def test_t15_a_part_file_that_others_may_write_is_not_used(files: TokenExecutor, tmp_path: Path) -> None:
    record = await left_behind(files, tmp_path / "file")
    record.path.chmod(0o606)
    assert await PartFile.reopen(files, tmp_path / "file", record) is None


async def test_t15_another_owner_in_the_record_means_start_anew(files: TokenExecutor, tmp_path: Path) -> None:
    record = await left_behind(files, tmp_path / "file")
    assert record.uid is not None
    assert await PartFile.reopen(files, tmp_path / "file", replace(record, uid=record.uid + 1)) is None


async def test_t15_another_directory_under_the_same_path_means_start_anew(files: TokenExecutor, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    record = await left_behind(files, home / "file")
    home.rename(tmp_path / "old")
    home.mkdir()
    (home / record.name).hardlink_to(tmp_path / "old" / record.name)
    assert await PartFile.reopen(files, home / "file", record) is None
    assert not await discard_part(files, home / "file", record)
    assert os.listdir(home) == os.listdir(tmp_path / "old") == [record.name]


async def test_a_directory_that_cannot_be_opened_is_an_error_and_not_a_reason_to_start_anew(files: TokenExecutor, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    record = await left_behind(files, home / "file")
    home.rename(tmp_path / "unmounted")
    with pytest.raises(LocalFileError) as caught:
        await PartFile.reopen(files, home / "file", record)
    assert caught.value.code == ErrorCode.ERROR_PATH_NOT_FOUND
    (tmp_path / "unmounted").rename(home)
    part = await PartFile.reopen(files, home / "file", record)
    assert part is not None
    await part.close()


# -- throwing away -------------------------------------------------------------------------------------------------------------


async def test_discard_deletes_the_part_file_and_closes_it(part: PartFile, tmp_path: Path) -> None:
    await write(part, 0, [b"x"])
    await part.discard()
    await part.discard()
    await part.close()
    assert os.listdir(tmp_path) == []
    assert open_below(tmp_path) == []


async def test_after_discard_every_use_is_a_local_file_error(part: PartFile, tmp_path: Path) -> None:
    await part.start_digest(["sha256"], 0)
    await part.discard()
    uses = [
        write(part, 0, [b"x"]),
        part.length(),
        part.sync(),
        part.truncate(0),
        part.start_digest(["sha256"], 5),
        part.digest("sha256"),
        part.commit(mtime=None),
    ]
    for use in uses:
        with pytest.raises(LocalFileError) as caught:
            await use
        assert caught.value.path == tmp_path / "file.iso"
    assert os.listdir(tmp_path) == []


async def test_t15_discard_leaves_what_has_taken_the_name(part: PartFile, tmp_path: Path) -> None:
    part.path.rename(tmp_path / "moved")
    part.path.write_bytes(b"not ours")
    await part.discard()
    assert part.path.read_bytes() == b"not ours"
    assert (tmp_path / "moved").exists()


async def test_t17_discard_part_deletes_what_the_record_names(files: TokenExecutor, tmp_path: Path) -> None:
    record = await left_behind(files, tmp_path / "file")
    assert await discard_part(files, tmp_path / "file", record)
    assert os.listdir(tmp_path) == []
    assert await discard_part(files, tmp_path / "file", record)  # gone is gone
    assert open_below(tmp_path) == []


async def test_t17_discard_part_is_done_when_the_directory_is_gone(files: TokenExecutor, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    record = await left_behind(files, home / "file")
    record.path.unlink()
    home.rmdir()
    assert await discard_part(files, home / "file", record)


async def test_t17_no_finalizer_touches_a_path(tmp_path: Path) -> None:
    """Neither garbage collection nor the end of the interpreter deletes or renames anything."""
    program = """
import asyncio, gc, pathlib, sys, uuid
from bits_async.files.part import PartFile
from bits_async.identity.threads import TokenExecutor
from bits_async.identity.tokens import Token
from bits_async.transport.ranges import Slice
async def main():
    files = TokenExecutor(Token.for_process())
    part = await PartFile.create(files, pathlib.Path(sys.argv[1]), uuid.uuid4())
    await part.append(Slice.fresh(0, None), [b"kept"])
    del part
    gc.collect()
    part = await PartFile.create(files, pathlib.Path(sys.argv[1]), uuid.uuid4())
    await part.append(Slice.fresh(0, None), [b"kept"])
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=True, timeout=30)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"kept", b"kept"]


async def test_a_part_file_that_was_renamed_before_the_journal_knew_is_found(files: TokenExecutor, tmp_path: Path) -> None:
    destination = tmp_path / "file"
    part = await PartFile.create(files, destination, JOB)
    await write(part, 0, [b"whole"])
    assert await committed_length(files, destination, part.record) is None
    await part.commit(mtime=None)
    await part.close()
    assert await PartFile.reopen(files, destination, part.record) is None
    assert await committed_length(files, destination, part.record) == 5
    destination.rename(tmp_path / "kept")
    destination.write_bytes(b"other")
    assert await committed_length(files, destination, part.record) is None
    assert open_below(tmp_path) == []


async def test_a_closed_executor_is_a_local_file_error_and_its_descriptors_can_be_closed(token: Token, tmp_path: Path) -> None:
    files = TokenExecutor(token)
    part = await PartFile.create(files, tmp_path / "file", JOB)
    await files.aclose()
    with pytest.raises(LocalFileError):
        await write(part, 0, [b"x"])
    with pytest.raises(LocalFileError):
        await part.length()
    await part.close()
    assert open_below(tmp_path) == []
    assert part.path.exists()


async def test_a_digest_nobody_asked_for_is_an_invalid_state(part: PartFile) -> None:
    with pytest.raises(InvalidState):
        await part.digest("sha256")
