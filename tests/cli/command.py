"""`bits-async` as its users run it: a process with its own state directory, its output and its exit code."""

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.waiting import until

DEADLINE = 90


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of --json."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def complaint(self) -> str:
        """The one line on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


class Running:
    """A command that has not ended yet."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def end(self, number: signal.Signals | None = None) -> Result:
        """Send the signal, if one is given, and wait."""
        if number is not None:
            self.process.send_signal(number)
        async with asyncio.timeout(DEADLINE):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return Result(self.process.returncode, (out or b"").decode(), (err or b"").decode())


class Command:
    """Runs `bits-async` in `directory`, with a state directory of the test's own."""

    def __init__(self, directory: Path, state: Path) -> None:
        self.directory = directory
        self.state = state
        self.environment = os.environ | {"HOME": str(state), "XDG_STATE_HOME": str(state), "TERM": "xterm", "COLUMNS": "120"}
        self._started: list[asyncio.subprocess.Process] = []

    async def start(self, *arguments: object, **options: Any) -> Running:
        """`options` are those of subprocess.Popen."""
        pipes = dict.fromkeys(("stdout", "stderr"), asyncio.subprocess.PIPE)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bits_async"),
            *map(str, arguments),
            **(pipes | {"cwd": self.directory, "env": self.environment, "stdin": asyncio.subprocess.DEVNULL} | options),
        )
        self._started.append(process)
        return Running(process)

    async def __call__(self, *arguments: object, **options: Any) -> Result:
        return await (await self.start(*arguments, **options)).end()

    async def close(self) -> None:
        """What a failed test left running."""
        for process in self._started:
            if process.returncode is None:
                process.kill()
                await process.communicate()


def part_of(destination: Path) -> Path | None:
    """The part file beside a destination."""
    return next(destination.parent.glob(f".{destination.name}.*.bits-part"), None)


async def held(destination: Path, size: int) -> Path:
    """The part file, once the `size` bytes that the peer has sent are in it."""
    await until(lambda: (part := part_of(destination)) is not None and part.stat().st_size >= size, "the bytes are in the part file")
    part = part_of(destination)
    assert part is not None
    return part
