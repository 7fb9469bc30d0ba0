"""Training a judge: recorded, the same again, opened as it was, refused by name, found out when tampered with."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from algorithms.encoders import Encoder
from algorithms.errors import SettingsError
from algorithms.probes import FitSettings
from cli import main
from governance.auditing import verify
from governance.catalogue import register_model
from governance.errors import InputError, PromptSetError, WeightsChangedError
from governance.evaluation import EvaluationRequest, evaluate
from governance.hidden_state_cache import HiddenStateCache
from governance.judge_artifact import FORMAT, read_judge_artifact
from governance.judge_figures import JudgeFigure
from governance.judge_training import JudgeRequest, default_blocks, train_judge
from governance.judges import JudgeSummary, check_judge, list_judges, open_judge, show_judge
from governance.labelled_rows import LabelledSource, PromptSplit, read_labelled
from governance.pack_export import export_pack
from governance.pack_verification import verify_pack
from governance.workspace import Workspace
from neuronledger import NeuronLedgerError
from registry.errors import ArtifactError, RecordExistsError, RecordNotFoundError
from tests.governance.labelled import labelled_rows, write_labelled
from tests.governance.packs import NOTHING
from tests.governance.scenarios import Scenario, events_of
from tests.tiny_models import save_model

QUICK = FitSettings(members=2, width=8, epochs=3, learning_rate=3e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("judges") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledSource:
    path = write_labelled(tmp_path_factory.mktemp("labelled") / "rows.jsonl", labelled_rows())
    return LabelledSource(str(path), category_column="category", report_where=(("source", "test"),))


@pytest.fixture
def request_(model: Path, data: LabelledSource) -> JudgeRequest:
    return JudgeRequest(data=data, model=str(model), fit=QUICK, dtype="float32")


def unseen(summary: JudgeSummary, data: LabelledSource) -> list[Any]:
    """The rows that a judge's figures are of."""
    split = PromptSplit(**summary.settings["split"])
    return [row for row in read_labelled(data) if row.reported and split.side(row.prompt) == "report"]


def test_a_judge_is_recorded_with_its_figures_on_unseen_prompts(workspace: Workspace, request_: JudgeRequest) -> None:
    trained = train_judge(workspace, "mine", request_)
    assert show_judge(workspace, "mine") == trained
    assert list_judges(workspace) == [trained]
    assert trained.version == trained.artifact_digest[:12]
    rows = unseen(trained, request_.data)
    assert {trained.figure(metric).n for metric in ("auc", "balanced_accuracy", "brier")} == {len(rows)}
    assert trained.figure("recall").n == sum(row.unsafe for row in rows)
    by_category = {f.category: f.n for f in trained.figures if f.category}
    assert by_category == {
        name: sum(row.unsafe and name in row.categories for row in rows) for name in ("animals", "weapons")
    }
    assert all(figure.low <= figure.value <= figure.high for figure in trained.figures)
    outcome = verify(workspace)
    assert (outcome.findings, outcome.checked["judges"], outcome.checked["artifacts"]) == ((), 1, 1)
    (event,) = [content for action, content in events_of(workspace) if action == "judge.trained"]
    assert list(event["records"]) == ["judge mine"]
    assert event["data_digest"] == trained.data_digest


def test_a_judge_learns_what_tells_the_answers_apart(sqlite_workspace: Workspace, request_: JudgeRequest) -> None:
    fitted = replace(request_, fit=FitSettings(members=2, width=16, epochs=30, learning_rate=3e-3))
    assert train_judge(sqlite_workspace, "mine", fitted).figure("auc").value > 0.75


def test_training_again_gives_the_same_judge_to_the_byte(sqlite_workspace: Workspace, request_: JudgeRequest) -> None:
    first, second = (train_judge(sqlite_workspace, name, request_) for name in ("one", "two"))
    assert first.artifact_digest == second.artifact_digest
    assert first.figures == second.figures
    other = train_judge(sqlite_workspace, "three", replace(request_, fit=replace(QUICK, seed=1)))
    assert other.artifact_digest != first.artifact_digest


def test_an_opened_judge_scores_as_it_did_when_it_was_trained(
    sqlite_workspace: Workspace, request_: JudgeRequest
) -> None:
    trained = train_judge(sqlite_workspace, "mine", request_)
    _assert_same_figures(check_judge(sqlite_workspace, "mine", request_.data).figures, trained.figures)
    judge, again = open_judge(sqlite_workspace, "mine"), open_judge(sqlite_workspace, "mine")
    rows = unseen(trained, request_.data)
    verdicts = judge.judge([row.prompt for row in rows], [row.answer for row in rows])
    assert verdicts == again.judge([row.prompt for row in rows], [row.answer for row in rows])
    assert all(verdict.unsafe == ((verdict.score or 0) >= judge.probe.threshold) for verdict in verdicts)
    assert (judge.name, judge.version, judge.digest) == ("mine", trained.version, trained.artifact_digest)
    assert judge.judge([], []) == ()


def test_figures_of_unmarked_rows_are_of_all(sqlite_workspace: Workspace, request_: JudgeRequest) -> None:
    everything = replace(request_, data=replace(request_.data, report_where=()))
    trained = train_judge(sqlite_workspace, "mine", everything)
    assert trained.figure("auc").n == trained.splits["report"]["rows"] == trained.splits["report"]["reported"]
    assert trained.figure("auc").n > len(unseen(trained, request_.data))


def test_a_registered_model_is_the_encoder_by_name(
    sqlite_workspace: Workspace, request_: JudgeRequest, model: Path
) -> None:
    register_model(sqlite_workspace, "chat", model, "aligned")
    trained = train_judge(sqlite_workspace, "mine", replace(request_, model="chat"))
    assert trained.encoder == "chat"
    assert trained.encoder_digest == train_judge(sqlite_workspace, "path", request_).encoder_digest


def test_an_interrupted_training_reads_no_answer_twice(
    sqlite_workspace: Workspace, request_: JudgeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("governance.hidden_state_cache._PIECE", 32)
    read, features = [], Encoder.features

    def interrupted(self: Encoder, prompts: Any, *rest: Any, **more: Any) -> torch.Tensor:
        read.append(len(prompts))
        if len(read) == 3:
            raise KeyboardInterrupt
        return features(self, prompts, *rest, **more)

    monkeypatch.setattr(Encoder, "features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_judge(sqlite_workspace, "mine", request_)
    assert list_judges(sqlite_workspace) == []
    trained = train_judge(sqlite_workspace, "mine", request_)
    assert sum(read) == 180 + 32  # the piece that was interrupted is read again
    monkeypatch.setattr(Encoder, "features", features)
    assert train_judge(sqlite_workspace, "again", request_).artifact_digest == trained.artifact_digest
    assert not list(sqlite_workspace.directory.glob("judge-features-*"))


def test_a_damaged_piece_is_read_again(tmp_path: Path) -> None:
    cache = HiddenStateCache(tmp_path / "cache")
    cache.keep(0, torch.ones(3, 2))
    assert torch.equal(cache.find(0, 3), torch.ones(3, 2))  # type: ignore[arg-type]
    assert cache.find(0, 4) is None
    assert cache.find(1, 3) is None
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    assert cache.find(0, 3) is None


# What is refused


def test_rows_of_one_kind_are_refused_and_the_refusal_recorded(
    workspace: Workspace, request_: JudgeRequest, tmp_path: Path
) -> None:
    rows = [row | {"is_safe": True} for row in labelled_rows()]
    only = replace(request_, data=LabelledSource(str(write_labelled(tmp_path / "safe.jsonl", rows))))
    with pytest.raises(SettingsError, match="only safe answers"):
        train_judge(workspace, "mine", only)
    assert [action for action, _ in events_of(workspace)] == ["refused"]
    assert list_judges(workspace) == []


def test_marked_rows_of_one_kind_are_refused(
    sqlite_workspace: Workspace, request_: JudgeRequest, tmp_path: Path
) -> None:
    rows = [row | ({"is_safe": False} if row["source"] == "test" else {}) for row in labelled_rows()]
    marked = replace(request_.data, location=str(write_labelled(tmp_path / "marked.jsonl", rows)))
    with pytest.raises(SettingsError, match="side `threshold` and of the reported kind hold only unsafe"):
        train_judge(sqlite_workspace, "mine", replace(request_, data=marked))


def test_what_cannot_be_used_is_refused_by_name(
    sqlite_workspace: Workspace, request_: JudgeRequest, tmp_path: Path
) -> None:
    train_judge(sqlite_workspace, "mine", request_)
    refused: list[tuple[str, Any, type[NeuronLedgerError], str]] = [
        ("mine", {}, RecordExistsError, "judge named 'mine'"),
        ("../mine", {}, InputError, "cannot name a judge"),
        ("new", {"model": "nobody"}, RecordNotFoundError, "nobody"),
        ("new", {"data": replace(request_.data, response_column="reply")}, PromptSetError, "no column reply"),
        ("new", {"blocks": (9,)}, SettingsError, "Block 9"),
    ]
    for name, changed, error, problem in refused:
        with pytest.raises(error, match=problem):
            train_judge(sqlite_workspace, name, replace(request_, **changed))
    with pytest.raises(RecordNotFoundError, match="mine"):
        open_judge(sqlite_workspace, "mime")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter"):
        train_judge(sqlite_workspace, "new", replace(request_, model=str(tmp_path / "adapter")))


def test_a_check_measures_no_prompt_that_was_trained_on(
    sqlite_workspace: Workspace, request_: JudgeRequest, tmp_path: Path
) -> None:
    trained = train_judge(sqlite_workspace, "mine", request_)
    split = PromptSplit(**trained.settings["split"])
    fitted = [row for row in labelled_rows() if split.side(row["prompt"]) == "fit"]
    seen = LabelledSource(str(write_labelled(tmp_path / "seen.jsonl", fitted)))
    with pytest.raises(SettingsError, match="The 0 rows"):
        check_judge(sqlite_workspace, "mine", seen)
    assert check_judge(sqlite_workspace, "mine", seen, all_prompts=True).figures[0].n == len(fitted)
    assert check_judge(sqlite_workspace, "mine").figures == ()


# What was tampered with


def test_a_damaged_artifact_is_refused_and_found(sqlite_workspace: Workspace, request_: JudgeRequest) -> None:
    path = sqlite_workspace.store.path(train_judge(sqlite_workspace, "mine", request_).artifact_digest)
    content = bytearray(path.read_bytes())
    path.chmod(0o600)
    for position in (0, len(content) // 2, len(content) - 1):
        changed = content.copy()
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ArtifactError, match="was changed"):
            open_judge(sqlite_workspace, "mine")
        assert [finding.subject for finding in verify(sqlite_workspace).findings] == ["judge mine"]


@pytest.mark.parametrize("change", ["version", "tensor", "setting"])
def test_a_file_that_is_no_judge_of_this_version_is_refused(
    sqlite_workspace: Workspace, request_: JudgeRequest, tmp_path: Path, change: str
) -> None:
    path = sqlite_workspace.store.path(train_judge(sqlite_workspace, "mine", request_).artifact_digest)
    artifact = read_judge_artifact(path)
    tensors, header = load_file(path), json.loads(_metadata(path))
    assert torch.equal(artifact.probe.output, tensors["output"])
    if change == "version":
        header["version"] = 2
    elif change == "tensor":
        tensors["mean"] = tensors["mean"][1:].clone()
    else:
        del header["reading"]["frame"]
    save_file(tensors, tmp_path / "other", metadata={FORMAT: json.dumps(header)})
    with pytest.raises(InputError, match="not a judge artifact"):
        read_judge_artifact(tmp_path / "other")


def test_a_judge_whose_encoder_changed_or_went_is_refused(
    sqlite_workspace: Workspace, request_: JudgeRequest, tmp_path: Path
) -> None:
    encoder = save_model(tmp_path / "encoder", seed=5)
    train_judge(sqlite_workspace, "mine", replace(request_, model=str(encoder)))
    save_model(encoder, seed=6)
    with pytest.raises(WeightsChangedError, match="other weights"):
        open_judge(sqlite_workspace, "mine")
    save_model(encoder, seed=5)
    content = json.loads((encoder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (encoder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(WeightsChangedError, match="another tokenizer"):
        open_judge(sqlite_workspace, "mine")
    encoder.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsChangedError, match="is not there"):
        open_judge(sqlite_workspace, "mine")


def test_a_registered_encoder_that_changed_is_refused(
    sqlite_workspace: Workspace, request_: JudgeRequest, tmp_path: Path
) -> None:
    register_model(sqlite_workspace, "chat", save_model(tmp_path / "chat", seed=5), "aligned")
    train_judge(sqlite_workspace, "mine", replace(request_, model="chat"))
    save_model(tmp_path / "chat", seed=6)
    with pytest.raises(WeightsChangedError, match="model chat"):
        open_judge(sqlite_workspace, "mine")


# Beside the rest


def test_a_pack_of_a_lineage_holds_the_judges_of_its_figures(
    scenario: Scenario, request_: JudgeRequest, tmp_path: Path
) -> None:
    workspace = scenario.workspace
    scenario.apply("animals")
    for name in ("used", "unused"):
        train_judge(workspace, name, request_)
    judged = EvaluationRequest(judges=(open_judge(workspace, "used"),), dimensions=("animals",))
    evaluate(workspace, "line", judged)
    export_pack(workspace, "line", tmp_path / "pack.zip")
    with (tmp_path / "pack.zip").open("rb") as file:
        outcome = verify_pack(file, NOTHING)
    assert outcome.findings == ()
    assert outcome.checked["judges"] == 1


@pytest.mark.parametrize(("depth", "blocks"), [(1, (1,)), (2, (1, 2)), (12, (6, 7, 10)), (30, (14, 18, 24))])
def test_default_blocks_lie_between_the_middle_and_four_fifths(depth: int, blocks: tuple[int, ...]) -> None:
    assert default_blocks(depth) == blocks


def test_the_commands_train_list_show_and_check(sqlite_workspace: Workspace, model: Path, data: LabelledSource) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["judge", *arguments, "--database", sqlite_workspace.registry.url])
        assert (result.exit_code, result.stderr) == (0, "")
        return result.stdout

    columns = ["--category-column", "category", "--report-where", "source=test"]
    trained = run("train", "mine", "--data", data.location, "--model", str(model), "--dtype", "float32", *columns)
    assert "Figures on prompts that it never saw" in trained
    (listed,) = json.loads(run("list", "--json"))
    shown = json.loads(run("show", "mine", "--json"))
    assert listed == shown
    checked = json.loads(run("check", "mine", "--data", data.location, *columns, "--json"))
    _assert_same_figures(*([JudgeFigure(**figure) for figure in told["figures"]] for told in (checked, shown)))
    assert "what was recorded" in run("check", "mine")
    assert "weapons" in run("show", "mine")
    assert "mine" in run("list")
    assert run("list", "--csv").startswith("name,version,encoder")


def _assert_same_figures(found: Sequence[JudgeFigure], expected: Sequence[JudgeFigure]) -> None:
    """Equal but for last bits: answers are read in other batches when fewer of them are asked for."""
    for one, other in zip(found, expected, strict=True):
        assert (one.metric, one.category, one.n) == (other.metric, other.category, other.n)
        assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-6)


def _metadata(path: Path) -> str:
    from governance.tensor_file import TensorFile

    return TensorFile(path).metadata[FORMAT]
