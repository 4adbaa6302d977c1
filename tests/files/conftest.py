"""Real files, and real threads of the process's own token."""

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bits_async.files.part import PartFile
from bits_async.identity.threads import TokenExecutor
from bits_async.identity.tokens import Token
from tests.files.putting import JOB, Put, put_by_receive, put_by_write


@pytest.fixture(params=[put_by_write, put_by_receive], ids=["write", "receive"])
def put(request: pytest.FixtureRequest) -> Put:
    chosen: Put = request.param
    return chosen


@pytest.fixture
def token() -> Token:
    """The process's own; made outside the event loop, as it reads files of /proc."""
    return Token.for_process()


@pytest.fixture
async def files(token: Token) -> AsyncIterator[TokenExecutor]:
    executor = TokenExecutor(token)
    yield executor
    await executor.aclose()


@pytest.fixture
async def part(files: TokenExecutor, tmp_path: Path) -> AsyncIterator[PartFile]:
    """A new part file for `tmp_path / "file.iso"`."""
    part = await PartFile.create(files, tmp_path / "file.iso", JOB)
    yield part
    await part.close()


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, for `privileged` tests."""
    path = tmp_path / "volume"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)
