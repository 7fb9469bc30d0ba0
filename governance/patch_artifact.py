"""The patch artifact: one safetensors file with every changed row, as it was and as it became.

Tensors, for each module: `MODULE/rows` (n) int64 ascending; `MODULE/old` and `MODULE/new`, the rows in the dtype of
the file that they stand in. For a full checkpoint both are (n, in) effective rows. For a LoRA subject they are rows
of lora_B: `old` (n, r), and `new` (n, r + e) over [A ; E], with `MODULE/extension` (e, in) = E when e > 0.

Where a patch is made on rows that patches before it wrote (`algorithms.kept_directions`), E begins with `held` rows
that those appended, `old` is (n, r + held) over [A ; E[:held]], and E is made of `blocks`, each of which stands in
lora_A as consecutive rows. A patch that claims directions holds them as `MODULE/directions` (in, r) float32.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from algorithms.buffers import BUFFER_BYTES
from algorithms.errors import CheckpointError
from governance.errors import InputError
from governance.tensor_file import TensorFile, TensorFileWriter, TensorSpec

FORMAT = "neuronledger-patch"
VERSION = 1
BLOCK_BYTES = BUFFER_BYTES
"""How much of a file is in memory at once, per thread, while rows are written or checked; its new rows add to it."""

_LATER_FIELDS = frozenset({"directions", "held", "blocks"})

Form = Literal["checkpoint", "adapter"]
Side = Literal["old", "new"]


@dataclass(frozen=True)
class ArtifactModule:
    """What the artifact holds of one module.

    Attributes:
        name: canonical module name.
        tensor: name of the tensor in the subject's files whose rows change (of an adapter, that of lora_B).
        dtype: safetensors name of that tensor's dtype.
        rows: how many rows change.
        width: entries of an old row.
        extension: rows that lora_A gains; 0 for full checkpoints.
        in_features: input width of the module.
        transposed: whether a row stands as a column of the stored tensor.
        directions: how many input directions the patch claims.
        held: leading rows of the extension that old rows are over too.
        blocks: sizes of the parts of the extension that lora_A holds as consecutive rows; empty where it is one part.
    """

    name: str
    tensor: str
    dtype: str
    rows: int
    width: int
    extension: int
    in_features: int
    transposed: bool
    directions: int = 0
    held: int = 0
    blocks: tuple[int, ...] = ()

    @property
    def has_parts_that_fit(self) -> bool:
        """Whether the parts of the extension make it up."""
        sizes = self.blocks or (self.extension,)
        return sum(sizes) == self.extension and min(sizes) >= 0 and 0 <= self.held <= self.extension

    def to_json(self) -> dict[str, Any]:
        """The fields; those that patches without directions do not need are left out where they say nothing."""
        return {name: value for name, value in asdict(self).items() if value or name not in _LATER_FIELDS}


@dataclass(frozen=True)
class ArtifactHeader:
    """What a patch artifact says of itself."""

    form: Form
    method: str
    dimension: str
    subject_digest: str
    settings_digest: str
    modules: tuple[ArtifactModule, ...]

    def to_json(self) -> str:
        """Return the header as one line of JSON."""
        modules = [module.to_json() for module in self.modules]
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self), "modules": modules}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, path: Path) -> "ArtifactHeader":
        """Read a header back.

        Raises:
            InputError: the text is not a header of a version that is known.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            known = (fields.pop("format"), fields.pop("version")) == (FORMAT, VERSION)
            modules = tuple(
                ArtifactModule(**{**module, "blocks": tuple(module.get("blocks", ()))})
                for module in fields.pop("modules")
            )
            header = cls(modules=modules, **fields)
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise InputError(
                f"{path} is not a patch artifact of version {VERSION}", "upgrade neuronledger, or restore the artifact"
            )
        return header


class ArtifactWriter(TensorFileWriter):
    """Writes a patch artifact row block by row block; the store flushes it."""

    def __init__(self, path: Path, header: ArtifactHeader) -> None:
        super().__init__(path, list(artifact_specs(header)), {FORMAT: header.to_json()}, flush=False)


class PatchArtifact:
    """A patch artifact; rows are read as they are asked for, and by several threads if need be."""

    def __init__(self, file: TensorFile, header: ArtifactHeader) -> None:
        self.header = header
        self._file = file
        self._modules: Mapping[str, ArtifactModule] = {module.name: module for module in header.modules}

    @property
    def modules(self) -> Sequence[ArtifactModule]:
        """The modules that change."""
        return self.header.modules

    def module(self, name: str) -> ArtifactModule | None:
        """Return what the artifact holds of a module, if anything."""
        return self._modules.get(name)

    def rows(self, module: str) -> Tensor:
        """Return the changed rows (n) int64, ascending."""
        return self._file.read(f"{module}/rows")

    def values(self, module: str, side: Side, first: int = 0, last: int | None = None) -> Tensor:
        """Return rows `first..last` of the changed rows, in the file's dtype."""
        return self._file.read(f"{module}/{side}", first, last)

    def read_into(self, view: memoryview, module: str, side: Side, first: int) -> None:
        """Fill `view` with the bytes of changed rows from `first` on, as they stand in the file."""
        self._file.read_into(view, f"{module}/{side}", first)

    def read_scattered(self, views: Sequence[memoryview], module: str, side: Side, first: int) -> None:
        """Fill views, one after the other, with the bytes of changed rows from `first` on."""
        self._file.read_scattered(views, f"{module}/{side}", first)

    def columns(self, module: str, side: Side, first: int, last: int) -> Tensor:
        """Return the entries `first..last` of all changed rows, in the file's dtype."""
        stored = self._file.stored[f"{module}/{side}"]
        height = max(1, BLOCK_BYTES // stored.row_bytes)
        pieces = [
            self.values(module, side, start, min(start + height, stored.shape[0]))[:, first:last].clone()
            for start in range(0, stored.shape[0], height)
        ]
        return torch.cat(pieces)

    def extension(self, module: str) -> Tensor | None:
        """Return the rows (e, in) that lora_A gains, if any."""
        return self._file.read(f"{module}/extension") if self._modules[module].extension else None

    def blocks(self, module: str) -> tuple[Tensor, ...]:
        """Return the parts of the extension, each (e, in), in order."""
        extension = self.extension(module)
        if extension is None:
            return ()
        return torch.split(extension, list(self._modules[module].blocks or (len(extension),)))

    def directions(self, module: str) -> Tensor | None:
        """Return the claimed directions (in, r) float32 of a module, if any."""
        held = self._modules.get(module)
        return self._file.read(f"{module}/directions") if held is not None and held.directions else None


@contextmanager
def open_artifact(path: Path) -> Iterator[PatchArtifact]:
    """Open a patch artifact for reading.

    Raises:
        InputError: the file is no patch artifact, or one of another version.
    """
    try:
        file = TensorFile(path)
        header = ArtifactHeader.from_json(file.metadata.get(FORMAT, ""), path)
        for spec in artifact_specs(header):
            held = file.stored.get(spec.name)
            if held is None or (held.dtype, held.shape) != (spec.dtype, spec.shape):
                raise InputError(
                    f"{path} does not hold the tensor {spec.name} that its header declares",
                    "restore the artifact store from a copy",
                )
        wrong = next((module.name for module in header.modules if not module.has_parts_that_fit), None)
        if wrong is not None:
            raise InputError(
                f"{path} declares parts of the extension of {wrong} that do not make it up",
                "restore the artifact store from a copy",
            )
        yield PatchArtifact(file, header)
    except CheckpointError as error:
        if str(path) not in error.problem:
            raise
        raise InputError(
            f"{path} is not a patch artifact ({error.problem})", "restore the artifact store from a copy"
        ) from error


def artifact_specs(header: ArtifactHeader) -> Iterator[TensorSpec]:
    """Yield the tensors of an artifact with this header, in the order of the file."""
    for module in header.modules:
        yield TensorSpec(f"{module.name}/rows", "I64", (module.rows,))
        yield TensorSpec(f"{module.name}/old", module.dtype, (module.rows, module.width + module.held))
        yield TensorSpec(f"{module.name}/new", module.dtype, (module.rows, module.width + module.extension))
        if module.extension:
            yield TensorSpec(f"{module.name}/extension", module.dtype, (module.extension, module.in_features))
        if module.directions:
            yield TensorSpec(f"{module.name}/directions", "F32", (module.in_features, module.directions))
