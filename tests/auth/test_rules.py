"""What may be shown to whom, whatever a job says: each rule, and that a refusal names it."""

import itertools
import struct
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import spnego

from bits_async.auth.policy import (
    AuthRules,
    AuthScheme,
    AuthTarget,
    AutologonLevel,
    Delegation,
    Grant,
    Hosts,
    ImplicitCredentials,
    Offers,
    Origin,
    Seat,
    choose_offers,
    implied,
    is_near,
    is_own_name,
    mechanisms,
    unseen,
    without_guarded,
)
from bits_async.auth.schemes import _never_ntlm_v1
from bits_async.errors import AuthFailed, InvalidArgument
from bits_async.identity.tokens import DelegationTarget, ImpersonationLevel
from tests.auth.conftest import a_token

SERVER, PROXY = AuthTarget.SERVER, AuthTarget.PROXY
NTLM, NEGOTIATE = AuthScheme.NTLM, AuthScheme.NEGOTIATE
FILES = Origin.of("https://files.corp.example/")
PLAIN = Origin.of("http://files.corp.example/")
PASSWORD = spnego.Password("alice@REALM", "hunter2-secret")


def offered(
    rules: AuthRules, origin: Origin = FILES, *schemes: AuthScheme, seat: Seat = Seat.ORIGIN, user: str | None = None, **token: object
) -> Offers:
    """What a job that asked for these schemes may show, as the process itself or as the account `user`."""
    grants = [Grant(seat.target, scheme, user, None if user is None else "pw", frozenset({origin})) for scheme in schemes or (NEGOTIATE,)]
    return choose_offers(seat, origin, grants, a_token(**token), rules)  # type: ignore[arg-type]


# -- whom a token's ticket-granting ticket is handed to

LISTED, LISTED_ANYWAY = "https://files.corp.example", "https://build.corp.example"
TRUSTED, ALWAYS, NEVER = Delegation.IF_TRUSTED, Delegation.ALWAYS, Delegation.NEVER


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        (LISTED, TRUSTED),
        (LISTED_ANYWAY, ALWAYS),
        ("https://other.corp.example", NEVER),
        ("https://corp.example", NEVER),
        ("https://x.files.corp.example", NEVER),
        (f"{LISTED}:8443", NEVER),
        ("http://files.corp.example", NEVER),
        ("http://files.corp.example:443", NEVER),
    ],
)
def test_t20_who_is_not_listed_is_never_handed_a_ticket_even_where_the_realm_trusts_him(origin: str, wanted: Delegation) -> None:
    listed = (DelegationTarget(LISTED), DelegationTarget(LISTED_ANYWAY, ok_as_delegate_only=False))
    for level, seat, user in itertools.product(list(ImpersonationLevel)[2:], Seat, (None, "bob")):
        offers = offered(AuthRules(), Origin.of(origin), seat=seat, user=user, network=PASSWORD, level=level, delegates=listed)
        may = level is ImpersonationLevel.DELEGATE and seat is Seat.ORIGIN and user is None
        handed = {offer.delegation for offer in offers}
        assert handed <= {wanted if may else NEVER}, (level, seat, user)
        assert handed or origin.startswith("http:")  # there a password is shown to nobody


# -- lists of hosts


@pytest.mark.parametrize(
    ("entry", "inside", "outside"),
    [
        ("files.corp.example", ["https://files.corp.example", "http://FILES.corp.example.:8080"], ["https://x.files.corp.example"]),
        (".corp.example", ["https://corp.example", "http://a.b.corp.example"], ["https://evilcorp.example", "https://corp.example.evil"]),
        ("*.corp.example", ["https://a.corp.example"], ["https://acorp.example"]),
        ("https://files.corp.example", ["https://files.corp.example:444"], ["http://files.corp.example"]),
        ("files.corp.example:8443", ["https://files.corp.example:8443"], ["https://files.corp.example"]),
        ("straße.example", ["http://xn--strae-oqa.example"], ["http://strasse.example"]),
        ("10.0.0.0/8", ["http://10.1.2.3"], ["http://11.1.2.3", "http://ten.example"]),
        ("::1", ["http://[::1]:8080"], ["http://[::2]"]),
        ("[fe80::1]:81", ["http://[fe80::1]:81"], ["http://[fe80::1]"]),
        ("127.0.0.1", ["http://127.0.0.1:5"], ["http://127.0.0.2"]),
        ("HTTP/files.corp.example", ["https://files.corp.example"], ["https://other.corp.example"]),
        ("HTTP/files.corp.example@CORP.EXAMPLE", ["http://files.corp.example"], []),
    ],
)
def test_an_entry_covers_exactly_these(entry: str, inside: list[str], outside: list[str]) -> None:
    hosts = Hosts([entry])
    assert all(Origin.of(url) in hosts for url in inside)
    assert not any(Origin.of(url) in hosts for url in outside)
    assert hosts == Hosts([entry])
    assert len({hosts, Hosts([entry])}) == 1


@pytest.mark.parametrize("entry", ["", "ftp://files", "files/path", "user@files", "files:0", "files:x", "10.0.0.1/8", "a b", "files?x", 7])
def test_what_is_no_entry_is_an_invalid_argument(entry: str) -> None:
    with pytest.raises(InvalidArgument):
        Hosts([entry])


def test_one_text_is_no_list() -> None:
    with pytest.raises(InvalidArgument, match="list"):
        Hosts("files.corp.example")


# -- NTLM


@pytest.mark.parametrize(
    "wrong",
    [
        {"autologon": "never"},  # as text it would forbid nothing
        {"implicit": "when_set"},
        {"implicit": None},
        {"ntlm_in_negotiate": "no"},
        {"ntlm": ["files.corp.example"]},
        {"ntlm_over_http": "files.corp.example"},
        {"ntlm_over_http": None},
        {"intranet": [".corp.example"]},
        {"allow": ()},
        {"basic_over_http": {PROXY}},
    ],
    ids=str,
)
def test_a_rule_of_another_kind_is_refused_by_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        AuthRules(**wrong)


def test_t22_ntlm_over_plain_http_goes_to_listed_servers_only() -> None:
    refused = offered(AuthRules(), PLAIN, NTLM, user=r"CORP\alice")
    assert refused == ()
    assert "ntlm_over_http" in refused.withheld[0]
    assert offered(AuthRules(ntlm_over_http=Hosts(["files.corp.example"])), PLAIN, NTLM, user=r"CORP\alice")
    assert offered(AuthRules(), FILES, NTLM, user=r"CORP\alice")
    assert offered(AuthRules(), PLAIN, NTLM, seat=Seat.PROXY, user=r"CORP\alice"), "a proxy is mostly reached without TLS"


def test_t22_negotiate_that_can_only_be_ntlm_is_ruled_like_ntlm() -> None:
    refused = offered(AuthRules(), PLAIN, NEGOTIATE, user=r"CORP\alice")
    assert refused == ()
    assert "ntlm_over_http" in refused.withheld[0]
    [kerberos] = offered(AuthRules(ntlm_in_negotiate=True), PLAIN, NEGOTIATE, user="alice@CORP.EXAMPLE")
    assert mechanisms(kerberos, AuthRules(ntlm_in_negotiate=True)) == ("kerberos",), "it never falls back where NTLM may not go"


def test_ntlm_can_be_allowed_to_some_hosts_only() -> None:
    rules = AuthRules(ntlm=Hosts([".corp.example"]))
    assert offered(rules, FILES, NTLM, user="alice")
    refused = offered(rules, Origin.of("https://elsewhere.example"), NTLM, user="alice")
    assert refused == ()
    assert "the rule ntlm " in refused.withheld[0]
    refused = offered(AuthRules(ntlm=Hosts()), FILES, NTLM, seat=Seat.PROXY, user="alice")
    assert refused == ()


def authenticate_message(response: int) -> bytes:
    return b"NTLMSSP\0" + struct.pack("<IHHIHHI", 3, 24, 24, 64, response, response, 88) + bytes(64)


def test_ntlm_version_1_never_leaves_whatever_the_machine_is_set_to() -> None:
    with pytest.raises(AuthFailed, match="NTLMv1") as caught:
        _never_ntlm_v1(authenticate_message(24))
    assert "LM_COMPAT_LEVEL" in str(caught.value.advice)
    for response in (0, 60, 300):
        assert _never_ntlm_v1(authenticate_message(response))


@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_a_real_context_that_is_set_to_ntlm_version_1_is_refused(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_COMPAT_LEVEL", level)
    client = spnego.client(r"CORP\alice", "pw", protocol="ntlm", options=spnego.NegotiateOptions.use_ntlm)
    challenge = b"NTLMSSP\0" + struct.pack("<IHHII8s8sHHI", 2, 0, 0, 48, 0xE2898215, b"c" * 8, bytes(8), 0, 0, 48)
    client.step()
    with pytest.raises(AuthFailed, match="NTLMv1"):
        _never_ntlm_v1(client.step(challenge) or b"")


# -- the token's own credentials


@pytest.mark.parametrize(
    ("level", "intranet", "shown"),
    [
        (None, [], True),
        (AutologonLevel.ANY_HOST, [], True),
        (AutologonLevel.INTRANET, [], False),
        (AutologonLevel.INTRANET, [".corp.example"], True),
        (AutologonLevel.INTRANET, [".other.example"], False),
        (AutologonLevel.NEVER, [".corp.example"], False),
    ],
)
def test_autologon_says_whom_a_tokens_own_credentials_are_shown_to(
    level: AutologonLevel | None, intranet: Iterable[str], shown: bool
) -> None:
    rules = AuthRules(autologon=level, intranet=Hosts(intranet))
    for token in ({}, {"network": PASSWORD}):
        found = offered(rules, **token)
        assert bool(found) is shown
        assert shown or "autologon" in found.withheld[0]
    assert offered(rules, FILES, NEGOTIATE, user="alice@REALM"), "what was given for the job is not the token's own"


def test_t22_a_name_without_a_dot_is_not_the_intranet() -> None:
    rules = AuthRules(autologon=AutologonLevel.INTRANET, intranet=Hosts([".corp.example"]))
    assert offered(rules, Origin.of("https://intranet")) == ()


def test_an_allow_list_names_hosts_and_service_principals() -> None:
    assert offered(AuthRules(allow=Hosts(["files.corp.example"])))
    refused = offered(AuthRules(allow=Hosts(["other.corp.example"])))
    assert refused == ()
    assert "the rule allow" in refused.withheld[0]
    by_principal = AuthRules(allow=Hosts(["HTTP/files.corp.example"]))
    assert offered(by_principal)
    refused = offered(by_principal, FILES, NTLM)
    assert refused == ()
    assert "service principal" in refused.withheld[0]


def test_t22_the_processs_own_credentials_go_to_loopback_and_addresses_only_when_listed() -> None:
    for host in ("localhost", "127.0.0.1", "10.1.2.3", "[::1]"):
        there = Origin.of(f"https://{host}")
        refused = offered(AuthRules(), there)
        assert refused == ()
        assert "the rule allow" in refused.withheld[0]
        assert offered(AuthRules(allow=Hosts([host.strip("[]")])), there)


@pytest.mark.parametrize(
    ("peer", "local", "near"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.9.9.9", "10.0.0.5", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "::ffff:10.0.0.5", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("10.0.0.5", "10.0.0.5", True),
        ("fe80::1%eth0", "fe80::1%eth0", True),
        ("", "", True),
        ("10.0.0.6", "10.0.0.5", False),
        ("2001:db8::1", "2001:db8::2", False),
    ],
)
def test_t22_a_peer_on_this_machine_is_told_by_its_address(peer: str, local: str, near: bool) -> None:
    assert is_near(peer, local) is near


def test_t22_a_far_name_that_leads_to_this_machine_gets_nothing_of_the_processs_own() -> None:
    kept = without_guarded(offered(AuthRules()), "127.0.0.1")
    assert kept == ()
    assert "127.0.0.1" in kept.withheld[0]
    for rules, more in ((AuthRules(allow=Hosts(["files.corp.example"])), {}), (AuthRules(), {"network": PASSWORD})):
        assert without_guarded(offered(rules, **more), "127.0.0.1"), "listed, or a credential that the caller built"
    assert without_guarded(offered(AuthRules(), FILES, NEGOTIATE, user="alice@REALM"), "127.0.0.1")


def test_t22_behind_a_proxy_the_processs_own_login_is_for_the_host_of_the_url_or_it_is_not_made() -> None:
    rules = AuthRules(ntlm_in_negotiate=True)
    own = unseen(offered(rules, FILES, NEGOTIATE, NTLM))
    assert [(offer.scheme, mechanisms(offer, rules)) for offer in own] == [(NEGOTIATE, ("kerberos",))]
    assert "through a proxy" in own.withheld[-1]
    for listed, more in ((replace(rules, allow=Hosts(["files.corp.example"])), {}), (rules, {"network": PASSWORD})):
        built = offered(listed, FILES, NEGOTIATE, NTLM, **more)
        assert unseen(built) == built, "listed, or a credential that the caller built"


@pytest.mark.parametrize(
    ("host", "machine", "own"),
    [
        ("box", "box", True),
        ("box.corp.example", "Box.corp.example", True),
        ("box", "box.corp.example", True),
        ("box.corp.example", "box", False),
        ("box.elsewhere.example", "box.corp.example", False),
        ("", "", False),
    ],
)
def test_t22_what_the_machine_calls_itself_is_itself(host: str, machine: str, own: bool) -> None:
    assert is_own_name(host, machine) is own


@pytest.mark.parametrize("when", list(ImplicitCredentials))
def test_use_lm_compat_says_when_a_tokens_own_credentials_answer(when: ImplicitCredentials) -> None:
    rules = AuthRules(implicit=when, intranet=Hosts([".corp.example"]))
    origins = {SERVER: frozenset({FILES}), PROXY: frozenset[Origin]()}
    added = implied(rules, [], origins)
    found = choose_offers(Seat.ORIGIN, FILES, added, a_token(PASSWORD), rules)
    assert [offer.scheme for offer in found] == ([] if when is ImplicitCredentials.WHEN_SET else [NEGOTIATE, NTLM])


def test_what_a_rule_adds_stays_in_the_intranet_and_yields_to_what_the_job_set() -> None:
    rules = AuthRules(implicit=ImplicitCredentials.ON_ANY_CHALLENGE)
    origins = {SERVER: frozenset({FILES}), PROXY: frozenset({PLAIN})}
    added = implied(rules, [], origins)
    refused = choose_offers(Seat.ORIGIN, FILES, added, a_token(PASSWORD), rules)
    assert refused == ()
    assert "intranet" in refused.withheld[0]
    given = Grant(SERVER, AuthScheme.BASIC, "alice", "pw", frozenset({FILES}))
    assert {grant.target for grant in implied(rules, [given], origins)} == {PROXY}


def test_consent_to_basic_over_http_is_for_a_target() -> None:
    with pytest.raises(InvalidArgument, match="frozenset"):
        AuthRules(basic_over_http=True)  # type: ignore[arg-type]
    assert AuthRules(basic_over_http=frozenset({PROXY})) != AuthRules(basic_over_http=frozenset({SERVER}))
