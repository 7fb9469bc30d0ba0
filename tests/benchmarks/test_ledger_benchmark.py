"""The benchmark of verification measures a ledger that is verified, and says whether the time wanted was kept."""

import json
from pathlib import Path

import ledger
import pytest


@pytest.mark.parametrize("signed", [False, True])
def test_a_small_ledger_is_made_verified_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], signed: bool
) -> None:
    out = tmp_path / "measured.json"
    arguments = ["--events", "60", "--wanted", "1000", "--json", str(out)]
    assert ledger.main([*arguments, *(["--signed"] if signed else [])]) == 0
    measured = json.loads(out.read_text())
    assert (measured["events"], measured["signed"]) == (60, signed)
    assert "holds: verified in less than 1000 s" in capsys.readouterr().out


def test_a_verification_that_takes_too_long_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert ledger.main(["--events", "5", "--wanted", "0"]) == 1
    assert "FAILS" in capsys.readouterr().out
