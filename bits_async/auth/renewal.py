"""Tickets are renewed while they are still good, in the threads of their tokens, before anybody has to wait for them.

One task sleeps until the first of them is due; where none can be renewed it waits to hear of one. A renewal that fails harms nobody: it is
tried again, ever sooner, until the ticket really ends, and what comes then is said by whoever wants to use it. A ticket that nobody
used since it was got, and whose token has nothing under way, is left to end. Nothing here keeps a token alive, or knows a secret.
"""

import asyncio
import contextlib
import logging
from contextvars import Context
from functools import partial
from typing import Any, Final, cast, final

from ..clock import Clock
from ..errors import BitsError, TokenRequired, show_text
from ..identity.threads import TokenExecutors
from ..identity.tokens import Token
from .policy import Offer
from .tickets import KDC_DEADLINE, Renewal, Tickets

LONGEST_SLEEP: Final = 300.0  # seconds; a machine that was asleep itself has slept through the moment

log = logging.getLogger("bits_async.auth")


@final
class Renewals:
    """Renews the tickets of one manager, from `start` to `aclose`.

    Args:
        tickets: whose keeper this becomes.
        executors: the threads of the tokens.
        clock: the one that tickets are compared with, too.
    """

    def __init__(self, tickets: Tickets, executors: TokenExecutors, clock: Clock) -> None:
        self._tickets = tickets
        self._executors = executors
        self._clock = clock
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """On the running loop."""
        self._loop = asyncio.get_running_loop()
        self._tickets.keeper = self
        self._task(self._keep())

    async def aclose(self) -> None:
        """Renew no more; what a KDC is being asked is not waited for."""
        self._tickets.keeper = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def news(self) -> None:
        """See `Keeper.news`."""
        self._soon(self._news.set)

    def worn(self, offer: Offer) -> None:
        """See `Keeper.worn`."""
        self._soon(partial(self._refresh_soon, offer))

    def _soon(self, call: Any) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the manager with it
                self._loop.call_soon_threadsafe(call, context=Context())

    def _refresh_soon(self, offer: Offer) -> None:
        if self._tickets.keeper is self:
            self._task(self._ask(cast(Token, offer.holder), self._tickets.refresh, offer))

    def _task(self, work: Any) -> None:
        assert self._loop is not None
        task = self._loop.create_task(work, name="bits-tickets", context=Context())  # nobody's identity
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self) -> None:
        while True:
            self._news.clear()
            now = self._clock.now().timestamp()
            found = [each for each in self._tickets.renewals() if self._is_used(each)]
            due = [each for each in found if each.when <= now]
            if due:
                for each in due:
                    each.begin(now)
                await asyncio.gather(*(self._ask(cast(Token, each.holder), self._tickets.renew, each) for each in due))
                continue
            pause = min((each.when - now for each in found), default=None)
            del found, due  # they hold tokens
            await self._rest(pause)

    def _is_used(self, renewal: Renewal) -> bool:
        return renewal.used or self._executors.in_use(cast(Token, renewal.holder))

    async def _rest(self, pause: float | None) -> None:
        """Until there is news, or for so long."""
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._news.wait())]
        if pause is not None:
            waits.append(asyncio.ensure_future(self._clock.sleep(min(pause, LONGEST_SLEEP))))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    async def _ask(self, token: Token, ask: Any, about: Any) -> None:
        try:
            with self._executors.lease(token, "security") as security:
                await security.run_security(ask, about, deadline=KDC_DEADLINE)
        except TokenRequired:
            self._tickets.forget(token)
        except (BitsError, TimeoutError) as error:
            why = error.message if isinstance(error, BitsError) else "the KDC did not answer in time"
            log.warning("the Kerberos tickets of %s were not renewed: %s", show_text(token.name, 80), why)
