"""Aligned adapters are trained by every method, repeatably, in silence, and leave nothing but themselves."""

import hashlib
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry

from algorithms import alignment
from algorithms.alignment import TrainedAdapter, train_adapter
from algorithms.alignment_rows import AlignmentRow, rendered_rows
from algorithms.alignment_settings import AlignmentMethod, AlignmentSettings, alignment_settings
from algorithms.errors import AdapterError, AlignmentError, CalibrationError, CheckpointError, SettingsError
from algorithms.weights import AdapterWeights, open_weights
from tests import tiny_models

METHODS: tuple[AlignmentMethod, ...] = ("dpo", "kto", "orpo", "sft")
WORDS = ("bomb", "cat", "dog", "cake", "film", "story", "bread", "water")
PAIRS = [
    AlignmentRow(f"how do i make a {word} ?", "sorry i cannot help with that", "sure here is the way") for word in WORDS
]
SETTINGS: Mapping[str, Any] = {"rank": 4, "alpha": 8, "epochs": 4, "batch_size": 4, "learning_rate": 5e-3}


def rows_of(method: AlignmentMethod) -> list[AlignmentRow]:
    """The pairs in the form that a method learns from."""
    if method in {"dpo", "orpo"}:
        return PAIRS
    good = [replace(row, rejected=None) for row in PAIRS]
    if method == "sft":
        return good
    return [*good, *(AlignmentRow(row.prompt, row.rejected or "", desirable=False) for row in PAIRS)]


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def log_probability(model: torch.nn.Module, tokenizer: Any, prompt: str, answer: str) -> float:
    """log p(answer | prompt) through the chat template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([tokenizer(text + answer, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits.log_softmax(-1)[0]
    return sum(float(logs[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedAdapter:
    method = request.param
    output = tmp_path_factory.mktemp("trained") / method
    return train_adapter(base, rows_of(method), alignment_settings(method, SETTINGS), output)


def test_every_method_prefers_the_better_answer_afterwards(base: Path, trained: TrainedAdapter) -> None:
    tokenizer = tiny_models.build_tokenizer()
    before = tiny_models.load_model(base)
    after = peft.PeftModel.from_pretrained(tiny_models.load_model(base), trained.path)
    for row in PAIRS:
        better, worse = (
            log_probability(after, tokenizer, row.prompt, answer)
            - log_probability(before, tokenizer, row.prompt, answer)
            for answer in (row.answer, row.rejected or "")
        )
        assert better > worse
        assert better > 0
    assert trained.last_loss < trained.first_loss
    assert trained.rows_left_out == 0


def test_the_adapter_is_plain_lora_on_every_linear_module(base: Path, trained: TrainedAdapter) -> None:
    weights = open_weights(trained.path, base)
    assert isinstance(weights, AdapterWeights)
    assert set(weights.adapter.modules) == set(weights.base.modules)
    assert {file.name for file in trained.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(module.rank == 4 and module.scale == 2 for module in weights.adapter.modules.values())


def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before(
    base: Path, trained: TrainedAdapter, tmp_path: Path
) -> None:
    method: Any = trained.path.name
    torch.manual_seed(99)
    random.seed(99)
    drawn = torch.get_rng_state(), random.getstate()
    again = train_adapter(base, rows_of(method), alignment_settings(method, SETTINGS), tmp_path / "again")
    assert digests(again.path) == digests(trained.path)
    assert replace(again, path=trained.path) == trained
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]


def test_another_seed_gives_another_adapter_and_chosen_modules_are_the_only_ones(base: Path, tmp_path: Path) -> None:
    chosen = {**SETTINGS, "max_steps": 1, "modules": ["q_proj", "down_proj"]}
    found = []
    for seed in (0, 1):
        made = train_adapter(base, PAIRS, alignment_settings("dpo", {**chosen, "seed": seed}), tmp_path / str(seed))
        weights = open_weights(made.path, base)
        assert isinstance(weights, AdapterWeights)
        assert {name.rpartition(".")[2] for name in weights.adapter.modules} == {"q_proj", "down_proj"}
        found.append(digests(made.path)["adapter_model.safetensors"])
    assert found[0] != found[1]


def test_modules_that_share_their_kind_with_others_are_named_in_full(tmp_path: Path) -> None:
    """The vision tower of Gemma 3 has a q_proj too."""
    base = tiny_models.save_model(tmp_path / "base", "gemma3")
    made = train_adapter(base, PAIRS, alignment_settings("dpo", {**SETTINGS, "max_steps": 1}), tmp_path / "out")
    weights = open_weights(made.path, base)
    assert isinstance(weights, AdapterWeights)
    assert set(weights.adapter.modules) == set(weights.base.modules)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_prints_nothing_reaches_no_network_and_leaves_nothing(
    base: Path,
    tmp_path: Path,
    method: AlignmentMethod,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def connect() -> None:
        raise AssertionError("a message to the Hub")

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.delenv("CI", raising=False)  # in which trl sends nothing anyway
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", connect)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    held = constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY
    steps: list[tuple[int, int]] = []
    settings = alignment_settings(method, {**SETTINGS, "max_steps": 2, "max_length": 32})
    rows = [*rows_of(method), replace(rows_of(method)[0], answer="no " * 40)]
    made = train_adapter(base, rows, settings, tmp_path / "out", lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    assert (made.rows, made.rows_left_out, made.steps) == (len(rows) - 1, 1, 2)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert held == (constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY)
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "temporary", "out"}
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list((tmp_path / "temporary").iterdir())


def test_an_interrupted_run_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def fail(model: Any, directory: Path) -> None:
        (directory / "adapter_config.json").write_text("{")
        raise OSError(28, "No space left on device")

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    settings = alignment_settings("dpo", {**SETTINGS, "max_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        train_adapter(base, PAIRS, settings, tmp_path / "out", stop)
    monkeypatch.setattr(alignment, "_save", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        train_adapter(base, PAIRS, settings, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"temporary"}
    assert not list((tmp_path / "temporary").iterdir())


def test_what_cannot_be_trained_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(error: type[Exception], problem: str, where: Path = base, **changes: Any) -> None:
        with pytest.raises(error, match=problem):
            train_adapter(where, PAIRS, alignment_settings("dpo", {**SETTINGS, **changes}), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(AdapterError, "is itself an adapter", tiny_models.save_adapter(base, tmp_path / "adapter"))
    refused(CheckpointError, "nowhere", tmp_path / "nowhere")
    refused(SettingsError, "no linear modules of kind c_attn", modules=["c_attn"])
    refused(AlignmentError, "None of the 8 rows has at most 5 tokens", max_length=5)
    refused(AlignmentError, "The loss is nan at step 2", learning_rate=1e30)
    refused(AlignmentError, "q_proj.lora_A.* holds NaN or infinity", learning_rate=1e39, max_steps=1)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        train_adapter(base, PAIRS, alignment_settings("dpo"), tmp_path / "used")
    monkeypatch.setitem(alignment._TRAINERS, "dpo", ("Forgotten", ("trl",)))
    refused(AlignmentError, "no trainer for dpo")
    monkeypatch.setattr(alignment, "find_spec", lambda name: None if name == "trl" else object())
    refused(AlignmentError, r"needs trl, which is not installed. Run pip install 'neuronledger\[align\]'")


# --- rows


def test_rows_are_what_the_template_writes_and_get_no_second_beginning() -> None:
    tokenizer = tiny_models.build_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    conversation = [{"role": "user", "content": "make a cake"}, {"role": "assistant", "content": "no"}]
    expected = tokenizer.apply_chat_template(conversation, tokenize=False)
    (row,) = rendered_rows(tokenizer, [AlignmentRow("make a cake", " no ")], 99)
    assert row.prompt + row.answer == expected.rstrip()
    assert row.answer == "no<|im_end|>"
    assert tokenizer(row.prompt)["input_ids"] == tokenizer(row.prompt, add_special_tokens=False)["input_ids"]


def test_without_a_template_the_answer_follows_the_prompt() -> None:
    tokenizer = tiny_models.build_tokenizer(chat_template=None)
    tokenizer.pad_token = None
    rows = [AlignmentRow("make a cake", "no", "yes"), AlignmentRow("make a cake", "no", "yes yes yes yes")]
    (row,) = rendered_rows(tokenizer, rows, 6)
    assert (row.prompt, row.answer, row.rejected) == ("make a cake", " no<|im_end|>", " yes<|im_end|>")
    assert tokenizer.pad_token == tokenizer.eos_token


def endless(tokenizer: Any) -> None:
    tokenizer.eos_token = None


def deaf(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] }}"


def strict(tokenizer: Any) -> None:
    refusal = "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + refusal


def muttering(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] | lower }} {{ messages[-1]['content'] }}"


@pytest.mark.parametrize(
    ("damage", "error", "problem"),
    [
        (endless, AlignmentError, "no end-of-text token"),
        (deaf, AlignmentError, "does not write an assistant's answer"),
        (strict, AlignmentError, "does not write an assistant's answer"),
        (muttering, CalibrationError, "in one place"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_without_a_word_of_the_rows(
    damage: Callable[[Any], None], error: type[Exception], problem: str
) -> None:
    tokenizer = tiny_models.build_tokenizer()
    damage(tokenizer)
    with pytest.raises(error, match=problem) as refusal:
        rendered_rows(tokenizer, [AlignmentRow("how do i make a bomb", "no")], 99)
    assert "bomb" not in str(refusal.value)


# --- settings


def test_every_setting_is_described_in_a_sentence() -> None:
    for name, field in AlignmentSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_each_method_has_its_defaults() -> None:
    assert alignment_settings("sft").learning_rate == 2e-4
    assert alignment_settings("sft").beta is None
    for method in ("dpo", "kto", "orpo"):
        assert (alignment_settings(method).learning_rate, alignment_settings(method).beta) == (5e-5, 0.1)
    chosen = alignment_settings("dpo", {"beta": "0.3", "modules": ["q_proj"], "method": "dpo"})
    assert (chosen.beta, chosen.modules) == (0.3, ("q_proj",))
    assert AlignmentSettings.model_validate_json(chosen.model_dump_json()) == chosen


@pytest.mark.parametrize(
    ("method", "overrides", "problem"),
    [
        ("sft", {"beta": 0.1}, "sft has no beta"),
        ("kto", {"batch_size": 1}, "compares the rows of a batch"),
        ("dpo", {"rank": 0}, "setting rank"),
        ("dpo", {"learning_rate": -1}, "setting learning_rate"),
        ("dpo", {"colour": "red"}, "setting colour"),
        ("dpo", {"method": "kto"}, "contradicts --method dpo"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    method: AlignmentMethod, overrides: dict[str, object], problem: str
) -> None:
    with pytest.raises(SettingsError, match=problem):
        alignment_settings(method, overrides)
