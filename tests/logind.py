"""A real logind (elogind) on a system bus of its own, in a mount namespace of its own; and sessions on it, begun and ended as pam_systemd
does.

elogind cannot be installed beside systemd's libraries: `make test` unpacks its packages into `.make/elogind`.
"""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterable, Mapping

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

from tests.left_out import find_elogind
from tests.realms import Server, poll

BUS_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>{address}</listen>
  <policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy>
</busconfig>
"""

# elogind keeps its state below /run, /run/elogind.pid too, by which a second one ends, and its sessions in a hierarchy of control groups.
NAMESPACE = """
mount -t tmpfs tmpfs /run && mkdir /run/systemd
mkdir -p /sys/fs/cgroup/elogind && mount -t cgroup -o none,name=elogind cgroup /sys/fs/cgroup/elogind
exec "$0"
"""


class SystemBus(Server):
    """A dbus-daemon that plays the system's."""

    def __init__(self) -> None:
        super().__init__("bus")
        self.socket = self.directory / "socket"
        self.address = f"unix:path={self.socket}"

    @property
    def ports(self) -> Iterable[int]:
        return ()

    def configure(self) -> None:
        self.socket.unlink(missing_ok=True)
        (self.directory / "bus.conf").write_text(BUS_CONFIGURATION.format(address=self.address))

    def command(self) -> list[str]:
        return ["dbus-daemon", f"--config-file={self.directory}/bus.conf", "--nofork", "--nopidfile"]

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0


class Logind(Server):
    """elogind on that bus; `stop` and `start` again restart it, which ends its sessions."""

    def __init__(self, bus: SystemBus) -> None:
        super().__init__("logind")
        self.bus = bus
        found = find_elogind()
        assert found is not None, "else these tests are left out"
        self._program, self._libraries = found

    @property
    def ports(self) -> Iterable[int]:
        return ()

    @property
    def environment(self) -> Mapping[str, str]:
        return {"DBUS_SYSTEM_BUS_ADDRESS": self.bus.address, "LD_LIBRARY_PATH": str(self._libraries)}

    def configure(self) -> None:
        """Nothing to write."""

    def command(self) -> list[str]:
        return ["unshare", "--mount", "sh", "-ec", NAMESPACE, str(self._program)]

    def _listens(self) -> bool:
        asked = ["dbus-send", f"--bus={self.bus.address}", "--print-reply", "--dest=org.freedesktop.DBus", "/"]
        asked += ["org.freedesktop.DBus.NameHasOwner", "string:org.freedesktop.login1"]
        return "true" in subprocess.run(asked, capture_output=True, text=True, check=False).stdout

    def kill(self) -> None:
        """logind is gone, without a word."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        poll(lambda: not self._listens(), deadline=10, what="logind stays on the bus")

    def start_again(self) -> None:
        self._start()


class Session:
    """A logon session: it lasts until `end`."""

    def __init__(self, bus: MessageBus, leader: "subprocess.Popen[bytes]", name: str, descriptor: int) -> None:
        self.bus, self.name = bus, name
        self._leader, self._descriptor = leader, descriptor

    @classmethod
    async def begin(cls, address: str, uid: int) -> "Session":
        """As pam_systemd does it: CreateSession, whose answer is the session's name and a pipe that holds it."""
        bus = await MessageBus(bus_address=address, negotiate_unix_fd=True).connect()
        leader = subprocess.Popen(["sleep", "600"])
        asked = [uid, leader.pid, "test", "tty", "user", "", "", 0, "", "", False, "", "", []]
        try:
            answer = await _call(bus, "CreateSession", "uusssssussbssa(sv)", asked)
        except BaseException:
            await _hang_up(bus, leader)
            raise
        return cls(bus, leader, answer.body[0], answer.unix_fds[answer.body[3]])

    async def end(self) -> None:
        """Log off: the session has no process any more, then whoever logged on hangs up. (ReleaseSession is for processes in the session
        only, since elogind 255; one with a process left waits for a word of the kernel's that does not reach this namespace.)"""
        self._leader.kill()
        self._leader.wait()
        os.close(self._descriptor)
        await _hang_up(self.bus, self._leader)

    async def abandon(self) -> None:
        """logind is gone, and the session with it."""
        os.close(self._descriptor)
        await _hang_up(self.bus, self._leader)


async def _hang_up(bus: MessageBus, leader: "subprocess.Popen[bytes]") -> None:
    leader.kill()
    leader.wait()
    bus.disconnect()
    with contextlib.suppress(OSError, EOFError):
        await bus.wait_for_disconnect()


async def _call(bus: MessageBus, member: str, signature: str, body: list[object]) -> Message:
    answer = await bus.call(
        Message(
            destination="org.freedesktop.login1",
            path="/org/freedesktop/login1",
            interface="org.freedesktop.login1.Manager",
            member=member,
            signature=signature,
            body=body,
        )
    )
    assert answer is not None
    assert answer.message_type is MessageType.METHOD_RETURN, answer.body
    return answer
