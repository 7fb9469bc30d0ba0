"""Whether ledger, heads and signatures agree. Imports nothing of the database: exported ones are checked as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from governance.errors import InputError
from registry.chain import Event, Violation
from registry.head_lines import Head, Line, check_heads, check_ledger, parse_lines
from registry.keys import PublicKey, read_public_key
from registry.signatures import Signatures, SignedBy, check_signatures

SIGNED = "ledger.signed"
"""The action of the event that a signing is."""


@dataclass(frozen=True)
class LedgerProof:
    """Whether ledger, heads and signatures agree.

    Attributes:
        checked: how many of each were checked.
        not_checked: what was not.
        problems: what was found, each with the event, file or key that it is about.
        signed_by: what each key has signed of the registry's head file.
        unsigned_from: the first event that no signature covers; None if there is no such event.
    """

    checked: dict[str, int]
    not_checked: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    signed_by: tuple[SignedBy, ...]
    unsigned_from: int | None


@dataclass(frozen=True)
class Evidence:
    """What a reader brings along: keys that may sign, and a copy of the heads that was kept elsewhere."""

    keys: tuple[PublicKey, ...] = ()
    kept: tuple[Line, ...] = ()
    kept_at: Path | None = None


def read_evidence(public_keys: Sequence[Path] = (), heads: Path | None = None) -> Evidence:
    """Read public keys and a kept copy of the heads.

    Raises:
        KeyFileError: one of the files holds no public key.
        InputError: the copy cannot be read or is empty.
    """
    trusted = tuple(read_public_key(path) for path in public_keys)
    if heads is None:
        return Evidence(trusted)
    try:
        kept = parse_lines(heads.read_bytes())
    except OSError as error:
        raise InputError(f"the kept heads {heads} cannot be read: {error.strerror}", "check the path") from error
    if not kept:
        raise InputError(f"the kept heads {heads} are empty", "give the copy of a head file, or a line of one")
    return Evidence(trusted, kept, heads)


def check_proof(events: Sequence[Event], lines: Sequence[Line], evidence: Evidence) -> LedgerProof:
    """Check the ledger's chain, the registry's heads, their signatures, and a copy of the heads kept elsewhere."""
    signatures = check_signatures(lines, evidence.keys)
    problems = [_about_event(violation) for violation in check_ledger(lines, events)]
    problems += [_about_event(violation) for violation in signatures.problems]
    problems += _lost_signatures(events, lines)
    checked = {"events": len(events), "exported heads": len(lines)}
    signed = signatures.heads
    if evidence.kept_at is not None:
        kept = check_signatures(evidence.kept, evidence.keys)
        found = [*check_heads(evidence.kept, events, whole=False), *kept.problems]
        problems += [(str(evidence.kept_at), violation.problem) for violation in found]
        checked["kept heads"] = len(evidence.kept)
        signed += kept.heads
    if signed or evidence.keys:
        checked["signed heads"] = signed
    if evidence.keys and not any(key.heads for key in signatures.signed_by if key.trusted):
        problems.append(("ledger", "no exported head is signed by any of the keys given"))
    return LedgerProof(
        checked,
        () if evidence.keys or not signed else (f"whose signatures those of {signed} heads are (pass --public-key)",),
        tuple(problems),
        signatures.signed_by,
        _unsigned_from(signatures, len(events)),
    )


def _about_event(violation: Violation) -> tuple[str, str]:
    return f"event {violation.sequence}" if violation.sequence else "ledger", violation.problem


def _lost_signatures(events: Sequence[Event], lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Signings that no signed head bears witness to. One that comes later covers them as well."""
    last = max((line.count for line in lines if isinstance(line, Head) and line.signature), default=0)
    lost = [event.sequence for event in events if event.action == SIGNED and event.sequence > last]
    if not lost:
        return []
    problem = (
        "says that the ledger was signed, but no exported head from there on is: the signature was removed, or a "
        "process died before it was written; look for the line in a kept copy, and sign again with `audit sign`"
    )
    return [(f"event {lost[0]}", f"event {lost[0]} {problem}")]


def _unsigned_from(signatures: Signatures, events: int) -> int | None:
    return signatures.last + 1 if signatures.last < events else None
