"""Where the journal's key comes from: a file beside it, the operating system's keyring, or a credential of systemd.

A journal remembers which (not the key), and is opened from no other place: a key that cannot be had is an error and never a reason to
look elsewhere, because the secrets that are saved meanwhile would be sealed with what an administrator did not choose. A key that is
gone from the place it was in (a file that was deleted, an entry that was removed) is made anew there, and the jobs whose secrets it
sealed say so; systemd's credentials are read-only, so a missing one is an error.

Everything here blocks, a keyring perhaps until somebody unlocks it: it is called by the store's own thread.
"""

import base64
import binascii
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, final

from ..errors import BitsError, ErrorCode, InvalidArgument, StoreError
from ..identity.vault import ask_keyring, keyring_unusable, systemd_credential
from .secrets import KEY_SIZE, load_key

FILE: Final = "file"
KEYRING: Final = "keyring"
SYSTEMD: Final = "systemd"


@final
@dataclass(frozen=True, slots=True)
class KeySource:
    """Where a manager finds the key that seals the secrets of its journal. Make it by `file`, `keyring` or `systemd`."""

    kind: str
    name: str = ""

    @classmethod
    def file(cls) -> Self:
        """A file beside the journal (`<store>.key`), readable by its owner only, made when it is missing. The default."""
        return cls(FILE)

    @classmethod
    def keyring(cls, service: str = "bits_async") -> Self:
        """The operating system's keyring, through the package keyring (`pip install bits-async[keyring]`).

        Args:
            service: under which the entry is kept; its user name is an id that the journal remembers.

        Raises:
            InvalidArgument: no name.
        """
        return cls(KEYRING, _named(service))

    @classmethod
    def systemd(cls, name: str) -> Self:
        """A credential of systemd: the file of that name in `$CREDENTIALS_DIRECTORY`, 32 random bytes.

        In the unit `LoadCredentialEncrypted=NAME`, made once with
        `head -c 32 /dev/urandom | systemd-creds encrypt --name=NAME - /etc/credstore.encrypted/NAME`.

        Raises:
            InvalidArgument: not a plain file name.
        """
        if _named(name) in (".", "..") or "/" in name or "\0" in name:
            raise InvalidArgument(f"a credential of systemd has a plain name, not {name!r}")
        return cls(SYSTEMD, name)

    def __str__(self) -> str:
        """As the journal remembers it."""
        return f"{self.kind} {self.name}".rstrip()

    def check(self, remembered: str, journal: Path) -> None:
        """Refuses another place than the journal's own.

        Raises:
            StoreError: the key of this journal is elsewhere.
        """
        if str(self) != remembered:
            raise StoreError(
                f"the key of this journal is kept by: {remembered}; it was asked for from: {self}",
                code=ErrorCode.E_INVALIDARG,
                path=journal,
                advice="open the journal with the KeySource it was made with (key=), or name another journal",
            )

    def load(self, beside: Path, key_id: str) -> bytes:
        """The key.

        Args:
            beside: the file for `file()`.
            key_id: the name of this journal's entry in a keyring.

        Raises:
            StoreError: it cannot be had, may be read by others, or is none.
        """
        if self.kind == KEYRING:
            return _from_keyring(self.name, key_id)
        if self.kind == SYSTEMD:
            return _from_systemd(self.name)
        return load_key(beside)


def _named(name: str) -> str:
    if not isinstance(name, str) or not name:
        raise InvalidArgument("a key source has a name")
    return name


def _from_systemd(name: str) -> bytes:
    with _of_the_store():
        key = systemd_credential(name, KEY_SIZE + 1)
    if len(key) != KEY_SIZE:
        raise StoreError(
            f"the credential {name} has {'more' if len(key) > KEY_SIZE else len(key)} bytes instead of {KEY_SIZE}",
            code=ErrorCode.BG_E_INVALID_CREDENTIALS,
            advice=f"make it with: head -c {KEY_SIZE} /dev/urandom | systemd-creds encrypt --name={name} - FILE",
        )
    return key


def _from_keyring(service: str, key_id: str) -> bytes:
    with _of_the_store():
        text = ask_keyring(lambda keyring: keyring.get_password(service, key_id))
        if text is None:
            text = base64.b64encode(os.urandom(KEY_SIZE)).decode("ascii")
            ask_keyring(lambda keyring: keyring.set_password(service, key_id, text))
            if ask_keyring(lambda keyring: keyring.get_password(service, key_id)) != text:  # as the null backend does
                raise keyring_unusable("it did not keep what it was given")
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_SIZE:
        advice = "restore the entry from a backup; without one remove it: jobs that need a secret then say so"
        message = f"the keyring's entry {key_id} of {service} is no key"
        raise StoreError(message, code=ErrorCode.BG_E_INVALID_CREDENTIALS, advice=advice)
    return key


@contextlib.contextmanager
def _of_the_store() -> Iterator[None]:
    """A key that cannot be had is the journal's trouble."""
    try:
        yield
    except BitsError as error:
        raise StoreError(error.message, code=error.code, path=error.path, advice=error.advice) from error.__cause__
