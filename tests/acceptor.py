"""The accepting half of NTLM, Negotiate and Kerberos, in a process of its own.

pyspnego's acceptor finds its users by the environment variable NTLM_USER_FILE, and GSSAPI keeps a replay cache; neither
belongs into the process under test. So the peers of `peers.py`, which live on the test's own event loop, ask this child.
One connection to it is one security context: the first line says which mechanism and which users, each further line is
a token, each line back is the verdict.
"""

import asyncio
import atexit
import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

LINE_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True)
class Verdict:
    """What one token led to: the answering token, and the user once the login is complete; whose tickets came with it."""

    token: bytes
    user: str | None
    error: str | None
    delegated: str | None = None


class Context:
    """One login in the child."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, mechanism: str, *, users: Mapping[str, str], keytab: Path | None = None, binding: bytes | None = None) -> "Context":
        """Begin a login by "ntlm", "negotiate" (SPNEGO around NTLM) or "kerberos".

        With `binding`, the application data of the channel binding, a token that lacks it is refused.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", start(), limit=LINE_LIMIT)
        context = cls(reader, writer)
        context._send(
            mechanism=mechanism,
            users=dict(users),
            keytab=str(keytab) if keytab else None,
            binding=base64.b64encode(binding).decode() if binding is not None else None,
            config=os.environ.get("KRB5_CONFIG"),
        )
        return context

    def _send(self, **values: Any) -> None:
        self._writer.write(json.dumps(values).encode() + b"\n")

    async def step(self, token: bytes) -> Verdict:
        self._send(token=base64.b64encode(token).decode())
        found = json.loads(await self._reader.readline())
        return Verdict(base64.b64decode(found["token"]), found["user"], found["error"], found["delegated"])

    def close(self) -> None:
        self._writer.transport.abort()


_child: "subprocess.Popen[str] | None" = None
_port = 0


def start() -> int:
    """The child's port; the child is started at the first call and ends with this process."""
    global _child, _port
    if _child is None or _child.poll() is not None:
        _child = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(stop)
        assert _child.stdout is not None
        _port = int(_child.stdout.readline())
    return _port


def stop() -> None:
    global _child
    if _child is not None:
        assert _child.stdin is not None
        assert _child.stdout is not None
        _child.stdin.close()  # the child serves until its standard input ends
        _child.stdout.close()
        try:
            _child.wait(5)
        except subprocess.TimeoutExpired:
            _child.kill()
            _child.wait()
        _child = None


# -- in the child


class Gssapi:
    """Kerberos by python-gssapi: pyspnego's acceptor does not say whether a token was bound to the channel."""

    CHANNEL_BOUND = 0x800

    def __init__(self, keytab: str, binding: bytes | None) -> None:
        import gssapi
        from gssapi.raw import ChannelBindings

        self._binding = binding
        make_bindings: Any = ChannelBindings  # compiled, without annotations
        bindings = make_bindings(application_data=binding) if binding is not None else None
        credentials = gssapi.Credentials(usage="accept", store={"keytab": keytab})
        self._context: Any = gssapi.SecurityContext(
            creds=credentials,
            usage="accept",
            channel_bindings=bindings,
        )

    def step(self, token: bytes) -> tuple[bytes, str | None]:
        reply = self._context.step(token) or b""
        if not self._context.complete:
            return reply, None
        if self._binding is not None and not int(self._context.actual_flags) & self.CHANNEL_BOUND:
            raise PermissionError("the token is not bound to this channel")
        return reply, str(self._context.initiator_name)

    @property
    def delegated(self) -> str | None:
        tickets = self._context.delegated_creds if self._context.complete else None
        return None if tickets is None else str(tickets.name)


class Spnego:
    """NTLM, alone or inside SPNEGO, by pyspnego."""

    delegated = None

    def __init__(self, mechanism: str, users_file: Path, binding: bytes | None) -> None:
        self._mechanism, self._users_file, self._binding = mechanism, users_file, binding
        self._context: Any = None

    @staticmethod
    def _server(protocol: str, binding: bytes | None) -> Any:
        import spnego
        from spnego.channel_bindings import GssChannelBindings

        bindings = GssChannelBindings(application_data=binding) if binding is not None else None
        options = spnego.NegotiateOptions.none
        if protocol == "negotiate":  # where python-gssapi is installed it would else want a keytab for Kerberos
            options = spnego.NegotiateOptions.use_negotiate | spnego.NegotiateOptions.use_ntlm
        return spnego.server(protocol=protocol, channel_bindings=bindings, options=options)

    def step(self, token: bytes) -> tuple[bytes, str | None]:
        os.environ["NTLM_USER_FILE"] = str(self._users_file)  # read at each step; this process serves one step at a time
        if self._context is None:
            # Under "Negotiate" many clients send NTLM without the wrapping of SPNEGO.
            self._context = self._server("ntlm" if token.startswith(b"NTLMSSP\0") else self._mechanism, self._binding)
        reply = self._context.step(token) or b""
        return reply, self._context.client_principal if self._context.complete else None


def _login(wish: Mapping[str, Any], directory: Path) -> "Gssapi | Spnego":
    binding = base64.b64decode(wish["binding"]) if wish["binding"] is not None else None
    if wish["mechanism"] == "kerberos":
        if wish["config"]:
            os.environ["KRB5_CONFIG"] = wish["config"]
        return Gssapi(wish["keytab"], binding)
    lines = "".join(f"{name.replace(chr(92), ':')}:{password}\n" for name, password in wish["users"].items())
    users_file = directory / f"users-{abs(hash(lines))}"
    users_file.write_text(lines)
    return Spnego(wish["mechanism"], users_file, binding)


async def _serve_context(directory: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    login: Gssapi | Spnego | None = None
    try:
        wish = json.loads(await reader.readline() or b"null")
        while wish and (line := await reader.readline()):
            try:
                login = login or _login(wish, directory)
                token, user = login.step(base64.b64decode(json.loads(line)["token"]))
                verdict = {"token": base64.b64encode(token).decode(), "user": user, "error": None, "delegated": login.delegated}
            except Exception as error:  # whatever a bad token led to is the verdict, never the end of this process
                verdict = {"token": "", "user": None, "error": f"{type(error).__name__}: {error}", "delegated": None}
            writer.write(json.dumps(verdict).encode() + b"\n")
            await writer.drain()
    except OSError:
        pass  # the peer's connection went away in the middle of a login
    finally:
        writer.close()


async def _serve() -> None:
    os.environ["KRB5RCACHENAME"] = "none:"  # tests repeat themselves within a second
    with tempfile.TemporaryDirectory(prefix="bits-acceptor-") as directory:
        server = await asyncio.start_server(
            lambda reader, writer: _serve_context(Path(directory), reader, writer), "127.0.0.1", 0, limit=LINE_LIMIT
        )
        print(cast("int", server.sockets[0].getsockname()[1]), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        server.close()


if __name__ == "__main__":
    asyncio.run(_serve())
