"""Rows to align on, as the text that a model is trained on: through the chat template, as it is prompted elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from algorithms.calibration import render_prompt, require_fast_tokenizer
from algorithms.errors import AlignmentError

# Letters only: templates strip and escape other signs.
_PROMPT, _ANSWER = "PLACEHOLDERPROMPT", "PLACEHOLDERANSWER"


@dataclass(frozen=True)
class AlignmentRow:
    """One prompt with what is to be learned of it.

    Attributes:
        prompt: the user's text.
        answer: an answer to it: the better one of a pair, or the one that `desirable` speaks of.
        rejected: the worse answer of a pair (dpo, orpo).
        desirable: whether the answer is a good one (kto).
    """

    prompt: str
    answer: str
    rejected: str | None = None
    desirable: bool = True


def rendered_rows(tokenizer: Any, rows: Sequence[AlignmentRow], max_length: int) -> list[AlignmentRow]:
    """The rows that fit, with prompts up to where the answer begins, and answers to the end of the text.

    A templated text has its special tokens in it already, so the tokenizer is changed to add none.

    Args:
        tokenizer: a fast transformers tokenizer; it is for training alone from here on.
        rows: as they were given.
        max_length: most tokens of a prompt with an answer; a row with more is left out.

    Raises:
        CalibrationError: a slow tokenizer, or a template that hides where the user's text goes.
        AlignmentError: no end-of-text token, or a template that hides where the answer goes.
    """
    require_fast_tokenizer(tokenizer)
    if tokenizer.eos_token is None:
        raise AlignmentError("The tokenizer has no end-of-text token", "Set eos_token in tokenizer_config.json")
    ending = _ending(tokenizer)
    rendered = [_rendered(tokenizer, row, ending) for row in rows]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template:
        _add_no_tokens(tokenizer)
    return [row for row in rendered if _length(tokenizer, row) <= max_length]


def _rendered(tokenizer: Any, row: AlignmentRow, ending: str) -> AlignmentRow:
    prompt = render_prompt(tokenizer, row.prompt)
    gap = "" if prompt.templated or prompt.text[-1:].isspace() else " "
    rejected = None if row.rejected is None else gap + row.rejected.strip() + ending
    return replace(row, prompt=prompt.text, answer=gap + row.answer.strip() + ending, rejected=rejected)


def _ending(tokenizer: Any) -> str:
    """What stands after an answer: what the template writes there, and the end-of-text token."""
    eos = str(tokenizer.eos_token)
    if not tokenizer.chat_template:
        return eos
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    except TemplateError:
        text = ""
    _, found, after = str(text).partition(_ANSWER)
    if not found:
        raise AlignmentError(
            "The chat template does not write an assistant's answer unchanged", "Use a template that does"
        )
    ending = after.rstrip()
    return ending if ending.endswith(eos) else ending + eos


def _add_no_tokens(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])


def _length(tokenizer: Any, row: AlignmentRow) -> int:
    answers = [row.answer] if row.rejected is None else [row.answer, row.rejected]
    return max(len(tokenizer(row.prompt + answer)["input_ids"]) for answer in answers)
