"""What an FGSN identification found, and how it is stored: its tensors and a JSON summary of the rest."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from algorithms.editors import EditSources
from algorithms.layers import LayerScore
from algorithms.operations import ModuleStatistics, RowEditor
from algorithms.settings import FgsnSettings
from algorithms.stored_parts import readable, unreadable

_MODULE_TENSORS = ("scores", "benign_scores", "ranks", "selected", "benign_overlap", "already_protected")
_FIGURES = (
    "linear_parameters",
    "selected_parameters",
    "harmful_tokens",
    "benign_tokens",
    "overlap",
    "rank_correlation",
)


@dataclass(frozen=True)
class ModuleIdentification:
    """What was found in one module in scope.

    Attributes:
        module: canonical name of the module.
        input_group: name of the first module with the same input; modules of a group share norms.
        scores: (out,) float32, the score that the harmful ranking used.
        benign_scores: (out,) float32, the same kind of score on benign prompts; None when the score has no such side.
        ranks: (out,) int64, position in the harmful ranking from 0 (inside the module, or over all modules).
        selected: (n,) int64 ascending, the rows chosen, those that are already protected included.
        benign_overlap: (m,) int64 ascending, rows of the harmful top set dropped because they are in the benign one.
        already_protected: (p,) int64 ascending, the selected rows that were protected when the run began.
        overlap: share of the harmful top set that is in the benign top set too; None without a benign side.
        rank_correlation: Spearman's correlation of harmful and benign scores; None without a benign side.
        input_norms: (in,) float32 norms ‖x_j‖ on harmful prompts, when the operation needs them.
        directions: (in, r) float32 leading orthonormal input directions, when the operation needs them.
        directions_of: name of the first module with the same directions.
    """

    module: str
    input_group: str
    scores: Tensor
    benign_scores: Tensor | None
    ranks: Tensor
    selected: Tensor
    benign_overlap: Tensor
    already_protected: Tensor
    overlap: float | None
    rank_correlation: float | None
    input_norms: Tensor | None
    directions: Tensor | None
    directions_of: str

    @property
    def statistics(self) -> ModuleStatistics:
        """What `edit_rows` needs of the calibration run."""
        return ModuleStatistics(self.input_norms, self.directions)


@dataclass(frozen=True)
class Identification:
    """One run that found the neurons of a dimension.

    Attributes:
        settings: the settings of the run.
        layer_scores: one entry per block of the model, in order.
        modules: the modules in scope, in the order of the architecture table; modules with nothing selected included.
        unreached: linear modules in the blocks and kinds in scope that a LoRA subject has no adapter on, so that
            nothing can be changed there.
        linear_parameters: number of entries of all linear modules of the model.
        selected_parameters: number of entries of the selected rows.
        harmful_tokens: harmful tokens that the statistics counted; 0 for scores without a forward pass.
        benign_tokens: the same for benign tokens.
        overlap: share of all harmful top sets that is in the benign top sets too; None without a benign side.
        rank_correlation: Spearman's correlation over all modules in scope (ranking all) or the mean of the modules'
            (ranking module); None without a benign side.
        aligned_loss: mean of −log p over the counted answer tokens in the aligned model, where it was differentiated.
        head_loss: the same in the lineage's head.
    """

    settings: FgsnSettings
    layer_scores: tuple[LayerScore, ...]
    modules: tuple[ModuleIdentification, ...]
    unreached: tuple[str, ...]
    linear_parameters: int
    selected_parameters: int
    harmful_tokens: int
    benign_tokens: int
    overlap: float | None
    rank_correlation: float | None
    aligned_loss: float | None = None
    head_loss: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name that safetensors can store; `summary` holds the rest.

        Names are `KIND/MODULE` with KIND out of scores, benign_scores, ranks, selected, benign_overlap and
        already_protected, `input_norms/INPUT_GROUP`, and `directions/MODULE` of the first module with the same ones.
        """
        found: dict[str, Tensor] = {}
        for part in self.modules:
            for kind in _MODULE_TENSORS:
                _store(found, f"{kind}/{part.module}", getattr(part, kind))
            _store(found, f"input_norms/{part.input_group}", part.input_norms)
            _store(found, f"directions/{part.directions_of}", part.directions)
        return found

    def summary(self) -> dict[str, Any]:
        """Everything that is no tensor, ready for JSON."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "layer_scores": [asdict(layer) for layer in self.layer_scores],
            "modules": [
                {
                    "module": part.module,
                    "input_group": part.input_group,
                    "directions_of": part.directions_of,
                    "directions": 0 if part.directions is None else part.directions.shape[1],
                    "overlap": part.overlap,
                    "rank_correlation": part.rank_correlation,
                }
                for part in self.modules
            ],
            "unreached": list(self.unreached),
            **{name: getattr(self, name) for name in _FIGURES},
            "aligned_loss": self.aligned_loss,
            "head_loss": self.head_loss,
        }


class StoredIdentification:
    """A stored identification of which one module at a time is in memory.

    Args:
        summary: what `Identification.summary` returned.
        tensors: what `Identification.tensors` returned; a mapping that reads from a file will do.

    Attributes:
        settings, unreached: as of the identification.
        modules: names of the modules in scope, in order.

    Raises:
        SettingsError: an entry or a tensor is missing, or the settings are not valid.
    """

    def __init__(self, summary: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        with readable():
            self.settings = FgsnSettings.model_validate(summary["settings"])
            self.unreached: tuple[str, ...] = tuple(summary["unreached"])
            self._entries = {str(entry["module"]): entry for entry in summary["modules"]}
            self._summary = summary
        self._tensors = tensors
        names = set(tensors)
        for module in self._entries:
            for kind in ("scores", "ranks", "selected", "benign_overlap", "already_protected"):
                if f"{kind}/{module}" not in names:
                    raise unreadable(f"no tensor {kind}/{module}")

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules in scope, in order."""
        return tuple(self._entries)

    def selected(self, module: str) -> Tensor:
        """(n,) int64 ascending, the rows chosen in a module."""
        return self._tensors[f"selected/{module}"]

    def statistics(self, module: str) -> ModuleStatistics:
        """What operations need of a module's calibration inputs."""
        entry = self._entries[module]
        return ModuleStatistics(
            self._tensors.get(f"input_norms/{entry['input_group']}"), self._tensors.get(_directions_name(entry))
        )

    def directions(self, module: str) -> Tensor | None:
        """(in, r) float32, what a patch claims of a module instead of rows; None where it claims rows."""
        return self.statistics(module).directions if self.settings.protects_directions else None

    def require_unprotected(self, protected: Mapping[str, Tensor], directed: Collection[str] = ()) -> None:
        """Nothing is refused: protected rows are left out row by row, and the action on directions is kept."""
        del protected, directed

    def editor(self, sources: EditSources, module: str, rows: Tensor) -> RowEditor:
        """Who computes new values of some of a module's selected rows; see `editors.Selection`."""
        return RowEditor(
            sources.subject, sources.aligned, sources.base, module, rows, self.settings, self.statistics(module)
        )

    def whole(self) -> Identification:
        """All of it at once.

        Raises:
            SettingsError: an entry is missing.
        """
        with readable():
            return Identification(
                settings=self.settings,
                layer_scores=tuple(LayerScore(**layer) for layer in self._summary["layer_scores"]),
                modules=tuple(_module_from_parts(entry, self._tensors) for entry in self._entries.values()),
                unreached=self.unreached,
                **{name: self._summary[name] for name in _FIGURES},
                aligned_loss=self._summary.get("aligned_loss"),  # older identifications have none
                head_loss=self._summary.get("head_loss"),
            )


def _store(tensors: dict[str, Tensor], name: str, value: Tensor | None) -> None:
    if value is not None and name not in tensors:
        tensors[name] = value.contiguous()


def _directions_name(entry: Mapping[str, Any]) -> str:
    """Name of the tensor of a module's directions; in older identifications those with one input shared them."""
    return f"directions/{entry.get('directions_of', entry['input_group'])}"


def _module_from_parts(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModuleIdentification:
    module, group = str(entry["module"]), str(entry["input_group"])
    return ModuleIdentification(
        module=module,
        input_group=group,
        scores=tensors[f"scores/{module}"],
        benign_scores=tensors.get(f"benign_scores/{module}"),
        ranks=tensors[f"ranks/{module}"],
        selected=tensors[f"selected/{module}"],
        benign_overlap=tensors[f"benign_overlap/{module}"],
        already_protected=tensors[f"already_protected/{module}"],
        overlap=entry["overlap"],
        rank_correlation=entry["rank_correlation"],
        input_norms=tensors.get(f"input_norms/{group}"),
        directions=tensors.get(_directions_name(entry)),
        directions_of=entry.get("directions_of", group),
    )
