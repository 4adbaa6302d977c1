"""Files belong to the token's user, and no user reaches another's files through us."""

import errno
import os
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bits_async.errors import ErrorCode, ErrorContext, LocalFileError
from bits_async.files.leftovers import discard_part
from bits_async.files.part import PartFile
from bits_async.identity import native
from bits_async.identity.threads import TokenExecutor
from bits_async.identity.tokens import Token
from tests.files.putting import JOB, Put, open_below, write
from tests.files.test_part_commit import ACL, shared_with_alice
from tests.local_users import LocalUser

pytestmark = pytest.mark.privileged

Users = Mapping[str, LocalUser]


@asynccontextmanager
async def acting_as(user: LocalUser) -> AsyncIterator[TokenExecutor]:
    executor = TokenExecutor(await Token.for_user(user.name))
    try:
        yield executor
    finally:
        await executor.aclose()


@pytest.fixture
async def alice(users: Users) -> AsyncIterator[TokenExecutor]:
    async with acting_as(users["bitsalice"]) as executor:
        yield executor


@pytest.fixture
async def bob(users: Users) -> AsyncIterator[TokenExecutor]:
    async with acting_as(users["bitsbob"]) as executor:
        yield executor


def make_directory(path: Path, mode: int, uid: int = 0, gid: int = 0) -> Path:
    path.mkdir()
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


async def test_a_file_in_a_users_own_directory_belongs_to_that_user(alice: TokenExecutor, users: Users, put: Put) -> None:
    user = users["bitsalice"]
    destination = user.home / "file"
    part = await PartFile.create(alice, destination, JOB)
    assert user.owns(part.path)
    assert part.record.uid == user.uid
    await put(part, 0, b"0123456789")
    await part.commit(mtime=1.0)
    await part.close()
    found = destination.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_mtime) == (user.uid, user.gid, 0o644, 1.0)
    destination.unlink()
    assert open_below(user.home) == []


async def test_a_directory_of_somebody_else_is_refused_and_nothing_is_created_there(alice: TokenExecutor, users: Users) -> None:
    destination = users["bitsbob"].home / "file"
    before = sorted(os.listdir(destination.parent))
    with pytest.raises(LocalFileError) as caught:
        await PartFile.create(alice, destination, JOB)
    error = caught.value
    assert (error.code, error.context) == (ErrorCode.E_ACCESSDENIED, ErrorContext.LOCAL_FILE)
    assert (error.path, error.identity) == (destination, "bitsalice")
    assert sorted(os.listdir(destination.parent)) == before
    assert open_below(destination.parent) == []


async def test_a_directory_that_may_be_read_but_not_written_is_refused(alice: TokenExecutor, world_dir: Path) -> None:
    home = make_directory(world_dir / "home", 0o755)
    with pytest.raises(LocalFileError) as caught:
        await PartFile.create(alice, home / "file", JOB)
    assert caught.value.code == ErrorCode.E_ACCESSDENIED
    assert os.listdir(home) == []


async def test_a_directory_that_becomes_unwritable_leaves_the_part_file_for_later(
    alice: TokenExecutor, users: Users, world_dir: Path
) -> None:
    user = users["bitsalice"]
    home = make_directory(world_dir / "home", 0o700, user.uid, user.gid)
    part = await PartFile.create(alice, home / "file", JOB)
    await write(part, 0, [b"whole"])
    home.chmod(0o500)
    for refused in (part.commit(mtime=None), part.discard()):
        with pytest.raises(LocalFileError) as caught:
            await refused
        assert caught.value.code == ErrorCode.E_ACCESSDENIED
    assert os.listdir(home) == [part.record.name]
    home.chmod(0o700)
    again = await PartFile.reopen(alice, home / "file", part.record)
    assert again is not None
    await again.commit(mtime=None)
    await again.close()
    assert (home / "file").read_bytes() == b"whole"


async def test_a_drop_box_that_cannot_be_listed_can_be_filled(alice: TokenExecutor, world_dir: Path) -> None:
    box = make_directory(world_dir / "box", 0o1733)
    part = await PartFile.create(alice, box / "file", JOB)
    await write(part, 0, [b"x"])
    await part.close()
    again = await PartFile.reopen(alice, box / "file", part.record)
    assert again is not None
    await again.commit(mtime=None)
    await again.close()
    assert os.listdir(box) == ["file"]


async def test_t17_nobody_else_deletes_a_part_file(alice: TokenExecutor, bob: TokenExecutor, users: Users, world_dir: Path) -> None:
    user = users["bitsalice"]
    home = make_directory(world_dir / "home", 0o755, user.uid, user.gid)
    part = await PartFile.create(alice, home / "file", JOB)
    await part.close()
    with pytest.raises(LocalFileError) as caught:
        await discard_part(bob, home / "file", part.record)
    assert (caught.value.code, caught.value.identity) == (ErrorCode.E_ACCESSDENIED, "bitsbob")
    assert part.path.exists()
    assert await discard_part(alice, home / "file", part.record)


async def test_t17_not_even_root_deletes_or_goes_on_with_the_part_file_of_a_user(
    alice: TokenExecutor, files: TokenExecutor, users: Users, world_dir: Path
) -> None:
    user = users["bitsalice"]
    home = make_directory(world_dir / "home", 0o755, user.uid, user.gid)
    part = await PartFile.create(alice, home / "file", JOB)
    await part.close()
    with pytest.raises(LocalFileError) as caught:
        await discard_part(files, home / "file", part.record)
    assert caught.value.code == ErrorCode.E_ACCESSDENIED
    assert await PartFile.reopen(files, home / "file", part.record, allow_shared_directory=True) is None
    assert part.path.exists()
    assert await discard_part(alice, home / "file", part.record)


# -- T15: a privileged token where others could swap the file ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "owner"),
    [
        pytest.param(0o777, None, id="everybody may write"),
        pytest.param(0o703, None, id="everybody else may write"),
        pytest.param(0o775, "group", id="a group may write"),
        pytest.param(0o755, "bitsalice", id="of another user"),
        pytest.param(0o500, "bitsalice", id="of another user, who may change that"),
        pytest.param(0o1777, "bitsalice", id="sticky, of another user"),
    ],
)
async def test_t15_a_privileged_token_writes_only_where_nobody_else_could_swap_the_file(
    files: TokenExecutor, users: Users, world_dir: Path, mode: int, owner: str | None
) -> None:
    uid = users[owner].uid if owner in users else 0
    gid = users["bitsalice"].gid if owner == "group" else 0
    home = make_directory(world_dir / "home", mode, uid, gid)
    with pytest.raises(LocalFileError) as caught:
        await PartFile.create(files, home / "file", JOB)
    error = caught.value
    assert (error.code, error.context) == (ErrorCode.ERROR_DIRECTORY, ErrorContext.LOCAL_FILE)
    assert (error.path, error.identity) == (home / "file", "root")
    assert os.listdir(home) == []
    part = await PartFile.create(files, home / "file", JOB, allow_shared_directory=True)
    await part.close()
    with pytest.raises(LocalFileError):
        await PartFile.reopen(files, home / "file", part.record)
    again = await PartFile.reopen(files, home / "file", part.record, allow_shared_directory=True)
    assert again is not None
    await again.discard()


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777, 0o775])
async def test_t15_a_privileged_token_writes_in_its_own_and_in_sticky_directories(files: TokenExecutor, world_dir: Path, mode: int) -> None:
    home = make_directory(world_dir / "home", mode)  # 0775: the group is root's own
    part = await PartFile.create(files, home / "file", JOB)
    await part.discard()


async def test_t15_a_privileged_token_does_not_follow_a_link_of_another_user(files: TokenExecutor, world_dir: Path) -> None:
    only_roots = make_directory(world_dir / "etc", 0o700)
    home = make_directory(world_dir / "home", 0o755, 20001, 20001)
    os.symlink(only_roots, home / "out")
    os.lchown(home / "out", 20001, 20001)
    for there in (home / "out", home / "out" / ".." / "etc"):
        with pytest.raises(LocalFileError) as caught:
            await PartFile.create(files, there / "file", JOB)
        assert caught.value.code == ErrorCode.ERROR_DIRECTORY
        assert "uid 20001" in caught.value.message
    assert os.listdir(only_roots) == open_below(world_dir) == []
    part = await PartFile.create(files, home / "out" / "file", JOB, allow_shared_directory=True)
    await part.close()
    with pytest.raises(LocalFileError):
        await PartFile.reopen(files, home / "out" / "file", part.record)


async def test_t15_a_privileged_token_follows_links_that_nobody_else_made(files: TokenExecutor, world_dir: Path) -> None:
    make_directory(world_dir / "etc", 0o700)
    os.symlink("etc", world_dir / "relative")
    os.symlink(world_dir / "relative", world_dir / "absolute")
    part = await PartFile.create(files, world_dir / "absolute" / "file", JOB)
    await part.discard()
    os.symlink("round", world_dir / "round")
    with pytest.raises(LocalFileError):
        await PartFile.create(files, world_dir / "round" / "file", JOB)


async def test_t15_a_list_that_lets_others_write_is_seen_behind_the_own_group(files: TokenExecutor, world_dir: Path) -> None:
    home = make_directory(world_dir / "home", 0o700)
    os.setxattr(home, ACL, shared_with_alice(7))
    assert home.stat().st_gid == 0
    with pytest.raises(LocalFileError):
        await PartFile.create(files, home / "file", JOB)


async def test_t15_an_ordinary_user_may_write_in_a_shared_directory(alice: TokenExecutor, world_dir: Path) -> None:
    home = make_directory(world_dir / "home", 0o777)
    part = await PartFile.create(alice, home / "file", JOB)
    await part.discard()


async def test_t15_a_part_file_given_to_another_user_is_not_used(files: TokenExecutor, users: Users, world_dir: Path) -> None:
    part = await PartFile.create(files, world_dir / "file", JOB)
    await part.close()
    os.chown(part.path, users["bitsalice"].uid, -1)
    assert await PartFile.reopen(files, world_dir / "file", part.record) is None


async def test_t15_a_user_who_swaps_the_directory_gets_nothing_of_root_written_elsewhere(
    files: TokenExecutor, users: Users, world_dir: Path
) -> None:
    user = users["bitsalice"]
    home = make_directory(world_dir / "home", 0o755, user.uid, user.gid)
    precious = make_directory(world_dir / "precious", 0o700)
    (precious / "file").write_bytes(b"root's")
    part = await PartFile.create(files, home / "file", JOB, allow_shared_directory=True)
    await write(part, 0, [b"from the network"])
    home.rename(world_dir / "moved")
    home.symlink_to(precious)
    with pytest.raises(LocalFileError):
        await part.commit(mtime=None)
    await part.discard()
    assert [path.name for path in precious.iterdir()] == ["file"]
    assert (precious / "file").read_bytes() == b"root's"
    assert os.listdir(world_dir / "moved") == []


# -- T16: modes and lists that strangers wrote ---------------------------------------------------------------------------------


async def test_t16_a_strangers_access_list_is_not_taken_over(files: TokenExecutor, users: Users, world_dir: Path) -> None:
    """Where everybody may make files, the destination may be a bait."""
    box = make_directory(world_dir / "box", 0o1777)
    (box / "file").write_bytes(b"bait")
    os.setxattr(box / "file", ACL, shared_with_alice(6))
    os.chown(box / "file", users["bitsbob"].uid, 0)
    part = await PartFile.create(files, box / "file", JOB)
    await part.commit(mtime=None)
    await part.close()
    assert ACL not in os.listxattr(box / "file")
    assert stat.S_IMODE((box / "file").stat().st_mode) == 0o600
    assert (box / "file").stat().st_uid == 0


async def test_t16_another_group_gets_no_more_than_everybody(files: TokenExecutor, users: Users, world_dir: Path) -> None:
    home = make_directory(world_dir / "home", 0o755)
    (home / "file").write_bytes(b"old")
    os.chown(home / "file", 0, users["bitsalice"].gid)
    (home / "file").chmod(0o640)
    part = await PartFile.create(files, home / "file", JOB)
    await part.commit(mtime=None)
    await part.close()
    found = (home / "file").stat()
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0o600)


async def test_t16_a_file_that_the_user_could_not_read_is_not_replaced_by_one_that_others_can(
    alice: TokenExecutor, users: Users, world_dir: Path
) -> None:
    user = users["bitsalice"]
    home = make_directory(world_dir / "home", 0o700, user.uid, user.gid)
    (home / "file").write_bytes(b"root's, with a list that alice cannot read")
    os.chown(home / "file", 0, user.gid)
    os.setxattr(home / "file", ACL, shared_with_alice(6))
    part = await PartFile.create(alice, home / "file", JOB)
    await part.commit(mtime=None)
    await part.close()
    assert user.owns(home / "file")
    assert stat.S_IMODE((home / "file").stat().st_mode) == 0o600


async def test_t16_a_rename_that_fails_leaves_a_part_file_that_its_user_can_open_again(
    alice: TokenExecutor, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = users["bitsalice"].home / "read-only"
    destination.write_bytes(b"old")
    os.chown(destination, users["bitsalice"].uid, users["bitsalice"].gid)
    destination.chmod(0o400)
    part = await PartFile.create(alice, destination, JOB)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(native, "rename_at", fail)
        with pytest.raises(LocalFileError):
            await part.commit(mtime=None)
    await part.close()
    again = await PartFile.reopen(alice, destination, part.record)
    assert again is not None
    await again.commit(mtime=None)
    await again.close()
    assert stat.S_IMODE(destination.stat().st_mode) == 0o400
    destination.unlink()
