"""The API: `BitsManager`, and `download`, one call from create to complete."""

import asyncio
import contextlib
import contextvars
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from ssl import SSLContext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from ..auth.policy import AuthCredentials, AuthRules, Refusals
from ..auth.renewal import Renewals
from ..auth.tickets import Tickets
from ..clock import Clock, SystemClock, finish
from ..errors import AccessDenied, BitsError, InvalidArgument, NotFound, StoreError
from ..identity import native
from ..identity.processes import run_command
from ..identity.sessions import WatchSessions, watch_sessions
from ..identity.threads import TokenExecutors
from ..identity.tokens import HelperTokenFlags, Token
from ..limits import Bucket
from ..transport.lane import Lanes, Network
from ..transport.network import Connectivity, watch_network
from ..transport.options import ClientCertificate
from ..transport.proxies import ProxySettings
from ..transport.timeouts import Timeouts
from ..transport.tls import TlsSettings
from .arguments import FileInfo, StrPath, checked_bandwidth, checked_connections, checked_own_file
from .callbacks import RunCommand, commander
from .conditions import Conditions
from .desk import Desk
from .door import Door, calling, identity_of
from .engine import Engine
from .handles import Job, JobFile
from .keys import KeySource
from .logoff import LogOffs
from .model import JobPriority, OwnerKey
from .notify import EventStream, Progress
from .orders import Order, carry_out
from .parties import Parties
from .places import OneShot, default_store, locked, make_state_directories, private_store, read_policy, state_directory
from .policies import CostSource, GroupPolicy, effective_limits, overrides
from .roster import Entry
from .scheduler import Limits
from .store import SqliteStore
from .transfer import Workshop

if TYPE_CHECKING:
    from yarl import URL


@dataclass(frozen=True, slots=True)
class Seams:
    """What `bits_async.testing` puts in place of the network, the time, other programs and logon sessions."""

    network: Network
    clock: Clock
    connectivity: Callable[[], Connectivity]
    run_command: RunCommand
    sessions: WatchSessions


async def _run_command(token: Token, program: str, parameters: Sequence[str], variables: Mapping[str, str]) -> int:
    """Without a time limit, as BITS runs commands."""
    return await run_command(token, program, parameters, timeout=None, environment=variables)


seams: contextvars.ContextVar[Seams | None] = contextvars.ContextVar("bits_async_seams", default=None)


class BitsManager(AbstractAsyncContextManager["BitsManager"]):
    """The queue. Transfers run while it is open, and only then; what is unfinished continues when it is opened again.

    For one event loop and one use, not thread-safe: a call from another loop, or before entering, raises RuntimeError.

    Entering raises StoreError where the journal cannot be used (its `advice` says what to do; `transient`: that may be over without
    anybody's looking at the journal). It is left as it was: a new manager opens it when its volume has room, or can be written, again.
    What happens to a journal later only pauses the transfers (`journal_fault`). Another program that holds it is waited for, 10 s at most.

    Args:
        store: the journal's file; None: the user's own queue (in the user's state directory).
        ssl: for every TLS connection; None: `ssl.create_default_context()`. Never modified, never stored.
        limits: how much may run at once.
        timeouts: seconds, of the connections.
        auth_rules: what may be shown to whom, whatever a job says.
        require_impersonation: a call that asks for an identity is refused (AccessDenied) outside of `impersonate()`: for services that
            act for their callers, so that a forgotten one does not act as the service.
        run: False: jobs can be edited, nothing is transferred.
        logon: asked once per owner whose token a restart has lost; a token that does not match the job's owner is not used.
        maximum_bandwidth: bytes per second of all jobs together, FOREGROUND included; None: no limit.
        policy: what the machine's administrator allows: a `GroupPolicy`, or its TOML file, which is read when the manager is entered and
            must be writable for its administrator (root or this user) only; None: everything.
        cost_source: tells what the connection costs (`Job.set_cost_flags`); None: nothing.
        key: where the key comes from that seals credentials, custom headers and URLs' queries in the journal.
    """

    def __init__(
        self,
        *,
        store: StrPath | None = None,
        ssl: SSLContext | None = None,
        limits: Limits = Limits(),  # noqa: B008 - a frozen value
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - a frozen value
        auth_rules: AuthRules = AuthRules(),  # noqa: B008 - a frozen value
        require_impersonation: bool = False,
        run: bool = True,
        logon: Callable[[Job], Awaitable[Token | None]] | None = None,
        maximum_bandwidth: float | None = None,
        policy: GroupPolicy | StrPath | None = None,
        cost_source: CostSource | None = None,
        key: KeySource = KeySource.file(),  # noqa: B008 - a frozen value
    ) -> None:
        wanted = {
            "limits": (limits, Limits),
            "timeouts": (timeouts, Timeouts),
            "auth_rules": (auth_rules, AuthRules),
            "key": (key, KeySource),
        }
        for name, (value, kind) in wanted.items():
            if not isinstance(value, kind):
                raise InvalidArgument(f"{name}= takes {kind.__name__}, not {type(value).__name__}")
        if logon is not None and not callable(logon):
            raise InvalidArgument(f"logon= takes a function, not {type(logon).__name__}")
        if cost_source is not None and not callable(getattr(cost_source, "watch", None)):
            raise InvalidArgument(f"cost_source= takes a CostSource, not {type(cost_source).__name__}")
        if ssl is not None and not isinstance(ssl, SSLContext):
            raise InvalidArgument(f"ssl= takes an ssl.SSLContext or None, not {ssl!r}")
        self._path = None if store is None else checked_own_file("store=", store)
        self._tls = TlsSettings(ssl)
        self._key = key
        self._limits = limits
        self._timeouts = timeouts
        self._auth_rules = auth_rules
        self._require_impersonation = require_impersonation
        self._run = run
        self._logon = logon
        self._seams = seams.get()
        self._clock: Clock = self._seams.clock if self._seams else SystemClock()
        self._machine = Bucket(checked_bandwidth(maximum_bandwidth), self._clock.monotonic)
        self._policy = policy if policy is None or isinstance(policy, GroupPolicy) else checked_own_file("policy=", policy)
        self._cost_source = cost_source
        self._one_shot: OneShot | None = None  # for download(): found jobs wait until their owner and helper are set
        self._desk: Desk | None = None
        self._network: Network | None = None
        self._executors: TokenExecutors | None = None
        self._store: SqliteStore | None = None
        self._closing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._destinations: set[Path] = set()
        self._refusals = Refusals()
        self._tickets: Tickets | None = None
        self._renewals: Renewals | None = None
        self._log_offs: LogOffs | None = None
        self._overridden: frozenset[str] = frozenset()

    # -- life -------------------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("a BitsManager is entered once")
        self._loop = asyncio.get_running_loop()
        try:
            await self._start()
        except BaseException:
            self._desk = None
            await self._close_parts()
            raise
        return self

    async def _start(self) -> None:
        self._executors = TokenExecutors()
        with self._executors.lease(Token.for_process(), "files") as files:
            boot_id = await files.run(native.boot_id)
            await files.run(self._tls.refresh)  # reads the authorities' certificates
            policy = await files.run(read_policy, self._policy) if isinstance(self._policy, Path) else self._policy
            if self._path is None:
                await files.run(make_state_directories, state_directory() / "downloads")
            if self._one_shot is not None:
                await self._one_shot.claim(files)
            own = self._path is None or (self._one_shot is not None and self._one_shot.private)
            path = self._path or default_store()
            # our own place may be reached through links (a home directory often is); a path that was named may not (T13)
            self._store = SqliteStore(Path(await files.run(os.path.realpath, path)) if own else path, key=self._key)
        self._network = self._seams.network if self._seams else self._real_network(self._executors)
        await self._store.open()
        shop = Workshop(self._network, self._executors, self._clock, boot_id, self._limits.disk_reserve)
        parties = Parties(self._tls, self._auth_rules, self._timeouts, self._executors, self._refusals, self._handles, self._clock)
        conditions = Conditions(
            clock=self._clock,
            machine=self._machine,
            connectivity=self._seams.connectivity() if self._seams else watch_network(clock=self._clock),
            policy=policy,
            cost=self._cost_source,
        )
        engine = Engine(
            store=self._store,
            shop=shop,
            limits=self._limits,
            conditions=conditions,
            run=self._run,
            party=parties.party,
            find_owner=self._find_owner,
            run_command=self._seams.run_command if self._seams else _run_command,
            adopt=self._adopt,
            hold=self._one_shot is not None,
        )
        self._log_offs = LogOffs(engine, self._seams.sessions if self._seams else watch_sessions)
        door = Door(self._store.fingerprint_key, fakes=self._seams is not None, note=self._log_offs.note)
        limits = effective_limits(self._limits, policy)
        self._desk = Desk(  # the first attempts and logon() need it
            engine, asyncio.get_running_loop(), door, parties, limits, self._store.path, self._require_impersonation
        )
        self._overridden = overrides(policy)
        await engine.start()

    def _real_network(self, executors: TokenExecutors) -> Network:
        self._tickets = Tickets(self._refusals)
        self._renewals = Renewals(self._tickets, executors, self._clock)
        self._renewals.start()
        return Lanes(self._limits.connections_per_host, refusals=self._refusals, tickets=self._tickets)

    @property
    def set_aside(self) -> Path | None:
        """Where the journal is that was found damaged when this manager opened it, or is found so until it is closed. It was replaced by a
        new one, and the log says so at ERROR; its files (the key too) are kept for recovery with sqlite3. None: no damage was found."""
        return None if self._store is None else self._store.set_aside

    @property
    def journal_fault(self) -> StoreError | None:
        """Why the journal cannot be used for now (its volume is full, another program holds it), and at which path; None: it can.

        While it lasts all transfers are paused (`Job.waiting` says so), whatever would change a job raises this error and changes nothing,
        and the journal is tried again after 1 s, 2 s and so on up to every minute. Then everything goes on by itself.
        """
        return None if self._desk is None else self._desk.engine.journal_fault

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        await self.aclose()
        failure = self._desk.engine.failure if self._desk else None
        if failure is not None and exc is None:
            raise failure.located()

    async def aclose(self, *, grace: float = 10.0) -> None:
        """Stop every transfer at a durable point and close the journal; what leaving `async with` does. Completes and cancels no job.

        Cancelled, or called again, it is finished first.

        Args:
            grace: seconds to wait for transfers to stop.
        """
        if self._desk is None:
            return
        if self._closing is None:
            engine = self._desk.engine
            self._closing = engine.task(self._close(engine, grace), "bits-close")
        await finish(self._closing)

    async def _close(self, engine: Engine, grace: float) -> None:
        try:
            if self._log_offs is not None:
                await self._log_offs.aclose()
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
            if self._tickets is not None:
                stack.push_async_callback(self._tickets.aclose)
            if self._network is not None:
                stack.push_async_callback(self._network.aclose)
            if self._renewals is not None:
                stack.push_async_callback(self._renewals.aclose)

    async def _close_store(self, store: SqliteStore) -> None:
        private = self._one_shot is not None and self._one_shot.private
        if private and self._desk is not None and self._desk.engine.failure is None:
            await store.remove()  # if nothing is left to continue
        else:
            await store.close()

    def _caller(self) -> Token:
        return calling(impersonated=self._require_impersonation)

    def _at_desk(self) -> Desk:
        """For a call of this loop while the manager is open."""
        if self._desk is None:
            raise RuntimeError("the BitsManager is not open: use it in `async with`")
        self._desk.ready()
        return self._desk

    # -- limits -----------------------------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """Those that count for owners that are not elevated: what was set, with the numbers of group policy in the place of its own."""
        return self._limits if self._desk is None else self._desk.limits

    @property
    def overridden_by_policy(self) -> frozenset[str]:
        """What group policy decides, whatever is set here (BG_S_OVERRIDDEN_BY_POLICY): names of `Limits`, and "bandwidth"."""
        return self._overridden

    @property
    def maximum_bandwidth(self) -> float | None:
        """Bytes per second of all jobs together; None: no limit."""
        return self._machine.rate

    def set_maximum_bandwidth(self, bytes_per_second: float | None) -> None:
        """Change it, for transfers under way too; None: no limit. Where group policy allows less, that counts.

        Raises:
            InvalidArgument: not a positive number.
        """
        self._machine.set_rate(checked_bandwidth(bytes_per_second))

    # -- jobs -------------------------------------------------------------------------------------------------------------------------

    def create_job(
        self,
        display_name: str,
        *,
        priority: JobPriority = JobPriority.NORMAL,
        owner: Token | None = None,
        segments: int = 1,
        files_at_once: int = 1,
    ) -> Coroutine[Any, Any, Job]:
        """A new job, SUSPENDED and without files, durable when it returns.

        Args:
            display_name: for people, 1 to 256 characters.
            priority: which jobs go first.
            owner: whose job it is; None: the ambient identity at this call.
            segments: see `Job.set_segments`.
            files_at_once: see `Job.set_files_at_once`.

        Raises:
            InvalidArgument: a name, priority or number that is not allowed. AccessDenied: more jobs than `Limits.jobs_per_user`.
        """
        caller = self._caller()
        abreast = checked_connections("segments", segments), checked_connections("files_at_once", files_at_once)
        return self._create_job(display_name, priority, caller if owner is None else owner, *abreast)

    async def _create_job(self, display_name: str, priority: JobPriority, owner: Token, segments: int, files_at_once: int) -> Job:
        desk = self._at_desk()
        record = await desk.new_record(display_name, priority, owner)
        record = replace(record, segments=segments, files_at_once=files_at_once)
        return Job(desk, await desk.engine.add(record, owner))

    def get_job(self, job_id: UUID | str) -> Coroutine[Any, Any, Job]:
        """The access check: a handle on an unfinished job, for the ambient identity at this call.

        From the owner, the job has its owner's token again; from whoever set its notification command, the command has that token.

        Raises:
            NotFound: no such job, or it has left the queue. AccessDenied: this identity may not open it. InvalidArgument: not an id.
        """
        return self._get_job(job_id, self._caller())

    async def _get_job(self, job_id: UUID | str, caller: Token) -> Job:
        desk = self._at_desk()
        try:
            key = job_id if isinstance(job_id, UUID) else UUID(job_id)
        except (ValueError, AttributeError, TypeError):
            raise InvalidArgument(f"a job's id is a UUID, not {str(job_id)[:50]!r}") from None
        async with desk.engine.reading():
            entry = await desk.engine.roster.find(key)
        if entry is None:
            raise NotFound(job_id=key)
        desk.door.admit(caller, entry.job)
        if entry.owner is None and desk.door.may_stand_for(caller, entry.job.owner):
            await desk.engine.owner_found(entry, desk.door.usable(caller))
        setter = entry.job.notify_setter
        if setter is not None and commander(entry) is None and desk.door.may_stand_for(caller, setter):
            desk.engine.setter_found(setter, desk.door.usable(caller))
        return Job(desk, entry)

    def enum_jobs(self, *, all_users: bool = False) -> AsyncIterator[Job]:
        """The unfinished jobs that `get_job` gives the ambient identity at this call as their owner, oldest first; with `all_users`
        everybody's, for elevated callers only.

        Raises:
            AccessDenied: `all_users` without being elevated.
        """
        return self._enum_jobs(self._caller(), all_users)

    async def _enum_jobs(self, caller: Token, all_users: bool) -> AsyncIterator[Job]:
        desk = self._at_desk()
        desk.door.refuse_fake(caller)
        if all_users and not desk.door.is_elevated(caller):
            raise AccessDenied("only an elevated identity may list the jobs of all users", identity=caller.name)
        pages = desk.engine.roster.pages(None if all_users else caller.sid)
        while True:
            async with desk.engine.reading():
                page = await anext(pages, None)
            if page is None:
                return
            for entry in page:
                mine = desk.door.is_owner(caller, entry.job.owner) and desk.door.high_enough(caller, entry.job)
                if not entry.job.state.is_final and (all_users or mine):
                    yield Job(desk, entry)

    def events(self) -> EventStream:
        """Events of every job that the ambient identity at this call may open, those made later too, until the manager closes."""
        desk, caller = self._at_desk(), self._caller()
        engine, door = desk.engine, desk.door
        door.refuse_fake(caller)
        # asked now: a token that is closed later would fail those who publish, and with them the queue
        who, elevated = door.identity(caller), door.is_elevated(caller)

        def wants(job_id: UUID) -> bool:
            entry = engine.roster.live(job_id)
            return entry is not None and (elevated or who == identity_of(entry.job.owner))

        return engine.stream(wants, lambda _: False)

    async def join(self) -> None:
        """Return when no job is QUEUED, CONNECTING, TRANSFERRING or TRANSIENT_ERROR.

        Raises:
            ManagerClosed: the manager closed first. StoreError: the journal failed.
        """
        engine = self._at_desk().engine
        await engine.until_idle()

    # -- who may ------------------------------------------------------------------------------------------------------------------------

    def _handles(self, entry: Entry, file: int) -> tuple[Job, JobFile]:
        assert self._desk is not None  # attempts begin when the manager is open
        return Job(self._desk, entry), JobFile(self._desk, entry, file)

    async def _find_owner(self, entry: Entry) -> Token | None:
        desk = self._desk
        if self._logon is None or desk is None:
            return None
        token = await self._logon(Job(desk, entry))
        if token is None:
            return None
        if not desk.door.may_stand_for(desk.door.usable(token), entry.job.owner):
            raise AccessDenied(f"logon() gave a token of {token.name}, not the owner's", identity=token.name, job_id=entry.job.id)
        return token

    async def _adopt(self, key: OwnerKey, sessions: Collection[str]) -> Token | None:
        """The token of an owner who has none since the restart, if the process may stand in for him. Who made jobs as long as he was
        logged on has them run as long as he is: where none of the sessions is left, he has logged off."""
        session = await self._session_left(key.local, sessions) if sessions else None
        if sessions and session is None:
            return None
        token = await _stand_in(key, session)
        if token is not None and self._log_offs is not None:
            self._log_offs.note(token)
        return token

    async def _session_left(self, user: str, sessions: Collection[str]) -> str | None:
        """One of these that is still this user's (after a reboot the same name may be another's); None: there is none. Where nobody knows,
        nobody is logged off: it is asked again as long as the token lives."""
        watch = self._seams.sessions if self._seams else watch_sessions
        async with watch() as known:
            for session in sorted(sessions):
                try:
                    if await known.user_of(session) == user:
                        return session
                except LookupError:
                    return session
        return None

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
        sha512: str | None = None,
        blake3: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        priority: JobPriority = JobPriority.FOREGROUND,
        retry_for: float = 300.0,
        maximum_bandwidth: float | None = None,
        segments: int = 1,
        client_certificate: ClientCertificate | None = None,
    ) -> Coroutine[Any, Any, Path]:
        """Fetch one file, from create to complete. See `bits_async.download`, which is this on a manager of its own."""
        self._caller()
        file = FileInfo(url, path, sha256=sha256, sha512=sha512, blake3=blake3)
        order = Order.checked(
            file,
            proxy=proxy,
            credentials=credentials,
            owner=owner,
            helper=helper,
            helper_flags=helper_flags,
            progress=progress,
            priority=priority,
            retry_for=retry_for,
            maximum_bandwidth=maximum_bandwidth,
            segments=segments,
            client_certificate=client_certificate,
        )
        return self._download(order)

    async def _download(self, order: "Order") -> Path:
        desk = self._at_desk()
        if order.file.path in self._destinations:
            raise locked(order.file.path)
        self._destinations.add(order.file.path)
        try:
            return await carry_out(desk, order)
        finally:
            self._destinations.discard(order.file.path)


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
    sha512: str | None = None,
    blake3: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    priority: JobPriority = JobPriority.FOREGROUND,
    retry_for: float = 300.0,
    maximum_bandwidth: float | None = None,
    segments: int = 1,
    client_certificate: ClientCertificate | None = None,
    store: StrPath | None = None,
    ssl: SSLContext | None = None,
    auth_rules: AuthRules = AuthRules(),  # noqa: B008 - a frozen value
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
        sha256, sha512, blake3: hexadecimal; a file with another one is refused, once it has been fetched twice. `blake3` needs the
            extra of that name. A digest that the server gives (Repr-Digest) is looked at where the caller gives none.
        progress: a plain function, called in this task: first, last, at each change of state, at most every 0.5 s between.
        priority: of interest on a shared manager only.
        retry_for: seconds without a byte until a transient error is final; 0: the first error is.
        maximum_bandwidth: bytes per second at most; None: no limit.
        segments: ranges of a large file that are fetched side by side, 1 to 64, each on a connection of its own; see `Job.set_segments`.
        client_certificate: what the URL's host is shown if it asks who we are, opened as the owner; not together with `ssl`. See
            `Job.set_client_certificate_by_file`.
        store: the journal's file instead of a private one; the lock on the destination is in the user's state directory,
            or beside this journal if that cannot be used.
        ssl: None: `ssl.create_default_context()`.
        auth_rules: what may be shown to whom; the default is strict.

    Raises:
        BitsError: the one that says what went wrong; `LocalFileError` with BG_E_DESTINATION_LOCKED when another transfer to the same path
            is running.
    """
    file = FileInfo(url, path, sha256=sha256, sha512=sha512, blake3=blake3)
    order = Order.checked(
        file,
        proxy=proxy,
        credentials=credentials,
        owner=owner,
        helper=helper,
        helper_flags=helper_flags,
        progress=progress,
        priority=priority,
        retry_for=retry_for,
        maximum_bandwidth=maximum_bandwidth,
        segments=segments,
        client_certificate=client_certificate,
    )
    manager = BitsManager(store=private_store(order.owner, order.file.path) if store is None else store, ssl=ssl, auth_rules=auth_rules)
    manager._one_shot = OneShot(order.file.path, None if store is None else manager._path)
    async with manager:
        return await manager._download(order)


async def _stand_in(key: OwnerKey, session: str | None) -> Token | None:
    """The token of an owner for whom the process may stand in after a restart (T13), else None."""
    process = Token.for_process()
    if key.process:
        return _tied(process, session) if key.local == process.local.key else None
    if key.principal is not None or key.proof is not None or process.local.key not in ("uid:0", key.local):
        return None
    try:
        token = await Token.for_user(key.name)
    except BitsError:
        return None  # the user is gone, or may not be taken: the job waits for a token and says so
    return _tied(token, session) if token.local.key == key.local and token.name == key.name else None


def _tied(token: Token, session: str | None) -> Token:
    """The same user's, until that session ends."""
    return token if session is None else Token._make(token.local, session=session)
