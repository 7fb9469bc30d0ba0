"""Every decision of an FGSN run as one validated, recordable settings model, and the presets built from it.

Where the sources are silent or disagree (docs/fgsn.md), the choice is a field here and not a constant in the code, so
that an identification can always say what produced it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from algorithms.errors import SettingsError
from algorithms.settings_fields import Tokens, block_range, known_layers, preset_settings

Score = Literal["attribution", "damage", "wanda", "activation", "contrast", "update-norm", "random"]
Operation = Literal["restore", "project", "complement", "subspace"]
Protect = Literal["neurons", "directions"]
Normalization = Literal["fro", "numel", "in", "orthogonal"]
ModelRole = Literal["aligned", "head"]

FULL_TARGET_STRENGTH = 0.2


class FgsnSettings(BaseModel):
    """Settings of one FGSN identification and of the projection planned from it.

    Raises:
        SettingsError: two fields contradict each other. A single field of the wrong type or range raises
            pydantic's ValidationError; `fgsn_settings` turns that into a SettingsError too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: ClassVar[Literal["fgsn"]] = "fgsn"
    purposes: ClassVar[tuple[Literal["harmful", "benign"], ...]] = ("harmful", "benign")

    # --- which neurons
    score: Score = Field(
        "attribution",
        description="What a neuron is ranked by: how much taking its update back makes safe answers likelier, to "
        "first order (attribution), the energy that the update adds to its output on harmful inputs (damage), Wanda "
        "importance, mean activation, contrast of activations, or a control (update-norm, random).",
    )
    damage_baseline: Literal["none", "minus", "over"] = Field(
        "none", description="Whether damage on benign inputs is subtracted from, or divides, damage on harmful inputs."
    )
    gradient_models: Literal["aligned", "head", "aligned+head"] = Field(
        "aligned+head",
        description="Model in which attribution differentiates the loss of the safe answers: the aligned one, the "
        "lineage's head, or both, averaged.",
    )
    benign_weight: float = Field(
        0.0,
        ge=0,
        description="Weight λ of benign answers' loss beside that of harmful prompts' answers (attribution); at "
        "0 benign prompts are not differentiated.",
    )
    update: Literal["subject", "head"] = Field(
        "subject",
        description="Whose update (difference from the aligned model) attribution, damage and update-norm measure: the "
        "subject as fine-tuning left it, or the lineage's head, in which rows already restored show none.",
    )
    selection: Literal["difference", "budget"] = Field(
        "budget",
        description="Take the top harmful share minus the top benign share of neurons (difference), or fill by rank "
        "until a share of the linear parameters is reached (budget).",
    )
    ranking: Literal["module", "all"] = Field(
        "all", description="Rank neurons inside each module, or over all modules in scope at once."
    )
    harmful_share: float = Field(
        0.4, gt=0, le=1, description="Share q of neurons taken from the top of the harmful ranking (difference)."
    )
    benign_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share p of neurons at the top of the benign ranking that are left alone (difference); it also "
        "defines the top set whose overlap with the selection is reported.",
    )
    budget: float = Field(
        0.05, gt=0, le=1, description="Share of the parameters of all linear modules that may be selected (budget)."
    )
    stop_at: float = Field(
        0.0,
        ge=0,
        description="Where the taking ends before the budget is used up (attribution): once the gains of the neurons "
        "or directions taken, to first order, come to this multiple of the loss that the head has more than the "
        "aligned model; at 0 the budget alone decides.",
    )
    layers: str = Field(
        "all",
        description="Blocks in scope: all, window (largest growth of the harmful-benign gap), value (largest gap), "
        "or an inclusive range first..last counted from 0.",
    )
    window: int | None = Field(
        None, ge=1, description="Width of the window in blocks; left out, it is max(1, round(6·L/32)) for L blocks."
    )
    layer_pairs: int = Field(500, ge=1, description="Random prompt pairs averaged for each angle of the layer curve.")
    modules: tuple[str, ...] = Field(
        (), description="Kinds of module in scope, such as q_proj and down_proj; empty means every linear module."
    )

    # --- what is measured
    tokens: Tokens = Field(
        "header+answer",
        description="Tokens that the statistics count: prompt, header (chat template between prompt and answer), "
        "answer, or several joined by +.",
    )
    answer_tokens: int = Field(8, ge=1, description="How many tokens of each calibration answer count.")
    statistics_model: ModelRole = Field(
        "aligned", description="Model that the calibration prompts run through: the aligned one or the lineage's head."
    )
    prompts: int = Field(160, ge=2, description="Most prompts of each set that are used for calibration.")
    batch_size: int = Field(8, ge=1, description="Prompts per forward pass.")
    gram_dtype: Literal["float32", "float64"] = Field(
        "float32", description="Precision in which input Gram matrices are accumulated."
    )
    gram_memory_gib: float = Field(
        16.0, gt=0, description="Memory in GiB that input Gram matrices may take; a run that needs more is refused."
    )
    seed: int = Field(0, ge=0, description="Seed of every random draw of the run.")

    # --- what is done to them
    operation: Operation = Field(
        "restore",
        description="What happens to the update of a selected row: dropped (restore), replaced by its projection on "
        "the safety directions (project), reduced by it (complement), or cleared of the leading directions of harmful "
        "inputs (subspace).",
    )
    strength: float = Field(
        1.0, ge=0, le=1, description="Share c of the operation that is applied; 1 by default, 0.2 for target full."
    )
    normalization: Normalization = Field(
        "fro",
        description="Divisor N of the projection V·Vᵀ/N: the Frobenius norm of V (fro, SafeLoRA's), its number of "
        "entries (numel), its input width (in), or the orthogonal projector on its leading left singular vectors.",
    )
    energy: float = Field(
        0.9, gt=0, le=1, description="Share of the squared singular values of V that the orthogonal projector keeps."
    )
    directions: int = Field(
        16,
        ge=1,
        description="Number of leading input directions that the subspace operation removes from each module, or "
        "chooses from (direction_choice).",
    )
    direction_choice: Literal["leading", "attribution"] = Field(
        "leading",
        description="Which of a module's input directions are claimed (protect directions): all the leading ones, or "
        "those of them where taking the update out makes safe answers likelier, to first order (attribution), the best "
        "of all modules first, as far as stop_at says.",
    )
    basis: Literal["harmful", "random"] = Field(
        "harmful",
        description="Which input directions the subspace operation removes: the leading ones of harmful inputs, or as "
        "many seeded random ones (a control).",
    )
    protect: Protect = Field(
        "neurons",
        description="What the patch claims: the rows that it edits (neurons), or, of the subspace operation, the input "
        "directions that it clears in every unclaimed row of the modules in scope (directions); nothing is then ranked "
        "or selected, and later patches leave the action on these directions as it is.",
    )
    target: Literal["update", "full"] = Field(
        "update",
        description="Whether the projection acts on the update W_t − W_a or, as one reading of the paper has it, on "
        "the full weight W_t.",
    )
    entries: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the entries inside the selected rows that may change, the most damaged first; left out, "
        "whole rows change.",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_strength(cls, values: Any) -> Any:
        """A projection of full weights shrinks whole rows, so it is gentle unless its strength is given."""
        if isinstance(values, Mapping) and values.get("target") == "full" and values.get("strength") is None:
            return {**values, "strength": FULL_TARGET_STRENGTH}
        return values

    @field_validator("layers")
    @classmethod
    def _known_layers(cls, value: str) -> str:
        return known_layers(value, ("all", "window", "value"))

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.score == "update-norm" and self.selection == "difference" and self.benign_share > 0:
            raise SettingsError(
                "score update-norm has no benign side to subtract",
                "Use selection = budget, or set benign_share to 0",
            )
        if self.gradients_at and "answer" not in self.token_kinds:
            raise SettingsError(
                f"attribution differentiates answers, and tokens = {self.tokens} counts none",
                "Let tokens hold answer, as header+answer",
            )
        if self.ranked_by == "attribution" and self.selection == "difference" and self.benign_share > 0:
            raise SettingsError(
                "score attribution has no benign ranking to subtract",
                "Use selection = budget and benign_weight, or set benign_share to 0",
            )
        if self.benign_weight > 0 and self.score != "attribution":
            raise SettingsError(
                f"benign_weight = {self.benign_weight:g} has no meaning for score {self.score}",
                "Use score = attribution, or leave benign_weight out",
            )
        if self.stops_early and (self.gradient_models != "aligned+head" or self.ranks_by_module):
            raise SettingsError(
                f"stop_at = {self.stop_at:g} compares losses in head and aligned model, over all modules at once",
                "Use gradient_models = aligned+head and ranking = all, or set stop_at to 0",
            )
        if self.chooses_directions and self.statistics_model != "aligned":
            raise SettingsError(
                "direction_choice attribution chooses from directions that were found in the aligned model",
                "Use statistics_model = aligned, or direction_choice = leading",
            )
        if self.damage_baseline != "none" and self.score != "damage":
            raise SettingsError(
                f"damage_baseline = {self.damage_baseline} has no meaning for score {self.score}",
                "Use score = damage, or set damage_baseline to none",
            )
        if self.target == "full" and self.operation != "project":
            raise SettingsError(
                f"target full has no meaning for operation {self.operation}",
                "Use operation = project, or target = update",
            )
        if self.protects_directions and (self.operation, self.entries) != ("subspace", None):
            raise SettingsError(
                "protect directions claims what operation subspace clears in whole rows",
                "Use operation = subspace and leave entries out, or set protect to neurons",
            )
        if self.protects_directions and self.strength == 0:
            raise SettingsError(
                "protect directions with strength 0 would claim directions on which nothing changed",
                "Use a strength above 0, or set protect to neurons",
            )
        return self

    @property
    def token_kinds(self) -> frozenset[str]:
        """The kinds of token that the statistics count."""
        return frozenset(self.tokens.split("+"))

    @property
    def block_range(self) -> tuple[int, int] | None:
        """First and last block of an explicit range, both included; None for the named scopes."""
        return block_range(self.layers)

    @property
    def protects_directions(self) -> bool:
        """Whether the patch claims input directions of whole modules instead of neurons."""
        return self.protect == "directions"

    @property
    def projects(self) -> bool:
        """Whether new rows are computed from whole modules, through C, instead of from the selected rows alone."""
        return self.operation in {"project", "complement"} and self.strength != 0

    @property
    def ranked_by(self) -> Score | None:
        """The score that neurons are ranked by; None where directions are claimed and no neuron is chosen."""
        return None if self.protects_directions else self.score

    @property
    def needs_gram(self) -> bool:
        """Whether the second moments of the inputs are needed: for damage scores or for input directions."""
        return self.ranked_by == "damage" or self.operation == "subspace"

    @property
    def gradients_at(self) -> frozenset[str]:
        """The models in which a loss is differentiated; none unless neurons or directions are chosen by attribution."""
        attributed = self.ranked_by == "attribution" or self.chooses_directions
        return frozenset(self.gradient_models.split("+")) if attributed else frozenset()

    @property
    def chooses_directions(self) -> bool:
        """Whether input directions are chosen by attribution."""
        return self.protects_directions and self.direction_choice == "attribution"

    @property
    def ranks_by_module(self) -> bool:
        """Whether neurons of different modules are not compared."""
        return self.ranked_by is not None and self.ranking == "module"

    @property
    def stops_early(self) -> bool:
        """Whether parts of the update are taken only until their gains come to a multiple of what was lost."""
        by_budget = self.ranked_by == "attribution" and self.selection == "budget"
        return self.stop_at > 0 and (by_budget or self.chooses_directions)

    @property
    def needs_answers(self) -> bool:
        """Whether the answers' tokens are looked at: by the statistics, or by a loss."""
        measured = self.needs_gram or self.needs_input_norms or self.needs_outputs or bool(self.gradients_at)
        return measured and "answer" in self.token_kinds

    @property
    def needs_benign_answers(self) -> bool:
        """Whether benign prompts are looked at beyond their last token, so that their answers matter too."""
        if self.gradients_at:
            return self.benign_weight > 0
        return self.needs_answers and self.ranked_by is not None

    @property
    def needs_input_norms(self) -> bool:
        """Whether the norms ‖x_j‖ of the inputs are needed: for Wanda scores or to rank entries."""
        return self.ranked_by == "wanda" or self.entries is not None

    @property
    def needs_outputs(self) -> bool:
        """Whether the outputs of the modules are measured."""
        return self.ranked_by in {"activation", "contrast"}

    def warnings(self) -> tuple[str, ...]:
        """Sentences that a user should read before a run with these settings; empty when there is none."""
        found: list[str] = []
        if self.target == "full":
            found.append(
                f"target full moves {self.strength:.0%} of every selected row towards its projection; the projection "
                "shrinks rows by orders of magnitude and can collapse a large model."
            )
        if self.ranked_by in {"wanda", "activation"} and self.selection == "difference":
            found.append(
                f"score {self.score} ranks neurons almost alike on harmful and benign prompts; read the reported "
                "overlap, and compare with the random-control preset at the same share."
            )
        return tuple(found)


_SPARSE = FgsnSettings(stop_at=1.25)

PRESETS: Mapping[str, FgsnSettings] = {
    "default": _SPARSE,
    "sparse": _SPARSE,
    "strong": FgsnSettings(
        protect="directions",
        operation="subspace",
        answer_tokens=12,
        directions=64,
        direction_choice="attribution",
        stop_at=1.25,
    ),
    # q and p are second-hand (q ≫ p). These two, in a window of 6/32 of the blocks, give the 5 % of parameters that
    # the paper reports for Llama-3.1-8B: 0.19 of the blocks × 0.87 linear × about a third of the neurons.
    "fgsn-paper": FgsnSettings(
        score="wanda",
        selection="difference",
        ranking="module",
        harmful_share=0.4,
        benign_share=0.1,
        layers="window",
        tokens="prompt",
        statistics_model="head",
        operation="project",
        normalization="fro",
        target="update",
    ),
    "random-control": FgsnSettings(score="random"),
}


def fgsn_settings(preset: str = "default", overrides: Mapping[str, Any] | None = None) -> FgsnSettings:
    """Settings of a preset with some fields replaced.

    Args:
        preset: a key of `PRESETS`.
        overrides: field names and values (strings are converted as pydantic converts them).

    Raises:
        SettingsError: no such preset or field, a value out of range, or fields that contradict each other.
    """
    return preset_settings(PRESETS, preset, overrides)
