"""The reference as a directory: for the forward pass of calibration, and to be judged before anything is taken from it.

A full checkpoint keeps the aligned model's shards, order of tensors, metadata and dtypes; every parameter that both
models have is extrapolated in float32, block of rows by block of rows, and rounded once. An adapter's factors are
written in float32, because 1+β times a half-precision number is none, with the aligned adapter's own configuration.
The directory appears whole or not at all.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from algorithms.adapters import ADAPTER_WEIGHTS, Adapter
from algorithms.checkpoints import (
    TORCH_DTYPES,
    Checkpoint,
    StoredTensor,
    is_buffer,
    read_stored,
    require_finite,
)
from algorithms.differences import BLOCK_BYTES
from algorithms.errors import CheckpointError, MismatchError
from algorithms.nlsr_settings import NlsrSettings
from algorithms.references import extrapolate, extrapolated_factors, is_aligned_itself, require_extrapolable
from algorithms.safetensors_files import LENGTH_BYTES, read_header
from algorithms.weights import AdapterWeights, CheckpointWeights, LoraFactors

_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_SAME_BASE = "Name the base model that the aligned one was made from"

Stored = CheckpointWeights | AdapterWeights
Progress = Callable[[int], None]


def write_reference(
    aligned: Stored, base: Stored, settings: NlsrSettings, output: Path, progress: Progress | None = None
) -> Path:
    """Write the reference of `references.reference_weights` as a checkpoint, or as an adapter where W_a is one.

    Args:
        aligned: W_a.
        base: W_0; for an aligned adapter the checkpoint under it.
        settings: beta, mode and published_factor.
        output: directory to make; it may exist when it is empty.
        progress: told the number of bytes after each block that is written.

    Returns:
        The output directory.

    Raises:
        MismatchError: a tensor is in one model only or has another shape in the other, or the base is not the
            checkpoint under the aligned adapter.
        SettingsError: mode published-code for a full checkpoint.
        CheckpointError: a file is damaged, or the output exists and is not an empty directory.
        NonFiniteError: an extrapolated weight does not fit its dtype.
    """
    require_extrapolable(aligned, base, settings)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty directory", "Give a directory that does not exist")
    told = progress or _ignore
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            written = Path(scratch) / "reference"
            written.mkdir()
            if isinstance(aligned, AdapterWeights):
                _write_adapter(aligned.adapter, settings, written, told)
            else:
                _write_checkpoint(aligned.checkpoint, _checkpoint_of(base, settings), settings, written, told)
            _copy_companions(aligned.path, written)
            written.rename(output)
    except OSError as error:
        raise CheckpointError(
            f"{output} cannot be written: {error.strerror or error}", "Check free space and permissions"
        ) from error
    return output


def _ignore(count: int) -> None:
    del count


def _checkpoint_of(base: Stored, settings: NlsrSettings) -> Checkpoint | None:
    """The base checkpoint; None where the reference is the aligned model, so that no base is read."""
    if is_aligned_itself(settings):
        return None
    if isinstance(base, AdapterWeights):
        raise MismatchError(
            f"The base model {base.path} is an adapter, and the aligned model is a full checkpoint",
            "Merge the base adapter into a full checkpoint",
        )
    return base.checkpoint


def _write_adapter(adapter: Adapter, settings: NlsrSettings, target: Path, progress: Progress) -> None:
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        reference = extrapolated_factors(LoraFactors(*adapter.factors(name)), settings)
        for tensor_name, values in ((module.a_tensor, reference.A), (module.b_tensor, reference.B)):
            require_finite(values, tensor_name, adapter.path)
            tensors[tensor_name] = values.contiguous()
    metadata = read_header(adapter.path / ADAPTER_WEIGHTS).metadata
    save_file(tensors, target / ADAPTER_WEIGHTS, metadata=dict(metadata) if metadata else None)
    with (target / ADAPTER_WEIGHTS).open("rb+") as file:
        os.fsync(file.fileno())
    progress((target / ADAPTER_WEIGHTS).stat().st_size)


def _write_checkpoint(
    aligned: Checkpoint, base: Checkpoint | None, settings: NlsrSettings, target: Path, progress: Progress
) -> None:
    if base is not None:
        _require_same_tensors(aligned, base)
    for file in aligned.weight_files:
        tensors = sorted(
            (stored for stored in aligned.tensors.values() if stored.file == file), key=lambda at: at.begin
        )
        with (target / file).open("xb") as out, (aligned.path / file).open("rb") as source:
            out.write(_header_bytes(source))
            for stored in tensors:
                for block in _blocks(aligned, base, stored, settings.beta):
                    progress(out.write(block))
            out.flush()
            os.fsync(out.fileno())


def _header_bytes(source: BinaryIO) -> bytes:
    prefix = source.read(LENGTH_BYTES)
    return prefix + source.read(int.from_bytes(prefix, "little"))


def _require_same_tensors(aligned: Checkpoint, base: Checkpoint) -> None:
    for one, other in ((aligned, base), (base, aligned)):
        for name, stored in one.tensors.items():
            if is_buffer(name):
                continue
            twin = other.tensors.get(name)
            if twin is None:
                raise MismatchError(f"tensor {name} is in {one.path} but not in {other.path}", _SAME_BASE)
            if twin.shape != stored.shape:
                raise MismatchError(
                    f"tensor {name} has shape {stored.shape} in {one.path} and {twin.shape} in {other.path}", _SAME_BASE
                )


def _blocks(aligned: Checkpoint, base: Checkpoint | None, stored: StoredTensor, beta: float) -> Iterator[memoryview]:
    """The bytes of one tensor of the reference, a block of rows at a time; buffers are copied."""
    if not stored.shape or not stored.parameters or is_buffer(stored.name):
        yield from _copied(aligned.path, stored)
        return
    dtype = TORCH_DTYPES[stored.dtype]
    rows = max(1, BLOCK_BYTES // max(1, 4 * stored.parameters // stored.shape[0]))
    for start in range(0, stored.shape[0], rows):
        stop = min(start + rows, stored.shape[0])
        block = read_stored(aligned.path, stored, start, stop)
        if base is not None:
            below = read_stored(base.path, base.stored(stored.name), start, stop).float()
            block = extrapolate(block.float(), below, beta).to(dtype)
            require_finite(block, stored.name, aligned.path)
        yield block.contiguous().flatten().view(torch.uint8).numpy().data


def _copied(directory: Path, stored: StoredTensor) -> Iterator[memoryview]:
    with (directory / stored.file).open("rb") as source:
        source.seek(stored.begin)
        left = stored.end - stored.begin
        while left:
            chunk = source.read(min(left, BLOCK_BYTES))
            if not chunk:
                raise CheckpointError(f"{directory / stored.file} ends early", "Download or save the file again")
            left -= len(chunk)
            yield memoryview(chunk)


def _copy_companions(source: Path, target: Path) -> None:
    """Configuration, index, generation settings and tokenizer."""
    for file in sorted(source.iterdir()):
        if file.suffix in _COMPANIONS and file.is_file():
            shutil.copyfile(file, target / file.name)
