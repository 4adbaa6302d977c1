"""Many small files in one hop, with every promise that `PartFile` makes for one."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

from ..errors import BitsError
from ..identity import native
from .directories import Directory, guard_of, leads_to, open_guarded, replaceable
from .hashes import new_hash
from .hops import Handles, close_handles, given_up, hop
from .names import create_in_place_of_stray, open_known, part_name, record_of, unlink
from .records import Chunk, PartRecord, uid_of
from .rename import rename, tidy_up

if TYPE_CHECKING:
    from ..identity.threads import TokenExecutor
    from ..identity.tokens import Token

_BATCH_SECONDS: Final = 1.0  # for renames in one hop: a cancel waits no longer


@dataclass(slots=True)
class _Place:
    """A directory that a batch of files goes to."""

    directory: Directory
    found: os.stat_result
    longest: int  # bytes that a name may have


class _Places:
    """The directories of a batch, each opened and looked at once. Closed by whoever leaves its `with`."""

    def __init__(self, guard: int | None, walker: int | None) -> None:
        self._guard = guard, walker
        self._places: dict[str, _Place] = {}  # by path: of text the hash is known

    def __enter__(self) -> "_Places":
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._places.values():
            if isinstance(each.directory, int):
                os.close(each.directory)

    def of(self, destination: Path) -> _Place:
        parent = os.path.dirname(destination)
        place = self._places.get(parent)
        if place is None:
            directory = open_guarded(Path(parent), *self._guard)
            place = self._places[parent] = _Place(directory, os.stat(directory), native.max_name(directory))
        return place

    def sync(self) -> None:
        for each in self._places.values():
            native.sync_directory(each.directory)

    def stand(self) -> bool:
        """Whether the way that was asked for still leads to each of them: what was put into one that was moved away is not where it was
        asked for (T15)."""
        return all(leads_to(Path(path), each.found) for path, each in self._places.items())


def _store_all(handles: Handles, wholes: "Sequence[WholeFile]", guard: int | None, walker: int | None, token: "Token") -> list[PartRecord]:
    """What the journal is to keep of those, from the first on, that are durable now.

    First all are written and the disk is told, then each is waited for: it writes them side by side.
    """
    until = time.monotonic() + _BATCH_SECONDS
    made: list[tuple[int, PartRecord]] = []
    with _Places(guard, walker) as places:
        try:
            for whole in wholes:
                if time.monotonic() >= until or not _store_one(handles, whole, places, made, token):
                    break
                token.local.check()  # as in `_commit_all`
            for file, _ in made:
                native.datasync(file)
            places.sync()
        except OSError:
            for _, record in made:  # which of them are durable is not known
                _unlink_made(places, record)
            return []
        finally:
            for file, _ in made:
                os.close(file)
    return [record for _, record in made]


def _store_one(handles: Handles, whole: "WholeFile", places: _Places, made: list[tuple[int, PartRecord]], token: "Token") -> bool:
    """Whether it is in its part file, not yet durable. If not, nothing is left of it."""
    file, record = None, None
    try:
        if not whole.is_right():
            return False
        place = places.of(whole.destination)
        replaceable(place.directory, whole.destination)
        name = part_name(whole.destination.name, whole.job_id, whole.draft, place.longest)
        if handles.released:
            return False  # nobody waits any more: the name may be another's part file by now
        file = create_in_place_of_stray(place.directory, name, uid_of(token))
        record = record_of(whole.destination, name, place.found, os.fstat(file), token)
        native.pwrite_all(file, whole.chunks, 0)
        native.write_back(file, 0, sum(map(len, whole.chunks)))
    except (OSError, BitsError, ValueError):  # what is wrong is said when it is tried alone
        if record is not None:
            _unlink_made(places, record)
        if file is not None:
            os.close(file)
        return False
    made.append((file, record))
    return True


def _unlink_made(places: _Places, record: PartRecord) -> None:
    with suppress(OSError, BitsError):  # else the next one who makes it removes it
        unlink(places.of(record.path).directory, record)


def _commit_all(handles: Handles, parts: "Sequence[FinishedPart]", guard: int | None, check: Callable[[], None]) -> int:
    """How many of them, from the first on, have their names, durably."""
    until = time.monotonic() + _BATCH_SECONDS
    umask, done = native.process_umask(), 0
    with _Places(guard, guard) as places:
        try:
            for part in parts:
                if not _commit_one(handles, part, places, umask):
                    break
                done += 1
                if time.monotonic() >= until:
                    break
                check()  # a batch is long; whoever changes the thread's identity meanwhile changes it for one file at most (T1)
            places.sync()
        except OSError:
            return 0  # which of them are durable is not known
        return done if places.stand() else 0


def _commit_one(handles: Handles, part: "FinishedPart", places: _Places, umask: int) -> bool:
    """Whether it has its name."""
    record = part.record
    if (record.device, record.inode) in given_up or not handles.publish(record):  # or nobody waits for this thread any more
        return False
    file = None
    try:
        place = places.of(part.destination)
        if not record.is_directory(place.found):
            return False
        file = open_known(place.directory, record)
        if file is None:
            return False
        mode = rename(place.directory, file, part.destination, record, part.mtime, umask)
        tidy_up(place.directory, file, record, mode)
        return True
    except (OSError, BitsError, ValueError):
        return False  # what is wrong is said when it is tried alone
    finally:
        if file is not None:
            os.close(file)


@dataclass(frozen=True, slots=True)
class WholeFile:
    """All bytes of a file, in memory.

    Attributes:
        destination, job_id, draft: as `PartFile.create` takes them.
        chunks: the bytes.
        digests: what they must hash to, in hexadecimal digits, by algorithm.
    """

    destination: Path
    job_id: UUID
    draft: str
    chunks: Sequence[Chunk]
    digests: Sequence[tuple[str, str]] = ()

    def is_right(self) -> bool:
        """Whether they hash to what they must."""
        for algorithm, expected in self.digests:
            found = new_hash(algorithm)
            for chunk in self.chunks:
                found.update(chunk)
            if found.hexdigest() != expected:
                return False
        return True


async def store_whole(files: "TokenExecutor", wholes: "Sequence[WholeFile]", *, chosen_by_another: bool = False) -> list[PartRecord]:
    """Put whole files into new part files, as `PartFile.create`, `append` and `sync` do: many in one hop, and each directory is synced
    once.

    Returns:
        What the journal is to keep of those, from the first on, that are durable. It stops after a second, and at one with which
        anything is wrong, of which nothing is left: `PartFile` says what, when it is tried alone.
    """
    handles = Handles()
    try:
        guard = guard_of(files.token, False)
        walker = uid_of(files.token) if chosen_by_another else guard
        return await hop(files, handles, wholes[0].destination, "write", _store_all, wholes, guard, walker, files.token)
    finally:
        await close_handles(files, handles)


@dataclass(frozen=True, slots=True)
class FinishedPart:
    """A part file that holds a whole file and is durable, and what it shall become."""

    destination: Path
    record: PartRecord
    mtime: float | None


async def commit_parts(files: "TokenExecutor", parts: Sequence[FinishedPart]) -> int:
    """Give part files that are not open their names, as `PartFile.commit` does: many in one hop, and each directory is synced once.

    Returns:
        How many of them, from the first on, have their names and are durable. It stops after a second, and at one with which anything
        is wrong: `PartFile.reopen` and `PartFile.commit` say what.
    """
    handles = Handles()
    try:
        own = list(takewhile(lambda part: part.record.was_made_by(files.token), parts))
        guard, check = guard_of(files.token, False), files.token.local.check
        return await hop(files, handles, parts[0].destination, "replace", _commit_all, own, guard, check)
    finally:
        await close_handles(files, handles)
