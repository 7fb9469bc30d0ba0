"""The figures of the patching benchmark: kept in a JSON file, printed as tables, and set against what is wanted."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patching_measure import MIB, Cost, typical
from patching_records import LAYOUTS
from rich.console import Console
from rich.table import Table

PHASES = ("plan", "apply", "revert", "verify")
MEMORY_LIMIT = 3 * 32 + 64
"""MiB beyond imports that planning and patching may take (design, section 6): three row blocks and 64 MiB."""
SPREAD, SHARE_OF_LOAD_AND_SAVE, PROJECTION_GAIN, REFERENCE_SIZE = 0.2, 0.25, 10.0, 4.0


class Results:
    """Costs of every run by key, `(size, layout, operation, phase)` or shorter, kept in a file as they come."""

    def __init__(self, path: Path, parameters: dict[str, Any], machine: dict[str, str]) -> None:
        self._path = path
        self.parameters = parameters
        self.machine = machine
        self.costs: dict[str, list[Cost]] = {}
        self.bytes: dict[str, int] = {}

    @classmethod
    def open(cls, path: Path, parameters: dict[str, Any], machine: dict[str, str]) -> "Results":
        """Go on with what the file holds, if it was measured with the same parameters."""
        results = cls(path, parameters, machine)
        if path.is_file():
            held = json.loads(path.read_text())
            if held["parameters"] == parameters:
                results.costs = {key: [Cost(**cost) for cost in costs] for key, costs in held["costs"].items()}
                results.bytes = held["bytes"]
        return results

    @property
    def key(self) -> str:
        """What tells whether two measurements belong together."""
        return json.dumps(self.parameters, sort_keys=True)

    @property
    def sizes(self) -> list[float]:
        """The sizes measured, ascending."""
        return sorted(float(size) for size in self.bytes)

    def runs(self, *key: object) -> int:
        """How often a phase was measured."""
        return len(self.costs.get(_joined(key), ()))

    def get(self, *key: object) -> Cost | None:
        """What a phase took, the median of its runs."""
        costs = self.costs.get(_joined(key))
        return None if costs is None else typical(costs)

    def add(self, key: tuple[object, ...], cost: Cost) -> None:
        """Keep what one run of a phase took."""
        self.costs.setdefault(_joined(key), []).append(cost)
        self._save()

    def forget(self, *key: object) -> None:
        """Drop what was measured of a chain of phases."""
        begin = _joined(key) + "/"
        self.costs = {name: costs for name, costs in self.costs.items() if not name.startswith(begin)}

    def note_bytes(self, size: object, count: int) -> None:
        """Keep how large the checkpoint of a size is."""
        self.bytes[_joined((size,))] = count
        self._save()

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "parameters": self.parameters,
            "machine": self.machine,
            "bytes": self.bytes,
            "costs": {key: [asdict(cost) for cost in costs] for key, costs in self.costs.items()},
        }

    def memory_beyond_imports(self, size: object, *key: object) -> float | None:
        """Peak of a phase over that of a process that only imports the same and opens the registry, in MiB."""
        cost, imports = self.get(size, *key), self.get(size, "imports")
        return None if cost is None or imports is None else (cost.peak_memory - imports.peak_memory) / MIB

    def chains(self) -> list[tuple[str, str]]:
        """The (layout, operation) pairs that were measured, in order."""
        operations = dict.fromkeys(key.split("/")[2] for key in self.costs if key.count("/") == 3)
        return [(layout, operation) for layout in LAYOUTS for operation in operations]

    def _save(self) -> None:
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(self.document(), indent=1))
        temporary.replace(self._path)


@dataclass(frozen=True)
class Verdict:
    """A sentence with the measured numbers, and whether what was wanted holds."""

    text: str
    holds: bool

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS'}: {self.text}"


def print_report(results: Results) -> None:
    """Print the machine, the tables and the verdicts."""
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    for name, value in results.machine.items():
        console.print(f"{name}: {value}")
    console.print(
        "Files were read once before each phase and earlier writes flushed; 'from disk' says what the page cache had "
        "lost all the same. 'on cores' is processor time, which other work on the machine changes least. Where a phase "
        "ran several times, every figure is its median.\n"
    )
    for layout, operation in results.chains():
        console.print(chain_table(results, layout, operation))
    console.print(set_up_table(results))
    for line in projection_lines(results):
        console.print(line)
    for verdict in verdicts(results):
        console.print(str(verdict), soft_wrap=True)


def chain_table(results: Results, layout: str, operation: str) -> Table:
    """One layout and operation: every phase at every size."""
    table = Table(title=f"{layout}, operation {operation}", title_justify="left")
    table.add_column("phase")
    names = (
        "GB",
        "seconds",
        "per GB",
        "on cores",
        "of load+save",
        "MB read",
        "from disk",
        "MB written",
        "MiB beyond imports",
    )
    for name in names:
        table.add_column(name, justify="right")
    for phase in (*PHASES, "load+save"):
        for size in results.sizes:
            cost = results.get(size, layout, operation, phase)
            if cost is not None:
                memory = results.memory_beyond_imports(size, layout, operation, phase)
                base = results.get(size, layout, operation, "load+save")
                table.add_row(phase, *_cells(cost, base, results.bytes[_joined((size,))], memory))
    return table


def set_up_table(results: Results) -> Table:
    """What is done once: registering, creating the lineage; and a plain copy."""
    table = Table(title="once per model, and a plain copy (unflushed: without fsync)", title_justify="left")
    table.add_column("phase")
    for name in ("GB", "seconds", "unflushed", "on cores", "MB read", "from disk", "MB written", "MiB beyond imports"):
        table.add_column(name, justify="right")
    for phase in ("register base", "register aligned", "register subject", "create lineage", "copy", "load+save"):
        for size in results.sizes:
            chain = results.chains()[0] if results.chains() else ("", "")
            key = (size, *chain, phase) if phase == "load+save" else (size, phase)
            cost = results.get(*key)
            if cost is not None:
                memory = results.memory_beyond_imports(*key)
                unflushed = cost.figures.get("unflushed_seconds")
                gigabytes, seconds, _, busy, _, *rest = _cells(cost, None, results.bytes[_joined((size,))], memory)
                table.add_row(phase, gigabytes, seconds, "" if unflushed is None else f"{unflushed:.2f}", busy, *rest)
    return table


def _cells(cost: Cost, base: Cost | None, size: int, memory: float | None) -> tuple[str, ...]:
    gigabytes = size / 1e9
    return (
        f"{gigabytes:.2f}",
        f"{cost.seconds:.2f}",
        f"{cost.seconds / gigabytes:.2f}",
        f"{cost.processor_seconds:.2f}",
        "" if base is None else f"{cost.seconds / base.seconds:.3f}",
        f"{cost.read / 1e6:,.0f}",
        f"{cost.device_read / 1e6:,.0f}",
        f"{cost.written / 1e6:,.0f}",
        "" if memory is None else f"{memory:,.0f}",
    )


def projection_lines(results: Results) -> Iterator[str]:
    """Seconds per 4096 × 4096 module, the product's and the dense formula's."""
    dense = results.get("projection", "dense")
    if dense is None:
        return
    yield f"Projection of one 4096 × 4096 module, median of {dense.figures['modules']}, weights read included:"
    ways = {f"rows {share:g}": f"{share:.0%} of the rows" for share in (0.05, 0.2)}
    for way, title in {**ways, "dense": "SafeLoRA's dense formula"}.items():
        cost = results.get("projection", way)
        if cost is not None:
            seconds, on_cores = cost.figures["module_seconds"], cost.figures["module_cpu_seconds"]
            memory = results.memory_beyond_imports("projection", way)
            yield f"  {title}: {seconds:.3f} s, on cores {on_cores:.3f} s, peak {memory:,.0f} MiB beyond imports"


def verdicts(results: Results) -> Iterator[Verdict]:
    """What is wanted of memory and time, with what was measured."""
    for phase in PHASES:
        yield from _memory_verdicts(results, phase)
    for layout, operation in results.chains():
        yield from _time_verdict(results, layout, operation)
    rows, dense = results.get("projection", "rows 0.05"), results.get("projection", "dense")
    if rows is not None and dense is not None:
        gain, on_cores = (dense.figures[key] / rows.figures[key] for key in ("module_seconds", "module_cpu_seconds"))
        text = f"projecting 5 % of the rows of a 4096 × 4096 module is {gain:.1f} times as fast as the dense formula"
        counted = f"wanted {PROJECTION_GAIN:g}; in processor time {on_cores:.1f}"
        yield Verdict(f"{text} ({counted})", gain >= PROJECTION_GAIN)


def _memory_verdicts(results: Results, phase: str) -> Iterator[Verdict]:
    """The limit for all layouts and operations at once, the spread over sizes for each."""
    peaks = {
        chain: {
            size: memory
            for size in results.sizes
            if (memory := results.memory_beyond_imports(size, *chain, phase)) is not None
        }
        for chain in results.chains()
    }
    every = [memory for found in peaks.values() for memory in found.values()]
    if every:
        text = f"{phase}: at most {max(every):,.0f} MiB beyond imports (wanted {MEMORY_LIMIT})"
        yield Verdict(text, max(every) <= MEMORY_LIMIT)
    for (layout, operation), found in peaks.items():
        if len(found) > 1:
            spread = max(found.values()) / max(min(found.values()), 1.0) - 1
            told = ", ".join(f"{memory:,.0f} MiB at {size:g} GB" for size, memory in found.items())
            yield Verdict(
                f"{phase}, {layout}, {operation}: {told}, a spread of {spread:.0%} (wanted {SPREAD:.0%})",
                spread <= SPREAD,
            )


def _time_verdict(results: Results, layout: str, operation: str) -> Iterator[Verdict]:
    size = min(results.sizes, key=lambda size: abs(size - REFERENCE_SIZE), default=0.0)
    if abs(size - REFERENCE_SIZE) > 1:
        return
    apply, base = (results.get(size, layout, operation, phase) for phase in ("apply", "load+save"))
    if apply is None or base is None:
        return
    share = apply.seconds / base.seconds
    unflushed = apply.seconds / base.figures["unflushed_seconds"]
    yield Verdict(
        f"apply, {layout}, {operation}, {size:g} GB: {apply.seconds:.2f} s against {base.seconds:.2f} s of load and "
        f"save, {share:.2f} of it ({unflushed:.2f} of it without fsync; wanted {SHARE_OF_LOAD_AND_SAVE} at most); "
        f"on cores {apply.processor_seconds:.2f} s against {base.processor_seconds:.2f} s",
        share <= SHARE_OF_LOAD_AND_SAVE,
    )


def _joined(key: tuple[object, ...]) -> str:
    return "/".join(f"{part:g}" if isinstance(part, float) else str(part) for part in key)
