"""How long the registry takes to answer: every list and every question, on a million protected neurons.

    python benchmarks/questions.py [--neurons 1000000] [--events 100000] [--directory DIR] [--json FILE]

Makes a registry in SQLite with a lineage of Llama 3 8B's modules, ten patches of five dimensions that protect so many
neurons altogether (one of them in the place of a reverted one), and a ledger of so many events. Rows go in by SQL, so
that this takes half a minute. Then every use case of a list or a question is asked a few times in one process, the
cache of the file system warm, and its fastest answer stands beside a plain SELECT that reads the table that it is
about: on a machine that does other work too, look at processor time beside the clock. Exits with 1 if one takes longer
than two seconds.
"""

import argparse
import json
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from questions_registry import CREATED, LINEAGE, MODULES, Size, make_registry
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

from governance.capacity import capacity
from governance.catalogue import list_dimensions, list_models
from governance.event_log import LogQuery, audit_log
from governance.lineages import list_lineages
from governance.moments import parse_moment
from governance.neuron_history import neuron_history
from governance.overlap import overlaps
from governance.patch_records import list_patches, show_patch
from governance.state_diff import diff_states
from governance.timeline import lineages_at
from governance.workspace import Workspace
from registry.database import Registry

LIMIT_SECONDS = 2.0
MODULE = MODULES[3]
BASELINES = {
    "claims": "SELECT count(*) FROM protected_neurons WHERE patch_id >= 0",
    "identified": "SELECT count(*) FROM identified_neurons WHERE score IS NOT NULL",
    "events": "SELECT count(*) FROM ledger_events WHERE length(payload) > 0",
    "patches": "SELECT count(*) FROM patch_modules WHERE parameters > 0",
}
"""Table → a SELECT that reads it whole and counts."""


@dataclass(frozen=True)
class Answer:
    """What one question took.

    Attributes:
        answers: records in the answer.
        seconds: of the fastest answer, and those of them that the processor worked.
        baseline: the plain SELECT that reads the same table, and its fastest answer.
    """

    question: str
    answers: int
    seconds: float
    processor_seconds: float
    baseline: str
    baseline_seconds: float

    @property
    def holds(self) -> bool:
        """Whether it was answered in time."""
        return self.seconds < LIMIT_SECONDS


def questions(workspace: Workspace) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Question → the baseline's table, and what asks it."""

    def log(**query: Any) -> Callable[[], Any]:
        return lambda: audit_log(workspace, LogQuery(**query))

    def sql(query: str) -> Callable[[], Any]:
        def ask() -> Any:
            with workspace.registry.read() as session:
                return session.execute(text(query)).all()

        return ask

    late = parse_moment(datetime.fromtimestamp(CREATED + 90_000, UTC).isoformat())
    return {
        "model list": ("patches", lambda: list_models(workspace)),
        "dimension list": ("patches", lambda: list_dimensions(workspace)),
        "lineage list": ("claims", lambda: list_lineages(workspace)),
        "patch list": ("patches", lambda: list_patches(workspace, LINEAGE)),
        "patch show": ("patches", lambda: show_patch(workspace, LINEAGE, 1)),
        "audit log": ("events", log()),
        "audit log --newest-first --limit 20": ("events", log(newest_first=True, limit=20)),
        "audit log --since": ("events", log(since=late)),
        "audit log --action patch": ("events", log(actions=("patch",))),
        "audit log --by": ("events", log(actor="bob")),
        "audit log --lineage --limit 20": ("events", log(lineage=LINEAGE, limit=20)),
        "audit log --dimension": ("events", log(dimension="dimension 2")),
        "audit log --model --action patch": ("events", log(model="subject", actions=("patch",))),
        "audit log --module": ("events", log(module=MODULE.removeprefix("model."))),
        "audit neuron": ("identified", lambda: neuron_history(workspace, LINEAGE, MODULE, 17)),
        "audit at": ("events", lambda: lineages_at(workspace, "2100-01-01")),
        "audit diff subject head": ("patches", lambda: diff_states(workspace, LINEAGE, "subject", "head")),
        "audit diff 10 head": ("identified", lambda: diff_states(workspace, LINEAGE, "10", "head")),
        "audit overlap": ("identified", lambda: overlaps(workspace, LINEAGE)),
        "audit capacity": ("claims", lambda: capacity(workspace, LINEAGE)),
        "audit capacity --by kind": ("claims", lambda: capacity(workspace, LINEAGE, "kind")),
        "audit capacity --by total": ("claims", lambda: capacity(workspace, LINEAGE, "total")),
        "v_patches": ("patches", sql("SELECT * FROM v_patches")),
        "v_protected_neurons, one module": (
            "claims",
            sql(f"SELECT * FROM v_protected_neurons WHERE lineage = '{LINEAGE}' AND module = '{MODULE}'"),
        ),
        "v_protected_neurons, by dimension": (
            "claims",
            sql("SELECT lineage, dimension, count(*) FROM v_protected_neurons GROUP BY lineage, dimension"),
        ),
        "v_neuron_history, one neuron": (
            "identified",
            sql(
                "SELECT * FROM v_neuron_history "
                f"WHERE lineage = '{LINEAGE}' AND module = '{MODULE}' AND neuron = 17 ORDER BY happened_at"
            ),
        ),
        "v_capacity": ("claims", sql(f"SELECT * FROM v_capacity WHERE lineage = '{LINEAGE}'")),
        "v_events, the last 20": ("events", sql("SELECT * FROM v_events ORDER BY event DESC LIMIT 20")),
        "v_events, of a dimension": ("events", sql("SELECT * FROM v_events WHERE dimension = 'dimension 2'")),
    }


def measure(workspace: Workspace, times: int) -> list[Answer]:
    """Ask everything; the first answer, which fills the cache, does not count."""
    with sqlite3.connect(str(workspace.registry.engine.url.database)) as connection:
        baselines = {
            name: _fastest(lambda query=query: connection.execute(query).fetchall(), times)[1]  # type: ignore[misc]
            for name, query in BASELINES.items()
        }
    found = []
    for question, (table, ask) in questions(workspace).items():
        answer, seconds, processor = _fastest(ask, times)
        count = len(answer) if isinstance(answer, list) else 1
        found.append(Answer(question, count, seconds, processor, table, baselines[table]))
    return found


def _fastest(ask: Callable[[], Any], times: int) -> tuple[Any, float, float]:
    answer = ask()
    taken = []
    for _ in range(times):
        begin, worked = time.perf_counter(), time.process_time()
        ask()
        taken.append((time.perf_counter() - begin, time.process_time() - worked))
    return answer, *min(taken)


def show(answers: Sequence[Answer]) -> None:
    """Print the table, and the queries of its baselines."""
    table = Table(title="Seconds of each question", title_justify="left")
    for column, justify in (
        ("question", "left"),
        ("answers", "right"),
        ("seconds", "right"),
        ("processor", "right"),
        ("reading the table", "right"),
        ("table", "left"),
        (f"within {LIMIT_SECONDS:.0f} s", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for answer in answers:
        table.add_row(
            answer.question,
            f"{answer.answers:,}",
            f"{answer.seconds:.3f}",
            f"{answer.processor_seconds:.3f}",
            f"{answer.baseline_seconds:.3f}",
            answer.baseline,
            "holds" if answer.holds else "FAILS",
        )
    Console(width=120).print(table)
    for name, query in BASELINES.items():
        print(f"Reading {name}: {query}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the registry, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=1_000_000, help="protected neurons")
    parser.add_argument("--events", type=int, default=100_000, help="ledger events")
    parser.add_argument("--times", type=int, default=5, help="how often each question is asked")
    parser.add_argument("--directory", type=Path, help="where the registry is made; a temporary directory if left out")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    chosen = parser.parse_args(arguments)
    size = Size(chosen.neurons, chosen.events)
    if chosen.directory is not None:
        chosen.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        begin = time.perf_counter()
        url = make_registry(Path(directory), size)
        print(f"Made the registry in {time.perf_counter() - begin:.0f} s.")
        with Registry.open(url) as registry:
            answers = measure(Workspace(registry=registry, actor="ada"), chosen.times)
        show(answers)
        if chosen.json:
            figures = {
                "size": asdict(size),
                "machine": {"system": platform.platform(), "python": platform.python_version(),
                            "sqlite": sqlite3.sqlite_version},
                "answers": [asdict(answer) for answer in answers],
            }  # fmt: skip
            chosen.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(answer.holds for answer in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
