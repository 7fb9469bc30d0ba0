"""Where each family of models keeps its transformer blocks and linear modules: data, one table.

To reach another family add a row, and a tiny model of it to the tests: they compare the row with what transformers
builds, saves and computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class LinearEntry:
    """One row of a family's table: a path inside the block, the names of its two dimensions, and its input."""

    path: str
    out: str
    input: str
    group: str


@dataclass(frozen=True)
class Family:
    """Layout of one family.

    Attributes:
        model_types: `model_type` values of config.json.
        blocks: path of the list of blocks in the transformers model.
        stored_as: paths under which checkpoints store that list: the full path, or the path as the model without
            its output head saves it.
        linear: the linear modules of a block, in order.
        dimensions: dimension name -> keys of config.json whose product it is. Dimensions without an entry, or whose
            keys config.json leaves to their defaults, are learned from the first module and must then agree.
        layer_count: key of config.json with the number of blocks.
        transposed: whether weights are stored as `(in, out)`.
        nested: key of config.json under which the text model is configured, when it is one part of a larger model.
    """

    model_types: tuple[str, ...]
    blocks: str
    stored_as: tuple[str, ...]
    linear: tuple[LinearEntry, ...]
    dimensions: Mapping[str, tuple[str, ...]]
    layer_count: str = "num_hidden_layers"
    transposed: bool = False
    nested: str | None = None


def _attention(out_proj: str = "o_proj") -> tuple[LinearEntry, ...]:
    return (
        LinearEntry("self_attn.q_proj", "query", "hidden", "attention"),
        LinearEntry("self_attn.k_proj", "key_value", "hidden", "attention"),
        LinearEntry("self_attn.v_proj", "key_value", "hidden", "attention"),
        LinearEntry(f"self_attn.{out_proj}", "hidden", "query", "attention output"),
    )


_GATED = (
    LinearEntry("mlp.gate_proj", "intermediate", "hidden", "feed-forward"),
    LinearEntry("mlp.up_proj", "intermediate", "hidden", "feed-forward"),
    LinearEntry("mlp.down_proj", "hidden", "intermediate", "feed-forward output"),
)
_DIMENSIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hidden": ("hidden_size",),
        "intermediate": ("intermediate_size",),
        "query": ("num_attention_heads", "head_dim"),
        "key_value": ("num_key_value_heads", "head_dim"),
    }
)

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=(
            "llama", "qwen2", "qwen3", "mistral", "ministral", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2",
        ),
        blocks="model.layers",
        stored_as=("model.layers", "layers"),
        linear=(*_attention(), *_GATED),
        dimensions=_DIMENSIONS,
    ),
    # Gemma3ForConditionalGeneration: a vision tower beside the text model. Only the text model's blocks are reached.
    Family(
        model_types=("gemma3",),
        blocks="model.language_model.layers",
        stored_as=("language_model.model.layers", "model.language_model.layers"),
        linear=(*_attention(), *_GATED),
        dimensions=_DIMENSIONS,
        nested="text_config",
    ),
    Family(
        model_types=("phi3",),
        blocks="model.layers",
        stored_as=("model.layers", "layers"),
        linear=(
            LinearEntry("self_attn.qkv_proj", "query, key and value", "hidden", "attention"),
            LinearEntry("self_attn.o_proj", "hidden", "query", "attention output"),
            LinearEntry("mlp.gate_up_proj", "gate and up", "hidden", "feed-forward"),
            LinearEntry("mlp.down_proj", "hidden", "intermediate", "feed-forward output"),
        ),
        dimensions=_DIMENSIONS,
    ),
    # Phi's attention and feed-forward read the same normalised hidden state.
    Family(
        model_types=("phi",),
        blocks="model.layers",
        stored_as=("model.layers", "layers"),
        linear=(
            *_attention("dense"),
            LinearEntry("mlp.fc1", "intermediate", "hidden", "attention"),
            LinearEntry("mlp.fc2", "hidden", "intermediate", "feed-forward output"),
        ),
        dimensions=_DIMENSIONS,
    ),
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        stored_as=("gpt_neox.layers", "layers"),
        linear=(
            LinearEntry("attention.query_key_value", "3 hidden", "hidden", "attention"),
            LinearEntry("attention.dense", "hidden", "hidden", "attention output"),
            LinearEntry("mlp.dense_h_to_4h", "intermediate", "hidden", "feed-forward"),
            LinearEntry("mlp.dense_4h_to_h", "hidden", "intermediate", "feed-forward output"),
        ),
        dimensions=_DIMENSIONS,
    ),
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        stored_as=("transformer.h", "h"),
        linear=(
            LinearEntry("attn.c_attn", "3 hidden", "hidden", "attention"),
            LinearEntry("attn.c_proj", "hidden", "hidden", "attention output"),
            LinearEntry("mlp.c_fc", "intermediate", "hidden", "feed-forward"),
            LinearEntry("mlp.c_proj", "hidden", "intermediate", "feed-forward output"),
        ),
        dimensions=MappingProxyType({"hidden": ("n_embd",), "intermediate": ("n_inner",)}),
        layer_count="n_layer",
        transposed=True,
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        stored_as=("model.decoder.layers", "decoder.layers"),
        linear=(
            LinearEntry("self_attn.q_proj", "hidden", "hidden", "attention"),
            LinearEntry("self_attn.k_proj", "hidden", "hidden", "attention"),
            LinearEntry("self_attn.v_proj", "hidden", "hidden", "attention"),
            LinearEntry("self_attn.out_proj", "hidden", "hidden", "attention output"),
            LinearEntry("fc1", "intermediate", "hidden", "feed-forward"),
            LinearEntry("fc2", "hidden", "intermediate", "feed-forward output"),
        ),
        dimensions=MappingProxyType({"hidden": ("hidden_size",), "intermediate": ("ffn_dim",)}),
    ),
)  # fmt: skip

# Mixtures of experts keep many weights in one fused tensor, and which rows act depends on the token's route.
EXPERT_MODEL_TYPES = frozenset(
    {
        "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "gpt_oss", "llama4", "llama4_text",
        "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dbrx", "olmoe", "granitemoe", "granitemoeshared",
        "granitemoehybrid", "phimoe", "jetmoe", "jamba", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite",
        "hunyuan_v1_moe", "minimax", "minimax_m2", "dots1", "flex_olmo", "lfm2_moe", "longcat_flash", "cohere2_moe",
        "exaone_moe", "kimi_linear", "bailing_hybrid", "nllb_moe", "switch_transformers",
    }
)  # fmt: skip
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
