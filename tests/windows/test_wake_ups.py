"""What asyncio relies on where threads work for an event loop. Without `wake_ups` this fails under Wine 8."""

import asyncio
import socket
import threading

THREADS, ROUNDS = 2, 200


class Counting:
    """A socket that counts what it refused."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self.refused = 0

    def send(self, data: bytes) -> int:
        try:
            return self._inner.send(data)
        except OSError:
            self.refused += 1
            raise


def test_two_threads_that_wake_a_loop_at_the_same_time_are_both_heard() -> None:
    loop = asyncio.new_event_loop()
    pipe = loop._csock  # type: ignore[attr-defined]
    counting = loop._csock = Counting(pipe)  # type: ignore[attr-defined]
    together = threading.Barrier(THREADS)

    def wake() -> None:
        for _ in range(ROUNDS):
            together.wait()
            loop.call_soon_threadsafe(int)

    threads = [threading.Thread(target=wake) for _ in range(THREADS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    loop._csock = pipe  # type: ignore[attr-defined]
    loop.close()
    assert counting.refused == 0
