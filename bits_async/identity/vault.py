"""Where secrets are kept encrypted: credentials of systemd, and the operating system's keyring.

Everything here blocks, a keyring perhaps until somebody unlocks it. Nothing here knows what a secret is for.
"""

import os
import stat
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BitsError, ErrorCode, ErrorContext, error_from_os, make_error, scrub

T = TypeVar("T")


def systemd_credential(name: str, most: int) -> bytes:
    """At most so many bytes of the file of that name in `$CREDENTIALS_DIRECTORY`.

    Raises:
        BitsError: systemd gave this process no such credential, or another user may read or write it.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    advice = f"set LoadCredentialEncrypted={name} in the unit"
    if not directory:
        message = f"there is no credential {name}: this process was not given any by systemd"
        raise _failed(ErrorCode.ERROR_PATH_NOT_FOUND, message, f"{advice}; CREDENTIALS_DIRECTORY is then set")
    path = Path(directory, name)
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(fd, "rb") as file:
            _check(os.fstat(fd), path)
            return file.read(most)
    except FileNotFoundError:
        raise _failed(ErrorCode.ERROR_FILE_NOT_FOUND, f"systemd gave this process no credential {name}", advice, path) from None
    except OSError as exc:
        raise error_from_os(exc, path=path, identity=None, doing="use") from scrub(exc)


def _check(found: os.stat_result, path: Path) -> None:
    """Of a service's user, or root's; nobody else reads or writes it (systemd lets a service's user read by an ACL: the group bits)."""
    if sys.platform == "win32":
        return
    strange = found.st_uid not in (0, os.geteuid()) or not stat.S_ISREG(found.st_mode)
    if strange or found.st_mode & (stat.S_IWGRP | stat.S_IRWXO):
        message = "the credential is not used: another user may read or write it"
        advice = "let systemd make the directory of credentials (LoadCredentialEncrypted=)"
        raise _failed(ErrorCode.ERROR_DIRECTORY, message, advice, path)


def ask_keyring(call: Callable[[Any], T]) -> T:
    """What `call` gets of the package keyring.

    Raises:
        BitsError: it is not installed, or cannot be used.
    """
    try:
        keyring = import_module("keyring")
    except ImportError:
        raise _failed(ErrorCode.E_NOTIMPL, "the package keyring is not installed", "pip install bits-async[keyring]") from None
    try:
        return call(keyring)
    except Exception as exc:  # each backend has errors of its own besides keyring's
        raise keyring_unusable(type(exc).__name__) from scrub(exc)


def keyring_unusable(why: str) -> BitsError:
    """A keyring that does not do what it is for."""
    advice = "unlock it, or choose a backend that works without a desktop (keyring --list-backends); a service has credentials of systemd"
    return _failed(ErrorCode.E_ACCESSDENIED, f"the keyring cannot be used: {why}", advice)


def _failed(code: ErrorCode, message: str, advice: str, path: Path | None = None) -> BitsError:
    return make_error(code, ErrorContext.GENERAL_QUEUE_MANAGER, message, advice=advice, path=path)
