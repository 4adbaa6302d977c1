"""A real Active Directory on loopback: Samba's domain controller, its KDC alone, on ports of its own.

It issues tickets with PAC, does S4U2Self and S4U2Proxy by the accounts' own settings, and knows why an account is refused.
Provisioning one takes ten seconds of a processor, so that is done once per machine: the directory is kept in the user's cache
(`$XDG_CACHE_HOME/bits-async-tests`, 0700), under a name made from all that went into it, and each run of the tests starts from a
copy. Starting the copy takes less than a second.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import platformdirs

from tests.realms import Server, ServerFailed, free_port, make_world_directory, write_krb5_conf

REALM, DOMAIN = "AD.BITS.TEST", "ADBITS"
KEYTAB = "all.keytab"  # of every account, in the archive
POPULATE = Path(__file__).with_name("populate_directory.py")
SYSTEM_PYTHON = "/usr/bin/python3"  # whose samba it is
KEPT = 4  # caches; older ones are removed

# userAccountControl ([MS-ADTS] 2.2.16)
NORMAL, DISABLED, NO_EXPIRY = 0x200, 0x2, 0x10000
TRUSTED_FOR_DELEGATION, NOT_DELEGATED, TRUSTED_TO_AUTH_FOR_DELEGATION = 0x80000, 0x100000, 0x1000000
LONG_AGO = "132223104000000000"  # 2020-01-01 as a FILETIME


def control(*more: int) -> dict[str, str]:
    return {"userAccountControl": str(sum((NORMAL, NO_EXPIRY, *more)))}


@dataclass(frozen=True)
class Account:
    """A user or a service of the directory."""

    name: str
    services: list[str] = field(default_factory=list)
    delegates_to: list[str] = field(default_factory=list)
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def password(self) -> str:
        return f"Pass-w0rd.{self.name}"

    def described(self) -> dict[str, object]:
        return dataclasses.asdict(self) | {"password": self.password}


ACCOUNTS = (
    Account("alice"),
    Account("bob"),
    Account("helper"),
    Account("expired", attributes={"accountExpires": LONG_AGO}),
    Account("locked", attributes={"lockoutTime": LONG_AGO}),
    Account("disabled", attributes=control(DISABLED)),
    Account("stale", attributes={"pwdLastSet": "0"}),  # must change the password first
    Account("sensitive", attributes=control(NOT_DELEGATED)),  # never delegated, whoever asks
    Account("web", ["HTTP/localhost"]),
    Account("other", ["HTTP/other.bits.test"]),
    # May act for anybody, with HTTP/localhost alone, however they logged on (constrained, with protocol transition).
    Account("engine", ["bits/engine"], ["HTTP/localhost"], control(TRUSTED_TO_AUTH_FOR_DELEGATION)),
    Account("plain", ["bits/plain"]),  # may not
    # May act for those who came to it by Kerberos (constrained, without protocol transition).
    Account("front", ["HTTP/front.bits.test"], ["HTTP/localhost"], control()),
    # Clients may hand their ticket-granting tickets to it (unconstrained: its tickets are ok-as-delegate).
    Account("portal", ["HTTP/portal.bits.test"], attributes=control(TRUSTED_FOR_DELEGATION)),
)


class ActiveDirectory(Server):
    """The domain controller of AD.BITS.TEST. What it hands out is what `realms.MitKdc` does."""

    realm = REALM

    def __init__(self) -> None:
        super().__init__("directory")
        self.port = self._password_port = 0
        self.krb5_conf = self.directory / "krb5.conf"
        self._smb_conf = self.directory / "etc/smb.conf"

    @property
    def ports(self) -> Iterable[int]:
        return (self.port,)

    @property
    def environment(self) -> Mapping[str, str]:
        return {"KRB5_CONFIG": str(self.krb5_conf)}

    def prepare(self) -> None:
        subprocess.run(["tar", "-xSf", str(provisioned()), "-C", str(self.directory)], check=True)
        self.directory.chmod(0o755)
        self._template = self._smb_conf.read_text()

    def configure(self) -> None:
        self.port, self._password_port = free_port(), free_port()
        text = self._template
        for mark, value in (("@DIRECTORY@", self.directory), ("10088", self.port), ("10464", self._password_port)):
            text = text.replace(mark, str(value))
        self._smb_conf.write_text(text)
        write_krb5_conf(self.krb5_conf, {self.realm: self.port})

    def command(self) -> list[str]:
        return ["samba", "--interactive", "--model=single", "--no-process-group", "-s", str(self._smb_conf)]

    def principal(self, name: str) -> str:
        return f"{name}@{self.realm}"

    def password(self, name: str) -> str:
        return Account(name).password

    def keytab(self, *names: str, directory: Path | None = None, owner: str | int | None = None) -> Path:
        """A keytab (0600) with the keys of these principals. The default directory is this server's, which every user may enter."""
        file = (directory or self.directory) / f"keytab-{uuid4().hex}"
        copy_keys(self.directory / KEYTAB, file, {self.principal(name) for name in names})
        if owner is not None:
            shutil.chown(file, owner)
        return file


def copy_keys(source: Path, target: Path, principals: set[str]) -> None:
    import krb5

    context = krb5.init_context()
    found, new = (krb5.kt_resolve(context, f"FILE:{path}".encode()) for path in (source, target))
    left = set(principals)
    for entry in found:
        name = (entry.principal.name or b"").decode()
        if name in principals:
            krb5.kt_add_entry(context, new, entry.principal, entry.kvno, entry.timestamp, entry.key)
            left.discard(name)
    if left:
        raise LookupError(f"the directory has no keys of {', '.join(sorted(left))}")


# -- made once


def provisioned() -> Path:
    """The archive of a provisioned directory; makes it when this machine has none of these inputs yet."""
    place = platformdirs.user_cache_path("bits-async-tests")
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    archive = place / f"directory-{_fingerprint()}.tar"
    with _alone(place):
        if not archive.exists():
            _provision(archive)
        os.utime(archive)
        for old in sorted(place.glob("directory-*.tar"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            old.unlink()
    return archive


def _fingerprint() -> str:
    version = subprocess.run(["samba", "--version"], check=True, capture_output=True, text=True).stdout
    made_of = (version, *_provisioning(Path("@DIRECTORY@")), POPULATE.read_text(), _accounts())
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:20]


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Runs of the tests may begin at the same time."""
    import fcntl  # not on Windows, where this module is imported all the same

    lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _provision(archive: Path) -> None:
    directory = make_world_directory("provision")
    try:
        _fill(directory)
        conf = directory / "etc/smb.conf"
        conf.write_text(conf.read_text().replace(str(directory), "@DIRECTORY@"))
        half = archive.with_suffix(".half")
        subprocess.run(["tar", "-cSf", str(half), "-C", str(directory), "."], check=True)
        half.rename(archive)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _fill(directory: Path) -> None:
    seed = directory / "seed.conf"  # else it would look at the machine's own smb.conf
    seed.write_text("[global]\n")
    _run(*_provisioning(directory), "-s", str(seed))
    _run(SYSTEM_PYTHON, str(POPULATE), str(directory / "etc/smb.conf"), str(directory / KEYTAB), text=_accounts())
    seed.unlink()


def _provisioning(directory: Path) -> list[str]:
    settings = {
        "interfaces": "127.0.0.1/8",
        "bind interfaces only": "yes",
        "server services": "kdc",
        "krb5 port": "10088",
        "kpasswd port": "10464",
        "disable netbios": "yes",
        "logging": "file",
        "log file": f"{directory}/log.%m",
        "pid directory": f"{directory}/run",
        "ncalrpc dir": f"{directory}/ncalrpc",
        "ntp signd socket directory": f"{directory}/ntp",
    }
    return [
        *("samba-tool", "domain", "provision", f"--realm={REALM}", f"--domain={DOMAIN}", "--server-role=dc", "--dns-backend=NONE"),
        *("--adminpass=Pass-w0rd.Administrator", f"--targetdir={directory}", "--host-name=dc", "--host-ip=127.0.0.1"),
        *(word for name, value in settings.items() for word in ("--option", f"{name}={value}")),
    ]


def _accounts() -> str:
    return json.dumps([account.described() for account in ACCOUNTS])


def _run(*command: str, text: str = "") -> None:
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise ServerFailed(f"{command[0]}: {done.stderr[-4000:]}")
