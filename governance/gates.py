"""Gates: a prepared patch is judged by the policy in force, in memory, before anything of it is written.

The head and the candidate (`governance.candidate_model`) are measured on the same prompts; stored answers are taken
where there are some. `governance.gate_rules` says what passes. Nothing is recorded here: a run records the decision
with the patch, a dry run shows it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from algorithms.generation import first_token_log_probabilities
from algorithms.loading import load_tokenizer
from governance.candidate_model import Candidate, candidate_of
from governance.evaluated_models import answer_state
from governance.gate_rules import GateFigures, MeasuredRate, Pair, RuleResult, gate_results, passed
from governance.gate_tasks import answer_tasks, divergence_prompts
from governance.lineage_state import LineageState, ModelLocation
from governance.measured_tasks import AnswerTask, DivergenceTask
from governance.measuring import GenerationSettings, Measured, measure
from governance.metrics import HARMFULNESS, KL
from governance.planning import PreparedPatch
from governance.policy_files import OVER_REFUSAL, Gates, accuracy_name
from governance.policy_records import PolicyInForce, policy_in_force
from governance.workspace import Workspace
from registry import queries

AGAINST = "head"
"""What the candidate's divergence is measured against, for the record."""


@dataclass(frozen=True)
class Decision:
    """What the policy in force says of a prepared patch.

    Attributes:
        policy: None if there is none: everything passes.
        results: every rule of its gates.
        before: figures of the head.
        after: figures of the candidate.
        judged: digest of the weights that were judged; None if nothing was measured.
    """

    policy: PolicyInForce | None = None
    results: tuple[RuleResult, ...] = ()
    before: tuple[Measured, ...] = ()
    after: tuple[Measured, ...] = ()
    judged: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every rule is kept."""
        return passed(self.results)

    @property
    def failed(self) -> tuple[RuleResult, ...]:
        """The rules that are not kept."""
        return tuple(result for result in self.results if not result.passed)

    @property
    def approvals_needed(self) -> int:
        """How many others have to approve the patch before it is written."""
        return self.policy.file.approvals_needed if self.policy else 0

    @property
    def refusal(self) -> str:
        """Which rules refuse the patch, in one sentence."""
        rules = "; ".join(result.sentence for result in self.failed)
        return f"policy {self.policy.label if self.policy else ''} refuses the patch: {rules}"

    @property
    def told(self) -> dict[str, Any]:
        """What the event of a patch says of it."""
        if self.policy is None:
            return {}
        rules = [
            {"rule": r.rule, "subject": r.subject, "limit": r.limit, "measured": r.measured, "passed": r.passed}
            for r in self.results
        ]
        judged = {"digest_judged": self.judged} if self.judged else {}
        return {**self.policy.told, "gates": rules, **judged}


def judge_patch(workspace: Workspace, ready: PreparedPatch) -> Decision:
    """Hold a prepared patch against the policy in force for its lineage.

    Raises:
        PolicyError: the policy in force cannot be read, or asks for what is not there.
        InputError: a dimension that a rule asks for has no held-out prompts.
        UnsupportedModelError: the model cannot be judged in memory.
        CalibrationError, SettingsError, JudgeError: as `measure`.
    """
    lineage = ready.plan.lineage
    with workspace.registry.read() as session:
        policy = policy_in_force(session, lineage.name)
        tasks = answer_tasks(workspace, session, policy, ready) if policy else []
    if policy is None or policy.file.gates is None:
        return Decision(policy)
    gates = policy.file.gates
    if not gates.measures:
        return Decision(policy, gate_results(gates, _figures(ready, {}, {})))
    # In the policy's number format, whatever the command says: who applies a patch does not choose how it is judged.
    workspace = replace(workspace, placement=replace(workspace.placement, dtype=gates.dtype))
    with candidate_of(ready, workspace.placement) as candidate:
        before, after = _measured(workspace, policy, lineage, candidate, tasks)
    figures = _figures(ready, _by_metric(before), _by_metric(after))
    return Decision(policy, gate_results(gates, figures), before, after, candidate.digest)


def _measured(
    workspace: Workspace,
    policy: PolicyInForce,
    lineage: LineageState,
    candidate: Candidate,
    tasks: list[AnswerTask],
) -> tuple[tuple[Measured, ...], tuple[Measured, ...]]:
    """The figures of the head and of the candidate, one model in memory after the other."""
    gates = policy.file.gates or Gates()
    settings = GenerationSettings(max_new_tokens=gates.max_new_tokens, batch_size=gates.batch_size)
    base = lineage.locations["subject"].base_path

    def head() -> nn.Module:
        return workspace.placement.load(lineage.working, base)

    under = _under(workspace, lineage)
    tokenizer = load_tokenizer(lineage.working, base)
    location = ModelLocation("head", lineage.working, base)
    state = answer_state(lineage.state_digest, under, location)
    before = measure(workspace, tasks, head, tokenizer, state, settings)
    more: list[DivergenceTask] = []
    if gates.divergence is not None:
        with workspace.registry.read() as session:
            prompts = divergence_prompts(workspace, session, policy)
        texts = [row.prompt for row in prompts.rows]
        reference = first_token_log_probabilities(head(), tokenizer, texts, batch_size=gates.batch_size)
        more.append(DivergenceTask(f"{KL}_{AGAINST}", prompts, AGAINST, reference))
    state = answer_state(candidate.digest, under, location)
    after = measure(workspace, [*tasks, *more], candidate.load, candidate.tokenizer(), state, settings)
    return before, after


def _under(workspace: Workspace, lineage: LineageState) -> str | None:
    """Digest of the checkpoint under an adapter."""
    with workspace.registry.read() as session:
        below = queries.get_lineage(session, lineage.name).subject.base_model
        return below.state_digest if below else None


def _by_metric(figures: tuple[Measured, ...]) -> Mapping[tuple[str, str | None], Measured]:
    return {(figure.metric, figure.dimension): figure for figure in figures}


def _figures(
    ready: PreparedPatch,
    before: Mapping[tuple[str, str | None], Measured],
    after: Mapping[tuple[str, str | None], Measured],
) -> GateFigures:
    """What was measured, in the form that the rules ask for."""
    plan = ready.plan
    pairs = {key: Pair(_rate(figure), _rate(after[key])) for key, figure in before.items()}
    divergence = after.get((f"{KL}_{AGAINST}", None))
    suffix = accuracy_name("")
    return GateFigures(
        dimension=plan.dimension,
        modified_share=plan.parameters_modified / plan.lineage.parameters,
        linear_share=plan.parameters_modified / plan.lineage.linear_parameters,
        harmfulness={
            dimension: pair for (metric, dimension), pair in pairs.items() if metric == HARMFULNESS and dimension
        },
        accuracy={metric.removesuffix(suffix): pair for (metric, _), pair in pairs.items() if metric.endswith(suffix)},
        over_refusal=pairs.get((OVER_REFUSAL, None)),
        divergence=divergence.value if divergence else None,
    )


def _rate(figure: Measured) -> MeasuredRate:
    low, high = figure.interval
    return MeasuredRate(figure.value, low, high, figure.n, figure.outcomes)
