"""The adapter to EleutherAI's lm-eval harness: runs its tasks on a loaded model and reads its results.

The harness is an extra, imported when it is asked for. Its metrics and standard errors are taken as it gives them.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from algorithms.loading import input_device
from governance.errors import InputError
from governance.metrics import LM_EVAL

_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class HarnessSettings:
    """What is run, and how.

    Attributes:
        tasks: names of tasks or groups that the harness knows, or that stand in `include_path`.
        include_path: directory of task files of one's own (YAML), or None.
        num_fewshot: worked examples before each question; None: what the task says.
        limit: at most so many questions of each task, or None.
        batch_size: questions together.
        chat_template: whether questions go through the model's chat template.
        seed: of whatever the harness draws.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    chat_template: bool = False
    seed: int = 0


@dataclass(frozen=True)
class HarnessFigure:
    """One metric of one task, as the harness gives it; of a group, n is None.

    Attributes:
        error: the standard error, or None where the harness gives none.
        generation: what it was measured with: the harness, the task's version and configuration by digest.
    """

    task: str
    name: str
    value: float
    error: float | None
    n: int | None
    generation: Mapping[str, Any]
    dimension: None = None
    dimension_id: None = None
    numerator: None = None
    judge: None = None
    prompts: None = None
    answers_digest: None = None
    from_store: int = 0

    @property
    def metric(self) -> str:
        """The name in the record."""
        return f"{LM_EVAL}_{self.task}_{self.name}"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the normal approximation."""
        if self.error is None:
            return None
        return self.value - _Z_95 * self.error, self.value + _Z_95 * self.error


def run_harness(model: nn.Module, tokenizer: Any, settings: HarnessSettings) -> tuple[HarnessFigure, ...]:
    """Run tasks of the harness on a loaded model.

    Raises:
        InputError: the harness is not installed, there is no such task, or a task's data cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("the package lm-eval is missing", "pip install 'neuronledger[utility]'") from error
    offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if offloaded is not None:
        raise InputError(
            f"{offloaded} is offloaded, and lm-eval runs only what lies on devices",
            "place all of the model on devices, or leave the device map out",
        )
    manager = TaskManager(include_path=str(settings.include_path) if settings.include_path else None)
    unknown = [task for task in settings.tasks if task not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"lm-eval knows no task {unknown[0]}", "check the name with lm-eval ls tasks, or pass --include-path"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=settings.batch_size,
                device=str(input_device(model)),
            ),
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            task_manager=manager,
            log_samples=False,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"lm-eval cannot run {', '.join(settings.tasks)} ({first})", "check the task and its data"
        ) from error
    return read_results(results, settings, str(getattr(lm_eval, "__version__", "unknown")))


def read_results(results: Mapping[str, Any], settings: HarnessSettings, version: str) -> tuple[HarnessFigure, ...]:
    """The figures in what the harness returns, tasks and metrics in its order.

    Raises:
        InputError: it holds no figure.
    """
    found = []
    for task, values in results.get("results", {}).items():
        counted = (results.get("n-samples") or {}).get(task) or {}
        record = {
            "harness": f"lm-eval {version}",
            "task_version": (results.get("versions") or {}).get(task),
            "task_configuration": _digest((results.get("configs") or {}).get(task)),
            "num_fewshot": (results.get("n-shot") or {}).get(task, settings.num_fewshot),
            "limit": settings.limit,
            "chat_template": settings.chat_template,
            "seed": settings.seed,
            "batch_size": settings.batch_size,
        }
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if name.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float) or not chosen:
                continue
            error = values.get(f"{name}_stderr,{chosen}")
            found.append(
                HarnessFigure(
                    task=task,
                    name=name if chosen == "none" else f"{name}_{chosen}",
                    value=float(value),
                    error=float(error) if isinstance(error, int | float) else None,
                    n=counted.get("effective"),
                    generation=record,
                )
            )
    if not found:
        raise InputError(f"lm-eval gave no figure for {', '.join(settings.tasks)}", "check the task's metrics")
    return tuple(found)


def _digest(configuration: Any) -> str | None:
    """SHA-256 of a task's configuration; functions in it count by their name."""
    if configuration is None:
        return None

    def named(value: Any) -> str:
        return str(getattr(value, "__name__", type(value).__name__))

    text = json.dumps(configuration, sort_keys=True, default=named)
    return hashlib.sha256(text.encode()).hexdigest()
