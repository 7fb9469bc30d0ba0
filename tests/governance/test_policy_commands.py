"""Policies and approvals on the command line: what is printed, what is JSON, and what a script can go by."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import main
from tests.governance.scenarios import PLAIN, Scenario, digests

POLICY = """
name = "release"

[gates]
largest_linear_share = {share}

[gates.accuracy.task]
prompts = "benign.jsonl"
largest_loss = 100

[approvals]
needed = 1

[roles]
approve = ["bob"]
"""


def run(scenario: Scenario, *arguments: str, actor: str = "ada") -> Result:
    url = f"sqlite:///{scenario.workspace.directory / 'registry.db'}"
    given = {"NEURONLEDGER_DATABASE": url, "NEURONLEDGER_ACTOR": actor}
    return CliRunner().invoke(main, list(arguments), env=given, catch_exceptions=False)


@pytest.fixture
def policy(prompts: Path) -> Path:
    """A policy file beside the prompts that it names by a relative path."""
    file = prompts / "policy.toml"
    file.write_text(POLICY.format(share=1))
    return file


def settings() -> list[str]:
    return [part for key, value in PLAIN.items() for part in ("--set", f"{key}={value}")]


def test_a_patch_goes_from_planned_to_applied(scenario: Scenario, policy: Path) -> None:
    assert run(scenario, "policy", "check", str(policy)).exit_code == 0
    assert "4 prompts for task_accuracy" in run(scenario, "policy", "check", str(policy)).stdout
    assert run(scenario, "policy", "set", str(policy), "--lineage", "line", "--reason", "first").exit_code == 0
    shown = json.loads(run(scenario, "policy", "show", "--lineage", "line", "--json").stdout)
    assert (shown["policy"]["approvals_needed"], shown["policy"]["roles"]) == (1, {"approve": ["bob"]})
    assert shown["content"] == policy.read_text()
    before = digests(scenario.working)

    planned = run(scenario, "patch", "apply", "line", "animals", *settings())
    assert planned.exit_code == 1
    assert "is planned" in planned.stdout
    assert "It waits for approval: 0 of 1" in planned.stdout
    refused = run(scenario, "patch", "approve", "line", "1", actor="ada")
    assert (refused.exit_code, "ada may not patch.approve" in refused.stderr) == (1, True)
    assert run(scenario, "patch", "apply", "line", "--planned", "1").exit_code == 1
    assert digests(scenario.working) == before
    approved = run(scenario, "patch", "approve", "line", "1", "--reason", "seen", actor="bob")
    assert approved.exit_code == 0
    assert "It is approved: neuronledger patch apply line --planned 1 writes it." in approved.stdout
    assert "waits" not in approved.stdout
    assert "patch approve" not in approved.stdout
    told = json.loads(run(scenario, "patch", "show", "line", "1", "--json").stdout)["patch"]
    assert [(each["actor"], each["decision"], each["reason"]) for each in told["approvals"]] == [
        ("bob", "approved", "seen")
    ]
    written = run(scenario, "patch", "apply", "line", "--planned", "1")
    assert (written.exit_code, "is applied" in written.stdout) == (0, True)
    assert digests(scenario.working) != before
    assert run(scenario, "audit", "verify", "--weights").exit_code == 0


def test_a_refused_patch_exits_with_one_and_prints_its_rules(scenario: Scenario, policy: Path) -> None:
    policy.write_text(POLICY.format(share=0))
    assert run(scenario, "policy", "set", str(policy)).exit_code == 0
    rehearsed = run(scenario, "patch", "apply", "line", "animals", "--dry-run", *settings())
    assert (rehearsed.exit_code, "FAILED" in rehearsed.stdout) == (1, True)
    assert "The policy refuses the patch; nothing was written." in rehearsed.stdout
    told = run(scenario, "patch", "apply", "line", "animals", "--json", *settings())
    summary = json.loads(told.stdout)
    assert (told.exit_code, summary["state"]) == (1, "rejected")
    assert [(rule["rule"], rule["passed"]) for rule in summary["gates"]] == [
        ("largest_linear_share", False),
        ("largest_loss", True),
    ]
    assert "FAILED" in run(scenario, "patch", "show", "line", "1").stdout
    listed = json.loads(run(scenario, "policy", "list", "--json").stdout)
    assert [(each["scope"], each["version"], each["in_force"]) for each in listed] == [("registry", 1, True)]


def test_mistakes_are_one_line(scenario: Scenario, policy: Path) -> None:
    for arguments, problem in {
        ("policy", "show"): "no policy is in force for the registry",
        ("policy", "show", "--lineage", "nope"): "no lineage named",
        ("policy", "set", str(policy.with_name("none.toml"))): "there is no policy file",
        ("patch", "apply", "line"): "name the DIMENSION",
        ("patch", "apply", "line", "animals", "--planned", "1"): "--planned takes no DIMENSION",
        ("patch", "apply", "line", "--planned", "1"): "has no patch 1",
        ("patch", "approve", "line", "1"): "has no patch 1",
    }.items():
        found = run(scenario, *arguments)
        assert found.exit_code == 2
        assert problem in found.stderr
        assert found.stderr.count("\n") == 1
