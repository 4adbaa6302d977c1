"""Fixtures of the command-line tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.peers import Origin


@pytest.fixture
async def command(tmp_path: Path) -> AsyncIterator[Command]:
    """`await command("download", url, "file")`, in `tmp_path`."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    found = Command(tmp_path, state)
    yield found
    await found.close()


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as server:
        yield server
