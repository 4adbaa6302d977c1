"""The HTTP options of a job, by the public API over real sockets: headers, method, redirect policy, certificates, response headers."""

import asyncio
import contextvars
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

import bits_async as bits
from bits_async import AuthScheme, AuthTarget, ErrorCode, ErrorContext, JobPriority, JobState
from bits_async import SecurityFlags as F
from bits_async.testing import FakeNetwork
from tests.certificates import DAY, Authority, ServerTls
from tests.peers import USERS, Door, Fault, Hold, Origin, Proxy, answer, redirect
from tests.rules import NTLM_OVER_HTTP
from tests.waiting import until

BODY = os.urandom(200_000)
HALF = 90_000
SECRET = "s3cret-of-the-tenant"
ALICE = r"LAB\alice"


@dataclass
class Place:
    """Where a test's journal and files are, and what the manager trusts."""

    directory: Path
    tls: ssl.SSLContext | None = None

    def manager(self, **options: Any) -> bits.BitsManager:
        return bits.BitsManager(auth_rules=NTLM_OVER_HTTP, store=self.directory / "queue.db", ssl=self.tls, **options)

    @property
    def path(self) -> Path:
        return self.directory / "out" / "file"

    async def job(self, manager: bits.BitsManager, *urls: str) -> bits.Job:
        """FOREGROUND, straight to the servers; suspended."""
        job = await manager.create_job("options", priority=JobPriority.FOREGROUND)
        for number, url in enumerate(urls):
            await job.add_file(url, self.path.with_name(f"file{number or ''}"))
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        return job


@pytest.fixture
def place(memory_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("XDG_STATE_HOME", str(memory_dir / "state"))
    (memory_dir / "out").mkdir()
    return Place(memory_dir)


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with Origin() as origin:
        yield origin


async def refusal(call: Awaitable[Any], code: int) -> bits.BitsError:
    with pytest.raises(bits.BitsError) as caught:
        await call
    assert bits.errors.code_name(caught.value.code) == bits.errors.code_name(code)
    return caught.value


async def failed(job: bits.Job, code: int, state: JobState = JobState.ERROR) -> bits.BitsError:
    """Resume the job and see it fail so."""
    await job.resume()
    error = await refusal(job.wait(transient=True), code)
    assert job.state is state
    assert error.transient is (state is JobState.TRANSIENT_ERROR)
    assert error.advice
    return error


async def whole(job: bits.Job, body: bytes = BODY) -> None:
    """Resume the job and see it finish."""
    await job.resume()
    await job.wait()
    paths = await job.complete()
    assert [path.read_bytes() for path in paths] == [body] * len(paths)


# -- custom headers


async def test_custom_headers_go_with_every_request_in_their_order_and_replace_the_user_agent(place, origin):
    url = origin.serve("/file", BODY)
    origin.fault("/file", Fault(cut_after=HALF))
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.set_custom_headers(f"X-Tenant: {SECRET}\r\nX-Many: 1\r\nx-many: 2\r\nUser-Agent: mine/1.0\r\nAccept: a/b\r\n")
        assert job.custom_headers == (("X-Tenant", SECRET), ("X-Many", "1"), ("X-Many", "2"), ("User-Agent", "mine/1.0"), ("Accept", "a/b"))
        await whole(job)
    assert len(origin.requests) == 2
    for seen in origin.requests:
        assert seen.header("X-Tenant") == SECRET
        assert [value for name, value in seen.head.headers if name.lower() == "x-many"] == ["1", "2"]
        names = [name.lower() for name, _ in seen.head.headers]
        assert (names.count("user-agent"), names.count("accept")) == (1, 1)
        assert (seen.header("User-Agent"), seen.header("Accept")) == ("mine/1.0", "a/b")
        assert seen.header("Accept-Encoding") == "identity"
    assert origin.requests[1].range is not None


async def test_custom_headers_can_be_replaced_and_removed_and_survive_a_restart(place, origin):
    url = origin.serve("/file", BODY)
    async with place.manager() as manager:
        job = await place.job(manager, url)
        assert job.custom_headers == ()
        await job.set_custom_headers([("X-Old", "1")])
        await job.set_custom_headers([("X-New", SECRET)])
    async with place.manager() as manager:
        job = await manager.get_job(job.id)
        assert job.custom_headers == (("X-New", SECRET),)
        await whole(job)
    assert origin.requests[0].header("X-New") == SECRET
    assert origin.requests[0].header("X-Old") is None
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.set_custom_headers([("X-New", SECRET)])
        await job.set_custom_headers(None)
        assert job.custom_headers == ()
        await whole(job)
    assert origin.requests[1].header("X-New") is None


async def test_write_only_headers_are_sent_and_never_given_out_again(place, origin):
    url = origin.serve("/file", BODY)
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.set_custom_headers([("X-Tenant", SECRET)])
        await job.make_custom_headers_write_only()
        assert job.custom_headers is None
        await job.set_custom_headers([("X-Tenant", SECRET + "2")])
        assert job.custom_headers is None
    async with place.manager() as manager:
        job = await manager.get_job(job.id)
        assert job.custom_headers is None
        await whole(job)
    assert origin.requests[0].header("X-Tenant") == SECRET + "2"


@pytest.mark.parametrize(
    "headers",
    [[("Host", "x")], "Range: bytes=0-1", [("If-Match", "*")], [("Proxy-Authorization", "x")], [("X", "a\r\nY: b")], "X: a\nY: b"],
)
async def test_t23_a_job_takes_no_header_that_smuggles(place, headers):
    async with place.manager() as manager:
        job = await manager.create_job("x")
        await refusal(job.set_custom_headers(headers), ErrorCode.E_INVALIDARG)
        await refusal(job.set_custom_headers("X: " + "v" * 16_384), ErrorCode.BG_E_STRING_TOO_LONG)
        assert job.custom_headers == ()


async def test_t19_custom_headers_do_not_follow_a_redirect_to_another_origin(place, origin):
    async with Origin() as elsewhere:
        target = elsewhere.serve("/moved", BODY)
        origin.always("/file", redirect(target))
        async with place.manager() as manager:
            job = await place.job(manager, origin.url("/file"))
            await job.set_custom_headers([("X-Tenant", SECRET)])
            await whole(job)
    assert origin.requests[0].header("X-Tenant") == SECRET
    assert elsewhere.requests[0].header("X-Tenant") is None
    assert SECRET not in str(elsewhere.requests[0].head.headers)


async def test_t19_custom_headers_belong_to_the_origins_of_the_first_resume(place, origin):
    """A file that is added later, from another server, is asked for without them, until they are set again."""
    url = origin.serve("/file", BODY)
    async with Origin() as later:
        second = later.serve("/file", BODY)
        async with place.manager() as manager:
            job = await place.job(manager, url)
            await job.set_custom_headers([("X-Tenant", SECRET)])
            await job.resume()
            await job.wait()
            await job.add_file(second, place.path.with_name("second"))
            later.fault("/file", answer(404))
            await failed(job, 0x80190194)
            assert later.requests[0].header("X-Tenant") is None
            await job.set_custom_headers([("X-Tenant", SECRET)])
            await whole(job)
    assert later.requests[1].header("X-Tenant") == SECRET


async def test_a_proxy_does_not_see_custom_headers_with_connect(place, authority):
    place.tls = authority.client()
    async with Origin(tls=authority.server) as origin, Proxy(door=Door("Basic")) as proxy:
        url = origin.serve("/file", BODY)
        async with place.manager() as manager:
            job = await place.job(manager, url)
            await job.set_proxy_settings(bits.ProxySettings.override(proxy.url))
            await job.set_credentials(AuthTarget.PROXY, AuthScheme.BASIC, ALICE, USERS[ALICE])
            await job.set_custom_headers([("X-Tenant", SECRET)])
            await job.resume()
            with pytest.raises(bits.BitsError):
                await job.wait()  # Basic to a proxy over plain http is refused; what was sent so far counts
    assert proxy.requests
    assert SECRET not in str([seen.head.headers for seen in proxy.requests])


async def test_custom_headers_reach_the_origin_through_a_tunnel_and_through_a_forwarding_proxy(place, authority):
    place.tls = authority.client()
    async with Origin(tls=authority.server) as secure, Origin() as plain, Proxy() as proxy:
        urls = [secure.serve("/file", BODY), plain.serve("/file", BODY)]
        async with place.manager() as manager:
            job = await place.job(manager, *urls)
            await job.set_proxy_settings(bits.ProxySettings.override(proxy.url))
            await job.set_custom_headers([("X-Tenant", SECRET)])
            await whole(job)
    assert [seen.header("X-Tenant") for seen in (*secure.requests, *plain.requests)] == [SECRET, SECRET]
    assert [seen.header("X-Tenant") for seen in proxy.tunnels] == [None]


async def test_t14_custom_headers_are_in_no_repr_event_log_error_or_file(place, origin, caplog):
    caplog.set_level("DEBUG")
    origin.always("/file", answer(500, SECRET.encode()))
    async with place.manager() as manager:
        job = await place.job(manager, origin.url("/file"))
        await job.set_custom_headers([("X-Tenant", SECRET)])
        texts = []
        async with job.events() as stream:
            await job.resume()
            error = await refusal(job.wait(transient=True), 0x801901F4)
            async for event in stream:
                texts.append(repr(event))
                if isinstance(event, bits.JobChanged) and event.state is JobState.TRANSIENT_ERROR:
                    break
        texts += [
            repr(error),
            str(error),
            str(error.fields()),
            repr(job),
            repr(manager),
            repr(list(manager._desk.engine.roster)),
            repr(job.files),
        ]
        texts += [repr(record.__dict__) for record in caplog.records]
        assert origin.requests[0].header("X-Tenant") == SECRET
        assert not [text for text in texts if SECRET in text]
        for file in place.directory.glob("queue.db*"):
            assert SECRET.encode() not in file.read_bytes()


async def test_custom_headers_whose_key_was_lost_stop_the_job_until_they_are_set_again(place, origin):
    url = origin.serve("/file", BODY)
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.set_custom_headers([("X-Tenant", SECRET)])
    place.directory.joinpath("queue.db.key").unlink()
    async with place.manager() as manager:
        job = await manager.get_job(job.id)
        assert job.state is JobState.ERROR
        assert job.error.code == ErrorCode.BG_E_INVALID_CREDENTIALS
        assert job.custom_headers is None
        await failed(job, ErrorCode.BG_E_INVALID_CREDENTIALS)
        assert origin.requests == [], "nothing is asked without them"
        await job.set_custom_headers([("X-Tenant", SECRET)])
        await whole(job)
    assert origin.requests[0].header("X-Tenant") == SECRET


async def test_taking_a_job_over_drops_its_custom_headers(place, origin):
    url = origin.serve("/file", BODY)
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.set_custom_headers([("X-Tenant", SECRET)])
        try:
            await job.take_ownership()
        except bits.AccessDenied:
            return  # not elevated: nothing to see
        job = await manager.get_job(job.id)
        assert job.custom_headers == ()
        await whole(job)
    assert origin.requests[0].header("X-Tenant") is None


async def test_a_running_transfer_goes_on_with_the_headers_that_replaced_its_own(place, origin):
    url, hold = origin.serve("/file", BODY), Hold(after=HALF)
    origin.fault("/file", Fault(hold=hold))
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.set_custom_headers([("X-Tenant", "old")])
        await job.resume()
        await hold.reached.wait()
        await job.set_custom_headers([("X-Tenant", "new")])
        await job.wait()
    assert [seen.header("X-Tenant") for seen in origin.requests] == ["old", "new"]


# -- method


async def test_another_method_makes_the_job_foreground_and_locks_its_priority(place, origin):
    url = origin.serve("/file", BODY)
    async with place.manager() as manager:
        job = await manager.create_job("report", priority=JobPriority.LOW)
        assert job.http_method == "GET"
        await job.set_http_method("GET")
        assert job.priority is JobPriority.LOW
        await job.add_file(url, place.path)
        await job.set_http_method("POST")
        assert (job.http_method, job.priority) == ("POST", JobPriority.FOREGROUND)
        await refusal(job.set_priority(JobPriority.HIGH), ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD)
        await job.set_priority(JobPriority.FOREGROUND)
        await whole(job)
    assert [(seen.method, seen.header("Content-Length"), seen.header("Content-Type")) for seen in origin.requests] == [("POST", "0", None)]


async def test_the_method_is_set_before_the_first_resume(place, origin):
    url = origin.serve("/file", BODY)
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.resume()
        await job.suspend() if job.state is not JobState.TRANSFERRED else None
        error = await refusal(job.set_http_method("POST"), ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME)
        assert isinstance(error, bits.InvalidState)
        await job.set_http_method("GET")
        assert job.http_method == "GET"


@pytest.mark.parametrize("method", ["get", "CONNECT", "HEAD", "TRACE", "OPTIONS", "POST /\r\nX: y", ""])
async def test_t23_methods_that_smuggle_or_bring_no_file_are_refused(place, method):
    async with place.manager() as manager:
        job = await manager.create_job("x")
        await refusal(job.set_http_method(method), ErrorCode.E_INVALIDARG)


async def test_another_method_excludes_dynamic_content(place):
    async with place.manager() as manager:
        job = await manager.create_job("x")
        await job.set_dynamic_content(True)
        await refusal(job.set_http_method("POST"), ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD)
        job = await manager.create_job("y")
        await job.set_http_method("POST")
        await refusal(job.set_dynamic_content(True), ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD)


@pytest.mark.parametrize(
    ("fault", "code"), [(answer(503), 0x801901F7), (Fault(cut_after=HALF), ErrorCode.BG_E_CONNECTION_CLOSED)], ids=["503", "cut"]
)
async def test_what_get_would_try_again_is_an_error_with_another_method_and_resume_begins_anew(place, origin, fault, code):
    url = origin.serve("/file", BODY)
    origin.fault("/file", fault)
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.set_http_method("POST")
        await failed(job, code)
        assert len(origin.requests) == 1, "the request was made once"
        await whole(job)
    assert [(seen.method, seen.range) for seen in origin.requests] == [("POST", None), ("POST", None)]


async def test_a_suspended_job_with_another_method_begins_anew(place, origin):
    url, hold = origin.serve("/file", BODY), Hold(after=HALF)
    origin.fault("/file", Fault(hold=hold))
    async with place.manager() as manager:
        job = await place.job(manager, url)
        await job.set_http_method("PUT")
        await job.resume()
        await hold.reached.wait()
        await job.suspend()
        await whole(job)
    assert [(seen.method, seen.range) for seen in origin.requests] == [("PUT", None), ("PUT", None)]


async def test_a_kept_connection_that_died_never_repeats_another_method(place, origin):
    """Two files of one job: the second request leaves on a connection of its own."""
    urls = [origin.serve("/a", BODY), origin.serve("/b", BODY)]
    async with place.manager() as manager:
        job = await place.job(manager, *urls)
        await job.set_http_method("POST")
        await whole(job)
    assert [seen.connection for seen in origin.requests] == [1, 2]


async def test_a_part_of_a_file_in_answer_to_another_method_is_an_error_and_the_rest_is_not_asked_for(place, origin):
    part = (("Content-Range", f"bytes 0-{HALF - 1}/{len(BODY)}"), ("ETag", '"v1"'))
    origin.always("/file", Fault(status=206, body=BODY[:HALF], headers=part))
    async with place.manager() as manager:
        job = await place.job(manager, origin.url("/file"))
        await job.set_http_method("POST")
        await failed(job, ErrorCode.BG_E_INVALID_SERVER_RESPONSE)
    assert len(origin.requests) == 1


@pytest.mark.parametrize("scheme", [AuthScheme.DIGEST, AuthScheme.NTLM])
async def test_logins_work_with_another_method(place, scheme):
    async with Origin(door=Door("Digest" if scheme is AuthScheme.DIGEST else "NTLM")) as origin:
        url = origin.serve("/file", BODY)
        async with place.manager() as manager:
            job = await place.job(manager, url)
            await job.set_http_method("POST")
            await job.set_credentials(AuthTarget.SERVER, scheme, ALICE, USERS[ALICE])
            await whole(job)
    assert {seen.method for seen in origin.requests} == {"POST"}
    assert origin.passed[-1].user


@pytest.mark.parametrize(("status", "method"), [(301, "GET"), (302, "GET"), (303, "GET"), (307, "POST"), (308, "POST")])
async def test_a_redirect_says_with_which_method_it_is_followed(place, origin, status, method):
    target = origin.serve("/moved", BODY)
    origin.always("/file", redirect(target, status))
    async with place.manager() as manager:
        job = await place.job(manager, origin.url("/file"))
        await job.set_http_method("POST")
        await whole(job)
    assert [(seen.method, seen.target) for seen in origin.requests] == [("POST", "/file"), (method, "/moved")]


# -- redirect policy


async def test_a_redirect_is_followed_silently_by_default(place, origin):
    target = origin.serve("/moved", BODY)
    origin.always("/file", redirect(target))
    async with place.manager() as manager:
        job = await place.job(manager, origin.url("/file"))
        assert job.security_flags == F.HTTP_REDIRECT_POLICY_ALLOW_SILENT
        await job.resume()
        await job.wait()
        assert job.files[0].remote_name == origin.url("/file")


async def test_a_reported_redirect_rewrites_the_remote_name_and_the_next_attempt_asks_there(place, origin):
    target = origin.serve("/moved", BODY) + "?signature=1"
    origin.always("/file", redirect(target))
    hold = Hold(after=HALF)
    origin.fault("/moved", Fault(hold=hold))
    async with place.manager() as manager:
        job = await place.job(manager, origin.url("/file"))
        await job.set_security_flags(F.HTTP_REDIRECT_POLICY_ALLOW_REPORT)
        await job.resume()
        await hold.reached.wait()
        await until(lambda: job.files[0].remote_name == target and job.progress.bytes_transferred)
    async with place.manager() as manager:
        job = await manager.get_job(job.id)
        assert job.security_flags == F.HTTP_REDIRECT_POLICY_ALLOW_REPORT
        assert job.files[0].remote_name == target
        await job.wait()
        (path,) = await job.complete()
        assert path.read_bytes() == BODY
    assert [seen.target for seen in origin.requests] == ["/file", "/moved?signature=1", "/moved?signature=1"]
    assert origin.requests[-1].range is not None


async def test_a_final_url_that_is_too_long_for_a_job_is_followed_and_not_reported(place, origin):
    target = origin.serve("/moved", BODY) + "?" + "x" * 2200
    origin.always("/file", redirect(target))
    async with place.manager() as manager:
        job = await place.job(manager, origin.url("/file"))
        await job.set_security_flags(F.HTTP_REDIRECT_POLICY_ALLOW_REPORT)
        await job.resume()
        await job.wait()
        assert job.files[0].remote_name == origin.url("/file")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_that_is_not_allowed_is_fatal_and_its_target_becomes_the_remote_name(place, origin, status):
    target = origin.serve("/moved", BODY)
    origin.always("/file", redirect(target, status))
    async with place.manager() as manager:
        job = await place.job(manager, origin.url("/file"))
        await job.set_security_flags(F.HTTP_REDIRECT_POLICY_DISALLOW)
        error = await failed(job, 0x80190000 | status)
        assert (error.context, error.http_status) == (ErrorContext.REMOTE_FILE, status)
        assert job.files[0].remote_name == target
        assert [seen.target for seen in origin.requests] == ["/file"]
        assert list(place.path.parent.iterdir()) == []
        await whole(job)
    assert origin.requests[-1].target == "/moved"


@pytest.mark.parametrize("policy", [F.HTTP_REDIRECT_POLICY_ALLOW_REPORT, F.HTTP_REDIRECT_POLICY_DISALLOW])
async def test_t19_a_name_that_a_redirect_wrote_never_counts_for_credentials_or_headers(place, origin, policy):
    """Neither before nor after `set_credentials` is called again: the application did not name that server."""
    async with Origin(door=Door("NTLM", "Digest", "Basic")) as thief:
        origin.always("/file", redirect(thief.serve("/moved", BODY)))
        async with place.manager() as manager:
            job = await place.job(manager, origin.url("/file"))
            await job.set_security_flags(policy)
            await job.resume()
            with pytest.raises(bits.BitsError):
                await job.wait()
            if policy is F.HTTP_REDIRECT_POLICY_DISALLOW:
                assert job.files[0].remote_name == thief.url("/moved")
            for _ in range(2):
                await job.set_credentials(AuthTarget.SERVER, AuthScheme.NTLM, ALICE, USERS[ALICE])
                await job.set_credentials(AuthTarget.SERVER, AuthScheme.DIGEST, ALICE, USERS[ALICE])
                await job.set_custom_headers([("X-Tenant", SECRET)])
                await job.resume()
                with pytest.raises(bits.AuthFailed):
                    await job.wait()
    assert thief.requests
    assert not [seen for seen in thief.requests if seen.header("Authorization") or seen.header("X-Tenant")]


async def test_https_falls_to_http_only_when_it_is_allowed_and_takes_no_secret_along(place, origin, authority):
    place.tls = authority.client()
    target = origin.serve("/moved", BODY)
    async with Origin(tls=authority.server) as secure:
        secure.always("/file", redirect(target))
        async with place.manager() as manager:
            job = await place.job(manager, secure.url("/file"))
            await job.set_custom_headers([("X-Tenant", SECRET)])
            await failed(job, ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED)
            assert origin.requests == []
            await job.set_security_flags(F.HTTP_REDIRECT_POLICY_ALLOW_HTTPS_TO_HTTP)
            await whole(job)
    assert secure.requests[-1].header("X-Tenant") == SECRET
    assert origin.requests[0].header("X-Tenant") is None


async def test_flags_that_cannot_be_followed_are_refused(place):
    async with place.manager() as manager:
        job = await manager.create_job("x")
        for flags in (F.SSL_IGNORE_CERT_WRONG_USAGE, F.HTTP_REDIRECT_POLICY_ALLOW_REPORT | F.HTTP_REDIRECT_POLICY_DISALLOW):
            await refusal(job.set_security_flags(flags), ErrorCode.E_NOTIMPL)
        await refusal(job.set_security_flags(0x0200), ErrorCode.E_INVALIDARG)
        assert job.security_flags == F.HTTP_REDIRECT_POLICY_ALLOW_SILENT


async def test_an_attempt_that_is_running_goes_on_under_the_new_flags(place, authority):
    """A server that was let in by mistake sends nothing more."""
    place.tls = authority.client()
    hold = Hold(after=HALF)
    async with Origin(tls=authority.issue("elsewhere.test")) as origin, place.manager() as manager:
        url = origin.serve("/file", BODY)
        origin.fault("/file", Fault(hold=hold))
        job = await place.job(manager, url)
        await job.set_security_flags(F.SSL_IGNORE_CERT_CN_INVALID)
        await job.resume()
        await hold.reached.wait()
        await until(lambda: job.progress.bytes_transferred > 0)
        await job.set_security_flags(F(0))
        error = await refusal(job.wait(transient=True), ErrorCode.ERROR_WINHTTP_SECURE_FAILURE)
        assert not error.transient
        await job.set_security_flags(F.SSL_IGNORE_CERT_CN_INVALID)
        await whole(job)
        assert origin.requests[-1].range is not None, "what was fetched is kept"


# -- certificates


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a server's certificate, and which flags let it pass."""

    make: Callable[[Authority, Path], ServerTls]
    flags: F
    trusted: bool = True  # by the client


def an_expired(authority: Authority, directory: Path) -> ServerTls:
    return authority.issue(not_before=datetime.now(UTC) - 3 * DAY, not_after=datetime.now(UTC) - DAY)


def a_future(authority: Authority, directory: Path) -> ServerTls:
    return authority.issue(not_before=datetime.now(UTC) + DAY, not_after=datetime.now(UTC) + 2 * DAY)


UNKNOWN, NAME, DATE, USAGE = (
    F.SSL_IGNORE_UNKNOWN_CA,
    F.SSL_IGNORE_CERT_CN_INVALID,
    F.SSL_IGNORE_CERT_DATE_INVALID,
    F.SSL_IGNORE_CERT_WRONG_USAGE,
)
FLAWS = {
    "another host": Flaw(lambda authority, _: authority.issue("elsewhere.test"), NAME),
    "expired": Flaw(an_expired, DATE),
    "not valid yet": Flaw(a_future, DATE),
    "unknown": Flaw(lambda authority, _: authority.issue(), UNKNOWN, trusted=False),
    "unknown, another host": Flaw(lambda authority, _: authority.issue("elsewhere.test"), UNKNOWN | NAME, trusted=False),
    "unknown, expired": Flaw(an_expired, UNKNOWN | DATE, trusted=False),
    "unknown, for clients": Flaw(Authority.issue_for_clients, UNKNOWN | USAGE, trusted=False),
}
NEVER_ENOUGH = [F(0), NAME | DATE, UNKNOWN | DATE | USAGE, UNKNOWN | NAME | USAGE, UNKNOWN | NAME | DATE]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the client does not trust."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.mark.parametrize("given", [True, False], ids=["a context of the application", "the default context"])
@pytest.mark.parametrize("flaw", FLAWS.values(), ids=list(FLAWS))
async def test_a_flag_lets_its_flaw_pass_and_no_other(place, authority, stranger, tmp_path, monkeypatch, flaw, given):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    place.tls = authority.client() if given else None
    server = flaw.make(authority if flaw.trusted else stranger, tmp_path)
    async with Origin(tls=server) as origin:
        url = origin.serve("/file", BODY)
        async with place.manager() as manager:
            job = await place.job(manager, url)
            for flags in NEVER_ENOUGH:
                if flaw.flags not in flags:
                    await job.set_security_flags(flags)
                    error = await failed(job, ErrorCode.ERROR_WINHTTP_SECURE_FAILURE)
                    assert error.context is ErrorContext.GENERAL_TRANSPORT
            assert origin.requests == []
            await job.set_security_flags(flaw.flags)
            await whole(job)


async def test_a_context_of_the_application_is_never_changed_by_a_job_s_flags(place, authority, stranger):
    place.tls = authority.client()

    def look(context: ssl.SSLContext) -> tuple[Any, ...]:
        return context.verify_mode, context.check_hostname, context.verify_flags, context.options, context.cert_store_stats()

    before = look(place.tls)
    async with Origin(tls=stranger.server) as origin:
        async with place.manager() as manager:
            job = await place.job(manager, origin.serve("/file", BODY))
            await job.set_security_flags(UNKNOWN | NAME | DATE)
            await whole(job)
            other = await place.job(manager, origin.url("/file"))
            await failed(other, ErrorCode.ERROR_WINHTTP_SECURE_FAILURE)
    assert look(place.tls) == before


async def test_a_job_without_flags_never_gets_a_connection_of_one_with_flags(place, authority, stranger):
    """The connection that was made in spite of an unknown authority is still open when the strict job asks."""
    place.tls = authority.client()
    async with Origin(tls=stranger.server) as origin, place.manager() as manager:
        lax = await place.job(manager, origin.serve("/file", BODY))
        await lax.set_security_flags(UNKNOWN)
        await whole(lax)
        assert origin.open_connections == 1
        strict = await place.job(manager, origin.url("/file"))
        await failed(strict, ErrorCode.ERROR_WINHTTP_SECURE_FAILURE)
        again = await place.job(manager, origin.url("/file"))
        await again.set_security_flags(UNKNOWN)
        await whole(again)
        assert {seen.connection for seen in origin.requests} == {1}, "jobs with the same flags share"


async def test_flags_about_servers_do_not_weaken_the_proxy_s_tls(place, authority, stranger):
    place.tls = authority.client()
    async with Origin() as origin, Proxy(tls=stranger.server) as proxy:
        async with place.manager() as manager:
            job = await place.job(manager, origin.serve("/file", BODY))
            await job.set_proxy_settings(bits.ProxySettings.override(proxy.url))
            await job.set_security_flags(UNKNOWN | NAME | DATE | USAGE)
            await failed(job, ErrorCode.ERROR_WINHTTP_SECURE_FAILURE)
            assert proxy.requests == []
    async with Origin(tls=stranger.server) as origin, Proxy(tls=authority.server) as proxy:
        async with place.manager() as manager:
            job = await place.job(manager, origin.serve("/file", BODY))
            await job.set_proxy_settings(bits.ProxySettings.override(proxy.url))
            await job.set_security_flags(UNKNOWN)
            await whole(job)
            assert proxy.tunnels


class OwnContext(ssl.SSLContext):
    """Verifies in ways of its own, for all we know."""


async def test_a_context_that_cannot_be_read_back_is_refused_rather_than_weakened(place, tmp_path, authority):
    place.tls = OwnContext(ssl.PROTOCOL_TLS_CLIENT)
    async with place.manager() as manager:
        job = await manager.create_job("x")
        for flags in (NAME, F.SSL_ENABLE_CRL_CHECK):
            await refusal(job.set_security_flags(flags), ErrorCode.E_NOTIMPL)
        await job.set_security_flags(F.HTTP_REDIRECT_POLICY_DISALLOW)


# -- revocation


@pytest.mark.parametrize("form", ["pem", "der", "directory"])
async def test_a_revoked_certificate_is_fatal_and_one_that_is_not_passes(place, authority, form, tmp_path):
    place.tls = authority.client()
    revoked = authority.issue()
    lists = authority.revocation_list(revoked)
    source = tmp_path / "lists"
    if form == "directory":
        source.mkdir()
        (source / "readme.txt").write_text("nothing to see")
        (source / "a.crl").write_bytes(lists.public_bytes(Encoding.PEM))
    else:
        source.write_bytes(lists.public_bytes(Encoding.PEM if form == "pem" else Encoding.DER))
    async with Origin(tls=revoked) as bad, Origin(tls=authority.server) as good, place.manager() as manager:
        for origin in (bad, good):
            job = await place.job(manager, origin.serve("/file", BODY))
            await job.set_crl_source(source)
            assert job.crl_source == source
            await job.set_security_flags(F.SSL_ENABLE_CRL_CHECK)
            if origin is bad:
                error = await failed(job, ErrorCode.ERROR_WINHTTP_SECURE_CERT_REVOKED)
                assert error.context is ErrorContext.GENERAL_TRANSPORT
                await job.set_security_flags(F(0))
            await whole(job)


@pytest.mark.parametrize("lack", ["no source", "missing", "empty", "expired", "of another authority"])
async def test_without_a_good_revocation_list_no_server_is_trusted(place, authority, stranger, lack, tmp_path):
    place.tls = authority.client()
    source = tmp_path / "lists.crl"
    if lack == "empty":
        source.write_bytes(authority.ca_file.read_bytes())  # certificates are no lists, and not trusted for being there
    if lack == "expired":
        source.write_bytes(authority.revocation_list(expired=True).public_bytes(Encoding.PEM))
    if lack == "of another authority":
        source.write_bytes(stranger.revocation_list().public_bytes(Encoding.PEM))
    async with Origin(tls=authority.server) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        if lack != "no source":
            await job.set_crl_source(source)
        await job.set_security_flags(F.SSL_ENABLE_CRL_CHECK)
        await failed(job, ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED)
        assert origin.requests == []
        source.write_bytes(authority.revocation_list().public_bytes(Encoding.PEM))
        await job.set_crl_source(source)
        await whole(job)


async def test_revocation_lists_are_read_again_at_each_attempt(place, authority, tmp_path):
    place.tls = authority.client()
    source = tmp_path / "lists.crl"
    source.write_bytes(authority.revocation_list().public_bytes(Encoding.PEM))
    server = authority.issue()
    async with Origin(tls=server) as origin, place.manager() as manager:
        for code in (None, ErrorCode.ERROR_WINHTTP_SECURE_CERT_REVOKED):
            job = await place.job(manager, origin.serve("/file", BODY))
            await job.set_crl_source(source)
            await job.set_security_flags(F.SSL_ENABLE_CRL_CHECK)
            await (whole(job) if code is None else failed(job, code))
            source.write_bytes(authority.revocation_list(server).public_bytes(Encoding.PEM))


async def test_a_revocation_check_that_is_turned_on_in_the_middle_restarts_the_file(place, authority, tmp_path):
    place.tls = authority.client()
    source, hold = tmp_path / "lists.crl", Hold(after=HALF)
    source.write_bytes(authority.revocation_list().public_bytes(Encoding.PEM))
    async with Origin(tls=authority.server) as origin, place.manager() as manager:
        url = origin.serve("/file", BODY)
        origin.fault("/file", Fault(hold=hold))
        job = await place.job(manager, url)
        await job.set_crl_source(source)
        await job.resume()
        await hold.reached.wait()
        await job.suspend()
        await job.set_security_flags(F.SSL_ENABLE_CRL_CHECK)
        await whole(job)
        assert [seen.range for seen in origin.requests] == [None, None]


async def test_revocation_lists_are_named_by_an_absolute_path(place):
    async with place.manager() as manager:
        job = await manager.create_job("x")
        for source in ("lists.crl", "/a\0b", b"/lists"):
            await refusal(job.set_crl_source(source), ErrorCode.E_INVALIDARG)
        await job.set_crl_source("/etc/revoked")
    async with place.manager() as manager:
        job = await manager.get_job(job.id)
        assert job.crl_source == Path("/etc/revoked")
        await job.set_crl_source(None)
        assert job.crl_source is None


# -- the application's own say


@dataclass
class Callback:
    """What an application is asked, and what it says."""

    says: Any = True

    def __post_init__(self) -> None:
        self.asked: list[tuple[Any, Any, bytes]] = []

    def __call__(self, job: bits.Job, file: bits.JobFile, certificate: bytes) -> Any:
        self.asked.append((job, file, certificate))
        if isinstance(self.says, BaseException):
            raise self.says
        return self.says


async def test_the_application_is_asked_once_for_each_certificate_before_anything_is_requested(place, authority):
    place.tls = authority.client()
    other = authority.issue()
    async with Origin(tls=authority.server) as first, Origin(tls=other) as second, place.manager() as manager:
        urls = [first.serve("/a", BODY), first.serve("/b", BODY), second.serve("/c", BODY)]
        job = await place.job(manager, *urls)
        callback = Callback()
        await job.set_server_certificate_validation(callback)
        first.fault("/b", Fault(cut_after=HALF))  # reconnects: known already
        await whole(job)
    assert [(asked.id, file.remote_name, certificate) for asked, file, certificate in callback.asked] == [
        (job.id, urls[0], authority.server.der),
        (job.id, urls[2], other.der),
    ]


async def test_an_asynchronous_callback_holds_the_request_back_and_runs_in_its_own_context(place, authority):
    place.tls = authority.client()
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen: list[Any] = []
    go = asyncio.Event()
    async with Origin(tls=authority.server) as origin, place.manager() as manager:

        async def callback(job: bits.Job, file: bits.JobFile, certificate: bytes) -> bool:
            seen.append(who.get())
            await go.wait()
            return True

        job = await place.job(manager, origin.serve("/file", BODY))
        token = who.set("the one who set it")
        await job.set_server_certificate_validation(callback)
        who.reset(token)
        await job.resume()
        await until(lambda: seen)
        await asyncio.sleep(0.05)
        assert origin.requests == []
        assert job.state is JobState.CONNECTING
        go.set()
        await job.wait()
    assert seen == ["the one who set it"]


@pytest.mark.parametrize("says", [False, None, 1, "yes"])
async def test_only_true_accepts_a_certificate(place, authority, says):
    place.tls = authority.client()
    async with Origin(tls=authority.server) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        callback = Callback(says)
        await job.set_server_certificate_validation(callback)
        error = await failed(job, ErrorCode.ERROR_WINHTTP_SECURE_FAILURE, JobState.TRANSIENT_ERROR)
        assert error.context is ErrorContext.SERVER_CERTIFICATE_CALLBACK
        assert origin.requests == []
        callback.says = True
        await whole(job)  # a refusal is not remembered
        assert len(callback.asked) == 2


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ValueError("no"), ErrorCode.E_FAIL),
        (bits.AccessDenied("not this one"), ErrorCode.E_ACCESSDENIED),
        (asyncio.CancelledError(), ErrorCode.E_FAIL),
    ],
    ids=["any error", "a BitsError", "a cancel of its own"],
)
async def test_a_callback_that_raises_refuses_with_its_code(place, authority, raised, code):
    place.tls = authority.client()
    async with Origin(tls=authority.server) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        await job.set_server_certificate_validation(Callback(raised))
        error = await failed(job, code, JobState.TRANSIENT_ERROR)
        assert error.context is ErrorContext.SERVER_CERTIFICATE_CALLBACK
        assert origin.requests == []


async def test_the_callback_is_not_asked_about_what_tls_refuses_nor_without_tls(place, authority, stranger, origin):
    place.tls = authority.client()
    async with Origin(tls=stranger.server) as bad, place.manager() as manager:
        callback = Callback()
        job = await place.job(manager, bad.serve("/file", BODY))
        await job.set_server_certificate_validation(callback)
        await failed(job, ErrorCode.ERROR_WINHTTP_SECURE_FAILURE)
        plain = await place.job(manager, origin.serve("/file", BODY))
        await plain.set_server_certificate_validation(callback)
        await whole(plain)
        assert callback.asked == []
        await job.set_security_flags(UNKNOWN)
        await job.resume()
        await job.wait()
        assert [certificate for *_, certificate in callback.asked] == [stranger.server.der]


async def test_the_callback_is_set_while_the_job_is_not_active_only(place, authority):
    place.tls = authority.client()
    hold = Hold()
    async with Origin(tls=authority.server) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        origin.fault("/file", Fault(hold=hold))
        await job.resume()
        await hold.reached.wait()
        error = await refusal(job.set_server_certificate_validation(Callback()), ErrorCode.BG_E_READ_ONLY_WHEN_JOB_ACTIVE)
        assert isinstance(error, bits.InvalidState)
        await refusal(job.set_server_certificate_validation(7), ErrorCode.E_INVALIDARG)
        await job.suspend()
        callback = Callback()
        await job.set_server_certificate_validation(callback)
        await whole(job)
        assert len(callback.asked) == 1, "a connection from before is not used"


async def test_setting_the_callback_again_forgets_what_was_accepted(place, authority):
    place.tls = authority.client()
    async with Origin(tls=authority.server) as origin, place.manager() as manager:
        origin.serve("/file", BODY)
        job = await place.job(manager, origin.url("/file"))
        callback = Callback()
        await job.set_server_certificate_validation(callback)
        await job.resume()
        await job.wait()
        await job.set_server_certificate_validation(callback)
        await job.add_file(origin.url("/file"), place.path.with_name("again"))
        await whole(job)
        assert len(callback.asked) == 2
        await job_without_callback_shares_nothing(place, manager, origin)


async def job_without_callback_shares_nothing(place: Place, manager: bits.BitsManager, origin: Origin) -> None:
    before = origin.connections
    await whole(await place.job(manager, origin.url("/file")))
    assert origin.connections == before + 1


async def test_the_callback_does_not_survive_a_restart_and_until_it_is_set_again_nothing_is_requested(place, authority):
    place.tls = authority.client()
    async with Origin(tls=authority.server) as origin:
        url = origin.serve("/file", BODY)
        async with place.manager() as manager:
            job = await place.job(manager, url)
            await job.set_server_certificate_validation(Callback())
        async with place.manager() as manager:
            job = await manager.get_job(job.id)
            error = await failed(job, ErrorCode.BG_E_SERVER_CERT_VALIDATION_INTERFACE_REQUIRED)
            assert error.context is ErrorContext.SERVER_CERTIFICATE_CALLBACK
            assert origin.requests == []
            callback = Callback()
            await job.set_server_certificate_validation(callback)
            await whole(job)
            assert len(callback.asked) == 1


async def test_a_callback_that_was_removed_is_not_required_after_a_restart(place, authority):
    place.tls = authority.client()
    async with Origin(tls=authority.server) as origin:
        url = origin.serve("/file", BODY)
        async with place.manager() as manager:
            job = await place.job(manager, url)
            await job.set_server_certificate_validation(Callback(False))
            await job.set_server_certificate_validation(None)
        async with place.manager() as manager:
            await whole(await manager.get_job(job.id))


async def test_a_job_is_suspended_while_its_callback_thinks(place, authority):
    place.tls = authority.client()
    thinking, ended = asyncio.Event(), asyncio.Event()

    async def callback(job: bits.Job, file: bits.JobFile, certificate: bytes) -> bool:
        thinking.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return True

    async with Origin(tls=authority.server) as origin, place.manager() as manager:
        job = await place.job(manager, origin.serve("/file", BODY))
        await job.set_server_certificate_validation(callback)
        await job.resume()
        await thinking.wait()
        await job.suspend()
        assert job.state is JobState.SUSPENDED
        assert ended.is_set()
        assert origin.requests == []


# -- response headers


async def test_the_headers_of_the_last_response_can_be_read(place, origin):
    target = origin.serve("/moved", BODY)
    origin.fault("/file", answer(404, b"no", X_Reason="gone"), redirect(target))
    origin.fault("/moved", Fault(headers=(("X-Part", "1"), ("X-Part", "2"))))
    async with place.manager() as manager:
        job = await place.job(manager, origin.url("/file"))
        assert job.files[0].http_response_headers == ()
        await failed(job, 0x80190194)
        assert ("X-Reason", "gone") in job.files[0].http_response_headers
        await job.resume()
        await job.wait()
        found = job.files[0].http_response_headers
        assert [value for name, value in found if name == "X-Part"] == ["1", "2"]
        assert ("ETag", '"v1"') in found
        assert not [name for name, _ in found if name == "X-Reason"]
    async with place.manager() as manager:
        job = await manager.get_job(job.id)
        assert job.files[0].http_response_headers == (), "they are kept in memory only"


async def test_the_tests_of_an_application_see_method_and_custom_headers_and_give_response_headers(place):
    with FakeNetwork() as network:
        network.serve("https://h.test/file", BODY)
        async with place.manager() as manager:
            job = await place.job(manager, "https://h.test/file")
            await job.set_custom_headers([("X-Tenant", SECRET)])
            await job.set_http_method("POST")
            await job.resume()
            await job.wait()
            assert dict(job.files[0].http_response_headers)["content-length"] == str(len(BODY))
        (request,) = network.requests
    assert (request.method, request.headers) == ("POST", (("X-Tenant", SECRET),))
    assert SECRET not in repr(request)


# -- proxy settings, when they are used


@pytest.mark.parametrize("kind", ["automatic", "environment"])
async def test_proxy_settings_that_cannot_be_followed_end_the_job_when_it_runs(place, origin, monkeypatch, kind):
    url = origin.serve("/file", BODY)
    async with place.manager() as manager:
        job = await place.job(manager, url)
        if kind == "automatic":
            await job.set_proxy_settings(bits.ProxySettings.autodetect())
        else:
            monkeypatch.setenv("http_proxy", "socks5://proxy:1")
            await job.set_proxy_settings(bits.ProxySettings.preconfig())
        error = await failed(job, ErrorCode.BG_E_INVALID_PROXY_INFO)
        assert error.context is ErrorContext.GENERAL_TRANSPORT
        assert origin.requests == [], "there is no silent direct connection"
        await job.set_proxy_settings(bits.ProxySettings.no_proxy())
        await whole(job)
