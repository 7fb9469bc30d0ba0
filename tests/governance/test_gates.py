"""A patch is judged in memory: what passes is written as it was judged, what fails touches nothing and says why."""

from pathlib import Path

import pytest
import torch
from torch import nn

from algorithms.errors import UnsupportedModelError
from algorithms.loading import load_model
from governance import candidate_model
from governance.candidate_model import candidate_of
from governance.dry_runs import dry_run
from governance.errors import InputError, JudgeError, PolicyError, WeightsChangedError
from governance.patch_records import list_patches
from governance.patching import apply_patch
from governance.placement import Placement
from governance.planning import prepared
from governance.policy_records import policy_in_force
from governance.workspace import Workspace
from registry import queries
from tests.governance.conftest import Scenarios, Trios
from tests.governance.policed import measured, put_in_force
from tests.governance.scenarios import Scenario, build, digests


@pytest.fixture(params=["full", "gpt2", "bf16", "lora"])
def form(request: pytest.FixtureRequest, scenarios: Scenarios, trios: Trios, adapter_trios: Trios) -> Scenario:
    """A lineage of every form of subject: rows, rows stored as columns, rounded rows, an adapter whose rank grows."""
    made = {
        "full": trios,
        "gpt2": lambda: trios("gpt2"),
        "bf16": lambda: trios(dtype=torch.bfloat16),
        "lora": lambda: adapter_trios(on_aligned=False),
    }
    return scenarios(made[request.param]())


def state_of(path: Path, base: Path | None) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in load_model(path, base)[0].state_dict().items()}


def test_what_is_judged_is_what_would_be_written_bit_for_bit(form: Scenario) -> None:
    form.apply("weapons")
    plan = form.plan("animals")
    before = digests(form.working)
    with prepared(form.workspace, plan) as ready, candidate_of(ready, Placement()) as candidate:
        judged = {name: value.clone() for name, value in candidate.load().state_dict().items()}
        digest = candidate.digest
    assert digests(form.working) == before
    summary = apply_patch(form.workspace, plan)
    assert summary.digest_after == digest
    written = state_of(form.working, form.trio.checkpoint)
    assert written.keys() == judged.keys()
    assert all(torch.equal(written[name], judged[name]) for name in written)
    assert any(
        not torch.equal(value, load[name])
        for load in [state_of(form.trio.subject, form.trio.checkpoint)]
        for name, value in written.items()
        if name in load
    )


def test_a_patch_that_passes_is_written_with_its_figures(form: Scenario, prompts: Path, tmp_path: Path) -> None:
    put_in_force(form.workspace, tmp_path, measured(prompts))
    summary = form.apply("animals")
    assert (summary.state, summary.policy is not None) == ("applied", True)
    rules = ["largest_linear_share", "smallest_drop", "largest_loss", "largest_over_refusal", "largest_divergence"]
    assert [result.rule for result in summary.gates] == rules
    assert all(result.passed for result in summary.gates)
    told = next(payload for action, payload in form.events() if action == "patch.applying")
    assert told["digest_judged"] == summary.digest_after
    assert [rule["rule"] for rule in told["gates"]] == rules
    figures = evaluations(form.workspace)
    assert {(stage, digest) for stage, digest, *_ in figures} == {
        ("patch 0", summary.digest_before),
        ("candidate 1", summary.digest_after),
    }
    form.require_sound()


def test_a_patch_that_fails_touches_nothing_and_says_why(form: Scenario, prompts: Path, tmp_path: Path) -> None:
    form.apply("weapons")
    put_in_force(form.workspace, tmp_path, measured(prompts, drop=10))
    files, claims, head = digests(form.working), form.claims(), form.patch(1).digest_after
    plan = form.plan("animals")
    rehearsed = dry_run(form.workspace, plan)
    assert form.states() == ["applied"]
    summary = apply_patch(form.workspace, plan, "why not")
    assert (summary.state, summary.patch, summary.digest_after) == ("rejected", 2, None)
    assert [result.rule for result in summary.gates if not result.passed] == ["smallest_drop"]
    assert (rehearsed.refused, rehearsed.gates) == (True, summary.gates)
    assert (digests(form.working), form.claims(), form.states()) == (files, claims, ["applied", "rejected"])
    with form.workspace.registry.read() as session:
        lineage = queries.get_lineage(session, "line")
        assert (lineage.head_patch_id, lineage.state_digest) == (1, head)
        recorded = queries.evaluations(session, lineage.id, patch_id=2)
    assert {record.stage for record in recorded} == {"candidate 2"}
    assert {record.metric for record in recorded} == {"harmfulness", "task_accuracy", "over_refusal", "kl_head"}
    action, payload = form.events()[-1]
    assert (action, payload["patch"], payload["reason"]) == ("patch.rejected", 2, "why not")
    assert "smallest_drop of animals: 0 against 10" in payload["failure"]
    assert summary.failure == payload["failure"]
    form.require_sound()
    form.revert()
    form.require_sound()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_both_databases_hold_what_was_judged(
    workspace: Workspace, trios: Trios, prompts: Path, tmp_path: Path, share: float
) -> None:
    scenario = build(workspace, trios(), prompts)
    put_in_force(workspace, tmp_path, f"[gates]\nlargest_linear_share = {share}\n", lineage=None)
    summary = scenario.apply("insults")
    assert summary.state == ("applied" if share else "rejected")
    assert [(r.rule, r.limit, r.passed) for r in summary.gates] == [("largest_linear_share", share, bool(share))]
    assert evaluations(workspace) == []
    scenario.require_sound()


@pytest.mark.parametrize(("share", "drop"), [(1.0, 0.0), (0.0, 0.0), (1.0, 50.0), (0.01, 50.0)])
def test_a_dry_run_refuses_exactly_what_the_run_refuses(
    scenario: Scenario, prompts: Path, tmp_path: Path, share: float, drop: float
) -> None:
    put_in_force(scenario.workspace, tmp_path, measured(prompts, share=share, drop=drop))
    plan = scenario.plan("animals")
    before = digests(scenario.workspace.directory / "lineages")
    rehearsed = dry_run(scenario.workspace, plan)
    assert (scenario.states(), digests(scenario.workspace.directory / "lineages")) == ([], before)
    summary = apply_patch(scenario.workspace, plan)
    assert rehearsed.gates == summary.gates
    assert rehearsed.refused == (summary.state == "rejected")
    refusals = [payload for action, payload in scenario.events() if action == "refused"]
    assert [payload["error"] for payload in refusals] == (["GateRefused"] if rehearsed.refused else [])
    scenario.require_sound()


def test_answers_of_a_rehearsal_are_not_generated_again(
    scenario: Scenario, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_force(scenario.workspace, tmp_path, "[gates]\nsmallest_drop = 0\nmax_new_tokens = 2\n")
    plan = scenario.plan("animals")
    dry_run(scenario.workspace, plan)
    monkeypatch.setattr(Placement, "load", lambda *_: pytest.fail("the model was loaded again"))
    assert apply_patch(scenario.workspace, plan).state == "applied"


def test_an_earlier_dimension_is_measured_once_it_is_protected(scenario: Scenario, tmp_path: Path) -> None:
    put_in_force(scenario.workspace, tmp_path, "[gates]\nlargest_rise = 0\nmax_new_tokens = 2\n")
    assert scenario.apply("animals").gates == ()
    assert [(r.rule, r.subject) for r in scenario.apply("insults").gates] == [("largest_rise", "animals")]


def test_a_dimension_without_held_out_prompts_is_named_and_nothing_is_written(
    scenario: Scenario, tmp_path: Path
) -> None:
    put_in_force(scenario.workspace, tmp_path, "[gates]\nsmallest_drop = 1\n")
    plan = scenario.plan("weapons")
    for attempt in (dry_run, apply_patch):
        with pytest.raises(InputError, match="harmfulness of weapons"):
            attempt(scenario.workspace, plan)
    assert scenario.states() == []


def test_a_weight_that_was_left_on_disk_is_refused_by_name(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_force(scenario.workspace, tmp_path, "[gates]\nsmallest_drop = 0\nmax_new_tokens = 2\n")
    plan = scenario.plan("animals")
    module = plan.touched[0].module

    def offloaded(_: Placement, path: Path, base: Path | None = None) -> nn.Module:
        model, _tokenizer = load_model(path, base)
        model.get_submodule(module).to("meta")
        return model

    monkeypatch.setattr(Placement, "load", offloaded)
    with pytest.raises(UnsupportedModelError, match=f"weight of {module} is offloaded"):
        apply_patch(scenario.workspace, plan)
    assert scenario.states() == []


def test_rows_that_are_not_the_artifacts_old_ones_are_not_judged(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_force(scenario.workspace, tmp_path, "[gates]\nsmallest_drop = 0\nmax_new_tokens = 2\n")
    plan = scenario.plan("animals")
    touched = plan.touched[0]

    def another(_: Placement, path: Path, base: Path | None = None) -> nn.Module:
        model, _tokenizer = load_model(path, base)
        model.get_submodule(touched.module).weight[touched.rows[0], 0] += 1
        return model

    monkeypatch.setattr(Placement, "load", another)
    with pytest.raises(WeightsChangedError, match=f"rows of {touched.module}"):
        apply_patch(scenario.workspace, plan)
    assert scenario.states() == []


def test_weights_that_do_not_become_what_was_judged_are_taken_back(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_force(scenario.workspace, tmp_path, "[gates]\nsmallest_drop = 0\nmax_new_tokens = 2\n")
    plan, before = scenario.plan("animals"), digests(scenario.working)
    monkeypatch.setattr(candidate_model, "_digest_after", lambda _: "0" * 64)
    with pytest.raises(WeightsChangedError, match="judged with the digest 0000"):
        apply_patch(scenario.workspace, plan)
    assert (scenario.states(), digests(scenario.working)) == (["rejected"], before)
    scenario.require_sound()


def test_a_patch_without_a_policy_is_applied_as_ever(scenario: Scenario) -> None:
    summary = scenario.apply("animals")
    assert (summary.state, summary.policy, summary.gates, evaluations(scenario.workspace)) == ("applied", None, (), [])


def test_the_policy_of_a_lineage_stands_before_the_registrys(scenario: Scenario, tmp_path: Path) -> None:
    put_in_force(scenario.workspace, tmp_path, "[gates]\nlargest_linear_share = 0\n", lineage=None, name="everywhere")
    put_in_force(scenario.workspace, tmp_path, "[gates]\nlargest_linear_share = 1\n", name="here")
    again = put_in_force(scenario.workspace, tmp_path, "[gates]\nlargest_linear_share = 1\n", name="here")
    assert again.version == 1
    with scenario.workspace.registry.read() as session:
        names = [found.name if (found := policy_in_force(session, name)) else None for name in ("line", "other", None)]
    assert names == ["here", "everywhere", "everywhere"]
    assert scenario.apply("animals").state == "applied"
    assert list_patches(scenario.workspace, "line")[0].policy is not None


def test_another_judge_under_the_same_name_is_refused(scenario: Scenario, tmp_path: Path) -> None:
    judge = tmp_path / "judge.toml"
    gates = f"[gates]\nsmallest_drop = 0\nmax_new_tokens = 2\njudge = '{judge}'\n"
    with pytest.raises(JudgeError):
        put_in_force(scenario.workspace, tmp_path, gates)
    judge.write_text('judge = "endpoint:m"\nbase_url = "http://127.0.0.1:1/v1"\n')
    put_in_force(scenario.workspace, tmp_path, gates)
    plan = scenario.plan("animals")
    judge.write_text('judge = "endpoint:m"\nbase_url = "http://127.0.0.1:2/v1"\n')
    with pytest.raises(PolicyError, match="is not the one that policy strict"):
        apply_patch(scenario.workspace, plan)
    assert scenario.states() == []


def evaluations(workspace: Workspace) -> list[tuple[str, str, str, int | None]]:
    """Stage, digest, metric and patch of every recorded figure of the lineage."""
    with workspace.registry.read() as session:
        lineage = queries.get_lineage(session, "line")
        return [(r.stage, r.state_digest, r.metric, r.patch_id) for r in queries.evaluations(session, lineage.id)]
