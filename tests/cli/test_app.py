"""What may be typed, and what is refused before anything happens."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import bits_async
from bits_async.cli import app, download

HEAVY = ("aiohttp", "spnego", "cryptography", "aiosqlite", "gssapi", "krb5", "rich", "bits_async.jobs")


def type_in(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bits-async", *arguments])
    return app.main()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["download", "--help"], []])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['bits-async', *{arguments!r}]\n"
        "from bits_async.cli.app import main\n"
        "code = main()\n"
        f"sys.exit(code or ' '.join(name for name in {HEAVY!r} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bits-async" in done.stdout


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert type_in(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"bits-async {bits_async.__version__}\n"


def test_the_console_script_is_this_program() -> None:
    (script,) = entry_points(group="console_scripts", name="bits-async")
    assert script.load() is app.main


def test_help_says_where_credentials_come_from_and_no_option_takes_a_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "download", "--help")
    shown = capsys.readouterr().out
    assert "Where credentials come from" in shown
    assert "--password" not in shown
    options = "--proxy --no-proxy --user --keytab --principal --ccache --helper-user --helper-keytab --helper-principal --helper-ccache"
    options += " --helper-for --sha256 --sha512 --blake3 --retry-for --maximum-bandwidth --segments --cacert --store --json"
    options += " --cert --key --cert-password-file --ask-cert-password"
    for option in options.split():
        assert option in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--proxy", "http://p:3128", "--no-proxy"], "--proxy and --no-proxy"),
        (["--keytab", "k"], "--keytab and --principal"),
        (["--key", "k"], "go with --cert"),
        (["--ask-cert-password"], "go with --cert"),
        (["--cert", "c", "--cert-password-file", "p", "--ask-cert-password"], "--cert-password-file and --ask-cert-password"),
        (["--principal", "p@R"], "--keytab and --principal"),
        (["--keytab", "k", "--principal", "p@R", "--ccache", "c"], "--keytab and --ccache"),
        (["--helper-user", "bob"], "--helper-for"),
        (["--helper-for", "network"], "--helper-user"),
        (["--helper-for", "both", "--helper-keytab", "k"], "--helper-keytab and --helper-principal"),
        (["--helper-for", "both", "--helper-principal", "p@R"], "--helper-keytab and --helper-principal"),
        (
            ["--helper-for", "both", "--helper-ccache", "c", "--helper-keytab", "k", "--helper-principal", "p@R"],
            "--helper-keytab and --helper-ccache",
        ),
        (["--helper-for", "everything", "--helper-user", "bob"], "--helper-for"),
        (["--retry-for", "-1"], "--retry-for"),
        (["--maximum-bandwidth", "0"], "--maximum-bandwidth"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_in_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_in(monkeypatch, "download", "http://host.test/file", "file", *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_a_missing_destination_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert type_in(monkeypatch, "download", "http://host.test/file") == 2
    assert "DEST" in capsys.readouterr().err


def test_t14_a_refused_command_line_is_not_repeated_with_its_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    surplus = "https://me:pass-word@host.test/file?sig=top-secret\x1b[31m"
    assert type_in(monkeypatch, "download", "http://host.test/file", "file", surplus) == 2
    shown = capsys.readouterr().err
    assert "host.test" in shown
    assert not any(secret in shown for secret in ("top-secret", "pass-word", "\x1b"))


def test_what_is_typed_of_time_and_speed_reaches_the_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    async def download(*_: object, **options: Any) -> Path:
        given.update(options)
        return tmp_path

    monkeypatch.setattr("bits_async.cli.download.download", download)
    typed = ("--retry-for", "7", "--maximum-bandwidth", "2e6", "--json")
    assert type_in(monkeypatch, "download", "http://host.test/file", str(tmp_path / "file"), *typed) == 0
    assert (given["retry_for"], given["maximum_bandwidth"]) == (7, 2e6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sha256", "00"), "--sha256 takes 64 hexadecimal digits"),
        (("--retry-for", "inf"), "--retry-for takes seconds"),
        (("--maximum-bandwidth", "inf"), "--maximum-bandwidth takes bytes per second, more than 0, not inf"),
        (("--proxy", ""), "--no-proxy is how to ask servers directly"),
        (("--proxy", "http://me:pw@proxy.test"), "--proxy-user and --proxy-password-file say who you are"),
        (("--user", ""), "--user is empty"),
        (("--ccache", ""), "--ccache is empty"),
        (("--helper-for", "network", "--helper-ccache", ""), "--helper-ccache is empty"),
        (("--helper-for", "local"), "'--helper-for': 'local' is not one of"),
    ],
)
def test_what_was_typed_wrong_is_said_in_the_words_of_the_command_line(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`--ccache "$KRB5CCNAME"` names no file where that variable is not set, above all not the working directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(download, "_log_to_stderr", lambda: None)
    assert type_in(monkeypatch, "download", "http://host.test/file", "file", *arguments) == 2
    assert said in capsys.readouterr().err
