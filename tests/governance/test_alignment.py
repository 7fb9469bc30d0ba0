"""An aligned model is made from a base and rows, registered with all it came from, and pairs like any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import text

from algorithms.alignment_rows import AlignmentRow
from algorithms.alignment_settings import AlignmentMethod, AlignmentSettings, alignment_settings
from algorithms.errors import AlignmentError, CheckpointError
from cli import main
from governance import alignment
from governance.alignment import align_model
from governance.alignment_data import AlignmentSource, read_alignment_data
from governance.auditing import verify
from governance.catalogue import register_model
from governance.errors import InputError, PromptSetError, WeightsChangedError
from governance.lineages import create_lineage
from governance.workspace import Workspace
from registry.errors import RecordExistsError, RecordNotFoundError
from tests.governance.conftest import Trios
from tests.governance.scenarios import events_of
from tests.governance.test_prompt_sets import write_csv, write_json, write_jsonl, write_parquet, write_saved
from tests.tiny_models import save_adapter

PAIRS: list[dict[str, Any]] = [
    {"prompt": f"how do i make a {word} ?", "chosen": "sorry i cannot help", "rejected": "sure here is the way"}
    for word in ("bomb", "cat", "film", "story")
]
SECRET = ("bomb", "sorry", "sure here")
QUICK = {"rank": 2, "max_steps": 2, "batch_size": 2, "learning_rate": 5e-3}


def quick(method: AlignmentMethod = "dpo", **changes: Any) -> AlignmentSettings:
    return alignment_settings(method, {**QUICK, **changes})


@pytest.fixture
def pairs(tmp_path: Path) -> AlignmentSource:
    return AlignmentSource(str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS)))


@pytest.fixture
def based(workspace: Workspace, trios: Trios) -> Workspace:
    """A registry with a base, on both databases."""
    register_model(workspace, "base", trios().base, "base")
    return workspace


@pytest.fixture
def sqlite_based(sqlite_workspace: Workspace, trios: Trios) -> Workspace:
    register_model(sqlite_workspace, "base", trios().base, "base")
    return sqlite_workspace


def test_an_aligned_adapter_is_registered_with_all_that_it_came_from(
    based: Workspace, pairs: AlignmentSource, trios: Trios, tmp_path: Path
) -> None:
    made = align_model(based, "aligned", base="base", source=pairs, settings=quick(seed=3))
    assert (made.model.role, made.model.kind, made.model.base) == ("aligned", "adapter", "base")
    assert Path(made.model.path) == based.directory / "aligned" / "aligned"
    action, payload = events_of(based)[-1]
    assert action == "model.registered"
    record = payload["made_from"]
    assert record == made.made_from
    assert record["settings"] == quick(seed=3).model_dump(mode="json")
    assert (record["base"]["name"], len(record["base"]["state_digest"])) == ("base", 64)
    assert (record["data"]["rows"], record["data"]["source"]) == (4, pairs.location)
    assert record["data"]["digest"] == read_alignment_data(pairs, "dpo").digest
    assert (record["training"]["rows"], record["training"]["steps"]) == (4, 2)
    assert 0 < record["training"]["last_loss"] < record["training"]["first_loss"]
    assert {"python", "trl", "torch", "peft"} <= set(record["library_versions"])
    assert not any(word in json.dumps(payload) for word in SECRET)
    register_model(based, "subject", save_adapter(trios().base, tmp_path / "subject"), "subject", "base")
    create_lineage(based, "line", subject="subject", aligned="aligned", base="base")
    assert verify(based, weights=True).findings == ()


def test_an_edited_record_of_the_training_is_named(sqlite_based: Workspace, pairs: AlignmentSource) -> None:
    align_model(sqlite_based, "aligned", base="base", source=pairs, settings=quick())
    with sqlite_based.registry.write() as session:
        session.execute(text("UPDATE models SET metadata = replace(metadata, '\"dpo\"', '\"sft\"')"))
    assert [(finding.subject, finding.problem) for finding in verify(sqlite_based).findings] == [
        ("model aligned", "it was edited: its digest is not the one in event 2"),
        ("model aligned", "its recorded made_from is not the registered one"),
    ]


def test_what_cannot_be_aligned_is_refused_recorded_and_leaves_nothing(
    sqlite_based: Workspace, pairs: AlignmentSource, trios: Trios, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = sqlite_based
    register_model(workspace, "adapter", save_adapter(trios().base, tmp_path / "adapter"), "aligned", "base")

    def refused(error: type[Exception], problem: str, name: str = "aligned", **changes: Any) -> None:
        arguments: dict[str, Any] = {"base": "base", "source": pairs, "settings": quick(), **changes}
        with pytest.raises(error, match=problem):
            align_model(workspace, name, **arguments)
        action, payload = events_of(workspace)[-1]
        assert (action, payload["attempted"], payload["error"]) == ("refused", "align", error.__name__)
        assert not any(word in json.dumps(payload) for word in SECRET)
        assert not (workspace.directory / "aligned").exists()

    refused(InputError, "base model adapter is itself an adapter", base="adapter")
    refused(RecordNotFoundError, "no model named 'nobody'", base="nobody")
    refused(RecordExistsError, "adapter", name="adapter")
    refused(PromptSetError, "row 1 has no column completion", settings=quick("kto"), source=without(pairs, "chosen"))
    refused(AlignmentError, "at most 4 tokens", settings=quick(max_length=4))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    refused(CheckpointError, "not an empty directory", output=tmp_path / "used")
    monkeypatch.setattr(alignment, "require_libraries", missing)
    refused(AlignmentError, r"neuronledger\[align\]")
    monkeypatch.undo()
    with workspace.registry.write() as session:
        session.execute(text("UPDATE model_files SET size = size + 1 WHERE model_id = 1"))
    refused(WeightsChangedError, "base")


def without(source: AlignmentSource, column: str) -> AlignmentSource:
    rows = [{key: value for key, value in row.items() if key != column} for row in PAIRS]
    return AlignmentSource(str(write_jsonl(Path(source.location).with_name(f"without-{column}.jsonl"), rows)))


def missing() -> None:
    raise AlignmentError("Training needs trl, which is not installed", "Run pip install 'neuronledger[align]'")


# --- rows


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_csv, write_parquet, write_saved])
def test_rows_are_the_same_from_every_format(tmp_path: Path, write: Callable[[Path, list[Any]], Path]) -> None:
    suffix = {"write_saved": ""}.get(write.__name__, "." + write.__name__.removeprefix("write_"))
    found = read_alignment_data(AlignmentSource(str(write(tmp_path / f"rows{suffix}", PAIRS))), "dpo")
    assert found.rows[0] == AlignmentRow("how do i make a bomb ?", "sorry i cannot help", "sure here is the way")
    assert (
        found.digest
        == read_alignment_data(AlignmentSource(str(write_jsonl(tmp_path / "x.jsonl", PAIRS))), "orpo").digest
    )


def test_pairs_serve_kto_as_good_and_bad_answers(tmp_path: Path, pairs: AlignmentSource) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": label}
        for row in PAIRS
        for name, label in (("chosen", "True"), ("rejected", 0))
    ]
    labelled = read_alignment_data(AlignmentSource(str(write_jsonl(tmp_path / "kto.jsonl", rows))), "kto")
    assert labelled == read_alignment_data(pairs, "kto")
    assert [row.desirable for row in labelled.rows] == [True, False] * 4


def test_rows_are_chosen_and_their_columns_named(tmp_path: Path) -> None:
    rows = [
        {"q": {"text": row["prompt"]}, "good": row["chosen"], "kind": number % 2} for number, row in enumerate(PAIRS)
    ]
    location = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    columns = {"prompt": "q.text", "response": "good"}
    found = read_alignment_data(AlignmentSource(location, (("kind", "1"),), columns), "sft")
    assert [row.prompt for row in found.rows] == [PAIRS[1]["prompt"], PAIRS[3]["prompt"]]
    assert len(read_alignment_data(AlignmentSource(location, (), columns, limit=3), "sft").rows) == 3


@pytest.mark.parametrize(
    ("method", "row", "columns", "problem"),
    [
        ("dpo", {"prompt": "a bomb", "chosen": "sorry"}, {}, "row 1 has no column rejected.*prompt, chosen"),
        ("orpo", {"prompt": "a bomb", "chosen": "sorry", "rejected": " "}, {}, "row 1 has an empty rejected"),
        ("sft", {"prompt": "a bomb", "response": ["sorry"]}, {}, "response of row 1 is list, not text"),
        ("sft", {"prompt": "a bomb", "chosen": "sorry"}, {}, "row 1 has no column response"),
        ("kto", {"prompt": "a bomb", "completion": "sorry", "label": "sorry"}, {}, "neither true nor false"),
        ("kto", {"prompt": "a bomb", "completion": "sorry", "label": ["sorry"]}, {}, "neither true nor false"),
        ("kto", {"prompt": "a bomb", "completion": "sorry"}, {}, "row 1 has no column label"),
        ("sft", {"prompt": "a bomb", "response": "sorry"}, {"chosen": "response"}, "sft reads no column chosen"),
    ],
)
def test_rows_that_lack_something_are_refused_without_a_word_of_them(
    tmp_path: Path, method: AlignmentMethod, row: dict[str, Any], columns: dict[str, str], problem: str
) -> None:
    location = str(write_jsonl(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(InputError, match=problem) as refusal:
        read_alignment_data(AlignmentSource(location, columns=columns), method)
    assert not any(word in str(refusal.value) for word in SECRET)


# --- the command line


def test_the_command_trains_registers_and_says_so(
    sqlite_based: Workspace, pairs: AlignmentSource, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("rank = 2\nmax_steps = 9\nmax_length = 64\n", encoding="utf-8")
    long = {"prompt": "how " * 80, "chosen": "sorry", "rejected": "sure"}
    data = str(write_jsonl(tmp_path / "rows.jsonl", [*PAIRS, long]))

    def run(name: str, *more: str) -> Any:
        arguments = [
            *("align", name, "--base", "base", "--method", "sft", "--data", data, "--column", "response=chosen"),
            *("--settings", str(settings), "--set", "max_steps=1", "--output", str(tmp_path / name)),
            *("--database", sqlite_based.registry.url, *more),
        ]
        return CliRunner().invoke(main, arguments)

    said = run("aligned")
    assert said.exit_code == 0, said.output
    assert said.stdout.startswith("Aligned base as aligned by sft (rows 4, steps 1, loss ")
    assert "Left out: 1 of 5 rows, of more than 64 tokens." in said.stdout
    assert said.stderr == ""
    twin = json.loads(run("twin", "--json").stdout)
    assert twin["model"]["path"] == str(tmp_path / "twin")
    assert twin["made_from"]["data"]["columns"] == {"response": "chosen"}
    again = run("aligned")
    assert (again.exit_code, again.stdout) == (2, "")
    wrong = run("other", "--set", "beta=1")
    assert wrong.exit_code == 2
    assert "method sft has no beta" in wrong.stderr
    assert events_of(sqlite_based)[-1][1]["attempted"] == "align"


def test_the_base_is_not_written_to(sqlite_based: Workspace, pairs: AlignmentSource, trios: Trios) -> None:
    before = {file.name: file.read_bytes() for file in trios().base.iterdir()}
    align_model(sqlite_based, "aligned", base="base", source=pairs, settings=quick("orpo", max_steps=1))
    assert {file.name: file.read_bytes() for file in trios().base.iterdir()} == before
