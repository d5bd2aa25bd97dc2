"""A checkpoint whose tokenizer has Qwen's added tokens that are not special: answers have them as text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

ANSWER_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def with_answer_tokens(checkpoint: Path, folder: Path) -> Path:
    """Copies a random checkpoint to `folder`, and makes its first tokens without a meaning these tokens."""
    shutil.copytree(checkpoint, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    first = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    names = {token_id: name for name, token_id in tokenizer["model"]["vocab"].items()}
    for token_id, token in enumerate(ANSWER_TOKENS, first):
        del tokenizer["model"]["vocab"][names[token_id]]
        tokenizer["model"]["vocab"][token] = token_id
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokenizer["added_tokens"].append({"id": token_id, "content": token, **flags})
    path.write_text(json.dumps(tokenizer))
    return folder
