"""Where a user's transfers keep their state, the lock on the destination of a `download()`, and the file of group policy."""

import hashlib
from pathlib import Path
from typing import Final, final

from ..errors import (
    ErrorCode,
    ErrorContext,
    InvalidArgument,
    LocalFileError,
    StoreError,
    make_error,
    scrub,
)
from ..identity.threads import TokenExecutor, TokenExecutors
from ..identity.tokens import Token
from ..identity.trusted import read_trusted
from .policies import GroupPolicy
from .secrets import guard_directory, os_fault, release_lock, take_lock

STATE_ADVICE: Final = "set HOME or XDG_STATE_HOME to a directory where this user may write"


@final
class OneShot:
    """What tells the manager of one `download()` from a queue: a lock on the destination, and perhaps a journal of its own.

    Args:
        destination: what is locked.
        journal: the one that the caller named; None: a private one. The lock stands in the user's state directory, where every
            transfer of the user looks; where that cannot be used, and a journal was named, beside the journal.
    """

    def __init__(self, destination: Path, journal: Path | None) -> None:
        self.private = journal is None
        self._destination = destination
        self._journal = journal
        self._path: Path | None = None
        self._lock: int | None = None

    async def claim(self, files: TokenExecutor) -> None:
        """Lock the destination against other transfers of this user, in this process or another.

        Raises:
            LocalFileError: another transfer holds it (BG_E_DESTINATION_LOCKED).
        """
        try:
            await files.run(self._take)
        except StoreError as error:
            if error.code == ErrorCode.ERROR_SHARING_VIOLATION:
                raise locked(self._destination) from None
            raise

    def _take(self) -> None:
        name = f"{_digest(str(self._destination))}.lock"
        try:
            directory = state_directory() / "downloads"
            make_state_directories(directory)
            self._lock_at(directory / name)
        except StoreError as error:
            if self._journal is None or error.code == ErrorCode.ERROR_SHARING_VIOLATION:
                raise
            guard_directory(self._journal.parent)
            self._lock_at(self._journal.with_name(f"{self._journal.name}.{name}"))

    def _lock_at(self, path: Path) -> None:
        self._lock, self._path = take_lock(path, path), path  # kept by the thread: a cancelled claim is given back too

    async def release(self, executors: TokenExecutors) -> None:
        """Give the destination back."""
        if self._lock is not None and self._path is not None:
            lock, self._lock = self._lock, None
            with executors.lease(Token.for_process(), "files") as files:
                await files.run(release_lock, lock, self._path, remove=True)


def locked(path: Path) -> LocalFileError:
    """Another transfer to that path is running."""
    error = make_error(
        ErrorCode.BG_E_DESTINATION_LOCKED, ErrorContext.LOCAL_FILE, "another transfer to this destination is running", path=path
    )
    assert isinstance(error, LocalFileError)
    return error


def default_store() -> Path:
    """The journal of the user's own queue."""
    return state_directory() / "queue.db"


def private_store(owner: Token, path: Path) -> Path:
    """The journal of `download()` for one owner and one destination."""
    return state_directory() / "downloads" / f"{_digest(owner.sid, str(path))}.db"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def state_directory() -> Path:
    """Of this user.

    Raises:
        StoreError: the user has none.
    """
    import platformdirs

    try:
        return platformdirs.user_state_path("bits_async", appauthor=False)
    except RuntimeError:  # no HOME, and a user whom the user database does not know
        code = ErrorCode.ERROR_PATH_NOT_FOUND
        raise StoreError("this user has no home directory for the state of transfers", code=code, advice=STATE_ADVICE) from None


def make_state_directories(path: Path) -> None:
    """Make a directory and those above it that are missing, each for its owner only, whatever the umask is.

    Raises:
        StoreError: one cannot be made.
    """
    for each in [*reversed(path.parents), path]:
        try:
            each.mkdir(0o700)
        except FileExistsError:
            pass
        except OSError as exc:
            fault = os_fault(exc, each, "make the directory for")
            raise StoreError(fault.message, code=fault.code, transient=False, path=each, advice=STATE_ADVICE) from scrub(exc)


def read_policy(path: Path) -> GroupPolicy:
    """The group policy of a TOML file. What others may write is nobody's policy (T27).

    Raises:
        LocalFileError: it cannot be read. AccessDenied: somebody else than root or this user may write it. InvalidArgument: see
            `GroupPolicy.from_toml`.
    """
    try:
        return GroupPolicy.from_toml(read_trusted(path, "the group policy"))
    except InvalidArgument as error:
        raise error.located(path=path) from None
