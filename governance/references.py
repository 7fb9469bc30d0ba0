"""References of NLSR: a registered super-aligned model, or the extrapolation of a lineage's aligned model.

Rows are read from the extrapolation without a file. Only a forward pass through it needs one: it is then written below
the registry's directory for as long as the pass takes. What a killed process left there goes with the next one.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algorithms.editors import EditSources, Settings
from algorithms.nlsr_settings import NlsrSettings
from algorithms.reference_files import write_reference
from algorithms.references import is_aligned_itself, reference_weights, require_extrapolable
from algorithms.weights import WeightSource, open_weights, require_pair
from governance.catalogue import (
    ModelSummary,
    WeightSources,
    model_with_role,
    register_model,
    require_name,
    weights_of,
)
from governance.errors import InputError
from governance.lineage_state import LineageState, ModelLocation, location_of
from governance.weight_state import require_unchanged
from governance.working_checkpoint import require_space
from governance.workspace import Workspace
from registry import queries
from registry.processes import Owner, this_process
from registry.schema import Model


@dataclass(frozen=True)
class Reference:
    """What NLSR takes rows from.

    Attributes:
        weights: its effective weights.
        location: where it lies; None for an extrapolation, which has no files.
        record: what it is and what it was made from, for the record.
    """

    weights: WeightSource
    location: ModelLocation | None
    record: Mapping[str, Any]


def reference_of(workspace: Workspace, lineage: LineageState, settings: NlsrSettings) -> Reference:
    """The reference that settings name, or the extrapolation that they describe.

    Raises:
        RecordNotFoundError: no model of that name.
        InputError: the model is none of role reference.
        WeightsChangedError: its files are not what was registered.
        MismatchError, SettingsError: the subject and it differ, or nothing can be extrapolated.
    """
    if settings.reference is None:
        record = {
            "model": None,
            **_recipe(settings),
            "aligned": lineage.locations["aligned"].name,
            "base": lineage.locations["base"].name,
        }
        weights = reference_weights(lineage.aligned, lineage.base, settings)
        return Reference(weights, lineage.locations["aligned"] if is_aligned_itself(settings) else None, record)
    location, origin = registered_reference(workspace, lineage, settings.reference)
    return Reference(open_weights(location.path, location.base_path), location, origin)


def registered_reference(
    workspace: Workspace, lineage: LineageState, name: str
) -> tuple[ModelLocation, Mapping[str, Any]]:
    """Where a registered super-aligned model that pairs with a lineage's subject lies, and what is recorded of it.

    Raises:
        RecordNotFoundError: no model of that name.
        InputError: the model is none of role reference.
        WeightsChangedError: its files are not what was registered.
        MismatchError: the subject and it differ.
    """
    with workspace.registry.read() as session:
        model = queries.get_model(session, name)
        if model.role != "reference":
            raise InputError(
                f"model {model.name} has the role {model.role}, not reference",
                "register it as a reference, or make one with neuronledger reference build",
            )
        _require_unchanged(model)
        found = weights_of(model)
        record = {"model": model.name, "state_digest": model.state_digest, **model.details}
        location = location_of(model)
    require_pair(lineage.subject, found)
    return location, record


def edit_sources(workspace: Workspace, lineage: LineageState, settings: Settings) -> EditSources:
    """The models that new rows are computed from.

    Raises:
        NeuronLedgerError: as `reference_of`.
    """
    reference: WeightSource = lineage.aligned
    if isinstance(settings, NlsrSettings):
        reference = reference_of(workspace, lineage, settings).weights
    return EditSources(lineage.subject, lineage.aligned, lineage.base, reference)


@contextmanager
def reference_files(
    workspace: Workspace, lineage: LineageState, settings: NlsrSettings, reference: Reference
) -> Iterator[ModelLocation]:
    """Where the reference lies as a model directory; an extrapolation is written, and removed at exit.

    Raises:
        NeuronLedgerError: it cannot be written.
    """
    if reference.location is not None:
        yield reference.location
        return
    scratch = workspace.directory / "scratch"
    _discard_abandoned(scratch)
    own = scratch / this_process().name
    require_space(workspace.directory, _file_bytes(lineage.aligned.path))
    try:
        path = _write(workspace, lineage.aligned, lineage.base, settings, own / "reference")
        yield ModelLocation("reference", path, lineage.locations["aligned"].base_path)
    finally:
        shutil.rmtree(own, ignore_errors=True)
        with suppress(OSError):  # another process is at work there too
            scratch.rmdir()


def build_reference(
    workspace: Workspace,
    name: str,
    *,
    aligned: str,
    base: str,
    settings: NlsrSettings,
    output: Path | None = None,
) -> ModelSummary:
    """Write the extrapolation of an aligned model and register it as a reference, with what it was made from.

    Args:
        workspace: where to record.
        name: unused name for the reference.
        aligned, base: names of registered models, W_a and W_0; for an aligned adapter W_0 is the checkpoint under it.
        settings: beta, mode and published_factor.
        output: directory to make; left out, it lies beside the registry.

    Raises:
        RecordExistsError: the name is taken.
        InputError: a model is registered in another role.
        MismatchError, SettingsError: nothing can be extrapolated from these two.
        CheckpointError: the directory cannot be written, or is not empty.
        WeightsChangedError: files of a model are not what was registered.
    """
    require_name("model", name)
    with workspace.attempt("reference.build", "model", name):
        with workspace.registry.read() as session:
            queries.require_absent(session, Model, name)
            named = {"aligned": aligned, "base": base}
            models = {role: model_with_role(session, model, role) for role, model in named.items()}
            for model in models.values():
                _require_unchanged(model)
            sources = {role: weights_of(model) for role, model in models.items()}
            under = models["aligned"].base_model.name if models["aligned"].base_model else None
            made_from = {
                **_recipe(settings),
                **{role: {"name": model.name, "state_digest": model.state_digest} for role, model in models.items()},
            }
        require_pair(sources["aligned"], sources["base"])
        require_extrapolable(sources["aligned"], sources["base"], settings)
        target = (output or workspace.directory / "references" / name).expanduser().resolve()
        require_space(target, _file_bytes(sources["aligned"].path))
        path = _write(workspace, sources["aligned"], sources["base"], settings, target)
        return register_model(workspace, name, path, "reference", under, made_from=made_from)


def _write(
    workspace: Workspace, aligned: WeightSources, base: WeightSources, settings: NlsrSettings, target: Path
) -> Path:
    total, done = _file_bytes(aligned.path), 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        workspace.progress("writing the reference", min(done, total), total)

    return write_reference(aligned, base, settings, target, report)


def _recipe(settings: NlsrSettings) -> dict[str, Any]:
    if settings.mode == "published-code":
        return {"mode": settings.mode, "published_factor": settings.published_factor}
    return {"mode": settings.mode, "beta": settings.beta}


def _require_unchanged(model: Model) -> None:
    require_unchanged(model)
    if model.base_model is not None:
        require_unchanged(model.base_model)


def _file_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _discard_abandoned(scratch: Path) -> None:
    """Remove what processes that are no more have left."""
    for place in scratch.glob("*.*.*"):
        owner = Owner.named(place.name)
        if owner is not None and owner.liveness == "dead":
            shutil.rmtree(place, ignore_errors=True)
