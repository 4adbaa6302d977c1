"""The machine a benchmark ran on, and who may use which processor: the servers the last one, the clients all others."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.left_out import find_program

MIB = 1 << 20
GIB = 1 << 30
PROGRAMS = ("curl", "wget", "wget2", "aria2c", "nginx", "apache2")
LIBRARIES = ("aiohttp", "aiofiles", "httpx", "requests", "pypdl", "uvloop")


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def clients_cores() -> str:
    """As `meter` wants them."""
    return ",".join(map(str, cores()[:-1] or cores()))


@contextmanager
def on_the_servers_core() -> Iterator[None]:
    """What is started here stays there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _field(path: str, name: str) -> str | None:
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def available_memory() -> int:
    return int((_field("/proc/meminfo", "MemAvailable") or "0 kB").split()[0]) * 1024


def file_system(path: Path) -> str:
    """Its type."""
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip().replace("ext2/ext3", "ext4")  # stat has one name for the three


def _program_version(name: str) -> str | None:
    program = find_program(name)
    if program is None:
        return None
    done = subprocess.run([program, "-v" if name in ("nginx", "apache2") else "--version"], capture_output=True, text=True, check=False)
    words = (word.rpartition("/")[2] for word in (done.stdout or done.stderr).partition("\n")[0].split())
    return next((word for word in words if word[:1].isdigit()), None)


def _library_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe(disk: Path) -> dict[str, Any]:
    """What a reader needs to judge the figures; neither the machine's name nor a path."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(cores()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB),
        "kernel": os.uname().release.partition("-")[0],
        "python": platform.python_version() + ("" if "--with-lto" in _build_options() else ", built without LTO"),
        "disk": file_system(disk),
        "load_at_start": round(os.getloadavg()[0], 1),
        "versions": {
            **{name: found for name in PROGRAMS if (found := _program_version(name))},
            **{name: found for name in LIBRARIES if (found := _library_version(name))},
        },
        "tls": sys.modules["ssl"].OPENSSL_VERSION if "ssl" in sys.modules else None,
    }


def _build_options() -> str:
    import sysconfig

    return str(sysconfig.get_config_var("CONFIG_ARGS") or "")
