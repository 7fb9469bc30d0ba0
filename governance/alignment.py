"""Making the aligned model where there is none: a LoRA adapter trained on preferences or refusals, and registered."""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from algorithms.alignment import LIBRARIES, require_libraries, train_adapter
from algorithms.alignment_settings import AlignmentSettings
from algorithms.model_files import require_new_directory
from governance.alignment_data import AlignmentData, AlignmentSource, read_alignment_data
from governance.catalogue import ModelSummary, register_model, require_name
from governance.errors import InputError
from governance.weight_state import require_unchanged
from governance.workspace import Workspace
from registry import queries
from registry.schema import Model

_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "numpy", *LIBRARIES)


@dataclass(frozen=True)
class AlignedModel:
    """A registered adapter, and the record of what it was made from and how."""

    model: ModelSummary
    made_from: dict[str, Any]


def align_model(
    workspace: Workspace,
    name: str,
    *,
    base: str,
    source: AlignmentSource,
    settings: AlignmentSettings,
    output: Path | None = None,
) -> AlignedModel:
    """Train a LoRA adapter on a registered base and register it as an aligned model, with all that it came from.

    The record names the source of the rows, how many they are and their digest; it holds none of their text.

    Args:
        workspace: where to record.
        name: unused name for the aligned model.
        base: name of a registered full checkpoint.
        source: the rows.
        settings: method and training.
        output: directory to make; left out, it lies beside the registry.

    Raises:
        RecordExistsError: the name is taken.
        InputError: the base is an adapter.
        PromptSetError: the rows cannot be read, or lack what the method needs.
        WeightsChangedError: the base's files are not what was registered.
        NeuronLedgerError: training failed, as `algorithms.alignment.train_adapter` says.
    """
    require_name("model", name)
    with workspace.attempt("align", "model", name):
        require_libraries()
        with workspace.registry.read() as session:
            queries.require_absent(session, Model, name)
            record = queries.get_model(session, base)
            if record.kind != "checkpoint":
                raise InputError(
                    f"base model {base} is itself an adapter", "name the full checkpoint under it, or merge it first"
                )
            require_unchanged(record)
            checkpoint, state_digest = Path(record.path), record.state_digest
        target = (output or workspace.directory / "aligned" / name).expanduser().resolve()
        require_new_directory(target)
        data = read_alignment_data(source, settings.method)

        def report(done: int, total: int) -> None:
            workspace.progress(f"training ({settings.method})", done, total)

        trained = train_adapter(checkpoint, data.rows, settings, target, report)
        made_from = {
            "base": {"name": base, "state_digest": state_digest},
            "settings": settings.model_dump(mode="json"),
            "data": _data(source, data),
            "training": {
                "rows": trained.rows,
                "rows_left_out": trained.rows_left_out,
                "steps": trained.steps,
                "first_loss": trained.first_loss,
                "last_loss": trained.last_loss,
            },
            "library_versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        }
        model = register_model(workspace, name, target, "aligned", base, made_from=made_from)
        return AlignedModel(model, made_from)


def _data(source: AlignmentSource, data: AlignmentData) -> dict[str, Any]:
    return {
        "source": source.location,
        "where": dict(source.where),
        "columns": dict(source.columns),
        "limit": source.limit,
        "rows": len(data.rows),
        "digest": data.digest,
    }
