"""Downloads with the libraries that people use otherwise, in the ordinary way: `others.py ORDER`."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from inside import Inside, order

MIB = 1 << 20


def _tls(wish: dict[str, Any]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=wish.get("ca"))


async def _with_aiohttp(wish: dict[str, Any]) -> None:
    import aiofiles
    import aiohttp

    tls, limit = _tls(wish), asyncio.Semaphore(wish.get("at_once", 1))

    async def fetch(session: aiohttp.ClientSession, url: str, path: str) -> None:
        async with limit, session.get(url) as response, aiofiles.open(path, "wb") as file:
            response.raise_for_status()
            async for chunk in response.content.iter_chunked(wish["chunk"]):
                await file.write(chunk)

    with Inside():
        connector = aiohttp.TCPConnector(ssl=tls, limit=wish.get("at_once", 1))
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            async with asyncio.TaskGroup() as group:
                for url, path in wish["files"]:
                    group.create_task(fetch(session, url, path))


def aiohttp_(wish: dict[str, Any]) -> None:
    asyncio.run(_with_aiohttp(wish))


async def _with_httpx(wish: dict[str, Any]) -> None:
    import aiofiles
    import httpx

    tls = _tls(wish)
    with Inside():
        async with httpx.AsyncClient(verify=tls, timeout=None) as client:
            for url, path in wish["files"]:
                async with client.stream("GET", url) as response, aiofiles.open(path, "wb") as file:
                    response.raise_for_status()
                    async for chunk in response.aiter_bytes(wish["chunk"]):
                        await file.write(chunk)


def httpx_async(wish: dict[str, Any]) -> None:
    asyncio.run(_with_httpx(wish))


def httpx_(wish: dict[str, Any]) -> None:
    import httpx

    tls = _tls(wish)
    with Inside(), httpx.Client(verify=tls, timeout=None) as client:
        for url, path in wish["files"]:
            with client.stream("GET", url) as response, open(path, "wb") as file:
                response.raise_for_status()
                for chunk in response.iter_bytes(wish["chunk"]):
                    file.write(chunk)


def requests_(wish: dict[str, Any]) -> None:
    import requests

    with Inside(), requests.Session() as session:
        session.verify = wish.get("ca") or True
        for url, path in wish["files"]:
            with session.get(url, stream=True, timeout=60) as response, open(path, "wb") as file:
                response.raise_for_status()
                for chunk in response.iter_content(wish["chunk"]):
                    file.write(chunk)


def pypdl_(wish: dict[str, Any]) -> None:
    from pypdl import Pypdl

    ((url, path),) = wish["files"]
    segments = wish["segments"]
    with Inside():
        if Pypdl().start(url, path, segments=segments, multisegment=segments > 1, display=False) is None:
            raise SystemExit("pypdl failed")


CLIENTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "aiohttp": aiohttp_,
    "httpx": httpx_,
    "httpx_async": httpx_async,
    "requests": requests_,
    "pypdl": pypdl_,
}


if __name__ == "__main__":
    wish = order()
    CLIENTS[wish["client"]](wish)
