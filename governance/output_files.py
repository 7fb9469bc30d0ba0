"""Files that are handed out: written under a name of their own, flushed, and then given their name.

Wherever a user has one written, it is not among the registry's own files nor in the directory of a model.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from governance.errors import InputError, SpaceError
from governance.workspace import Workspace
from registry import queries
from registry.files import create_file, sync_directory

_OWN_DIRECTORIES = {
    "artifacts": "the artifacts of the registry",
    "answers": "the stored answers of the registry",
    "lineages": "the working checkpoints of the registry",
    "references": "the references of the registry",
    "aligned": "the aligned models of the registry",
    "scratch": "the scratch files of the registry",
}
_BESIDE_SQLITE = ("", "-wal", "-shm", "-journal")


def require_elsewhere(workspace: Workspace, target: Path) -> None:
    """Refuse a place that belongs to the registry or to a model, links followed, whatever may be replaced.

    Raises:
        InputError: the path is one of the registry's own files, or at or in a working checkpoint, the directory of a
            registered model, or a directory of the registry.
    """
    named, meant = target.parent.resolve() / target.name, target.resolve()
    for place, what in _taken(workspace):
        taken = place.resolve()
        for path in (named, meant):
            if path.is_relative_to(taken):
                raise InputError(
                    f"{target} {'is' if path == taken else 'lies in'} {what}",
                    "write it elsewhere; what lies there is written by patches and by the registry only",
                )


def _taken(workspace: Workspace) -> Iterator[tuple[Path, str]]:
    """Every file and directory that nothing is written to on request, and what it is."""
    registry = workspace.registry
    with registry.read() as session:
        for lineage in queries.list_lineages(session):
            yield Path(lineage.working_path), f"the working checkpoint of lineage {lineage.name}"
        for model in queries.list_models(session):
            yield Path(model.path), f"the directory of model {model.name}"
    if registry.engine.dialect.name == "sqlite" and registry.engine.url.database:
        for ending in _BESIDE_SQLITE:
            yield Path(registry.engine.url.database + ending), "the database of the registry"
    yield registry.heads.path, "the file of the ledger's heads"
    for name, what in _OWN_DIRECTORIES.items():
        yield registry.directory / name, what


def require_free(workspace: Workspace, target: Path, *, force: bool) -> None:
    """Refuse to write over something.

    Raises:
        InputError: the path is a directory, or a file and may not be replaced, or its directory is not there; or it
            belongs to the registry or to a model, whatever may be replaced.
    """
    require_elsewhere(workspace, target)
    if target.is_dir():
        raise InputError(f"{target} is a directory", "name a file in it")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is not a directory", "make it first")
    if target.exists() and not force:
        raise InputError(f"{target} exists", "name another file, or replace it with --force")


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Give a free name in the directory of `target`; what is still there at exit is removed."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.writing")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(content: str, output: Path, target: Path) -> None:
    """Write a text in one step.

    Args:
        content: all of it.
        output: the file as the user named it.
        target: the same as an absolute path.

    Raises:
        InputError: it cannot be written.
        SpaceError: it cannot be given its name.
    """
    with temporary_beside(target) as temporary:
        try:
            create_file(temporary, content.encode())
        except OSError as error:
            raise InputError(f"{output} cannot be written: {error.strerror}", "name another file") from error
        publish(temporary, target)


def publish(temporary: Path, target: Path) -> None:
    """Give a flushed file its name.

    Raises:
        SpaceError: the file cannot be renamed; it is gone then.
    """
    try:
        temporary.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        if not temporary.exists():
            target.unlink(missing_ok=True)
        raise SpaceError(
            f"{target} cannot be written: {error.strerror or error}", "mend the permissions of its directory"
        ) from error
