"""The demo: the whole path on a small model made on the spot, through the same use cases as the commands.

It makes the laboratory, registers its models and three dimensions, puts a policy into force, patches one dimension
after the other, measures every stage, has the policy refuse a patch with a bad setting, sets a control of random
neurons beside the patches at the same share, does the same with NLSR, patches one lineage by both methods, verifies
ledger and weights, reverts the last patch and proves that the bytes are back. At the end the evidence pack of the first
lineage is exported and verified.
"""

import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from algorithms.laboratory import Laboratory, build
from algorithms.settings import FgsnSettings, fgsn_settings
from governance.answer_store import DIRECTORY as ANSWERS
from governance.auditing import Verification, verify
from governance.catalogue import register_dimension, register_model
from governance.demo_gates import POLICY, GateFigures, refuse_bad_patch, set_demo_policy
from governance.demo_nlsr import COMBINED, NlsrFigures, show_nlsr
from governance.demo_nlsr import LINEAGES as NLSR_LINEAGES
from governance.demo_steps import (
    PatchFigures,
    StageFigures,
    measure_stage,
    patch_dimension,
    patch_figures,
    patch_sentence,
    prompt_source,
)
from governance.errors import InputError
from governance.lineages import create_lineage
from governance.pack_export import export_pack
from governance.pack_verification import verify_pack_file
from governance.patch_records import PatchSummary
from governance.patching import revert_patch
from governance.prompt_sets import read_prompt_set
from governance.proof_checks import Evidence
from governance.reporting import write_report
from governance.workspace import Progress, Workspace, create_registry, no_progress, open_workspace

LINEAGE = "demo"
CONTROL = "random-control"
SUMMARY = "summary.json"
REPORT = "report.html"
COMBINED_REPORT = "report-both-methods.html"
EVIDENCE = "evidence.zip"
_OWN_ENTRIES = (
    "registry.db",
    "registry.db-wal",
    "registry.db-shm",
    "ledger-heads.jsonl",
    ANSWERS,
    "artifacts",
    "lineages",
    "scratch",
    SUMMARY,
    REPORT,
    COMBINED_REPORT,
    EVIDENCE,
    POLICY,
)


@dataclass(frozen=True)
class DemoSummary:
    """Everything that the demo shows; written to `summary.json`."""

    seed: int
    settings: dict[str, Any]
    stages: tuple[StageFigures, ...]
    patches: tuple[PatchFigures, ...]
    control_stages: tuple[StageFigures, ...]
    control_patches: tuple[PatchFigures, ...]
    nlsr: NlsrFigures
    gates: GateFigures
    ledger: dict[str, Any]
    weights: dict[str, bool]
    heldout_prompts: dict[str, int]
    report: str
    combined_report: str
    evidence: dict[str, Any]
    seconds: dict[str, float]
    next_command: str


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    actor: str = "demo",
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = no_progress,
) -> DemoSummary:
    """Run the whole path in `output` and write `summary.json` and the report there.

    Args:
        output: directory; what an earlier demo left there is replaced, the laboratory of the same seed is reused.
        seed: of the laboratory and of every draw.
        actor: name for the record.
        say: told each step in a sentence.
        progress: told how far long steps are.

    Raises:
        InputError: the directory holds something else.
    """
    started = time.monotonic()
    _clear(output)
    say("Making a base, an aligned and a fine-tuned model in an invented language.")
    laboratory = build(output / "laboratory", seed, progress)
    built = time.monotonic()
    database = f"sqlite:///{output / 'registry.db'}"
    create_registry(database)
    workspace = open_workspace(database, actor, progress)
    settings = fgsn_settings("default", {"seed": seed})
    say("Registering three models, three safety dimensions and five lineages.")
    names = _register(workspace, laboratory)
    stages = [measure_stage(workspace, laboratory, LINEAGE, stage) for stage in ("base", "aligned", "subject")]
    set_demo_policy(workspace, LINEAGE, laboratory, output)
    patches: list[PatchSummary] = []
    for name in names:
        patches.append(patch_dimension(workspace, LINEAGE, name, settings, "default"))
        say(patch_sentence(patches[-1]))
        stages.append(measure_stage(workspace, laboratory, LINEAGE, "head", f"after {name}"))
    passed = sum(patch.state == "applied" and bool(patch.gates) for patch in patches)
    gates = replace(refuse_bad_patch(workspace, LINEAGE, names[0], settings, say), passed=passed)
    control, control_stages = _control(workspace, laboratory, names, settings, patches, say)
    nlsr = show_nlsr(workspace, laboratory, names, settings, say)
    checked = verify(workspace, weights=True)
    say(_verification_sentence(checked))
    reverted_exactly = _revert_last(workspace, patches[-1], say)
    export_pack(workspace, LINEAGE, output / EVIDENCE, artifacts=True)
    pack = verify_pack_file(output / EVIDENCE, Evidence())
    final = verify(workspace, weights=True)
    report = write_report(workspace, LINEAGE, output / REPORT)
    combined_report = write_report(workspace, COMBINED, output / COMBINED_REPORT)
    summary = DemoSummary(
        seed=seed,
        settings=settings.model_dump(mode="json"),
        stages=tuple(stages),
        patches=tuple(patch_figures(patch) for patch in patches),
        control_stages=tuple(control_stages),
        control_patches=tuple(patch_figures(patch) for patch in control),
        nlsr=nlsr,
        gates=gates,
        ledger={"events": final.checked["events"], "verified": checked.verified and final.verified},
        weights={"verified": checked.verified and final.verified, "reverted_exactly": reverted_exactly},
        heldout_prompts={
            each.name: len(read_prompt_set(prompt_source(each.heldout)).rows) for each in laboratory.dimensions
        },
        report=str(report),
        combined_report=str(combined_report),
        evidence={"pack": str(output / EVIDENCE), "verified": pack.verified},
        seconds={"laboratory": built - started, "governance": time.monotonic() - built},
        next_command=_evaluation(laboratory, database),
    )
    (output / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def _evaluation(laboratory: Laboratory, database: str) -> str:
    """The command that measures the head again; refusals are phrases of the invented language."""
    phrases = [word for phrase in laboratory.refusal_phrases for word in ("--refusal-phrase", phrase)]
    length = ("--max-new-tokens", str(laboratory.max_new_tokens))
    return shlex.join(["neuronledger", "evaluate", LINEAGE, *phrases, *length, "--database", database])


def _clear(output: Path) -> None:
    """Remove what an earlier demo left; refuse a directory that holds anything else, also another's registry."""
    if output.exists():
        known = {*_OWN_ENTRIES, "laboratory"}
        foreign = next(
            (entry.name for entry in output.iterdir() if entry.name not in known and not entry.name.startswith(".")),
            None,
        )
        if foreign is not None:
            raise InputError(f"{output} holds {foreign}, which no demo made", "name another directory with --output")
        if (output / "registry.db").exists() and not (output / "laboratory").is_dir():
            raise InputError(
                f"{output} holds a registry, and no laboratory, so no demo made it",
                "name another directory with --output",
            )
        for name in _OWN_ENTRIES:
            path = output / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)


def _register(workspace: Workspace, laboratory: Laboratory) -> list[str]:
    register_model(workspace, "base", laboratory.base, "base")
    register_model(workspace, "aligned", laboratory.aligned, "aligned")
    register_model(workspace, "finetuned", laboratory.finetuned, "subject")
    for dimension in laboratory.dimensions:
        register_dimension(
            workspace,
            dimension.name,
            {
                "harmful": prompt_source(dimension.harmful, "response"),
                "benign": prompt_source(dimension.benign, "response"),
                "heldout": prompt_source(dimension.heldout),
            },
            "placeholder words of an invented language",
        )
    for name in (LINEAGE, CONTROL, *NLSR_LINEAGES):
        create_lineage(workspace, name, subject="finetuned", aligned="aligned", base="base")
    return [dimension.name for dimension in laboratory.dimensions]


def _control(
    workspace: Workspace,
    laboratory: Laboratory,
    names: list[str],
    settings: FgsnSettings,
    patches: list[PatchSummary],
    say: Callable[[str], None],
) -> tuple[list[PatchSummary], list[StageFigures]]:
    """Random neurons in place of chosen ones: the same operation, the same share after every step."""
    say("Setting a control beside it: random neurons, the same operation, the same share.")
    applied, stages = [], []
    share = 0.0
    for name, patch in zip(names, patches, strict=True):
        share += patch.modified_linear_share
        if patch.neurons_modified:
            random = settings.model_copy(update={"score": "random", "selection": "budget", "budget": min(share, 1.0)})
            applied.append(patch_dimension(workspace, CONTROL, name, random, "random-control"))
        stages.append(measure_stage(workspace, laboratory, CONTROL, "head", f"after {name}"))
    return applied, stages


def _revert_last(workspace: Workspace, last: PatchSummary, say: Callable[[str], None]) -> bool:
    """Revert the last patch and compare the weights' digest, hashed from the files, with that before the patch."""
    reverted = revert_patch(workspace, LINEAGE, last.patch, "demo: prove that it can be taken back")
    with workspace.registry.read() as session:
        from registry import queries

        digest = queries.get_lineage(session, LINEAGE).state_digest
    exact = digest == last.digest_before
    say(
        f"Reverted patch {reverted.patch} ({reverted.dimension}): the weights "
        f"{'have their former digest' if exact else 'DO NOT have their former digest'} {last.digest_before[:16]}…"
    )
    return exact


def _verification_sentence(checked: Verification) -> str:
    counts = ", ".join(f"{count:,} {what}" for what, count in checked.checked.items())
    return f"Verified {counts}: {'everything agrees' if checked.verified else 'FINDINGS, see audit verify'}."
