"""A job's part files: their names are journalled before they are made; at the end they get those they are for, or are deleted, each by the
threads of the token that made it. What becomes of the job and of its records is for the engine to say.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import BitsError, LocalFileError
from ..files.batches import FinishedPart, commit_parts
from ..files.leftovers import committed_length, discard_draft, discard_part
from ..files.part import PartFile
from ..files.records import PartRecord
from ..identity.threads import TokenExecutor, TokenExecutors
from ..identity.tokens import HelperTokenFlags, Token
from .model import FileRecord
from .roster import Entry

log = logging.getLogger("bits_async.jobs")


async def commit_some(executors: TokenExecutors, entry: Entry, files: Sequence[FileRecord]) -> int:
    """How many of them have their names now, from the first on; the next one is to be tried alone."""
    with executors.lease(entry.pair.acting_for(HelperTokenFlags.LOCAL_FILE), "files") as executor:
        return await commit_parts(executor, [_finished(file) for file in files])


async def commit(executors: TokenExecutors, entry: Entry, file: FileRecord) -> list[FileRecord]:
    """Give a finished part file its name.

    Returns:
        Those of the job that are found to be lost (changed, removed, or another identity's), this one first; none: it has its name.

    Raises:
        LocalFileError: it cannot be renamed. TokenRequired: the token that must do it is gone.
    """
    assert file.part is not None
    with executors.lease(entry.pair.acting_for(HelperTokenFlags.LOCAL_FILE), "files") as files:
        part = await PartFile.reopen(files, file.path, file.part)
        if part is None:
            if await committed_length(files, file.path, file.part) == file.size:
                return []
            return [file, *[each for each in entry.files if each.index > file.index and await _is_lost(files, each)]]
        try:
            await part.commit(mtime=_mtime(file))
        finally:
            await part.close()
    return []


async def _is_lost(files: TokenExecutor, file: FileRecord) -> bool:
    """Whether the journal counts on a part file that is not as it was left, and that no process that died gave its name."""
    if file.part is None or not file.transferred or file.committed:
        return False
    try:
        part = await PartFile.reopen(files, file.path, file.part)
        if part is None:
            return await committed_length(files, file.path, file.part) != file.size
    except LocalFileError:
        return False  # nothing is known of it: its own turn says what is wrong
    await part.close()
    return False


async def discard(executors: TokenExecutors, entry: Entry, files: Sequence[FileRecord]) -> list[Path]:
    """Delete part files as the token that made them; without it they stay, and are named (BG_S_UNABLE_TO_DELETE_FILES)."""
    left_behind: list[Path] = []
    for file in files:
        if entry.restored and entry.job.resumed:
            await _discard_draft(executors, entry, file)
        if file.part is None:
            continue
        left = file.part.path
        try:
            with executors.lease(_maker(entry, file.part), "files") as executor:
                gone = await discard_part(executor, file.path, file.part)
        except BitsError as error:
            log.warning("job %s: BG_S_UNABLE_TO_DELETE_FILES %s: %s", entry.job.id, left, error)
            left_behind.append(left)
        else:
            if not gone:
                log.warning("job %s: %s is not the job's part file any more and was left alone", entry.job.id, left)
    return left_behind


def _maker(entry: Entry, part: PartRecord) -> Token:
    """The token that made the part file (T17); if the job has it no more, the one that acts on local files, to say so."""
    tokens = (entry.owner, entry.helper)
    made = next((token for token in tokens if token is not None and part.was_made_by(token)), None)
    return made or entry.pair.acting_for(HelperTokenFlags.LOCAL_FILE)


async def _discard_draft(executors: TokenExecutors, entry: Entry, file: FileRecord) -> None:
    if not file.draft:
        return
    try:
        token = entry.pair.acting_for(HelperTokenFlags.LOCAL_FILE)
        with executors.lease(token, "files") as executor:
            await discard_draft(executor, file.path, entry.job.id, file.draft)
    except BitsError as error:
        log.info("job %s: no look for what a process that died may have left beside %s: %s", entry.job.id, file.path, error)


def _finished(file: FileRecord) -> FinishedPart:
    assert file.part is not None, "it was transferred into one"
    return FinishedPart(file.path, file.part, _mtime(file))


def _mtime(file: FileRecord) -> float | None:
    """When the server says that the file was changed."""
    modified = file.validator.modified if file.validator else None
    return modified.timestamp() if modified else None
