"""In CI a few failures are looked at again, and only who passes each time is forgiven."""

import pytest

SOMETIMES = """
from pathlib import Path

def test_fails_at_first():
    tries = Path("tries")
    count = int(tries.read_text()) if tries.exists() else 0
    tries.write_text(str(count + 1))
    assert count not in {bad}

def test_passes(): pass
"""


CONFTEST = """
from tests import again
from tests.left_out import LeftOut

again.TIMES = 2

def pytest_configure(config):
    config.pluginmanager.register(LeftOut())
    config.pluginmanager.register(again.Again(), "again")
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half of a short run's time
    pytester.makeconftest(CONFTEST)

    def runner(text: str, *arguments: str, ci: bool = True) -> pytest.RunResult:
        monkeypatch.setenv("CI", "true") if ci else monkeypatch.delenv("CI", raising=False)
        pytester.makepyfile(text)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)

    return runner


@pytest.mark.parametrize("spread", [(), ("-p", "xdist", "-n", "2")], ids=["one process", "two"])
def test_what_fails_once_and_then_passes_each_time_is_said_and_forgiven(run, pytester, spread) -> None:
    result = run(SOMETIMES.format(bad="(0,)"), *spread)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*FAILED, THEN PASSED 2 TIMES ALONE: TO BE MENDED*", "*::test_fails_at_first"])
    assert (pytester.path / "tries").read_text() == "3"


def test_what_fails_now_and_then_fails_the_run(run) -> None:
    assert run(SOMETIMES.format(bad="(0, 2)")).ret == pytest.ExitCode.TESTS_FAILED


def test_what_always_fails_fails_the_run(run, pytester) -> None:
    assert run(SOMETIMES.format(bad="range(99)")).ret == pytest.ExitCode.TESTS_FAILED
    assert (pytester.path / "tries").read_text() == "2"


def test_many_failures_are_not_looked_at_again(run, pytester) -> None:
    more = "".join(f"def test_{n}(): assert False\n" for n in range(2))
    assert run(SOMETIMES.format(bad="(0,)") + more).ret == pytest.ExitCode.TESTS_FAILED
    assert (pytester.path / "tries").read_text() == "1"


def test_a_process_that_went_away_fails_the_run(run) -> None:
    text = (
        "import os\nfrom pathlib import Path\n"
        "def test_dies():\n    if not Path('died').exists():\n        Path('died').touch()\n        os._exit(3)\n"
        "def test_passes(): pass\n"
    )
    assert run(text, "-p", "xdist", "-n", "2").ret == pytest.ExitCode.TESTS_FAILED


def test_a_skip_is_not_forgiven_with_the_failure(run) -> None:
    skips = "import pytest\ndef test_skips(): pytest.skip()\n"
    assert run(SOMETIMES.format(bad="(0,)") + skips).ret == pytest.ExitCode.TESTS_FAILED


def test_without_ci_nothing_is_run_again(run, pytester) -> None:
    assert run(SOMETIMES.format(bad="(0,)"), ci=False).ret == pytest.ExitCode.TESTS_FAILED
    assert (pytester.path / "tries").read_text() == "1"
