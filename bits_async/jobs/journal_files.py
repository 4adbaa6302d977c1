"""The files of one journal: private, locked by one manager, set aside whole when they turn out to be damaged. Knows no SQL.

They are `<store>`, `<store>-wal`, `<store>-shm`, `<store>.lock` and `<store>.key`.
"""

import itertools
import os
import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ..errors import scrub
from .schema import APPLICATION_ID
from .secrets import check_private, guard_directory, make_private, os_fault, release_lock, sync_directory, take_lock

_ENDING: Final = re.compile(
    r"(?:\.damaged-[^/\\]*)?(?:|-wal|-shm|-journal|\.key|\.key\.new|(?:\.[^./\\]+)?\.lock)"
)  # also of `download(store=)`


class JournalFiles:
    """Every call blocks, and is made by one thread at a time.

    Attributes:
        path: the database, absolute.
        set_aside: where the journal is that was found damaged; None: it was not.
    """

    def __init__(self, path: Path, *, make_parents: bool) -> None:
        self.path = path
        self.set_aside: Path | None = None
        self._make_parents = make_parents
        self._lock_file: int | None = None
        self._made: list[Path] = []  # empty files that an open under way has made

    def side(self, suffix: str) -> Path:
        """The file beside the database that has its name and that ending."""
        return self.path.with_name(self.path.name + suffix)

    def claim(self) -> None:
        """What must hold before SQLite may look: private files, and the lock. No database file is opened before the lock is ours,
        because closing it would give up the locks that another connection of this process has on it."""
        guard_directory(self.path.parent, make_parents=self._make_parents)
        self._lock_file = take_lock(self.side(".lock"), self.path)
        self.make()

    def make(self) -> None:
        """Each that is missing, empty and private."""
        for name in ("", "-wal", "-shm"):
            if make_private(self.side(name)):
                self._made.append(self.side(name))
        self.check()
        sync_directory(self.path.parent)

    def check(self) -> None:
        """Refuses what others may have written."""
        for name in ("", "-wal", "-shm", "-journal"):
            check_private(self.side(name))

    def keep(self) -> None:
        """The open succeeded: what it made is the journal's."""
        self._made.clear()

    def delete(self) -> None:
        """All but the lock."""
        for name in ("-wal", "-shm", "-journal", "", ".key"):
            try:
                self.side(name).unlink(missing_ok=True)
            except OSError as exc:
                raise os_fault(exc, self.side(name), "delete") from scrub(exc)
        sync_directory(self.path.parent)

    def unmake(self) -> None:
        """After an open that failed: beside another program's database an empty log would mean something to SQLite."""
        while self._made:
            made = self._made.pop()
            if made.exists() and made.stat().st_size == 0:
                made.unlink()

    def release(self, *, remove: bool) -> None:
        if self._lock_file is not None:
            lock_file, self._lock_file = self._lock_file, None
            release_lock(lock_file, self.side(".lock"), remove=remove)

    def has_log(self) -> bool:
        """Whether the last process that had it open did not come to closing it."""
        log_file = self.side("-wal")
        return log_file.exists() and log_file.stat().st_size > 0

    def is_ours(self) -> bool:
        """Whether a file that SQLite cannot read was a journal: its header says so, or a key is beside it."""
        with self.path.open("rb") as file:
            header = file.read(72)
        return header[68:] == APPLICATION_ID.to_bytes(4, "big") or self.side(".key").exists()

    def name_aside(self) -> list[str]:
        """Each has a second name now, beside the first: the endings of those that there are, for `let_go`."""
        aside = self._free_name()
        names = [name for name in ("", "-wal", "-journal", ".key") if self.side(name).exists()]
        try:
            for name in names:
                _link(self.side(name), aside.with_name(aside.name + name))
        except OSError as exc:
            raise os_fault(exc, self.path, "set aside") from scrub(exc)
        sync_directory(self.path.parent)
        self.set_aside = aside
        return names

    def let_go(self, names: Sequence[str]) -> None:
        """They lose their first names."""
        try:
            for name in (*names, "-shm"):
                self.side(name).unlink(missing_ok=True)
        except OSError as exc:
            raise os_fault(exc, self.path, "set aside") from scrub(exc)
        sync_directory(self.path.parent)

    def _free_name(self) -> Path:
        stem = f"{self.path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        names = (self.path.with_name(stem + (f"-{number}" if number else "")) for number in itertools.count())
        return next(name for name in names if not os.path.lexists(name))


def is_beside(journal: Path, path: Path) -> bool:
    """Whether a path names the journal, or a file that is kept beside it: a lock, a key, what was set aside."""
    own, other = (os.path.normcase(os.path.normpath(each)) for each in (journal, path))
    return other.startswith(own) and _ENDING.fullmatch(other[len(own) :]) is not None


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without links: copied, so that the old one still stands if this fails
        make_private(new)  # before there is a byte in it: the key is copied too
        shutil.copyfile(old, new)
        with new.open("rb") as file:
            os.fsync(file.fileno())
