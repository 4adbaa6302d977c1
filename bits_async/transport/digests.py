"""What a server, or a caller, says the bytes hash to.

Pure: field lines in, a `Digests` out; hashes nothing. Two of HTTP's fields look alike and are not (RFC 9530): `Repr-Digest` is of
the whole representation, whatever part of it an answer brings, so it is the same in every range of one version; `Content-Digest` is
of the content of that one answer. The older `Digest` (RFC 3230) was meant as the first and is often written as the second; it is
believed only where the two are one, in an answer that brings the whole file.

All three are read in the head of an answer. RFC 9530 lets a server that hashes while it sends put the first two in the trailers of a
chunked body, for clients that say `TE: trailers` (RFC 9110, 6.5.1). aiohttp drops trailers and shows them to nobody, so we never say it,
and what a server sends there unasked proves nothing and contradicts nothing. Such a file is checked if the caller names its digest.

Algorithms that are unknown or broken (MD5, SHA-1, checksums), and fields that are malformed, say nothing. Of all three the subject is
the encoded representation; answers with a content coding are refused before anybody asks for their digest.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, cast

from http_sf import parse

from ..errors import InvalidArgument

MAX_FIELD: Final = 4096
"""Characters of a field that are looked at; a longer one says nothing."""

_OF_HTTP: Final = {"sha-256": "sha256", "sha-512": "sha512"}  # what RFC 9530 calls active
_SIZES: Final = {"sha256": 32, "sha512": 64, "blake3": 32}
_NAMES: Final = tuple(_SIZES)
_HEX: Final = re.compile(r"[0-9a-f]+")
_LEGACY: Final = re.compile(r"\s*([A-Za-z0-9-]+)=([A-Za-z0-9+/]+={0,2})\s*")


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of one run of bytes, in lower-case hexadecimal digits; None: not known."""

    sha256: str | None = None
    sha512: str | None = None
    blake3: str | None = None

    def __bool__(self) -> bool:
        return (self.sha256, self.sha512, self.blake3) != (None, None, None)

    @property
    def names(self) -> tuple[str, ...]:
        """The algorithms whose digest is known."""
        return tuple(name for name in _NAMES if getattr(self, name) is not None) if self else ()

    def of(self, name: str) -> str | None:
        """The digest by that algorithm."""
        value: str | None = getattr(self, name)
        return value

    def one(self) -> "Digests":
        """One of them, the cheapest to compute: enough to check the bytes by."""
        return Digests(**{name: self.of(name) for name in self.names[:1]}) if self else self

    def contradicts(self, other: "Digests") -> bool:
        """Whether the two are of different bytes for sure."""
        return any(self.of(name) != other.of(name) for name in self._shared(other))

    def proves(self, other: "Digests") -> bool:
        """Whether the two are of the same bytes for sure."""
        return bool(self._shared(other)) and not self.contradicts(other)

    def joined(self, other: "Digests") -> "Digests":
        """This one, completed by what only the other knows."""
        return Digests(*(self.of(name) or other.of(name) for name in _NAMES)) if other else self

    def _shared(self, other: "Digests") -> list[str]:
        return [name for name in self.names if other.of(name) is not None]

    @classmethod
    def checked(cls, **given: str | None) -> "Digests":
        """From what a caller wrote, in either case.

        Raises:
            InvalidArgument: one is not hexadecimal, or has not the length of its algorithm.
        """
        found = {name: value.lower() if isinstance(value, str) else value for name, value in given.items()}
        for name, value in found.items():
            digits = 2 * _SIZES[name]
            if value is not None and not (isinstance(value, str) and len(value) == digits and _HEX.fullmatch(value)):
                raise InvalidArgument(f"{name}= takes {digits} hexadecimal digits")
        return cls(**found) if any(found.values()) else NO_DIGESTS


NO_DIGESTS: Final = Digests()


def parse_digests(lines: Sequence[str]) -> Digests:
    """The lines of a `Repr-Digest` or a `Content-Digest` (a dictionary of byte sequences, RFC 9530, section 2 and 3)."""
    if not lines:
        return NO_DIGESTS
    text = ", ".join(lines)
    if not text or len(text) > MAX_FIELD or not text.isascii():
        return NO_DIGESTS
    try:
        found = parse(text.encode("ascii"), tltype="dictionary")
    except ValueError:
        return NO_DIGESTS
    members = cast("dict[str, tuple[object, object]]", found)  # a value and its parameters
    return _digests((name, value) for name, (value, _) in members.items())


def parse_legacy_digests(lines: Sequence[str]) -> Digests:
    """The lines of a `Digest` (RFC 3230, section 4.3.2): names in any case, base64 without colons."""
    if not lines:
        return NO_DIGESTS
    text = ", ".join(lines)
    matches = [_LEGACY.fullmatch(each) for each in text.split(",")] if len(text) <= MAX_FIELD else []
    return _digests((match[1].lower(), _decoded(match[2])) for match in matches if match)


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None


def _digests(pairs: Iterable[tuple[str, object]]) -> Digests:
    known = {_OF_HTTP[name]: value for name, value in pairs if name in _OF_HTTP}
    return Digests(**{name: value.hex() for name, value in known.items() if isinstance(value, bytes) and len(value) == _SIZES[name]})
