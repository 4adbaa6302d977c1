"""The text of WWW-Authenticate, Proxy-Authenticate and (Proxy-)Authentication-Info, to values and back (RFC 9110, 11.2 to 11.6).

A challenge list is ambiguous by design: commas separate challenges, the parameters of one challenge, and may stand inside
quotes. The reader therefore walks each line once, from left to right, and decides at every word whether it is a parameter of
the challenge at hand ("word =") or the name of the next scheme. What it cannot read it leaves out, up to the next comma; a
peer's mistakes in one challenge do not hide the others. Pure; it knows no scheme and decides nothing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from ..errors import AuthFailed

MAX_TEXT: Final = 64 * 1024  # of all lines together: the header block itself may not be longer (design, section 9)
MAX_CHALLENGES: Final = 32
MAX_PARAMS: Final = 32

_NO_PARAMS: Final[Mapping[str, str]] = MappingProxyType({})
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TOKEN68 = re.compile(r"[A-Za-z0-9\-._~+/]+=*(?=[ \t]*(?:,|$))")
_EQUALS = re.compile(r"[ \t]*=[ \t]*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_GAP = re.compile(r"[ \t,]*")
_BLANKS = re.compile(r"[ \t]*")
_REST_OF_ELEMENT = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*"|".*)*')  # a quote that is never closed hides all that follows


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge: a scheme in lower case with either a token68 or parameters (names in lower case, values unquoted)."""

    scheme: str
    token68: str | None = field(default=None, repr=False)
    params: Mapping[str, str] = field(default_factory=lambda: _NO_PARAMS, repr=False)

    @property
    def realm(self) -> str:
        """The realm, "" where the scheme has none."""
        return self.params.get("realm", "")


def parse_challenges(lines: Sequence[str]) -> tuple[Challenge, ...]:
    """All challenges of the header's lines, in order.

    A challenge that names a parameter twice is left out, for two readers could understand it differently.

    Raises:
        AuthFailed: a line holds control characters; the peer, or something between, is forging headers.
    """
    found: list[Challenge] = []
    for line in _checked(lines):
        for challenge in _walk(line):
            if len(found) == MAX_CHALLENGES:
                return tuple(found)
            found.append(challenge)
    return tuple(found)


def parse_params(lines: Sequence[str]) -> Mapping[str, str]:
    """The parameters of an Authentication-Info header; the first of two with one name counts. Raises as `parse_challenges`."""
    params: dict[str, str] = {}
    for line in _checked(lines):
        at = 0
        while (at := _past(_GAP, line, at)) < len(line) and len(params) < MAX_PARAMS:
            word = _TOKEN.match(line, at)
            read = _value(line, word.end()) if word else None
            if word and read:
                params.setdefault(word[0].lower(), read[0])
                at = read[1]
            else:
                at = _past(_REST_OF_ELEMENT, line, at)
    return MappingProxyType(params)


def quote(text: str) -> str:
    """A quoted-string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# -- the walk --------------------------------------------------------------------------------------------------------------------


def _checked(lines: Sequence[str]) -> Iterable[str]:
    """The lines until MAX_TEXT is used up; a line is read whole or not at all, so that no cut makes another meaning."""
    left = MAX_TEXT
    for line in lines:
        left -= len(line)
        if left < 0:
            return
        if _CONTROL.search(line):
            raise AuthFailed(
                "the challenge holds control characters",
                advice="the server or something between forges headers; look at its log",
            )
        yield line


class _Draft:
    """The challenge at hand, while its parameters are read."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.token68: str | None = None
        self.params: dict[str, str] = {}
        self.sound = True

    def add(self, name: str, value: str) -> None:
        if name in self.params or self.token68 is not None or len(self.params) == MAX_PARAMS:
            self.sound = False
        self.params.setdefault(name, value)

    def finished(self) -> Challenge:
        return Challenge(self.scheme, self.token68, MappingProxyType(self.params) if self.params else _NO_PARAMS)


def _walk(line: str) -> Iterator[Challenge]:
    draft: _Draft | None = None
    at = 0
    while (at := _past(_GAP, line, at)) < len(line):
        word = _TOKEN.match(line, at)
        if word is None:
            at = max(_past(_REST_OF_ELEMENT, line, at), at + 1)
            continue
        if _EQUALS.match(line, word.end()):
            read = _value(line, word.end())
            if draft and read:
                draft.add(word[0].lower(), read[0])
            elif draft:
                draft.sound = False
            at = read[1] if read else _past(_REST_OF_ELEMENT, line, word.end())
            continue
        if draft and draft.sound:
            yield draft.finished()
        draft = _Draft(word[0].lower())
        at = _past(_BLANKS, line, word.end())
        if at > word.end() and (token := _TOKEN68.match(line, at)):
            draft.token68 = token[0]
            at = token.end()
        elif at == word.end() and line[at : at + 1] not in ("", ","):
            draft = None  # a word with something else glued to it is no scheme
            at = _past(_REST_OF_ELEMENT, line, at)
    if draft and draft.sound:
        yield draft.finished()


def _value(line: str, at: int) -> tuple[str, int] | None:
    """What follows a parameter's name: (value, where it ends). None: no value that can be read, or something behind it."""
    equals = _EQUALS.match(line, at)
    if equals is None:
        return None
    at = equals.end()
    if quoted := _QUOTED.match(line, at):
        value, at = re.sub(r"\\(.)", r"\1", quoted[1]), quoted.end()
    elif token := _TOKEN.match(line, at):
        value, at = token[0], token.end()
    else:
        return None
    at = _past(_BLANKS, line, at)
    return (value, at) if line[at : at + 1] in ("", ",") else None


def _past(pattern: re.Pattern[str], line: str, at: int) -> int:
    found = pattern.match(line, at)
    return found.end() if found else at
