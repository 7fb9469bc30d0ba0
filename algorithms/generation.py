"""Answers of a model to prompts, by greedy decoding.

Prompts are padded on the left and batched by length, so that little is computed on padding. Without a batch size as
many go together as a token budget holds; where memory runs out nevertheless, the batch is halved and tried again.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from algorithms.calibration import padding_id, render_prompt
from algorithms.errors import CalibrationError
from algorithms.loading import input_device

TOKEN_BUDGET = 8192
"""Tokens, padding and answers included, that go through a model together when no batch size is given."""
MOST_TOGETHER = 64
"""Prompts that go together at most when no batch size is given."""
_Done = TypeVar("_Done")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer every prompt greedily, through the chat template when there is one.

    Sampling settings that the checkpoint brings along are ignored: the same weights always give the same answers.

    Args:
        model: as `load_model` gives it.
        tokenizer: its tokenizer.
        prompts: the users' texts.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts answered together; None: as many as the token budget holds.
        progress: called with (prompts answered, prompts in all) after every batch.

    Returns:
        The answers in the order of the prompts, without special tokens and surrounding white space.

    Raises:
        CalibrationError: a prompt is empty, the tokenizer has no token to pad with, or one prompt does not fit into
            memory.
    """
    answers = [""] * len(prompts)
    done = 0
    for batch in answer_batches(
        model, tokenizer, encode_prompts(tokenizer, prompts), max_new_tokens=max_new_tokens, batch_size=batch_size
    ):
        for index, answer in batch:
            answers[index] = answer
        done += len(batch)
        if progress is not None:
            progress(done, len(prompts))
    return answers


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens that a model reads of every prompt, up to where its answer begins.

    Raises:
        CalibrationError: a prompt is empty, or the template hides where the user's text goes.
    """
    found = []
    for prompt in prompts:
        rendered = render_prompt(tokenizer, prompt)
        found.append(tuple(tokenizer(rendered.text, add_special_tokens=not rendered.templated)["input_ids"]))
    return found


def answer_batches(
    model: nn.Module,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
) -> Iterator[list[tuple[int, str]]]:
    """As `generate`, of encoded prompts: (position of the prompt, answer), batch by batch as they are done."""
    pad_id = padding_id(tokenizer)
    configuration = _configuration(model, tokenizer, max_new_tokens, pad_id)

    def answered(batch: _Batch) -> list[tuple[int, str]]:
        output = _run(model, batch, configuration)
        texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return [(index, text.strip()) for index, text in zip(batch.indices, texts, strict=True)]

    yield from _batch_by_batch(encoded, pad_id, max_new_tokens, batch_size, answered)


def first_token_log_probabilities(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Natural logarithms of the probabilities of the first token of the answer, for every prompt.

    Args:
        model: as `load_model` gives it.
        tokenizer: its tokenizer.
        prompts: the users' texts.
        batch_size: prompts read together; None: as many as the token budget holds.
        progress: called with (prompts read, prompts in all) after every batch.

    Returns:
        (prompts, vocabulary) float32, on the CPU.

    Raises:
        CalibrationError: as `generate`.
    """
    encoded = encode_prompts(tokenizer, prompts)
    return log_probabilities_after(model, tokenizer, encoded, batch_size=batch_size, progress=progress)


def log_probabilities_after(
    model: nn.Module,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """As `first_token_log_probabilities`, of the token that follows encoded texts."""
    pad_id = padding_id(tokenizer)
    configuration = _configuration(model, tokenizer, 1, pad_id, output_logits=True, return_dict_in_generate=True)

    def predicted(batch: _Batch) -> list[tuple[int, Tensor]]:
        output = _run(model, batch, configuration)
        rows = torch.log_softmax(output.logits[0].float(), dim=-1).cpu()
        return list(zip(batch.indices, rows, strict=True))

    found: dict[int, Tensor] = {}
    for batch in _batch_by_batch(encoded, pad_id, 1, batch_size, predicted):
        found.update(batch)
        if progress is not None:
            progress(len(found), len(encoded))
    return torch.stack([found[index] for index in range(len(encoded))]) if found else torch.empty(0, 0)


@dataclass(frozen=True)
class _Batch:
    """Left-padded prompts: their positions, and (prompts, tokens) int64 ids and mask."""

    indices: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor


def _batch_by_batch(
    encoded: Sequence[Sequence[int]],
    pad_id: int,
    new_tokens: int,
    batch_size: int | None,
    work: Callable[[_Batch], _Done],
) -> Iterator[_Done]:
    order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index]), index))
    most = batch_size or MOST_TOGETHER
    start = 0
    while start < len(order):
        count = min(most, len(order) - start)
        if batch_size is None:
            count = _fitting([len(encoded[index]) + new_tokens for index in order[start : start + count]])
        batch = _left_padded(encoded, order[start : start + count], pad_id)
        try:
            done = work(batch)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if count == 1:
                raise CalibrationError(
                    f"A prompt of {len(encoded[order[start]])} tokens with {new_tokens} more does not fit into memory",
                    "Ask for shorter answers, take the prompt out, or use a machine with more memory",
                ) from error
            most = count // 2
        else:
            start += count
            yield done
            continue
        # Outside the handler, so that the traceback no longer holds what filled the memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _fitting(lengths: Sequence[int]) -> int:
    """How many of the prompts, which get longer, hold the token budget when padded to the last; at least one."""
    fits = [count for count, length in enumerate(lengths, start=1) if count * length <= TOKEN_BUDGET]
    return fits[-1] if fits else 1


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in _OUT_OF_MEMORY)


def _run(model: Any, batch: _Batch, configuration: Any) -> Any:
    device = input_device(model)
    with torch.inference_mode():
        return model.generate(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            generation_config=configuration,
        )


def _configuration(model: Any, tokenizer: Any, max_new_tokens: int, pad_id: int, **more: Any) -> Any:
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
        **more,
    )


def _left_padded(encoded: Sequence[Sequence[int]], indices: Sequence[int], pad_id: int) -> _Batch:
    rows = [encoded[index] for index in indices]
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad_id] * (width - len(row)) + [*row] for row in rows], dtype=torch.long)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return _Batch(tuple(indices), input_ids, attention_mask)
