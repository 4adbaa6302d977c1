"""`make bench-integrity`: the schedules of `schedules.json`, played to curl, wget, wget2, aria2c and `bits-async download`, as a table.

Every tool is a program of its own, told to continue what it finds; killed where a schedule says so, and started again as often as
it says. Who says with exit code 0 that the file is there is taken at his word, and the file is compared with what was served. Exit
code 0 whatever the figures.

Those that fetch a file in several ranges at once get larger files, as none of them divides a small one; the rows of a schedule then go
to whichever connection asks next.
"""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tests.bench.machine import describe
from tests.integrity.schedules import Schedule, load
from tests.integrity.stage import Outcome, Stage

SCALE: Final = 16  # times the sizes of the schedules, so that a tool is killed with something on the disk
DIVIDED: Final = 2000  # the same for a tool that divides files: 20 MB, enough for 4 ranges of ours and of aria2c's
PATIENCE: Final = 30.0  # seconds for one run
DIGESTION: Final = 0.05  # seconds between the last byte before a kill and the kill


@dataclass(frozen=True)
class Tool:
    """A client, and how it is asked to fetch or to continue."""

    name: str
    program: str
    command: Callable[[str, Path], Sequence[str]]
    scale: int = SCALE


def _curl(*more: str) -> Callable[[str, Path], Sequence[str]]:
    return lambda url, path: ["-q", "-fsSL", *more, "-C", "-", "-o", str(path), url]


def _wget2(*more: str) -> Callable[[str, Path], Sequence[str]]:
    common = ("--no-config", "-q", "-t", "3", "--waitretry=0", "-T", "10", "--no-hsts", "--no-ocsp", *more)
    return lambda url, path: [*common, "-O", str(path), url]


def _aria2c(*more: str) -> Callable[[str, Path], Sequence[str]]:
    common = ("--no-conf", "-q", "-c", "-m", "3", "--retry-wait=0", "-t", "10", "--auto-file-renaming=false", *more)
    return lambda url, path: [*common, "-d", str(path.parent), "-o", path.name, url]


def _bits(*more: str) -> Callable[[str, Path], Sequence[str]]:
    return lambda url, path: ["download", url, str(path), "--retry-for", "0", "--json", *more]


BITS: Final = str(Path(sys.executable).with_name("bits-async"))
TOOLS: Final = (
    Tool("curl -C -", "curl", _curl()),
    Tool("curl -C - --parallel", "curl", _curl("--parallel")),
    Tool("curl -C - --retry 2", "curl", _curl("--retry", "2", "--retry-all-errors")),
    Tool("wget -c", "wget", lambda url, path: ["--no-config", "-q", "-c", "-t", "3", "--waitretry=0", "-T", "10", "-O", str(path), url]),
    Tool("wget2 -c", "wget2", _wget2("-c")),
    # with -c as well it asks for ever (1.99.1): once it has a part, for what lies behind the end of the file
    Tool("wget2 --chunk-size=5M", "wget2", _wget2("--chunk-size=5M", "--max-threads=4"), DIVIDED),
    Tool("aria2c -c", "aria2c", _aria2c()),
    Tool("aria2c -c -x4 -s4 -k1M", "aria2c", _aria2c("-x4", "-s4", "-k1M"), DIVIDED),
    Tool("bits-async download", BITS, _bits()),
    Tool("bits-async download --segments 4", BITS, _bits("--segments", "4"), DIVIDED),
)


async def version_of(tool: Tool) -> str:
    process = await asyncio.create_subprocess_exec(tool.program, "--version", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    words = output.decode(errors="replace").split()
    return next((word for word in words if word[0].isdigit()), "?")


async def one_run(tool: Tool, stage: Stage, path: Path, environment: dict[str, str]) -> bool:
    """Start the tool; it ends, or is killed where the schedule says. Whether it says that the file is there."""
    process = await asyncio.create_subprocess_exec(
        tool.program,
        *tool.command(stage.file_url, path),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    ending, killing = asyncio.ensure_future(process.wait()), asyncio.ensure_future(stage.killing.wait())
    await asyncio.wait({ending, killing}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    if not ending.done():
        await asyncio.sleep(DIGESTION)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL if stage.row.crash or not killing.done() else signal.SIGTERM)
        stage.killed()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ending), PATIENCE)
    if not ending.done():
        process.kill()
    killing.cancel()
    return await ending == 0


async def play(tool: Tool, schedule: Schedule) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="bits-integrity-") as directory:
        path = Path(directory) / "out" / "file"
        path.parent.mkdir()
        environment = {"PATH": os.environ["PATH"], "HOME": directory, "XDG_STATE_HOME": f"{directory}/state", "LC_ALL": "C"}
        async with Stage(schedule, tool.scale) as stage:
            for _ in range(schedule.runs):
                if await one_run(tool, stage, path, environment):
                    return stage.judge(path, claims_success=True)
    return Outcome.FAILED


async def compare(schedules: Sequence[Schedule], only: str | None = None) -> tuple[dict[str, Counter[Outcome]], list[str]]:
    """(what each tool made of them, how each is called with its version)"""
    turn = asyncio.Semaphore(os.cpu_count() or 1)
    counts: dict[str, Counter[Outcome]] = {}
    names = []
    for tool in [tool for tool in TOOLS if only in (None, tool.name)]:
        if shutil.which(tool.program) is None:
            print(f"{tool.name} is not installed", file=sys.stderr)
            continue

        async def one(schedule: Schedule, tool: Tool = tool) -> Outcome:
            async with turn:
                return await play(tool, schedule)

        outcomes = await asyncio.gather(*(one(each) for each in schedules))
        counts[tool.name] = Counter(outcomes)
        names.append(f"`{tool.name}` {await version_of(tool)}")
        print(f"{names[-1]}: " + ", ".join(f"{count} {outcome.value}" for outcome, count in counts[tool.name].items()), file=sys.stderr)
    return counts, names


def table(counts: dict[str, Counter[Outcome]], names: Sequence[str]) -> str:
    """In Markdown, the silently wrong ones last and in bold."""
    columns = [Outcome.RIGHT, Outcome.FAILED, Outcome.PAGE, Outcome.SHORT, Outcome.MISSING, Outcome.MIXED]
    heads = ["right", "says it failed", "a login page, exit 0", "cut short, exit 0", "no file, exit 0", "**mixed, exit 0**"]
    rows = [
        [name, *(str(count[each]) if each is not Outcome.MIXED else f"**{count[each]}**" for each in columns)]
        for name, count in zip(names, counts.values(), strict=True)
    ]
    lines = [["", *heads], ["---", *["--:"] * len(heads)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """What a reader wants to know of it."""
    found = describe(Path(tempfile.gettempdir()))
    return f"{found['processor']}, {found['cores']} cores, Linux {found['kernel']}, Python {found['python']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, help="only so many schedules")
    parser.add_argument("--only", choices=[tool.name for tool in TOOLS], help="only this tool")
    arguments = parser.parse_args()
    schedules = load()[: arguments.first]
    counts, names = asyncio.run(compare(schedules, arguments.only))
    print(f"\n{len(schedules)} schedules, {datetime.now(UTC):%d %B %Y}, {machine()}\n\n{table(counts, names)}")


if __name__ == "__main__":
    main()
