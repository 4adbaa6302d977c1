"""The sentences of the package's map, held to the code: who imports whom, which modules are pure, who may touch what.

Everything is read from the syntax tree, so a breach is found in code that no test runs, too.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bits_async

ROOT = Path(bits_async.__path__[0])

# From the ground up; what stands in one line is of one rank. A module or a room imports its own rank and those before it.
RANKS = (
    {"errors", "clock"},
    {"events"},
    {"limits", "metrics"},
    {"identity"},
    {"auth"},
    {"transport"},
    {"files"},
    {"jobs"},
    {"service", "testing"},
    {"cli"},
    {"__main__"},
)
RANKS_WITHIN: dict[str, tuple[set[str], ...]] = {
    "files": (
        {"records"},
        {"directories", "hashes", "reservation"},
        {"hops", "names", "intake"},
        {"rename"},
        {"part", "batches", "leftovers"},
    ),
    "jobs": (
        {"model"},
        {"keys", "secrets", "policies", "schema", "columns"},
        {"statements", "rows", "journal_files"},
        {"store"},
        {"scheduler", "faults"},
        {"transfer", "notify", "certificates", "conditions", "callbacks"},
        {"roster"},
        {"part_files"},
        {"engine"},
        {"arguments", "door", "logoff", "parties", "places"},
        {"desk"},
        {"consent"},
        {"token_options"},
        {"handles"},
        {"orders"},
        {"manager"},
    ),
}

PURE = {
    *("errors", "identity.tokens", "auth.challenge", "auth.policy", "jobs.model", "jobs.policies", "jobs.scheduler", "jobs.faults"),
    *(f"transport.{name}" for name in ("ranges", "answers", "digests", "options", "proxies", "timeouts")),
}
IMPURE_LIBRARIES = {"asyncio", "aiohttp", "aiofiles", "os", "sqlite3", "aiosqlite", "subprocess", "threading"}

POSIX_ONLY_MODULES = {"fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog"}
POSIX_HOME = {"identity.posix", "identity.kernel"}  # the platform's twin, loaded on POSIX alone

AIOHTTP_PRIVATE = {"transport.exchange", "transport.lane"}


@dataclass(frozen=True)
class Import:
    """One imported name; `target` is a module of the package without the package's name, or a foreign module."""

    target: str
    ours: bool
    typing_only: bool
    top_level: bool
    line: int


@dataclass(frozen=True)
class Module:
    name: str  # "transport.lane"; "" is the package itself
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), str(self.path))

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]

    @property
    def package(self) -> list[str]:
        parts = self.name.split(".") if self.name else []
        return parts if self.path.name == "__init__.py" else parts[:-1]

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, typing_only=False, top_level=True))

    def _imports(self, node: ast.AST, *, typing_only: bool, top_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target, ours in self._targets(child):
                    yield Import(target, ours, typing_only, top_level, child.lineno)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for branch, only in ((child.body, True), (child.orelse, typing_only)):
                    yield from self._imports(ast.Module(branch, []), typing_only=only, top_level=top_level)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from self._imports(child, typing_only=typing_only, top_level=top_level and not inside)

    def _targets(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from (self._ours_or_foreign(alias.name) for alias in node.names)
            return
        if node.level:
            base = self.package[: len(self.package) - node.level + 1]
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((_deepest(origin, alias.name), True) for alias in node.names)
            return
        found, ours = self._ours_or_foreign(node.module or "")
        yield from (((_deepest(found, alias.name), True) if ours else (found, False)) for alias in node.names)

    @staticmethod
    def _ours_or_foreign(name: str) -> tuple[str, bool]:
        return (name.partition(".")[2], True) if name.partition(".")[0] == "bits_async" else (name, False)


def _deepest(origin: str, name: str) -> str:
    """`from ..identity import tokens` names the module tokens; `from ..errors import BitsError` the module errors."""
    longer = f"{origin}.{name}" if origin else name
    path = ROOT.joinpath(*longer.split("."))
    return longer if path.is_dir() or path.with_suffix(".py").exists() else origin


def _modules() -> list[Module]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


MODULES = _modules()
NAMES = {module.name for module in MODULES}
each_module = pytest.mark.parametrize("module", MODULES, ids=[module.name or "bits_async" for module in MODULES])


def _rank(name: str, ranks: tuple[set[str], ...]) -> int:
    found = [number for number, members in enumerate(ranks) if name in members]
    assert found, f"{name} has no place in the order of the package; give it one here and in the map"
    return found[0]


def _where(module: Module, node: ast.AST) -> str:
    return f"{module.path.relative_to(ROOT.parent)}:{getattr(node, 'lineno', '?')}"


# -- directions


@each_module
def test_imports_point_one_way(module: Module) -> None:
    if not module.name:
        return  # the package's own __init__ names everything, and loads it when it is asked for
    wrong = []
    for found in module.imports:
        if not found.ours or found.target == "":  # the bare package: its version
            continue
        room = found.target.partition(".")[0]
        if _rank(room, RANKS) > _rank(module.room, RANKS):
            wrong.append(f"line {found.line}: {found.target}")
        if module.room == room and room in RANKS_WITHIN and room not in (module.name, found.target):
            here, there = (name.partition(".")[2] for name in (module.name, found.target))
            if _rank(there, RANKS_WITHIN[room]) > _rank(here, RANKS_WITHIN[room]):
                wrong.append(f"line {found.line}: {found.target}")
    assert not wrong, f"{module.name} imports upwards: {wrong}"


def test_no_two_modules_need_each_other_to_be_loaded() -> None:
    needs = {
        module.name: {found.target for found in module.imports if found.ours and found.top_level and not found.typing_only}
        for module in MODULES
        if module.name
    }
    try:
        TopologicalSorter({name: targets & NAMES - {name, ""} for name, targets in needs.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"modules import in a circle: {' -> '.join(error.args[1])}")


def test_only_the_transfer_knows_both_a_lane_and_a_file() -> None:
    for module in MODULES:
        targets = {found.target for found in module.imports if found.ours}
        both = "transport.lane" in targets and any(target.partition(".")[0] == "files" for target in targets)
        assert both == (module.name == "jobs.transfer"), module.name


def test_nothing_below_jobs_knows_what_a_job_is() -> None:
    below = [module for module in MODULES if module.room and _rank(module.room, RANKS) < _rank("jobs", RANKS)]
    assert below
    for module in below:
        assert not [found for found in module.imports if found.ours and found.target.startswith("jobs")], module.name


# -- purity


@each_module
def test_pure_modules_touch_neither_loop_nor_system(module: Module) -> None:
    if module.name not in PURE:
        return
    run = [found for found in module.imports if not found.typing_only]
    foreign = {found.target.partition(".")[0] for found in run if not found.ours}
    assert not foreign & IMPURE_LIBRARIES, f"{module.name} is pure and imports {foreign & IMPURE_LIBRARIES}"
    rooms = {room for name in NAMES if (room := name.partition(".")[0]) != name} | {""}
    ours = {found.target for found in run if found.ours and found.top_level} - rooms
    assert ours <= PURE, f"{module.name} is pure and stands on {ours - PURE}, which are not"


@each_module
def test_only_the_transport_imports_aiohttp(module: Module) -> None:
    using = [found for found in module.imports if not found.ours and found.target.partition(".")[0] == "aiohttp"]
    assert not using or module.room == "transport", f"{module.name} imports aiohttp, line {using[0].line}"


@each_module
def test_only_two_modules_touch_what_aiohttp_does_not_document(module: Module) -> None:
    if module.name in AIOHTTP_PRIVATE:
        return
    foreign = [found.target for found in module.imports if not found.ours and found.target.startswith("aiohttp")]
    assert not [name for name in foreign if name not in ("aiohttp", "aiohttp.abc")], f"{module.name} imports inner modules"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aiohttp"):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")], _where(module, node)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert not (isinstance(node.value, ast.Name) and node.value.id == "aiohttp"), _where(module, node)


# -- threads and files


def _calls(module: Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.Call))


@each_module
def test_work_runs_in_named_threads_only(module: Module) -> None:
    for call in _calls(module):
        name = ast.unparse(call.func).rpartition(".")[2]
        assert name != "to_thread", f"{_where(module, call)} hides whose thread it is"
        if name == "run_in_executor":
            first = call.args[0] if call.args else None
            anonymous = first is None or (isinstance(first, ast.Constant) and first.value is None)
            assert not anonymous, f"{_where(module, call)} uses the default executor"
    for found in module.imports:
        assert found.target != "asyncio.to_thread"


@each_module
def test_files_are_not_opened_by_async_with(module: Module) -> None:
    """aiofiles closes such a file, and writes what it buffered, by a thread of the default executor."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.AsyncWith):
            opened = [ast.unparse(item.context_expr) for item in node.items]
            assert not [text for text in opened if re.match(r"aiofiles\.open\(|aio_open\(", text)], _where(module, node)


@each_module
def test_no_call_of_the_process_s_identity_or_umask(module: Module) -> None:
    """glibc's set*id calls change every thread; umask and chdir change the whole process; so does the environment."""
    if module.name == "identity.launcher":
        return  # a process of its own, which gives everything of ours up before it becomes the command
    forbidden = r"os\.(umask|chdir|putenv|unsetenv|set(e|re|res)?[ug]id|setgroups|initgroups)|os\.environ\.(update|setdefault|pop|clear)"
    for call in _calls(module):
        assert not re.fullmatch(forbidden, ast.unparse(call.func)), _where(module, call)
    for node in ast.walk(module.tree):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        assert not [target for target in targets if ast.unparse(target).startswith("os.environ[")], _where(module, node)


# -- other systems


@each_module
def test_posix_only_modules_stay_in_the_platform_s_twin_or_behind_a_guard(module: Module) -> None:
    if module.name in POSIX_HOME:
        return
    guarded = {
        line
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If | ast.Try)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        if isinstance(node, ast.Try) or re.search(r"sys\.platform|os\.name|hasattr", ast.unparse(node.test))
    }
    for found in module.imports:
        if not found.ours and found.target in POSIX_ONLY_MODULES and not found.typing_only and found.top_level:
            assert found.line in guarded, f"{module.name} line {found.line} imports {found.target} on every system"


AS_ON_WINDOWS = """
import sys
import asyncio, ctypes.wintypes, importlib, pathlib, shutil, sqlite3, ssl, subprocess, tempfile, urllib.request, uuid
for name in ("aiohttp", "aiofiles.os", "aiosqlite", "cryptography.hazmat.primitives.ciphers.aead", "h11", "platformdirs",
             "rich.progress", "rich.console", "spnego", "typer.testing", "yarl"):
    importlib.import_module(name)
import os
for name in %(modules)r:
    sys.modules[name] = None
for name in ("geteuid", "getuid", "getegid", "getgroups", "pwrite", "pwritev", "pread", "preadv", "fchmod", "fchown", "chown",
             "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK", "statvfs", "posix_fallocate", "register_at_fork"):
    if hasattr(os, name):
        delattr(os, name)
from unittest.mock import MagicMock
ctypes.WinDLL = ctypes.OleDLL = lambda *arguments, **options: MagicMock()
ctypes.WINFUNCTYPE = ctypes.CFUNCTYPE
for name in ("msvcrt", "winreg"):
    sys.modules[name] = MagicMock()
sys.platform = "win32"
for name in %(names)r:
    importlib.import_module(f"bits_async.{name}")
"""


def test_every_module_but_the_posix_twin_is_loaded_without_posix() -> None:
    names = sorted(name for name in NAMES - POSIX_HOME if name and name != "__main__")
    script = AS_ON_WINDOWS % {"modules": sorted(POSIX_ONLY_MODULES), "names": names}
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_none_of_the_heavy_libraries() -> None:
    heavy = "('aiohttp', 'spnego', 'aiosqlite', 'cryptography', 'typer', 'rich')"
    script = f"import bits_async, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True, timeout=150)
    assert done.stdout.strip() == "[]"


# -- the map


@each_module
def test_every_module_says_what_it_is_for(module: Module) -> None:
    text = ast.get_docstring(module.tree)
    assert text or module.path.stat().st_size == 0, f"{module.name} has no docstring"


def _map_lines() -> dict[str, str]:
    """Line by its first word, from the docstring of the package."""
    text = bits_async.__doc__ or ""
    rows = (re.match(r"\s+(\S+?)(\.py|/)\s+(.*)", line) for line in text.splitlines())
    return {row[1] + row[2]: row[3] for row in rows if row}


def _has_line(module: Module, lines: dict[str, str]) -> bool:
    room = lines.get(f"{module.room}/", "")
    return module.path.name in lines or bool(re.search(rf"\b{module.path.stem}\b", room))


def test_every_module_has_a_line_in_the_map_and_every_line_a_module() -> None:
    lines = _map_lines()
    missing = [module.name for module in MODULES if not module.path.name.startswith("__") and not _has_line(module, lines)]
    assert not missing, f"no line in the docstring of bits_async/__init__.py: {missing}"
    existing = {module.path.name for module in MODULES} | {f"{module.room}/" for module in MODULES}
    assert not lines.keys() - existing, "the map names what does not exist"


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "base", "misc", "tools"}
    assert not [name for name in NAMES if name.rpartition(".")[2] in empty]
