r"""A Kerberos realm, Apache, nginx and Squid on loopback: Debian's own servers, each a child process in a directory of its own.

Every server runs in the foreground and is ended by its process id. As root they run as their usual users, otherwise as
yours. A port that another process took in the moment between choosing and binding it is replaced by another. The
fixtures are in `conftest.py`; this is what they hand out:

    kdc.keytab("alice"), kdc.ccache("alice")    a file, a cache's name; kdc.principal("alice") is "alice@BITS.TEST"
    apache.url("/neg/big", tls=True)            "/slow/neg/big" is the same at a slow rate; apache.data is the content
    apache.hits(expect=2, user="alice@BITS.TEST")    waits until the log has that many such lines
    squid.url, squid.hits(expect=1, user="helper@BITS.TEST")

The library never changes the environment. libkrb5 finds the realm by KRB5_CONFIG, so the session's fixtures set that
variable in the test process before anything speaks Kerberos. NTLM_USER_FILE is set for Apache alone.
"""

import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar
from uuid import uuid4

from tests.left_out import find_program
from tests.peers import Authority

REALM = "BITS.TEST"
SILENT_REALM = "SILENT.TEST"  # its KDC takes connections and never answers
PASSWORDS = {"alice": "alice-password", "helper": "helper-password", "bob": "bob-password"}
NTLM_DOMAIN = "BITS"

APACHE_MODULES = Path("/usr/lib/apache2/modules")
SQUID_HELPERS = Path("/usr/lib/squid")
PATIENCE = 30.0  # seconds for a server to start, and to write a line of its log: more than a loaded machine needs
TICK = 0.002  # seconds: what servers keep of a moment


# -- directories, ports, processes


def make_world_directory(name: str) -> Path:
    """A new directory that every user may enter. pytest's own are 0700 above, and servers run as other users."""
    directory = Path(tempfile.mkdtemp(prefix=f"bits-{name}-"))
    directory.chmod(0o755)
    return directory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def closed_port() -> Iterator[int]:
    """A port at which nobody listens, and nobody begins to while the block runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def poll(check: Callable[[], bool], *, deadline: float, what: str) -> None:
    """Until `check` holds; TimeoutError after `deadline` seconds."""
    end = time.monotonic() + deadline
    while not check():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.02)


def listens(process: int, port: int) -> bool:
    """Whether it is this process that listens on the port: another may have taken it, and then ours is about to end."""
    listening = "0A"
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[9]}]" for row in table if row[3] == listening and int(row[1].partition(":")[2], 16) == port}
    return not sockets.isdisjoint(_descriptors(process))


def _descriptors(process: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except OSError:
            pass  # closed in the meantime
    return found


class ServerFailed(Exception):
    """A server ended before it listened."""


class Server:
    """One child process in the foreground, its directory and its output."""

    tries = 4

    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = make_world_directory(name)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.prepare()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def prepare(self) -> None:
        """Files that do not depend on the ports."""

    def configure(self) -> None:
        """Choose free ports and write what depends on them."""
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    @property
    def environment(self) -> Mapping[str, str]:
        return {}

    @property
    def ports(self) -> Iterable[int]:
        raise NotImplementedError

    def _start(self) -> None:
        for attempt in range(self.tries):
            self.configure()
            try:
                self._spawn()
            except ServerFailed:
                if attempt + 1 == self.tries:
                    raise
            else:
                return

    def _spawn(self) -> None:
        # A test run that is killed takes the server along: setpriv asks the kernel for that.
        leash = [setpriv, "--pdeathsig", "TERM"] if (setpriv := shutil.which("setpriv")) else []
        with (self.directory / "output").open("ab") as output:
            self.process = subprocess.Popen(
                [*leash, *self.command()],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        poll(lambda: self._ended() or self._listens(), deadline=PATIENCE, what=f"{self.name} does not listen")
        if self._ended():
            raise ServerFailed(f"{self.name} ended:\n{self.output()}")

    def _ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def _listens(self) -> bool:
        assert self.process is not None
        try:
            return all(listens(self.process.pid, port) for port in self.ports)
        except OSError:
            return False  # it has just ended

    def output(self) -> str:
        return (self.directory / "output").read_text(errors="replace")[-4000:]

    def run(self, *command: str, text: str | None = None) -> str:
        """A tool, with this server's environment."""
        program = find_program(command[0]) or command[0]
        done = subprocess.run(
            [program, *command[1:]],
            env={**os.environ, **self.environment},
            input=text,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise ServerFailed(f"{command[0]}: {done.stderr}")
        return done.stdout

    def ask_to_stop(self) -> None:
        """So that several servers end at the same time; `stop` waits."""
        if not self._ended():
            assert self.process is not None
            self.process.terminate()

    def stop(self) -> None:
        self.ask_to_stop()
        if self.process is not None:
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def give_to(user: str, directory: Path) -> None:
    """The directory and all in it belong to the server's user; an ordinary user's servers run as that user."""
    if os.geteuid() == 0:
        for path in (directory, *directory.rglob("*")):
            shutil.chown(path, user)


# -- logs

Line = TypeVar("Line", bound="Entry")


class Entry(Protocol):
    """A line of a log."""

    @property
    def begun(self) -> float:
        """When the request came, in seconds since 1970."""
        ...


class Log(Generic[Line]):
    """A server's access log. Lines come after the answer, some of them in a later test: reading it is waiting for those that are due, and
    passing over those of requests that came before `clear`.
    """

    def __init__(self, path: Path, parse: Callable[[str], Line | None]) -> None:
        self.path, self._parse = path, parse
        self._start, self._since = 0, 0.0

    def clear(self) -> None:
        """Forget what is there, and what is still to be written of requests that have come."""
        self._start = len(self._lines())
        time.sleep(2 * TICK)  # no request of the test before came in the tick in which the first of this one may
        self._since = time.time() - TICK

    def _lines(self) -> list[str]:
        text = self.path.read_text(errors="replace")
        return text[: text.rfind("\n") + 1].splitlines()  # a line is complete when its end is written

    def read(self, expect: int = 0, *, deadline: float = PATIENCE, **match: object) -> list[Line]:
        """The lines with these fields, once there are at least `expect` of them."""
        end = time.monotonic() + deadline
        while True:
            parsed = [line for text in self._lines()[self._start :] if (line := self._parse(text)) is not None]
            found = [line for line in parsed if line.begun >= self._since]
            chosen = [line for line in found if all(getattr(line, name) == value for name, value in match.items())]
            if len(chosen) >= expect:
                return chosen
            if time.monotonic() > end:
                raise TimeoutError(f"{len(chosen)} of {expect} lines with {match} in {deadline} s; the log has {found}")
            time.sleep(0.02)


@dataclass(frozen=True)
class Hit:
    """One line of Apache's log. The client's port tells connections apart; `keepalive` counts the requests on one."""

    client_port: int
    server_port: int
    user: str | None
    method: str
    target: str
    status: int
    sent: int
    range: str | None
    keepalive: int
    begun: float


def parse_hit(text: str) -> Hit | None:
    """A line of Apache's, with the microsecond in which the request came; of nginx's, with the second of its end and how long it took."""
    client, server, user, method, target, status, sent, wanted, keepalive, *when = text.split("\t")
    name = None if user in ("-", '""') else user.replace("\\\\", "\\")
    begun = int(when[0]) / 1e6 if len(when) == 1 else float(when[0]) - float(when[1])
    asked = None if wanted == "-" else wanted
    return Hit(int(client), int(server), name, method, target, int(status), int(sent), asked, int(keepalive), begun)


@dataclass(frozen=True)
class Passage:
    """One line of Squid's log."""

    client_port: int
    user: str | None
    method: str
    target: str
    status: int
    sent: int
    begun: float


def parse_passage(text: str) -> Passage | None:
    client, user, request, status, sent, note, begun = text.split("\t")
    if "transaction-end" in note or note.startswith("error:"):
        return None  # the end of a connection, no request
    method, _, target = request.partition(" ")
    return Passage(int(client), None if user == "-" else user, method, target, int(status), int(sent), float(begun))


# -- the realm


def write_krb5_conf(path: Path, kdcs: Mapping[str, int]) -> Path:
    """A configuration that asks nobody but these KDCs and finds no credentials but those it is given."""
    realms = "".join(f" {realm} = {{\n  kdc = 127.0.0.1:{port}\n }}\n" for realm, port in kdcs.items())
    default = next(iter(kdcs))
    path.write_text(f"""[libdefaults]
 default_realm = {default}
 dns_lookup_kdc = false
 dns_lookup_realm = false
 dns_canonicalize_hostname = false
 rdns = false
 qualify_shortname = ""
 udp_preference_limit = 1
 forwardable = true
 default_ccache_name = FILE:{path.parent}/no-ccache
 default_keytab_name = FILE:{path.parent}/no-keytab
 default_client_keytab_name = FILE:{path.parent}/no-client-keytab
[realms]
{realms}[domain_realm]
 localhost = {default}
 .bits.test = {default}
""")
    path.chmod(0o644)
    return path


class Realm(Protocol):
    """What a server needs of the realm it belongs to."""

    krb5_conf: Path

    def keytab(self, *names: str) -> Path:
        """A keytab (0600) with the keys of these principals."""


class MitKdc(Server):
    """MIT Kerberos: the realm BITS.TEST with alice, helper, bob and the service HTTP of this machine."""

    realm = REALM
    services = ("HTTP/localhost", "HTTP/proxy.bits.test", "HTTP/origin.bits.test")

    def __init__(self, silent_port: int) -> None:
        super().__init__("kdc")
        self._silent_port = silent_port
        self.port = 0
        self.krb5_conf = self.directory / "krb5.conf"

    @property
    def ports(self) -> Iterable[int]:
        return (self.port,)

    @property
    def environment(self) -> Mapping[str, str]:
        return {"KRB5_CONFIG": str(self.krb5_conf), "KRB5_KDC_PROFILE": str(self.directory / "kdc.conf")}

    def prepare(self) -> None:
        self.configure()
        self.run("kdb5_util", "create", "-s", "-r", self.realm, "-P", "master")
        users = [f"addprinc -pw {password} {name}" for name, password in PASSWORDS.items()]
        self._kadmin(*users, *(f"addprinc -randkey {service}" for service in self.services))

    def configure(self) -> None:
        self.port = free_port()
        write_krb5_conf(self.krb5_conf, {self.realm: self.port, SILENT_REALM: self._silent_port})
        (self.directory / "kdc.conf").write_text(f"""[kdcdefaults]
 kdc_listen = 127.0.0.1:{self.port}
 kdc_tcp_listen = 127.0.0.1:{self.port}
[realms]
 {self.realm} = {{
  database_name = {self.directory}/principal
  key_stash_file = {self.directory}/stash
  max_renewable_life = 7d
  supported_enctypes = aes256-cts-hmac-sha1-96:normal aes128-cts-hmac-sha1-96:normal
 }}
[logging]
 kdc = FILE:{self.directory}/kdc.log
""")

    def command(self) -> list[str]:
        return [find_program("krb5kdc") or "krb5kdc", "-n", "-r", self.realm]

    def _kadmin(self, *commands: str) -> None:
        self.run("kadmin.local", "-p", "admin", "-r", self.realm, text="\n".join(commands) + "\n")

    def principal(self, name: str) -> str:
        return f"{name}@{self.realm}"

    def password(self, name: str) -> str:
        return PASSWORDS[name]

    def add_user(self, name: str, password: str, *flags: str) -> str:
        """A principal of the test's own; returns its full name."""
        self._kadmin(f"addprinc -pw {password} {' '.join(flags)} {name}")
        return self.principal(name)

    def add_service(self, name: str, *flags: str) -> str:
        """A principal with a random key, for a keytab; returns its name without the realm."""
        self._kadmin(f"addprinc -randkey {' '.join(flags)} {name}")
        return name

    def keytab(self, *names: str, directory: Path | None = None, owner: str | int | None = None) -> Path:
        """A keytab (0600) with the keys of these principals. The default directory is the KDC's, which every user may enter."""
        file = (directory or self.directory) / f"keytab-{uuid4().hex}"
        self._kadmin(*(f"ktadd -norandkey -k {file} {name}" for name in names))
        file.chmod(0o600)
        if owner is not None:
            shutil.chown(file, owner)
        return file

    def ccache(
        self,
        name: str,
        *,
        directory: Path | None = None,
        owner: str | int | None = None,
        life: int | None = None,
        renewable: int | None = None,
        file: Path | None = None,
    ) -> str:
        """A FILE: credential cache (0600) that holds a ticket-granting ticket of this user, as kinit makes it.

        Args:
            life, renewable: seconds; None: as the realm gives it, and not renewable.
            file: the one to write; None: a new one.
        """
        import krb5

        file = (directory or self.directory) / f"ccache-{uuid4().hex}" if file is None else file
        keytab = self.keytab(name)
        context = krb5.init_context()
        client = krb5.parse_name_flags(context, self.principal(name).encode())
        options = krb5.get_init_creds_opt_alloc(context)
        if life is not None:
            krb5.get_init_creds_opt_set_tkt_life(options, life)
        if renewable is not None:
            krb5.get_init_creds_opt_set_renew_life(options, renewable)
        ticket = krb5.get_init_creds_keytab(context, client, options, keytab=krb5.kt_resolve(context, str(keytab).encode()))
        cache = krb5.cc_resolve(context, f"FILE:{file}".encode())
        krb5.cc_initialize(context, cache, client)
        krb5.cc_store_cred(context, cache, ticket)
        keytab.unlink()
        if owner is not None:
            shutil.chown(file, owner)
        return f"FILE:{file}"


# -- the origin


class Apache(Server):
    """Apache with one big file under /pub, /dated (no ETag), /basic, /digest, /neg (Kerberos) and /ntlm, each over http and https.

    Below /zipped files are compressed for whoever takes that, below /packed for everybody.
    Everything is there once more below /slow, paced. Over https /known asks for a client's certificate when it has seen the path:
    within the handshake that follows (TLS 1.3), or by another one (TLS 1.2, `tls12_port`); the log shows its common name as the user.
    """

    modules = (
        *("mpm_event", "authn_core", "authn_file", "authz_core", "authz_user", "auth_basic", "auth_digest", "auth_gssapi"),
        *("alias", "deflate", "filter", "session", "request", "mime", "headers", "ratelimit", "env", "socache_shmcb", "ssl"),
    )
    locations = ("pub", "dated", "basic", "digest", "neg", "ntlm", "known", "zipped", "packed")

    def __init__(self, kdc: Realm, authority: Authority, *, size: int = 8 * 1024 * 1024, slow_kib_per_second: int = 1024) -> None:
        super().__init__("apache")
        self._kdc, self._authority = kdc, authority
        self._slow = slow_kib_per_second
        self.ca_file = authority.ca_file
        self.data = os.urandom(size)
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self.port = self.tls_port = self.tls12_port = 0
        self.log = Log(self.directory / "access.log", parse_hit)

    @property
    def root(self) -> Path:
        """Where files are served from; a test may add its own below one of the locations."""
        return self.directory / "www"

    @property
    def ports(self) -> Iterable[int]:
        return self.port, self.tls_port, self.tls12_port

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "KRB5_CONFIG": str(self._kdc.krb5_conf),
            "KRB5RCACHENAME": "none:",
            "NTLM_USER_FILE": str(self.directory / "ntlm.users"),
        }

    def url(self, path: str = "/pub/big", *, tls: bool = False) -> str:
        return f"https://localhost:{self.tls_port}{path}" if tls else f"http://localhost:{self.port}{path}"

    def hits(self, expect: int = 0, *, deadline: float = PATIENCE, **match: object) -> list[Hit]:
        """Log lines with these fields (user, status, method, target ...), once there are at least `expect` of them."""
        return self.log.read(expect, deadline=deadline, **match)

    def prepare(self) -> None:
        (self.directory / "run").mkdir()
        for location in self.locations:
            (self.root / location).mkdir(parents=True)
        (self.root / "pub/big").write_bytes(self.data)
        for location in self.locations[1:]:
            os.link(self.root / "pub/big", self.root / location / "big")
        self._chain, self._key = self._authority.write_server_files(self.directory)
        shutil.copy(self._kdc.keytab("HTTP/localhost"), self.directory / "http.keytab")
        self.run("htpasswd", "-bcB", "-C", "4", str(self.directory / "basic.users"), "alice", PASSWORDS["alice"])
        digest = hashlib.md5(f"alice:lab:{PASSWORDS['alice']}".encode()).hexdigest()
        (self.directory / "digest.users").write_text(f"alice:lab:{digest}\n")
        lines = (f"{NTLM_DOMAIN}:{name}:{password}\n" for name, password in PASSWORDS.items())
        (self.directory / "ntlm.users").write_text("".join(lines))
        self.log.path.touch()

    def configure(self) -> None:
        self.port, self.tls_port, self.tls12_port = free_port(), free_port(), free_port()
        load = "\n".join(f"LoadModule {name}_module {APACHE_MODULES}/mod_{name}.so" for name in self.modules)
        user = "User www-data\nGroup www-data" if os.geteuid() == 0 else ""
        (self.directory / "httpd.conf").write_text(f"""{load}
{user}
ServerRoot {self.directory}
ServerName localhost
PidFile {self.directory}/run/httpd.pid
DefaultRuntimeDir {self.directory}/run
Mutex file:{self.directory}/run default
ErrorLog {self.directory}/error.log
LogLevel warn auth_gssapi:info
Listen 127.0.0.1:{self.port}
Listen 127.0.0.1:{self.tls_port} https
Listen 127.0.0.1:{self.tls12_port} https
TypesConfig /dev/null
DocumentRoot {self.root}
Alias /slow {self.root}
LogFormat "%{{remote}}p\\t%{{local}}p\\t%u\\t%m\\t%U%q\\t%>s\\t%B\\t%{{Range}}i\\t%k\\t%{{usec}}t" fields
CustomLog {self.log.path} fields
ServerLimit 1
StartServers 1
ThreadsPerChild 32
MaxRequestWorkers 32
KeepAlive On
KeepAliveTimeout 60
MaxKeepAliveRequests 0
LimitRequestFieldSize 65536
<Directory {self.root}>
 Require all granted
</Directory>
<Location /slow>
 SetOutputFilter RATE_LIMIT
 SetEnv rate-limit {self._slow}
</Location>
<Location /dated>
 FileETag None
</Location>
<LocationMatch "^/(zipped|packed)/">
 SetOutputFilter DEFLATE
</LocationMatch>
<Location /packed>
 SetEnv force-gzip
</Location>
<LocationMatch "^(/slow)?/neg/">
 AuthType GSSAPI
 AuthName neg
 GssapiCredStore keytab:{self.directory}/http.keytab
 GssapiAcceptorName HTTP@localhost
 GssapiAllowedMech krb5
 Require valid-user
</LocationMatch>
<LocationMatch "^(/slow)?/ntlm/">
 AuthType GSSAPI
 AuthName ntlm
 GssapiAllowedMech ntlmssp
 GssapiConnectionBound On
 Require valid-user
</LocationMatch>
<LocationMatch "^(/slow)?/basic/">
 AuthType Basic
 AuthName lab
 AuthUserFile {self.directory}/basic.users
 Require valid-user
</LocationMatch>
<LocationMatch "^(/slow)?/digest/">
 AuthType Digest
 AuthName lab
 AuthDigestProvider file
 AuthUserFile {self.directory}/digest.users
 Require valid-user
</LocationMatch>
{self._host(self.tls_port, "")}{self._host(self.tls12_port, "SSLProtocol -all +TLSv1.2")}""")
        give_to("www-data", self.directory)

    def _host(self, port: int, more: str) -> str:
        return f"""<VirtualHost 127.0.0.1:{port}>
 SSLEngine on
 {more}
 SSLCertificateFile {self._chain}
 SSLCertificateKeyFile {self._key}
 SSLCACertificateFile {self.ca_file}
 <Location /known>
  SSLVerifyClient require
  SSLUserName SSL_CLIENT_S_DN_CN
 </Location>
 CustomLog {self.log.path} fields
</VirtualHost>
"""

    def command(self) -> list[str]:
        return [find_program("apache2") or "apache2", "-f", str(self.directory / "httpd.conf"), "-DFOREGROUND"]


# -- the proxy


class Squid(Server):
    """Squid with one scheme of authentication: "negotiate", "basic", "digest" or "ntlmfake". It caches URLs whose query is `cached`.

    Basic and Digest know alice and helper. "ntlmfake" shows the shape of the handshake only: it takes any password and
    logs a mangled user.
    """

    def __init__(self, auth: str, kdc: MitKdc | None = None) -> None:
        super().__init__(f"squid-{auth}")
        self.auth, self._kdc = auth, kdc
        self.port = 0
        self.log = Log(self.directory / "access.log", parse_passage)

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    @property
    def ports(self) -> Iterable[int]:
        return (self.port,)

    @property
    def environment(self) -> Mapping[str, str]:
        return {"KRB5RCACHENAME": "none:"} | ({"KRB5_CONFIG": str(self._kdc.krb5_conf)} if self._kdc else {})

    def hits(self, expect: int = 0, *, deadline: float = PATIENCE, **match: object) -> list[Passage]:
        """Log lines with these fields (user, status, method, target), once there are at least `expect` of them.

        A tunnel's line comes when the tunnel is closed.
        """
        return self.log.read(expect, deadline=deadline, **match)

    def prepare(self) -> None:
        if self._kdc is not None:
            shutil.copy(self._kdc.keytab("HTTP/localhost"), self.directory / "proxy.keytab")
        users = self.directory / "basic.users"
        users.touch()
        for name in ("alice", "helper"):
            self.run("htpasswd", "-bm", str(users), name, PASSWORDS[name])
        digests = ((name, hashlib.md5(f"{name}:lab:{PASSWORDS[name]}".encode()).hexdigest()) for name in ("alice", "helper"))
        (self.directory / "digest.users").write_text("".join(f"{name}:lab:{digest}\n" for name, digest in digests))
        for name in ("access.log", "cache.log"):
            (self.directory / name).touch()

    def _helper(self) -> str:
        at, helpers = self.directory, SQUID_HELPERS
        return {
            "negotiate": f"negotiate program {helpers}/negotiate_kerberos_auth -s GSS_C_NO_NAME -k {at}/proxy.keytab -t none",
            "basic": f"basic program {helpers}/basic_ncsa_auth {at}/basic.users",
            "digest": f"digest program {helpers}/digest_file_auth -c {at}/digest.users",
            "ntlmfake": f"ntlm program {helpers}/ntlm_fake_auth",
        }[self.auth]

    def configure(self) -> None:
        self.port = free_port()
        helper = self._helper()
        scheme = helper.split()[0]
        more = "realm lab" if scheme in ("basic", "digest") else "keep_alive on"
        (self.directory / "squid.conf").write_text(f"""http_port 127.0.0.1:{self.port}
visible_hostname localhost
pid_filename {self.directory}/squid.pid
cache_log {self.directory}/cache.log
logformat fields %>p\t%un\t%rm %ru\t%>Hs\t%<st\t%Ss%err_code\t%tS
access_log stdio:{self.log.path} fields
coredump_dir {self.directory}
cache_mem 8 MB
acl cached urlpath_regex [?]cached
cache allow cached
cache deny all
pinger_enable off
shutdown_lifetime 0 seconds
icp_port 0
netdb_filename none
dns_nameservers 127.0.0.1
auth_param {helper}
auth_param {scheme} children 4 startup=1 idle=1
auth_param {scheme} {more}
acl auth proxy_auth REQUIRED
http_access deny !auth
http_access allow auth
""")
        give_to("proxy", self.directory)

    def command(self) -> list[str]:
        # -n names its shared memory, which no other Squid of this machine may use.
        return [find_program("squid") or "squid", "-N", "-f", str(self.directory / "squid.conf"), "-n", f"bits{self.port}"]


# -- another origin


class Nginx(Server):
    """Nginx with the files below `root`, over http and https, each in every way that its path begins with.

    `/pub/` as they are; `/dated/` without an ETag; `/unpinned/` with no validator at all; `/whole/` 200 to every range; `/chunked/`
    without a length; `/zipped/` compressed for whoever takes that; `/packed/` the gzip file beside it, whatever was asked for; `/slow/`
    paced; `/getonly/` refuses HEAD. With an authority there are two more ports, which ask for a client's certificate: `required_port`
    serves nobody without one, and on `optional_port` only what is below `/known/` does; the log shows its common name as the user.

    Args:
        authority: signs the certificate; None: no https.
        root: the content; None: a directory of the server's own.
        slow_kib_per_second: the pace of `/slow/`.
    """

    ways: Mapping[str, str] = {
        "pub": "",
        "dated": "etag off;",
        "unpinned": 'etag off; add_header Last-Modified "";',
        "whole": "max_ranges 0;",
        "chunked": "sub_filter_types *; sub_filter_once off; sub_filter no-file-has-this no-file-has-this;",
        "zipped": "gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any; gzip_vary on;",
        "packed": "gzip_static always; default_type application/octet-stream;",
        "getonly": "if ($request_method = HEAD) { return 405; }",
    }

    def __init__(self, authority: Authority | None = None, *, root: Path | None = None, slow_kib_per_second: int = 1024) -> None:
        super().__init__("nginx")
        self._authority, self._slow = authority, slow_kib_per_second
        self.root = self.directory / "www" if root is None else root
        self.ca_file = None if authority is None else authority.ca_file
        self.port = self.tls_port = self.required_port = self.optional_port = 0
        self.log = Log(self.directory / "access.log", parse_hit)

    @property
    def ports(self) -> Iterable[int]:
        return (self.port,) if self._authority is None else (self.port, self.tls_port, self.required_port, self.optional_port)

    def url(self, path: str, *, tls: bool = False) -> str:
        return f"https://localhost:{self.tls_port}{path}" if tls else f"http://localhost:{self.port}{path}"

    def hits(self, expect: int = 0, *, deadline: float = PATIENCE, **match: object) -> list[Hit]:
        """Log lines with these fields (status, method, target ...), once there are at least `expect` of them."""
        return self.log.read(expect, deadline=deadline, **match)

    def prepare(self) -> None:
        self.root.mkdir(exist_ok=True)
        if self._authority is not None:
            self._chain, self._key = self._authority.write_server_files(self.directory)
        self.log.path.touch()

    def configure(self) -> None:
        self.port, self.tls_port, self.required_port, self.optional_port = (free_port() for _ in range(4))
        at = self.directory
        user = "user www-data;" if os.geteuid() == 0 else ""
        tls = asking = ""
        if self._authority is not None:
            shown = f"ssl_certificate {self._chain}; ssl_certificate_key {self._key}; ssl_client_certificate {self._authority.ca_file};"
            known = f"location /known/ {{ if ($ssl_client_verify != SUCCESS) {{ return 403; }} alias {self.root}/; }}"
            asking = "\n".join(
                f" server {{ listen 127.0.0.1:{port} ssl; {shown} ssl_verify_client {how}; location / {{ alias {self.root}/; }} {known} }}"
                for port, how in ((self.required_port, "on"), (self.optional_port, "optional"))
            )
            tls = f"listen 127.0.0.1:{self.tls_port} ssl; ssl_certificate {self._chain}; ssl_certificate_key {self._key};"
        ways = {**self.ways, "slow": f"limit_rate {self._slow}k;"}
        locations = "\n".join(f"  location /{name}/ {{ alias {self.root}/; {how} }}" for name, how in ways.items())
        scratch = "\n".join(f" {kind}_temp_path {at}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (at / "nginx.conf").write_text(f"""{user}
daemon off;
worker_processes 1;
pid {at}/nginx.pid;
error_log {at}/error.log warn;
events {{ worker_connections 512; }}
http {{
 default_type application/octet-stream;
 sendfile on;
 tcp_nopush on;
 keepalive_requests 1000000;
 large_client_header_buffers 4 64k;
 map $ssl_client_s_dn $who {{ default '-'; ~CN=(?<name>[^,]+) $name; }}
 log_format fields '$remote_port\\t$server_port\\t$who\\t$request_method\\t$uri$is_args$args\\t'
  '$status\\t$body_bytes_sent\\t$told\\t$connection_requests\\t$msec\\t$request_time';
 map $http_range $told {{ '' '-'; default $http_range; }}
 access_log {self.log.path} fields;
{scratch}
 server {{
  listen 127.0.0.1:{self.port};
  {tls}
  server_name localhost;
{locations}
 }}
{asking}
}}
""")
        give_to("www-data", at)

    def command(self) -> list[str]:
        return [find_program("nginx") or "nginx", "-c", str(self.directory / "nginx.conf"), "-e", str(self.directory / "error.log")]
