"""Who may see which credentials: origins, levels, the process's own, and what is told about it."""

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import spnego
from hypothesis import given
from hypothesis import strategies as st

from bits_async.auth.policy import (
    MAX_PASSWORD,
    MAX_USER_NAME,
    AuthCredentials,
    AuthRules,
    AuthScheme,
    AuthTarget,
    CredentialKind,
    Grant,
    Offer,
    Origin,
    Refusals,
    Seat,
    account_fingerprint,
    cache_type,
    choose_offers,
    credential_fingerprint,
    kind_of,
    mechanisms,
)
from bits_async.errors import ErrorCode, InvalidArgument, TokenRequired
from bits_async.identity.tokens import ImpersonationLevel, Token
from tests.auth.conftest import a_token

SERVER, PROXY = AuthTarget.SERVER, AuthTarget.PROXY
BASIC, DIGEST, NTLM, NEGOTIATE = AuthScheme.BASIC, AuthScheme.DIGEST, AuthScheme.NTLM, AuthScheme.NEGOTIATE
FILES = Origin.of("https://files.corp.example/")
EVIL = Origin.of("https://files.corp.example.evil.example/")
PASSWORD = spnego.Password("alice@REALM", "hunter2-secret")
KEYTAB = spnego.KerberosKeytab("/etc/alice.keytab", "alice@REALM")
CACHE = spnego.KerberosCCache("FILE:/tmp/alice", "alice@REALM")
HASH = spnego.NTLMHash("alice", nt_hash="8ADB9B997580D69E69CAA2BBB68F4697")


def grant(scheme: AuthScheme, user: str | None = "alice", password: str | None = "hunter2-secret", **more: object) -> Grant:
    values = {"target": SERVER, "origins": frozenset({FILES}), **more}
    return Grant(scheme=scheme, user_name=user, password=password, **values)  # type: ignore[arg-type]


def implicit(scheme: AuthScheme = NEGOTIATE, **more: object) -> Grant:
    return grant(scheme, None, None, **more)


# -- origins


@pytest.mark.parametrize(
    ("url", "text", "port"),
    [
        ("HTTP://Files.Corp.EXAMPLE/a?b", "http://files.corp.example", 80),
        ("https://files.corp.example:443", "https://files.corp.example", 443),
        ("https://files.corp.example.:8443/", "https://files.corp.example:8443", 8443),
        ("http://user:pw@host:80/", "http://host", 80),
        ("http://straße.example/", "http://xn--strae-oqa.example", 80),
        ("http://[2001:DB8::0:1]:8080/", "http://[2001:db8::1]:8080", 8080),
        ("http://[FE80::1%25eth0]/", "http://[fe80::1%25eth0]", 80),
    ],
)
def test_an_origin_is_scheme_host_and_port_normalised(url: str, text: str, port: int) -> None:
    origin = Origin.of(url)
    assert (str(origin), origin.port) == (text, port)
    assert Origin.of(str(origin)) == origin


@pytest.mark.parametrize("url", ["", "files", "//host/", "ftp://host/", "http://", "http:///path", "http://./", "http://h:x/"])
def test_what_names_no_host_is_an_invalid_argument(url: str) -> None:
    with pytest.raises(InvalidArgument):
        Origin.of(url)


@pytest.mark.parametrize("authority", ["h:0", "h:99999", "a b", "a\tb", "a\r\nb", "a\0b", "a\\b", "a%2eb", "xn--\udcff"])
def test_a_host_that_readers_could_understand_differently_is_an_invalid_argument(authority: str) -> None:
    with pytest.raises(InvalidArgument):
        Origin.of(f"http://{authority}/")


def test_t19_hosts_that_only_look_alike_are_other_origins() -> None:
    assert Origin.of("http://straße.example") != Origin.of("http://strasse.example")
    assert Origin.of("http://files.corp.example") != Origin.of("https://files.corp.example")
    assert Origin.of("http://files.corp.example:81") != Origin.of("http://files.corp.example")


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "10.0.0.7"])
def test_loopback_and_addresses_in_any_spelling_need_listing(host: str) -> None:
    assert Origin.of(f"http://{host}/").needs_listing
    assert Origin.of(f"http://{host}./").needs_listing


def test_addresses_of_version_6_need_listing_and_names_do_not() -> None:
    assert Origin.of("http://[::1]/").needs_listing
    assert Origin.of("http://[::ffff:127.0.0.1]/").needs_listing
    assert not FILES.needs_listing
    assert not Origin.of("http://intranet").needs_listing


# -- AuthCredentials


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((SERVER, NTLM, "alice", None), ErrorCode.E_INVALIDARG),
        ((SERVER, NTLM, None, "pw"), ErrorCode.E_INVALIDARG),
        ((SERVER, BASIC, None, None), ErrorCode.E_INVALIDARG),
        ((PROXY, DIGEST, None, None), ErrorCode.E_INVALIDARG),
        ((SERVER, NTLM, "", "pw"), ErrorCode.E_INVALIDARG),
        ((SERVER, NTLM, "a\nb", "pw"), ErrorCode.E_INVALIDARG),
        ((SERVER, BASIC, "a:b", "pw"), ErrorCode.E_INVALIDARG),
        ((SERVER, BASIC, "a", "p\nw"), ErrorCode.E_INVALIDARG),
        ((SERVER, NTLM, "a" * (MAX_USER_NAME + 1), "pw"), ErrorCode.BG_E_USERNAME_TOO_LARGE),
        ((SERVER, NTLM, "a", "p" * (MAX_PASSWORD + 1)), ErrorCode.BG_E_PASSWORD_TOO_LARGE),
        ((1, NTLM, "a", "p"), ErrorCode.BG_E_INVALID_AUTH_TARGET),
        ((SERVER, 3, "a", "p"), ErrorCode.BG_E_INVALID_AUTH_SCHEME),
    ],
)
def test_credentials_that_cannot_work_are_refused_at_once(arguments: tuple[object, ...], code: ErrorCode) -> None:
    with pytest.raises(InvalidArgument) as caught:
        AuthCredentials(*arguments)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_credentials_are_values_that_show_no_password() -> None:
    given = AuthCredentials(PROXY, NEGOTIATE, r"CORP\alice", "hunter2-secret")
    assert given == AuthCredentials(PROXY, NEGOTIATE, r"CORP\alice", "hunter2-secret")
    assert pickle.loads(pickle.dumps(given)) == given
    assert AuthCredentials(SERVER, NTLM, None, None).password is None
    offer = choose_offers(Seat.ORIGIN, FILES, [grant(BASIC)], a_token())[0]
    for value in (given, grant(BASIC), offer, choose_offers(Seat.ORIGIN, FILES, [implicit()], a_token(PASSWORD))[0]):
        assert "hunter2" not in repr(value)


# -- choosing


def schemes(offers: tuple[Offer, ...]) -> list[AuthScheme]:
    return [offer.scheme for offer in offers]


def test_the_strongest_scheme_comes_first() -> None:
    grants = [grant(BASIC), grant(NTLM), grant(NEGOTIATE), grant(DIGEST)]
    assert schemes(choose_offers(Seat.ORIGIN, FILES, grants, a_token())) == [NEGOTIATE, NTLM, DIGEST, BASIC]


def test_t19_a_grant_counts_for_its_origins_and_its_target_only() -> None:
    assert schemes(choose_offers(Seat.ORIGIN, FILES, [grant(BASIC)], a_token())) == [BASIC]
    for origin in (EVIL, replace(FILES, scheme="http", port=80), replace(FILES, port=8443)):
        refused = choose_offers(Seat.ORIGIN, origin, [grant(BASIC), implicit()], a_token(PASSWORD))
        assert refused == ()
        assert all("other hosts" in reason for reason in refused.withheld)
    assert choose_offers(Seat.PROXY, FILES, [grant(BASIC)], a_token()) == ()
    assert choose_offers(Seat.PROXY, FILES, [grant(BASIC)], a_token()).withheld == ()
    assert schemes(choose_offers(Seat.PROXY, FILES, [grant(BASIC, target=PROXY)], a_token())) == [BASIC]


def test_nothing_is_shown_without_a_grant() -> None:
    assert choose_offers(Seat.ORIGIN, FILES, [], a_token(PASSWORD)) == ()


@pytest.mark.parametrize("level", [ImpersonationLevel.ANONYMOUS, ImpersonationLevel.IDENTIFY])
def test_a_token_below_impersonate_shows_nothing(level: ImpersonationLevel) -> None:
    token = a_token(PASSWORD, level=level)
    refused = choose_offers(Seat.ORIGIN, FILES, [grant(BASIC), implicit()], token)
    assert refused == ()
    assert level.name in refused.withheld[0]


def test_t22_the_processs_own_credentials_never_go_to_loopback_or_addresses() -> None:
    token = a_token()
    for url in ("http://localhost:8080", "http://127.0.0.1/", "http://[::1]/", "https://10.1.2.3/"):
        there = Origin.of(url)
        refused = choose_offers(Seat.ORIGIN, there, [implicit(origins=frozenset({there}))], token)
        assert refused == ()
        assert "loopback and IP addresses" in refused.withheld[0]
    [offer] = choose_offers(Seat.ORIGIN, FILES, [implicit()], token)
    assert offer.implicit
    assert offer.credential is None
    assert offer.process


def test_t22_a_token_built_from_a_credential_is_the_permission_for_loopback() -> None:
    there = Origin.of("http://127.0.0.1:8080")
    [offer] = choose_offers(Seat.ORIGIN, there, [implicit(origins=frozenset({there}))], a_token(PASSWORD, principal="alice@REALM"))
    assert offer.credential is PASSWORD
    assert offer.principal == offer.who == "alice@REALM"


def test_t22_what_an_access_token_is_logged_on_with_goes_where_the_processs_own_would() -> None:
    lent = spnego.CredentialCache("LAB\\alice")
    token = Token._make(a_token(is_process=False).local, network=lent, logged_on=True)
    [offer] = choose_offers(Seat.ORIGIN, FILES, [implicit()], token)
    assert (offer.credential, offer.guarded, offer.process) == (lent, True, False)
    there = Origin.of("http://localhost:8080")
    refused = choose_offers(Seat.ORIGIN, there, [implicit(origins=frozenset({there}))], token)
    assert refused == ()
    assert "the token's credentials are not sent to loopback" in refused.withheld[0]
    assert choose_offers(Seat.ORIGIN, FILES, [implicit()], a_token(lent, is_process=False)) == ()  # no thread of it is logged on


def test_t22_naming_what_the_process_is_logged_on_with_is_no_permission_for_loopback() -> None:
    """A token built from a credential that says "whatever this program is logged on with" holds the process's own: on Windows NTLM too."""
    there = Origin.of("http://127.0.0.1:8080")
    for named in (spnego.CredentialCache(), spnego.CredentialCache("LAB\\alice")):
        refused = choose_offers(Seat.ORIGIN, there, [implicit(origins=frozenset({there}))], a_token(named))
        assert refused == ()
        assert "the process's own credentials are not sent to loopback" in refused.withheld[0]
        [offer] = choose_offers(Seat.ORIGIN, FILES, [implicit()], a_token(named))
        assert offer.guarded, "nor to this machine by another name"


def test_implicit_credentials_are_those_of_the_token_or_nobodys() -> None:
    refused = choose_offers(Seat.ORIGIN, FILES, [implicit()], a_token(is_process=False))
    assert refused == ()
    assert "no network credentials" in refused.withheld[0]
    assert choose_offers(Seat.ORIGIN, FILES, [implicit(BASIC)], a_token(PASSWORD)) == ()
    assert schemes(choose_offers(Seat.ORIGIN, FILES, [implicit(NTLM)], a_token(PASSWORD))) == [NTLM]
    assert choose_offers(Seat.ORIGIN, FILES, [implicit(NTLM)], a_token(KEYTAB)) == ()
    assert choose_offers(Seat.ORIGIN, FILES, [implicit(NTLM)], a_token(CACHE)) == ()


def test_t04_another_users_token_may_name_file_caches_only() -> None:
    for name in ("KEYRING:session:x", "KCM:1000", "API:x", "DIR:/tmp/x", "MEMORY:guess"):
        cache = spnego.KerberosCCache(name, "alice@REALM")
        refused = choose_offers(Seat.ORIGIN, FILES, [implicit()], a_token(cache, is_process=False))
        assert refused == ()
        assert "FILE:" in refused.withheld[0]
        assert len(choose_offers(Seat.ORIGIN, FILES, [implicit()], a_token(cache))) == 1
    assert len(choose_offers(Seat.ORIGIN, FILES, [implicit()], a_token(CACHE, is_process=False))) == 1
    ambient = a_token(spnego.CredentialCache("alice"), is_process=False)
    assert choose_offers(Seat.ORIGIN, FILES, [implicit()], ambient) == ()


def test_a_closed_token_is_required_again() -> None:
    token: Token = a_token(PASSWORD)
    token.close()
    with pytest.raises(TokenRequired):
        choose_offers(Seat.ORIGIN, FILES, [implicit()], token)


# -- what the schemes mean


@pytest.mark.parametrize(
    ("offer", "plain", "relaxed"),
    [
        (Offer(NEGOTIATE, user_name="alice@REALM", password="x"), ["kerberos"], ["kerberos", "ntlm"]),
        (Offer(NEGOTIATE, user_name=r"CORP\alice", password="x"), ["ntlm"], ["ntlm"]),
        (Offer(NEGOTIATE, user_name=r"CORP\alice@x", password="x"), ["ntlm"], ["ntlm"]),
        (Offer(NEGOTIATE, user_name="alice", password="x"), ["ntlm"], ["ntlm"]),
        (Offer(NEGOTIATE, user_name="alice@", password="x"), ["ntlm"], ["ntlm"]),
        (Offer(NTLM, user_name="alice@REALM", password="x"), ["ntlm"], ["ntlm"]),
        (Offer(NEGOTIATE, KEYTAB, implicit=True), ["kerberos"], ["kerberos"]),
        (Offer(NEGOTIATE, CACHE, implicit=True), ["kerberos"], ["kerberos"]),
        (Offer(NEGOTIATE, HASH, implicit=True), ["ntlm"], ["ntlm"]),
        (Offer(NEGOTIATE, PASSWORD, implicit=True), ["kerberos"], ["kerberos", "ntlm"]),
        (Offer(NEGOTIATE, None, implicit=True), ["kerberos"], ["kerberos", "ntlm"]),
        (Offer(NEGOTIATE, spnego.CredentialCache(), implicit=True), ["kerberos"], ["kerberos", "ntlm"]),
    ],
)
def test_kerberos_where_kerberos_is_meant_and_ntlm_only_by_rule_or_name(offer: Offer, plain: list[str], relaxed: list[str]) -> None:
    assert list(mechanisms(offer, AuthRules())) == plain
    assert list(mechanisms(offer, AuthRules(ntlm_in_negotiate=True))) == relaxed


def test_credentials_are_told_apart_by_what_they_have() -> None:
    kinds = {
        CredentialKind.PASSWORD: PASSWORD,
        CredentialKind.HASH: HASH,
        CredentialKind.CACHE: CACHE,
        CredentialKind.KEYTAB: KEYTAB,
        CredentialKind.AMBIENT: spnego.CredentialCache("alice"),
    }
    assert {kind: kind_of(credential) for kind, credential in kinds.items()} == {kind: kind for kind in kinds}
    assert kind_of(None) is CredentialKind.AMBIENT
    for name, expected in (("/tmp/x", "FILE"), ("file:/tmp/x", "FILE"), ("KCM:", "KCM"), ("C:", "C"), ("./a:b", "FILE")):
        assert cache_type(spnego.KerberosCCache(name)) == expected


def test_the_module_loads_neither_pyspnego_nor_anything_that_waits() -> None:
    banned = {"spnego", "asyncio", "aiohttp", "sqlite3", "cryptography", "gssapi", "krb5"}
    code = f"import bits_async.auth.policy, bits_async.auth.challenge, sys; print(sorted({banned} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# -- fingerprints


def test_t07_a_fingerprint_is_keyed_and_differs_by_secret() -> None:
    key = b"k" * 32
    known = credential_fingerprint(PASSWORD, key)
    assert known == credential_fingerprint(spnego.Password("alice@REALM", "hunter2-secret"), key)
    assert known != credential_fingerprint(spnego.Password("alice@REALM", "guess"), key)
    assert known != credential_fingerprint(PASSWORD, b"l" * 32)
    assert "hunter2" not in known
    everything = [PASSWORD, KEYTAB, CACHE, HASH, spnego.CredentialCache(), grant(BASIC), implicit(), None]
    assert len({credential_fingerprint(credential, key) for credential in everything}) == len(everything)
    with pytest.raises(TypeError):
        credential_fingerprint(object(), key)


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_fingerprints_do_not_run_names_and_passwords_together(one: tuple[str, str], other: tuple[str, str]) -> None:
    same = credential_fingerprint(spnego.Password(*one), b"key") == credential_fingerprint(spnego.Password(*other), b"key")
    assert same == (one == other)


def test_one_account_has_one_fingerprint_in_all_schemes() -> None:
    offers = choose_offers(Seat.ORIGIN, FILES, [grant(BASIC), grant(NTLM), grant(DIGEST)], a_token())
    assert {offer.fingerprint for offer in offers} == {account_fingerprint("alice", "hunter2-secret")}
    [own] = choose_offers(Seat.ORIGIN, FILES, [implicit()], a_token(PASSWORD))
    assert own.fingerprint == account_fingerprint("alice@REALM", "hunter2-secret")


# -- refusals


def test_t26_a_refusal_counts_for_its_credential_realm_and_seat_until_it_is_replaced() -> None:
    refusals = Refusals()
    refusals.add("f1", "realm", Seat.ORIGIN)
    assert refusals.refused("f1", "realm", Seat.ORIGIN)
    assert not refusals.refused("f2", "realm", Seat.ORIGIN)
    assert not refusals.refused("f1", "other", Seat.ORIGIN)
    assert not refusals.refused("f1", "realm", Seat.PROXY)
    assert not refusals.refused("f1", "realm", Seat.ORIGIN, "the keytab was exported again")
    refusals.forget("f2")
    assert refusals.refused("f1", "realm", Seat.ORIGIN)
    refusals.forget("f1")
    assert not refusals.refused("f1", "realm", Seat.ORIGIN)


def test_refusals_do_not_grow_without_end() -> None:
    refusals = Refusals()
    for number in range(Refusals.LIMIT + 10):
        refusals.add("f", str(number), Seat.PROXY)
    assert not refusals.refused("f", "9", Seat.PROXY)
    assert refusals.refused("f", "10", Seat.PROXY)
    refusals.forget()
    assert not refusals.refused("f", "10", Seat.PROXY)


def test_a_seat_knows_its_headers() -> None:
    assert (Seat.ORIGIN.status, Seat.ORIGIN.challenge_header, Seat.ORIGIN.answer_header) == (
        401,
        "WWW-Authenticate",
        "Authorization",
    )
    assert (Seat.PROXY.status, Seat.PROXY.challenge_header, Seat.PROXY.answer_header) == (
        407,
        "Proxy-Authenticate",
        "Proxy-Authorization",
    )
    assert (Seat.ORIGIN.info_header, Seat.PROXY.info_header) == ("Authentication-Info", "Proxy-Authentication-Info")
    assert (Seat.ORIGIN.target, Seat.PROXY.target) == (SERVER, PROXY)
