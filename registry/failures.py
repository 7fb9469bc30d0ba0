"""What the database's own errors mean: one error of ours for each, naming the record and the mend."""

import re

from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from neuronledger import NeuronLedgerError
from registry.errors import LedgerError, NeuronProtectedError, RecordExistsError, RegistryBusyError, RegistryError

LEDGER_IS_APPEND_ONLY = "ledger events are append-only"
LEDGER_CONTINUES = "a ledger event continues the chain"
NEURON_IS_PROTECTED = "neuron is already protected"
CLAIM_IS_FIXED = "a claim is never moved"
CLAIM_IS_APPLIED = "the claims of an applied patch are not released"

_PERMISSION_CODES = {"42501", "25006"}
_BUSY_CODES = {"55P03", "40001", "40P01"}
_FULL_CODES = {"53100", "53200"}
_SYSTEM_ERRORS = "58"
_UNREACHABLE_CODES = ("08", "28", "3D", "57P")
_POSTGRESQL_KEY = re.compile(r"\((?P<columns>[\w, ]+)\)=\((?P<values>.*)\)")


def translate(error: DBAPIError, place: str) -> NeuronLedgerError | None:
    """The error to raise instead of a database error, or None if it is a defect of ours.

    Args:
        place: the registry's URL without its password.
    """
    if isinstance(error, IntegrityError):
        return _translate_integrity(error)
    code = error_code(error)
    text = str(error.orig)
    for matches, translated in (
        (
            LEDGER_IS_APPEND_ONLY in text,
            LedgerError(f"the registry refuses this change: {_first_line(text)}", "Append instead"),
        ),
        (
            code in _BUSY_CODES or code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")),
            RegistryBusyError(
                f"the registry {place} is in use by another writer", "Wait until it is done and try again"
            ),
        ),
        (
            code in _PERMISSION_CODES or code.startswith("SQLITE_READONLY"),
            RegistryError(f"the registry {place} cannot be written", "Give yourself write permission on it"),
        ),
        (code in _FULL_CODES or code == "SQLITE_FULL", RegistryError(f"the disk of {place} is full", "Free space")),
        (
            code.startswith(("SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")),
            RegistryError(
                f"the registry {place} cannot be opened", "Give yourself read and write permission on its directory"
            ),
        ),
        (
            code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")),
            RegistryError(f"the registry {place} is damaged or not a database", "Restore it from a backup"),
        ),
        (
            code.startswith(("SQLITE_IOERR", _SYSTEM_ERRORS)),
            RegistryError(f"reading or writing the registry {place} failed: {text}", "Check the disk"),
        ),
        (
            # A connection that never came about has no SQLSTATE.
            code.startswith(_UNREACHABLE_CODES) or (not code and isinstance(error, OperationalError)),
            RegistryError(
                f"the registry {place} cannot be reached: {_first_line(text)}",
                "Check the URL, and that the database server runs and lets you in",
            ),
        ),
    ):
        if matches:
            return translated
    return None


def error_code(error: DBAPIError) -> str:
    """SQLite's error name, or PostgreSQL's five-character SQLSTATE; empty if the driver gave none."""
    return str(getattr(error.orig, "sqlite_errorname", None) or getattr(error.orig, "sqlstate", None) or "")


def claimed_twice(error: IntegrityError) -> tuple[int, int, int] | None:
    """The (lineage, module, neuron) that a second claim was refused for, where the database says which."""
    details = _POSTGRESQL_KEY.search(str(error.orig))
    if details is None or "pk_protected_neurons" not in str(error.orig):
        return None
    lineage_id, module_id, neuron = (int(value) for value in details["values"].split(", "))
    return lineage_id, module_id, neuron


def is_claim_refused(error: IntegrityError) -> bool:
    """Whether it is the rule of protected neurons that was broken."""
    text = str(error.orig)
    return (
        NEURON_IS_PROTECTED in text
        or "pk_protected_neurons" in text
        or _names(text, "protected_neurons", "lineage_id", "module_id", "neuron")
    )


def _translate_integrity(error: IntegrityError) -> NeuronLedgerError | None:
    text = str(error.orig)
    refusal = f"the registry refuses this change: {_first_line(text)}"
    translated: NeuronLedgerError | None = None
    if is_claim_refused(error):
        translated = NeuronProtectedError(
            "a neuron that an applied patch protects was to be claimed again", "Plan again"
        )
    elif CLAIM_IS_FIXED in text or CLAIM_IS_APPLIED in text:
        translated = NeuronProtectedError(refusal, "Revert the patch first")
    elif _names(text, "patches", "lineage_id", "sequence"):
        translated = RegistryBusyError("another patch of this lineage was planned on the same head", "Plan again")
    elif LEDGER_CONTINUES in text or "ledger_events.sequence" in text or "pk_ledger_events" in text:
        translated = RegistryBusyError("another writer appended to the ledger first", "Try again")
    elif LEDGER_IS_APPEND_ONLY in text:
        translated = LedgerError(refusal, "Append an event instead")
    for table, record in (("models", "model"), ("safety_dimensions", "dimension"), ("lineages", "lineage")):
        if _names(text, table, "name"):
            translated = RecordExistsError(f"there is a {record} of that name already", "Choose another name")
    return translated


def _names(text: str, table: str, *columns: str) -> bool:
    """Whether the message is of the unique constraint on these columns (SQLite lists columns, PostgreSQL its name)."""
    return f"uq_{table}_{'_'.join(columns)}" in text or text.endswith(
        "UNIQUE constraint failed: " + ", ".join(f"{table}.{column}" for column in columns)
    )


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
