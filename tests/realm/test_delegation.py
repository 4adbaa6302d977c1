"""T20: a ticket-granting ticket goes to whom the token's maker listed, over verified TLS, and to nobody else, whoever asks."""

import ssl
from pathlib import Path

import gssapi
import pytest
import spnego

import bits_async as bits
from bits_async import DelegationTarget, ImpersonationLevel, Token, logon_user
from bits_async.auth import policy
from bits_async.auth.policy import AuthScheme, Delegation, Offer
from bits_async.auth.schemes import _begin_kerberos
from bits_async.auth.tickets import Tickets
from tests.active_directory import ActiveDirectory
from tests.peers import Authority, Door, Origin, Proxy, redirect

pytestmark = pytest.mark.realm
NETWORK = bits.HelperTokenFlags.NETWORK
ALICE = "alice@AD.BITS.TEST"


@pytest.fixture(autouse=True)
def private_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def door(active_directory: ActiveDirectory) -> Door:
    """An origin's or a proxy's: the realm does not mark its account as trusted for delegation."""
    return Door("Kerberos", keytab=active_directory.keytab("HTTP/localhost"))


async def alice(directory: ActiveDirectory, *targets: DelegationTarget | str) -> Token:
    return await logon_user(ALICE, directory.password("alice"), delegate_to=targets)


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.ca_file))


def whoever(url: str) -> DelegationTarget:
    return DelegationTarget(url, ok_as_delegate_only=False)


async def test_t20_a_listed_https_origin_is_handed_the_ticket(
    active_directory: ActiveDirectory, door: Door, authority: Authority, tmp_path: Path
) -> None:
    async with Origin(door=door, tls=authority.server) as origin:
        token = await alice(active_directory, whoever(origin.base_url))
        assert token.level is ImpersonationLevel.DELEGATE
        await bits.download(origin.serve("/f", b"x" * 100), tmp_path / "f", helper=token, helper_flags=NETWORK, ssl=trusting(authority))
    assert door.delegated == [ALICE]


@pytest.mark.parametrize("why", ["not listed", "another port", "the realm does not trust it", "no level"])
async def test_t20_others_are_logged_on_to_and_handed_nothing(
    active_directory: ActiveDirectory, door: Door, authority: Authority, tmp_path: Path, why: str
) -> None:
    async with Origin(door=door, tls=authority.server) as origin:
        targets: dict[str, tuple[DelegationTarget | str, ...]] = {
            "not listed": (whoever("https://elsewhere.example"),),
            "another port": (whoever("https://localhost:1"),),
            "the realm does not trust it": (origin.base_url,),
            "no level": (),
        }
        token = await alice(active_directory, *targets[why])
        await bits.download(origin.serve("/f", b"x" * 100), tmp_path / "f", helper=token, helper_flags=NETWORK, ssl=trusting(authority))
    assert [user for _, _, user in door.logins] == [ALICE]
    assert door.delegated == []


async def test_t20_neither_plain_http_nor_a_proxy_is_handed_anything(active_directory: ActiveDirectory, door: Door, tmp_path: Path) -> None:
    at_proxy = Door("Kerberos", keytab=door.keytab)
    async with Origin(door=door) as origin, Proxy(door=at_proxy) as proxy:
        secure = [whoever(peer.base_url.replace("http:", "https:")) for peer in (origin, proxy)]
        token = await alice(active_directory, *secure)
        await bits.download(origin.serve("/f", b"x" * 100), tmp_path / "f", helper=token, helper_flags=NETWORK, proxy=proxy.base_url)
    for each in (door, at_proxy):
        assert each.logins
        assert each.delegated == []


async def test_t20_a_proxy_is_handed_nothing_over_tls_either(active_directory: ActiveDirectory) -> None:
    peer = policy.Origin.of("https://proxy.example:8443")
    token = await alice(active_directory, "https://proxy.example:8443")
    for seat, delegation in ((policy.Seat.ORIGIN, Delegation.IF_TRUSTED), (policy.Seat.PROXY, Delegation.NEVER)):
        grant = policy.Grant(seat.target, AuthScheme.NEGOTIATE, None, None, frozenset({peer}))
        (offer,) = policy.choose_offers(seat, peer, [grant], token)
        assert offer.delegation is delegation


async def test_t20_a_redirect_and_a_certificate_that_nobody_verified_are_handed_nothing(
    active_directory: ActiveDirectory, door: Door, authority: Authority, tmp_path: Path
) -> None:
    async with Origin(door=door, tls=authority.server) as origin:
        token = await alice(active_directory, whoever(origin.base_url))
        origin.serve("/f", b"x" * 100)
        origin.fault("/from", redirect(origin.url("/f")))
        origin.serve("/from", b"")
        careless = trusting(authority)
        careless.check_hostname = False
        await bits.download(origin.url("/f"), tmp_path / "f", helper=token, helper_flags=NETWORK, ssl=careless)
        assert door.logins
        assert door.delegated == []
        await bits.download(origin.url("/from"), tmp_path / "g", helper=token, helper_flags=NETWORK, ssl=trusting(authority))
    assert door.delegated == [ALICE]  # who redirected is listed; where it led to was not asked for by the application


@pytest.mark.parametrize(("host", "handed"), [("portal.bits.test", True), ("other.bits.test", False)])
async def test_t20_the_realms_own_mark_decides_where_the_entry_does_not(active_directory: ActiveDirectory, host: str, handed: bool) -> None:
    token = await alice(active_directory, f"https://{host}")
    tickets = Tickets()
    offer = Offer(AuthScheme.NEGOTIATE, token.network, holder=token, principal=ALICE, delegation=Delegation.IF_TRUSTED)
    _, first = await bits.run_as(Token.for_process(), _begin_kerberos, tickets, offer, host, None)
    store = {"keytab": str(active_directory.keytab(f"HTTP/{host}")), "rcache": "none:"}
    acceptor = gssapi.SecurityContext(creds=gssapi.Credentials(usage="accept", store=store), usage="accept")
    acceptor.step(first)
    assert (acceptor.delegated_creds is not None) is handed
    await tickets.aclose()


def test_t20_only_https_can_be_listed() -> None:
    for url in ("http://portal.example", "portal.example", ""):
        with pytest.raises(bits.InvalidArgument):
            DelegationTarget(url)
    assert isinstance(Token.for_network(spnego.Password("a@B", "c")).delegates, tuple)
