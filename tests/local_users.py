"""Real users of this machine, made for the tests and removed after them.

Runs of the tests may overlap, and a run may have been killed: the users are marked by their GECOS field, taken over where
they exist, shared, and removed by the last run that used them.
"""

import fcntl
import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.left_out import find_program

NAMES = ("bitsalice", "bitsbob", "bitshelper")
MARK = "made by the tests of bits_async"
RANGE = (20001, 29999)
TOOLS = ("useradd", "usermod", "userdel", "groupadd", "groupmod", "groupdel", "gpasswd", "chage", "passwd", "chpasswd", "vipw")


@dataclass(frozen=True)
class LocalUser:
    """A user with a home directory (0700) and no password."""

    name: str
    uid: int
    gid: int
    home: Path

    def owns(self, path: Path) -> bool:
        return path.lstat().st_uid == self.uid


@contextmanager
def local_users() -> Iterator[Mapping[str, LocalUser]]:
    """The users, while the `with` block runs."""
    with _lock_file("use") as use:
        with changing_accounts():
            fcntl.flock(use, fcntl.LOCK_SH)
            for name in NAMES:
                _make(name)
        try:
            yield {name: _read(name) for name in NAMES}
        finally:
            with changing_accounts():
                if _is_last(use):
                    for name in NAMES:
                        _remove(name)


@contextmanager
def _lock_file(purpose: str) -> Iterator[int]:
    path = Path(tempfile.gettempdir()) / f"bits-async-test-users.{purpose}"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield lock
    finally:
        os.close(lock)


@contextmanager
def changing_accounts() -> Iterator[None]:
    """Only one process of the tests at a time changes the user database, or finds out what is in it to change.

    The tools wait for one another for some seconds only; and nobody removes users that another has just found to exist.
    """
    with _lock_file("change") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _break_stale_locks()
        yield


def _break_stale_locks() -> None:
    """A tool that was killed leaves its lock, which others keep to as long as there is a process of that number, whatever it is."""
    for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid"):
        lock = Path(f"/etc/{name}.lock")
        try:
            holder = Path(f"/proc/{int(lock.read_text().rstrip(chr(0)))}/comm").read_text().strip()
        except FileNotFoundError:
            holder = ""
        except ValueError:
            continue  # being written
        if not holder or holder not in TOOLS:
            lock.unlink(missing_ok=True)


def _is_last(use: int) -> bool:
    try:
        fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _exists(name: str) -> bool:
    try:
        return pwd.getpwnam(name).pw_gecos.startswith(MARK)
    except KeyError:
        return False


def _read(name: str) -> LocalUser:
    entry = pwd.getpwnam(name)
    return LocalUser(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def _make(name: str) -> None:
    if _exists(name) and _read(name).home.is_dir():
        return
    if _exists(name):
        _remove(name)
    low, high = RANGE
    ids = [f"{kind}_{end}={value}" for kind in ("UID", "GID") for end, value in (("MIN", low), ("MAX", high))]
    options = [option for value in ids for option in ("-K", value)]
    _run("useradd", *options, "--user-group", "--create-home", "--shell", "/usr/sbin/nologin", "--comment", MARK, name)
    _read(name).home.chmod(0o700)


def _remove(name: str) -> None:
    if _exists(name):
        _run("userdel", "--remove", "--force", name)


def _run(*command: str) -> None:
    program = find_program(command[0]) or command[0]
    done = subprocess.run([program, *command[1:]], text=True, capture_output=True, check=False)
    if done.returncode not in (0, 12):  # 12: userdel could not remove the home directory or mail spool
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


@contextmanager
def own_user() -> Iterator[LocalUser]:
    """A user of this test alone, whose account it may change."""
    name = f"bitsown{os.getpid()}"
    with changing_accounts():
        _make(name)
    try:
        yield _read(name)
    finally:
        with changing_accounts():
            _remove(name)


def change_account(name: str, *options: str) -> None:
    """usermod(8), while nobody else changes the user database."""
    with changing_accounts():
        _run("usermod", *options, name)


def remove_account(name: str) -> None:
    """The account is gone."""
    with changing_accounts():
        _remove(name)
