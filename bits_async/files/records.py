"""What the journal keeps of a part file, and who made it."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..identity.tokens import Token

Chunk = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What the journal keeps of a part file: enough to know it again (T15), and who made it (T17).

    `uid` is the file's owner, None where the platform has no such thing; `maker` the local user who made it (`LocalIdentity.key`):
    another one on file systems that give every file to one user. None: not known (a journal of version 2), taken for the owner.
    """

    directory: str
    name: str
    dir_device: int
    dir_inode: int
    device: int
    inode: int
    uid: int | None
    maker: str | None = None

    @property
    def path(self) -> Path:
        """Where it was made."""
        return Path(self.directory, self.name)

    def was_made_by(self, token: "Token") -> bool:
        """Whether that identity made it: no other goes on with it or deletes it (T17)."""
        if self.maker is None:
            return self.uid is None or uid_of(token) == self.uid
        return token.local.key == self.maker

    def is_file(self, found: os.stat_result) -> bool:
        """Whether that is our file, whatever its name."""
        return (found.st_dev, found.st_ino) == (self.device, self.inode)

    def is_directory(self, found: os.stat_result) -> bool:
        """Whether that is the directory we made it in."""
        return (found.st_dev, found.st_ino) == (self.dir_device, self.dir_inode)


def uid_of(token: "Token") -> int | None:
    """The local user a token acts as; None where users have no number."""
    kind, _, number = token.local.key.partition(":")
    if kind == "uid" and number.isdecimal():
        return int(number)
    return None if sys.platform == "win32" else os.geteuid()
