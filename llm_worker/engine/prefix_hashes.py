"""The hash of all that a block of KV depends on: its tokens, its media embeddings, and everything in front of them.

The first block's also depends on the request's cache scope, so that no two tenants find each other's blocks.

Positions are not part of it: they are equal where tokens and media, and all in front of them, are equal.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt

# Where in the block an item's embeddings begin, and the first of them, as a row of the item.
_PLACE = struct.Struct("<qq")


def extend_prefix_hashes(
    hashes: list[bytes],
    token_ids: Sequence[int],
    prompt: ExpandedPrompt,
    block_size: int,
    num_blocks: int,
    scope: bytes = b"",
) -> None:
    """Appends SHA-256 hashes of blocks until there are `num_blocks`, or up to the first media item of unknown content.

    Args:
        hashes: those of the first blocks of the same tokens.
        token_ids: of the prompt and generated since; at least `num_blocks` blocks of them.
        prompt: only the text in front of the first media item, while no more is known.
        scope: the digest of the request's cache scope, in front of the first block.
    """
    first, stop = len(hashes) * block_size, num_blocks * block_size
    tokens, nbytes = array("q", token_ids[first:stop]).tobytes(), 8 * block_size
    contents = [tokens[begin : begin + nbytes] for begin in range(0, len(tokens), nbytes)]
    for span in prompt.spans_in(first, stop):
        content_hash = prompt.content_hashes[span.item_index] if prompt.content_hashes else b""
        begin = max(span.start, first)
        if not content_hash:
            del contents[(begin - first) // block_size :]
            break
        for start in range(begin // block_size * block_size, min(span.stop, stop), block_size):
            begin = max(span.start, start)
            place = _PLACE.pack(begin - start, span.first_row + begin - span.start)
            contents[(start - first) // block_size] += content_hash + place
    previous = hashes[-1] if hashes else scope
    for content in contents:
        previous = hashlib.sha256(previous + content).digest()
        hashes.append(previous)
