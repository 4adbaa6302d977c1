"""The Windows twin, as far as another system can run it: the same names, the same promises of the file calls."""

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bits_async import Token
from bits_async.errors import BitsError, ErrorCode, ImpersonationFailed
from bits_async.identity import native, win32, windows
from bits_async.identity.threads import in_own_thread

if sys.platform != "win32":
    from bits_async.identity import posix

TWINS = [windows] if sys.platform == "win32" else [posix]


def public_functions(module: Any) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(inspect.unwrap(value)) and not name.startswith("_") and value.__module__ == module.__name__
    }


@pytest.mark.posix
def test_the_twins_have_the_same_names() -> None:
    assert public_functions(posix) == public_functions(windows)
    for name in public_functions(posix):
        ours, theirs = (list(inspect.signature(getattr(module, name)).parameters) for module in (posix, windows))
        assert len(ours) == len(theirs), name


def test_the_twin_of_this_system_is_chosen() -> None:
    assert native.__name__.rpartition(".")[2] == ("windows" if sys.platform == "win32" else "posix")


@pytest.mark.parametrize("module", TWINS, ids=[twin.__name__.rpartition(".")[2] for twin in TWINS])
class TestFileCalls:
    """What both twins promise to the part file."""

    def test_a_file_is_made_written_renamed_and_removed(self, module: Any, tmp_path: Path) -> None:
        calls = module
        directory = calls.open_directory(tmp_path)
        file = calls.create_exclusive(directory, "part")
        assert calls.pwrite_all(file, [b"cd", b"", memoryview(b"ef")], 2) == 4
        assert calls.pwrite_all(file, [b"ab"], 0) == 2
        calls.preallocate(file, 0, 100)
        calls.set_mode(file, 0o644)
        calls.set_times(file, 10**18)
        calls.datasync(file)
        os.close(file)
        (tmp_path / "file").write_bytes(b"replaced")
        calls.rename_at(directory, "part", "file")
        calls.sync_directory(directory)
        found = calls.stat_at(directory, "file")
        assert (found.st_size, found.st_mtime_ns) == (6, 10**18)
        again = calls.open_existing(directory, "file")
        assert os.read(again, 100) == b"abcdef"
        os.close(again)
        calls.unlink_at(directory, "file")
        assert list(tmp_path.iterdir()) == []
        assert calls.max_name(directory) >= 14
        if isinstance(directory, int):
            os.close(directory)

    @pytest.mark.posix  # Wine 8 makes no links
    def test_no_link_is_opened(self, module: Any, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("file")
        directory = module.open_directory(tmp_path)
        with pytest.raises(OSError):
            module.open_existing(directory, "link")
        if isinstance(directory, int):
            os.close(directory)

    def test_what_is_there_is_not_made_again(self, module: Any, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        directory = module.open_directory(tmp_path)
        with pytest.raises(FileExistsError):
            module.create_exclusive(directory, "file")
        for name in ("", "..", "a/b"):
            with pytest.raises(OSError):
                module.stat_at(directory, name)
        if isinstance(directory, int):
            os.close(directory)

    def test_what_is_no_directory_is_refused(self, module: Any, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for name in ("file", "missing"):
            with pytest.raises(OSError):
                module.open_directory(tmp_path / name)

    def test_a_boot_has_one_name(self, module: Any) -> None:
        assert module.boot_id() == module.boot_id() != ""


@pytest.mark.parametrize("name", ["a\\b", "C:x", "file:stream", "nul\0"])
def test_names_of_windows_have_no_drive_and_no_stream(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        windows.create_exclusive(tmp_path, name)


def test_another_windows_user_is_refused_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    own = windows.Account("BITS\\alice", "S-1-5-21-1", False)
    monkeypatch.setattr(windows, "_account_of_process", lambda: own)
    for name in ("alice", "bits\\ALICE", "S-1-5-21-1"):
        assert windows.user_identity(name).is_process
    assert windows.process_identity().key == "S-1-5-21-1"
    for user in ("bob", 1000):
        with pytest.raises(ImpersonationFailed, match="comes from a logon"):
            windows.user_identity(user)


def test_a_thread_that_impersonates_is_not_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = windows.ProcessIdentity(windows.Account("alice", "S-1-5-21-1", False), False)
    identity.check()
    monkeypatch.setattr(windows, "_thread_impersonates", lambda: True)
    with pytest.raises(ImpersonationFailed, match="impersonating somebody else"):
        identity.check()


@pytest.mark.posix
async def test_access_tokens_are_windows_s_alone() -> None:
    for make in (lambda: Token.for_handle(4), lambda: in_own_thread(Token.for_thread)):
        with pytest.raises(BitsError, match="on Windows only") as caught:
            await make()
        assert caught.value.code == ErrorCode.E_NOTIMPL


@pytest.mark.posix
def test_calls_of_windows_load_nothing_elsewhere() -> None:
    assert len(win32.CALLS) > 20
    with pytest.raises(OSError, match="only Windows"):
        win32.process_token()
