"""Schedules: which versions a server has, how each of its answers goes wrong, and where the client is killed. As text, JSON.

    {"versions": [{"size": 10000, "etag": "strong", "dated": true}, ...],
     "answers": [{"version": 0, "fault": "honest", "cut": 500, "reset": false, "kill": null, "crash": false}, ...],
     "runs": 2}

The n-th answer of the server, whoever asks, is of the n-th row; those after the last row are honest, of that row's version. `cut`
and `kill` are parts of the body in thousandths: there the connection ends, or the client is killed. `runs` is how often the client
is started. One schedule means the same to every client: `make bench-integrity` plays those of `schedules.json` to curl, wget, wget2
and aria2c as well.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.peers import Fault, Version

FILE: Final = Path(__file__).with_name("schedules.json")
STAMP: Final = 1_700_000_000
PAGE: Final = b"<html><body>Please log in to this network.</body></html>"
ETAGS: Final = ("strong", "weak", "none")


@dataclass(frozen=True)
class Content:
    """One version of the remote file."""

    size: int
    etag: str = "strong"
    dated: bool = True


@dataclass(frozen=True)
class Row:
    """How one answer goes."""

    version: int = 0
    fault: str = "honest"
    cut: int | None = None
    reset: bool = False
    kill: int | None = None
    crash: bool = False  # killed as by `kill -9`; else asked to stop


@dataclass(frozen=True)
class Schedule:
    """The whole story."""

    versions: tuple[Content, ...]
    answers: tuple[Row, ...]
    runs: int = 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "Schedule":
        versions, answers = given["versions"], given["answers"]
        return cls(tuple(Content(**each) for each in versions), tuple(Row(**each) for each in answers), given["runs"])

    def row(self, number: int) -> Row:
        """Of the answer with this number."""
        return self.answers[number] if number < len(self.answers) else Row(self.answers[-1].version)

    def version(self, index: int, scale: int = 1, file: int = 0) -> Version:
        """Its bytes (the same at every call, others for each file) and its validators."""
        content = self.versions[index]
        etag = {"strong": f'"v{index}"', "weak": f'W/"v{index}"', "none": None}[content.etag]
        date = formatdate(STAMP + 60 * index, usegmt=True) if content.dated else None
        return Version(random.Random(1000 * content.size + index + 100 * file).randbytes(content.size * scale), etag, date)


# What a server, or something before it, does to one answer. `half` of the body is what several of them need.
FAULTS: Final[dict[str, Fault]] = {
    "honest": Fault(),
    "200 to a range": Fault(ignore_range=True),
    "If-Range ignored": Fault(ignore_if_range=True),
    "no validator": Fault(no_validator=True),
    "no validator, If-Range ignored": Fault(no_validator=True, ignore_if_range=True),
    "chunked": Fault(chunked=True),
    "ends with the connection": Fault(close_delimited=True),
    "range from elsewhere": Fault(shift=7, ignore_if_range=True),
    "range from elsewhere, unsaid": Fault(shift=7, ignore_if_range=True, content_range=""),
    "wrong Content-Range": Fault(content_range="bytes 0-9/10", ignore_if_range=True),
    "no Content-Range": Fault(content_range="", ignore_if_range=True),
    "announced too long": Fault(length_off=100),
    "encoded": Fault(headers=(("Content-Encoding", "gzip"),)),
    "multipart": Fault(headers=(("Content-Type", "multipart/byteranges; boundary=x"),)),
    "500": Fault(status=500, body=b"oh"),
    "503": Fault(status=503, body=b"busy"),
    "404": Fault(status=404, body=b"no such file"),
    "403": Fault(status=403, body=b"this link has expired"),
    "416": Fault(status=416),
    "412": Fault(status=412),
    "redirect": Fault(status=302, headers=(("Location", "/file?moved"),)),
    "login page": Fault(status=200, body=PAGE, headers=(("Content-Type", "text/html"),)),
    "nothing": Fault(raw=b""),
    "half a head": Fault(raw=b"HTTP/1.1 200 OK\r\nContent-Le"),
}

_parts = st.integers(0, 1000)
_rows = st.builds(
    Row,
    version=st.integers(0, 2),
    fault=st.sampled_from(["honest", *FAULTS]),
    cut=st.none() | _parts,
    reset=st.booleans(),
    kill=st.none() | _parts,
    crash=st.booleans(),
)


def _in_order(versions: Sequence[Content], answers: Sequence[Row], runs: int) -> Schedule:
    """A server does not go back to a version it had before."""
    newest, rows = 0, []
    for row in answers:
        newest = max(newest, min(row.version, len(versions) - 1))
        rows.append(Row(**{**asdict(row), "version": newest}))
    return Schedule(tuple(versions), tuple(rows), runs)


_contents = st.builds(Content, st.integers(0, 12_000) | st.just(10_000), st.sampled_from(ETAGS), st.booleans())
_anything = st.builds(
    _in_order,
    st.lists(_contents, min_size=1, max_size=3),
    st.lists(_rows, min_size=1, max_size=5),
    st.integers(1, 4),
)


def _interrupted(first: Row, content: Content, later: Sequence[Content], answers: Sequence[Row], runs: int) -> Schedule:
    return _in_order([content, *later], [first, *(Row(**{**asdict(row), "version": row.version + 1}) for row in answers)], runs)


# The head of one version has arrived when the next one comes: what all of this is about.
_changes = st.builds(
    _interrupted,
    st.builds(Row, cut=st.integers(100, 900)) | st.builds(Row, kill=st.integers(100, 900), crash=st.booleans()),
    st.just(Content(10_000)) | _contents,
    st.lists(st.just(Content(10_000)) | _contents, min_size=1, max_size=2),
    st.lists(_rows, min_size=1, max_size=4),
    st.integers(2, 4),
)
schedules: Final = _changes | _anything

# Nothing goes wrong but that versions of one size follow each other, between the ranges of a file or the files of a job.
_quiet_rows = st.builds(
    Row,
    st.integers(0, 2),
    st.sampled_from(["honest", "honest", "honest", "If-Range ignored", "200 to a range", "no validator, If-Range ignored"]),
    st.none() | st.none() | _parts,
)
_same_sizes = st.builds(Content, st.just(10_000), st.sampled_from(ETAGS), st.just(True))
quiet: Final = st.builds(
    _in_order, st.lists(_same_sizes, min_size=2, max_size=3), st.lists(_quiet_rows, min_size=3, max_size=8), st.integers(1, 3)
)

CHANGED: Final = (Content(10_000), Content(10_000))
DATED: Final = (Content(10_000, "none"), Content(10_000, "none"))
UNPINNED: Final = (Content(10_000, "none", False), Content(10_000, "none", False))
NAMED: Final = tuple(  # the cases that people meet, each with a cut or a kill half way, and the new version afterwards
    Schedule(versions, (Row(0, cut=500, kill=kill, crash=True), Row(1, fault)), runs=2)
    for versions in (CHANGED, DATED, UNPINNED, (Content(10_000), Content(15_000)), (Content(10_000), Content(4_000)))
    for kill in (None, 450)
    for fault in ("honest", "200 to a range", "If-Range ignored", "no validator, If-Range ignored")
)


def load() -> list[Schedule]:
    """The file's."""
    return [Schedule.from_json(each) for each in json.loads(FILE.read_text())]


def draw(count: int) -> list[Schedule]:
    """As many schedules as are asked for, the same at every call of one version of hypothesis."""
    found: list[Schedule] = []

    @seed(2026)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
        derandomize=False,
    )
    @given(schedules)
    def take(schedule: Schedule) -> None:
        found.append(schedule)

    take()
    return found[:count]


if __name__ == "__main__":  # writes the file anew
    lines = ",\n".join(json.dumps(each.to_json()) for each in (*NAMED, *draw(160)))
    FILE.write_text(f"[\n{lines}\n]\n")
