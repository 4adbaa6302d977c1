"""A process of its own for what a test cannot do to pytest: drop ids, be aborted, or hide the interpreter's directories."""

import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATHS = (ROOT, Path(sysconfig.get_path("purelib")))  # where modules are found

# What a script may use. Modules are loaded first: the user a script turns into need not be able to read this checkout.
PRELUDE = """
import asyncio, ctypes, errno, os, subprocess, sys, threading, time
from bits_async.errors import BitsError, ImpersonationFailed, TokenRequired
from bits_async.identity import kernel, logon, native
from bits_async.identity.threads import TokenExecutor, TokenExecutors, prepare, run_as
from bits_async.identity.ambient import current_token
from bits_async.identity.tokens import Token
prepare()

def drop_to(uid, capabilities=()):
    "The whole process becomes an ordinary user, with these capabilities and no other."
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    bits = sum(1 << each for each in capabilities)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    assert libc.capset(header, (ctypes.c_uint32 * 6)(low, low, low, high, high, high)) == 0
    for each in capabilities:
        assert libc.prctl(47, 2, each, 0, 0) == 0  # PR_CAP_AMBIENT_RAISE

def failure(func, *args):
    "The error that a call ends with; None when it works."
    try:
        func(*args)
    except Exception as exc:
        return exc
"""


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    """Starts a script with the prelude. By the interpreter that this one's environment is made of: the user a script turns into may start
    it again, where a virtual environment lies below somebody's home directory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, PATHS)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [os.path.realpath(sys.executable), "-P", "-W", "error", "-c", PRELUDE + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(script: str, *arguments: object, signalled: signal.Signals | None = None) -> str:
    """Runs a script to its end and returns what it printed. It must end well, or by the signal."""
    process = start(script, *arguments)
    try:
        out, err = process.communicate(timeout=150)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == (0 if signalled is None else -signalled), err
    return out
