"""Llama-shaped checkpoints of a wanted size, for the patching benchmark: aligned, subject and base in bfloat16.

Subject and base are the aligned model plus a small change of every linear module each, so that every operation has
something to do. Embeddings, norms and output head are the same in all three; their shard is one file under three
names. Nothing is ever held whole: values come in blocks from one pool of normal numbers, each block from another place.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from governance.tensor_file import TensorFileWriter, TensorSpec

ROLES = ("base", "aligned", "subject")
SHARDS_OF_BLOCKS = 4
WEIGHT_SCALE, CHANGE_SCALE = 0.02, 0.001

_POOL = 2**24 + 7_919
_BLOCK_VALUES = 2**22
_DONE = "made.json"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama checkpoint: width, feed-forward width, heads of 64 or 128, vocabulary, blocks."""

    hidden: int
    intermediate: int
    head: int
    key_value_heads: int
    vocabulary: int
    blocks: int

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Linear modules of one block: path within the block → (out, in)."""
        key_value = self.head * self.key_value_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def block_parameters(self) -> int:
        """Parameters of one block, norms included."""
        return sum(out * width for out, width in self.modules.values()) + 2 * self.hidden

    @property
    def bytes(self) -> int:
        """Bytes of all weights in bfloat16."""
        return 2 * (self.blocks * self.block_parameters + 2 * self.vocabulary * self.hidden + self.hidden)

    def config(self) -> dict[str, object]:
        """What config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


SMALL = Shape(hidden=256, intermediate=704, head=64, key_value_heads=1, vocabulary=4_000, blocks=0)
SHAPES: Mapping[float, Shape] = {
    0.2: Shape(hidden=2048, intermediate=8192, head=64, key_value_heads=8, vocabulary=8_000, blocks=0),
    2.0: Shape(hidden=4096, intermediate=14336, head=128, key_value_heads=8, vocabulary=32_000, blocks=0),
}
"""From which size in GB on a checkpoint has which widths: those of Llama 3.2 1B, and from 2 GB on of Llama 3 8B."""

PROJECTION = Shape(hidden=4096, intermediate=256, head=128, key_value_heads=1, vocabulary=64, blocks=2)
"""Two blocks whose q_proj and o_proj are 4096 × 4096, and little else."""


def shape_of(gigabytes: float) -> Shape:
    """The shape nearest to a size in GB (10⁹ bytes), with two blocks or a number of them that four divides."""
    widths = max((bound, shape) for bound, shape in {0.0: SMALL, **SHAPES}.items() if bound <= gigabytes)[1]
    left = gigabytes * 1e9 - widths.bytes
    blocks = left / (2 * widths.block_parameters)
    return Shape(**{**asdict(widths), "blocks": 2 if blocks < 3 else 4 * max(1, round(blocks / 4))})


def make_checkpoints(directory: Path, shape: Shape, seed: int, tell: Tell) -> dict[str, Path]:
    """Make the three models of a shape, or find them.

    Returns:
        Role → directory.
    """
    recipe = json.dumps({"shape": asdict(shape), "seed": seed, "scales": [WEIGHT_SCALE, CHANGE_SCALE], "version": 1})
    models = {role: directory / role for role in ROLES}
    if (directory / _DONE).is_file() and (directory / _DONE).read_text() == recipe:
        tell(f"models found in {directory}")
        return models
    tell(f"making three models of {shape.bytes / 1e9:.2f} GB in {directory} …")
    shutil.rmtree(directory, ignore_errors=True)
    for path in models.values():
        path.mkdir(parents=True)
    noise = _Noise(seed)
    weight_map: dict[str, str] = {}
    for file, specs in _shards(shape).items():
        _write_shard(models, file, specs, noise)
        weight_map |= {spec.name: file for spec in specs}
    for path in models.values():
        _write_beside(path, shape, weight_map)
    (directory / _DONE).write_text(recipe)
    return models


def _shards(shape: Shape) -> dict[str, list[TensorSpec]]:
    """File name → its tensors: one shard for what is outside of blocks, then the blocks in equal parts."""
    outside = [
        TensorSpec("model.embed_tokens.weight", "BF16", (shape.vocabulary, shape.hidden)),
        TensorSpec("lm_head.weight", "BF16", (shape.vocabulary, shape.hidden)),
        TensorSpec("model.norm.weight", "BF16", (shape.hidden,)),
    ]
    count = min(SHARDS_OF_BLOCKS, shape.blocks)
    parts = [outside, *([] for _ in range(count))]
    for block in range(shape.blocks):
        parts[1 + block * count // shape.blocks] += _block_specs(shape, block)
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, start=1)}


def _block_specs(shape: Shape, block: int) -> Iterator[TensorSpec]:
    path = f"model.layers.{block}"
    for name, size in shape.modules.items():
        yield TensorSpec(f"{path}.{name}.weight", "BF16", size)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{path}.{norm}.weight", "BF16", (shape.hidden,))


class _Noise:
    """Blocks of normal numbers, each from a random place of one pool: as good here as drawn anew, and much faster."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(_POOL, generator=self._generator)

    def block(self, rows: int, width: int) -> Tensor:
        """Float32 (rows, width)."""
        start = int(torch.randint(_POOL - rows * width, (1,), generator=self._generator))
        return self._pool[start : start + rows * width].view(rows, width)


def _write_shard(models: Mapping[str, Path], file: str, specs: list[TensorSpec], noise: _Noise) -> None:
    linear = any(_is_linear(spec) for spec in specs)
    with ExitStack() as stack:
        writers = {
            role: stack.enter_context(TensorFileWriter(models[role] / file, specs, {"format": "pt"}))
            for role in (ROLES if linear else ("aligned",))
        }
        for spec in specs:
            for start, values in _values(spec, noise):
                for role, writer in writers.items():
                    changed = role != "aligned" and _is_linear(spec)
                    writer.put(spec.name, _nearby(values, noise) if changed else values, start)
    if not linear:
        for role in ("base", "subject"):
            os.link(models["aligned"] / file, models[role] / file)


def _is_linear(spec: TensorSpec) -> bool:
    return ".layers." in spec.name and len(spec.shape) == 2


def _values(spec: TensorSpec, noise: _Noise) -> Iterator[tuple[int, Tensor]]:
    """(first row, bfloat16 rows) of a tensor of the aligned model."""
    if len(spec.shape) == 1:
        yield 0, torch.ones(spec.shape, dtype=torch.bfloat16)
        return
    rows, width = spec.shape
    height = max(1, _BLOCK_VALUES // width)
    for start in range(0, rows, height):
        yield start, (noise.block(min(height, rows - start), width) * WEIGHT_SCALE).bfloat16()


def _nearby(values: Tensor, noise: _Noise) -> Tensor:
    return (values.float() + noise.block(*values.shape) * CHANGE_SCALE).bfloat16()


def _write_beside(path: Path, shape: Shape, weight_map: Mapping[str, str]) -> None:
    """Configuration, index and a tokenizer, without which no lineage is made."""
    (path / "config.json").write_text(json.dumps(shape.config(), indent=2))
    index = {"metadata": {"total_size": shape.bytes}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    vocabulary = {f"word{number}": number for number in range(shape.vocabulary)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "word0"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
