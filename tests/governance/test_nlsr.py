"""NLSR governed like FGSN: only claimed rows change and become the reference's, in any order, and all is kept."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sqlalchemy import text

from algorithms.adapters import Adapter
from algorithms.checkpoints import Checkpoint
from algorithms.errors import AdapterError, MismatchError, SettingsError
from algorithms.nlsr_settings import NlsrSettings, nlsr_settings
from algorithms.references import reference_weights
from algorithms.transplants import transplanted_factors
from algorithms.weights import WeightSource, open_weights
from cli import main
from governance.auditing import verify
from governance.catalogue import register_dimension, register_model
from governance.errors import InputError, PromptSetError, WeightsChangedError
from governance.identification import run_identification
from governance.patch_import import import_patch
from governance.patching import apply_patch
from governance.planning import dry_run, plan_patch
from governance.prompt_sets import PromptSource
from governance.recovery import RecoveryAction, recover
from governance.references import build_reference
from governance.replay import replay
from governance.reporting import write_report
from governance.workspace import Workspace
from registry.database import Registry
from registry.errors import RecordExistsError, RecordNotFoundError
from registry.processes import Owner, this_process
from tests.databases import SQLiteDatabases
from tests.governance.conftest import Scenarios, Trios
from tests.governance.exchange import export_to
from tests.governance.faults import Fault, flip_byte, struck_by
from tests.governance.scenarios import (
    HARMFUL,
    Scenario,
    Trio,
    build,
    digests,
    require_factors_kept,
    require_only_rows_differ,
    settings_of,
)
from tests.governance.test_reporting import read_page
from tests.tiny_models import merged_model, save_adapter

EVERY = slice(0, None)
FACTOR: dict[str, Any] = {"method": "nlsr", "form": "factor", "sparsity": 0.5}


@pytest.fixture(scope="session")
def continued(tmp_path_factory: pytest.TempPathFactory, trios: Trios) -> Trios:
    """LoRA subjects that were trained on from the aligned adapter: its factors with a drift."""
    made: dict[str, Trio] = {}

    def trio(*, same_basis: bool = False, **more: Any) -> Trio:
        key = f"{same_basis} {sorted(more.items(), key=str)}"
        if key not in made:
            place, base = tmp_path_factory.mktemp("continued"), trios().base
            aligned = save_adapter(base, place / "aligned", seed=4, **more)
            subject = save_adapter(base, place / "subject", seed=4, **more)
            file = subject / "adapter_model.safetensors"
            generator = torch.Generator().manual_seed(6)
            drifted = {}
            for name, tensor in sorted(load_file(file).items()):
                drift = 0.05 * torch.randn(tensor.shape, generator=generator)
                kept = same_basis and "lora_A" in name
                drifted[name] = tensor if kept else (tensor.float() + drift).to(tensor.dtype)
            save_file(drifted, file, metadata={"format": "pt"})
            made[key] = Trio(subject, aligned, base, base)
        return made[key]

    return trio


def _aligned(trio: Trio) -> WeightSource:
    return open_weights(trio.aligned, None if trio.aligned == trio.checkpoint else trio.checkpoint)


def _reference(scenario: Scenario, chosen: NlsrSettings) -> WeightSource:
    return reference_weights(_aligned(scenario.trio), open_weights(scenario.trio.base), chosen)


def _plain(**more: Any) -> NlsrSettings:
    chosen = settings_of(method="nlsr", **more)
    assert isinstance(chosen, NlsrSettings)
    return chosen


def _require_rows(scenario: Scenario, expected: WeightSource, tolerance: float) -> None:
    """PEFT's merged model has the expected rows where neurons are claimed, and the subject's everywhere else."""
    merged = merged_model(scenario.trio.checkpoint, scenario.working).state_dict()
    before = merged_model(scenario.trio.checkpoint, scenario.trio.subject).state_dict()
    claims = scenario.claims()
    for name, weight in merged.items():
        module = name.removesuffix(".weight")
        rows = sorted(claims.get(module, {}))
        free = torch.ones(len(weight), dtype=torch.bool)
        free[rows] = False
        torch.testing.assert_close(weight[free], before[name][free], atol=1e-5, rtol=1e-5)
        if rows:
            index = torch.tensor(rows)
            torch.testing.assert_close(weight[index], expected.rows(module, index), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_claimed_rows_of_a_full_checkpoint_become_the_references_and_no_other_byte_changes(
    scenarios: Scenarios, trios: Trios, beta: float, dtype: torch.dtype
) -> None:
    scenario = scenarios(trios(dtype=dtype, shard_size="10KB"))
    patched = scenario.apply("animals", method="nlsr", beta=beta)
    assert (patched.method, patched.settings["beta"], patched.state) == ("nlsr", beta, "applied")
    claims = scenario.claims()
    assert sum(map(len, claims.values())) == patched.neurons_modified > 0
    assert require_only_rows_differ(scenario.trio.subject, scenario.working, claims) > 0
    reference, ours = _reference(scenario, _plain(beta=beta)), scenario.weights()
    for module, rows in claims.items():
        index = torch.tensor(sorted(rows))
        assert torch.equal(ours.rows(module, index), reference.rows(module, index).to(dtype).float())
    scenario.require_sound()
    scenario.revert()
    assert digests(scenario.working) == digests(scenario.trio.subject)


LORA: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("continued", {}, {}),
    ("continued, published-code growth", {}, {"mode": "published-code"}),
    ("rsLoRA", {"use_rslora": True, "rank": 6, "alpha": 7}, {}),
    ("patterns", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}, {}),
    ("bfloat16", {"dtype": torch.bfloat16}, {}),
    ("some modules only", {"targets": ["q_proj", "down_proj"]}, {}),
]


@pytest.mark.parametrize(("case", "form", "chosen"), LORA, ids=[case for case, _, _ in LORA])
def test_a_patched_adapter_loads_with_peft_and_has_the_references_rows_inside_the_region(
    scenarios: Scenarios, continued: Trios, case: str, form: dict[str, Any], chosen: dict[str, Any]
) -> None:
    scenario = scenarios(continued(**form))
    for name in ("animals", "weapons"):
        scenario.apply(name, method="nlsr", region_score="random", seed=len(name), **chosen)
    tolerance = 0.03 if case == "bfloat16" else 1e-5
    _require_rows(scenario, _reference(scenario, _plain(**chosen)), tolerance)
    require_factors_kept(scenario.trio.subject, scenario.working, scenario.claims())
    before, after = Adapter.open(scenario.trio.subject), Adapter.open(scenario.working)
    for name in scenario.claims():
        # Both dimensions share the reference's factors.
        assert after.modules[name].rank >= 2 * before.modules[name].rank
        assert "bfloat16" in case or "rsLoRA" in case or after.modules[name].rank == 2 * before.modules[name].rank
    scenario.require_sound()
    scenario.revert(1)
    scenario.revert(2)
    assert digests(scenario.working) == digests(scenario.trio.subject)


def test_adapters_of_different_origin_are_patched_in_neuron_form(scenarios: Scenarios, adapter_trios: Trios) -> None:
    scenario = scenarios(adapter_trios(on_aligned=False))
    assert scenario.apply("animals", method="nlsr").neurons_modified > 0
    _require_rows(scenario, _reference(scenario, _plain()), 1e-5)


def test_the_aligned_checkpoint_under_an_adapter_is_the_reference_at_beta_0(
    scenarios: Scenarios, adapter_trios: Trios
) -> None:
    """Its update is dense, its rows cost no rank."""
    scenario = scenarios(adapter_trios(on_aligned=True))
    assert scenario.apply("animals", method="nlsr", beta=0).neurons_modified > 0
    _require_rows(scenario, open_weights(scenario.trio.aligned), 1e-5)
    before, after = Adapter.open(scenario.trio.subject), Adapter.open(scenario.working)
    assert {name: module.rank for name, module in after.modules.items()} == {
        name: module.rank for name, module in before.modules.items()
    }


def test_no_rank_is_added_where_the_references_factors_are_already_there(
    scenarios: Scenarios, continued: Trios
) -> None:
    scenario = scenarios(continued(same_basis=True))
    scenario.apply("animals", method="nlsr")
    before, after = Adapter.open(scenario.trio.subject), Adapter.open(scenario.working)
    assert all(after.modules[name].rank == module.rank for name, module in before.modules.items())
    assert (scenario.working / "adapter_config.json").read_bytes() == (
        scenario.trio.subject / "adapter_config.json"
    ).read_bytes()
    _require_rows(scenario, _reference(scenario, _plain()), 1e-5)


@pytest.mark.parametrize("form", [{}, {"use_rslora": True, "rank": 6, "alpha": 7}], ids=["LoRA", "rsLoRA"])
def test_the_factor_form_claims_whole_modules_and_gives_the_transplanted_factors(
    scenarios: Scenarios, continued: Trios, form: dict[str, Any]
) -> None:
    scenario = scenarios(continued(**form))
    plan = scenario.plan("animals", **FACTOR, modules=["q_proj", "down_proj"])
    assert dry_run(scenario.workspace, plan).neurons_modified == plan.neurons_modified
    patch = apply_patch(scenario.workspace, plan)
    subject = scenario.subject_weights()
    claims = scenario.claims()
    assert {name.rpartition(".")[2] for name in claims} == {"q_proj", "down_proj"}
    assert all(len(rows) == subject.modules[name].out_features for name, rows in claims.items())
    record = scenario.patch(1).identification_id
    found = run_identification(scenario.workspace, "line", "weapons", _plain(modules=("k_proj",), form="factor"))
    assert found.neurons_already_protected == 0
    reference, merged = (
        _reference(scenario, _plain()),
        merged_model(scenario.trio.checkpoint, scenario.working).state_dict(),
    )
    stored = plan.identification
    for name in claims:
        mine, theirs, masks = subject.factors(name), reference.factors(name), stored.masks(name)  # type: ignore[attr-defined]
        assert mine is not None
        assert theirs is not None
        new = transplanted_factors(mine, theirs, masks, name)
        below = open_weights(scenario.trio.checkpoint).rows(name, EVERY)
        torch.testing.assert_close(merged[f"{name}.weight"], below + new.scale * new.B @ new.A, atol=1e-5, rtol=1e-5)
    scenario.require_sound()
    assert (patch.identification, record) == (record, patch.identification)
    scenario.apply("weapons", modules=["k_proj"])
    scenario.revert(1)
    scenario.require_sound()
    scenario.revert(2)
    assert digests(scenario.working) == digests(scenario.trio.subject)


def test_the_factor_form_is_refused_where_a_neuron_is_protected_and_leaves_other_modules_open(
    scenarios: Scenarios, continued: Trios
) -> None:
    scenario = scenarios(continued())
    scenario.apply("animals", modules=["q_proj"], score="random")
    before = digests(scenario.working)
    with pytest.raises(SettingsError, match=r"q_proj, and \d+ of them are protected.*form = neuron"):
        scenario.identify("weapons", **FACTOR)
    assert digests(scenario.working) == before
    assert scenario.events()[-1][0] == "refused"
    assert scenario.apply("weapons", **FACTOR, modules=["v_proj"]).neurons_modified > 0
    # What was found while a module was free is refused at the plan once it is not.
    record = scenario.identify("insults", **FACTOR, modules=["k_proj"])
    plan = plan_patch(scenario.workspace, "line", record.identification)
    name = next(module.module for module in plan.touched)
    with pytest.raises(SettingsError, match="k_proj"):
        plan.identification.require_unprotected({name: torch.tensor([0])})


def test_the_factor_form_is_refused_for_adapters_of_different_origin(
    scenarios: Scenarios, adapter_trios: Trios, trios: Trios
) -> None:
    scenario = scenarios(adapter_trios(on_aligned=False))
    with pytest.raises(MismatchError, match=r"neither continues from the other.*Use form = neuron"):
        scenario.identify("animals", **FACTOR)
    scenario = scenarios(trios())
    with pytest.raises(MismatchError, match=r"no adapter and has no factors.*Use form = neuron"):
        scenario.identify("animals", **FACTOR)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trained embeddings"),
    ],
    ids=str,
)
def test_an_aligned_adapter_that_is_no_plain_lora_is_refused_by_name(
    trios: Trios, sqlite_workspace: Workspace, tmp_path: Path, more: dict[str, Any], named: str
) -> None:
    base = trios().base
    adapter = save_adapter(base, tmp_path / "aligned", targets=["q_proj"], **more)
    register_model(sqlite_workspace, "base", base, "base")
    with pytest.raises(AdapterError, match=named):
        register_model(sqlite_workspace, "aligned", adapter, "aligned", "base")


def test_an_adapter_on_an_aligned_checkpoint_is_told_to_be_merged(scenarios: Scenarios, adapter_trios: Trios) -> None:
    scenario = scenarios(adapter_trios(on_aligned=True))
    with pytest.raises(MismatchError, match=r"no low-rank change.*merge the subject's adapter"):
        scenario.identify("animals", method="nlsr", beta=0.3)
    assert not (scenario.workspace.directory / "scratch").exists()


# --- both methods in one lineage

FORMS: dict[str, dict[str, Any]] = {
    "restore": {"operation": "restore"},
    "subspace": {"operation": "subspace", "directions": 2},
    "beta 0.3": {"method": "nlsr"},
    "beta 0": {"method": "nlsr", "beta": 0, "region_score": "magnitude"},
    "drawn": {"method": "nlsr", "selection": "bernoulli", "region_score": "random", "sparsity": 0.5},
    "factor": {**FACTOR, "modules": ["k_proj", "o_proj"]},
}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.sampled_from(sorted(HARMFUL)), st.sampled_from(sorted(FORMS))),
        st.tuples(st.just("revert"), st.integers(0, 5), st.just("")),
    ),
    min_size=3,
    max_size=6,
)
ORDERS = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _walk(scenario: Scenario, steps: list[tuple[str, Any, str]]) -> None:
    applied: list[int] = []
    for action, what, form in steps:
        kept = scenario.claimed_rows()
        if action == "apply":
            try:
                applied.append(scenario.apply(what, **FORMS[form]).patch)
            except (SettingsError, MismatchError):
                # Entries of factors: only where whole modules are free, and never of a full checkpoint.
                assert form == "factor"
                assert scenario.claimed_rows() == kept
        elif applied:
            scenario.revert(applied.pop(what % len(applied)))
        claims = scenario.claims()
        rows = {sequence: scenario.artifact_rows(sequence) for sequence in applied}
        for module, held in claims.items():
            assert held == {row: sequence for sequence in applied for row in rows[sequence].get(module, ())}
        assert sum(map(len, claims.values())) == sum(len(part) for found in rows.values() for part in found.values())
        now = scenario.claimed_rows()
        assert all(now[neuron] == kept[neuron] for neuron in now.keys() & kept.keys())
        if scenario.trio.checkpoint is None:
            require_only_rows_differ(scenario.trio.subject, scenario.working, claims)
        else:
            require_factors_kept(scenario.trio.subject, scenario.working, claims)
    while applied:
        scenario.revert(applied.pop())
    assert digests(scenario.working) == digests(scenario.trio.subject)
    scenario.require_sound()


@pytest.fixture
def fresh(prompts: Path, sqlite_databases: SQLiteDatabases) -> Callable[[Path, Trio], Scenario]:
    """A lineage in a registry of its own, made anew for every example."""

    def scenario(place: Path, trio: Trio) -> Scenario:
        registry = Registry.open(sqlite_databases.migrated(place))
        return build(Workspace(registry=registry, actor="tester"), trio, prompts)

    return scenario


@ORDERS
@given(steps=STEPS)
def test_both_methods_in_any_order_on_a_full_checkpoint(
    fresh: Callable[[Path, Trio], Scenario], trios: Trios, steps: list[tuple[str, Any, str]]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        scenario = fresh(Path(place), trios())
        with scenario.workspace.registry:
            _walk(scenario, steps)


@ORDERS
@given(steps=STEPS)
def test_both_methods_in_any_order_on_an_adapter(
    fresh: Callable[[Path, Trio], Scenario], continued: Trios, steps: list[tuple[str, Any, str]]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        scenario = fresh(Path(place), continued())
        with scenario.workspace.registry:
            _walk(scenario, steps)


def test_protected_neurons_stay_out_whichever_method_protected_them(scenario: Scenario) -> None:
    chosen = {"region_score": "random", "sparsity": 0.5}
    first = scenario.apply("animals", method="nlsr", **chosen)
    again = scenario.identify("weapons", method="nlsr", **chosen)
    assert again.neurons_selected == again.neurons_already_protected == first.neurons_modified
    other = scenario.apply("insults", score="random", budget=0.4)
    assert other.neurons_already_protected > 0
    assert other.neurons_modified == other.neurons_selected - other.neurons_already_protected
    third = scenario.plan("weapons", method="nlsr", region_score="magnitude", sparsity=0.2)
    assert set(third.protected_by) == {"animals", "insults"}


# --- references


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_built_reference_is_recorded_with_its_origin_and_patches_as_the_extrapolation_does(
    scenarios: Scenarios, trios: Trios, continued: Trios, kind: str
) -> None:
    trio = trios() if kind == "checkpoint" else continued()
    plain, named = scenarios(trio), scenarios(trio)
    workspace = named.workspace
    built = build_reference(workspace, "super", aligned="aligned", base="base", settings=_plain())
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
    problems = [finding.problem for finding in verify(workspace).findings]
    assert problems == ["its recorded made_from is not the registered one"]


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
    built = build_reference(workspace, "super", aligned="aligned", base="base", settings=_plain())
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
    with pytest.raises(RecordExistsError):
        build_reference(workspace, "aligned", aligned="aligned", base="base", settings=_plain())
    register_model(workspace, "shape", trios("gpt2").base, "base")
    with pytest.raises(MismatchError):
        build_reference(workspace, "super", aligned="aligned", base="shape", settings=_plain())
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("years of work")
    with pytest.raises(Exception, match="not an empty directory"):
        build_reference(workspace, "super", aligned="aligned", base="base", settings=_plain(), output=used)
    assert not (workspace.directory / "references").exists()
    assert digests(workspace.directory / "artifacts") == held
    assert [entry.name for entry in used.iterdir()] == ["thesis.txt"]


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
    chosen = _plain(statistics_model=role, answer_tokens=3)
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
        run_identification(unanswered.workspace, "line", "bombs", _plain(answer_tokens=3), judge=Never())
    assert not (unanswered.workspace.directory / "scratch").exists()
    assert unanswered.events()[-1][0] == "refused"
    # A region that no answer decides needs none.
    assert unanswered.identify("bombs", method="nlsr", region_score="magnitude").neurons_selected > 0


def test_what_a_killed_pass_left_goes_with_the_next_one(scenario: Scenario) -> None:
    scratch = scenario.workspace.directory / "scratch"
    mine = this_process()
    dead, elsewhere = Owner(mine.host, 2**22 + 1, 1), Owner("another-host", 1, 1)
    places = {owner: scratch / f"{owner.started}.{owner.pid}.{owner.host}" for owner in (dead, elsewhere)}
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


# --- what is shown and kept


def test_the_choice_of_modules_is_stored_and_shown_in_the_report(scenario: Scenario, tmp_path: Path) -> None:
    drawn = {"method": "nlsr", "selection": "bernoulli"}
    scenario.apply("animals")
    found = scenario.identify("weapons", **drawn)
    stored = plan_patch(scenario.workspace, "line", found.identification).identification
    scenario.apply("weapons", **drawn)
    assert len(found.choices) == len(scenario.subject_weights().modules)
    page = read_page(scenario.workspace, "line", tmp_path)
    rows = page.tables[f"table-choices-{found.identification}"][1:]
    assert [row[0] for row in rows] == [c["module"] for c in sorted(found.choices, key=lambda c: c["rank"])]
    patched = {row[0] for row in rows if row[5] == "yes"}
    assert patched == {module for module in stored.modules if len(stored.selected(module))}
    assert patched == {choice["module"] for choice in found.choices if choice["patched"]}
    assert "extrapolated from aligned and base (mode exact, beta 0.3)" in page.text
    assert [cell for cell in page.row("table-patches", "2") if "nlsr" in cell] == ["nlsr, neuron form"]
    assert "NLSR chooses modules, not blocks" in page.text


def test_a_report_of_nothing_but_nlsr_renders_and_a_control_of_another_method_is_not_its_own(
    scenario: Scenario, tmp_path: Path
) -> None:
    from governance.lineages import create_lineage

    scenario.apply("animals", method="nlsr")
    for name, chosen in (("chance", _plain(region_score="random")), ("other", settings_of(score="random"))):
        create_lineage(scenario.workspace, name, subject="subject", aligned="aligned", base="base")
        found = run_identification(scenario.workspace, name, "animals", chosen)
        apply_patch(scenario.workspace, plan_patch(scenario.workspace, name, found.identification))
    page = read_page(scenario.workspace, "line", tmp_path)
    assert "table-control-1" in page.tables
    assert "table-control-2" not in page.tables
    assert "This lineage is a control" in read_page(scenario.workspace, "chance", tmp_path).text


@pytest.mark.parametrize(("kind", "operation"), [("full", "write"), ("lora", "rename")])
def test_an_interrupted_patch_is_recovered(
    scenarios: Scenarios, trios: Trios, continued: Trios, kind: str, operation: Any
) -> None:
    scenario = scenarios(trios() if kind == "full" else continued())
    scenario.apply("weapons")
    before, held = digests(scenario.working), scenario.claims()
    plan = scenario.plan("animals", method="nlsr", region_score="random")
    assert plan.neurons_modified > 0
    fault = Fault(scenario.working, operation, 2 if kind == "full" else 1, KeyboardInterrupt())
    with struck_by(fault), pytest.raises(KeyboardInterrupt):
        apply_patch(scenario.workspace, plan)
    assert recover(scenario.workspace) == [RecoveryAction("line", 2, "applying", "rejected")]
    assert (digests(scenario.working), scenario.claims()) == (before, held)
    scenario.require_sound()
    scenario.apply("animals", method="nlsr", region_score="random")
    scenario.revert(1)
    scenario.revert(3)
    assert digests(scenario.working) == digests(scenario.trio.subject)


@pytest.mark.parametrize("chosen", [{"method": "nlsr"}, FACTOR], ids=["neuron form", "factor form"])
def test_a_patch_can_be_replayed_and_taken_to_another_registry(
    scenarios: Scenarios, continued: Trios, tmp_path: Path, chosen: dict[str, Any]
) -> None:
    here, there = scenarios(continued()), scenarios(continued())
    here.apply("animals", **chosen)
    assert replay(here.workspace, "line").agrees
    import_patch(there.workspace, "line", export_to(here, tmp_path / "patch"))
    assert digests(there.working) == digests(here.working)
    assert there.claims() == here.claims()
    assert there.patch(1).kind == "nlsr"
    there.require_sound()
    read_page(there.workspace, "line", tmp_path)
    there.revert()
    assert digests(there.working) == digests(there.trio.subject)


def test_a_changed_artifact_and_a_changed_row_are_named(scenario: Scenario) -> None:
    scenario.apply("animals", method="nlsr")
    module, rows = next(iter(scenario.claims().items()))
    stored = Checkpoint.open(scenario.working).stored(scenario.subject_weights().modules[module].tensor)
    flip_byte(scenario.working / stored.file, stored.begin + next(iter(rows)) * 4 * stored.shape[1])
    assert any(f.check == "weights" for f in verify(scenario.workspace, weights=True).findings)
    flip_byte(scenario.artifact(1), scenario.artifact(1).stat().st_size - 1)
    assert any(f.check == "artifact" for f in verify(scenario.workspace).findings)


# --- the command line


@pytest.fixture
def run(scenario: Scenario) -> Callable[..., Any]:
    """Run a command against the scenario's registry."""

    def command(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(main, [*arguments, "--database", scenario.workspace.registry.url])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if "--json" in arguments else result

    return command


def test_the_whole_path_by_commands(scenario: Scenario, run: Callable[..., Any], tmp_path: Path) -> None:
    built = run("reference", "build", "super", "--aligned", "aligned", "--base", "base", "--beta", "0.3", "--json")
    assert (built["role"], built["name"]) == ("reference", "super")
    shown = run("reference", "build", "loud", "--aligned", "aligned", "--base", "base", "--output", str(tmp_path / "x"))
    assert "β 0.9" in shown.stdout
    assert "beta 0.9 can break the reference" in shown.stderr
    options = ("--method", "nlsr", "--reference", "super", "--set", "sparsity=0.6")
    shown = run("identify", "line", "animals", *options)
    assert "Choice of modules" in shown.stdout
    assert "Reference: super." in shown.stdout
    found = run("identify", "line", "animals", *options, "--json")
    assert (found["method"], len(found["choices"])) == ("nlsr", 14)
    planned = run("patch", "plan", "line", "animals", *options, "--json")
    patched = run("patch", "apply", "line", "animals", *options, "--json")
    assert patched["neurons_modified"] == planned["neurons_modified"] > 0
    assert (patched["method"], patched["settings"]["reference"]) == ("nlsr", "super")
    run("patch", "apply", "line", "weapons", "--preset", "random-control", "--set", "budget=0.2")
    assert [patch["method"] for patch in run("patch", "list", "line", "--json")] == ["nlsr", "fgsn"]
    assert run("audit", "verify", "--weights", "--json")["findings"] == []
    write_report(scenario.workspace, "line", tmp_path / "report.html")
    run("patch", "revert", "line", "1")
    run("patch", "revert", "line")
    assert digests(scenario.working) == digests(scenario.trio.subject)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--method", "nlsr", "--set", "budget=0.1"), "budget"),
        (("--set", "beta=0.1"), "beta"),
        (("--reference", "super"), "reference"),
        (("--method", "nlsr", "--preset", "fgsn-paper"), "nlsr-published-code"),
        (("--method", "nlsr", "--set", "beta=-1"), "beta"),
        (("--method", "nlsr", "--set", "selection=threshold"), "threshold"),
        (("--method", "nlsr", "--reference", "nobody"), "nobody"),
        (("--method", "nlsr", "--preset", "nlsr-paper"), "form = neuron"),
        (("--method", "nlsr", "--preset", "nlsr-published-code"), "published-code"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings_are_those_of_the_method(
    scenario: Scenario, run: Callable[..., Any], arguments: tuple[str, ...], named: str
) -> None:
    for command in ("identify", "patch apply"):
        result = run(*command.split(), "line", "animals", *arguments, code=2)
        assert named in result.stderr
        assert result.stderr.count("\n") == 1
    assert scenario.states() == []
