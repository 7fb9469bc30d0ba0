"""The second judge of the real-model benchmark: trained on BeaverTails in a registry of its own, once for a cache.

It is trained as `docs/judges.md` says, with the base model's hidden states. Rows whose prompt the benchmark reports on
are left out: else the judge would have seen the label of another answer to it, and could judge by the prompt.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from real_model_commands import RefusedError, Results
from real_model_models import BenchmarkModels

from algorithms.loading import load_tokenizer
from governance.prompt_sets import prompt_key
from neuronledger import NeuronLedgerError

NAME = "beavertails"
_COLUMNS = ("--category-column", "category", "--report-where", "source_split=30k_test")

Tell = Callable[[str], None]


class SecondJudgeError(NeuronLedgerError):
    """The second judge cannot be trained, or what it should judge isn't there."""


class Command(Protocol):
    """Runs a `neuronledger` command against one registry, as `real_model_commands.Commands` does."""

    def __call__(self, *arguments: object) -> Any:
        """Return what it prints as JSON."""


@dataclass(frozen=True)
class JudgeHome:
    """Where the second judge is.

    Attributes:
        directory: of its registry.
        rows: the labelled rows that it is trained on.
    """

    directory: Path
    rows: Path

    @property
    def database(self) -> str:
        """Address of its registry."""
        return f"sqlite:///{self.directory / 'registry.db'}"


def judge_home(data: Path, cache: Path, models: BenchmarkModels) -> JudgeHome:
    """Write the rows that the judge is trained on, unless they are there.

    The folder is named after the rows' digest, so that other data or another parting of the prompts is another judge.

    Args:
        data: directory of the benchmark data; `beavertails/qa.jsonl` is read.
        cache: directory for models, prompts and results.
        models: whose prompts of the report are left out.

    Raises:
        SecondJudgeError: the labelled rows aren't there.
    """
    source = data / "beavertails" / "qa.jsonl"
    if not source.is_file():
        raise SecondJudgeError(f"There is no file {source}", "Give the directory of the benchmark data")
    measured = {
        prompt_key(json.loads(line)["prompt"])
        for file in models.prompts.rglob("*_report.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    content = "".join(line for line in lines if prompt_key(json.loads(line)["prompt"]) not in measured).encode()
    home = cache / f"judge-{NAME}-{hashlib.sha256(content).hexdigest()[:12]}"
    rows = home / "rows.jsonl"
    if not rows.is_file():
        home.mkdir(parents=True, exist_ok=True)
        unfinished = rows.with_suffix(".unfinished")
        unfinished.write_bytes(content)
        unfinished.replace(rows)
    return JudgeHome(home, rows)


def trained_judge(
    commands: Command, home: JudgeHome, models: BenchmarkModels, tokens: int, tell: Tell
) -> dict[str, Any]:
    """Train the judge unless it is trained; a training that was interrupted goes on where it stopped.

    Args:
        commands: of the judge's registry.
        home: as `judge_home` made it.
        models: whose base is the encoder.
        tokens: longest answer that it will be shown.
        tell: told when training begins.

    Returns:
        The judge as `neuronledger judge show` prints it, and under `cut` its figures on answers cut to `tokens`.

    Raises:
        SecondJudgeError: the rows or the encoder are refused.
    """
    try:
        commands("init")
        if "base" not in {model["name"] for model in commands("model", "list")}:
            commands("model", "register", "base", models.base, "--role", "base")
        if NAME not in {judge["name"] for judge in commands("judge", "list")}:
            tell("second judge: training, about a quarter of an hour of one core …")
            commands("judge", "train", NAME, "--data", home.rows, "--model", "base", *_COLUMNS)
        shown: dict[str, Any] = commands("judge", "show", NAME)
        checks = Results(home.directory / "checks.json")
        name = f"{shown['version']} {tokens} tokens"
        checks.once(name, lambda: _check_cut(commands, home, models.base, tokens), tell)
    except RefusedError as refusal:
        raise SecondJudgeError(f"The second judge could not be trained: {refusal}", "Mend that and run again") from None
    return shown | {"cut": checks.content[name]}


def _check_cut(commands: Command, home: JudgeHome, base: Path, tokens: int) -> dict[str, Any]:
    """Figures on the rows that it never saw, their answers cut as short as the benchmark's are."""
    tokenizer = load_tokenizer(base, None)
    cut = home.directory / f"rows-{tokens}.jsonl"
    with home.rows.open(encoding="utf-8") as source, cut.open("w", encoding="utf-8") as target:
        for line in source:
            row = json.loads(line)
            start = tokenizer(row["response"], add_special_tokens=False)["input_ids"][:tokens]
            target.write(json.dumps({**row, "response": tokenizer.decode(start)}) + "\n")
    checked = commands("judge", "check", NAME, "--data", cut, *_COLUMNS)
    return {"tokens": tokens, "prompts": checked["prompts"], "figures": checked["figures"]}
