"""One request written and the head of its answer read, on a connection that stands: aiohttp's parser without aiohttp's session.

A lane has one connection, follows no redirect by itself, keeps no cookie and sets its own deadlines, so most of what a
`ClientSession` does around a request is done in vain, and for a small file that is more than the request itself. What stays aiohttp's
is everything that reads what a peer sent: its protocol, its parser and its stream. `Wire` is that protocol; all requests of all lanes
go through it.

Knows neither identity nor route, and judges nothing: `answers` does. With `lane` (the rest of a body whose connection broke) the only
module that touches names of aiohttp that are not documented; a contract test guards them.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError

from .answers import RawHeaders

if TYPE_CHECKING:
    from aiohttp.http_parser import RawResponseMessage
    from multidict import CIMultiDictProxy

HEAD_LIMIT: Final = 64 * 1024
READ_BUFFER: Final = 256 * 1024

_LENGTH: Final = re.compile(r"[0-9]{1,18}")
_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Reply:
    """The head of an answer, and the stream of its body: of one that has none, an empty stream."""

    status: int
    reason: str
    headers: "CIMultiDictProxy[str]"
    raw_headers: RawHeaders
    content: aiohttp.StreamReader

    @property
    def content_length(self) -> int | None:
        """As the peer announced it; None: it did not, or so oddly that `answers` refuses it."""
        text = self.headers.get("Content-Length") or ""
        return int(text) if _LENGTH.fullmatch(text) else None

    def give_up(self) -> None:
        """Whoever waits for the body is told at once that no more of it comes."""
        if self.content.exception() is None:
            self.content.set_exception(aiohttp.ClientConnectionError("the connection was given up"))


class Wire(ResponseHandler):
    """The protocol of a lane's connection: one request at a time, and nothing is heard that was not asked for.

    aiohttp parses and keeps whatever comes between two answers, as much as the peer sends, and never counts the bytes of a head that
    does not end: here the first byte too much ends the connection (T26), and what came in one piece with an answer ends it afterwards.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._answer: aiohttp.StreamReader | None = aiohttp.EMPTY_PAYLOAD
        """The body that is coming, or came last; None: the head of the next answer is waited for."""
        self._head_size = 0  # bytes that have come of that head, and of the interim answers before it

    @property
    def ready(self) -> bool:
        """It stands, and nothing lies in it that was not asked for."""
        transport = self.transport
        return transport is not None and not transport.is_closing() and not self.should_close

    async def ask(self, head: bytes) -> Reply:
        """Sends a request without a body (see `request_head`) and waits for the final answer's head.

        What is left of the parser of the last answer is not used for this one. Whoever stops waiting gives the connection up.

        Raises:
            aiohttp.ClientError, HttpProcessingError, OSError: there is no answer.
        """
        if not self.ready or self.transport is None:
            raise aiohttp.ServerDisconnectedError
        self.set_response_params(
            read_until_eof=True, auto_decompress=False, read_bufsize=READ_BUFFER, max_line_size=HEAD_LIMIT, max_field_size=HEAD_LIMIT
        )
        self._answer, self._head_size = None, 0
        self.transport.write(head)
        while True:
            message, content = await self.read()
            if not _is_interim(message.code):
                return Reply(message.code, message.reason, message.headers, message.raw_headers, content)

    def data_received(self, data: bytes) -> None:
        """Hands to the parser what was asked for. Without data (the parser is to go on) it is not the peer who says something."""
        answer = self._answer
        if answer is None:
            if self._head_size > HEAD_LIMIT:
                self._end(HttpProcessingError(message=f"Got more than {HEAD_LIMIT} bytes when reading a head"))
                return
            self._head_size += len(data)
        elif data and answer.is_eof():
            self._end(aiohttp.ClientConnectionError("bytes that were not asked for"))
            return
        super().data_received(data)
        if self._answer is not None and self._answer.is_eof() and self._holds_more():
            self.force_close()

    def _holds_more(self) -> bool:
        """Whether the parser has the beginning of a head behind the answer that is over, which came in one piece with its end. The next
        request has a parser of its own: without this one's beginning, the rest would be taken for its answer (T26).
        """
        parser, self._parser = self._parser, None
        try:
            return parser is not None and parser.feed_eof() is not None
        except Exception:
            return True  # what is no beginning of a head

    def resume_reading(self, *how: Any, **more: Any) -> None:
        """aiohttp's stream says so after each piece that was taken from it: of a connection that was not paused it means nothing, and costs
        as much as the piece."""
        if self._reading_paused:
            super().resume_reading(*how, **more)

    def feed_data(self, data: "tuple[RawResponseMessage, aiohttp.StreamReader]", size: int = 0) -> None:
        """A head has come, says the parser."""
        if not _is_interim(data[0].code):
            self._answer = data[1]
        super().feed_data(data, size)

    def _end(self, why: Exception) -> None:
        self.set_exception(why)
        if self.transport is not None:
            self.transport.abort()


def _is_interim(status: int) -> bool:
    """Another answer follows this one (RFC 9110, 15.2); after a 101 something else than HTTP does."""
    return 100 <= status < 200 and status != 101


def make_wire() -> Wire:
    """For a connection that the running loop is about to open."""
    return Wire(asyncio.get_running_loop())


def request_head(method: str, target: str, fields: Sequence[tuple[str, str]]) -> bytes:
    """The head of a request (RFC 9112, 3) without a body.

    Raises:
        ValueError: a control character is in it. All that gets here was checked before (T23); this is the last gate.
    """
    lines = [f"{method} {target} HTTP/1.1", *[f"{name}: {value}" for name, value in fields], "", ""]
    text = "\n".join(lines)
    if text.count("\n") >= len(lines) or _FORBIDDEN.search(text):
        raise ValueError("a control character in the head of a request")
    return text.replace("\n", "\r\n").encode()
