"""Tiny random models of every supported family, saved the way users save theirs, for tests.

Nothing is downloaded: configurations are given here, weights are drawn from a seed, and files are written by
`save_pretrained` of transformers and PEFT.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

VOCABULARY_SIZE = 64

_WIDE = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_GPT2 = {"vocab_size": VOCABULARY_SIZE, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
_NEOX = {key: value for key, value in _WIDE.items() if key != "num_key_value_heads"}
_OPT = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 16,
}

# Family name -> (configuration class of transformers, its arguments). head_dim differs from hidden_size / heads where
# the family allows it, so that a mix-up of the two shows.
CONFIGURATIONS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "llama": ("LlamaConfig", _WIDE),
        "qwen2": ("Qwen2Config", _WIDE),
        "qwen3": ("Qwen3Config", {**_WIDE, "head_dim": 8}),
        "mistral": ("MistralConfig", {**_WIDE, "head_dim": 8}),
        "ministral": ("MinistralConfig", {**_WIDE, "head_dim": 8}),
        "gemma": ("GemmaConfig", {**_WIDE, "head_dim": 8}),
        "gemma2": ("Gemma2Config", {**_WIDE, "head_dim": 8}),
        "gemma3_text": ("Gemma3TextConfig", {**_WIDE, "head_dim": 8}),
        "smollm3": ("SmolLM3Config", _WIDE),
        "olmo2": ("Olmo2Config", _WIDE),
        "phi3": ("Phi3Config", _WIDE),
        "phi": ("PhiConfig", _WIDE),
        "gpt_neox": ("GPTNeoXConfig", _NEOX),
        "gpt2": ("GPT2Config", _GPT2),
        "opt": ("OPTConfig", _OPT),
        "gemma3": (
            "Gemma3Config",
            {
                "text_config": {**_WIDE, **_TOKENS, "head_dim": 8},
                "vision_config": {
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 16,
                    "patch_size": 8,
                },
            },
        ),
    }
)
FAMILY_NAMES = tuple(CONFIGURATIONS)

_VOCABULARY = (
    "<pad> <unk> <|im_start|> <|im_end|> system user assistant how do i make a cake bomb cat dog feed hurt sorry"
    " cannot help with that sure here is the way to film good bad positive negative review what please tell me"
    " about you are an in of and it was great terrible story music water bread no yes ? . ,"
)
WORDS = tuple(_VOCABULARY.split())

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A tiny random model of a family; `changes` replace arguments of its configuration."""
    name, arguments = CONFIGURATIONS[family]
    tokens = {} if family == "gemma3" else _TOKENS
    config = getattr(transformers, name)(**{**tokens, **arguments, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # The default initialisation is so narrow that all neurons look alike, and leaves all norms and biases the same.
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 0.2 * noise if parameter.dim() > 1 else parameter.data + 0.1 * noise
    return model.eval()


def save_model(
    directory: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str | int | None = None,
    seed: int = 0,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """Save a tiny random model with its tokenizer.

    Args:
        directory: where to.
        family: a key of `CONFIGURATIONS`.
        dtype: dtype of the weights on disk.
        shard_size: largest size of a weight file, such as "10KB"; None for one file.
        seed: of the weights.
        tokenizer: whether to save the tokenizer beside it.
        changes: replace arguments of the configuration.
    """
    model = build_model(family, seed=seed, **changes).to(dtype)
    return write_model(directory, model, shard_size=shard_size, tokenizer=tokenizer)


def write_model(
    directory: Path,
    model: transformers.PreTrainedModel,
    *,
    shard_size: str | int | None = None,
    tokenizer: bool = True,
) -> Path:
    """Save a model with `save_pretrained`, without its progress bars."""
    with quiet():
        model.save_pretrained(directory, max_shard_size=shard_size or "1GB")
        if tokenizer:
            build_tokenizer().save_pretrained(directory)
    return directory


def save_variant(
    source: Path, directory: Path, *, scale: float = 0.05, seed: int = 1, shard_size: str | int | None = None
) -> Path:
    """Save a model whose block weights are those of `source` plus noise: a stand-in for a fine-tuned model."""
    model = load_model(source, dtype="auto")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ".embed" not in name and "lm_head" not in name:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * scale)
    return write_model(directory, model, shard_size=shard_size)


def save_adapter(
    base: Path,
    directory: Path,
    *,
    targets: list[str] | str = "all-linear",
    rank: int = 4,
    alpha: float = 8,
    seed: int = 1,
    scale: float = 0.1,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Save a random LoRA adapter (B is not zero) on a saved base model with PEFT.

    Args:
        base: directory of the base model.
        directory: where to.
        targets: target_modules of the adapter.
        rank: r.
        alpha: lora_alpha.
        seed: of the factors.
        scale: standard deviation of the entries of A and B.
        dtype: dtype of the factors on disk.
        settings: further arguments of `peft.LoraConfig`.
    """
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **settings)
    with quiet():
        model = peft.get_peft_model(load_model(base), config, autocast_adapter_dtype=False)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * scale)
                    parameter.data = parameter.data.to(dtype)
        model.save_pretrained(directory)
    return directory


def load_model(path: Path, dtype: torch.dtype | str = torch.float32) -> transformers.PreTrainedModel:
    """Load a saved model with transformers, without its progress bars."""
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True).eval()


def merged_model(base: Path, adapter: Path) -> transformers.PreTrainedModel:
    """What PEFT makes of base and adapter: the reference for effective weights. Float32."""
    with quiet():
        return peft.PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload()


def build_tokenizer(words: Sequence[str] = WORDS, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A fast word-level tokenizer with offsets, special tokens and a ChatML template; at most 64 ids."""
    vocabulary = {word: identifier for identifier, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Punctuation("isolated")]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = chat_template
    return fast


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notices of transformers and PEFT."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
