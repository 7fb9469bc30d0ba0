"""`neuronledger init`."""

import click

from governance.commands.options import json_option


@click.command(short_help="Create the registry, or bring its schema up to date.")
@click.option("--database", metavar="URL", envvar="NEURONLEDGER_DATABASE", help="sqlite:///FILE or postgresql://…")
@json_option
def init(database: str | None, as_json: bool) -> None:
    """Create the registry, or bring an older one to the schema of this version.

    Nothing in an existing registry is lost.

    \b
    Examples:
      neuronledger init
      neuronledger init --database postgresql://team@db.example/neuronledger
    """
    from governance.commands.rendering import emit
    from governance.workspace import create_registry, default_database

    created = create_registry(database or default_database())
    emit(
        created,
        as_json,
        lambda: click.echo(
            f"Registry {created.url} is ready; artifacts and ledger heads are kept in {created.directory}."
        ),
    )
