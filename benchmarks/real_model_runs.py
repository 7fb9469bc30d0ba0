"""What the real-model benchmark runs: every method, grid point and control as data.

A further preset is one line of `MAIN`, and one more for its control; `controls` names what it is compared with, beside
SafeLoRA, by a paired test:

    Run("mine", settings(preset="mine"), "ours", "main", ("mine-random",), every_stage=True, quick=True),
    Run("mine-random", settings("score=random", preset="mine"), "control", "main"),

A preset that claims directions has random ones (`basis=random`) as its control instead. A run with `entries` is a
checkpoint (`real_model_entries.py`) instead of patches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from real_model_prompts import DIMENSIONS as _CATEGORIES

DIMENSIONS = tuple(_CATEGORIES)
SAFELORA = "safelora"

Family = Literal["ours", "published", "baseline", "control"]
Part = Literal["main", "grid", "nlsr"]
PARTS: tuple[Part, ...] = ("main", "grid", "nlsr")


@dataclass(frozen=True)
class Run:
    """One lineage of the benchmark: the dimensions patched one after the other with the same settings.

    Attributes:
        name: of the run and of its lineage.
        options: of `patch apply`.
        family: for the plot.
        part: of the benchmark that it belongs to.
        controls: runs with the same budget and blocks that know nothing of harm.
        dimensions: patched in this order.
        every_stage: whether it is measured after every patch, or after the last one only.
        quick: whether `--quick` runs it.
        entries: share of the linear modules' single entries to put back at random; None for a run of patches.
    """

    name: str
    options: tuple[str, ...]
    family: Family
    part: Part
    controls: tuple[str, ...] = ()
    dimensions: tuple[str, ...] = DIMENSIONS
    every_stage: bool = False
    quick: bool = False
    entries: float | None = None


def settings(*assignments: str, preset: str = "default", method: str = "fgsn") -> tuple[str, ...]:
    """Options of `patch apply` for a preset with some settings replaced."""
    return (
        *("--method", method, "--preset", preset),
        *(part for assignment in assignments for part in ("--set", assignment)),
    )


_ALL_ROWS = ("score=random", "selection=budget", "budget=1", "layers=all")

_DAMAGE_SUBSPACE = (
    "score=damage",
    "operation=subspace",
    "budget=0.6",
    "tokens=prompt+header+answer",
    "answer_tokens=12",
)

_RANDOM_DIRECTIONS = ("basis=random", "direction_choice=leading")

MAIN = (
    # What could be had at most by whole rows: every linear module as it was in the aligned model.
    Run("undo-all", settings("operation=restore", *_ALL_ROWS), "baseline", "main", dimensions=DIMENSIONS[:1]),
    # Every module by C = V Vᵀ/‖V‖_F (its threshold at the top of its range).
    Run(
        SAFELORA,
        settings("operation=project", "normalization=fro", *_ALL_ROWS),
        "baseline",
        "main",
        dimensions=DIMENSIONS[:1],
        quick=True,
    ),
    Run("fgsn-paper", settings(preset="fgsn-paper"), "published", "main", ("fgsn-paper-random",), every_stage=True),
    Run("fgsn-paper-random", settings("score=random", preset="fgsn-paper"), "control", "main"),
    Run(
        "sparse",
        settings(preset="sparse"),
        "ours",
        "main",
        ("sparse-random", "entries-random"),
        every_stage=True,
        quick=True,
    ),
    # The same ranking, but each patch takes rows until its budget is used up.
    Run("sparse-whole-budget", settings("stop_at=0", preset="sparse"), "ours", "main", ("sparse-random",)),
    # One draw of at least as many rows as three dimensions of `sparse` come to.
    Run(
        "sparse-random",
        settings("score=random", "budget=0.15", preset="sparse"),
        "control",
        "main",
        dimensions=DIMENSIONS[:1],
        quick=True,
    ),
    # As large a share of all entries, each drawn by itself; no rows, so no patches.
    Run("entries-random", (), "control", "main", dimensions=(), entries=0.15),
    Run(
        "strong",
        settings(preset="strong"),
        "ours",
        "main",
        ("strong-random", "strong-random-64"),
        every_stage=True,
        quick=True,
    ),
    # The leading directions of the preset as it was, whatever they gain.
    Run(
        "strong-leading",
        settings("direction_choice=leading", "directions=16", preset="strong"),
        "ours",
        "main",
        ("strong-random",),
    ),
    # As many random directions as that, and as many as `strong` chooses from.
    Run(
        "strong-random", settings(*_RANDOM_DIRECTIONS, "directions=16", preset="strong"), "control", "main", quick=True
    ),
    Run("strong-random-64", settings(*_RANDOM_DIRECTIONS, "directions=64", preset="strong"), "control", "main"),
    Run("damage-subspace", settings(*_DAMAGE_SUBSPACE), "ours", "main", ("damage-subspace-random",)),
    Run("damage-subspace-random", settings("score=random", *_DAMAGE_SUBSPACE[1:]), "control", "main"),
    Run("nlsr-default", settings(method="nlsr"), "published", "main", ("nlsr-default-random",), every_stage=True),
    Run("nlsr-default-random", settings("region_score=random", method="nlsr"), "control", "main"),
)

_POINT = {"score": "damage", "operation": "restore", "layers": "all", "budget": "0.1"}
"""The grid's point from which one axis at a time is left."""


def _grid_run(**changed: str) -> Run:
    values = _POINT | changed
    control = values["score"] in {"random", "update-norm"}
    assignments = ("selection=budget", "ranking=all", *(f"{key}={value}" for key, value in values.items()))
    controls = () if control else (_grid_name(values | {"score": "random"}),)
    return Run(_grid_name(values), settings(*assignments), "control" if control else "ours", "grid", controls)


def _grid_name(values: dict[str, str]) -> str:
    return "-".join(("grid", *values.values())).replace("..", "to")


def _grid() -> Iterable[Run]:
    """One axis at a time, each point with random rows at the same budget, blocks and operation where those differ."""
    for score in ("damage", "wanda", "activation", "contrast", "update-norm", "random"):
        yield _grid_run(score=score)
    for operation in ("project", "complement"):
        yield replace(_grid_run(operation=operation), controls=())
    for score in ("damage", "random"):
        yield _grid_run(operation="subspace", score=score)
        for layers in ("window", "value", "15..29"):
            yield _grid_run(layers=layers, score=score)
        for budget in ("0.25", "0.5"):
            for operation in ("restore", "subspace"):
                yield _grid_run(budget=budget, operation=operation, score=score)
    yield replace(_grid_run(budget="0.05"), controls=())


GRID = tuple(_grid())

BETAS = (0.0, 0.5, 0.9, 1.5)
_REGIONS = (0.2, 0.5)
_CONTROL_BETAS = (0.0, 0.9, 1.5)


def _nlsr_run(form: str, beta: float, region: float) -> Run:
    name = f"nlsr-{form}-beta{beta:g}-region{region:g}"
    assignments = [f"beta={beta:g}", f"sparsity={1 - region:g}", f"form={'factor' if form == 'factor' else 'neuron'}"]
    if form == "random":
        return Run(name, settings("region_score=random", *assignments, method="nlsr"), "control", "nlsr")
    # The factor form claims every neuron of a module, so a second dimension finds the modules taken.
    dimensions = DIMENSIONS[:1] if form == "factor" else DIMENSIONS
    controlled = form == "neuron" and region == _REGIONS[0] and beta in _CONTROL_BETAS
    controls = (f"nlsr-random-beta{beta:g}-region{region:g}",) if controlled else ()
    return Run(name, settings(*assignments, method="nlsr"), "published", "nlsr", controls, dimensions)


NLSR = (
    *(_nlsr_run("neuron", beta, region) for beta in BETAS for region in _REGIONS),
    *(_nlsr_run("random", beta, _REGIONS[0]) for beta in _CONTROL_BETAS),
    *(_nlsr_run("factor", beta, _REGIONS[0]) for beta in BETAS),
)

RUNS = (*MAIN, *GRID, *NLSR)


def chosen(parts: Sequence[Part], form: str, *, quick: bool = False) -> tuple[Run, ...]:
    """The runs of some parts, in the table's order.

    Args:
        parts: of the benchmark.
        form: of the subject; a full checkpoint has no factors to exchange entries of.
        quick: only what `--quick` runs, one dimension each.
    """
    runs = [run for run in RUNS if run.part in parts and (form == "lora" or "form=factor" not in run.options)]
    if quick:
        runs = [replace(run, dimensions=run.dimensions[:1]) for run in runs if run.quick]
    return tuple(runs)
