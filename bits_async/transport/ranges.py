"""Which bytes of which version: slices of a remote file, the requests that fetch them, and what pins the version.

Pure arithmetic and text. Knows no connection and no local file; positions are absolute offsets in the remote file, and every
`end` is exclusive (only the text of a header counts inclusively). Where a job names ranges of a file, the local file is these,
one after the other; slices then count in it, and `locate` says where a position of it is in the remote file.

A version is pinned by a strong ETag, else by Last-Modified together with the size. A weak ETag promises equal meaning, not
equal bytes, so it never proves that two answers are the same file; it may prove that they are not.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import pairwise
from typing import Final, Self, TypeGuard

from ..errors import ErrorCode, InvalidArgument
from .digests import NO_DIGESTS, Digests

MAX_REQUEST: Final = 2 * 1024**3
"""One request asks for the rest of the file, but for no more than this; BITS never asks for more either."""

ENTITY_TAG: Final = re.compile(r'(W/)?"([\x21\x23-\x7e]{1,1000})"')  # an empty one, or one outside ASCII, pins nothing
_CONTENT_RANGE: Final = re.compile(r"bytes[ ]+(?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19}|\*)", re.IGNORECASE)


# -- the version -----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)  # of many small files the dates are few
def http_date(text: str | None) -> datetime | None:
    """An HTTP date as an aware UTC datetime; None when there is none or it is none."""
    if not text or len(text) > 64:
        return None
    try:
        date = parsedate_to_datetime(text)
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class Validator:
    """What pins one version of a remote file: texts as the server wrote them, and the size as far as known.

    Attributes:
        etag, last_modified: the fields.
        size: bytes of the file.
        digests: of the whole file, where the server gives them.
        media_type: what it came as, in lower case and without parameters. It pins nothing; it tells a login page from the file.
    """

    etag: str | None = None
    last_modified: str | None = None
    size: int | None = None
    digests: Digests = NO_DIGESTS
    media_type: str | None = field(default=None, compare=False)

    @property
    def strong(self) -> str | None:
        """The ETag where it is strong, well formed and not empty; else None."""
        match = ENTITY_TAG.fullmatch(self.etag or "")
        return self.etag if match and not match[1] else None

    @property
    def modified(self) -> datetime | None:
        """Last-Modified as a date (aware, UTC)."""
        return http_date(self.last_modified)

    @property
    def resumable(self) -> bool:
        """Whether a later answer can be proved to be of this version. If not, the file is fetched in one piece or anew."""
        return self.if_range() is not None

    def if_range(self) -> str | None:
        """The value of `If-Range`: the strong ETag, else Last-Modified as the server wrote it; None: nothing pins this version.

        RFC 9110 (8.8.2.2) wants a date to be a second older than the answer it came with before it counts as strong. That can
        only be
        seen when the answer arrives: `answers.validator_of` leaves a date out that is too fresh.
        """
        return self.strong or (self.last_modified if self.modified else None)

    def agrees(self, other: "Validator") -> bool:
        """Whether `other` is proved to be the same version as this, the pinned one.

        Different sizes, digests or ETags (weak comparison) never agree. Two strong ETags decide, and so does a digest. Otherwise
        Last-Modified and the size must be the same, and nothing that this one was pinned with may be missing.
        """
        if self.contradicts(other):
            return False
        if (self.strong and other.strong) or self.digests.proves(other.digests):
            return True
        if (self.etag and not other.etag) or (self.size is not None and other.size is None):
            return False
        return self.modified is not None and self.modified == other.modified

    def at_another_url(self) -> "Validator":
        """What of it counts where the file got another URL: BITS's version of a file, its time and size.

        An ETag means something for its own resource only; two resources may well share one (RFC 9110, 8.8.1).
        """
        return replace(self, etag=None)

    def contradicts(self, other: "Validator") -> bool:
        """Whether size, digest or ETag prove that `other` is another version. What is missing proves nothing."""
        if self.size is not None and other.size is not None and self.size != other.size:
            return True
        if self.digests.contradicts(other.digests):
            return True
        ours, theirs = ENTITY_TAG.fullmatch(self.etag or ""), ENTITY_TAG.fullmatch(other.etag or "")
        return bool(ours and theirs and ours[2] != theirs[2])


# -- the bytes -------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Slice:
    """A byte range of one remote file with two positions: `written` and `durable`. Mutable: it is the progress.

    Always `start <= durable <= written <= end`.

    Attributes:
        start: its first byte.
        end: one past its last byte; None while the size is unknown.
        written: one past the last byte handed to the operating system.
        durable: one past the last byte known to survive a loss of power; what the journal keeps.
    """

    start: int
    end: int | None
    written: int
    durable: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.durable <= self.written or (self.end is not None and self.written > self.end):
            raise ValueError(f"not a slice: {self.start} <= {self.durable} <= {self.written} <= {self.end}")

    @classmethod
    def fresh(cls, start: int = 0, end: int | None = None) -> Self:
        """A slice of which nothing was fetched."""
        return cls(start, end, start, start)

    @property
    def done(self) -> bool:
        """Every byte is written. Never true while the end is unknown."""
        return self.written == self.end

    @property
    def remaining(self) -> int | None:
        """Bytes still to fetch; None while the end is unknown."""
        return None if self.end is None else self.end - self.written

    def advance(self, count: int) -> None:
        """`count` more bytes were written.

        Raises:
            ValueError: they would lie outside the slice.
        """
        if count < 0 or (self.end is not None and self.written + count > self.end):
            raise ValueError(f"{count} bytes at {self.written} leave the slice that ends at {self.end}")
        self.written += count

    def checkpoint(self, position: int) -> None:
        """All bytes before `position` are durable now (read `written` before the sync, and give it here after)."""
        if not self.durable <= position <= self.written:
            raise ValueError(f"a checkpoint at {position} is not between {self.durable} and {self.written}")
        self.durable = position


@dataclass(frozen=True, slots=True)
class Detached:
    """The rest of a body that has left HTTP: what a lane gives up and a part file takes.

    Attributes:
        socket: a connected socket that nobody else reads, or what deciphers one and reads like it (typed loosely: this module knows
            no sockets).
        already: bytes of the body that were read before.
        length: bytes of the body in all, `already` included.
    """

    socket: object
    already: bytes
    length: int


def merge(slices: Iterable[Slice]) -> tuple[Slice, ...]:
    """The slices in order, each durable one joined with the one that begins at its end.

    Raises:
        ValueError: two of them overlap.
    """
    merged: list[Slice] = []
    for piece in sorted(slices, key=lambda each: (each.start, each.end is None, each.end)):
        last = merged[-1] if merged else None
        if last is not None and (last.end is None or last.end > piece.start):
            raise ValueError("slices overlap")
        if last is not None and last.durable == last.end == piece.start:
            merged[-1] = Slice(last.start, piece.end, piece.written, piece.durable)
        else:
            merged.append(Slice(piece.start, piece.end, piece.written, piece.durable))
    return tuple(merged)


def divide(slices: Iterable[Slice], size: int, parts: int, least: int) -> tuple[Slice, ...]:
    """The slices of a file of `size` bytes, and fresh ones for what none of them covers, so that `parts` of them are not done.

    The longest rest is halved as long as there are too few and each half has `least` bytes; what is written stays in its slice.
    """
    pieces, position = list[Slice](), 0
    for each in merge(slices):
        if each.start > position:
            pieces.append(Slice.fresh(position, each.start))
        position = size if each.end is None else each.end
        pieces.append(Slice(each.start, position, each.written, each.durable))
    if position < size or not pieces:
        pieces.append(Slice.fresh(position, size))
    while sum(not each.done for each in pieces) < parts:
        longest = max(pieces, key=lambda each: each.remaining or 0)
        rest = longest.remaining or 0
        if rest < 2 * least:
            break
        middle = longest.written + (rest + 1) // 2
        place = pieces.index(longest)
        halves = Slice(longest.start, middle, longest.written, longest.durable), Slice.fresh(middle, longest.end)
        pieces[place : place + 1] = halves
    return tuple(pieces)


def complete(slices: Sequence[Slice], size: int) -> bool:
    """Whether the slices are all written and cover [0, size) exactly: no hole, no overlap, nothing beyond."""
    position = 0
    for piece in sorted(slices, key=lambda each: (each.start, each.written)):
        if piece.start != position or not piece.done:
            return False
        position = piece.written
    return position == size


def recover(slices: Sequence[Slice], *, length: int, same_boot: bool) -> tuple[Slice, ...] | None:
    """What may be trusted of a part file of `length` bytes that another process left behind; None: nothing, start anew.

    After a crash of the process alone (same boot) the page cache is whole, so one sequential slice is written up to the file's
    length. After a reboot, and with several slices (their bytes do not end where the file ends), only durable positions count.
    """
    if any(piece.durable > length for piece in slices if piece.durable > piece.start):
        return None
    if same_boot and len(slices) == 1:
        piece = slices[0]
        written = max(piece.durable, length if piece.end is None else min(length, piece.end))
        return (Slice(piece.start, piece.end, written, piece.durable),)
    return tuple(Slice(piece.start, piece.end, piece.durable, piece.durable) for piece in slices)


# -- ranges that a job names ------------------------------------------------------------------------------------------------------

LENGTH_TO_EOF: Final = 2**64 - 1  # BG_LENGTH_TO_EOF; here it is written None
_FARTHEST: Final = 2**63 - 1  # no file system and no journal counts farther


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes of a remote file (BG_FILE_RANGE): `length` of them from `initial_offset`; None: to the end of the file."""

    initial_offset: int
    length: int | None = None

    @property
    def end(self) -> int | None:
        """One past its last byte; None: the end of the file."""
        return None if self.length is None else self.initial_offset + self.length

    def reaches_beyond(self, size: int) -> bool:
        """Whether a file of that size lacks bytes of it, or brings none to a range that goes to its end."""
        if self.end is not None:
            return self.end > size
        return self.initial_offset >= size and self.initial_offset > 0


def checked_requests(ranges: Iterable[FileRange]) -> tuple[FileRange, ...]:
    """Ranges that may be asked for on demand: each has a byte; they may overlap.

    Raises:
        InvalidArgument: none, or one of no byte (E_INVALIDARG); an offset that is none (BG_E_INVALID_RANGE).
    """
    checked = _checked_each(ranges)
    if not checked or any(each.length == 0 for each in checked):
        raise InvalidArgument("ranges are asked for: at least one, of at least one byte")
    return checked


def checked_ranges(ranges: Iterable[FileRange]) -> tuple[FileRange, ...]:
    """Ranges that one file may be made of, in the order given.

    Raises:
        InvalidArgument: none, or one of no byte (E_INVALIDARG); an offset that is none, or the end of the file (BG_E_INVALID_RANGE);
            two that share a byte, or begin at the same one (BG_E_OVERLAPPING_RANGES).
    """
    checked = _checked_each(ranges)
    if not checked:
        raise InvalidArgument("a file with ranges has at least one")
    for one, other in pairwise(sorted(checked, key=lambda each: each.initial_offset)):
        if one.initial_offset == other.initial_offset or one.end is None or one.end > other.initial_offset:
            message = f"the ranges from {one.initial_offset} and from {other.initial_offset} overlap"
            raise InvalidArgument(message, code=ErrorCode.BG_E_OVERLAPPING_RANGES)
    if any(each.length == 0 for each in checked):
        raise InvalidArgument("a range has at least one byte")
    return checked


def _checked_each(ranges: Iterable[FileRange]) -> tuple[FileRange, ...]:
    if not isinstance(ranges, Iterable):
        raise InvalidArgument(f"ranges are given as FileRange, in a list even if there is one, not {type(ranges).__name__}")
    return tuple(_checked_range(each) for each in ranges)


def _checked_range(given: FileRange) -> FileRange:
    if not isinstance(given, FileRange):
        raise InvalidArgument(f"a range is a FileRange, not {type(given).__name__}")
    offset, length = given.initial_offset, None if given.length == LENGTH_TO_EOF else given.length
    if not _is_count(offset) or offset + (length if _is_count(length) else 0) > _FARTHEST:
        raise InvalidArgument("a range begins at a byte of the file", code=ErrorCode.BG_E_INVALID_RANGE)
    if length is not None and not _is_count(length):
        raise InvalidArgument("the length of a range is a whole number, or None: to the end of the file")
    return FileRange(offset, length)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def located(ranges: Sequence[FileRange], local: Iterable[FileRange]) -> tuple[FileRange, ...]:
    """Where bytes of a local file made of ranges are in the remote one, in the order of that."""
    found: list[FileRange] = []
    for each in local:
        position, left = each.initial_offset, each.length or 0
        for within in ranges:
            here = left if within.length is None else max(0, min(left, within.length - position))
            if here:
                found.append(FileRange(within.initial_offset + position, here))
            left -= here
            position = max(0, position - (within.length or 0)) if not here else 0
    return joined(found)


def joined(ranges: Iterable[FileRange]) -> tuple[FileRange, ...]:
    """The same bytes in the order of the file, each once: ranges that overlap or touch become one."""
    result: list[FileRange] = []
    for each in sorted(ranges, key=lambda each: each.initial_offset):
        last = result[-1] if result else None
        if last is None or (last.end is not None and last.end < each.initial_offset):
            result.append(each)
        elif last.end is not None and (each.end is None or each.end > last.end):
            result[-1] = FileRange(last.initial_offset, None if each.end is None else each.end - last.initial_offset)
    return tuple(result)


def durable(slices: Iterable[Slice]) -> tuple[FileRange, ...]:
    """What of the slices is there for good, in the order of the file."""
    return joined(FileRange(each.start, each.durable - each.start) for each in slices if each.durable > each.start)


def without(ranges: Iterable[FileRange], others: Iterable[FileRange]) -> tuple[FileRange, ...]:
    """The bytes of the ranges that are in none of the others, in the order of the file; all of them of known length."""
    left: list[FileRange] = []
    there = [(each.initial_offset, each.initial_offset + (each.length or 0)) for each in joined(others)]
    for each in joined(ranges):
        start, end = each.initial_offset, each.initial_offset + (each.length or 0)
        for first, last in there:
            if first < end and last > start:
                if first > start:
                    left.append(FileRange(start, first - start))
                start = last
        if start < end:
            left.append(FileRange(start, end - start))
    return tuple(left)


def filled(slices: Iterable[Slice]) -> tuple[Slice, ...]:
    """What is written of the slices, in the order of the file; neighbours that are durable are one."""
    return merge(Slice(each.start, each.written, each.written, each.durable) for each in slices if each.written > each.start)


def missing(wanted: Iterable[FileRange], slices: Iterable[Slice], size: int | None, position: int = 0) -> tuple[int, int | None] | None:
    """The bytes to fetch next, as (start, end): wanted, not written, and at `position` or behind it if there are any.

    End None: to the end of a file whose size is not known. None: nothing is missing.
    """
    gaps: list[tuple[int, int | None]] = []
    written = filled(slices)
    for each in joined(wanted):
        start, end = each.initial_offset, size if each.end is None else each.end
        for piece in written:
            if piece.written > start and (end is None or piece.start < end):
                if piece.start > start:
                    gaps.append((start, piece.start))
                start = piece.written
        if end is None or start < end:
            gaps.append((start, end))
    for start, end in gaps:
        if end is None or end > position:
            return max(start, position), end
    return gaps[0] if gaps else None


def local_size(ranges: Sequence[FileRange], size: int | None) -> int | None:
    """Bytes of a local file made of these ranges of a remote one of `size` bytes (of all of it, without ranges); None: unknown."""
    if not ranges:
        return size
    total = 0
    for each in ranges:
        end = size if each.end is None else each.end
        if end is None:
            return None
        total += max(0, end - each.initial_offset)
    return total


def locate(ranges: Sequence[FileRange], position: int, size: int | None) -> tuple[int, int | None]:
    """The bytes to ask for next when `position` bytes of the local file are there, as (start, end) in the remote file.

    As far as the ranges go on without a gap, but at most `MAX_REQUEST` bytes; end None: to the end of the file.

    Raises:
        ValueError: the ranges end before `position`.
    """
    here = position
    for number, each in enumerate(ranges):
        end = size if each.end is None else each.end
        if end is None or here < end - each.initial_offset:
            start = each.initial_offset + here
            for following in ranges[number + 1 :]:
                if end is None or following.initial_offset != end:
                    break
                end = size if following.end is None else following.end
            if end is not None and end > start + MAX_REQUEST:
                end = start + MAX_REQUEST
            return start, end
        here -= end - each.initial_offset
    raise ValueError(f"the ranges end before byte {position}")


# -- their text ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ContentRange:
    """`Content-Range` of a 206: [start, end) of `total` bytes; total None: the server wrote `*`."""

    start: int
    end: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Unsatisfied:
    """`Content-Range` of a 416: `bytes */total`."""

    total: int


def parse_content_range(text: str) -> ContentRange | Unsatisfied:
    """The value of `Content-Range`.

    Raises:
        ValueError: it is not one, or contradicts itself.
    """
    match = _CONTENT_RANGE.fullmatch(text.strip(" \t"))
    if match is None or match[1] == match[3] == "*":
        raise ValueError("not a Content-Range of bytes")
    first, last, total = match[1], match[2], None if match[3] == "*" else int(match[3])
    if first is None:
        if total is None:
            raise ValueError("an unsatisfied Content-Range needs a length")
        return Unsatisfied(total)
    start, end = int(first), int(last) + 1
    if start >= end or (total is not None and end > total):
        raise ValueError("a Content-Range that contradicts itself")
    return ContentRange(start, end, total)


def range_header(start: int, end: int | None) -> str:
    """The value of `Range` for [start, end), to the end of the file when `end` is None."""
    if start < 0 or (end is not None and end <= start):
        raise InvalidArgument("a range needs at least one byte")
    return f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"
