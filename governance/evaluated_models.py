"""Whom figures are measured of: a lineage's head, one of its models, or a registered reference."""

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from algorithms.digests import digest_file
from algorithms.loading import load_tokenizer
from governance.evaluation_records import MeasuredState
from governance.lineage_state import LineageState, ModelLocation
from governance.placement import Placement
from governance.references import registered_reference
from governance.workspace import Workspace
from registry import queries

_CONFIGURATION = ("config.json", "generation_config.json")
"""Files that decide what is generated and hold no weights."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of a lineage: where it lies, and whose figures these are.

    Attributes:
        name: as it was asked for.
        key: stands for its weights and its configuration in the answer store.
    """

    name: str
    location: ModelLocation
    state: MeasuredState
    key: str

    def load(self, placement: Placement) -> nn.Module:
        """The model, loaded for a forward pass."""
        return placement.load(self.location.path, self.location.base_path)

    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.location.path, self.location.base_path)


def model_of(workspace: Workspace, lineage: LineageState, name: str) -> EvaluatedModel:
    """The model of a lineage that a name stands for.

    Args:
        workspace: the registry.
        lineage: as read.
        name: `head`, `subject`, `aligned` or `base`, or the name of a registered reference.

    Raises:
        RecordNotFoundError: no model of that name.
        InputError: the model is none of role reference.
        MismatchError: the subject and it differ.
    """
    if name == "head":
        location = ModelLocation("head", lineage.working, lineage.locations["subject"].base_path)
    else:
        location = lineage.locations.get(name) or registered_reference(workspace, lineage, name)[0]
    with workspace.registry.read() as session:
        record = queries.get_lineage(session, lineage.name)
        models = {"head": None, "subject": record.subject, "aligned": record.aligned, "base": record.base}
        model = models[name] if name in models else queries.get_model(session, name)
        under = (model or record.subject).base_model
        state = MeasuredState(
            lineage_id=lineage.lineage_id,
            stage=(name if name in models else "reference") if model else f"patch {lineage.head_sequence or 0}",
            state_digest=model.state_digest if model else lineage.state_digest,
            model_id=model.id if model else None,
            patch_id=None if model else lineage.head_patch_id,
        )
        key = answer_state(state.state_digest, under.state_digest if under else None, location)
        return EvaluatedModel(name, location, state, key)


def answer_state(state_digest: str, base_digest: str | None, location: ModelLocation) -> str:
    """What answers are stored under: weights and configuration, and of an adapter also those of its checkpoint.

    Args:
        state_digest: of the weights.
        base_digest: of the weights of the checkpoint under an adapter.
        location: where the model lies, whose configuration is no part of these digests.
    """
    told = [state_digest, base_digest or ""]
    for directory in (location.path, location.base_path):
        for name in _CONFIGURATION:
            file = None if directory is None else directory / name
            told.append(digest_file(file) if file is not None and file.is_file() else "")
    return hashlib.sha256(" ".join(told).encode()).hexdigest()
