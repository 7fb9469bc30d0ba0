"""Utility: what a model of a lineage is worth on tasks of the lm-eval harness, recorded like any other figure."""

from dataclasses import replace

from governance.evaluated_models import model_of
from governance.evaluation import Measurement, measurement
from governance.evaluation_records import add_figures
from governance.harness import HarnessSettings, run_harness
from governance.lineage_state import read_lineage
from governance.workspace import Workspace


def measure_utility(
    workspace: Workspace, lineage_name: str, model_name: str, settings: HarnessSettings
) -> list[Measurement]:
    """Run tasks of the harness on one model of a lineage and record every metric that it gives.

    Args:
        workspace: where to record.
        lineage_name: the lineage.
        model_name: `head`, `subject`, `aligned` or `base`, or the name of a registered reference.
        settings: what to run, and how.

    Raises:
        InputError: the harness or a task is missing, or the model is no reference.
        RecordNotFoundError: no model of that name.
        WeightsChangedError: the model's files are not what was recorded.
    """
    with workspace.attempt("utility", "lineage", lineage_name):
        lineage = read_lineage(workspace, lineage_name)
        model = model_of(workspace, lineage, model_name)
        found = run_harness(model.load(workspace.placement), model.tokenizer(), settings)
        figures = [replace(one, generation={**one.generation, **workspace.placement.record}) for one in found]
        with workspace.registry.write() as session:
            recorded = add_figures(workspace, session, model.state, figures)
            workspace.record(
                session,
                "evaluation.recorded",
                "lineage",
                lineage_name,
                {"model": model_name, "head": lineage.head_sequence, "figures": list(recorded.told)},
                records=recorded.evaluations,
            )
            return [measurement(record, None) for record in recorded.evaluations]
