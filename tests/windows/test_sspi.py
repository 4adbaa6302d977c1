"""Kerberos and NTLM on Windows, to the real Apache: whose name its log shows.

Wine's Kerberos is the library of this machine, so the tickets and the contexts are real. It has one ticket cache for everybody, so that a
token is shown *its own* tickets cannot be seen here; NTLM with the logon's own password needs a domain member, and is not seen either.
"""

import base64
import hashlib
import ssl
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
import spnego

import bits_async as bits
from bits_async import AuthCredentials, AuthFailed, AuthRules, AuthScheme, AuthTarget, ErrorCode, HelperTokenFlags, Hosts, Token
from bits_async.auth import sspi
from bits_async.auth.tickets import target_of
from bits_async.identity import win32
from tests.windows.stage import stage

SERVER = AuthTarget.SERVER
OWN = AuthCredentials(SERVER, AuthScheme.NEGOTIATE, None, None)  # whoever the token is logged on as
HERE = AuthRules(allow=Hosts(("localhost",)), ntlm_over_http=Hosts(("localhost",)))
SPN = "HTTP/localhost"


async def fetch(
    path: Path,
    target: str,
    credentials: Sequence[AuthCredentials] = (OWN,),
    *,
    owner: Token | None = None,
    helper: Token | None = None,
    rules: AuthRules = HERE,
    tls: bool = False,
) -> str:
    """The hash of what was downloaded. Each test asks for a target that no other does, so that it finds its own lines in the log. The
    first error is told, and not waited out."""
    url = (stage().tls_url if tls else stage().url) + target
    context = ssl.create_default_context(cafile=stage().ca_file) if tls else None
    flags = HelperTokenFlags.NONE if helper is None else HelperTokenFlags.NETWORK
    done = await bits.download(
        url,
        path,
        owner=owner,
        helper=helper,
        helper_flags=flags,
        credentials=list(credentials),
        auth_rules=rules,
        ssl=context,
        retry_for=0,
    )
    return hashlib.sha256(Path(done).read_bytes()).hexdigest()


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The token (its id, None: the process) of each thread that made a context or took a step of one."""
    seen: list[int | None] = []

    def note() -> None:
        token = win32.thread_token()
        seen.append(None if token is None else win32.worn(token).token)

    made, stepped = sspi.Context.__init__, sspi.Context.step

    def make(self: sspi.Context, *args: object, **kwargs: object) -> None:
        note()
        made(self, *args, **kwargs)  # type: ignore[arg-type]

    def step(self: sspi.Context, token: bytes | None = None) -> bytes:
        note()
        return stepped(self, token)

    monkeypatch.setattr(sspi.Context, "__init__", make)
    monkeypatch.setattr(sspi.Context, "step", step)
    return seen


@pytest.fixture
async def token() -> Token:
    handle = win32.process_token(win32.TOKEN_QUERY | win32.TOKEN_DUPLICATE)
    return await Token.for_handle(handle.value)


class TestWhoIsLoggedOn:
    async def test_the_process_downloads_by_kerberos(self, tmp_path: Path, contexts: list[int | None]) -> None:
        assert await fetch(tmp_path / "big", "/neg/big?process") == stage().sha256
        (hit,) = stage().hits(1, target="/neg/big?process", status=200)
        assert hit.user == stage().principal == "alice@BITS.TEST"
        assert set(contexts) == {None}

    async def test_a_ticket_is_bound_to_the_tls_channel(self, tmp_path: Path) -> None:
        assert await fetch(tmp_path / "big", "/neg/big?tls", tls=True) == stage().sha256
        (hit,) = stage().hits(1, target="/neg/big?tls", status=200)
        assert hit.user == stage().principal

    async def test_a_tokens_own_threads_make_and_step_its_contexts(self, tmp_path: Path, token: Token, contexts: list[int | None]) -> None:
        assert await fetch(tmp_path / "big", "/neg/big?helper", helper=token) == stage().sha256
        (hit,) = stage().hits(1, target="/neg/big?helper", status=200)
        assert hit.user == stage().principal
        assert None not in contexts
        assert len(contexts) >= 3  # made, the first token, the server's proof

    async def test_t22_what_a_token_is_logged_on_with_goes_to_no_local_listener_unasked(self, tmp_path: Path, token: Token) -> None:
        with pytest.raises(AuthFailed, match="the token's credentials are not sent to loopback"):
            await fetch(tmp_path / "big", "/neg/big?unlisted", helper=token, rules=AuthRules())


class TestAccounts:
    """A user name and a password, whoever the thread is."""

    async def test_ntlm_needs_nothing_of_the_system(self, tmp_path: Path, contexts: list[int | None]) -> None:
        given = AuthCredentials(SERVER, AuthScheme.NEGOTIATE, "BITS\\alice", stage().password)
        assert await fetch(tmp_path / "big", "/ntlm/big?account", [given]) == stage().sha256
        (hit,) = stage().hits(1, target="/ntlm/big?account", status=200)
        assert hit.user == "BITS\\alice"
        assert contexts == []

    async def test_a_wrong_password_is_refused_once(self, tmp_path: Path) -> None:
        given = AuthCredentials(SERVER, AuthScheme.NEGOTIATE, "BITS\\alice", "wrong")
        with pytest.raises(AuthFailed, match="wrong"):
            await fetch(tmp_path / "big", "/ntlm/big?wrong", [given])

    async def test_what_windows_has_nothing_of_is_said(self, tmp_path: Path) -> None:
        cache = Token.for_network(spnego.KerberosCCache("FILE:x", "alice@BITS.TEST"))
        with pytest.raises(AuthFailed, match="Windows shows no ticket cache"):
            await fetch(tmp_path / "big", "/neg/big?cache", owner=cache)


class TestContexts:
    def test_the_ticket_names_the_host_of_the_url(self) -> None:
        assert target_of(sspi.Context("Kerberos", SPN).step()) == ("HTTP", "localhost")

    def test_a_binding_changes_what_is_shown(self) -> None:
        assert sspi.Context("Kerberos", SPN, binding=b"tls-server-end-point:" + bytes(32)).step()

    def test_an_account_is_shown_whoever_the_thread_is(self) -> None:
        """By Kerberos; the account in two parts, because Wine's does not know alice@REALM for what Windows takes it for."""
        account = sspi.Account("bob", "BITS.TEST", stage().others["bob"])
        token = base64.b64encode(sspi.Context("Kerberos", SPN, account=account).step()).decode()
        request = urllib.request.Request(stage().url + "/neg/big?account", headers={"Authorization": f"Negotiate {token}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            assert hashlib.sha256(answer.read()).hexdigest() == stage().sha256
        (hit,) = stage().hits(1, target="/neg/big?account", status=200)
        assert hit.user == "bob@BITS.TEST"

    def test_nobody_is_known_there(self) -> None:
        with pytest.raises(OSError) as caught:
            sspi.Context("Kerberos", "HTTP/nobody.bits.test").step()
        failure = sspi.explain(caught.value)
        assert isinstance(failure, AuthFailed)
        assert failure.code == ErrorCode.SEC_E_NO_CREDENTIALS

    def test_a_package_that_there_is_not_is_said(self) -> None:
        with pytest.raises(OSError) as caught:
            sspi.Context("Nonsense", SPN)
        assert "no such security package" in sspi.explain(caught.value).message

    def test_a_password_is_not_shown(self) -> None:
        account = sspi.Account.of("LAB\\alice", "secret")
        assert (account.user, account.domain) == ("alice", "LAB")
        assert "secret" not in repr(account)

    def test_contexts_are_given_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        freed: list[str] = []
        monkeypatch.setattr(sspi, "_freed", lambda call, handle: freed.append(call.name))
        context = sspi.Context("Kerberos", SPN)
        context.step()
        del context
        assert sorted(freed) == ["DeleteSecurityContext", "FreeCredentialsHandle"]

    def test_hundreds_of_contexts_in_threads(self) -> None:
        failures: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(50):
                    assert target_of(sspi.Context("Kerberos", SPN).step())[1] == "localhost"
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert failures == []
