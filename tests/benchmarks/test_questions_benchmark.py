"""The benchmark of questions: its registry is one that the product could have made, and questions find something."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from questions import Answer, main, questions
from questions_registry import LINEAGE, PATCHES, Size, make_registry

from governance.capacity import capacity
from governance.timeline import lineages_at
from governance.workspace import Workspace
from registry.database import Registry
from registry.ledger import check_chain, events

SMALL = Size(neurons=3000, events=200)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A small registry of the benchmark."""
    with Registry.open(make_registry(tmp_path_factory.mktemp("questions"), SMALL)) as registry:
        yield Workspace(registry=registry, actor="ada")


def test_so_many_neurons_are_protected_and_the_ledger_is_sound(workspace: Workspace) -> None:
    (total,) = capacity(workspace, LINEAGE, "total")
    assert total.protected == SMALL.neurons
    assert sum(total.protected_by.values()) == SMALL.neurons
    with workspace.registry.read() as session:
        assert list(check_chain(events(session))) == []
        assert len(list(events(session))) == SMALL.events
    (now,) = lineages_at(workspace, "2100-01-01", LINEAGE)
    assert now.patches == (*range(1, PATCHES), PATCHES + 1)
    assert now.protected_neurons == SMALL.neurons


@pytest.mark.filterwarnings("error")
def test_every_question_is_answered(workspace: Workspace) -> None:
    silent = {"audit log --since"}  # asks for what comes after the first 90,000 events
    for question, (_, ask) in questions(workspace).items():
        answer = ask()
        assert answer or question in silent | {"v_neuron_history, one neuron"}, question


def test_a_slow_answer_fails() -> None:
    assert Answer("q", 1, 1.9, 1.0, "events", 0.1).holds
    assert not Answer("q", 1, 2.1, 1.0, "events", 0.1).holds


def test_the_figures_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long they take: a busy machine fails no test."""
    monkeypatch.setattr("questions.LIMIT_SECONDS", 600.0)
    file = tmp_path / "figures.json"
    arguments = ["--neurons", "1000", "--events", "120", "--times", "1", "--directory", str(tmp_path)]
    assert main([*arguments, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["size"] == {"neurons": 1000, "events": 120}
    assert "audit capacity" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
