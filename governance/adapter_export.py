"""Exporting a patch as a PEFT adapter: what the patch alone changes, as a LoRA update on the same base.

LoRA subject: `A = [A_t ; E]` is the subject's lora_A with the rows that the patch appended, and B holds new minus old
rows of lora_B, zeros elsewhere. With the subject's adapter and this one both active on the base, a patched row is
`W + s B_old A_t + s (B_new − B_old) [A_t ; E]`, so the scale s is the subject's.

Full subject: A holds new minus old rows, and B has a single one in each of their rows, at scale 1. The rank of a module
is the number of its rows that change.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from algorithms.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from algorithms.digests import digest_file
from algorithms.weights import AdapterWeights, CheckpointWeights
from governance.adapter_files import rank_and_alpha
from governance.catalogue import weights_of
from governance.errors import InputError, PlanError, SpaceError
from governance.output_files import publish, require_elsewhere, temporary_beside
from governance.patch_artifact import BLOCK_BYTES, ArtifactModule, PatchArtifact, open_artifact
from governance.patch_export import exportable_patch, record_export
from governance.patch_file import provenance_metadata
from governance.provenance import Provenance
from governance.row_figures import widened
from governance.tensor_file import TensorFileWriter, TensorSpec
from governance.weight_state import require_unchanged
from governance.working_checkpoint import require_space
from governance.workspace import Workspace
from registry.files import create_file, sync_directory

_ANOTHER_DIRECTORY = "name an empty directory, or one that is not there yet"


@dataclass(frozen=True)
class AdapterExportSummary:
    """A patch exported as an adapter: where it lies, and how large the update became."""

    lineage: str
    patch: int
    dimension: str
    path: str
    base: str
    sha256: str
    bytes: int
    modules: int
    rows: int
    largest_rank: int


class _Update(Protocol):
    """The LoRA update of one module: A (rank, in) and B (out, rank), float32, written piece by piece."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    def write(self, writer: TensorFileWriter, a_name: str, b_name: str) -> None: ...


def export_adapter(
    workspace: Workspace, lineage_name: str, sequence: int, directory: Path, *, force: bool = False
) -> AdapterExportSummary:
    """Write what one patch changes as a PEFT adapter directory, and record that it was exported.

    Args:
        workspace: the registry.
        lineage_name: the lineage.
        sequence: number of the patch, applied or reverted.
        directory: where to; it is made if it is not there.
        force: whether an adapter that is there may be replaced.

    Raises:
        PlanError: the patch was never applied, or changes nothing.
        InputError: the directory holds something else, or belongs to the registry or to a model.
        WeightsChangedError: the subject is not what was registered.
        SpaceError: a file cannot be written.
        NeuronLedgerError: as `export_patch`.
    """
    with workspace.attempt("patch.export", "lineage", lineage_name):
        require_elsewhere(workspace, directory)
        _require_usable(directory, force=force)
        with workspace.registry.read() as session:
            patch = exportable_patch(workspace, session, lineage_name, sequence)
            provenance = Provenance.of(workspace, session, patch)
            model = patch.lineage.subject
            for record in (model, model.base_model):
                if record is not None:
                    require_unchanged(record)
            subject = weights_of(model)
        with open_artifact(workspace.store.path(provenance.artifact)) as artifact:
            updates = list(_updates(artifact, subject))
            if not updates:
                raise PlanError(
                    f"patch {sequence} of lineage {lineage_name} changes no entry, so there is no update to write",
                    "export it as a file, without --as-adapter",
                )
            config = _config(updates, subject, artifact)
            with _made(directory), temporary_beside(directory / ADAPTER_WEIGHTS) as weights:
                _write_weights(weights, updates, provenance)
                summary = AdapterExportSummary(
                    lineage=lineage_name,
                    patch=sequence,
                    dimension=provenance.dimension.name,
                    path=str(directory),
                    base=config["base_model_name_or_path"],
                    sha256=digest_file(weights),
                    bytes=weights.stat().st_size,
                    modules=len(updates),
                    rows=sum(module.rows for module in artifact.modules),
                    largest_rank=max(update.rank for update in updates),
                )
                _publish(workspace, provenance, directory, weights, config)
        return summary


@dataclass(frozen=True)
class _RowUpdate:
    """Of a full subject: one rank for each row that changes."""

    artifact: PatchArtifact
    module: ArtifactModule
    out_features: int
    rank: int

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.module.in_features

    @property
    def alpha(self) -> float:
        return self.rank

    def write(self, writer: TensorFileWriter, a_name: str, b_name: str) -> None:
        """Write the changed rows to A; B stays a hole of zeros but for its rows with a one."""
        position = 0
        for rows, change in _changes(self.artifact, self.module):
            writer.put(a_name, change, position)
            for row in rows.tolist():
                chosen = torch.zeros(1, self.rank)
                chosen[0, position] = 1
                writer.put(b_name, chosen, row)
                position += 1


@dataclass(frozen=True)
class _FactorUpdate:
    """Of a LoRA subject: the subject's lora_A and the appended rows, weighed by the change of lora_B."""

    artifact: PatchArtifact
    module: ArtifactModule
    A: Tensor
    out_features: int
    rank: int
    alpha: float

    @property
    def name(self) -> str:
        return self.module.name

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.module.in_features

    def write(self, writer: TensorFileWriter, a_name: str, b_name: str) -> None:
        """Write A, with zeros where no alpha fits the least rank, and B."""
        writer.put(a_name, self.A)
        B = torch.zeros(self.out_features, self.rank)
        for rows, change in _changes(self.artifact, self.module):
            B[rows, : change.shape[1]] = change
        writer.put(b_name, B)


def _updates(artifact: PatchArtifact, subject: CheckpointWeights | AdapterWeights) -> Iterator[_Update]:
    for module in artifact.modules:
        changed = sum(len(rows) for rows, _ in _changes(artifact, module))
        if not changed:
            continue
        out_features = subject.modules[module.name].out_features
        if not isinstance(subject, AdapterWeights):
            yield _RowUpdate(artifact, module, out_features, changed)
            continue
        lora = subject.adapter.modules[module.name]
        A, extension = subject.adapter.factors(module.name)[0], artifact.extension(module.name)
        rank, alpha = lora.rank, lora.alpha
        if extension is not None:
            A = torch.cat([A, extension.to(torch.float32)])
            rank, alpha = rank_and_alpha(lora, len(A), rslora=bool(subject.adapter.config.get("use_rslora")))
        yield _FactorUpdate(artifact, module, A, out_features, rank, alpha)


def _changes(artifact: PatchArtifact, module: ArtifactModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (row numbers, new minus old in float32) of the rows that are not the same, block by block."""
    rows = artifact.rows(module.name)
    height = max(1, BLOCK_BYTES // (4 * (module.width + module.extension)))
    for first in range(0, module.rows, height):
        last = min(first + height, module.rows)
        new = artifact.values(module.name, "new", first, last).to(torch.float32)
        old = artifact.values(module.name, "old", first, last).to(torch.float32)
        change = new - widened(old, new.shape[1])
        kept = (change != 0).any(dim=1)
        yield rows[first:last][kept], change[kept]


def _config(
    updates: Sequence[_Update], subject: CheckpointWeights | AdapterWeights, artifact: PatchArtifact
) -> dict[str, Any]:
    """Name every module in full with its rank and alpha, so that no other module of the base matches."""
    own: Mapping[str, Any] = subject.adapter.config if isinstance(subject, AdapterWeights) else {}
    largest = max(updates, key=lambda update: update.rank)
    return {
        "alpha_pattern": {update.name: update.alpha for update in updates},
        "auto_mapping": None,
        "base_model_name_or_path": own.get("base_model_name_or_path") or str(_checkpoint_path(subject)),
        "bias": "none",
        "fan_in_fan_out": bool(own["fan_in_fan_out"]) if "fan_in_fan_out" in own else _transposed(artifact),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": largest.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": largest.rank,
        "rank_pattern": {update.name: update.rank for update in updates},
        "revision": own.get("revision"),
        "target_modules": [update.name for update in updates],
        "task_type": own.get("task_type", "CAUSAL_LM"),
        "use_rslora": bool(own.get("use_rslora")),
    }


def _checkpoint_path(subject: CheckpointWeights | AdapterWeights) -> Path:
    return subject.base.path if isinstance(subject, AdapterWeights) else subject.path


def _transposed(artifact: PatchArtifact) -> bool:
    """Whether the modules are stored as (in, out): PEFT has one setting for all modules of an adapter.

    Raises:
        PlanError: some are and some are not.
    """
    found = {module.transposed: module.name for module in artifact.modules}
    if len(found) > 1:
        raise PlanError(
            f"{found[True]} is stored as (in, out) and {found[False]} as (out, in), which one adapter cannot say",
            "export the patch as a file, without --as-adapter",
        )
    return True in found


def _write_weights(path: Path, updates: Sequence[_Update], provenance: Provenance) -> None:
    specs = []
    for update in updates:
        a_name, b_name = _tensor_names(update)
        out_features, in_features = update.shape
        specs.append(TensorSpec(a_name, "F32", (update.rank, in_features)))
        specs.append(TensorSpec(b_name, "F32", (out_features, update.rank)))
    require_space(path.parent, sum(spec.bytes for spec in specs))
    try:
        with TensorFileWriter(path, specs, {"format": "pt", **provenance_metadata(provenance)}) as writer:
            for update in updates:
                update.write(writer, *_tensor_names(update))
        path.chmod(0o644)
    except OSError as error:
        raise SpaceError(f"{path} cannot be written: {error.strerror or error}", "free space there") from error


def _tensor_names(update: _Update) -> tuple[str, str]:
    return f"base_model.model.{update.name}.lora_A.weight", f"base_model.model.{update.name}.lora_B.weight"


def _publish(
    workspace: Workspace, provenance: Provenance, directory: Path, weights: Path, config: Mapping[str, Any]
) -> None:
    """Give the weights their name and write the configuration last: without it the directory is no adapter."""
    target, described = directory / ADAPTER_WEIGHTS, directory / ADAPTER_CONFIG
    content = (json.dumps(config, indent=2) + "\n").encode()
    with temporary_beside(described) as temporary:
        _write_config(temporary, content)
        files = {ADAPTER_WEIGHTS: digest_file(weights), ADAPTER_CONFIG: digest_file(temporary)}
        with workspace.registry.write() as session:
            record_export(workspace, session, provenance, directory, files)
        described.unlink(missing_ok=True)
        publish(weights, target)
        try:
            publish(temporary, described)
        except SpaceError:
            target.unlink(missing_ok=True)
            raise


def _write_config(path: Path, content: bytes) -> None:
    try:
        create_file(path, content)
    except OSError as error:
        raise SpaceError(f"{path} cannot be written: {error.strerror or error}", "free space there") from error


def _require_usable(directory: Path, *, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file", _ANOTHER_DIRECTORY)
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    other = sorted(held - {ADAPTER_WEIGHTS, ADAPTER_CONFIG})
    if other:
        raise InputError(f"{directory} holds {other[0]} and is not a directory of its own", _ANOTHER_DIRECTORY)
    if held and not force:
        raise InputError(f"{directory} holds an adapter", "name another directory, or replace it with --force")


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make the directory; it goes again if nothing came of it."""
    new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(directory.parent)
    except OSError as error:
        raise SpaceError(f"{directory} cannot be made: {error.strerror or error}", _ANOTHER_DIRECTORY) from error
    try:
        yield
    except BaseException:
        if new and not any(directory.iterdir()):
            directory.rmdir()
        raise
