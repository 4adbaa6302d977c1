"""A service that runs for months: the authorities that it trusts are replaced while it runs."""

from pathlib import Path

import pytest

import bits_async as bits
from bits_async.jobs import parties
from tests.peers import Authority, Origin


async def test_authorities_that_were_replaced_while_the_manager_runs_count_from_then_on(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted = tmp_path / "trusted.pem"
    trusted.touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "no directory"))
    monkeypatch.setattr(parties, "AUTHORITIES_AGAIN", 0.0)
    async with Origin(tls=authority.server) as origin, bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await manager.create_job("renewed")
        await job.add_file(origin.serve("/file", b"bytes"), tmp_path / "file")
        await job.resume()
        with pytest.raises(bits.NetworkError, match="certificate refused"):
            await job.wait()
        trusted.write_bytes(authority.ca_file.read_bytes())
        await job.resume()
        await job.wait()
        await job.complete()
        trusted.write_bytes(b"")  # and nobody is trusted who is no longer there
        other = await manager.create_job("distrusted")
        await other.add_file(origin.serve("/other", b"bytes"), tmp_path / "other")
        await other.resume()
        with pytest.raises(bits.NetworkError, match="certificate refused"):
            await other.wait()
    assert (tmp_path / "file").read_bytes() == b"bytes"
