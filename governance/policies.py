"""Setting policies, and showing them.

A policy is recorded with the very text of its file and the prompts that its gates measure on, which are read when it is
set: what patches are judged by cannot move under the policy's name afterwards.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from governance.errors import PolicyError
from governance.gate_tasks import judge_of
from governance.planned_patches import close_stale_plans
from governance.policy_files import AccuracySet, PolicyFile, Prompts, parse_policy
from governance.policy_records import PolicyInForce, newest_policy, policy_in_force, read_policy
from governance.prompt_set_records import evaluation_prompts
from governance.prompt_sets import PromptSet, PromptSource, read_prompt_set
from governance.workspace import Workspace
from registry import queries
from registry.errors import RecordNotFoundError
from registry.schema import Policy


@dataclass(frozen=True)
class PolicySummary:
    """A policy as lists and `--json` show it."""

    policy: int
    scope: str
    name: str
    version: int
    digest: str
    in_force: bool
    approvals_needed: int
    gates: dict[str, Any] | None
    roles: dict[str, Any] | None
    prompts: dict[str, str]
    created_at: datetime
    actor: str


@dataclass(frozen=True)
class PolicyCheck:
    """What a policy file asks for, and how many prompts each of its sets holds."""

    file: str
    name: str
    digest: str
    gates: dict[str, Any] | None
    approvals_needed: int
    roles: dict[str, Any] | None
    prompts: dict[str, int]


def check_policy(workspace: Workspace, file: Path) -> PolicyCheck:
    """Read a policy file and the prompts and judge that it names, as `set_policy` does; nothing is recorded.

    Raises:
        PolicyError: the file cannot be read, or a key is unknown, missing or has a value that it cannot have.
        PromptSetError: prompts cannot be read.
        JudgeError: there is no such judge.
    """
    text, policy = _read(file)
    _judge_digest(workspace, policy)
    sets = _prompt_sets(policy, file)
    return PolicyCheck(
        file=str(file),
        name=policy.name,
        digest=_digest(text),
        gates=_plain(policy.gates),
        approvals_needed=policy.approvals_needed,
        roles=_plain(policy.roles),
        prompts={name: len(held.rows) for name, held in sets.items()},
    )


def set_policy(workspace: Workspace, file: Path, lineage: str | None = None, reason: str = "") -> PolicySummary:
    """Put a policy into force: for one lineage, or for every lineage without one of its own.

    The same text with the same prompts, if it is in force there already, is not recorded again.

    Args:
        workspace: where to record.
        file: the policy, TOML.
        lineage: whose; None: the registry's.
        reason: why, for the record.

    Raises:
        NotAllowedError: the policy in force until now gives that role to others.
        PolicyError, PromptSetError, JudgeError: as `check_policy`.
        RecordNotFoundError: no lineage of that name.
    """
    subject = ("lineage", lineage) if lineage is not None else ("registry", "policy")
    with workspace.attempt("policy.set", *subject):
        text, policy = _read(file)
        judge = _judge_digest(workspace, policy)
        sets = _prompt_sets(policy, file)
        stored = {name: workspace.store.put_bytes(held.canonical) for name, held in sets.items()}
        with workspace.registry.write() as session:
            lineage_id = queries.lineage_id(session, lineage) if lineage is not None else None
            held = newest_policy(session, lineage_id)
            same = (_digest(text), stored, judge)
            if held is not None and (held.digest, held.prompts, held.judge_digest) == same:
                return _summary(read_policy(held), in_force=True)
            record = Policy(
                lineage_id=lineage_id,
                name=policy.name,
                version=_next_version(session, lineage_id),
                digest=_digest(text),
                content=text,
                prompts=stored,
                judge_digest=judge,
                created_at=workspace.clock(),
                actor=workspace.actor,
            )
            session.add(record)
            session.flush()
            prompt_sets = [evaluation_prompts(workspace, session, sets[name], stored[name]) for name in sets]
            payload = {"policy": record.id, "name": record.name, "version": record.version, "digest": record.digest}
            payload |= {"prompts": stored, "judge_digest": judge, "reason": reason}
            workspace.record(session, "policy.set", *subject, payload, records=[record, *prompt_sets])
            for each in queries.list_lineages(session):
                close_stale_plans(workspace, session, each)
            return _summary(read_policy(record), in_force=True)


def show_policy(workspace: Workspace, lineage: str | None = None) -> tuple[PolicySummary, str]:
    """The policy in force for a lineage, or the registry's, and its text.

    Raises:
        RecordNotFoundError: there is none, or no lineage of that name.
    """
    with workspace.registry.read() as session:
        if lineage is not None:
            queries.lineage_id(session, lineage)
        policy = policy_in_force(session, lineage)
    if policy is None:
        where = f"lineage {lineage}" if lineage else "the registry"
        raise RecordNotFoundError(f"no policy is in force for {where}", "Run `neuronledger policy set FILE`")
    return _summary(policy, in_force=True), policy.content


def list_policies(workspace: Workspace) -> list[PolicySummary]:
    """Every policy that was ever set, oldest first."""
    with workspace.registry.read() as session:
        records = session.scalars(select(Policy).order_by(Policy.id)).all()
        newest = {record.lineage_id: record.id for record in records}
        return [_summary(read_policy(each), in_force=newest[each.lineage_id] == each.id) for each in records]


def _read(file: Path) -> tuple[str, PolicyFile]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PolicyError(f"there is no policy file {file}", "check its path") from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"{file} is not UTF-8 text", "save it as UTF-8") from error
    return text, parse_policy(text, str(file))


def _judge_digest(workspace: Workspace, policy: PolicyFile) -> str | None:
    return judge_of(workspace, policy.gates).digest if policy.gates is not None else None


def _prompt_sets(policy: PolicyFile, file: Path) -> Mapping[str, PromptSet]:
    found = {}
    for name, prompts in policy.prompts().items():
        place = file.parent / prompts.prompts
        source = _source(prompts, str(place) if place.exists() else prompts.prompts)
        held = read_prompt_set(source)
        if not held.rows:
            raise PolicyError(
                f"{file}: the prompts of {name} are empty", "name prompts that its conditions leave some of"
            )
        found[name] = held
    return found


def _source(prompts: Prompts, location: str) -> PromptSource:
    return PromptSource(
        location,
        where=tuple(prompts.where.items()),
        prompt_columns=prompts.prompt_columns,
        answer_column=prompts.answer_column if isinstance(prompts, AccuracySet) else None,
        drop_duplicates=prompts.drop_duplicates,
        limit=prompts.limit,
    )


def _next_version(session: Session, lineage_id: int | None) -> int:
    same = Policy.lineage_id == lineage_id if lineage_id else Policy.lineage_id.is_(None)
    return (session.scalar(select(func.max(Policy.version)).where(same)) or 0) + 1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _plain(section: Any) -> dict[str, Any] | None:
    return None if section is None else section.model_dump(mode="json", by_alias=True, exclude_none=True)


def _summary(policy: PolicyInForce, *, in_force: bool) -> PolicySummary:
    return PolicySummary(
        policy=policy.policy,
        scope=policy.lineage or "registry",
        name=policy.name,
        version=policy.version,
        digest=policy.digest,
        in_force=in_force,
        approvals_needed=policy.file.approvals_needed,
        gates=_plain(policy.file.gates),
        roles=_plain(policy.file.roles),
        prompts=dict(policy.prompts),
        created_at=policy.created_at,
        actor=policy.actor,
    )
