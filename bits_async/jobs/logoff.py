"""What a log-off does to jobs: tokens that were tied to the session are given up, wherever they are.

A finished job is left alone. An unfinished one whose helper flags are not 0 goes to ERROR with BG_E_TOKEN_REQUIRED at once, SUSPENDED
included; it goes on after `set_helper_token()` and `resume()`, or after `set_helper_token_flags(NONE)` and `resume()`. Any other job whose
owner logged off waits in the queue until the owner is back (BITS: "Users and Network Connections", "Helper Tokens").

Only an end that was seen is a log-off, and only tokens that are tied to a session end with one. Nobody is watched before the first such
token comes.

Races this module answers: a job whose command hangs (a destination on a file system that its user can stop keeps it held for ever) delays
neither the others nor the end of the tokens by more than `PATIENCE`; it is settled when it can be. A watch that breaks begins anew, and
asks for every session that tokens are tied to.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Any, Final, final

from ..errors import BitsError, InvalidState, StoreError, TokenRequired
from ..identity.sessions import SessionEnded, Sessions, WatchSessions
from ..identity.tokens import HelperTokenFlags, Token
from .engine import Engine
from .model import Outcome, OwnerKey, advance
from .roster import Entry

PATIENCE: Final = 15.0  # seconds in which jobs may stop at a durable point; then the tokens are closed under those that did not
AGAIN: Final = 5.0  # seconds until a watch that broke begins anew, and until a session is asked for again that nobody could tell of

log = logging.getLogger("bits_async.jobs")


@final
class LogOffs:
    """Follows the sessions that tokens of this manager's jobs are tied to.

    Args:
        engine: the queue.
        watch: the logon sessions of the machine.
    """

    def __init__(self, engine: Engine, watch: WatchSessions) -> None:
        self._engine = engine
        self._watch = watch
        self._sessions: set[str] = set()  # that tokens are tied to
        self._unchecked: set[str] = set()  # that may have ended before they were watched
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._giving_up: set[asyncio.Task[None]] = set()

    def note(self, token: Token) -> None:
        """A token that jobs may carry."""
        if token.session is None or token.session in self._sessions:
            return
        self._sessions.add(token.session)
        self._unchecked.add(token.session)
        self._news.set()
        if self._task is None:
            self._task = self._engine.task(self._follow(), "bits-log-offs")

    async def aclose(self) -> None:
        """Follow no more."""
        tasks = {*self._giving_up, *([] if self._task is None else [self._task])}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(self) -> None:
        while True:
            try:
                await self._watch_on()
            except Exception as error:  # log-offs that nobody sees leave tokens to those who are gone
                if self._engine.failure is not None:
                    return  # nothing is transferred any more
                if isinstance(error, StoreError) and error.transient:  # of which the engine says enough
                    log.info("what a log-off means for jobs is looked at again in %g s: %s", AGAIN, error)
                else:
                    log.error("the watch of the logon sessions broke; it begins anew in %g s", AGAIN, exc_info=error)
            self._unchecked |= self._sessions  # what ended meanwhile is not told
            await asyncio.sleep(AGAIN)

    async def _watch_on(self) -> None:
        async with self._watch() as sessions:
            ended: asyncio.Future[SessionEnded] = asyncio.ensure_future(sessions.ended())
            try:
                while True:
                    await self._check(sessions)
                    news = asyncio.ensure_future(self._news.wait())
                    await asyncio.wait((ended, news), timeout=AGAIN if self._unchecked else None, return_when=asyncio.FIRST_COMPLETED)
                    news.cancel()
                    if ended.done():
                        await self.log_off(ended.result())
                        ended = asyncio.ensure_future(sessions.ended())
            finally:
                ended.cancel()

    async def _check(self, sessions: Sessions) -> None:
        """Tokens may come after the end of the session that they are tied to. Where nobody knows, nobody is logged off, but asked again."""
        self._news.clear()
        for session in list(self._unchecked):
            try:
                user = await sessions.user_of(session)
            except LookupError:
                continue
            self._unchecked.discard(session)
            if user is None:
                await self.log_off(SessionEnded(None, session))

    async def log_off(self, ended: SessionEnded) -> None:
        """Give up what was tied to it. If that breaks off, the session is asked for again."""
        self._sessions.discard(ended.session or "")  # tokens that are brought from here on are asked for anew
        try:
            await self._log_off(ended)
        except BaseException:
            self._sessions.update([] if ended.session is None else [ended.session])
            raise

    async def _log_off(self, ended: SessionEnded) -> None:
        def gone(token: Token | None) -> bool:
            if token is None or token.session is None:
                return False
            return token.session == ended.session if ended.session is not None else token.local.key == ended.user

        engine = self._engine
        owners = engine.roster.owners_gone(gone)
        lost = {*owners.values(), *engine.forget_setters(gone)}
        closed = asyncio.Event()
        settling: list[asyncio.Task[None]] = []
        try:
            touched = await engine.roster.touched_by(gone, owners)
            for entry in touched:
                lost.update(_carried(entry, gone))
            settling = await self._part_all(touched, gone, owners, closed)
        finally:
            for entry in engine.roster:  # some may have got it meanwhile
                lost.update(_carried(entry, gone))
            lost.update(engine.roster.carried_apart(gone))  # of jobs that could not be read now
            for token in lost:  # whoever still holds one: the session is over
                engine.executors.discard(token)
                token.close()
            closed.set()
            await engine.forget_lanes(*lost)
        if settling:
            await asyncio.wait(settling)

    async def _part_all(
        self, entries: Collection[Entry], gone: Callable[[Token | None], bool], owners: Collection[OwnerKey], closed: asyncio.Event
    ) -> list[asyncio.Task[None]]:
        """Each job stops and parts with the tokens. Returns those that go on as soon as they are `closed`; the others are late."""
        parting: dict[asyncio.Task[Any], asyncio.Task[None]] = {}
        for entry in entries:
            parted = asyncio.Event()
            task = self._engine.task(self._give_up(entry, gone, owners, parted, closed), f"bits-log-off-{entry.job.id}")
            self._giving_up.add(task)
            task.add_done_callback(self._giving_up.discard)
            parting[asyncio.ensure_future(parted.wait())] = task
        done, late = await asyncio.wait(parting, timeout=PATIENCE) if parting else (set(), set())
        for each in late:
            log.warning("a job did not stop within %g s of a log-off; the token is closed under it", PATIENCE)
            each.cancel()
        return [parting[each] for each in done]

    async def _give_up(
        self, entry: Entry, gone: Callable[[Token | None], bool], owners: Collection[OwnerKey], parted: asyncio.Event, closed: asyncio.Event
    ) -> None:
        """One job parts with the tokens, and goes on when they are closed: none does before all have parted with them."""
        try:
            async with self._engine.command(entry, even_paused=True):  # tokens are given up whatever can be journalled
                await self._part(entry, gone, owners)
                parted.set()
                await closed.wait()
                await self._settle(entry)
        except InvalidState:
            pass  # it has left the queue in the meantime
        except BitsError as error:
            log.warning("job %s: what a log-off changes could not be kept: %s", entry.job.id, error)
        except Exception as error:
            log.error("job %s: a defect in bits_async ended what a log-off does", entry.job.id, exc_info=error)
        finally:
            parted.set()

    async def _part(self, entry: Entry, gone: Callable[[Token | None], bool], owners: Collection[OwnerKey]) -> None:
        """Stop the attempt at a durable point and take the tokens; with its owner the helper goes too."""
        owner_left = gone(entry.owner) or entry.job.owner in owners
        helper = entry.helper if owner_left or gone(entry.helper) else None
        await self._engine.drop_lanes(entry, *_carried(entry, gone), helper)
        for token in _carried(entry, gone):
            token.close()
        if helper is not None:
            entry.helper = None
        if owner_left:
            entry.owner = None

    async def _settle(self, entry: Entry) -> None:
        job, who = entry.job, "owner" if entry.owner is None else "helper"
        if job.state.is_settled or job.helper_flags is HelperTokenFlags.NONE:
            self._engine.announce(entry)
            return
        message = f"the job's {who} logged off, and the helper token was discarded"
        advice = "set the helper token again, or set the helper token flags to NONE, and resume the job"
        error = TokenRequired(message, job_id=job.id, advice=advice)
        log.warning("job %s: %s", job.id, error)
        fields: dict[str, Any] = {"error": error, "error_count": job.error_count + 1, "retry_at": None}
        await self._engine.change(entry, state=advance(job.state, Outcome.FAILED), **fields)


def _carried(entry: Entry, gone: Callable[[Token | None], bool]) -> set[Token]:
    """The tokens that a job carries and that are given up."""
    return {token for token in (entry.owner, entry.helper) if token is not None and gone(token)}
