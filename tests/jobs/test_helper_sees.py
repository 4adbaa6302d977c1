"""T8: a helper's token stays on a job only while the job is what the helper saw when it set the token."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

import bits_async as bits
from bits_async import BitsManager, ErrorCode, FileInfo, FileRange, HelperTokenFlags, Job, JobState, SecurityFlags, impersonate
from bits_async.testing import FakeNetwork, fake_token

URL = "https://files.test/f"
BODY = b"seen" * 100
Change = Callable[[Job, Path], Awaitable[object]]

CHANGES: dict[str, Change] = {
    "add_file": lambda job, where: job.add_file("https://evil.test/f", where / "g"),
    "add_file_set": lambda job, where: job.add_file_set([FileInfo("https://evil.test/f", where / "g")]),
    "add_file_with_ranges": lambda job, where: job.add_file_with_ranges("https://evil.test/f", where / "g", [FileRange(0, 1)]),
    "set_remote_name": lambda job, where: job.files[0].set_remote_name("https://evil.test/f"),
    "replace_remote_prefix": lambda job, where: job.replace_remote_prefix("https://files.test", "https://evil.test"),
    "set_proxy_settings": lambda job, where: job.set_proxy_settings(bits.ProxySettings.override("http://evil.test:3128")),
    "set_security_flags": lambda job, where: job.set_security_flags(SecurityFlags.HTTP_REDIRECT_POLICY_ALLOW_HTTPS_TO_HTTP),
    "set_crl_source": lambda job, where: job.set_crl_source(where / "crl"),
    "set_http_method": lambda job, where: job.set_http_method("DELETE"),
    "set_client_certificate_by_file": lambda job, where: job.set_client_certificate_by_file(where / "me.pem"),
    "set_server_certificate_validation": lambda job, where: job.set_server_certificate_validation(lambda *_: True),
}


@pytest.fixture
async def job(tmp_path: Path) -> AsyncIterator[Job]:
    """Alice's, with bob as its helper on the network."""
    with FakeNetwork() as network:
        network.serve(URL, BODY)
        async with BitsManager(store=tmp_path / "queue.db") as manager:
            job = await manager.create_job("alice's", owner=fake_token("alice"))
            await job.add_file(URL, tmp_path / "f")
            await give_helper(job)
            yield job


async def give_helper(job: Job) -> None:
    with impersonate(fake_token("alice")):
        options = await job.token_options()
    with impersonate(fake_token("bob")):
        await options.set_helper_token()
    await options.set_helper_token_flags(HelperTokenFlags.NETWORK)


async def helper_of(job: Job) -> str | None:
    with impersonate(fake_token("admin", elevated=True)):
        return (await job.token_options()).helper_token_sid


@pytest.mark.parametrize("change", CHANGES)
async def test_t08_a_change_of_what_the_helper_saw_takes_its_token_from_the_job(job: Job, tmp_path: Path, change: str) -> None:
    with impersonate(fake_token("alice")):
        await CHANGES[change](job, tmp_path)
    assert await helper_of(job) is None
    await job.resume()
    with pytest.raises(bits.TokenRequired) as caught:
        await job.wait()
    assert caught.value.code == ErrorCode.BG_E_TOKEN_REQUIRED
    assert job.state is JobState.ERROR


@pytest.mark.parametrize("change", CHANGES)
async def test_t08_what_the_helper_changes_itself_leaves_its_token(job: Job, tmp_path: Path, change: str) -> None:
    with impersonate(fake_token("bob")):
        await CHANGES[change](job, tmp_path)
    assert await helper_of(job) == fake_token("bob").sid


async def test_t08_what_is_not_changed_or_not_seen_leaves_the_token(job: Job, tmp_path: Path) -> None:
    await job.set_description("of no interest")
    await job.set_priority(bits.JobPriority.HIGH)
    await job.set_security_flags(job.security_flags)
    await job.set_proxy_settings(job.proxy_settings)
    await job.set_crl_source(None)
    assert not await job.replace_remote_prefix("https://other.test", "https://evil.test")
    assert await helper_of(job) == fake_token("bob").sid
    await job.resume()
    await job.wait()
    assert await job.complete() == (tmp_path / "f",)


async def test_t08_the_owner_may_set_the_helper_anew_after_a_change(job: Job, tmp_path: Path) -> None:
    with impersonate(fake_token("alice")):
        await job.files[0].set_remote_name(f"{URL}?again")
    assert await helper_of(job) is None
    await give_helper(job)
    assert await helper_of(job) == fake_token("bob").sid


async def test_t10_a_manager_that_requires_impersonation_is_not_called_as_the_process(tmp_path: Path) -> None:
    calls: dict[str, Callable[[BitsManager, Job], object]] = {
        "create_job": lambda manager, job: manager.create_job("mine"),
        "create_job for somebody": lambda manager, job: manager.create_job("his", owner=fake_token("bob")),
        "get_job": lambda manager, job: manager.get_job(job.id),
        "enum_jobs": lambda manager, job: manager.enum_jobs(),
        "events": lambda manager, job: manager.events(),
        "download": lambda manager, job: manager.download(URL, tmp_path / "d", owner=fake_token("bob")),
        "token_options": lambda manager, job: job.token_options(),
        "take_ownership": lambda manager, job: job.take_ownership(),
        "set_notify_cmd_line": lambda manager, job: job.set_notify_cmd_line("/bin/true", ["true"]),
    }
    with FakeNetwork() as network:
        network.serve(URL, BODY)
        async with BitsManager(store=tmp_path / "queue.db", require_impersonation=True) as manager:
            with impersonate(fake_token("alice")):
                job = await manager.create_job("alice's")
            for name, call in calls.items():
                with pytest.raises(bits.AccessDenied, match="impersonate") as caught:
                    call(manager, job)
                assert caught.value.code == ErrorCode.E_ACCESSDENIED, name
                with impersonate(fake_token("alice")), bits.revert_to_self(), pytest.raises(bits.AccessDenied):
                    call(manager, job)
            with impersonate(fake_token("alice")):
                assert [each.id async for each in manager.enum_jobs()] == [job.id]
