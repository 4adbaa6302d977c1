"""What can be typed: the commands of `bits-async` and their options.

Nothing is done here, and nothing heavy is imported: a command loads its own module when it runs, so that `--help` answers at
once. No option takes a secret, because every user of the machine can read a command line.
"""

import enum
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from .. import __version__
from ..errors import show_text, show_url

USAGE: Final = 2
INTERRUPTED: Final = 130

_URL: Final = re.compile(r"https?://[^\s'\"]+", re.IGNORECASE)

app: Final = typer.Typer(
    help="Background HTTP transfers: durable, resumable, with two identities per job.",
    add_completion=False,
    rich_markup_mode=None,  # plain text reads the same in a terminal, a pipe and a log
    pretty_exceptions_enable=False,  # its tracebacks show local variables, which may be secrets
)


class HelperFor(enum.Enum):
    """The values of --helper-for."""

    LOCAL_FILE = "local-file"
    NETWORK = "network"
    BOTH = "both"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bits-async {__version__}")
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """The options before a command."""


EPILOG: Final = """\b
Where credentials come from:
No option takes a password. Servers and proxies are shown Kerberos credentials
from --keytab or --ccache, in answer to a Negotiate challenge of the URL's host
or the proxy, never of a redirect. Without these options nothing is sent; your
own tickets are sent if you name them: --ccache "$KRB5CCNAME". A proxy that
asks for a name and a password (Negotiate, NTLM, Digest, Basic) is shown those
of --proxy-user; Basic over plain HTTP, where all can read it, only with
--proxy-basic-over-http. A server that asks for a client certificate is shown
that of --cert. Programs can set other credentials through the Python API.

\b
Exit codes:
0 the destination holds the whole file; 1 it does not, standard error says why;
2 the command line is wrong; 130 Ctrl-C, 143 SIGTERM: run it again to continue.
"""


@app.command(epilog=EPILOG)
def download(
    url: Annotated[str, typer.Argument(metavar="URL", help="http or https, without user name and password.", show_default=False)],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="The file to write, not a directory.", show_default=False)],
    proxy: Annotated[str | None, typer.Option(metavar="URL", help="Ask this proxy, not the environment's.")] = None,
    no_proxy: Annotated[bool, typer.Option("--no-proxy", help="Ask the server directly.")] = False,
    proxy_user: Annotated[str | None, typer.Option(metavar="NAME", help="Who you are to the proxy.")] = None,
    proxy_password_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Its first line is the proxy's password.")] = None,
    ask_proxy_password: Annotated[bool, typer.Option("--ask-proxy-password", help="Ask for it on the terminal.")] = False,
    proxy_basic_over_http: Annotated[bool, typer.Option("--proxy-basic-over-http", help="Show it unencrypted, if need be.")] = False,
    user: Annotated[str | None, typer.Option(metavar="NAME", help="Write the file as this local user.")] = None,
    keytab: Annotated[str | None, typer.Option(metavar="FILE", help="Kerberos keys; goes with --principal.")] = None,
    principal: Annotated[str | None, typer.Option(metavar="P", help="Whose keys: name@REALM.")] = None,
    ccache: Annotated[str | None, typer.Option(metavar="NAME", help="Kerberos tickets: a file, or TYPE:NAME.")] = None,
    helper_user: Annotated[str | None, typer.Option(metavar="NAME", help="The helper is this local user.")] = None,
    helper_keytab: Annotated[str | None, typer.Option(metavar="FILE", help="The helper's Kerberos keys.")] = None,
    helper_principal: Annotated[str | None, typer.Option(metavar="P", help="Whose keys: name@REALM.")] = None,
    helper_ccache: Annotated[str | None, typer.Option(metavar="NAME", help="The helper's Kerberos tickets.")] = None,
    helper_for: Annotated[HelperFor | None, typer.Option(help="Where the helper acts instead of the owner.")] = None,
    sha256: Annotated[str | None, typer.Option(metavar="HEX", help="Refuse a file with another digest.")] = None,
    sha512: Annotated[str | None, typer.Option(metavar="HEX", help="The same, by SHA-512.")] = None,
    blake3: Annotated[str | None, typer.Option(metavar="HEX", help="The same, by BLAKE3 (extra 'blake3').")] = None,
    retry_for: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Try again for so long without a byte.")] = 300.0,
    maximum_bandwidth: Annotated[
        float | None, typer.Option("--maximum-bandwidth", metavar="BYTES", min=1, help="Bytes per second at most.")
    ] = None,
    segments: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Fetch a large file in N ranges side by side.")] = 1,
    cacert: Annotated[Path | None, typer.Option(metavar="FILE", help="Trust these certificate authorities only (PEM).")] = None,
    cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Show this client certificate (PEM, PKCS#12).")] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key, if it is in another file.")] = None,
    cert_password_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Its first line opens the key.")] = None,
    ask_cert_password: Annotated[bool, typer.Option("--ask-cert-password", help="Ask on the terminal what opens the key.")] = False,
    store: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the journal here, not in a private place.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Write events to standard output, one JSON object a line.")] = False,
) -> None:
    """Download URL to DEST; run again after a kill or an error, it continues.

    The owner of the transfer (--user, --keytab or --ccache; else you) does everything, unless a helper does its part: so a
    service may write where only it may write, and show the server and the proxy somebody with fewer rights; or the other way
    round.
    """
    try:
        with _loading():
            from .download import Certificate, Identity, Order, ProxyLogin, run

        order = Order(
            url=url,
            dest=dest,
            proxy=proxy,
            no_proxy=no_proxy,
            proxy_login=ProxyLogin(proxy_user, proxy_password_file, ask_proxy_password, proxy_basic_over_http),
            owner=Identity("--", user, keytab, principal, ccache),
            helper=Identity("--helper-", helper_user, helper_keytab, helper_principal, helper_ccache),
            helper_for=None if helper_for is None else helper_for.value,
            sha256=sha256,
            sha512=sha512,
            blake3=blake3,
            retry_for=retry_for,
            maximum_bandwidth=maximum_bandwidth,
            segments=segments,
            cacert=cacert,
            cert=Certificate(cert, key, cert_password_file, ask_cert_password),
            store=store,
            json=json,
        )
        contradiction = order.contradiction()
        if contradiction is not None:
            _complain(f"{contradiction}. Try 'bits-async download --help'.")
            raise typer.Exit(USAGE)
        raise typer.Exit(run(order))
    except KeyboardInterrupt:  # before the transfer began, or after it ended; in between it is run()'s
        _complain("interrupted; run the same command again to continue")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _loading() -> Iterator[None]:
    """Many small objects that stay: for the garbage collector to look through them again and again would take a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def main() -> int:
    """The console script; returns the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # The caller closed it: nobody writes or reads it. Its number must not become the loop's own: uvloop aborts when it closes that.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the process ends
    try:
        result: Any = app(args=sys.argv[1:] or ["--help"], prog_name="bits-async", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        message = getattr(error, "format_message", None)  # what click, or typer's own copy of it, refuses
        if message is None:
            raise
        path = getattr(getattr(error, "ctx", None), "command_path", None) or "bits-async"
        _complain(f"{message().replace('Value error, ', '').rstrip('.')}. Try '{path} --help'.")
        return USAGE
    return result if isinstance(result, int) else 0


def _complain(text: str) -> None:
    """One line; arguments that it quotes may hold a signed URL or a terminal's escape codes (T14)."""
    typer.echo("bits-async: " + show_text(_URL.sub(lambda found: show_url(found[0]), text), 1000), err=True)
