"""A large file needs no more memory than a small one, however fast the server and however slow the disk."""

import hashlib
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import downloader

MIB = 1 << 20
SMALL, LARGE = 10 * MIB, 1024 * MIB
MORE = 16 * MIB


class Zeros:
    """An origin of files that cost nothing: `/<size>` and `/chunked/<size>` are that many zeros, sent by the kernel from a hole."""

    def __init__(self, directory: Path) -> None:
        self._holes = directory / "zeros"
        with self._holes.open("wb") as file:
            file.truncate(LARGE)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def url(self, size: int, *, chunked: bool) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/{'chunked/' if chunked else ''}{size}"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept() up
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    self._answer(connection)
        except OSError:
            pass  # closed

    def _answer(self, connection: socket.socket) -> None:
        head = connection.recv(65536)
        found = re.match(rb"GET /(chunked/)?(\d+) ", head)
        assert found is not None
        size = int(found[2])
        framing = b"Transfer-Encoding: chunked" if found[1] else b"Content-Length: %d" % size
        connection.sendall(b'HTTP/1.1 200 OK\r\nConnection: close\r\nETag: "zeros"\r\n%b\r\n\r\n' % framing)
        with self._holes.open("rb") as file:
            if not found[1]:
                connection.sendfile(file, count=size)
                return
            for _ in range(size // MIB):
                connection.sendall(b"%x\r\n" % MIB)
                connection.sendfile(file, count=MIB)
                connection.sendall(b"\r\n")
            connection.sendall(b"0\r\n\r\n")


@pytest.fixture
def directory() -> Iterator[Path]:
    """In memory if there is room, for other runs too: it is not the disk that is looked at."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 8 * LARGE
    with tempfile.TemporaryDirectory(prefix="bits-memory-", dir=shared if roomy else None) as found:
        yield Path(found)


@pytest.fixture
def zeros(tmp_path: Path) -> Iterator[Zeros]:
    server = Zeros(tmp_path)
    yield server
    server.close()


@pytest.fixture
def peak(zeros: Zeros, directory: Path, monkeypatch: pytest.MonkeyPatch) -> "Peak":
    monkeypatch.setenv("XDG_STATE_HOME", str(directory / "state"))
    return Peak(zeros, directory)


class Peak:
    """The most memory that a process had which downloads a file of this size and does nothing else."""

    def __init__(self, zeros: Zeros, directory: Path) -> None:
        self._zeros, self._directory = zeros, directory

    def __call__(self, size: int, *, chunked: bool = False, **more: object) -> int:
        path = self._directory / str(size)
        child = downloader.start(self._zeros.url(size, chunked=chunked), path, **more)
        try:
            out, err = child.communicate(timeout=150)
        finally:
            child.kill()
        assert child.returncode == 0, err
        assert path.stat().st_size == size
        path.unlink()
        return int(out)


def test_a_1_gib_file_needs_no_more_memory_than_a_10_mib_one(peak):
    assert peak(LARGE) < peak(SMALL) + MORE


def test_neither_does_a_slow_disk_under_a_fast_server_nor_a_digest_nor_a_body_of_unknown_length(peak):
    """Each write takes 4 ms more, and the server does not wait."""
    small, large = (peak(size, chunked=True, slowly=0.004, sha256=hashlib.sha256(bytes(size)).hexdigest()) for size in (SMALL, LARGE // 4))
    assert large < small + MORE
