"""What is left of a process that died, or of a job that ended: part files that are not open, found again and deleted."""

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from ..errors import ErrorCode, ErrorContext, make_error
from ..identity import native
from .directories import destination_name, find, open_directory
from .hops import Handles, close_handles, hop
from .names import part_name, remove_stray, synced, unlink
from .records import PartRecord, uid_of

if TYPE_CHECKING:
    from ..identity.threads import TokenExecutor


def _discard_draft(handles: Handles, destination: Path, job_id: UUID, draft: str, uid: int | None) -> bool:
    handles.release()  # closed as soon as this thread leaves
    try:
        handles.directory = directory = open_directory(destination.parent)
    except FileNotFoundError:
        return True
    name = part_name(destination.name, job_id, draft, native.max_name(directory))
    return synced(directory, remove_stray(directory, name, uid))


def _discard_recorded(handles: Handles, record: PartRecord) -> bool:
    handles.release()  # closed as soon as this thread leaves
    try:
        handles.directory = directory = open_directory(Path(record.directory))
    except FileNotFoundError:
        return True
    return record.is_directory(os.stat(directory)) and synced(directory, unlink(directory, record))


def _look_for_committed(handles: Handles, destination: Path, record: PartRecord) -> int | None:
    handles.release()
    handles.directory = directory = open_directory(destination.parent)
    if not record.is_directory(os.stat(directory)) or find(directory, record.name) is not None:
        return None
    found = find(directory, destination_name(destination))
    if found is None or not stat.S_ISREG(found.st_mode) or not record.is_file(found) or record.uid not in (None, found.st_uid):
        return None
    native.sync_directory(directory)  # the process may have died before it did that
    return found.st_size


async def discard_part(files: "TokenExecutor", destination: Path, record: PartRecord) -> bool:
    """Delete a part file that is not open, as the token that made it (T17).

    Returns:
        True: nothing has its name any more. False: directory or file are not those of the record; nothing was touched.

    Raises:
        LocalFileError: it cannot be looked for or deleted; or another identity made it, and nothing was touched.
    """
    if not record.was_made_by(files.token):
        message, who = "another identity made the part file, and only that one deletes it", files.token.name
        raise make_error(ErrorCode.E_ACCESSDENIED, ErrorContext.LOCAL_FILE, message, path=record.path, identity=who)
    handles = Handles()
    try:
        return await hop(files, handles, destination, "remove", _discard_recorded, record)
    finally:
        await close_handles(files, handles)


async def discard_draft(files: "TokenExecutor", destination: Path, job_id: UUID, draft: str) -> bool:
    """Delete the part file that a process may have left which died before it could journal more than `draft`.

    Returns:
        True: nothing has that name. False: somebody else's file has it, and was left alone.

    Raises:
        LocalFileError: it cannot be looked for or deleted.
    """
    handles = Handles()
    try:
        return await hop(files, handles, destination, "remove", _discard_draft, destination, job_id, draft, uid_of(files.token))
    finally:
        await close_handles(files, handles)


async def committed_length(files: "TokenExecutor", destination: Path, record: PartRecord) -> int | None:
    """The length of the destination if it is the recorded part file, renamed by a process that died before it could journal it.

    The inode number alone does not prove that nobody has written another file there since: compare the length, and the digest if
    any.

    Raises:
        LocalFileError: the directory cannot be opened.
    """
    handles = Handles()
    try:
        return await hop(files, handles, destination, "look at", _look_for_committed, destination, record)
    finally:
        await close_handles(files, handles)
