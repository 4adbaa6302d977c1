r"""The helper-token story: a service writes where only it may write, and shows the servers somebody with fewer rights.

The job belongs to the service (its owner). A second token, the helper, is set on it as BITS does with IBitsTokenOptions: take
the options, impersonate, set the token and the flags, which say where it acts. Here that is the network, so the proxy and the origin see
the helper, and the file is the service's. With HelperTokenFlags.LOCAL_FILE it would be the other way round.

    python examples/two_identities.py                                      against servers of its own (NTLM)
    python examples/two_identities.py URL DEST KEYTAB PRINCIPAL [--proxy URL]     Kerberos: the helper is PRINCIPAL
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

import spnego
from embedded import EmbeddedServers

import bits_async as bits

# The servers of this example speak NTLM without TLS. On a network that is for listed servers only: it can be relayed.
RULES = bits.AuthRules(ntlm_over_http=bits.Hosts(["localhost"]))


async def fetch(url: str, path: Path, proxy: str | None, helper: bits.Token, scheme: bits.AuthScheme, store: Path) -> None:
    async with bits.BitsManager(store=store, auth_rules=RULES) as manager:
        job = await manager.create_job("nightly update", priority=bits.JobPriority.FOREGROUND)
        await job.add_file(url, path)
        if proxy is not None:
            await job.set_proxy_settings(bits.ProxySettings.override(proxy))

        # Permission to answer challenges with the acting token's own credentials (None, None), and the token that acts.
        for target in bits.AuthTarget:
            await job.set_credentials(target, scheme, None, None)
        options = await job.token_options()
        with bits.impersonate(helper):
            await options.set_helper_token()
            await options.set_helper_token_flags(bits.HelperTokenFlags.NETWORK)
        print(f"owner {job.owner_name}, helper {options.helper_token_sid} for {options.helper_token_flags.name}")

        await job.resume()
        try:
            await job.wait()
            await job.complete()
        except bits.BitsError as error:
            await job.cancel()
            raise SystemExit(str(error)) from None
    print(f"{path} belongs to uid {path.stat().st_uid}")


def main() -> None:
    parser = argparse.ArgumentParser(description="a job with a helper token")
    parser.add_argument("url", nargs="?")
    parser.add_argument("dest", nargs="?", type=Path)
    parser.add_argument("keytab", nargs="?")
    parser.add_argument("principal", nargs="?")
    parser.add_argument("--proxy")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory, "queue.db")
        if options.url is not None:
            if options.principal is None:
                parser.error("URL, DEST, KEYTAB and PRINCIPAL go together")
            helper = bits.Token.for_network(spnego.KerberosKeytab(options.keytab, options.principal))
            dest = options.dest.absolute()  # a job's path is absolute: its manager may run elsewhere
            asyncio.run(fetch(options.url, dest, options.proxy, helper, bits.AuthScheme.NEGOTIATE, store))
            return
        name, password = r"DEMO\helper", "only for this example"
        helper = bits.Token.for_network(spnego.Password(name, password))
        with EmbeddedServers({name: password}) as servers:
            dest = Path(directory, "file.bin")
            asyncio.run(fetch(servers.origin_url, dest, servers.proxy_url, helper, bits.AuthScheme.NTLM, store))
            for server in ("proxy", "origin"):
                seen = {entry["user"] for entry in servers.log() if entry["server"] == server and entry["status"] < 400}
                print(f"the {server} saw {', '.join(sorted(seen))}")


if __name__ == "__main__":
    main()
