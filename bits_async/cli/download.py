"""`bits-async download`: options become arguments of `bits_async.download`, its outcome becomes an exit code and a line.

Signal handlers belong here and not in the library. The first signal cancels the call, which suspends the transfer at a durable
point; a second Ctrl-C ends the process at once, which is as safe as any kill.
"""

import asyncio
import contextlib
import getpass
import logging
import os
import re
import signal
import ssl
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from ..auth.policy import MAX_PASSWORD, AuthCredentials, AuthRules, AuthScheme, AuthTarget
from ..errors import BitsError, ErrorCode, ErrorContext, InvalidArgument, error_from_os, make_error, show_text
from ..identity.tokens import HelperTokenFlags, Token
from ..jobs.manager import download
from ..transport.options import ClientCertificate
from ..transport.proxies import ProxySettings
from .progress import Reporter, reporter

if TYPE_CHECKING:
    import spnego

DONE: Final = 0
FAILED: Final = 1
MISUSED: Final = 2  # a value that was typed cannot be meant
SIGNALLED: Final = 128  # and the signal's number

# What the library advises those who hold the job, as whoever runs a command does it: to him there is no job that goes on by itself.
OF_COMMANDS: Final = (
    ("set credentials for the server", "say with --keytab or --ccache who you are to the server (other credentials: from Python)"),
    (
        "set credentials for the proxy (Job.set_credentials with AuthTarget.PROXY)",
        "say who you are to the proxy with --proxy-user and --proxy-password-file, or with --keytab or --ccache",
    ),
    (
        "permit BASIC over plain HTTP with AuthRules(basic_over_http=frozenset({AuthTarget.PROXY})) if it must be",
        "permit BASIC over plain HTTP with --proxy-basic-over-http if it must be",
    ),
    ("then resume the job", "then run the same command again"),
    ("then resume it", "then run the same command again"),
    ("and resume the job", "and run the same command again"),
    ("resume the job when", "run the same command again when"),
    ("resume downloads the file anew", "the same command downloads the file anew"),
    ("the job then goes on from where it stopped", "the same command then goes on from where this one stopped"),
    ("the job goes on from where it stopped", "run the same command again: it goes on from where this one stopped"),
    ("the job goes on by itself when", "run the same command again when"),
    ("the job tries again by itself", "run the same command again later"),
    ("and the trusted authorities", "and the trusted authorities (--cacert)"),
    ("check the job's proxy settings", "check --proxy, or http_proxy and https_proxy in the environment"),
    (", or name its principal", ""),
    ("then try again", "then run the same command again"),
    ("or act as the user who owns it", "or write as the user who owns it (--user)"),
)
# And what it says of arguments, of options.
OF_ARGUMENTS: Final = (
    (re.compile(r"\b(sha256|sha512|blake3)= takes"), r"--\1 takes"),
    (re.compile(r"\bretry_for takes"), "--retry-for takes"),
    (re.compile(r"\bstore= takes"), "--store takes"),
    (re.compile(r"\bmaximum_bandwidth takes (.*), or None, not"), r"--maximum-bandwidth takes \1, not"),
    (re.compile(r"\bNO_PROXY is how"), "--no-proxy is how"),
    (re.compile(r"use set_credentials for the target PROXY"), "--proxy-user and --proxy-password-file say who you are"),
)

HELPER_FLAGS: Final = {
    None: HelperTokenFlags.NONE,
    "local-file": HelperTokenFlags.LOCAL_FILE,
    "network": HelperTokenFlags.NETWORK,
    "both": HelperTokenFlags.LOCAL_FILE | HelperTokenFlags.NETWORK,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """The options that name one identity; `prefix` is how they begin."""

    prefix: str
    user: str | None = None
    keytab: str | None = None
    principal: str | None = None
    ccache: str | None = None

    @property
    def given(self) -> bool:
        """Whether any of the options was used."""
        return any(value is not None for value in (self.user, self.keytab, self.principal, self.ccache))

    def contradiction(self) -> str | None:
        """Why the options cannot be meant."""
        for name in ("user", "keytab", "principal", "ccache"):
            if getattr(self, name) == "":  # a shell's variable that is not set, most likely
                return f"{self.prefix}{name} is empty"
        if (self.keytab is None) != (self.principal is None):
            return f"{self.prefix}keytab and {self.prefix}principal go together"
        if self.keytab is not None and self.ccache is not None:
            return f"{self.prefix}keytab and {self.prefix}ccache exclude each other"
        return None

    async def token(self) -> Token | None:
        """The token; None: no option was used.

        Raises:
            ImpersonationFailed: as `Token.for_user`. InvalidArgument: a credential that cannot be used.
        """
        network = self._credential()
        if self.user is not None:
            return await Token.for_user(self.user, network=network)
        return None if network is None else Token.for_network(network)

    def _credential(self) -> "spnego.Credential | None":
        if self.keytab is None and self.ccache is None:
            return None
        import spnego

        if self.keytab is not None:
            return spnego.KerberosKeytab(_absolute(self.keytab), self.principal)
        assert self.ccache is not None
        return spnego.KerberosCCache(_absolute(self.ccache))


def _absolute(name: str) -> str:
    """A keytab's or cache's name that means the same in every directory: run again elsewhere, the owner is the same."""
    kind, colon, rest = name.partition(":")
    if not colon or "/" in kind:
        return os.path.abspath(name)
    return f"{kind}:{os.path.abspath(rest)}" if kind in ("FILE", "DIR") and rest else name


@dataclass(frozen=True, slots=True)
class Certificate:
    """The options that name a client certificate."""

    file: Path | None = None
    key: Path | None = None
    password_file: Path | None = None
    ask: bool = False

    def contradiction(self, *, stored: bool) -> str | None:
        """Why the options cannot be meant; `stored`: with --store."""
        if self.file is None and (self.key is not None or self.password_file is not None or self.ask):
            return "--key, --cert-password-file and --ask-cert-password go with --cert"
        if self.password_file is not None and self.ask:
            return "--cert-password-file and --ask-cert-password exclude each other"
        if self.ask and stored:
            return "a journal that others go on with (--store) cannot keep what was typed: use --cert-password-file"
        return None

    def given(self) -> ClientCertificate | None:
        """As `download()` takes it; asks for the password, if that is wanted.

        What is typed is kept in memory that has no name on any disk, and that the owner's threads open as they would a file (T27).
        """
        if self.file is None:
            return None
        password = self.password_file
        if self.ask:
            password = Path(f"/proc/self/fd/{_typed(f'What opens {show_text(str(self.file), 200)}: ')}")
        return ClientCertificate(source=self.file, key=self.key, password_file=password)


@dataclass(frozen=True, slots=True)
class ProxyLogin:
    """The options that say who asks the proxy, by name and password."""

    user: str | None = None
    password_file: Path | None = None
    ask: bool = False
    basic_over_http: bool = False

    def contradiction(self) -> str | None:
        """Why the options cannot be meant."""
        if self.user == "":
            return "--proxy-user is empty"
        if self.user is None:
            given = self.password_file is not None or self.ask or self.basic_over_http
            rest = "--proxy-password-file, --ask-proxy-password and --proxy-basic-over-http"
            return f"{rest} go with --proxy-user" if given else None
        if (self.password_file is not None) == self.ask:
            return "--proxy-user needs --proxy-password-file or --ask-proxy-password, one of them"
        return None

    def credentials(self) -> Sequence[AuthCredentials]:
        """For every scheme that takes a name and a password; none: the options were not used. Asks for the password, if that is wanted.

        Raises:
            LocalFileError: the file cannot be read. InvalidArgument: no password in it, or none was typed; one that cannot be sent.
        """
        if self.user is None:
            return ()
        password = self._password() if self.password_file is None else _first_line(self.password_file)
        return [AuthCredentials(AuthTarget.PROXY, scheme, self.user, password) for scheme in AuthScheme]

    def _password(self) -> str:
        assert self.user is not None
        return _line(f"Password of {show_text(self.user, 200)} at the proxy: ")

    @property
    def rules(self) -> AuthRules:
        """What may be shown where."""
        return AuthRules(basic_over_http=frozenset({AuthTarget.PROXY})) if self.basic_over_http else AuthRules()


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline(MAX_PASSWORD + 2).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise InvalidArgument("the password's file is not text in UTF-8", path=path) from None
    except OSError as exc:
        error = error_from_os(exc, path=path, identity=None, doing="read")
        raise make_error(error.code, error.context, error.message, path=path, advice="name a file that you may read") from exc
    if not line:
        raise InvalidArgument("there is no password in the first line", path=path)
    return line


def _line(prompt: str) -> str:
    """Typed on the terminal, unseen.

    Raises:
        InvalidArgument: nothing was.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", getpass.GetPassWarning)  # getpass says it again, in words for a person
            return getpass.getpass(prompt)
    except EOFError:
        raise InvalidArgument("no password was typed") from None


def _typed(prompt: str) -> int:
    """A descriptor with a line that was typed.

    Raises:
        InvalidArgument: nothing was, or there is no such memory here.
    """
    line = _line(prompt)
    if sys.platform != "linux":
        raise InvalidArgument("a password can be typed on Linux only; name a file with --cert-password-file")
    descriptor = os.memfd_create("bits-password")
    os.write(descriptor, line.encode() + b"\n")
    return descriptor


@dataclass(frozen=True, slots=True)
class Order:
    """The command line, typed but not yet believed."""

    url: str
    dest: str
    owner: Identity
    helper: Identity
    proxy: str | None = None
    no_proxy: bool = False
    proxy_login: ProxyLogin = ProxyLogin()
    helper_for: str | None = None
    sha256: str | None = None
    sha512: str | None = None
    blake3: str | None = None
    retry_for: float = 300.0
    maximum_bandwidth: float | None = None
    segments: int = 1
    cacert: Path | None = None
    cert: Certificate = Certificate()
    store: Path | None = None
    json: bool = False

    def contradiction(self) -> str | None:
        """Why the options cannot be meant together; None: they can."""
        if self.proxy is not None and self.no_proxy:
            return "--proxy and --no-proxy exclude each other"
        if self.no_proxy and self.proxy_login.user is not None:
            return "--no-proxy and --proxy-user exclude each other"
        if self.helper.given and self.helper_for is None:
            return "a helper needs --helper-for: local-file, network or both"
        if self.helper_for is not None and not self.helper.given:
            return "--helper-for needs a helper: --helper-user, --helper-keytab or --helper-ccache"
        mine = self.cert.contradiction(stored=self.store is not None) or self.proxy_login.contradiction()
        return mine or self.owner.contradiction() or self.helper.contradiction()

    def credentials(self, login: Sequence[AuthCredentials], owner: Token | None, helper: Token | None) -> Sequence[AuthCredentials] | None:
        """As `download()` takes them: a name and a password for the proxy leave the server what it would be shown without them."""
        if not login:
            return None
        acting = helper if HelperTokenFlags.NETWORK in HELPER_FLAGS[self.helper_for] else owner
        tickets = acting is not None and acting.has_credentials
        return [*([AuthCredentials(AuthTarget.SERVER, AuthScheme.NEGOTIATE, None, None)] if tickets else []), *login]

    @property
    def proxies(self) -> ProxySettings | None:
        """Of the options; None: the environment's."""
        if self.no_proxy:
            return ProxySettings.no_proxy()
        return None if self.proxy is None else ProxySettings.override([self.proxy])

    def destination(self) -> Path:
        """DEST, which must name a file: no name is taken from the URL, because its server would choose what is overwritten.

        Raises:
            InvalidArgument: it is what other programs call standard output.
            LocalFileError: it can only be a directory. (One that exists is found out by the identity that writes.)
        """
        if self.dest == "-":
            raise InvalidArgument(
                "DEST is a file: what can be continued is not written to standard output", advice="./- is a file of that name"
            )
        path = Path(os.path.abspath(self.dest))
        if os.path.basename(self.dest) in ("", ".", ".."):
            raise make_error(ErrorCode.ERROR_FILE_EXISTS, ErrorContext.LOCAL_FILE, "the destination is a directory", path=path)
        return path

    def tls(self) -> ssl.SSLContext | None:
        """The authorities of --cacert, and no others.

        Raises:
            LocalFileError: the file cannot be read. InvalidArgument: there is no certificate in it.
        """
        if self.cacert is None:
            return None
        try:
            context = ssl.create_default_context(cafile=self.cacert)
        except ssl.SSLError:
            raise InvalidArgument("--cacert takes a file of certificates in PEM format", path=self.cacert) from None
        except OSError as exc:
            error = error_from_os(exc, path=self.cacert, identity=None, doing="read")
            raise make_error(error.code, error.context, error.message, path=self.cacert, advice="name a file that you may read") from exc
        if self.cert.file is None:
            return context
        # A client certificate needs contexts of the library's own (T24): they trust what OpenSSL is told to in this process.
        os.environ |= {"SSL_CERT_FILE": os.path.abspath(self.cacert), "SSL_CERT_DIR": os.devnull}
        return None


def run(order: Order) -> int:
    """Download, report, return the exit code."""
    _log_to_stderr()
    stop = Stop()
    try:
        with reporter(os.path.basename(order.dest), as_json=order.json) as report:
            return _outcome(order, report, stop)
    except OSError as exc:  # from our own writing alone: the library raises BitsErrors
        _give_up_output()
        _say(f"cannot write to standard output: {exc.strerror}; run the same command again to continue")
        return FAILED


def told(error: BitsError) -> str:
    """What went wrong, whose and where, and what to do: run the command again, where others would resume a job."""
    text, advice = str(error), error.advice
    if isinstance(error, InvalidArgument):
        for wording, ours in OF_ARGUMENTS:
            text = wording.sub(ours, text)
    if not advice or not text.endswith(advice):
        return text
    for ours, theirs in OF_COMMANDS:
        advice = advice.replace(ours, theirs)
    return text.removesuffix(error.advice) + advice


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where that is installed (the extra of that name); the command works the same on every loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _outcome(order: Order, report: Reporter, stop: "Stop") -> int:
    try:
        secrets = Secrets(order.cert.given(), order.proxy_login.credentials())
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            path = runner.run(_fetch(order, secrets, report, stop))
    except BitsError as error:
        report.failed(error)
        _say(told(error))
        return MISUSED if isinstance(error, InvalidArgument) else FAILED
    except (asyncio.CancelledError, KeyboardInterrupt):  # KeyboardInterrupt: where loops have no signal handlers (Windows)
        received = stop.received or signal.SIGINT
        report.interrupted(received.name)
        _say(f"interrupted by {received.name}; run the same command again to continue")
        return SIGNALLED + received
    report.done(path)
    return DONE


@dataclass(frozen=True, slots=True)
class Secrets:
    """What was read or typed before the loop runs: both wait for a person."""

    certificate: ClientCertificate | None
    login: Sequence[AuthCredentials] = field(repr=False)


async def _fetch(order: Order, secrets: Secrets, report: Reporter, stop: "Stop") -> Path:
    stop.listen(report)
    path, context = order.destination(), order.tls()
    owner, helper = await order.owner.token(), await order.helper.token()
    return await download(
        order.url,
        path,
        proxy=order.proxies,
        credentials=order.credentials(secrets.login, owner, helper),
        owner=owner,
        helper=helper,
        helper_flags=HELPER_FLAGS[order.helper_for],
        sha256=order.sha256,
        sha512=order.sha512,
        blake3=order.blake3,
        progress=report.progress,
        retry_for=order.retry_for,
        maximum_bandwidth=order.maximum_bandwidth,
        segments=order.segments,
        client_certificate=secrets.certificate,
        store=order.store,
        ssl=context,
        auth_rules=order.proxy_login.rules,
    )


class Stop:
    """The first signal cancels the task that listens; a second Ctrl-C ends the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self, report: Reporter) -> None:
        """From now on, in the running task."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            each = getattr(signal, name, None)
            if each is None or signal.getsignal(each) is signal.SIG_IGN:  # nohup, a shell's background job: meant to go on
                continue
            with contextlib.suppress(NotImplementedError):  # Windows: asyncio.run() makes Ctrl-C a KeyboardInterrupt
                loop.add_signal_handler(each, self._on_signal, each, task, report)

    def _on_signal(self, each: signal.Signals, task: "asyncio.Task[Path]", report: Reporter) -> None:
        if self.received is None:
            self.received = each
            report.stopping()
            task.cancel()
        elif each is signal.SIGINT:  # only Ctrl-C is impatience: service managers send SIGTERM and SIGHUP together
            os._exit(SIGNALLED + each)


# -- standard error ---------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it; the exit code is left
        typer.echo("bits-async: " + show_text(text, 4000), err=True)


class _OneLine(logging.Handler):
    """Warnings of the package, a line each. No tracebacks: they may quote what peers sent (T14)."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


def _log_to_stderr() -> None:
    log = logging.getLogger("bits_async")
    log.addHandler(_OneLine(logging.WARNING))
    log.propagate = False


def _give_up_output() -> None:
    """Nothing is flushed to a closed pipe at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
