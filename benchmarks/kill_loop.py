"""Kills a running `neuronledger patch apply` at random moments, and looks at what is left each time.

    python benchmarks/kill_loop.py --times 50

Makes three checkpoints of some 200 MB, registers them, and measures one undisturbed run. Then, as often as wished,
starts the command in a process of its own and ends it by SIGKILL: mostly between the recorded intent and the recorded
result, where rows are written and hashed. After every kill `patch list` has to answer, and the next command that writes
has to recover; then the working checkpoint is byte for byte the version before or the one after, `audit verify
--weights` finds nothing, and no temporary file is left. `--command revert` kills reverts instead.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from click.testing import CliRunner
from patching_checkpoints import Shape, make_checkpoints
from patching_records import DIMENSION, EVERY, LINEAGE, record_dimension, record_identification

from cli import main as neuronledger
from governance.workspace import Workspace
from registry import queries
from registry.database import Registry
from registry.ledger import ledger_head

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(hidden=1024, intermediate=2816, head=64, key_value_heads=4, vocabulary=4_000, blocks=8)
SETTINGS = ("--preset", "random-control", "--set", "operation=restore")
POLL_SECONDS = 0.001
LONGEST_SECONDS = 300

Phase = Literal["starting", "writing the artifact", "from intent to result", "ending"]
SHARES: dict[Phase, float] = {
    "starting": 0.1,
    "writing the artifact": 0.2,
    "from intent to result": 0.6,
    "ending": 0.1,
}
"""How many of the kills fall into which part of a run."""


@dataclass(frozen=True)
class Moment:
    """When to kill: how far into which phase, in seconds from where the phase is seen to begin."""

    phase: Phase
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What one kill left: the phase it was meant for, the patch's state as it was found, and the version after all."""

    phase: Phase
    found: str
    version: Literal["old", "new"]


class InconsistentError(Exception):
    """Something that must hold after a kill does not."""


def draw_moment(durations: dict[Phase, float], chance: random.Random) -> Moment:
    """A moment of a run whose phases take so long."""
    phase = chance.choices(list(SHARES), list(SHARES.values()))[0]
    return Moment(phase, chance.uniform(0, durations[phase]))


def table(outcomes: Sequence[Outcome]) -> str:
    """How the kills ended, by the phase they were meant for and the state that they left."""
    lines = [f"{'killed while':<24}{'patch was':<12}{'kills':>6}{'old':>6}{'new':>6}"]
    counts = Counter((outcome.phase, outcome.found, outcome.version) for outcome in outcomes)
    for phase in SHARES:
        for found in sorted({outcome.found for outcome in outcomes if outcome.phase == phase}):
            old, new = counts[phase, found, "old"], counts[phase, found, "new"]
            lines.append(f"{phase:<24}{found:<12}{old + new:>6}{old:>6}{new:>6}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill as often as asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="how many kills (default 50)")
    parser.add_argument("--command", choices=("apply", "revert"), default="apply", help="what is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the models, the rows and the moments (default 0)")
    parser.add_argument("--database", metavar="URL", help="an empty PostgreSQL database (default: a SQLite file)")
    parser.add_argument("--directory", type=Path, help="where to make a directory of 1 GB, which is removed at the end")
    options = parser.parse_args(arguments)
    # A registry in PostgreSQL keeps its artifacts below the working directory.
    with tempfile.TemporaryDirectory(prefix="kill-loop-", dir=options.directory) as place, chdir(place):
        lineage = Lineage(Path(place).resolve(), options.database, options.command, options.seed)
        durations = lineage.measure()
        _tell("an undisturbed run: " + ", ".join(f"{phase} {1000 * took:.0f} ms" for phase, took in durations.items()))
        chance = random.Random(options.seed)
        outcomes: list[Outcome] = []
        try:
            for number in range(1, options.times + 1):
                outcomes.append(lineage.kill_at(draw_moment(durations, chance)))
                _tell(f"kill {number}: {outcomes[-1].phase}, {outcomes[-1].found}, {outcomes[-1].version} version")
        except InconsistentError as problem:
            print(table(outcomes))
            print(f"kill {len(outcomes) + 1} of {options.times}, seed {options.seed}: {problem}")
            return 1
        finally:
            lineage.close()
    versions = Counter(outcome.version for outcome in outcomes)
    print(table(outcomes))
    print(f"{len(outcomes)} kills: {versions['old']} old, {versions['new']} new, 0 mixtures")
    return 0


class Lineage:
    """The lineage that is patched, killed and looked at."""

    def __init__(self, place: Path, database: str | None, command: str, seed: int) -> None:
        self.command = command
        self._place = place
        self._database = database or f"sqlite:///{place / 'registry' / 'registry.db'}"
        self._run("init")
        self._registry = Registry.open(self._database)
        self._workspace = Workspace(registry=self._registry, actor="kill loop")
        models = make_checkpoints(place / "models", SHAPE, seed, _tell)
        for role, path in models.items():
            self._run("model", "register", role, path, "--role", role)
        record_dimension(self._workspace, place)
        self._run("lineage", "create", LINEAGE, *(f"--{role}={role}" for role in models))
        record_identification(self._workspace, EVERY, "restore", seed)
        self._apply = ("patch", "apply", LINEAGE, DIMENSION, *SETTINGS, "--set", f"seed={seed}")
        self._revert = ("patch", "revert", LINEAGE)
        with self._registry.read() as session:
            self._working = Path(queries.get_lineage(session, LINEAGE).working_path)
        without = self._digests()
        self._run(*self._apply)
        self._versions = (without, self._digests())
        self._run(*self._revert)

    @property
    def old(self) -> dict[str, str]:
        """Digests of the files before the command."""
        return self._versions[self.command == "revert"]

    @property
    def new(self) -> dict[str, str]:
        """Digests of the files after it."""
        return self._versions[self.command == "apply"]

    def close(self) -> None:
        """Give the connections back."""
        self._registry.close()

    def measure(self) -> dict[Phase, float]:
        """How long the phases of an undisturbed run take."""
        self._bring_to_old()
        process, begun = self._start(), {"starting": time.monotonic()}
        for phase in ("writing the artifact", "from intent to result", "ending"):
            self._wait_for(phase, process)
            begun[phase] = time.monotonic()
        if process.wait(LONGEST_SECONDS):
            raise InconsistentError(f"the undisturbed run failed: {process.communicate()[1].decode()}")
        moments = [*begun.values(), time.monotonic()]
        return dict(zip(SHARES, (b - a for a, b in itertools.pairwise(moments)), strict=True))

    def kill_at(self, moment: Moment) -> Outcome:
        """Run the command, kill it, recover, and check what is left.

        Raises:
            InconsistentError: it is neither the version before nor the one after.
        """
        self._bring_to_old()
        process = self._start()
        self._wait_for(moment.phase, process)
        time.sleep(moment.seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = [patch["state"] for patch in json.loads(self._run("patch", "list", LINEAGE, "--json"))]
        self._write_something()
        state = found[-1] if self.command == "revert" or len(found) > self._patches else "not begun"
        return Outcome(moment.phase, state, self._checked_version())

    def _bring_to_old(self) -> None:
        applied = "applied" in self._states()
        if applied and self.command == "apply":
            self._run(*self._revert)
        if not applied and self.command == "revert":
            self._run(*self._apply)
        self._patches = len(self._states())
        self._events = 0
        self._events = self._new_events()

    def _checked_version(self) -> Literal["old", "new"]:
        files = self._digests()
        if files not in self._versions:
            raise InconsistentError("the working checkpoint is neither the version before nor the one after")
        version: Literal["old", "new"] = "new" if files == self.new else "old"
        if ("applied" in self._states()) != (files == self._versions[1]):
            raise InconsistentError(f"the files are of the {version} version, and the patches {self._states()}")
        if left := self._workspace.store.leftovers():
            raise InconsistentError(f"{left[0]} is left over")
        told = json.loads(self._run("audit", "verify", "--weights", "--json"))
        if not told["verified"]:
            raise InconsistentError(f"audit verify found {told['findings']}")
        return version

    def _start(self) -> "subprocess.Popen[bytes]":
        arguments = self._apply if self.command == "apply" else self._revert
        return subprocess.Popen(
            [sys.executable, "-m", "cli", *map(str, arguments), "--database", self._database],
            cwd=self._place,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def _wait_for(self, phase: Phase, process: "subprocess.Popen[bytes]") -> None:
        """Until a phase begins, or the process ends."""
        begun: dict[Phase, Callable[[], bool]] = {
            "starting": lambda: True,
            "writing the artifact": lambda: bool(self._workspace.store.leftovers()) or self._new_events() > 0,
            "from intent to result": lambda: self._new_events() > 0,
            "ending": lambda: self._new_events() > 1,
        }
        until = time.monotonic() + LONGEST_SECONDS
        while not begun[phase]() and process.poll() is None:
            if time.monotonic() > until:
                raise InconsistentError(f"the command never came to {phase}")
            time.sleep(POLL_SECONDS)

    def _new_events(self) -> int:
        """How many events there are since the lineage was brought to the version before."""
        with self._registry.read() as session:
            return ledger_head(session)[0] - self._events

    def _states(self) -> list[str]:
        with self._registry.read() as session:
            lineage = queries.get_lineage(session, LINEAGE)
            return [patch.state for patch in queries.list_patches(session, lineage.id)]

    def _write_something(self) -> None:
        """Run a command that writes, and so recovers first."""
        name = f"dimension-{time.monotonic_ns()}"
        for purpose in ("harmful", "benign"):
            prompt = json.dumps({"prompt": f"{purpose} {name}"})
            (self._place / f"{name}.{purpose}.jsonl").write_text(f"{prompt}\n")
        files = (f"--{purpose}={self._place / name}.{purpose}.jsonl" for purpose in ("harmful", "benign"))
        self._run("dimension", "register", name, *files)

    def _digests(self) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(self._working.iterdir())}

    def _run(self, *arguments: object) -> str:
        """A command that has to succeed, in this process; what it prints."""
        words = [*map(str, arguments), "--database", self._database]
        result = CliRunner().invoke(neuronledger, words)
        if result.exit_code:
            raise InconsistentError(f"neuronledger {' '.join(words[:3])} failed: {result.output}") from result.exception
        return result.stdout


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
