"""Threads that are born in a token and die in it: the only place where an identity of the operating system is worn.

No thread ever switches back, so there is no forgotten revert; what cannot take or keep its identity is broken for good and
fails closed. Every callable runs in an empty context, between two checks of its thread's identity (T1). In threads of
another user no process, program or thread can be started (T2), and what such a thread may need is imported before the first
one is born.

The asyncio side knows two manners: a file call is awaited through a cancel, so that nothing races a live write; a security
call is abandoned at its deadline, because a silent KDC blocks for half a minute. Threads are daemonic: one that never
returns cannot keep the interpreter from exiting. This module does not know what its callables do.
"""

import asyncio
import codecs
import concurrent.futures
import contextlib
import importlib
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import Context
from functools import partial
from typing import Any, Final, Literal, ParamSpec, TypeVar

from ..errors import ImpersonationFailed, ManagerClosed, TokenRequired, scrub
from .ambient import worn_by_thread
from .tokens import ImpersonationLevel, LocalIdentity, Token

P = ParamSpec("P")
T = TypeVar("T")

CANCEL_PATIENCE: Final = 10.0  # seconds that a cancelled file call is waited for before its thread is given up
CLOSE_PATIENCE: Final = 10.0  # the same for all threads of an executor that is closed
IDLE_SECONDS: Final = 60.0  # an executor that nobody uses for so long is closed
IDLE_EXECUTORS: Final = 16  # so many are kept that nobody uses, of all tokens together

# -- in a token thread (T2) -------------------------------------------------------------------------------------------


class _Here(threading.local):
    """What the calling thread wears: the name of another user, or None in every thread that is the process."""

    identity: str | None = None


_here: Final = _Here()

_BIRTHS: Final = frozenset(
    {
        "_thread.start_joinable_thread",
        "_thread.start_new_thread",
        "_winapi.CreateProcess",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "os.startfile/2",
        "os.system",
        "pty.spawn",
        "subprocess.Popen",
    }
)


def wearing() -> str | None:
    """The other user whose identity the calling thread wears; None in a thread that is the process."""
    return _here.identity


def _forbid_births(event: str, arguments: tuple[Any, ...], births: frozenset[str] = _BIRTHS, here: _Here = _here) -> None:
    """The audit hook: a program started here would be the process again, a thread would keep the identity.

    Its names are bound as defaults, because it is still called when the interpreter has taken this module apart.
    """
    if event in births and here.identity is not None:
        raise ImpersonationFailed(f"a thread that acts as {here.identity} may start no process and no thread ({event})")
    if event == "bits_async.identity.probe":
        arguments[0].append(True)


@contextlib.contextmanager
def _once(lock: threading.Lock, done: list[bool]) -> Iterator[bool]:
    """True for the first caller that gets through; the others wait for it."""
    with lock:
        yield not done
        done.append(True)


_arming, _armed = threading.Lock(), list[bool]()
_preparing, _prepared = threading.Lock(), list[bool]()


def _arm() -> None:
    """Installs the audit hook, once per process.

    It can never be removed. Another hook may veto it, so it is asked whether it is there.
    """
    with _once(_arming, _armed) as first:
        if first:
            sys.addaudithook(_forbid_births)
            answers: list[bool] = []
            sys.audit("bits_async.identity.probe", answers)
            if not answers:
                raise ImpersonationFailed("an audit hook of this process forbids the hook that guards threads of other users")


# Where a token's user may not read the interpreter's own directories, an import in its thread fails.
# fmt: off
_MODULES: Final = (
    "_strptime", "asyncio", "concurrent.futures.thread", "fcntl", "fnmatch", "getpass", "glob", "grp", "hashlib", "hmac",
    "ipaddress", "linecache", "locale", "logging", "mmap", "multiprocessing", "ntpath", "pathlib", "platform", "posixpath",
    "pwd", "random", "secrets", "select", "selectors", "shutil", "socket", "ssl", "stat", "stringprep", "struct",
    "subprocess", "tempfile", "textwrap", "tokenize", "traceback", "unicodedata", "urllib.parse", "uuid", "cryptography.x509",
    "spnego", "spnego.channel_bindings", "spnego.exceptions", "spnego.iov", "gssapi", "gssapi.raw", "krb5",
)
_CODECS: Final = (
    "ascii", "base64", "cp1252", "hex", "idna", "latin-1", "punycode", "utf-16", "utf-16-be", "utf-16-le", "utf-32",
    "utf-7", "utf-8", "utf-8-sig",
)
# fmt: on


def prepare() -> None:
    """Imports all that a thread of another user may need; once, half a second, in a thread that is the process."""
    with _once(_preparing, _prepared) as first:
        if first:
            for name in _MODULES:
                with contextlib.suppress(ImportError):  # an extra, or of another platform
                    importlib.import_module(name)
            for name in _CODECS:
                codecs.lookup(name)
            "bücher.example".encode("idna")
            _load_mechanisms()


# The second message of an NTLM login (CHALLENGE_MESSAGE of [MS-NLMP]) of a server without a name.
_NTLM_CHALLENGE: Final = (
    b"NTLMSSP\0\2\0\0\0" + bytes(4) + b"\x38\0\0\0" + b"\x35\x82\x8a\xe2" + bytes(16) + b"\4\0\4\0\x38\0\0\0" + bytes(12)
)


def _load_mechanisms() -> None:
    """NTLM loads its ciphers in its last step, GSSAPI and libkrb5 their plug-ins at the first call."""
    import spnego

    rehearsal = spnego.client(spnego.Password("nobody", "nothing"), protocol="ntlm", options=spnego.NegotiateOptions.use_ntlm)
    rehearsal.step()
    rehearsal.step(_NTLM_CHALLENGE)
    try:
        import gssapi
        import krb5
    except ImportError:
        return  # without the extra there is no Kerberos to prepare
    gssapi.raw.indicate_mechs()
    context = krb5.init_context()
    krb5.cc_resolve(context, b"MEMORY:")


# -- a crew: threads of one identity ----------------------------------------------------------------------------------


class _Call:
    """A callable and the future of its outcome."""

    __slots__ = ("future", "work")

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()


class _Worker:
    """A thread of a crew. Retired: given up on; it ends when what it is stuck in returns."""

    __slots__ = ("retired", "thread")

    def __init__(self) -> None:
        self.retired = False
        self.thread: threading.Thread


class _Crew(concurrent.futures.Executor):
    """An executor whose threads wear `local`. `ThreadPoolExecutor` joins its threads at exit, which a silent KDC would block."""

    def __init__(self, local: LocalIdentity, name: str, limit: int, refuse: Callable[[], None] = lambda: None) -> None:
        self._local = local
        self._refuse_first = refuse  # raises when the identity may no longer be used, whatever this crew thinks
        self._name = f"{name}-{local.name}"
        self._limit = limit
        self._lock = threading.RLock()  # calls come from the loop, their ends from the threads; a finalizer may stop it anywhere
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._waiting = 0  # calls in the queue
        self._idle = 0  # threads of the pool without a call
        self._pool: set[_Worker] = set()  # those that serve the queue
        self._alone: set[_Worker] = set()  # those with one call of their own
        self._running: dict[concurrent.futures.Future[Any], _Worker] = {}
        self._refusal: Callable[[], Exception] | None = None
        self._born = 0
        self.broken = False

    # -- from outside

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "concurrent.futures.Future[T]":
        call = _Call(partial(fn, *args, **kwargs))
        with self._lock:
            self._refuse()
            self._waiting += 1
            self._queue.put(call)
            try:
                self._grow()
            except ImpersonationFailed:
                self._take()  # no thread lives: this call is the only one that waits
                raise
        return call.future

    def dedicate(self, work: Callable[[], T]) -> "concurrent.futures.Future[T]":
        """Runs one call in a thread of its own, so that it takes nobody's place."""
        call = _Call(work)
        with self._lock:
            self._refuse()
            self._alone = {worker for worker in self._alone if worker.thread.is_alive()}
            self._alone.add(self._start(_live_for_one_call, call))
        return call.future

    def give_up(self, future: "concurrent.futures.Future[Any]") -> bool:
        """Forgets a call. If it runs, its thread is retired and replaced: True."""
        if future.cancel():
            return False  # it had not begun
        with self._lock:
            worker = self._running.pop(future, None)
            if worker is None:
                return False  # it has just ended
            self._retire(worker)
            try:
                self._grow()
            except ImpersonationFailed as exc:
                failed = exc
            else:
                return True
        self._break(failed)  # nobody is left to serve those that wait
        return True

    def stop(self, refusal: Callable[[], Exception], *, drop: bool) -> None:
        """Takes no more calls.

        Each raises what `refusal` makes. `drop`: those that wait fail the same way, else they are served.
        """
        dropped = []
        with self._lock:
            if self._refusal is None or drop:
                self._refusal = refusal
            while drop and (call := self._take()) is not None:
                dropped.append(call)
            for _ in self._pool:
                self._queue.put(None)
        for call in dropped:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(refusal())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Of the Executor protocol; the owner of the crew closes it."""
        self.stop(_closed, drop=cancel_futures)
        for worker in self.living() if wait else ():
            worker.thread.join()

    def living(self) -> list[_Worker]:
        """The threads that are still there, the retired ones aside."""
        with self._lock:
            return [worker for worker in (*self._pool, *self._alone) if not worker.retired and worker.thread.is_alive()]

    def abandon_living(self) -> int:
        """Retires whoever is left."""
        with self._lock:
            living = [worker for worker in (*self._pool, *self._alone) if worker.thread.is_alive()]
            for worker in living:
                self._retire(worker)
        return len(living)

    # -- with the lock held

    def _refuse(self) -> None:
        self._refuse_first()
        if self._refusal is not None:
            raise self._refusal()

    def _grow(self) -> None:
        if self._waiting > self._idle and len(self._pool) < self._limit:
            try:
                self._pool.add(self._start(_live))
            except ImpersonationFailed:
                if not self._pool:  # else those that live must do
                    raise

    def _take(self) -> _Call | None:
        """A waiting call, taken back from the queue."""
        with contextlib.suppress(queue.Empty):
            while True:
                call = self._queue.get_nowait()
                if call is not None:
                    self._waiting -= 1
                    return call
        return None

    def _retire(self, worker: _Worker) -> None:
        worker.retired = True
        self._pool.discard(worker)
        self._alone.discard(worker)

    def _start(self, life: Callable[..., None], *arguments: Any) -> _Worker:
        if _here.identity is not None:
            raise ImpersonationFailed(f"a thread that acts as {_here.identity} may start no thread")
        if not self._local.is_process:
            prepare()
            _arm()
        worker = _Worker()
        self._born += 1
        name = f"{self._name}_{self._born}"
        worker.thread = threading.Thread(target=life, args=(self, worker, *arguments), name=name, daemon=True)
        try:
            worker.thread.start()
        except RuntimeError as exc:
            raise ImpersonationFailed(f"no thread can be started for {self._local.name}: {exc}") from exc
        return worker

    # -- in the crew's threads

    def next(self) -> _Call | None:
        call = self._queue.get()
        with self._lock:
            self._idle -= 1
            self._waiting -= call is not None
        return call

    def be_born(self) -> bool:
        """Puts the identity on; the first thing a thread does."""
        if not self._local.is_process:
            _here.identity = self._local.name
        try:
            self._local.assume()
        except BaseException as exc:
            self._break(exc)
            return False
        return True

    def rest(self, worker: _Worker) -> None:
        """The worker can take the next call: said before the outcome is, so that whoever gets it finds the worker free."""
        with self._lock:
            self._idle += worker in self._pool

    def perform(self, worker: _Worker, call: _Call) -> None:
        future = call.future
        with self._lock:  # both or neither: give_up() asks the one, then the other
            if not future.set_running_or_notify_cancel():
                self.rest(worker)
                return
            self._running[future] = worker
        try:
            outcome = Context().run(self._checked, call.work)
        except BaseException as exc:  # also SystemExit: it belongs to whoever waits, as in every executor
            self._ended(worker, future)
            future.set_exception(exc)
        else:
            self._ended(worker, future)
            future.set_result(outcome)

    def fail(self, call: _Call) -> None:
        if call.future.set_running_or_notify_cancel():
            assert self._refusal is not None
            call.future.set_exception(self._refusal())

    def _ended(self, worker: _Worker, future: "concurrent.futures.Future[Any]") -> None:
        with self._lock:
            self._running.pop(future, None)
            self.rest(worker)

    def _checked(self, work: Callable[[], T]) -> T:
        self._check()
        try:
            outcome = work()
        except BaseException as exc:
            self._check(exc)
            raise
        self._check()  # what was done as somebody else is not handed out
        return outcome

    def _check(self, during: BaseException | None = None) -> None:
        try:
            self._local.check()
        except BaseException as exc:
            raise self._break(exc) from (None if during is None else scrub(during))

    def _break(self, why: BaseException) -> ImpersonationFailed:
        """No thread of this crew is used again. Returns the error of the call that noticed."""
        if not isinstance(why, ImpersonationFailed):
            why = ImpersonationFailed(f"cannot act as {self._local.name}: {type(why).__name__}", identity=self._local.name)
        self.broken = True
        refusal = partial(ImpersonationFailed, why.message, identity=why.identity, advice=why.advice)
        self.stop(refusal, drop=True)
        return refusal()


def _closed() -> Exception:
    return RuntimeError("the executor was closed")


def _live(crew: _Crew, worker: _Worker) -> None:
    """A thread that serves the queue, from birth to death."""
    if not crew.be_born():
        return
    crew.rest(worker)
    while not worker.retired and (call := crew.next()) is not None:
        crew.perform(worker, call)
        del call  # nothing of it stays while this thread waits


def _live_for_one_call(crew: _Crew, worker: _Worker, call: _Call) -> None:
    if crew.be_born():
        crew.perform(worker, call)
    else:
        crew.fail(call)


# -- the asyncio side -------------------------------------------------------------------------------------------------


def _end_of(source: "concurrent.futures.Future[Any]") -> "asyncio.Future[None]":
    """Done on the running loop when the thread's future is. Cancelling it stops nothing; a closed loop is not called."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[None] = loop.create_future()

    def arrive() -> None:
        if not end.done():
            end.set_result(None)

    def ended(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(arrive)

    source.add_done_callback(ended)
    return end


def _outcome(source: "concurrent.futures.Future[T]") -> "asyncio.Future[T]":
    """The same with the outcome."""
    outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def arrive(_: object) -> None:
        if outcome.done():
            return
        error = source.exception()
        if isinstance(error, StopIteration):
            outcome.set_exception(RuntimeError("the callable raised StopIteration"))  # a future cannot hold it
        elif error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(source.result())

    _end_of(source).add_done_callback(arrive)
    return outcome


async def _outlast(source: "concurrent.futures.Future[T]", give_up: Callable[[], object]) -> T:
    """Waits for a call, through a cancel too, so that nothing is undone while it still runs. After `CANCEL_PATIENCE` it is
    given up.
    """
    try:
        await _end_of(source)
    except asyncio.CancelledError:
        if not await _has_ended(source, CANCEL_PATIENCE):
            give_up()
        raise
    return source.result()


async def _has_ended(source: "concurrent.futures.Future[Any]", patience: float) -> bool:
    loop = asyncio.get_running_loop()
    end = loop.time() + patience
    while not source.done() and (left := end - loop.time()) > 0:
        try:
            await asyncio.wait([_end_of(source)], timeout=left)
        except asyncio.CancelledError:
            continue  # one cancel is already on its way to the caller
    return source.done()


async def in_own_thread(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a callable as the process in a thread of its own, never in the loop's default executor. A cancel abandons it."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def live() -> None:
        try:
            future.set_result(Context().run(func, *args, **kwargs))
        except BaseException as exc:
            future.set_exception(exc)

    if _here.identity is not None:
        raise ImpersonationFailed(f"a thread that acts as {_here.identity} may start no thread")
    threading.Thread(target=live, name="bits-lookup", daemon=True).start()
    await _end_of(future)
    return future.result()


async def wear(local: LocalIdentity, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a callable in one new thread born in `local`; awaited through a cancel like a file call."""
    crew = _Crew(local, "bits-as", 0)
    source = crew.dedicate(partial(func, *args, **kwargs))
    return await _outlast(source, lambda: crew.give_up(source))


async def run_as(token: Token, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a callable in a thread born in the token, which is also the ambient identity there.

    On Linux the token decides what files the thread may open, make or change, and whose they are; `os.geteuid()` and `os.access()`
    go on telling of the process.

    A cancel waits for the callable, at most 10 seconds. In a thread of another user no process and no thread can be started.

    Raises:
        ImpersonationFailed: The token's level is below IMPERSONATE; the identity could not be taken, or was not kept: then nothing
            that the callable returned is handed out.
        TokenRequired: The token was closed.
    """
    _refuse(token)

    def as_token() -> T:
        with worn_by_thread(token):
            return func(*args, **kwargs)

    return await wear(token.local, as_token)


def _gone(token: Token) -> TokenRequired:
    return TokenRequired(f"the token of {token.name} is gone", identity=token.name)


def _refuse(token: Token) -> None:
    """The two things that a token itself may say against its use."""
    if token.closed:
        raise _gone(token)
    if token.level.value < ImpersonationLevel.IMPERSONATE.value:
        raise ImpersonationFailed(f"a token of level {token.level.name} cannot act", identity=token.name, advice=_IDENTIFIED)


_IDENTIFIED: Final = "it names somebody and no more: log the user on, or have the realm trust this service to act for him"


class TokenExecutor:
    """A few threads born in a token, used from one event loop; `local`: in another identity than `token.local`.

    Its threads start with the first call. A broken one (the identity was not taken or kept, a cancelled file call never
    returned) stays so.
    """

    def __init__(self, token: Token, *, threads: int = 4, name: str = "files", local: LocalIdentity | None = None) -> None:
        _refuse(token)
        self.token = token
        self.retired = 0  # threads given up on
        self._crew = _Crew(local or token.local, f"bits-{name}", threads, partial(_refuse, token))
        weakref.finalize(self, self._crew.stop, _closed, drop=False).atexit = False

    @property
    def pool(self) -> concurrent.futures.Executor:
        """For libraries that take an executor (`aiofiles.open(..., executor=)`).

        The same threads, the same checks. Never shut it down.
        """
        return self._crew

    @property
    def broken(self) -> bool:
        """Every use raises ImpersonationFailed from now on."""
        return self._crew.broken

    async def run(self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a file call.

        A cancel waits until it has ended, at most 10 seconds: then its thread is retired, and this executor broken.

        Raises:
            ImpersonationFailed: The thread's identity was not right before or after the call; its result is dropped.
            TokenRequired: The token is gone.
        """
        source = self._crew.submit(func, *args, **kwargs)
        return await _outlast(source, lambda: self._give_up_on(source))

    async def run_security(self, func: Callable[..., T], /, *args: Any, deadline: float, **kwargs: Any) -> T:
        """Runs a security call.

        After `deadline` seconds (TimeoutError), or at a cancel, it is abandoned and its thread replaced.
        """
        source = self._crew.submit(partial(func, *args, **kwargs))
        try:
            async with asyncio.timeout(deadline):
                await _end_of(source)
        except (TimeoutError, asyncio.CancelledError) as exc:
            if not (isinstance(exc, TimeoutError) and source.done()):  # else it was the loop that was late: the machine slept, say
                self.retired += self._crew.give_up(source)
                raise
        return source.result()

    def spawn(self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[T]":
        """Starts a long call in a thread of its own, born in the token.

        Cancelling the future does not stop it: tell the callable.
        """
        return _outcome(self._crew.dedicate(partial(func, *args, **kwargs)))

    def discard(self) -> None:
        """The token is gone: what waits, and every later use, raises TokenRequired. What runs ends by itself."""
        self._crew.stop(partial(_gone, self.token), drop=True)

    async def aclose(self) -> None:
        """Serves what waits, then ends the threads. One that does not end within 10 seconds is retired."""
        self._crew.stop(_closed, drop=False)
        loop = asyncio.get_running_loop()
        end, pause = loop.time() + CLOSE_PATIENCE, 0.0005
        while self._crew.living() and loop.time() < end:
            await asyncio.sleep(pause)  # a thread tells nobody that it has really ended
            pause = min(2 * pause, 0.05)
        self.retired += self._crew.abandon_living()

    def _give_up_on(self, source: "concurrent.futures.Future[Any]") -> None:
        if self._crew.give_up(source):
            self.retired += 1
            self._crew._break(
                ImpersonationFailed(
                    f"a file call of {self.token.name} did not return within {CANCEL_PATIENCE:.0f} s of being cancelled",
                    identity=self.token.name,
                    advice="look at the volume: a call to it hangs",
                )
            )


# -- the manager's executors ------------------------------------------------------------------------------------------

Kind = Literal["files", "security"]
KINDS: Final[tuple[Kind, ...]] = ("files", "security")


class _Entry:
    """An executor with its users."""

    __slots__ = ("executor", "replaced", "timer", "users")

    def __init__(self, executor: TokenExecutor) -> None:
        self.executor = executor
        self.users = 0
        self.replaced = False  # the token's account has changed: closed with its last user
        self.timer: asyncio.TimerHandle | None = None


class TokenExecutors:
    """Two executors for each token in use, for files and for security contexts; closed after a minute without a user, and at once where
    many tokens take turns.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[Token, Kind], _Entry] = {}
        self._fresh: weakref.WeakKeyDictionary[Token, LocalIdentity] = weakref.WeakKeyDictionary()  # accounts that have changed
        self._closing: dict[TokenExecutor, asyncio.Task[None]] = {}
        self._retired = 0
        self._closed = False

    @property
    def retired(self) -> int:
        """Threads given up on so far."""
        living = (entry.executor for entry in self._entries.values())
        return self._retired + sum(executor.retired for executor in (*living, *self._closing))

    @contextlib.contextmanager
    def lease(self, token: Token, kind: Kind) -> Iterator[TokenExecutor]:
        """The token's executor, for as long as the block runs. A broken one is replaced for those who come later.

        Raises:
            TokenRequired: The token was closed.
            ManagerClosed: These executors were closed.
        """
        if self._closed:
            raise ManagerClosed()
        _refuse(token)
        entry = self._enter(token, kind)
        try:
            yield entry.executor
        finally:
            self._leave((token, kind), entry)

    def in_use(self, token: Token) -> bool:
        """Somebody has leased one of its executors."""
        return any(entry.users for kind in KINDS if (entry := self._entries.get((token, kind))) is not None)

    async def refresh(self, token: Token) -> LocalIdentity:
        """Read again what the machine says of the token's user (T12): executors leased from now on have the groups of today.

        Raises:
            TokenRequired: The account is gone, locked or expired, or the token was closed. A job that hears it goes to ERROR, whatever
                its flags: it is no log-off that somebody tells the end of, and to wait for an account is to ask for it for ever.
        """
        _refuse(token)
        known = self._fresh.get(token, token.local)
        if known.is_process:
            return known
        fresh = await in_own_thread(known.fresh)
        if fresh == known:
            return known
        self._fresh[token] = fresh
        for kind in KINDS:
            entry = self._entries.pop((token, kind), None)  # whoever uses it ends with it
            if entry is not None:
                entry.replaced = True
                if not entry.users:
                    self._close(entry)
        return fresh

    def discard(self, token: Token) -> None:
        """The token is gone: whoever still uses it gets TokenRequired."""
        self._fresh.pop(token, None)
        for kind in KINDS:
            entry = self._entries.pop((token, kind), None)
            if entry is not None:
                entry.executor.discard()
                self._close(entry)

    async def aclose(self) -> None:
        """Ends all threads; those that do not end are retired and counted."""
        self._closed = True
        for key in list(self._entries):
            self._close(self._entries.pop(key))
        while self._closing:
            await asyncio.wait(list(self._closing.values()))

    def _enter(self, token: Token, kind: Kind) -> _Entry:
        entry = self._entries.get((token, kind))
        if entry is not None and entry.executor.broken:
            self._close(self._entries.pop((token, kind)))
            entry = None
        if entry is None:
            fresh = self._fresh.get(token, token.local)
            local = token.security if kind == "security" and token.security is not token.local else fresh
            entry = self._entries[token, kind] = _Entry(TokenExecutor(token, name=kind, local=local))
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        entry.users += 1
        return entry

    def _leave(self, key: tuple[Token, Kind], entry: _Entry) -> None:
        entry.users -= 1
        if entry.replaced and not entry.users:
            self._close(entry)
        if entry.users or self._entries.get(key) is not entry:
            return
        entry.timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._idle, key, entry)
        self._entries[key] = self._entries.pop(key)  # the longest unused first
        idle = [each for each, other in self._entries.items() if not other.users]
        for each in idle[:-IDLE_EXECUTORS]:
            self._close(self._entries.pop(each))

    def _idle(self, key: tuple[Token, Kind], entry: _Entry) -> None:
        if not entry.users and self._entries.get(key) is entry:
            self._close(self._entries.pop(key))

    def _close(self, entry: _Entry) -> None:
        """Closes in the background: whoever still holds a lease gets its errors, not a wait."""
        if entry.timer is not None:
            entry.timer.cancel()
        executor = entry.executor
        task = asyncio.get_running_loop().create_task(executor.aclose(), context=Context())
        self._closing[executor] = task
        task.add_done_callback(lambda _: self._gone(executor))

    def _gone(self, executor: TokenExecutor) -> None:
        del self._closing[executor]
        self._retired += executor.retired
