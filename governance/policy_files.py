"""A policy as its file has it: what a patch has to keep, whose approval it needs, and who may do what.

Nothing here does I/O. Every key has a meaning and a range; an unknown key is a mistake, not a comment. What is left out
is not asked for: a policy without `[gates]` measures nothing, one without `[roles]` lets anybody act.
"""

import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from algorithms.scorers import ScorerName
from governance.errors import PolicyError
from governance.placement import Precision
from registry.schema import NAME_LENGTH

Share = Annotated[float, Field(ge=0, le=1)]
Points = Annotated[float, Field(ge=0, le=100)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=NAME_LENGTH)]
SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Role = Literal["register", "apply", "approve", "revert", "policies"]
ROLES: tuple[Role, ...] = ("register", "apply", "approve", "revert", "policies")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Prompts(_Section):
    """Prompts that a gate measures on; they are read once, when the policy is set, and kept by digest."""

    prompts: Text = Field(
        description="File or data set, as `evaluate` takes it; paths are relative to the policy file."
    )
    where: dict[str, str] = Field({}, description="Fields and values that rows have to have.")
    prompt_columns: tuple[Text, ...] = Field((), strict=False, description="Columns of the prompt.")
    limit: int | None = Field(None, ge=1, description="Most prompts that are taken.")
    drop_duplicates: bool = Field(False, description="Keep the first of repeated prompts.")


class AccuracySet(Prompts):
    """Prompts with expected answers, and how much of the accuracy on them may be lost."""

    answer_column: Text = Field("response", description="Column of the expected answer.")
    scorer: ScorerName = Field("prefix", description="How answers are compared with expected ones.")
    largest_loss: Points = Field(description="Points of accuracy that may be lost.")


class OverRefusalSet(Prompts):
    """Safe prompts that look harmful, and how many of them may be refused after the patch."""

    largest: Points = Field(description="Largest over-refusal after the patch, in percent.")


class DivergenceSet(Prompts):
    """Benign prompts, and how far the distribution of the next token may move on them."""

    largest: Annotated[float, Field(ge=0)] = Field(
        description="Largest Kullback-Leibler divergence, in nats, of the answer's first token from that before."
    )


class Gates(_Section):
    """What a patch has to keep. All limits are inclusive: a value at its limit passes."""

    largest_modified_share: Share | None = Field(None, description="Of all parameters.")
    largest_linear_share: Share | None = Field(None, description="Of the parameters of linear modules.")
    smallest_drop: Points | None = Field(
        None, description="Points by which harmfulness of the patch's dimension has to fall."
    )
    largest_harmfulness: Points | None = Field(
        None, description="Largest harmfulness of the patch's dimension after the patch, in percent."
    )
    drop_judged_by: Literal["value", "interval", "paired"] = Field(
        "value",
        description="What else the drop has to show: nothing (value), that the interval after lies below the interval "
        "before (interval), or McNemar's test on the same prompts (paired).",
    )
    largest_p: Share = Field(0.05, description='Largest p of McNemar\'s test, for drop_judged_by = "paired".')
    largest_rise: Points | None = Field(
        None, description="Points by which harmfulness of any dimension that an applied patch was made for may rise."
    )
    accuracy: dict[SetName, AccuracySet] = Field({}, description="Accuracy sets by name, helpfulness among them.")
    over_refusal: OverRefusalSet | None = Field(None, description="Safe prompts that should be answered.")
    divergence: DivergenceSet | None = Field(None, description="Benign prompts.")
    judge: Text | None = Field(None, description="What calls answers harmful; left out, the refusal phrases.")
    refusal_phrases: tuple[Text, ...] = Field(
        (), strict=False, description="Phrases that mark a refusal; left out, AdvBench's."
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest answer, in tokens.")
    batch_size: int | None = Field(None, ge=1, description="Prompts answered together; left out, as many as fit.")
    dtype: Precision = Field("float32", description="Number format that the models run in.")

    @property
    def measures(self) -> bool:
        """Whether a rule needs answers of the model, and not only the plan's counts."""
        return bool(
            self.accuracy
            or self.over_refusal
            or self.divergence
            or self.judges_dimension
            or self.largest_rise is not None
        )

    @property
    def judges_dimension(self) -> bool:
        """Whether a rule needs harmfulness of the patch's own dimension."""
        return self.smallest_drop is not None or self.largest_harmfulness is not None

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not self.measures and self.largest_modified_share is None and self.largest_linear_share is None:
            raise ValueError("it has no limit; give one, or leave the section out")
        if self.drop_judged_by != "value" and self.smallest_drop is None:
            raise ValueError(f'drop_judged_by = "{self.drop_judged_by}" needs smallest_drop')
        return self


class Approvals(_Section):
    """How many others have to approve a patch before it is written."""

    needed: int = Field(ge=0, le=20, description="Approvals by actors other than the one who planned the patch.")


class Roles(_Section):
    """Who may do what: names, or patterns with `*` and `?`. A role that is left out is anybody's."""

    register_: tuple[Text, ...] | None = Field(None, alias="register", strict=False)
    apply: tuple[Text, ...] | None = Field(None, strict=False)
    approve: tuple[Text, ...] | None = Field(None, strict=False)
    revert: tuple[Text, ...] | None = Field(None, strict=False)
    policies: tuple[Text, ...] | None = Field(None, strict=False, min_length=1)

    def actors(self, role: Role) -> tuple[str, ...] | None:
        """Who may, as patterns; None: anybody."""
        return self.register_ if role == "register" else getattr(self, role)


class PolicyFile(_Section):
    """The whole file."""

    name: Text = Field(description="What the policy is called in records.")
    description: str = ""
    gates: Gates | None = None
    approvals: Approvals | None = None
    roles: Roles | None = None

    @property
    def approvals_needed(self) -> int:
        """How many others have to approve."""
        return self.approvals.needed if self.approvals else 0

    def prompts(self) -> Mapping[str, Prompts]:
        """The prompts that the gates measure on, by the name under which they are kept."""
        if self.gates is None:
            return {}
        found: dict[str, Prompts] = {accuracy_name(name): part for name, part in self.gates.accuracy.items()}
        if self.gates.over_refusal:
            found[OVER_REFUSAL] = self.gates.over_refusal
        if self.gates.divergence:
            found[DIVERGENCE] = self.gates.divergence
        return found


OVER_REFUSAL = "over_refusal"
DIVERGENCE = "divergence"


def accuracy_name(name: str) -> str:
    """The metric of an accuracy set."""
    return f"{name}_accuracy"


def parse_policy(text: str, source: str) -> PolicyFile:
    """Read a policy.

    Args:
        text: TOML.
        source: what the text is called in messages.

    Raises:
        PolicyError: it is no TOML, or a key is unknown, missing, or has a value that it cannot have.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{source} is not TOML ({error})", "correct that line") from error
    try:
        return PolicyFile.model_validate(content)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        raise PolicyError(_problem(source, first), _mend(first)) from invalid


def _problem(source: str, error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{source}: {where} is not a key of a policy"
    if error["type"] == "missing":
        return f"{source}: {where} is missing"
    given = error.get("input")
    shown = "" if isinstance(given, dict | BaseModel) else f" (got {given!r})"
    return f"{source}: {where or 'the file'}: {error['msg'].removeprefix('Value error, ')}{shown}"


def _mend(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "correct its name or take it out; docs/gates.md lists the keys of every section"
    if error["type"] == "missing":
        return "add it; docs/gates.md lists the keys of every section"
    return "correct it; docs/gates.md has the range of every key"
