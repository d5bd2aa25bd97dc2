from __future__ import annotations

import hashlib
from array import array

import torch

from vitrine_vlm.llm_worker.engine.prefix_hashes import extend_prefix_hashes
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt
from vitrine_vlm.service_runtime.tenants import CacheScope

BLOCK = 4
TOKENS = list(range(1, 13))


def hashes_of(scope: CacheScope, tokens: list[int] = TOKENS) -> list[bytes]:
    prompt = ExpandedPrompt(tokens, torch.arange(len(tokens)).expand(3, -1), len(tokens))
    hashes: list[bytes] = []
    for num_blocks in range(1, len(tokens) // BLOCK + 1):  # as steps extend them
        extend_prefix_hashes(hashes, tokens, prompt, BLOCK, num_blocks, scope.digest())
    return hashes


def test_scopes_have_no_block_in_common() -> None:
    scopes = [CacheScope(), CacheScope("a"), CacheScope("b"), CacheScope("a", "b"), CacheScope("", "ab")]
    found = [each for scope in scopes for each in hashes_of(scope)]
    assert len(set(found)) == len(found) == 3 * len(scopes)
    assert hashes_of(CacheScope("a", "b")) == hashes_of(CacheScope("a", "b"))


def test_without_a_scope_hashes_are_what_they_were() -> None:
    previous, expected = b"", []
    for first in range(0, len(TOKENS), BLOCK):
        previous = hashlib.sha256(previous + array("q", TOKENS[first : first + BLOCK]).tobytes()).digest()
        expected.append(previous)
    assert hashes_of(CacheScope()) == expected


def test_no_salt_aims_at_a_block_of_another_prompt() -> None:
    """A salt may hold the very bytes of a block: its digest would be that block's hash without the tag in front."""
    block = array("q", TOKENS[:BLOCK]).tobytes()
    salts = [block.decode("latin-1"), block[8:].decode("latin-1"), block[16:].decode("latin-1")]
    aimed = {each for salt in salts for each in hashes_of(CacheScope("", salt), TOKENS[BLOCK:])}
    assert not aimed & set(hashes_of(CacheScope()))
