import inspect
import subprocess
import sys

import pytest

import bits_async as bits

PUBLIC = """
AccessDenied
AuthCredentials
AuthFailed
AuthRules
AuthScheme
AuthTarget
AutologonLevel
BackgroundCopyCallback
BitsError
BitsManager
Cancellation
ClientCertificate
Completion
CostFlags
CostSource
DelegationTarget
ErrorCode
ErrorContext
Event
EventStream
EventsLost
FileInfo
FileProgress
FileRange
FileRestarted
FileTransferred
GroupPolicy
HelperTokenFlags
Hosts
ImpersonationFailed
ImpersonationLevel
ImplicitCredentials
InvalidArgument
InvalidState
Job
JobCancelled
JobChanged
JobFile
JobPriority
JobProgress
JobState
JobTimes
KeySource
Limits
LocalFileError
LocalUser
LogonFailed
LogonType
ManagerClosed
NetworkError
NotFound
NotifyCmdLine
NotifyFlags
Progress
ProxySettings
ProxyUsage
RemoteFileError
Retrying
SecurityFlags
StoreError
Timeouts
Token
TokenFlow
TokenOptions
TokenRequired
ValidationFailed
Waiting
WaitingReason
carry
current_token
download
impersonate
logon_user
revert_to_self
run_as
s4u_logon
set_token_flow
"""


def test_exactly_these_names_are_public_and_each_can_be_had():
    assert sorted(bits.__all__) == sorted(PUBLIC.split())
    for name in bits.__all__:
        assert getattr(bits, name) is not None
    assert set(bits.__all__) <= set(dir(bits))


def test_every_public_class_and_function_says_what_it_promises():
    for name in bits.__all__:
        value = getattr(bits, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
        if inspect.isclass(value):
            for member, what in vars(value).items():
                if not member.startswith("_") and (inspect.isfunction(what) or isinstance(what, property)):
                    assert inspect.getdoc(what), f"{name}.{member}"


def test_importing_the_package_loads_none_of_the_heavy_libraries():
    code = (
        "import sys, bits_async as bits; bits.__all__; "
        "bits.ErrorCode, bits.JobState, bits.Token, bits.impersonate, bits.AuthCredentials; "
        "print(sorted({'aiohttp', 'spnego', 'gssapi', 'aiosqlite', 'cryptography', 'typer', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_numbers_are_those_of_bits():
    assert [s.value for s in bits.JobState] == list(range(9))
    assert [p.value for p in bits.JobPriority] == [0, 1, 2, 3]
    assert (bits.HelperTokenFlags.LOCAL_FILE.value, bits.HelperTokenFlags.NETWORK.value) == (1, 2)
    assert [t.value for t in bits.AuthTarget] == [1, 2]
    assert [s.value for s in bits.AuthScheme] == [1, 2, 3, 4]
    assert [level.name for level in bits.ImpersonationLevel] == ["ANONYMOUS", "IDENTIFY", "IMPERSONATE", "DELEGATE"]
    assert [flag.value for flag in bits.SecurityFlags] == [0x1, 0x2, 0x4, 0x8, 0x10, 0x100, 0x200, 0x800]
    assert bits.ErrorCode.BG_E_TOKEN_REQUIRED == 0x80200056
    assert bits.ErrorCode.E_ACCESSDENIED == 0x80070005
    assert bits.ErrorContext.LOCAL_FILE.value == 4


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        bits.nothing  # noqa: B018 - the access is the test
