"""Having the ledger's head timestamped by an authority (RFC 3161), so that others need not believe our clock.

The authority is sent the last event's hash and nothing else. Its token is written to a file beside the exported heads,
and then recorded as an event: what fails in between leaves a token that is true all the same, never an event without.
"""

import hashlib
import re
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import rfc8785
from cryptography.x509 import Certificate

from governance.errors import InputError
from governance.ledger_proof import require_new, write_new
from governance.timestamp_checks import STAMPED, KeptToken, stamped_payload
from governance.workspace import Workspace
from registry import ledger
from registry.database import Registry
from registry.errors import LedgerError, RegistryError, TimestampError
from registry.files import replace_file
from registry.timestamps import Token, is_vouched, read_token, timestamp_query

Ask = Callable[[str, bytes], bytes]
"""Sends a query to an address, and returns what it answers."""

_NAME = re.compile(r"([0-9a-f]{64})\.tsr")
_SECONDS = 30
_LARGEST = 1 << 20


@dataclass(frozen=True)
class TimestampedHead:
    """A head that was timestamped.

    Attributes:
        event: the event that the token is of; it covers all before it too.
        hash: its hash.
        time: when the authority saw it.
        authority: the subject of the authority's certificate.
        vouched: whether the certificates given vouch for the authority; None if none were given.
        recorded: the event that records it.
        token: the file beside the exported heads.
        output: a copy of it; None if none was asked for.
    """

    event: int
    hash: str
    time: str
    authority: str
    vouched: bool | None
    recorded: int
    token: Path
    output: Path | None


def ask_authority(url: str, query: bytes) -> bytes:
    """Send a query to a time-stamping authority over HTTP, and return its answer.

    Raises:
        TimestampError: it cannot be reached, or answers with an error or at great length.
    """
    headers = {"Content-Type": "application/timestamp-query", "Accept": "application/timestamp-reply"}
    request = urllib.request.Request(url, data=query, headers=headers)  # noqa: S310  `timestamp_ledger` sees to that
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:  # noqa: S310
            answer: bytes = response.read(_LARGEST + 1)
    except urllib.error.HTTPError as error:
        raise _silent(url, f"answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise _silent(url, f"cannot be reached: {getattr(error, 'reason', None) or error}") from error
    if len(answer) > _LARGEST:
        raise _silent(url, "answers with more than a timestamp")
    return answer


def timestamp_ledger(
    workspace: Workspace,
    url: str,
    *,
    roots: Sequence[Certificate] = (),
    output: Path | None = None,
    ask: Ask = ask_authority,
) -> TimestampedHead:
    """Have the ledger's last event timestamped, keep the token, and record it.

    Args:
        workspace: the registry.
        url: address of the authority, http or https.
        roots: certificates that have to vouch for it; if there are none, that is left to whoever verifies.
        output: a new file for a copy of the token, to be handed out.
        ask: what sends the query.

    Raises:
        InputError: the address is of another kind, the output is there already, or there is no event yet.
        TimestampError: the authority gives no answer, a wrong one, or one that the certificates do not vouch for.
        LedgerError: the last event is damaged.
        RegistryError: the registry or the place of tokens cannot be written, or the extra is not installed.
    """
    if urlsplit(url).scheme not in {"http", "https"}:
        raise InputError(f"{url} is not the address of a time-stamping authority", "give one with http:// or https://")
    if output is not None:
        require_new(workspace, output)
    last = _last_event(workspace.registry)
    query = timestamp_query(_content(last))
    token = read_token(ask(url, query.content))
    if (token.imprint, token.nonce) != (last.hash, query.nonce):
        raise _silent(url, "answers with a timestamp of something else")
    if roots and not is_vouched(token, roots):
        raise _silent(url, f"gives a timestamp by {token.authority}, for whom none of the certificates given vouches")
    path = _keep(workspace.registry, token)
    with workspace.registry.write() as session:
        event = workspace.registry.record(
            session,
            action=STAMPED,
            subject_kind="ledger",
            subject_name="ledger",
            payload=stamped_payload(last, token, _shown(url)),
            actor=workspace.actor,
            now=workspace.clock(),
        )
        recorded = event.sequence
    if output is not None:
        write_new(workspace, output, token.content)
    vouched = True if roots else None
    return TimestampedHead(last.sequence, last.hash, token.time, token.authority, vouched, recorded, path, output)


def tokens_directory(registry: Registry) -> Path:
    """Where a registry's tokens lie: beside its exported heads, named after them."""
    heads = registry.heads.path
    return heads.with_name(heads.name.replace("ledger-heads.jsonl", "ledger-timestamps"))


def kept_tokens(registry: Registry) -> list[KeptToken]:
    """The tokens beside a registry's exported heads; other files there are none of ours.

    Raises:
        RegistryError: one cannot be read.
    """
    place = tokens_directory(registry)
    try:
        files = sorted(place.iterdir()) if place.is_dir() else []
        named = [(file, found[1]) for file in files if (found := _NAME.fullmatch(file.name))]
        return [KeptToken(str(file), file.read_bytes(), digest) for file, digest in named]
    except OSError as error:
        raise RegistryError(
            f"the timestamps in {place} cannot be read: {error.strerror}", "Give yourself read permission"
        ) from error


def _last_event(registry: Registry) -> ledger.Event:
    with registry.read() as session:
        count, _ = ledger.ledger_head(session)
        events = list(ledger.events(session, after=count - 1)) if count else []
    if not events:
        raise InputError("there are no events to be timestamped yet", "change something first")
    return events[-1]


def _content(event: ledger.Event) -> bytes:
    """The canonical JSON whose SHA-256 is the event's hash."""
    names = ("sequence", "created_at", "actor", "action", "subject_kind", "subject_name", "previous_hash")
    if ledger.is_canonical(event.payload):
        content = rfc8785.dumps({name: getattr(event, name) for name in names} | {"payload": event.content()})
        if hashlib.sha256(content).hexdigest() == event.hash:
            return content
    raise LedgerError(f"the content of event {event.sequence} does not have its hash", "run neuronledger audit verify")


def _keep(registry: Registry, token: Token) -> Path:
    place = tokens_directory(registry)
    path = place / f"{hashlib.sha256(token.content).hexdigest()}.tsr"
    try:
        place.mkdir(parents=True, exist_ok=True)
        replace_file(path, token.content, place / f".{secrets.token_hex(8)}.writing")
    except OSError as error:
        raise RegistryError(
            f"the timestamp cannot be written to {place}: {error.strerror}", "Make the directory writable"
        ) from error
    return path


def _shown(url: str) -> str:
    """The address without what may be a secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _silent(url: str, problem: str) -> TimestampError:
    return TimestampError(f"the time-stamping authority {_shown(url)} {problem}", "Ask again, or another authority")
