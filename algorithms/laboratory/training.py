"""The training loop of the laboratory: answers only, seeded batches, AdamW with a cosine schedule."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.laboratory.language import Example, seeded

_IGNORED = -100


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    batch_size: int = 32
    warmup: int = 10
    weight_decay: float = 0.0


def train(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    schedule: Schedule,
    *,
    seed: int,
    report: Callable[[int, int], None] | None = None,
) -> float:
    """Train the parameters that require gradients on the answers to the examples.

    Examples are drawn in shuffled passes. The loss counts the answer's tokens and the end token.

    Returns:
        The mean loss of the last ten steps.
    """
    encoded = [_encode(tokenizer, example) for example in examples]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=(0.9, 0.98)
    )
    shares = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, schedule))
    draws = _Passes(len(encoded), seeded("order", seed))
    losses: list[float] = []
    model.train()
    for step in range(schedule.steps):
        rows = [encoded[index] for index in draws.take(schedule.batch_size)]
        input_ids, attention_mask, targets = _padded(rows, tokenizer.pad_token_id)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), targets[:, 1:].reshape(-1), ignore_index=_IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shares.step()
        losses.append(float(loss.detach()))
        if report is not None:
            report(step + 1, schedule.steps)
    model.eval()
    recent = losses[-10:]
    return sum(recent) / len(recent)


class _Passes:
    """Indices in shuffled passes over all examples."""

    def __init__(self, size: int, draw: random.Random) -> None:
        self._size = size
        self._draw = draw
        self._left: list[int] = []

    def take(self, count: int) -> list[int]:
        while len(self._left) < count:
            again = list(range(self._size))
            self._draw.shuffle(again)
            self._left += again
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def _encode(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """Tokens of prompt, answer and end token, and how many of them the prompt has."""
    message = [{"role": "user", "content": example.prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompt = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    answer = list(tokenizer(example.response, add_special_tokens=False)["input_ids"])
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def _padded(rows: Sequence[tuple[list[int], int]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(tokens) for tokens, _ in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    targets = torch.full((len(rows), width), _IGNORED, dtype=torch.long)
    for row, (tokens, prompt) in enumerate(rows):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        attention_mask[row, : len(tokens)] = 1
        targets[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return input_ids, attention_mask, targets


def _share(step: int, schedule: Schedule) -> float:
    """Share of the learning rate at a step: linear warm-up, then cosine down to a twentieth."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
