"""Models run where and in the number format that the command names; records say so, and what is written is the same."""

import importlib.util
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from sqlalchemy import select

from algorithms import loading
from algorithms.errors import CheckpointError, UnsupportedModelError
from algorithms.generation import generate
from algorithms.loading import load_tokenizer
from algorithms.nlsr_settings import NlsrSettings
from cli import main
from governance.errors import InputError
from governance.evaluation import EvaluationRequest, evaluate
from governance.identification import IdentificationSummary, run_identification
from governance.measuring import GenerationSettings
from governance.patching import apply_patch
from governance.placement import ON_THE_CPU, Placement, Precision, read_placement
from governance.prompt_sets import PromptSource
from registry.schema import Evaluation, IdentifiedNeuron
from tests.governance.conftest import Scenarios, Trios
from tests.governance.policed import put_in_force
from tests.governance.scenarios import PLAIN_NLSR, Scenario, digests

ON_DISK = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
ON_DISK |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
SHORT = EvaluationRequest(dimensions=("animals",), generation=GenerationSettings(max_new_tokens=3))


def placed(scenario: Scenario, placement: Placement) -> Scenario:
    """The same lineage, its models placed in another way."""
    return replace(scenario, workspace=replace(scenario.workspace, placement=placement))


def told(scenario: Scenario, action: str) -> list[dict[str, Any]]:
    """What the ledger's events of one action say."""
    return [payload for name, payload in scenario.events() if name == action]


def recorded(scenario: Scenario, metric: str) -> list[Evaluation]:
    """The evaluations of one metric, oldest first."""
    with scenario.workspace.registry.read() as session:
        return list(session.scalars(select(Evaluation).where(Evaluation.metric == metric).order_by(Evaluation.id)))


def selected_by(scenario: Scenario, found: IdentificationSummary) -> set[tuple[int, int]]:
    """(module, neuron) of everything that an identification selected."""
    with scenario.workspace.registry.read() as session:
        query = select(IdentifiedNeuron).where(
            IdentifiedNeuron.identification_id == found.identification, IdentifiedNeuron.disposition == "selected"
        )
        return {(neuron.module_id, neuron.neuron) for neuron in session.scalars(query)}


# --- what the command line says


def test_what_is_named_is_a_placement(tmp_path: Path) -> None:
    assert read_placement(None, "float32") == ON_THE_CPU
    assert read_placement("auto", "bfloat16") == Placement("auto", "bfloat16")
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"": "cpu"}))
    assert read_placement(str(file), "float32") == Placement({"": "cpu"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "does not hold an object"),
        ("{}", "does not hold an object"),
        ('{"model": null}', "does not hold an object"),
        ('{"model": true}', "does not hold an object"),
    ],
)
def test_a_file_that_is_no_device_map_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "map.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=f"{file} {said}"):
        read_placement(str(file), "float32")


@pytest.mark.parametrize("device", ["nonsense", "disk", "cuda:97", {"": "mtia:9"}, {"": 99}, {"": "auto"}])
def test_a_device_that_is_not_here_is_named(trios: Trios, device: Any) -> None:
    named = next(iter(device.values())) if isinstance(device, dict) else device
    with pytest.raises(InputError, match=f"there is no device {named} here"):
        Placement(device).load(trios().subject)


@pytest.mark.parametrize("device_map", ["meta", {"": "meta"}])
def test_a_model_without_weights_is_refused(trios: Trios, device_map: Any) -> None:
    with pytest.raises(InputError, match="holds no weights"):
        Placement(device_map).load(trios().subject)


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({"model.layerz": "cpu", "": "cpu"}, "names model.layerz"),
        ({"model.embed_tokens": "cpu"}, r"holds model\.layers\.0"),
        ({"model.layers.1": "disk", "": "cpu"}, "Check the device map"),
    ],
)
def test_a_device_map_that_does_not_fit_the_model_is_refused(trios: Trios, device_map: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        Placement(device_map).load(trios().subject)


def test_an_adapter_is_not_laid_on_a_base_that_is_partly_offloaded(
    adapter_trios: Trios, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT would write the offloaded part anew, below the working directory or over the base's own file."""
    trio = adapter_trios(on_aligned=False)
    assert trio.checkpoint is not None
    before = digests(trio.checkpoint)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedModelError, match="an adapter lies on it"):
        Placement(ON_DISK).load(trio.subject, trio.checkpoint)
    assert digests(trio.checkpoint) == before
    assert list(tmp_path.iterdir()) == []
    assert Placement("auto").load(trio.subject, trio.checkpoint) is not None


def test_a_placed_model_that_was_let_go_is_gone_before_the_next_is_loaded(
    trios: Trios, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, placed_on_disk = trios().subject, Placement(ON_DISK)
    first = placed_on_disk.load(subject)
    held = weakref.ref(first)
    del first
    alive: list[bool] = []
    load = loading._load_checkpoint

    def noted(*arguments: Any) -> Any:
        alive.append(held() is not None)
        return load(*arguments)

    monkeypatch.setattr(loading, "_load_checkpoint", noted)
    placed_on_disk.load(subject)
    assert alive == [False]


def test_without_accelerate_it_is_said_what_to_install(trios: Trios, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(InputError, match="Install neuronledger\\[accelerate\\]"):
        Placement("auto").load(trios().subject)
    assert ON_THE_CPU.load(trios().subject) is not None


@pytest.mark.parametrize("device_map", ["auto", "cpu", ON_DISK])
def test_a_model_answers_alike_wherever_it_lies(trios: Trios, device_map: Any) -> None:
    subject = trios().subject
    tokenizer = load_tokenizer(subject)
    prompts = ["how do i feed a dog ?", "what is a good story ?"]
    here, there = (each.load(subject) for each in (ON_THE_CPU, Placement(device_map)))
    assert any(parameter.is_meta for parameter in there.parameters()) == (device_map == ON_DISK)
    assert generate(there, tokenizer, prompts, max_new_tokens=4) == generate(here, tokenizer, prompts, max_new_tokens=4)


# --- identifying


@pytest.mark.parametrize("form", ["full", "lora"])
def test_identifying_on_devices_in_bfloat16_finds_almost_the_same_and_says_how(
    scenarios: Scenarios, trios: Trios, adapter_trios: Trios, form: str
) -> None:
    scenario = scenarios(trios() if form == "full" else adapter_trios(on_aligned=False))
    attributed = {"score": "attribution", "gradient_models": "aligned+head", "budget": 0.2, "stop_at": 0}
    usual = scenario.identify("animals", **attributed)
    there = placed(scenario, Placement("auto", "bfloat16"))
    rounded = there.identify("animals", **attributed, seed=1)
    assert usual.ran == {}
    assert rounded.ran == {"dtype": "bfloat16", "device_map": "auto"}
    assert "ran" not in told(scenario, "identification.recorded")[0]
    assert told(scenario, "identification.recorded")[1]["ran"] == rounded.ran
    assert rounded.head_loss == pytest.approx(usual.head_loss, rel=0.05)
    own, other = (selected_by(scenario, found) for found in (usual, rounded))
    assert len(own) > 20
    assert len(own & other) > 0.6 * len(own)
    again = scenario.identify("animals", **attributed, seed=1)
    assert again.reused
    assert again.ran == rounded.ran


def test_a_loss_is_not_differentiated_where_a_part_lies_on_disk_but_a_forward_pass_is_enough_for_damage(
    scenario: Scenario,
) -> None:
    there = placed(scenario, Placement(ON_DISK))
    with pytest.raises(UnsupportedModelError, match="no loss can be differentiated"):
        there.identify("animals", score="attribution")
    found = there.identify("animals", score="damage")
    assert found.neurons_selected == scenario.identify("animals", score="damage", seed=1).neurons_selected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_kind_of_measuring_runs_in_sixteen_bits(
    scenarios: Scenarios, trios: Trios, adapter_trios: Trios, dtype: Precision
) -> None:
    directions = {"operation": "subspace", "protect": "directions", "directions": 4}
    for trio in (trios(), adapter_trios(on_aligned=False)):
        scenario = placed(scenarios(trio), Placement("auto", dtype))
        for settings in (
            *({"score": "wanda"}, {"score": "contrast"}, {"score": "damage", "operation": "subspace"}),
            {**directions, "direction_choice": "attribution", "gradient_models": "aligned+head", "stop_at": 1.25},
        ):
            found = scenario.identify("animals", **settings)
            assert found.neurons_selected or found.directions
        transplanted = run_identification(scenario.workspace, "line", "animals", NlsrSettings(**PLAIN_NLSR))
        assert transplanted.ran == {"dtype": dtype, "device_map": "auto"}


# --- patching and evaluating


def test_a_patch_is_the_same_bytes_in_whatever_format_it_was_judged(
    trios: Trios, scenarios: Scenarios, tmp_path: Path
) -> None:
    written = []
    for dtype in ("float32", "bfloat16", "float16"):
        (tmp_path / dtype).mkdir()
        scenario = scenarios(trios())
        gates = f'[gates]\nsmallest_drop = 0\nmax_new_tokens = 2\ndtype = "{dtype}"\n'
        put_in_force(scenario.workspace, tmp_path / dtype, gates)
        plan = scenario.plan("animals")
        # What the command says of the format changes nothing: the policy names it.
        summary = apply_patch(placed(scenario, Placement("cpu", "bfloat16")).workspace, plan)
        assert summary.state == "applied"
        found = [one.generation.get("dtype", "float32") for one in recorded(scenario, "harmfulness")]
        assert found == [dtype, dtype]
        written.append(digests(scenario.working))
        scenario.require_sound()
    assert written[0] == written[1] == written[2]


def test_answers_in_another_format_are_others_and_the_record_says_in_which(scenario: Scenario) -> None:
    rounded = placed(scenario, Placement("cpu", "bfloat16"))
    for each in (scenario, rounded, scenario, rounded):
        evaluate(each.workspace, each.name, SHORT)
    generated = [event["figures"][0] for event in told(scenario, "evaluation.recorded")]
    n = generated[0]["n"]
    assert [one["answers_from_store"] for one in generated] == [0, 0, n, n]
    dtypes = [one.generation.get("dtype") for one in recorded(scenario, "harmfulness")]
    assert dtypes == [None, "bfloat16", None, "bfloat16"]


def test_distributions_are_recorded_with_where_they_were_computed(scenario: Scenario, tmp_path: Path) -> None:
    file = tmp_path / "benign.jsonl"
    file.write_text('{"prompt": "how do i feed a dog ?"}\n{"prompt": "tell me a good story"}\n')
    request = replace(SHORT, dimensions=(), kl=PromptSource(str(file)), against="subject")
    scenario.apply("animals", budget=0.5)
    values = [
        [one.value for one in evaluate(each.workspace, each.name, request) if one.unit == "nats"]
        for each in (scenario, placed(scenario, Placement(ON_DISK)))
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert [one.generation.get("device_map") for one in recorded(scenario, "kl_subject")] == [None, ON_DISK]


# --- the command


def test_the_command_takes_both_from_options_or_the_environment(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, torch.dtype]] = []
    load = Placement.load

    def noted(self: Placement, path: Path, base: Path | None = None) -> Any:
        model = load(self, path, base)
        seen.append((self.device_map, next(model.parameters()).dtype))
        return model

    monkeypatch.setattr(Placement, "load", noted)
    database = ["--database", scenario.workspace.registry.url]
    short = ["evaluate", "line", "--dimension", "animals", "--max-new-tokens", "2", *database]
    assert CliRunner().invoke(main, [*short, "--device-map", "cpu", "--dtype", "bfloat16"]).exit_code == 0
    monkeypatch.setenv("NEURONLEDGER_DEVICE_MAP", "auto")
    monkeypatch.setenv("NEURONLEDGER_DTYPE", "float16")
    assert CliRunner().invoke(main, short).exit_code == 0
    assert seen == [("cpu", torch.bfloat16), ("auto", torch.float16)]

    refused = CliRunner().invoke(main, [*short, "--device-map", "cuda:97", "--fresh"])
    assert refused.exit_code == 2
    assert "there is no device cuda:97 here" in refused.output
