"""What planning, applying, reverting and verifying a patch cost, beside loading and saving the whole checkpoint.

    python benchmarks/patching.py --sizes 0.3,1,4 --directory DIR

Makes Llama-shaped checkpoints of about these sizes in GB, registers them, patches 5 % of the linear rows in two layouts
(5 % of every module; as many rows in every fourth block), and measures each phase in a process of its own: seconds,
bytes, highest resident set. Beside them: the same rows by load, assign and save, a plain copy, and SafeLoRA's dense
projection. The identification is written directly; the forward pass is not part of this benchmark.

Each phase runs after its input files were read once, so from the page cache as far as they fit, and after everything
written before was flushed; the baselines too. The phases of a patch run several times; figures are medians. Disk for
the largest size: about six times its size. What was measured with the same code and parameters is not measured again.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from patching_checkpoints import PROJECTION, ROLES, Shape, make_checkpoints, shape_of
from patching_measure import MIB, Cost, machine, warm
from patching_records import LAYOUTS, LINEAGE
from patching_report import Results, print_report

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = ("restore", "subspace")
SHARES = (0.05, 0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the tables."""
    options = _options(arguments)
    benchmark = Benchmark(options)
    if not options.no_projection:
        benchmark.projection()
    for size in options.sizes:
        benchmark.size(size)
    print_report(benchmark.results)
    if options.json:
        options.json.write_text(json.dumps(benchmark.results.document(), indent=2) + "\n")
    return 0


class Benchmark:
    """Runs phases in processes of their own and keeps what they took."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._directory: Path = options.directory
        self._directory.mkdir(parents=True, exist_ok=True)
        parameters = {"code": _code_digest(), "threads": options.threads, "seed": options.seed}
        self.results = Results.open(
            self._directory / "results.json", parameters, machine(self._directory, options.threads)
        )

    def size(self, size: float) -> None:
        """Measure one size, unless all of it was measured."""
        shape = shape_of(size)
        chains = [(layout, operation) for layout in LAYOUTS for operation in self._options.operations]
        missing = [chain for chain in chains if self.results.runs(size, *chain, "revert") < self.times]
        if not missing and self.results.runs(size, "copy"):
            return
        place = self._directory / f"size-{size:g}"
        _require_space(self._directory, place, 6 * shape.bytes)
        models = make_checkpoints(place / "models", shape, self._options.seed, _tell)
        runner = Runner(self, place, size, shape)
        if not runner.is_ready:
            runner.set_up(models)
        for layout, operation in missing:
            runner.chain(layout, operation, models)
        if not self.results.runs(size, "copy"):
            runner.measure("copy", ("copy",), [models["subject"]], source=models["subject"], target=place / "copy")
            shutil.rmtree(place / "copy")
        if not self._options.keep:
            shutil.rmtree(place)

    def projection(self) -> None:
        """Measure the projection of rows beside the dense formula, on modules of 4096 × 4096."""
        name = "projection"
        keys = [(name, f"rows {share:g}") for share in SHARES] + [(name, "dense")]
        if all(self.results.runs(*key) for key in keys):
            return
        place = self._directory / name
        models = make_checkpoints(place / "models", PROJECTION, self._options.seed, _tell)
        runner = Runner(self, place, name, PROJECTION)
        shutil.rmtree(place / "registry", ignore_errors=True)
        runner.run("create")
        inputs = list(models.values())
        runner.measure("imports", ("imports",), [])
        for share in SHARES:
            runner.measure("project rows", (f"rows {share:g}",), inputs, models=place / "models", share=share)
        runner.measure("project dense", ("dense",), inputs, models=place / "models")
        if not self._options.keep:
            shutil.rmtree(place)

    @property
    def threads(self) -> int:
        """Processor threads of every phase."""
        return int(self._options.threads)

    @property
    def times(self) -> int:
        """How often each phase of a patch runs."""
        return int(self._options.times)

    @property
    def seed(self) -> int:
        """Of the weights and of the rows."""
        return int(self._options.seed)


class Runner:
    """The phases of one size, in its registry."""

    def __init__(self, benchmark: Benchmark, place: Path, size: float | str, shape: Shape) -> None:
        self._benchmark = benchmark
        self._size = size
        self._place = place
        self._registry = place / "registry"
        self._ready = place / "ready"
        self._shape = shape

    @property
    def is_ready(self) -> bool:
        """Whether models and lineage are registered by the code that runs now."""
        return self._ready.is_file() and self._ready.read_text() == self._benchmark.results.key

    def set_up(self, models: dict[str, Path]) -> None:
        """Register the models and create the lineage in a fresh registry, and measure that."""
        shutil.rmtree(self._registry, ignore_errors=True)
        self.run("create")
        self._benchmark.results.note_bytes(self._size, self._shape.bytes)
        self.measure("imports", ("imports",), [])
        for role in ROLES:
            self.measure("register", (f"register {role}",), [models[role]], role=role, path=models[role])
        self.measure("lineage", ("create lineage",), [models["subject"]])
        self._ready.write_text(self._benchmark.results.key)

    def chain(self, layout: str, operation: str, models: dict[str, Path]) -> None:
        """Plan, apply, change the same rows by load and save, verify, revert; as often as was asked."""
        self._benchmark.results.forget(self._size, layout, operation)
        self.run("reset")
        found = self.run("identify", layout=layout, operation=operation, seed=self._benchmark.seed)
        number = found.figures["identification"]
        working = self._registry / "lineages" / LINEAGE
        inputs = [models["aligned"], models["subject"], working]
        target = self._place / "saved"
        for _ in range(self._benchmark.times):
            self.measure("plan", (layout, operation, "plan"), inputs, identification=number)
            patch = self.measure("apply", (layout, operation, "apply"), inputs, identification=number).figures["patch"]
            shutil.rmtree(target, ignore_errors=True)
            self.measure(
                "load+save",
                (layout, operation, "load+save"),
                [models["subject"]],
                patch=patch,
                source=models["subject"],
                target=target,
            )
            shutil.rmtree(target)
            self.measure("verify", (layout, operation, "verify"), [models["base"], *inputs])
            self.measure("revert", (layout, operation, "revert"), inputs)

    def measure(self, phase: str, key: tuple[str, ...], inputs: list[Path], **parameters: object) -> Cost:
        """Run a phase over files that were just read, and keep what it took."""
        os.sync()
        warm([path for directory in inputs for path in sorted(directory.glob("*.safetensors"))])
        cost = self.run(phase, **parameters)
        self._benchmark.results.add((self._size, *key), cost)
        place = f"{self._size:g} GB" if isinstance(self._size, float) else self._size
        _tell(
            f"{', '.join((place, *key))}: {cost.seconds:.2f} s, {cost.read / 1e6:,.0f} MB read "
            f"({cost.device_read / 1e6:,.0f} from disk), {cost.written / 1e6:,.0f} MB written, "
            f"peak {cost.peak_memory / MIB:,.0f} MiB"
        )
        return cost

    def run(self, phase: str, **parameters: object) -> Cost:
        """Run a phase without keeping what it took."""
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "patching_phases.py"),
            f"sqlite:///{self._registry / 'registry.db'}",
            phase,
            json.dumps(parameters, default=str),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._benchmark.threads), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{phase} failed with {done.returncode}: {done.stderr.strip()}")
        return Cost(**json.loads(done.stdout))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_sizes, default=(0.3, 1.0, 4.0), help="sizes in GB (default 0.3,1,4)")
    parser.add_argument("--directory", type=Path, default=Path(".cache/patching"), help="where everything is made")
    parser.add_argument("--operations", type=_operations, default=OPERATIONS, help="default restore,subspace")
    parser.add_argument("--times", type=int, default=3, help="runs of each phase of a patch (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; hashing uses all cores (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and rows (default 0)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--keep", action="store_true", help="keep models and registries when done")
    parser.add_argument("--no-projection", action="store_true", help="leave out the projection of 4096 × 4096 modules")
    options = parser.parse_args(arguments)
    options.directory = options.directory.resolve()
    return options


def _sizes(text: str) -> tuple[float, ...]:
    return tuple(sorted({float(part) for part in text.split(",")}))


def _operations(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _code_digest() -> str:
    """SHA-256 of every module that decides a figure."""
    files = [path for part in ("algorithms", "governance", "registry") for path in (ROOT / part).rglob("*.py")]
    files += (ROOT / "benchmarks").glob("patching_*.py")
    content = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_space(disk: Path, place: Path, size: int) -> None:
    held = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    free = shutil.disk_usage(disk).free + held
    if size > free:
        raise SystemExit(f"{place} needs about {size / 1e9:.0f} GB and its disk has {free / 1e9:.0f} GB free")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
