"""Downloads with bits_async, as an application would: `ours.py ORDER`.

The manager is open before the clock starts, as it is in a service; the clock stops when the files have their names and are durable.
"""

import asyncio
import ssl
import time
from typing import Any

from inside import Inside, order

import bits_async as bits


def _tls(wish: dict[str, Any]) -> ssl.SSLContext | None:
    return ssl.create_default_context(cafile=wish["ca"]) if wish.get("ca") else None


async def _job(manager: bits.BitsManager, files: list[list[str]], priority: bits.JobPriority = bits.JobPriority.FOREGROUND) -> bits.Job:
    job = await manager.create_job("benchmark", priority=priority)
    await job.add_file_set([bits.FileInfo(url, path) for url, path in files])
    return job


async def _see_through(job: bits.Job) -> None:
    await job.resume()
    await job.wait()
    await job.complete()


async def one_job(manager: bits.BitsManager, wish: dict[str, Any]) -> None:
    """All files as one job."""
    with Inside():
        job = await _job(manager, wish["files"])
        if "files_at_once" in wish:
            await job.set_files_at_once(wish["files_at_once"])
        await _see_through(job)


async def many_jobs(manager: bits.BitsManager, wish: dict[str, Any]) -> None:
    """Each file as a job of its own."""
    with Inside():
        async with asyncio.TaskGroup() as group:
            for file in wish["files"]:
                group.create_task(_see_through(await _job(manager, [file])))


async def in_line(manager: bits.BitsManager, wish: dict[str, Any]) -> None:
    """All files as the one background job that runs; others wait behind it."""
    with Inside():
        await _see_through(await _job(manager, wish["files"], bits.JobPriority.HIGH))


async def limited(manager: bits.BitsManager, wish: dict[str, Any]) -> None:
    """All files as one job with a limit of speed (bytes per second); "rate" is how much of it was used."""
    job = await _job(manager, wish["files"])
    await job.set_maximum_bandwidth(wish["rate"])
    with Inside() as inside:
        begin = time.perf_counter()
        await job.resume()
        await job.wait()
        inside.more["rate"] = job.progress.bytes_transferred / (time.perf_counter() - begin) / wish["rate"]
        await job.complete()


async def for_another(manager: bits.BitsManager, wish: dict[str, Any]) -> None:
    """The file is written by another user of this machine."""
    helper = await bits.Token.for_user(wish["user"])
    with Inside():
        job = await _job(manager, wish["files"])
        options = await job.token_options()
        with bits.impersonate(helper):
            await options.set_helper_token()
        await options.set_helper_token_flags(bits.HelperTokenFlags.LOCAL_FILE)
        await _see_through(job)


async def logged_in(manager: bits.BitsManager, wish: dict[str, Any]) -> None:
    """The server wants Kerberos."""
    import spnego

    credential = spnego.KerberosKeytab(wish["keytab"], wish["principal"])
    with Inside():
        job = await manager.create_job("benchmark", priority=bits.JobPriority.FOREGROUND, owner=bits.Token.for_network(credential))
        await job.add_file_set([bits.FileInfo(url, path) for url, path in wish["files"]])
        await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.NEGOTIATE, None, None)
        await _see_through(job)


WORK = {
    "limited": limited,
    "one_job": one_job,
    "many_jobs": many_jobs,
    "in_line": in_line,
    "for_another": for_another,
    "logged_in": logged_in,
}


async def main(wish: dict[str, Any]) -> None:
    if wish["work"] == "open":
        with Inside():
            manager = await bits.BitsManager(store=wish["journal"], run=False).__aenter__()
        await manager.aclose()
        return
    async with bits.BitsManager(store=wish.get("journal", wish["store"]), ssl=_tls(wish)) as manager:
        await WORK[wish["work"]](manager, wish)


if __name__ == "__main__":
    asyncio.run(main(order()))
