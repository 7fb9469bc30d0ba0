"""Where an exported patch comes from: who made it, of which subject, how, and at which point of which ledger.

It holds names, digests, settings and counts. It holds no prompt and no path: of a prompt set only its purpose, its
number of rows and its digest. Its text is canonical JSON (RFC 8785), so equal provenances are equal bytes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy.orm import Session

from governance.errors import PatchFileError
from governance.workspace import Workspace
from neuronledger import __version__
from registry import ledger
from registry.schema import NAME_LENGTH, Identification, Method, Model, ModelKind, Patch, SafetyDimension

FORMAT: Final = "neuronledger-export"
VERSION: Final = 1

_EXPORT_AGAIN = "export the patch again"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH)]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelOrigin(_Record):
    """A model of the lineage: its name there, and the digest of its weights.

    Attributes:
        digest_algorithms: those of the tensors' digests, which the digest of the weights is made of.
        under: of an adapter, the checkpoint that it is an adapter on; its weights are not in the adapter's digest.
    """

    name: Name
    kind: ModelKind
    architecture: str
    state_digest: Digest
    digest_algorithms: tuple[str, ...]
    under: "ModelOrigin | None"

    @classmethod
    def of(cls, model: Model) -> Self:
        """Describe a registered model."""
        return cls(
            name=model.name,
            kind=model.kind,
            architecture=model.architecture,
            state_digest=model.state_digest,
            digest_algorithms=tuple(sorted({tensor.digest_algorithm for tensor in model.tensors})),
            under=cls.of(model.base_model) if model.base_model else None,
        )


class PromptSetOrigin(_Record):
    """A prompt set by its purpose, number of rows and digest."""

    purpose: Name
    rows: Count
    digest: Digest


class DimensionOrigin(_Record):
    """The safety dimension with its prompt sets."""

    name: Name
    description: str
    prompt_sets: tuple[PromptSetOrigin, ...]

    @classmethod
    def of(cls, dimension: SafetyDimension) -> Self:
        """Describe a registered dimension."""
        return cls(
            name=dimension.name,
            description=dimension.description,
            prompt_sets=tuple(
                PromptSetOrigin(purpose=held.purpose, rows=held.rows, digest=held.digest)
                for held in dimension.prompt_sets
            ),
        )


class IdentificationOrigin(_Record):
    """How the neurons were found: settings, seed, libraries, and the figures that came out."""

    preset: Annotated[str, Field(max_length=NAME_LENGTH)] | None
    seed: int
    settings: dict[str, Any]
    settings_digest: Digest
    library_versions: dict[str, str]
    head: int | None
    state_digest: Digest
    counts: dict[str, int]
    figures: dict[str, int | float | None]
    unreached: tuple[str, ...]
    warnings: tuple[str, ...]
    actor: Name
    created_at: AwareDatetime

    @model_validator(mode="after")
    def _settings_have_their_digest(self) -> Self:
        if hashlib.sha256(ledger.canonical(self.settings)).hexdigest() != self.settings_digest:
            raise ValueError("the settings do not have their digest")
        return self

    @classmethod
    def of(cls, record: Identification) -> Self:
        """Describe a recorded identification, found here or imported."""
        found = record.summary.get("found", {})
        return cls(
            preset=record.preset,
            seed=record.seed,
            settings=record.settings,
            settings_digest=record.settings_digest,
            library_versions=record.library_versions,
            head=record.summary.get("head_sequence"),
            state_digest=record.state_digest,
            counts=record.summary.get("counts", {}),
            figures={name: value for name, value in found.items() if value is None or type(value) in (int, float)},
            unreached=tuple(found.get("unreached", ())),
            warnings=tuple(record.summary.get("warnings", ())),
            actor=record.actor,
            created_at=record.created_at,
        )

    def summary(self) -> dict[str, Any]:
        """Return the summary of the identification's record where it is imported, shaped as that of one found there."""
        return {
            "imported": True,
            "found": {**self.figures, "unreached": list(self.unreached)},
            "answers": None,
            "counts": self.counts,
            "head_sequence": self.head,
            "warnings": list(self.warnings),
        }


class LedgerHead(_Record):
    """A ledger's length and last hash."""

    events: Count
    hash: Digest


class Provenance(_Record):
    """Everything that an exported patch says of itself."""

    format: Literal["neuronledger-export"] = FORMAT
    version: Literal[1] = VERSION
    neuronledger: Name
    lineage: Name
    patch: Annotated[int, Field(ge=1)]
    state: Literal["applied", "reverted"]
    method: Method
    dimension: DimensionOrigin
    subject: ModelOrigin
    aligned: ModelOrigin
    base: ModelOrigin
    identification: IdentificationOrigin
    artifact: Digest
    digest_before: Digest
    digest_after: Digest
    neurons_selected: Count
    neurons_already_protected: Count
    neurons_modified: Count
    rows_unchanged: Count
    parameters_modified: Count
    actor: Name
    reason: str
    created_at: AwareDatetime
    applied_at: AwareDatetime
    reverted_at: AwareDatetime | None
    exported_by: Name
    exported_at: AwareDatetime
    ledger: LedgerHead
    origin: dict[str, Any] | None

    @classmethod
    def of(cls, workspace: Workspace, session: Session, patch: Patch) -> Self:
        """Describe a patch of this registry as it stands now.

        Raises:
            PatchFileError: a record of it cannot be described, because something else than NeuronLedger wrote it.
        """
        lineage = patch.lineage
        events, head = ledger.ledger_head(session)
        try:
            return cls.model_validate(
                {
                    "neuronledger": __version__,
                    "lineage": lineage.name,
                    "patch": patch.sequence,
                    "state": patch.state,
                    "method": patch.kind,
                    "dimension": DimensionOrigin.of(patch.dimension),
                    "subject": ModelOrigin.of(lineage.subject),
                    "aligned": ModelOrigin.of(lineage.aligned),
                    "base": ModelOrigin.of(lineage.base),
                    "identification": IdentificationOrigin.of(patch.identification),
                    "artifact": patch.artifact_digest,
                    "digest_before": patch.digest_before,
                    "digest_after": patch.digest_after,
                    "neurons_selected": patch.neurons_selected,
                    "neurons_already_protected": patch.neurons_protected,
                    "neurons_modified": patch.neurons_modified,
                    "rows_unchanged": patch.rows_unchanged,
                    "parameters_modified": patch.parameters_modified,
                    "actor": patch.actor,
                    "reason": patch.reason or "",
                    "created_at": patch.created_at,
                    "applied_at": patch.applied_at,
                    "reverted_at": patch.reverted_at,
                    "exported_by": workspace.actor,
                    "exported_at": workspace.clock(),
                    "ledger": LedgerHead(events=events, hash=head),
                    "origin": patch.origin,
                }
            )
        except ValidationError as error:
            raise PatchFileError(
                f"the record of patch {patch.sequence} of lineage {lineage.name} cannot be described: {_first(error)}",
                "run neuronledger audit verify",
            ) from error

    @classmethod
    def from_text(cls, text: str, path: Path) -> Self:
        """Read a provenance back.

        Raises:
            PatchFileError: the text is none of a version that is known, or holds what no registry could keep.
        """
        try:
            fields = json.loads(text)
            known = isinstance(fields, dict) and (fields.get("format"), fields.get("version")) == (FORMAT, VERSION)
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise PatchFileError(
                f"{path} has no provenance of version {VERSION}", f"upgrade neuronledger, or {_EXPORT_AGAIN}"
            )
        try:
            read = cls.model_validate_json(text)
        except ValidationError as error:
            raise PatchFileError(f"the provenance in {path} is not valid: {_first(error)}", _EXPORT_AGAIN) from error
        if read.text() != text or any("\0" in found for found in _texts(fields)):
            raise PatchFileError(f"the provenance in {path} is not as an export writes it", _EXPORT_AGAIN)
        return read

    def record(self) -> dict[str, Any]:
        """Return the provenance in the types of JSON, as a patch's `origin` holds it."""
        return self.model_dump(mode="json")

    def text(self) -> str:
        """Return the canonical JSON."""
        return ledger.canonical(self.record()).decode("utf-8")


@dataclass(frozen=True)
class Origin:
    """Where an imported patch comes from: its provenance, and the SHA-256 of the file that it was read from."""

    provenance: Provenance
    file_sha256: str

    def payload(self) -> dict[str, Any]:
        """Return what the ledger says of it: the place in the other ledger, and digests of everything."""
        told = self.provenance
        return {
            "origin": {
                "lineage": told.lineage,
                "patch": told.patch,
                "artifact": told.artifact,
                "ledger_events": told.ledger.events,
                "ledger_hash": told.ledger.hash,
                "file_sha256": self.file_sha256,
            },
            "provenance": origin_digest(told.record()),
        }


@dataclass(frozen=True)
class OriginSummary:
    """Where an imported patch came from, as lists and `--json` show it."""

    lineage: str
    patch: str
    dimension: str
    actor: str
    reason: str
    applied_at: str
    exported_by: str
    exported_at: str
    neuronledger: str
    ledger_events: str
    ledger_hash: str


def origin_summary(origin: Mapping[str, Any] | None) -> OriginSummary | None:
    """Describe what a patch's record says of its origin, if it was imported. A damaged record is shown as it is."""

    def told(*names: str) -> str:
        held: Any = origin
        for name in names:
            held = held.get(name, "") if isinstance(held, dict) else ""
        return str(held)

    if origin is None:
        return None
    return OriginSummary(
        lineage=told("lineage"),
        patch=told("patch"),
        dimension=told("dimension", "name"),
        actor=told("actor"),
        reason=told("reason"),
        applied_at=told("applied_at"),
        exported_by=told("exported_by"),
        exported_at=told("exported_at"),
        neuronledger=told("neuronledger"),
        ledger_events=told("ledger", "events"),
        ledger_hash=told("ledger", "hash"),
    )


def origin_digest(origin: Mapping[str, Any] | None) -> str | None:
    """Return the SHA-256 of a provenance's canonical JSON: what the ledger keeps of it."""
    return None if origin is None else hashlib.sha256(ledger.canonical(origin)).hexdigest()


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, held in value.items():
            yield name
            yield from _texts(held)
    elif isinstance(value, list):
        for held in value:
            yield from _texts(held)
