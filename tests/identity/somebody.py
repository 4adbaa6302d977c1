"""A token for tests that need no operating system behind it."""

from dataclasses import dataclass, field
from typing import Any

from bits_async.identity.tokens import LocalIdentity, Token


@dataclass
class Somebody:
    """A local identity that only writes down what happens to it."""

    name: str = "alice"
    key: str = "uid:1000"
    elevated: bool = False
    is_process: bool = False
    closed: list[str] = field(default_factory=list)

    def assume(self) -> None: ...

    def check(self) -> None: ...

    def fresh(self) -> LocalIdentity:
        return self

    def close(self) -> None:
        self.closed.append(self.name)


def a_token(name: str = "alice", **values: Any) -> Token:
    return Token._make(Somebody(name), **values)
