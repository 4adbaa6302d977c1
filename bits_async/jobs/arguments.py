"""What a caller hands in, checked: files to add, flags, durations.

Nothing here looks at the disk or at a job.
"""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from ..errors import ErrorCode, InvalidArgument
from ..files.names import new_draft
from ..identity.tokens import HelperTokenFlags
from ..transport.answers import MAX_URL, check_url
from ..transport.digests import Digests
from ..transport.ranges import FileRange
from .model import MOST_SECONDS, CostFlags, FileRecord, JobPriority, NotifyFlags

if TYPE_CHECKING:
    from yarl import URL

StrPath = str | os.PathLike[str]

SIDE_BY_SIDE: Final = 64  # more than any server that is not asked first will bear
_NOT_IN_NAMES: Final = re.compile(r'[\x00-\x1f<>:"|?*]')
_DEVICE: Final = re.compile(r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[0-9\xb9\xb2\xb3]) *(?:\..*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file to add: from where, to where, and optionally the digests (hexadecimal) that it must have.

    `blake3` needs the extra of that name.
    """

    url: "str | URL"
    path: StrPath
    sha256: str | None = None
    sha512: str | None = None
    blake3: str | None = None

    def __init__(
        self, url: "str | URL", path: StrPath, *, sha256: str | None = None, sha512: str | None = None, blake3: str | None = None
    ) -> None:
        object.__setattr__(self, "url", url)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "sha256", sha256)
        object.__setattr__(self, "sha512", sha512)
        object.__setattr__(self, "blake3", blake3)


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A checked `FileInfo`: the URL as it is sent, an absolute path, digests in lower case."""

    url: str
    path: Path
    digests: Digests
    ranges: tuple[FileRange, ...] = ()


def checked_absolute(what: str, path: StrPath) -> Path:
    """A path that does not depend on where the process stands.

    Args:
        what: it is, for the message.

    Raises:
        InvalidArgument: it is not absolute.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text or not os.path.isabs(text):
        raise InvalidArgument(f"{what} is named by an absolute path")
    return Path(text)


def checked_own_file(what: str, path: StrPath) -> Path:
    """A file of the manager's, from wherever the process stands now.

    Args:
        what: it is, for the message.

    Raises:
        InvalidArgument: it cannot be a file's name.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text or text in ("", "."):
        raise InvalidArgument(f"{what} takes the path of a file, not {str(path) if isinstance(path, os.PathLike) else path!r}")
    return Path(os.path.abspath(text))


def checked_destination(path: StrPath) -> str:
    """A path that can be a file's. What ends with a slash is meant to be a directory, even if there is none yet.

    Raises:
        InvalidArgument: it can only be a directory's, is not text, has a NUL in it, or on Windows is no name that a file may have.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise InvalidArgument(f"a path is text or a pathlib.Path, not {type(path).__name__}")
    if "\0" in text:
        raise InvalidArgument("a path has no NUL character in it", path=text.replace("\0", "?"))
    if os.path.basename(text) in ("", ".", ".."):
        raise InvalidArgument("a destination names a file, not a directory", path=text)
    if sys.platform == "win32" and is_reserved_on_windows(os.path.basename(text)):
        raise InvalidArgument("on Windows this name means something other than a file that is called so", path=text)
    return text


def is_reserved_on_windows(name: str) -> bool:
    """Whether a file cannot be called so there: a device, a stream of another file, or dots and spaces that Windows drops, so that it is
    the name of another file (Microsoft Learn, "Naming Files, Paths, and Namespaces")."""
    return name != name.rstrip(". ") or _NOT_IN_NAMES.search(name) is not None or _DEVICE.fullmatch(name) is not None


def checked_file(file: FileInfo) -> CheckedFile:
    """An absolute path, a URL that can be fetched, digests that can be some.

    Raises:
        InvalidArgument: which of them is not; BLAKE3 where nothing computes it (BG_E_INVALID_HASH_ALGORITHM).
    """
    if not isinstance(file, FileInfo):
        raise InvalidArgument(f"files are given as FileInfo, not {type(file).__name__}")
    path = checked_destination(file.path)
    if not os.path.isabs(path):
        raise InvalidArgument("a job's destination is an absolute path", path=path)
    destination = Path(path)
    digests = Digests.checked(sha256=file.sha256, sha512=file.sha512, blake3=file.blake3)
    if digests.blake3 is not None and importlib.util.find_spec("blake3") is None:
        raise InvalidArgument(
            "nothing here computes BLAKE3", code=ErrorCode.BG_E_INVALID_HASH_ALGORITHM, advice="install bits-async[blake3]"
        )
    return CheckedFile(check_url(str(file.url)), destination, digests)


def file_record(job_id: UUID, index: int, file: CheckedFile) -> FileRecord:
    """The file as the journal begins to keep it: with a name for its part file, which the journal then knows before the file is made."""
    return FileRecord(
        job_id=job_id,
        index=index,
        original_url=file.url,
        url=file.url,
        path=file.path,
        digests=file.digests,
        ranges=file.ranges,
        draft=new_draft(),
    )


def replaced_prefix(url: str, old: str, new: str) -> str:
    """The URL with another beginning.

    Raises:
        InvalidArgument: what comes out cannot be fetched.
    """
    replaced = new + url[len(old) :]
    if len(replaced) > MAX_URL:
        raise InvalidArgument(f"the prefix makes a URL of more than {MAX_URL} characters")
    return check_url(replaced)


def checked_bool(name: str, value: bool) -> bool:
    """True or False, nothing that is merely like it."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} takes True or False, not {value!r}")
    return value


def checked_priority(priority: object) -> JobPriority:
    """A JobPriority.

    Raises:
        InvalidArgument: none; a number that is merely like one: E_NOTIMPL, as in BITS.
    """
    if isinstance(priority, JobPriority):
        return priority
    code = ErrorCode.E_NOTIMPL if isinstance(priority, int) else ErrorCode.E_INVALIDARG
    advice = f"use one of {', '.join(f'JobPriority.{each.name}' for each in JobPriority)}"
    raise InvalidArgument(f"a priority is a JobPriority, not {priority!r}", code=code, advice=advice)


def checked_helper_flags(flags: HelperTokenFlags) -> HelperTokenFlags:
    """HelperTokenFlags, not a number that is merely like them."""
    if not isinstance(flags, HelperTokenFlags):
        raise InvalidArgument(f"helper flags are HelperTokenFlags, not {flags!r}")
    return flags


def checked_notify_flags(flags: NotifyFlags) -> NotifyFlags:
    """At least one flag, or DISABLE alone.

    Raises:
        InvalidArgument: no NotifyFlags; a combination that means nothing (E_NOTIMPL).
    """
    if not isinstance(flags, NotifyFlags):
        raise InvalidArgument(f"notify flags are NotifyFlags, not {flags!r}")
    if not flags or (NotifyFlags.DISABLE in flags and flags is not NotifyFlags.DISABLE):
        message = "notify flags name what to tell of, or are DISABLE alone"
        raise InvalidArgument(message, code=ErrorCode.E_NOTIMPL, advice="use NotifyFlags.DISABLE to be told of nothing")
    return flags


def checked_connections(name: str, count: int) -> int:
    """How many connections to have side by side: a whole number from 1 to `SIDE_BY_SIDE`."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= SIDE_BY_SIDE:
        raise InvalidArgument(f"{name} takes a whole number from 1 to {SIDE_BY_SIDE}, not {count!r}")
    return count


def checked_text(name: str, text: str, most: int) -> str:
    """Text of so many characters at most.

    Raises:
        InvalidArgument: no text; too long (BG_E_STRING_TOO_LONG).
    """
    if not isinstance(text, str):
        raise InvalidArgument(f"{name} takes text, not {type(text).__name__}")
    if len(text) > most:
        raise InvalidArgument(f"{name} takes at most {most} characters", code=ErrorCode.BG_E_STRING_TOO_LONG)
    return text


def checked_seconds(name: str, value: float) -> float:
    """Seconds, from 0 to `MOST_SECONDS`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_SECONDS:
        raise InvalidArgument(f"{name} takes seconds, from 0 to {MOST_SECONDS:,}, not {value!r}")
    return float(value)


def checked_bandwidth(value: float | None) -> float | None:
    """Bytes per second, finite, more than 0; None: no limit."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise InvalidArgument(f"maximum_bandwidth takes bytes per second, more than 0, or None, not {value!r}")
    return float(value)


def checked_cost_flags(flags: CostFlags) -> CostFlags:
    """CostFlags with a cost among them: with none the job would never run."""
    if not isinstance(flags, CostFlags):
        raise InvalidArgument(f"cost flags are CostFlags, not {flags!r}")
    if not flags & CostFlags.TRANSFER_ALWAYS & ~CostFlags.IGNORE_CONGESTION:
        raise InvalidArgument("cost flags name at least one cost at which the job may run")
    return flags
