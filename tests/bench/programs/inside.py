"""What the transfer alone costs, seen from inside the process that makes it: begun after everything is imported and open."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def order() -> dict[str, Any]:
    """What the benchmark asks of this program: the file that its only argument names."""
    found: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return found


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:"))) * 1024


class Inside:
    """Seconds of wall and of processor time (all threads) of the block, and bytes of memory after it; printed for the benchmark."""

    def __init__(self) -> None:
        self.more: dict[str, float] = {}  # what else was found

    def __enter__(self) -> "Inside":
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if kind is None:
            found = {"wall": wall, "cpu": cpu, "resident": _memory("VmRSS"), "peak": _memory("VmHWM"), **self.more}
            os.write(1, json.dumps(found).encode() + b"\n")
