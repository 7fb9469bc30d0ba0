"""What a lineage was at any moment, told by the ledger: which patches its working checkpoint held, and their digest.

The ledger is append-only and hash-chained, so what it tells of a past moment cannot have been changed since without
`audit verify` naming it. Events count in their order, not in that of their times, which a clock that is set back mixes:
a moment is after the last event whose time is not later.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from governance.errors import InputError
from governance.moments import Moment, parse_moment
from governance.told_records import event_payload
from governance.workspace import Workspace
from registry import ledger, queries
from registry.errors import LedgerError, RecordNotFoundError
from registry.schema import LedgerEvent, Lineage

_MOVES = ("lineage.created", "patch.applied", "patch.reverted")
_BEGINS = ("patch.applying", "patch.reverting")
_RETURNS = ("patch.undone", "patch.revert-undone")


@dataclass(frozen=True)
class PastState:
    """A lineage between one event that concerns its weights and the next.

    Attributes:
        event: number of the event that it begins with.
        at: that event's time, as the ledger writes it.
        patches: numbers of the patches that the working checkpoint held, ascending; the last is the head.
        digest: what the recorded digest of its weights was.
        at_work: the patch that was being applied or reverted, so that rows may have been of either version.
    """

    event: int
    at: str
    patches: tuple[int, ...]
    digest: str
    at_work: int | None = None

    @property
    def head(self) -> int | None:
        """Number of the last patch."""
        return self.patches[-1] if self.patches else None


@dataclass(frozen=True)
class LineageAt:
    """What a lineage was at a moment.

    Attributes:
        at: the moment, as the ledger writes times: the end of the day, minute or second that was named.
        since: when its weights became what they were.
        dimensions: those of its patches, in order.
        protected_by: dimension → protected neurons.
        at_work: the patch that was being applied or reverted just then.
    """

    lineage: str
    subject: str
    at: str
    since: str
    head: int | None
    patches: tuple[int, ...]
    dimensions: tuple[str, ...]
    protected_neurons: int
    protected_by: dict[str, int]
    state_digest: str
    at_work: int | None
    event: int


def lineages_at(workspace: Workspace, time: str, lineage: str | None = None) -> list[LineageAt]:
    """Tell what was live at a moment: every lineage that there was, or one.

    Raises:
        InputError: the time is no date or time, or the lineage was not there yet.
        RecordNotFoundError: no lineage of that name.
        LedgerError: an event cannot be read.
    """
    moment = parse_moment(time)
    with workspace.registry.read() as session:
        records = [queries.get_lineage(session, lineage)] if lineage else list(queries.list_lineages(session))
        found = []
        for record in records:
            states = past_states(session, record)
            if reached := _reached(states, moment):
                found.append(_lineage_at(session, record, reached, moment))
            elif lineage:
                raise _not_there_yet(record, states, moment)
        return found


def past_states(session: Session, lineage: Lineage) -> tuple[PastState, ...]:
    """Every state that a lineage had, oldest first; the first is its subject.

    Raises:
        LedgerError: an event does not say what it should, or there is none.
    """
    where = [
        LedgerEvent.subject_kind == "lineage",
        LedgerEvent.subject_name == lineage.name,
        LedgerEvent.action.in_((*_MOVES, *_BEGINS, *_RETURNS)),
    ]
    states = tuple(_states(ledger.events(session, where=where)))
    if not states:
        raise LedgerError(
            f"the ledger does not tell of the creation of lineage {lineage.name}", "run neuronledger audit verify"
        )
    return states


def named_state(session: Session, lineage: Lineage, states: Sequence[PastState], name: str) -> PastState:
    """The state that a name means: `subject`, `head`, the number of a patch just applied, or a date or time.

    Args:
        states: every state of the lineage.

    Raises:
        InputError: it is none of these, or the lineage was not there yet.
        RecordNotFoundError: no patch of that number, or none that was ever applied.
    """
    if name == "subject":
        return states[0]
    if name == "head":
        return states[-1]
    if name.isdecimal():
        sequence = queries.get_patch(session, lineage, int(name)).sequence
        before: tuple[int, ...] = ()
        for state in states:
            if sequence in state.patches and sequence not in before:
                return state
            before = state.patches
        raise RecordNotFoundError(
            f"patch {sequence} of lineage {lineage.name!r} was never applied",
            f"Its states are {_known(states)}, or a date or time",
        )
    try:
        moment = parse_moment(name)
    except InputError as error:
        raise InputError(
            f"{name!r} names no state of lineage {lineage.name}",
            f"give one of {_known(states)}, or a date or time (2026-03-01, 2026-03-01T12:30)",
        ) from error
    reached = _reached(states, moment)
    if not reached:
        raise _not_there_yet(lineage, states, moment)
    return reached[-1]


def _reached(states: Sequence[PastState], moment: Moment) -> Sequence[PastState]:
    """The states up to the one of a moment."""
    count = max((number for number, state in enumerate(states, start=1) if state.at <= moment.last), default=0)
    return states[:count]


def _states(events: Iterator[ledger.Event]) -> Iterator[PastState]:
    state: PastState | None = None
    for event in events:
        payload = event_payload(event)
        if event.action == "lineage.created":
            state = PastState(event.sequence, event.created_at, (), _text(event, payload.get("state_digest")))
        else:
            patch = payload.get("patch")
            if state is None or not isinstance(patch, int):
                raise _unreadable(event)
            held = set(state.patches)
            if event.action in _BEGINS:
                state = replace(state, event=event.sequence, at=event.created_at, at_work=patch)
            elif event.action in _RETURNS:
                state = replace(state, event=event.sequence, at=event.created_at, at_work=None)
            else:
                after = held | {patch} if event.action == "patch.applied" else held - {patch}
                digest = _text(event, payload.get("digest_after"))
                state = PastState(event.sequence, event.created_at, tuple(sorted(after)), digest)
        yield state


def _lineage_at(session: Session, record: Lineage, states: Sequence[PastState], moment: Moment) -> LineageAt:
    state = states[-1]
    live = [patch for patch in queries.list_patches(session, record.id) if patch.sequence in state.patches]
    protected: dict[str, int] = {}
    for patch in live:
        protected[patch.dimension.name] = protected.get(patch.dimension.name, 0) + patch.neurons_modified
    return LineageAt(
        lineage=record.name,
        subject=record.subject.name,
        at=moment.last,
        since=_since(states),
        head=state.head,
        patches=state.patches,
        dimensions=tuple(protected),
        protected_neurons=sum(protected.values()),
        protected_by=protected,
        state_digest=state.digest,
        at_work=state.at_work,
        event=state.event,
    )


def _since(states: Sequence[PastState]) -> str:
    """When the last state's weights became what they were: a patch that began since has not moved the head."""
    since = states[-1]
    for state in reversed(states):
        if (state.patches, state.digest) != (since.patches, since.digest):
            break
        since = state
    return since.at


def _not_there_yet(lineage: Lineage, states: Sequence[PastState], moment: Moment) -> InputError:
    return InputError(
        f"lineage {lineage.name} was not there at {moment.last}",
        f"it was created at {states[0].at}; ask for a later time",
    )


def _known(states: Sequence[PastState]) -> str:
    applied = sorted({patch for state in states for patch in state.patches})
    return ", ".join(["subject", *(f"{patch} (after patch {patch})" for patch in applied[:5]), "head"])


def _text(event: ledger.Event, value: object) -> str:
    if not isinstance(value, str):
        raise _unreadable(event)
    return value


def _unreadable(event: ledger.Event) -> LedgerError:
    return LedgerError(
        f"event {event.sequence} ({event.action}) of {event.subject_name} does not say what such an event says",
        "run neuronledger audit verify",
    )
