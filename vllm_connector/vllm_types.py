"""The parts of vLLM's objects that the scheduler's side reads.

Source: vLLM 0.32, vllm/v1/request.py and vllm/multimodal/inputs.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class PlaceholderRange(Protocol):
    """The item's place in the prompt; a video's also has text between its frames, which is no embedding."""

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...

    def get_num_embeds(self) -> int: ...


class Field(Protocol):
    @property
    def data(self) -> Any: ...


class Feature(Protocol):
    """One item of a request.

    data: what vLLM's processor made of the item: pixels and grid, or the grid alone.
    modality: "image" or "video".
    identifier: its key in vLLM's caches. mm_hash: the same without the prefix of a LoRA adapter.
    """

    @property
    def data(self) -> Mapping[str, Field] | None: ...

    @property
    def modality(self) -> str: ...

    @property
    def identifier(self) -> str: ...

    @property
    def mm_hash(self) -> str | None: ...

    @property
    def mm_position(self) -> PlaceholderRange: ...


class VllmRequest(Protocol):
    """A request; `ec_transfer_params` and `cache_salt` are those of its HTTP body."""

    @property
    def request_id(self) -> str: ...

    @property
    def mm_features(self) -> Sequence[Feature]: ...

    @property
    def ec_transfer_params(self) -> Mapping[str, Any] | None: ...

    @property
    def cache_salt(self) -> str | None: ...
