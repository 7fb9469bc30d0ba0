"""Signed heads: what a signature covers, and what the signatures of a head file are worth.

The signature is Ed25519 over `DOMAIN` followed by the canonical JSON of all other fields of the line, the public key
among them. So a line can be checked by itself; whether the key is one to be trusted is for the reader to say.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import rfc8785

from registry.chain import Violation
from registry.head_lines import Head, Line
from registry.keys import PrivateKey, PublicKey

DOMAIN = b"neuronledger ledger head v1\n"
"""Keeps a signature from being one of anything else."""


@dataclass(frozen=True, slots=True)
class SignedBy:
    """The heads that one key has signed.

    Attributes:
        key: the public key's fingerprint.
        heads: how many.
        first, last: the events of the first and the last of them; None if there are none.
        trusted: whether it is among the keys that the reader gave; None if none were given.
    """

    key: str
    heads: int
    first: int | None
    last: int | None
    trusted: bool | None


@dataclass(frozen=True, slots=True)
class Signatures:
    """What was found of the signatures of a head file.

    Attributes:
        problems: every signature that is forged, or foreign: by a key that is not trusted.
        signed_by: for each trusted key, and each other that signed, what it has signed truly.
    """

    problems: tuple[Violation, ...]
    signed_by: tuple[SignedBy, ...]

    @property
    def heads(self) -> int:
        """How many heads are truly signed, by whomever."""
        return sum(key.heads for key in self.signed_by)

    @property
    def last(self) -> int:
        """The last event that a signature covers, of a trusted key where any were given; 0 if there is none."""
        return max((key.last or 0 for key in self.signed_by if key.trusted is not False), default=0)


def signed_bytes(head: Head) -> bytes:
    """What is signed of a head that names its key."""
    return DOMAIN + rfc8785.dumps({name: value for name, value in head.fields().items() if name != "signature"})


def sign_head(head: Head, key: PrivateKey) -> Head:
    """The head as a signed line."""
    named = replace(head, key=key.public.hex, signature=None)
    return replace(named, signature=key.sign(signed_bytes(named)))


def is_signed(head: Head) -> bool:
    """Whether a signed line's signature was made with the key that it names."""
    return (
        head.key is not None
        and head.signature is not None
        and PublicKey(head.key).has_signed(signed_bytes(head), head.signature)
    )


def check_signatures(lines: Sequence[Line], trusted: Collection[PublicKey] = ()) -> Signatures:
    """Check every signature of a head file.

    Args:
        lines: of the file.
        trusted: the keys that may sign; if there are none, any may.
    """
    known = {key.hex for key in trusted}
    problems: list[Violation] = []
    signed: dict[str, list[int]] = {key.hex: [] for key in trusted}
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, Head) or line.key is None:
            continue
        here = f"line {number} of the ledger head file, the head of event {line.count},"
        if not is_signed(line):
            problem = f"{here} has a forged signature: key {fingerprint(line.key)} has not made it"
            problems.append(Violation(line.count, problem))
            continue
        signed.setdefault(line.key, []).append(line.count)
        if known and line.key not in known:
            problem = f"{here} has a foreign signature: key {fingerprint(line.key)} is none of those given"
            problems.append(Violation(line.count, problem))
    return Signatures(
        tuple(problems),
        tuple(
            SignedBy(
                fingerprint(key),
                len(counts),
                min(counts, default=None),
                max(counts, default=None),
                key in known if known else None,
            )
            for key, counts in signed.items()
        ),
    )


def fingerprint(key: str) -> str:
    """The fingerprint of a public key in hexadecimal."""
    return PublicKey(key).fingerprint
