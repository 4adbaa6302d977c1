"""Digests while writing: of bytes that come in order."""

import hashlib
import threading
from collections.abc import Sequence
from typing import Protocol

from ..errors import ErrorCode, ErrorContext, InvalidArgument, InvalidState
from .records import Chunk


class _Hash(Protocol):
    """What hashlib's objects and BLAKE3's share."""

    @property
    def digest_size(self) -> int: ...
    def update(self, data: Chunk, /) -> object: ...
    def hexdigest(self) -> str: ...


class RunningDigests:
    """Hashes of the bytes up to `position`, fed by the writes themselves as long as these come in order.

    A write behind the position makes them worthless: position None. Writes may come from several threads at once (slices), hence
    the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hashes: dict[str, _Hash] = {}
        self.position: int | None = None

    def begin(self, algorithms: Sequence[str], position: int = 0) -> None:
        """Start there. The hash objects are made here, on the caller's thread: OpenSSL loads what it needs the first time."""
        hashes = {name: new_hash(name) for name in algorithms}
        with self._lock:
            self._hashes = hashes
            self.position = position if hashes else None

    def rewrite(self, offset: int) -> None:
        """Bytes from `offset` on will change."""
        with self._lock:
            if self.position is not None and offset < self.position:
                self.position = None

    def feed(self, offset: int, chunks: Sequence[Chunk]) -> None:
        """These bytes are in the file."""
        with self._lock:
            if offset != self.position:
                return
            for chunk in chunks:
                for each in self._hashes.values():
                    each.update(chunk)
                self.position += len(chunk)

    def hexdigest(self, algorithm: str) -> str:
        with self._lock:
            if self.position is None or algorithm not in self._hashes:
                raise InvalidState(f"no running digest {algorithm} covers what was written: start_digest comes first")
            return self._hashes[algorithm].hexdigest()


def new_hash(algorithm: str) -> _Hash:
    fresh: _Hash | None
    try:
        fresh = _new_blake3() if algorithm == "blake3" else hashlib.new(algorithm)
    except (ValueError, ImportError):
        fresh = None
    if fresh is None or not fresh.digest_size:  # SHAKE has no length of its own
        code, context = ErrorCode.BG_E_INVALID_HASH_ALGORITHM, ErrorContext.NONE
        raise InvalidArgument(f"no digest algorithm {algorithm!r}", code=code, context=context)
    return fresh


def _new_blake3() -> _Hash:
    from blake3 import blake3  # an extra

    return blake3()
