"""The linear modules of a checkpoint's transformer blocks, found by the table of families and checked.

A neuron is an output row of a linear module inside a transformer block. Embeddings, norms and the output head are
not neurons. A module that is missing, has another shape than the others imply, or is not in the table is refused by
name; nothing is skipped.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from algorithms.checkpoints import Checkpoint, StoredTensor, is_buffer
from algorithms.errors import CheckpointError, UnsupportedModelError
from algorithms.families import EXPERT_KEYS, EXPERT_MODEL_TYPES, FAMILIES, Family, LinearEntry

_OTHER_FAMILY = "Use a dense model of one of these families: {}"
_INCOMPLETE = "Check that the checkpoint is complete and that config.json belongs to it"


@dataclass(frozen=True)
class LinearModule:
    """One linear module of a transformer block.

    Attributes:
        name: path of the module in the transformers model, `model.layers.0.self_attn.q_proj`.
        block: index of the transformer block.
        kind: last part of the path, `q_proj`.
        tensor: name of its weight in the checkpoint.
        out_features: d, the number of neurons.
        in_features: k, the length of a neuron's row.
        transposed: whether the weight is stored as `(in, out)`, as GPT-2's Conv1D does.
        input_group: name of the first module of the block that gets the same input.
    """

    name: str
    block: int
    kind: str
    tensor: str
    out_features: int
    in_features: int
    transposed: bool
    input_group: str


@dataclass(frozen=True)
class Coverage:
    """How much of a model the modules reach.

    Attributes:
        linear_parameters: entries of the weights of the given modules.
        total_parameters: entries of all parameters in the checkpoint (tied weights count once, as they are stored).
        outside_blocks: two-dimensional or larger tensors outside transformer blocks (embeddings, output head, other
            towers), which are never written.
    """

    linear_parameters: int
    total_parameters: int
    outside_blocks: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of all parameters that lie in the given modules."""
        return self.linear_parameters / self.total_parameters


def supported_model_types() -> tuple[str, ...]:
    """Values of `model_type` that the table reaches, sorted."""
    return tuple(sorted(name for family in FAMILIES for name in family.model_types))


def discover(checkpoint: Checkpoint) -> tuple[LinearModule, ...]:
    """Find every linear module of every transformer block, ordered by block, then as in the table.

    Raises:
        UnsupportedModelError: the family is not in the table, has experts, or a block holds a weight that the table
            does not know, lacks one that it knows, or has one of an unexpected shape.
        CheckpointError: config.json lacks the number of blocks, or the checkpoint holds other blocks than it says.
    """
    family = family_of(checkpoint)
    config = _text_config(checkpoint, family)
    count = _positive(config.get(family.layer_count))
    if count is None:
        raise CheckpointError(
            f"config.json of {checkpoint.path} has no usable {family.layer_count}: {config.get(family.layer_count)!r}",
            _INCOMPLETE,
        )
    stored_as = _stored_as(checkpoint, family)
    _check_blocks(checkpoint, stored_as, count)
    layout = _Layout(checkpoint, family, stored_as, _sizes_from_config(config, family))
    modules = tuple(_module(layout, block, entry) for block in range(count) for entry in family.linear)
    _refuse_unknown_weights(checkpoint, stored_as, modules)
    return modules


def coverage(checkpoint: Checkpoint, modules: Iterable[LinearModule]) -> Coverage:
    """Count what the given modules reach of a checkpoint.

    Raises:
        UnsupportedModelError: a weight of a transformer block is in none of the family's modules.
        CheckpointError: a module's tensor is not in the checkpoint.
    """
    modules = tuple(modules)
    stored_as = _stored_as(checkpoint, family_of(checkpoint))
    _refuse_unknown_weights(checkpoint, stored_as, discover(checkpoint))
    parameters = [tensor for tensor in checkpoint.tensors.values() if not is_buffer(tensor.name)]
    outside = tuple(
        tensor.name for tensor in parameters if len(tensor.shape) > 1 and _block_of(tensor.name, stored_as) is None
    )
    linear = sum(checkpoint.stored(module.tensor).parameters for module in modules)
    return Coverage(linear, sum(tensor.parameters for tensor in parameters), outside)


def family_of(checkpoint: Checkpoint) -> Family:
    """The row of the table that a checkpoint belongs to.

    Raises:
        UnsupportedModelError: there is none, or the model is a mixture of experts.
    """
    model_type = checkpoint.config.get("model_type")
    known = model_type if isinstance(model_type, str) else ""
    configs = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    experts = any((_positive(part.get(key)) or 0) > 1 for part in configs for key in EXPERT_KEYS)
    mend = _OTHER_FAMILY.format(", ".join(supported_model_types()))
    if experts or known in EXPERT_MODEL_TYPES or any(_is_expert(name) for name in checkpoint.tensors):
        raise UnsupportedModelError(
            f"{checkpoint.path} is a mixture of experts (model_type {model_type!r}), whose expert weights are fused or"
            " routed per token and are not reached",
            mend,
        )
    for family in FAMILIES:
        if known in family.model_types:
            return family
    raise UnsupportedModelError(f"{checkpoint.path} has model_type {model_type!r}, which is not in the table", mend)


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _text_config(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    if family.nested is None:
        return checkpoint.config
    nested = checkpoint.config.get(family.nested)
    if not isinstance(nested, dict):
        raise CheckpointError(f"config.json of {checkpoint.path} has no {family.nested}", _INCOMPLETE)
    return nested


def _positive(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _stored_as(checkpoint: Checkpoint, family: Family) -> str:
    found = [path for path in family.stored_as if any(name.startswith(f"{path}.") for name in checkpoint.tensors)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{checkpoint.path} stores blocks under both {found[0]} and {found[1]}", _INCOMPLETE)
    raise UnsupportedModelError(
        f"{checkpoint.path} has no tensor under {family.blocks}, where {checkpoint.config.get('model_type')} keeps its"
        " blocks",
        _INCOMPLETE,
    )


def _block_of(name: str, stored_as: str) -> str | None:
    """The index of the block that a tensor belongs to, as text; None outside blocks."""
    if not name.startswith(f"{stored_as}."):
        return None
    return name[len(stored_as) + 1 :].split(".", 1)[0]


def _check_blocks(checkpoint: Checkpoint, stored_as: str, count: int) -> None:
    for name in checkpoint.tensors:
        block = _block_of(name, stored_as)
        # Text comparison, so that "01" or "x" is no block either.
        if block is not None and not (block.isdecimal() and str(int(block)) == block and int(block) < count):
            raise CheckpointError(
                f"tensor {name} of {checkpoint.path} is outside the {count} blocks that config.json declares",
                _INCOMPLETE,
            )


def _sizes_from_config(config: dict[str, Any], family: Family) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for dimension, keys in family.dimensions.items():
        values = [_positive(config.get(key)) for key in keys]
        known = [value for value in values if value is not None]
        if len(known) == len(keys):
            sizes[dimension] = math.prod(known)
    _derive(sizes)
    return sizes


def _derive(sizes: dict[str, int]) -> None:
    """Sizes of fused modules, which are sums of others."""
    if "hidden" in sizes:
        sizes["3 hidden"] = 3 * sizes["hidden"]
    if "intermediate" in sizes:
        sizes["gate and up"] = 2 * sizes["intermediate"]
    if "query" in sizes and "key_value" in sizes:
        sizes["query, key and value"] = sizes["query"] + 2 * sizes["key_value"]


@dataclass(frozen=True)
class _Layout:
    """A checkpoint seen as one family: where its blocks are stored and how large each named dimension is."""

    checkpoint: Checkpoint
    family: Family
    stored_as: str
    sizes: dict[str, int]


def _module(layout: _Layout, block: int, entry: LinearEntry) -> LinearModule:
    checkpoint, family, sizes = layout.checkpoint, layout.family, layout.sizes
    name = f"{family.blocks}.{block}.{entry.path}"
    tensor = f"{layout.stored_as}.{block}.{entry.path}.weight"
    stored = checkpoint.tensors.get(tensor)
    if stored is None:
        raise UnsupportedModelError(f"{checkpoint.path} has no tensor {tensor}", _INCOMPLETE)
    out_features, in_features = _features(checkpoint, stored, family.transposed)
    for dimension, found in ((entry.out, out_features), (entry.input, in_features)):
        expected = sizes.setdefault(dimension, found)
        if found != expected:
            raise UnsupportedModelError(
                f"tensor {tensor} of {checkpoint.path} has shape {stored.shape}, but its {dimension} size is"
                f" {expected} by config.json and the other modules",
                _INCOMPLETE,
            )
    _derive(sizes)
    first = next(other for other in family.linear if other.group == entry.group)
    return LinearModule(
        name=name,
        block=block,
        kind=entry.path.rsplit(".", 1)[-1],
        tensor=tensor,
        out_features=out_features,
        in_features=in_features,
        transposed=family.transposed,
        input_group=f"{family.blocks}.{block}.{first.path}",
    )


def _features(checkpoint: Checkpoint, stored: StoredTensor, transposed: bool) -> tuple[int, int]:
    if len(stored.shape) != 2 or 0 in stored.shape:
        raise UnsupportedModelError(
            f"tensor {stored.name} of {checkpoint.path} has shape {stored.shape}, not a matrix", _INCOMPLETE
        )
    first, second = stored.shape
    return (second, first) if transposed else (first, second)


def _refuse_unknown_weights(checkpoint: Checkpoint, stored_as: str, modules: Iterable[LinearModule]) -> None:
    known = {module.tensor for module in modules}
    for tensor in checkpoint.tensors.values():
        inside = _block_of(tensor.name, stored_as) is not None
        if inside and len(tensor.shape) > 1 and tensor.name not in known and not is_buffer(tensor.name):
            raise UnsupportedModelError(
                f"tensor {tensor.name} of {checkpoint.path}, shape {tensor.shape}, is a weight inside a transformer"
                f" block that the table of model_type {checkpoint.config.get('model_type')!r} does not know",
                "Use a model of a published layout of its family",
            )
