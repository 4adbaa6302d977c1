"""Issue of trust: whatever secret a transfer used, nobody who reads its journal, logs, events or errors finds it (T14)."""

import asyncio
import base64
import gc
import json
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bits_async as bits
from bits_async import AuthCredentials, AuthScheme, AuthTarget
from bits_async.testing import FakeNetwork
from tests.peers import USERS, Door, Fault, Misbehaviour, Origin, Proxy, answer, redirect
from tests.rules import NTLM_OVER_HTTP

ALICE, HELPER = r"LAB\alice", r"LAB\helper"
QUERY = "signature=c0ffee-is-not-for-you"
BODY = bytes(range(256)) * 4096


class Everything(logging.Handler):
    """Every record at DEBUG, formatted and raw."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record) + repr(record.__dict__))


@pytest.fixture
def logs() -> Iterator[Everything]:
    handler, root = Everything(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


def everything_about(error: BaseException) -> list[str]:
    """What a debugger, a crash reporter or a careless `print` would show of an exception and all it drags along."""
    found, seen, todo = [], set(), [error]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        found += [repr(each), str(each), *map(repr, each.args), repr(getattr(each, "__dict__", {})), *getattr(each, "__notes__", [])]
        found += traceback.format_exception(each)
        for value in vars(each).values():
            found.append(repr(value))
        todo += [e for e in (each.__cause__, each.__context__) if e is not None]
        if isinstance(each, bits.BitsError):
            found.append(json.dumps({name: str(value) for name, value in each.fields().items()}))
    return found


def assert_absent(secrets: list[str], texts: list[str]) -> None:
    for secret in secrets:
        for text in texts:
            assert secret not in text, f"{secret[:6]}… in {text[:300]}"


def answers_sent(*peers: Origin | Proxy) -> list[str]:
    """The values of the Authorization headers that really went over the wire, without the scheme's name."""
    values = [seen.header(name) for peer in peers for seen in peer.requests for name in ("Authorization", "Proxy-Authorization")]
    return sorted({value.split(" ", 1)[1] for value in values if value})


async def attempt(manager: bits.BitsManager, url: str, path: Path, texts: list[str], **options: Any) -> None:
    stream = manager.events()
    try:
        await manager.download(url, path, retry_for=0, progress=lambda p: texts.append(repr(p) + json.dumps(p.as_dict())), **options)
    except bits.BitsError as error:
        texts += everything_about(error)
    await stream.aclose()


SCHEMES = {
    "ntlm": (AuthScheme.NTLM, Door("NTLM"), False),
    "negotiate": (AuthScheme.NEGOTIATE, Door("Negotiate"), False),
    "digest": (AuthScheme.DIGEST, Door("Digest"), False),
    "basic": (AuthScheme.BASIC, Door("Basic"), True),
    "wrong final token": (AuthScheme.DIGEST, Door("Digest", misbehave=Misbehaviour(wrong_final=True)), False),
    "endless": (AuthScheme.NTLM, Door("NTLM", misbehave=Misbehaviour(endless=True)), False),
}
FAULTS = {
    "whole": None,
    "404": answer(404, b"no"),
    "cut": Fault(cut_after=10_000, reset=True),
    "garbage": Fault(raw=b"\x00garbage\r\n\r\n"),
    "bad redirect": redirect("ftp://elsewhere/?" + QUERY),
    "broken length": Fault(headers=(("Content-Length", "1"), ("Transfer-Encoding", "chunked"))),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_t14_no_secret_is_in_logs_events_errors_or_tracebacks(scheme, fault, authority, tmp_path, logs):
    kind, door, tls = SCHEMES[scheme]
    texts: list[str] = []
    async with Origin(door=door, tls=authority.server if tls else None) as origin:
        url = origin.serve("/f", BODY) + "?" + QUERY
        if fault == "cut":
            origin.fault("/f", FAULTS[fault])
        elif fault != "whole":
            origin.always("/f", FAULTS[fault])
        async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "q.db", ssl=authority.client()) as manager:
            for password in (USERS[ALICE], "Wrong-password-of-alice"):
                given = [AuthCredentials(AuthTarget.SERVER, kind, ALICE, password)]
                texts.append(repr(given))
                await attempt(manager, url, tmp_path / f"out-{password[:3]}", texts, credentials=given, proxy=bits.ProxySettings.no_proxy())
        sent = answers_sent(origin)
    assert sent
    basic = base64.b64encode(f"{ALICE}:{USERS[ALICE]}".encode()).decode()
    assert_absent([USERS[ALICE], "Wrong-password-of-alice", QUERY, basic, *sent], texts + logs.texts)


@pytest.mark.parametrize("tls", [False, True], ids=["http", "connect"])
async def test_t14_no_secret_of_the_proxy_either(tls, authority, tmp_path, logs):
    texts: list[str] = []
    async with Origin(tls=authority.server if tls else None) as origin, Proxy(door=Door("NTLM", "Digest")) as proxy:
        url = origin.serve("/f", BODY) + "?" + QUERY
        async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "q.db", ssl=authority.client()) as manager:
            for password in (USERS[HELPER], "Wrong-password-of-helper"):
                given = [AuthCredentials(AuthTarget.PROXY, AuthScheme.NTLM, HELPER, password)]
                await attempt(manager, url, tmp_path / "out", texts, credentials=given, proxy=proxy.url)
        sent = answers_sent(proxy)
    assert sent
    assert_absent([USERS[HELPER], "Wrong-password-of-helper", QUERY, *sent], texts + logs.texts)


async def test_t14_no_secret_is_in_the_journal_or_beside_it(authority, tmp_path):
    directory = tmp_path / "journal"
    directory.mkdir(mode=0o700)
    async with Origin(door=Door("NTLM")) as origin:
        url = origin.serve("/f", BODY) + "?" + QUERY
        origin.always("/f", answer(503))
        async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=directory / "q.db") as manager:
            job = await manager.create_job("secrets")
            await job.add_file(url, tmp_path / "out")
            await job.set_credentials(AuthTarget.SERVER, AuthScheme.NTLM, ALICE, USERS[ALICE])
            await job.set_credentials(AuthTarget.PROXY, AuthScheme.NTLM, HELPER, USERS[HELPER])
            await job.resume()
            with pytest.raises(bits.RemoteFileError):
                await job.wait(transient=True)
            secrets = [USERS[ALICE], USERS[HELPER], QUERY, *answers_sent(origin)]
            assert len(secrets) > 3
            await journal_is_clean(directory, secrets)
            assert repr(job).count(QUERY) == 0
            await job.cancel()
        await journal_is_clean(directory, secrets)
        assert {p.stat().st_mode & 0o777 for p in directory.iterdir()} == {0o600}


async def journal_is_clean(directory: Path, secrets: list[str]) -> None:
    files = list(directory.iterdir())
    assert files
    for path in files:
        content = await asyncio.get_running_loop().run_in_executor(None, path.read_bytes)
        for secret in secrets:
            for form in (secret.encode(), secret.encode("utf-16-le"), base64.b64encode(secret.encode())):
                assert form not in content, f"{secret[:6]}… in {path.name}"


async def test_t14_no_object_that_an_application_holds_shows_a_secret(tmp_path):
    import spnego

    token = bits.Token.for_network(spnego.Password(ALICE, "Password-in-a-token"))
    async with bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=tmp_path / "q.db") as manager:
        job = await manager.create_job("x", owner=token)
        file = await job.add_file("https://h.test/f?" + QUERY, tmp_path / "f")
        await job.set_credentials(AuthTarget.SERVER, AuthScheme.BASIC, "u", "Password-of-the-job")
        with bits.impersonate(token):
            options = await job.token_options()
        shown = [repr(o) for o in (token, manager, job, file, job.files, job.proxy_settings, job.progress, options)]
        shown += [repr(vars(manager)), repr(list(manager._desk.engine.roster))]
        gc.collect()
        assert_absent(["Password-in-a-token", "Password-of-the-job", QUERY], shown)


SECRET = "-".join(("Refused", "secret"))  # no line of this file, which a traceback shows, has it
REFUSED = {
    "a URL with a password": lambda job, to: job.add_file(f"https://u:{SECRET}@h.test/f", to),
    "a URL of another scheme": lambda job, to: job.add_file(f"ftp://h.test/f?{SECRET}", to),
    "a URL with a line break": lambda job, to: job.add_file(f"https://h.test/f\n?{SECRET}", to),
    "a URL that is too long": lambda job, to: job.add_file(f"https://h.test/f?{SECRET}" + "x" * 3000, to),
    "a relative path": lambda job, to: job.add_file(f"https://h.test/f?{SECRET}", "f"),
    "a remote name with a password": lambda job, to: job.files[0].set_remote_name(f"https://u:{SECRET}@h.test/f"),
    "a prefix with a password": lambda job, to: job.replace_remote_prefix("https://h.test", f"https://u:{SECRET}@h.test"),
    "a proxy with a password": lambda job, to: job.set_proxy_settings(bits.ProxySettings.override(f"http://u:{SECRET}@p:3128")),
    "a password of bytes": lambda job, to: job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "u", SECRET.encode()),
    "a password without a user": lambda job, to: job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, None, SECRET),
    "too long a user": lambda job, to: job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "u" * 400, SECRET),
    "too long a password": lambda job, to: job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "u", SECRET * 9000),
    "no scheme": lambda job, to: job.set_credentials(bits.AuthTarget.SERVER, "basic", "u", SECRET),
    "a header with a line break": lambda job, to: job.set_custom_headers([("X-Key", f"{SECRET}\r\nX-Other: 1")]),
    "a header of the engine": lambda job, to: job.set_custom_headers([("Authorization", SECRET)]),
    "a cookie": lambda job, to: job.set_custom_headers(f"Cookie: {SECRET}"),
    "no header": lambda job, to: job.set_custom_headers(SECRET),
    "a header of bytes": lambda job, to: job.set_custom_headers([("X-Key", SECRET.encode())]),
    "a header of three parts": lambda job, to: job.set_custom_headers([("X-Key", SECRET, "")]),
    "too many headers": lambda job, to: job.set_custom_headers([("X-Key", SECRET + "y" * 20_000)]),
    "a token that is a password": lambda job, to: bits.impersonate(SECRET),
}


@pytest.mark.parametrize("call", REFUSED)
async def test_t14_what_is_refused_is_not_repeated(call, tmp_path, logs):
    with FakeNetwork():
        async with bits.BitsManager(store=tmp_path / "q.db") as manager:
            job = await manager.create_job("x")
            await job.add_file("https://h.test/f", tmp_path / "f")
            with pytest.raises((bits.BitsError, TypeError)) as caught:
                await REFUSED[call](job, tmp_path / "g")
            error = caught.value
            texts = [str(error), repr(error), *traceback.format_exception(error), repr(getattr(error, "__dict__", ""))]
    assert_absent([SECRET], texts + logs.texts)
