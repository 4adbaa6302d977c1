"""In CI: the few tests that failed run again alone, and fail the run unless each passes every time.

7,000 tests share a machine with whatever else it does. One that fails there and passes five times in a row in processes of its own is
a fault to mend, of the test or of the product, and is said so with the failure it had; it does not condemn a change that has nothing
to do with it. CPython does the same (`python -m test --rerun`). Without CI=true nothing is run again: who is at the machine wants to know.

Not forgiven: more than `MOST` failures, a process that went away, what cannot be collected, what was left out.
"""

import os
import subprocess
import sys
from typing import Final

import pytest

MOST: Final = 2
TIMES: Final = 5


class Again:
    """The pytest plugin. `-p no:again` is how its own runs do without it."""

    def __init__(self) -> None:
        self.ci = os.environ.get("CI", "").lower() in ("1", "true", "yes")
        self.failed: dict[str, str] = {}
        self.condemned = False
        self.forgiven = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.condemned |= report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext
            self.condemned |= report.when not in ("setup", "call", "teardown")  # pytest-xdist says so of a process that went away

    @pytest.hookimpl(tryfirst=True)  # what was left out is looked at afterwards
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.ci or hasattr(session.config, "workeroutput") or session.exitstatus != pytest.ExitCode.TESTS_FAILED:
            return
        if self.condemned or not 1 <= len(self.failed) <= MOST:
            return
        self.forgiven = all(_passes(test, session.config) for test in self.failed for _ in range(TIMES))
        if self.forgiven:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.forgiven:
            terminalreporter.section(f"FAILED, THEN PASSED {TIMES} TIMES ALONE: TO BE MENDED", sep="!")
            for test in self.failed:
                terminalreporter.line(test)


def _passes(test: str, config: pytest.Config) -> bool:
    print(f"\nfailed, and runs again alone: {test}", flush=True)
    without = [argument for name in ("again", "xdist", "cacheprovider") for argument in ("-p", f"no:{name}")]
    windows = ["-p", "tests.windows.wake_ups"] if sys.platform == "win32" else []
    command = [sys.executable, "-m", "pytest", *without, *windows, "--tb=long", "-v", test]
    return subprocess.run(command, cwd=config.rootpath, check=False).returncode == 0
