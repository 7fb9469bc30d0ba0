"""What the registry keeps of prompts that were read: where from, which rows, and the digest of what was kept."""

from sqlalchemy.orm import Session

from governance.prompt_sets import PromptSet
from governance.workspace import Workspace
from registry import queries
from registry.schema import PromptSet as PromptSetRecord
from registry.schema import Purpose


def prompt_set_record(workspace: Workspace, purpose: Purpose, prompts: PromptSet, digest: str) -> PromptSetRecord:
    """A new record of prompts whose canonical form is stored under `digest`."""
    source = prompts.source
    return PromptSetRecord(
        purpose=purpose,
        source=source.location,
        source_filter={"where": dict(source.where), "limit": source.limit, "dropped": prompts.dropped},
        columns={"prompt": list(source.prompt_columns), "answer": source.answer_column},
        rows=len(prompts.rows),
        digest=digest,
        created_at=workspace.clock(),
    )


def evaluation_prompts(workspace: Workspace, session: Session, prompts: PromptSet, digest: str) -> PromptSetRecord:
    """The record of prompts that are of no dimension, made if the registry never measured with them before."""
    for held in queries.prompt_sets(session, purpose="evaluation"):
        if held.digest == digest:
            return held
    record = prompt_set_record(workspace, "evaluation", prompts, digest)
    session.add(record)
    session.flush()
    return record
