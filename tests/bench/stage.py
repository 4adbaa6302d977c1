"""Where the benchmark plays: nginx on loopback, what it serves, where the files go, the compiled programs, and what dear rows need.

Everything lies in two directories, one in memory and one on the disk, and is gone afterwards. The servers have a processor of their
own. What only one row needs (a Kerberos realm with Apache, another user) is started when that row asks.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Self

from tests.bench.contenders import PROGRAMS
from tests.bench.machine import MIB, file_system, on_the_servers_core
from tests.certificates import Authority
from tests.local_users import LocalUser, local_users
from tests.realms import Apache, MitKdc, Nginx, free_port, make_world_directory

SMALL = 64 << 10


def _in_memory() -> Path:
    return Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())


def _on_disk() -> Path:
    """The temporary directory, if it is on a disk."""
    usual = Path(tempfile.gettempdir())
    return Path.cwd() if file_system(usual) in ("tmpfs", "ramfs") else usual


class Stage:
    """A context manager; its directories exist while it is entered."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.memory, self.disk = (self._directory(stack, parent) for parent in (_in_memory(), _on_disk()))
            self.tools = self._compile()
            self._pattern = os.urandom(MIB)  # nobody compresses it
            self.www = self.memory / "www"
            self.www.mkdir()
            authority = Authority(self.disk)
            with on_the_servers_core():
                self._nginx = stack.enter_context(Nginx(authority, root=self.www))
            self.ca_file = authority.ca_file
            self._authority = authority
            self.clear()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def _directory(stack: ExitStack, parent: Path) -> Path:
        directory = Path(tempfile.mkdtemp(prefix="bits-bench-", dir=parent))
        directory.chmod(0o755)
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        return directory

    def _compile(self) -> Path:
        tools = self.disk / "tools"
        tools.mkdir()
        for name in ("meter", "limit"):
            subprocess.run(["cc", "-O2", "-o", str(tools / name), str(PROGRAMS / f"{name}.c")], check=True)
        return tools

    # -- where files go

    def clear(self) -> None:
        """Empty directories for the next run: `out_in_memory`, `out_on_disk`, and `scratch` on the disk for lists and journals."""
        for directory in (self.out_in_memory, self.out_on_disk, self.scratch):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(mode=0o700 if directory == self.scratch else 0o755)

    @property
    def out_in_memory(self) -> Path:
        return self.memory / "out"

    @property
    def out_on_disk(self) -> Path:
        return self.disk / "out"

    @property
    def scratch(self) -> Path:
        return self.disk / "scratch"

    # -- what is served

    def url(self, name: str, *, tls: bool = False) -> str:
        return self._nginx.url(f"/pub/{name}", tls=tls).replace("localhost", "127.0.0.1")  # no contender asks DNS

    def big(self, size: int) -> str:
        """The name of a file of random bytes."""
        name = f"big-{size}"
        if not (self.www / name).exists():
            with (self.www / name).open("wb") as file:
                for _ in range(size // MIB):
                    file.write(self._pattern)
                file.write(self._pattern[: size % MIB])
        return name

    def hole(self, size: int) -> str:
        """The name of a file of zeros that takes no room."""
        name = f"hole-{size}"
        with (self.www / name).open("wb") as file:
            file.truncate(size)
        return name

    def small(self, count: int) -> list[str]:
        """The names of so many files of 64 KiB."""
        directory = self.www / "small"
        if not directory.exists():
            directory.mkdir()
            (directory / "0").write_bytes(self._pattern[:SMALL])
        names = [f"small/{number}" for number in range(count)]
        for name in names:
            if not (self.www / name).exists():
                os.link(directory / "0", self.www / name)
        return names

    # -- what one row needs

    @cached_property
    def realm(self) -> MitKdc:
        """A KDC."""
        kdc: MitKdc = self._stack.enter_context(MitKdc(free_port()))
        return kdc

    @cached_property
    def apache(self) -> Apache:
        """A server that wants Kerberos below /neg/ and nothing below /pub/; serves the same files."""
        with on_the_servers_core():
            server: Apache = self._stack.enter_context(Apache(self.realm, self._authority, size=1))
        for location in ("pub", "neg"):
            (server.root / location / "www").symlink_to(self.www)
        return server

    @cached_property
    def keytab(self) -> Path:
        found: Path = self.realm.keytab("alice")
        return found

    @cached_property
    def another_user(self) -> LocalUser:
        users: Mapping[str, LocalUser] = self._stack.enter_context(local_users())
        return users["bitshelper"]

    @cached_property
    def long_queue(self) -> dict[int, Path]:
        """Journals of 0 and of 100,000 queued jobs; a run works on a copy."""
        directory = make_world_directory("journals")
        self._stack.callback(shutil.rmtree, directory, ignore_errors=True)
        directory.chmod(0o700)
        journals = {count: directory / f"{count}.db" for count in (0, 100_000)}
        for count, journal in journals.items():
            subprocess.run([sys.executable, str(PROGRAMS / "fill.py"), str(journal), str(count)], check=True)
        return journals

    def copy_journal(self, count: int) -> Path:
        source = self.long_queue[count]
        for file in source.parent.glob(f"{source.name}*"):
            with open(shutil.copy(file, self.scratch), "rb") as copy:
                os.fsync(copy.fileno())  # else the run's first transaction has it written
        return self.scratch / source.name
