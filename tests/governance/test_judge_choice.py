"""Names of judges, and settings files."""

from dataclasses import replace
from pathlib import Path

import pytest

from algorithms.classifier_judge import ClassifierJudge
from algorithms.generative_judge import GenerativeJudge
from algorithms.judges import RefusalPhraseJudge
from algorithms.probes import FitSettings
from algorithms.trained_judges import ProbeJudge
from governance.endpoint_judge import EndpointJudge
from governance.errors import JudgeError
from governance.judge_choice import choose_judge
from governance.judge_training import JudgeRequest, train_judge
from governance.labelled_rows import LabelledSource
from governance.placement import Placement
from governance.workspace import Workspace
from registry.errors import RecordNotFoundError
from tests.governance.labelled import labelled_rows, write_labelled
from tests.tiny_models import save_model

PHRASES = RefusalPhraseJudge(("no",), name="own")


def test_names_stand_for_judges(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    path = save_model(tmp_path / "guard")
    assert choose_judge(sqlite_workspace, "phrases", PHRASES) is PHRASES
    classifier = choose_judge(sqlite_workspace, f"classifier:{path}", PHRASES)
    assert isinstance(classifier, ClassifierJudge)
    assert (classifier.name, classifier.version) == ("classifier guard", classifier.digest[:12])
    generative = choose_judge(sqlite_workspace, f"generative:{path}", PHRASES)
    assert isinstance(generative, GenerativeJudge)
    assert generative.digest != classifier.digest
    endpoint = choose_judge(sqlite_workspace, "endpoint:some/model:free", PHRASES)
    assert isinstance(endpoint, EndpointJudge)
    assert endpoint.name == "endpoint some/model:free"


def test_models_that_judge_run_on_the_devices_that_were_named(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    path = save_model(tmp_path / "guard")
    placed = replace(sqlite_workspace, placement=Placement("auto", "bfloat16"))
    for kind in ("classifier", "generative"):
        usual, there = (choose_judge(each, f"{kind}:{path}", PHRASES) for each in (sqlite_workspace, placed))
        assert isinstance(there, ClassifierJudge | GenerativeJudge)
        assert there == replace(usual, device_map="auto")


def test_a_judge_of_other_weights_or_settings_has_another_version(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    path = save_model(tmp_path / "guard")
    settings = tmp_path / "guard.toml"
    settings.write_text(f'judge = "classifier:{path}"\nthreshold = 0.3\nunsafe_labels = ["bad"]\n')
    plain, strict = (choose_judge(sqlite_workspace, name, PHRASES) for name in (f"classifier:{path}", str(settings)))
    assert isinstance(strict, ClassifierJudge)
    assert (strict.settings.threshold, strict.settings.unsafe_labels) == (0.3, ("bad",))
    other = choose_judge(sqlite_workspace, f"classifier:{save_model(tmp_path / 'b' / 'guard', seed=1)}", PHRASES)
    assert plain.name == strict.name == other.name
    assert len({plain.version, strict.version, other.version}) == 3


def test_a_trained_judge_is_named_as_it_was_trained(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    rows = LabelledSource(str(write_labelled(tmp_path / "rows.jsonl", labelled_rows())))
    request = JudgeRequest(rows, str(save_model(tmp_path / "model")), fit=FitSettings(1, 4, 1), dtype="float32")
    trained = train_judge(sqlite_workspace, "mine", request)
    judge = choose_judge(sqlite_workspace, "trained:mine", PHRASES)
    assert isinstance(judge, ProbeJudge)
    assert (judge.name, judge.version, judge.digest) == ("mine", trained.version, trained.artifact_digest)
    with pytest.raises(RecordNotFoundError, match="mine"):
        choose_judge(sqlite_workspace, "trained:mime", PHRASES)
    (tmp_path / "judge.toml").write_text('judge = "trained:mine"\nthreshold = 0.1\n')
    with pytest.raises(JudgeError, match="no setting threshold"):
        choose_judge(sqlite_workspace, str(tmp_path / "judge.toml"), PHRASES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", r"no judge 'nobody'.*phrases, classifier:"),
        ("classifier", "no judge 'classifier'"),
        ("classifier:", "no judge 'classifier:'"),
        ("classifier:./nowhere", r"no directory \./nowhere"),
        ("classifier:{empty}", "holds no safetensors file"),
        ("{nowhere}.toml", "cannot be read"),
        ("{broken}", "is not TOML"),
        ("{nameless}", "names no judge"),
        ("{phrases}", "judge phrases has no setting threshold"),
        ("{unknown}", r"the judge m: colour: .*Its settings are rubric"),
        ("{range}", "the judge m: unsafe_from: Input should be less than or equal to 5"),
    ],
)
def test_what_stands_for_no_judge_is_refused(
    sqlite_workspace: Workspace, tmp_path: Path, name: str, message: str
) -> None:
    files = {
        "broken": "judge = ",
        "nameless": "threshold = 0.5",
        "phrases": 'judge = "phrases"\nthreshold = 0.5',
        "unknown": 'judge = "endpoint:m"\ncolour = 1',
        "range": 'judge = "endpoint:m"\nunsafe_from = 6',
    }
    places = {"empty": str(tmp_path), "nowhere": str(tmp_path / "nowhere")}
    for stem, content in files.items():
        (tmp_path / f"{stem}.toml").write_text(content)
        places[stem] = str(tmp_path / f"{stem}.toml")
    with pytest.raises(JudgeError, match=message):
        choose_judge(sqlite_workspace, name.format(**places), PHRASES)
