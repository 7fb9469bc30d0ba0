"""What the report shows of a lineage's models, patches, identifications and ledger, as plain records."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from governance.auditing import Verification
from governance.gate_rules import RuleResult
from governance.provenance import OriginSummary
from governance.report_figures import FigureTable
from governance.report_protection import DirectionClaim, OverlapTable, ProtectionMap

Mark = Literal["done", "gone", "stopped"]


@dataclass(frozen=True)
class ModelRecord:
    """One model of the lineage."""

    role: str
    name: str
    kind: str
    architecture: str
    parameters: int
    linear_parameters: int
    state_digest: str


@dataclass(frozen=True)
class ModuleRecord:
    """What a patch changed in one module; norms are Frobenius norms of the claimed rows as the file holds them."""

    module: str
    block: int
    rows: int
    rows_unchanged: int
    parameters: int
    norm_before: float | None
    norm_after: float | None
    change_norm: float | None


@dataclass(frozen=True)
class ApprovalRecord:
    """Somebody's decision on a patch."""

    actor: str
    decision: str
    reason: str
    created_at: datetime


@dataclass(frozen=True)
class PatchRecord:
    """One patch, with the figures of `patch list` and the modules of `patch show`.

    Attributes:
        policy: the one that it was judged by, by name and version; None if there was none.
        gates: what each of its rules came to.
    """

    patch: int
    dimension: str
    method: str
    operation: str
    state: str
    identification: int
    neurons_selected: int
    neurons_already_protected: int
    neurons_modified: int
    rows_unchanged: int
    parameters_modified: int
    modified_share: float
    modified_linear_share: float
    digest_before: str
    digest_after: str | None
    artifact: str | None
    actor: str
    reason: str
    revert_reason: str
    failure: str | None
    origin: OriginSummary | None
    created_at: datetime
    applied_at: datetime | None
    reverted_at: datetime | None
    modules: tuple[ModuleRecord, ...]
    approvals: tuple[ApprovalRecord, ...]
    policy: str | None = None
    policy_digest: str | None = None
    gates: tuple[RuleResult, ...] = ()


@dataclass(frozen=True)
class LayerRecord:
    """The gap of one block, in radians, and whether the block was in scope."""

    block: int
    gap: float | None
    in_scope: bool


@dataclass(frozen=True)
class ChoiceRecord:
    """NLSR's verdict on one module: how like the reference its region is, and whether it is patched."""

    module: str
    similarity: float
    rank: float
    kept_probability: float
    draw: float | None
    patched: bool


@dataclass(frozen=True)
class IdentificationRecord:
    """One identification: how it was set, and what it started from. Layers are FGSN's.

    Attributes:
        choices: the verdict on every module, the least similar first.
        reference: what rows are taken from, in words.
        safe_answers: how many answers were given, generated and kept.
        ran: where and in which number format the models ran; empty for float32 on the CPU.
    """

    identification: int
    dimension: str
    patches: tuple[str, ...]
    method: str
    preset: str | None
    seed: int
    head: int | None
    settings: dict[str, Any]
    settings_digest: str
    state_digest: str
    artifact: str | None
    answers: str | None
    libraries: dict[str, Any]
    prompt_sets: tuple[int, ...]
    layers: tuple[LayerRecord, ...]
    benign_overlap_share: float | None
    unreached: tuple[str, ...]
    warnings: tuple[str, ...]
    imported: bool
    created_at: datetime
    choices: tuple[ChoiceRecord, ...]
    reference: str
    safe_answers: str
    ran: dict[str, Any]

    @property
    def label(self) -> str:
        """The identification by its number and its patches."""
        return f"{self.dimension}, {' and '.join(self.patches) or 'not patched'}"


@dataclass(frozen=True)
class PromptSetRecord:
    """One prompt set; `source` is a data set's name or the last parts of a file's path.

    Attributes:
        where: conditions that its rows hold, as field and value.
        prompt_columns: columns that make the prompt; empty: the first known name.
        limit: most prompts that were kept; None: all.
        dropped: how many repeated prompts were left out.
    """

    identifier: int
    purpose: str
    dimension: str | None
    source: str
    rows: int
    digest: str
    where: tuple[tuple[str, str], ...] = ()
    prompt_columns: tuple[str, ...] = ()
    answer_column: str | None = None
    limit: int | None = None
    dropped: int = 0


@dataclass(frozen=True)
class MeasurementRecord:
    """What one evaluation of a model that was there read, and how: enough to measure it again, without its figure."""

    at: datetime
    stage: str
    metric: str
    dimension: str | None
    prompt_set: int | None
    judge: str | None
    generation: dict[str, Any]


@dataclass(frozen=True)
class PolicyRecord:
    """A policy that was put into force, for this lineage or (`everywhere`) for all without one of their own."""

    at: datetime
    name: str
    version: int
    digest: str
    everywhere: bool


@dataclass(frozen=True)
class EventRecord:
    """One event of the ledger, with the facts of its payload that fit into a line."""

    sequence: int
    created_at: str
    actor: str
    action: str
    subject: str
    facts: str
    hash: str


@dataclass(frozen=True)
class Moment:
    """One thing that happened to the lineage, or that was refused.

    Attributes:
        at: ISO 8601, UTC.
        mark: done (it happened), gone (something was taken back), stopped (it did not happen, or not to the end).
        what: in words.
        patch: its number, where it concerns one.
        why: reason, or the message of a refusal.
        event: its number in the ledger; None where no event speaks of it.
        repeated: how many more times in a row exactly this was refused, signed or the like.
        until: when it was last.
    """

    at: str
    mark: Mark
    what: str
    patch: int | None
    dimension: str | None
    actor: str
    why: str
    event: int | None
    repeated: int = 0
    until: str = ""


@dataclass(frozen=True)
class LedgerRecord:
    """The ledger's end, inside the database and outside it."""

    events: int
    last_hash: str
    exported_heads: int
    last_exported: str | None
    agrees: bool
    latest: tuple[EventRecord, ...]


@dataclass(frozen=True)
class ControlRecord:
    """A lineage of the same subject whose patches took random neurons, and its patches."""

    lineage: str
    patches: tuple[PatchRecord, ...]


@dataclass(frozen=True)
class Report:
    """The whole report of one lineage."""

    lineage: str
    state: str
    state_digest: str
    created_at: datetime
    generated_at: datetime
    head: int | None
    is_control: bool
    models: tuple[ModelRecord, ...]
    patches: tuple[PatchRecord, ...]
    harmfulness: FigureTable
    accuracy: FigureTable
    means: FigureTable
    protection: ProtectionMap
    directions: tuple[DirectionClaim, ...]
    overlaps: OverlapTable
    identifications: tuple[IdentificationRecord, ...]
    prompt_sets: tuple[PromptSetRecord, ...]
    controls: tuple[ControlRecord, ...]
    measurements: tuple[MeasurementRecord, ...]
    ledger: LedgerRecord
    timeline: tuple[Moment, ...]
    verification: Verification
    policies: tuple[PolicyRecord, ...] = ()

    @property
    def applied(self) -> tuple[PatchRecord, ...]:
        """The patches that the working checkpoint holds."""
        return tuple(patch for patch in self.patches if patch.state == "applied")

    @property
    def subject(self) -> ModelRecord:
        """The model that is to be protected."""
        return next(model for model in self.models if model.role == "subject")

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Every dimension that a patch, a figure or an identification names, in a fixed order, for its colour."""
        named = [patch.dimension for patch in self.patches]
        named += [quantity.dimension for quantity in self.harmfulness.quantities if quantity.dimension]
        named += [record.dimension for record in self.identifications]
        return tuple(dict.fromkeys(named))
