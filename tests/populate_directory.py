"""Fills a freshly provisioned Active Directory, with Debian's python3-samba: run by the system's own interpreter.

Its arguments are the directory's smb.conf and the keytab to write; its input is the JSON list of `active_directory.ACCOUNTS`.
One program and one transaction: each call of samba-tool would cost a second.
"""

import json
import sys
from typing import Any

import ldb
import samba.dckeytab  # noqa: F401 - adds export_keytab to Net
from samba.auth import system_session
from samba.net import Net
from samba.param import LoadParm
from samba.samdb import SamDB

AES = "24"  # msDS-SupportedEncryptionTypes
FOR_EVER = "-9223372036854775808"  # an interval in units of 100 ns, counted downwards


def change(directory: SamDB, name: str, **attributes: str | list[str]) -> None:
    message = ldb.Message(ldb.Dn(directory, name))
    for number, (attribute, value) in enumerate(attributes.items()):
        values = value if isinstance(value, list) else [value]
        attribute = attribute.replace("_", "-")
        message[str(number)] = ldb.MessageElement(values, ldb.FLAG_MOD_REPLACE, attribute)
    directory.modify(message)


def add(directory: SamDB, account: dict[str, Any]) -> None:
    name = account["name"]
    directory.newuser(name, account["password"])
    entry = f"CN={name},CN=Users,{directory.domain_dn()}"
    change(directory, entry, msDS_SupportedEncryptionTypes=AES)
    if account["services"]:
        change(directory, entry, servicePrincipalName=account["services"])
    if account["delegates_to"]:
        change(directory, entry, msDS_AllowedToDelegateTo=account["delegates_to"])
    for attribute, value in account["attributes"].items():
        change(directory, entry, **{attribute: value})


def main() -> None:
    conf, keytab = sys.argv[1:]
    accounts = json.load(sys.stdin)
    parameters = LoadParm()
    parameters.load(conf)
    directory = SamDB(url=parameters.private_path("sam.ldb"), session_info=system_session(), lp=parameters)
    directory.transaction_start()
    # The directory is kept for longer than passwords usually live, and what is locked stays so.
    change(directory, directory.domain_dn(), maxPwdAge=FOR_EVER, lockoutDuration=FOR_EVER, lockoutThreshold="5")
    for account in accounts:
        add(directory, account)
    directory.transaction_commit()
    net = Net(None, parameters)
    for account in accounts:
        for principal in (account["name"], *account["services"]):
            net.export_keytab(keytab=keytab, principal=principal)


if __name__ == "__main__":
    main()
