"""The documentation speaks of what is there."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from governance.commands.rendering import plain
from governance.event_log import audit_log
from governance.ledger_proof import sign_ledger
from governance.workspace import Workspace
from registry.database import Registry
from registry.keys import create_key, read_private_key

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_page_is_what_the_help_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_reference

    assert make_reference.TARGET.read_text(encoding="utf-8") == make_reference.reference()
    sys.modules.pop("make_reference")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_program_on_the_ledger_page_checks_what_audit_verify_checks(
    sqlite_registry: Registry, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    key, other = create_key(tmp_path / "key", None), create_key(tmp_path / "other", None)
    assert key != other
    workspace = Workspace(sqlite_registry, "ada")
    for payload in ({"share": 0.25, "name": "größe"}, {}):
        with sqlite_registry.write() as session:
            workspace.record(session, "a", "k", "n", payload)
    sign_ledger(workspace, read_private_key(tmp_path / "key", None))
    log = [plain(event) for event in audit_log(workspace)]
    heads = sqlite_registry.heads.path.read_bytes().splitlines(keepends=True)

    def told(events: list[Any] = log, lines: list[bytes] = heads, trusted: str = "key.pub") -> str:
        (tmp_path / "events").write_text(json.dumps(events))
        (tmp_path / "heads").write_bytes(b"".join(lines))
        arguments = [str(tmp_path / name) for name in ("events", "heads", trusted)]
        done = subprocess.run([sys.executable, "-c", program, *arguments], check=False, capture_output=True, text=True)
        assert (done.returncode == 0) == bool(done.stdout)
        return (done.stdout or done.stderr).strip()

    assert told() == "3 events and 3 heads agree; signed up to event 3"
    assert told([log[0], {**log[1], "actor": "eve"}, log[2]]) == "event 2 was changed"
    assert told(log[:2]) == "line 3 counts 3 events: the ledger was cut off"
    assert told(lines=[heads[0], heads[2]]) == "line 2 does not come after the line before it"
    assert told(lines=heads[:2]) == "from event 3 on there is no head"
    assert told(lines=[*heads[:2], heads[2].replace(b'"after":2', b'"after": 2')]) == "line 3 is not a head"
    end = b'0"}\n' if heads[2][-4:-3] != b"0" else b'1"}\n'
    assert told(lines=[*heads[:2], heads[2][:-4] + end]) == "line 3 has a forged signature"
    assert told(lines=[*heads[:2], heads[2].split(b',"key"')[0] + b"}\n"]) == "the signature of event [3] is gone"
    assert told(trusted="other.pub") == "line 3 is signed by a foreign key"
