"""What a block of KV depends on, as a hash: its tokens, its media rows, and everything in front of them.

Positions need no place in it: those of equal tokens and media behind equal ones are equal.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from llm_worker.engine.request import ExpandedPrompt


def extend_prefix_hashes(
    hashes: list[bytes], token_ids: Sequence[int], prompt: ExpandedPrompt | None, block_size: int, num_blocks: int
) -> None:
    """Appends SHA-256 hashes until there are `num_blocks`, or until media whose content is unknown stand in the way.

    Args:
        hashes: of the first blocks of the same tokens.
        token_ids: the prompt's and those generated since; `num_blocks` blocks of them at least.
        prompt: None while only its text in front of the first media item is known.
    """
    for block in range(len(hashes), num_blocks):
        start, stop = block * block_size, (block + 1) * block_size
        digest = hashlib.sha256(hashes[-1] if hashes else b"")
        digest.update(array("q", token_ids[start:stop]).tobytes())
        if prompt is not None:
            for span in prompt.spans_in(start, stop):
                content_hash = prompt.content_hashes[span.item_index] if prompt.content_hashes else b""
                if not content_hash:
                    return
                first = max(span.start, start)
                digest.update(content_hash)
                digest.update(array("q", (first - start, span.first_row + first - span.start)).tobytes())
        hashes.append(digest.digest())
