"""Runs the tests on Windows: `python -m tests.windows [ARGUMENTS OF PYTEST]`, after `make install-test` (make test-windows).

The servers of the realm run on this machine, as in the other tests; pytest runs in the Windows CPython under Wine, which reaches them
on loopback. Wine's Kerberos is this machine's: its one ticket cache stands for the logon session's tickets, and is alice's. What the
tests need to know is in the file that BITS_STAGE names. A test that
stands still does not hold up the others: `rounds` says what becomes of it. The exit code is pytest's.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.peers import Authority
from tests.realms import Apache, MitKdc, free_port, make_world_directory
from tests.windows.machine import NoWindows, Windows, windows
from tests.windows.rounds import LIMIT, Ended, run
from tests.windows.suite import WHERE

ALICE = "alice"


def main(arguments: list[str]) -> int:
    try:
        machine = windows()
        try:
            return _on_the_stage(machine, arguments)
        finally:
            machine.shut_down()
    except NoWindows as why:
        print(f"make test-windows: {why}", file=sys.stderr)
        return 1


def _on_the_stage(machine: Windows, arguments: list[str]) -> int:
    directory = make_world_directory("windows")
    try:
        with MitKdc(free_port()) as kdc:
            # In the middle: MitKdc.ccache() is GSSAPI in this process.
            os.environ["KRB5_CONFIG"] = str(kdc.krb5_conf)
            with Apache(kdc, Authority(directory), size=2 * 1024 * 1024) as apache:
                stage = _write_stage(machine, directory, kdc, apache)
                tickets = {"KRB5_CONFIG": str(kdc.krb5_conf), "KRB5CCNAME": kdc.ccache(ALICE, directory=directory)}
                return _pytest(machine, arguments, directory, BITS_STAGE=machine.path(stage), **tickets)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_stage(machine: Windows, directory: Path, kdc: MitKdc, apache: Apache) -> Path:
    stage = directory / "stage.json"
    stage.write_text(
        json.dumps(
            {
                "url": apache.url(""),
                "tls_url": apache.url("", tls=True),
                "ca_file": machine.path(apache.ca_file),
                "log": machine.path(apache.log.path),
                "sha256": apache.sha256,
                "principal": kdc.principal(ALICE),
                "password": kdc.password(ALICE),
                "others": {"bob": kdc.password("bob")},
            }
        ),
        encoding="utf-8",
    )
    return stage


def _pytest(machine: Windows, arguments: list[str], directory: Path, **environment: str) -> int:
    where = [] if any(not argument.startswith("-") for argument in arguments) else WHERE

    def process(diary: Path, leave_out: Path, is_lost: Callable[[], bool]) -> Ended:
        temporary = directory / f"tmp-{diary.name}"
        temporary.mkdir()
        # `witness` limits the tests' time: pytest-timeout would end the process, and what it knew would be lost.
        options = [
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.windows.witness",
            "-p",
            "tests.windows.wake_ups",
            "--timeout=0",
            f"--basetemp={machine.path(temporary)}",
        ]
        told = {"BITS_DIARY": machine.path(diary), "BITS_LEAVE_OUT": machine.path(leave_out), "BITS_LIMIT": str(LIMIT)}
        command = (machine.python, "-m", "pytest", *options, *where, *arguments)
        return machine.run(*command, is_lost=is_lost, **environment, **told)

    return run(process, directory, say=_say)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
