"""The loop that kills the running command: its moments, its table, and one kill of each command."""

import random
from pathlib import Path

import kill_loop
import pytest
from kill_loop import SHARES, Outcome, draw_moment, table
from patching_checkpoints import Shape


def test_moments_lie_within_their_phases_and_most_of_them_where_rows_are_written() -> None:
    durations = {phase: number + 0.5 for number, phase in enumerate(SHARES)}
    chance = random.Random(0)
    moments = [draw_moment(durations, chance) for _ in range(1000)]
    assert all(0 <= moment.seconds <= durations[moment.phase] for moment in moments)
    assert {moment.phase for moment in moments} == set(SHARES)
    assert sum(moment.phase == "from intent to result" for moment in moments) > 500


def test_the_table_counts_every_kill_once() -> None:
    outcomes = [
        Outcome("starting", "not begun", "old"),
        Outcome("from intent to result", "applying", "old"),
        Outcome("from intent to result", "applying", "old"),
        Outcome("from intent to result", "applied", "new"),
    ]
    lines = [line.split() for line in table(outcomes).splitlines()[1:]]
    assert [line[-4:] for line in lines] == [
        ["begun", "1", "1", "0"],
        ["applied", "1", "0", "1"],
        ["applying", "2", "2", "0"],
    ]


def test_a_killed_command_leaves_one_of_the_two_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Shape(hidden=128, intermediate=256, head=64, key_value_heads=1, vocabulary=64, blocks=4)
    monkeypatch.setattr(kill_loop, "SHAPE", small)
    assert kill_loop.main(["--times", "1", "--directory", str(tmp_path)]) == 0
    assert "0 mixtures" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
