"""Network lost and back: whether this machine can reach anybody, and the moment at which that changes.

Knows nothing of jobs, requests or connections, and never sends a packet. It prefers not to know over being wrong: a network is called
lost only when there is proof of it, because a job that is told so waits for an event instead of trying again after a while.

What counts as connected: an interface that is up and running and leads out of the machine, and an address that is not loopback and not
only link-local IPv6. So a VPN or a bridge of containers that stays up hides the loss of the cable below it (the jobs then fail and retry
as with any dead server); the return shows all the same, as a new address or default route.

Whether one host is out of reach is another question (`reaches`): loopback never is, nor is an address of this machine; a name is out of
reach when it leads to no address that is in reach.

The promise that keeps jobs from waiting for ever: whoever was told that a host is out of reach hears True from `changed` once it is not.
To keep it, every answer of `reaches` that was no is kept and asked again after each look.

Linux tells of changes (rtnetlink); what it says is only taken as a reason to look again, at the whole picture. So messages that were lost
in an overflow cost nothing but another look. Elsewhere, and where netlink is forbidden, the routing table is asked every 5 seconds by
connecting UDP sockets, which sends nothing.
"""

import asyncio
import errno
import ipaddress
import logging
import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol, Self

from ..clock import Clock, SystemClock
from .answers import authority
from .proxies import ProxySettings, route

log = logging.getLogger("bits_async.network")

SETTLE: Final = 0.5
"""Seconds of quiet after a change before it is told: addresses and routes come and go in groups."""

PATIENCE: Final = 5.0
"""Seconds after which a change is told although it never became quiet."""

POLL_INTERVAL: Final = 5.0
LOOKUP_TIMEOUT: Final = 2.0
LOOKUPS: Final = 4  # at once: without a network the resolver may hang, and its threads are also needed to connect

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Connectivity(Protocol):
    """Whether the network is there. An async context manager; `changed` and `reaches` are for inside the `async with`."""

    @property
    def connected(self) -> bool:
        """At the last look: False is certain, True is not."""
        ...

    async def changed(self) -> bool:
        """Wait for news. For one reader; news that come while nobody reads are kept, and told in one.

        Returns:
            False: the network is lost (also, at the first call, when it was not there to begin with).
            True: a network is there again or another one came: what could not be reached may be reachable now.
        """
        ...

    async def reaches(self, host: str) -> bool:
        """Whether the host may be reached: False only with proof, and then `changed` says True once it may be.

        Args:
            host: a name or an address, as `peer_host` gives it. Without a network, a name is looked up, for 4 s at most.
        """
        ...

    async def __aenter__(self) -> Self:
        """Look for the first time and begin to watch."""
        ...

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        """Stop watching. A call of `changed` that still waits is for its task's owner to cancel."""
        ...


Resolver = Callable[[str], Awaitable[Collection[str] | None]]
"""A name -> its addresses; none: it has none; None: could not be asked."""


def watch_network(*, clock: Clock | None = None) -> Connectivity:
    """The best watcher that this machine allows; to be entered by its owner."""
    return NetlinkConnectivity(clock=clock) if _netlink_answers() else PollingConnectivity(clock=clock)


def peer_host(settings: ProxySettings, url: str) -> str:
    """Whom a request for this URL needs to reach: its proxy, else its server.

    Raises:
        BitsError: the proxy settings cannot be followed, or the URL cannot be fetched.
    """
    return authority(route(settings, url) or url)[0]


# -- what was seen, and what it means ---------------------------------------------------------------------------------------------

IFF_UP: Final = 0x1
IFF_LOOPBACK: Final = 0x8
IFF_RUNNING: Final = 0x40
IFA_F_TEMPORARY: Final = 0x01
IFA_F_OPTIMISTIC: Final = 0x04
IFA_F_DADFAILED: Final = 0x08
IFA_F_TENTATIVE: Final = 0x40

_LEAD_NOWHERE: Final = frozenset({"dummy", "ifb", "nlmon"})
_INSIDE: Final = frozenset({"bridge", "veth"})  # containers come and go; that is no reason to try everything again


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. `kind` is the driver's word for what is not hardware: "bridge", "veth", "tun", "wireguard"..."""

    index: int
    flags: int
    kind: str = ""

    @property
    def leads_out(self) -> bool:
        """What is sent there may leave the machine: it is up, there is a carrier, and it is neither loopback nor a dummy."""
        works = self.flags & IFF_UP and self.flags & IFF_RUNNING
        return bool(works) and not self.inward

    @property
    def inward(self) -> bool:
        """It leads nowhere; routers and clusters put addresses there that are reached by other interfaces."""
        return bool(self.flags & IFF_LOOPBACK) or self.kind in _LEAD_NOWHERE


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """One of the machine's addresses."""

    index: int
    value: Address
    flags: int = field(default=0, compare=False)

    @property
    def ready(self) -> bool:
        """Nobody else was found to have it, or nobody had to be asked."""
        unsure = self.flags & IFA_F_TENTATIVE and not self.flags & IFA_F_OPTIMISTIC
        return not unsure and not self.flags & IFA_F_DADFAILED


@dataclass(frozen=True, slots=True)
class Sight:
    """Interfaces and addresses at one moment."""

    links: Mapping[int, Link] = field(default_factory=dict)
    addresses: frozenset[LocalAddress] = frozenset()

    def usable(self) -> frozenset[LocalAddress]:
        """The addresses with which somebody else may be reached."""
        if not any(link.leads_out for link in self.links.values()):
            return frozenset()
        return frozenset(address for address in self.addresses if self._usable(address))

    def _usable(self, address: LocalAddress) -> bool:
        link = self.links.get(address.index)
        if link is None or not address.ready or is_loopback(address.value):
            return False
        return link.leads_out or bool(link.inward and link.flags & IFF_UP)


def is_loopback(address: Address) -> bool:
    """127/8, ::1, and the unspecified address, which connects to the same."""
    address = _unmapped(address)
    return address.is_loopback or address.is_unspecified


def is_loopback_name(host: str) -> bool:
    """`localhost` and the names below it (RFC 6761); every resolver must know them, so none is asked."""
    name = host.removesuffix(".").lower()
    return name == "localhost" or name.endswith(".localhost")


def parse_address(host: str) -> Address | None:
    """The address that is written there; None: it is a name."""
    try:
        return _unmapped(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return None


def _unmapped(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _only_nearby(address: Address) -> bool:
    """Link-local IPv6 leads to neighbours alone. Link-local IPv4 counts in full: clouds number their containers with it."""
    return isinstance(address, ipaddress.IPv6Address) and address.is_link_local


def connected(sight: Sight) -> bool:
    """Whether others may be reached: some address is usable, and not only for neighbours."""
    return any(not _only_nearby(address.value) for address in sight.usable())


def leads_to(sight: Sight, target: Address) -> bool:
    """Whether the address may be reached: False is certain."""
    if is_loopback(target) or any(own.value == target for own in sight.addresses):
        return True
    return bool(sight.usable()) if _only_nearby(target) else connected(sight)


def came_up(before: Sight, now: Sight) -> bool:
    """Whether a network (re)appeared: there is one and was none, or another uplink has an address now."""
    if connected(now) and not connected(before):
        return True
    return any(_is_news(address, now.links[address.index]) for address in now.usable() - before.usable())


def _is_news(address: LocalAddress, link: Link) -> bool:
    """Not every new address is a new network: IPv6 changes its temporary ones daily, and containers start all the time."""
    return not (_only_nearby(address.value) or address.flags & IFA_F_TEMPORARY or link.kind in _INSIDE)


# -- netlink: bytes and what they say ---------------------------------------------------------------------------------------------

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 0x1
NLM_F_DUMP: Final = 0x300
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_LINK: Final = struct.Struct("=BxHiII")  # family, hardware, index, flags, changed
_ADDRESS: Final = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # family, lengths of destination and source, tos, table, protocol, scope, type, flags
_NUMBER: Final = struct.Struct("=I")

_IFLA_LINKINFO, _IFLA_EXT_MASK, _IFLA_INFO_KIND = 18, 29, 1
_RTEXT_FILTER_SKIP_STATS: Final = 0x8
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_OIF: Final = 4
_RTA_KEY: Final = (_RTA_OIF, 5, 6, 9, 15, 18)  # interface, gateway, priority, several hops, table, gateway of the other family
_RTN_UNICAST: Final = 1
_RTM_F_CLONED: Final = 0x200
_ATTRIBUTE_TYPE: Final = 0x3FFF  # the upper bits are flags
_RECEIVE: Final = 64 * 1024
_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message."""

    kind: int
    flags: int
    sequence: int
    body: bytes


def messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram. What follows a length that cannot be is left out."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            return
        yield Message(kind, flags, sequence, data[at + _HEADER.size : at + length])
        at += _aligned(length)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of a message or of a nest by type; the last of each type counts. Malformed ones end the list."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            break
        found[kind & _ATTRIBUTE_TYPE] = data[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def parse_link(body: bytes) -> Link | None:
    """The interface of an RTM_NEWLINK; None: it cannot be read."""
    if len(body) < _LINK.size:
        return None
    _, _, index, flags, _ = _LINK.unpack_from(body)
    info = attributes(attributes(body[_LINK.size :]).get(_IFLA_LINKINFO, b""))
    return Link(index, flags, info.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode("ascii", "replace"))


def parse_local_address(body: bytes) -> LocalAddress | None:
    """The address of an RTM_NEWADDR; None: it cannot be read or is of another family.

    On a point-to-point interface IFA_ADDRESS is the other end's and IFA_LOCAL ours.
    """
    if len(body) < _ADDRESS.size:
        return None
    _, _, flags, _, index = _ADDRESS.unpack_from(body)
    found = attributes(body[_ADDRESS.size :])
    packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS, b"")
    if len(packed) not in (4, 16):
        return None
    wide = found.get(_IFA_FLAGS, b"")
    return LocalAddress(index, ipaddress.ip_address(packed), _NUMBER.unpack(wide)[0] if len(wide) == _NUMBER.size else flags)


@dataclass(frozen=True, slots=True)
class DefaultRoute:
    """A way to everywhere. `interface` is None when it has several."""

    family: int
    interface: int | None
    key: tuple[bytes, ...]  # whatever else tells two of them apart


def parse_default_route(body: bytes) -> DefaultRoute | None:
    """The route of an RTM_NEWROUTE or RTM_DELROUTE; None: it is not a default route."""
    if len(body) < _ROUTE.size:
        return None
    family, destination, _, _, table, _, _, kind, flags = _ROUTE.unpack_from(body)
    if destination != 0 or kind != _RTN_UNICAST or flags & _RTM_F_CLONED or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    found = attributes(body[_ROUTE.size :])
    interface = found.get(_RTA_OIF, b"")
    index = _NUMBER.unpack(interface)[0] if len(interface) == _NUMBER.size else None
    return DefaultRoute(family, index, (bytes([table]), *(found.get(number, b"") for number in _RTA_KEY)))


def request(kind: int, sequence: int) -> bytes:
    """The question for all interfaces (RTM_GETLINK) or all addresses (RTM_GETADDR)."""
    if kind == RTM_GETLINK:
        lean = _ATTRIBUTE.pack(_ATTRIBUTE.size + _NUMBER.size, _IFLA_EXT_MASK) + _NUMBER.pack(_RTEXT_FILTER_SKIP_STATS)
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + lean
    else:
        body = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    return _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, 0) + body


class _Kernel:
    """Two netlink sockets: one on which the kernel tells, one on which it is asked. It answers at once, so neither ever blocks."""

    def __init__(self) -> None:
        """Raises OSError where netlink is not to be had."""
        family = getattr(socket, "AF_NETLINK", None)
        if family is None:
            raise OSError(errno.EAFNOSUPPORT, "no netlink on this system")
        self.news = self._socket(family, GROUPS)
        try:
            self._questions = self._socket(family, 0)
        except OSError:
            self.news.close()
            raise
        self._sequence = 0

    @staticmethod
    def _socket(family: int, groups: int) -> socket.socket:
        made = socket.socket(family, socket.SOCK_RAW, 0)  # NETLINK_ROUTE
        try:
            made.setblocking(False)
            made.bind((0, groups))
        except OSError:
            made.close()
            raise
        return made

    def close(self) -> None:
        self.news.close()
        self._questions.close()

    def look(self) -> Sight:
        """Everything as it is now.

        Raises:
            OSError: it could not be seen.
        """
        links = (parse_link(message.body) for message in self._ask(RTM_GETLINK, RTM_NEWLINK))
        addresses = (parse_local_address(message.body) for message in self._ask(RTM_GETADDR, RTM_NEWADDR))
        return Sight({link.index: link for link in links if link}, frozenset(address for address in addresses if address))

    def _ask(self, kind: int, wanted: int) -> list[Message]:
        """One list. A change while it was told (NLM_F_DUMP_INTR) is also told on the other socket, so there will be another look."""
        self._sequence += 1
        self._questions.send(request(kind, self._sequence))
        found: list[Message] = []
        while True:
            for message in self._messages(self._questions):
                if message.sequence != self._sequence:
                    continue  # the rest of a list that was given up
                if message.kind == NLMSG_ERROR:
                    raise OSError(-int.from_bytes(message.body[:4], sys.byteorder, signed=True), "netlink refused")
                if message.kind == NLMSG_DONE:
                    return found
                if message.kind == wanted:
                    found.append(message)

    def hear(self) -> Iterator[Message]:
        """What the kernel has told since the last call.

        Raises:
            OSError: ENOBUFS: some of it is lost.
        """
        for _ in range(_AT_ONCE):  # the rest wakes the loop again
            try:
                yield from self._messages(self.news)
            except BlockingIOError:
                return

    @staticmethod
    def _messages(source: socket.socket) -> Iterator[Message]:
        data, sender = source.recvfrom(_RECEIVE)
        if sender[0] == 0:  # the kernel; other processes may write to the socket as well
            yield from messages(data)


def _netlink_answers() -> bool:
    """Whether netlink is there and tells something; sandboxes forbid it or leave it empty."""
    try:
        kernel = _Kernel()
    except OSError:
        return False
    try:
        return bool(kernel.look().links)
    except OSError:
        return False
    finally:
        kernel.close()


# -- watching ---------------------------------------------------------------------------------------------------------------------


class _Names:
    """Looks names up with the loop's resolver, a few at once; a lookup that hangs keeps its place until its thread is back."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(LOOKUPS)
        self._lookups: set[asyncio.Future[list[str]]] = set()

    async def __call__(self, host: str) -> Collection[str] | None:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT):
                await self._places.acquire()
        except TimeoutError:
            return None
        lookup = asyncio.ensure_future(self._look_up(host))
        self._lookups.add(lookup)
        lookup.add_done_callback(self._done)
        await asyncio.wait({lookup}, timeout=LOOKUP_TIMEOUT)
        return lookup.result() if lookup.done() and not lookup.cancelled() else ()

    async def _look_up(self, host: str) -> list[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return []
        return [str(entry[4][0]) for entry in found]

    def _done(self, lookup: asyncio.Future[list[str]]) -> None:
        self._lookups.discard(lookup)
        self._places.release()

    def close(self) -> None:
        for lookup in self._lookups:
            lookup.cancel()


class _Watcher(ABC):
    """What every watcher does with what it sees: wait for quiet, compare, tell, and keep the promise of `reaches`."""

    def __init__(self, *, clock: Clock | None = None, resolve: Resolver | None = None) -> None:
        self._clock: Clock = clock or SystemClock()
        self._names = _Names()
        self._resolve: Resolver = resolve or self._names
        self._connected = self._told = True
        self._appeared = False
        self._missed: set[Address | None] = set()  # None: a name that had no address
        self._stale = False  # something happened since the last look
        self._unquiet = False  # and `changed` has not waited for its end
        self._stirred = 0.0
        self._woken = asyncio.Event()

    @property
    def connected(self) -> bool:
        """At the last look: False is certain, True is not."""
        return self._connected

    async def changed(self) -> bool:
        """See `Connectivity`."""
        while True:
            if self._unquiet:
                await self._settle()
            self._refresh()
            news = self._news()
            if news is not None:
                return news
            if not self._unquiet:
                await self._next_stir()

    async def reaches(self, host: str) -> bool:
        """See `Connectivity`."""
        self._hear()
        self._refresh()
        target = parse_address(host)
        if is_loopback_name(host) or self._in_reach(target):
            return True
        found = [str(target)] if target else await self._resolve(host)
        if found is None:
            return True  # nothing is proven; whoever asked may try
        targets: set[Address | None] = {address for text in found if (address := parse_address(text))} or {None}
        self._refresh()
        if any(self._in_reach(one) for one in targets):
            return True
        self._missed |= targets
        return False

    def _in_reach(self, target: Address | None) -> bool:
        return self._connected or self._leads_to(target)

    def _stir(self) -> None:
        self._stale = self._unquiet = True
        self._stirred = self._clock.monotonic()
        self._woken.set()

    async def _settle(self) -> None:
        end = self._clock.monotonic() + PATIENCE
        while (left := min(self._stirred + SETTLE, end) - self._clock.monotonic()) > 0:
            await self._clock.sleep(left)
        self._unquiet = False

    def _refresh(self) -> None:
        """Look, if there is reason to. What cannot be seen now is looked for again after a moment."""
        if not self._stale:
            return
        self._stale = False
        try:
            appeared = self._look()
        except OSError as exc:
            log.debug("the network could not be looked at: %s", exc)
            self._stir()
            return
        self._appeared = self._appeared or appeared or self._owes()

    def _owes(self) -> bool:
        """Somebody was told that a host is out of reach, and it no longer is."""
        return any(self._in_reach(target) for target in self._missed)

    def _news(self) -> bool | None:
        if self._told and not self._connected:
            self._told, self._appeared = False, self._owes()
            return False
        if self._appeared:
            self._told, self._appeared = self._connected, False
            self._missed = {target for target in self._missed if not self._in_reach(target)}
            return True
        return None

    @abstractmethod
    def _look(self) -> bool:
        """Set `_connected`; whether a network appeared since the last look."""

    @abstractmethod
    def _leads_to(self, target: Address | None) -> bool:
        """Whether an address may be reached by a machine that is not connected; None: whether a name may have an address."""

    @abstractmethod
    def _hear(self) -> None:
        """Take in what happened so far; called before a question is answered."""

    @abstractmethod
    async def _next_stir(self) -> None:
        """Wait until something may have changed."""


class NetlinkConnectivity(_Watcher):
    """Linux: the kernel tells of interfaces, addresses and default routes as they come and go."""

    def __init__(self, *, clock: Clock | None = None, resolve: Resolver | None = None) -> None:
        super().__init__(clock=clock, resolve=resolve)
        self._kernel: _Kernel | None = None
        self._sight = Sight()
        self._defaults: set[DefaultRoute] = set()  # those heard of; a full list may have a million routes around it
        self._route_came = False

    async def __aenter__(self) -> Self:
        """Begin.

        Raises:
            OSError: netlink is not to be had here.
        """
        kernel = _Kernel()
        try:
            self._sight = kernel.look()  # after the other socket was bound: nothing is missed in between
            self._connected = connected(self._sight)
            asyncio.get_running_loop().add_reader(kernel.news, self._hear)
        except BaseException:
            kernel.close()
            raise
        self._kernel = kernel
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        """End."""
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            asyncio.get_running_loop().remove_reader(kernel.news)
            kernel.close()
        self._names.close()

    def _look(self) -> bool:
        if self._kernel is None:
            return False
        before, now = self._sight, self._kernel.look()
        self._sight, self._connected = now, connected(now)
        route_came, self._route_came = self._route_came, False
        return came_up(before, now) or (route_came and self._connected)

    def _leads_to(self, target: Address | None) -> bool:
        return target is not None and leads_to(self._sight, target)

    def _hear(self) -> None:
        if self._kernel is None:
            return
        try:
            for message in self._kernel.hear():
                if self._matters(message):
                    self._stir()
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                log.warning("netlink: %s", exc)
            self._defaults.clear()
            self._stir()

    def _matters(self, message: Message) -> bool:
        if message.kind in (RTM_NEWLINK, RTM_DELLINK):
            self._forget_routes(parse_link(message.body), gone=message.kind == RTM_DELLINK)
        if message.kind in (RTM_NEWROUTE, RTM_DELROUTE):
            return self._is_new_route(parse_default_route(message.body), gone=message.kind == RTM_DELROUTE)
        return message.kind in (RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR)

    def _forget_routes(self, link: Link | None, *, gone: bool) -> None:
        """IPv4 routes go with their interface without a word; they are news again when they return."""
        if link is not None and (gone or not link.leads_out):
            self._defaults = {one for one in self._defaults if one.interface != link.index}

    def _is_new_route(self, found: DefaultRoute | None, *, gone: bool) -> bool:
        if found is None:
            return False
        if gone:
            self._defaults.discard(found)
            return False
        new = found not in self._defaults
        self._defaults.add(found)
        self._route_came = self._route_came or new
        return new

    async def _next_stir(self) -> None:
        while not self._unquiet:
            self._woken.clear()
            await self._woken.wait()


_PROBES: Final = tuple(
    ipaddress.ip_address(text)
    for text in (
        "192.0.2.1",  # for documentation (RFC 5737, 3849): only a default route leads there
        "2001:db8::1",
        "224.0.0.251",  # Windows and macOS have a route for multicast on each network, also without a default route
    )
)
_NO_WAY: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
_PORT: Final = 9  # any; nothing is sent


def source_towards(target: Address) -> Address | None:
    """The address with which this machine would send to that one; None: it has no way there.

    Raises:
        OSError: not to be found out.
    """
    try:
        with socket.socket(socket.AF_INET if target.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.setblocking(False)
            probe.connect((str(target), _PORT))
            return parse_address(probe.getsockname()[0])
    except OSError as exc:
        if exc.errno in _NO_WAY:
            return None
        raise


Route = Callable[[Address], Address | None]


class PollingConnectivity(_Watcher):
    """Everywhere: the routing table is asked by what it answers, every 5 s. On Linux it does not see a lost carrier, only lost routes."""

    def __init__(
        self, *, clock: Clock | None = None, resolve: Resolver | None = None, interval: float = POLL_INTERVAL, route: Route = source_towards
    ) -> None:
        super().__init__(clock=clock, resolve=resolve)
        self._interval = interval
        self._route = route
        self._sources: frozenset[Address] = frozenset()
        self._was_connected = False

    async def __aenter__(self) -> Self:
        """Begin."""
        self._stale = True
        self._refresh()
        self._appeared = self._unquiet = False
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        """End."""
        self._names.close()

    def _hear(self) -> None:
        self._stale = True

    def _look(self) -> bool:
        before, found, unsure = self._sources, set(), False
        for probe in _PROBES:
            try:
                source = self._route(probe)
            except OSError:
                unsure = True  # forbidden, say: no proof of anything
                continue
            if source is not None and not is_loopback(source):
                found.add(source)
        self._sources = frozenset(found)
        self._connected = unsure or bool(found)
        self._was_connected |= self._connected
        return bool(self._sources - before)

    def _leads_to(self, target: Address | None) -> bool:
        if target is None:
            # Where there never was a way out, as on an isolated network, its absence says nothing about a name.
            return not self._was_connected
        if is_loopback(target) or _only_nearby(target):
            return True
        try:
            return self._route(target) is not None
        except OSError:
            return True

    async def _next_stir(self) -> None:
        await self._clock.sleep(max(0.0, self._interval - SETTLE))
        self._stir()
