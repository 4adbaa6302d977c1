"""The file calls: relative to a directory that was opened once, and as strict as they promise. T16 is tested here."""

import errno
import os
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from bits_async.identity import kernel, posix
from bits_async.identity.threads import run_as, wear
from bits_async.identity.tokens import Token
from tests.identity import child
from tests.local_users import LocalUser


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = posix.open_directory(tmp_path)
    yield fd
    os.close(fd)


@pytest.fixture
def file(directory: int) -> Iterator[int]:
    fd = posix.create_exclusive(directory, "part")
    yield fd
    os.close(fd)


def mode_of(fd: int) -> int:
    return stat.S_IMODE(os.fstat(fd).st_mode)


# -- directories


def test_a_directory_is_opened_for_this_process_alone(directory: int, tmp_path: Path) -> None:
    assert os.path.samestat(os.fstat(directory), tmp_path.stat())
    assert not os.get_inheritable(directory)


@pytest.mark.parametrize(("name", "number"), [("missing", errno.ENOENT), ("file", errno.ENOTDIR)])
def test_what_is_no_directory_is_refused(tmp_path: Path, name: str, number: int) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        posix.open_directory(tmp_path / name)
    assert caught.value.errno == number


def test_t15_magic_links_of_proc_are_not_followed(directory: int, tmp_path: Path) -> None:
    for path in (f"/proc/self/fd/{directory}", "/proc/self/cwd", "/proc/self/root/tmp"):
        with pytest.raises(OSError) as caught:
            posix.open_directory(path)
        assert caught.value.errno == errno.ELOOP


def test_t15_an_ordinary_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fd = posix.open_directory(tmp_path / "link")
    assert os.path.samestat(os.fstat(fd), (tmp_path / "real").stat())
    os.close(fd)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_without_openat2_opens_directories_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(number, "no such call")

    monkeypatch.setattr(kernel, "open_without_magic_links", refuse)
    fd = posix.open_directory(tmp_path)
    assert os.path.samestat(os.fstat(fd), tmp_path.stat())
    os.close(fd)


def test_t15_a_directory_that_is_swapped_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    fd = posix.open_directory(tmp_path / "in")
    (tmp_path / "in").rename(tmp_path / "was")
    (tmp_path / "in").symlink_to("elsewhere")
    os.close(posix.create_exclusive(fd, "part"))
    posix.rename_at(fd, "part", "file")
    os.close(fd)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert [path.name for path in (tmp_path / "was").iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../x", "nul\0"])
def test_t15_a_name_has_one_component(directory: int, name: str) -> None:
    for call in (posix.create_exclusive, posix.open_existing, posix.unlink_at, posix.stat_at):
        with pytest.raises(OSError) as caught:
            call(directory, name)
        assert caught.value.errno == errno.EINVAL
    for old, new in ((name, "x"), ("x", name)):
        with pytest.raises(OSError):
            posix.rename_at(directory, old, new)


def test_the_longest_name_is_told(directory: int) -> None:
    longest = posix.max_name(directory)
    os.close(posix.create_exclusive(directory, "x" * longest))
    with pytest.raises(OSError):
        posix.create_exclusive(directory, "x" * (longest + 1))


def test_names_are_made_durable(directory: int) -> None:
    posix.sync_directory(directory)


DROP_BOX = """
if os.geteuid() == 0:
    drop_to(65534)
path = sys.argv[1]
os.mkdir(path, 0o300)
fd = native.open_directory(path)
part = native.create_exclusive(fd, "part")
native.rename_at(fd, "part", "file")
native.sync_directory(fd)
print(native.max_name(fd), type(failure(os.listdir, path)).__name__)
native.unlink_at(fd, "file")
os.rmdir(path)
"""


def test_a_directory_that_may_be_written_but_not_listed_takes_files(world_dir: Path) -> None:
    world_dir.chmod(0o777)
    assert child.run(DROP_BOX, world_dir / "box") == "255 PermissionError\n"


# -- files


def test_t16_a_new_file_is_its_owners_alone_whatever_the_umask_is(directory: int) -> None:
    for number, umask in enumerate((0o000, 0o077, 0o777)):
        before = os.umask(umask)
        try:
            fd = posix.create_exclusive(directory, f"part{number}")
        finally:
            os.umask(before)
        assert mode_of(fd) == 0o600
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_t15_a_name_that_is_taken_is_not_opened(directory: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(FileExistsError):
            posix.create_exclusive(directory, name)
    assert not (tmp_path / "nowhere").exists()


def test_t15_an_existing_file_is_not_opened_through_a_link(directory: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("ours")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError) as caught:
        posix.open_existing(directory, "link")
    assert caught.value.errno == errno.ELOOP
    fd = posix.open_existing(directory, "file")
    assert os.read(fd, 10) == b"ours"
    os.close(fd)


def test_t15_a_fifo_in_its_place_does_not_hang(directory: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "part")
    fd = posix.open_existing(directory, "part")
    assert stat.S_ISFIFO(os.fstat(fd).st_mode)
    os.close(fd)


def test_t15_what_stands_under_a_name_is_told_of_the_name_itself(directory: int, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert stat.S_ISLNK(posix.stat_at(directory, "link").st_mode)
    posix.unlink_at(directory, "link")
    with pytest.raises(FileNotFoundError):
        posix.stat_at(directory, "link")


def test_chunks_land_at_their_place(file: int) -> None:
    assert posix.pwrite_all(file, [b"cd", b"", bytearray(b"e"), memoryview(b"fgh")], 2) == 6
    assert posix.pwrite_all(file, [b"ab"], 0) == 2
    assert posix.pwrite_all(file, [], 0) == 0
    posix.datasync(file)
    assert os.pread(file, 100, 0) == b"abcdefgh"


def test_more_chunks_than_the_kernel_takes_at_once(file: int) -> None:
    chunks = [bytes([n % 251]) * (n % 7) for n in range(5000)]
    posix.pwrite_all(file, chunks, 0)
    assert os.pread(file, 10**6, 0) == b"".join(chunks)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 100])
def test_short_writes_are_gone_on_with(file: int, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: os.pwrite(fd, b"".join(views)[:at_once], offset))
    assert posix.pwrite_all(file, [b"abc", b"d", b"efgh"], 1) == 8
    assert os.pread(file, 100, 0) == b"\0abcdefgh"


def test_a_file_system_that_takes_nothing_is_an_error(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: 0)
    with pytest.raises(OSError) as caught:
        posix.pwrite_all(file, [b"abc"], 0)
    assert caught.value.errno == errno.EIO


def test_room_is_reserved_without_changing_the_size(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "is_memory", lambda fd: False)
    posix.pwrite_all(file, [b"abc"], 0)
    assert posix.preallocate(file, 0, 1 << 20)
    found = os.fstat(file)
    assert found.st_size == 3
    assert found.st_blocks * 512 >= 1 << 20


def test_in_memory_nothing_is_reserved() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        assert not posix.preallocate(file.fileno(), 0, 1 << 20)
        assert os.fstat(file.fileno()).st_blocks == 0


@pytest.mark.parametrize(("number", "raised"), [(errno.EOPNOTSUPP, False), (errno.ENOSYS, False), (errno.ENOSPC, True)])
def test_only_a_full_disk_fails_the_reservation(file: int, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(kernel, "is_memory", lambda fd: False)
    monkeypatch.setattr(kernel, "allocate", refuse)
    if raised:
        with pytest.raises(OSError):
            posix.preallocate(file, 0, 10)
    else:
        assert not posix.preallocate(file, 0, 10)


def test_a_time_is_set_to_the_nanosecond(file: int) -> None:
    before = os.fstat(file).st_atime_ns
    posix.set_times(file, 1_234_567_890_123_456_789)
    assert (os.fstat(file).st_mtime_ns, os.fstat(file).st_atime_ns) == (1_234_567_890_123_456_789, before)


# -- T16


@pytest.mark.parametrize(("asked", "given"), [(0o644, 0o644), (0o600, 0o600), (0o666, 0o644), (0o777, 0o755), (0o6755, 0o755)])
def test_t16_a_file_is_never_writable_by_others_nor_setuid(file: int, asked: int, given: int) -> None:
    posix.set_mode(file, asked)
    assert mode_of(file) == given


def test_t16_the_umask_is_read_without_being_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)
        assert posix.process_umask() == 0o027
    finally:
        monkeypatch.undo()
        os.umask(before)


def test_t16_an_umask_that_cannot_be_read_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str = "") -> dict[bytes, bytes]:
        raise OSError(errno.ENOENT, "no /proc")

    monkeypatch.setattr(kernel, "status", refuse)
    assert posix.process_umask() == 0o077


def access_list(*entries: tuple[int, int, int]) -> bytes:
    """The kernel's form of an access list: version 2, then (tag, permissions, id)."""
    nobody = 0xFFFFFFFF
    return (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + (who if tag in (2, 8) else nobody).to_bytes(4, "little")
        for tag, bits, who in entries
    )


LIST = access_list((0x01, 6, 0), (0x02, 4, 4711), (0x04, 4, 0), (0x10, 4, 0), (0x20, 0, 0))  # user:4711:r--
ACL = "system.posix_acl_access"


def test_t16_a_replaced_files_access_list_is_kept(directory: int, file: int) -> None:
    old = posix.create_exclusive(directory, "old")
    os.setxattr(old, ACL, LIST)
    assert posix.copy_acl(old, file)
    assert os.getxattr(file, ACL) == LIST
    os.close(old)


def test_t16_a_replaced_file_without_an_access_list_passes_none_on(directory: int, file: int) -> None:
    old = posix.create_exclusive(directory, "old")
    os.setxattr(file, ACL, LIST)
    assert not posix.copy_acl(old, file)
    assert not posix.copy_acl(old, file)
    with pytest.raises(OSError) as caught:
        os.getxattr(file, ACL)
    assert caught.value.errno == errno.ENODATA
    os.close(old)


async def test_t16_for_the_processs_own_ids_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set_groups", "set_filesystem_ids", "drop_capabilities", "forbid_births", "own_working_directory"):
        monkeypatch.setattr(kernel, name, None)
    assert await run_as(Token.for_process(), os.geteuid) == os.geteuid()
    assert await run_as(await Token.for_user(os.geteuid()), threading.active_count)


@pytest.mark.privileged
async def test_t16_where_unshare_is_forbidden_identities_work_too(users: Mapping[str, LocalUser], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "own_working_directory", lambda: False)
    token = await Token.for_user("bitsalice")
    assert await run_as(token, kernel.fsuid) == users["bitsalice"].uid


@pytest.mark.privileged
async def test_t16_a_chdir_or_umask_in_a_token_thread_is_its_own(users: Mapping[str, LocalUser]) -> None:
    def wander() -> str:
        os.chdir(users["bitsalice"].home)
        os.umask(0o777)
        return os.getcwd()

    before = os.getcwd(), posix.process_umask()
    assert await run_as(await Token.for_user("bitsalice"), wander) == str(users["bitsalice"].home)
    assert (os.getcwd(), posix.process_umask()) == before


# -- identities


@pytest.mark.privileged
async def test_files_belong_to_the_user_and_the_users_rights_count(users: Mapping[str, LocalUser]) -> None:
    alice, bob = users["bitsalice"], users["bitsbob"]
    name = f"made-{os.getpid()}"

    def make(home: Path) -> os.stat_result:
        directory = posix.open_directory(home)
        try:
            file = posix.create_exclusive(directory, name)
            posix.pwrite_all(file, [b"data"], 0)
            posix.set_mode(file, 0o640)
            posix.datasync(file)
            os.close(file)
            posix.sync_directory(directory)
            found = posix.stat_at(directory, name)
            posix.unlink_at(directory, name)
            return found
        finally:
            os.close(directory)

    token = await Token.for_user(alice.name)
    found = await run_as(token, make, alice.home)
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_size) == (alice.uid, alice.gid, 0o640, 4)
    for home in (bob.home, Path("/root")):
        with pytest.raises(PermissionError):
            await run_as(token, make, home)
    assert not list(bob.home.glob("made-*"))


@pytest.mark.privileged
@pytest.mark.parametrize(
    ("call", "error"),
    [("set_groups", errno.EPERM), ("set_filesystem_ids", errno.EPERM), ("drop_capabilities", errno.EINVAL)],
)
async def test_a_thread_that_cannot_become_the_user_does_nothing(
    users: Mapping[str, LocalUser], monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    from bits_async.errors import ImpersonationFailed

    token = await Token.for_user("bitsalice")

    def refuse(*arguments: object) -> None:
        raise OSError(error, f"{call}: refused")

    monkeypatch.setattr(kernel, call, refuse)
    called: list[bool] = []
    with pytest.raises(ImpersonationFailed, match=f"cannot become bitsalice: {call}"):
        await run_as(token, called.append, True)
    assert called == []


@pytest.mark.privileged
@pytest.mark.parametrize("call", ["set_groups", "set_filesystem_ids", "drop_capabilities"])
async def test_a_kernel_that_says_yes_and_does_nothing_is_found_out(
    users: Mapping[str, LocalUser], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    from bits_async.errors import ImpersonationFailed

    token = await Token.for_user("bitsalice")
    monkeypatch.setattr(kernel, call, lambda *arguments: None)
    with pytest.raises(ImpersonationFailed):
        await wear(token.local, os.getpid)


def test_the_boot_has_a_name() -> None:
    assert posix.boot_id() == posix.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
