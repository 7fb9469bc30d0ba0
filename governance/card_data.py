"""What the model card and the bill of materials of a patched model say, gathered once.

Figures are the report's (`report_data`, `report_glance`); what is added here is what a page about one model needs
besides: the files with their digests, the event that made the head, and what the models' own cards say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from governance.errors import InterruptedPatchError, UnsoundRecordError
from governance.model_origin import ModelOrigin, read_origin
from governance.output_files import require_free, write_whole
from governance.report_data import gather
from governance.report_glance import Glance, glance
from governance.report_records import ModelRecord, PatchRecord, Report
from governance.workspace import Workspace
from registry import queries
from registry.schema import LedgerEvent, Lineage, LineageFile, ModelFile

_MADE_A_HEAD = ("lineage.created", "patch.applied", "patch.reverted")

_JUDGED = (
    "Harmfulness is the share of harmful prompts whose answer the judge named beside it calls unsafe. A judge by "
    "refusal phrases calls every answer unsafe that holds none: one that refuses in other words counts as harmful, a "
    "lecture that ends in help counts as refused. A trained judge may find otherwise."
)
_DRAW = (
    "Intervals (Wilson, 95 %) cover the draw of prompts. They do not cover other seeds, phrasings or sampled answers."
)
_INPUTS = (
    "A protected neuron's weights are never written by a later patch. What it outputs may still change, since its "
    "inputs come from neurons that may."
)
_NO_CONTROL = (
    "No control with random neurons was measured beside it, so the effect of choosing these neurons is not told apart "
    "from that of changing as many."
)


@dataclass(frozen=True)
class RecordedDigest:
    """One file of a model: its size in bytes, and its digest with the algorithm (`sha256` or `tree`)."""

    file: str
    size: int
    algorithm: str
    digest: str


@dataclass(frozen=True)
class HeadEvent:
    """The event of the ledger that brought the working checkpoint into its present state."""

    sequence: int
    action: str
    at: datetime
    hash: str


@dataclass(frozen=True)
class Card:
    """Everything that is said of a patched model.

    Attributes:
        files: of the working checkpoint.
        model_files: of the registered models, by name.
        origin: what the models' own cards and places say.
    """

    report: Report
    glance: Glance
    head: HeadEvent
    files: tuple[RecordedDigest, ...]
    model_files: Mapping[str, tuple[RecordedDigest, ...]]
    origin: ModelOrigin

    @property
    def is_adapter(self) -> bool:
        """Whether the patched model is a LoRA adapter."""
        return self.report.subject.kind == "adapter"

    @property
    def checkpoint(self) -> ModelRecord | None:
        """The checkpoint under a LoRA subject; None for a full one."""
        role = f"base of {self.report.subject.name}"  # as `report_data` names it
        return next((model for model in self.report.models if model.role == role), None)

    @property
    def taken_back(self) -> tuple[PatchRecord, ...]:
        """Patches that were applied and are no more."""
        return tuple(patch for patch in self.report.patches if patch.state == "reverted")


def gather_card(workspace: Workspace, lineage_name: str, base_model: str | None = None) -> Card:
    """Read everything that is said of a patched model, and verify the records without hashing weights.

    Args:
        workspace: the registry.
        lineage_name: the lineage.
        base_model: the Hub's name of the model that it derives from; None: as the models' own cards have it.

    Raises:
        RecordNotFoundError: no lineage of that name.
        UnsoundRecordError: records, ledger or artifacts do not agree.
        InterruptedPatchError: a patch is being written, or was interrupted.
        InputError: `base_model` cannot name a model on the Hub.
    """
    report = gather(workspace, lineage_name)
    _require_sound(report)
    with workspace.registry.read() as session:
        lineage = queries.get_lineage(session, lineage_name)
        models = {model.name: model for model in (lineage.subject, lineage.aligned, lineage.base)}
        models |= {model.base_model.name: model.base_model for model in models.values() if model.base_model}
        under = lineage.subject.base_model
        return Card(
            report=report,
            glance=glance(report),
            head=_head_event(session, lineage),
            files=_digests(lineage.files),
            model_files={name: _digests(model.files) for name, model in models.items()},
            origin=read_origin(
                {name: Path(model.path) for name, model in models.items()},
                subject=lineage.subject.name,
                checkpoint=under.name if under else None,
                given=base_model,
            ),
        )


def limits(card: Card) -> tuple[str, ...]:
    """What the figures do not show, in sentences of plain text."""
    control = not card.report.applied or card.glance.control
    return (
        _JUDGED if card.report.harmfulness.judges else "No judged figure is recorded.",
        _DRAW,
        _INPUTS,
        *(() if control else (_NO_CONTROL,)),
        "Safety was measured for the named dimensions only. Nothing is said of others.",
        "The record is evidence of what was done. It is not a determination of compliance with any law.",
    )


def write_text(workspace: Workspace, content: str, output: Path, *, force: bool) -> Path:
    """Write a card or a bill of materials to a file of its own, in one step, and return its path.

    Args:
        workspace: the registry.
        content: all of it.
        output: file to write, outside of working checkpoints.
        force: whether a file that is there may be replaced.

    Raises:
        InputError: the file is there already, belongs to the registry or to a model, or cannot be written.
    """
    target = output.absolute()
    require_free(workspace, target, force=force)
    write_whole(content, output, target)
    return output


def _require_sound(report: Report) -> None:
    if findings := report.verification.findings:
        first = findings[0]
        raise UnsoundRecordError(
            f"{len(findings)} things in the record of {report.lineage} do not agree, first {first.check}, "
            f"{first.subject}: {first.problem}",
            "see neuronledger audit verify; nothing is published from such a record",
        )
    for patch in report.patches:
        if patch.state in {"applying", "reverting"}:
            raise InterruptedPatchError(
                f"patch {patch.patch} of {report.lineage} is {patch.state}: interrupted, or still at work",
                "wait for it, or run neuronledger recover",
            )


def _head_event(session: Session, lineage: Lineage) -> HeadEvent:
    event = session.scalars(
        select(LedgerEvent)
        .where(
            LedgerEvent.subject_kind == "lineage",
            LedgerEvent.subject_name == lineage.name,
            LedgerEvent.action.in_(_MADE_A_HEAD),
        )
        .order_by(LedgerEvent.sequence.desc())
        .limit(1)
    ).one()
    return HeadEvent(event.sequence, event.action, datetime.fromisoformat(event.created_at), event.hash)


def _digests(files: list[LineageFile] | list[ModelFile]) -> tuple[RecordedDigest, ...]:
    return tuple(RecordedDigest(file.file, file.size, file.digest_algorithm, file.digest) for file in files)
