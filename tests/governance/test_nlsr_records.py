"""What NLSR leaves behind: tables, reports, recovery, replay, exports; and the same by commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from algorithms.checkpoints import Checkpoint
from cli import main
from governance.auditing import verify
from governance.identification import run_identification
from governance.patch_import import import_patch
from governance.patching import apply_patch
from governance.planning import plan_patch
from governance.recovery import RecoveryAction, recover
from governance.replay import replay
from governance.reporting import write_report
from tests.governance.conftest import Scenarios, Trios
from tests.governance.exchange import export_to
from tests.governance.faults import Fault, flip_byte, struck_by
from tests.governance.report_pages import read_page
from tests.governance.scenarios import (
    Scenario,
    digests,
    plain_nlsr,
    settings_of,
)

FACTOR: dict[str, Any] = {"method": "nlsr", "form": "factor", "sparsity": 0.5}


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
    for name, chosen in (("chance", plain_nlsr(region_score="random")), ("other", settings_of(score="random"))):
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
    # How its neurons were found stayed there, so the patch is found anew here.
    assert there.apply("animals", **chosen).digest_after == here.patch(1).digest_after


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
