"""The API: `BitsManager`, the handles `Job`, `JobFile` and `TokenOptions`, and `download`, one call from create to complete.

Here stands the door. The access check happens once, when a handle is obtained (`get_job`, `token_options`), as BITS does since Windows 7;
a handle is a capability, and afterwards the ambient identity no longer matters. The ambient identity is read at the call itself, by the
functions that say so and by no others.
"""

import asyncio
import contextlib
import contextvars
import hashlib
import inspect
import math
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from ssl import SSLContext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, final
from uuid import UUID, uuid4

from ..auth.policy import (
    AuthCredentials,
    AuthRules,
    AuthScheme,
    AuthTarget,
    Origin,
    Refusals,
    Seat,
    account_fingerprint,
    choose_offers,
    credential_fingerprint,
)
from ..clock import Clock, SystemClock
from ..errors import (
    AccessDenied,
    BitsError,
    ErrorCode,
    ErrorContext,
    ImpersonationFailed,
    InvalidArgument,
    InvalidState,
    JobCancelled,
    LocalFileError,
    ManagerClosed,
    NotFound,
    StoreError,
    TokenRequired,
    ValidationFailed,
    make_error,
    scrub,
)
from ..identity import native
from ..identity.threads import TokenExecutor, TokenExecutors
from ..identity.tokens import HelperTokenFlags, ImpersonationLevel, Token, current_token, impersonation
from ..transport.answers import MAX_URL, check_url
from ..transport.lane import Judge, Lanes, Network, Party
from ..transport.options import TLS_FLAGS, SecurityFlags, checked_flags, checked_headers, checked_method
from ..transport.proxies import ProxySettings, resolve, route
from ..transport.ranges import FileRange, checked_ranges, checked_requests, joined, located
from ..transport.timeouts import Timeouts
from ..transport.tls import TlsSettings, read_revocation_lists
from .certificates import CertificateJudge, callback_required
from .engine import Engine, Entry
from .model import (
    RETRY_DELAY_FLOOR,
    Completion,
    FileProgress,
    FileRecord,
    GrantRecord,
    GrantRemoved,
    JobPriority,
    JobProgress,
    JobRecord,
    JobState,
    JobTimes,
    OwnerKey,
    StoredJob,
    Waiting,
)
from .notify import EventStream, JobChanged, Progress
from .scheduler import Limits
from .secrets import os_fault, release_lock, take_lock
from .store import SqliteStore, finish
from .transfer import Workshop

if TYPE_CHECKING:
    from yarl import URL

StrPath = str | os.PathLike[str]

DISPLAY_NAME_LENGTH: Final = 256
DESCRIPTION_LENGTH: Final = 1024
PROGRESS_INTERVAL: Final = 0.5
STATE_ADVICE: Final = "set HOME or XDG_STATE_HOME to a directory where this user may write"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file to add: from where, to where, and optionally the SHA-256 (hexadecimal) that it must have."""

    url: "str | URL"
    path: StrPath
    sha256: str | None = None

    def __init__(self, url: "str | URL", path: StrPath, *, sha256: str | None = None) -> None:
        object.__setattr__(self, "url", url)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "sha256", sha256)


@dataclass(frozen=True, slots=True)
class Seams:
    """What `bits_async.testing` puts in place of the network and the time."""

    network: Network
    clock: Clock


seams: contextvars.ContextVar[Seams | None] = contextvars.ContextVar("bits_async_seams", default=None)


@final
class JobFile:
    """One file of a job; the values are as new as your last await."""

    def __init__(self, manager: "BitsManager", entry: Entry, index: int) -> None:
        self._manager = manager
        self._entry = entry
        self._index = index

    @property
    def _record(self) -> FileRecord:
        return self._entry.files[self._index]

    @property
    def remote_name(self) -> str:
        """The URL, with its query."""
        return self._record.url

    @property
    def local_name(self) -> Path:
        """The destination."""
        return self._record.path

    @property
    def progress(self) -> FileProgress:
        """How far it is; `completed`: it stands at its destination."""
        record = self._record
        return FileProgress(record.size, self._entry.positions.get(self._index, 0), record.committed)

    @property
    def http_response_headers(self) -> Sequence[tuple[str, str]]:
        """Of the last response for this file, an error or a redirect too, as they came; empty before the first. Not kept by the journal.

        Servers write them: cookies may be among them, and nothing in them is to be believed.
        """
        return self._entry.answers.get(self._index, ())

    @property
    def ranges(self) -> Sequence[FileRange]:
        """What of the remote file the local one is made of, in this order; empty: all of it."""
        return self._record.ranges

    @property
    def filled_file_ranges(self) -> Sequence[FileRange]:
        """What of the remote file is in the part file for good, in the order of the file."""
        record = self._record
        here = [FileRange(each.start, each.durable - each.start) for each in record.slices if each.durable > each.start]
        return located(record.ranges, here) if record.ranges else joined(here)

    async def request_file_ranges(self, ranges: Sequence[FileRange]) -> None:
        """Ask for bytes of a file whose job is in on-demand mode; durable when it returns. They add to what was asked for before.

        Resume the job to have them fetched. When all is there the job is TRANSFERRED if its files are whole, else SUSPENDED again.

        Raises:
            InvalidArgument: no range, or one without a byte; one that is not in the file, as far as its size is known
                (BG_E_INVALID_RANGE; otherwise the job stops with it).
            InvalidState: the job is not in on-demand mode.
        """
        engine, checked = self._manager._ready(), checked_requests(ranges)
        async with engine.command(self._entry):
            self._check_on_demand(checked)
            await engine.ask_for(self._entry, self._index, wanted=joined((*self._record.wanted, *checked)))

    async def update_download_position(self, offset: int) -> None:
        """Fetch what was asked for at this offset and behind it first, then what lies before it.

        Raises:
            InvalidArgument: not an offset in the file (BG_E_INVALID_RANGE). InvalidState: the job is not in on-demand mode.
        """
        engine = self._manager._ready()
        (checked,) = checked_requests([FileRange(offset)])
        async with engine.command(self._entry):
            self._check_on_demand([checked])
            await engine.ask_for(self._entry, self._index, position=checked.initial_offset)

    def _check_on_demand(self, ranges: Iterable[FileRange]) -> None:
        record, job = self._record, self._entry.job
        if not job.on_demand_mode:
            raise InvalidState("the job is not in on-demand mode", job_id=job.id)
        if record.size is not None and any(each.reaches_beyond(record.size) for each in ranges):
            message = f"a range is not in the file, which has {record.size} bytes"
            raise InvalidArgument(message, code=ErrorCode.BG_E_INVALID_RANGE, job_id=job.id)

    @property
    def temporary_name(self) -> Path | None:
        """The part file beside the destination, from the moment it is made until the job is completed or cancelled. Leave it alone."""
        record = self._record
        return None if record.part is None or record.committed else record.part.path

    @property
    def validation_state(self) -> bool:
        """Whether the application said that the content is right; completing the job says so too."""
        return self._record.transferred and self._record.validated

    @property
    def is_downloaded_from_peer(self) -> bool:
        """False: there are no peers, every byte comes from the origin."""
        return False

    async def set_remote_name(self, url: "str | URL") -> None:
        """Fetch the file from another URL, from now on; durable when it returns.

        The position is kept where the file there proves to be the same version, by its size and time (for URLs that differ in their
        query only, by its ETag too); a finished file is not fetched again. An origin that the job did not name before gets no
        credentials until `Job.set_credentials` is called again (T19).

        Raises:
            InvalidArgument: not a URL that can be fetched, as in `Job.add_file`.
        """
        engine, name = self._manager._ready(), check_url(str(url))
        async with engine.command(self._entry):
            self._manager._check_lengths(self._entry.job, name)
            await engine.rename(self._entry, {self._index: name})

    async def set_validation_state(self, valid: bool) -> None:
        """Say whether the content of the finished file, in `temporary_name`, is right.

        False drops what was fetched, and the job goes to ERROR (BG_E_VALIDATION_FAILED); resume fetches the file anew.

        Raises:
            InvalidState: the file is not transferred yet (E_PENDING), or it is at its destination already.
        """
        engine, checked = self._manager._ready(), _yes_or_no("validation_state", valid)
        async with engine.command(self._entry):
            where: dict[str, Any] = {"job_id": self._entry.job.id, "path": self.local_name}
            if not self._record.transferred:
                raise make_error(ErrorCode.E_PENDING, ErrorContext.NONE, "the file is not transferred yet", **where)
            if checked:
                await engine.change(self._entry, files=[replace(self._record, validated=True)])
            elif self._record.committed:
                raise InvalidState("the file is at its destination already", **where)
            else:
                await engine.refuse_content(self._entry, self._index)

    def __repr__(self) -> str:
        return f"<JobFile {self.local_name}>"


@final
class Job:
    """A handle on a job, and the right to use it: who holds it may do everything, under any ambient identity.

    No property does I/O. Every method raises ManagerClosed when the manager is closed, StoreError when the journal fails, InvalidState when
    the job has left the queue, and RuntimeError from another event loop.
    """

    def __init__(self, manager: "BitsManager", entry: Entry) -> None:
        self._manager = manager
        self._entry = entry
        self.id: Final[UUID] = entry.job.id
        self.display_name: Final[str] = entry.job.display_name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.display_name!r} {self.state.name}>"

    @property
    def owner(self) -> str:
        """The owner's sid."""
        return self._entry.job.owner.sid

    @property
    def owner_name(self) -> str:
        """The owner's name, for people."""
        return self._entry.job.owner.name

    # -- how it stands ------------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> JobState:
        """Where it is in its life cycle."""
        return self._entry.job.state

    @property
    def waiting(self) -> Waiting | None:
        """Why nothing moves; None when something does, or nothing will."""
        engine = self._manager._engine
        return None if engine is None else engine.waiting(self._entry)

    @property
    def error(self) -> BitsError | None:
        """In ERROR and TRANSIENT_ERROR what went wrong, else None."""
        job = self._entry.job
        return job.error if job.state in (JobState.ERROR, JobState.TRANSIENT_ERROR) else None

    @property
    def progress(self) -> JobProgress:
        """Over all files."""
        return self._entry.progress

    @property
    def files(self) -> Sequence[JobFile]:
        """In the order in which they were added."""
        return tuple(JobFile(self._manager, self._entry, file.index) for file in self._entry.files)

    @property
    def priority(self) -> JobPriority:
        """Which jobs go first."""
        return self._entry.job.priority

    @property
    def minimum_retry_delay(self) -> float:
        """Seconds between a transient error and the next attempt."""
        return self._entry.job.minimum_retry_delay

    @property
    def no_progress_timeout(self) -> float:
        """Seconds without a byte after which a transient error is fatal; 0: every error is."""
        return self._entry.job.no_progress_timeout

    @property
    def description(self) -> str:
        """For people."""
        return self._entry.job.description

    @property
    def times(self) -> JobTimes:
        """When it was created, changed and transferred."""
        job = self._entry.job
        return JobTimes(job.created, job.modified, job.completed)

    @property
    def error_count(self) -> int:
        """How often it was interrupted, by transient and fatal errors."""
        return self._entry.job.error_count

    @property
    def maximum_download_time(self) -> float:
        """Seconds that the job may spend CONNECTING and TRANSFERRING, counted from its last resume."""
        return self._entry.job.maximum_download_time

    @property
    def maximum_download_size(self) -> int | None:
        """Bytes that the files of the job may have together; None: any number."""
        return self._entry.job.maximum_download_size

    @property
    def dynamic_content(self) -> bool:
        """The files are made when they are asked for."""
        return self._entry.job.dynamic_content

    @property
    def on_demand_mode(self) -> bool:
        """Only what `JobFile.request_file_ranges` asks for is fetched."""
        return self._entry.job.on_demand_mode

    @property
    def high_performance(self) -> bool:
        """Nothing is journalled while a file is fetched."""
        return self._entry.job.high_performance

    @property
    def proxy_settings(self) -> ProxySettings:
        """How the job reaches its servers."""
        return self._entry.job.proxy

    @property
    def custom_headers(self) -> Sequence[tuple[str, str]] | None:
        """Sent with every request; None: they are write-only, or the journal's key was lost."""
        http = self._entry.job.http
        return None if http.headers_write_only else http.headers

    @property
    def http_method(self) -> str:
        """Of every request."""
        return self._entry.job.http.method

    @property
    def security_flags(self) -> SecurityFlags:
        """What the job allows a server."""
        return self._entry.job.http.flags

    @property
    def crl_source(self) -> Path | None:
        """File or directory of the certificate revocation lists for SSL_ENABLE_CRL_CHECK."""
        return self._entry.job.http.crl_source

    # -- files and properties -------------------------------------------------------------------------------------------------------------

    async def add_file(self, url: "str | URL", path: StrPath, *, sha256: str | None = None) -> JobFile:
        """Add one file; durable when it returns.

        Raises:
            InvalidArgument: not an http(s) URL, user information in it, a relative path, not a SHA-256.
        """
        (file,) = await self.add_file_set([FileInfo(url, path, sha256=sha256)])
        return file

    async def add_file_set(self, files: Iterable[FileInfo]) -> Sequence[JobFile]:
        """Add files, all or none, in one transaction.

        Raises:
            InvalidArgument: as `add_file`; AccessDenied (BG_E_TOO_MANY_FILES_IN_JOB): more than `Limits.files_per_job`.
        """
        self._manager._ready()
        return await self._add([_checked(file) for file in files])

    async def add_file_with_ranges(
        self, url: "str | URL", path: StrPath, ranges: Sequence[FileRange], *, sha256: str | None = None
    ) -> JobFile:
        """Add one file that is made of ranges of a remote one, joined in the order given; durable when it returns.

        The server must support ranges, and give a validator (a strong ETag or Last-Modified) where there is more than one. A range that
        is not in the remote file stops the job with BG_E_INVALID_RANGE.

        Raises:
            InvalidArgument: as `add_file`; no range, or one without a byte; an offset that is none (BG_E_INVALID_RANGE); ranges that
                overlap (BG_E_OVERLAPPING_RANGES).
            AccessDenied: more than `Limits.ranges_per_file` (BG_E_TOO_MANY_RANGES_IN_FILE), or as `add_file_set`.
            InvalidState: the job has dynamic content, or is in on-demand mode (BG_E_UNSUPPORTED_JOB_CONFIGURATION).
        """
        self._manager._ready()
        (file,) = await self._add([replace(_checked(FileInfo(url, path, sha256=sha256)), ranges=checked_ranges(ranges))])
        return file

    async def _add(self, files: Sequence["_File"]) -> Sequence[JobFile]:
        engine, entry = self._manager._ready(), self._entry
        async with engine.command(entry):
            self._manager._check_limits(entry, files)
            if (entry.job.dynamic_content or entry.job.on_demand_mode) and any(file.ranges for file in files):
                raise self._unfit("dynamic content, and a file that is fetched on demand, is not made of ranges")
            first = len(entry.files)
            records = [_file_record(self.id, first + n, file) for n, file in enumerate(files)]
            await engine.add_files(entry, records)
        return tuple(JobFile(self._manager, entry, record.index) for record in records)

    def _unfit(self, message: str, code: ErrorCode = ErrorCode.BG_E_UNSUPPORTED_JOB_CONFIGURATION) -> BitsError:
        return make_error(code, ErrorContext.NONE, message, job_id=self.id)

    async def replace_remote_prefix(self, old_prefix: str, new_prefix: str) -> bool:
        """Put another beginning on the URLs of all files that begin with `old_prefix`, letter by letter; all or none of them.

        See `JobFile.set_remote_name` for what becomes of positions and credentials. False: no URL begins so.

        Raises:
            InvalidArgument: an empty prefix, or a URL that cannot be fetched comes out.
        """
        engine, entry = self._manager._ready(), self._entry
        if not isinstance(old_prefix, str) or not isinstance(new_prefix, str) or not old_prefix or not new_prefix:
            raise InvalidArgument("a prefix is text, at least one character")
        async with engine.command(entry):
            old = [(file.index, file.url) for file in entry.files if file.url.startswith(old_prefix)]
            urls = {index: _replaced_prefix(url, old_prefix, new_prefix) for index, url in old}
            for url in urls.values():
                self._manager._check_lengths(entry.job, url)
            if urls:
                await engine.rename(entry, urls)
            return bool(urls)

    async def set_proxy_settings(self, settings: ProxySettings) -> None:
        """How the job reaches its servers, from the next attempt on.

        A later proxy needs its credentials set again; so do servers over plain http once the job was resumed, because another proxy would
        see what is shown to them, and custom headers (T19).
        """
        engine, entry, proxy = self._manager._ready(), self._entry, resolve(settings, os.environ)
        async with engine.command(entry):
            exposed = entry.job.resumed and proxy != entry.job.proxy
            grants = [_kept_from_proxies(grant) if exposed else grant for grant in entry.grants]
            http = entry.job.http
            if exposed and http.header_origins:
                http = replace(http, header_origins=_not_plain(http.header_origins))
            if grants != entry.grants:
                await engine.save(*grants)
                entry.grants[:] = grants
            await engine.change(entry, proxy=proxy, http=http)

    async def set_priority(self, priority: JobPriority) -> None:
        """Which jobs go first.

        Raises:
            InvalidState: a job with another method than GET stays FOREGROUND (BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD).
        """
        if not isinstance(priority, JobPriority):
            raise InvalidArgument(f"a priority is a JobPriority, not {priority!r}")
        engine, entry = self._manager._ready(), self._entry
        async with engine.command(entry):
            if priority is not JobPriority.FOREGROUND and not entry.job.http.plain:
                message = f"a job with the method {self.http_method} stays FOREGROUND"
                raise self._unfit(message, ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD)
            if not replace(entry.job, priority=priority).may_run:
                await engine.halt(entry)
            await engine.change(entry, priority=priority)

    async def set_description(self, description: str) -> None:
        """For people, at most 1024 characters.

        Raises:
            InvalidArgument: no text, or too long (BG_E_STRING_TOO_LONG).
        """
        if not isinstance(description, str):
            raise InvalidArgument("a description is text")
        if len(description) > DESCRIPTION_LENGTH:
            message = f"a description has at most {DESCRIPTION_LENGTH} characters"
            raise InvalidArgument(message, code=ErrorCode.BG_E_STRING_TOO_LONG)
        await self._set(description=description)

    async def set_maximum_download_size(self, size: int | None) -> None:
        """Bytes that the files of the job may have together, before the first resume. A job that would get more fails.

        Raises:
            InvalidArgument: not a whole number from 1 (BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE).
            InvalidState: the job was resumed before (BG_E_READ_ONLY_PROPERTY_AFTER_RESUME).
        """
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**64):
            message = f"maximum_download_size takes a whole number of bytes, not {size!r}"
            raise InvalidArgument(message, code=ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE)
        await self._set_early("maximum_download_size", size)

    async def set_dynamic_content(self, dynamic: bool) -> None:
        """The files are made when they are asked for: neither a size nor ranges are needed, and after any interruption a file begins
        anew. The job is transferred at FOREGROUND priority only, where nothing else interrupts it.

        Raises:
            InvalidState: the job was resumed before (BG_E_READ_ONLY_PROPERTY_AFTER_RESUME); it has a file with ranges, or is in on-demand
                mode (BG_E_UNSUPPORTED_JOB_CONFIGURATION); or another method than GET (BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD).
        """
        await self._set_early("dynamic_content", _yes_or_no("dynamic_content", dynamic))

    async def set_on_demand_mode(self, on_demand: bool) -> None:
        """Fetch only what `JobFile.request_file_ranges` asks for, in any order; the rest of the part file stays a hole.

        The server must support ranges and give a validator, else the job stops with BG_E_RANDOM_ACCESS_NOT_SUPPORTED.

        Raises:
            InvalidState: the job was resumed before (BG_E_READ_ONLY_PROPERTY_AFTER_RESUME); it has dynamic content, or a file with
                ranges (BG_E_UNSUPPORTED_JOB_CONFIGURATION); or another method than GET (BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD).
        """
        await self._set_early("on_demand_mode", _yes_or_no("on_demand_mode", on_demand))

    async def set_high_performance(self, fast: bool) -> None:
        """Journal nothing while a file is fetched, and sync it once, at its end: after a loss of power it is fetched anew.

        BITS also writes to the destination itself and leaves there what an error or a cancel has cut short. That much of it we do not
        do: a rename costs nothing, and the destination never holds half a file, or parts of two versions.

        Raises:
            InvalidState: the job has a file (BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE).
        """
        engine, checked = self._manager._ready(), _yes_or_no("high_performance", fast)
        async with engine.command(self._entry):
            if self._entry.files:
                code = ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE
                raise self._unfit("high_performance is set before the first file is added", code)
            await engine.change(self._entry, high_performance=checked)

    async def _set_early(self, name: str, value: object) -> None:
        """Set what the first resume makes final."""
        engine, entry = self._manager._ready(), self._entry
        async with engine.command(entry):
            if entry.job.resumed:
                raise self._unfit(f"{name} is set before the first resume", ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME)
            if name == "dynamic_content" and value and not entry.job.http.plain:
                raise self._unfit("dynamic content is fetched with GET only", ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD)
            fields: dict[str, Any] = {name: value}
            self._check_fit(replace(entry.job, **fields))
            kept = [file for file in entry.files if name == "on_demand_mode" and file.wanted]
            await engine.change(entry, files=[replace(file, wanted=(), position=0) for file in kept], **fields)

    def _check_fit(self, job: JobRecord) -> None:
        """Whether the ways in which the job is to be fetched go together."""
        if not (job.dynamic_content or job.on_demand_mode):
            return
        if not job.http.plain:
            code = ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD
            raise self._unfit("dynamic content, and a file on demand, is fetched with GET only", code)
        if job.dynamic_content and job.on_demand_mode:
            raise self._unfit("dynamic content cannot be fetched on demand")
        if any(file.ranges for file in self._entry.files):
            raise self._unfit("dynamic content, and a file that is fetched on demand, is not made of ranges")

    async def set_maximum_download_time(self, seconds: float) -> None:
        """Seconds that the job may spend CONNECTING and TRANSFERRING; then it fails with BG_E_MAXDOWNLOAD_TIMEOUT. Resume counts anew."""
        await self._set(maximum_download_time=_seconds("maximum_download_time", seconds))

    async def set_minimum_retry_delay(self, seconds: float) -> None:
        """Seconds between a transient error and the next attempt, 5 at least (smaller values are raised to it, as BITS does)."""
        await self._set(minimum_retry_delay=max(_seconds("minimum_retry_delay", seconds), RETRY_DELAY_FLOOR))

    async def set_no_progress_timeout(self, seconds: float) -> None:
        """Seconds without a byte, from the first transient error on, after which the job fails; 0: every error is fatal."""
        await self._set(no_progress_timeout=_seconds("no_progress_timeout", seconds))

    async def _set(self, **fields: Any) -> None:
        engine = self._manager._ready()
        async with engine.command(self._entry):
            await engine.change(self._entry, **fields)

    async def set_custom_headers(self, headers: Sequence[tuple[str, str]] | str | None) -> None:
        """Headers to send with every request of the job, in place of those set before; None: none. Kept encrypted.

        They go to the origins that the job names when it is first resumed, or names now if it was (T19), and to no other: not where a
        redirect leads, and not to a proxy with CONNECT (a proxy that forwards plain http reads them, like the rest of the request).

        Args:
            headers: pairs, or text with a CRLF between lines.

        Raises:
            InvalidArgument: more than 16,384 characters (BG_E_STRING_TOO_LONG), a malformed header, or one that belongs to the engine or
                the connection (Host, Range, Cookie, Authorization, Proxy-* and the like).
        """
        checked, entry = checked_headers(headers), self._entry
        async with self._manager._ready().command(entry):
            origins = _origins(entry, AuthTarget.SERVER) if checked and entry.job.resumed else None
            await self._change_http(stop=entry.job.http.headers != (), headers=checked, header_origins=origins)

    async def make_custom_headers_write_only(self) -> None:
        """From now on `custom_headers` gives none out, those set later neither; irreversible."""
        async with self._manager._ready().command(self._entry):
            await self._change_http(headers_write_only=True)

    async def set_http_method(self, method: str) -> None:
        """The method of every request, sent without a body; before the first resume only. Anything but GET makes the job FOREGROUND.

        Such a request is made once: what would be tried again with GET is an error, and resume begins with the first byte. (A job that
        was at work when its manager closed is begun anew when the journal is opened, like any other.)

        Args:
            method: a token in capital letters; not CONNECT, HEAD, OPTIONS or TRACE, whose answers bring no file.

        Raises:
            InvalidArgument: another method. InvalidState: the job was resumed (BG_E_READ_ONLY_PROPERTY_AFTER_RESUME), or has dynamic
                content (BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD).
        """
        checked, entry = checked_method(method), self._entry
        async with self._manager._ready().command(entry):
            if checked == entry.job.http.method:
                return
            if entry.job.resumed:
                raise self._unfit("http_method is set before the first resume", ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME)
            if checked == "GET":
                await self._change_http(method=checked)
                return
            http = replace(entry.job.http, method=checked)
            self._check_fit(replace(entry.job, http=http))
            await self._manager._ready().change(entry, http=http, priority=JobPriority.FOREGROUND)

    async def set_security_flags(self, flags: SecurityFlags) -> None:
        """What the job allows a server, in place of what was allowed before. An attempt that is running begins again under them; with
        SSL_ENABLE_CRL_CHECK newly set, files that are not whole are fetched anew.

        Raises:
            InvalidArgument: no SecurityFlags. BitsError (E_NOTIMPL): flags that contradict each other, that `ssl` cannot follow, or that
                cannot be applied to the manager's `ssl=` context.
        """
        checked, entry, manager = checked_flags(flags), self._entry, self._manager
        engine = manager._ready()
        await manager._check_derivable(checked)
        async with engine.command(entry):
            before = entry.job.http.flags
            if checked == before:
                return
            await engine.halt(entry)
            newly_checked = SecurityFlags.SSL_ENABLE_CRL_CHECK in checked & ~before
            untrusted = [file for file in entry.files if newly_checked and not file.transferred and not file.committed]
            files = [replace(file, validator=None, slices=()) for file in untrusted]
            await engine.change(entry, files=files, http=replace(entry.job.http, flags=checked))

    async def set_crl_source(self, source: StrPath | None) -> None:
        """Where the certificate revocation lists for SSL_ENABLE_CRL_CHECK are: a file, or a directory of files (PEM or DER).

        They are read again at each attempt, as the job's owner; nothing is fetched.

        Raises:
            InvalidArgument: not an absolute path.
        """
        path = None if source is None else os.fspath(source)
        if path is not None and (not isinstance(path, str) or "\0" in path or not os.path.isabs(path)):
            raise InvalidArgument("revocation lists are named by an absolute path")
        checked, entry = None if path is None else Path(path), self._entry
        async with self._manager._ready().command(entry):
            if checked != entry.job.http.crl_source:
                await self._change_http(stop=SecurityFlags.SSL_ENABLE_CRL_CHECK in entry.job.http.flags, crl_source=checked)

    async def set_server_certificate_validation(self, callback: "Callable[[Job, JobFile, bytes], bool | Awaitable[bool]] | None") -> None:
        """Let the application look at each server's certificate, after TLS verified it (under the security flags) and before anything is
        requested; None: no longer.

        Only True accepts. A server that was not accepted leaves the job in TRANSIENT_ERROR with the context SERVER_CERTIFICATE_CALLBACK,
        and the code of a BitsError that the callback raised. What was accepted (host, port, certificate) is not asked again until the next
        set. The callback runs in the context of this call, on the event loop; it does not survive a restart, but that there must be one
        does: until it is set again the job fails with BG_E_SERVER_CERT_VALIDATION_INTERFACE_REQUIRED.

        Args:
            callback: a function or coroutine function of (job, file, certificate as DER).

        Raises:
            InvalidState: the job is active (BG_E_READ_ONLY_WHEN_JOB_ACTIVE); suspend it first.
        """
        if callback is not None and not callable(callback):
            raise InvalidArgument("a server certificate validation is a function of (job, file, certificate)")
        judge, entry = None if callback is None else CertificateJudge(callback), self._entry
        async with self._manager._ready().command(entry):
            if not (entry.job.state.is_settled or entry.job.state is JobState.SUSPENDED):
                raise self._unfit(f"the job is {entry.job.state.name}", ErrorCode.BG_E_READ_ONLY_WHEN_JOB_ACTIVE)
            await self._change_http(validates_certificates=judge is not None)
            entry.judge = judge

    async def _change_http(self, *, stop: bool = False, **fields: Any) -> None:
        """For a command; with `stop` a running attempt begins again with the new values."""
        engine, entry = self._manager._ready(), self._entry
        if stop:
            await engine.halt(entry)
        await engine.change(entry, http=replace(entry.job.http, **fields))

    async def set_credentials(self, target: AuthTarget, scheme: AuthScheme, user_name: str | None, password: str | None) -> None:
        """What the job may answer a challenge with; None, None: the acting token's own credentials (NTLM and NEGOTIATE only).

        Kept encrypted until the job leaves the queue. Bound to the origins that the job names when it is first resumed, or names now if it
        was (T19). Replaces what was set for the same target and scheme.

        Raises:
            InvalidArgument: exactly one of user name and password is None; BASIC or DIGEST without them; too long.
        """
        engine = self._manager._ready()
        checked = AuthCredentials(target, scheme, user_name, password)
        async with engine.command(self._entry):
            await self._manager._save_grants(self._entry, [checked])

    async def remove_credentials(self, target: AuthTarget, scheme: AuthScheme) -> bool:
        """Forget what was set; its connections are closed at once. False: nothing was set."""
        engine, entry = self._manager._ready(), self._entry
        async with engine.command(entry):
            rest = [grant for grant in entry.grants if (grant.target, grant.scheme) != (target, scheme)]
            if len(rest) == len(entry.grants):
                return False
            await self._manager._forget_network(entry)  # first: cancelled in between, at worst a connection is made again
            await engine.save(GrantRemoved(self.id, target, scheme), then=partial(entry.grants.__setitem__, slice(None), rest))
            return True

    def take_ownership(self) -> Coroutine[Any, Any, None]:
        """Make the ambient identity at this call the owner. What the old owner entrusted to the job is dropped: its credentials and its
        helper token; what was fetched is fetched anew, because the part files are the old owner's. Other handles on the job lead nowhere
        from now on (for them it is CANCELLED): get a new one by `get_job`.

        Raises:
            AccessDenied: the caller is not elevated.
        """
        return self._take_ownership(current_token())

    async def _take_ownership(self, caller: Token) -> None:
        manager, entry = self._manager, self._entry
        engine = manager._ready()
        if not manager._is_elevated(manager._usable(caller)):
            raise AccessDenied("only an elevated identity may take a job over", job_id=self.id, identity=caller.name)
        async with engine.command(entry):
            self._entry = await engine.take_over(entry, manager._owner_key(caller), caller)

    def token_options(self) -> "Coroutine[Any, Any, TokenOptions]":
        """The helper token of the job. The access check happens here, once, for the identity that calls (COM: QueryInterface).

        Raises:
            AccessDenied: the ambient identity may not open the job.
        """
        return self._token_options(current_token())

    async def _token_options(self, caller: Token) -> "TokenOptions":
        self._manager._ready()
        self._manager._admit(caller, self._entry)
        return TokenOptions(self._manager, self._entry, caller)

    # -- commands -------------------------------------------------------------------------------------------------------------------------

    async def resume(self) -> None:
        """Put the job into the queue; it has left SUSPENDED, ERROR and TRANSIENT_ERROR when it returns.

        Raises:
            InvalidState: the job has no file (BG_E_EMPTY).
        """
        await self._manager._ready().resume(self._entry, self._manager._bind)

    async def suspend(self) -> None:
        """No byte is written after it returns.

        Raises:
            InvalidState: the job is TRANSFERRED.
        """
        await self._manager._ready().suspend(self._entry)

    async def cancel(self) -> None:
        """The job leaves the queue; its part files are gone when it returns (finished ones too, unless completed before)."""
        await self._manager._ready().cancel(self._entry)

    async def complete(self, *, partial: bool = False) -> Completion:
        """Put the files in their places, in one rename each; the job leaves the queue. Returns the paths.

        `partial` is BITS's Complete: in any state, keeps the finished files and drops the rest. `Completion.code` says whether it did.

        Raises:
            InvalidState: not TRANSFERRED, and not `partial`.
            LocalFileError: a file could not be put in place; the job stays, files that were are available; call it again or cancel.
            TokenRequired: the identity that must do it has no token.
        """
        return await self._manager._ready().complete(self._entry, partial=partial)

    async def wait(self, *, transient: bool = False) -> None:
        """Return when the job is TRANSFERRED or ACKNOWLEDGED; in on-demand mode also when all is there that was asked for, and the job is
        SUSPENDED. Cancelling stops the waiting, never the job.

        Raises:
            BitsError: the job is in ERROR (with `transient` also in TRANSIENT_ERROR): a new instance of its error.
            JobCancelled: it was cancelled. InvalidState: it was never resumed. ManagerClosed: the manager closed.
        """
        engine = self._manager._ready()
        job = self._entry.job
        if job.state is JobState.SUSPENDED and not job.resumed:
            raise InvalidState("the job was never resumed", job_id=self.id)

        def settled() -> bool:
            state = self.state
            satisfied = state is JobState.SUSPENDED and self._entry.satisfied
            return state.is_settled or satisfied or (transient and state is JobState.TRANSIENT_ERROR)

        await engine.until(settled)
        if self.state is JobState.CANCELLED:
            raise JobCancelled(job_id=self.id)
        if self.error is not None:
            raise self.error.located(job_id=self.id)

    def events(self, *, follow: bool = False) -> EventStream:
        """What happens from now on; the first item is a `JobChanged` with the job as it is.

        The stream ends after TRANSFERRED, ERROR or a final state, with `follow` after a final state only.
        """
        engine = self._manager._ready()

        def ends(state: JobState) -> bool:
            return state.is_final if follow else state.is_settled

        stream = engine.stream(lambda job_id: job_id == self.id, ends)
        stream.publish(engine.snapshot(self._entry))
        return stream


@final
class TokenOptions:
    """The helper token of a job (IBitsTokenOptions). Works under any ambient identity: the access check was made when it was obtained."""

    def __init__(self, manager: "BitsManager", entry: Entry, caller: Token) -> None:
        self._manager = manager
        self._entry = entry
        self._caller = caller

    @property
    def helper_token_flags(self) -> HelperTokenFlags:
        """Where the helper acts."""
        return self._entry.job.helper_flags

    @property
    def helper_token_sid(self) -> str | None:
        """Whose token it is; None: no helper."""
        return None if self._entry.helper is None else self._entry.helper.sid

    def set_helper_token(self) -> Coroutine[Any, Any, None]:
        """Take the token of the enclosing `impersonate()` as the job's helper, in place of any other, from the next attempt on.

        Raises:
            ImpersonationFailed: there is no enclosing `impersonate()`, or its token's level is below IMPERSONATE.
            AccessDenied: the token is elevated and the caller of `token_options()` was not.
        """
        return self._set_helper(impersonation())

    async def _set_helper(self, token: Token | None) -> None:
        engine = self._manager._ready()
        if token is None:
            message = "set_helper_token() takes the token of an enclosing impersonate(); there is none"
            raise ImpersonationFailed(message, job_id=self._entry.job.id)
        self._manager._check_helper(token, self._caller)
        async with engine.command(self._entry):
            before, self._entry.helper = self._entry.helper, token
            if before is not token:
                await engine.drop_lanes(self._entry, before)

    async def set_helper_token_flags(self, flags: HelperTokenFlags) -> None:
        """Where the helper acts, from the next attempt on. Kept on the job, with or without a token; NONE: the owner does everything.

        Raises:
            InvalidArgument: not a HelperTokenFlags. AccessDenied: the helper is elevated and the caller of `token_options()` was not.
        """
        engine = self._manager._ready()
        checked = _flags(flags)
        if self._entry.helper is not None:
            self._manager._check_helper(self._entry.helper, self._caller)
        async with engine.command(self._entry):
            await engine.change(self._entry, helper_flags=checked)

    async def clear_helper_token(self) -> None:
        """Drop the helper token; the flags stay."""
        engine = self._manager._ready()
        async with engine.command(self._entry):
            before, self._entry.helper = self._entry.helper, None
            if before is not None:
                await engine.drop_lanes(self._entry, before)


class BitsManager(AbstractAsyncContextManager["BitsManager"]):
    """The queue. Transfers run while it is open, and only then; what is unfinished continues when it is opened again.

    For one event loop and one use, not thread-safe: a call from another loop, or before entering, raises RuntimeError.

    Args:
        store: the journal's file; None: the user's own queue (in the user's state directory).
        ssl: for every TLS connection; None: `ssl.create_default_context()`. Never modified, never stored.
        limits: how much may run at once.
        timeouts: seconds, of the connections.
        run: False: jobs can be edited, nothing is transferred.
        logon: asked once per owner whose token a restart has lost; a token that does not match the job's owner is not used.
    """

    def __init__(
        self,
        *,
        store: StrPath | None = None,
        ssl: SSLContext | None = None,
        limits: Limits = Limits(),  # noqa: B008 - a frozen value
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - a frozen value
        run: bool = True,
        logon: Callable[[Job], Awaitable[Token | None]] | None = None,
    ) -> None:
        if ssl is not None and not isinstance(ssl, SSLContext):
            raise InvalidArgument(f"ssl= takes an ssl.SSLContext or None, not {ssl!r}")
        self._path = None if store is None else Path(os.path.abspath(os.fspath(store)))
        self._tls = TlsSettings(ssl)
        self._limits = limits
        self._timeouts = timeouts
        self._run = run
        self._logon = logon
        self._seams = seams.get()
        self._one_shot: _OneShot | None = None  # for download(): found jobs wait until their owner and helper are set
        self._engine: Engine | None = None
        self._network: Network | None = None
        self._executors: TokenExecutors | None = None
        self._store: SqliteStore | None = None
        self._closing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._destinations: set[Path] = set()
        self._refusals = Refusals()

    # -- life -------------------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("a BitsManager is entered once")
        self._loop = asyncio.get_running_loop()
        try:
            self._engine = await self._start()
        except BaseException:
            await self._close_parts()
            raise
        return self

    async def _start(self) -> Engine:
        self._executors = TokenExecutors()
        with self._executors.lease(Token.for_process(), "files") as files:
            boot_id = await files.run(native.boot_id)
            await files.run(self._tls.effective)  # reads the authorities' certificates
            if self._path is None or self._one_shot:
                await files.run(_make_state_directories, _state_directory() / "downloads")
            if self._one_shot is not None:
                await self._one_shot.claim(files)
            own = self._path is None or (self._one_shot is not None and self._one_shot.private)
            path = self._path or default_store()
            # our own place may be reached through links (a home directory often is); a path that was named may not (T13)
            self._store = SqliteStore(Path(await files.run(os.path.realpath, path)) if own else path)
        self._network = self._seams.network if self._seams else Lanes(self._limits.connections_per_host, refusals=self._refusals)
        clock = self._seams.clock if self._seams else SystemClock()
        shop = Workshop(self._network, self._executors, clock, boot_id)
        engine = Engine(store=self._store, shop=shop, limits=self._limits, run=self._run, party=self._party, find_owner=self._find_owner)
        await engine.start(self._adopt, hold=self._one_shot is not None)
        return engine

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        await self.aclose()
        failure = self._engine.failure if self._engine else None
        if failure is not None and exc is None:
            raise failure.located()

    async def aclose(self, *, grace: float = 10.0) -> None:
        """Stop every transfer at a durable point and close the journal; what leaving `async with` does. Completes and cancels no job.

        Cancelled, or called again, it is finished first.

        Args:
            grace: seconds to wait for transfers to stop.
        """
        if self._engine is None:
            return
        if self._closing is None:
            self._closing = self._engine.task(self._close(self._engine, grace), "bits-close")
        await finish(self._closing)

    async def _close(self, engine: Engine, grace: float) -> None:
        try:
            await engine.stop(grace)
        finally:
            await self._close_parts()

    async def _close_parts(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self._executors is not None:
                stack.push_async_callback(self._executors.aclose)
            if self._one_shot is not None and self._executors is not None:
                stack.push_async_callback(self._one_shot.release, self._executors)
            if self._store is not None:
                stack.push_async_callback(self._close_store, self._store)
            if self._network is not None:
                stack.push_async_callback(self._network.aclose)

    async def _close_store(self, store: SqliteStore) -> None:
        private = self._one_shot is not None and self._one_shot.private
        if private and self._engine is not None and not self._engine.entries and self._engine.failure is None:
            await store.remove()  # nothing is left to continue
        else:
            await store.close()

    def _ready(self) -> Engine:
        """The engine, for a call of this loop while the manager is open."""
        if self._engine is None:
            raise RuntimeError("the BitsManager is not open: use it in `async with`")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("a BitsManager and its jobs belong to the event loop in which it was entered")
        self._engine.check()
        return self._engine

    # -- jobs -------------------------------------------------------------------------------------------------------------------------

    def create_job(
        self, display_name: str, *, priority: JobPriority = JobPriority.NORMAL, owner: Token | None = None
    ) -> Coroutine[Any, Any, Job]:
        """A new job, SUSPENDED and without files, durable when it returns.

        Args:
            display_name: for people, 1 to 256 characters.
            priority: which jobs go first.
            owner: whose job it is; None: the ambient identity at this call.

        Raises:
            InvalidArgument: a name or priority that is not allowed. AccessDenied: more jobs than `Limits.jobs_per_user`.
        """
        return self._create_job(display_name, priority, current_token() if owner is None else owner)

    async def _create_job(self, display_name: str, priority: JobPriority, owner: Token) -> Job:
        engine = self._ready()
        return Job(self, await engine.add(self._new_record(display_name, priority, owner), owner))

    def _new_record(self, display_name: str, priority: JobPriority, owner: Token) -> JobRecord:
        if not isinstance(display_name, str) or not 1 <= len(display_name) <= DISPLAY_NAME_LENGTH:
            raise InvalidArgument(f"a display name has 1 to {DISPLAY_NAME_LENGTH} characters")
        if not isinstance(priority, JobPriority):
            raise InvalidArgument(f"a priority is a JobPriority, not {priority!r}")
        engine = self._ready()
        key = self._owner_key(self._usable(owner))
        most = self._limits.jobs_per_user
        if most is not None and not owner.elevated and sum(e.job.owner.sid == key.sid for e in engine.jobs()) >= most:
            message = f"{key.name} has {most} unfinished jobs"
            raise make_error(ErrorCode.BG_E_TOO_MANY_JOBS_PER_USER, ErrorContext.GENERAL_QUEUE_MANAGER, message, identity=key.name)
        most = self._limits.jobs_per_machine
        if most is not None and not owner.elevated and len(engine.entries) >= most:
            code = ErrorCode.BG_E_TOO_MANY_JOBS_PER_MACHINE
            raise make_error(code, ErrorContext.GENERAL_QUEUE_MANAGER, f"the queue has {most} unfinished jobs", identity=key.name)
        now, proxy = engine.clock.now(), resolve(ProxySettings.preconfig(), os.environ)
        return JobRecord(id=uuid4(), display_name=display_name, owner=key, created=now, modified=now, priority=priority, proxy=proxy)

    def _check_limits(self, entry: Entry, files: Sequence["_File"]) -> None:
        """Whether the job may have these files too."""
        limits, job = self._limits, entry.job
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
            self._check_lengths(job, file.url, file.path)

    def _check_lengths(self, job: JobRecord, url: str, path: Path | None = None) -> None:
        """Whether names are as short as `Limits.name_length` wants them."""
        most = self._limits.name_length
        if most is None or job.owner.elevated:
            return
        segments = url.partition("?")[0].split("/")[3:]
        if len(str(path or "")) > most or any(len(each) > most for each in segments):
            message = f"a local name, and a segment of a URL, may have {most} characters"
            raise InvalidArgument(message, code=ErrorCode.BG_E_STRING_TOO_LONG, job_id=job.id, path=path)

    def get_job(self, job_id: UUID | str) -> Coroutine[Any, Any, Job]:
        """The access check: a handle on an unfinished job, for the ambient identity at this call.

        From the owner, the job has its owner's token again.

        Raises:
            NotFound: no such job, or it has left the queue. AccessDenied: this identity may not open it. InvalidArgument: not an id.
        """
        return self._get_job(job_id, current_token())

    async def _get_job(self, job_id: UUID | str, caller: Token) -> Job:
        engine = self._ready()
        try:
            key = job_id if isinstance(job_id, UUID) else UUID(job_id)
        except (ValueError, AttributeError, TypeError):
            raise InvalidArgument(f"a job's id is a UUID, not {str(job_id)[:50]!r}") from None
        entry = engine.entries.get(key)
        if entry is None:
            raise NotFound(job_id=key)
        self._admit(caller, entry)
        if entry.owner is None and self._is_owner(caller, entry.job.owner):
            engine.owner_found(entry, self._usable(caller))
        return Job(self, entry)

    def enum_jobs(self, *, all_users: bool = False) -> AsyncIterator[Job]:
        """The unfinished jobs of the ambient identity at this call, oldest first; with `all_users` everybody's, for elevated callers only.

        Raises:
            AccessDenied: `all_users` without being elevated.
        """
        return self._enum_jobs(current_token(), all_users)

    async def _enum_jobs(self, caller: Token, all_users: bool) -> AsyncIterator[Job]:
        engine = self._ready()
        self._refuse_fake(caller)
        if all_users and not self._is_elevated(caller):
            raise AccessDenied("only an elevated identity may list the jobs of all users", identity=caller.name)
        for entry in engine.jobs():
            if all_users or self._is_owner(caller, entry.job.owner):
                yield Job(self, entry)

    def events(self) -> EventStream:
        """Events of every job that the ambient identity at this call may open, those made later too, until the manager closes."""
        engine, caller = self._ready(), current_token()
        self._refuse_fake(caller)
        # asked now: a token that is closed later would fail those who publish, and with them the queue
        who, elevated = self._identity(caller), self._is_elevated(caller)

        def wants(job_id: UUID) -> bool:
            entry = engine.entries.get(job_id)
            return entry is not None and (elevated or who == _identity_of(entry.job.owner))

        return engine.stream(wants, lambda _: False)

    async def join(self) -> None:
        """Return when no job is QUEUED, CONNECTING, TRANSFERRING or TRANSIENT_ERROR.

        Raises:
            ManagerClosed: the manager closed first. StoreError: the journal failed.
        """
        engine = self._ready()
        await engine.until(lambda: all(e.job.state.is_settled or e.job.state is JobState.SUSPENDED for e in engine.jobs()))

    # -- who may ------------------------------------------------------------------------------------------------------------------------

    def _refuse_fake(self, token: Token) -> None:
        if token.fake and self._seams is None:
            raise ImpersonationFailed("a fake_token works with bits_async.testing.FakeNetwork only", identity=token.name)

    def _usable(self, token: Token) -> Token:
        """A token that jobs of this manager may carry."""
        if not isinstance(token, Token):
            raise InvalidArgument(f"a token is a Token, not {type(token).__name__}")
        self._refuse_fake(token)
        if token.level.value < ImpersonationLevel.IMPERSONATE.value:
            raise ImpersonationFailed(f"a token of level {token.level.name} cannot act", identity=token.name)
        return token

    def _check_helper(self, token: Token, caller: Token) -> None:
        self._usable(token)
        if token.elevated and not caller.elevated:
            raise AccessDenied("an elevated helper token may be set by an elevated caller only", identity=token.name)

    def _owner_key(self, token: Token) -> OwnerKey:
        return OwnerKey(
            sid=token.sid,
            name=token.name,
            local=token.local.key,
            principal=token.principal,
            proof=self._proof(token),
            process=token.local.is_process and not token.has_credentials and not token.fake,
            elevated=token.elevated,
        )

    def _proof(self, token: Token) -> str | None:
        """The keyed fingerprint of the secret behind a token's principal: nobody else checked that name (T7)."""
        assert self._store is not None
        if not token.has_credentials or token.network is None:
            return None
        return credential_fingerprint(token.network, self._store.fingerprint_key)

    def _identity(self, token: Token) -> "_Identity | None":
        """What must be the same in an owner key; None: nobody's (ANONYMOUS opens nothing)."""
        return None if token.level is ImpersonationLevel.ANONYMOUS else (token.local.key, token.principal, self._proof(token))

    def _is_owner(self, token: Token, key: OwnerKey) -> bool:
        """Exactly the identity that made the job: the same local user, the same principal, proved by the same secret."""
        return self._identity(token) == _identity_of(key)

    def _is_elevated(self, token: Token) -> bool:
        """Whether it opens every door. Not with a principal that nobody proved: the powers beside it are those of the process, which
        whoever merely names a principal has not shown to be his (T7)."""
        return token.elevated and token.principal is None and token.level is not ImpersonationLevel.ANONYMOUS

    def _admit(self, caller: Token, entry: Entry) -> None:
        self._refuse_fake(caller)
        if not (self._is_owner(caller, entry.job.owner) or self._is_elevated(caller)):
            raise AccessDenied(f"the job belongs to {entry.job.owner.name}", job_id=entry.job.id, identity=caller.name)

    async def _adopt(self, stored: StoredJob) -> Token | None:
        """The token of an owner for whom the process may stand in after a restart (T13), else None."""
        key, process = stored.job.owner, Token.for_process()
        if key.process:
            return process if key.local == process.local.key else None
        if key.principal is not None or key.proof is not None or process.local.key not in ("uid:0", key.local):
            return None
        try:
            token = await Token.for_user(key.name)
        except BitsError:
            return None  # the user is gone, or may not be taken: the job waits for a token and says so
        return token if token.local.key == key.local and token.name == key.name else None

    async def _find_owner(self, entry: Entry) -> Token | None:
        if self._logon is None:
            return None
        token = await self._logon(Job(self, entry))
        if token is None:
            return None
        if not self._is_owner(self._usable(token), entry.job.owner):
            raise AccessDenied(f"logon() gave a token of {token.name}, not the owner's", identity=token.name, job_id=entry.job.id)
        return token

    # -- credentials --------------------------------------------------------------------------------------------------------------------

    async def _party(self, entry: Entry, token: Token, security: TokenExecutor, file: int) -> Party:
        http = entry.job.http
        if http.headers is None:
            message = "the journal's key file was lost or replaced, and the custom headers cannot be read: set them again"
            code = ErrorCode.BG_E_INVALID_CREDENTIALS
            raise make_error(code, ErrorContext.GENERAL_QUEUE_MANAGER, message, job_id=entry.job.id)
        return Party(
            options=http,
            judge=Judge(entry.judge or entry, partial(self._judge, entry, file)) if http.validates_certificates else None,
            heard=partial(self._heard, entry, file),
            token=token,
            grants=tuple(grant.grant() for grant in entry.grants),
            proxy=entry.job.proxy,
            tls=await self._tls_of(entry),
            rules=AuthRules(),
            timeouts=self._timeouts,
            security=security,
        )

    async def _tls_of(self, entry: Entry) -> TlsSettings:
        """The manager's TLS as the job's security flags want it; read and made off the loop."""
        http, revoked = entry.job.http, None
        assert self._executors is not None
        if not http.flags & TLS_FLAGS:
            return self._tls
        if SecurityFlags.SSL_ENABLE_CRL_CHECK in http.flags:
            if http.crl_source is None:
                code = ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED
                raise make_error(code, ErrorContext.GENERAL_TRANSPORT, "the job has no revocation lists", job_id=entry.job.id)
            if entry.owner is None:
                raise TokenRequired("the revocation lists are read as the job's owner", job_id=entry.job.id)
            with self._executors.lease(entry.owner, "files") as files:
                revoked = await files.run(read_revocation_lists, http.crl_source, entry.owner.name)
        with self._executors.lease(Token.for_process(), "files") as files:
            return await files.run(self._tls.under, http.flags, revoked)

    async def _check_derivable(self, flags: SecurityFlags) -> None:
        """Raises E_NOTIMPL when the flags cannot be applied to the manager's context."""
        assert self._executors is not None
        with self._executors.lease(Token.for_process(), "files") as files:
            await files.run(self._tls.under, flags & ~SecurityFlags.SSL_ENABLE_CRL_CHECK)
            if SecurityFlags.SSL_ENABLE_CRL_CHECK in flags:
                await files.run(self._tls.check_revocable)

    async def _judge(self, entry: Entry, file: int, host: str, port: int, certificate: bytes) -> None:
        if entry.judge is None:
            raise callback_required()
        await entry.judge.ask(Job(self, entry), JobFile(self, entry, file), host, port, certificate)

    def _heard(self, entry: Entry, file: int, headers: Iterable[tuple[str, str]]) -> None:
        entry.answers[file] = tuple(headers)

    def _bind(self, entry: Entry) -> Sequence[GrantRecord]:
        """Grants without origins get those that the job names now (T19)."""
        return [grant if grant.origins is not None else replace(grant, origins=_origins(entry, grant.target)) for grant in entry.grants]

    async def _save_grants(self, entry: Entry, credentials: Iterable[AuthCredentials]) -> None:
        records = [
            GrantRecord(
                job_id=entry.job.id,
                target=given.target,
                scheme=given.scheme,
                user_name=given.user_name,
                password=given.password,
                origins=_origins(entry, given.target) if entry.job.resumed else None,
            )
            for given in credentials
        ]
        engine = self._ready()
        fresh = {(record.target, record.scheme) for record in records}
        replaced = fresh & {(grant.target, grant.scheme) for grant in entry.grants}
        if replaced:  # a credential that is only added has no connections yet; other jobs of the token keep theirs
            await self._forget_network(entry)
            self._forgive(entry, [record for record in records if (record.target, record.scheme) in replaced])
        grants = [grant for grant in entry.grants if (grant.target, grant.scheme) not in fresh] + records
        await engine.save(*records, then=partial(entry.grants.__setitem__, slice(None), grants))

    def _forgive(self, entry: Entry, records: Iterable[GrantRecord]) -> None:
        """A job's credentials that were replaced may be offered again where they were refused, even the same ones: somebody asked for
        it. Another job that merely brings a refused password may not (T26)."""
        token = entry.helper if HelperTokenFlags.NETWORK in entry.job.helper_flags else entry.owner
        if token is None:
            return
        for record in records:
            if record.user_name is not None and record.password is not None:
                self._refusals.forget(account_fingerprint(record.user_name, record.password))
            seat = Seat.PROXY if record.target is AuthTarget.PROXY else Seat.ORIGIN
            origins = record.origins or _origins(entry, record.target)
            for origin in origins:
                for offer in choose_offers(seat, origin, [replace(record, origins=origins).grant()], token):
                    self._refusals.forget(offer.fingerprint)

    async def _forget_network(self, entry: Entry) -> None:
        """A credential was replaced or removed: connections that used the old one are closed at once (T25)."""
        await self._ready().drop_lanes(entry, entry.owner, entry.helper)

    # -- one call -----------------------------------------------------------------------------------------------------------------------

    def download(
        self,
        url: "str | URL",
        path: StrPath,
        *,
        proxy: ProxySettings | str | None = None,
        credentials: Iterable[AuthCredentials] | None = None,
        owner: Token | None = None,
        helper: Token | None = None,
        helper_flags: HelperTokenFlags = HelperTokenFlags.NONE,
        sha256: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        priority: JobPriority = JobPriority.FOREGROUND,
        retry_for: float = 300.0,
    ) -> Coroutine[Any, Any, Path]:
        """Fetch one file, from create to complete. See `bits_async.download`, which is this on a manager of its own."""
        order = _Order.checked(url, path, proxy, credentials, owner, helper, helper_flags, sha256, progress, priority, retry_for)
        return self._download(order)

    async def _download(self, order: "_Order") -> Path:
        self._ready()
        if order.file.path in self._destinations:
            raise locked(order.file.path)
        self._destinations.add(order.file.path)
        try:
            entry = await self._prepare(order)
            return await self._see_through(entry, order)
        finally:
            self._destinations.discard(order.file.path)

    async def _prepare(self, order: "_Order") -> Entry:
        """The job of an earlier call for the same owner, path and URL, or a new one; with owner, helper and settings of this call."""
        engine = self._ready()
        self._usable(order.owner)
        entry = await self._found(order)
        if entry is None:
            record = self._new_record(order.display_name, order.priority, order.owner)
            entry = await engine.add(record, order.owner, [_file_record(record.id, 0, order.file)])
        elif not entry.job.state.is_settled and entry.job.state is not JobState.SUSPENDED:
            await engine.suspend(entry)
        if order.helper is not None:
            self._check_helper(order.helper, order.caller)
        async with engine.command(entry):
            stale = [token for token in (entry.owner, entry.helper) if token not in (order.owner, order.helper)]
            entry.owner, entry.helper = order.owner, order.helper
            file = entry.files[0]
            if order.file.sha256 not in (None, file.sha256):
                file = replace(file, sha256=order.file.sha256, transferred=False)  # its digest has not been looked at
            await engine.change(
                entry,
                files=[file],
                priority=order.priority,
                proxy=order.proxy,
                helper_flags=order.helper_flags,
                minimum_retry_delay=RETRY_DELAY_FLOOR,
                no_progress_timeout=order.retry_for,
            )
            if entry.grants:
                removed = [GrantRemoved(entry.job.id, old.target, old.scheme) for old in entry.grants]
                await engine.save(*removed, then=entry.grants.clear)
                stale += [order.owner, order.helper]
            await engine.drop_lanes(entry, *stale)
            await self._save_grants(entry, order.granted())
        return entry

    async def _found(self, order: "_Order") -> Entry | None:
        engine = self._ready()
        for entry in engine.jobs():
            mine = entry.job.display_name == order.display_name and self._is_owner(order.owner, entry.job.owner)
            if mine and len(entry.files) == 1 and entry.files[0].path == order.file.path:
                if entry.files[0].original_url == order.file.url:
                    return entry
                await engine.cancel(entry)  # another file for that path: the old part goes
        return None

    async def _see_through(self, entry: Entry, order: "_Order") -> Path:
        engine, job = self._ready(), Job(self, entry)
        try:
            await job.resume()
            if order.progress is not None:
                await _show(job, order.progress, engine.clock)
            await job.wait()
            (path,) = await job.complete()
        except BitsError as error:
            if not entry.job.state.is_final and engine.failure is None and not engine.closed and _nothing_to_keep(entry, error):
                await engine.cancel(entry)
            raise
        except BaseException:
            # a cancel, or what the progress function raised: the job is suspended, and a later call goes on
            await asyncio.shield(engine.task(_leave_suspended(engine, entry), "bits-suspend"))
            raise
        return path


async def _leave_suspended(engine: Engine, entry: Entry) -> None:
    with contextlib.suppress(InvalidState, ManagerClosed):  # finished, or closed, in the meantime
        await engine.suspend(entry)


def _nothing_to_keep(entry: Entry, error: BitsError) -> bool:
    """After an error the part is kept when durable bytes are in it, and thrown away when they are wrong."""
    durable = any(piece.durable > piece.start for file in entry.files for piece in file.slices)
    return isinstance(error, ValidationFailed) or not durable


async def _show(job: Job, progress: Callable[[Progress], None], clock: Clock) -> None:
    """Call `progress` in the caller's own task: first, last, at each change of state, and every half second between."""
    shown, last = -math.inf, None
    async with job.events() as stream:
        async for event in stream:
            if isinstance(event, JobChanged):
                p = event.progress
                last = Progress(
                    time=event.time,
                    job_id=event.job_id,
                    state=event.state,
                    waiting=event.waiting,
                    bytes_total=p.bytes_total,
                    bytes_transferred=p.bytes_transferred,
                    files_total=p.files_total,
                    files_transferred=p.files_transferred,
                )
            elif isinstance(event, Progress) and clock.monotonic() - shown >= PROGRESS_INTERVAL:
                last = event
            else:
                continue
            shown = clock.monotonic()
            progress(last)


@dataclass(frozen=True, slots=True)
class _File:
    """A checked `FileInfo`: the URL as it is sent, an absolute path, a digest in lower case."""

    url: str
    path: Path
    sha256: str | None
    ranges: tuple[FileRange, ...] = ()


@dataclass(frozen=True, slots=True)
class _Order:
    """The checked arguments of one `download()`."""

    file: _File
    proxy: ProxySettings
    credentials: tuple[AuthCredentials, ...] | None
    caller: Token
    owner: Token
    owner_named: bool
    helper: Token | None
    helper_flags: HelperTokenFlags
    progress: Callable[[Progress], None] | None
    priority: JobPriority
    retry_for: float

    @classmethod
    def checked(
        cls,
        url: "str | URL",
        path: StrPath,
        proxy: ProxySettings | str | None,
        credentials: Iterable[AuthCredentials] | None,
        owner: Token | None,
        helper: Token | None,
        helper_flags: HelperTokenFlags,
        sha256: str | None,
        progress: Callable[[Progress], None] | None,
        priority: JobPriority,
        retry_for: float,
    ) -> "_Order":
        """Read the ambient identity and the environment, and refuse what cannot be meant."""
        flags = _flags(helper_flags)
        if (helper is None) != (flags is HelperTokenFlags.NONE):
            raise InvalidArgument("helper= and helper_flags= go together")
        if progress is not None and (not callable(progress) or inspect.iscoroutinefunction(progress)):
            raise TypeError("progress= takes a plain function")
        if not isinstance(priority, JobPriority):
            raise InvalidArgument(f"a priority is a JobPriority, not {priority!r}")
        for token in (owner, helper):
            if token is not None and not isinstance(token, Token):
                raise InvalidArgument(f"a token is a Token, not {type(token).__name__}")
        given = None if credentials is None else tuple(credentials)
        if given is not None and not all(isinstance(item, AuthCredentials) for item in given):
            raise InvalidArgument("credentials= takes AuthCredentials")
        return cls(
            file=_checked(FileInfo(url, os.path.abspath(os.fspath(path)), sha256=sha256)),
            proxy=resolve(ProxySettings.of(proxy), os.environ),
            credentials=given,
            caller=current_token(),
            owner=current_token() if owner is None else owner,
            owner_named=owner is not None,
            helper=helper,
            helper_flags=flags,
            progress=progress,
            priority=priority,
            retry_for=_seconds("retry_for", retry_for),
        )

    @property
    def display_name(self) -> str:
        """What tells these jobs from the user's own."""
        return f"download {self.file.path.name}"[:DISPLAY_NAME_LENGTH]

    def granted(self) -> Sequence[AuthCredentials]:
        """The given credentials, or what naming a token with network credentials permits: NEGOTIATE, for the server and the proxy."""
        if self.credentials is not None:
            return self.credentials
        named_owner = self.owner if self.owner_named else None
        token = self.helper if HelperTokenFlags.NETWORK in self.helper_flags else named_owner
        if token is None or not token.has_credentials:
            return ()
        return [AuthCredentials(target, AuthScheme.NEGOTIATE, None, None) for target in AuthTarget]


async def download(
    url: "str | URL",
    path: StrPath,
    *,
    proxy: ProxySettings | str | None = None,
    credentials: Iterable[AuthCredentials] | None = None,
    owner: Token | None = None,
    helper: Token | None = None,
    helper_flags: HelperTokenFlags = HelperTokenFlags.NONE,
    sha256: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    priority: JobPriority = JobPriority.FOREGROUND,
    retry_for: float = 300.0,
    store: StrPath | None = None,
    ssl: SSLContext | None = None,
) -> Path:
    """Fetch one file and return its path; an existing file is replaced at once, when the new one is whole.

    Run again after a kill, a cancel or an error, it goes on where it stopped: a private journal per owner and destination remembers the
    job until nothing is left to continue. Where an error advises to resume the job, call again.

    Args:
        url: http or https, sent as it stands; no user information.
        path: the destination; relative paths are those of the working directory at the call.
        proxy: None: the environment's (`http_proxy`, `https_proxy`, `no_proxy`); a URL; or settings.
        credentials: what challenges may be answered with; `()`: nothing; None: the credentials of the named owner, or of the helper with
            NETWORK, for the hosts of the URL and the proxy as given.
        owner: who does it; None: the ambient identity.
        helper, helper_flags: a second identity, and where it acts; both or neither.
        sha256: hexadecimal; a file with another one is refused.
        progress: a plain function, called in this task: first, last, at each change of state, at most every 0.5 s between.
        priority: of interest on a shared manager only.
        retry_for: seconds without a byte until a transient error is final; 0: the first error is.
        store: the journal's file instead of a private one; the lock on the destination stays in the user's state directory.
        ssl: None: `ssl.create_default_context()`.

    Raises:
        BitsError: the one that says what went wrong; `LocalFileError` with BG_E_DESTINATION_LOCKED when another transfer to the same path
            is running.
    """
    order = _Order.checked(url, path, proxy, credentials, owner, helper, helper_flags, sha256, progress, priority, retry_for)
    manager = BitsManager(store=private_store(order.owner, order.file.path) if store is None else store, ssl=ssl)
    manager._one_shot = _OneShot(order.file.path, private=store is None)
    async with manager:
        return await manager._download(order)


class _OneShot:
    """What tells the manager of one `download()` from a queue: a lock on the destination, and perhaps a journal of its own."""

    def __init__(self, destination: Path, *, private: bool) -> None:
        self.private = private
        self._destination = destination
        self._path = _state_directory() / "downloads" / f"{_digest(str(destination))}.lock"
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
        self._lock = take_lock(self._path, self._path)  # kept by the thread: a cancelled claim is given back too

    async def release(self, executors: TokenExecutors) -> None:
        """Give the destination back."""
        if self._lock is not None:
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
    return _state_directory() / "queue.db"


def private_store(owner: Token, path: Path) -> Path:
    """The journal of `download()` for one owner and one destination."""
    return _state_directory() / "downloads" / f"{_digest(owner.sid, str(path))}.db"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _state_directory() -> Path:
    import platformdirs

    try:
        return platformdirs.user_state_path("bits_async", appauthor=False)
    except RuntimeError:  # no HOME, and a user whom the user database does not know
        code = ErrorCode.ERROR_PATH_NOT_FOUND
        raise StoreError("this user has no home directory for the state of transfers", code=code, advice=STATE_ADVICE) from None


def _make_state_directories(path: Path) -> None:
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


_Identity = tuple[str, str | None, str | None]  # local user, principal, the proof of that


def _identity_of(key: OwnerKey) -> _Identity:
    return key.local, key.principal, key.proof


def _origins(entry: Entry, target: AuthTarget) -> frozenset[Origin]:
    """The origins that a job names now: of its files as the application named them, or of the proxies on the way to them."""
    urls = [file.original_url for file in entry.files]
    if target is AuthTarget.SERVER:
        return frozenset(Origin.of(url) for url in urls)
    proxies = [route(entry.job.proxy, url) for url in urls]
    return frozenset(Origin.of(proxy) for proxy in proxies if proxy is not None)


def _not_plain(origins: frozenset[Origin]) -> frozenset[Origin]:
    return frozenset(origin for origin in origins if origin.scheme != "http")


def _kept_from_proxies(grant: GrantRecord) -> GrantRecord:
    """Without the origins that a forwarding proxy stands before: it reads what they are shown."""
    if grant.target is AuthTarget.PROXY or grant.origins is None:
        return grant
    return replace(grant, origins=_not_plain(grant.origins))


def _checked(file: FileInfo) -> _File:
    path = os.fspath(file.path)
    if not isinstance(path, str):
        raise InvalidArgument("a path is text, not bytes")
    if "\0" in path or not os.path.isabs(path):
        raise InvalidArgument("a job's destination is an absolute path", path=path.replace("\0", "?"))
    if Path(path).name in ("", ".", ".."):
        raise InvalidArgument("a destination names a file", path=path)
    digest = file.sha256
    if digest is not None:
        digest = digest.lower() if isinstance(digest, str) else ""
        if not _SHA256.fullmatch(digest):
            raise InvalidArgument("sha256= takes 64 hexadecimal digits")
    return _File(check_url(str(file.url)), Path(path), digest)


def _file_record(job_id: UUID, index: int, file: _File) -> FileRecord:
    named = FileRecord(job_id=job_id, index=index, original_url=file.url, url=file.url, path=file.path, sha256=file.sha256)
    return replace(named, ranges=file.ranges)


def _replaced_prefix(url: str, old: str, new: str) -> str:
    replaced = new + url[len(old) :]
    if len(replaced) > MAX_URL:
        raise InvalidArgument(f"the prefix makes a URL of more than {MAX_URL} characters")
    return check_url(replaced)


def _yes_or_no(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} takes True or False, not {value!r}")
    return value


def _flags(flags: HelperTokenFlags) -> HelperTokenFlags:
    if not isinstance(flags, HelperTokenFlags):
        raise InvalidArgument(f"helper flags are HelperTokenFlags, not {flags!r}")
    return flags


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InvalidArgument(f"{name} takes seconds, 0 or more, not {value!r}")
    return float(value)
