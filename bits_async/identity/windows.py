"""Windows: who a thread is, and the file calls that its identity is checked on. The twin of `posix`, with the same names.

Identities: an access token, held by a handle of our own (an impersonation token, duplicated from whatever it was got from) and worn by
    a thread from birth to death (ImpersonateLoggedOnUser). What a thread really wears is read back at its birth and compared at every use:
    Windows makes a token that a process may not impersonate into one of level IDENTIFY, and says nothing. The process's own identity
    is worn by doing nothing. A token's groups and powers are those of its logon; they stay until it is closed.

File calls: names of one component in a directory. A directory "descriptor" is the directory's path here, because Windows has no calls
    relative to a directory.

Seen under Wine 8 with the Windows CPython (`make test-windows`): the calls, a token per thread and its check, the file calls. Never
seen anywhere, because Wine cannot show it, and this was never run on a real Windows:

    * that a thread which wears a token may open what its user may open, and no more: to Wine every file is the one Unix user's;
    * a second user: LogonUser of Wine answers every password with one handle that is no token, WTSQueryUserToken every session with the
      process's own; that they are called as documented is all that is shown;
    * that a link in a part file's place is not followed: Wine makes no links that Windows would know;
    * IDENTIFY in place of IMPERSONATE for a process without SeImpersonatePrivilege, tokens limited by UAC, sessions and their ends.
"""

import contextlib
import errno
import os
import sys
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from ..errors import ImpersonationFailed, scrub, show_text
from . import win32
from .tokens import ImpersonationLevel

# -- accounts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Account:
    """What Windows says of an access token."""

    name: str
    sid: str
    elevated: bool  # TokenElevation
    integrity: int = win32.HIGH_INTEGRITY  # the RID of the mandatory label
    elevation_type: str = "default"  # "full" and "limited": the two tokens of an administrator under UAC
    session: int = 0


def is_elevated(account: Account) -> bool:
    """The one place that decides it: a fact of the access token (T10).

    A process that lowered its integrity, so as to be harmless, has no administrator's powers whatever its groups are.
    """
    return account.elevated and account.integrity >= win32.HIGH_INTEGRITY


POWERS_ARE_THE_TOKENS: Final = True
"""One administrator has two tokens under UAC, with his powers and without."""


def _account(facts: win32.Facts) -> Account:
    kind = win32.ELEVATION_TYPES.get(facts.elevation_type, "default")
    return Account(facts.name, facts.sid, facts.elevated, facts.integrity, kind, facts.session)


def _refused(what: str, exc: OSError, identity: str | None = None) -> ImpersonationFailed:
    why = show_text(exc.strerror or type(exc).__name__)
    number = win32.code_of(exc)
    return ImpersonationFailed(f"{what}: {why}{f' ({number})' if number else ''}", identity=identity)


# -- identities -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """The process's own: nothing is set or restored to wear it."""

    account: Account
    elevated: bool
    is_process: bool = True

    @property
    def name(self) -> str:
        return self.account.name

    @property
    def key(self) -> str:
        return self.account.sid

    def assume(self) -> None:
        self.check()

    def check(self) -> None:
        """A thread that somebody else made impersonate is not the process (T1)."""
        if _thread_impersonates():
            raise ImpersonationFailed(
                f"a thread of {self.name} was found impersonating somebody else",
                identity=self.name,
                advice="something in this process impersonates in threads that are not its own",
            )

    def fresh(self) -> "ProcessIdentity":
        return self

    def close(self) -> None:
        pass


class _Wearing(threading.local):
    """What the calling thread put on."""

    worn: win32.Worn | None = None


_wearing: Final = _Wearing()


@dataclass(frozen=True, slots=True, eq=False)
class TokenIdentity:
    """Whoever an access token is about, worn by a thread from birth to death.

    The handle is closed with the last reference to this object: several tokens may share it.
    """

    account: Account
    elevated: bool
    logon: int  # the logon session: a handle that was closed and given out anew names another
    handle: win32.TokenHandle = field(repr=False)
    is_process: bool = False

    @classmethod
    def of(cls, handle: win32.TokenHandle) -> "TokenIdentity":
        """Of an impersonation token, whose handle it keeps. Blocks: a domain controller may be asked for the name. Raises OSError."""
        found = win32.facts(handle)
        account = _account(found)
        return cls(account, is_elevated(account), found.logon, handle)

    @property
    def name(self) -> str:
        return self.account.name

    @property
    def key(self) -> str:
        return self.account.sid

    def assume(self) -> None:
        try:
            win32.impersonate(self.handle)
            worn = _worn_by_thread()
            if worn is None or worn.logon != self.logon or _sid_of_thread() != self.account.sid:
                raise ImpersonationFailed(f"a thread that should be {self.name} is not", identity=self.name)
        except OSError as exc:
            raise _refused(f"cannot become {self.name}", exc, self.name) from scrub(exc)
        if worn.level < ImpersonationLevel.IMPERSONATE.value:
            raise ImpersonationFailed(
                f"cannot become {self.name}: Windows lets this process identify, but not impersonate",
                identity=self.name,
                advice='give its account the right "Impersonate a client after authentication" (SeImpersonatePrivilege)',
            )
        _wearing.worn = worn

    def check(self) -> None:
        """Three calls, microseconds: every use of an identity pays this twice (T1)."""
        try:
            worn = _worn_by_thread()
        except OSError as exc:
            raise _refused(f"nobody can say who a thread of {self.name} is", exc, self.name) from scrub(exc)
        if worn is None or worn != _wearing.worn or worn.logon != self.logon:
            who = "the process" if worn is None else "somebody else"
            raise ImpersonationFailed(
                f"a thread of {self.name} was found as {who}",
                identity=self.name,
                advice="something in this process called RevertToSelf or impersonated in threads that are not its own",
            )

    def fresh(self) -> "TokenIdentity":
        return self  # an access token is what it was at the logon, until it is closed

    def close(self) -> None:
        pass  # several tokens may share this identity: the handle goes with the last of them


def process_identity() -> ProcessIdentity:
    """The identity of the running process."""
    account = _account_of_process()
    return ProcessIdentity(account, is_elevated(account))


def process_key() -> object:
    """A process keeps its access token for life."""
    return "process"


def user_identity(user: str | int) -> ProcessIdentity:
    """The identity of a user by name or SID: the process's own, or a refusal. Windows makes nobody of a name alone."""
    own = process_identity()
    if isinstance(user, str) and user.casefold() in _names_of(own.account):
        return own
    raise ImpersonationFailed(
        f"cannot become {show_text(str(user))}: on Windows another user's token comes from a logon, not from a name",
        identity=str(user),
        advice="use logon_user(), Token.for_session() or Token.for_handle()",
    )


def is_system_account(local: ProcessIdentity | TokenIdentity) -> bool:
    """LocalSystem, LocalService, NetworkService, and a machine's or domain's own Administrator ([MS-DTYP] 2.4.2.4)."""
    return local.account.sid in ("S-1-5-18", "S-1-5-19", "S-1-5-20") or local.account.sid.endswith("-500")


def _names_of(account: Account) -> frozenset[str]:
    return frozenset({account.sid.casefold(), account.name.casefold(), account.name.rpartition("\\")[2].casefold()})


def _account_of_process() -> Account:
    try:
        return _account(win32.facts(win32.process_token()))
    except OSError as exc:
        raise _refused("cannot read the process's own token", exc) from scrub(exc)


def _worn_by_thread() -> win32.Worn | None:
    token = win32.thread_token()
    if token is None:
        return None
    try:
        return win32.worn(token)
    finally:
        token.close()


def _sid_of_thread() -> str:
    token = win32.thread_token()
    return "" if token is None else win32.sid_of(token)


def _thread_impersonates() -> bool:
    try:
        return _worn_by_thread() is not None
    except OSError:
        return sys.platform == "win32"  # there it wears something that cannot even be looked at


# -- directories ------------------------------------------------------------------------------------------------------


def open_directory(path: str | os.PathLike[str]) -> Path:
    """The directory's full path, once it is known to be one."""
    directory = Path(path).resolve(strict=True)
    if not directory.is_dir():
        raise NotADirectoryError(20, "not a directory", str(directory))
    return directory


def sync_directory(directory: Path) -> None:
    """NTFS journals names itself."""


def max_name(directory: Path) -> int:
    """How many characters a name may have."""
    return 255


def _in(directory: Path, name: str) -> Path:
    """A name of one component: no separator, no drive, no stream."""
    if not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise OSError(22, "not a plain file name", name)
    return directory / name


def rename_at(directory: Path, old: str, new: str) -> None:
    """Renames within the directory; replaces what is there, unless another program has it open: OSError EBUSY."""
    target = _in(directory, new)
    try:
        os.replace(_in(directory, old), target)
    except PermissionError:  # what Windows says then too
        if not win32.in_use(str(target)):
            raise
    else:
        return
    raise OSError(errno.EBUSY, "another program has the file open", str(target))


def unlink_at(directory: Path, name: str) -> None:
    """Removes a name from the directory."""
    os.unlink(_in(directory, name))


def stat_at(directory: Path, name: str) -> os.stat_result:
    """What stands under the name itself: a link is not followed."""
    return os.stat(_in(directory, name), follow_symlinks=False)


# -- files ------------------------------------------------------------------------------------------------------------


def create_exclusive(directory: Path, name: str) -> int:
    """A new file; raises FileExistsError when anything has the name."""
    return win32.open_file(str(_in(directory, name)), new=True)


def open_existing(directory: Path, name: str) -> int:
    """Opens a file to go on with it; a link in its place is refused."""
    return win32.open_file(str(_in(directory, name)), new=False)


DONTCACHE: Final = 0
"""No write here bypasses the system's cache."""

_position: Final = threading.Lock()  # it is the descriptor's: threads that write two ranges of one file must not move it for each other


def pwrite_all(fd: int, chunks: Sequence[bytes | bytearray | memoryview], offset: int, flags: int = 0) -> int:
    """Writes all chunks one after the other at the offset. Returns the bytes written."""
    start = offset
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while len(view):
                written = os.write(fd, view)
                view = view[written:]
                offset += written
    return offset - start


class Splicer:
    """Windows moves no bytes from a socket into a file by itself: `splicer` never gives one."""

    def move(self, source: int, target: int, offset: int, count: int) -> int:
        """Never called."""
        raise NotImplementedError

    def close(self) -> None:
        """Never called."""


def splicer() -> Splicer | None:
    """None: the bytes pass through this program."""
    return None


def write_back(fd: int, offset: int, length: int) -> None:
    """Left to the system."""


def datasync(fd: int) -> None:
    """Makes the file's bytes durable."""
    os.fsync(fd)


def preallocate(fd: int, offset: int, length: int) -> bool:
    """Not done: Windows reserves room only by changing the file's size."""
    return False


def room(fd: int) -> int | None:
    """Not known of a descriptor."""
    return None


def set_mode(fd: int, mode: int) -> None:
    """Access lists come from the directory; permission bits mean nothing here."""


def set_times(fd: int, mtime_ns: int) -> None:
    """Sets the time of modification, where the system lets a descriptor do it."""
    if os.utime in os.supports_fd:
        os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))
    elif sys.platform == "win32":
        win32.set_modification_time(fd, mtime_ns)


def copy_acl(from_fd: int, to_fd: int) -> bool:
    """A file that replaces another keeps the list it inherited from the directory."""
    return False


# -- the machine ------------------------------------------------------------------------------------------------------


def process_umask() -> int:
    """Permission bits mean nothing here."""
    return 0o022


@cache
def boot_id() -> str:
    """Names this boot of the machine by the time it began; where that is unknown, this process."""
    with contextlib.suppress(OSError):
        import time

        return f"boot-{round((time.time() * 1000 - win32.milliseconds_up()) / 60000)}"
    return str(uuid.uuid4())
