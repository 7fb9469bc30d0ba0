"""The rows of a planned patch, computed module by module into its artifact.

A row that no patch wrote is at every head the subject's, so rows are computed from the subject. Where applied patches
claim directions of a module they have written rows of it that nobody claims, so there rows are computed from the head,
and whatever is computed leaves the action on the claimed directions as it is (`algorithms.kept_directions`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from algorithms.block_tensors import block_copy
from algorithms.differences import require_finite_values
from algorithms.editors import Editor, EditSources, Selection
from algorithms.errors import MismatchError, NonFiniteError
from algorithms.kept_directions import KeepingEditor, RebasedEditor
from algorithms.settings import FgsnSettings
from algorithms.weights import AdapterWeights
from governance.adapter_files import with_extension
from governance.lineage_state import LineageState
from governance.patch_artifact import ArtifactModule, ArtifactWriter, PatchArtifact, open_artifact
from governance.row_figures import ModuleOutcome, RowFigures
from governance.tensor_file import DTYPES
from governance.weight_state import checkpoint_of


@contextmanager
def planned_rows(lineage: LineageState, selection: Selection, sources: EditSources) -> Iterator["PlannedRows"]:
    """What computes rows of a lineage at its head; holds the applied patches' artifacts open while it does.

    Args:
        lineage: the lineage.
        selection: the identification.
        sources: the models that rows are computed from.

    Raises:
        InputError: an artifact of an applied patch cannot be read.
    """
    with ExitStack() as stack:
        applied = tuple(stack.enter_context(open_artifact(path)) for path in lineage.applied)
        yield PlannedRows(lineage, selection, sources, applied)


@dataclass(frozen=True)
class PlannedRows:
    """Computes rows of one lineage; see `planned_rows`. `applied` are an adapter's applied patches in sequence."""

    lineage: LineageState
    selection: Selection
    sources: EditSources
    applied: Sequence[PatchArtifact]

    def described(self, name: str, rows: Tensor) -> ArtifactModule:
        """What the artifact will hold of a module's rows.

        Raises:
            NeuronLedgerError: the rows cannot be edited.
        """
        lineage = self.lineage
        claimed = self.selection.directions(name)
        module = artifact_module(lineage, name, len(rows))
        module = replace(module, directions=0 if claimed is None else claimed.shape[1])
        if not lineage.is_adapter:
            return module
        editor = self._editor(name, rows)
        gained = 0 if editor.extension is None else len(editor.extension)
        if gained:
            self._require_one_dtype(name)
        if isinstance(editor, RebasedEditor):
            blocks = editor.blocks if len(editor.blocks) > 1 else ()
            return replace(module, extension=gained, held=editor.held, blocks=blocks)
        return replace(module, extension=gained)

    def write_all(
        self, writer: ArtifactWriter, modules: Sequence[ArtifactModule], rows: Mapping[str, Tensor]
    ) -> Iterator[ModuleOutcome]:
        """Compute the rows of all modules into the artifact, one module after another.

        Args:
            writer: of the artifact; each module has its own place there.
            modules: what `described` returned.
            rows: for each module its rows.

        Yields:
            What the rows of each module came to, in order.

        Raises:
            NonFiniteError: a row cannot be computed.
            OSError: the artifact cannot be written.
        """
        settings = self.selection.settings
        multiplies = isinstance(settings, FgsnSettings) and settings.projects
        with nullcontext() if multiplies else _torch_on_one_core():
            for module in modules:
                yield self._write(writer, module, rows[module.name])

    def _write(self, writer: ArtifactWriter, module: ArtifactModule, rows: Tensor) -> ModuleOutcome:
        dtype = DTYPES[module.dtype]
        editor, figures = self._editor(module.name, rows), RowFigures(module.name)
        claimed = self.selection.directions(module.name)
        writer.put(f"{module.name}/rows", editor.row_index)
        if claimed is not None and module.directions:
            writer.put(f"{module.name}/directions", claimed.float())
        if editor.extension is not None and module.extension:
            extension = editor.extension.to(dtype)
            writer.put(f"{module.name}/extension", require_finite_values(extension, module.name, "The extension"))

        for edit in editor.edits():
            # Rows are read as float32, which holds every stored dtype exactly.
            old, new = block_copy(edit.before, dtype), block_copy(edit.values, dtype)
            del edit  # what follows needs the room
            writer.put(f"{module.name}/old", old, figures.rows)
            writer.put(f"{module.name}/new", new, figures.rows)
            figures.add(old, new)
            del old, new
        outcome = figures.outcome()
        if not math.isfinite(outcome.norm_after):
            raise NonFiniteError(
                f"The computed rows of {module.name} are too large for {module.dtype}, in which the file holds them",
                "Save the subject in bfloat16 or float32 and register it anew, or lower the strength",
            )
        return outcome

    def _require_one_dtype(self, name: str) -> None:
        """Rows that lora_A gains are kept in the dtype of lora_B: rounded again they would be other rows."""
        subject = self.lineage.subject
        if isinstance(subject, AdapterWeights):
            lora = subject.adapter.modules[name]
            of_a, of_b = (subject.adapter.tensors[tensor].dtype for tensor in (lora.a_tensor, lora.b_tensor))
            if of_a != of_b:
                raise MismatchError(
                    f"lora_A of {name} is {of_a} and lora_B {of_b}, and this patch would add rows to lora_A",
                    "Save the adapter in one dtype and register it anew",
                )

    def _editor(self, name: str, rows: Tensor) -> Editor:
        lineage, sources = self.lineage, self.sources
        if name not in lineage.directions:
            return self.selection.editor(sources, name, rows)
        editor = self.selection.editor(replace(sources, subject=lineage.head), name, rows)
        head = lineage.head.factors(name)
        kept = KeepingEditor(editor, lineage.directions.bases(name), head, name)
        if not isinstance(lineage.subject, AdapterWeights):
            return kept
        A = lineage.subject.adapter.factors(name)[0]
        return RebasedEditor(kept, A, _appended_blocks(A, name, self.applied))


@contextmanager
def _torch_on_one_core() -> Iterator[None]:
    """Let torch compute on one core inside, where its operations are many and small; results are then any machine's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def artifact_module(lineage: LineageState, name: str, rows: int) -> ArtifactModule:
    """Describe what an artifact holds of rows of a module of this lineage's subject, without extension or directions.

    Raises:
        KeyError: the subject has no such module, or no adapter on it.
    """
    linear = lineage.subject.modules[name]
    factor = _stored_factor(lineage, name)
    stored = factor or checkpoint_of(lineage.subject).checkpoint.stored(linear.tensor)
    return ArtifactModule(
        name=name,
        tensor=stored.name,
        dtype=stored.dtype,
        rows=rows,
        width=linear.in_features if factor is None else factor.shape[1],
        extension=0,
        in_features=linear.in_features,
        transposed=linear.transposed and factor is None,
    )


def _stored_factor(lineage: LineageState, module: str) -> Any:
    """Return lora_B of an adapted module; None for a full checkpoint."""
    if not isinstance(lineage.subject, AdapterWeights):
        return None
    adapter = lineage.subject.adapter
    return adapter.tensors[adapter.modules[module].b_tensor]


def _appended_blocks(A: Tensor, name: str, applied: Sequence[PatchArtifact]) -> list[Tensor]:
    """What applied patches appended to a module's lora_A, part by part in the order in which they stand there."""
    blocks = []
    for artifact in applied:
        if artifact.module(name) is None:
            continue
        for block in artifact.blocks(name):
            grown, _ = with_extension(A, (block.float(),))
            if len(grown) > len(A):
                blocks.append(block.float())
            A = grown
    return blocks
