"""Users log on to a real Active Directory; services act for users; who was seen where stands in Apache's log."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

import gssapi
import krb5
import pytest
import spnego

import bits_async as bits
from bits_async import (
    AuthScheme,
    ErrorCode,
    HelperTokenFlags,
    ImpersonationLevel,
    LocalUser,
    LogonFailed,
    LogonType,
    Token,
    logon_user,
    s4u_logon,
)
from tests.active_directory import ActiveDirectory
from tests.local_users import LocalUser as LocalAccount
from tests.peers import SilentKdc
from tests.realms import Apache, MitKdc, write_krb5_conf
from tests.waiting import Deadlines, until

pytestmark = pytest.mark.realm
SECRET = "correct-horse-battery-staple"


@pytest.fixture(autouse=True)
def private_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def ad(active_directory: ActiveDirectory) -> ActiveDirectory:
    return active_directory


async def fetch(apache: Apache, helper: Token, path: Path) -> None:
    """A job of the process's that shows the origin somebody else."""
    await bits.download(
        apache.url("/neg/big"),
        path,
        helper=helper,
        helper_flags=HelperTokenFlags.NETWORK,
    )


async def log_on(ad: ActiveDirectory, name: str = "alice", **more: object) -> Token:
    return await logon_user(ad.principal(name), ad.password(name), **more)  # type: ignore[arg-type]


# -- a password


@pytest.mark.parametrize("logon_type", [LogonType.INTERACTIVE, LogonType.BATCH, LogonType.SERVICE, LogonType.NETWORK_CLEARTEXT])
async def test_a_logon_proves_the_user_and_gives_network_credentials(ad: ActiveDirectory, logon_type: LogonType) -> None:
    token = await log_on(ad, keytab=ad.keytab("bits/engine"), logon_type=logon_type)
    assert (token.name, token.sid, token.principal) == (ad.principal("alice"), f"network:{ad.principal('alice')}", ad.principal("alice"))
    assert (token.proved, token.has_credentials, token.elevated, token.level) == (True, True, False, ImpersonationLevel.IMPERSONATE)


async def test_the_origins_log_shows_who_logged_on(ad: ActiveDirectory, directory_apache: Apache, tmp_path: Path) -> None:
    await fetch(directory_apache, await logon_user("alice", ad.password("alice"), domain=ad.realm), tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == directory_apache.data
    directory_apache.hits(expect=1, user=ad.principal("alice"), status=200)


async def test_a_network_logon_has_no_credentials_for_other_machines(ad: ActiveDirectory, directory_apache: Apache, tmp_path: Path) -> None:
    token = await log_on(ad, keytab=ad.keytab("bits/engine"), logon_type=LogonType.NETWORK)
    assert (token.proved, token.has_credentials, token.network) == (True, False, None)
    with pytest.raises(bits.BitsError) as caught:
        await fetch(directory_apache, token, tmp_path / "big")
    assert caught.value.http_status == 401 or "no network credentials" in caught.value.message


async def test_new_credentials_keep_the_local_identity_and_ask_nobody(ad: ActiveDirectory) -> None:
    token = await logon_user(ad.principal("alice"), "a wrong one", logon_type=LogonType.NEW_CREDENTIALS)
    assert (token.local, token.proved, token.principal) == (Token.for_process().local, False, ad.principal("alice"))


async def test_a_key_of_the_user_logs_on_too(ad: ActiveDirectory, directory_apache: Apache, tmp_path: Path) -> None:
    token = await logon_user(ad.principal("helper"), keytab=ad.keytab("helper"))
    assert token.proved
    await fetch(directory_apache, token, tmp_path / "big")
    directory_apache.hits(expect=1, user=ad.principal("helper"), status=200)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("wrong", ErrorCode.ERROR_LOGON_FAILURE),
        ("nobody", ErrorCode.ERROR_NO_SUCH_USER),
        ("stale", ErrorCode.ERROR_PASSWORD_EXPIRED),
        ("locked", ErrorCode.ERROR_ACCOUNT_LOCKED_OUT),
        ("disabled", ErrorCode.ERROR_ACCOUNT_DISABLED),
        ("expired", ErrorCode.ERROR_ACCOUNT_EXPIRED),
    ],
)
async def test_each_refusal_has_its_code_and_says_who_and_what_to_do(ad: ActiveDirectory, name: str, code: ErrorCode) -> None:
    user = ad.principal("bob" if name == "wrong" else name)
    with pytest.raises(LogonFailed) as caught:
        await logon_user(user, ad.password(name))
    assert (caught.value.code, caught.value.identity) == (code, user)
    assert caught.value.advice


async def test_a_realm_without_a_kdc_is_told_from_a_wrong_password(ad: ActiveDirectory) -> None:
    for user in ("alice@NOWHERE.TEST", "alice@AD.BITS.TEST"):
        if user.endswith("AD.BITS.TEST"):
            write_krb5_conf(Path(os.environ["KRB5_CONFIG"]).with_name("closed.conf"), {ad.realm: 1})
            os.environ["KRB5_CONFIG"] = str(Path(os.environ["KRB5_CONFIG"]).with_name("closed.conf"))  # the fixture puts it back
        with pytest.raises(LogonFailed) as caught:
            await logon_user(user, SECRET)
        assert (caught.value.code, caught.value.identity) == (ErrorCode.ERROR_NO_LOGON_SERVERS, user)


async def test_a_silent_kdc_costs_the_deadline_and_never_the_loop(
    ad: ActiveDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bits_async.identity.logon.LOGON_DEADLINE", 0.3)
    monkeypatch.setattr(asyncio, "timeout", (deadlines := Deadlines(0.3)).timeout)
    before = set(threading.enumerate())
    with SilentKdc() as silent:
        monkeypatch.setenv("KRB5_CONFIG", str(write_krb5_conf(tmp_path / "krb5.conf", {"SILENT.TEST": silent.port})))
        logging_on = asyncio.create_task(logon_user("alice@SILENT.TEST", SECRET))
        await until(lambda: silent.asked)  # the loop goes on
        deadlines.pass_now()
        with pytest.raises(LogonFailed) as caught:
            await logging_on
        assert caught.value.code == ErrorCode.ERROR_NO_LOGON_SERVERS
        stuck = [thread for thread in threading.enumerate() if thread.name.startswith("bits-logon") and thread not in before]
        assert len(stuck) == 1  # given up: it ends when libkrb5 does
        assert stuck[0].daemon


async def test_a_kdc_that_only_claims_the_realm_logs_nobody_on(
    ad: ActiveDirectory, silent_kdc: SilentKdc, monkeypatch: pytest.MonkeyPatch
) -> None:
    keytab = ad.keytab("bits/engine")
    with FalseKdc(silent_kdc.port) as false:
        alice, password = false.principal("alice"), false.password("alice")
        false.add_service("bits/engine")
        monkeypatch.setenv("KRB5_CONFIG", str(false.krb5_conf))
        with pytest.raises(LogonFailed) as caught:
            await logon_user(alice, password, keytab=keytab)
        assert caught.value.code == ErrorCode.ERROR_TRUSTED_RELATIONSHIP_FAILURE
        unproved = await logon_user(alice, password)  # nothing to verify with: the name is a claim
        assert not unproved.proved


class FalseKdc(MitKdc):
    """Somebody else's KDC that says it is AD.BITS.TEST's."""

    realm = "AD.BITS.TEST"
    services = ()


SKEWED = """
import asyncio, sys
from bits_async import LogonFailed, logon_user
async def main():
    try:
        await logon_user(sys.argv[1], sys.stdin.read())
    except LogonFailed as failed:
        print(failed.code, failed.advice)
asyncio.run(main())
"""


def test_clocks_that_differ_are_told_as_that(ad: ActiveDirectory) -> None:
    command = ["faketime", "-f", "+2h", sys.executable, "-c", SKEWED, ad.principal("alice")]
    done = subprocess.run(command, input=ad.password("alice"), capture_output=True, text=True, timeout=150, check=False)
    code, _, advice = done.stdout.partition(" ")
    assert (int(code or "0"), "clock" in advice) == (ErrorCode.ERROR_TIME_SKEW, True), done.stderr


async def test_t14_no_password_is_shown_by_token_log_error_or_traceback(ad: ActiveDirectory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = await log_on(ad)
    try:
        await logon_user(ad.principal("alice"), SECRET)
    except LogonFailed as failed:
        shown = "".join(traceback.TracebackException.from_exception(failed, capture_locals=True).format())
        told = [str(failed), repr(failed.args), repr(failed.__cause__), repr(failed.__context__)]
    text = "\n".join([repr(token), repr(token.network), caplog.text, *told, *shown.split(f'"""{SECRET}"""')])
    assert ad.password("alice") not in text
    # The test's own frame holds nothing but the constant's name.
    assert SECRET not in text


# -- who that is on this machine


async def test_t09_somebody_from_the_realm_is_nobody_on_this_machine(ad: ActiveDirectory, tmp_path: Path) -> None:
    token = await log_on(ad)
    with pytest.raises(bits.ImpersonationFailed, match="nobody on this machine"):
        await bits.run_as(token, os.getuid)
    with pytest.raises(bits.ImpersonationFailed, match="nobody on this machine"):
        await bits.download("http://localhost:1/", tmp_path / "x", helper=token, helper_flags=HelperTokenFlags.LOCAL_FILE)


@pytest.mark.privileged
async def test_t09_a_mapping_is_said_and_never_to_root_a_system_account_or_from_another_realm(
    ad: ActiveDirectory, users: Mapping[str, LocalAccount]
) -> None:
    mapped = await log_on(ad, local_user="bitsalice")
    assert await bits.run_as(mapped, lambda: mapped.local.name) == "bitsalice"
    assert mapped.sid == f"uid:{mapped.local.key.partition(':')[2]}:{ad.principal('alice')}"
    for local_user in ("root", 0, "daemon", "no-such-user", LocalUser("bitsalice", realms=frozenset({"OTHER.TEST"}))):
        with pytest.raises(bits.ImpersonationFailed):
            await log_on(ad, local_user=local_user)
    assert (await log_on(ad, local_user=LocalUser("daemon", system=True))).local.name == "daemon"


@pytest.mark.privileged
async def test_t04_who_is_mapped_writes_as_the_local_user_and_shows_tickets_that_only_this_process_can_name(
    ad: ActiveDirectory, users: Mapping[str, LocalAccount], directory_apache: Apache
) -> None:
    alice = users["bitsalice"]
    token = await s4u_logon("bob@AD.BITS.TEST", service=ad.keytab("engine"), local_user=alice.name)
    both = HelperTokenFlags.LOCAL_FILE | HelperTokenFlags.NETWORK
    path = await bits.download(directory_apache.url("/neg/big"), alice.home / "big", helper=token, helper_flags=both)
    assert alice.owns(path)
    directory_apache.hits(expect=1, user="bob@AD.BITS.TEST", status=200)
    with pytest.raises(bits.ImpersonationFailed, match="only files are guarded"):
        await Token.for_user(alice.name, network=spnego.KerberosCCache("MEMORY:guess", "bob@AD.BITS.TEST"))
    path.unlink()


@pytest.mark.privileged
async def test_t27_a_keytab_is_read_as_whoever_names_it(
    ad: ActiveDirectory, users: Mapping[str, LocalAccount], directory_apache: Apache, tmp_path: Path
) -> None:
    theirs, others = ad.keytab("helper", owner=users["bitsalice"].uid), ad.keytab("helper")
    user = ad.principal("helper")
    with bits.impersonate(await Token.for_user("bitsalice")):
        for attempt in (lambda: logon_user(user, keytab=others), lambda: s4u_logon(user, service=others)):
            with pytest.raises(LogonFailed, match="may not be read"):
                await attempt()
        token = await logon_user(user, keytab=theirs)
    await fetch(directory_apache, token, tmp_path / "big")  # later tickets, too, are got as the one who named it
    directory_apache.hits(expect=1, user=user, status=200)


# -- the right to act for others


async def test_the_origin_sees_bob_though_nobody_knew_his_password(ad: ActiveDirectory, directory_apache: Apache, tmp_path: Path) -> None:
    token = await s4u_logon("bob@AD.BITS.TEST", service=ad.keytab("engine"))
    assert (token.level, token.proved, token.principal) == (ImpersonationLevel.IMPERSONATE, True, "bob@AD.BITS.TEST")
    await fetch(directory_apache, token, tmp_path / "big")
    directory_apache.hits(expect=1, user="bob@AD.BITS.TEST", status=200)


@pytest.mark.parametrize(("service", "user"), [("plain", "bob"), ("engine", "sensitive")], ids=["no-right", "never-delegated"])
async def test_without_a_forwardable_ticket_the_token_names_bob_and_does_nothing(
    ad: ActiveDirectory, tmp_path: Path, service: str, user: str
) -> None:
    token = await s4u_logon(ad.principal(user), service=ad.keytab(service))
    assert (token.level, token.network, token.principal) == (ImpersonationLevel.IDENTIFY, None, ad.principal(user))
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await manager.create_job("refused")
        options = await job.token_options()
        with bits.impersonate(token):
            refused = (options.set_helper_token, lambda: manager.create_job("his"), lambda: bits.run_as(token, os.getuid))
            for use in refused:
                with pytest.raises(bits.ImpersonationFailed, match="IDENTIFY") as caught:
                    await use()
                assert caught.value.code == ErrorCode.CO_E_FAILEDTOIMPERSONATE
            with pytest.raises(bits.AccessDenied):
                await manager.get_job(job.id)


async def test_a_service_that_is_not_on_the_list_is_refused_by_its_name(
    ad: ActiveDirectory, directory_apache: Apache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await s4u_logon("bob@AD.BITS.TEST", service=ad.keytab("other"))
    assert token.level is ImpersonationLevel.IDENTIFY  # no right at all
    token = await s4u_logon("bob@AD.BITS.TEST", service=spnego.KerberosKeytab(str(ad.keytab("engine"))))
    from bits_async.auth.policy import Offer
    from bits_async.auth.schemes import _begin_kerberos
    from bits_async.auth.tickets import Tickets

    offer = Offer(AuthScheme.NEGOTIATE, token.network, holder=token, process=False, principal=token.principal)
    with pytest.raises(bits.AuthFailed, match=r"HTTP/other\.bits\.test") as caught:
        await bits.run_as(Token.for_process(), _begin_kerberos, Tickets(), offer, "other.bits.test", None)
    assert caught.value.code == ErrorCode.SEC_E_DELEGATION_POLICY


@pytest.mark.parametrize(
    ("user", "code"),
    [
        ("nobody", ErrorCode.ERROR_NO_SUCH_USER),
        ("locked", ErrorCode.ERROR_ACCOUNT_LOCKED_OUT),
        ("disabled", ErrorCode.ERROR_ACCOUNT_RESTRICTION),
    ],
)
async def test_a_service_cannot_act_for_somebody_who_could_not_log_on(ad: ActiveDirectory, user: str, code: ErrorCode) -> None:
    with pytest.raises(LogonFailed) as caught:
        await s4u_logon(ad.principal(user), service=ad.keytab("engine"))
    assert caught.value.code == code


# -- what a client delegated


def login(
    ad: ActiveDirectory, client: gssapi.Credentials, service: str, *, both: bool = False, forward: bool = False
) -> gssapi.SecurityContext:
    """The service's side of a login."""
    keytab = str(ad.keytab(*({service} | ({"front"} if both else set()))))
    store = {"keytab": keytab, "rcache": "none:"}
    name = gssapi.Name(ad.principal("front"), gssapi.NameType.kerberos_principal) if both else None
    credentials = gssapi.Credentials(
        name=name, usage="both" if both else "accept", store=store | ({"client_keytab": keytab, "ccache": "MEMORY:front"} if both else {})
    )
    acceptor = gssapi.SecurityContext(creds=credentials, usage="accept")
    target = gssapi.Name(ad.principal(service), gssapi.NameType.kerberos_principal)
    flags = gssapi.RequirementFlag.delegate_to_peer if forward else 0
    initiator = gssapi.SecurityContext(name=target, creds=client, usage="initiate", mech=gssapi.MechType.kerberos, flags=flags)
    acceptor.step(initiator.step())
    return acceptor


def client(ad: ActiveDirectory, name: str = "alice") -> gssapi.Credentials:
    store = {"client_keytab": str(ad.keytab(name)), "ccache": f"MEMORY:client-{name}"}
    return gssapi.Credentials(name=gssapi.Name(ad.principal(name), gssapi.NameType.kerberos_principal), usage="initiate", store=store)


async def test_a_forwarded_ticket_makes_a_token(ad: ActiveDirectory, directory_apache: Apache, tmp_path: Path) -> None:
    token = await Token.from_delegated(login(ad, client(ad), "HTTP/portal.bits.test", forward=True))
    assert (token.name, token.proved, token.level) == ("alice@AD.BITS.TEST", True, ImpersonationLevel.IMPERSONATE)
    await fetch(directory_apache, token, tmp_path / "big")
    directory_apache.hits(expect=1, user="alice@AD.BITS.TEST", status=200)


async def test_a_login_alone_is_enough_where_the_service_may_act_for_its_callers(
    ad: ActiveDirectory, directory_apache: Apache, tmp_path: Path
) -> None:
    token = await Token.from_delegated(login(ad, client(ad), "HTTP/front.bits.test", both=True))
    await fetch(directory_apache, token, tmp_path / "big")
    directory_apache.hits(expect=1, user="alice@AD.BITS.TEST", status=200)


async def test_who_delegated_nothing_is_not_acted_for(ad: ActiveDirectory) -> None:
    acceptor = login(ad, client(ad), "HTTP/portal.bits.test")
    with pytest.raises(bits.ImpersonationFailed, match="delegated nothing") as caught:
        await Token.from_delegated(acceptor)
    assert caught.value.identity == "alice@AD.BITS.TEST"
    with pytest.raises(TypeError):
        await Token.from_delegated(object())


# -- proof


async def test_t07_a_proved_principal_opens_what_it_made_and_an_unproved_one_does_not(ad: ActiveDirectory, tmp_path: Path) -> None:
    keytab = ad.keytab("bits/engine")
    async with bits.BitsManager(store=tmp_path / "queue.db") as manager:
        job = await manager.create_job("hers", owner=await log_on(ad, keytab=keytab))
        for token in (await log_on(ad, keytab=keytab), await logon_user(ad.principal("alice"), keytab=ad.keytab("alice"))):
            with bits.impersonate(token):
                assert (await manager.get_job(job.id)).id == job.id
        claimed = Token.for_network(spnego.Password(ad.principal("alice"), ad.password("alice")))
        for stranger in (claimed, await log_on(ad), await log_on(ad, "bob", keytab=keytab)):
            with bits.impersonate(stranger), pytest.raises(bits.AccessDenied):
                await manager.get_job(job.id)


# -- many


def holds_tickets(cache: str) -> bool:
    try:
        return krb5.cc_resolve(krb5.init_context(), cache.encode()).principal is not None
    except krb5.Krb5Error:
        return False


async def test_fifty_tokens_at_once_each_see_themselves_and_leave_no_cache(kdc: MitKdc) -> None:
    service = kdc.keytab(kdc.add_service("bits/fifty", "+ok_to_auth_as_delegate"))
    names = ("alice", "bob", "helper")
    tokens = await asyncio.gather(*(s4u_logon(kdc.principal(names[n % 3]), service=service) for n in range(50)))
    assert [token.principal for token in tokens] == [kdc.principal(names[n % 3]) for n in range(50)]
    assert {token.level for token in tokens} == {ImpersonationLevel.IMPERSONATE}
    places = {token.network.ccache for token in tokens}
    assert len(places) == 50
    assert all(holds_tickets(place) for place in places)
    for token in tokens:
        token.close()
    assert not any(holds_tickets(place) for place in places)
