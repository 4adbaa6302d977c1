"""Fixtures of the transport tests: a party that trusts the test's own authority, lanes that are closed, accounts for NTLM."""

import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme

from bits_async.auth.policy import Grant
from bits_async.identity.tokens import Token
from bits_async.transport.lane import Lanes, Party
from bits_async.transport.proxies import ProxySettings
from bits_async.transport.timeouts import Timeouts
from bits_async.transport.tls import TlsSettings
from tests.rules import NTLM_OVER_HTTP
from tests.transport.wire import ALICE, BOB, Security, Server


@pytest.fixture
def security() -> Iterator[Security]:
    security = Security()
    yield security
    security.pool.shutdown()


@pytest.fixture
def party(security: Security, trust: ssl.SSLContext) -> Callable[..., Party]:
    """Makes parties that differ in what the test names."""
    usual = Party(
        token=Token.for_process(),
        grants=(),
        proxy=ProxySettings.no_proxy(),
        tls=TlsSettings(trust),
        rules=NTLM_OVER_HTTP,
        timeouts=Timeouts(connect=30, response=30, idle=30, auth=30),
        security=security,  # type: ignore[arg-type]
    )

    def make(*grants: Grant, via: Server | str | None = None, **others: Any) -> Party:
        proxy = usual.proxy if via is None else ProxySettings.override(via if isinstance(via, str) else via.base)
        return replace(usual, grants=grants, proxy=proxy, **others)

    return make


@pytest.fixture
async def lanes() -> AsyncIterator[Lanes]:
    made = Lanes()
    yield made
    await made.aclose()


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server_tls(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def trust(ca: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


@pytest.fixture(autouse=True)
def accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom pyspnego's NTLM acceptor knows."""
    file = tmp_path / "accounts"
    file.write_text("".join(f"{name.replace(chr(92), ':')}:{password}\n" for name, password in (ALICE, BOB)))
    monkeypatch.setenv("NTLM_USER_FILE", str(file))
