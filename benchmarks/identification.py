"""What finding NLSR's regions costs, beside a plain forward pass over the same answers and beside the published way.

    python benchmarks/identification.py --model DIR [--adapter DIR] [--prompts FILE.jsonl]

Finds the region of every linear module of a model from 200 safe answers, three times, each in a process of its own:

- plain: the forward pass alone, without any hook;
- neuron, factor: this package's identification, all modules in one pass, no activation kept, decompositions exact;
- published: block after block from stored hidden states, the inputs of all modules of the block kept at all answer
  tokens, a randomised SVD of every module's outputs (torch.svd_lowrank, 20 iterations), and the block run again for
  the hidden states that the next one gets.

With an adapter, regions are of its factors (without one a random adapter of rank 16 on every linear module is made);
with `--full`, of the checkpoint's whole weights. Without prompts the answers are random tokens: for time and memory it
makes no difference. Seconds leave imports and loading out; memory is the highest resident set after loading, and what
of it came on top. The published way is written for decoders whose blocks pass hidden states on, as Llama's do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from patching_measure import MIB, machine
from torch import Tensor, nn

from algorithms import nlsr
from algorithms.architectures import LinearModule
from algorithms.calibration import CalibrationItem, batches, calibration_items, padding_id
from algorithms.loading import blocks as transformer_blocks
from algorithms.loading import linear_module, load_model, quiet_transformers, unwrapped
from algorithms.low_rank import kept_rank
from algorithms.nlsr_settings import NlsrSettings
from algorithms.statistics import run_prompts
from algorithms.weights import LoraFactors, WeightSource, open_weights

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = 20


class NoWeights:
    """A base whose weights are all zero, so that the update over it is the whole weight."""

    def __init__(self, like: WeightSource) -> None:
        self.modules: Mapping[str, LinearModule] = like.modules
        self.path = Path("no weights")

    def rows(self, module: str, index: slice | Tensor) -> Tensor:
        """Zeros of the shape that is asked for."""
        linear = self.modules[module]
        return torch.zeros(len(torch.arange(linear.out_features)[index]), linear.in_features)

    def factors(self, module: str) -> LoraFactors | None:
        """None."""
        del module


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every phase in a process of its own and print the ratios."""
    options = _options(arguments)
    if options.phase:
        print(json.dumps(_phase(options)))
        return 0
    with tempfile.TemporaryDirectory() as place:
        if options.adapter is None and not options.full:
            options.adapter = _random_adapter(options.model, Path(place) / "adapter")
        phases = ("plain", "neuron", "published") if options.full else ("plain", "neuron", "factor", "published")
        found = {}
        for phase in phases:
            print(f"{phase} …", file=sys.stderr, flush=True)
            found[phase] = _run(options, phase)
    _print(found)
    if options.json:
        document = {"machine": machine(options.model, options.threads), "model": options.model.name, "phases": found}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the full checkpoint")
    parser.add_argument("--adapter", type=Path, help="directory of a LoRA adapter on it")
    parser.add_argument("--full", action="store_true", help="regions of whole weights instead of an adapter's factors")
    parser.add_argument("--prompts", type=Path, help="JSONL with prompt and response; left out, tokens are random")
    parser.add_argument("--answers", type=int, default=200, help="how many answers (default 200)")
    parser.add_argument("--answer-tokens", type=int, default=32, help="tokens of each answer that count (default 32)")
    parser.add_argument("--batch-size", type=int, default=8, help="answers per forward pass (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    parser.add_argument("--phase", choices=["plain", "neuron", "factor", "published"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, phase: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--phase", phase, "--model", options.model]
    for name in ("answers", "answer_tokens", "batch_size", "threads"):
        command += [f"--{name.replace('_', '-')}", getattr(options, name)]
    for name in ("adapter", "prompts"):
        command += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
    command += ["--full"] if options.full else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{phase} failed: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _phase(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    base = open_weights(options.model)
    reference = base if options.full else open_weights(options.adapter, options.model)
    model, tokenizer = load_model(
        options.model if options.full else options.adapter, None if options.full else options.model
    )
    items = _items(options, tokenizer)
    settings = NlsrSettings(
        selection="all",
        form="factor" if options.phase == "factor" else "neuron",
        batch_size=options.batch_size,
        prompts=len(items),
    )
    pad_id = padding_id(tokenizer)
    below: WeightSource = NoWeights(base) if options.full else base

    def identify() -> None:
        nlsr.identify(
            reference,
            reference,
            below,
            reference,
            load=lambda _: model,
            safe=items,
            pad_id=pad_id,
            settings=settings,
        )

    work: dict[str, Callable[[], None]] = {
        "plain": lambda: run_prompts(model, items, [], batch_size=options.batch_size, pad_id=pad_id),
        "published": lambda: published(model, reference, items, settings, pad_id),
    }
    return _cost(work.get(options.phase, identify))


def _cost(work: Callable[[], None]) -> dict[str, float]:
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins again at the present size
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    peak = _memory("VmHWM")
    return {"seconds": seconds, "peak": peak, "on_top": max(0, peak - before)}


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) * 1024


def _items(options: argparse.Namespace, tokenizer: Any) -> list[CalibrationItem]:
    if options.prompts:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()[: options.answers]
        rows = [json.loads(line) for line in lines]
        prompts, answers = [row["prompt"] for row in rows], [row["response"] for row in rows]
        return calibration_items(tokenizer, prompts, answers, frozenset({"answer"}), options.answer_tokens)
    generator = torch.Generator().manual_seed(0)
    prompt = 32
    mask = tuple([False] * prompt + [True] * options.answer_tokens)
    drawn = torch.randint(4, len(tokenizer) - 1, (options.answers, len(mask)), generator=generator)
    return [CalibrationItem(tuple(row.tolist()), mask, prompt) for row in drawn]


def published(
    model: nn.Module,
    reference: WeightSource,
    items: Sequence[CalibrationItem],
    settings: NlsrSettings,
    pad_id: int,
    iterations: int = ITERATIONS,
) -> dict[str, Tensor]:
    """The published procedure: reduced weights of every module, a block at a time from stored hidden states.

    Args:
        model: the reference, loaded.
        reference: its weights.
        items: prompts with safe answers.
        settings: sparsity and batch size.
        pad_id: token id to pad with.
        iterations: of the randomised SVD; with many it comes near the exact one.

    Returns:
        Name → reduced weight; of an adapter `NAME.A` and `NAME.B`.
    """
    blocks = transformer_blocks(model)
    states, calls, masks = _first_inputs(model, blocks[0], items, settings.batch_size, pad_id)
    reduced: dict[str, Tensor] = {}
    modules = list(reference.modules.values())
    for number, block in enumerate(blocks):
        own = [module for module in modules if module.block == number]
        stored = _stored_inputs(model, block, own, states, calls, masks)
        for module in own:
            reduced |= _reduced(module, torch.cat(stored.pop(module.name)), reference, settings, iterations)
        states = [_hidden(block(state, *args, **kwargs)) for state, (args, kwargs) in zip(states, calls, strict=True)]
    return reduced


class _EnoughError(Exception):
    """The first block has its inputs; the rest of the pass is not needed."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _first_inputs(
    model: nn.Module, block: nn.Module, items: Sequence[CalibrationItem], batch_size: int, pad_id: int
) -> tuple[list[Tensor], list[Call], list[Tensor]]:
    states: list[Tensor] = []
    calls: list[Call] = []
    masks = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, *rest = args or (kwargs.pop("hidden_states"),)
        states.append(state)
        calls.append((tuple(rest), kwargs))
        raise _EnoughError

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    backbone: Any = getattr(unwrapped(model), "base_model", unwrapped(model))
    with torch.no_grad():
        for batch in batches(items, batch_size, pad_id):
            masks.append(batch.count_mask)
            try:
                backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            except _EnoughError:
                continue
    handle.remove()
    return states, calls, masks


def _stored_inputs(
    model: nn.Module,
    block: nn.Module,
    own: Sequence[LinearModule],
    states: Sequence[Tensor],
    calls: Sequence[Call],
    masks: Sequence[Tensor],
) -> dict[str, list[Tensor]]:
    """The inputs of a block's modules at every answer token."""
    stored: dict[str, list[Tensor]] = {module.name: [] for module in own}
    counted: list[Tensor] = []

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: stored[name].append(args[0][counted[-1]])

    handles = [linear_module(model, module.name).register_forward_pre_hook(keep(module.name)) for module in own]
    with torch.no_grad():
        for state, (args, kwargs), mask in zip(states, calls, masks, strict=True):
            counted.append(mask)
            block(state, *args, **kwargs)
    for handle in handles:
        handle.remove()
    return stored


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden.detach()


def _reduced(
    module: LinearModule, X: Tensor, reference: WeightSource, settings: NlsrSettings, iterations: int
) -> dict[str, Tensor]:
    factors = reference.factors(module.name)
    if factors is None:
        weight = reference.rows(module.name, slice(0, None))
        return {module.name: _low_rank(X, weight, settings, iterations)}
    inner = X @ factors.A.T
    return {
        f"{module.name}.A": _low_rank(X, factors.A, settings, iterations),
        f"{module.name}.B": _low_rank(inner, factors.B, settings, iterations),
    }


def _low_rank(X: Tensor, weight: Tensor, settings: NlsrSettings, iterations: int) -> Tensor:
    """V Vᵀ F with V from a randomised SVD of the outputs X Fᵀ."""
    outputs = X @ weight.T
    rank = min(kept_rank(min(weight.shape), settings), *outputs.shape)
    _, _, V = torch.svd_lowrank(outputs, q=rank, niter=iterations)
    return V @ (V.T @ weight)


def _random_adapter(model: Path, target: Path) -> Path:
    import peft
    import transformers

    with quiet_transformers():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(loaded, config)
        torch.manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.02)
        wrapped.save_pretrained(target)
    return target


def _print(found: Mapping[str, Mapping[str, float]]) -> None:
    plain = found["plain"]
    print("| | seconds | × plain | peak MiB | × plain | on top of the model, MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    for phase, cost in found.items():
        times = [cost[name] / plain[name] for name in ("seconds", "peak")]
        memory = [cost[name] / MIB for name in ("peak", "on_top")]
        print(
            f"| {phase} | {cost['seconds']:.2f} | {times[0]:.2f} | {memory[0]:.0f} | {times[1]:.2f} | {memory[1]:.0f} |"
        )


if __name__ == "__main__":
    raise SystemExit(main())
