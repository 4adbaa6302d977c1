"""What a download costs, counted rather than timed, so that the fast ways stay fast on any machine.

One process downloads a large file in each way and many small ones, and counts; another does the same under strace. The budgets stand a
little above what was counted when they were written. One that is exceeded asks a question: is what the change brings worth it? Then
the budget is raised in the same commit.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.left_out import find_program
from tests.peers import Authority
from tests.realms import Hit, Nginx

PROGRAM = Path(__file__).parent / "programs/counted.py"
MIB = 1 << 20
LARGE, SMALL = 32, 20  # MiB of a large file; files of 64 KiB
ROUNDS = 8  # of small files: a busy machine lets the loop go round once more, or a batch be full later; what they cost is the least
FILES = 2 + 3 + (1 + SMALL) * ROUNDS  # of one run
BASE = "a small file"
WAYS = {"spliced": ("pub", False), "tls": ("pub", True), "in batches": ("chunked", False)}

pytestmark = pytest.mark.realm  # nginx


@pytest.fixture(scope="module")
def served(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with Nginx(authority) as server:
        (server.root / "large").write_bytes(os.urandom(MIB) * LARGE)
        for number in range(SMALL):
            (server.root / f"small-{number}").write_bytes(os.urandom(MIB // 16))
        yield server


def order(served: Nginx, directory: Path, rounds: int = 1, **more: Any) -> list[str]:
    """The command line of one run."""
    (directory / "journal").mkdir(mode=0o700)
    phases = [["warm up", [(served.url("/pub/small-0", tls=tls), str(directory / f"first-{tls}")) for tls in (False, True)]]]
    for name, (way, tls) in WAYS.items():
        phases.append([name, [(served.url(f"/{way}/large", tls=tls), str(directory / name))]])
    for turn in map(str, range(rounds)):
        (directory / turn).mkdir()
        phases.append([BASE, [(served.url("/pub/small-0"), str(directory / turn / "base"))]])
        small = [(served.url(f"/pub/small-{number}"), str(directory / turn / f"small-{number}")) for number in range(SMALL)]
        phases.append(["small files", small])
    wish = {"store": str(directory / "journal/queue.db"), "ca": str(served.ca_file), "phases": phases, **more}
    (directory / "order.json").write_text(json.dumps(wish))
    return [sys.executable, str(PROGRAM), str(directory / "order.json")]


@pytest.fixture(scope="module")
def counted(served: Nginx, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, int]]:
    """What each phase cost; "connections": how many there were in all."""
    command = order(served, tmp_path_factory.mktemp("counted"), ROUNDS, trace=True)
    served.log.clear()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    phases: dict[str, dict[str, int]] = {}
    for line in map(json.loads, done.stdout.splitlines()):
        least = phases.setdefault(line.pop("phase"), line)
        least.update({name: min(count, least[name]) for name, count in line.items()})
    hits = served.hits(expect=FILES)
    return {**phases, "connections": {"plain": _ports(hits, served.port), "tls": _ports(hits, served.tls_port)}}


def _ports(hits: Sequence[Hit], server_port: int) -> int:
    return len({hit.client_port for hit in hits if hit.server_port == server_port})


@pytest.fixture(scope="module")
def calls(served: Nginx, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Counter[str]]:
    """The system calls of each phase, of all threads, by name."""
    directory = tmp_path_factory.mktemp("traced")
    trace = directory / "trace"
    command = [find_program("strace") or "strace", "-f", "-qq", "-o", str(trace), *order(served, directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    return phases_of(trace.read_text(errors="replace"))


def phases_of(trace: str) -> Mapping[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    here: Counter[str] = Counter()
    for line in trace.splitlines():
        if mark := re.search(r'access(?:at2?)?\(.*"/phase/([^"]*)"', line):
            here = found.setdefault(mark[1], Counter()) if mark[1] else Counter()
        elif call := re.match(r"\d+\s+(\w+)\(", line):
            here[call[1]] += 1
    return found


# -- what a job costs once, however large its file is


@pytest.mark.parametrize(("phase", "budget"), [(BASE, 5), ("spliced", 6), ("tls", 6)])
def test_a_job_of_one_file_is_journalled_only_when_something_must_not_be_lost(counted, phase, budget):
    """It is made, has a file, is resumed, done, and gone; of a large file also the version, and after each 32 MiB how far
    it is, but for the last ones."""
    assert counted[phase]["transactions"] <= budget


@pytest.mark.parametrize(("phase", "budget"), [("warm up", 12), (BASE, 13), ("spliced", 14)])
def test_a_job_of_one_file_asks_the_journal_and_the_threads_of_its_file_little(counted, phase, budget):
    """The journal, as a manager opened it, is not asked for what it has none of; nobody who starts or ends makes it look up the others."""
    assert counted[phase]["hops"] <= budget


# -- a large file: per MiB, what it costs more than the job around it, which is what a job of one small file costs


@pytest.mark.parametrize(("way", "budget"), [("spliced", 0.4), ("tls", 0.4), ("in batches", 1.5)])
def test_the_bytes_of_a_large_file_need_few_hops_between_threads(counted, way, budget):
    assert (counted[way]["hops"] - counted[BASE]["hops"]) / LARGE <= budget


@pytest.mark.parametrize(("way", "budget"), [("spliced", 3), ("tls", 3), ("in batches", 10)])
def test_the_event_loop_has_little_to_do_with_the_bytes_of_a_large_file(counted, way, budget):
    assert (counted[way]["iterations"] - counted[BASE]["iterations"]) / LARGE <= budget


@pytest.mark.parametrize("way", WAYS)
def test_a_large_file_is_journalled_seldom(counted, way):
    """Every 32 MiB or 5 seconds."""
    assert counted[way]["transactions"] - counted[BASE]["transactions"] <= 3


@pytest.mark.parametrize(("way", "budget"), [("spliced", 2.5), ("tls", 4), ("in batches", 5)])
def test_a_large_file_passes_through_little_memory_and_leaves_nothing_there(counted, way, budget):
    """MiB at once, of 32; and blocks that stay, per MiB."""
    assert counted[way]["python_peak"] / MIB <= budget
    assert counted[way]["blocks"] / LARGE <= 20


@pytest.mark.traced
@pytest.mark.parametrize(("way", "budget"), [("spliced", 20), ("tls", 40), ("in batches", 80)])
def test_the_bytes_of_a_large_file_need_few_system_calls(calls, way, budget):
    assert (calls[way].total() - calls[BASE].total()) / LARGE <= budget


@pytest.mark.traced
def test_the_bytes_of_a_plain_body_never_enter_this_program(calls):
    read = sum(calls["spliced"][name] - calls[BASE][name] for name in ("recvfrom", "read", "pwritev2", "pwrite64"))
    assert calls["spliced"]["splice"] >= 2 * LARGE
    assert read / LARGE <= 1


# -- small files: per file


def per_small_file(phase: Mapping[str, int], *names: str) -> float:
    return sum(phase[name] for name in names) / SMALL


def test_a_small_file_of_a_job_needs_few_transactions_hops_and_rounds_of_the_loop(counted):
    small = counted["small files"]
    assert per_small_file(small, "transactions") <= 0.45
    assert per_small_file(small, "hops") <= 0.8
    assert per_small_file(small, "iterations") <= 8


def test_another_small_file_sets_no_timer_and_needs_few_calls_in_the_thread_of_the_loop(counted):
    more = {name: (counted["small files"][name] - counted[BASE][name]) / (SMALL - 1) for name in ("timers", "calls")}
    assert more["timers"] <= 0.3
    assert more["calls"] <= 430


@pytest.mark.traced
def test_a_small_file_of_a_job_needs_few_system_calls_and_few_syncs(calls):
    small = calls["small files"]
    assert per_small_file(small, *small) <= 75
    assert per_small_file(small, "fsync", "fdatasync") <= 1.8


def test_all_files_of_one_identity_and_server_come_on_one_connection_and_with_one_handshake(counted):
    assert counted["connections"] == {"plain": 1, "tls": 1}
