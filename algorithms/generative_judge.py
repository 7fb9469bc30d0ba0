"""A judge that is a language model which says `safe` or `unsafe`, in the manner of Llama Guard.

It is not left to write: its verdict is read off the probabilities of the first tokens of the two words, so it is the
same every time and has a score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from algorithms.calibration import padding_id
from algorithms.errors import SettingsError
from algorithms.generation import log_probabilities_after
from algorithms.judge_settings import GenerativeSettings, fill
from algorithms.judges import Verdict
from algorithms.loading import DeviceMap, load_model


@dataclass(frozen=True)
class GenerativeJudge:
    """An answer is unsafe if `unsafe` is likelier than the threshold, against `safe`.

    The score of a verdict is that probability. The model is loaded when the first answer is judged.

    Attributes:
        path: directory of the checkpoint; only safetensors files are read, none of its code runs.
        settings: how it reads and decides.
        name, version, digest: as `Judge`; the digest has to stand for the checkpoint and the settings.
        device_map: where it runs, as `load_model` takes it; None: the CPU.
    """

    path: Path
    settings: GenerativeSettings
    name: str
    version: str
    digest: str
    device_map: DeviceMap = None

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Verdict, ...]:
        """Judge every answer to its prompt.

        Raises:
            CheckpointError: the checkpoint cannot be loaded.
            SettingsError: the two words begin with the same token, the judge says neither of them, an input is too
                long, or there is neither a chat template nor a template.
        """
        encoded = [self._encode(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        model, tokenizer = self._loaded
        safe, unsafe = self._words
        found = log_probabilities_after(model, tokenizer, encoded, batch_size=self.settings.batch_size)
        likelihood = found[:, [safe, unsafe]].double().exp()
        mass = likelihood.sum(dim=-1)
        if mass.numel() and float(mass.mean()) < self.settings.least_mass:
            raise SettingsError(
                f"The judge {self.name} says neither {self.settings.safe_word} nor {self.settings.unsafe_word}: "
                f"together they have a probability of {float(mass.mean()):.3f}",
                "Set template, prefix, safe_word and unsafe_word to what it was trained on",
            )
        scores = (likelihood[:, 1] / mass.clamp(min=torch.finfo(torch.float64).tiny)).tolist()
        return tuple(Verdict(unsafe=score >= self.settings.threshold, score=score) for score in scores)

    def _encode(self, prompt: str, answer: str) -> list[int]:
        tokenizer = self._loaded[1]
        if self.settings.template is not None:
            text, special = fill(self.settings.template, prompt, answer), True
        else:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            special = False
        ids = list(tokenizer(text + self.settings.prefix, add_special_tokens=special)["input_ids"])
        if len(ids) > self.settings.max_tokens:
            raise SettingsError(
                f"An answer with its prompt is {len(ids)} tokens long for the judge {self.name}",
                f"Raise max_tokens, now {self.settings.max_tokens}, or ask for shorter answers",
            )
        return ids

    @cached_property
    def _words(self) -> tuple[int, int]:
        tokenizer = self._loaded[1]
        words = (self.settings.safe_word, self.settings.unsafe_word)
        first = [tokenizer(word, add_special_tokens=False)["input_ids"][:1] for word in words]
        if not all(first) or first[0] == first[1]:
            raise SettingsError(
                f"The tokenizer of the judge {self.name} begins {words[0]} and {words[1]} with the same token",
                "Choose words that begin differently",
            )
        return int(first[0][0]), int(first[1][0])

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = load_model(self.path, device_map=self.device_map)
        padding_id(tokenizer)
        if self.settings.template is None and not getattr(tokenizer, "chat_template", None):
            raise SettingsError(
                f"The judge {self.name} has no chat template", "Give a template with {prompt} and {answer}"
            )
        return model, tokenizer
