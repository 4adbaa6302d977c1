"""The domain controller of the tests does what real ones do, seen with krb5 and python-gssapi alone."""

import gssapi
import krb5
import pytest

from tests import active_directory as directory_module
from tests.active_directory import ActiveDirectory

pytestmark = pytest.mark.realm
KERBEROS = gssapi.MechType.kerberos


def log_on(name: str, password: str) -> krb5.Creds:
    context = krb5.init_context()
    options = krb5.get_init_creds_opt_alloc(context)
    return krb5.get_init_creds_password(context, krb5.parse_name_flags(context, name.encode()), options, password=password.encode())


def service(directory: ActiveDirectory, name: str, cache: str) -> gssapi.Credentials:
    keytab = str(directory.keytab(name))
    principal = gssapi.Name(directory.principal(name), gssapi.NameType.kerberos_principal)
    return gssapi.Credentials(name=principal, usage="both", store={"keytab": keytab, "client_keytab": keytab, "ccache": f"MEMORY:{cache}"})


def accepted(directory: ActiveDirectory, token: bytes) -> str:
    credentials = gssapi.Credentials(usage="accept", store={"keytab": str(directory.keytab("HTTP/localhost"))})
    acceptor = gssapi.SecurityContext(creds=credentials, usage="accept")
    acceptor.step(token)
    return str(acceptor.initiator_name)


def as_bob(directory: ActiveDirectory, credentials: gssapi.Credentials) -> gssapi.Credentials:
    bob = gssapi.Name(directory.principal("bob"), gssapi.NameType.kerberos_principal)
    return credentials.impersonate(bob, mechs=[KERBEROS])


def ticket_for(credentials: gssapi.Credentials, host: str) -> bytes:
    name = gssapi.Name(f"HTTP@{host}", gssapi.NameType.hostbased_service)
    return gssapi.SecurityContext(name=name, creds=credentials, usage="initiate", mech=KERBEROS).step() or b""


@pytest.mark.parametrize(
    ("name", "number"),
    [("expired", -1765328366), ("locked", -1765328366), ("disabled", -1765328366), ("stale", -1765328361), ("nobody", -1765328378)],
)
def test_accounts_that_may_not_log_on_are_refused(active_directory: ActiveDirectory, name: str, number: int) -> None:
    assert log_on(active_directory.principal("alice"), active_directory.password("alice")).ticket_flags
    with pytest.raises(krb5.Krb5Error) as caught:
        log_on(active_directory.principal(name), active_directory.password(name))
    assert caught.value.err_code == number


def test_the_engine_may_act_for_bob_with_the_web_service_and_no_other(active_directory: ActiveDirectory) -> None:
    credentials = as_bob(active_directory, service(active_directory, "engine", "test-engine"))
    assert accepted(active_directory, ticket_for(credentials, "localhost")) == active_directory.principal("bob")
    with pytest.raises(gssapi.exceptions.GSSError):
        ticket_for(credentials, "other.bits.test")


def test_a_service_without_the_right_cannot_act_for_bob(active_directory: ActiveDirectory) -> None:
    credentials = as_bob(active_directory, service(active_directory, "plain", "test-plain"))
    with pytest.raises(gssapi.exceptions.GSSError):
        ticket_for(credentials, "localhost")


@pytest.mark.usefixtures("directory_server")
def test_the_directory_is_provisioned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "_provision", lambda archive: pytest.fail("provisioned again"))
    archive = directory_module.provisioned()
    assert archive.parent.stat().st_mode & 0o077 == 0
