"""What of a tokenizer decides which ids a text becomes, so that two models can be compared token by token."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algorithms.errors import CheckpointError
from algorithms.safetensors_files import read_json_file

FAST = "tokenizer.json"
SLOW = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
_MEND = "Save the tokenizer beside the model with AutoTokenizer.from_pretrained(...).save_pretrained"


@dataclass(frozen=True)
class TokenizerContent:
    """The content of a tokenizer that matters for token ids.

    Attributes:
        path: directory it was read from.
        tokens: token -> id, added tokens included; None when only slow tokenizer files are there.
        merges: merges in order, as pairs.
        digest: SHA-256 over kind, tokens and merges (or over the slow files), in hexadecimal.
    """

    path: Path
    tokens: dict[str, Any] | None
    merges: tuple[tuple[str, ...], ...]
    digest: str

    @classmethod
    def read(cls, path: Path) -> "TokenizerContent":
        """Read the tokenizer of a directory.

        Raises:
            CheckpointError: there is none, or its files are damaged.
        """
        if (path / FAST).is_file():
            return _read_fast(path)
        present = [name for name in SLOW if (path / name).is_file()]
        if not present:
            raise CheckpointError(f"{path} has no tokenizer", _MEND)
        try:
            files = [[name, hashlib.sha256((path / name).read_bytes()).hexdigest()] for name in present]
        except OSError as error:
            raise CheckpointError(
                f"the tokenizer of {path} cannot be read: {error.strerror or error}", _MEND
            ) from error
        return cls(path, None, (), _digest(["slow", files]))

    @classmethod
    def exists(cls, path: Path) -> bool:
        """Whether a directory holds a tokenizer."""
        return any((path / name).is_file() for name in (FAST, *SLOW))

    def first_difference(self, other: "TokenizerContent") -> str | None:
        """One sentence that names the first difference, or None when texts become the same ids."""
        if self.digest == other.digest:
            return None
        if self.tokens is None or other.tokens is None:
            return "their tokenizer files differ"
        for token in sorted({*self.tokens, *other.tokens}):
            mine, theirs = self.tokens.get(token), other.tokens.get(token)
            if mine != theirs:
                return f"token {token!r} has {_said(mine)} in one and {_said(theirs)} in the other"
        for rank, (mine_pair, their_pair) in enumerate(zip(self.merges, other.merges, strict=False)):
            if mine_pair != their_pair:
                return f"merge {rank} is {mine_pair} in one and {their_pair} in the other"
        if len(self.merges) != len(other.merges):
            return f"one has {len(self.merges)} merges, the other {len(other.merges)}"
        return "one splits text by another kind of model"


def _said(identifier: object) -> str:
    return "no id" if identifier is None else f"id {identifier}"


def _read_fast(path: Path) -> TokenizerContent:
    content = read_json_file(path / FAST, _MEND)
    model, added = content.get("model"), content.get("added_tokens") or []
    merges = model.get("merges") or [] if isinstance(model, dict) else []
    if not isinstance(model, dict) or not isinstance(added, list) or not isinstance(merges, list):
        raise CheckpointError(f"{path / FAST} has no usable model", _MEND)
    tokens = _tokens(model.get("vocab"), path)
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise CheckpointError(f"{path / FAST} has a damaged added token", _MEND)
        tokens[token["content"]] = token["id"]
    pairs = tuple(_merge(merge, path) for merge in merges)
    kind = str(model.get("type"))
    return TokenizerContent(path, tokens, pairs, _digest([kind, sorted(tokens.items()), pairs]))


def _tokens(vocabulary: object, path: Path) -> dict[str, Any]:
    """Token -> id; a Unigram vocabulary is a list of (token, log probability), and both count."""
    if isinstance(vocabulary, dict):
        return dict(vocabulary)
    if isinstance(vocabulary, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in vocabulary):
        return {str(token): [identifier, score] for identifier, (token, score) in enumerate(vocabulary)}
    raise CheckpointError(f"the model of {path / FAST} has no vocabulary", _MEND)


def _merge(merge: object, path: Path) -> tuple[str, ...]:
    """Older files write a merge as `"a b"`, newer ones as `["a", "b"]`."""
    if isinstance(merge, str):
        return tuple(merge.split(" "))
    if isinstance(merge, list) and all(isinstance(part, str) for part in merge):
        return tuple(merge)
    raise CheckpointError(f"{path / FAST} has a damaged merge", _MEND)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode("ascii")).hexdigest()
