"""What the tests on loopback share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """A directory that needs no disk where there is one: for many small tests in which nothing has to survive."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="bits-test-", dir=memory) as directory:
        yield Path(directory)
