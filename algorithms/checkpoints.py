"""A full checkpoint: a Hugging Face directory of safetensors files, read by byte ranges.

Opening reads headers only. What is refused here, by name: directories without safetensors (a pickle is never
opened), quantised weights, an index that names files outside its directory, missing shards and missing tensors.

Links: a symbolic link is followed, because the Hugging Face cache is made of links to blobs outside the snapshot.
An index, however, is text that comes with the download; it may only name files of its own directory.

Reads go through `readinto` into the tensor that is returned rather than through a memory map: a file that shrinks
while it is read is then an error that can be named instead of a killed process, and no page counts twice as memory.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from algorithms.block_tensors import empty_block
from algorithms.errors import CheckpointError, NonFiniteError, UnsupportedModelError
from algorithms.safetensors_files import StoredTensor, read_header, read_json_file, read_ranges

__all__ = [
    "TORCH_DTYPES",
    "Checkpoint",
    "StoredTensor",
    "find_nonfinite",
    "is_buffer",
    "read_stored",
    "read_stored_columns",
    "read_stored_ranges",
    "refuse_quantised",
    "require_finite",
]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 32 * 1024 * 1024

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
)

# Buffers that older versions of transformers saved beside the weights (causal masks, rotary frequencies, positions).
# They are no parameters, whatever their dtype and shape.
_BUFFER = re.compile(r"(^|\.)((attn|attention|self_attn)\.(bias|masked_bias)|rotary_emb\.inv_freq|position_ids)$")
_QUANTISED_NAME = re.compile(
    r"[._](qweight|qzeros|scales|g_idx|weight_scale(_inv|_2)?|weight_zero_point|weight_packed|weight_shape|input_scale"
    r"|absmax|quant_map|nested_absmax|nested_quant_map|quant_state(\..*)?|SCB|weight_format|weight_scb|blocks)$"
)
_NOT_SAFETENSORS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".pkl")
_DEQUANTISE = "Register the unquantised checkpoint (bfloat16, float16 or float32) that it was made from"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose headers have been checked; no weight is in memory.

    Attributes:
        path: the directory.
        config: content of config.json.
        tensors: every stored tensor by name.
        weight_files: names of the safetensors files, sorted.
        metadata: `__metadata__` of each weight file.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    weight_files: tuple[str, ...]
    metadata: Mapping[str, Mapping[str, str] | None]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open a checkpoint directory.

        Raises:
            CheckpointError: the directory, config.json, the index or a shard is missing, damaged or inconsistent.
            UnsupportedModelError: the weights are quantised or not stored as safetensors.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory", "Give the directory that holds config.json")
        config = read_json_file(path / CONFIG, "Give a directory saved by save_pretrained")
        _refuse_quantisation_config(config, path)
        weight_map = _weight_map(path)
        files = (SINGLE,) if weight_map is None else tuple(sorted(set(weight_map.values())))
        tensors: dict[str, StoredTensor] = {}
        metadata: dict[str, Mapping[str, str] | None] = {}
        for file in files:
            header = read_header(path / file)
            metadata[file] = header.metadata
            for name, tensor in header.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"tensor {name} stands in both {tensors[name].file} and {file} of {path}",
                        "Save the model again with save_pretrained",
                    )
                tensors[name] = tensor
        if weight_map is not None:
            _check_index(weight_map, tensors, path)
        if not tensors:
            raise CheckpointError(f"{path} holds no tensor", "Give a directory saved by save_pretrained")
        for tensor in tensors.values():
            refuse_quantised(tensor, path)
        return cls(path, config, MappingProxyType(tensors), files, MappingProxyType(metadata))

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Read a tensor, or the rows `start` to `stop` of its dimension 0, in the stored dtype.

        Raises:
            CheckpointError: there is no such tensor, or its file ends early.
            IndexError: the rows are outside the tensor.
        """
        return read_stored(self.path, self.stored(name), start, stop)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Read several ranges `(start, stop)` of a tensor's rows, one after the other, opening the file once.

        Raises: as `read`.
        """
        return read_stored_ranges(self.path, self.stored(name), ranges)

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Read the columns `start` to `stop` of a two-dimensional tensor; shape `(rows, stop - start)`."""
        return read_stored_columns(self.path, self.stored(name), start, stop)

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name}", "Check that the checkpoint is complete"
            ) from None


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is a buffer that old versions of transformers saved, not a parameter."""
    return _BUFFER.search(name) is not None


def read_stored(directory: Path, stored: StoredTensor, start: int | None = None, stop: int | None = None) -> Tensor:
    """Read rows of a stored tensor, in the stored dtype; the result owns its memory.

    Raises:
        CheckpointError: the file cannot be read or ends early.
        IndexError: the rows are outside the tensor.
    """
    if start is not None or stop is not None:
        return read_stored_ranges(directory, stored, [_range(stored, 0, start, stop)])
    dtype = _torch_dtype(stored, directory)
    buffer = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
    read_ranges(directory / stored.file, [(stored.begin, len(buffer))], buffer.numpy().data)
    return buffer.view(dtype).view(stored.shape)


def read_stored_ranges(directory: Path, stored: StoredTensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Read several ranges `(start, stop)` of a stored tensor's rows, one after the other, in the stored dtype.

    Raises:
        CheckpointError: the file cannot be read or ends early.
        IndexError: a row is outside the tensor.
    """
    dtype = _torch_dtype(stored, directory)
    checked = [_range(stored, 0, start, stop) for start, stop in ranges]
    row_bytes = stored.row_bytes
    pieces = [(stored.begin + first * row_bytes, (last - first) * row_bytes) for first, last in checked]
    buffer = empty_block((sum(size for _, size in pieces),), torch.uint8)
    read_ranges(directory / stored.file, pieces, buffer.numpy().data)
    return buffer.view(dtype).view(sum(last - first for first, last in checked), *stored.shape[1:])


def read_stored_columns(directory: Path, stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Read columns of a two-dimensional stored tensor; only the bytes of those columns are read.

    Returns:
        Tensor `(rows, stop - start)` in the stored dtype.

    Raises:
        CheckpointError: the file cannot be read or ends early.
        IndexError: the columns are outside the tensor.
    """
    dtype = _torch_dtype(stored, directory)
    if len(stored.shape) != 2:
        raise IndexError(f"{stored.name} has shape {stored.shape}, not two dimensions")
    first, last = _range(stored, 1, start, stop)
    rows, width = stored.shape[0], last - first
    item, row_bytes = dtype.itemsize, stored.row_bytes
    buffer = torch.empty(rows * width * item, dtype=torch.uint8)
    pieces = [(stored.begin + row * row_bytes + first * item, width * item) for row in range(rows)]
    read_ranges(directory / stored.file, pieces, buffer.numpy().data)
    return buffer.view(dtype).view(rows, width)


def refuse_quantised(tensor: StoredTensor, directory: Path) -> None:
    """Refuse a tensor that is not a plain bfloat16, float16 or float32 weight.

    Raises:
        UnsupportedModelError: packed, quantised, double precision or integer weights.
    """
    if is_buffer(tensor.name):
        return
    if _QUANTISED_NAME.search(tensor.name):
        raise UnsupportedModelError(f"tensor {tensor.name} of {directory} belongs to quantised weights", _DEQUANTISE)
    if tensor.dtype == "F64":
        raise UnsupportedModelError(
            f"tensor {tensor.name} of {directory} has dtype F64", "Save the model in float32 or bfloat16"
        )
    if tensor.dtype not in TORCH_DTYPES:
        raise UnsupportedModelError(f"tensor {tensor.name} of {directory} has dtype {tensor.dtype}", _DEQUANTISE)


def require_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: the tensor holds one.
    """
    if not _is_finite(tensor):
        raise NonFiniteError(
            f"tensor {name} of {path} holds NaN or infinity", "Register a checkpoint whose weights are finite"
        )


def find_nonfinite(checkpoint: Checkpoint) -> str | None:
    """Name of the first tensor (in the order of the files) that holds NaN or infinity, or None.

    Reads the whole checkpoint in blocks of 32 MiB.
    """
    for tensor in sorted(checkpoint.tensors.values(), key=lambda stored: (stored.file, stored.begin)):
        if tensor.dtype not in TORCH_DTYPES or is_buffer(tensor.name):
            continue
        if not all(_is_finite(block) for block in _blocks(checkpoint.path, tensor)):
            return tensor.name
    return None


def _is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite. The extremes tell (they keep NaN), without a copy of the tensor."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _blocks(directory: Path, stored: StoredTensor) -> Iterator[Tensor]:
    if not stored.shape:
        yield read_stored(directory, stored)
        return
    rows = max(1, BLOCK_BYTES // max(1, stored.row_bytes))
    for start in range(0, stored.shape[0], rows):
        yield read_stored(directory, stored, start, min(start + rows, stored.shape[0]))


def _torch_dtype(stored: StoredTensor, directory: Path) -> torch.dtype:
    if stored.dtype not in TORCH_DTYPES:
        raise UnsupportedModelError(f"tensor {stored.name} of {directory} has dtype {stored.dtype}", _DEQUANTISE)
    return TORCH_DTYPES[stored.dtype]


def _range(stored: StoredTensor, dimension: int, start: int | None, stop: int | None) -> tuple[int, int]:
    if len(stored.shape) <= dimension:
        raise IndexError(f"{stored.name} has shape {stored.shape}, no dimension {dimension}")
    length = stored.shape[dimension]
    first, last = 0 if start is None else start, length if stop is None else stop
    if not 0 <= first <= last <= length:
        raise IndexError(f"{first}:{last} is outside dimension {dimension} of {stored.name}, which has {length}")
    return first, last


def _refuse_quantisation_config(config: dict[str, Any], path: Path) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key in ("quantization_config", "compression_config"):
        if any(part.get(key) for part in parts):
            raise UnsupportedModelError(f"{path / CONFIG} has a {key}: the weights are quantised", _DEQUANTISE)


def _weight_map(path: Path) -> dict[str, str] | None:
    """The index as tensor name -> file name; None for a checkpoint of one file."""
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            _refuse_missing_weights(path)
        return None
    mend = "Download or save the checkpoint again"
    weight_map = read_json_file(path / INDEX, mend).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map", mend)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(f"{path / INDEX} puts tensor {name!r} in {file!r}, not a file of its directory", mend)
        if not file.endswith(".safetensors"):
            raise UnsupportedModelError(
                f"{path / INDEX} puts tensor {name!r} in {file}, which is not a safetensors file",
                "Save the model again with save_pretrained",
            )
    files = set(weight_map.values())
    if (path / SINGLE).exists() and SINGLE not in files:
        raise CheckpointError(
            f"{path} holds both {SINGLE} and an index of other files, so which one is the model is ambiguous",
            "Remove the one that is out of date",
        )
    for file in sorted(files):
        if not (path / file).is_file():
            raise CheckpointError(f"{path / file} is missing, but the index names it", mend)
    return weight_map


def _is_plain_name(file: str) -> bool:
    """Whether this names an entry of the directory itself, in a way that every system and every message can show."""
    return 0 < len(file) < 200 and file.isprintable() and not {"/", "\\"} & set(file) and file not in {".", ".."}


def _check_index(weight_map: dict[str, str], tensors: Mapping[str, StoredTensor], path: Path) -> None:
    mend = "Download or save the checkpoint again"
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"tensor {name!r} is not in {path / file}, where the index puts it", mend)
    unnamed = next((name for name in tensors if name not in weight_map), None)
    if unnamed is not None:
        raise CheckpointError(f"tensor {unnamed} of {path / tensors[unnamed].file} is not named by the index", mend)


def _refuse_missing_weights(path: Path) -> None:
    names = sorted(entry.name for entry in path.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        raise CheckpointError(
            f"{path} holds {shards[0]} but neither {SINGLE} nor {INDEX}", "Download or save the checkpoint again"
        )
    other = next((name for name in names if name.endswith(_NOT_SAFETENSORS)), None)
    if other is not None:
        raise UnsupportedModelError(
            f"the weights of {path} are in {other}, not in safetensors files, and are not opened",
            "Load the model where you trust it and save it with save_pretrained(..., safe_serialization=True)",
        )
    raise CheckpointError(f"{path} holds no weights", "Give a directory with model.safetensors or an index of shards")
