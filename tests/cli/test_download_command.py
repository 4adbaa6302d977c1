"""`bits-async download` as a process: what it leaves on the disk, on the terminal and in its exit code, also when it is killed."""

import asyncio
import hashlib
import logging
import os
import re
import signal
import ssl
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from bits_async import BitsError, InvalidArgument, LocalFileError, download
from bits_async.cli.download import Identity, Order, Stop, _OneLine, told
from bits_async.cli.progress import Reporter
from tests.cli.command import Command, held, part_of
from tests.doors import USERS
from tests.local_users import LocalUser
from tests.peers import Authority, Door, Fault, Hold, Origin, Proxy, answer, header_bomb, redirect

BODY = os.urandom(3 * 1024 * 1024)
SIGNED = "sig=top-secret-signature"
ALICE, PASSWORD = next(iter(USERS.items()))


# -- what it does


async def test_the_file_is_there_and_nothing_was_said(command: Command, origin: Origin, tmp_path: Path) -> None:
    done = await command("download", origin.serve("/file", BODY), "file")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / "file").read_bytes() == BODY
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "state"]
    assert not [each for each in (tmp_path / "state").rglob("*") if each.is_file()], "no journal is left of a finished download"


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_a_plain_download_loads_nothing_that_it_does_not_need(command: Command, authority: Authority, tls: bool) -> None:
    command.environment["PYTHONPROFILEIMPORTTIME"] = "1"  # tells of every module on standard error
    async with Origin(tls=authority.server if tls else None) as origin:
        done = await command("download", origin.serve("/file", BODY), "file", "--cacert", str(authority.ca_file))
    assert done.code == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.err.splitlines()}
    assert {"bits_async", "aiohttp", "aiosqlite"} <= loaded
    assert not loaded & {"spnego", "gssapi", "krb5", "cryptography", "rich", "keyring", "dbus_fast", "blake3"}


async def test_json_is_one_event_a_line_and_the_last_says_done(command: Command, origin: Origin, tmp_path: Path) -> None:
    done = await command("download", origin.serve("/file", BODY), "file", "--json")
    assert (done.code, done.err) == (0, "")
    assert {event["event"] for event in done.events[:-1]} == {"Progress"}
    assert done.events[-2]["state"] == "TRANSFERRED"
    assert (done.events[-2]["bytes_transferred"], done.events[-2]["bytes_total"]) == (len(BODY), len(BODY))
    assert (done.events[-1]["event"], done.events[-1]["path"]) == ("Done", str(tmp_path / "file"))


async def test_a_terminal_shows_a_bar(command: Command, origin: Origin, tmp_path: Path) -> None:
    theirs, ours = os.openpty()
    running = await command.start("download", origin.serve("/file", BODY), "file", stderr=ours)
    os.close(ours)
    done = await running.end()
    shown = os.read(theirs, 65536).decode()
    os.close(theirs)
    assert (done.code, done.out) == (0, "")
    assert "file" in shown
    assert "3.0/3.0 MiB" in shown


async def test_the_environments_proxy_is_used_unless_the_options_say_otherwise(command: Command, origin: Origin) -> None:
    url = origin.serve("/file", b"bytes")
    async with Proxy() as usual, Proxy() as other:
        command.environment["http_proxy"] = usual.url
        assert (await command("download", url, "file")).code == 0
        assert len(usual.passed) == 1
        assert (await command("download", url, "file", "--no-proxy")).code == 0
        assert (await command("download", url, "file", "--proxy", other.url)).code == 0
        assert (len(usual.passed), len(other.passed)) == (1, 1)


async def test_cacert_decides_whom_to_trust(command: Command, authority: Authority) -> None:
    async with Origin(tls=authority.server) as origin:
        url = origin.serve("/file", b"bytes")
        refused = await command("download", url, "file", "--retry-for", "0")
        assert refused.code == 1
        assert "certificate" in refused.complaint
        assert (await command("download", url, "file", "--cacert", authority.ca_file)).code == 0


@pytest.mark.parametrize("how", ["one file", "key in another file", "password in a file", "typed password"])
async def test_a_client_certificate_is_shown_to_the_server(command: Command, authority: Authority, tmp_path: Path, how: str) -> None:
    me, options = authority.issue_client(), ["--cert", "me"]
    if how == "one file":
        (tmp_path / "me").write_bytes(me.pem + me.key())
    elif how == "key in another file":
        (tmp_path / "me").write_bytes(me.pem)
        (tmp_path / "its.key").write_bytes(me.key())
        options += ["--key", "its.key"]
    else:
        (tmp_path / "me").write_bytes(me.pkcs12(b"opens it"))
        (tmp_path / "word").write_bytes(b"opens it\n")
        options += ["--cert-password-file", "word"] if how == "password in a file" else ["--ask-cert-password"]
    async with Origin(tls=authority.asking()) as origin:
        arguments = ("download", origin.serve("/file", b"bytes"), "file", "--cacert", authority.ca_file, "--retry-for", "0")
        if how == "one file":
            refused = await command(*arguments)
            assert refused.code == 1
        running = await command.start(*arguments, *options, stdin=asyncio.subprocess.PIPE, start_new_session=True)  # no terminal
        assert running.process.stdin is not None
        if how == "typed password":
            running.process.stdin.write(b"opens it\n")
        running.process.stdin.close()
        done = await running.end()
    assert done.code == 0, done.err
    assert (tmp_path / "file").read_bytes() == b"bytes"
    assert "opens it" not in done.out + done.err


async def test_a_digest_is_checked(command: Command, origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/file", BODY)
    wrong = await command("download", url, "file", "--sha256", "0" * 64)
    assert wrong.code == 1
    assert "BG_E_VALIDATION_FAILED" in wrong.complaint
    assert not (tmp_path / "file").exists()
    assert part_of(tmp_path / "file") is None
    assert (await command("download", url, "file", "--sha256", hashlib.sha256(BODY).hexdigest())).code == 0


async def test_a_large_file_comes_in_as_many_ranges_as_were_asked_for(command: Command, origin: Origin, tmp_path: Path) -> None:
    body = BODY * 4
    assert (await command("download", origin.serve("/file", body), "file", "--segments", "2")).code == 0
    assert (tmp_path / "file").read_bytes() == body
    assert len(origin.requests) == 3  # one that asks for the version, then both halves of the rest
    refused = await command("download", origin.url("/file"), "file", "--segments", "65")
    assert refused.code == 2
    assert "--segments" in refused.complaint


async def test_the_journal_is_kept_where_store_says(command: Command, origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir(mode=0o700)
    assert (await command("download", origin.serve("/file", BODY), "file", "--store", "journal/queue.db")).code == 0
    assert (tmp_path / "journal/queue.db").exists()
    assert not list((tmp_path / "state").rglob("*.db"))


# -- what it says when it fails


async def test_a_failure_is_one_line_that_says_what_whose_where_and_what_to_do(command: Command, origin: Origin) -> None:
    failed = await command("download", origin.url("/missing"), "file")
    assert (failed.code, failed.out) == (1, "")
    assert failed.complaint.startswith("bits-async: BG_E_HTTP_ERROR_404 (0x80190194, REMOTE_FILE)")
    for part in ("identity ", f"URL {origin.url('/missing')}", "check the URL"):
        assert part in failed.complaint


REFUSALS: dict[str, tuple[str, Fault]] = {
    "202": ("BG_E_HTTP_ERROR_202", answer(202)),
    "204": ("BG_E_INVALID_SERVER_RESPONSE", answer(204)),
    "304": ("BG_E_HTTP_ERROR_304", answer(304)),
    "a challenge": ("BG_E_HTTP_ERROR_401", answer(401, WWW_Authenticate='Basic realm="files"')),
    "a proxy's challenge": ("BG_E_HTTP_ERROR_407", answer(407, Proxy_Authenticate="Basic")),
    "403": ("BG_E_HTTP_ERROR_403", answer(403)),
    "410": ("BG_E_HTTP_ERROR_410", answer(410)),
    "416": ("BG_E_HTTP_ERROR_416", answer(416)),
    "429": ("BG_E_HTTP_ERROR_429", answer(429, Retry_After="7")),
    "500": ("BG_E_HTTP_ERROR_500", answer(500)),
    "503": ("BG_E_HTTP_ERROR_503", answer(503)),
    "compressed": ("BG_E_INVALID_SERVER_RESPONSE", Fault(headers=(("Content-Encoding", "gzip"),))),
    "without an end": ("BG_E_MISSING_FILE_SIZE", Fault(close_delimited=True)),
    "a part as the whole": ("BG_E_INVALID_SERVER_RESPONSE", Fault(headers=(("Content-Range", "bytes 5-10/20"),))),
    "a wrong digest": ("BG_E_VALIDATION_FAILED", Fault(headers=(("Repr-Digest", f"sha-256=:{'A' * 43}=:"),))),
    "a loop": ("ERROR_WINHTTP_REDIRECT_FAILED", redirect("/file")),
    "no web server": ("ERROR_WINHTTP_REDIRECT_FAILED", redirect("ftp://files/x")),
    "not HTTP": ("BG_E_INVALID_SERVER_RESPONSE", Fault(raw=b"SSH-2.0-OpenSSH\r\n\r\n")),
    "nothing": ("BG_E_CONNECTION_CLOSED", Fault(raw=b"")),
    "a large head": ("BG_E_TOO_LARGE", header_bomb(70_000)),
}


async def test_every_refusal_says_its_code_whose_it_is_of_what_and_what_whoever_ran_the_command_can_do(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    url = origin.serve("/file", BODY)
    for name, (code, fault) in REFUSALS.items():
        origin.always("/file", fault)
        with pytest.raises(BitsError) as caught:
            await download(url, tmp_path / "file", ssl=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), retry_for=0)
        line = told(caught.value)
        assert line.startswith(code), name
        for part in ("; identity ", f"; URL {url}", "; job "):
            assert part in line, name
        what_to_do = line.rpartition("; job ")[2].partition("; ")[2]
        assert what_to_do, name
        assert not re.search(r"resume|by itself|the job", what_to_do), name


async def test_a_file_that_keeps_changing_is_told_with_whose_it_is_of_what_and_what_to_do(command: Command, origin: Origin) -> None:
    versions = iter(range(9))

    def change() -> None:
        origin.serve("/file", BODY, etag=f'"other-{next(versions)}"')

    url = origin.serve("/file", BODY)
    origin.always("/file", Fault(cut_after=len(BODY) // 2, then=change))
    failed = await command("download", url, "file", "--retry-for", "0")
    assert failed.code == 1
    for part in (
        "BG_E_REMOTE_FILE_CHANGED",
        "changed 4 times",
        "identity ",
        f"URL {url}",
        "run the same command again when it has settled",
    ):
        assert part in failed.complaint


async def test_a_failure_is_the_last_json_line_too(command: Command, origin: Origin) -> None:
    failed = await command("download", origin.url("/missing"), "file", "--json")
    assert failed.code == 1
    assert "BG_E_HTTP_ERROR_404" in failed.complaint
    last = failed.events[-1]
    assert (last["event"], last["name"], last["context"]) == ("Failed", "BG_E_HTTP_ERROR_404", "REMOTE_FILE")
    assert (last["http_status"], last["url"], last["transient"]) == (404, origin.url("/missing"), False)


@pytest.mark.parametrize("dest", ["there", "absent/"])
async def test_a_directory_is_no_destination_and_no_name_is_guessed(dest: str, command: Command, origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    failed = await command("download", origin.serve("/file", BODY), dest)
    assert failed.code == 1
    assert "LOCAL_FILE" in failed.complaint
    assert "name a file, not a directory" in failed.complaint
    assert not [each for each in tmp_path.rglob("*") if each.is_file() and "state" not in each.parts]
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("dest", ["there/", "there/.", "there/..", ".", "..", "", "/"])
def test_what_can_only_be_a_directory_is_refused_without_looking(dest: str) -> None:
    order = Order(url="http://host.test/file", dest=dest, owner=Identity("--"), helper=Identity("--helper-"))
    with pytest.raises(LocalFileError):
        order.destination()


def test_standard_output_is_no_destination_and_no_file_of_that_name_is_made() -> None:
    order = Order(url="http://host.test/file", dest="-", owner=Identity("--"), helper=Identity("--helper-"))
    with pytest.raises(InvalidArgument, match="standard output"):
        order.destination()
    assert replace(order, dest="./-").destination() == Path("-").absolute()


async def test_a_missing_directory_is_named_with_the_identity(command: Command, origin: Origin, tmp_path: Path) -> None:
    failed = await command("download", origin.serve("/file", BODY), "absent/file")
    assert failed.code == 1
    assert "LOCAL_FILE" in failed.complaint
    assert f"file {tmp_path}/absent/file" in failed.complaint
    assert "identity " in failed.complaint


async def test_a_cacert_that_cannot_be_used_is_named(command: Command, origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "not.pem").write_text("no certificate")
    for name, code in (("missing.pem", 1), ("not.pem", 2)):
        failed = await command("download", origin.serve("/file", BODY), "file", "--cacert", name)
        assert failed.code == code
        assert name in failed.complaint
    assert not origin.passed


async def test_an_unknown_user_is_refused_before_anything_is_sent(command: Command, origin: Origin) -> None:
    failed = await command("download", origin.serve("/file", BODY), "file", "--user", "nobody-has-this-name")
    assert failed.code == 1
    assert "CO_E_FAILEDTOIMPERSONATE" in failed.complaint
    assert "nobody-has-this-name" in failed.complaint
    assert not origin.passed


async def test_a_second_transfer_to_the_same_file_is_refused(command: Command, origin: Origin, tmp_path: Path) -> None:
    hold = Hold(after=1024)
    url = origin.serve("/file", BODY)
    origin.fault("/file", Fault(hold=hold))
    first = await command.start("download", url, "file")
    await hold.reached.wait()
    second = await command("download", url, tmp_path / "file")
    assert second.code == 1
    assert "BG_E_DESTINATION_LOCKED" in second.complaint
    hold.release()
    assert (await first.end()).code == 0


async def test_retry_for_zero_makes_the_first_error_final(command: Command, origin: Origin) -> None:
    url = origin.serve("/file", BODY)
    origin.always("/file", Fault(status=503))
    failed = await command("download", url, "file", "--retry-for", "0")
    assert failed.code == 1
    assert "BG_E_HTTP_ERROR_503" in failed.complaint
    assert "run the same command again later" in failed.complaint


async def test_closed_standard_output_suspends_the_transfer(command: Command, origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/file", BODY)
    reading, writing = os.pipe()
    running = await command.start("download", url, "file", "--json", stdout=writing)
    os.close(writing)
    os.close(reading)
    failed = await running.end()
    assert failed.code == 1
    assert "standard output" in failed.complaint
    assert (await command("download", url, "file", "--json")).code == 0
    assert (tmp_path / "file").read_bytes() == BODY


# -- killed, stopped, and run again


def resumed_at(origin: Origin) -> int:
    """Where the last request began."""
    found = re.fullmatch(r"bytes=(\d+)-", origin.passed[-1].range or "")
    assert found is not None
    return int(found[1])


async def test_after_kill_9_it_goes_on_where_it_stopped(command: Command, origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/file", BODY)
    origin.fault("/file", Fault(hold=Hold(after=2 * 1024 * 1024)))
    running = await command.start("download", url, "file")
    part = await held(tmp_path / "file", 1024 * 1024)
    assert (await running.end(signal.SIGKILL)).code == -signal.SIGKILL
    written = part.stat().st_size
    again = await command("download", url, "file", "--json")
    assert (again.code, again.err) == (0, "")
    assert (tmp_path / "file").read_bytes() == BODY
    assert resumed_at(origin) == written
    assert len(origin.passed) == 2
    assert part_of(tmp_path / "file") is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
async def test_a_signal_suspends_durably_and_the_next_run_goes_on(
    number: signal.Signals, code: int, command: Command, origin: Origin, tmp_path: Path
) -> None:
    url = origin.serve("/file", BODY)
    origin.fault("/file", Fault(hold=Hold(after=2 * 1024 * 1024)))
    running = await command.start("download", url, "file", "--json")
    await held(tmp_path / "file", 1024 * 1024)
    stopped = await running.end(number)
    assert stopped.code == code
    assert stopped.complaint == f"bits-async: interrupted by {number.name}; run the same command again to continue"
    assert (stopped.events[-1]["event"], stopped.events[-1]["signal"]) == ("Interrupted", number.name)
    part = part_of(tmp_path / "file")
    assert part is not None
    written = part.stat().st_size
    assert (await command("download", url, "file")).code == 0
    assert (tmp_path / "file").read_bytes() == BODY
    assert resumed_at(origin) == written


async def test_ctrl_c_stops_it_in_every_phase(command: Command, tmp_path: Path) -> None:
    """Also where the server has not answered yet, or the transfer waits to try again."""
    async with Origin() as origin:
        url, hold = origin.serve("/file", BODY), Hold()
        origin.fault("/file", Fault(hold=hold))
        connecting = await command.start("download", url, "file")
        await hold.reached.wait()
        assert (await connecting.end(signal.SIGINT)).code == 130
        origin.fault("/file", Fault(status=503))
        waiting = await command.start("download", url, "file", "--json")
        assert waiting.process.stdout is not None
        while b"TRANSIENT_ERROR" not in await waiting.process.stdout.readline():
            pass
        assert (await waiting.end(signal.SIGINT)).code == 130
        assert (await command("download", url, "file")).code == 0
        assert (tmp_path / "file").read_bytes() == BODY


async def test_what_the_parent_told_it_to_ignore_does_not_stop_it(command: Command, origin: Origin, tmp_path: Path) -> None:
    """nohup, and a shell's background jobs."""
    url, hold = origin.serve("/file", BODY), Hold(after=1024)
    origin.fault("/file", Fault(hold=hold))
    program = f"""import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-m", "bits_async", "download", {url!r}, "file"])
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=tmp_path, env=command.environment)
    await hold.reached.wait()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    hold.release()
    assert await process.wait() == 0
    assert (tmp_path / "file").read_bytes() == BODY


async def test_a_second_ctrl_c_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    stop, task = Stop(), asyncio.create_task(asyncio.sleep(3600, Path()))
    stop._on_signal(signal.SIGTERM, task, Reporter())
    stop._on_signal(signal.SIGHUP, task, Reporter())
    assert (exits, task.cancelling()) == ([], 1)
    stop._on_signal(signal.SIGINT, task, Reporter())
    assert (exits, task.cancelling()) == ([130], 1)
    with pytest.raises(asyncio.CancelledError):
        await task


# -- secrets


async def test_t14_neither_queries_nor_a_peers_text_reach_the_terminal(command: Command, origin: Origin, tmp_path: Path) -> None:
    hostile = b"HTTP/1.1 403 \x1b[31mNo\x07 [bold red]entry[/bold red]\r\nContent-Length: 0\r\n\r\n"
    url = origin.serve("/file", BODY)
    runs = []
    for fault in (Fault(raw=hostile), redirect(f"/missing?{SIGNED}"), Fault(status=404), Fault(hold=Hold(after=1024))):
        origin.fault("/file", fault)
        running = await command.start("download", f"{url}?{SIGNED}", "file", "--json", "--retry-for", "0")
        if fault.hold is not None:
            await fault.hold.reached.wait()
            runs.append(await running.end(signal.SIGTERM))
        else:
            runs.append(await running.end())
    assert [run.code for run in runs] == [1, 1, 1, 143]
    assert "?…" in runs[2].complaint
    for run in runs:
        assert SIGNED not in run.out + run.err
        assert "\x1b" not in run.out + run.err
        assert "\x07" not in run.out + run.err


async def test_t14_a_password_in_an_argument_is_refused_and_not_repeated(command: Command, origin: Origin) -> None:
    url = origin.serve("/file", BODY).replace("://", "://me:pass-word@")
    for arguments in ([url, "file"], [origin.url("/file"), "file", "--proxy", "http://me:pass-word@proxy.test:3128"]):
        refused = await command("download", *arguments, "--json")
        assert refused.code == 2
        assert "E_INVALIDARG" in refused.complaint
        assert "pass-word" not in refused.out + refused.err
    assert not origin.passed


async def test_without_options_no_credentials_are_sent(command: Command) -> None:
    async with Origin(door=Door("NTLM", "Negotiate", "Basic")) as origin:
        failed = await command("download", origin.serve("/file", BODY), "file")
    assert failed.code == 1
    assert "GENERAL_TRANSPORT" in failed.complaint or "REMOTE_FILE" in failed.complaint
    assert not [seen for seen in origin.requests if seen.header("Authorization")]


PROXY_OPTIONS = ("--proxy-user", ALICE, "--proxy-password-file", "word")


@pytest.mark.parametrize("scheme", ["Digest", "NTLM", "Basic"])
async def test_a_proxy_is_shown_the_name_and_the_password_of_the_options(
    command: Command, origin: Origin, tmp_path: Path, scheme: str
) -> None:
    url, door = origin.serve("/file", b"bytes"), Door(scheme)
    (tmp_path / "word").write_text(f"{PASSWORD}\n")
    async with Proxy(door=door) as proxy:
        done = await command("download", url, "file", "--proxy", proxy.url, *PROXY_OPTIONS, "--retry-for", "0")
        if scheme == "Basic":  # everybody on the way could read it
            assert done.code == 1
            assert "permit BASIC over plain HTTP with --proxy-basic-over-http if it must be" in done.complaint
            assert not [seen for seen in proxy.requests if seen.header("Proxy-Authorization")]
            done = await command("download", url, "file", "--proxy", proxy.url, *PROXY_OPTIONS, "--proxy-basic-over-http")
        assert done.code == 0, done.err
    assert PASSWORD not in done.out + done.err
    assert not [seen for seen in origin.requests if seen.header("Authorization") or seen.header("Proxy-Authorization")]


async def test_a_proxys_password_can_be_typed(command: Command, origin: Origin) -> None:
    async with Proxy(door=Door("Digest")) as proxy:
        arguments = ("download", origin.serve("/file", b"bytes"), "file", "--proxy", proxy.url, "--proxy-user", ALICE)
        running = await command.start(*arguments, "--ask-proxy-password", stdin=asyncio.subprocess.PIPE, start_new_session=True)
        assert running.process.stdin is not None
        running.process.stdin.write(f"{PASSWORD}\n".encode())
        running.process.stdin.close()
        done = await running.end()
    assert done.code == 0, done.err


async def test_who_is_refused_by_a_proxy_hears_of_the_option_and_the_call_that_say_who_he_is(command: Command, origin: Origin) -> None:
    async with Proxy(door=Door("Digest")) as proxy:
        refused = await command("download", origin.serve("/file", b"bytes"), "file", "--proxy", proxy.url)
        assert "say who you are to the proxy with --proxy-user and --proxy-password-file" in refused.complaint
        with pytest.raises(BitsError) as caught:
            await download(origin.url("/file"), command.directory / "file", proxy=proxy.url, store=command.directory / "queue.db")
        assert "Job.set_credentials with AuthTarget.PROXY" in caught.value.advice


# -- other users of this machine


@pytest.mark.privileged
async def test_the_owner_writes_as_a_local_user(command: Command, origin: Origin, users: Mapping[str, LocalUser]) -> None:
    alice, bob = users["bitsalice"], users["bitsbob"]
    url = origin.serve("/file", BODY)
    assert (await command("download", url, alice.home / "file", "--user", alice.name)).code == 0
    assert alice.owns(alice.home / "file")
    failed = await command("download", url, bob.home / "file", "--user", alice.name)
    assert failed.code == 1
    for part in ("LOCAL_FILE", f"identity {alice.name}", str(bob.home / "file")):
        assert part in failed.complaint
    assert part_of(bob.home / "file") is None
    assert not (bob.home / "file").exists()


@pytest.mark.privileged
async def test_the_helper_writes_and_after_a_kill_the_same_command_goes_on(
    command: Command, origin: Origin, users: Mapping[str, LocalUser]
) -> None:
    helper = users["bitshelper"]
    url, destination = origin.serve("/file", BODY), helper.home / "file"
    origin.fault("/file", Fault(hold=Hold(after=2 * 1024 * 1024)))
    arguments = ("download", url, destination, "--helper-user", helper.name, "--helper-for", "local-file")
    running = await command.start(*arguments)
    part = await held(destination, 1024 * 1024)
    assert helper.owns(part)
    await running.end(signal.SIGKILL)
    written = part.stat().st_size
    assert (await command(*arguments)).code == 0
    assert helper.owns(destination)
    assert destination.read_bytes() == BODY
    assert resumed_at(origin) == written


def test_t14_a_warning_is_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("bits_async.test")
    log.addHandler(_OneLine(logging.WARNING))
    try:
        raise ValueError(SIGNED)
    except ValueError:
        log.error("an attempt ended\n\x1b[31m", exc_info=True)
    log.info("not worth a line")
    shown = capsys.readouterr().err
    assert shown.startswith("bits-async: an attempt ended")
    assert shown.count("\n") == 1
    assert SIGNED not in shown
    assert "\x1b" not in shown


# -- what the shell got wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ftp://host.test/file", "file"), "http"),
        (("http://me:pw@host.test/file", "file"), "user"),
        (("http://host.test/file", "file", "--sha256", "abc"), "sha256"),
        (("http://host.test/file", "file", "--cert", "me", "--ask-cert-password", "--store", "queue.db"), "--cert-password-file"),
        (("http://host.test/file", "file", "--proxy-user", "me"), "--proxy-password-file"),
        (("http://host.test/file", "file", "--proxy-password-file", "word"), "--proxy-user"),
        (("http://host.test/file", "file", "--proxy-user", "me", "--proxy-password-file", "/dev/null"), "no password"),
        (("http://host.test/file", "file", "--no-proxy", *PROXY_OPTIONS), "--no-proxy"),
    ],
)
async def test_a_value_that_cannot_be_meant_is_a_wrong_command_line(command: Command, arguments: tuple[str, ...], said: str) -> None:
    done = await command("download", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.complaint
    assert "pw@" not in done.complaint


async def test_a_home_that_cannot_be_written_is_told_with_what_to_do(command: Command, origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/file", BODY)
    (tmp_path / "no home").touch()
    command.environment |= {"HOME": str(tmp_path / "no home"), "XDG_STATE_HOME": str(tmp_path / "no home" / "state")}
    done = await command("download", url, "file")
    assert done.code == 1
    assert "set HOME or XDG_STATE_HOME to a directory where this user may write" in done.complaint
    done = await command("download", url, "file", "--store", tmp_path / "queue.db")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
async def test_a_closed_stream_keeps_no_file_from_being_downloaded(command: Command, origin: Origin, tmp_path: Path, closed: str) -> None:
    number = {"stdin": 0, "stdout": 1, "stderr": 2}[closed]
    arguments = ("download", origin.serve("/file", BODY), "file", *(["--json"] if closed == "stdout" else []))
    done = await command(*arguments, preexec_fn=lambda: os.close(number))
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / "file").read_bytes() == BODY


async def test_an_empty_store_is_refused_by_the_name_of_its_option(command: Command) -> None:
    done = await command("download", "http://127.0.0.1/file", "file", "--store", "")
    assert done.code == 2
    assert "--store takes the path of a file, not '.'" in done.err


async def test_a_password_that_cannot_be_asked_for_is_no_warning_of_python(command: Command, tmp_path: Path) -> None:
    arguments = ("download", "http://127.0.0.1/file", "file", "--proxy-user", "alice", "--ask-proxy-password")
    done = await command(*arguments, start_new_session=True)  # without a terminal, and nothing to read
    assert done.code == 2
    assert "no password was typed" in done.err
    assert "GetPassWarning" not in done.err


async def test_a_proxy_of_the_environment_that_cannot_be_meant_is_advised_on_by_its_name(command: Command, tmp_path: Path) -> None:
    command.environment |= {"http_proxy": "socks://proxy.example"}
    done = await command("download", "http://files.example/file", "file", "--retry-for", "0")
    assert done.code == 1
    assert "check --proxy, or http_proxy and https_proxy in the environment" in done.err
