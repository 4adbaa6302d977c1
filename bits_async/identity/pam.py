"""Asks PAM whether a password is right and the account may be used: a program of its own, because PAM's modules change ids,
groups and keyrings of the whole process they run in (T6).

`logon` hands this file's text to `python -I -S -c`, so nothing of the package is imported here. The question comes through
standard input, the password with it: neither is ever an argument or a variable that other users could read. The answer is one
line on standard output: PAM's number, and its words.
"""

import json
import sys
from typing import TypedDict

RULES = "bits-async"  # /etc/pam.d/bits-async, where an administrator has written one
OTHERWISE = "login"


class Question(TypedDict):
    """What is asked."""

    user: str
    password: str
    place: str  # the directory that python-pam is in


class Answer(TypedDict):
    """What PAM said."""

    code: int
    reason: str
    locked: bool  # the password itself is locked (passwd -l): PAM does not tell this from a wrong one


def _is_locked(user: str) -> bool:
    try:
        with open("/etc/shadow", encoding="utf-8", errors="replace") as file:
            entries = dict(line.split(":", 2)[:2] for line in file if line.count(":") > 1)
    except OSError:
        return False  # this process may not read it, or the accounts are elsewhere
    return entries.get(user, "").startswith("!")


def _rules() -> str:
    try:
        with open(f"/etc/pam.d/{RULES}", "rb"):
            return RULES
    except OSError:
        return OTHERWISE


def main() -> None:
    """Reads the question, writes the answer."""
    question: Question = json.load(sys.stdin)
    sys.path.append(question["place"])
    from pam import PAM_AUTH_ERR, PamAuthenticator

    asked = PamAuthenticator()
    # Credentials (groups, keyrings, tickets) would be this process's, which ends here.
    asked.authenticate(question["user"], question["password"], service=_rules(), resetcreds=False)
    reason = asked.reason.decode(errors="replace") if isinstance(asked.reason, bytes) else str(asked.reason)
    locked = asked.code == PAM_AUTH_ERR and _is_locked(question["user"])
    answer: Answer = {"code": asked.code, "reason": reason, "locked": locked}
    print(json.dumps(answer))  # noqa: T201 - a program's answer


if __name__ == "__main__":
    main()
