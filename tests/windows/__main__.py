"""Runs the tests on Windows: `python -m tests.windows [ARGUMENTS OF PYTEST]`, after `make install-test` (make test-windows).

The servers of the realm run on this machine, as in the other tests; pytest runs in the Windows CPython under Wine, which reaches them
on loopback. Wine's Kerberos is this machine's: its one ticket cache stands for the logon session's tickets, and is alice's. What the
tests need to know is in the file that BITS_STAGE names. The exit code is pytest's.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from tests.peers import Authority
from tests.realms import Apache, MitKdc, free_port, make_world_directory
from tests.windows.machine import NoWindows, Windows, windows
from tests.windows.suite import WHERE

ALICE = "alice"
DEADLINE = 900.0  # seconds for all of pytest; it takes two minutes on a machine that has nothing else to do


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
    temporary = directory / "tmp"
    temporary.mkdir()
    where = [] if any(not argument.startswith("-") for argument in arguments) else WHERE
    told = directory / "result.xml"
    options = ["-p", "no:cacheprovider", "--timeout=180", f"--basetemp={machine.path(temporary)}", f"--junitxml={machine.path(told)}"]
    code = machine.run(machine.python, "-m", "pytest", *options, *where, *arguments, deadline=DEADLINE, **environment)
    if not told.exists():  # Wine may end a program that broke with 0
        print("make test-windows: pytest did not come to its end", file=sys.stderr)
        return code or 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
