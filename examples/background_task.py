r"""The manager as a background task inside an aiohttp web application: downloads go on while requests come and go.

    POST /downloads {"url": "...", "name": "file.bin"}   -> 202 {"id": "..."}
    GET  /downloads/{id}                                 -> {"state": "TRANSFERRING", "bytes_transferred": ..., ...}

SIGTERM and Ctrl-C stop it: every transfer stops at a durable point, and goes on when the application is started again on the same
directory. background_task.service runs it under systemd. Run without arguments it downloads from a server of its own:

    python examples/background_task.py [--port PORT] [--directory DIR --origin URL]
"""

import argparse
import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from aiohttp import web
from embedded import EmbeddedServers
from yarl import URL

import bits_async as bits

# The servers of this example speak NTLM without TLS. On a network that is for listed servers only: it can be relayed.
RULES = bits.AuthRules(ntlm_over_http=bits.Hosts(["localhost"]))


@dataclass
class Downloads:
    """What this application does with the queue: start jobs, complete them when they are transferred, tell how they stand."""

    manager: bits.BitsManager
    directory: Path
    origin: URL
    proxy: bits.ProxySettings
    credentials: Sequence[bits.AuthCredentials]
    finished: dict[UUID, dict[str, Any]] = field(default_factory=dict)
    later: set[bits.Job] = field(default_factory=set)

    async def start(self, url: str, name: str) -> UUID:
        # Whoever may ask us chooses neither our servers (they would get our credentials) nor our paths. The queue is where no name leads.
        if URL(url).origin() != self.origin:
            raise ValueError(f"only files of {self.origin} are fetched")
        if name.startswith(".") or Path(name).name != name:
            raise ValueError("the name of a file, without directories")
        job = await self.manager.create_job(name)
        await job.set_proxy_settings(self.proxy)
        for each in self.credentials:
            await job.set_credentials(each.target, each.scheme, each.user_name, each.password)
        await job.add_file(url, self.directory / name)
        await job.resume()
        return job.id

    async def describe(self, job_id: str) -> dict[str, Any]:
        if (known := self.finished.get(UUID(job_id))) is not None:
            return known
        job = await self.manager.get_job(job_id)
        return {
            "state": job.state.name,
            "bytes_total": job.progress.bytes_total,
            "bytes_transferred": job.progress.bytes_transferred,
            "waiting": None if job.waiting is None else str(job.waiting),
            "error": None if job.error is None else str(job.error),
        }

    async def complete_transferred(self) -> None:
        """Runs in the background: a transferred file is put in its place, also one that an earlier run of this program left."""
        async with self.manager.events() as events:
            async for job in self.manager.enum_jobs():
                if job.state is bits.JobState.TRANSFERRED:
                    await self._complete(job)
            async for event in events:
                if isinstance(event, bits.JobChanged) and event.state is bits.JobState.TRANSFERRED:
                    await self._complete(await self.manager.get_job(event.job_id))

    async def _complete(self, job: bits.Job) -> None:
        try:
            (path,) = await job.complete()
            self.finished[job.id] = {"state": job.state.name, "path": str(path)}
            self.later.discard(job)
        except bits.InvalidState:
            pass  # completed a moment ago: it was in the list and in an event
        except bits.StoreError as error:
            if not error.transient:
                raise
            self.later.add(job)  # the journal cannot be written now; jobs that somebody holds are told of again when it can
        except bits.LocalFileError as error:
            self.finished[job.id] = {"state": job.state.name, "error": str(error)}


DOWNLOADS = web.AppKey("downloads", Downloads)


async def post(request: web.Request) -> web.Response:
    try:
        wish = await request.json()
        job_id = await request.app[DOWNLOADS].start(str(wish["url"]), str(wish["name"]))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:  # bits.InvalidArgument is a ValueError
        raise web.HTTPBadRequest(text=str(error)) from None
    except bits.StoreError as error:
        if not error.transient:
            raise
        raise web.HTTPServiceUnavailable(text="the queue cannot be written now; try again later") from error
    return web.json_response({"id": str(job_id)}, status=202, headers={"Location": f"/downloads/{job_id}"})


async def get(request: web.Request) -> web.Response:
    try:
        return web.json_response(await request.app[DOWNLOADS].describe(request.match_info["id"]))
    except (ValueError, bits.NotFound):
        raise web.HTTPNotFound from None


def make_app(directory: Path, origin: URL, proxy: bits.ProxySettings, credentials: Sequence[bits.AuthCredentials] = ()) -> web.Application:
    async def queue(app: web.Application) -> AsyncIterator[None]:
        """Opened before the first request, closed after the last one: aiohttp calls this around the application's life."""
        async with bits.BitsManager(store=directory / ".queue" / "queue.db", auth_rules=RULES) as manager:
            app[DOWNLOADS] = downloads = Downloads(manager, directory, origin, proxy, credentials)
            completing = asyncio.create_task(downloads.complete_transferred())
            yield
            completing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await completing

    app = web.Application()
    app.cleanup_ctx.append(queue)
    app.add_routes([web.post("/downloads", post), web.get("/downloads/{id}", get)])
    return app


def serve(app: web.Application, port: int) -> None:
    listener = socket.create_server(("127.0.0.1", port))
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}/downloads", flush=True)
    web.run_app(app, sock=listener, print=None)  # returns after SIGTERM or Ctrl-C, when everything is closed
    print("stopped; what is unfinished goes on at the next start", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="a web application that downloads in the background")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--origin", type=URL)
    options = parser.parse_args()
    if options.directory is not None and options.origin is not None:
        serve(make_app(options.directory.absolute(), options.origin.origin(), bits.ProxySettings.preconfig()), options.port)
        return
    name, password = r"DEMO\alice", "only for this example"
    with EmbeddedServers({name: password}) as servers, tempfile.TemporaryDirectory() as directory:
        credentials = [bits.AuthCredentials(target, bits.AuthScheme.NTLM, name, password) for target in bits.AuthTarget]
        proxy = bits.ProxySettings.override(servers.proxy_url)
        print(f"""try:  curl -d '{json.dumps({"url": servers.origin_url, "name": "file.bin"})}' URL""", flush=True)
        serve(make_app(Path(directory), URL(servers.origin_url).origin(), proxy, credentials), options.port)


if __name__ == "__main__":
    main()
