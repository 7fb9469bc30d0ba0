"""Loading models for a forward pass, and finding their linear modules and blocks again behind a PEFT wrapper."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from algorithms.errors import AdapterError, CheckpointError, UnsupportedModelError

DeviceMap = str | dict[str, str | int] | None
"""Where accelerate places a model: a strategy such as `auto`, a device, or module name → device; None: the CPU."""


def load_model(
    path: Path,
    base: Path | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device_map: DeviceMap = None,
) -> tuple[nn.Module, Any]:
    """Load a checkpoint, or a PEFT adapter on its base checkpoint, for inference.

    Nothing is fetched from the network, no code of the checkpoint runs, and only safetensors files are read.

    Args:
        path: a checkpoint directory; with `base`, the adapter's directory.
        base: the checkpoint that the adapter at `path` belongs to.
        dtype: what the weights are converted to; None keeps the stored type. The adapter's factors are float32, as PEFT
            loads them.
        device_map: over which devices and disk it is placed.

    Returns:
        The model in evaluation mode without gradients, and its tokenizer (the adapter's own where it has one).

    Raises:
        CheckpointError: the directory, a tensor or the tokenizer is missing or cannot be read, or the device map does
            not fit the model or the machine.
        AdapterError: the adapter does not load on the base.
        UnsupportedModelError: a part of an adapter's base would be offloaded.
    """
    checkpoint = path if base is None else base
    for directory in {path, checkpoint}:
        if not directory.is_dir():
            raise CheckpointError(f"There is no model directory {directory}", "Check the path")
    make_room(device_map)
    with quiet_transformers():
        model = _load_checkpoint(checkpoint, dtype, device_map)
        if base is not None:
            _require_nothing_offloaded(model, base)
            model = _load_adapter(model, path)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model, load_tokenizer(path, base)


def make_room(device_map: DeviceMap) -> None:
    """Free what models that were let go still hold, where accelerate places the next by the memory that is free.

    The hooks of a placed model refer to one another, so that it stays until the next collection.
    """
    if device_map is None:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_backbone(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a checkpoint of any family without its head, for the hidden states alone; as safely as `load_model`.

    Args:
        path: a checkpoint directory.
        dtype: what the weights are converted to.

    Raises:
        CheckpointError: the directory or a tensor is missing or cannot be read.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    if not path.is_dir():
        raise CheckpointError(f"There is no model directory {path}", "Check the path")
    # That the weights of a head are left over is what is wanted here; transformers would print a table of them.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet_transformers():
            model = _load_checkpoint(path, dtype, None, AutoModel)
    finally:
        logging.set_verbosity(level)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model


def load_tokenizer(path: Path, base: Path | None = None) -> Any:
    """The tokenizer of a checkpoint; for an adapter its own when it has one, else the base's.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer

    directory = path if base is None or (path / "tokenizer_config.json").is_file() else base
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"The tokenizer in {directory} cannot be loaded ({error})",
            "Save tokenizer.json and tokenizer_config.json there",
        ) from error


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return cast("nn.Module", get_base_model()) if callable(get_base_model) else model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and its notices to PEFT off the terminal: library code does not print."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: beside the embeddings. Weights that accelerate keeps on disk are on no device yet."""
    embeddings: nn.Module = unwrapped(model).get_input_embeddings()  # type: ignore[operator]
    device = cast("Tensor", embeddings.weight).device
    return torch.device("cpu") if device.type == "meta" else device


def linear_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that canonical name, in a plain or PEFT-wrapped model.

    In a wrapped model it is the adapter's layer: its forward input is x, its output that of the effective weight, so
    hooks see the same in both.

    Args:
        model: as `load_model` gives it.
        name: path in the transformers model, such as `model.layers.0.self_attn.q_proj`.

    Raises:
        UnsupportedModelError: there is no such module.
    """
    try:
        return unwrapped(model).get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"The loaded model has no module {name}",
            "Check that the registered architecture is the one that was loaded",
        ) from error


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in order, in a plain or PEFT-wrapped model.

    Raises:
        UnsupportedModelError: no list of modules has as many entries as the configuration has hidden layers.
    """
    inner = unwrapped(model)
    config: Any = inner.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = int(text_config.num_hidden_layers)
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise UnsupportedModelError(
        f"{type(inner).__name__} keeps no list of its {depth} transformer blocks",
        "Use a decoder-only family from the documented table",
    )


def _load_checkpoint(path: Path, dtype: torch.dtype | None, device_map: DeviceMap, kind: Any = None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model, report = (kind or AutoModelForCausalLM).from_pretrained(
            path,
            **{dtype_argument(): "auto" if dtype is None else dtype},
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        mend = "Check its config.json and safetensors files"
        if device_map is not None:
            mend = "Check the device map and the memory of its devices, then config.json and the safetensors files"
        raise CheckpointError(f"The checkpoint {path} cannot be loaded ({error})", mend) from error
    if isinstance(device_map, dict):
        _require_fit(device_map, cast("nn.Module", model), path)
    # transformers fills missing tensors with random numbers and goes on: statistics of such a model mean nothing.
    # Only a pooler may be missing, which stands beside the blocks and is not read.
    missing = sorted(key for key in map(str, report["missing_keys"]) if not (kind and key.startswith("pooler.")))
    if missing:
        raise CheckpointError(
            f"The checkpoint {path} lacks {len(missing)} tensors, first {missing[0]}", "Save the checkpoint again"
        )
    return cast("nn.Module", model)


def _require_fit(device_map: dict[str, str | int], model: nn.Module, path: Path) -> None:
    """Refuse a device map that names what the model does not have, or leaves a part out: that would be on the CPU."""
    parameters = [name for name, _ in model.named_parameters()]
    names = [name for name, _ in model.named_modules()]
    unknown = sorted(set(device_map) - {*names, *parameters})
    if unknown:
        raise CheckpointError(
            f"The device map names {unknown[0]}, which the model in {path} does not have",
            f"It has {names[1]} and others",
        )
    for name in parameters:
        if not any(not place or f"{name}.".startswith(f"{place}.") for place in device_map):
            raise CheckpointError(
                f"The device map places no part of the model in {path} that holds {name}",
                'Name every part, or the rest by ""',
            )


def _require_nothing_offloaded(model: nn.Module, path: Path) -> None:
    """PEFT writes the offloaded parts of a base anew, where they may replace its files."""
    offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if offloaded is not None:
        raise UnsupportedModelError(
            f"{offloaded} of {path} would be offloaded, and an adapter lies on it",
            "Place the whole base on devices, leave the device map out, or merge the adapter (model merge)",
        )


def dtype_argument() -> str:
    """Name of the argument that sets the dtype: transformers renamed it in 4.56."""
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _load_adapter(model: nn.Module, path: Path) -> nn.Module:
    from peft import PeftModel

    if not (path / "adapter_model.safetensors").is_file():
        raise AdapterError(f"{path} has no adapter_model.safetensors", "Save the adapter with safe_serialization=True")
    try:
        return cast("nn.Module", PeftModel.from_pretrained(model, str(path), is_trainable=False, local_files_only=True))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise AdapterError(
            f"The adapter {path} does not load on its base model ({error})",
            "Register it with the base it was trained on",
        ) from error
