"""The report of a lineage: one self-contained HTML page, without script and without network.

`report_data` reads the registry, `report_charts` places the marks, the template in `templates` writes the page.
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from governance.errors import InputError
from governance.output_files import require_free, write_whole
from governance.report_charts import layer_panels, rate_panels
from governance.report_commands import commands
from governance.report_data import gather
from governance.report_glance import glance
from governance.report_records import IdentificationRecord, Report
from governance.report_text import FILTERS, isolated
from governance.workspace import Workspace
from neuronledger import __version__

TEMPLATE = "report.html.jinja"
_BEGINS = b"<!doctype html"
COLOURS = 8
"""How many colours the style sheet has for dimensions; more dimensions share them."""


def write_report(workspace: Workspace, lineage: str, output: Path) -> Path:
    """Write the report of a lineage from what the registry holds, and return its path.

    The records are verified on the way; the contents of weight files are not hashed, and the page says so. An earlier
    report gives way, another file does not.

    Raises:
        RecordNotFoundError: no lineage of that name.
        RegistryError: the registry or its head file cannot be read.
        InputError: the file is none of a report's, belongs to the registry or to a model, or cannot be written.
    """
    target = output.resolve()
    _require_place(workspace, output)
    page = render(gather(workspace, lineage))
    write_whole(page, output, target)
    return output


def _require_place(workspace: Workspace, output: Path) -> None:
    """Refuse to write over anything but an earlier report.

    Raises:
        InputError: it is something else, cannot be read, or is no place to write to.
    """
    require_free(workspace, output, force=True)
    if not output.exists():
        return
    begins = b""
    try:
        if output.is_file():
            with output.open("rb") as file:
                begins = file.read(len(_BEGINS) + 8).strip().lower()
    except OSError as error:
        raise InputError(f"{output} cannot be read: {error.strerror}", "name another file") from error
    if not begins.startswith(_BEGINS):
        raise InputError(f"{output} exists and is not a report", "name another file with --output, or remove it")


def render(report: Report) -> str:
    """Return the page of a report."""
    environment = Environment(
        loader=PackageLoader("governance", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=isolated,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    colours = {name: index % COLOURS for index, name in enumerate(report.dimensions)}
    return environment.get_template(TEMPLATE).render(
        report=report,
        version=__version__,
        colours=colours,
        harmfulness_panels=rate_panels(report.harmfulness, report.dimensions),
        accuracy_panels=rate_panels(report.accuracy, report.dimensions),
        layer_panels=layer_panels(report.identifications),
        glance=glance(report),
        commands=commands(report),
        settings=_settings(report.identifications),
        libraries=_libraries(report.identifications),
    )


def _settings(records: tuple[IdentificationRecord, ...]) -> list[tuple[str, list[tuple[Any, str]]]]:
    """Every setting with its values, each with the identifications that had it; "" stands for all of them."""
    return _by_value([(record.label, record.settings) for record in records])


def _libraries(records: tuple[IdentificationRecord, ...]) -> list[tuple[str, list[tuple[Any, str]]]]:
    return _by_value([(record.label, record.libraries) for record in records])


def _by_value(found: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, list[tuple[Any, str]]]]:
    names = dict.fromkeys(name for _, settings in found for name in settings)
    rows = []
    for name in names:
        values: list[tuple[Any, list[str]]] = []
        for label, settings in found:
            held = next((labels for value, labels in values if value == settings.get(name)), None)
            if held is None:
                values.append((settings.get(name), [label]))
            else:
                held.append(label)
        rows.append((name, [(value, "" if len(values) == 1 else "; ".join(labels)) for value, labels in values]))
    return rows
