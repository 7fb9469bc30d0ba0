"""Training an aligned LoRA adapter with `trl`: DPO, KTO, ORPO or supervised fine-tuning.

DPO: arXiv 2305.18290; KTO: arXiv 2402.01306; ORPO: arXiv 2403.07691. The losses are trl's. What is set here is what
goes in and what comes out: rows through the model's chat template, a seed, one adapter directory and the losses.
Nothing is fetched, reported or printed, and trl's own directory is a temporary one that goes with the run.
"""

import json
import logging
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from algorithms.adapters import ADAPTER_CONFIG, is_adapter
from algorithms.alignment_rows import AlignmentRow, rendered_rows
from algorithms.alignment_settings import AlignmentSettings
from algorithms.architectures import LinearModule
from algorithms.errors import AdapterError, AlignmentError
from algorithms.loading import load_model, quiet_transformers
from algorithms.model_files import new_directory, require_new_directory
from algorithms.scope import modules_of_kinds
from algorithms.weights import open_weights

LIBRARIES = ("trl", "accelerate")
_TALKING = ("trl", "transformers", "accelerate", "datasets", "peft")
_TRAINERS = {
    "dpo": ("DPO", ("trl",)),
    "kto": ("KTO", ("trl", "trl.experimental.kto")),
    "orpo": ("ORPO", ("trl.experimental.orpo", "trl")),
    "sft": ("SFT", ("trl",)),
}
"""Names of trainer and configuration, and the modules of trl that have held them, the present one first."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainedAdapter:
    """What a training came to.

    Attributes:
        path: the adapter's directory.
        rows: how many rows it was trained on.
        rows_left_out: how many were longer than max_length.
        steps: optimiser steps.
        first_loss, last_loss: mean loss over the first and the last tenth of the steps.
    """

    path: Path
    rows: int
    rows_left_out: int
    steps: int
    first_loss: float
    last_loss: float


def require_libraries() -> None:
    """Refuse to go on without the libraries of the extra `align`.

    Raises:
        AlignmentError: names the one that is not installed.
    """
    for name in LIBRARIES:
        if find_spec(name) is None:
            raise AlignmentError(
                f"Training needs {name}, which is not installed", "Run pip install 'neuronledger[align]'"
            )


def train_adapter(
    base: Path,
    rows: Sequence[AlignmentRow],
    settings: AlignmentSettings,
    output: Path,
    progress: Progress | None = None,
) -> TrainedAdapter:
    """Train a LoRA adapter on a checkpoint and write it as a PEFT directory, which appears whole or not at all.

    On one processor the same rows, settings and seed give the same bytes.

    Args:
        base: directory of the checkpoint; it is not changed.
        rows: what to learn; with rejected answers for dpo and orpo.
        settings: every choice of the run.
        output: directory to make; it may exist when it is empty.
        progress: told the optimiser steps done, and in all.

    Raises:
        AlignmentError: trl is not installed, no row is short enough, loss or factors are no numbers any more, or the
            memory of the graphics processor does not suffice.
        AdapterError: the base is itself an adapter.
        SettingsError: a kind of module that the base does not have.
        CheckpointError: the base cannot be read, or the output exists or cannot be written.
        CalibrationError: a tokenizer or chat template that cannot be used.
    """
    require_libraries()
    require_new_directory(output)
    if is_adapter(base):
        raise AdapterError(f"{base} is itself an adapter", "Merge it first, or name the checkpoint under it")
    modules = modules_of_kinds(open_weights(base), settings.modules)
    model, tokenizer = load_model(base, dtype=getattr(torch, settings.precision))
    rendered = rendered_rows(tokenizer, rows, settings.max_length)
    if not rendered:
        raise AlignmentError(
            f"None of the {len(rows)} rows has at most {settings.max_length} tokens", "Raise max_length"
        )
    with _undisturbed(settings.seed), tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, tokenizer, rendered, settings, _targets(model, modules), Path(scratch))
        if progress is not None:
            trainer.add_callback(_reporting(progress))
        try:
            trainer.train()
        except torch.cuda.OutOfMemoryError as error:
            raise AlignmentError(
                "The memory of the graphics processor does not suffice",
                "Lower batch_size or max_length, or set gradient_checkpointing=true or precision=bfloat16",
            ) from error
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        _require_finite(losses, trainer.model)
        with new_directory(output) as written:
            _save(trainer.model, written)
    tenth = max(1, len(losses) // 10)
    return TrainedAdapter(
        path=output,
        rows=len(rendered),
        rows_left_out=len(rows) - len(rendered),
        steps=int(trainer.state.global_step),
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
    )


def _trainer(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[AlignmentRow],
    settings: AlignmentSettings,
    targets: list[str],
    scratch: Path,
) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback

    trainer_class, config_class = _classes(settings)
    if torch.cuda.device_count() > 1:
        raise AlignmentError("Training uses one graphics processor", "Choose one with CUDA_VISIBLE_DEVICES")
    trainer = trainer_class(
        model=model,
        args=config_class(**_arguments(settings, scratch)),
        train_dataset=Dataset.from_list([_columns(row, settings) for row in rows]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _targets(model: nn.Module, modules: Sequence[LinearModule]) -> list[str]:
    """What PEFT finds these modules by: their kinds where those are found nowhere else, or else their names."""
    names, kinds = {module.name for module in modules}, {module.kind for module in modules}
    found = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in kinds}
    return sorted(kinds if found == names else names)


def _classes(settings: AlignmentSettings) -> tuple[Any, Any]:
    """Trainer and configuration of a method, wherever this version of trl keeps them."""
    name, places = _TRAINERS[settings.method]
    missing: Exception | None = None
    for place in places:
        try:
            module = import_module(place)
            return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
        except (ImportError, AttributeError, RuntimeError) as error:  # trl's own way to say that an import failed
            missing = error
    raise AlignmentError(
        f"The installed trl has no trainer for {settings.method}", "Run pip install 'neuronledger[align]'"
    ) from missing


def _arguments(settings: AlignmentSettings, scratch: Path) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "output_dir": str(scratch),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_length": settings.max_length,
        "seed": settings.seed,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
    }
    if settings.beta is not None:
        chosen["beta"] = settings.beta
    if settings.method == "sft":
        chosen["completion_only_loss"] = True
    return chosen


def _columns(row: AlignmentRow, settings: AlignmentSettings) -> dict[str, Any]:
    if settings.method in {"dpo", "orpo"}:
        return {"prompt": row.prompt, "chosen": row.answer, "rejected": row.rejected}
    if settings.method == "kto":
        return {"prompt": row.prompt, "completion": row.answer, "label": row.desirable}
    return {"prompt": row.prompt, "completion": row.answer}


def _reporting(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Reporting(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:  # noqa: ARG002
            progress(int(state.global_step), int(state.max_steps))

    return Reporting()


def _require_finite(losses: Sequence[float], model: nn.Module) -> None:
    mend = "Lower learning_rate"
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise AlignmentError(f"The loss is {loss} at step {step}", mend)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise AlignmentError(f"The trained {name} holds NaN or infinity", mend)


def _save(model: Any, directory: Path) -> None:
    """Configuration and factors; without PEFT's model card, and with lists in an order of their own."""
    model.save_pretrained(directory, safe_serialization=True, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    config = json.loads((directory / ADAPTER_CONFIG).read_text("utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


@contextmanager
def _undisturbed(seed: int) -> Iterator[None]:
    """Training that neither talks, nor reaches the network, nor leaves random generators or loggers changed."""
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stack.enter_context(_silent())
        stack.enter_context(_offline())
        stack.enter_context(_own_randomness(seed))
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """No log line and no warning: some of trl's quote the text that is trained on."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    loggers = [logging.getLogger(name) for name in _TALKING]
    levels = [logger.level for logger in loggers]
    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            enable_progress_bars()


@contextmanager
def _offline() -> Iterator[None]:
    """trl tells the Hub which trainer runs, unless its client is offline."""
    from huggingface_hub import constants

    held = constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_OFFLINE = constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY = held


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Every generator from the seed; afterwards they go on from where they were."""
    from transformers import set_seed

    held = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(held[0])
            np.random.set_state(held[1])
