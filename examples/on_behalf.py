r"""A web service behind Negotiate fetches files for its callers: as each of them, or as itself.

    POST /fetch/NAME          whoever calls reaches the origin himself (impersonation and delegation)
    POST /own/NAME            the service reaches it, whoever calls (trusted subsystem)

Impersonation: choose it where the origin decides, user by user, who may have what, or its log must show who it was. It needs a
realm that lets this service act for its callers, and no two callers share a connection.
Trusted subsystem: choose it where this service decides, or all callers get the same. It needs nothing of the realm, connections are
shared, and the origin trusts and logs the service alone: whoever takes the service over has everything.

The account is allowed constrained delegation to the origin's HTTP service (Active Directory: msDS-AllowedToDelegateTo), or callers
forward their tickets to it. The keytab holds the keys of ACCOUNT and of the service principal that callers ask for. TLS belongs in
front of it; it listens on 127.0.0.1.

    python examples/on_behalf.py KEYTAB ACCOUNT@REALM ORIGIN DIRECTORY [--port PORT]
"""

import argparse
import asyncio
import base64
import binascii
import secrets
from dataclasses import dataclass
from pathlib import Path

import gssapi
import spnego
from aiohttp import web
from aiohttp.typedefs import Handler

import bits_async as bits

# -- who calls


@dataclass
class Door:
    """Answers Negotiate with this service's keys."""

    keytab: str
    account: str

    def accept(self, token: bytes) -> tuple[gssapi.SecurityContext, bytes]:
        """The service's side of a login; blocks. Usage "both" is what lets it act for its callers."""
        store = {"keytab": self.keytab, "client_keytab": self.keytab, "ccache": "MEMORY:own"}
        name = gssapi.Name(self.account, gssapi.NameType.kerberos_principal)
        context = gssapi.SecurityContext(creds=gssapi.Credentials(name=name, usage="both", store=store), usage="accept")
        return context, context.step(token) or b""

    async def caller(self, request: web.Request) -> tuple[gssapi.SecurityContext, dict[str, str]]:
        """The login of a request, and the header that proves this service to the caller."""
        scheme, _, text = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "negotiate":
            raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Negotiate"})
        try:
            token = base64.b64decode(text, validate=True)
            context, proof = await bits.run_as(bits.Token.for_process(), self.accept, token)
        except (binascii.Error, gssapi.exceptions.GSSError):
            raise web.HTTPForbidden(text="this login is not accepted") from None
        if not context.complete:
            raise web.HTTPForbidden(text="logins of one step only")
        return context, {"WWW-Authenticate": f"Negotiate {base64.b64encode(proof).decode()}"}


# -- what it fetches


@dataclass
class Service:
    door: Door
    origin: str
    directory: Path
    own: bits.Token

    async def fetch(self, request: web.Request) -> web.Response:
        login, proof = await self.door.caller(request)
        url, path = self.place(request)
        caller = await bits.Token.from_delegated(login)
        try:
            # Impersonation: the file is the service's, the origin sees the caller.
            await bits.download(url, path, helper=caller, helper_flags=bits.HelperTokenFlags.NETWORK)
        finally:
            caller.close()
        return web.json_response({"path": str(path), "as": caller.name}, headers=proof)

    async def fetch_as_itself(self, request: web.Request) -> web.Response:
        _, proof = await self.door.caller(request)
        url, path = self.place(request)
        # Trusted subsystem: the origin sees the service.
        await bits.download(url, path, owner=self.own)
        return web.json_response({"path": str(path), "as": self.own.name}, headers=proof)

    def place(self, request: web.Request) -> tuple[str, Path]:
        name = request.match_info["name"]  # one component, by the route
        if name.startswith("."):
            raise web.HTTPBadRequest(text="the name of a file")
        return f"{self.origin}/{name}", self.directory / f"{name}-{secrets.token_hex(4)}"


@web.middleware
async def say_why(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except bits.BitsError as error:
        return web.json_response({"error": str(error)}, status=502)


async def main(options: argparse.Namespace) -> None:
    own = bits.Token.for_network(spnego.KerberosKeytab(options.keytab, options.account))
    service = Service(Door(options.keytab, options.account), options.origin.rstrip("/"), options.directory.absolute(), own)
    app = web.Application(middlewares=[say_why])
    app.add_routes([web.post("/fetch/{name}", service.fetch), web.post("/own/{name}", service.fetch_as_itself)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.port)
    await site.start()
    print(f"listening on {runner.addresses[0][1]}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="files for callers, as each of them")
    parser.add_argument("keytab")
    parser.add_argument("account")
    parser.add_argument("origin")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0)
    try:
        asyncio.run(main(parser.parse_args()))
    except KeyboardInterrupt:
        pass
