"""T8: a helper's token stays on a job only while the job is what the helper saw when it set the token, and acts only where it agreed to.

Every method that changes a job stands in one of two tables here; one that is added and stands in neither fails a test.
"""

import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import bits_async as bits
from bits_async import (
    AuthScheme,
    AuthTarget,
    BitsManager,
    CostFlags,
    ErrorCode,
    FileInfo,
    FileRange,
    HelperTokenFlags,
    Job,
    JobFile,
    JobPriority,
    JobState,
    NotifyFlags,
    SecurityFlags,
    Token,
    TokenOptions,
    impersonate,
)
from bits_async.testing import FakeNetwork, fake_token

URL = "https://files.test/f"
BODY = b"seen" * 100
NONE, LOCAL, NETWORK = HelperTokenFlags.NONE, HelperTokenFlags.LOCAL_FILE, HelperTokenFlags.NETWORK
SERVER, PROXY = AuthTarget
Change = Callable[[Job, Path], Awaitable[object]]

# What a helper saw: what of a job decides whom its requests go to, what they say and prove, what may answer, and what is written where.
SEEN: dict[str, Change] = {
    "Job.add_file": lambda job, where: job.add_file("https://evil.test/f", where / "g"),
    "Job.add_file_set": lambda job, where: job.add_file_set([FileInfo("https://evil.test/f", where / "g")]),
    "Job.add_file_with_ranges": lambda job, where: job.add_file_with_ranges("https://evil.test/f", where / "g", [FileRange(0, 1)]),
    "JobFile.set_remote_name": lambda job, where: job.files[0].set_remote_name("https://evil.test/f"),
    "Job.replace_remote_prefix": lambda job, where: job.replace_remote_prefix("https://files.test", "https://evil.test"),
    "Job.set_proxy_settings": lambda job, where: job.set_proxy_settings(bits.ProxySettings.override("http://evil.test:3128")),
    "Job.set_security_flags": lambda job, where: job.set_security_flags(SecurityFlags.HTTP_REDIRECT_POLICY_ALLOW_HTTPS_TO_HTTP),
    "Job.set_crl_source": lambda job, where: job.set_crl_source(where / "crl"),
    "Job.set_http_method": lambda job, where: job.set_http_method("DELETE"),
    "Job.set_custom_headers": lambda job, where: job.set_custom_headers([("X-Do", "something else")]),
    "Job.set_credentials": lambda job, where: job.set_credentials(SERVER, AuthScheme.NEGOTIATE, None, None),
    "Job.set_use_stored_credentials": lambda job, where: job.set_use_stored_credentials(PROXY),
    "Job.remove_credentials": lambda job, where: job.remove_credentials(SERVER, AuthScheme.BASIC),
    "Job.set_client_certificate_by_file": lambda job, where: job.set_client_certificate_by_file(where / "me.pem"),
    "Job.set_client_certificate_by_id": lambda job, where: job.set_client_certificate_by_id(where, bytes(20)),
    "Job.set_client_certificate_by_name": lambda job, where: job.set_client_certificate_by_name(where, "me"),
    "Job.remove_client_certificate": lambda job, where: job.remove_client_certificate(),
    "Job.set_server_certificate_validation": lambda job, where: job.set_server_certificate_validation(lambda *_: True),
    "Job.set_maximum_download_size": lambda job, where: job.set_maximum_download_size(None),
}

# What it need not see, and why.
UNSEEN: dict[str, tuple[str, Change | None]] = {
    "Job.set_display_name": ("for people", lambda job, where: job.set_display_name("bob's own idea")),
    "Job.set_description": ("for people", lambda job, where: job.set_description("of no interest")),
    "Job.set_priority": ("when, not what", lambda job, where: job.set_priority(JobPriority.HIGH)),
    "Job.set_cost_flags": ("when, not what", lambda job, where: job.set_cost_flags(CostFlags.UNRESTRICTED)),
    "Job.set_minimum_retry_delay": ("when, not what", lambda job, where: job.set_minimum_retry_delay(60)),
    "Job.set_no_progress_timeout": ("when, not what", lambda job, where: job.set_no_progress_timeout(60)),
    "Job.set_maximum_download_time": ("when, not what", lambda job, where: job.set_maximum_download_time(60)),
    "Job.set_maximum_bandwidth": ("how fast, not what", lambda job, where: job.set_maximum_bandwidth(10**9)),
    "Job.set_files_at_once": ("how fast, not what", lambda job, where: job.set_files_at_once(2)),
    "Job.set_segments": ("how fast, not what", lambda job, where: job.set_segments(2)),
    "Job.set_dynamic_content": ("the same requests, without conditions", lambda job, where: job.set_dynamic_content(False)),
    "Job.set_on_demand_mode": ("less of the same files", lambda job, where: job.set_on_demand_mode(False)),
    "Job.set_high_performance": ("when it is made durable; before any file", None),
    "JobFile.request_file_ranges": ("less of the same file", None),
    "JobFile.update_download_position": ("the order of the same bytes", None),
    "JobFile.set_validation_state": ("throws away what the job itself wrote", None),
    "Job.make_custom_headers_write_only": ("the same headers", lambda job, where: job.make_custom_headers_write_only()),
    "Job.set_notify_interface": ("who is told, as himself", lambda job, where: job.set_notify_interface(bits.BackgroundCopyCallback())),
    "Job.set_notify_flags": ("of what he is told", lambda job, where: job.set_notify_flags(NotifyFlags.JOB_ERROR)),
    "Job.set_notify_cmd_line": ("runs as whoever sets it, never as the helper", lambda job, where: job.set_notify_cmd_line("/bin/true")),
    "Job.set_minimum_notification_interval": ("how often he is told", lambda job, where: job.set_minimum_notification_interval(1)),
    "Job.resume": ("what the helper agreed to happens", lambda job, where: job.resume()),
    "Job.suspend": ("what the helper agreed to is put off", lambda job, where: job.suspend()),
    "Job.cancel": ("only the job's own part files go, by whoever made them (T17)", None),
    "Job.complete": ("what the helper agreed to happens", None),
    "Job.wait": ("changes nothing", None),
    "Job.events": ("changes nothing", None),
    "Job.token_options": ("changes nothing", None),
    "Job.take_ownership": ("drops the helper's token itself", None),
    "TokenOptions.set_helper_token": ("another helper sees for itself", None),
    "TokenOptions.clear_helper_token": ("drops the helper's token itself", None),
    "TokenOptions.set_helper_token_flags": ("is refused where the helper did not agree: the table below", None),
}


def test_t08_every_method_of_a_job_stands_in_one_of_the_tables() -> None:
    methods = {
        f"{kind.__name__}.{name}"
        for kind in (Job, JobFile, TokenOptions)
        for name, member in vars(kind).items()
        if not name.startswith("_") and callable(member)
    }
    assert methods == SEEN.keys() | UNSEEN.keys()
    assert not SEEN.keys() & UNSEEN.keys()


@pytest.fixture
def tmp_path(memory_dir: Path) -> Path:
    """No disk: nothing here has to survive."""
    return memory_dir


def test_t08_the_list_for_people_is_the_same() -> None:
    document = (Path(__file__).parents[2] / "docs" / "who-acts.md").read_text().partition("## What a helper agrees to")[2]
    listed = re.findall(r"`((?:Job|JobFile)\.[a-z_]+)`", document.partition("Flags are taken back")[0])
    assert sorted(listed) == sorted(SEEN)


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[BitsManager]:
    with FakeNetwork() as network:
        network.serve(URL, BODY)
        async with BitsManager(store=tmp_path / "queue.db") as manager:
            yield manager


@pytest.fixture
async def job(manager: BitsManager, tmp_path: Path) -> Job:
    """Alice's, with bob as its helper on the network."""
    job = await manager.create_job("alice's", owner=fake_token("alice"))
    await job.add_file(URL, tmp_path / "f")
    await job.set_credentials(SERVER, AuthScheme.BASIC, "alice", "secret")
    await job.set_custom_headers([("X-Do", "this")])
    await job.set_maximum_download_size(10_000)
    await give_helper(job)
    return job


async def give_helper(job: Job) -> None:
    with impersonate(fake_token("alice")):
        options = await job.token_options()
        await options.set_helper_token_flags(NETWORK)
    with impersonate(fake_token("bob")):
        await options.set_helper_token()


async def helper_of(job: Job) -> str | None:
    with impersonate(fake_token("admin", elevated=True)):
        return (await job.token_options()).helper_token_sid


async def prepared(job: Job, change: str, where: Path) -> None:
    """There is something to remove."""
    if change == "Job.remove_client_certificate":
        with impersonate(fake_token("bob")):
            await job.set_client_certificate_by_file(where / "me.pem")


@pytest.mark.parametrize("change", SEEN)
async def test_t08_a_change_of_what_the_helper_saw_takes_its_token_from_the_job(job: Job, tmp_path: Path, change: str) -> None:
    await prepared(job, change, tmp_path)
    with impersonate(fake_token("alice")):
        await SEEN[change](job, tmp_path)
    assert await helper_of(job) is None
    await job.resume()
    with pytest.raises(bits.TokenRequired) as caught:
        await job.wait()
    assert caught.value.code == ErrorCode.BG_E_TOKEN_REQUIRED
    assert job.state is JobState.ERROR


@pytest.mark.parametrize("as_whom", ["an administrator", "the process", "somebody of the helper's name"])
async def test_t08_nobody_but_the_helper_changes_what_it_saw(job: Job, tmp_path: Path, as_whom: str) -> None:
    impostor = Token._make(fake_token("bob").local, principal="bob@REALM", fake=True)
    token = {"an administrator": fake_token("admin", elevated=True), "the process": None}.get(as_whom, impostor)
    with nullcontext() if token is None else impersonate(token):
        await job.files[0].set_remote_name("https://evil.test/f")
    assert await helper_of(job) is None


@pytest.mark.parametrize("change", SEEN)
async def test_t08_what_the_helper_changes_itself_leaves_its_token(job: Job, tmp_path: Path, change: str) -> None:
    await prepared(job, change, tmp_path)
    with impersonate(fake_token("bob")):
        await SEEN[change](job, tmp_path)
    assert await helper_of(job) == fake_token("bob").sid


async def test_t08_what_the_helper_need_not_see_leaves_its_token(job: Job, tmp_path: Path) -> None:
    for name, (_, change) in UNSEEN.items():
        if change is not None:
            await change(job, tmp_path)
            assert await helper_of(job) == fake_token("bob").sid, name


async def test_t08_what_is_refused_changes_nothing_and_leaves_the_token(job: Job, tmp_path: Path) -> None:
    await job.set_dynamic_content(True)
    for refused in (
        job.set_http_method("DELETE"),
        job.add_file_with_ranges(URL, tmp_path / "g", [FileRange(0, 1)]),
        job.add_file("ftp://files.test/f", tmp_path / "g"),
        job.files[0].set_remote_name("file:///etc/passwd"),
        job.replace_remote_prefix("https://", "file://"),
        job.set_custom_headers([("Host", "evil.test")]),
        job.set_credentials(SERVER, AuthScheme.BASIC, "alice", None),
        job.set_maximum_download_size(0),
    ):
        with pytest.raises(bits.BitsError):
            await refused
    assert await helper_of(job) == fake_token("bob").sid


async def test_t08_what_is_not_changed_leaves_the_token(job: Job, tmp_path: Path) -> None:
    await job.set_security_flags(job.security_flags)
    await job.set_proxy_settings(job.proxy_settings)
    await job.set_crl_source(None)
    await job.set_http_method(job.http_method)
    await job.set_custom_headers(job.custom_headers)
    await job.set_credentials(SERVER, AuthScheme.BASIC, "alice", "secret")
    await job.set_maximum_download_size(9_000)
    await job.set_server_certificate_validation(None)
    assert not await job.remove_client_certificate()
    assert not await job.remove_credentials(PROXY, AuthScheme.BASIC)
    assert not await job.replace_remote_prefix("https://other.test", "https://evil.test")
    assert await helper_of(job) == fake_token("bob").sid
    await job.resume()
    await job.wait()
    assert await job.complete() == (tmp_path / "f",)


@pytest.mark.parametrize("change", SEEN)
async def test_t11_whose_change_it_is_is_found_at_the_call(job: Job, tmp_path: Path, change: str) -> None:
    """Not when the coroutine happens to run, under whatever identity."""
    await prepared(job, change, tmp_path)
    with impersonate(fake_token("alice")):
        hers = SEEN[change](job, tmp_path)
    with impersonate(fake_token("bob")):
        await hers
    assert await helper_of(job) is None


async def test_t08_a_handle_does_not_speak_for_the_process_as_a_helper(manager: BitsManager, tmp_path: Path) -> None:
    """A service lends itself to a job of alice; what it then does for her with her handle, outside of `impersonate()`, is hers to want."""
    mine, admin = Token.for_process(), fake_token("admin", elevated=True)
    job = await manager.create_job("alice's", owner=fake_token("alice"))
    await job.add_file(URL, tmp_path / "f")
    with impersonate(admin):
        options = await job.token_options()
        await options.set_helper_token_flags(LOCAL)
    with impersonate(mine):
        await options.set_helper_token()
        await job.add_file(URL, tmp_path / "g")
    assert options.helper_token_sid == mine.sid
    await job.add_file("https://evil.test/cron", tmp_path / "cron")
    assert options.helper_token_sid is None


async def test_t08_the_owner_may_set_the_helper_anew_after_a_change(job: Job, tmp_path: Path) -> None:
    with impersonate(fake_token("alice")):
        await job.files[0].set_remote_name(f"{URL}?again")
    assert await helper_of(job) is None
    await give_helper(job)
    assert await helper_of(job) == fake_token("bob").sid


# -- where it acts ------------------------------------------------------------------------------------------------------------------------

ALL_FLAGS = (NONE, LOCAL, NETWORK, LOCAL | NETWORK)
WHO = ("alice", "bob", "mallory", "admin", "process", None)


def somebody(who: str | None) -> Token | None:
    if who == "process":
        return Token.for_process()
    return None if who is None else fake_token(who, elevated=who == "admin")


@pytest.mark.parametrize("opened_by", ["alice", "admin", "process", "bob"])
@pytest.mark.parametrize("called_by", WHO)
async def test_t08_a_helper_is_made_to_do_more_by_itself_only(
    manager: BitsManager, tmp_path: Path, opened_by: str, called_by: str | None
) -> None:
    """By itself, or where an administrator, the process (which made its token) or itself passed the access check. Less is anybody's to set
    who has the options, and so is everything while there is no helper."""
    permitted = opened_by in ("admin", "process", "bob") or called_by == "bob"
    opener, caller = somebody(opened_by), somebody(called_by)
    assert opener is not None
    owner = opener if opened_by in ("process", "bob") else fake_token("alice")
    for before, after in itertools.product(ALL_FLAGS, ALL_FLAGS):
        job = await manager.create_job("a job", owner=owner)
        with impersonate(opener):
            options = await job.token_options()
            await options.set_helper_token_flags(before)
        with impersonate(fake_token("bob")):
            await options.set_helper_token()
        with nullcontext() if caller is None else impersonate(caller):
            if permitted or not after & ~before:
                await options.set_helper_token_flags(after)
                assert options.helper_token_flags is after
                continue
            with pytest.raises(bits.AccessDenied) as caught:
                await options.set_helper_token_flags(after)
        assert caught.value.code == ErrorCode.E_ACCESSDENIED
        assert (options.helper_token_flags, options.helper_token_sid) == (before, fake_token("bob").sid)
        await options.clear_helper_token()
        await options.set_helper_token_flags(after)
        assert options.helper_token_flags is after


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
