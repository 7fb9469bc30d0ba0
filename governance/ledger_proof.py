"""The proof outside the database: heads listed, signed, and handed out.

Signing is an event of the ledger itself, whose head is then appended signed. So counts go on increasing, a signature
covers everything before it, and a signature that was taken out of the head file is missed.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from governance.errors import InputError
from governance.output_files import require_elsewhere
from governance.proof_checks import SIGNED
from governance.workspace import Workspace
from registry.files import create_file, sync_directory
from registry.head_lines import Head, Line, parse_lines
from registry.keys import PrivateKey
from registry.signatures import fingerprint, sign_head


@dataclass(frozen=True)
class HeadSummary:
    """One line of the head file; what is not a head has only its `problem`."""

    line: int
    count: int | None
    after: int | None
    at: str | None
    hash: str | None
    key: str | None
    problem: str | None = None


def list_heads(workspace: Workspace) -> list[HeadSummary]:
    """The lines of the head file, oldest first; signatures are not checked here."""
    return [_summary(number, line) for number, line in enumerate(workspace.registry.heads.read(), start=1)]


def copy_heads(workspace: Workspace, output: Path) -> int:
    """Write a copy of the head file, to be kept elsewhere.

    Returns:
        the number of its lines.

    Raises:
        InputError: the output is there already, or there is nothing to copy.
    """
    with workspace.registry.heads.shared() as content:
        if not content:
            raise InputError("there are no exported heads yet", "change something, or run `neuronledger recover`")
    write_new(workspace, output, content)
    return len(parse_lines(content))


@dataclass(frozen=True)
class SignedHead:
    """A head that was signed: of which event, with which key, and the line as it stands in the head file."""

    event: int
    hash: str
    at: str
    fingerprint: str
    line: str
    output: Path | None


def sign_ledger(workspace: Workspace, key: PrivateKey, output: Path | None = None) -> SignedHead:
    """Record that the ledger is signed, and append the head of that event signed.

    Args:
        workspace: the registry.
        key: signs.
        output: a new file for the signed line, to be handed out.

    Raises:
        InputError: the output is there already.
        RegistryError: the registry or the head file cannot be written.
    """
    if output is not None:
        require_new(workspace, output)
    registry = replace(workspace.registry, signer=lambda: partial(sign_head, key=key))
    with registry.write() as session:
        event = registry.record(
            session,
            action=SIGNED,
            subject_kind="ledger",
            subject_name="ledger",
            payload={"key": key.public.hex},
            actor=workspace.actor,
            now=workspace.clock(),
        )
    head = next(line for line in registry.heads.read() if isinstance(line, Head) and line.count == event.sequence)
    if output is not None:
        write_new(workspace, output, head.line().encode() + b"\n")
    return SignedHead(head.count, head.hash, head.at, key.public.fingerprint, head.line(), output)


def _summary(number: int, line: Line) -> HeadSummary:
    if not isinstance(line, Head):
        return HeadSummary(number, None, None, None, None, None, f"{line.problem}: {line.text}")
    key = fingerprint(line.key) if line.key else None
    return HeadSummary(number, line.count, line.after, line.at, line.hash, key)


def require_new(workspace: Workspace, path: Path) -> None:
    """Refuse to write over something, or to where the registry or a model lies.

    Raises:
        InputError: there is something, or the path belongs to the registry or to a model.
    """
    require_elsewhere(workspace, path)
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists", "choose another name")


def write_new(workspace: Workspace, path: Path, content: bytes) -> None:
    """Write a new file to be handed out, and flush it.

    Raises:
        InputError: it is there already, belongs to the registry or to a model, or cannot be written.
    """
    require_new(workspace, path)
    try:
        create_file(path, content)
        sync_directory(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", "choose a place that you may write") from error
