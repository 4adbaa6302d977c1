"""Lanes against Apache and Squid as they are installed: every scheme at both seats, logins counted in the servers' own logs."""

import ssl
from collections.abc import Callable
from typing import Any

import pytest
import spnego

from bits_async.auth.policy import AuthRules, AuthScheme, AuthTarget, Grant
from bits_async.auth.policy import Origin as Place
from bits_async.identity.tokens import Token
from bits_async.transport.lane import Lanes, Party
from bits_async.transport.tls import TlsSettings
from tests.realms import NTLM_DOMAIN, PASSWORDS
from tests.rules import PEERS
from tests.transport.wire import fetch

pytestmark = pytest.mark.realm

SCHEMES = {"basic": AuthScheme.BASIC, "digest": AuthScheme.DIGEST, "ntlm": AuthScheme.NTLM, "neg": AuthScheme.NEGOTIATE}


def kerberos(kdc: Any, name: str) -> Token:
    return Token.for_network(spnego.KerberosKeytab(str(kdc.keytab(name)), kdc.principal(name)))


def permission(target: AuthTarget, location: str, url: str) -> Grant:
    """alice's password, or for Kerberos the token's own credentials."""
    who = {"neg": None, "ntlm": f"{NTLM_DOMAIN}\\alice"}.get(location, "alice")
    return Grant(target, SCHEMES[location], who, None if who is None else PASSWORDS["alice"], frozenset({Place.of(url)}))


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("location", SCHEMES)
async def test_apache_is_asked_by_every_scheme_and_the_connection_is_used_again(
    kdc: Any, apache: Any, lanes: Lanes, party: Callable[..., Party], location: str, tls: bool
) -> None:
    url = apache.url(f"/{location}/big", tls=tls)
    trust = TlsSettings(ssl.create_default_context(cafile=str(apache.ca_file)))
    who = party(
        permission(AuthTarget.SERVER, location, url),
        token=kerberos(kdc, "alice"),
        tls=trust,
        rules=AuthRules(basic_over_http=frozenset(AuthTarget), ntlm_over_http=PEERS),
    )
    for _ in range(3):
        assert await fetch(lanes, who, url) == apache.data
    apache.hits(expect=3, target=f"/{location}/big", status=200)
    hits = apache.hits(target=f"/{location}/big")
    user = {"neg": "alice@BITS.TEST", "ntlm": f"{NTLM_DOMAIN}\\alice"}.get(location, "alice")
    assert [hit.user for hit in hits if hit.status == 200] == [user] * 3
    assert len([hit for hit in hits if hit.status == 401]) == (2 if location == "ntlm" else 1)
    assert len({hit.client_port for hit in hits}) == 1


@pytest.mark.parametrize("tls", [False, True], ids=["forwarded", "tunnel"])
@pytest.mark.parametrize("auth", ["basic", "digest", "ntlmfake", "negotiate"])
async def test_squid_is_asked_by_every_scheme(
    kdc: Any, apache: Any, squid_servers: Any, lanes: Lanes, party: Callable[..., Party], auth: str, tls: bool
) -> None:
    squid = squid_servers.of(auth)
    location = {"ntlmfake": "ntlm", "negotiate": "neg"}.get(auth, auth)
    url = apache.url("/pub/big", tls=tls)
    who = party(
        permission(AuthTarget.PROXY, location, squid.url),
        token=kerberos(kdc, "helper"),
        tls=TlsSettings(ssl.create_default_context(cafile=str(apache.ca_file))),
        rules=AuthRules(basic_over_http=frozenset(AuthTarget), ntlm_over_http=PEERS),
        via=squid.url,
    )
    for _ in range(3):
        assert await fetch(lanes, who, url) == apache.data
    await lanes.aclose()
    passed = squid.hits(expect=1 if tls else 3, status=200)
    assert len(passed) == (1 if tls else 3)
    if auth != "ntlmfake":  # which logs a mangled name
        assert {hit.user for hit in passed} == {"helper@BITS.TEST" if auth == "negotiate" else "alice"}


@pytest.mark.parametrize("tls", [False, True], ids=["forwarded", "tunnel"])
async def test_ntlm_at_apache_through_squid_with_kerberos_at_squid(
    kdc: Any, apache: Any, squid_servers: Any, lanes: Lanes, party: Callable[..., Party], tls: bool
) -> None:
    """Squid pins the connection to the origin and promises it (Proxy-Support), so NTLM works through it on plain http too."""
    squid = squid_servers.of("negotiate")
    url = apache.url("/ntlm/big", tls=tls)
    who = party(
        permission(AuthTarget.SERVER, "ntlm", url),
        permission(AuthTarget.PROXY, "neg", squid.url),
        token=kerberos(kdc, "helper"),
        tls=TlsSettings(ssl.create_default_context(cafile=str(apache.ca_file))),
        via=squid.url,
    )
    for _ in range(2):
        assert await fetch(lanes, who, url) == apache.data
    apache.hits(expect=2, target="/ntlm/big", status=200)
    hits = apache.hits(target="/ntlm/big")
    assert [hit.user for hit in hits if hit.status == 200] == [f"{NTLM_DOMAIN}\\alice"] * 2
