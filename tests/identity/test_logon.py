"""How tokens are made, and whom they are refused to."""

import dataclasses
import grp
import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import krb5
import pytest
import spnego

from bits_async.errors import ErrorCode, ImpersonationFailed, InvalidArgument
from bits_async.identity import logon, posix
from bits_async.identity.ambient import impersonate
from bits_async.identity.logon import LogonType, NetworkOnly, logon_user, s4u_logon
from bits_async.identity.posix import Account, is_elevated
from bits_async.identity.threads import run_as
from bits_async.identity.tokens import ImpersonationLevel, Token
from tests.identity import child
from tests.local_users import LocalUser

UID = os.geteuid()
ME = pwd.getpwuid(UID).pw_name
PRINCIPAL = "alice@BITS.TEST"


def make_cache(path: Path, principal: str = PRINCIPAL) -> str:
    """A credential cache of somebody, without a ticket."""
    context = krb5.init_context()
    cache = krb5.cc_resolve(context, f"FILE:{path}".encode())
    krb5.cc_initialize(context, cache, krb5.parse_name_flags(context, principal.encode()))
    return f"FILE:{path}"


def make_keytab(path: Path, principal: str = PRINCIPAL) -> str:
    """A keytab with one DES-sized entry, in the file format of MIT Kerberos."""
    name, realm = (part.encode() for part in principal.split("@"))
    counted = b"".join(len(part).to_bytes(2, "big") + part for part in (realm, name))
    entry = (1).to_bytes(2, "big") + counted + (1).to_bytes(4, "big") + bytes(4) + b"\1" + (18).to_bytes(2, "big")
    entry += (32).to_bytes(2, "big") + bytes(32)
    path.write_bytes(b"\5\2" + len(entry).to_bytes(4, "big") + entry)
    path.chmod(0o600)
    return str(path)


# -- the process


def test_the_process_has_one_token() -> None:
    token = Token.for_process()
    assert token is Token.for_process()
    assert (token.name, token.sid, token.level) == (ME, f"uid:{UID}", ImpersonationLevel.IMPERSONATE)
    assert token.local.is_process
    assert (token.principal, token.has_credentials, token.fake, token.session) == (None, False, False, None)
    assert token.network == spnego.CredentialCache()


async def test_ones_own_uid_needs_no_privilege() -> None:
    for user in (UID, ME):
        token = await Token.for_user(user)
        assert (token.name, token.sid, token.network) == (ME, f"uid:{UID}", None)
        assert token.local.is_process
        assert token is not Token.for_process()


async def test_a_token_is_asked_for_under_any_ambient_identity() -> None:
    other = Token.for_network(spnego.Password("alice@REALM", "pw"))
    with impersonate(other):
        assert Token.for_process().network == spnego.CredentialCache()
        assert (await Token.for_user(UID)).name == ME


@pytest.mark.parametrize("user", ["no-such-user", "", "bits\nroot", "nul\0", 4294967294, -2, 10**30, str(UID)])
async def test_t09_a_user_that_the_database_does_not_know_is_refused(user: str | int) -> None:
    with pytest.raises(ImpersonationFailed, match="does not know") as caught:
        await Token.for_user(user)
    assert "\n" not in str(caught.value)
    assert caught.value.code == ErrorCode.CO_E_FAILEDTOIMPERSONATE


@pytest.mark.parametrize("user", [None, True, 1.5, b"root"])
async def test_a_user_is_a_name_or_a_uid(user: Any) -> None:
    with pytest.raises(TypeError, match="name or a uid"):
        await Token.for_user(user)


async def test_the_user_database_is_asked_in_a_thread_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    names: list[str] = []
    find = posix.user_identity

    def spy(user: str | int) -> Any:
        names.append(threading.current_thread().name)
        return find(user)

    monkeypatch.setattr(posix, "user_identity", spy)
    await Token.for_user(UID)
    assert names == ["bits-lookup"]


# -- without and with the privilege

REFUSED = """
import pwd
if os.geteuid() == 0:
    drop_to(int(sys.argv[1]), [int(each) for each in sys.argv[2:]])

async def main():
    other = next(entry.pw_name for entry in pwd.getpwall() if entry.pw_uid != os.geteuid())
    try:
        await Token.for_user(other)
    except ImpersonationFailed as exc:
        print(exc.identity == other, exc)
    own = await Token.for_user(os.geteuid())
    print(own.local.is_process, await run_as(own, os.geteuid) == os.geteuid())

asyncio.run(main())
"""


def test_another_user_is_refused_at_once_and_the_missing_capabilities_are_named() -> None:
    error, own = child.run(REFUSED, 65534).splitlines()
    assert error.startswith("True CO_E_FAILEDTOIMPERSONATE")
    assert "lacks CAP_SETUID and CAP_SETGID" in error
    assert own == "True True"


@pytest.mark.privileged
@pytest.mark.parametrize(("held", "missing"), [(7, "CAP_SETGID"), (6, "CAP_SETUID")])
def test_half_of_the_privilege_is_not_enough(held: int, missing: str) -> None:
    assert f"the process lacks {missing};" in child.run(REFUSED, 65534, held)


SERVICE = """
uid, directory = int(sys.argv[1]), sys.argv[2]
drop_to(65534, [6, 7, 1, 3])  # SETGID, SETUID, and DAC_OVERRIDE and FOWNER, which the kernel does not drop for a user that is not root

def make():
    path = f"{directory}/made-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    owner = os.stat(path).st_uid
    os.unlink(path)
    return owner, kernel.status()[b"CapEff"], type(failure(os.listdir, "/root"))

async def main():
    token = await Token.for_user(uid)
    print(token.elevated, Token.for_process().elevated, *await run_as(token, make))
    print(os.geteuid(), kernel.capabilities()[0] == 1 << 6 | 1 << 7 | 1 << 1 | 1 << 3)

asyncio.run(main())
"""


@pytest.mark.privileged
def test_t02_a_service_with_ambient_capabilities_lends_none_of_them(users: Mapping[str, LocalUser]) -> None:
    alice = users["bitsalice"]
    token, process = child.run(SERVICE, alice.uid, alice.home).splitlines()
    assert token == f"False True {alice.uid} b'{'0' * 16}' <class 'PermissionError'>"
    assert process == "65534 True"


@pytest.mark.privileged
async def test_a_users_token_is_that_user(users: Mapping[str, LocalUser]) -> None:
    alice = users["bitsalice"]
    for user in (alice.name, alice.uid):
        token = await Token.for_user(user)
        assert (token.name, token.sid, token.elevated, token.network) == (alice.name, f"uid:{alice.uid}", False, None)
        assert not token.local.is_process
        assert await run_as(token, os.getgroups) == [alice.gid]


@pytest.mark.privileged
async def test_a_user_can_have_network_credentials(users: Mapping[str, LocalUser]) -> None:
    credential = spnego.Password(PRINCIPAL, "pw")
    token = await Token.for_user("bitsalice", network=credential)
    assert (token.name, token.sid) == ("bitsalice", f"uid:{users['bitsalice'].uid}:{PRINCIPAL}")
    assert token.network == credential


# -- network credentials


@pytest.mark.parametrize(
    ("credential", "principal"),
    [
        (spnego.Password("alice@REALM", "pw"), "alice@REALM"),
        (spnego.Password("DOM\\alice", "pw"), "DOM\\alice"),
        (spnego.NTLMHash("alice", nt_hash="0" * 32), "alice"),
        (spnego.CredentialCache("alice@REALM"), "alice@REALM"),
        (spnego.KerberosKeytab("/no/such/keytab", "alice@REALM"), "alice@REALM"),
        (spnego.KerberosCCache("FILE:/no/such/cache", "alice@REALM"), "alice@REALM"),
    ],
)
def test_a_network_token_is_the_process_with_a_principal(credential: Any, principal: str) -> None:
    token = Token.for_network(credential)
    assert (token.name, token.principal, token.sid) == (principal, principal, f"uid:{UID}:{principal}")
    assert token.local.is_process
    assert token.has_credentials
    assert token.network == credential


def test_the_default_cache_has_no_principal_of_its_own() -> None:
    token = Token.for_network(spnego.CredentialCache())
    assert (token.principal, token.sid, token.has_credentials) == (None, f"uid:{UID}", True)


def test_whoever_changes_the_credential_later_does_not_change_the_token() -> None:
    credential = spnego.Password("alice@REALM", "pw")
    token = Token.for_network(credential)
    credential.username, credential.password = "root@REALM", "other"
    assert token.network == spnego.Password("alice@REALM", "pw")


def test_the_principal_of_a_cache_or_keytab_is_read_from_it(tmp_path: Path) -> None:
    cache = spnego.KerberosCCache(make_cache(tmp_path / "cc"))
    keytab = spnego.KerberosKeytab(make_keytab(tmp_path / "kt"))
    for credential in (cache, keytab):
        token = Token.for_network(credential)
        assert token.principal == PRINCIPAL
        assert token.network == dataclasses.replace(credential, principal=PRINCIPAL)  # and it stays that one


@pytest.mark.parametrize("credential", [spnego.KerberosCCache("FILE:/no/cache"), spnego.KerberosKeytab("/no/keytab")])
def test_a_cache_that_cannot_be_read_is_an_error_that_names_the_file(credential: Any) -> None:
    with pytest.raises(ImpersonationFailed, match=r"/no/(cache|keytab)"):
        Token.for_network(credential)


@pytest.mark.parametrize("name", ["", "alice\n@REALM", "a\x1b[0m"])
def test_a_principal_is_plain_text(name: str) -> None:
    with pytest.raises(InvalidArgument):
        Token.for_network(spnego.Password(name, "pw"))


@pytest.mark.parametrize("credential", [None, "alice", ("alice", "pw"), object()])
async def test_network_credentials_are_spnegos(credential: Any) -> None:
    with pytest.raises(TypeError, match="credential"):
        Token.for_network(credential)
    if credential is not None:
        with pytest.raises(TypeError, match="credential"):
            await Token.for_user(UID, network=credential)


def test_no_secret_is_shown(tmp_path: Path) -> None:
    token = Token.for_network(spnego.Password("alice@REALM", "hunter2"))
    shown = [repr(token), *(repr(getattr(token, name)) for name in ("name", "sid", "principal", "local", "network"))]
    assert not any("hunter2" in text for text in shown)


# -- T4

UNGUARDED = [
    spnego.CredentialCache(),
    spnego.CredentialCache("alice@REALM"),
    *(spnego.KerberosCCache(f"{kind}:x", "alice@REALM") for kind in ("KEYRING", "KCM", "API", "DIR", "MSLSA", "keyring", "XYZ", "")),
    spnego.KerberosKeytab("KDB:", "alice@REALM"),
]


@pytest.mark.privileged
@pytest.mark.parametrize("credential", UNGUARDED, ids=repr)
async def test_t04_credentials_that_the_fsuid_does_not_guard_are_refused_to_other_users(
    users: Mapping[str, LocalUser], credential: Any
) -> None:
    with pytest.raises(ImpersonationFailed, match="cannot have") as caught:
        await Token.for_user("bitsalice", network=credential)
    assert caught.value.identity == "bitsalice"


@pytest.mark.parametrize("credential", UNGUARDED[:-2], ids=repr)
async def test_t04_they_are_accepted_for_the_process_itself(credential: Any) -> None:
    assert Token.for_network(credential).network == credential
    assert (await Token.for_user(UID, network=credential)).network == credential


@pytest.mark.privileged
async def test_t04_a_cache_is_read_as_the_user_whose_token_it_is_for(users: Mapping[str, LocalUser], world_dir: Path) -> None:
    cache = make_cache(world_dir / "cc")
    os.chmod(world_dir / "cc", 0o600)  # root's
    with pytest.raises(ImpersonationFailed, match="cannot read whose"):
        await Token.for_user("bitsalice", network=spnego.KerberosCCache(cache))
    os.chown(world_dir / "cc", users["bitsalice"].uid, users["bitsalice"].gid)
    token = await Token.for_user("bitsalice", network=spnego.KerberosCCache(cache))
    assert token.sid == f"uid:{users['bitsalice'].uid}:{PRINCIPAL}"
    with pytest.raises(ImpersonationFailed, match="cannot read whose"):
        await Token.for_user("bitsbob", network=spnego.KerberosCCache(cache))


# -- T10


def test_t10_elevated_is_a_fact_of_the_account() -> None:
    plain = Account("alice", 1000, 1000, (1000,))
    assert not is_elevated(plain)
    assert is_elevated(dataclasses.replace(plain, uid=0))
    assert is_elevated(dataclasses.replace(plain, gid=0))
    assert is_elevated(dataclasses.replace(plain, groups=(0, 1000)))
    assert is_elevated(dataclasses.replace(plain, capabilities=1 << 21))  # CAP_SYS_ADMIN, of the process itself
    assert not is_elevated(dataclasses.replace(plain, capabilities=1 << 10))  # CAP_NET_BIND_SERVICE


@pytest.mark.parametrize("group", ["sudo", "wheel", "admin", "docker", "lxd", "disk", "shadow"])
def test_t10_members_of_the_administrators_groups_are_elevated(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def getgrnam(name: str) -> Any:
        if name != group:
            raise KeyError(name)
        return type("Group", (), {"gr_gid": 4711})

    monkeypatch.setattr(grp, "getgrnam", getgrnam)
    assert is_elevated(Account("alice", 1000, 1000, (1000, 4711)))
    assert not is_elevated(Account("alice", 1000, 1000, (1000, 4712)))


# -- fresh


@pytest.mark.privileged
async def test_a_changed_account_gives_another_identity(users: Mapping[str, LocalUser], monkeypatch: pytest.MonkeyPatch) -> None:
    from bits_async.errors import TokenRequired

    token = await Token.for_user("bitsalice")
    assert token.local.fresh() is token.local
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 4711])
    assert token.local.fresh() != token.local
    monkeypatch.undo()
    entry = pwd.getpwuid(users["bitsbob"].uid)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)
    with pytest.raises(TokenRequired, match="no longer"):
        token.local.fresh()


async def test_t10_a_token_that_only_says_who_somebody_is_becomes_no_other_one() -> None:
    seen = Token._make(Token.for_process().local, name="bob@REALM", principal="bob@REALM", level=ImpersonationLevel.IDENTIFY)
    for targets in ((), ("https://files.example",)):
        with impersonate(seen), pytest.raises(ImpersonationFailed, match="IDENTIFY"):
            await logon_user("eve@REALM", "guess", logon_type=LogonType.NEW_CREDENTIALS, delegate_to=targets)


@pytest.mark.parametrize("way", ["key", "verify", "service"])
async def test_t27_whoever_is_nobody_on_this_machine_logs_nobody_on_with_its_keytabs(tmp_path: Path, way: str) -> None:
    keytab = make_keytab(tmp_path / "service.keytab")
    remote = Token._make(NetworkOnly("eve@REALM"), principal="eve@REALM", proved=True, security=Token.for_process().local)
    with impersonate(remote), pytest.raises(ImpersonationFailed, match="nobody on this machine"):
        if way == "service":
            await s4u_logon("bob@REALM", service=keytab)
        else:
            await logon_user(PRINCIPAL, "guess" if way == "verify" else None, keytab=keytab)


@pytest.mark.parametrize("process", [True, False], ids=["the process", "another user"])
@pytest.mark.parametrize("way", ["key", "verify"])
def test_t07_a_key_that_another_user_knows_proves_nobody(monkeypatch: pytest.MonkeyPatch, way: str, process: bool) -> None:
    """He may have made the key up, and stand in for the KDC that answers with it."""

    class Tickets:
        def destroy(self) -> None:
            pass

    key = spnego.KerberosKeytab("/home/eve/made.up", PRINCIPAL)
    request = logon._Request(
        PRINCIPAL, "BITS.TEST", key if way == "key" else spnego.Password(PRINCIPAL, "guess"), None if way == "key" else "/home/eve/made.up"
    )
    monkeypatch.setattr(logon, "_first_ticket", lambda _: Tickets())
    monkeypatch.setattr(logon.kerberos, "clock_difference", lambda _: 0)
    monkeypatch.setattr(logon.kerberos, "verify", lambda *_: None)
    assert logon._prove(request, process) is process
