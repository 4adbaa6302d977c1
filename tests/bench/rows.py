"""The rows of the benchmark: what is done, who does it, and what is to be reached.

A goal's figure is made of one round and its median is taken, so that what slows the machine for a minute slows both sides of a ratio.
Figures of ours are those from inside the process ("in-proc"): a service pays for the start of the interpreter once. Those of programs
are of the whole process, which is how they are used.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.contenders import (
    CURL,
    HTTPX,
    HTTPX_ASYNC,
    NAIVE,
    NAIVE_16,
    NAIVE_SMALL,
    OURS,
    PYPDL,
    PYPDL_4,
    REQUESTS,
    Aria2,
    Contender,
    Curl,
    Limit,
    OurCommand,
    Ours,
    Task,
    Wget,
    Wget2,
)
from tests.bench.machine import GIB, MIB, available_memory
from tests.bench.stage import Stage
from tests.left_out import missing_kerberos, missing_root, missing_servers


@dataclass(frozen=True)
class Sample:
    """One run of one contender: seconds, and bytes of memory; `inside`: the transfer alone, where the contender can tell."""

    wall: float
    cpu: float
    peak: int
    inside: Mapping[str, float] | None = None

    @property
    def own_wall(self) -> float:
        return self.inside["wall"] if self.inside else self.wall

    @property
    def own_cpu(self) -> float:
        return self.inside["cpu"] if self.inside else self.cpu


Round = Mapping[str, Sample]


@dataclass(frozen=True)
class Goal:
    """What is to be reached: at most `most`."""

    what: str
    most: float
    figure: Callable[[Round], float]
    unit: str = ""


def wall_ratio(ours: str, other: str) -> Callable[[Round], float]:
    return lambda found: found[ours].own_wall / found[other].own_wall


def cpu_ratio(ours: str, other: str) -> Callable[[Round], float]:
    return lambda found: found[ours].own_cpu / found[other].own_cpu


@dataclass(frozen=True)
class Row:
    """One kind of work. `full` is its whole amount of bytes (or files); a run has less of it where it `scales` and time is short.

    It is played in every round, or in `every` second, third ... one.
    """

    key: str
    title: str
    full: int
    contenders: tuple[Contender, ...]
    baseline: str
    goals: tuple[Goal, ...]
    scales: bool = True
    every: int = 1

    def missing(self) -> str | None:
        """Why this machine cannot play it."""
        return None

    def amount(self, part: float) -> int:
        return max(MIB, round(self.full * part / MIB) * MIB)

    def bytes_of(self, amount: int) -> int:
        return amount

    def task(self, stage: Stage, contender: Contender, amount: int) -> Task:
        raise NotImplementedError

    def environment(self, stage: Stage) -> Mapping[str, str]:
        return {}

    def said(self, amount: int) -> str:
        """How much a run had."""
        return f"{amount / GIB:g} GiB" if amount >= GIB else f"{amount // MIB} MiB"


@dataclass(frozen=True)
class OneFile(Row):
    """One large file from nginx."""

    tls: bool = False
    on_disk: bool = False

    def task(self, stage: Stage, contender: Contender, amount: int) -> Task:
        out = stage.out_on_disk if self.on_disk else stage.out_in_memory
        name = stage.big(amount)
        files = [(stage.url(name, tls=self.tls), out / "file")]
        return Task(files, stage.scratch, stage.tools, stage.ca_file if self.tls else None, served=[name])


@dataclass(frozen=True)
class SmallFiles(Row):
    """Many files of 64 KiB; `full` is their number."""

    on_disk: bool = False

    def amount(self, part: float) -> int:
        return max(50, round(self.full * part / 50) * 50)

    def bytes_of(self, amount: int) -> int:
        return amount * (64 << 10)

    def said(self, amount: int) -> str:
        return f"{amount} files"

    def task(self, stage: Stage, contender: Contender, amount: int) -> Task:
        out = stage.out_on_disk if self.on_disk else stage.out_in_memory
        names = stage.small(amount)
        files = [(stage.url(name), out / Path(name).name) for name in names]
        return Task(files, stage.scratch, stage.tools, served=names)


@dataclass(frozen=True)
class Memory(Row):
    """A small file and one that is a thousand times larger, of zeros: memory is what is looked at."""

    def amount(self, part: float) -> int:
        room = available_memory() // 2  # for the file, which lies in memory
        return max(size for size in (GIB, 2 * GIB, 4 * GIB, 10 * GIB) if size <= max(GIB, min(room, self.full * part)))

    def bytes_of(self, amount: int) -> int:
        return 0

    def task(self, stage: Stage, contender: Contender, amount: int) -> Task:
        size = amount if contender.name == LARGE.name else 10 * MIB
        name = stage.hole(size)
        return Task([(stage.url(name), stage.out_in_memory / "file")], stage.scratch, stage.tools, served=[name])


@dataclass(frozen=True)
class Queue(Row):
    """Opening a journal with many queued jobs, or with none."""

    def amount(self, part: float) -> int:
        return self.full

    def bytes_of(self, amount: int) -> int:
        return 0

    def said(self, amount: int) -> str:
        return f"{amount:,} jobs"

    def task(self, stage: Stage, contender: Contender, amount: int) -> Task:
        count = amount if contender.name == LONG.name else 0
        return Task([("", Path())], stage.scratch, stage.tools, more={"journal": str(stage.copy_journal(count))})


@dataclass(frozen=True)
class InLine(OneFile):
    """One large file as a background job, with many jobs in line behind it, or with none."""

    def task(self, stage: Stage, contender: Contender, amount: int) -> Task:
        journal = stage.copy_journal(100_000 if contender.name == CROWDED.name else 0)
        return replace(super().task(stage, contender, amount), more={"journal": str(journal)})


@dataclass(frozen=True)
class Limited(OneFile):
    """One large file at a limit of speed; `full` is what ten seconds bring."""

    def task(self, stage: Stage, contender: Contender, amount: int) -> Task:
        return replace(super().task(stage, contender, amount), more={"rate": self.full / LIMITED_SECONDS})


@dataclass(frozen=True)
class LoggedIn(Row):
    """One large file from Apache, anonymous and with Kerberos."""

    def missing(self) -> str | None:
        return missing_servers() or missing_kerberos()

    def environment(self, stage: Stage) -> Mapping[str, str]:
        return {"KRB5_CONFIG": str(stage.realm.krb5_conf)}

    def task(self, stage: Stage, contender: Contender, amount: int) -> Task:
        location = "neg" if contender.name == KERBEROS.name else "pub"
        name = stage.big(amount)
        url = stage.apache.url(f"/{location}/www/{name}")
        more = {"keytab": str(stage.keytab), "principal": stage.realm.principal("alice")}
        return Task([(url, stage.out_in_memory / "file")], stage.scratch, stage.tools, more=more, served=[name])


@dataclass(frozen=True)
class Identities(Row):
    """One large file, written by this process and by another user's threads."""

    def missing(self) -> str | None:
        return missing_root()

    def task(self, stage: Stage, contender: Contender, amount: int) -> Task:
        out = stage.out_in_memory
        if contender.name == ANOTHER.name:
            os.chown(out, stage.another_user.uid, stage.another_user.gid)
        name = stage.big(amount)
        more = {"user": stage.another_user.name}
        return Task([(stage.url(name), out / "file")], stage.scratch, stage.tools, more=more, served=[name])


# -- the table of goals (performance.md) -----------------------------------------------------------------------------------------

BITS, TO_CURL = OURS.name, CURL.name
SPLICE, SPLICE_DURABLE, CURL_SYNC, ARIA_16 = Limit(), Limit(durable=True), Curl(durable=True), Aria2(at_once=16)
LARGE, SMALL = replace(OURS, variant="large"), replace(OURS, variant="10 MiB")
AT_ONCE = Ours(variant="8 files at once", options=(("files_at_once", 8),))
LONG, EMPTY = Ours("open", "100,000 jobs"), Ours("open", "no jobs")
CROWDED, ALONE = Ours("in_line", "100,000 jobs behind it"), Ours("in_line", "no job behind it")
ANONYMOUS, KERBEROS = replace(OURS, variant="anonymous"), Ours("logged_in", "Kerberos")
SLOWED = Ours("limited", "limited")
LIMITED_SECONDS = 10
ONE, ANOTHER = replace(OURS, variant="one identity"), Ours("for_another", "two identities")


def _grown(found: Round) -> float:
    return (found[LARGE.name].peak - found[SMALL.name].peak) / MIB


def _off_the_limit(found: Round) -> float:
    inside = found[SLOWED.name].inside
    assert inside is not None
    return abs(inside["rate"] - 1) * 100


def _resident(found: Round) -> float:
    inside = found[LONG.name].inside
    assert inside is not None
    return inside["resident"] / MIB


# Everybody side by side, with less to do: the slow ones would take the time that the goals need.
PEERS: tuple[Row, ...] = (
    OneFile(
        "plain-peers",
        "a file of 64 MiB, plain HTTP, into memory",
        64 * MIB,
        (
            *(SPLICE, Limit("read"), CURL, OURS, OurCommand(), Wget2(), Wget(), Aria2(), REQUESTS, HTTPX, HTTPX_ASYNC),
            *(NAIVE, NAIVE_SMALL, PYPDL, PYPDL_4),
        ),
        TO_CURL,
        (),
        scales=False,
        every=2,
    ),
    OneFile(
        "tls-peers",
        "a file of 64 MiB, TLS, into memory",
        64 * MIB,
        (CURL, OURS, OurCommand(), Wget2(), Wget(), Aria2(), REQUESTS, HTTPX, NAIVE, NAIVE_SMALL),
        TO_CURL,
        (),
        scales=False,
        every=2,
        tls=True,
    ),
    SmallFiles(
        "small-peers",
        "200 files of 64 KiB, one job",
        200,
        (ARIA_16, OURS, AT_ONCE, Curl(), Curl(at_once=16), Wget2(at_once=16), NAIVE_16),
        ARIA_16.name,
        (),
        scales=False,
        every=2,
    ),
)

ROWS: tuple[Row, ...] = (
    OneFile(
        "plain",
        "one large file, plain HTTP, into memory",
        GIB,
        (SPLICE, CURL, OURS),
        TO_CURL,
        (
            Goal("wall, to curl", 0.75, wall_ratio(BITS, TO_CURL)),
            Goal("CPU, to curl", 0.75, cpu_ratio(BITS, TO_CURL)),
            Goal("wall, to the C splice program", 1.2, wall_ratio(BITS, SPLICE.name)),
            Goal("CPU, to the C splice program", 1.2, cpu_ratio(BITS, SPLICE.name)),
        ),
    ),
    OneFile(
        "disk",
        "one large file, plain HTTP, onto the disk, durable",
        GIB,
        (CURL_SYNC, OURS, SPLICE_DURABLE),
        CURL_SYNC.name,
        (Goal("wall, to curl + sync", 0.60, wall_ratio(BITS, CURL_SYNC.name)),),
        on_disk=True,
    ),
    OneFile(
        "tls",
        "one large file, TLS, into memory",
        GIB,
        (CURL, OURS),
        TO_CURL,
        (Goal("wall, to curl", 0.95, wall_ratio(BITS, TO_CURL)), Goal("CPU, to curl", 0.95, cpu_ratio(BITS, TO_CURL))),
        tls=True,
    ),
    SmallFiles(
        "small",
        "many files of 64 KiB, one job",
        2000,
        (ARIA_16, OURS, AT_ONCE),
        ARIA_16.name,
        (
            Goal("wall, to aria2c -j16, with the journal", 1.0, wall_ratio(BITS, ARIA_16.name)),
            Goal("the same, 8 files at once", 1.0, wall_ratio(AT_ONCE.name, ARIA_16.name)),
        ),
    ),
    SmallFiles(
        "jobs",
        "many files of 64 KiB, a job each",
        200,
        (ARIA_16, replace(OURS, work="many_jobs")),
        ARIA_16.name,
        (),
        every=2,
    ),
    Memory(
        "memory",
        "a very large file, and one of 10 MiB",
        10 * GIB,
        (LARGE, SMALL),
        SMALL.name,
        (Goal("peak of memory, more than of 10 MiB", 8, _grown, "MiB"),),
        every=3,
    ),
    Queue(
        "queue",
        "opening a journal of 100,000 queued jobs",
        100_000,
        (LONG, EMPTY),
        EMPTY.name,
        (
            Goal("seconds until it is open", 0.5, lambda found: found[LONG.name].own_wall, "s"),
            Goal("resident memory of the process", 60, _resident, "MiB"),
        ),
        scales=False,
    ),
    InLine(
        "line",
        "one large file as a background job, plain HTTP, into memory",
        GIB,
        (CROWDED, ALONE),
        ALONE.name,
        (Goal("wall with 100,000 jobs in line, to none", 1.02, wall_ratio(CROWDED.name, ALONE.name)),),
    ),
    *(
        Limited(
            f"limit-{megabytes}",
            f"one large file, limited to {megabytes} MB/s",
            megabytes * LIMITED_SECONDS * 1_000_000,
            (SLOWED,),
            SLOWED.name,
            (Goal("off the limit", 5, _off_the_limit, "%"),),
            scales=False,
            every=3,
        )
        for megabytes in (1, 100)
    ),
    LoggedIn(
        "kerberos",
        "one large file from Apache, with Kerberos",
        GIB,
        (ANONYMOUS, KERBEROS),
        ANONYMOUS.name,
        (Goal("wall, to anonymous", 1.02, wall_ratio(KERBEROS.name, ANONYMOUS.name)),),
    ),
    Identities(
        "identities",
        "one large file, the file another user's",
        GIB,
        (ONE, ANOTHER),
        ONE.name,
        (Goal("wall, to one identity", 1.01, wall_ratio(ANOTHER.name, ONE.name)),),
    ),
    *PEERS,
)


def sample_of(report: str, inside: dict[str, Any] | None) -> tuple[Sample, int]:
    """What `meter` wrote, and the exit status."""
    wall, user, system, peak, status = report.split()
    return Sample(float(wall), float(user) + float(system), int(peak) * 1024, inside), int(status)
