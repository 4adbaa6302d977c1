"""What `tests.windows` tells the tests it starts: where the servers of the realm are, and who is logged on there."""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.realms import Hit, Log, parse_hit


@dataclass(frozen=True)
class Stage:
    """Apache in the realm, and alice, whose tickets Wine's Kerberos finds."""

    url: str
    tls_url: str
    ca_file: str
    log: str
    sha256: str
    principal: str
    password: str
    others: dict[str, str]  # users of the realm, and their passwords

    def hits(self, expect: int, **match: object) -> list[Hit]:
        """Lines of Apache's log with these fields, once there are at least so many."""
        return Log(Path(self.log), parse_hit).read(expect, **match)


@cache
def stage() -> Stage:
    """The one that BITS_STAGE names."""
    return Stage(**json.loads(Path(os.environ["BITS_STAGE"]).read_text(encoding="utf-8")))
