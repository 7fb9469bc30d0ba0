"""Plans: what a patch would change, worked out whole before anything is written.

A plan is frozen and says which rows of which modules, against which head. Preparing it computes every new row into
the patch artifact, under a temporary name: a dry run stops there, a run goes on, so both refuse the same things.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session
from torch import Tensor

from algorithms.digests import ExpectedContent
from algorithms.editors import EditSources, Selection, Settings
from algorithms.parallel import beside
from algorithms.selection import new_rows
from governance.errors import PlanError, SpaceError
from governance.gate_rules import RuleResult
from governance.identification import stored_identification
from governance.lineage_state import LineageState, read_lineage, telling_writers_apart
from governance.patch_artifact import ArtifactHeader, ArtifactModule, ArtifactWriter
from governance.planned_rows import artifact_module, planned_rows
from governance.provenance import Origin
from governance.references import edit_sources
from governance.row_figures import ModuleOutcome
from governance.tensor_file import DTYPES
from governance.working_checkpoint import require_space
from governance.working_files import Change, LineageFiles, check_change
from governance.workspace import Workspace
from registry import queries
from registry.errors import RecordNotFoundError, RegistryBusyError
from registry.schema import Identification as IdentificationRecord
from registry.schema import Lineage, Method


@dataclass(frozen=True)
class ModulePlan:
    """The rows of one module that a patch will change.

    Attributes:
        module: canonical name.
        module_id: its id in the registry.
        rows: (n,) int64 ascending, selected and not protected.
        selected: how many neurons the identification selected here.
        protected: how many of them are protected already.
        parameters: entries of the effective rows that change.
        bytes: bytes of the rows in the file.
        directions: how many input directions the patch claims instead of the rows; 0 where it claims the rows.
    """

    module: str
    module_id: int
    rows: Tensor
    selected: int
    protected: int
    parameters: int
    bytes: int
    directions: int = 0


@dataclass(frozen=True)
class ChangePlan:
    """What a patch will change and what is recorded of it; `lineage` is the state that it was planned on.

    Attributes:
        recorded_settings: the settings that its rows were computed with, in the types of JSON.
    """

    lineage: LineageState
    dimension: str
    dimension_id: int
    method: Method
    recorded_settings: Mapping[str, Any]
    settings_digest: str
    modules: tuple[ModulePlan, ...]
    neurons_selected: int
    neurons_protected: int

    @property
    def neurons_modified(self) -> int:
        """Neurons that the patch will newly claim."""
        return sum(len(module.rows) for module in self.modules if not module.directions)

    @property
    def rows_modified(self) -> int:
        """Rows that the patch will write."""
        return sum(len(module.rows) for module in self.modules)

    @property
    def directions(self) -> int:
        """Input directions that the patch will claim, over all modules."""
        return sum(module.directions for module in self.touched)

    @property
    def parameters_modified(self) -> int:
        """Entries of the effective weights that the patch may change."""
        return sum(module.parameters for module in self.modules)

    @property
    def bytes(self) -> int:
        """Bytes of rows that will be rewritten in place (for an adapter, of its rows of lora_B)."""
        return sum(module.bytes for module in self.modules)

    @property
    def touched(self) -> tuple[ModulePlan, ...]:
        """The modules in which at least one row changes."""
        return tuple(module for module in self.modules if len(module.rows))


@dataclass(frozen=True)
class PatchPlan(ChangePlan):
    """A patch whose rows are to be computed from an identification."""

    identification_id: int
    identification: Selection
    sources: EditSources
    settings: Settings
    protected_by: Mapping[str, int]


@dataclass(frozen=True)
class PreparedPatch:
    """A plan whose rows are computed and lie in an artifact, a temporary one unless the patch was recorded before.

    Attributes:
        plan: what was planned.
        artifact: the rows, sealed.
        artifact_digest: SHA-256 of the artifact.
        outcomes: what the rows of each touched module came to.
        expected: what `check_change` returned: what touched tensors will hold.
        identify: gives the id of the patch's identification; where there is none yet, records it in the session that
            records the patch.
        origin: where an imported patch comes from.
    """

    plan: ChangePlan
    artifact: Path
    artifact_digest: str
    outcomes: tuple[ModuleOutcome, ...]
    expected: Mapping[str, ExpectedContent]
    identify: Callable[[Session], int]
    origin: Origin | None = None

    @property
    def rows_unchanged(self) -> int:
        """Rows whose bytes did not change after rounding."""
        return sum(outcome.rows_unchanged for outcome in self.outcomes)


def plan_patch(workspace: Workspace, lineage_name: str, identification_id: int) -> PatchPlan:
    """Plan the patch of an identification against the lineage's head.

    Raises:
        PlanError: the identification is of another lineage, or was made at another head.
        SettingsError: NLSR's factor form, which changes whole modules, would change a protected neuron.
        WeightsChangedError: files are not what was recorded.
        NeuronLedgerError: as `read_lineage`.
    """
    with workspace.attempt("patch.plan", "lineage", lineage_name):
        return _plan(workspace, lineage_name, identification_id)


def _plan(workspace: Workspace, lineage_name: str, identification_id: int) -> PatchPlan:
    lineage = read_lineage(workspace, lineage_name)
    with workspace.registry.read() as session:
        record = session.get(IdentificationRecord, identification_id)
        if record is None:
            raise RecordNotFoundError(f"there is no identification {identification_id}", "run neuronledger identify")
        if record.lineage_id != lineage.lineage_id:
            raise PlanError(
                f"identification {identification_id} is not of lineage {lineage_name}", "identify on this lineage"
            )
        if record.state_digest != lineage.state_digest:
            raise PlanError(
                f"identification {identification_id} was made at another head of lineage {lineage_name}",
                "identify again at the present head",
            )
        artifact, summary, dimension = record.artifact_digest, record.summary, record.dimension
        recorded_settings = dict(record.settings)
        dimension_id, dimension_name, digest = dimension.id, dimension.name, record.settings_digest
        method = record.method
    if artifact is None:
        raise PlanError(f"identification {identification_id} has no artifact", "identify again")
    found = stored_identification(workspace, method, artifact, summary)
    found.require_unprotected(lineage.protected, lineage.directions.held)
    modules = tuple(
        _module_plan(lineage, module, found.selected(module), found.directions(module)) for module in found.modules
    )
    holders: Counter[str] = Counter()
    for module in found.modules:
        for patch_id, count in lineage.holding(module, found.selected(module)).items():
            holders[lineage.patch_dimensions[patch_id]] += count
    return PatchPlan(
        lineage=lineage,
        dimension=dimension_name,
        dimension_id=dimension_id,
        method=method,
        recorded_settings=recorded_settings,
        settings_digest=digest,
        modules=modules,
        neurons_selected=sum(module.selected for module in modules if not module.directions),
        neurons_protected=sum(module.protected for module in modules),
        identification_id=identification_id,
        identification=found,
        sources=edit_sources(workspace, lineage, found.settings),
        settings=found.settings,
        protected_by=dict(holders),
    )


@contextmanager
def prepared(workspace: Workspace, plan: PatchPlan) -> Iterator[PreparedPatch]:
    """Compute every new row into a temporary artifact, which is removed at exit unless it was kept.

    Raises:
        RegistryBusyError: the head moved since the plan was made.
        NonFiniteError: a row cannot be computed.
        SettingsError, MismatchError: the operation cannot be applied to this subject.
        SpaceError: the artifact or the working checkpoint cannot be written.
        ArtifactStoreError: the artifact cannot be flushed.
        WeightsChangedError: what would change is not what was recorded.
    """
    lineage = plan.lineage
    _require_head(workspace, lineage)
    require_space(workspace.store.directory, 2 * plan.bytes)
    require_space(lineage.working, 2 * plan.bytes if lineage.is_adapter else 0)
    with workspace.store.writer() as path:
        digest, outcomes, expected = _computed(workspace, plan, path)
        yield PreparedPatch(plan, path, digest, outcomes, expected, identify=lambda _: plan.identification_id)


def sealed(
    workspace: Workspace, lineage: LineageState, artifact: Path, computed: Iterable[ArtifactModule]
) -> tuple[str, Mapping[str, ExpectedContent]]:
    """Seal a new artifact once its rows are computed, while what it would change is checked.

    Args:
        workspace: whose store the artifact is in.
        lineage: what it would change.
        artifact: the artifact, with its header and room for every row.
        computed: its modules, each given once its rows are there.

    Returns:
        SHA-256 of the artifact, and what `check_change` returned.

    Raises:
        SpaceError: the artifact or the working checkpoint cannot be written.
        ArtifactStoreError: the artifact cannot be flushed.
        WeightsChangedError: what would change is not what was recorded.
        RegistryBusyError: another patch was applied or reverted meanwhile.
    """
    change = Change(artifact=artifact, side="new", applied=lineage.applied)
    files = LineageFiles(lineage.working, lineage.locations["subject"].path, change, lineage.recorded)
    with ExitStack() as held:
        sealing: list[Future[str]] = []

        def until_all() -> Iterator[ArtifactModule]:
            yield from computed
            sealing.append(held.enter_context(beside(lambda: workspace.store.seal(artifact))))

        with telling_writers_apart(workspace, lineage.name, lineage.state_digest):
            expected = check_change(files, until_all())
        return sealing[0].result(), expected


def _computed(
    workspace: Workspace, plan: PatchPlan, path: Path
) -> tuple[str, tuple[ModuleOutcome, ...], Mapping[str, ExpectedContent]]:
    """Compute every row into an artifact at `path`, which is sealed and checked on the way."""
    with planned_rows(plan.lineage, plan.identification, plan.sources) as planned:
        rows = {module.module: module.rows for module in plan.touched}
        header = ArtifactHeader(
            form="adapter" if plan.lineage.is_adapter else "checkpoint",
            method=plan.method,
            dimension=plan.dimension,
            subject_digest=plan.lineage.subject_digest,
            settings_digest=plan.settings_digest,
            modules=tuple(planned.described(name, chosen) for name, chosen in rows.items()),
        )
        with _naming_the_store(workspace):
            opened = ArtifactWriter(path, header)
        with opened as writer:
            outcomes: list[ModuleOutcome] = []

            def computed() -> Iterator[ArtifactModule]:
                with _naming_the_store(workspace):
                    written = planned.write_all(writer, header.modules, rows)
                    for module, outcome in zip(header.modules, written, strict=True):
                        workspace.progress("computing rows", len(outcomes), len(rows))
                        outcomes.append(outcome)
                        yield module
                workspace.progress("computing rows", len(rows), len(rows))

            digest, expected = sealed(workspace, plan.lineage, path, computed())
    return digest, tuple(outcomes), expected


@contextmanager
def _naming_the_store(workspace: Workspace) -> Iterator[None]:
    """A descriptor's errors do not say which file."""
    try:
        yield
    except OSError as error:
        raise SpaceError(
            f"the patch artifact in {workspace.store.directory} cannot be written ({error.strerror or error})",
            "free space there, or mend its permissions",
        ) from error


def _require_head(workspace: Workspace, planned: LineageState) -> None:
    with workspace.registry.read() as session:
        require_head(queries.get_lineage(session, planned.name), planned)


def require_head(lineage: Lineage, planned: LineageState) -> None:
    """Refuse a plan whose head is the lineage's no more.

    Raises:
        RegistryBusyError: another patch was applied or reverted since.
    """
    if (lineage.head_patch_id, lineage.state_digest) != (planned.head_patch_id, planned.state_digest):
        raise RegistryBusyError(
            f"the head of lineage {lineage.name} moved while this patch was planned", "plan and apply it again"
        )


def _module_plan(lineage: LineageState, name: str, selected: Tensor, directions: Tensor | None) -> ModulePlan:
    rows = new_rows(selected, lineage.protected.get(name))
    described = artifact_module(lineage, name, len(rows))
    return ModulePlan(
        module=name,
        module_id=lineage.module_ids[name],
        rows=rows,
        selected=len(selected),
        protected=len(selected) - len(rows),
        parameters=len(rows) * described.in_features,
        bytes=len(rows) * described.width * DTYPES[described.dtype].itemsize,
        directions=0 if directions is None or not len(rows) else directions.shape[1],
    )


@dataclass(frozen=True)
class ModulePlanSummary:
    """What a plan says of one module."""

    module: str
    selected: int
    protected: int
    rows: int
    rows_unchanged: int
    parameters: int
    bytes: int
    directions: int


@dataclass(frozen=True)
class PlanSummary:
    """A dry run's answer: everything that applying the patch would change.

    Attributes:
        policy: the one in force, by name and version; None if there is none.
        gates: what each of its rules came to.
        refused: whether one of them refuses the patch.
        approvals_needed: how many others would have to approve it.
    """

    lineage: str
    dimension: str
    head: int | None
    identification: int
    settings: dict[str, Any]
    neurons_selected: int
    neurons_protected: int
    neurons_modified: int
    rows_modified: int
    directions: int
    protected_by: dict[str, int]
    parameters_modified: int
    modified_share: float
    modified_linear_share: float
    bytes: int
    rows_unchanged: int
    modules: tuple[ModulePlanSummary, ...]
    unreached: tuple[str, ...]
    warnings: tuple[str, ...]
    policy: str | None = None
    gates: tuple[RuleResult, ...] = ()
    refused: bool = False
    approvals_needed: int = 0


def plan_summary(plan: PatchPlan, ready: PreparedPatch) -> PlanSummary:
    """Describe a planned patch whose rows are computed."""
    outcomes = {outcome.module: outcome for outcome in ready.outcomes}
    lineage = plan.lineage
    return PlanSummary(
        lineage=lineage.name,
        dimension=plan.dimension,
        head=lineage.head_sequence,
        identification=plan.identification_id,
        settings=plan.settings.model_dump(mode="json"),
        neurons_selected=plan.neurons_selected,
        neurons_protected=plan.neurons_protected,
        neurons_modified=plan.neurons_modified,
        rows_modified=plan.rows_modified,
        directions=plan.directions,
        protected_by=dict(plan.protected_by),
        parameters_modified=plan.parameters_modified,
        modified_share=plan.parameters_modified / lineage.parameters,
        modified_linear_share=plan.parameters_modified / lineage.linear_parameters,
        bytes=plan.bytes,
        rows_unchanged=ready.rows_unchanged,
        modules=tuple(
            ModulePlanSummary(
                module=module.module,
                selected=module.selected,
                protected=module.protected,
                rows=len(module.rows),
                rows_unchanged=outcomes[module.module].rows_unchanged if module.module in outcomes else 0,
                parameters=module.parameters,
                bytes=module.bytes,
                directions=module.directions,
            )
            for module in plan.modules
        ),
        unreached=plan.identification.unreached,
        warnings=plan.settings.warnings(),
    )
