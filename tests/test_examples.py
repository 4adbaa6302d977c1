"""The examples and the demo run as their readers would run them, and say what their documentation says."""

import base64
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bits_async import BitsManager
from tests.active_directory import ActiveDirectory
from tests.realms import Apache

EXAMPLES = Path(__file__).parent.parent / "examples"
DEADLINE = 150


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home of the test's own."""
    return os.environ | {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "PYTHONWARNINGS": "error"}


@pytest.fixture
def run(environment: dict[str, str]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def run(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(EXAMPLES / name), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False)

    return run


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def claims(shown: str) -> list[str]:
    """What the demo found, all of it true."""
    _, _, found = shown.partition("Who reached what\n")
    assert "  NO " not in found
    return re.findall(r"^  yes  (.*)$", found, re.MULTILINE)


@pytest.mark.privileged
def test_the_demo_as_root_has_a_local_user_and_a_network_identity(run: Run) -> None:
    done = run("demo.py")
    assert (done.returncode, done.stderr) == (0, "")
    proxy, origin, file, resumed, right = claims(done.stdout)
    assert r"DEMO\helper" in proxy
    assert r"DEMO\helper" in origin
    assert "nobody" in file
    assert "resumed" in resumed
    assert "SHA-256" in right


def test_the_demo_without_root_has_two_network_identities_and_says_so(run: Run) -> None:
    done = run("demo.py", "--network-identities")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Both identities are network identities, without root's privileges" in done.stdout
    proxy, origin, _, resumed, right = claims(done.stdout)
    assert r"DEMO\helper" in proxy
    assert r"DEMO\alice" in origin
    assert "resumed" in resumed
    assert "SHA-256" in right


def test_t14_the_demo_shows_no_password(run: Run) -> None:
    done = run("demo.py", "--network-identities")
    assert "password of" not in done.stdout + done.stderr


def test_one_call_fetches_the_file(run: Run) -> None:
    done = run("download.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "is whole: 8,388,608 bytes" in done.stdout


def test_one_call_that_fails_ends_with_the_errors_line(run: Run, tmp_path: Path) -> None:
    done = run("download.py", "http://127.0.0.1:9/file", str(tmp_path / "absent" / "file"), "--proxy", "http://me:secret@host")
    assert done.returncode == 1
    assert done.stderr.startswith("E_INVALIDARG")
    assert "secret" not in done.stderr


def test_the_servers_see_the_helper_and_the_file_is_the_owners(run: Run) -> None:
    done = run("two_identities.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"the proxy saw DEMO\helper" in done.stdout
    assert r"the origin saw DEMO\helper" in done.stdout
    assert f"belongs to uid {os.geteuid()}" in done.stdout


def test_an_application_can_be_tested_without_a_network(run: Run) -> None:
    done = run("test_your_app.py", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout


# -- the web application


class Service:
    """background_task.py, running."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        wish = re.search(r"curl -d '(.*)' URL", process.stdout.readline())
        address = re.search(r"listening on (\S+)", process.stdout.readline())
        assert wish is not None
        assert address is not None
        self.wish, self.address = json.loads(wish[1]), address[1]

    def post(self, **wish: str) -> tuple[int, Any]:
        return self._ask(urllib.request.Request(self.address, json.dumps(wish).encode(), method="POST"))

    def get(self, job_id: str) -> tuple[int, Any]:
        return self._ask(urllib.request.Request(f"{self.address}/{job_id}"))

    def _ask(self, request: urllib.request.Request) -> tuple[int, Any]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture
def service(environment: dict[str, str]) -> Iterator[Service]:
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "background_task.py")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Service(process)
    finally:
        process.terminate()  # so that it removes its directories
        process.communicate(timeout=DEADLINE)


def test_a_web_application_downloads_in_the_background_and_ends_cleanly(service: Service) -> None:
    status, answer = service.post(**service.wish)
    assert status == 202
    end = time.monotonic() + DEADLINE
    while (found := service.get(answer["id"]))[1]["state"] != "ACKNOWLEDGED":
        assert found[0] == 200
        assert found[1]["error"] is None
        assert time.monotonic() < end, found
        time.sleep(0.05)
    assert Path(found[1]["path"]).stat().st_size == 8 * 1024 * 1024
    service.process.send_signal(signal.SIGTERM)
    out, err = service.process.communicate(timeout=DEADLINE)
    assert (service.process.returncode, err) == (0, "")
    assert "stopped" in out


def test_a_web_application_stops_in_mid_transfer_too(service: Service) -> None:
    assert service.post(**service.wish)[0] == 202
    service.process.send_signal(signal.SIGTERM)
    _, err = service.process.communicate(timeout=DEADLINE)
    assert (service.process.returncode, err) == (0, "")


def test_a_web_application_refuses_what_its_callers_must_not_choose(service: Service) -> None:
    assert service.post(url="http://elsewhere.test/file", name="file")[0] == 400
    assert service.post(url=service.wish["url"], name="../file")[0] == 400
    assert service.post(url=service.wish["url"], name=".queue/queue.db.key")[0] == 400
    assert service.post(url=service.wish["url"])[0] == 400
    assert service.get("no-id")[0] == 404
    assert service.get("00000000-0000-0000-0000-000000000000")[0] == 404


def test_the_unit_runs_the_application_as_it_can_be_run_and_gives_it_time_to_stop(run: Run) -> None:
    unit = dict(re.findall(r"^(\w+)=(.+)$", (EXAMPLES / "background_task.service").read_text(), re.MULTILINE))
    _, program, *options = unit["ExecStart"].split()
    assert Path(program).name == "background_task.py"
    known = run("background_task.py", "--help").stdout
    assert [option for option in options if option.startswith("--") and option not in known] == []
    assert options[options.index("--directory") + 1] == f"/var/lib/{unit['StateDirectory']}"
    assert unit["StateDirectoryMode"] == "0700"
    grace = inspect.signature(BitsManager.aclose).parameters["grace"].default
    assert int(unit["TimeoutStopSec"]) > 2 * grace


# -- the service that acts for its callers


def negotiate(keytab: Path, user: str, service: str) -> str:
    import gssapi

    kind = gssapi.NameType.kerberos_principal
    store = {"client_keytab": str(keytab), "ccache": f"FILE:{keytab}.ccache"}
    client = gssapi.Credentials(name=gssapi.Name(user, kind), usage="initiate", store=store)
    context = gssapi.SecurityContext(name=gssapi.Name(service, kind), creds=client, usage="initiate")
    return "Negotiate " + base64.b64encode(context.step() or b"").decode()


@pytest.fixture
def on_behalf(environment: dict[str, str], active_directory: ActiveDirectory, directory_apache: Apache, tmp_path: Path) -> Iterator[int]:
    """The port of on_behalf.py, running as HTTP/front.bits.test."""
    keytab = active_directory.keytab("front", "HTTP/front.bits.test")
    arguments = [str(keytab), active_directory.principal("front"), directory_apache.url("/neg"), str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "on_behalf.py"), *arguments],
        env=environment | {"KRB5_CONFIG": os.environ["KRB5_CONFIG"], "KRB5RCACHENAME": "none:"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rpartition(" ")[2])
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)


@pytest.mark.realm
def test_a_service_behind_negotiate_fetches_as_its_caller_or_as_itself(
    on_behalf: int, active_directory: ActiveDirectory, directory_apache: Apache
) -> None:
    keytab = active_directory.keytab("alice")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for way, name in (("fetch", "alice"), ("own", "front")):
        login = negotiate(keytab, active_directory.principal("alice"), active_directory.principal("HTTP/front.bits.test"))
        request = urllib.request.Request(f"http://127.0.0.1:{on_behalf}/{way}/big", method="POST", headers={"Authorization": login})
        with opener.open(request, timeout=DEADLINE) as answer:
            told = json.load(answer)
            assert answer.headers["WWW-Authenticate"].startswith("Negotiate ")
        assert told["as"] == active_directory.principal(name)
        assert Path(told["path"]).read_bytes() == directory_apache.data
        assert directory_apache.hits(expect=1, user=active_directory.principal(name), status=200)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        opener.open(urllib.request.Request(f"http://127.0.0.1:{on_behalf}/fetch/big", method="POST"), timeout=DEADLINE).close()
