"""Tiny models and prompts for the real-model benchmark, and its commands run in this process."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from real_model_commands import RefusedError
from real_model_models import BenchmarkModels
from real_model_runs import DIMENSIONS
from real_model_summary import UNSEEN

from cli import main
from tests.tiny_models import WORDS, save_adapter, save_model, save_variant


class Here:
    """`Commands` in this process: the same command line, without the time to start it."""

    def __init__(self, place: Path) -> None:
        self._environment = {
            "NEURONLEDGER_DATABASE": f"sqlite:///{place / 'registry.db'}",
            "NEURONLEDGER_ACTOR": "benchmark",
        }
        self.done: list[str] = []

    def __call__(self, *arguments: object) -> Any:
        words = [*map(str, arguments), "--json"]
        self.done.append(" ".join(words[:3]))
        result = CliRunner().invoke(main, words, env=self._environment)
        if result.exit_code in {1, 2}:
            raise RefusedError(result.stderr.strip().splitlines()[-1])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


def tiny_models(home: Path, form: str) -> BenchmarkModels:
    """Three tiny models, a subject in form `lora` or `full`, and prompts of every set."""
    base = save_model(home / "base")
    if form == "lora":
        aligned, subject = (save_adapter(base, home / name, seed=seed) for name, seed in (("a", 4), ("s", 5)))
    else:
        aligned = save_variant(base, home / "a", seed=1)
        subject = save_variant(aligned, home / "s", seed=2)
    words = iter(f"{one} {other}" for one in WORDS for other in WORDS)

    def write(name: str, count: int) -> None:
        file = home / "prompts" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = ({"id": str(i), "prompt": next(words), "response": WORDS[i % len(WORDS)]} for i in range(count))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for name in DIMENSIONS:
        write(f"dimensions/{name}/harmful_identify", 4)
        write(f"dimensions/{name}/harmful_report", 5)
    for name in (*(f"unseen/{kind}_report" for kind in UNSEEN), "sst2_report", "xstest_safe_report"):
        write(name, 5)
    for name in ("benign_identify", "harmless_report"):
        write(name, 4)
    return BenchmarkModels(base, aligned, subject, home / "prompts", {}, {})
