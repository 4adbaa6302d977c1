"""Nothing is skipped in silence: what a machine cannot run is listed with the reason and the command, and fails under CI=true."""

import pytest

from tests import left_out

TESTS = """
import pytest

@pytest.mark.privileged
def test_needs_root(): pass

@pytest.mark.realm
def test_needs_the_realm(): pass

def test_needs_nothing(): pass
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs TESTS on a machine that lacks some things."""
    pytester.makeconftest("from tests.left_out import LeftOut\ndef pytest_configure(config):\n    config.pluginmanager.register(LeftOut())")
    pytester.makeini("[pytest]\nmarkers =\n    privileged\n    realm\nasyncio_default_fixture_loop_scope = function\n")

    def runner(text: str = TESTS, *, lacking: str | None = None, ci: bool = False) -> pytest.RunResult:
        pieces = [
            left_out.Piece(what, marker, lambda why=why: why, command)
            for what, marker, why, command in (
                ("root", "privileged", "you are not root" if lacking == "root" else None, "sudo it"),
                ("a realm", "realm", "no KDC" if lacking == "realm" else None, "install it"),
            )
        ]
        monkeypatch.setattr(left_out, "PIECES", tuple(pieces))
        monkeypatch.setenv("CI", "true") if ci else monkeypatch.delenv("CI", raising=False)
        pytester.makepyfile(text)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider")

    return runner


def test_on_a_machine_that_has_everything_all_runs_and_nothing_is_listed(run) -> None:
    result = run(ci=True)
    result.assert_outcomes(passed=3)
    assert result.ret == 0
    assert "LEFT OUT" not in result.stdout.str()


def test_what_is_left_out_is_listed_with_its_reason_and_its_command(run) -> None:
    result = run(lacking="root")
    result.assert_outcomes(passed=2, deselected=1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*LEFT OUT*", "1 tests need root; you are not root.", "*sudo it"])


def test_in_ci_what_is_left_out_is_a_failure(run) -> None:
    result = run(lacking="realm", ci=True)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*LEFT OUT, a failure with CI=true*", "1 tests need a realm; no KDC."])


def test_in_ci_a_skip_is_a_failure(run) -> None:
    text = "import pytest\ndef test_skips(): pytest.skip('no network')\n"
    assert run(text).ret == 0
    result = run(text, ci=True)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*test_skips skipped itself"])


def test_the_machine_is_asked_for_each_package_by_name() -> None:
    assert {"krb5-kdc", "squid", "apache2"} <= set(left_out.packages())
    assert not [name for name in left_out.packages() if " " in name or "#" in name]
