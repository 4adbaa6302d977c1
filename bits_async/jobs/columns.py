"""How the journal keeps a value in a column, and what a column says. Knows no table."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from ..auth.policy import Origin
from ..transport.options import ClientCertificate
from .model import OwnerKey

Row = Mapping[str, Any]
Values = dict[str, Any]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
_LARGEST: Final = 2**63 - 1
_SECRET: Final = re.compile(r"[?#]")  # where what must not be read begins in a URL


def row_of(**columns: Any) -> Values:
    """Each as `column_value` gives it; most values are kept as they are, and a file has many of them."""
    return {
        name: value
        if value is None or (kind := type(value)) is bool or (kind is str and value.isascii()) or (kind is int and 0 <= value <= _LARGEST)
        else column_value(value)
        for name, value in columns.items()
    }


def column_value(value: Any) -> Any:
    """How the journal keeps a value."""
    match value:
        case None | bytes() | float():
            return value
        case bool():
            return int(value)
        case int():
            return int(value) if abs(value) <= _LARGEST else str(value).encode()  # a server may claim any size
        case UUID():
            return _uuid_text(value)
        case str() | Path():
            return _text_in(str(value))
        case datetime():
            return (value - EPOCH) // MICROSECOND
        case Enum():
            return value.value
    raise TypeError(f"no column for {type(value).__name__}")


@lru_cache(maxsize=64)  # of many files the jobs are few
def _uuid_text(value: UUID) -> str:
    return str(value)


def _text_in(text: str) -> str | bytes:
    """Text as text; what is no UTF-8 (a path with lone surrogates) as bytes, which a TEXT column keeps as they are."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def text_out(value: str | bytes) -> str:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else str(value)


def owner_text(key: OwnerKey) -> str:
    """As the statement `IN_LINE` puts it together; the sid holds the local user and the principal."""
    return "\x1f".join((key.sid, key.name, key.proof or "", f"{key.process:d}{key.elevated:d}"))


def maybe_text(value: str | bytes | None) -> str | None:
    return None if value is None else text_out(value)


def maybe_int(value: int | bytes | None) -> int | None:
    return None if value is None else int(value)


def maybe_time(value: int | None) -> datetime | None:
    return None if value is None else EPOCH + value * MICROSECOND


def split_url(url: str) -> tuple[str, str]:
    """What of a URL may be read in the journal, and what is sealed.

    Sealed is the query with what follows, or the whole URL where it has user information. `join_url` puts them together.
    """
    mark = _SECRET.search(url)
    cut = mark.start() if mark else len(url)
    base, secret = url[:cut], url[cut:]
    if "@" not in base:
        return base, secret
    scheme, slashes, rest = base.partition("://")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        return f"{scheme}{slashes}{authority.rpartition('@')[2]}{slash}{path}", url
    return base, secret


def join_url(base: str, secret: str) -> str:
    return base + secret if secret[:1] in ("", "?", "#") else secret


def origins_in(origins: frozenset[Origin] | None) -> str | None:
    return None if origins is None else json.dumps(sorted([o.scheme, o.host, o.port] for o in origins))


def origins_out(text: str | None) -> frozenset[Origin] | None:
    return None if text is None else frozenset(Origin(scheme, host, port) for scheme, host, port in json.loads(text))


def certificate_in(given: ClientCertificate | None) -> str | None:
    if given is None:
        return None
    paths = {name: value and str(value) for name, value in (("key", given.key), ("password_file", given.password_file))}
    thumbprint = given.thumbprint and given.thumbprint.hex()
    return json.dumps({"source": str(given.source), "thumbprint": thumbprint, "subject_name": given.subject_name, **paths})


def certificate_out(text: str | None) -> ClientCertificate | None:
    if text is None:
        return None
    stored = json.loads(text)
    return ClientCertificate(
        source=Path(stored["source"]),
        thumbprint=None if stored["thumbprint"] is None else bytes.fromhex(stored["thumbprint"]),
        subject_name=stored["subject_name"],
        key=None if stored["key"] is None else Path(stored["key"]),
        password_file=None if stored["password_file"] is None else Path(stored["password_file"]),
    )
