"""Never run: mypy --strict reads it as an application's code, so that the public types stay what they are."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import assert_type
from uuid import UUID

import spnego
from yarl import URL

import bits_async as bits
from bits_async.testing import FakeNetwork, fake_token


def show(progress: bits.Progress) -> None:
    assert_type(progress.bytes_total, int | None)


async def one_call(token: bits.Token) -> None:
    path = await bits.download(
        URL("https://h/f"),
        "f",
        proxy="http://proxy:3128",
        credentials=[bits.AuthCredentials(bits.AuthTarget.PROXY, bits.AuthScheme.NEGOTIATE, None, None)],
        owner=token,
        helper=fake_token("helper", elevated=False),
        helper_flags=bits.HelperTokenFlags.NETWORK | bits.HelperTokenFlags.LOCAL_FILE,
        sha256="0" * 64,
        sha512="0" * 128,
        blake3="0" * 64,
        progress=show,
        priority=bits.JobPriority.FOREGROUND,
        retry_for=0,
        maximum_bandwidth=1e6,
        segments=4,
        client_certificate=bits.ClientCertificate(source=Path("/srv/me.pem")),
        store=Path("queue.db"),
        ssl=ssl.create_default_context(),
    )
    assert_type(path, Path)


async def logon(job: bits.Job) -> bits.Token | None:
    return None


async def looks_right(job: bits.Job, file: bits.JobFile, certificate: bytes) -> bool:
    return False


class Hears(bits.BackgroundCopyCallback):
    def job_transferred(self, job: bits.Job) -> None:
        return None

    async def job_error(self, job: bits.Job, error: bits.BitsError) -> None:
        await job.cancel()

    async def file_ranges_transferred(self, job: bits.Job, file: bits.JobFile, ranges: Sequence[bits.FileRange]) -> None:
        return None


async def notified(job: bits.Job, network: FakeNetwork) -> None:
    await job.set_notify_interface(Hears())
    await job.set_notify_interface(None)
    assert_type(job.notify_interface, bits.BackgroundCopyCallback | None)
    await job.set_notify_flags(bits.NotifyFlags.JOB_ERROR | bits.NotifyFlags.FILE_TRANSFERRED)
    await job.set_minimum_notification_interval(1)
    await job.set_notify_cmd_line("/bin/true")
    await job.set_notify_cmd_line("/bin/true", ["true", "x"])
    await job.set_notify_cmd_line("/bin/true", "true x")
    await job.set_notify_cmd_line(None)
    assert_type(job.notify_cmd_line, bits.NotifyCmdLine | None)
    network.fail_command(3, times=2)
    assert_type(network.commands[0].parameters, tuple[str, ...])


async def the_queue() -> None:
    manager = bits.BitsManager(
        store="queue.db", limits=bits.Limits(background_jobs=2), timeouts=bits.Timeouts(connect=5), run=True, logon=logon
    )
    async with manager as same:
        assert_type(same, bits.BitsManager)
        job = await manager.create_job("name", priority=bits.JobPriority.HIGH, owner=None, segments=4, files_at_once=8)
        assert_type(job, bits.Job)
        assert_type(job.id, UUID)
        assert_type(job.state, bits.JobState)
        assert_type(job.state.is_final, bool)
        assert_type(job.error, bits.BitsError | None)
        assert_type(job.waiting, bits.Waiting | None)
        assert_type(job.progress.bytes_total, int | None)
        assert_type(await job.add_file("http://h/f", "/f", sha256=None), bits.JobFile)
        assert_type(await job.add_file_set([bits.FileInfo("http://h/f", "/f")]), Sequence[bits.JobFile])
        await job.set_proxy_settings(bits.ProxySettings.override(["http://proxy:1"], bypass=("<local>",)))
        await job.set_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC, "user", "password")
        assert_type(await job.remove_credentials(bits.AuthTarget.SERVER, bits.AuthScheme.BASIC), bool)
        file = await job.add_file_with_ranges("http://h/f", "/f", [bits.FileRange(0, 10), bits.FileRange(20)], sha256=None)
        assert_type(file.ranges, Sequence[bits.FileRange])
        assert_type(file.temporary_name, Path | None)
        assert_type(file.validation_state, bool)
        assert_type(file.is_downloaded_from_peer, bool)
        await file.set_remote_name(URL("http://h/g"))
        await file.set_validation_state(True)
        assert_type(await job.replace_remote_prefix("http://h/", "http://i/"), bool)
        assert_type(await job.set_maximum_bandwidth(1e6), bits.ErrorCode)
        await job.set_cost_flags(bits.CostFlags.TRANSFER_STANDARD | bits.CostFlags.ROAMING)
        assert_type(job.maximum_bandwidth, float | None)
        await job.set_maximum_download_size(10**9)
        assert_type(job.maximum_download_size, int | None)
        await job.set_dynamic_content(False)
        await job.set_high_performance(False)
        await job.set_files_at_once(8)
        assert_type(job.files_at_once, int)
        await job.set_segments(4)
        assert_type(job.segments, int)
        await job.set_on_demand_mode(True)
        await file.request_file_ranges([bits.FileRange(0, 10)])
        await file.update_download_position(5)
        assert_type(file.filled_file_ranges, Sequence[bits.FileRange])
        await job.set_custom_headers([("X-Tenant", "a")])
        await job.set_custom_headers("X-Tenant: a\r\nX-Trace: b")
        await job.set_custom_headers(None)
        await job.make_custom_headers_write_only()
        assert_type(job.custom_headers, Sequence[tuple[str, str]] | None)
        await job.set_http_method("POST")
        assert_type(job.http_method, str)
        await job.set_security_flags(bits.SecurityFlags.SSL_ENABLE_CRL_CHECK | bits.SecurityFlags.HTTP_REDIRECT_POLICY_DISALLOW)
        assert_type(job.security_flags, bits.SecurityFlags)
        await job.set_crl_source("/etc/ssl/revoked")
        assert_type(job.crl_source, Path | None)
        await job.set_client_certificate_by_file("/etc/me.p12", password_file=Path("/etc/me.password"))
        await job.set_client_certificate_by_file(Path("/etc/me.pem"), key="/etc/me.key")
        await job.set_client_certificate_by_id("/etc/mine", "ab" * 20)
        await job.set_client_certificate_by_id("/etc/mine", b"a" * 32)
        await job.set_client_certificate_by_name(Path("/etc/mine"), "Lab, alice")
        assert_type(await job.remove_client_certificate(), bool)
        assert_type(job.client_certificate, bits.ClientCertificate | None)
        await job.set_server_certificate_validation(looks_right)
        await job.set_server_certificate_validation(lambda job, file, certificate: len(certificate) > 0)
        await job.set_server_certificate_validation(None)
        assert_type(file.http_response_headers, Sequence[tuple[str, str]])
        await job.set_priority(bits.JobPriority.LOW)
        await job.set_minimum_retry_delay(5)
        await job.set_no_progress_timeout(60.0)
        options = await job.token_options()
        assert_type(options.helper_token_sid, str | None)
        with bits.impersonate(fake_token("helper")) as helper:
            assert_type(helper, bits.Token)
            await options.set_helper_token()
        await options.set_helper_token_flags(bits.HelperTokenFlags.NONE)
        await options.clear_helper_token()
        await job.resume()
        async with job.events(follow=True) as stream:
            async for event in stream:
                assert_type(event.time, datetime)
                if isinstance(event, bits.JobChanged):
                    assert_type(event.state, bits.JobState)
                else:
                    assert_type(event.job_id, UUID)
        await job.wait(transient=True)
        done = await job.complete(partial=False)
        assert_type(done, bits.Completion)
        assert_type(done[0], Path)
        assert_type(done.code, bits.ErrorCode)
        await job.suspend()
        cancelled = await job.cancel()
        assert_type(cancelled, bits.Cancellation)
        assert_type(cancelled.code, bits.ErrorCode)
        assert_type(cancelled.left_behind, tuple[Path, ...])
        assert_type(manager.enum_jobs(all_users=True), AsyncIterator[bits.Job])
        assert_type(await manager.get_job(str(job.id)), bits.Job)
        await manager.join()
        await manager.aclose(grace=1)


async def identities() -> None:
    token = await bits.Token.for_user("alice", network=spnego.KerberosCCache("FILE:/tmp/cc"))
    assert_type(await bits.Token.for_handle(4, level=bits.ImpersonationLevel.IDENTIFY), bits.Token)
    assert_type(bits.Token.for_thread(), bits.Token | None)
    assert_type(bits.Token.for_network(spnego.Password("alice@REALM", "secret")), bits.Token)
    assert_type(bits.Token.for_process(), bits.Token)
    assert_type(token.level, bits.ImpersonationLevel)
    with bits.impersonate(token), bits.revert_to_self():
        assert_type(bits.current_token(), bits.Token)
    assert_type(await bits.run_as(token, len, "abc"), int)
    token.close()
    somebody = bits.LocalUser("alice", realms=frozenset({"REALM"}))
    assert_type(await bits.logon_user("alice", "secret", domain="REALM", local_user=somebody), bits.Token)
    assert_type(await bits.logon_user("alice@REALM", keytab=Path("/k"), logon_type=bits.LogonType.BATCH), bits.Token)
    assert_type(await bits.s4u_logon("bob@REALM", service=spnego.KerberosKeytab("/k", "service@REALM")), bits.Token)
    trusted = bits.DelegationTarget("https://portal.example", ok_as_delegate_only=False)
    assert_type(await bits.Token.from_delegated(object(), delegate_to=[trusted, "https://other.example"]), bits.Token)


def errors() -> None:
    try:
        asyncio.run(the_queue())
    except bits.InvalidArgument as error:
        assert_type(error.code, int)
    except (bits.TokenRequired, bits.LocalFileError) as error:
        assert_type(error.identity, str | None)
        assert_type(error.advice, str)


def fakes() -> None:
    with FakeNetwork() as network:
        network.serve("http://h/f", b"body", etag='"1"', status=200, cut_after=None, require="alice")
        network.fail()
        network.disconnect()
        network.reconnect()
        assert_type(network.requests[0].identity, str)
