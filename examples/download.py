r"""One call: fetch a file, resumably. Run it again after Ctrl-C or a kill and it goes on where it stopped.

python examples/download.py                         against a server of its own
python examples/download.py URL DEST [--proxy URL]
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

from embedded import EmbeddedServers

import bits_async as bits

# The servers of this example speak NTLM without TLS. On a network that is for listed servers only: it can be relayed.
RULES = bits.AuthRules(ntlm_over_http=bits.Hosts(["localhost"]))


async def fetch(url: str, path: Path, proxy: str | None, credentials: list[bits.AuthCredentials] | None) -> None:
    def show(progress: bits.Progress) -> None:
        total = "?" if progress.bytes_total is None else f"{progress.bytes_total:,}"
        print(f"{progress.state.name:15} {progress.bytes_transferred:,} of {total} bytes")

    try:
        done = await bits.download(url, path, proxy=proxy, credentials=credentials, progress=show, auth_rules=RULES)
    except bits.BitsError as error:
        # One line for the operator: the BITS code, whose fault it was, the identity, the path or URL, and what to do.
        raise SystemExit(str(error)) from None
    print(f"{done} is whole: {done.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="fetch one file")
    parser.add_argument("url", nargs="?")
    parser.add_argument("dest", nargs="?", type=Path)
    parser.add_argument("--proxy")
    options = parser.parse_args()
    if options.url is not None:
        if options.dest is None:
            parser.error("where to?")
        asyncio.run(fetch(options.url, options.dest, options.proxy, None))
        return
    name, password = r"DEMO\alice", "only for this example"
    with EmbeddedServers({name: password}, cut_after=5_000_000) as servers, tempfile.TemporaryDirectory() as directory:
        # The embedded servers want NTLM. Real credentials come from a safe place, never from a command line.
        credentials = [bits.AuthCredentials(target, bits.AuthScheme.NTLM, name, password) for target in bits.AuthTarget]
        asyncio.run(fetch(servers.origin_url, Path(directory, "file.bin"), servers.proxy_url, credentials))


if __name__ == "__main__":
    main()
