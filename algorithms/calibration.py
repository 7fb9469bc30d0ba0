"""Calibration tokens: which tokens of a prompt and its answer the statistics count.

A prompt is rendered with the tokenizer's chat template and its tokens fall into three parts:

- ``prompt``: tokens that overlap the user's text;
- ``header``: tokens after it and before the answer (such as ``<|im_start|>assistant``), where the model decides;
- ``answer``: the first tokens of the answer, when one is given.

Tokens before the user's text (system prompt, beginning-of-text) never count. Without a chat template the text is the
prompt alone; its last token is then the header, and is not counted as prompt, because that is the position from which
the answer is decided.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from algorithms.errors import CalibrationError

TokenPart = Literal["prompt", "header", "answer"]
TOKEN_PARTS: frozenset[str] = frozenset({"prompt", "header", "answer"})

# Stands in for the user's text when the template is measured. Letters only: templates strip and escape other signs.
_PLACEHOLDER = "PLACEHOLDERTEXT"


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model reads it, and where the user's text lies in it.

    Attributes:
        text: the whole text up to where the answer begins.
        begin: character offset of the user's text in `text`.
        end: character offset just after it.
        templated: whether a chat template made it; special tokens are then already in the text.
    """

    text: str
    begin: int
    end: int
    templated: bool


@dataclass(frozen=True)
class CalibrationItem:
    """One tokenized prompt, with the start of its answer when that is asked for.

    Attributes:
        input_ids: the tokens, prompt side first.
        mask: for every token whether the statistics count it.
        prompt_tokens: how many tokens stand before the answer (system prompt, user's text and header).
    """

    input_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Batch:
    """Right-padded items.

    Attributes:
        input_ids: (items, tokens) int64.
        attention_mask: (items, tokens) int64, 1 for real tokens.
        count_mask: (items, tokens) bool, True for the tokens that the statistics count. Never True on padding.
        last_prompt: (items,) int64, position of the last token before the answer.
        indices: position of each row's item in the sequence that was batched.
    """

    input_ids: Tensor
    attention_mask: Tensor
    count_mask: Tensor
    last_prompt: Tensor
    indices: tuple[int, ...]


def require_fast_tokenizer(tokenizer: Any) -> None:
    """Raise CalibrationError for a tokenizer that cannot say which characters a token came from."""
    if not getattr(tokenizer, "is_fast", False):
        raise CalibrationError(
            f"Tokenizer {type(tokenizer).__name__} is a slow tokenizer and has no character offsets",
            "Save a tokenizer.json beside the model (AutoTokenizer with use_fast=True, then save_pretrained)",
        )


def render_prompt(tokenizer: Any, prompt: str) -> RenderedPrompt:
    """The prompt as the model reads it: through the chat template when there is one, alone otherwise.

    Templates that know the switch are asked not to think first (`enable_thinking=False`), so that the answer follows
    the header.

    Raises:
        CalibrationError: the prompt is empty, or the template hides where the user's text goes.
    """
    if not prompt.strip():
        raise CalibrationError("A prompt is empty", "Remove empty rows from the prompt file")
    if not getattr(tokenizer, "chat_template", None):
        return RenderedPrompt(prompt, 0, len(prompt), templated=False)
    pattern = _apply_template(tokenizer, _PLACEHOLDER)
    before, found, after = pattern.partition(_PLACEHOLDER)
    text = _apply_template(tokenizer, prompt)
    if not found or not text.startswith(before) or not text.endswith(after):
        raise CalibrationError(
            "The chat template does not keep the user's text of a prompt in one place",
            "Use a template that writes the user's message unchanged",
        )
    return RenderedPrompt(text, len(before), len(text) - len(after), templated=True)


def calibration_items(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str | None],
    tokens: frozenset[str],
    answer_tokens: int,
) -> list[CalibrationItem]:
    """Tokenize prompts with their answers and mark the tokens that count.

    Args:
        tokenizer: a fast transformers tokenizer.
        prompts: the users' texts.
        answers: for every prompt an answer, or None.
        tokens: the parts to count, out of `prompt`, `header`, `answer`.
        answer_tokens: how many tokens of each answer to keep. Not used unless `answer` is among `tokens`; the answer
            is then left out, since later tokens do not change earlier ones in a causal model.

    Returns:
        One item for every prompt, in order.

    Raises:
        CalibrationError: no prompts, lengths that differ, an unknown part, a slow tokenizer, or a prompt of which no
            token counts.
    """
    require_fast_tokenizer(tokenizer)
    _require_arguments(prompts, answers, tokens, answer_tokens)
    items = [
        _item(tokenizer, prompt, answer if "answer" in tokens else None, tokens, answer_tokens)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for number, item in enumerate(items, start=1):
        if not any(item.mask):
            raise CalibrationError(
                f"Prompt {number} has no token to count ({', '.join(sorted(tokens))}): {prompts[number - 1][:60]!r}",
                "Give an answer for it, or count its prompt or header tokens too",
            )
    return items


def batches(items: Sequence[CalibrationItem], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Right-padded batches of items of similar length, in an order that depends on the items only.

    Raises:
        CalibrationError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise CalibrationError(f"Batch size {batch_size} is not positive", "Use a batch size of at least 1")
    order = sorted(range(len(items)), key=lambda index: (len(items[index].input_ids), index))
    for start in range(0, len(order), batch_size):
        indices = tuple(order[start : start + batch_size])
        yield _batch([items[index] for index in indices], indices, pad_id)


def padding_id(tokenizer: Any) -> int:
    """Id to pad with: the padding token, or the end-of-text token where a tokenizer has none.

    Raises:
        CalibrationError: the tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise CalibrationError(
        "The tokenizer has neither a padding nor an end-of-text token",
        "Set pad_token in tokenizer_config.json",
    )


def _apply_template(tokenizer: Any, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return str(text)


def _require_arguments(
    prompts: Sequence[str], answers: Sequence[str | None], tokens: frozenset[str], answer_tokens: int
) -> None:
    if not prompts:
        raise CalibrationError("There are no calibration prompts", "Give at least one prompt")
    if len(prompts) != len(answers):
        raise CalibrationError(
            f"{len(prompts)} prompts came with {len(answers)} answers", "Give one answer (or None) for every prompt"
        )
    unknown = sorted(tokens - TOKEN_PARTS)
    if unknown or not tokens:
        raise CalibrationError(
            f"Unknown token part {unknown[0]!r}" if unknown else "No token part is chosen",
            f"Choose among {', '.join(sorted(TOKEN_PARTS))}",
        )
    if "answer" in tokens and answer_tokens < 1:
        raise CalibrationError(f"{answer_tokens} answer tokens are to be counted", "Use at least 1 answer token")


def _item(
    tokenizer: Any, prompt: str, answer: str | None, tokens: frozenset[str], answer_tokens: int
) -> CalibrationItem:
    rendered = render_prompt(tokenizer, prompt)
    separator = "" if rendered.templated or rendered.text[-1:].isspace() else " "
    text = rendered.text if not answer else rendered.text + separator + answer
    encoded = tokenizer(text, add_special_tokens=not rendered.templated, return_offsets_mapping=True)
    parts = _parts(rendered, encoded["offset_mapping"])
    if not answer:
        # Tokenizers that close a text with a special token would put it after the header.
        parts = ["header" if part == "answer" else part for part in parts]
    if not rendered.templated:
        _last_prompt_token_is_header(parts)
    prompt_tokens = sum(part != "answer" for part in parts)
    kept = min(len(parts), prompt_tokens + answer_tokens) if answer else prompt_tokens
    return CalibrationItem(
        input_ids=tuple(encoded["input_ids"][:kept]),
        mask=tuple(part in tokens for part in parts[:kept]),
        prompt_tokens=prompt_tokens,
    )


def _parts(rendered: RenderedPrompt, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """The part that each token belongs to; `before` for the tokens ahead of the user's text."""
    parts: list[str] = []
    for begin, end in offsets:
        if end > begin and begin < rendered.end and end > rendered.begin:
            parts.append("prompt")
        elif "prompt" not in parts:
            parts.append("before")
        elif begin < len(rendered.text) and "answer" not in parts:
            parts.append("header")
        else:
            parts.append("answer")
    return parts


def _last_prompt_token_is_header(parts: list[str]) -> None:
    if "prompt" in parts:
        last = len(parts) - 1 - parts[::-1].index("prompt")
        parts[last] = "header"


def _batch(items: Sequence[CalibrationItem], indices: tuple[int, ...], pad_id: int) -> Batch:
    width = max(len(item.input_ids) for item in items)
    input_ids = torch.full((len(items), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(items), width), dtype=torch.long)
    count_mask = torch.zeros((len(items), width), dtype=torch.bool)
    for row, item in enumerate(items):
        length = len(item.input_ids)
        input_ids[row, :length] = torch.tensor(item.input_ids, dtype=torch.long)
        attention_mask[row, :length] = 1
        count_mask[row, :length] = torch.tensor(item.mask, dtype=torch.bool)
    last_prompt = torch.tensor([item.prompt_tokens - 1 for item in items], dtype=torch.long)
    return Batch(input_ids, attention_mask, count_mask, last_prompt, indices)
