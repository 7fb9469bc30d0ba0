"""Merge a LoRA adapter into its base: a full checkpoint, for operations that need one.

`W + s B A` is computed in float32, block of rows by block of rows, and rounded once to the file's dtype. Shards,
order of tensors, metadata and every tensor that the adapter does not change stay as the base has them, byte for byte,
unless another dtype is asked for.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from algorithms.architectures import LinearModule
from algorithms.checkpoints import (
    CONFIG,
    INDEX,
    TORCH_DTYPES,
    Checkpoint,
    StoredTensor,
    is_buffer,
    read_stored,
    require_finite,
)
from algorithms.errors import AdapterError
from algorithms.model_files import (
    copied_bytes,
    copy_companions,
    header_bytes,
    new_directory,
    row_ranges,
    tensor_bytes,
)
from algorithms.safetensors_files import DTYPE_BITS, LENGTH_BYTES
from algorithms.tokenizer_content import TokenizerContent
from algorithms.weights import AdapterWeights, LoraFactors, open_weights

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_STORED_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def merge_adapter(
    base: Path,
    adapter: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the full checkpoint of an adapter on its base.

    The output appears whole or not at all. The tokenizer is the adapter's when it has one of its own, as for
    `require_pair`, else the base's.

    Args:
        base: directory of the base checkpoint.
        adapter: directory of the adapter.
        output: directory to make; it may exist when it is empty.
        dtype: bfloat16, float16 or float32 for all weights; None keeps each tensor's own.
        progress: told the number of bytes after each block that is written.

    Returns:
        The output directory.

    Raises:
        AdapterError: the adapter does not fit the base.
        CheckpointError: a file is damaged, or the output exists and is not an empty directory.
        NonFiniteError: a merged weight does not fit its dtype.
        ValueError: the dtype is none of the three.
    """
    if dtype is not None and dtype not in _STORED_NAMES:
        raise ValueError(f"{dtype} is not bfloat16, float16 or float32")
    weights = open_weights(adapter, base)
    if not isinstance(weights, AdapterWeights):
        raise AdapterError(f"{adapter} is not an adapter", "Give a directory with adapter_config.json")
    with new_directory(output) as merged:
        for file in weights.base.checkpoint.weight_files:
            _write_file(weights, file, merged / file, dtype, progress or _ignore)
        _write_companions(weights, merged, dtype)
    return output


def _ignore(count: int) -> None:
    del count


def _write_file(
    weights: AdapterWeights, file: str, target: Path, dtype: torch.dtype | None, progress: Callable[[int], None]
) -> None:
    checkpoint = weights.base.checkpoint
    tensors = sorted(
        (tensor for tensor in checkpoint.tensors.values() if tensor.file == file), key=lambda tensor: tensor.begin
    )
    modules = {module.tensor: module for module in weights.modules.values()}
    with target.open("xb") as out:
        out.write(_header(checkpoint, file, tensors, dtype))
        for tensor in tensors:
            for block in _blocks(weights, tensor, modules.get(tensor.name), dtype):
                progress(out.write(block))


def _stored_dtype(tensor: StoredTensor, dtype: torch.dtype | None) -> str:
    return tensor.dtype if dtype is None or is_buffer(tensor.name) else _STORED_NAMES[dtype]


def _header(checkpoint: Checkpoint, file: str, tensors: list[StoredTensor], dtype: torch.dtype | None) -> bytes:
    """The base's header as it is, or one with the new dtype and the same order and metadata."""
    if dtype is None:
        return header_bytes(checkpoint.path / file)
    header: dict[str, object] = {}
    metadata = checkpoint.metadata[file]
    if metadata is not None:
        header["__metadata__"] = dict(metadata)
    position = 0
    for tensor in tensors:
        stored = _stored_dtype(tensor, dtype)
        end = position + tensor.parameters * DTYPE_BITS[stored] // 8
        header[tensor.name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # Aligned like the files that safetensors writes, so that tensors can be used in place.
    raw += b" " * (-len(raw) % LENGTH_BYTES)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def _blocks(
    weights: AdapterWeights, tensor: StoredTensor, module: LinearModule | None, dtype: torch.dtype | None
) -> Iterator[memoryview]:
    """The bytes of a tensor of the merged model, in blocks of rows."""
    directory = weights.base.path
    factors = None if module is None else weights.factors(module.name)
    if factors is None and _stored_dtype(tensor, dtype) == tensor.dtype:
        yield from copied_bytes(directory, tensor)
        return
    if not tensor.shape:
        yield tensor_bytes(read_stored(directory, tensor).to(dtype))
        return
    target = TORCH_DTYPES[_stored_dtype(tensor, dtype)]
    for start, stop in row_ranges(tensor):
        block = read_stored(directory, tensor, start, stop).to(torch.float32)
        if module is not None and factors is not None:
            left, right = _update(factors, module, slice(start, stop))
            block.addmm_(left, right, alpha=factors.scale)
        rounded = block.to(target)
        require_finite(rounded, tensor.name, directory)
        yield tensor_bytes(rounded)


def _update(factors: LoraFactors, module: LinearModule, rows: slice) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is `B A`, or its transpose, in the given stored rows."""
    if module.transposed:
        return factors.A.T[rows], factors.B.T
    return factors.B[rows], factors.A


def _write_companions(weights: AdapterWeights, target: Path, dtype: torch.dtype | None) -> None:
    """config.json, index, generation config and tokenizer."""
    copy_companions(weights.base.path, target)
    if TokenizerContent.exists(weights.path):
        for name in _TOKENIZER_FILES:
            (target / name).unlink(missing_ok=True)
            if (weights.path / name).is_file():
                shutil.copyfile(weights.path / name, target / name)
    if dtype is None:
        return
    config = dict(weights.base.checkpoint.config)
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = str(dtype).removeprefix("torch.")
    _write_json(target / CONFIG, config)
    if (target / INDEX).exists():
        index = json.loads((target / INDEX).read_text("utf-8"))
        tensors = weights.base.checkpoint.tensors.values()
        size = sum(tensor.parameters * DTYPE_BITS[_stored_dtype(tensor, dtype)] // 8 for tensor in tensors)
        if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
            index["metadata"]["total_size"] = size
        _write_json(target / INDEX, index)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
