"""Answers of a model to prompts, by greedy decoding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.calibration import padding_id, render_prompt


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer every prompt greedily, through the chat template when there is one.

    Prompts are padded on the left and batched by length, so that little is computed on padding. Sampling settings
    that the checkpoint brings along are ignored: the same weights always give the same answers.

    Args:
        model: as `load_model` gives it.
        tokenizer: its tokenizer.
        prompts: the users' texts.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts answered together.
        progress: called with (prompts answered, prompts in all) after every batch.

    Returns:
        The answers in the order of the prompts, without special tokens and surrounding white space.

    Raises:
        CalibrationError: a prompt is empty, or the tokenizer has no token to pad with.
    """
    pad_id = padding_id(tokenizer)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (len(encoded[index]), index))
    answers = [""] * len(prompts)
    configuration = _configuration(model, tokenizer, max_new_tokens, pad_id)
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        input_ids, attention_mask = _left_padded([encoded[index] for index in indices], pad_id)
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=configuration,
            )
        texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text.strip()
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return answers


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    rendered = render_prompt(tokenizer, prompt)
    return list(tokenizer(rendered.text, add_special_tokens=not rendered.templated)["input_ids"])


def _configuration(model: Any, tokenizer: Any, max_new_tokens: int, pad_id: int) -> Any:
    from transformers import GenerationConfig

    stored = getattr(model, "generation_config", None)
    end = getattr(stored, "eos_token_id", None)
    ends = {end} if isinstance(end, int) else set(end or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad_id,
        eos_token_id=sorted(ends) or None,
    )


def _left_padded(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], dtype=torch.long)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return input_ids, attention_mask
