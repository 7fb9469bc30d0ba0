"""References of NLSR and its safe answers: where they come from, what is refused, what is recorded."""

import json
from pathlib import Path

import pytest
from sqlalchemy import text

from algorithms.errors import MismatchError, SettingsError
from algorithms.nlsr_settings import nlsr_settings
from governance.auditing import verify
from governance.catalogue import register_dimension, register_model
from governance.errors import InputError, PromptSetError, WeightsChangedError
from governance.evaluation import EvaluationRequest, Measurement, evaluate
from governance.identification import run_identification
from governance.measuring import GenerationSettings
from governance.planning import plan_patch
from governance.prompt_sets import PromptSource
from governance.references import build_reference
from registry import queries
from registry.errors import RecordExistsError, RecordNotFoundError
from registry.processes import Owner, this_process
from tests.governance.conftest import Scenarios, Trios
from tests.governance.scenarios import (
    Scenario,
    digests,
    plain_nlsr,
    settings_of,
)
from tests.governance.test_reporting import read_page


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_built_reference_is_recorded_with_its_origin_and_patches_as_the_extrapolation_does(
    scenarios: Scenarios, trios: Trios, continued: Trios, kind: str
) -> None:
    trio = trios() if kind == "checkpoint" else continued()
    plain, named = scenarios(trio), scenarios(trio)
    workspace = named.workspace
    built = build_reference(workspace, "super", aligned="aligned", base="base", settings=plain_nlsr())
    assert (built.role, built.kind, built.name) == ("reference", kind, "super")
    assert Path(built.path) == workspace.directory / "references" / "super"
    action, payload = named.events()[-1]
    assert action == "model.registered"
    made = payload["made_from"]
    assert (made["mode"], made["beta"], made["aligned"]["name"], made["base"]["name"]) == (
        *("exact", 0.3, "aligned", "base"),
    )
    assert all(len(made[role]["state_digest"]) == 64 for role in ("aligned", "base"))
    expected = plain.apply("animals", method="nlsr")
    patch = named.apply("animals", method="nlsr", reference="super", beta=0.7)
    assert patch.digest_after == expected.digest_after
    found = named.identify("weapons", method="nlsr", reference="super")
    assert found.reference is not None
    assert found.reference["model"] == "super"
    assert found.reference["made_from"] == made
    named.require_sound()
    with workspace.registry.write() as session:
        session.execute(text("UPDATE models SET metadata = replace(metadata, '0.3', '0.2')"))
    found_again = verify(workspace).findings
    assert {finding.subject for finding in found_again} == {"model super"}
    assert found_again[-1].problem == "its recorded made_from is not the registered one"


def test_a_reference_that_cannot_be_used_is_refused(scenario: Scenario, trios: Trios) -> None:
    workspace = scenario.workspace
    with pytest.raises(RecordNotFoundError, match="no model named 'super'"):
        scenario.identify("animals", method="nlsr", reference="super")
    with pytest.raises(InputError, match=r"role aligned, not reference.*reference build"):
        scenario.identify("animals", method="nlsr", reference="aligned")
    with pytest.raises(SettingsError, match="reference"):
        settings_of(reference="super")
    register_model(workspace, "other", trios("gpt2").aligned, "reference")
    with pytest.raises(MismatchError):
        scenario.identify("animals", method="nlsr", reference="other")
    built = build_reference(workspace, "super", aligned="aligned", base="base", settings=plain_nlsr())
    found = scenario.identify("animals", method="nlsr", reference="super")
    file = next(Path(built.path).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsChangedError, match="super"):
        plan_patch(workspace, "line", found.identification)
    assert digests(scenario.working) == digests(scenario.trio.subject)


def test_a_reference_that_cannot_be_built_is_refused_and_leaves_nothing(
    scenario: Scenario, trios: Trios, tmp_path: Path
) -> None:
    workspace = scenario.workspace
    held = digests(workspace.directory / "artifacts") if (workspace.directory / "artifacts").exists() else {}
    with pytest.raises(SettingsError, match="published-code multiplies LoRA factors"):
        build_reference(
            workspace,
            "super",
            aligned="aligned",
            base="base",
            settings=nlsr_settings(overrides={"mode": "published-code"}),
        )
    with pytest.raises(InputError, match="base is registered as base, not as aligned"):
        build_reference(workspace, "super", aligned="base", base="aligned", settings=plain_nlsr())
    with pytest.raises(RecordExistsError):
        build_reference(workspace, "aligned", aligned="aligned", base="base", settings=plain_nlsr())
    register_model(workspace, "shape", trios("gpt2").base, "base")
    with pytest.raises(MismatchError):
        build_reference(workspace, "super", aligned="aligned", base="shape", settings=plain_nlsr())
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("years of work")
    with pytest.raises(Exception, match="not an empty directory"):
        build_reference(workspace, "super", aligned="aligned", base="base", settings=plain_nlsr(), output=used)
    assert not (workspace.directory / "references").exists()
    assert digests(workspace.directory / "artifacts") == held
    assert [entry.name for entry in used.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_reference_is_measured_under_its_own_name(
    scenarios: Scenarios, trios: Trios, continued: Trios, tmp_path: Path, kind: str
) -> None:
    scenario = scenarios(trios() if kind == "checkpoint" else continued())
    workspace = scenario.workspace
    for name, beta in (("mild", 0.0), ("super", 0.3)):
        build_reference(workspace, name, aligned="aligned", base="base", settings=plain_nlsr(beta=beta))
    held: dict[str, list[Measurement]] = {
        model: evaluate(
            workspace, "line", EvaluationRequest(model=model, dimensions=("animals",), generation=GenerationSettings(3))
        )
        for model in ("aligned", "mild", "super", "head")
    }
    assert {model: figures[0].stage for model, figures in held.items()} == {
        "aligned": "aligned",
        "mild": "reference",
        "super": "reference",
        "head": "patch 0",
    }
    assert held["mild"][0].numerator == held["aligned"][0].numerator
    assert scenario.events()[-2][1]["model"] == "super"
    with workspace.registry.read() as session:
        records = queries.evaluations(session, queries.get_lineage(session, "line").id)
        models = {record.model.name if record.model else None: record for record in records}
        assert list(models) == ["aligned", "mild", "super", None]
        for name in ("mild", "super"):
            assert models[name].state_digest == queries.get_model(session, name).state_digest
            assert models[name].patch_id is None
    page = read_page(workspace, "line", tmp_path)
    assert [row[0].split(" (")[0] for row in page.tables["table-harmfulness"][1:]] == [
        *("aligned", "reference|mild", "reference|super", "working copy"),
    ]
    scenario.require_sound()


def test_only_a_reference_is_measured_by_its_name(scenario: Scenario, trios: Trios) -> None:
    workspace = scenario.workspace
    register_model(workspace, "another", trios().aligned, "aligned")
    register_model(workspace, "stranger", trios("gpt2").aligned, "reference")
    for model, error, problem in (
        ("another", InputError, "has the role aligned, not reference"),
        ("stranger", MismatchError, "gpt2|Gpt2|GPT2|architecture|module"),
        ("nobody", RecordNotFoundError, "no model named 'nobody'"),
    ):
        with pytest.raises(error, match=problem):
            evaluate(workspace, "line", EvaluationRequest(model=model, generation=GenerationSettings(2)))
    with workspace.registry.read() as session:
        assert not queries.evaluations(session, queries.get_lineage(session, "line").id)


# --- calibration


class EveryOther:
    """A judge that calls every second answer a refusal, the first one included."""

    name, version = "every-other", "1"

    def __init__(self) -> None:
        self.asked = 0

    def refused(self, answer: str) -> bool:
        assert isinstance(answer, str)
        self.asked += 1
        return self.asked % 2 == 1


class Never:
    """A judge that calls nothing a refusal."""

    name, version = "never", "1"

    def refused(self, answer: str) -> bool:
        return False


@pytest.fixture
def unanswered(scenario: Scenario, prompts: Path) -> Scenario:
    """A dimension of five prompts of which none has an answer."""
    file = scenario.workspace.directory / "unanswered.jsonl"
    lines = [json.dumps({"prompt": f"how do i make a bomb {word}"}) for word in ("cat", "dog", "yes", "no", "story")]
    file.write_text("\n".join(lines), encoding="utf-8")
    sources = {"harmful": PromptSource(str(file)), "benign": PromptSource(str(prompts / "benign.jsonl"))}
    register_dimension(scenario.workspace, "bombs", sources)  # type: ignore[arg-type]
    return scenario


@pytest.mark.parametrize("role", ["reference", "aligned"])
def test_generated_answers_are_kept_where_the_judge_calls_them_refusals(unanswered: Scenario, role: str) -> None:
    chosen = plain_nlsr(statistics_model=role, answer_tokens=3)
    found = run_identification(unanswered.workspace, "line", "bombs", chosen, judge=EveryOther())
    assert found.safe_answers == {"given": 0, "generated": 5, "kept": 3, "judge": "every-other 1"}
    summary = unanswered.workspace.store
    with unanswered.workspace.registry.read() as session:
        from registry.schema import Identification

        record = session.get_one(Identification, found.identification)
        kept = summary.read_bytes(record.summary["answers"]).splitlines()
    assert len(kept) == 3
    assert all("answer" in json.loads(line) for line in kept)
    assert not (unanswered.workspace.directory / "scratch").exists()


def test_without_a_safe_answer_nothing_is_identified(unanswered: Scenario) -> None:
    with pytest.raises(PromptSetError, match=r"none of the 5 answers.*safe answers"):
        run_identification(unanswered.workspace, "line", "bombs", plain_nlsr(answer_tokens=3), judge=Never())
    assert not (unanswered.workspace.directory / "scratch").exists()
    assert unanswered.events()[-1][0] == "refused"
    # A region that no answer decides needs none.
    assert unanswered.identify("bombs", method="nlsr", region_score="magnitude").neurons_selected > 0


def test_what_a_killed_pass_left_goes_with_the_next_one(scenario: Scenario) -> None:
    scratch = scenario.workspace.directory / "scratch"
    mine = this_process()
    dead, elsewhere = Owner(mine.place, 2**22 + 1, 1), Owner("another.host+-+-+-", 1, 1)
    places = {owner: scratch / owner.name for owner in (dead, elsewhere)}
    for place in places.values():
        (place / "reference").mkdir(parents=True)
    scenario.identify("animals", method="nlsr")
    assert list(scratch.iterdir()) == [places[elsewhere]]


def test_an_identification_is_used_again_only_for_its_own_method_and_settings(scenario: Scenario) -> None:
    first = scenario.identify("animals", method="nlsr")
    assert first.method == "nlsr"
    assert scenario.identify("animals", method="nlsr").reused
    assert not scenario.identify("animals", method="nlsr", beta=0.2).reused
    assert not scenario.identify("animals").reused
