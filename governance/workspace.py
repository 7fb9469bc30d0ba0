"""What every use case works in: an open registry, who acts, and the clock.

The clock and the actor are read here and nowhere else, so a use case gives the same record for the
same input.
"""

import getpass
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sqlalchemy.orm import Session

from governance.errors import InputError
from governance.placement import ON_THE_CPU, Placement
from governance.policy_records import policy_in_force
from governance.roles import NEEDED, require_role
from governance.signing_keys import environment_signer
from neuronledger import NeuronLedgerError
from registry import ledger
from registry.artifacts import ArtifactStore
from registry.database import Registry
from registry.errors import RegistryBusyError, RegistryError
from registry.record_digests import Record, record_digests

DEFAULT_DATABASE = "sqlite:///.neuronledger/registry.db"

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) while long work goes on."""


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""


def default_database() -> str:
    """Return `$NEURONLEDGER_DATABASE`, or the SQLite registry of the working directory."""
    return os.environ.get("NEURONLEDGER_DATABASE") or DEFAULT_DATABASE


def default_actor() -> str:
    """Return `$NEURONLEDGER_ACTOR`, or the operating system's user name.

    Raises:
        InputError: neither is known, as in a container that runs under a number without a name.
    """
    if actor := os.environ.get("NEURONLEDGER_ACTOR"):
        return actor
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise InputError("the operating system names no user", "pass --actor or set NEURONLEDGER_ACTOR") from error


@dataclass(frozen=True)
class Workspace:
    """An open registry, the actor whose name goes into every record, the clock, and how models are loaded."""

    registry: Registry
    actor: str
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    progress: Progress = no_progress
    placement: Placement = ON_THE_CPU

    @property
    def store(self) -> ArtifactStore:
        """The content-addressed artifact store beside the registry."""
        return self.registry.store

    @property
    def directory(self) -> Path:
        """The directory of the registry: artifacts, exported heads, working checkpoints."""
        return self.registry.directory

    def record(
        self,
        session: Session,
        action: str,
        subject_kind: str,
        subject_name: str,
        payload: dict[str, Any],
        *,
        records: Iterable[Record] = (),
        before: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Append one event to the audit ledger, in the transaction of the change that it speaks of.

        Args:
            session: the change's own, from `Registry.write`.
            action: what happened.
            subject_kind: `model`, `dimension`, `lineage` or `registry`.
            subject_name: its name.
            payload: what is to be known of it.
            records: the records that it made or moved, or that it rests on; the event holds their digests.
            before: of records that it moved, the digests that `record_digests` gave before.
        """
        digests = record_digests(session, records)
        told = {"records": digests} if digests else {}
        told |= {"records_before": dict(before)} if before else {}
        ledger.append(
            session,
            action=action,
            subject_kind=subject_kind,
            subject_name=subject_name,
            payload=payload | told,
            actor=self.actor,
            now=self.clock(),
        )

    @contextmanager
    def attempt(self, action: str, subject_kind: str, subject_name: str) -> Iterator[None]:
        """Refuse who may not; record in the ledger that an attempted change was refused, and let the refusal through.

        Who may is asked of the policy in force, here and nowhere else, before anything of the change is done. A
        registry that is itself unusable or busy cannot record, so its own errors pass unrecorded; and where the record
        cannot be written, the refusal is still what the user is told.

        Raises:
            NotAllowedError: the policy in force gives the role that the action needs to others.
        """
        try:
            if action in NEEDED:
                with self.registry.read() as session:
                    policy = policy_in_force(session, subject_name if subject_kind == "lineage" else None)
                require_role(policy.file if policy else None, action, self.actor)
            yield
        except (RegistryError, RegistryBusyError):
            raise
        except (NeuronLedgerError, OSError) as refusal:
            with suppress(NeuronLedgerError, OSError), self.registry.write() as session:
                self.record(
                    session,
                    "refused",
                    subject_kind,
                    subject_name,
                    {"attempted": action, "error": type(refusal).__name__, "message": str(refusal)},
                )
            raise


def open_workspace(database: str, actor: str, progress: Progress = no_progress) -> Workspace:
    """Open an existing registry. Its heads are signed if `$NEURONLEDGER_SIGNING_KEY` names a key.

    Raises:
        RegistryError: there is none, its schema is newer or older than this version, or it cannot be written.
    """
    registry = Registry.open(database, signer=environment_signer())
    return Workspace(registry=registry, actor=actor, progress=progress)


@dataclass(frozen=True)
class CreatedRegistry:
    """Where a registry is, and where its artifacts and exported ledger heads are kept."""

    url: str
    directory: Path


def create_registry(database: str) -> CreatedRegistry:
    """Create a registry, or migrate an older one.

    Raises:
        RegistryError: the place cannot be written, or its schema is newer than this version.
    """
    with Registry.open(database, create=True) as registry:
        return CreatedRegistry(url=registry.url, directory=registry.directory)
