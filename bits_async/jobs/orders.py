"""One file from create to complete: what `download()` does on an open manager."""

import asyncio
import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ..auth.policy import AuthCredentials, AuthScheme, AuthTarget
from ..clock import Clock
from ..errors import BitsError, InvalidArgument, InvalidState, ManagerClosed, StoreError, ValidationFailed
from ..identity.ambient import current_token
from ..identity.tokens import HelperTokenFlags, Token
from ..transport.options import ClientCertificate, HttpOptions, checked_subject_name, checked_thumbprint
from ..transport.proxies import ProxySettings, resolve
from .arguments import (
    CheckedFile,
    FileInfo,
    checked_bandwidth,
    checked_connections,
    checked_destination,
    checked_file,
    checked_helper_flags,
    checked_seconds,
    file_record,
)
from .desk import DISPLAY_NAME_LENGTH, Desk
from .engine import Engine
from .handles import Job
from .model import RETRY_DELAY_FLOOR, GrantRemoved, JobPriority, JobState
from .notify import JobChanged, Progress
from .roster import Entry

PROGRESS_INTERVAL: Final = 0.5


@dataclass(frozen=True, slots=True)
class Order:
    """The checked arguments of one `download()`."""

    file: CheckedFile
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
    maximum_bandwidth: float | None
    segments: int
    client_certificate: ClientCertificate | None

    @classmethod
    def checked(
        cls,
        file: FileInfo,
        *,
        proxy: ProxySettings | str | None,
        credentials: Iterable[AuthCredentials] | None,
        owner: Token | None,
        helper: Token | None,
        helper_flags: HelperTokenFlags,
        progress: Callable[[Progress], None] | None,
        priority: JobPriority,
        retry_for: float,
        maximum_bandwidth: float | None,
        segments: int,
        client_certificate: ClientCertificate | None,
    ) -> "Order":
        """Read the ambient identity and the environment, and refuse what cannot be meant."""
        flags = checked_helper_flags(helper_flags)
        if (helper is None) != (flags is HelperTokenFlags.NONE):
            raise InvalidArgument("helper= and helper_flags= go together")
        if progress is not None and (not callable(progress) or inspect.iscoroutinefunction(progress)):
            raise TypeError("progress= takes a plain function")
        if not isinstance(priority, JobPriority):
            raise InvalidArgument(f"a priority is a JobPriority, not {priority!r}")
        for token in (owner, helper):
            if token is not None and not isinstance(token, Token):
                raise InvalidArgument(f"a token is a Token, not {type(token).__name__}")
        given = None if credentials is None else _several(credentials)
        return cls(
            file=checked_file(replace(file, path=os.path.abspath(checked_destination(file.path)))),
            proxy=resolve(ProxySettings.of(proxy), os.environ),
            credentials=given,
            caller=current_token(),
            owner=current_token() if owner is None else owner,
            owner_named=owner is not None,
            helper=helper,
            helper_flags=flags,
            progress=progress,
            priority=priority,
            retry_for=checked_seconds("retry_for", retry_for),
            maximum_bandwidth=checked_bandwidth(maximum_bandwidth),
            segments=checked_connections("segments", segments),
            client_certificate=None if client_certificate is None else _absolute(client_certificate),
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


async def carry_out(desk: Desk, order: Order) -> Path:
    """Fetch the file of an order, going on with an earlier job for the same owner, path and URL."""
    return await _see_through(desk, await _prepare(desk, order), order)


async def _prepare(desk: Desk, order: Order) -> Entry:
    """The job of an earlier call for the same owner, path and URL, or a new one; with owner, helper and settings of this call."""
    engine = desk.ready()
    desk.check_destination(order.file.path)
    desk.door.usable(order.owner)
    if order.client_certificate is not None:
        desk.parties.check_presentable()
    if order.helper is not None:
        desk.door.check_helper(order.helper, order.caller)
    entry = await _found(desk, order)
    if entry is None:
        record = await desk.new_record(order.display_name, order.priority, order.owner)
        entry = await engine.add(record, order.owner, [file_record(record.id, 0, order.file)])
    elif not entry.job.state.is_settled and entry.job.state is not JobState.SUSPENDED:
        await engine.suspend(entry)
    await Job(desk, entry)._set_client_certificate(order.client_certificate)
    async with engine.command(entry):
        if not _is_plain(entry):
            raise InvalidState("the job was changed by somebody else while it was taken up", job_id=entry.job.id)
        stale = [token for token in (entry.owner, entry.helper) if token not in (order.owner, order.helper)]
        if entry.owner is None:
            await engine.owner_found(entry, order.owner)
        # cancelled on the way, the job has no helper, rather than one with flags or credentials of an earlier call
        entry.owner, entry.helper = order.owner, None
        file = entry.files[0]
        if order.file.digests and order.file.digests != file.digests:
            file = replace(file, digests=order.file.digests, transferred=False)  # its digest has not been looked at
        await engine.change(
            entry,
            files=[file],
            priority=order.priority,
            proxy=order.proxy,
            helper_flags=order.helper_flags,
            minimum_retry_delay=RETRY_DELAY_FLOOR,
            no_progress_timeout=order.retry_for,
            maximum_bandwidth=order.maximum_bandwidth,
            segments=order.segments,
        )
        if entry.grants:
            removed = [GrantRemoved(entry.job.id, old.target, old.scheme) for old in entry.grants]
            await engine.save(*removed, then=entry.grants.clear)
            stale += [order.owner, order.helper]
        await engine.drop_lanes(entry, *stale)
        entry.helper = order.helper
        await desk.parties.save_grants(engine, entry, order.granted())
    return entry


def _absolute(given: ClientCertificate) -> ClientCertificate:
    """Its relative paths are those of the working directory at the call."""
    if not isinstance(given, ClientCertificate):
        raise InvalidArgument(f"client_certificate= takes a ClientCertificate, not {type(given).__name__}")
    if given.thumbprint is not None:
        checked_thumbprint(given.thumbprint)
    if given.subject_name is not None:
        checked_subject_name(given.subject_name)
    return replace(
        given,
        source=Path(os.path.abspath(given.source)),
        key=None if given.key is None else Path(os.path.abspath(given.key)),
        password_file=None if given.password_file is None else Path(os.path.abspath(given.password_file)),
    )


async def _found(desk: Desk, order: Order) -> Entry | None:
    engine = desk.ready()
    async with engine.reading():
        there = await engine.roster.with_destination(order.file.path, owner_sid=order.owner.sid)
    for entry in there:
        theirs = desk.door.may_stand_for(order.owner, entry.job.owner) and desk.door.high_enough(order.owner, entry.job)
        mine = entry.job.display_name == order.display_name and theirs
        if mine and _is_plain(entry) and entry.files[0].path == order.file.path:
            if entry.files[0].original_url == order.file.url:
                return entry
            await engine.cancel(entry)  # another file for that path: the old part goes
    return None


def _is_plain(entry: Entry) -> bool:
    """Whether it is a job as a call makes it: nothing is set on it that no call sets.

    Whoever may open the job knows its name, and may have made it so, or changed it since: the helper of this call, which saw the call and
    nothing else, would send his headers and believe the servers that he believes (T8).
    """
    job, files = entry.job, entry.files
    unlike = job.dynamic_content or job.on_demand_mode or any(file.ranges or file.url != file.original_url for file in files)
    return len(files) == 1 and not unlike and replace(job.http, client_certificate=None, certificate_origins=None) == HttpOptions()


async def _see_through(desk: Desk, entry: Entry, order: Order) -> Path:
    engine, job = desk.ready(), Job(desk, entry)
    try:
        await job.resume()
        if order.progress is not None:
            await _show(job, order.progress, engine.clock)
        await job.wait()
        (path,) = await job.complete()
    except BitsError as error:
        usable = engine.failure is None and engine.journal_fault is None and not engine.closed
        if not entry.job.state.is_final and usable and not isinstance(error, StoreError) and _nothing_to_keep(entry, error):
            await engine.cancel(entry)
        raise
    except BaseException:
        # a cancel, or what the progress function raised: the job is suspended, and a later call goes on
        await asyncio.shield(engine.task(_leave_suspended(engine, entry), "bits-suspend"))
        raise
    return path


async def _leave_suspended(engine: Engine, entry: Entry) -> None:
    """Or, where that cannot be journalled now, as soon as it can: nobody waits for that."""
    try:
        await engine.suspend(entry)
    except (InvalidState, ManagerClosed):
        pass  # finished, or closed, in the meantime
    except StoreError as error:
        if not error.transient:
            raise
        engine.task(_suspend_later(engine, entry), "bits-suspend-later")


async def _suspend_later(engine: Engine, entry: Entry) -> None:
    with contextlib.suppress(BitsError):  # the engine has ended, and says why itself
        await engine.until(lambda: engine.journal_fault is None)
        await _leave_suspended(engine, entry)


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


def _several(credentials: Iterable[AuthCredentials]) -> tuple[AuthCredentials, ...]:
    """What is given, which may be a generator; one that is in no list is told so."""
    given = tuple(credentials) if isinstance(credentials, Iterable) else ()
    if not isinstance(credentials, Iterable) or not all(isinstance(item, AuthCredentials) for item in given):
        raise InvalidArgument("credentials= takes AuthCredentials, in a list even if there is one")
    return given
