"""The handles: `Job` and `JobFile`.

A handle is a capability: the access check was made when it was obtained (`door`), and afterwards the ambient identity no longer matters.
The ambient identity is read at the call itself, by the functions that say so and by no others.
"""

import contextvars
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final
from uuid import UUID

from ..auth.policy import AuthCredentials, AuthScheme, AuthTarget, check_target_and_scheme
from ..errors import (
    AccessDenied,
    BitsError,
    ErrorCode,
    ErrorContext,
    InvalidArgument,
    InvalidState,
    JobCancelled,
    make_error,
)
from ..identity.ambient import current_token
from ..identity.processes import command_arguments
from ..identity.tokens import Token
from ..transport.answers import check_url
from ..transport.options import (
    ClientCertificate,
    SecurityFlags,
    checked_flags,
    checked_headers,
    checked_method,
    checked_subject_name,
    checked_thumbprint,
)
from ..transport.proxies import ProxySettings, resolve
from ..transport.ranges import FileRange, checked_ranges, checked_requests, joined, located
from .arguments import (
    CheckedFile,
    FileInfo,
    StrPath,
    checked_absolute,
    checked_bandwidth,
    checked_bool,
    checked_connections,
    checked_cost_flags,
    checked_file,
    checked_notify_flags,
    checked_priority,
    checked_seconds,
    checked_text,
    file_record,
    replaced_prefix,
)
from .callbacks import Listener
from .certificates import CertificateJudge
from .consent import change_what_the_helper_saw, seen_by_the_helper
from .desk import DISPLAY_NAME_LENGTH, Desk
from .model import (
    RETRY_DELAY_FLOOR,
    Cancellation,
    Completion,
    CostFlags,
    FileProgress,
    FileRecord,
    GrantRemoved,
    JobPriority,
    JobProgress,
    JobRecord,
    JobState,
    JobTimes,
    NotifyCmdLine,
    NotifyFlags,
    Waiting,
)
from .notify import EventStream
from .parties import kept_from_proxies, named_origins, not_plain
from .roster import Entry
from .token_options import TokenOptions

if TYPE_CHECKING:
    from yarl import URL

DESCRIPTION_LENGTH: Final = 1024
STORED: Final = (AuthTarget.PROXY, AuthScheme.NEGOTIATE)  # the grant that BITS_JOB_PROPERTY_USE_STORED_CREDENTIALS stands for
MAX_NOTIFICATION_INTERVAL: Final = (2**32 - 1) / 1000


@final
class JobFile:
    """One file of a job; the values are as new as your last await."""

    def __init__(self, desk: Desk, entry: Entry, index: int, changer: Token | None = None) -> None:
        self._desk = desk
        self._entry = entry
        self._index = index
        self._changer = changer

    def _called_by(self, changer: Token | None) -> "JobFile":
        return JobFile(self._desk, self._entry, self._index, changer)

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

        Servers write them: cookies may be among them, and nothing in them is to be believed. Where the helper acts on the network there
        are no cookies: they are its own login, which the owner has no part in.
        """
        came = self._entry.answers.get(self._index, ())
        return tuple((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")) for name, value in came)

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
        engine, checked = self._desk.ready(), checked_requests(ranges)
        async with engine.command(self._entry):
            self._check_on_demand(checked)
            await engine.ask_for(self._entry, self._index, wanted=joined((*self._record.wanted, *checked)))

    async def update_download_position(self, offset: int) -> None:
        """Fetch what was asked for at this offset and behind it first, then what lies before it.

        Raises:
            InvalidArgument: not an offset in the file (BG_E_INVALID_RANGE). InvalidState: the job is not in on-demand mode.
        """
        engine = self._desk.ready()
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

    @seen_by_the_helper
    async def set_remote_name(self, url: "str | URL") -> None:
        """Fetch the file from another URL, from now on; durable when it returns.

        The position is kept where the file there proves to be the same version, by its size and time (for URLs that differ in their
        query only, by its ETag too); a finished file is not fetched again. An origin that the job did not name before gets no
        credentials until `Job.set_credentials` is called again (T19).

        Raises:
            InvalidArgument: not a URL that can be fetched, as in `Job.add_file`.
        """
        engine, name = self._desk.ready(), check_url(str(url))
        async with engine.command(self._entry):
            self._desk.check_lengths(self._entry.job, name)
            await change_what_the_helper_saw(self._desk, self._entry, self._changer, "a remote name")
            await engine.rename(self._entry, {self._index: name})

    async def set_validation_state(self, valid: bool) -> None:
        """Say whether the content of the finished file, in `temporary_name`, is right.

        False drops what was fetched, and the job goes to ERROR (BG_E_VALIDATION_FAILED); resume fetches the file anew.

        Raises:
            InvalidState: the file is not transferred yet (E_PENDING), or it is at its destination already.
        """
        engine, checked = self._desk.ready(), checked_bool("validation_state", valid)
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

    def __init__(self, desk: Desk, entry: Entry, changer: Token | None = None) -> None:
        self._desk = desk
        self._entry = entry
        self._changer = changer

    def _called_by(self, changer: Token | None) -> "Job":
        return Job(self._desk, self._entry, changer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.display_name!r} {self.state.name}>"

    @property
    def id(self) -> UUID:
        """What `BitsManager.get_job` finds it by."""
        return self._entry.job.id

    @property
    def display_name(self) -> str:
        """For people; several jobs may have the same."""
        return self._entry.job.display_name

    @property
    def owner(self) -> str:
        """The owner's sid."""
        return self._entry.job.owner.sid

    @property
    def owner_name(self) -> str:
        """The owner's name, for people."""
        return self._entry.job.owner.name

    @property
    def owner_elevation_state(self) -> bool:
        """The owner was elevated when the job was made: then only elevated identities may open it."""
        return self._entry.job.owner.elevated

    @property
    def owner_integrity_level(self) -> int:
        """SECURITY_MANDATORY_HIGH_RID (0x3000) of an elevated owner, else SECURITY_MANDATORY_MEDIUM_RID (0x2000).

        It says what `owner_elevation_state` says, in Windows' terms: labels of its own no other system has.
        """
        return 0x3000 if self.owner_elevation_state else 0x2000

    # -- how it stands ------------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> JobState:
        """Where it is in its life cycle."""
        return self._entry.job.state

    @property
    def waiting(self) -> Waiting | None:
        """Why nothing moves, or why the application was not told of the job's end; None when something does, or nothing will."""
        return self._desk.engine.waiting(self._entry)

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
        return tuple(JobFile(self._desk, self._entry, file.index) for file in self._entry.files)

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
        """Seconds that the job may spend CONNECTING and TRANSFERRING, counted from its last resume: its own, else group policy's."""
        return self._desk.engine.maximum_download_time(self._entry.job)

    @property
    def cost_flags(self) -> CostFlags:
        """The costs of the connection at which the job may run."""
        return self._entry.job.cost_flags

    @property
    def maximum_bandwidth(self) -> float | None:
        """Bytes per second at most; None: as fast as the manager and its policy allow."""
        return self._entry.job.maximum_bandwidth

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
    def files_at_once(self) -> int:
        """Files that are fetched side by side."""
        return self._entry.job.files_at_once

    @property
    def segments(self) -> int:
        """Ranges of one large file that are fetched side by side."""
        return self._entry.job.segments

    @property
    def notify_interface(self) -> "BackgroundCopyCallback | None":
        """What is told what becomes of the job."""
        listener = self._entry.outbox.listener
        callback: BackgroundCopyCallback | None = None if listener is None else listener.callback
        return callback

    @property
    def notify_flags(self) -> NotifyFlags:
        """What the callback and the command are told of."""
        return self._entry.job.notify_flags

    @property
    def notify_cmd_line(self) -> NotifyCmdLine | None:
        """What is run when the job is transferred or in error."""
        return self._entry.job.notify_cmd_line

    @property
    def minimum_notification_interval(self) -> float:
        """Seconds between two modifications, or two portions of ranges, that the callback is told of."""
        return self._entry.job.minimum_notification_interval

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

    @property
    def client_certificate(self) -> ClientCertificate | None:
        """Where the client certificate is that servers are shown; None: there is none."""
        return self._entry.job.http.client_certificate

    # -- files and properties -------------------------------------------------------------------------------------------------------------

    @seen_by_the_helper
    async def add_file(
        self, url: "str | URL", path: StrPath, *, sha256: str | None = None, sha512: str | None = None, blake3: str | None = None
    ) -> JobFile:
        """Add one file; durable when it returns. Of two files with one path both are fetched, and `complete()` keeps the one added later.

        Raises:
            InvalidArgument: not an http(s) URL, user information in it, a relative path, one with a NUL or of the manager's journal, not a
                digest.
        """
        self._desk.ready()
        (file,) = await self._add([checked_file(FileInfo(url, path, sha256=sha256, sha512=sha512, blake3=blake3))])
        return file

    @seen_by_the_helper
    async def add_file_set(self, files: Iterable[FileInfo]) -> Sequence[JobFile]:
        """Add files, all or none, in one transaction.

        Raises:
            InvalidArgument: as `add_file`; AccessDenied (BG_E_TOO_MANY_FILES_IN_JOB): more than `Limits.files_per_job`.
        """
        self._desk.ready()
        if not isinstance(files, Iterable):
            raise InvalidArgument(f"files are given as FileInfo, in a list even if there is one, not {type(files).__name__}")
        return await self._add([checked_file(file) for file in files])

    @seen_by_the_helper
    async def add_file_with_ranges(
        self,
        url: "str | URL",
        path: StrPath,
        ranges: Sequence[FileRange],
        *,
        sha256: str | None = None,
        sha512: str | None = None,
        blake3: str | None = None,
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
        self._desk.ready()
        file_info = FileInfo(url, path, sha256=sha256, sha512=sha512, blake3=blake3)
        (file,) = await self._add([replace(checked_file(file_info), ranges=checked_ranges(ranges))])
        return file

    async def _add(self, files: Sequence[CheckedFile]) -> Sequence[JobFile]:
        engine, entry = self._desk.ready(), self._entry
        async with engine.command(entry):
            self._desk.check_limits(entry, files)
            if (entry.job.dynamic_content or entry.job.on_demand_mode) and any(file.ranges for file in files):
                raise self._unfit("dynamic content, and a file that is fetched on demand, is not made of ranges")
            first = len(entry.files)
            records = [file_record(self.id, first + n, file) for n, file in enumerate(files)]
            await change_what_the_helper_saw(self._desk, entry, self._changer, "its files")
            await engine.add_files(entry, records)
        return tuple(JobFile(self._desk, entry, record.index) for record in records)

    def _unfit(self, message: str, code: ErrorCode = ErrorCode.BG_E_UNSUPPORTED_JOB_CONFIGURATION) -> BitsError:
        return make_error(code, ErrorContext.NONE, message, job_id=self.id)

    @seen_by_the_helper
    async def replace_remote_prefix(self, old_prefix: str, new_prefix: str) -> bool:
        """Put another beginning on the URLs of all files that begin with `old_prefix`, letter by letter; all or none of them.

        See `JobFile.set_remote_name` for what becomes of positions and credentials. False: no URL begins so.

        Raises:
            InvalidArgument: an empty prefix, or a URL that cannot be fetched comes out.
        """
        engine, entry = self._desk.ready(), self._entry
        if not isinstance(old_prefix, str) or not isinstance(new_prefix, str) or not old_prefix or not new_prefix:
            raise InvalidArgument("a prefix is text, at least one character")
        async with engine.command(entry):
            old = [(file.index, file.url) for file in entry.files if file.url.startswith(old_prefix)]
            urls = {index: replaced_prefix(url, old_prefix, new_prefix) for index, url in old}
            for url in urls.values():
                self._desk.check_lengths(entry.job, url)
            if urls:
                await change_what_the_helper_saw(self._desk, entry, self._changer, "remote names")
                await engine.rename(entry, urls)
            return bool(urls)

    @seen_by_the_helper
    async def set_proxy_settings(self, settings: ProxySettings) -> None:
        """How the job reaches its servers, from the next attempt on.

        A later proxy needs its credentials set again; so do servers over plain http once the job was resumed, because another proxy would
        see what is shown to them, and custom headers (T19).

        Raises:
            InvalidArgument: not `ProxySettings`.
        """
        if not isinstance(settings, ProxySettings):
            raise InvalidArgument(f"settings= takes ProxySettings, not {type(settings).__name__}: ProxySettings.override() names a proxy")
        engine, entry, proxy = self._desk.ready(), self._entry, resolve(settings, os.environ)
        async with engine.command(entry):
            if proxy != entry.job.proxy:
                await change_what_the_helper_saw(self._desk, entry, self._changer, "its proxy")
            exposed = entry.job.resumed and proxy != entry.job.proxy
            grants = [kept_from_proxies(grant) if exposed else grant for grant in entry.grants]
            http = entry.job.http
            if exposed and http.header_origins:
                http = replace(http, header_origins=not_plain(http.header_origins))
            if grants != entry.grants:
                await engine.save(*grants)
                entry.grants[:] = grants
            await engine.change(entry, proxy=proxy, http=http)

    async def set_priority(self, priority: JobPriority) -> None:
        """Which jobs go first.

        Raises:
            InvalidArgument: no JobPriority (a number: E_NOTIMPL, as in BITS).
            InvalidState: a job with another method than GET stays FOREGROUND (BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD).
        """
        checked_priority(priority)
        engine, entry = self._desk.ready(), self._entry
        async with engine.command(entry):
            if priority is not JobPriority.FOREGROUND and not entry.job.http.plain:
                message = f"a job with the method {self.http_method} stays FOREGROUND"
                raise self._unfit(message, ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD)
            if not replace(entry.job, priority=priority).may_run:
                await engine.halt(entry)
            await engine.change(entry, priority=priority)

    async def set_display_name(self, display_name: str) -> None:
        """For people, 1 to 256 characters.

        Raises:
            InvalidArgument: no text, or empty; too long (BG_E_STRING_TOO_LONG).
        """
        if display_name == "":
            raise InvalidArgument("a job has a display name")
        await self._set(display_name=checked_text("display_name", display_name, DISPLAY_NAME_LENGTH))

    async def set_description(self, description: str) -> None:
        """For people, at most 1024 characters.

        Raises:
            InvalidArgument: no text, or too long (BG_E_STRING_TOO_LONG).
        """
        await self._set(description=checked_text("description", description, DESCRIPTION_LENGTH))

    async def set_maximum_bandwidth(self, bytes_per_second: float | None) -> ErrorCode:
        """How fast the job's bytes may come, FOREGROUND or not; None: as fast as the manager allows. Counts at once.

        Returns:
            S_OK; BG_S_OVERRIDDEN_BY_POLICY: it is set, but group policy now allows the job less than that.

        Raises:
            InvalidArgument: not a positive number.
        """
        await self._set(maximum_bandwidth=checked_bandwidth(bytes_per_second))
        overridden = self._desk.engine.overridden(self._entry)
        return ErrorCode.BG_S_OVERRIDDEN_BY_POLICY if overridden else ErrorCode.S_OK

    @seen_by_the_helper
    async def set_maximum_download_size(self, size: int | None) -> None:
        """Bytes that the files of the job may have together, before the first resume. A job that would get more fails.

        Raises:
            InvalidArgument: not a whole number from 1 (BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE).
            InvalidState: the job was resumed before (BG_E_READ_ONLY_PROPERTY_AFTER_RESUME).
        """
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**64):
            message = f"maximum_download_size takes a whole number of bytes, not {size!r}"
            raise InvalidArgument(message, code=ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE)
        async with self._desk.ready().command(self._entry):
            before = self._entry.job.maximum_download_size
            self._check_early("maximum_download_size")
            if before is not None and (size is None or size > before):
                await change_what_the_helper_saw(self._desk, self._entry, self._changer, "how much it may fetch")
            await self._desk.ready().change(self._entry, maximum_download_size=size)

    async def set_dynamic_content(self, dynamic: bool) -> None:
        """The files are made when they are asked for: neither a size nor ranges are needed, and after any interruption a file begins
        anew. The job is transferred at FOREGROUND priority only, where nothing else interrupts it.

        Where only the end of the connection says where a file ends, a server must end TLS with its close_notify, or the file is taken for
        cut: anybody on the way can end a connection.

        Raises:
            InvalidState: the job was resumed before (BG_E_READ_ONLY_PROPERTY_AFTER_RESUME); it has a file with ranges, or is in on-demand
                mode (BG_E_UNSUPPORTED_JOB_CONFIGURATION); or another method than GET (BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD).
        """
        await self._set_early("dynamic_content", checked_bool("dynamic_content", dynamic))

    async def set_on_demand_mode(self, on_demand: bool) -> None:
        """Fetch only what `JobFile.request_file_ranges` asks for, in any order; the rest of the part file stays a hole.

        The server must support ranges and give a validator, else the job stops with BG_E_RANDOM_ACCESS_NOT_SUPPORTED.

        Raises:
            InvalidState: the job was resumed before (BG_E_READ_ONLY_PROPERTY_AFTER_RESUME); it has dynamic content, or a file with
                ranges (BG_E_UNSUPPORTED_JOB_CONFIGURATION); or another method than GET (BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD).
        """
        await self._set_early("on_demand_mode", checked_bool("on_demand_mode", on_demand))

    async def set_high_performance(self, fast: bool) -> None:
        """Journal nothing while a file is fetched, and sync it once, at its end: after a loss of power it is fetched anew.

        BITS also writes to the destination itself and leaves there what an error or a cancel has cut short. That much of it we do not
        do: a rename costs nothing, and the destination never holds half a file, or parts of two versions.

        Raises:
            InvalidState: the job has a file (BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE).
        """
        engine, checked = self._desk.ready(), checked_bool("high_performance", fast)
        async with engine.command(self._entry):
            if self._entry.files:
                code = ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE
                raise self._unfit("high_performance is set before the first file is added", code)
            await engine.change(self._entry, high_performance=checked)

    async def set_files_at_once(self, count: int) -> None:
        """Fetch up to so many files side by side, each on a connection of its own and all as one identity; 1: one after the other.

        For many small files. `Limits.connections_per_host` bounds the connections whatever is asked for here. Takes effect when the job
        runs next.

        Raises:
            InvalidArgument: not a whole number from 1 to 64.
        """
        await self._set(files_at_once=checked_connections("files_at_once", count))

    async def set_segments(self, count: int) -> None:
        """Fetch a large file in up to so many ranges side by side, each on a connection of its own; 1: in one stream.

        For lines that lose packets, and servers that give each connection only so much. All ranges are of one version of the file; if one
        of them meets another version, the whole file begins anew. It needs a server that serves ranges and gives a validator; from others
        the file comes in one stream. `Limits.connections_per_host` bounds the connections whatever is asked for here. Takes effect when
        the job runs next.

        Raises:
            InvalidArgument: not a whole number from 1 to 64.
        """
        await self._set(segments=checked_connections("segments", count))

    async def _set_early(self, name: str, value: object) -> None:
        """Set what the first resume makes final."""
        engine, entry = self._desk.ready(), self._entry
        async with engine.command(entry):
            self._check_early(name)
            if name == "dynamic_content" and value and not entry.job.http.plain:
                raise self._unfit("dynamic content is fetched with GET only", ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD)
            fields: dict[str, Any] = {name: value}
            self._check_fit(replace(entry.job, **fields))
            kept = [file for file in entry.files if name == "on_demand_mode" and file.wanted]
            await engine.change(entry, files=[replace(file, wanted=(), position=0) for file in kept], **fields)

    def _check_early(self, name: str) -> None:
        if self._entry.job.resumed:
            raise self._unfit(f"{name} is set before the first resume", ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME)

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
        """Seconds that the job may spend CONNECTING and TRANSFERRING; then it fails with BG_E_MAXDOWNLOAD_TIMEOUT. Resume counts anew.

        Goes before the time that group policy sets.
        """
        await self._set(maximum_download_time=checked_seconds("maximum_download_time", seconds), own_download_time=True)

    async def set_cost_flags(self, flags: CostFlags) -> None:
        """The costs of the connection at which the job may run (BITS's "transfer policy"); at once, for a running job too.

        At another cost the job waits in TRANSIENT_ERROR with BG_E_BLOCKED_BY_COST_TRANSFER_POLICY, and goes on when the cost changes.
        What the connection costs, `BitsManager(cost_source=)` tells; without it every job runs.

        Raises:
            InvalidArgument: no CostFlags, or none at which a job could run.
        """
        await self._set(cost_flags=checked_cost_flags(flags))

    async def set_minimum_retry_delay(self, seconds: float) -> None:
        """Seconds between a transient error and the next attempt, 5 at least (smaller values are raised to it, as BITS does)."""
        await self._set(minimum_retry_delay=max(checked_seconds("minimum_retry_delay", seconds), RETRY_DELAY_FLOOR))

    async def set_no_progress_timeout(self, seconds: float) -> None:
        """Seconds without a byte, from the first transient error on, after which the job fails; 0: every error is fatal."""
        await self._set(no_progress_timeout=checked_seconds("no_progress_timeout", seconds))

    async def _set(self, **fields: Any) -> None:
        engine = self._desk.ready()
        async with engine.command(self._entry):
            await engine.change(self._entry, **fields)

    @seen_by_the_helper
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
        async with self._desk.ready().command(entry):
            origins = named_origins(entry, AuthTarget.SERVER) if checked and entry.job.resumed else None
            if (checked, origins) != (entry.job.http.headers, entry.job.http.header_origins):
                await change_what_the_helper_saw(self._desk, entry, self._changer, "its custom headers")
            await self._change_http(stop=entry.job.http.headers != (), headers=checked, header_origins=origins)

    async def make_custom_headers_write_only(self) -> None:
        """From now on `custom_headers` gives none out, those set later neither; irreversible."""
        async with self._desk.ready().command(self._entry):
            await self._change_http(headers_write_only=True)

    @seen_by_the_helper
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
        async with self._desk.ready().command(entry):
            if checked == entry.job.http.method:
                return
            self._check_early("http_method")
            http = replace(entry.job.http, method=checked)
            self._check_fit(replace(entry.job, http=http))
            await change_what_the_helper_saw(self._desk, entry, self._changer, "its HTTP method")
            priority = entry.job.priority if checked == "GET" else JobPriority.FOREGROUND
            await self._desk.ready().change(entry, http=http, priority=priority)

    @seen_by_the_helper
    async def set_security_flags(self, flags: SecurityFlags) -> None:
        """What the job allows a server, in place of what was allowed before. An attempt that is running begins again under them; with
        SSL_ENABLE_CRL_CHECK newly set, files that are not whole are fetched anew.

        Raises:
            InvalidArgument: no SecurityFlags. BitsError (E_NOTIMPL): flags that contradict each other, that `ssl` cannot follow, or that
                cannot be applied to the manager's `ssl=` context.
        """
        checked, entry, desk = checked_flags(flags), self._entry, self._desk
        engine = desk.ready()
        await desk.parties.check_derivable(checked)
        async with engine.command(entry):
            before = entry.job.http.flags
            if checked == before:
                return
            await change_what_the_helper_saw(desk, entry, self._changer, "its security flags")
            await engine.halt(entry)
            newly_checked = SecurityFlags.SSL_ENABLE_CRL_CHECK in checked & ~before
            untrusted = [file for file in entry.files if newly_checked and not file.transferred and not file.committed]
            files = [replace(file, validator=None, slices=()) for file in untrusted]
            await engine.change(entry, files=files, http=replace(entry.job.http, flags=checked))

    @seen_by_the_helper
    async def set_crl_source(self, source: StrPath | None) -> None:
        """Where the certificate revocation lists for SSL_ENABLE_CRL_CHECK are: a file, or a directory of files (PEM or DER).

        They are read again at each attempt, as the job's owner; nothing is fetched.

        Raises:
            InvalidArgument: not an absolute path.
        """
        checked, entry = None if source is None else checked_absolute("a file of revocation lists", source), self._entry
        async with self._desk.ready().command(entry):
            if checked != entry.job.http.crl_source:
                await change_what_the_helper_saw(self._desk, entry, self._changer, "its revocation lists")
                await self._change_http(stop=SecurityFlags.SSL_ENABLE_CRL_CHECK in entry.job.http.flags, crl_source=checked)

    @seen_by_the_helper
    async def set_client_certificate_by_file(
        self, file: StrPath, *, key: StrPath | None = None, password_file: StrPath | None = None
    ) -> None:
        """Show this client certificate to servers that ask for one, in the handshake or when they have seen the path (TLS 1.3: after the
        handshake; TLS 1.2: in another one), in place of the one set before.

        It goes to the origins that the job names when it is first resumed, or names now if it was (T19), and to no other: not where a
        redirect leads, and not to a proxy. Its files are opened as the job's owner at each attempt, whatever the helper does (T27); where
        the helper acts on the network, the job of an owner who is not elevated fails. It counts from the next attempt on; where it replaces
        another, an attempt that is running begins again.

        Args:
            file: PEM with the chain, the job's own certificate first; or PKCS#12.
            key: PEM or DER; None: in `file`, or beside it, with the suffix `.key`.
            password_file: its first line opens the key or the PKCS#12. The password itself is not kept in the journal.

        Raises:
            InvalidArgument: not an absolute path.
            BitsError: E_NOTIMPL: the manager has an `ssl=` context (T24), or the system is not Linux.
        """
        given = ClientCertificate(
            source=checked_absolute("a client certificate", file),
            key=None if key is None else checked_absolute("a key", key),
            password_file=None if password_file is None else checked_absolute("a file with a password", password_file),
        )
        await self._set_client_certificate(given)

    @seen_by_the_helper
    async def set_client_certificate_by_id(self, store: StrPath, thumbprint: bytes | str) -> None:
        """As `set_client_certificate_by_file`, with the certificate in a directory that has this thumbprint.

        Each file there is PEM, DER or PKCS#12 without a password, and its first certificate counts.

        Args:
            store: the directory. Subdirectories are not searched.
            thumbprint: SHA-1 as in BITS, or SHA-256; bytes, or hexadecimal digits.

        Raises:
            InvalidArgument: not an absolute path, or no thumbprint. BitsError: as there.
        """
        directory = checked_absolute("a certificate store", store)
        await self._set_client_certificate(ClientCertificate(source=directory, thumbprint=checked_thumbprint(thumbprint)))

    @seen_by_the_helper
    async def set_client_certificate_by_name(self, store: StrPath, subject_name: str) -> None:
        """As `set_client_certificate_by_id`, with the first certificate for clients whose subject has this in its name.

        Files are looked at in the order of their names.

        Args:
            subject_name: a part of the simple subject name, in any case: the values in the order of the certificate, so that what is
                shown as `CN=name1, OU=name2, O=name3` is `name3, name2, name1`.

        Raises:
            InvalidArgument: not an absolute path, or a name with no or more than 255 characters. BitsError: as there.
        """
        directory = checked_absolute("a certificate store", store)
        await self._set_client_certificate(ClientCertificate(source=directory, subject_name=checked_subject_name(subject_name)))

    @seen_by_the_helper
    async def remove_client_certificate(self) -> bool:
        """Show none any more; connections made with it are closed at once. False: none was set."""
        return await self._set_client_certificate(None)

    async def _set_client_certificate(self, given: ClientCertificate | None) -> bool:
        desk, entry = self._desk, self._entry
        engine = desk.ready()
        if given is not None:
            desk.parties.check_presentable()
        async with engine.command(entry):
            before = entry.job.http.client_certificate
            if given is None and before is None:
                return False
            if given != before:
                await change_what_the_helper_saw(desk, entry, self._changer, "its client certificate")
            origins = named_origins(entry, AuthTarget.SERVER) if given is not None and entry.job.resumed else None
            if before is not None:
                await desk.parties.forget_network(engine, entry)
            await self._change_http(stop=before is not None, client_certificate=given, certificate_origins=origins)
            return True

    @seen_by_the_helper
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
        async with self._desk.ready().command(entry):
            if not (entry.job.state.is_settled or entry.job.state is JobState.SUSPENDED):
                raise self._unfit(f"the job is {entry.job.state.name}", ErrorCode.BG_E_READ_ONLY_WHEN_JOB_ACTIVE)
            if judge is not None or entry.job.http.validates_certificates:
                await change_what_the_helper_saw(self._desk, entry, self._changer, "who judges its servers' certificates")
            await self._change_http(validates_certificates=judge is not None)
            entry.judge = judge

    def set_notify_interface(self, callback: "BackgroundCopyCallback | None") -> Coroutine[Any, Any, None]:
        """Tell this callback what becomes of the job, in place of the one set before; None: none.

        Its methods are called in the context of this call, on the event loop, one after the other; of one user's callbacks at most four
        are at work at a time. What the notify flags name and has happened before, in an earlier process too, is told at once. A callback
        does not survive a restart; that something is owed does. A job that is taken over by another owner has none.
        """
        return self._set_notify_interface(callback, contextvars.copy_context(), current_token().sid)

    async def _set_notify_interface(self, callback: "BackgroundCopyCallback | None", context: contextvars.Context, user: str) -> None:
        if callback is not None and not isinstance(callback, BackgroundCopyCallback):
            raise InvalidArgument(f"a callback is a BackgroundCopyCallback, not {type(callback).__name__}")
        engine, entry = self._desk.ready(), self._entry
        async with engine.command(entry):
            file = partial(JobFile, self._desk, entry)
            engine.notifier.listen(entry, None if callback is None else Listener(callback, self, file, user, context))

    async def set_notify_flags(self, flags: NotifyFlags) -> None:
        """What the callback and the command are told of, of all that happens from now on; DISABLE: of nothing.

        Raises:
            InvalidArgument: no NotifyFlags; no flag, or DISABLE with others (E_NOTIMPL).
        """
        await self._set(notify_flags=checked_notify_flags(flags))

    async def set_minimum_notification_interval(self, seconds: float) -> None:
        """Seconds that pass at least between two calls of the callback's `job_modification` and `file_ranges_transferred` together.

        Raises:
            InvalidArgument: not from 0 to 4,294,967 (BITS counts milliseconds in 32 bits).
        """
        checked = checked_seconds("minimum_notification_interval", seconds)
        if checked > MAX_NOTIFICATION_INTERVAL:
            raise InvalidArgument(f"minimum_notification_interval takes at most {MAX_NOTIFICATION_INTERVAL:,.0f} seconds")
        await self._set(minimum_notification_interval=checked)

    def set_notify_cmd_line(self, program: str | None, parameters: Sequence[str] | str | None = None) -> Coroutine[Any, Any, None]:
        """Run a program when the job is TRANSFERRED or in ERROR, as the ambient identity at this call; durable when it returns.

        It runs where there is no callback, or the callback failed, and again after `minimum_retry_delay` until it ends with status 0
        or the job leaves that state. It is told BITS_JOB_ID, BITS_JOB_STATE and BITS_JOB_ERROR (a code in hexadecimal) by its
        environment, which holds nothing else of this process; it has no capability, no terminal and no time limit. After a restart it
        waits for the token of that identity, if the process may not stand in for it: `waiting` says so, `BitsManager.get_job` brings
        it. A job that is taken over by another owner has no command.

        Args:
            program: the full path, at most 260 characters; nothing is searched or expanded. None, None: no command.
            parameters: the whole argv, or BITS's string; its first word is the program. At most 4,000 characters, which every user of the
                machine can read while the program runs.

        Raises:
            InvalidArgument: no full path, parameters that do not begin with the program, parameters without a program; too long
                (BG_E_STRING_TOO_LONG). AccessDenied: the identity is somebody on the network only (`Token.for_network`).
        """
        return self._set_notify_cmd_line(program, parameters, self._desk.caller())

    async def _set_notify_cmd_line(self, program: str | None, parameters: Sequence[str] | str | None, setter: Token) -> None:
        desk, entry = self._desk, self._entry
        engine = desk.ready()
        if program is None:
            if parameters is not None:
                raise InvalidArgument("parameters belong to a program")
            line, key = None, None
        else:
            line = NotifyCmdLine(program, tuple(command_arguments(program, parameters)))
            desk.door.check_commander(setter)
            key = desk.door.owner_key(setter)
        async with engine.command(entry):
            if key is not None:
                entry.outbox.commander = key, setter  # first: the token counts for commands of this setter only
            await engine.change(entry, notify_cmd_line=line, notify_setter=key)
            engine.notifier.commanded(entry)

    async def _change_http(self, *, stop: bool = False, **fields: Any) -> None:
        """For a command; with `stop` a running attempt begins again with the new values."""
        engine, entry = self._desk.ready(), self._entry
        if stop:
            await engine.halt(entry)
        await engine.change(entry, http=replace(entry.job.http, **fields))

    @seen_by_the_helper
    async def set_credentials(self, target: AuthTarget, scheme: AuthScheme, user_name: str | None, password: str | None) -> None:
        """What the job may answer a challenge with; None, None: the acting token's own credentials (NTLM and NEGOTIATE only).

        Kept encrypted until the job leaves the queue. Bound to the origins that the job names when it is first resumed, or names now if it
        was (T19). Replaces what was set for the same target and scheme.

        Raises:
            InvalidArgument: exactly one of user name and password is None; BASIC or DIGEST without them; too long.
        """
        await self._set_credentials(AuthCredentials(target, scheme, user_name, password))

    async def _set_credentials(self, given: AuthCredentials) -> None:
        desk, entry = self._desk, self._entry
        engine = desk.ready()
        async with engine.command(entry):
            if desk.parties.grant_of(entry, given) not in entry.grants:
                await change_what_the_helper_saw(desk, entry, self._changer, "its credentials")
            await desk.parties.save_grants(engine, entry, [given])

    @property
    def use_stored_credentials(self) -> AuthTarget | None:
        """PROXY: the proxy is answered with the acting token's own credentials; None: it is not."""
        own = (grant for grant in self._entry.grants if (grant.target, grant.scheme) == STORED and grant.user_name is None)
        return AuthTarget.PROXY if any(own) else None

    @seen_by_the_helper
    async def set_use_stored_credentials(self, target: AuthTarget | None) -> None:
        """Answer the proxy with the own credentials of the owner's token, or of the helper's where it acts on the network; None: no longer.

        That is `set_credentials(PROXY, NEGOTIATE, None, None)`, and replaces what was set for these two. Which proxies may see them is
        said there: those that the job names itself.

        Raises:
            InvalidArgument: SERVER, or something else (BG_E_USE_STORED_CREDENTIALS_NOT_SUPPORTED).
        """
        if target is None:
            if self.use_stored_credentials:
                await self._remove_credentials(*STORED)
            return
        if target is not AuthTarget.PROXY:
            code = ErrorCode.BG_E_USE_STORED_CREDENTIALS_NOT_SUPPORTED
            raise InvalidArgument("stored credentials are used for the proxy only", code=code)
        await self._set_credentials(AuthCredentials(*STORED, None, None))

    @seen_by_the_helper
    async def remove_credentials(self, target: AuthTarget, scheme: AuthScheme) -> bool:
        """Forget what was set; its connections are closed at once. False: nothing was set.

        Raises:
            InvalidArgument: no AuthTarget (BG_E_INVALID_AUTH_TARGET), no AuthScheme (BG_E_INVALID_AUTH_SCHEME).
        """
        return await self._remove_credentials(target, scheme)

    async def _remove_credentials(self, target: AuthTarget, scheme: AuthScheme) -> bool:
        check_target_and_scheme(target, scheme)
        engine, entry = self._desk.ready(), self._entry
        async with engine.command(entry):
            rest = [grant for grant in entry.grants if (grant.target, grant.scheme) != (target, scheme)]
            if len(rest) == len(entry.grants):
                return False
            await change_what_the_helper_saw(self._desk, entry, self._changer, "its credentials")
            await self._desk.parties.forget_network(engine, entry)  # first: cancelled in between, at worst a connection is made again
            await engine.save(GrantRemoved(self.id, target, scheme), then=partial(entry.grants.__setitem__, slice(None), rest))
            return True

    def take_ownership(self) -> Coroutine[Any, Any, None]:
        """Make the ambient identity at this call the owner. What was entrusted to the job is dropped: its credentials, its custom
        headers, its client certificate, its helper token, its notification command and its callback; what was fetched is fetched anew,
        because the part files are the old owner's. Other handles on the job lead nowhere from now on (for them it is CANCELLED): get a
        new one by `get_job`.

        Raises:
            AccessDenied: the caller is not elevated.
        """
        return self._take_ownership(self._desk.caller())

    async def _take_ownership(self, caller: Token) -> None:
        desk, entry = self._desk, self._entry
        engine = desk.ready()
        if not desk.door.is_elevated(desk.door.usable(caller)):
            raise AccessDenied("only an elevated identity may take a job over", job_id=self.id, identity=caller.name)
        async with engine.command(entry):
            self._entry = await engine.take_over(entry, desk.door.owner_key(caller), caller)

    def token_options(self) -> Coroutine[Any, Any, TokenOptions]:
        """The helper token of the job. The access check happens here, once, for the identity that calls (COM: QueryInterface).

        Raises:
            AccessDenied: the ambient identity may not open the job.
        """
        return self._token_options(self._desk.caller())

    async def _token_options(self, caller: Token) -> TokenOptions:
        self._desk.ready()
        self._desk.door.admit(caller, self._entry.job)
        return TokenOptions(self._desk, self._entry, caller)

    # -- commands -------------------------------------------------------------------------------------------------------------------------

    async def resume(self) -> None:
        """Put the job into the queue; it has left SUSPENDED, ERROR and TRANSIENT_ERROR when it returns.

        Raises:
            InvalidState: the job has no file (BG_E_EMPTY).
        """
        await self._desk.ready().resume(self._entry, self._desk.parties.bind)

    async def suspend(self) -> None:
        """No byte is written after it returns.

        Raises:
            InvalidState: the job is TRANSFERRED.
        """
        await self._desk.ready().suspend(self._entry)

    async def cancel(self) -> Cancellation:
        """The job leaves the queue; its part files are gone when it returns (finished ones too, unless completed before).

        `Cancellation.code` says whether they are: a part file is deleted by the identity that made it and by no other
        (BG_S_UNABLE_TO_DELETE_FILES; `left_behind` names it).
        """
        return await self._desk.ready().cancel(self._entry)

    async def complete(self, *, partial: bool = False) -> Completion:
        """Put the files in their places, in one rename each; the job leaves the queue. Returns the paths.

        `partial` is BITS's Complete: in any state, keeps the finished files and drops the rest. `Completion.code` says whether it did.

        Raises:
            InvalidArgument: `partial` is neither True nor False.
            InvalidState: not TRANSFERRED, and not `partial`.
            LocalFileError: a file could not be put in place; the job stays, files that were are available; call it again or cancel.
            TokenRequired: the identity that must do it has no token.
        """
        return await self._desk.ready().complete(self._entry, partial=checked_bool("partial", partial))

    async def wait(self, *, transient: bool = False) -> None:
        """Return when the job is TRANSFERRED or ACKNOWLEDGED; in on-demand mode also when all is there that was asked for, and the job is
        SUSPENDED. Cancelling stops the waiting, never the job.

        Raises:
            BitsError: the job is in ERROR (with `transient` also in TRANSIENT_ERROR): a new instance of its error.
            JobCancelled: it was cancelled. InvalidState: it was never resumed. ManagerClosed: the manager closed.
        """
        engine = self._desk.ready()
        job = self._entry.job
        if job.state is JobState.SUSPENDED and not job.resumed:
            raise InvalidState("the job was never resumed", job_id=self.id, advice="resume it first")

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
        engine = self._desk.ready()

        def ends(state: JobState) -> bool:
            return state.is_final if follow else state.is_settled

        stream = engine.stream(lambda job_id: job_id == self.id, ends)
        stream.publish(engine.snapshot(self._entry))
        return stream


class BackgroundCopyCallback:
    """What is told what becomes of a job (IBackgroundCopyCallback): derive a class from it and override what it wants to hear of.

    A method may be a function or a coroutine function; a plain function must not block. What one raises is logged by its type alone. A
    file, a job transferred and a job in error are told of again then, after 5 seconds, twice as long each time up to
    `minimum_retry_delay`, until the method returns; the rest is not. Whoever is told may complete or cancel the job, but must not close the
    manager, which waits for him. The notify flags say which methods are called: without `Job.set_notify_flags` it is `job_transferred`
    and `job_error`.
    """

    def job_transferred(self, job: Job) -> Awaitable[None] | None:
        """Every file is transferred, and was told of before, if the flags wanted that."""
        return None

    def job_error(self, job: Job, error: BitsError) -> Awaitable[None] | None:
        """The job went to ERROR. Transient errors are not told of."""
        return None

    def job_modification(self, job: Job) -> Awaitable[None] | None:
        """A property, the state (except to TRANSFERRED and ERROR) or the progress of the job changed: once for all that happened within
        `minimum_notification_interval`."""
        return None

    def file_transferred(self, job: Job, file: JobFile) -> Awaitable[None] | None:
        """A file is whole, in its `temporary_name`. The next one is told of when this returns."""
        return None

    def file_ranges_transferred(self, job: Job, file: JobFile, ranges: Sequence[FileRange]) -> Awaitable[None] | None:
        """In on-demand mode: these bytes of the file are there for good, in the order of the file; told once."""
        return None
