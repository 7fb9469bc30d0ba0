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
from algorithms.attribution import Attribution, labelled_tokens
from algorithms.calibration import CalibrationItem
from algorithms.differences import require_finite_values
from algorithms.fgsn_measuring import Measuring, Progress, Side
from algorithms.identifications import Identification, ModuleIdentification
from algorithms.layers import LastPromptStates, LayerScore, blocks_in_scope, gap_curve, layer_scores
from algorithms.scope import depth_of, fixed_blocks, require_same_modules
from algorithms.scores import against_baseline, contrast_scores, random_scores, update_norm_scores, wanda_scores
from algorithms.selection import ModuleSelection, ScoredModule, gaining_directions, new_rows, select
from algorithms.settings import FgsnSettings, ModelRole
from algorithms.weights import WeightSource


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
    held = protected or {}
    measuring = Measuring(subject, aligned, head, settings, pad_id, claimed, held, progress)
    fixed = fixed_blocks(depth_of(subject), settings)
    sides: tuple[Side, Side] | None = None
    model = load("aligned")
    if fixed is not None and settings.statistics_model == "aligned":
        # Scope and model are known beforehand: curve and statistics come from the same pass.
        scope, unreached = measuring.modules_in_scope(fixed)
        states = LastPromptStates(), LastPromptStates()
        sides = measuring.both_sides(model, scope, harmful, benign, states)
        gaps = gap_curve(states[0].result(), states[1].result(), settings.layer_pairs, settings.seed)
        blocks = fixed
    else:
        gaps = measuring.curve(model, harmful, benign)
        blocks = blocks_in_scope(gaps, settings)
        scope, unreached = measuring.modules_in_scope(blocks)
        if settings.statistics_model == "aligned":
            sides = measuring.both_sides(model, scope, harmful, benign, None)
    attributed: dict[ModelRole, Attribution] = {}

    def attribute(role: ModelRole, model: nn.Module) -> None:
        if role in settings.gradients_at:
            candidates = {} if sides is None else sides[0].directions
            attributed[role] = measuring.attribution(model, scope, harmful, benign, candidates)

    attribute("aligned", model)
    if sides is None or "head" in settings.gradients_at:
        del model
        model = load("head")
        sides = sides or measuring.both_sides(model, scope, harmful, benign, None)
        attribute("head", model)
    del model
    choosing = _Choosing(measuring, scope, sides, attributed, held)
    found = choosing.identification(layer_scores(gaps, blocks), unreached)
    if not attributed:
        return found
    benign_tokens = labelled_tokens(benign) if settings.benign_weight else 0
    return replace(
        found,
        harmful_tokens=found.harmful_tokens or labelled_tokens(harmful),
        benign_tokens=found.benign_tokens or benign_tokens,
    )


@dataclass(frozen=True)
class _Choosing:
    """Scores, and what is chosen by them."""

    measuring: Measuring
    scope: Sequence[LinearModule]
    sides: tuple[Side, Side]
    attributed: Mapping[ModelRole, Attribution]
    protected: Mapping[str, Tensor]

    def identification(self, layers: tuple[LayerScore, ...], unreached: tuple[str, ...]) -> Identification:
        """Score and select."""
        settings = self.measuring.settings
        scored = [self._scored(done, module) for done, module in enumerate(self.scope, start=1)]
        linear = self.measuring.subject.modules.values()
        total = sum(module.out_features * module.in_features for module in linear)
        selection = select(scored, settings, total, self._lost)
        directions = self._directions()
        modules = tuple(
            self._module(module, scores, chosen, directions.get(module.name))
            for module, scores, chosen in zip(self.scope, scored, selection.modules, strict=True)
        )
        chosen_parameters = sum(
            len(found.selected) * module.in_features for found, module in zip(modules, self.scope, strict=True)
        )
        return Identification(
            settings=settings,
            layer_scores=layers,
            modules=modules,
            unreached=unreached,
            linear_parameters=total,
            selected_parameters=chosen_parameters,
            harmful_tokens=self.sides[0].tokens,
            benign_tokens=self.sides[1].tokens,
            overlap=selection.overlap,
            rank_correlation=selection.rank_correlation,
            aligned_loss=self._losses.get("aligned"),
            head_loss=self._losses.get("head"),
        )

    @property
    def _losses(self) -> Mapping[ModelRole, float]:
        return {role: found.loss for role, found in self.attributed.items()}

    @property
    def _lost(self) -> float | None:
        """How much more the answers' loss is in the head than in the aligned model, where it is known in both."""
        return self._losses["head"] - self._losses["aligned"] if len(self._losses) == 2 else None

    def _gains(self, module: str) -> Tensor:
        """The mean over the models of what the module's parts gain."""
        return torch.stack([found.gains[module] for found in self.attributed.values()]).mean(dim=0)

    def _directions(self) -> Mapping[str, Tensor]:
        """The input directions of each module that the operation clears; none unless it is `subspace`."""
        settings, candidates = self.measuring.settings, self.sides[0].directions
        if not settings.chooses_directions:
            return candidates
        names = [module.name for module in self.scope]
        wanted = settings.stop_at * self._lost if settings.stops_early and self._lost is not None else None
        gains = [require_finite_values(self._gains(name), name, "What a direction gains") for name in names]
        chosen = gaining_directions(gains, wanted)
        return {name: candidates[name][:, mask].contiguous() for name, mask in zip(names, chosen, strict=True)}

    def _scored(self, done: int, module: LinearModule) -> ScoredModule:
        settings = self.measuring.settings
        scores, benign_scores = torch.zeros(module.out_features), None
        if settings.ranked_by == "attribution":
            scores = self._gains(module.name)
        elif settings.ranked_by is not None:  # where directions are claimed no neuron is ranked
            scores, benign_scores = self._scores(module, *self.sides)
        for values in (scores, benign_scores):
            if values is not None:
                require_finite_values(values, module.name, "The score")
        self.measuring.report("scores", done, len(self.scope))
        return ScoredModule(scores, benign_scores, module.in_features, self.protected.get(module.name))

    def _scores(self, module: LinearModule, harmful: Side, benign: Side) -> tuple[Tensor, Tensor | None]:
        measuring, settings, name = self.measuring, self.measuring.settings, module.name
        if settings.score == "random":
            seeds = (random_scores(name, module.out_features, settings.seed, side) for side in ("harmful", "benign"))
            return next(seeds), next(seeds)
        if settings.score == "update-norm":
            return update_norm_scores(measuring.update(module)), None
        if settings.score == "damage":
            baseline = benign.damage[name]
            return against_baseline(harmful.damage[name], baseline, settings.damage_baseline), baseline
        found = [side.statistics for side in (harmful, benign) if side.statistics is not None]
        if settings.score == "wanda":
            weights = measuring.aligned if settings.statistics_model == "aligned" else measuring.head
            one, other = (wanda_scores(weights, name, found_.input_norms[module.input_group]) for found_ in found)
            return one, other
        one_moments, other_moments = (found_.outputs[name] for found_ in found)
        if settings.score == "contrast":
            return contrast_scores(one_moments, other_moments), contrast_scores(other_moments, one_moments)
        return one_moments.mean.float(), other_moments.mean.float()

    def _module(
        self, module: LinearModule, scored: ScoredModule, chosen: ModuleSelection, directions: Tensor | None
    ) -> ModuleIdentification:
        settings, harmful = self.measuring.settings, self.sides[0]
        if settings.protects_directions and (directions is None or not directions.shape[1]):
            chosen = replace(chosen, selected=chosen.selected[:0])  # no direction is left to claim
        new = new_rows(chosen.selected, self.protected.get(module.name))
        norms: Tensor | None = None
        if settings.entries is not None and harmful.statistics is not None:
            norms = harmful.statistics.input_norms[module.input_group].float()
        shared = directions is harmful.directions.get(module.name)
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
            directions_of=harmful.directions_of.get(module.name, module.input_group) if shared else module.name,
        )


__all__ = ["Identification", "LayerScore", "ModuleIdentification", "Progress", "identify"]
