"""A plugin of pytest for Wine: an event loop is woken by every thread that wakes it.

A thread wakes a loop of asyncio by a byte on a non-blocking socket, and asyncio passes over an error of that `send`: if the socket is full,
the loop has enough to wake up for. Wine 8 refuses a byte (WSAEWOULDBLOCK) for another reason too: while another thread is in `send` on the
same socket, be it as empty as it may. So where two threads work for a loop in turn, as those of a journal do, the second can be refused
because the first has not returned yet, although the loop has had the first one's byte and rests again: it rests for ever, with a callback
in its hands. Wine 10 and Linux refuse nothing, and Windows is not known to. Seen with Wine 8: of 6,000 bytes that two threads sent at the
same time 1,192 were refused; of 12,169 calls in turns, on a loaded machine, the loop missed three, and with this plugin none of 11,470.

So here one thread at a time sends.
"""

import asyncio
import threading

_SENDING = threading.Lock()  # of all loops: there is seldom more than one


def pytest_configure() -> None:
    write_to_self = asyncio.ProactorEventLoop._write_to_self  # type: ignore[attr-defined]

    def write_alone(self: asyncio.AbstractEventLoop) -> None:
        with _SENDING:
            write_to_self(self)

    asyncio.ProactorEventLoop._write_to_self = write_alone  # type: ignore[attr-defined]
