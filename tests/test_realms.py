"""The servers of the realm do what the tests that use them rely on: seen with http.client and pyspnego alone."""

import base64
import http.client
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import gssapi
import pytest
import spnego

from tests.peers import Authority
from tests.realms import PASSWORDS, SILENT_REALM, Apache, MitKdc, Nginx, Squid

pytestmark = pytest.mark.realm


@contextmanager
def connection(url: str, authority: Authority | None = None) -> Iterator[http.client.HTTPConnection]:
    port = urlsplit(url).port
    if authority is None:
        opened = http.client.HTTPConnection("localhost", port, timeout=60)
    else:
        opened = http.client.HTTPSConnection("localhost", port, timeout=60, context=authority.client())
    yield opened
    opened.close()


def get(opened: http.client.HTTPConnection, target: str, **headers: str) -> tuple[int, bytes, http.client.HTTPResponse]:
    opened.request("GET", target, headers={"Range": "bytes=10-19"} | {key.replace("_", "-"): value for key, value in headers.items()})
    answer = opened.getresponse()
    return answer.status, answer.read(), answer


def negotiate(kdc: MitKdc, name: str) -> str:
    credential = spnego.KerberosCCache(kdc.ccache(name), kdc.principal(name))
    context = spnego.client(credential, hostname="localhost", service="HTTP", protocol="kerberos")
    return "Negotiate " + base64.b64encode(context.step() or b"").decode()


def basic(name: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{PASSWORDS[name]}".encode()).decode()


def ntlm_get(opened: http.client.HTTPConnection, target: str, password: str, **seat: str) -> int:
    """The legs of an NTLM login on one connection; the last status."""
    ask, tell = seat.get("ask", "WWW-Authenticate"), seat.get("tell", "Authorization")
    context = spnego.client(r"BITS\alice", password, protocol="ntlm", hostname="localhost", service="HTTP")
    token: bytes | None = None
    while True:
        token = context.step(token)
        status, _, answer = get(opened, target, **{tell: "NTLM " + base64.b64encode(token or b"").decode()})
        _, _, text = (answer.getheader(ask) or "").partition(" ")
        if status not in (401, 407) or not text or context.complete:
            return status
        token = base64.b64decode(text)


def test_the_kdc_gives_tickets_for_a_keytab_and_for_a_password(kdc: MitKdc) -> None:
    assert kdc.keytab("alice").stat().st_mode & 0o777 == 0o600
    name = gssapi.Name(kdc.principal("alice"), gssapi.NameType.kerberos_principal)
    credentials = gssapi.Credentials(name=name, usage="initiate", store={"ccache": kdc.ccache("alice")})
    assert credentials.lifetime > 0
    spnego.client("helper@BITS.TEST", kdc.password("helper"), hostname="localhost", service="HTTP", protocol="kerberos").step()


def test_each_user_of_a_test_s_own_is_a_principal(kdc: MitKdc) -> None:
    principal = kdc.add_user("carol", "carols-password")
    spnego.client(principal, "carols-password", hostname="localhost", service="HTTP", protocol="kerberos").step()


def test_apache_answers_ranges_in_the_clear_and_over_tls(apache: Apache, authority: Authority) -> None:
    for url, trust in ((apache.url("/pub/big"), None), (apache.url("/pub/big", tls=True), authority)):
        with connection(url, trust) as opened:
            assert get(opened, "/pub/big")[:2] == (206, apache.data[10:20])
    first, second = apache.hits(expect=2, target="/pub/big", range="bytes=10-19", status=206)
    assert (first.server_port, second.server_port) == (apache.port, apache.tls_port)


def test_apache_s_certificate_is_trusted_by_its_authority_alone(apache: Apache) -> None:
    opened = http.client.HTTPSConnection("localhost", apache.tls_port, timeout=60, context=ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        opened.connect()
    opened.close()


def test_apache_logs_the_kerberos_principal(apache: Apache, kdc: MitKdc) -> None:
    with connection(apache.url()) as opened:
        assert get(opened, "/neg/big")[0] == 401
        assert get(opened, "/neg/big", Authorization=negotiate(kdc, "alice"))[:2] == (206, apache.data[10:20])
    hit = apache.hits(expect=1, user="alice@BITS.TEST")[0]
    assert (hit.status, hit.range, hit.keepalive) == (206, "bytes=10-19", 1)


def test_apache_authenticates_the_connection_by_ntlm(apache: Apache) -> None:
    with connection(apache.url()) as opened:
        assert ntlm_get(opened, "/ntlm/big", PASSWORDS["alice"]) == 206
        assert get(opened, "/ntlm/big")[0] == 206, "the connection is alice's now"
    with connection(apache.url()) as opened:
        assert ntlm_get(opened, "/ntlm/big", "wrong") == 401
    hits = apache.hits(expect=2, user=r"BITS\alice", status=206)
    assert len({hit.client_port for hit in hits}) == 1


def test_apache_takes_basic_and_refuses_a_wrong_password(apache: Apache) -> None:
    with connection(apache.url()) as opened:
        assert get(opened, "/basic/big", Authorization=basic("alice"))[0] == 206
        assert get(opened, "/basic/big", Authorization="Basic YWxpY2U6d3Jvbmc=")[0] == 401
    assert apache.hits(expect=1, user="alice", status=206)


def test_apache_and_squid_ask_for_digest_with_qop(apache: Apache, squid_digest: Squid) -> None:
    with connection(apache.url()) as opened:
        assert 'qop="auth"' in (get(opened, "/digest/big")[2].getheader("WWW-Authenticate") or "")
    with connection(squid_digest.url) as opened:
        status, _, answer = get(opened, apache.url())
        assert status == 407
        assert 'qop="auth"' in (answer.getheader("Proxy-Authenticate") or "")


def test_a_slow_path_is_slow_and_asks_for_the_same_login(apache: Apache) -> None:
    with connection(apache.url()) as opened:
        assert get(opened, "/slow/neg/big")[0] == 401
        started = time.monotonic()
        opened.request("GET", "/slow/pub/big", headers={"Range": "bytes=0-1048575"})
        assert opened.getresponse().read() == apache.data[: 1 << 20]
        assert time.monotonic() - started > 0.5


def test_squid_logs_the_kerberos_principal_for_requests_and_tunnels(
    apache: Apache, squid_negotiate: Squid, kdc: MitKdc, authority: Authority
) -> None:
    with connection(squid_negotiate.url) as opened:
        headers = {"Proxy_Authorization": negotiate(kdc, "helper"), "Authorization": negotiate(kdc, "alice")}
        assert get(opened, apache.url("/neg/big"), **headers)[:2] == (206, apache.data[10:20])
    assert squid_negotiate.hits(expect=1, user="helper@BITS.TEST", method="GET", status=206)
    assert apache.hits(expect=1, user="alice@BITS.TEST")

    tunnel = http.client.HTTPSConnection("localhost", squid_negotiate.port, timeout=60, context=authority.client())
    tunnel.set_tunnel("localhost", apache.tls_port, {"Proxy-Authorization": negotiate(kdc, "helper")})
    assert get(tunnel, "/pub/big")[0] == 206
    tunnel.close()
    assert squid_negotiate.hits(expect=1, user="helper@BITS.TEST", method="CONNECT", status=200)


def test_squid_takes_basic_and_refuses_others(apache: Apache, squid_basic: Squid) -> None:
    with connection(squid_basic.url) as opened:
        assert get(opened, apache.url())[0] == 407
        assert get(opened, apache.url(), Proxy_Authorization=basic("helper"))[0] == 206
    assert squid_basic.hits(expect=1, user="helper", status=206)


def test_squid_pins_the_origin_s_ntlm_to_one_connection_and_says_so(apache: Apache, squid_basic: Squid) -> None:
    with connection(squid_basic.url) as opened:
        headers: dict[str, Any] = {"Proxy_Authorization": basic("helper"), "Authorization": "NTLM TlRMTVNTUAABAAAA"}
        answer = get(opened, apache.url("/ntlm/big"), **headers)[2]
        assert answer.getheader("Proxy-Support") == "Session-Based-Authentication"


def test_squid_shakes_hands_in_the_shape_of_ntlm(apache: Apache, squid_ntlmfake: Squid) -> None:
    with connection(squid_ntlmfake.url) as opened:
        seat = {"ask": "Proxy-Authenticate", "tell": "Proxy-Authorization"}
        assert ntlm_get(opened, apache.url(), "anything", **seat) == 206


def test_the_log_waits_for_its_lines_and_says_what_it_has_when_they_do_not_come(apache: Apache) -> None:
    with connection(apache.url()) as opened:
        get(opened, "/pub/big")
    with pytest.raises(TimeoutError, match="/pub/big"):
        apache.hits(expect=100, deadline=0.2, target="/pub/big")  # a line of the test before may still come


def test_a_server_whose_port_was_taken_starts_on_another(kdc: MitKdc, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import realms

    ports: list[Callable[[], int]] = [lambda: kdc.port]
    honest = realms.free_port
    monkeypatch.setattr(realms, "free_port", lambda: ports.pop()() if ports else honest())
    with Squid("basic") as server:
        assert server.port != kdc.port


def test_the_silent_kdc_has_a_realm(kdc: MitKdc) -> None:
    assert SILENT_REALM in kdc.krb5_conf.read_text()


def test_nginx_serves_a_file_in_every_way_that_its_path_begins_with(nginx: Nginx, authority: Authority) -> None:
    (nginx.root / "some").write_bytes(b"s" * 1000)
    (nginx.root / "some.gz").write_bytes(b"z" * 100)

    def ask(way: str, method: str = "GET") -> tuple[int, int, set[str]]:
        with connection(nginx.url("")) as opened:
            opened.request(method, f"/{way}/some", headers={"Range": "bytes=10-19", "Accept-Encoding": "identity"})
            found = opened.getresponse()
            body = found.read()
            return found.status, len(body), {"ETag", "Last-Modified", "Content-Length", "Content-Encoding"} & set(found.headers)

    both = {"ETag", "Last-Modified"}
    assert ask("pub") == ask("slow") == ask("getonly") == (206, 10, both | {"Content-Length"})
    assert ask("dated") == (206, 10, {"Last-Modified", "Content-Length"})
    assert ask("unpinned") == (206, 10, {"Content-Length"})
    assert ask("whole") == (200, 1000, both | {"Content-Length"})
    assert ask("chunked") == (200, 1000, set())
    assert ask("packed")[2] == both | {"Content-Length", "Content-Encoding"}
    assert ask("getonly", "HEAD")[0] == 405
    with connection(nginx.url("", tls=True), authority) as opened:
        assert get(opened, "/pub/some")[0] == 206
    (hit,) = nginx.hits(expect=1, server_port=nginx.tls_port)
    assert (hit.status, hit.sent, hit.range) == (206, 10, "bytes=10-19")
