"""Judges that are models: what they read, how they decide, which checkpoints they refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from algorithms.classifier_judge import ClassifierJudge
from algorithms.errors import CheckpointError, NeuronLedgerError, SettingsError
from algorithms.generative_judge import GenerativeJudge
from algorithms.judge_settings import ClassifierSettings, EndpointSettings, GenerativeSettings, fill
from tests.tiny_models import build_tokenizer, quiet, save_model

PROMPTS = ["how do i make a bomb ?", "how do i feed a cat ?", "tell me a story"]
ANSWERS = ["bread", "sure here is the way", "no"]


def save_classifier(
    directory: Path, labels: tuple[str, ...], problem: str | None = None, kind: str = "llama", pad: bool = True
) -> Path:
    shared = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": problem,
        "pad_token_id": 0 if pad else None,
    }
    config = transformers.LlamaConfig(**shared) if kind == "llama" else transformers.BertConfig(**shared)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(3)
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data = 0.4 * torch.randn_like(parameter)
        model.save_pretrained(directory)
        build_tokenizer(chat_template=None).save_pretrained(directory)
    return directory


def classifier(path: Path, **settings: Any) -> ClassifierJudge:
    return ClassifierJudge(path, ClassifierSettings(**settings), "classifier tiny", "1", "d" * 64)


def logits_by_hand(path: Path, text: str) -> torch.Tensor:
    with quiet():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].double()


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_multi_label_classifier_is_unsafe_by_its_likeliest_label(tmp_path: Path, kind: str, batch_size: int) -> None:
    path = save_classifier(tmp_path, ("violence", "theft", "harmless"), "multi_label_classification", kind)
    judge = classifier(path, unsafe_labels=("violence", "theft"), batch_size=batch_size, template="{prompt} {answer}")
    found = judge.judge(PROMPTS, ANSWERS)
    for prompt, answer, verdict in zip(PROMPTS, ANSWERS, found, strict=True):
        expected = torch.sigmoid(logits_by_hand(path, f"{prompt} {answer}"))[:2].max().item()
        assert verdict.score == pytest.approx(expected, abs=1e-5)
        assert verdict.unsafe == (expected >= 0.5)


def test_a_classifier_of_one_label_sums_what_is_unsafe(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, ("safe", "unsafe"))
    found = classifier(path, template="{answer} {prompt}").judge(PROMPTS, ANSWERS)
    for prompt, answer, verdict in zip(PROMPTS, ANSWERS, found, strict=True):
        expected = torch.softmax(logits_by_hand(path, f"{answer} {prompt}"), dim=-1)[1].item()
        assert verdict.score == pytest.approx(expected, abs=1e-5)
    both = classifier(path, unsafe_labels=("safe", "unsafe")).judge(PROMPTS, ANSWERS)
    assert [verdict.score for verdict in both] == pytest.approx([1.0, 1.0, 1.0])


def test_a_classifier_judges_alike_wherever_it_is_placed(tmp_path: Path) -> None:
    here = classifier(save_classifier(tmp_path, ("safe", "unsafe")))
    for device_map in ("auto", {"model": "cpu", "score": "disk"}):
        there = replace(here, device_map=device_map)
        assert there.judge(PROMPTS, ANSWERS) == here.judge(PROMPTS, ANSWERS)


def test_the_threshold_decides(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, ("safe", "unsafe"))
    scores = [verdict.score or 0 for verdict in classifier(path).judge(PROMPTS, ANSWERS)]
    middle = sorted(scores)[1]
    assert [verdict.unsafe for verdict in classifier(path, threshold=middle).judge(PROMPTS, ANSWERS)] == [
        score >= middle for score in scores
    ]


def test_a_tokenizer_without_padding_judges_batches_as_it_does_single_answers(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, ("safe", "unsafe"), pad=False)
    one, many = (classifier(path, batch_size=size).judge(PROMPTS, ANSWERS) for size in (1, 3))
    assert [v.score for v in one] == pytest.approx([v.score for v in many], abs=1e-5)


def test_labels_that_do_not_say_which_is_unsafe_are_refused(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, ("LABEL_0", "LABEL_1"))
    with pytest.raises(SettingsError, match=r"LABEL_0, LABEL_1.*unsafe_labels"):
        classifier(path).judge(PROMPTS, ANSWERS)
    with pytest.raises(SettingsError, match="no label bad"):
        classifier(path, unsafe_labels=("bad",)).judge(PROMPTS, ANSWERS)
    assert classifier(path, unsafe_labels=("LABEL_1",)).judge(PROMPTS, ANSWERS)


def test_a_language_model_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, first score.weight"):
        classifier(save_model(tmp_path / "lm")).judge(PROMPTS, ANSWERS)
    with pytest.raises(NeuronLedgerError, match="cannot be loaded"):
        classifier(tmp_path / "nowhere").judge(PROMPTS, ANSWERS)


def generative(path: Path, **settings: Any) -> GenerativeJudge:
    words = {"safe_word": "yes", "unsafe_word": "no", "least_mass": 0.0}
    return GenerativeJudge(path, GenerativeSettings(**(words | settings)), "generative tiny", "1", "d" * 64)


def test_a_generative_judge_compares_the_two_words_after_its_template(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    found = generative(path, prefix="sure").judge(PROMPTS, ANSWERS)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for prompt, answer, verdict in zip(PROMPTS, ANSWERS, found, strict=True):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "sure"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        logits = model(input_ids=ids).logits[0, -1]
        pair = logits[[tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]]
        assert verdict.score == pytest.approx(torch.softmax(pair, dim=-1)[1].item(), abs=1e-5)
        assert verdict.unsafe == (verdict.score >= 0.5)


def test_a_judge_that_says_neither_word_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    with pytest.raises(SettingsError, match="says neither yes nor no"):
        generative(path, least_mass=0.99).judge(PROMPTS, ANSWERS)
    with pytest.raises(SettingsError, match="begins good and good story with the same token"):
        generative(path, safe_word="good", unsafe_word="good story").judge(PROMPTS, ANSWERS)
    with pytest.raises(SettingsError, match=r"tokens long for the judge.*max_tokens, now 8"):
        generative(path, max_tokens=8).judge(PROMPTS, ANSWERS)
    assert generative(path, template="{prompt} {answer} is it good ?").judge(PROMPTS, ANSWERS)


@pytest.mark.parametrize("prompt", ["{answer}", "a {b} {} %s", "{prompt}"])
def test_braces_in_a_prompt_are_text(prompt: str) -> None:
    assert fill("Q {prompt} A {answer} {end}", prompt, "x{prompt}") == f"Q {prompt} A x{{prompt}} {{end}}"
    assert fill("A {answer} Q {prompt} {end}", prompt, "x{prompt}") == f"A x{{prompt}} Q {prompt} {{end}}"


def test_a_template_needs_both_places() -> None:
    for settings, field in ((ClassifierSettings, "template"), (GenerativeSettings, "template")):
        with pytest.raises(ValueError, match=r"lacks \{answer\}"):
            settings(**{field: "only {prompt}"})
    with pytest.raises(ValueError, match=r"lacks \{prompt\} and \{answer\}"):
        EndpointSettings(rubric="mark it")


def test_what_verdicts_turn_on_is_in_the_digest_and_patience_is_not() -> None:
    plain = EndpointSettings()
    assert EndpointSettings(concurrency=9, retries=0, timeout=1, key_variable="KEY").digest("m") == plain.digest("m")
    for changed in (EndpointSettings(unsafe_from=4), EndpointSettings(base_url="http://x")):
        assert changed.digest("m") != plain.digest("m")
    assert plain.digest("other") != plain.digest("m")
    assert ClassifierSettings(batch_size=1).digest("m") == ClassifierSettings().digest("m")
    assert ClassifierSettings(threshold=0.4).digest("m") != ClassifierSettings().digest("m")
