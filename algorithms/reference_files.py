"""The reference as a directory: for the forward pass of calibration, and to be judged before anything is taken from it.

A full checkpoint keeps the aligned model's shards, order of tensors, metadata and dtypes; every parameter that both
models have is extrapolated in float32, block of rows by block of rows, and rounded once. An adapter's factors are
written in float32, because 1+β times a half-precision number is none, with the aligned adapter's own configuration.
The directory appears whole or not at all.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

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
from algorithms.errors import MismatchError
from algorithms.model_files import (
    copied_bytes,
    copy_companions,
    header_bytes,
    new_directory,
    row_ranges,
    tensor_bytes,
)
from algorithms.nlsr_settings import NlsrSettings
from algorithms.references import extrapolate, extrapolated_factors, is_aligned_itself, require_extrapolable
from algorithms.safetensors_files import read_header
from algorithms.weights import AdapterWeights, CheckpointWeights, LoraFactors

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
    told = progress or _ignore
    with new_directory(output) as written:
        if isinstance(aligned, AdapterWeights):
            _write_adapter(aligned.adapter, settings, written, told)
        else:
            _write_checkpoint(aligned.checkpoint, _checkpoint_of(base, settings), settings, written, told)
        copy_companions(aligned.path, written)
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
        with (target / file).open("xb") as out:
            out.write(header_bytes(aligned.path / file))
            for stored in tensors:
                for block in _blocks(aligned, base, stored, settings.beta):
                    progress(out.write(block))


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
        yield from copied_bytes(aligned.path, stored)
        return
    dtype = TORCH_DTYPES[stored.dtype]
    for start, stop in row_ranges(stored):
        block = read_stored(aligned.path, stored, start, stop)
        if base is not None:
            below = read_stored(base.path, base.stored(stored.name), start, stop).float()
            block = extrapolate(block.float(), below, beta).to(dtype)
            require_finite(block, stored.name, aligned.path)
        yield tensor_bytes(block)
