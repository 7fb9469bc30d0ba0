"""A PEFT LoRA adapter directory: which modules it changes, by which factors, at which scale.

The effective weight of an adapted module is `W + s B A`, `A` of shape `(r, k)`, `B` of shape `(d, r)`,
`s = alpha / r`, or `alpha / √r` for rsLoRA (arXiv 2106.09685, equation 3; arXiv 2312.03732). Everything in an adapter
that would make the effective weight anything else is refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from algorithms.checkpoints import StoredTensor, read_stored, refuse_quantised
from algorithms.errors import AdapterError
from algorithms.safetensors_files import read_header, read_json_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")
_MERGE = "Merge the adapter into its base model with PEFT's merge_and_unload and register the merged model"
_SAVE_AGAIN = "Save the adapter again with PEFT's save_pretrained"

# Initialisations that leave the base weights as they are. The others (PiSSA, CorDA, OLoRA, LoftQ, ...) subtract
# something from the base when PEFT loads the adapter, so the base checkpoint is not what the adapter adds to.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")

_LARGEST = 1e30  # of a rank or alpha; a comparison also sorts out NaN and integers that no float can hold
_PEFT_DEFAULT = 8
"""What PEFT takes for r and lora_alpha when the config leaves them out."""

# Keys of adapter_config.json that change the effective weights when they are set, and what they mean.
_REFUSED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": "DoRA",
        "modules_to_save": "modules trained in full (modules_to_save)",
        "trainable_token_indices": "trained embeddings (trainable_token_indices)",
        "layer_replication": "replicated layers (layer_replication)",
        "lora_bias": "trained biases (lora_bias)",
        "target_parameters": "LoRA on parameters instead of modules (target_parameters)",
        "use_qalora": "QALoRA",
        "use_bdlora": "block-diagonal LoRA",
        "alora_invocation_tokens": "activated LoRA, which acts on some tokens only",
        "arrow_config": "routed adapters (arrow_config)",
        "kasa_config": "KaSA",
        "monteclora_config": "MonteCLoRA",
        "velora_config": "VeLoRA",
        "megatron_config": "Megatron layers",
    }
)
# Keys that say how the adapter was trained or found, not what it does. Any other key that is set is refused: it may
# come from a later version of PEFT and change the weights.
_HARMLESS_KEYS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
        "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
        "target_modules", "task_type", "use_rslora",
    }
)  # fmt: skip


@dataclass(frozen=True)
class LoraModule:
    """The adapter of one module.

    Attributes:
        name: name of the module in the transformers model, `model.layers.0.self_attn.q_proj`.
        a_tensor: name of A in the adapter file.
        b_tensor: name of B in the adapter file.
        rank: r.
        alpha: lora_alpha of this module.
        scale: s, what `B A` is multiplied by.
    """

    name: str
    a_tensor: str
    b_tensor: str
    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter whose config and header have been checked; no weight is in memory.

    Attributes:
        path: the directory.
        config: content of adapter_config.json.
        tensors: every stored tensor by name.
        base_model: what the config calls its base model; empty when it does not say.
        modules: adapted modules by name, in the order of their names.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    base_model: str
    modules: Mapping[str, LoraModule]

    @classmethod
    def open(cls, path: Path) -> "Adapter":
        """Open an adapter directory.

        Raises:
            AdapterError: it is no plain LoRA adapter, or config and tensors disagree.
            CheckpointError: a file is missing or damaged.
            UnsupportedModelError: a tensor is quantised.
        """
        config = read_json_file(path / ADAPTER_CONFIG, "Give a directory saved by PEFT's save_pretrained")
        _refuse_other_methods(config, path)
        if not (path / ADAPTER_WEIGHTS).exists():
            raise AdapterError(
                f"{path} has no {ADAPTER_WEIGHTS}; adapters in .bin files are not opened",
                "Save the adapter with PEFT's save_pretrained(..., safe_serialization=True)",
            )
        tensors = read_header(path / ADAPTER_WEIGHTS).tensors
        for tensor in tensors.values():
            refuse_quantised(tensor, path)
        modules = {
            name: _lora_module(name, factors, tensors, config, path)
            for name, factors in sorted(_pairs(tensors, path).items())
        }
        return cls(path, config, tensors, str(config.get("base_model_name_or_path") or ""), MappingProxyType(modules))

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A `(r, k)` and B `(d, r)` in float32, and the scale s of a module.

        Raises:
            AdapterError: the adapter does not change this module.
        """
        module = self.modules.get(name)
        if module is None:
            raise AdapterError(f"{self.path} has no adapter for {name}", "Check the module name")
        A = read_stored(self.path, self.tensors[module.a_tensor]).to(torch.float32)
        B = read_stored(self.path, self.tensors[module.b_tensor]).to(torch.float32)
        return A, B, module.scale

    def targets(self, module: str) -> bool:
        """Whether PEFT would place the adapter on a module of this name.

        Raises:
            AdapterError: target_modules, exclude_modules or layers_pattern cannot be understood.
        """
        return _targets(self.config, module, self.path)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a PEFT adapter rather than a full checkpoint."""
    return (path / ADAPTER_CONFIG).is_file()


def _refuse_other_methods(config: dict[str, Any], path: Path) -> None:
    def refuse(what: str) -> AdapterError:
        return AdapterError(f"{path} uses {what}, which is not a plain LoRA update", _MERGE)

    if config.get("peft_type") != "LORA":
        raise refuse(f"PEFT type {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        raise refuse(f"trained biases (bias = {config['bias']!r})")
    if config.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        raise refuse(f"the initialisation {config['init_lora_weights']!r}, which also changes the base weights")
    for key, value in config.items():
        if not value or key in _HARMLESS_KEYS:
            continue
        raise refuse(_REFUSED_KEYS.get(key, f"the setting {key}, unknown here"))


def _pairs(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, dict[str, str]]:
    """Module name -> {"A": tensor name, "B": tensor name}."""
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _FACTOR.match(name)
        if match is None:
            raise AdapterError(f"tensor {name} of {path} {_what(name)}", _MERGE)
        modules.setdefault(match["module"], {})[match["factor"]] = name
    for module, factors in modules.items():
        if len(factors) != 2:
            missing = "B" if "A" in factors else "A"
            raise AdapterError(f"{path} has no {_PREFIX}{module}.lora_{missing}.weight", _SAVE_AGAIN)
    if not modules:
        raise AdapterError(f"{path} adapts no module", _SAVE_AGAIN)
    return modules


def _what(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "belongs to DoRA, which is not a plain LoRA update"
    if "lora_embedding" in name:
        return "adapts an embedding, which holds no neurons"
    if ".lora_" in name:
        return "is no lora_A.weight or lora_B.weight of a linear module"
    return "is a weight trained in full beside the adapter (an embedding, a head or a norm)"


def _lora_module(
    name: str, factors: dict[str, str], tensors: Mapping[str, StoredTensor], config: dict[str, Any], path: Path
) -> LoraModule:
    a_shape, b_shape = tensors[factors["A"]].shape, tensors[factors["B"]].shape
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1] or 0 in (*a_shape, *b_shape):
        raise AdapterError(f"A {a_shape} and B {b_shape} of {name} in {path} have no product", _SAVE_AGAIN)
    rank = _setting(config, ("rank_pattern", "r"), name, path)
    alpha = _setting(config, ("alpha_pattern", "lora_alpha"), name, path)
    if rank != a_shape[0]:
        raise AdapterError(
            f"{name} in {path} has rank {a_shape[0]}, but {ADAPTER_CONFIG} gives it rank {rank:g}", _SAVE_AGAIN
        )
    if not _targets(config, name, path):
        raise AdapterError(
            f"{path} has factors for {name}, but target_modules leaves it out, so PEFT would ignore them", _SAVE_AGAIN
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraModule(name, factors["A"], factors["B"], int(rank), float(alpha), scale)


def _setting(config: dict[str, Any], keys: tuple[str, str], module: str, path: Path) -> float:
    """A number for a module: the first matching pattern in the order of the config, as PEFT's get_pattern_key."""
    pattern_key, default_key = keys
    patterns = config.get(pattern_key) or {}
    value = config.get(default_key, _PEFT_DEFAULT)
    if not isinstance(patterns, dict):
        raise AdapterError(f"{pattern_key} of {path} is not an object", _SAVE_AGAIN)
    for pattern, found in patterns.items():
        if _matches(rf"(.*\.)?({pattern})$", module, path):
            value = found
            break
    if type(value) not in (int, float) or not abs(value) < _LARGEST:
        raise AdapterError(f"{default_key} of {module} in {path} is {value!r}, not a number", _SAVE_AGAIN)
    return float(value)


def _matches(pattern: str, text: str, path: Path) -> re.Match[str] | None:
    try:
        return re.match(pattern, text)
    except re.error as error:
        raise AdapterError(f"{path} has the broken pattern {pattern!r}: {error}", _SAVE_AGAIN) from error


def _targets(config: dict[str, Any], module: str, path: Path) -> bool:
    """PEFT's check_target_module_exists."""
    if _named(config.get("exclude_modules") or [], module, "exclude_modules", path):
        return False
    target = config.get("target_modules")
    if target == "all-linear":
        return True
    if not _named(target or [], module, "target_modules", path):
        return False
    if isinstance(target, str) or module in (target or []):
        return True
    return _in_layers(config, module, path)


def _named(names: object, module: str, key: str, path: Path) -> bool:
    """Whether a module is in a list of full names and suffixes, or matches a regular expression."""
    if isinstance(names, str):
        return _matches(rf"(?:{names})\Z", module, path) is not None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{key} of {path} is neither a pattern nor a list of names", _SAVE_AGAIN)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(config: dict[str, Any], module: str, path: Path) -> bool:
    """PEFT's layers_to_transform: only the blocks of these indices."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    wanted = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(wanted, list) or not isinstance(patterns, list):
        raise AdapterError(f"layers_to_transform of {path} is not a list of indices", _SAVE_AGAIN)
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
    for expression in expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
        match = _matches(expression, module, path)
        if match is not None:
            return int(match["index"]) in wanted
    return False
