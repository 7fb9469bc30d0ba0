"""The bill of materials is valid CycloneDX 1.6, holds what the registry holds, and is the same for the same state."""

import hashlib
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from cli import main
from governance import bill_of_materials as module
from governance.bill_of_materials import bill_of_materials, bom_text
from governance.card_data import Card
from governance.errors import InputError
from governance.lineages import create_lineage
from governance.patching import revert_patch
from governance.report_glance import glance
from governance.workspace import Workspace
from registry.errors import RecordNotFoundError
from tests.governance.carded import BEFORE, NOW, measure
from tests.governance.conftest import Scenarios, Trios
from tests.governance.made_reports import made_report
from tests.governance.scenarios import Scenario, build
from tests.governance.test_model_card import HOSTILE, made_card


def read(text: str) -> dict[str, Any]:
    """A bill of materials, held against the schema that the library carries."""
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    content: dict[str, Any] = json.loads(text)
    references = [component["bom-ref"] for component in _components(content)]
    assert len(references) == len(set(references))
    assert {entry["ref"] for entry in content["dependencies"]} <= set(references)
    return content


def _components(content: Any) -> list[dict[str, Any]]:
    """Every component, however deep."""
    if isinstance(content, list):
        return [found for item in content for found in _components(item)]
    if not isinstance(content, dict):
        return []
    inner = [found for item in content.values() for found in _components(item)]
    return [content, *inner] if {"type", "name", "bom-ref"} <= content.keys() else inner


def facts(component: dict[str, Any]) -> dict[str, str]:
    return {one["name"].removeprefix("neuronledger:"): one["value"] for one in component["properties"]}


def test_the_same_state_gives_the_same_bytes_on_both_databases(
    workspace: Workspace, trios: Trios, prompts: Path, tmp_path: Path
) -> None:
    scenario = build(workspace, trios(), prompts)
    before = measure(scenario, BEFORE, tmp_path / "task.jsonl")
    first = scenario.apply("animals")
    now = measure(scenario, NOW, tmp_path / "task.jsonl")
    text = bill_of_materials(workspace, "line")
    content = read(text)
    patched = content["metadata"]["component"]
    metrics = patched["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [(one["type"], one["value"], one["confidenceInterval"]) for one in metrics] == [
        (
            found.metric,
            json.dumps(found.value),
            {"lowerBound": json.dumps(found.interval_low), "upperBound": json.dumps(found.interval_high)},
        )
        for pair in zip(before, now, strict=True)
        for found in pair
    ]
    assert facts(patched)["patch:1:neurons-modified"] == str(first.neurons_modified)
    assert [one["resolves"][0]["name"] for one in patched["pedigree"]["patches"]] == ["animals"]

    create_lineage(workspace, "other", subject="subject", aligned="aligned", base="base")
    with pytest.raises(RecordNotFoundError):
        revert_patch(workspace, "line", 7)
    later = Workspace(workspace.registry, "somebody else", lambda: workspace.clock() + timedelta(days=9))
    assert bill_of_materials(later, "line") == text

    measure(scenario, NOW, tmp_path / "task.jsonl")
    measured = read(bill_of_materials(workspace, "line"))
    assert measured["serialNumber"] == content["serialNumber"]
    assert measured["version"] == content["version"] + len(now)
    scenario.apply("weapons")
    assert read(bill_of_materials(workspace, "line"))["serialNumber"] != content["serialNumber"]


@pytest.mark.parametrize("form", ["full", "LoRA", "NLSR", "no patch"])
def test_files_have_the_digests_that_they_were_recorded_with(
    form: str, scenarios: Scenarios, trios: Trios, adapter_trios: Trios
) -> None:
    scenario = scenarios(adapter_trios(on_aligned=True) if form == "LoRA" else trios())
    if form != "no patch":
        scenario.apply("animals", method="nlsr" if form == "NLSR" else "fgsn")
    content = read(bill_of_materials(scenario.workspace, "line"))
    patched = content["metadata"]["component"]
    for model, place in ((patched, scenario.working), (_model(content, "subject"), scenario.trio.subject)):
        for file in model["components"]:
            hashes = {one["alg"]: one["content"] for one in file.get("hashes", ())}
            sha256 = hashlib.sha256((place / file["name"]).read_bytes()).hexdigest()
            assert hashes == {"SHA-256": sha256} or (not hashes and len(facts(file)["digest:tree"]) == 64)
    dependencies = {entry["ref"]: entry.get("dependsOn", []) for entry in content["dependencies"]}
    assert dependencies["patched-model"] == ["model:aligned", "model:base", "model:subject"]
    assert dependencies["model:subject"] == (["model:aligned"] if form == "LoRA" else [])
    assert ("patch:1:reference" in facts(patched)) == (form == "NLSR")
    assert patched["pedigree"]["ancestors"][0]["name"] == "subject"
    assert "patches" not in patched["pedigree"] or form != "no patch"


def _model(content: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in content["components"] if one["bom-ref"] == f"model:{name}"]
    return dict(found)


def test_prompt_sets_are_data_components_by_digest(scenario: Scenario) -> None:
    scenario.apply("animals")
    content = read(bill_of_materials(scenario.workspace, "line"))
    held = [one for one in content["components"] if one["type"] == "data"]
    assert {facts(one)["purpose"] for one in held} == {"harmful", "benign", "heldout"}
    for one in held:
        (digest,) = one["hashes"]
        kept = scenario.workspace.store.read_bytes(digest["content"])
        assert hashlib.sha256(kept).hexdigest() == digest["content"]
        assert len(kept.splitlines()) == int(facts(one)["rows"])
    named = content["metadata"]["component"]["modelCard"]["modelParameters"]["datasets"]
    assert {one["ref"] for one in named} == {one["bom-ref"] for one in held}


@pytest.mark.parametrize("name", [HOSTILE, "\u202eevil", "ünïcödé 漢字", "x" * 255])
def test_any_name_has_a_form_in_the_schema(name: str) -> None:
    patched = read(bom_text(made_card(name)))["metadata"]["component"]
    assert patched["name"] == name
    assert facts(patched)["patch:1:reason"] == f"because of {name}"


def test_ten_patches_keep_their_numbers() -> None:
    report = made_report(tuple(f"dimension {number}" for number in range(1, 13)))
    card: Card = replace(made_card("line"), report=report, glance=glance(report))
    card = replace(card, model_files={model.name: () for model in report.models})
    patched = read(bom_text(card))["metadata"]["component"]
    resolved = {one["resolves"][0]["id"]: one["resolves"][0]["name"] for one in patched["pedigree"]["patches"]}
    assert resolved == {f"patch {number}": f"dimension {number}" for number in range(1, 12)}
    assert "patch 12 (dimension 12) was taken back" in patched["pedigree"]["notes"]


def test_without_the_extra_the_command_says_what_to_install(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "LIBRARIES", ("no_such_library",))
    arguments = ("model", "bom", "line", "--output", str(tmp_path / "bom.json"))
    refused = CliRunner().invoke(main, [*arguments, "--database", scenario.workspace.registry.url])
    assert refused.exit_code == 2
    assert "neuronledger[cards]" in refused.stderr
    assert not (tmp_path / "bom.json").exists()


def test_what_does_not_hold_against_the_schema_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "data_json", lambda _: [{"type": "no such type"}])
    with pytest.raises(InputError, match="no form in CycloneDX"):
        bom_text(made_card("line"))
