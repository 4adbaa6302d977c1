"""Every code of BITS: made to occur through the API here, or by the test that is named; or why it cannot. Each that can says what to do.

The codes are those of `ErrorCode` (BITS Return Values, and the few of Windows that BITS passes on). A code that is added there without a
row here fails `test_every_code_has_a_place`.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

import bits_async as bits
from bits_async import AuthScheme, AuthTarget, ErrorCode, FileRange, JobPriority, ProxySettings
from bits_async.testing import FakeNetwork, fake_token

URL, BODY = "https://files.example.test/f", bytes(range(256)) * 400
TESTS = Path(__file__).parents[1]


@dataclass
class Scene:
    network: FakeNetwork
    manager: bits.BitsManager
    job: bits.Job
    out: Path

    async def add(self, name: str = "f", **how: object) -> bits.JobFile:
        return await self.job.add_file(URL, self.out / name, **how)

    async def run(self) -> None:
        await self.job.resume()
        await self.job.wait()


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    (tmp_path / "out").mkdir()
    with FakeNetwork() as network:
        network.serve(URL, BODY)
        async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
            job = await manager.create_job("job", priority=JobPriority.FOREGROUND)
            yield Scene(network, manager, job, tmp_path / "out")


# -- at the call


async def long_headers(s: Scene) -> None:
    await s.job.set_custom_headers([("X-Long", "x" * 20_000)])


async def long_proxy_list(s: Scene) -> None:
    await s.job.set_proxy_settings(ProxySettings.override("p" * 40_000))


async def long_bypass_list(s: Scene) -> None:
    await s.job.set_proxy_settings(ProxySettings.override("proxy:3128", ["b" * 40_000]))


async def credentials(s: Scene, target: object, scheme: object, user: str = "alice", password: str = "p") -> None:
    await s.job.set_credentials(target, scheme, user, password)


async def high_performance_too_late(s: Scene) -> None:
    await s.add()
    await s.job.set_high_performance(True)


async def method_too_late(s: Scene) -> None:
    await s.add()
    await s.run()
    await s.job.set_http_method("POST")


async def certificates_while_active(s: Scene) -> None:
    s.network.clock.freeze()
    s.network.pause()
    await s.add()
    await s.job.resume()
    await s.job.set_server_certificate_validation(lambda *_: True)


async def dynamic_and_posted(s: Scene) -> None:
    await s.job.set_dynamic_content(True)
    await s.job.set_http_method("POST")


async def dynamic_and_ranges(s: Scene) -> None:
    await s.job.set_dynamic_content(True)
    await s.job.add_file_with_ranges(URL, s.out / "f", [FileRange(0, 1)])


async def judged_too_early(s: Scene) -> None:
    await (await s.add()).set_validation_state(True)


async def waited_for_in_vain(s: Scene) -> None:
    await s.job.cancel()
    await s.job.wait()


async def used_after_the_manager(s: Scene) -> None:
    await s.manager.aclose()
    await s.job.resume()


async def jobs_of_everybody(s: Scene) -> None:
    with bits.impersonate(fake_token("nobody")):
        _ = [job async for job in s.manager.enum_jobs(all_users=True)]


async def helper_without_impersonation(s: Scene) -> None:
    await (await s.job.token_options()).set_helper_token()


async def second_manager(s: Scene) -> None:
    async with bits.BitsManager(store=s.out.parent / "queue.db"):
        pass


async def journal_that_is_none(s: Scene) -> None:
    path = s.out / "notes.txt"
    path.write_text("no journal\n" * 1000)
    path.chmod(0o600)
    async with bits.BitsManager(store=path):
        pass


async def journal_where_others_write(s: Scene) -> None:
    s.out.chmod(0o777)
    async with bits.BitsManager(store=s.out / "queue.db"):
        pass


async def ranges(s: Scene, *wanted: FileRange) -> None:
    await s.job.add_file_with_ranges(URL, s.out / "f", wanted)


# -- when the job runs


async def range_beyond_the_end(s: Scene) -> None:
    await ranges(s, FileRange(len(BODY) + 1, 5))
    await s.run()


async def server_without_ranges(s: Scene) -> None:
    s.network.serve(URL, BODY, ranges=False)
    await ranges(s, FileRange(10, 5))
    await s.run()


async def on_demand_without_ranges(s: Scene) -> None:
    s.network.serve(URL, BODY, ranges=False)
    await s.job.set_on_demand_mode(True)
    await (await s.add()).request_file_ranges([FileRange(10, 5)])
    await s.run()


async def larger_than_allowed(s: Scene) -> None:
    await s.job.set_maximum_download_size(10)
    await s.add()
    await s.run()


async def wrong_digest(s: Scene) -> None:
    await s.add(sha256="0" * 64)
    await s.run()


async def flags_without_a_helper(s: Scene) -> None:
    await (await s.job.token_options()).set_helper_token_flags(bits.HelperTokenFlags.NETWORK)
    await s.add()
    await s.run()


async def directory_is_missing(s: Scene) -> None:
    await s.add("missing/f")
    await s.run()


async def destination_is_a_directory(s: Scene) -> None:
    (s.out / "f").mkdir()
    await s.add()
    await s.run()


async def name_is_too_long(s: Scene) -> None:
    await s.add("n" * 300)
    await s.run()


async def part_file_removed(s: Scene) -> None:
    file = await s.add()
    await s.run()
    assert file.temporary_name is not None
    file.temporary_name.unlink()
    await s.job.complete()


OCCUR: dict[ErrorCode, Callable[[Scene], Awaitable[object]]] = {
    ErrorCode.E_INVALIDARG: lambda s: s.manager.create_job(""),
    ErrorCode.E_NOTIMPL: lambda s: s.job.set_priority(9),
    ErrorCode.E_PENDING: judged_too_early,
    ErrorCode.E_ABORT: waited_for_in_vain,
    ErrorCode.E_ACCESSDENIED: jobs_of_everybody,
    ErrorCode.CO_E_FAILEDTOIMPERSONATE: helper_without_impersonation,
    ErrorCode.ERROR_SERVICE_NOT_ACTIVE: used_after_the_manager,
    ErrorCode.ERROR_SHARING_VIOLATION: second_manager,
    ErrorCode.ERROR_DIRECTORY: journal_where_others_write,
    ErrorCode.ERROR_PATH_NOT_FOUND: directory_is_missing,
    ErrorCode.ERROR_FILE_EXISTS: destination_is_a_directory,
    ErrorCode.ERROR_FILENAME_EXCED_RANGE: name_is_too_long,
    ErrorCode.BG_E_NOT_FOUND: lambda s: s.manager.get_job(uuid4()),
    ErrorCode.BG_E_INVALID_STATE: lambda s: s.job.complete(),
    ErrorCode.BG_E_EMPTY: lambda s: s.job.resume(),
    ErrorCode.BG_E_STRING_TOO_LONG: long_headers,
    ErrorCode.BG_E_PROXY_LIST_TOO_LARGE: long_proxy_list,
    ErrorCode.BG_E_PROXY_BYPASS_LIST_TOO_LARGE: long_bypass_list,
    ErrorCode.BG_E_USERNAME_TOO_LARGE: lambda s: credentials(s, AuthTarget.SERVER, AuthScheme.BASIC, "u" * 301),
    ErrorCode.BG_E_PASSWORD_TOO_LARGE: lambda s: credentials(s, AuthTarget.SERVER, AuthScheme.BASIC, "u", "p" * 65_536),
    ErrorCode.BG_E_INVALID_AUTH_TARGET: lambda s: credentials(s, "server", AuthScheme.BASIC),
    ErrorCode.BG_E_INVALID_AUTH_SCHEME: lambda s: credentials(s, AuthTarget.SERVER, "basic"),
    ErrorCode.BG_E_OVERLAPPING_RANGES: lambda s: ranges(s, FileRange(0, 10), FileRange(5, 10)),
    ErrorCode.BG_E_INVALID_RANGE: range_beyond_the_end,
    ErrorCode.BG_E_INSUFFICIENT_RANGE_SUPPORT: server_without_ranges,
    ErrorCode.BG_E_RANDOM_ACCESS_NOT_SUPPORTED: on_demand_without_ranges,
    ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_INVALID_VALUE: lambda s: s.job.set_maximum_download_size(0),
    ErrorCode.BG_E_MAX_DOWNLOAD_SIZE_LIMIT_REACHED: larger_than_allowed,
    ErrorCode.BG_E_VALIDATION_FAILED: wrong_digest,
    ErrorCode.BG_E_TOKEN_REQUIRED: flags_without_a_helper,
    ErrorCode.BG_E_LOCAL_FILE_CHANGED: part_file_removed,
    ErrorCode.BG_E_DATABASE_CORRUPT: journal_that_is_none,
    ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_ADDFILE: high_performance_too_late,
    ErrorCode.BG_E_READ_ONLY_PROPERTY_AFTER_RESUME: method_too_late,
    ErrorCode.BG_E_READ_ONLY_WHEN_JOB_ACTIVE: certificates_while_active,
    ErrorCode.BG_E_NOT_SUPPORTED_WITH_CUSTOM_HTTP_METHOD: dynamic_and_posted,
    ErrorCode.BG_E_UNSUPPORTED_JOB_CONFIGURATION: dynamic_and_ranges,
}


@pytest.mark.parametrize("code", OCCUR, ids=lambda code: code.name)
async def test_a_code_occurs_and_says_what_to_do(scene: Scene, code: ErrorCode) -> None:
    with pytest.raises(bits.BitsError) as caught:
        await OCCUR[code](scene)
    error = caught.value
    assert (error.code, code.name in str(error)) == (code, True)
    assert error.advice
    assert error.advice in str(error)
    assert isinstance(error, type(bits.BitsError(code=code))) or type(error) is not bits.BitsError


# -- elsewhere, over real sockets, real realms or a day of fake time

ELSEWHERE: dict[ErrorCode, str] = {
    ErrorCode.S_OK: "jobs/test_files.py::test_completing_a_whole_job_is_ok",
    ErrorCode.BG_S_PARTIAL_COMPLETE: "jobs/test_files.py::test_completing_a_part_of_a_job_says_so",
    ErrorCode.BG_S_UNABLE_TO_DELETE_FILES: "jobs/test_files.py::test_t17_a_cancel_names_the_part_files_that_it_could_not_delete",
    ErrorCode.BG_S_OVERRIDDEN_BY_POLICY: "jobs/test_bandwidth.py::test_a_job_s_limit_above_the_policy_s_is_set_and_said_to_be_overridden",
    ErrorCode.BG_E_DESTINATION_LOCKED: "jobs/test_manager.py::test_two_downloads_to_one_destination_are_not_possible_at_once",
    ErrorCode.BG_E_NETWORK_DISCONNECTED: "jobs/test_manager.py::test_the_network_lost_and_back",
    ErrorCode.BG_E_MISSING_FILE_SIZE: "loopback/test_files.py::"
    "test_a_file_whose_end_only_the_connection_tells_is_refused_unless_it_is_dynamic",
    ErrorCode.BG_E_INVALID_SERVER_RESPONSE: "loopback/test_cases.py::test_a_file_that_is_encoded_though_that_was_not_asked_for_is_refused",
    ErrorCode.BG_E_TOO_LARGE: "loopback/test_hostile.py::test_t26_a_head_above_64_kib_is_refused_with_a_clear_error",
    ErrorCode.BG_E_NO_PROGRESS: "jobs/test_manager.py::test_no_progress_ends_the_retries",
    ErrorCode.BG_E_CONNECT_FAILURE: "transport/test_connector.py::test_nothing_listens_and_nobody_knows_the_name",
    ErrorCode.BG_E_CONNECTION_CLOSED: "loopback/test_hostile.py::test_a_connection_that_is_reset_at_once_is_an_error_that_may_pass",
    ErrorCode.BG_E_BLOCKED_BY_POLICY: "jobs/test_conditions.py::test_a_running_job_that_policy_blocks_waits_until_the_interval_ends",
    ErrorCode.BG_E_BLOCKED_BY_COST_TRANSFER_POLICY: "jobs/test_conditions.py::"
    "test_a_job_waits_while_the_connection_costs_too_much_and_goes_on_when_it_does_not",
    ErrorCode.BG_E_INVALID_PROXY_INFO: "loopback/test_http_options.py::"
    "test_proxy_settings_that_cannot_be_followed_end_the_job_when_it_runs",
    ErrorCode.BG_E_INVALID_CREDENTIALS: "jobs/test_journal.py::test_a_job_whose_secret_went_with_the_key_says_so_until_it_is_given_again",
    ErrorCode.BG_E_TOO_MANY_JOBS_PER_USER: "jobs/test_manager.py::test_limits_of_jobs_and_files_do_not_bind_the_elevated",
    ErrorCode.BG_E_TOO_MANY_JOBS_PER_MACHINE: "jobs/test_manager.py::test_limits_of_jobs_and_files_do_not_bind_the_elevated",
    ErrorCode.BG_E_TOO_MANY_FILES_IN_JOB: "jobs/test_manager.py::test_limits_of_jobs_and_files_do_not_bind_the_elevated",
    ErrorCode.BG_E_TOO_MANY_RANGES_IN_FILE: "jobs/test_files.py::"
    "test_a_file_has_as_many_ranges_as_the_limits_allow_and_the_elevated_have_more",
    ErrorCode.BG_E_MAXDOWNLOAD_TIMEOUT: "jobs/test_manager.py::test_a_job_that_transfers_for_too_long_fails_and_resume_counts_anew",
    ErrorCode.BG_E_USE_STORED_CREDENTIALS_NOT_SUPPORTED: "jobs/test_properties.py",
    ErrorCode.BG_E_WATCHDOG_TIMEOUT: "identity/test_processes.py::test_a_timeout_ends_the_whole_process_group",
    ErrorCode.BG_E_REMOTE_FILE_CHANGED: "jobs/test_manager.py::test_a_file_that_never_stops_changing_is_given_up",
    ErrorCode.BG_E_SERVER_CERT_VALIDATION_INTERFACE_REQUIRED: "loopback/test_http_options.py::"
    "test_the_callback_does_not_survive_a_restart_and_until_it_is_set_again_nothing_is_requested",
    ErrorCode.E_FAIL: "loopback/test_http_options.py",
    ErrorCode.ERROR_FILE_NOT_FOUND: "jobs/test_keys.py::test_t13_a_credential_that_is_not_there_or_not_ours_alone_is_an_error",
    ErrorCode.ERROR_WRITE_FAULT: "jobs/test_store.py::test_a_journal_that_cannot_be_written_is_a_clear_error",
    ErrorCode.ERROR_DISK_FULL: "files/test_part_bytes.py::test_a_full_disk_is_transient_and_the_file_goes_on_when_there_is_room",
    ErrorCode.ERROR_FILE_TOO_LARGE: "files/test_part_bytes.py::test_what_fits_of_a_short_write_is_there_and_the_rest_is_an_error",
    ErrorCode.ERROR_WINHTTP_TIMEOUT: "files/test_part_bytes.py::test_receive_gives_a_silent_connection_up",
    ErrorCode.ERROR_WINHTTP_NAME_NOT_RESOLVED: "transport/test_connector.py::test_nothing_listens_and_nobody_knows_the_name",
    ErrorCode.ERROR_WINHTTP_SECURE_CERT_REV_FAILED: "loopback/test_http_options.py::"
    "test_without_a_good_revocation_list_no_server_is_trusted",
    ErrorCode.ERROR_WINHTTP_CLIENT_AUTH_CERT_NEEDED: "loopback/test_client_certificates.py::"
    "test_a_server_that_wants_a_certificate_and_gets_none_or_a_stranger_s_is_a_clear_error",
    ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_PRIVATE_KEY: "loopback/test_client_certificates.py",
    ErrorCode.ERROR_WINHTTP_CLIENT_CERT_NO_ACCESS_PRIVATE_KEY: "loopback/test_client_certificates.py::"
    "test_t27_the_owner_s_permissions_on_the_key_decide",
    ErrorCode.CRYPT_E_NOT_FOUND: "loopback/test_client_certificates.py",
    ErrorCode.ERROR_WINHTTP_SECURE_CERT_REVOKED: "loopback/test_http_options.py::"
    "test_a_revoked_certificate_is_fatal_and_one_that_is_not_passes",
    ErrorCode.ERROR_WINHTTP_SECURE_FAILURE: "loopback/test_http_options.py::test_a_flag_lets_its_flaw_pass_and_no_other",
    ErrorCode.ERROR_WINHTTP_REDIRECT_FAILED: "loopback/test_hostile.py::test_a_redirect_loop_and_a_redirect_without_end_are_ended",
    ErrorCode.SEC_E_LOGON_DENIED: "auth/test_negotiate.py::test_t26_a_wrong_password_reaches_the_realm_once",
    ErrorCode.SEC_E_WRONG_PRINCIPAL: "auth/test_negotiate.py::test_t21_a_ticket_for_another_name_does_not_leave",
    ErrorCode.SEC_E_BAD_BINDINGS: "auth/test_tickets.py",
    ErrorCode.SEC_E_NO_CREDENTIALS: "auth/test_negotiate.py::test_a_host_without_a_service_is_told_as_such_and_another_scheme_may_follow",
    ErrorCode.SEC_E_DELEGATION_POLICY: "realm/test_logon.py::test_a_service_that_is_not_on_the_list_is_refused_by_its_name",
    ErrorCode.ERROR_NO_LOGON_SERVERS: "realm/test_logon.py::test_a_realm_without_a_kdc_is_told_from_a_wrong_password",
    ErrorCode.ERROR_NO_SUCH_USER: "identity/test_pam.py::test_a_wrong_password_and_an_unknown_user_are_told_apart",
    ErrorCode.ERROR_LOGON_FAILURE: "identity/test_pam.py::test_a_wrong_password_and_an_unknown_user_are_told_apart",
    ErrorCode.ERROR_ACCOUNT_RESTRICTION: "realm/test_logon.py",
    ErrorCode.ERROR_PASSWORD_EXPIRED: "identity/test_pam.py",
    ErrorCode.ERROR_ACCOUNT_DISABLED: "realm/test_logon.py",
    ErrorCode.ERROR_TIME_SKEW: "realm/test_logon.py::test_clocks_that_differ_are_told_as_that",
    ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE: "realm/test_logon.py::test_a_kdc_that_only_claims_the_realm_logs_nobody_on",
    ErrorCode.ERROR_ACCOUNT_EXPIRED: "identity/test_pam.py",
    ErrorCode.ERROR_ACCOUNT_LOCKED_OUT: "identity/test_pam.py",
    ErrorCode.BG_E_INVALID_HASH_ALGORITHM: "files/test_part_bytes.py::test_an_unknown_algorithm_is_refused",
}


@pytest.mark.parametrize("code", ELSEWHERE, ids=lambda code: code.name)
def test_the_test_of_a_code_is_there_and_the_code_says_what_to_do(code: ErrorCode) -> None:
    module, _, test = ELSEWHERE[code].partition("::")
    text = (TESTS / module).read_text(encoding="utf-8")
    assert re.search(rf"def {test}\(" if test else rf"\b{code.name}\b", text)
    assert code < 0x80000000 or bits.BitsError(code=code).advice


# -- not at all

UPLOADS = "downloads only: nothing is uploaded"
TEXTS = "the id of a text; ErrorContext has the names"
PEERS = "there are no peers and no peer cache"
PROPERTIES = "properties are attributes and methods: there is no id to be wrong"
WINDOWS = "a condition that Windows alone reports"

CANNOT: dict[ErrorCode, str] = {
    ErrorCode.S_FALSE: "methods return False",
    ErrorCode.BG_S_ERROR_CONTEXT_NONE: TEXTS,
    ErrorCode.BG_S_PROXY_CHANGED: "of IBackgroundCopyJob::GetProxySettings during a change; ours are read at once",
    ErrorCode.BG_E_FILE_NOT_AVAILABLE: "an error without a file has None as its file",
    ErrorCode.BG_E_PROTOCOL_NOT_AVAILABLE: "http and https are always there; other schemes are refused with E_INVALIDARG",
    ErrorCode.BG_E_ERROR_CONTEXT_UNKNOWN: TEXTS,
    ErrorCode.BG_E_ERROR_CONTEXT_GENERAL_QUEUE_MANAGER: TEXTS,
    ErrorCode.BG_E_ERROR_CONTEXT_LOCAL_FILE: TEXTS,
    ErrorCode.BG_E_ERROR_CONTEXT_REMOTE_FILE: TEXTS,
    ErrorCode.BG_E_ERROR_CONTEXT_GENERAL_TRANSPORT: TEXTS,
    ErrorCode.BG_E_ERROR_CONTEXT_QUEUE_MANAGER_NOTIFICATION: TEXTS,
    ErrorCode.BG_E_ERROR_CONTEXT_REMOTE_APPLICATION: TEXTS,
    ErrorCode.BG_E_ERROR_CONTEXT_SERVER_CERTIFICATE_CALLBACK: TEXTS,
    ErrorCode.BG_E_VOLUME_CHANGED: "volumes have no serial number here: another device is BG_E_LOCAL_FILE_CHANGED",
    ErrorCode.BG_E_ERROR_INFORMATION_UNAVAILABLE: "a job without an error has None as its error",
    ErrorCode.BG_E_INSUFFICIENT_HTTP_SUPPORT: "HTTP/1.0 servers are used as far as they go; what they lack has a code of its own",
    ErrorCode.BG_E_REMOTE_NOT_SUPPORTED: "of remote COM activation",
    ErrorCode.BG_E_NEW_OWNER_DIFF_MAPPING: "there are no mapped drives",
    ErrorCode.BG_E_NEW_OWNER_NO_FILE_ACCESS: "a new owner's files are made anew as the new owner; E_ACCESSDENIED when it runs",
    ErrorCode.BG_E_TOO_MANY_FILES: UPLOADS,
    ErrorCode.BG_E_SESSION_NOT_FOUND: UPLOADS,
    ErrorCode.BG_E_CLIENT_SERVER_PROTOCOL_MISMATCH: UPLOADS,
    ErrorCode.BG_E_SERVER_EXECUTE_ENABLE: UPLOADS,
    ErrorCode.BG_E_PROPERTY_SUPPORTED_FOR_DOWNLOAD_JOBS_ONLY: UPLOADS,
    ErrorCode.BG_E_FILE_NOT_FOUND: PEERS,
    ErrorCode.BG_E_RECORD_DELETED: PEERS,
    ErrorCode.BG_E_UPNP_ERROR: "no router is asked how busy it is",
    ErrorCode.BG_E_PEERCACHING_DISABLED: PEERS,
    ErrorCode.BG_E_BUSYCACHERECORD: PEERS,
    ErrorCode.BG_E_UNKNOWN_PROPERTY_ID: PROPERTIES,
    ErrorCode.BG_E_READ_ONLY_PROPERTY: PROPERTIES,
    ErrorCode.BG_E_STANDBY_MODE: WINDOWS,
    ErrorCode.BG_E_BLOCKED_BY_BATTERY_POLICY: WINDOWS,
    ErrorCode.BG_E_BLOCKED_BY_BATTERY_SAVER: WINDOWS,
    ErrorCode.BG_E_BLOCKED_BY_BACKGROUND_ACCESS_POLICY: WINDOWS,
    ErrorCode.BG_E_BLOCKED_BY_GAME_MODE: WINDOWS,
    ErrorCode.BG_E_BLOCKED_BY_SYSTEM_POLICY: WINDOWS,
    ErrorCode.ERROR_NOT_LOGGED_ON: "a job whose owner is not logged on waits and says so (WaitingReason.NO_OWNER_TOKEN)",
}


def test_every_code_has_a_place() -> None:
    places = [*OCCUR, *ELSEWHERE, *CANNOT]
    assert sorted(places) == sorted(ErrorCode)


def test_a_code_that_cannot_occur_is_made_nowhere() -> None:
    package = TESTS.parent / "bits_async"
    texts = [path.read_text(encoding="utf-8") for path in package.rglob("*.py")]
    for code in CANNOT:
        assert not [text for text in texts if f"ErrorCode.{code.name}" in text and re.search(rf"ErrorCode\.{code.name}\b", text)], code.name
