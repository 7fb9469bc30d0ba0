"""What `audit verify` and `audit verify-pack` share: the evidence they take, and how they tell what they found."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from governance.timestamp_checks import Timestamp

Command = TypeVar("Command", bound=Callable[..., Any])


class Problem(Protocol):
    """What was checked, which part it is about, and what is wrong."""

    @property
    def check(self) -> str: ...
    @property
    def subject(self) -> str: ...
    @property
    def problem(self) -> str: ...


def evidence_options(key_help: str) -> Callable[[Command], Command]:
    """Add the options for what a reader brings along, and hand the command the `evidence` that they name."""

    def add(command: Command) -> Command:
        @_files("--public-key", "public_keys", key_help)
        @click.option(
            "--heads",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Also check against this copy of the exported heads, or of some of them, that was kept elsewhere.",
        )
        @_files(
            "--tsa-roots",
            "tsa_roots",
            "Check timestamps with the certificates of time-stamping authorities in this PEM file. Repeatable.",
        )
        @_files(
            "--timestamps",
            "timestamps",
            "Also check this timestamp that was kept elsewhere, or the .tsr files of this directory. Repeatable.",
        )
        @wraps(command)
        def with_evidence(
            *args: Any,
            public_keys: tuple[Path, ...],
            heads: Path | None,
            tsa_roots: tuple[Path, ...],
            timestamps: tuple[Path, ...],
            **kwargs: Any,
        ) -> Any:
            from governance.proof_checks import EvidenceFiles, read_evidence

            files = EvidenceFiles(public_keys, heads, tsa_roots, timestamps)
            return command(*args, evidence=read_evidence(files), **kwargs)

        return with_evidence  # type: ignore[return-value]

    return add


def _files(option: str, name: str, told: str) -> Callable[[Command], Command]:
    """An option that names a file and may be given more than once."""
    return click.option(option, name, multiple=True, type=click.Path(path_type=Path), metavar="FILE", help=told)


def timestamp_lines(timestamps: "Sequence[Timestamp]", events: int) -> Iterator[str]:
    """What authorities say: how many heads each has seen, the first and the last, and from where on there are none."""
    by: dict[str, list[Timestamp]] = {}
    for stamp in timestamps:
        by.setdefault(stamp.authority, []).append(stamp)
    for authority, stamps in by.items():
        first, last = stamps[0], stamps[-1]
        counted = "1 timestamp is" if len(stamps) == 1 else f"{len(stamps):,} timestamps are"
        span = f"event {last.event:,} was there by {_moment(last.time)} (its own time is {_moment(last.at)})"
        span = span if len(stamps) == 1 else f"event {first.event:,} was there by {_moment(first.time)}, {span}"
        yield f"{counted} by {authority}: {span}."
    if timestamps and timestamps[-1].event < events:
        yield f"From event {timestamps[-1].event + 1:,} on nothing is timestamped."


def _moment(text: str) -> str:
    return text[:19].replace("T", " ") + " UTC"


def tell_findings(findings: Iterable[Problem]) -> None:
    """Print what does not agree, a line each, to stderr."""
    for finding in findings:
        click.echo(f"FAILED {finding.check}: {finding.subject}: {finding.problem}", err=True)


def tell_checked(checked: Mapping[str, int]) -> None:
    """Print how many of each were checked."""
    click.echo("Checked: " + ", ".join(f"{what} {count:,}" for what, count in checked.items()) + ".")


def tell_verdict(findings: Sequence[Problem], not_checked: Iterable[str], what: str) -> None:
    """Print what was not checked, and whether everything that was agrees; `what` does not stand if not."""
    for skipped in not_checked:
        click.echo(f"Not checked: {skipped}.")
    if not findings:
        click.echo("Everything checked agrees.")
        return
    counted = "1 finding" if len(findings) == 1 else f"{len(findings):,} findings"
    click.echo(f"{counted}: {what} does not stand.", err=True)
