"""Every decision of an alignment run as one validated, recordable settings model."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from algorithms.errors import SettingsError
from algorithms.settings_fields import settings_of

AlignmentMethod = Literal["dpo", "kto", "orpo", "sft"]

_LEARNING_RATES: Mapping[AlignmentMethod, float] = {"dpo": 5e-5, "kto": 5e-5, "orpo": 5e-5, "sft": 2e-4}
_BETA = 0.1


class AlignmentSettings(BaseModel):
    """Settings of the training of one aligned adapter.

    Raises:
        SettingsError: two fields contradict each other. A single field of the wrong type or range raises
            pydantic's ValidationError; `alignment_settings` turns that into a SettingsError too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: AlignmentMethod = Field(description="The loss: dpo, kto, orpo or sft. The option --method sets it.")

    # --- the adapter
    rank: int = Field(16, ge=1, description="Rank r of the LoRA adapter.")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha; the update is multiplied by alpha / rank.")
    modules: tuple[str, ...] = Field(
        (),
        description="Kinds of module that are adapted, such as q_proj and down_proj; empty means every linear module.",
    )

    # --- the training
    epochs: float = Field(1.0, gt=0, description="Passes over the rows.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps after which training ends, whatever epochs.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Largest learning rate of AdamW; it falls linearly to 0. Left out, 2e-4 for sft and 5e-5 for the "
        "others.",
    )
    batch_size: int = Field(8, ge=1, description="Rows per forward pass; kto needs 2.")
    accumulate: int = Field(1, ge=1, description="Forward passes per optimiser step.")
    beta: float | None = Field(
        None,
        gt=0,
        description="Strength of the tie to the base model (dpo, kto), or weight of the odds ratio (orpo). Left out, "
        "0.1; sft has none.",
    )
    max_length: int = Field(
        1024, ge=2, description="Most tokens of a prompt with its answer; longer rows are left out and counted."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the base's weights and of the products; the adapter is trained in float32."
    )
    gradient_checkpointing: bool = Field(
        False, description="Whether activations are computed again instead of kept: less memory, more time."
    )
    seed: int = Field(0, ge=0, description="Seed of the adapter's first values and of the order of the rows.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("method") not in _LEARNING_RATES:
            return values
        method = values["method"]
        defaults = {"learning_rate": _LEARNING_RATES[method]} | ({} if method == "sft" else {"beta": _BETA})
        return defaults | {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.method == "sft" and self.beta is not None:
            raise SettingsError("method sft has no beta", "Leave beta out, or use another method")
        if self.method == "kto" and self.batch_size == 1:
            raise SettingsError(
                "method kto compares the rows of a batch, and batch_size is 1", "Use a batch_size of at least 2"
            )
        return self


def alignment_settings(method: AlignmentMethod, overrides: Mapping[str, Any] | None = None) -> AlignmentSettings:
    """Settings of a method with some fields replaced.

    Args:
        method: dpo, kto, orpo or sft.
        overrides: field names and values (strings are converted as pydantic converts them).

    Raises:
        SettingsError: no such field, a value out of range, or fields that contradict each other.
    """
    values = dict(overrides or {})
    if values.setdefault("method", method) != method:
        raise SettingsError(f"method {values['method']} contradicts --method {method}", "Name the method once")
    return settings_of(AlignmentSettings, values)
