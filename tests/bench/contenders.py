"""Who takes part: each is a name and the command line that fetches what a `Task` asks for.

A contender measured from inside prints a line of JSON (`programs/inside.py`); of the others only the whole process is known.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.left_out import find_program

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Task:
    """What is to be fetched.

    Attributes:
        files: URLs and where they go.
        scratch: an empty directory for lists and journals.
        tools: where the compiled programs are.
        ca: whom to trust; None: plain HTTP.
        more: what a row tells its contenders besides.
        served: the names of the files where the server has them, to compare; none: nothing is fetched.
    """

    files: Sequence[tuple[str, Path]]
    scratch: Path
    tools: Path
    ca: Path | None = None
    more: dict[str, Any] = field(default_factory=dict)
    served: Sequence[str] = ()

    @property
    def url(self) -> str:
        return self.files[0][0]

    @property
    def path(self) -> Path:
        return self.files[0][1]

    def write(self, name: str, text: str) -> str:
        file = self.scratch / name
        file.write_text(text, encoding="utf-8")
        return str(file)


class Contender(Protocol):
    name: str

    @property
    def program(self) -> str | None:
        """What must be installed."""
        ...

    def command(self, task: Task) -> list[str]: ...


def missing(contender: Contender) -> bool:
    return contender.program is not None and find_program(contender.program) is None


# -- the limit


@dataclass(frozen=True)
class Limit:
    """A small C program: what this machine can do at all."""

    way: str = "splice"  # or read
    durable: bool = False
    program: str | None = None

    @property
    def name(self) -> str:
        return f"C, {self.way}" + (", durable" if self.durable else "")

    def command(self, task: Task) -> list[str]:
        _, _, address, target = task.url.split("/", 3)
        durable = ["durable"] if self.durable else []
        return [str(task.tools / "limit"), address.rpartition(":")[2], f"/{target}", str(task.path), self.way, *durable]


# -- programs


@dataclass(frozen=True)
class Curl:
    """curl; of many files `at_once` at a time; `durable`: what it wrote is synced."""

    at_once: int = 1
    durable: bool = False
    program: str | None = "curl"

    @property
    def name(self) -> str:
        return "curl" + (f" --parallel {self.at_once}" if self.at_once > 1 else "") + (" + sync" if self.durable else "")

    def command(self, task: Task) -> list[str]:
        pairs = "".join(f'url="{url}"\noutput="{path}"\n' for url, path in task.files)
        trust = ["--cacert", str(task.ca)] if task.ca else []
        parallel = ["--parallel", "--parallel-max", str(self.at_once)] if self.at_once > 1 else []
        command = ["curl", "-q", "-s", "-f", *trust, *parallel, "-K", task.write("curl", pairs)]
        return ["sh", "-c", '"$@" && sync "$0"', str(task.path), *command] if self.durable else command


@dataclass(frozen=True)
class Wget:
    name: str = "wget"
    program: str | None = "wget"

    def command(self, task: Task) -> list[str]:
        trust = [f"--ca-certificate={task.ca}"] if task.ca else []
        return ["wget", "--no-config", "-q", *trust, "-O", str(task.path), task.url]


@dataclass(frozen=True)
class Wget2:
    at_once: int = 1
    program: str | None = "wget2"

    @property
    def name(self) -> str:
        return "wget2" + (f", {self.at_once} threads" if self.at_once > 1 else "")

    def command(self, task: Task) -> list[str]:
        command = ["wget2", "--no-config", "-q", *([f"--ca-certificate={task.ca}"] if task.ca else [])]
        if len(task.files) == 1:
            return [*command, "-O", str(task.path), task.url]
        urls = task.write("wget2", "".join(f"{url}\n" for url, _ in task.files))
        return [*command, f"--max-threads={self.at_once}", "-P", str(task.path.parent), "-i", urls]


@dataclass(frozen=True)
class Aria2:
    """aria2c without preallocation, which on a file system in memory only costs."""

    connections: int = 1
    at_once: int = 1
    program: str | None = "aria2c"

    @property
    def name(self) -> str:
        return f"aria2c -j{self.at_once}" if self.at_once > 1 else f"aria2c -x{self.connections}"

    def command(self, task: Task) -> list[str]:
        pairs = "".join(f"{url}\n  dir={path.parent}\n  out={path.name}\n" for url, path in task.files)
        ways = [f"-j{self.at_once}", f"-x{self.connections}", f"-s{self.connections}", "--file-allocation=none"]
        trust = [f"--ca-certificate={task.ca}"] if task.ca else []
        return ["aria2c", "--no-conf", "-q", *ways, *trust, "-i", task.write("aria2", pairs)]


# -- Python


def _python(program: str, task: Task, **wish: Any) -> list[str]:
    files = [(url, str(path)) for url, path in task.files]
    order = {"files": files, "ca": str(task.ca) if task.ca else None, **task.more, **wish}
    return [sys.executable, str(PROGRAMS / program), task.write("order.json", json.dumps(order))]


@dataclass(frozen=True)
class Library:
    """A library, used in the ordinary way."""

    name: str
    client: str
    options: tuple[tuple[str, Any], ...]
    program: str | None = None

    def command(self, task: Task) -> list[str]:
        return _python("others.py", task, client=self.client, **dict(self.options))


@dataclass(frozen=True)
class Ours:
    """bits_async in a program whose manager is open. The journal is on the disk, where a user would have it."""

    work: str = "one_job"
    variant: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    program: str | None = None

    @property
    def name(self) -> str:
        return "bits_async" + (f", {self.variant}" if self.variant else "")

    def command(self, task: Task) -> list[str]:
        return _python("ours.py", task, **{"store": str(task.scratch / "queue.db"), "work": self.work} | dict(self.options))


@dataclass(frozen=True)
class OurCommand:
    """`bits-async download`, started for this one file."""

    name: str = "bits-async download"
    program: str | None = None

    def command(self, task: Task) -> list[str]:
        trust = ["--cacert", str(task.ca)] if task.ca else []
        command = [sys.executable, "-m", "bits_async", "download", task.url, str(task.path), *trust]
        return [*command, "--store", str(task.scratch / "queue.db")]


CURL = Curl()
OURS = Ours()
MIB = 1 << 20

NAIVE = Library("aiohttp + aiofiles, 1 MiB", "aiohttp", (("chunk", MIB),))
NAIVE_SMALL = Library("aiohttp + aiofiles, 64 KiB", "aiohttp", (("chunk", 64 << 10),))
NAIVE_16 = Library("aiohttp + aiofiles, 16 tasks", "aiohttp", (("chunk", MIB), ("at_once", 16)))
HTTPX = Library("httpx", "httpx", (("chunk", MIB),))
HTTPX_ASYNC = Library("httpx + aiofiles", "httpx_async", (("chunk", MIB),))
REQUESTS = Library("requests", "requests", (("chunk", MIB),))
PYPDL = Library("pypdl", "pypdl", (("segments", 1),))
PYPDL_4 = Library("pypdl, 4 segments", "pypdl", (("segments", 4),))
