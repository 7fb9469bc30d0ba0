"""FGSN identification: which neurons of a fine-tuned model carry the loss of safety on one dimension's prompts.

`identify` chooses the blocks in scope, measures both prompt sets in a forward pass each, scores the neurons, and
selects. It changes nothing; `algorithms.operations` then computes what the selected rows become.
Source: arXiv 2508.09190, steps 1 and 2, with the decisions that `FgsnSettings` records.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from algorithms.architectures import LinearModule
from algorithms.attribution import Attribution, attribution, labelled_tokens, require_update_memory
from algorithms.calibration import CalibrationItem
from algorithms.differences import Difference, LayeredWeights, require_finite_values
from algorithms.identifications import Identification, ModuleIdentification
from algorithms.layers import LastPromptStates, LayerScore, blocks_in_scope, gap_curve, layer_scores
from algorithms.projection import leading_directions_beside
from algorithms.scope import depth_of, fixed_blocks, modules_of_kinds, require_same_modules
from algorithms.scores import (
    against_baseline,
    contrast_scores,
    damage_scores,
    factored_damage_scores,
    random_scores,
    random_second_moment,
    update_norm_scores,
    wanda_scores,
)
from algorithms.selection import ModuleSelection, ScoredModule, new_rows, select
from algorithms.settings import FgsnSettings, ModelRole
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


def identify(
    subject: WeightSource,
    aligned: WeightSource,
    head: WeightSource,
    *,
    load: Callable[[ModelRole], nn.Module],
    harmful: Sequence[CalibrationItem],
    benign: Sequence[CalibrationItem],
    pad_id: int,
    settings: FgsnSettings,
    protected: Mapping[str, Tensor] | None = None,
    claimed: Callable[[str], Tensor | None] = lambda _: None,
    progress: Progress | None = None,
) -> Identification:
    """Find the neurons of one safety dimension in a lineage.

    Args:
        subject: the fine-tuned model as it was registered; its update is what attribution and damage measure.
        aligned: the aligned model W_a.
        head: the subject with the patches applied so far (the same source as `subject` before the first patch).
        load: gives the aligned model or the head, ready for a forward pass; called at most once for each, and only for
            those that the settings need. The first model is let go before the second is asked for.
        harmful: tokenized harmful prompts; their masks say which tokens count.
        benign: tokenized benign prompts, at least two.
        pad_id: token id to pad with.
        settings: the settings of the run.
        protected: for each module the rows claimed by applied patches, to be counted; they stay in the selection.
        claimed: gives the directions (in, m) of a module that applied patches protect, in any basis, or None; where
            directions are to be claimed, the new ones are orthogonal to these.
        progress: called with a stage, steps done and steps in all.

    Raises:
        SettingsError: a module kind or block range that the model does not have, or Gram matrices over the limit.
        CalibrationError: too few prompts, or none of their tokens counts.
        MismatchError: the sources do not have the same modules.
        NonFiniteError: NaN or infinity in weights, activations or scores.
    """
    require_same_modules(subject, aligned, head)
    run = _Run(subject, aligned, head, settings, pad_id, claimed, progress)
    fixed = fixed_blocks(depth_of(subject), settings)
    sides: tuple[_Side, _Side] | None = None
    model = load("aligned")
    if fixed is not None and settings.statistics_model == "aligned":
        # Scope and model are known beforehand: curve and statistics come from the same pass.
        scope, unreached = run.modules_in_scope(fixed)
        states = LastPromptStates(), LastPromptStates()
        sides = run.both_sides(model, scope, harmful, benign, states)
        gaps = gap_curve(states[0].result(), states[1].result(), settings.layer_pairs, settings.seed)
        blocks = fixed
    else:
        gaps = run.curve(model, harmful, benign)
        blocks = blocks_in_scope(gaps, settings)
        scope, unreached = run.modules_in_scope(blocks)
        if settings.statistics_model == "aligned":
            sides = run.both_sides(model, scope, harmful, benign, None)
    attributed: dict[ModelRole, Attribution] = {}
    if "aligned" in settings.gradients_at:
        attributed["aligned"] = run.attribution(model, scope, harmful, benign)
    if sides is None or "head" in settings.gradients_at:
        del model
        model = load("head")
        sides = sides or run.both_sides(model, scope, harmful, benign, None)
        if "head" in settings.gradients_at:
            attributed["head"] = run.attribution(model, scope, harmful, benign)
    del model
    found = run.identification(layer_scores(gaps, blocks), scope, unreached, sides, attributed, protected or {})
    if not attributed:
        return found
    benign_tokens = labelled_tokens(benign) if settings.benign_weight else 0
    return replace(
        found,
        harmful_tokens=found.harmful_tokens or labelled_tokens(harmful),
        benign_tokens=found.benign_tokens or benign_tokens,
    )


@dataclass(frozen=True)
class _Side:
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
class _Run:
    """The steps of one identification, with what they share."""

    subject: WeightSource
    aligned: WeightSource
    head: WeightSource
    settings: FgsnSettings
    pad_id: int
    claimed: Callable[[str], Tensor | None]
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
    ) -> tuple[_Side, _Side]:
        """Statistics of both prompt sets, one after the other, so that one set's second moments are held at a time."""
        if self.settings.gradients_at:
            updates = {module.name: self._update(module) for module in scope}
            require_update_memory(updates, self.settings.gram_memory_gib)
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
    ) -> Attribution:
        """The loss in this model, and what taking each neuron's update back gains there, to first order."""
        updates = {module.name: self._update(module) for module in scope}
        weight = self.settings.benign_weight

        def found(name: str, items: Sequence[CalibrationItem]) -> Attribution:
            return attribution(
                model,
                items,
                updates,
                batch_size=self.settings.batch_size,
                pad_id=self.pad_id,
                memory_gib=self.settings.gram_memory_gib,
                progress=lambda done, total: self._report(f"attribution, {name} prompts", done, total),
            )

        gains = found("harmful", harmful)
        return gains.plus(found("benign", benign), weight) if weight else gains

    def identification(
        self,
        layers: tuple[LayerScore, ...],
        scope: Sequence[LinearModule],
        unreached: tuple[str, ...],
        sides: tuple[_Side, _Side],
        attributed: Mapping[ModelRole, Attribution],
        protected: Mapping[str, Tensor],
    ) -> Identification:
        """Score and select."""
        scored: list[ScoredModule] = []
        gains = _mean([found.scores for found in attributed.values()])
        losses = {role: found.loss for role, found in attributed.items()}
        for done, module in enumerate(scope, start=1):
            # Where directions are claimed nothing is ranked; attribution came from a pass of its own.
            given = gains.get(module.name, torch.zeros(module.out_features)), None
            measured = self.settings.ranked_by not in {None, "attribution"}
            scores, benign_scores = self._scores(module, *sides) if measured else given
            for values in (scores, benign_scores):
                if values is not None:
                    require_finite_values(values, module.name, "The score")
            scored.append(ScoredModule(scores, benign_scores, module.in_features, protected.get(module.name)))
            self._report("scores", done, len(scope))
        total = sum(module.out_features * module.in_features for module in self.subject.modules.values())
        lost = losses["head"] - losses["aligned"] if len(losses) == 2 else None
        selection = select(scored, self.settings, total, lost)
        modules = tuple(
            self._module(module, scores, chosen, sides[0], protected.get(module.name))
            for module, scores, chosen in zip(scope, scored, selection.modules, strict=True)
        )
        chosen_parameters = sum(
            len(found.selected) * module.in_features for found, module in zip(modules, scope, strict=True)
        )
        return Identification(
            settings=self.settings,
            layer_scores=layers,
            modules=modules,
            unreached=unreached,
            linear_parameters=total,
            selected_parameters=chosen_parameters,
            harmful_tokens=sides[0].tokens,
            benign_tokens=sides[1].tokens,
            overlap=selection.overlap,
            rank_correlation=selection.rank_correlation,
            aligned_loss=losses.get("aligned"),
            head_loss=losses.get("head"),
        )

    def _side(
        self,
        model: nn.Module,
        name: str,
        scope: Sequence[LinearModule],
        items: Sequence[CalibrationItem],
        extra: list[Observer],
    ) -> _Side:
        wanted = self._wanted(scope, directions=name == "harmful")
        if wanted.second_moments:
            require_gram_memory(scope, wanted.gram_dtype, self.settings.gram_memory_gib)
        collector = None if wanted.nothing else StatisticsCollector(scope, wanted)
        observers = [*extra, collector] if collector is not None else extra
        if observers:
            self._pass(model, f"{name} prompts", items, observers)
        if collector is None:
            return _Side(None, {}, {}, {})
        statistics = collector.result()
        damage = {module.name: self._damage(module, statistics) for module in scope} if self._scores_damage else {}
        found = self._directions(scope, statistics) if name == "harmful" else ({}, {})
        return _Side(replace(statistics, second_moments={}), damage, *found)

    def _directions(
        self, scope: Sequence[LinearModule], statistics: PromptStatistics
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """`_Side.directions` and `directions_of` for the subspace operation.

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
            self._report("directions", done, len(scope))
        return directions, owners

    def _wanted(self, scope: Sequence[LinearModule], *, directions: bool) -> WantedStatistics:
        """What the pass has to accumulate; damage of a low-rank update needs no full second moment."""
        settings = self.settings
        subspace = directions and settings.operation == "subspace"
        projections: dict[str, Tensor] = {}
        dense = False
        if self._scores_damage and not subspace:
            for module in scope:
                factors = self._update(module).factors()
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

    def _update(self, module: LinearModule) -> Difference:
        source = self.subject if self.settings.update == "subject" else self.head
        return Difference(source, self.aligned, module.name)

    def _damage(self, module: LinearModule, statistics: PromptStatistics) -> Tensor:
        update = self._update(module)
        factors = update.factors()
        if factors is not None and module.name in statistics.projected_moments:
            return factored_damage_scores(update, factors[0], statistics.projected_moments[module.name])
        return damage_scores(update, statistics.second_moments[module.input_group])

    def _scores(self, module: LinearModule, harmful: _Side, benign: _Side) -> tuple[Tensor, Tensor | None]:
        settings, name = self.settings, module.name
        if settings.score == "random":
            seeds = (random_scores(name, module.out_features, settings.seed, side) for side in ("harmful", "benign"))
            return next(seeds), next(seeds)
        if settings.score == "update-norm":
            return update_norm_scores(self._update(module)), None
        if settings.score == "damage":
            baseline = benign.damage[name]
            return against_baseline(harmful.damage[name], baseline, settings.damage_baseline), baseline
        found = [side.statistics for side in (harmful, benign) if side.statistics is not None]
        if settings.score == "wanda":
            weights = self.aligned if settings.statistics_model == "aligned" else self.head
            one, other = (wanda_scores(weights, name, found_.input_norms[module.input_group]) for found_ in found)
            return one, other
        one_moments, other_moments = (found_.outputs[name] for found_ in found)
        if settings.score == "contrast":
            return contrast_scores(one_moments, other_moments), contrast_scores(other_moments, one_moments)
        return one_moments.mean.float(), other_moments.mean.float()

    def _module(
        self,
        module: LinearModule,
        scored: ScoredModule,
        chosen: ModuleSelection,
        harmful: _Side,
        protected: Tensor | None,
    ) -> ModuleIdentification:
        directions = harmful.directions.get(module.name)
        if self.settings.protects_directions and (directions is None or not directions.shape[1]):
            chosen = replace(chosen, selected=chosen.selected[:0])  # no direction is left to claim
        new = new_rows(chosen.selected, protected)
        norms: Tensor | None = None
        if self.settings.entries is not None and harmful.statistics is not None:
            norms = harmful.statistics.input_norms[module.input_group].float()
        return ModuleIdentification(
            module=module.name,
            input_group=module.input_group,
            scores=scored.scores,
            benign_scores=scored.benign_scores,
            ranks=chosen.ranks,
            selected=chosen.selected,
            benign_overlap=chosen.benign_overlap,
            already_protected=chosen.selected[~torch.isin(chosen.selected, new)],
            overlap=chosen.overlap,
            rank_correlation=chosen.rank_correlation,
            input_norms=norms,
            directions=directions,
            directions_of=harmful.directions_of.get(module.name, module.input_group),
        )

    def _pass(
        self, model: nn.Module, stage: str, items: Sequence[CalibrationItem], observers: Sequence[Observer]
    ) -> None:
        run_prompts(
            model,
            items,
            observers,
            batch_size=self.settings.batch_size,
            pad_id=self.pad_id,
            progress=lambda done, total: self._report(stage, done, total),
        )

    def _report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


def _mean(scores: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Module by module the mean of several models' scores; nothing of none."""
    if not scores:
        return {}
    return {name: torch.stack([of[name] for of in scores]).mean(dim=0) for name in scores[0]}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


__all__ = ["Identification", "LayerScore", "ModuleIdentification", "Progress", "identify"]
