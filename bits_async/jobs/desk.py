"""What the handles of one open manager work with, and the limits on what they may ask for."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final
from uuid import uuid4

from ..errors import ErrorCode, ErrorContext, InvalidArgument, make_error
from ..identity.tokens import Token
from ..transport.proxies import ProxySettings, resolve
from .arguments import CheckedFile, checked_priority
from .door import Door, calling
from .engine import Engine
from .journal_files import is_beside
from .model import JobPriority, JobRecord
from .parties import Parties
from .roster import Entry
from .scheduler import Limits

DISPLAY_NAME_LENGTH: Final = 256


@final
@dataclass(frozen=True, slots=True)
class Desk:
    """What the handles of one open manager work with."""

    engine: Engine
    loop: asyncio.AbstractEventLoop
    door: Door
    parties: Parties
    limits: Limits
    journal: Path
    require_impersonation: bool = False

    def caller(self) -> Token:
        """The identity that makes the call.

        Raises:
            AccessDenied: it is not impersonated, and must be.
        """
        return calling(impersonated=self.require_impersonation)

    def ready(self) -> Engine:
        """The engine, for a call of its loop while the manager is open.

        Raises:
            RuntimeError: another event loop. ManagerClosed, StoreError: it works no more.
        """
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("a BitsManager and its jobs belong to the event loop in which it was entered")
        self.engine.check()
        return self.engine

    async def new_record(self, display_name: str, priority: JobPriority, owner: Token) -> JobRecord:
        """A job as it begins, if the limits leave room for it."""
        if not isinstance(display_name, str) or not 1 <= len(display_name) <= DISPLAY_NAME_LENGTH:
            raise InvalidArgument(f"a display name has 1 to {DISPLAY_NAME_LENGTH} characters")
        checked_priority(priority)
        engine = self.ready()
        key = self.door.owner_key(self.door.usable(owner))
        most = self.limits.jobs_per_user
        if most is not None and not owner.elevated and await engine.count(key.sid, most) >= most:
            message = f"{key.name} has {most} unfinished jobs"
            raise make_error(ErrorCode.BG_E_TOO_MANY_JOBS_PER_USER, ErrorContext.GENERAL_QUEUE_MANAGER, message, identity=key.name)
        most = self.limits.jobs_per_machine
        if most is not None and not owner.elevated and await engine.count(None, most) >= most:
            code = ErrorCode.BG_E_TOO_MANY_JOBS_PER_MACHINE
            raise make_error(code, ErrorContext.GENERAL_QUEUE_MANAGER, f"the queue has {most} unfinished jobs", identity=key.name)
        now, proxy = engine.clock.now(), resolve(ProxySettings.preconfig(), os.environ)
        return JobRecord(id=uuid4(), display_name=display_name, owner=key, created=now, modified=now, priority=priority, proxy=proxy)

    def check_limits(self, entry: Entry, files: Sequence[CheckedFile]) -> None:
        """Whether the job may have these files too."""
        limits, job = self.limits, entry.job
        for file in files:
            self.check_destination(file.path)
        if not job.owner.elevated:
            most = limits.files_per_job
            if most is not None and len(entry.files) + len(files) > most:
                code = ErrorCode.BG_E_TOO_MANY_FILES_IN_JOB
                raise make_error(code, ErrorContext.GENERAL_QUEUE_MANAGER, f"a job may have {most} files", job_id=job.id)
            most = limits.ranges_per_file
            if most is not None and any(len(file.ranges) > most for file in files):
                code = ErrorCode.BG_E_TOO_MANY_RANGES_IN_FILE
                raise make_error(code, ErrorContext.GENERAL_QUEUE_MANAGER, f"a file may have {most} ranges", job_id=job.id)
        for file in files:
            self.check_lengths(job, file.url, file.path)

    def check_destination(self, path: Path) -> None:
        """The journal is an authority, and its directory often the one that a service downloads into under names that others chose: no job
        replaces a file of the journal of its own manager (T13). By the names alone; a link that leads there is made by whoever may write
        the journal anyway."""
        if is_beside(self.journal, path):
            message = "this name belongs to the journal of jobs"
            raise InvalidArgument(message, path=path, advice="choose another name, or keep the journal in a directory of its own")

    def check_lengths(self, job: JobRecord, url: str, path: Path | None = None) -> None:
        """Whether names are as short as `Limits.name_length` wants them."""
        most = self.limits.name_length
        if most is None or job.owner.elevated:
            return
        segments = url.partition("?")[0].split("/")[3:]
        if len(str(path or "")) > most or any(len(each) > most for each in segments):
            message = f"a local name, and a segment of a URL, may have {most} characters"
            raise InvalidArgument(message, code=ErrorCode.BG_E_STRING_TOO_LONG, job_id=job.id, path=path)
