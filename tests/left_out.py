"""Which tests cannot run on this machine, why, and the command that would change that.

Tests say what they need by a marker, `posix`, `privileged`, `realm` or `traced`. A test whose needs are not met is deselected and
listed at the end of the run: never skipped in silence. With CI=true any skip is a failure, and so is anything left out, but on Windows:
there it is what the runs elsewhere are for.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ELOGIND = HERE.parent / ".make" / "elogind"  # where `make test` unpacks it
OUTPUT = "left_out"  # what a process of pytest-xdist tells the one that reports
SBIN = ("/usr/sbin", "/sbin")  # where Debian keeps servers; not on every user's PATH


def find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(SBIN))


def packages() -> list[str]:
    """The Debian packages that the tests need."""
    lines = (HERE / "packages.txt").read_text(encoding="utf-8").splitlines()
    return [name for line in lines if (name := line.partition("#")[0].strip())]


def missing_posix() -> str | None:
    return "this is Windows" if sys.platform == "win32" else None


def missing_root() -> str | None:
    """Local users are made, and threads become them."""
    if sys.platform != "linux":
        return f"identities per thread exist on Linux only, and this is {sys.platform}"
    if os.geteuid() != 0:
        return f"this is user {os.geteuid()}, not root"
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    effective = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    absent = [name for bit, name in ((6, "CAP_SETGID"), (7, "CAP_SETUID")) if not effective >> bit & 1]
    return f"root lacks {' and '.join(absent)} here" if absent else None


def missing_servers() -> str | None:
    programs = ("krb5kdc", "kdb5_util", "kadmin.local", "apache2", "htpasswd", "nginx", "squid", "samba", "samba-tool", "faketime")
    absent = [name for name in programs if not find_program(name)]
    files = ("/usr/lib/apache2/modules/mod_auth_gssapi.so", "/usr/lib/squid/negotiate_kerberos_auth", "/usr/share/samba/setup/ad-schema")
    absent += [Path(name).name for name in files if not Path(name).exists()]
    if not any(Path("/usr/lib").glob("*/gssntlmssp/gssntlmssp.so")):
        absent.append("gssntlmssp.so")
    return f"not installed: {', '.join(absent)}" if absent else None


def missing_kerberos() -> str | None:
    absent = [name for name in ("gssapi", "krb5") if importlib.util.find_spec(name) is None]
    return f"Python packages not installed: {', '.join(absent)} (they are built with krb5-config of libkrb5-dev)" if absent else None


def missing_strace() -> str | None:
    program = find_program("strace")
    if program is None:
        return "not installed: strace"
    done = subprocess.run([program, "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return f"strace may not trace here: {done.stderr.strip()}" if done.returncode else None


def find_elogind() -> tuple[Path, Path] | None:
    """Its program, and the directory of its library; None: it was not unpacked."""
    places = (ELOGIND / "lib/elogind/elogind", ELOGIND / "usr/libexec/elogind")  # Debian 12, Debian 13
    program = next((place for place in places if place.exists()), None)
    library = next(ELOGIND.glob("**/libelogind-shared-*.so"), None)
    return None if program is None or library is None else (program, library.parent)


def missing_logind() -> str | None:
    """A mount namespace, a bus, and elogind, which cannot be installed beside systemd's libraries and is unpacked."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return "this is not root"
    absent = [name for name in ("dbus-daemon", "dbus-send", "unshare") if not find_program(name)]
    absent += [] if find_elogind() else ["elogind, unpacked"]
    absent += [] if importlib.util.find_spec("dbus_fast") else ["the extra 'sessions'"]
    return f"not there: {', '.join(absent)}" if absent else None


@dataclass
class Piece:
    """Something a machine has or lacks."""

    what: str
    marker: str
    missing: Callable[[], str | None]
    command: str
    left_out: set[str] = field(default_factory=set)  # ids of the tests


def _install() -> str:
    return f"sudo apt-get install --no-install-recommends {' '.join(packages())}"


PIECES = (
    Piece("POSIX", "posix", missing_posix, "make test, on Linux"),
    Piece("root", "privileged", missing_root, "sudo make test"),
    Piece("a logind of their own", "logind", missing_logind, "sudo make test"),
    Piece("the servers of a Kerberos realm", "realm", missing_servers, _install()),
    Piece("strace", "traced", missing_strace, _install()),
    Piece("the extra 'kerberos'", "realm", missing_kerberos, f"{_install()} && make test"),
)


class LeftOut:
    """The pytest plugin: deselects, reports, and fails the run under CI=true.

    When the tests are spread over processes (pytest-xdist), each of them deselects, and the one that reports has no tests of its own.
    """

    def __init__(self) -> None:
        self.ci = os.environ.get("CI", "").lower() in ("1", "true", "yes")
        self.skips: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for piece in PIECES:
            wanting = [item for item in items if item.get_closest_marker(piece.marker)]
            if wanting and piece.missing():
                piece.left_out.update(item.nodeid for item in wanting)
        gone = set().union(*(piece.left_out for piece in PIECES))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in gone])
        items[:] = [item for item in items if item.nodeid not in gone]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skips.append(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        for marker, what, tests in getattr(node, "workeroutput", {}).get(OUTPUT, ()):
            next(piece for piece in PIECES if (piece.marker, piece.what) == (marker, what)).left_out.update(tests)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[OUTPUT] = [(piece.marker, piece.what, sorted(piece.left_out)) for piece in PIECES]
            return
        left_out = sys.platform != "win32" and any(piece.left_out for piece in PIECES)
        if self.ci and (self.skips or left_out) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines = [*_sentences(PIECES), *(f"{test} skipped itself" for test in self.skips if self.ci)]
        if lines:
            terminalreporter.section("LEFT OUT" + (", a failure with CI=true" if self.ci and sys.platform != "win32" else ""))
            for line in lines:
                terminalreporter.line(line)


def _sentences(pieces: Iterable[Piece]) -> list[str]:
    told = "{count} tests need {what}; {why}.\n    {command}"
    return [
        told.format(count=len(piece.left_out), what=piece.what, why=piece.missing(), command=piece.command)
        for piece in pieces
        if piece.left_out
    ]
