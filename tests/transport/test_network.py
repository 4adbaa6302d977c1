"""Network lost and back: what a sight of the machine means, netlink's bytes, and the kernel in a network namespace of the test's own."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bits_async.errors import BitsError
from bits_async.testing import FakeClock
from bits_async.transport import network
from bits_async.transport.network import (
    IFA_F_DADFAILED,
    IFA_F_OPTIMISTIC,
    IFA_F_TEMPORARY,
    IFA_F_TENTATIVE,
    IFF_LOOPBACK,
    IFF_RUNNING,
    IFF_UP,
    RTM_DELROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    Address,
    DefaultRoute,
    Link,
    LocalAddress,
    NetlinkConnectivity,
    PollingConnectivity,
    Sight,
    attributes,
    came_up,
    connected,
    is_loopback_name,
    leads_to,
    messages,
    parse_address,
    parse_default_route,
    parse_link,
    parse_local_address,
    peer_host,
    source_towards,
    watch_network,
)
from bits_async.transport.proxies import ProxySettings
from tests.waiting import DEADLINE

ROOT = Path(__file__).parents[2]

UP = IFF_UP | IFF_RUNNING
LO = Link(1, UP | IFF_LOOPBACK)
ETH = Link(2, UP)
CABLE_OUT = Link(2, IFF_UP)
OFF = Link(2, IFF_RUNNING)


def at(text: str, index: int = 2, flags: int = 0) -> LocalAddress:
    return LocalAddress(index, ipaddress.ip_address(text), flags)


def sight(*seen: Link | LocalAddress) -> Sight:
    """Loopback with its addresses, and what else is named."""
    links = [LO, *(one for one in seen if isinstance(one, Link))]
    addresses = [at("127.0.0.1", 1), at("::1", 1), *(one for one in seen if isinstance(one, LocalAddress))]
    return Sight({link.index: link for link in links}, frozenset(addresses))


# -- what counts as connected


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        pytest.param(sight(), False, id="loopback alone, as in a container without network"),
        pytest.param(Sight(), False, id="not even loopback"),
        pytest.param(sight(ETH), False, id="no address yet"),
        pytest.param(sight(ETH, at("10.0.0.2")), True, id="an interface with an address"),
        pytest.param(sight(CABLE_OUT, at("10.0.0.2")), False, id="no carrier"),
        pytest.param(sight(OFF, at("10.0.0.2")), False, id="switched off"),
        pytest.param(sight(ETH, at("fe80::2")), False, id="neighbours alone"),
        pytest.param(sight(ETH, at("fe80::2"), at("2001:db8::2")), True, id="IPv6 alone"),
        pytest.param(sight(ETH, at("2001:db8::2", flags=IFA_F_TENTATIVE)), False, id="perhaps somebody else's address"),
        pytest.param(sight(ETH, at("2001:db8::2", flags=IFA_F_TENTATIVE | IFA_F_OPTIMISTIC)), True, id="used while it is asked for"),
        pytest.param(sight(ETH, at("2001:db8::2", flags=IFA_F_DADFAILED | IFA_F_TENTATIVE)), False, id="somebody else's address"),
        pytest.param(sight(ETH, at("169.254.76.1")), True, id="a container of a cloud that numbers them so"),
        pytest.param(sight(ETH, at("10.9.9.9", 1)), True, id="a router with its address on loopback"),
        pytest.param(sight(CABLE_OUT, at("10.9.9.9", 1)), False, id="such a router without a cable"),
        pytest.param(sight(Link(2, UP, "dummy"), at("10.0.0.2")), False, id="a dummy leads nowhere"),
        pytest.param(sight(Link(2, UP, "wireguard"), at("10.0.0.2")), True, id="a VPN"),
        pytest.param(sight(ETH, at("10.0.0.2", 7)), False, id="an address whose interface is not seen"),
        pytest.param(sight(CABLE_OUT, at("10.0.0.2"), Link(3, UP), at("10.1.0.2", 3)), True, id="one of two cables"),
    ],
)
def test_connected_means_an_interface_that_leads_out_and_an_address(seen: Sight, expected: bool) -> None:
    assert connected(seen) is expected


ALONE = sight(CABLE_OUT, at("10.0.0.2"))
NEAR = sight(ETH, at("fe80::2"))


@pytest.mark.parametrize(
    ("seen", "target", "expected"),
    [
        (ALONE, "127.0.0.1", True),
        (ALONE, "127.200.3.4", True),
        (ALONE, "::1", True),
        (ALONE, "::ffff:127.0.0.1", True),
        (ALONE, "0.0.0.0", True),
        (Sight(), "127.0.0.1", True),
        (ALONE, "10.0.0.2", True),  # the machine itself
        (ALONE, "::ffff:10.0.0.2", True),
        (ALONE, "10.0.0.3", False),
        (ALONE, "fe80::9", False),
        (NEAR, "fe80::9", True),
        (NEAR, "fe80::9%eth0", True),
        (NEAR, "2001:db8::9", False),
        (sight(ETH, at("10.0.0.2")), "2001:db8::9", True),  # a translator may stand behind it: not proven
    ],
)
def test_loopback_and_the_machine_itself_are_never_out_of_reach(seen: Sight, target: str, expected: bool) -> None:
    address = parse_address(target)
    assert address is not None
    assert leads_to(seen, address) is expected


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        pytest.param(ALONE, sight(ETH, at("10.0.0.2")), True, id="the cable is back"),
        pytest.param(sight(ETH, at("10.0.0.2")), ALONE, False, id="the cable goes"),
        pytest.param(sight(ETH), sight(ETH, at("10.0.0.2")), True, id="an address came"),
        pytest.param(sight(ETH), NEAR, False, id="not enough came"),
        pytest.param(sight(ETH, at("10.0.0.2")), sight(ETH, at("10.0.0.2")), False, id="nothing new"),
        pytest.param(sight(ETH, at("10.0.0.2")), sight(ETH, at("10.0.0.7")), True, id="another address"),
        pytest.param(sight(ETH, at("10.0.0.2")), sight(ETH, at("10.0.0.2"), at("fe80::2")), False, id="neighbours besides"),
        pytest.param(sight(ETH, at("10.0.0.2")), sight(ETH, at("10.0.0.2"), at("2001:db8::9", flags=IFA_F_TEMPORARY)), False, id="daily"),
        pytest.param(
            sight(ETH, at("10.0.0.2")), sight(ETH, at("10.0.0.2"), Link(3, UP, "tun"), at("10.8.0.2", 3)), True, id="a VPN besides"
        ),
        pytest.param(
            sight(ETH, at("10.0.0.2")), sight(ETH, at("10.0.0.2"), Link(3, UP, "bridge"), at("172.17.0.1", 3)), False, id="docker"
        ),
        pytest.param(sight(), sight(Link(3, UP, "bridge"), at("172.17.0.1", 3)), True, id="docker, and nothing before"),
        pytest.param(
            sight(ETH, at("2001:db8::2")), sight(ETH, at("2001:db8::2", flags=0x20)), False, id="an address that grows old is no news"
        ),
    ],
)
def test_a_network_that_comes_is_news_and_a_container_that_starts_is_not(before: Sight, now: Sight, expected: bool) -> None:
    assert came_up(before, now) is expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("LocalHost.", True), ("files.localhost", True), ("localhost.example", False), ("mylocalhost", False)],
)
def test_names_of_loopback(host: str, expected: bool) -> None:
    assert is_loopback_name(host) is expected


def test_with_a_proxy_it_is_the_proxy_that_must_be_reached() -> None:
    url = "https://files.example/a"
    assert peer_host(ProxySettings.no_proxy(), url) == "files.example"
    assert peer_host(ProxySettings.override("http://[::1]:3128"), url) == "::1"
    assert peer_host(ProxySettings.override("http://proxy:3128", bypass="*.example"), url) == "files.example"
    with pytest.raises(BitsError):
        peer_host(ProxySettings.autodetect(), url)


# -- netlink's bytes


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes, *, flags: int = 0, sequence: int = 0) -> bytes:
    data = struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body
    return data + bytes(-len(data) % 4)


def link_body(index: int, flags: int, *parts: bytes) -> bytes:
    return struct.pack("=BxHiII", 0, 1, index, flags, 0) + b"".join(parts)


def address_body(index: int, *parts: bytes, flags: int = 0) -> bytes:
    return struct.pack("=BBBBI", 2, 24, flags, 0, index) + b"".join(parts)


def route_body(*parts: bytes, family: int = socket.AF_INET, length: int = 0, table: int = 254, kind: int = 1, flags: int = 0) -> bytes:
    return struct.pack("=BBBBBBBBI", family, length, 0, 0, table, 3, 0, kind, flags) + b"".join(parts)


def test_messages_of_one_datagram_are_told_apart() -> None:
    data = message(16, b"abc", sequence=7) + message(20, b"", flags=2)
    assert [(one.kind, one.flags, one.sequence, one.body) for one in messages(data)] == [(16, 0, 7, b"abc"), (20, 2, 0, b"")]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (link_body(2, UP), Link(2, UP)),
        (link_body(2, 0x11043, attribute(3, b"eth0\0")), Link(2, 0x11043)),
        (link_body(9, UP, attribute(3, b"v0\0"), attribute(18, attribute(1, b"veth\0") + attribute(2, b"x"))), Link(9, UP, "veth")),
        (link_body(9, UP, attribute(0x8000 | 18, attribute(1, b"bridge\0"))), Link(9, UP, "bridge")),
        (link_body(9, UP, attribute(18, b"\x01")), Link(9, UP)),
        (b"\0" * 15, None),
        (b"", None),
    ],
)
def test_an_interface_is_read(body: bytes, expected: Link | None) -> None:
    assert parse_link(body) == expected


V4, PEER, V6 = ipaddress.ip_address("10.0.0.2"), ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("2001:db8::2")


@pytest.mark.parametrize(
    ("body", "expected", "flags"),
    [
        (address_body(2, attribute(1, V4.packed)), LocalAddress(2, V4), 0),
        (address_body(2, attribute(1, PEER.packed), attribute(2, V4.packed)), LocalAddress(2, V4), 0),
        (address_body(3, attribute(1, V6.packed), flags=0x40), LocalAddress(3, V6), 0x40),
        (address_body(3, attribute(1, V6.packed), attribute(8, struct.pack("=I", 0x240)), flags=0x40), LocalAddress(3, V6), 0x240),
        (address_body(3, attribute(8, struct.pack("=I", 0))), None, 0),
        (address_body(3, attribute(1, b"abc")), None, 0),
        (b"\x02", None, 0),
    ],
)
def test_an_address_is_read_and_of_two_ends_ours(body: bytes, expected: LocalAddress | None, flags: int) -> None:
    found = parse_local_address(body)
    assert found == expected
    assert found is None or found.flags == flags


ETH_IF = attribute(4, struct.pack("=I", 2))
GATEWAY = attribute(5, PEER.packed)


@pytest.mark.parametrize(
    ("body", "is_default"),
    [
        (route_body(ETH_IF, GATEWAY), True),
        (route_body(ETH_IF, family=socket.AF_INET6), True),
        (route_body(GATEWAY, attribute(9, b"hops")), True),
        (route_body(ETH_IF, attribute(1, PEER.packed), length=24), False),
        (route_body(ETH_IF, kind=7), False),  # unreachable
        (route_body(ETH_IF, family=socket.AF_INET6, flags=0x200), False),  # a cache entry
        (route_body(ETH_IF, family=128), False),  # multicast
        (b"\0" * 11, False),
    ],
)
def test_default_routes_are_told_from_others(body: bytes, is_default: bool) -> None:
    assert (parse_default_route(body) is not None) is is_default


def test_two_default_routes_are_two_and_one_told_twice_is_one() -> None:
    first, again = (
        parse_default_route(route_body(ETH_IF, GATEWAY)),
        parse_default_route(route_body(ETH_IF, GATEWAY, attribute(12, b"ages"))),
    )
    other = parse_default_route(route_body(ETH_IF, attribute(5, V4.packed)))
    assert isinstance(first, DefaultRoute)
    assert first == again
    assert first.interface == 2
    assert first != other
    assert first != parse_default_route(route_body(ETH_IF, GATEWAY, table=7))


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_no_bytes_break_the_parser(noise: bytes, body: bytes) -> None:
    for one in [*messages(noise), *messages(message(16, body))]:
        attributes(one.body)
        parse_link(one.body)
        parse_local_address(one.body)
        parse_default_route(one.body)


# -- when news are told


class Machine:
    """A routing table: which address leads to which."""

    def __init__(self, source: str | None = "10.0.0.2") -> None:
        self.source = source
        self.near: set[str] = set()
        self.refused: OSError | None = None
        self.names: dict[str, Collection[str] | None] = {}
        self.asked: list[str] = []

    def __call__(self, target: Address) -> Address | None:
        if self.refused is not None:
            raise self.refused
        if str(target) in self.near:
            return ipaddress.ip_address("192.168.7.7")
        return ipaddress.ip_address(self.source) if self.source else None

    async def resolve(self, host: str) -> Collection[str] | None:
        self.asked.append(host)
        return self.names.get(host, ())


def polling(machine: Machine, clock: FakeClock | None = None) -> PollingConnectivity:
    return PollingConnectivity(clock=clock or FakeClock(), resolve=machine.resolve, route=machine)


async def soon(watcher: network.Connectivity) -> bool:
    return await asyncio.wait_for(watcher.changed(), DEADLINE)


async def silent(watcher: network.Connectivity) -> None:
    """No news in the next 20 looks or so of the fake clock."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watcher.changed(), 0.8)


async def test_loss_and_return_are_told_once_each() -> None:
    machine = Machine()
    async with polling(machine) as watcher:
        assert watcher.connected
        await silent(watcher)
        machine.source = None
        assert await soon(watcher) is False
        assert not watcher.connected
        await silent(watcher)
        machine.source = "10.0.0.2"
        assert await soon(watcher) is True
        assert watcher.connected
        await silent(watcher)


async def test_a_network_that_is_missing_from_the_start_is_told_as_lost() -> None:
    machine = Machine(None)
    async with polling(machine) as watcher:
        assert not watcher.connected
        assert await soon(watcher) is False


async def test_another_network_beside_the_first_is_told() -> None:
    machine = Machine()
    async with polling(machine) as watcher:
        machine.source = "10.7.0.2"
        assert await soon(watcher) is True
        await silent(watcher)


async def test_polling_looks_every_five_seconds() -> None:
    clock, machine = FakeClock(), Machine()
    async with polling(machine, clock) as watcher:
        for due in (5, 10, 15):
            machine.source = None if machine.source else "10.0.0.2"
            await soon(watcher)
            assert clock.monotonic() == pytest.approx(due)


async def test_a_loss_that_is_over_before_it_is_told_is_told_as_a_return_alone() -> None:
    machine = Machine()
    async with polling(machine) as watcher:
        machine.source = None
        assert await watcher.reaches("192.0.2.80") is False  # somebody was told
        machine.source = "10.0.0.2"
        assert await watcher.reaches("192.0.2.80") is True
        assert await soon(watcher) is True
        await silent(watcher)


async def test_loopback_is_reached_without_a_network_and_without_a_resolver() -> None:
    machine = Machine()
    async with polling(machine) as watcher:
        machine.source = None
        for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "0.0.0.0", "localhost", "api.localhost."):
            assert await watcher.reaches(host), host
    assert machine.asked == []


async def test_a_name_is_out_of_reach_when_all_its_addresses_are() -> None:
    machine = Machine()
    machine.names = {"proxy": ("127.0.0.1",), "far": ("192.0.2.1", "2001:db8::1"), "both": ("192.0.2.1", "::1"), "unasked": None}
    async with polling(machine) as watcher:
        assert await watcher.reaches("far")
        assert machine.asked == []  # with a network nobody is asked
        machine.source = None
        for host, expected in (("proxy", True), ("far", False), ("both", True), ("nobody", False), ("unasked", True)):
            assert await watcher.reaches(host) is expected, host


async def test_whoever_was_told_that_a_host_is_out_of_reach_hears_when_it_no_longer_is() -> None:
    """Also when the machine as a whole stays disconnected, as on an isolated network whose cable was out."""
    machine = Machine()
    async with polling(machine) as watcher:
        machine.source = None
        assert await soon(watcher) is False
        assert await watcher.reaches("192.168.7.1") is False
        machine.near.add("192.168.7.1")
        assert await soon(watcher) is True
        assert not watcher.connected
        assert await watcher.reaches("192.168.7.1")
        await silent(watcher)


async def test_a_name_without_address_is_asked_again_when_the_network_is_back() -> None:
    machine = Machine()
    async with polling(machine) as watcher:
        machine.source = None
        assert await watcher.reaches("nobody") is False
        assert await soon(watcher) is False
        machine.source = "10.0.0.2"
        assert await soon(watcher) is True
        assert await watcher.reaches("nobody") is True


async def test_where_there_never_was_a_way_out_a_name_is_not_called_out_of_reach() -> None:
    machine = Machine(None)
    async with polling(machine) as watcher:
        assert await watcher.reaches("nas")
        assert await watcher.reaches("192.0.2.1") is False


async def test_what_cannot_be_found_out_is_no_loss() -> None:
    machine = Machine()
    async with polling(machine) as watcher:
        machine.refused = PermissionError(errno.EPERM, "forbidden")
        assert await watcher.reaches("192.0.2.1")
        await silent(watcher)
        assert watcher.connected


async def test_a_wait_that_is_cancelled_loses_no_news() -> None:
    machine = Machine()
    async with polling(machine) as watcher:
        for _ in range(3):
            waiting = asyncio.create_task(watcher.changed())
            await asyncio.sleep(0)
            machine.source = None
            waiting.cancel()
            await asyncio.wait({waiting})
        assert await soon(watcher) is False


def test_the_way_to_loopback_is_found_without_sending_anything() -> None:
    assert source_towards(ipaddress.ip_address("127.0.0.1")) == ipaddress.ip_address("127.0.0.1")


async def test_the_system_s_resolver_is_asked_and_a_hanging_one_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = network._Names()
    assert await names("localhost")
    monkeypatch.setattr(network, "LOOKUP_TIMEOUT", 0.1)
    never = asyncio.Event()

    async def hang(*_: object, **__: object) -> list[object]:
        await never.wait()
        return []

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", hang)
    answers = await asyncio.gather(*(names(f"host{number}") for number in range(network.LOOKUPS + 2)))
    assert answers.count(()) == network.LOOKUPS  # asked, and no answer came
    assert answers.count(None) == 2  # there was no place to ask
    names.close()
    await asyncio.sleep(0)
    assert await names("after") in ((), None)
    names.close()


async def test_without_netlink_the_routing_table_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_NETLINK", raising=False)
    watcher = watch_network()
    assert isinstance(watcher, PollingConnectivity)
    async with watcher:
        assert await watcher.reaches("127.0.0.1")
    with pytest.raises(OSError, match="no netlink"):
        await NetlinkConnectivity().__aenter__()


# -- netlink: which messages are a reason to look


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        (RTM_NEWLINK, link_body(2, UP), True),
        (RTM_NEWADDR, address_body(2, attribute(1, V4.packed)), True),
        (RTM_NEWROUTE, route_body(ETH_IF, GATEWAY), True),
        (RTM_NEWROUTE, route_body(ETH_IF, length=24), False),
        (RTM_DELROUTE, route_body(ETH_IF, GATEWAY), False),
        (2, b"\0\0\0\0", False),
    ],
)
def test_only_what_may_change_the_picture_is_a_reason_to_look(kind: int, body: bytes, expected: bool) -> None:
    assert NetlinkConnectivity()._matters(network.Message(kind, 0, 0, body)) is expected


def test_a_default_route_is_news_once_until_it_or_its_interface_goes() -> None:
    watcher = NetlinkConnectivity()
    route = network.Message(RTM_NEWROUTE, 0, 0, route_body(ETH_IF, GATEWAY))
    assert watcher._matters(route)
    assert not watcher._matters(route)
    watcher._matters(network.Message(RTM_DELROUTE, 0, 0, route.body))
    assert watcher._matters(route)
    watcher._matters(network.Message(RTM_NEWLINK, 0, 0, link_body(2, UP)))
    assert not watcher._matters(route)
    watcher._matters(network.Message(RTM_NEWLINK, 0, 0, link_body(2, IFF_UP)))
    assert watcher._matters(route)


class Told:
    """A kernel that shows what it is told to show, and fails as often as it is told to."""

    def __init__(self, *sights: Sight | OSError) -> None:
        self.sights = list(sights)

    def look(self) -> Sight:
        shown = self.sights.pop(0) if len(self.sights) > 1 else self.sights[0]
        if isinstance(shown, OSError):
            raise shown
        return shown

    def hear(self) -> tuple[network.Message, ...]:
        return ()


def netlink(*sights: Sight | OSError) -> NetlinkConnectivity:
    """Connected when it looked first, then told these."""
    watcher = NetlinkConnectivity(clock=FakeClock(), resolve=Machine().resolve)
    watcher._sight = sight(ETH, at("10.0.0.2"))
    watcher._kernel = Told(*sights)  # type: ignore[assignment]
    return watcher


async def test_a_look_that_fails_is_repeated_until_it_does_not() -> None:
    watcher = netlink(OSError(errno.EMFILE, "no room"), OSError(errno.EINTR, "again"), ALONE)
    watcher._stir()
    assert await soon(watcher) is False
    assert await watcher.reaches("10.0.0.9") is False


async def test_a_question_in_the_middle_of_a_look_that_fails_does_not_lose_the_news() -> None:
    watcher = netlink(OSError(errno.EMFILE, "no room"), ALONE)
    waiting = asyncio.create_task(watcher.changed())
    await asyncio.sleep(0)
    watcher._stale = True
    assert await watcher.reaches("10.0.0.9")  # nothing is proven
    assert await asyncio.wait_for(waiting, DEADLINE) is False


async def test_a_neighbour_that_may_be_reached_again_is_told_before_there_is_a_network() -> None:
    watcher = netlink(ALONE, NEAR)
    watcher._stir()
    assert await soon(watcher) is False
    assert await watcher.reaches("fe80::9%eth0") is False
    watcher._stir()
    assert await soon(watcher) is True
    assert not watcher.connected
    assert await watcher.reaches("fe80::9%eth0")


# -- the real kernel, in a network namespace of the test's own


CHILD = """
import asyncio, select, sys, time
from bits_async.transport import network
from bits_async.transport.network import watch_network
network.SETTLE = float(sys.argv[1])

async def news(network):
    while True:
        print("news", await network.changed(), flush=True)

async def main():
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with watch_network() as network:
        print("watching", type(network).__name__, network.connected, flush=True)
        reading = asyncio.create_task(news(network))
        while line := (await commands.readline()).decode().split():
            if line[0] == "reaches":
                print("reaches", line[1], await network.reaches(line[1]), flush=True)
            elif line[0] == "hang":
                print("hanging", flush=True)
                select.select([sys.stdin], [], [])  # until the next command
            elif line[0] == "cpu":
                print("cpu", time.process_time(), flush=True)
        reading.cancel()
        await asyncio.wait({reading})
    await asyncio.get_running_loop().shutdown_default_executor()

asyncio.run(main())
"""


class Namespace:
    """A process that watches a network namespace in which nothing else lives, and `ip` in that namespace."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ip(self, *commands: str) -> None:
        """Run commands of iproute2, all in one batch."""
        target = f"--net=/proc/{self._process.pid}/ns/net"
        program = await asyncio.create_subprocess_exec("nsenter", target, "ip", "-batch", "-", stdin=asyncio.subprocess.PIPE)
        await program.communicate("".join(f"{command}\n" for command in commands).encode())
        assert program.returncode == 0

    async def drops(self) -> int:
        """Messages that found no room in a netlink socket of the namespace."""
        target = f"--net=/proc/{self._process.pid}/ns/net"
        program = await asyncio.create_subprocess_exec(
            "nsenter", target, "cat", "/proc/thread-self/net/netlink", stdout=asyncio.subprocess.PIPE
        )
        text, _ = await program.communicate()
        return sum(int(line.split()[8]) for line in text.decode().splitlines()[1:])

    async def hears(self, *words: str) -> list[str]:
        """The next line, which must begin with these words."""
        assert self._process.stdout is not None
        line = (await asyncio.wait_for(self._process.stdout.readline(), DEADLINE)).decode().split()
        assert line[: len(words)] == list(words)
        return line

    def say(self, *words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words).encode() + b"\n")

    async def reaches(self, host: str) -> bool:
        self.say("reaches", host)
        return (await self.hears("reaches", host))[2] == "True"

    async def cpu(self) -> float:
        self.say("cpu")
        return float((await self.hears("cpu"))[1])


@pytest.fixture
async def namespace(request: pytest.FixtureRequest) -> AsyncIterator[Namespace]:
    """One with nothing but a loopback that is down. The machine's own interfaces are out of its reach.

    The parameter, if there is one: seconds of quiet that the watcher waits for, in place of its own.
    """
    pipe, settle = asyncio.subprocess.PIPE, getattr(request, "param", network.SETTLE)
    command = ("unshare", "--net", sys.executable, "-c", CHILD, str(settle))
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    made = Namespace(process)
    try:
        await made.hears("watching", "NetlinkConnectivity", "False")
        await made.hears("news", "False")
        yield made
        assert process.stdin is not None
        process.stdin.close()
        rest, _ = await asyncio.wait_for(process.communicate(), DEADLINE)
        assert rest == b"", "news that nothing accounts for"
        assert process.returncode == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


CABLE = (  # `far` is the other end: when it is switched off, `near` has no carrier
    "link set lo up",
    "link add near type veth peer name far",
    "link set near addrgenmode none",
    "link set far addrgenmode none",
    "link set near up",
    "link set far up",
)


@pytest.mark.privileged
async def test_a_cable_that_is_pulled_is_a_loss_and_put_back_a_return(namespace: Namespace) -> None:
    await namespace.ip(*CABLE, "addr add 192.0.2.2/24 dev near")
    await namespace.hears("news", "True")
    assert await namespace.reaches("198.51.100.1")
    for _ in range(2):
        await namespace.ip("link set far down")
        await namespace.hears("news", "False")
        assert not await namespace.reaches("192.0.2.9")
        for host in ("127.0.0.1", "::1", "localhost", "192.0.2.2"):
            assert await namespace.reaches(host), host
        await namespace.ip("link set far up")
        await namespace.hears("news", "True")
        assert await namespace.reaches("192.0.2.9")


@pytest.mark.privileged
async def test_an_address_that_goes_is_a_loss_and_one_that_comes_a_return(namespace: Namespace) -> None:
    await namespace.ip(*CABLE, "addr add 192.0.2.2/24 dev near")
    await namespace.hears("news", "True")
    await namespace.ip("addr del 192.0.2.2/24 dev near")
    await namespace.hears("news", "False")
    await namespace.ip("addr add 192.0.2.3/24 dev near")
    await namespace.hears("news", "True")
    await namespace.ip("link set near down")
    await namespace.hears("news", "False")
    await namespace.ip("link set near up")
    await namespace.hears("news", "True")
    await namespace.ip("link del near")
    await namespace.hears("news", "False")


@pytest.mark.privileged
async def test_ipv6_counts_when_the_neighbours_were_asked(namespace: Namespace) -> None:
    await namespace.ip(*CABLE[:2], *CABLE[4:])
    await namespace.ip("addr add 2001:db8::2/64 dev near")
    await namespace.hears("news", "True")
    assert await namespace.reaches("2001:db8::9")
    await namespace.ip("addr del 2001:db8::2/64 dev near")
    await namespace.hears("news", "False")
    assert not await namespace.reaches("2001:db8::9")
    assert await namespace.reaches("fe80::9"), "the interface's own link-local address is enough for neighbours"


@pytest.mark.privileged
async def test_a_default_route_that_comes_later_is_told_too(namespace: Namespace) -> None:
    await namespace.ip(*CABLE, "addr add 192.0.2.2/24 dev near")
    await namespace.hears("news", "True")
    await namespace.ip("route add default via 192.0.2.1")
    await namespace.hears("news", "True")
    await namespace.ip("route replace default via 192.0.2.1", "route add 198.51.100.0/24 via 192.0.2.1")
    await asyncio.sleep(1.5)  # a silence cannot be polled for
    await namespace.ip("link set far down")
    await namespace.hears("news", "False")


@pytest.mark.privileged
@pytest.mark.parametrize("namespace", [2.0], indirect=True)  # an instant that lasts, where another program has the processor
async def test_a_cable_that_is_out_for_an_instant_is_no_loss(namespace: Namespace) -> None:
    await namespace.ip(*CABLE, "addr add 192.0.2.2/24 dev near")
    await namespace.hears("news", "True")
    await namespace.ip(*("link set far down", "link set far up") * 5)
    await asyncio.sleep(3)  # a silence cannot be polled for
    assert await namespace.reaches("192.0.2.9")


@pytest.mark.privileged
async def test_an_address_on_loopback_and_a_container_beside_a_network_are_no_news(namespace: Namespace) -> None:
    await namespace.ip("link set lo up", "addr add 10.1.0.1/24 dev lo")
    await asyncio.sleep(1.0)  # a silence cannot be polled for
    assert not await namespace.reaches("10.1.0.9")
    await namespace.ip(*CABLE, "addr add 192.0.2.2/24 dev near")
    await namespace.hears("news", "True")
    await namespace.ip("link add inside type veth peer name container", "link set inside up", "link set container up")
    await namespace.ip("addr add 172.17.0.1/16 dev inside")
    await asyncio.sleep(1.0)


@pytest.mark.privileged
async def test_messages_that_were_lost_cost_a_look_and_nothing_else(namespace: Namespace) -> None:
    await namespace.ip(*CABLE, "addr add 192.0.2.2/24 dev near")
    await namespace.hears("news", "True")
    namespace.say("hang")
    await namespace.hears("hanging")
    await namespace.ip(*("link set far down", "link set far up") * 300, "link set far down")
    assert await namespace.drops() > 0
    namespace.say("go on")
    await namespace.hears("news", "False")
    await namespace.ip("link set far up")
    await namespace.hears("news", "True")


@pytest.mark.privileged
async def test_watching_costs_nothing_while_nothing_happens(namespace: Namespace) -> None:
    await namespace.ip(*CABLE, "addr add 192.0.2.2/24 dev near")
    await namespace.hears("news", "True")
    before = await namespace.cpu()
    await asyncio.sleep(2)
    assert await namespace.cpu() - before < 0.05


@pytest.mark.privileged
async def test_watching_leaves_nothing_behind(no_leaks: None) -> None:
    """On the machine's own interfaces, which are only looked at."""
    watcher = watch_network()
    assert isinstance(watcher, NetlinkConnectivity)
    async with watcher:
        waiting = asyncio.create_task(watcher.changed())
        assert await watcher.reaches("127.0.0.1")
        waiting.cancel()
        await asyncio.wait({waiting})
    async with watcher:  # it can be entered again
        assert await watcher.reaches("localhost")
