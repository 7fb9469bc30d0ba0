"""A lineage's weights rebuilt from its subject and patch artifacts: at its head, and at earlier moments of its history.

Each tensor of the subject is read once, in blocks. For every set of patches that matters to it the block gets their
rows and is hashed; the head's block is also held against the files of the working checkpoint.
"""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

from algorithms.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from algorithms.checkpoints import Checkpoint, StoredTensor
from algorithms.digests import TENSOR_ALGORITHM, Hash, named_digest, new_hash, tree_digest
from governance.errors import WeightsChangedError
from governance.found_files import FoundFile, Layout, compare_plain_files, layout_of
from governance.head_files import AdapterHead, Edit, adapter_head, checkpoint_edits, write_edits
from governance.lineage_history import LineageHistory
from governance.patch_artifact import PatchArtifact
from governance.row_comparison import RowComparison
from governance.row_files import tensor_blocks
from governance.weight_differences import Difference
from governance.weight_state import (
    TREE,
    FileState,
    TensorState,
    changed_files,
    digest_of,
    measure_plain_file,
    measure_tensors,
)
from governance.workspace import Progress

State = tuple[int, ...]
"""Numbers of the patches that are applied, ascending."""


class Rebuilding:
    """One rebuilding, and what it has found so far.

    Args:
        progress: told after each tensor.
        history: the lineage.
        artifacts: number → artifact of every patch of the states, in sequence order.
        states: the sets of patches whose digests are wanted; the head is one of them.

    Attributes:
        head: the applied patches.
        findings: what does not agree.
        is_recorded: whether subject and rebuilt head are what was recorded, whatever the working checkpoint holds.
        bytes: bytes of the rebuilt tensors.
    """

    def __init__(
        self,
        progress: Progress,
        history: LineageHistory,
        artifacts: Mapping[int, PatchArtifact],
        states: Collection[State],
    ) -> None:
        self._progress, self._history, self._artifacts = progress, history, artifacts
        self.head: State = tuple(patch.sequence for patch in history.applied)
        self.findings: list[Difference] = []
        self.is_recorded = True
        self.bytes = 0
        self._tensors: dict[State, dict[str, TensorState]] = {state: {} for state in states}
        self._modules = {module.tensor: module for module in history.modules}
        self._configs: dict[State, tuple[FileState, ...]] = dict.fromkeys(self._tensors, ())

    @property
    def tensors(self) -> int:
        """How many tensors were rebuilt."""
        return len(self._tensors[self.head])

    def digest(self, state: State) -> str:
        """The digest of the rebuilt weights at one of the states."""
        return digest_of(self._tensors[state].values(), self._configs[state])

    def rebuild_checkpoint(self, subject: Checkpoint) -> None:
        """Rebuild a full checkpoint.

        Raises:
            CheckpointError: the subject cannot be read.
        """
        edits = checkpoint_edits(self._artifacts)
        layouts = [layout_of(subject.path, file) for file in subject.weight_files]
        total = sum(len(layout.tensors) for layout in layouts)
        for layout in layouts:
            with FoundFile(self._history.working, layout) as found:
                for stored in layout.tensors:
                    self._progress("rebuilding the head", self.tensors, total)
                    self._rebuild_tensor(subject, stored, edits.get(stored.name, ()), found)
                self.findings += found.differences
            self._check_file(layout)
        self._progress("rebuilding the head", total, total)
        self._finish(subject.weight_files, {})

    def rebuild_adapter(self, subject: Adapter) -> None:
        """Rebuild a LoRA adapter.

        Raises:
            CheckpointError: the subject cannot be read.
        """
        for problem in changed_files(subject.path, self._history.subject_files, always_hash=True):
            self._not_recorded(Difference("subject", problem))
        for state in self._tensors:
            head = self._adapter_at(subject, state)
            for stored in head.layout.tensors:
                running = new_hash(self._algorithm(stored.name))
                running.update(head.rows(stored.name).data)
                self._note(state, stored, running)
            digest = hashlib.sha256(head.config).hexdigest()
            self._configs[state] = (FileState(ADAPTER_CONFIG, len(head.config), 0, digest),)
        head = self._adapter_at(subject, self.head)
        with FoundFile(self._history.working, head.layout) as found:
            for stored in head.layout.tensors:
                rows = RowComparison(stored, None, transposed=False)
                rows.compare_with_head(0, found.read(stored.name, 0, stored.end - stored.begin), head.rows(stored.name))
                self._compared(rows, stored, found)
            self.findings += found.differences
        self._check_file(head.layout)
        self._finish((ADAPTER_WEIGHTS,), head.contents)

    def require_written(self, copy: Path) -> None:
        """Read back a copy of the head that was written from the same sources.

        Raises:
            WeightsChangedError: it is another; names the tensor or file.
        """
        stored = (Adapter if self._history.is_adapter else Checkpoint).open(copy).tensors
        found = {
            tensor.name: tensor for tensor in measure_tensors(copy, stored.values(), self._history.recorded.algorithms)
        }
        expected = self._tensors[self.head]
        wrong = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        wrong += [
            config.file
            for config in self._configs[self.head]
            if measure_plain_file(copy, config.file).digest != config.digest
        ]
        if wrong:
            raise WeightsChangedError(
                f"{wrong[0]} was written to {copy}, but other bytes were read back", "check the disk, and try again"
            )

    def _rebuild_tensor(
        self, subject: Checkpoint, stored: StoredTensor, edits: tuple[Edit, ...], found: FoundFile
    ) -> None:
        touching = {state: frozenset(edit.patch for edit in edits if edit.patch in state) for state in self._tensors}
        untouched: frozenset[int] = frozenset()
        hashes = {patches: new_hash(self._algorithm(stored.name)) for patches in {untouched, *touching.values()}}
        module = self._modules.get(stored.name)
        name, transposed = (module.name, module.transposed) if module else (None, False)
        rows = RowComparison(stored, name, transposed=transposed)
        for block in tensor_blocks(subject.path, stored):
            original = bytes(block.content) if edits else b""
            for patches, running in hashes.items():
                if edits:
                    block.content[:] = original
                write_edits(block, (edit for edit in edits if edit.patch in patches))
                running.update(block.content)
                if patches == touching[self.head]:
                    content = found.read(stored.name, block.start * stored.row_bytes, len(block.content))
                    rows.compare_with_head(block.start, content, block.rows)
        for state, patches in touching.items():
            self._note(state, stored, hashes[patches])
        registered = self._history.subject_tensors.get(stored.name)
        if registered is None or registered.digest != hashes[untouched].hexdigest():
            problem = "the subject's own tensor is not what was registered"
            self._not_recorded(Difference("subject", problem, stored.file, stored.name))
        self._compared(rows, stored, found)

    def _compared(self, rows: RowComparison, stored: StoredTensor, found: FoundFile) -> None:
        self.bytes += stored.end - stored.begin
        if found.has(stored.name) and stored.begin < stored.end:
            self.findings += rows.head_differences("the working checkpoint holds other bytes than the rebuilt head")
        tensor, recorded = self._tensors[self.head][stored.name], self._history.recorded.tensors.get(stored.name)
        if tensor != recorded:
            problem = "the rebuilt tensor is not what was recorded"
            self._not_recorded(Difference("record", problem, stored.file, stored.name))

    def _check_file(self, layout: Layout) -> None:
        """Hold a file's recorded digest against the rebuilt one, where its tensors do not say so already."""
        recorded = {file.file: file for file in self._history.recorded.files}.get(layout.file)
        tensors = [self._tensors[self.head][stored.name] for stored in layout.tensors]
        if any(tensor != self._history.recorded.tensors.get(tensor.name) for tensor in tensors):
            return
        named = [(tensor.name, named_digest(tensor.digest, tensor.digest_algorithm)) for tensor in tensors]
        rebuilt = tree_digest(hashlib.sha256(layout.prefix).hexdigest(), named)
        if recorded is None or (recorded.digest_algorithm == TREE and recorded.digest != rebuilt):
            self._not_recorded(Difference("record", "the rebuilt file is not what was recorded", layout.file))

    def _finish(self, weight_files: Collection[str], contents: Mapping[str, bytes]) -> None:
        for name, tensor in self._history.recorded.tensors.items():
            if name not in self._tensors[self.head]:
                self._not_recorded(Difference("record", "recorded, but not in the subject", tensor.file, name))
        plain = compare_plain_files(self._history.working, self._history.subject, weight_files, contents)
        self.findings += plain.differences

    def _adapter_at(self, subject: Adapter, state: State) -> AdapterHead:
        return adapter_head(subject, {patch: self._artifacts[patch] for patch in state})

    def _note(self, state: State, stored: StoredTensor, running: Hash) -> None:
        self._tensors[state][stored.name] = TensorState(
            stored.name, stored.shape, stored.dtype, stored.file, running.hexdigest(), self._algorithm(stored.name)
        )

    def _not_recorded(self, difference: Difference) -> None:
        self.findings.append(difference)
        self.is_recorded = False

    def _algorithm(self, tensor: str) -> str:
        recorded = self._history.recorded.tensors.get(tensor)
        return recorded.digest_algorithm if recorded else TENSOR_ALGORITHM
