"""A finished part file gets its name, mode and time; what stood there is replaced, and nothing else anywhere is touched."""

import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bits_async.errors import ErrorCode, ErrorContext, LocalFileError
from bits_async.files.batches import FinishedPart, commit_parts
from bits_async.files.part import PartFile
from bits_async.identity import native
from bits_async.identity.threads import TokenExecutor
from tests.files.putting import JOB, open_below, write

ACL = "system.posix_acl_access"
DEFAULT_ACL = "system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
ALICE = 12345


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An access list as the kernel keeps it: (tag, permissions, id) each."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def shared_with_alice(mask: int) -> bytes:
    nobody = 0xFFFFFFFF
    return acl((USER_OBJ, 6, nobody), (USER, 6, ALICE), (GROUP_OBJ, 0, nobody), (MASK, mask, nobody), (OTHER, 0, nobody))


def entries(path: Path) -> dict[tuple[int, int], int]:
    value = os.getxattr(path, ACL)
    return {(tag, who): permissions for tag, permissions, who in struct.iter_unpack("<HHI", value[4:])}


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The process's umask for one test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


async def committed(files: TokenExecutor, destination: Path, *, mtime: float | None = None) -> Path:
    part = await PartFile.create(files, destination, JOB)
    await write(part, 0, [b"the new file"])
    path = await part.commit(mtime=mtime)
    assert part.committed
    assert part.path == path == destination
    await part.close()
    assert destination.stat().st_size == len(b"the new file")  # its mode may forbid reading it
    return path


# -- name and time -------------------------------------------------------------------------------------------------------------


async def test_commit_leaves_the_file_and_nothing_else(files: TokenExecutor, tmp_path: Path) -> None:
    await committed(files, tmp_path / "file", mtime=1_000_000_000.25)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"the new file"
    assert (tmp_path / "file").stat().st_mtime_ns == 1_000_000_000_250_000_000
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("mtime", [-1e30, 1e30, float("nan"), float("inf"), -86400.0, 0.0])
async def test_a_date_that_no_file_can_have_does_not_fail_the_download(files: TokenExecutor, tmp_path: Path, mtime: float) -> None:
    await committed(files, tmp_path / "file", mtime=mtime)


async def test_commit_replaces_an_existing_file_at_once(files: TokenExecutor, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"the old file, which somebody is reading")
    with open(tmp_path / "file", "rb") as reader:
        await committed(files, tmp_path / "file")
        assert reader.read() == b"the old file, which somebody is reading"


async def test_commit_replaces_a_link_and_not_what_it_leads_to(files: TokenExecutor, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "file").symlink_to("target")
    await committed(files, tmp_path / "file")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"kept"


async def test_after_commit_discard_keeps_the_file(part: PartFile) -> None:
    await write(part, 0, [b"whole"])
    path = await part.commit(mtime=None)
    await part.discard()
    assert path.read_bytes() == b"whole"


async def test_commit_may_be_called_again(part: PartFile) -> None:
    await write(part, 0, [b"whole"])
    assert await part.commit(mtime=None) == await part.commit(mtime=None)


async def test_bytes_are_durable_before_the_file_has_its_name_and_the_name_before_commit_returns(
    part: PartFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("datasync", "set_mode", "rename_at", "sync_directory"):

        def record(*args: object, _name: str = name, _func: object = getattr(native, name)) -> object:
            calls.append(_name)
            assert callable(_func)
            return _func(*args)

        monkeypatch.setattr(native, name, record)
    await part.commit(mtime=None)
    assert calls == ["datasync", "set_mode", "rename_at", "sync_directory"]


async def test_a_destination_that_became_a_directory_is_an_error_and_the_part_file_stays(part: PartFile, tmp_path: Path) -> None:
    await write(part, 0, [b"whole"])
    (tmp_path / "file.iso").mkdir()
    with pytest.raises(LocalFileError) as caught:
        await part.commit(mtime=None)
    assert caught.value.code == ErrorCode.ERROR_FILE_EXISTS
    assert part.path.read_bytes() == b"whole"
    (tmp_path / "file.iso").rmdir()
    await part.commit(mtime=None)
    assert (tmp_path / "file.iso").read_bytes() == b"whole"


# -- T16: modes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("umask", "expected"), [(0o022, 0o644), (0o000, 0o644), (0o027, 0o640), (0o077, 0o600), (0o777, 0o000)], indirect=["umask"]
)
async def test_t16_a_new_file_has_0644_less_the_umask(files: TokenExecutor, tmp_path: Path, umask: int, expected: int) -> None:
    await committed(files, tmp_path / "file")
    assert mode_of(tmp_path / "file") == expected
    assert os.umask(umask) == umask  # nobody has changed it


@pytest.mark.parametrize("umask", [0o022], indirect=True)
@pytest.mark.parametrize(
    ("before", "after"), [(0o600, 0o600), (0o640, 0o640), (0o666, 0o644), (0o6755, 0o644), (0o444, 0o444), (0o400, 0o400), (0, 0)]
)
async def test_t16_a_replaced_files_stricter_mode_is_kept_and_no_other(
    files: TokenExecutor, tmp_path: Path, umask: int, before: int, after: int
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(before)
    await committed(files, tmp_path / "file")
    assert mode_of(tmp_path / "file") == after


@pytest.mark.parametrize("umask", [0o022], indirect=True)
async def test_t16_a_link_says_nothing_about_the_mode(files: TokenExecutor, tmp_path: Path, umask: int) -> None:
    (tmp_path / "file").symlink_to("nowhere")
    await committed(files, tmp_path / "file")
    assert mode_of(tmp_path / "file") == 0o644


async def test_t16_the_part_file_is_private_whatever_the_directory_grants(files: TokenExecutor, tmp_path: Path) -> None:
    os.setxattr(tmp_path, DEFAULT_ACL, shared_with_alice(7))
    part = await PartFile.create(files, tmp_path / "file", JOB)
    assert mode_of(part.path) == 0o600
    assert entries(part.path)[MASK, 0xFFFFFFFF] == 0
    await part.discard()


@pytest.mark.parametrize("umask", [0o022], indirect=True)
async def test_t16_a_replaced_files_access_list_is_kept_but_grants_no_writing(files: TokenExecutor, tmp_path: Path, umask: int) -> None:
    (tmp_path / "file").write_bytes(b"old")
    os.setxattr(tmp_path / "file", ACL, shared_with_alice(6))
    await committed(files, tmp_path / "file")
    found = entries(tmp_path / "file")
    assert found[USER, ALICE] == 6
    assert found[MASK, 0xFFFFFFFF] == 4  # what alice really has is her entry and the mask
    assert found[GROUP_OBJ, 0xFFFFFFFF] == 0
    assert mode_of(tmp_path / "file") == 0o640


@pytest.mark.parametrize("umask", [0o022], indirect=True)
async def test_t16_a_replaced_file_without_an_access_list_gets_none_from_the_directory(
    files: TokenExecutor, tmp_path: Path, umask: int
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o640)
    os.setxattr(tmp_path, DEFAULT_ACL, shared_with_alice(7))
    await committed(files, tmp_path / "file")
    assert ACL not in os.listxattr(tmp_path / "file")
    assert mode_of(tmp_path / "file") == 0o640


@pytest.mark.parametrize("umask", [0o027], indirect=True)
async def test_t16_an_access_list_that_cannot_be_kept_gives_the_group_nothing(
    files: TokenExecutor, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    os.setxattr(tmp_path / "file", ACL, shared_with_alice(6))

    def refuse(*_: object) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(native, "copy_acl", refuse)
    await committed(files, tmp_path / "file")
    assert mode_of(tmp_path / "file") == 0o600


# -- T15: others at work -------------------------------------------------------------------------------------------------------


async def test_t15_a_directory_swapped_for_a_link_in_mid_transfer_changes_nothing_elsewhere(files: TokenExecutor, tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"precious")
    part = await PartFile.create(files, home / "file", JOB)
    await write(part, 0, [b"first"])
    home.rename(tmp_path / "moved")
    home.symlink_to(elsewhere)
    (elsewhere / part.record.name).write_bytes(b"a trap")
    await write(part, 5, [b"second"])
    await part.sync()
    with pytest.raises(LocalFileError) as caught:
        await part.commit(mtime=None)
    assert caught.value.code == ErrorCode.BG_E_LOCAL_FILE_CHANGED
    assert caught.value.context is ErrorContext.LOCAL_FILE
    assert caught.value.path == home / "file"
    assert (tmp_path / "moved" / part.record.name).read_bytes() == b"firstsecond"
    await part.discard()
    assert os.listdir(tmp_path / "moved") == []
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {"file": b"precious", part.record.name: b"a trap"}


async def test_t15_a_replaced_part_file_is_never_put_in_place(part: PartFile, tmp_path: Path) -> None:
    (tmp_path / "file.iso").write_bytes(b"old")
    part.path.rename(tmp_path / "kept")
    part.path.write_bytes(b"forged")
    with pytest.raises(LocalFileError) as caught:
        await part.commit(mtime=None)
    assert caught.value.code == ErrorCode.BG_E_LOCAL_FILE_CHANGED
    assert (tmp_path / "file.iso").read_bytes() == b"old"
    assert not part.committed


async def test_t15_a_removed_part_file_is_an_error(part: PartFile, tmp_path: Path) -> None:
    part.path.unlink()
    with pytest.raises(LocalFileError):
        await part.commit(mtime=None)
    assert os.listdir(tmp_path) == []


async def test_t15_after_the_rename_the_destination_must_be_our_file(
    part: PartFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody swaps the part file between our last look and the rename."""
    rename = native.rename_at

    def swap_and_rename(directory: int, old: str, new: str) -> None:
        os.rename(tmp_path / old, tmp_path / "stolen")
        (tmp_path / old).write_bytes(b"forged")
        rename(directory, old, new)

    monkeypatch.setattr(native, "rename_at", swap_and_rename)
    with pytest.raises(LocalFileError) as caught:
        await part.commit(mtime=None)
    assert caught.value.code == ErrorCode.BG_E_LOCAL_FILE_CHANGED
    assert not part.committed


async def test_t15_a_link_to_the_part_file_at_the_destination_is_replaced_like_any_file(part: PartFile, tmp_path: Path) -> None:
    (tmp_path / "file.iso").hardlink_to(part.path)
    await write(part, 0, [b"whole"])
    await part.commit(mtime=None)
    assert os.listdir(tmp_path) == ["file.iso"]


# -- a crash -------------------------------------------------------------------------------------------------------------------


async def test_a_process_that_dies_in_commit_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    program = """
import asyncio, os, pathlib, sys, uuid
from bits_async.files.batches import FinishedPart, commit_parts
from bits_async.files.part import PartFile
from bits_async.identity import native
from bits_async.identity.threads import TokenExecutor
from bits_async.identity.tokens import Token
from bits_async.transport.ranges import Slice
setattr(native, sys.argv[2], lambda *args: os._exit(7))
async def main():
    files = TokenExecutor(Token.for_process())
    part = await PartFile.create(files, pathlib.Path(sys.argv[1]), uuid.uuid4())
    await part.append(Slice.fresh(0, None), [b"new"])
    await part.commit(mtime=0.0)
asyncio.run(main())
"""
    for call, expected in (("set_times", b"old"), ("set_mode", b"old"), ("rename_at", b"old"), ("sync_directory", b"new")):
        (tmp_path / "file").write_bytes(b"old")
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "file"), call], check=False, timeout=30)
        assert done.returncode == 7
        assert (tmp_path / "file").read_bytes() == expected


# -- many at once


async def finished(files: TokenExecutor, *destinations: Path, mtime: float | None = None) -> list[FinishedPart]:
    found = []
    for destination in destinations:
        part = await PartFile.create(files, destination, JOB)
        await write(part, 0, [b"the new file"])
        await part.close()
        found.append(FinishedPart(destination, part.record, mtime))
    return found


async def test_many_files_get_their_names_in_one_hop_and_each_directory_is_synced_once(
    files: TokenExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "0").write_bytes(b"yesterday's")
    (tmp_path / "0").chmod(0o640)
    destinations = [*(tmp_path / str(number) for number in range(5)), tmp_path / "other/5"]
    parts = await finished(files, *destinations, mtime=1e9)
    synced: list[int] = []
    sync, hops, run = native.sync_directory, list[str](), files.run
    monkeypatch.setattr(native, "sync_directory", lambda fd: (synced.append(os.fstat(fd).st_ino), sync(fd))[1])
    monkeypatch.setattr(files, "run", lambda func, *args: (hops.append("hop"), run(func, *args))[1])
    assert await commit_parts(files, parts) == 6
    assert [(path.read_bytes(), path.stat().st_mtime) for path in destinations] == [(b"the new file", 1e9)] * 6
    assert mode_of(destinations[0]) == 0o640
    assert sorted(synced) == sorted([tmp_path.stat().st_ino, (tmp_path / "other").stat().st_ino])
    assert hops == ["hop"]
    assert len(list(tmp_path.iterdir())) == 6, "no part file is left"


@pytest.mark.parametrize("wrong", ["the part file is gone", "the destination is a directory"])
async def test_many_files_stop_at_the_first_with_which_something_is_wrong(files: TokenExecutor, tmp_path: Path, wrong: str) -> None:
    destinations = [tmp_path / str(number) for number in range(4)]
    parts = await finished(files, *destinations)
    if wrong == "the part file is gone":
        parts[2].record.path.unlink()
    else:
        destinations[2].mkdir()
    assert await commit_parts(files, parts) == 2
    assert [path.is_file() for path in destinations] == [True, True, False, False]
    assert await commit_parts(files, parts[3:]) == 1


async def test_many_files_of_which_nobody_knows_whether_they_are_durable_do_not_count(
    files: TokenExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    parts = await finished(files, tmp_path / "0", tmp_path / "1")
    monkeypatch.setattr(native, "sync_directory", broken)
    assert await commit_parts(files, parts) == 0


async def test_t15_files_that_went_into_a_directory_that_was_moved_away_meanwhile_are_not_said_to_be_where_they_were_asked_for(
    files: TokenExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    parts = await finished(files, *(place / str(number) for number in range(3)))
    rename, times = native.rename_at, list[str]()

    def swapped(directory: int, old: str, new: str) -> None:
        rename(directory, old, new)
        times.append(new)
        if len(times) == 1:
            place.rename(tmp_path / "away")
            place.mkdir()
            (place / "1").write_bytes(b"somebody else's")

    monkeypatch.setattr(native, "rename_at", swapped)
    assert await commit_parts(files, parts) == 0
    assert (place / "1").read_bytes() == b"somebody else's"
