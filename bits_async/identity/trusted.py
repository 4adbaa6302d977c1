"""Files that say what is to be done: they count only if nobody but root and the user who reads them may write them (T27).

Everything here blocks, and is called by a thread of the identity that asks.
"""

import os
import stat
import sys
from pathlib import Path
from typing import Final

from ..errors import AccessDenied, InvalidArgument, error_from_os, make_error, scrub

LARGEST: Final = 1 << 20  # bytes


def read_trusted(path: str | os.PathLike[str], what: str) -> str:
    """The text of such a file. `what` it is: "a group policy".

    Raises:
        LocalFileError: it cannot be read. AccessDenied: somebody else may write it. InvalidArgument: no file, too large, or not UTF-8.
    """
    name = Path(path)
    try:
        return _read(name, what).decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"{what} is not UTF-8", path=name) from None
    except OSError as exc:
        error = error_from_os(exc, path=name, identity=None)
        message, advice = f"cannot read {what}: {exc.strerror or type(exc).__name__}", "name a file that this user may read"
        raise make_error(error.code, error.context, message, path=name, advice=advice) from scrub(exc)


def _read(path: Path, what: str) -> bytes:
    file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        _check(os.fstat(file), path, what)
        return os.read(file, LARGEST)
    finally:
        os.close(file)


def _check(found: os.stat_result, path: Path, what: str) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
        raise InvalidArgument(f"{what} is a file of at most {LARGEST >> 20} MiB", path=path)
    if sys.platform != "win32" and (found.st_uid not in (0, _reader()) or found.st_mode & 0o022):
        message = f"{what} may be written by others than root and the user who reads it"
        raise AccessDenied(message, path=path, advice="chown it to root or that user, and chmod go-w")


def _reader() -> int:
    """The user whom this thread opens files as."""
    if sys.platform != "linux":
        return os.geteuid()
    from . import kernel

    return kernel.fsuid()
