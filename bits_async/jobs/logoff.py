"""What a log-off does to jobs: tokens that were tied to the session are given up, wherever they are.

A finished job is left alone. An unfinished one whose helper flags are not 0 goes to ERROR with BG_E_TOKEN_REQUIRED at once, SUSPENDED
included; it goes on after `set_helper_token()` and `resume()`, or after `set_helper_token_flags(NONE)` and `resume()`. Any other job whose
owner logged off waits in the queue until the owner is back (BITS: "Users and Network Connections", "Helper Tokens").

Only an end that was seen is a log-off, and only tokens that are tied to a session end with one. Nobody is watched before the first such
token comes.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, suppress
from typing import Any, final

from ..errors import InvalidState, TokenRequired
from ..identity.sessions import SessionEnded, Sessions, WatchSessions
from ..identity.tokens import HelperTokenFlags, Token
from .engine import Engine
from .model import Outcome, OwnerKey, advance
from .roster import Entry

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
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _follow(self) -> None:
        async with self._watch() as sessions:
            ended: asyncio.Future[SessionEnded] = asyncio.ensure_future(sessions.ended())
            try:
                while True:
                    await self._check(sessions)
                    news = asyncio.ensure_future(self._news.wait())
                    await asyncio.wait((ended, news), return_when=asyncio.FIRST_COMPLETED)
                    news.cancel()
                    if ended.done():
                        await self.log_off(ended.result())
                        ended = asyncio.ensure_future(sessions.ended())
            finally:
                ended.cancel()

    async def _check(self, sessions: Sessions) -> None:
        """Tokens may come after the end of the session that they are tied to."""
        self._news.clear()
        while self._unchecked:
            session = self._unchecked.pop()
            with suppress(LookupError):  # nobody knows: then nobody is logged off
                if await sessions.user_of(session) is None:
                    await self.log_off(SessionEnded(None, session))

    async def log_off(self, ended: SessionEnded) -> None:
        """Give up what was tied to it."""

        def gone(token: Token | None) -> bool:
            if token is None or token.session is None:
                return False
            return token.session == ended.session if ended.session is not None else token.local.key == ended.user

        self._sessions.discard(ended.session or "")
        owners = self._engine.roster.owners_gone(gone)
        self._engine.forget_setters(gone)
        async with AsyncExitStack() as held:  # no job goes on before all have parted with the token
            jobs = [entry for entry in await self._engine.roster.touched_by(gone, owners) if await self._hold(held, entry)]
            lost = {token for entry in jobs for token in await self._part(entry, gone, owners)}
            for token in lost:
                self._engine.executors.discard(token)
                token.close()  # whoever still holds it: the session is over
            for entry in jobs:
                await self._settle(entry)

    async def _hold(self, held: AsyncExitStack, entry: Entry) -> bool:
        try:
            await held.enter_async_context(self._engine.command(entry))
        except InvalidState:  # it has left the queue in the meantime
            return False
        return True

    async def _part(self, entry: Entry, gone: Callable[[Token | None], bool], owners: Collection[OwnerKey]) -> set[Token]:
        """Stop the attempt at a durable point and take the tokens; with its owner the helper goes too. Returns those that are over."""
        owner_left = gone(entry.owner) or entry.job.owner in owners
        over = {token for token in (entry.owner, entry.helper) if token is not None and gone(token)}
        helper = entry.helper if owner_left or gone(entry.helper) else None
        await self._engine.drop_lanes(entry, *over, helper)
        if helper is not None:
            entry.helper = None
        if owner_left:
            entry.owner = None
        if entry.outbox.commander is not None and gone(entry.outbox.commander[1]):
            entry.outbox.commander = None
        return over

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
