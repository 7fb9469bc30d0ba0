"""What FGSN measures: the passes of both prompt sets through the aligned model and the lineage's head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from algorithms.architectures import LinearModule
from algorithms.attribution import Attribution, Gains, attribution, direction_gains, neuron_gains, require_update_memory
from algorithms.calibration import CalibrationItem
from algorithms.differences import Difference, LayeredWeights
from algorithms.layers import LastPromptStates, gap_curve
from algorithms.projection import leading_directions_beside
from algorithms.scope import modules_of_kinds
from algorithms.scores import damage_scores, factored_damage_scores, random_second_moment
from algorithms.settings import FgsnSettings
from algorithms.statistics import (
    Observer,
    PromptStatistics,
    StatisticsCollector,
    WantedStatistics,
    require_gram_memory,
    run_prompts,
)
from algorithms.weights import WeightSource

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Side:
    """What one prompt set gave: statistics without second moments, and what was derived from those.

    Attributes:
        directions: module → input directions; modules with the same ones share a tensor.
        directions_of: module → the first module with the same directions.
    """

    statistics: PromptStatistics | None
    damage: dict[str, Tensor]
    directions: dict[str, Tensor]
    directions_of: dict[str, str]

    @property
    def tokens(self) -> int:
        return 0 if self.statistics is None else self.statistics.tokens


@dataclass(frozen=True)
class Measuring:
    """The passes of one identification, with what they share; see `fgsn.identify` for the fields."""

    subject: WeightSource
    aligned: WeightSource
    head: WeightSource
    settings: FgsnSettings
    pad_id: int
    claimed: Callable[[str], Tensor | None]
    protected: Mapping[str, Tensor]
    progress: Progress | None

    def modules_in_scope(self, blocks: range) -> tuple[list[LinearModule], tuple[str, ...]]:
        """Modules of these blocks and of the kinds wanted, and the names of those that a LoRA subject cannot reach."""
        wanted = [module for module in modules_of_kinds(self.subject, self.settings.modules) if module.block in blocks]
        if not isinstance(self.subject, LayeredWeights):
            return wanted, ()
        reached = [module for module in wanted if self.subject.factors(module.name) is not None]
        names = {module.name for module in reached}
        return reached, tuple(module.name for module in wanted if module.name not in names)

    def curve(self, model: nn.Module, harmful: Sequence[CalibrationItem], benign: Sequence[CalibrationItem]) -> Tensor:
        """The gap curve from a pass of its own."""
        found = []
        for name, items in (("harmful", harmful), ("benign", benign)):
            states = LastPromptStates()
            self._pass(model, f"layer curve, {name} prompts", items, [states])
            found.append(states.result())
        return gap_curve(found[0], found[1], self.settings.layer_pairs, self.settings.seed)

    def both_sides(
        self,
        model: nn.Module,
        scope: Sequence[LinearModule],
        harmful: Sequence[CalibrationItem],
        benign: Sequence[CalibrationItem],
        states: tuple[LastPromptStates, LastPromptStates] | None,
    ) -> tuple[Side, Side]:
        """Statistics of both prompt sets, one after the other, so that one set's second moments are held at a time."""
        if self.settings.ranked_by == "attribution":
            require_update_memory([self.update(module) for module in scope], self.settings.gram_memory_gib)
        extra: tuple[list[Observer], list[Observer]] = ([], []) if states is None else ([states[0]], [states[1]])
        return (
            self._side(model, "harmful", scope, harmful, extra[0]),
            self._side(model, "benign", scope, benign, extra[1]),
        )

    def attribution(
        self,
        model: nn.Module,
        scope: Sequence[LinearModule],
        harmful: Sequence[CalibrationItem],
        benign: Sequence[CalibrationItem],
        candidates: Mapping[str, Tensor],
    ) -> Attribution:
        """The loss in this model, and what taking parts of the update out gains there, to first order.

        The parts are neurons, or, where directions are to be claimed, the candidates (in, r) of each module.
        """
        parts = {module.name: self._parts(module, candidates) for module in scope}
        weight = self.settings.benign_weight

        def found(name: str, items: Sequence[CalibrationItem]) -> Attribution:
            return attribution(
                model,
                items,
                parts,
                batch_size=self.settings.batch_size,
                pad_id=self.pad_id,
                progress=lambda done, total: self.report(f"attribution, {name} prompts", done, total),
            )

        gains = found("harmful", harmful)
        return gains.plus(found("benign", benign), weight) if weight else gains

    def _parts(self, module: LinearModule, candidates: Mapping[str, Tensor]) -> Gains:
        if not self.settings.protects_directions:
            return neuron_gains(self.update(module))
        # Rows that are claimed as neurons keep what they are.
        return direction_gains(self.update(module), candidates[module.name], self.protected.get(module.name))

    def _side(
        self,
        model: nn.Module,
        name: str,
        scope: Sequence[LinearModule],
        items: Sequence[CalibrationItem],
        extra: list[Observer],
    ) -> Side:
        wanted = self._wanted(scope, directions=name == "harmful")
        if wanted.second_moments:
            require_gram_memory(scope, wanted.gram_dtype, self.settings.gram_memory_gib)
        collector = None if wanted.nothing else StatisticsCollector(scope, wanted)
        observers = [*extra, collector] if collector is not None else extra
        if observers:
            self._pass(model, f"{name} prompts", items, observers)
        if collector is None:
            return Side(None, {}, {}, {})
        statistics = collector.result()
        damage = {module.name: self._damage(module, statistics) for module in scope} if self._scores_damage else {}
        found = self._directions(scope, statistics) if name == "harmful" else ({}, {})
        return Side(replace(statistics, second_moments={}), damage, *found)

    def _directions(
        self, scope: Sequence[LinearModule], statistics: PromptStatistics
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """`Side.directions` and `directions_of` for the subspace operation.

        Modules with one input have the same directions, unless some of theirs are claimed already.
        """
        settings = self.settings
        directions: dict[str, Tensor] = {}
        owners: dict[str, str] = {}
        if settings.operation != "subspace":
            return directions, owners
        known: dict[str, list[tuple[str, Tensor | None]]] = {}
        for done, module in enumerate(scope, start=1):
            P = self.claimed(module.name) if settings.protects_directions else None
            alike = known.setdefault(module.input_group, [])
            owner = next((name for name, other in alike if _same(P, other)), None)
            if owner is None:
                moment, owner = statistics.second_moments[module.input_group], module.name
                if settings.basis == "random":
                    moment = random_second_moment(module.input_group, moment.shape[0], settings.seed)
                alike.append((owner, P))
                directions[owner] = leading_directions_beside(moment, settings.directions, P)
            directions[module.name], owners[module.name] = directions[owner], owner
            self.report("directions", done, len(scope))
        return directions, owners

    def _wanted(self, scope: Sequence[LinearModule], *, directions: bool) -> WantedStatistics:
        """What the pass has to accumulate; damage of a low-rank update needs no full second moment."""
        settings = self.settings
        subspace = directions and settings.operation == "subspace"
        projections: dict[str, Tensor] = {}
        dense = False
        if self._scores_damage and not subspace:
            for module in scope:
                factors = self.update(module).factors()
                if factors is None:
                    dense = True
                else:
                    projections[module.name] = factors[1]
        return WantedStatistics(
            input_squares=settings.ranked_by == "wanda" or (directions and settings.entries is not None),
            second_moments=subspace or dense,
            outputs=settings.needs_outputs,
            gram_dtype=torch.float64 if settings.gram_dtype == "float64" else torch.float32,
            projections={} if dense else projections,
        )

    @property
    def _scores_damage(self) -> bool:
        return self.settings.ranked_by == "damage"

    def update(self, module: LinearModule) -> Difference:
        """U of a module, of the subject or of the head."""
        source = self.subject if self.settings.update == "subject" else self.head
        return Difference(source, self.aligned, module.name)

    def _damage(self, module: LinearModule, statistics: PromptStatistics) -> Tensor:
        update = self.update(module)
        factors = update.factors()
        if factors is not None and module.name in statistics.projected_moments:
            return factored_damage_scores(update, factors[0], statistics.projected_moments[module.name])
        return damage_scores(update, statistics.second_moments[module.input_group])

    def _pass(
        self, model: nn.Module, stage: str, items: Sequence[CalibrationItem], observers: Sequence[Observer]
    ) -> None:
        run_prompts(
            model,
            items,
            observers,
            batch_size=self.settings.batch_size,
            pad_id=self.pad_id,
            progress=lambda done, total: self.report(stage, done, total),
        )

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell how far a stage is."""
        if self.progress is not None:
            self.progress(stage, done, total)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
