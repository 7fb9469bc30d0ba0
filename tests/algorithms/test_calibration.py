"""Which tokens of a prompt and its answer the statistics count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.calibration import batches, calibration_items, padding_id, render_prompt
from algorithms.errors import CalibrationError
from algorithms.laboratory.tokenizer import ASSISTANT, END, USER, word_tokenizer

WORDS = ["system", "rule", "one", "two", "three", "no", "sorry", "never", "assistant"]
WITH_SYSTEM_PROMPT = (
    "<|begin|> system rule one <|end|>{% for m in messages %} <|user|> {{ m['content'] | trim }} <|end|>"
    "{% endfor %} <|assistant|> "
)
ALL_PARTS = frozenset({"prompt", "header", "answer"})


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS)


def counted(tokenizer, item):
    pairs = zip(item.input_ids, item.mask, strict=True)
    return tokenizer.convert_ids_to_tokens([token for token, counts in pairs if counts])


def items(tokenizer, prompts, answers, *tokens, answer_tokens=12):
    return calibration_items(tokenizer, prompts, answers, frozenset(tokens), answer_tokens)


def test_prompt_tokens_are_the_users_words(tokenizer):
    (item,) = items(tokenizer, ["one two"], ["no sorry"], "prompt")
    assert counted(tokenizer, item) == ["one", "two"]


def test_header_is_what_stands_between_the_users_words_and_the_answer(tokenizer):
    (item,) = items(tokenizer, ["one two"], ["no sorry"], "header")
    assert counted(tokenizer, item) == [END, ASSISTANT]


def test_only_the_first_answer_tokens_are_kept(tokenizer):
    (item,) = items(tokenizer, ["one two"], ["no sorry never three"], "answer", answer_tokens=2)
    assert counted(tokenizer, item) == ["no", "sorry"]
    assert len(item.input_ids) == item.prompt_tokens + 2


def test_the_answer_is_left_out_unless_its_tokens_count(tokenizer):
    (item,) = items(tokenizer, ["one two"], ["no sorry"], "prompt", "header")
    assert len(item.input_ids) == item.prompt_tokens
    assert counted(tokenizer, item) == ["one", "two", END, ASSISTANT]


def test_system_prompt_tokens_never_count_even_when_the_user_repeats_them(tokenizer):
    tokenizer.chat_template = WITH_SYSTEM_PROMPT
    (item,) = items(tokenizer, ["system rule one"], ["no"], *ALL_PARTS)
    assert counted(tokenizer, item) == ["system", "rule", "one", END, ASSISTANT, "no"]
    assert not any(item.mask[:6])


def test_a_template_that_trims_still_shows_where_the_text_is(tokenizer):
    tokenizer.chat_template = WITH_SYSTEM_PROMPT
    (item,) = items(tokenizer, ["  one two \n"], [None], "prompt")
    assert counted(tokenizer, item) == ["one", "two"]


def test_a_prompt_that_speaks_of_the_header_does_not_move_it(tokenizer):
    (item,) = items(tokenizer, ["assistant no assistant"], [None], "prompt")
    assert counted(tokenizer, item) == ["assistant", "no", "assistant"]


def test_a_template_that_drops_the_users_text_is_refused(tokenizer):
    tokenizer.chat_template = "<|begin|> <|assistant|> "
    with pytest.raises(CalibrationError, match="chat template"):
        render_prompt(tokenizer, "one two")


def test_without_a_template_the_last_token_is_the_header_and_not_prompt(tokenizer):
    tokenizer.chat_template = None
    (item,) = items(tokenizer, ["one two three"], ["no sorry"], "header")
    assert counted(tokenizer, item) == ["three"]
    (item,) = items(tokenizer, ["one two three"], ["no sorry"], "prompt")
    assert counted(tokenizer, item) == ["one", "two"]
    (item,) = items(tokenizer, ["one two three"], ["no sorry"], "answer")
    assert counted(tokenizer, item) == ["no", "sorry"]


def test_a_tokenizer_without_offsets_is_refused_by_name():
    class SlowWordTokenizer:
        is_fast = False

    with pytest.raises(CalibrationError, match="SlowWordTokenizer"):
        items(SlowWordTokenizer(), ["one"], [None], "prompt")


@pytest.mark.parametrize(
    ("prompts", "answers", "tokens", "answer_tokens", "problem"),
    [
        ([], [], {"prompt"}, 12, "no calibration prompts"),
        (["one"], [], {"prompt"}, 12, "1 prompts came with 0 answers"),
        (["one"], [None], set(), 12, "No token part"),
        (["one"], [None], {"headers"}, 12, "headers"),
        (["one"], ["no"], {"answer"}, 0, "0 answer tokens"),
        (["one", "two"], ["no", None], {"answer"}, 12, "Prompt 2"),
        (["one", "  "], [None, None], {"prompt"}, 12, "empty"),
    ],
)
def test_calls_without_meaning_are_refused(tokenizer, prompts, answers, tokens, answer_tokens, problem):
    with pytest.raises(CalibrationError, match=problem):
        calibration_items(tokenizer, prompts, answers, frozenset(tokens), answer_tokens)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
)
def test_batches_hold_every_item_once_and_never_count_padding(lengths, batch_size):
    tokenizer = word_tokenizer(WORDS)
    prompts = [" ".join(["one"] * length) for length in lengths]
    made = items(tokenizer, prompts, ["no sorry"] * len(prompts), *ALL_PARTS)
    seen = []
    for batch in batches(made, batch_size, padding_id(tokenizer)):
        seen += batch.indices
        assert not (batch.count_mask & (batch.attention_mask == 0)).any()
        for row, index in enumerate(batch.indices):
            length = int(batch.attention_mask[row].sum())
            assert batch.input_ids[row, :length].tolist() == list(made[index].input_ids)
            assert batch.count_mask[row, :length].tolist() == list(made[index].mask)
            assert (batch.input_ids[row, length:] == tokenizer.pad_token_id).all()
            last = batch.input_ids[row, batch.last_prompt[row]]
            assert tokenizer.convert_ids_to_tokens(int(last)) == ASSISTANT
    assert sorted(seen) == list(range(len(made)))


def test_the_last_prompt_token_is_the_one_that_decides_the_answer(tokenizer):
    made = items(tokenizer, ["one", "one two three"], ["no", "no"], *ALL_PARTS)
    (batch,) = batches(made, 8, 0)
    assert torch.equal(batch.last_prompt, torch.tensor([item.prompt_tokens - 1 for item in made]))


def test_a_batch_size_of_nothing_is_refused(tokenizer):
    with pytest.raises(CalibrationError, match="Batch size 0"):
        list(batches(items(tokenizer, ["one"], [None], "prompt"), 0, 0))


def test_the_end_token_pads_where_there_is_no_padding_token(tokenizer):
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id


def test_special_tokens_of_the_template_are_not_added_twice(tokenizer):
    (item,) = items(tokenizer, ["one"], [None], "prompt")
    assert tokenizer.convert_ids_to_tokens(list(item.input_ids)) == ["<|begin|>", USER, "one", END, ASSISTANT]
