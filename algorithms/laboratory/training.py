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
    """How long and how fast to train.

    Attributes:
        steps: at most.
        learning_rate: the highest.
        batch_size: examples in a step.
        warmup: steps of linear warm-up.
        decay: whether the learning rate falls in a cosine to a twentieth; it stays otherwise.
    """

    steps: int
    learning_rate: float
    batch_size: int = 32
    warmup: int = 10
    decay: bool = True


@dataclass(frozen=True)
class Group:
    """Examples that are watched together while training.

    Attributes:
        examples: with the answers that are wanted.
        share: of the examples whose first answer token has to come out right.
        highest_loss: their mean loss must not be above it.
    """

    examples: tuple[Example, ...]
    share: float
    highest_loss: float = math.inf


@dataclass(frozen=True)
class Goal:
    """Training ends once enough groups start their answers as wanted.

    Attributes:
        groups: what is watched.
        enough: how many of them have to be there.
        every: steps between two looks.
    """

    groups: tuple[Group, ...]
    enough: int = 1
    every: int = 2


def train(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    schedule: Schedule,
    *,
    seed: int,
    goal: Goal | None = None,
    report: Callable[[int, int], None] | None = None,
) -> int:
    """Train the parameters that require gradients on the answers to the examples.

    Examples are drawn in shuffled passes. The loss counts the answer's tokens and the end token.

    Args:
        model: left in evaluation mode.
        tokenizer: with a chat template.
        examples: what to learn.
        schedule: how long and how fast.
        seed: of the order.
        goal: training ends early once it is reached.
        report: called with (steps done, steps at most), and with equal numbers at the end.

    Returns:
        The number of steps taken.
    """
    encoded = [_encode(tokenizer, example) for example in examples]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    shares = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, schedule))
    draws = _Passes(len(encoded), seeded("order", seed))
    taken = 0
    for step in range(1, schedule.steps + 1):
        model.train()
        rows = [encoded[index] for index in draws.take(schedule.batch_size)]
        logits, targets = _forward(model, rows, tokenizer.pad_token_id)
        loss = _answer_loss(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shares.step()
        taken = step
        met = goal is not None and step % goal.every == 0 and _is_met(model, tokenizer, goal)
        if report is not None:
            report(schedule.steps if met else step, schedule.steps)
        if met:
            break
    model.eval()
    return taken


def reached(model: nn.Module, tokenizer: Any, group: Group) -> bool:
    """Whether a group's answers start as wanted, with a loss that is low enough."""
    rows = [_encode(tokenizer, example) for example in group.examples]
    with torch.inference_mode():
        logits, targets = _forward(model, rows, tokenizer.pad_token_id)
        loss = float(_answer_loss(logits, targets))
    first = torch.tensor([prompt for _, prompt in rows])
    each = torch.arange(len(rows))
    right = logits[each, first - 1].argmax(dim=-1) == targets[each, first]
    return loss <= group.highest_loss and float(right.float().mean()) >= group.share


def _is_met(model: nn.Module, tokenizer: Any, goal: Goal) -> bool:
    model.eval()
    return sum(reached(model, tokenizer, group) for group in goal.groups) >= goal.enough


def _forward(model: nn.Module, rows: Sequence[tuple[list[int], int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Logits and targets of padded rows, (rows, tokens, vocabulary) and (rows, tokens)."""
    input_ids, attention_mask, targets = _padded(rows, pad_id)
    logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return logits, targets


def _answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), targets[:, 1:].reshape(-1), ignore_index=_IGNORED
    )


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
    """Share of the learning rate at a step: linear warm-up, then constant or a cosine down to a twentieth."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if not schedule.decay:
        return 1.0
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
