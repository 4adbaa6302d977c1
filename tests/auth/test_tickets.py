"""Tickets are got once, kept where nobody else can name them, checked before each use, and gone at the end."""

import asyncio
import gc
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import spnego
from hypothesis import given
from hypothesis import strategies as st

from bits_async.auth import tickets as module
from bits_async.auth.policy import AuthScheme, Offer, Refusals, account_fingerprint, credential_fingerprint
from bits_async.auth.tickets import KDC, Tickets, credential_of, descend, target_of
from bits_async.errors import AuthFailed, ErrorCode, NetworkError
from bits_async.identity.kerberos import explain, kerberos
from tests.realms import MitKdc, closed_port, write_krb5_conf

NEGOTIATE = AuthScheme.NEGOTIATE


def offer(credential: spnego.Credential | None = None, *, principal: str | None = None, process: bool = True, holder: Any = None) -> Offer:
    fingerprint = credential_fingerprint(credential, b"key")
    return Offer(NEGOTIATE, credential, None, None, True, fingerprint, principal, holder, process)


def explicit(user: str, password: str, holder: Any = None) -> Offer:
    return Offer(NEGOTIATE, None, user, password, False, account_fingerprint(user, password), None, holder)


# -- what a token says


def der(tag: int, *inside: bytes) -> bytes:
    data = b"".join(inside)
    length = len(data)
    size = bytes([length]) if length < 128 else bytes([0x82]) + length.to_bytes(2, "big")
    return bytes([tag]) + size + data


OID = bytes.fromhex("06092a864886f712010202")


def ap_req(*names: str, oid: bytes = OID, kind: bytes = b"\1\0") -> bytes:
    strings = der(0x30, *(der(0x1B, name.encode()) for name in names))
    sname = der(0xA2, der(0x30, der(0xA0, der(0x02, b"\2")), der(0xA1, strings)))
    ticket = der(0x61, der(0x30, der(0xA0, der(0x02, b"\5")), der(0xA1, der(0x1B, b"REALM")), sname, der(0xA3, b"\0" * 300)))
    request = der(0x6E, der(0x30, der(0xA0, der(0x02, b"\5")), der(0xA1, der(0x02, b"\x0e")), der(0xA3, ticket)))
    return der(0x60, oid, kind, request)


def test_t21_the_target_is_read_out_of_the_ticket_itself() -> None:
    assert target_of(ap_req("HTTP", "www.example.com")) == ("HTTP", "www.example.com")
    assert target_of(ap_req("host", "a", "b")) == ("host", "a", "b")


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"\x60",
        b"\x60\x80",
        b"\x60\x85\1\1\1\1\1",
        b"\x60\x7f\0",
        b"NTLMSSP\0\1\0\0\0",
        ap_req("HTTP", "x")[:-1],
        ap_req("HTTP", "x", oid=bytes.fromhex("06062b0601050502")),
        ap_req("HTTP", "x", kind=b"\2\0"),
        der(0x60, OID, b"\1\0", der(0x6E, der(0x30))),
    ],
)
def test_t21_what_is_no_kerberos_token_has_no_target(token: bytes) -> None:
    with pytest.raises(ValueError):
        target_of(token)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    for attempt in (lambda: target_of(data), lambda: descend(data, 0x30, 0xA1)):
        try:
            attempt()
        except ValueError:
            pass


# -- what went wrong


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (SimpleNamespace(err_code=-1765328360), ErrorCode.SEC_E_LOGON_DENIED, "password or key is wrong"),
        (SimpleNamespace(err_code=-1765328366), ErrorCode.SEC_E_LOGON_DENIED, "locked"),
        (
            SimpleNamespace(base_error=SimpleNamespace(min_code=2529638919, maj_code=0xD0000)),
            ErrorCode.SEC_E_NO_CREDENTIALS,
            "no such service",
        ),
        (SimpleNamespace(base_error=SimpleNamespace(min_code=0, maj_code=0x40000)), ErrorCode.SEC_E_BAD_BINDINGS, "binding"),
        (SimpleNamespace(err_code=-1765328228), ErrorCode.ERROR_WINHTTP_TIMEOUT, "no KDC"),
        (FileNotFoundError(2, "secret path"), ErrorCode.SEC_E_NO_CREDENTIALS, "does not exist"),
        (ValueError("secret"), ErrorCode.SEC_E_NO_CREDENTIALS, "ValueError"),
        (SimpleNamespace(err_code=-1), ErrorCode.SEC_E_NO_CREDENTIALS, "-1"),
    ],
)
def test_errors_of_the_mechanism_are_told_in_words(raised: Any, code: ErrorCode, words: str) -> None:
    error = explain(raised)
    assert error.code == code
    assert words in str(error)
    assert error.advice
    assert "secret" not in str(error)
    assert error.transient == isinstance(error, NetworkError)


def test_t14_nothing_of_the_original_stays_behind_an_error() -> None:
    def fail() -> None:
        raise ValueError("secret-token")

    with pytest.raises(AuthFailed) as caught:
        kerberos(fail)
    assert caught.value.__context__ is None
    assert "secret" not in repr(caught.value.__cause__)


# -- which credential


def test_credentials_become_pyspnegos() -> None:
    assert credential_of(explicit("alice", "pw")) == spnego.Password("alice", "pw")
    keytab = spnego.KerberosKeytab("/k")
    assert credential_of(offer(keytab)) is keytab
    assert credential_of(offer()) == spnego.CredentialCache()


@pytest.mark.parametrize("name", ["KEYRING:session:x", "KCM:", "API:x", "DIR:/tmp", "MEMORY:x"])
def test_t04_caches_that_no_user_id_guards_are_not_opened_for_other_users(name: str) -> None:
    with pytest.raises(AuthFailed, match="not guarded"):
        Tickets().ready(offer(spnego.KerberosCCache(name), process=False))
    with pytest.raises(AuthFailed, match="only the process"):
        Tickets().ready(offer(spnego.CredentialCache(), process=False))


def test_a_hash_is_no_key_to_kerberos() -> None:
    with pytest.raises(AuthFailed, match="hash"):
        Tickets().ready(offer(spnego.NTLMHash("alice", nt_hash="00" * 16)))


def test_a_cache_or_keytab_that_is_missing_is_named_as_such(tmp_path: Path) -> None:
    for credential in (
        spnego.KerberosCCache(f"FILE:{tmp_path}/nobody"),
        spnego.KerberosKeytab(f"{tmp_path}/nobody"),
        spnego.KerberosKeytab(f"{tmp_path}/nobody", "a@BITS.TEST"),
        spnego.CredentialCache(),
    ):
        with pytest.raises(AuthFailed) as caught:
            Tickets().ready(offer(credential))
        assert caught.value.code == ErrorCode.SEC_E_NO_CREDENTIALS
        assert "no such" in str(caught.value) or "does not exist" in str(caught.value) or "no key" in str(caught.value)


def test_the_revision_is_the_state_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keytab"
    file.write_bytes(b"1")
    tickets = Tickets()
    for credential in (spnego.KerberosKeytab(str(file)), spnego.KerberosKeytab(f"FILE:{file}"), spnego.KerberosCCache(f"FILE:{file}")):
        before = tickets.revision(offer(credential))
        assert before
        file.write_bytes(file.read_bytes() + b"2")
        assert tickets.revision(offer(credential)) != before
    for nowhere in (
        spnego.KerberosKeytab("/nowhere"),
        spnego.KerberosCCache("MEMORY:x"),
        spnego.Password("a", "b"),
        spnego.CredentialCache(),
    ):
        assert tickets.revision(offer(nowhere)) == ""
    assert tickets.revision(explicit("alice", "pw")) == ""


def test_a_kdc_that_is_down_is_a_transient_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as port, pytest.raises(NetworkError) as caught:
        monkeypatch.setenv("KRB5_CONFIG", str(write_krb5_conf(tmp_path / "krb5.conf", {"DOWN.TEST": port})))
        Tickets().ready(explicit("alice@DOWN.TEST", "pw"))
    assert caught.value.transient
    with pytest.raises(AuthFailed, match="no KDC is configured") as refused:
        Tickets().ready(explicit("alice@NO.WHERE", "pw"))
    assert not refused.value.transient


def test_nobody_waits_for_anothers_question_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KDC_DEADLINE", 0.05)
    asked, go_on = threading.Event(), threading.Event()

    def silent(_: object) -> None:
        asked.set()
        go_on.wait(50)
        raise ValueError

    monkeypatch.setattr(module, "_first_ticket", silent)
    tickets = Tickets()

    def ask() -> None:
        with pytest.raises(AuthFailed):
            tickets.ready(explicit("alice@BITS.TEST", "pw"))

    first = threading.Thread(target=ask)
    first.start()
    assert asked.wait(30)
    with pytest.raises(NetworkError, match="did not answer"):
        tickets.ready(explicit("alice@BITS.TEST", "pw"))
    go_on.set()
    first.join()


# -- against a real KDC


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The credentials with which the KDC was asked for a ticket-granting ticket."""
    seen: list[object] = []
    ask = module._first_ticket

    def counted(credential: object) -> Any:
        seen.append(credential)
        return ask(credential)

    monkeypatch.setattr(module, "_first_ticket", counted)
    return seen


class Holder:
    """Stands for a token."""


class Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tickets(clock: Clock) -> Iterator[Tickets]:
    made = Tickets(clock=clock)
    yield made
    asyncio.run(made.aclose())


def exists(cache: object) -> bool:
    import krb5

    assert isinstance(cache, spnego.KerberosCCache)
    try:
        return krb5.cc_resolve(krb5.init_context(), cache.ccache.encode()).principal is not None
    except krb5.Krb5Error:
        return False


def first_token(cache: spnego.Credential) -> bytes:
    return spnego.client(cache, hostname="localhost", service="HTTP", protocol="kerberos").step() or b""


@pytest.mark.realm
def test_a_password_and_a_keytab_are_shown_to_the_kdc_once(kdc: MitKdc, tickets: Tickets, asked: list[object]) -> None:
    keytab = spnego.KerberosKeytab(str(kdc.keytab("helper")), kdc.principal("helper"))
    for wanted, name in ((explicit(kdc.principal("alice"), kdc.password("alice")), "alice"), (offer(keytab), "helper")):
        caches = [tickets.ready(wanted) for _ in range(3)]
        assert caches[0] == caches[1] == caches[2]
        assert isinstance(caches[0], spnego.KerberosCCache)
        assert caches[0].principal == kdc.principal(name)
        assert caches[0].ccache.startswith("MEMORY:bits-")
        assert target_of(first_token(caches[0])) == ("HTTP", "localhost")
    assert len(asked) == 2
    assert kdc.password("alice") not in repr(tickets)


@pytest.mark.realm
def test_a_keytab_without_a_principal_means_its_first(kdc: MitKdc, tickets: Tickets) -> None:
    cache = tickets.ready(offer(spnego.KerberosKeytab(str(kdc.keytab("bob")))))
    assert isinstance(cache, spnego.KerberosCCache)
    assert cache.principal == kdc.principal("bob")


@pytest.mark.realm
def test_threads_that_come_together_ask_once(kdc: MitKdc, tickets: Tickets, asked: list[object]) -> None:
    wanted = explicit(kdc.principal("alice"), kdc.password("alice"))
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(tickets.ready(wanted))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1
    assert len(found) == 8
    assert all(cache == found[0] for cache in found)


@pytest.mark.realm
def test_t04_two_tokens_never_share_a_ticket(kdc: MitKdc, tickets: Tickets, asked: list[object]) -> None:
    keytab = spnego.KerberosKeytab(str(kdc.keytab("alice")), kdc.principal("alice"))
    first, second = Holder(), Holder()
    one, other = tickets.ready(offer(keytab, holder=first)), tickets.ready(offer(keytab, holder=second))
    assert one != other
    assert len(asked) == 2
    tickets.forget(first)
    assert not exists(one)
    assert exists(other)


@pytest.mark.realm
def test_tickets_keep_no_token_alive_and_go_with_it(kdc: MitKdc, tickets: Tickets) -> None:
    holder = Holder()
    gone = tickets.ready(explicit(kdc.principal("alice"), kdc.password("alice"), holder))
    assert exists(gone)
    del holder
    gc.collect()
    tickets.ready(explicit(kdc.principal("helper"), kdc.password("helper")))
    assert not exists(gone)


@pytest.mark.realm
def test_a_ticket_near_its_end_is_renewed_and_the_old_one_ends_later(
    kdc: MitKdc, tickets: Tickets, clock: Clock, asked: list[object]
) -> None:
    wanted = explicit(kdc.principal("alice"), kdc.password("alice"))
    first = tickets.ready(wanted)
    clock.ahead = 86400 - 200
    second = tickets.ready(wanted)
    assert first != second
    assert len(asked) == 2
    assert exists(first)  # a context may be on its way to it
    assert tickets.ready(wanted) == second, "a realm whose clock is behind ours is not asked for one after the other"
    clock.ahead = 86400 + 10
    third = tickets.ready(wanted)
    assert third != second
    assert not exists(first)


@pytest.mark.realm
def test_tickets_that_have_ended_are_removed(kdc: MitKdc, tickets: Tickets, clock: Clock) -> None:
    old = tickets.ready(explicit(kdc.principal("alice"), kdc.password("alice")))
    clock.ahead = 10 * 86400
    tickets.ready(explicit(kdc.principal("helper"), kdc.password("helper")))
    assert not exists(old)
    assert repr(tickets) == "<Tickets: 1>"


@pytest.mark.realm
async def test_at_the_end_no_ticket_is_left(kdc: MitKdc) -> None:
    tickets = Tickets()
    loop = asyncio.get_running_loop()
    cache = await loop.run_in_executor(None, tickets.ready, explicit(kdc.principal("alice"), kdc.password("alice")))
    assert exists(cache)
    await tickets.aclose()
    assert not exists(cache)
    with pytest.raises(AuthFailed, match="closing"):
        await loop.run_in_executor(None, tickets.ready, explicit(kdc.principal("alice"), kdc.password("alice")))


@pytest.mark.realm
def test_a_ticket_that_comes_after_its_token_was_closed_is_destroyed(
    kdc: MitKdc, tickets: Tickets, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    alice = Holder()
    ask = module._first_ticket

    def late(credential: object) -> Any:
        made.append(ask(credential))
        tickets.forget(alice)
        return made[0]

    monkeypatch.setattr(module, "_first_ticket", late)
    with pytest.raises(AuthFailed, match="was closed"):
        tickets.ready(explicit(kdc.principal("alice"), kdc.password("alice"), holder=alice))
    assert not exists(spnego.KerberosCCache(made[0].name))


@pytest.mark.realm
def test_t26_a_password_that_the_kdc_refused_is_not_tried_again(kdc: MitKdc, asked: list[object]) -> None:
    refusals = Refusals()
    wrong = explicit(kdc.principal("alice"), "wrong")
    with pytest.raises(AuthFailed) as caught:
        Tickets(refusals).ready(wrong)
    assert caught.value.code == ErrorCode.SEC_E_LOGON_DENIED
    assert not caught.value.transient
    assert refusals.refused(wrong.fingerprint, KDC, None)
    with pytest.raises(AuthFailed, match="refused the credentials"):
        Tickets(refusals).ready(wrong)
    assert len(asked) == 1
    refusals.forget(wrong.fingerprint)
    with pytest.raises(AuthFailed, match="wrong"):
        Tickets(refusals).ready(wrong)
    assert len(asked) == 2


@pytest.mark.realm
def test_t26_a_keytab_that_was_exported_again_is_a_new_credential(kdc: MitKdc, tmp_path: Path, asked: list[object]) -> None:
    name = kdc.add_user("rotated", "first")
    file = tmp_path / "rotated.keytab"
    kdc.keytab("rotated").rename(file)
    kdc.run("kadmin.local", "-r", kdc.realm, "cpw", "-pw", "second", "rotated")
    credential = offer(spnego.KerberosKeytab(str(file), name))
    refusals = Refusals()
    tickets = Tickets(refusals)
    for _ in range(2):
        with pytest.raises(AuthFailed) as caught:
            tickets.ready(credential)
        assert caught.value.code == ErrorCode.SEC_E_LOGON_DENIED
    assert len(asked) == 1
    file.unlink()
    kdc.keytab("rotated").rename(file)
    assert exists(tickets.ready(credential))
    asyncio.run(tickets.aclose())


@pytest.mark.realm
def test_t04_the_principal_of_a_cache_is_compared_before_each_context(kdc: MitKdc, tickets: Tickets, tmp_path: Path) -> None:
    file = Path(kdc.ccache("alice", directory=tmp_path).removeprefix("FILE:"))
    wanted = offer(spnego.KerberosCCache(str(file)), principal=kdc.principal("alice"))
    assert tickets.ready(wanted) == spnego.KerberosCCache(f"FILE:{file}", kdc.principal("alice"))
    assert exists(tickets.ready(offer(spnego.KerberosCCache(f"FILE:{file}"), principal="alice")))
    Path(kdc.ccache("bob", directory=tmp_path).removeprefix("FILE:")).replace(file)
    for swapped in (wanted, offer(spnego.KerberosCCache(f"FILE:{file}", kdc.principal("alice")))):
        with pytest.raises(AuthFailed, match=r"bob@BITS\.TEST") as caught:
            tickets.ready(swapped)
        assert caught.value.code == ErrorCode.SEC_E_WRONG_PRINCIPAL
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.realm
def test_the_processs_default_cache_is_looked_up_and_named(
    kdc: MitKdc, tickets: Tickets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = kdc.ccache("bob", directory=tmp_path)
    monkeypatch.setenv("KRB5CCNAME", cache)
    for credential in (None, spnego.CredentialCache(), spnego.CredentialCache(kdc.principal("bob"))):
        assert tickets.ready(offer(credential)) == spnego.KerberosCCache(cache, kdc.principal("bob"))
    assert tickets.revision(offer(None)) != ""
