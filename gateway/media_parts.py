"""Finds the images and videos of a chat request, and replaces them by their sizes.

Only the parts that are replaced are written again: all else of the body stays as the client has sent it, byte by byte.

Source: the content parts that vLLM 0.32 takes, vllm/renderers/chat_utils.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from vitrine_vlm.embedding_transport.clients.media_json import item_from_json, item_to_json
from vitrine_vlm.embedding_transport.clients.media_options import (
    ImageOptions,
    Layer,
    MediaIoKwargs,
    ProcessorKwargs,
    RequestOptions,
    VideoOptions,
    override,
    part_layer,
)
from vitrine_vlm.embedding_transport.clients.media_url import media_item
from vitrine_vlm.embedding_transport.wire.data_url import is_data_url
from vitrine_vlm.errors import BadRequest, TooManyItems
from vitrine_vlm.gateway.json_scanner import JsonScanner
from vitrine_vlm.service_runtime.body_process import Keep, Kept
from vitrine_vlm.service_runtime.json_limits import check_json
from vitrine_vlm.service_runtime.json_types import RequestObject, problem_of
from vitrine_vlm.types import MediaItem, MediaKind

ObjectT = TypeVar("ObjectT", bound=RequestObject)

# Where parts of these types have their URL.
_URL_KEYS = {"image_url": "image_url", "input_image": "image_url", "video_url": "video_url", "video": "video"}
_KINDS: dict[str, MediaKind] = {"image_url": "image", "video_url": "video", "video": "video"}
_EMBEDS_TYPES = ("image_embeds", "video_embeds")
_REPLACED_FIELDS = ("type", "image_url", "video_url", "video", "uuid")
_PROCESSOR_KWARGS, _IO_KWARGS = "mm_processor_kwargs", "media_io_kwargs"
_TRANSFER_PARAMS, _CACHE_SALT = "ec_transfer_params", "cache_salt"
_READ_KEYS = ("messages", "content", _TRANSFER_PARAMS, _PROCESSOR_KWARGS, _IO_KWARGS, _CACHE_SALT)
_MAX_URL_CHARS = 8192
# Of the first turns, at their beginning and at their end.
_AFFINITY_CHARS = 16384


@dataclass(frozen=True)
class MediaPart:
    """A content part that is one image or video.

    param: its place, as in OpenAI's errors. other_fields: JSON of the fields that stay.
    is_new: whether it is in the last message. What is in earlier ones, the server's prefix cache mostly has.
    """

    item: MediaItem
    param: str
    other_fields: tuple[str, ...]
    is_new: bool

    def replaced(self, metadata: dict[str, object], item_id: str) -> str:
        """Returns the JSON of the part that takes its place.

        Args:
            metadata: the fields of vLLM's image_embeds or video_embeds. item_id: becomes the uuid.
        """
        kind = f"{self.item.kind}_embeds"
        fields = json.dumps({"type": kind, kind: metadata, "uuid": item_id})[1:-1]
        return "{" + ", ".join((*self.other_fields, fields)) + "}"


@dataclass(frozen=True)
class _FoundPart:
    """A part as it stands in the body. source: its URL, or those of a video's frames. options: its own ones.

    where: the place of the source in the request.
    """

    kind: MediaKind
    where: str
    source: str | list[str]
    options: Layer
    param: str
    other_fields: tuple[str, ...]


@dataclass(frozen=True)
class ChatBody:
    """The body of a chat request. `pieces` is its text, cut where a part, or None for ec_transfer_params, belongs.

    affinity_key: equal for requests of one conversation, which begin alike up to the first turn of the user.
    cache_salt: the client's, which vLLM gets as it is; "" for none.
    """

    affinity_key: bytes
    pieces: tuple[str, ...]
    slots: tuple[MediaPart | None, ...]
    cache_salt: str = ""

    @property
    def parts(self) -> list[MediaPart]:
        return [slot for slot in self.slots if slot is not None]

    def to_json(self, keep: Keep) -> dict[str, Any]:
        """The same for `from_json` in another process."""
        slots = [slot and vars(slot) | {"item": item_to_json(slot.item, keep)} for slot in self.slots]
        # A salt may have lone surrogates, which are no UTF-8.
        return {
            "key": self.affinity_key.hex(),
            "pieces": self.pieces,
            "slots": slots,
            "salt": json.dumps(self.cache_salt),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], kept: Kept) -> ChatBody:
        slots = (slot and _part_from_json(slot, kept) for slot in fields["slots"])
        key, salt = bytes.fromhex(fields["key"]), json.loads(fields["salt"])
        return cls(key, tuple(fields["pieces"]), tuple(slots), salt)

    def replaced(self, parts: Sequence[str], transfer_params: dict[str, dict[str, object]]) -> bytes:
        """Returns the body with these parts instead of its own.

        Args:
            parts: JSON, one for each of `self.parts`.
        """
        remaining = iter(parts)
        text = [self.pieces[0]]
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            text += (json.dumps(transfer_params) if slot is None else next(remaining), piece)
        return "".join(text).encode()


def _part_from_json(fields: dict[str, Any], kept: Kept) -> MediaPart:
    item = item_from_json(fields["item"], kept)
    return MediaPart(item, fields["param"], tuple(fields["other_fields"]), fields["is_new"])


def parse_chat(body: bytes, max_items: int, *, several_tenants: bool = False) -> ChatBody:
    """Finds the media of a chat request. What vLLM will refuse anyway is left to it.

    Args:
        several_tenants: whether media that pass as they are must not name what vLLM has cached, or will cache.

    Raises:
        BadRequest: the body is not a JSON object or too large a one, or a part with media is malformed.
        TooManyItems: more than `max_items` parts with media.
    """
    check_json(body)
    try:
        return _ChatReader(body.decode(), max_items, several_tenants).read()
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


class _ChatReader:
    def __init__(self, text: str, max_items: int, several_tenants: bool) -> None:
        self._scanner = JsonScanner(text)
        self._max_items = max_items
        self._several_tenants = several_tenants
        self._pieces: list[str] = []
        self._slots: list[_FoundPart | None] = []
        self._options: dict[str, Any] = {}
        self._before_next_slot = ""
        self._end_of_last_slot = 0
        self._conversation = (0, 0)
        self._last_message = ""
        self._embeds_param: str | None = None
        self._has_transfer_params = False
        self._cache_salt = ""

    def read(self) -> ChatBody:
        scanner = self._scanner
        if scanner.peek() != "{":
            raise BadRequest("the body must be a JSON object")
        seen: set[str] = set()
        for key in scanner.members():
            self._check_once(key, seen, key)
            if key == "messages" and scanner.peek() == "[":
                self._read_messages()
            elif key == _TRANSFER_PARAMS:
                self._read_transfer_params()
            elif key in (_PROCESSOR_KWARGS, _IO_KWARGS):
                self._read_options(key)
            elif key == _CACHE_SALT:
                salt = scanner.value()
                self._cache_salt = salt if isinstance(salt, str) else ""  # vLLM refuses all else but null
            else:
                scanner.value()
        end = scanner.position - 1
        scanner.end()
        if self._has_transfer_params and self._several_tenants:
            raise _bad("it is set here, for the tenant of the request: leave it out", _TRANSFER_PARAMS)
        if not any(self._slots):  # goes on as it is
            return ChatBody(self._affinity_key(), (), ())
        if self._has_transfer_params:
            raise _bad("it is set here for requests with media: leave it out", _TRANSFER_PARAMS)
        if None not in self._slots:
            self._cut(end, end, None, f', "{_TRANSFER_PARAMS}": ')
        self._pieces.append(self._before_next_slot + scanner.text[self._end_of_last_slot :])
        return ChatBody(self._affinity_key(), tuple(self._pieces), tuple(self._items()), self._cache_salt)

    def _items(self) -> Iterator[MediaPart | None]:
        """The parts with the options of the whole request."""
        request = RequestOptions(
            _parsed(ProcessorKwargs, self._options.get(_PROCESSOR_KWARGS), _PROCESSOR_KWARGS),
            _parsed(MediaIoKwargs, self._options.get(_IO_KWARGS), _IO_KWARGS),
        )
        layers = request.layers([slot.kind for slot in self._slots if slot is not None])
        for slot in self._slots:
            if slot is None:
                yield None
            else:
                item = _item(slot, override(next(layers), slot.options))
                is_new = slot.param.startswith(f"{self._last_message}.")
                yield MediaPart(item, slot.param, slot.other_fields, is_new)

    def _affinity_key(self) -> bytes:
        begin, end = self._conversation
        text = self._scanner.text
        if end - begin > 2 * _AFFINITY_CHARS:  # with media in it, which are long
            text = f"{text[begin : begin + _AFFINITY_CHARS]}{end - begin}{text[end - _AFFINITY_CHARS : end]}"
        else:
            text = text[begin:end]
        return hashlib.sha256(text.encode()).digest()

    def _check_once(self, key: str, seen: set[str], param: str) -> None:
        """Refuses what two readers may understand in different ways."""
        if key in seen and key in _READ_KEYS:
            raise _bad("it is there twice", param)
        seen.add(key)

    def _cut(self, start: int, end: int, slot: _FoundPart | None, before: str = "") -> None:
        """Leaves out the text from start to end, for `slot` to be put there, behind `before`."""
        self._pieces.append(self._before_next_slot + self._scanner.text[self._end_of_last_slot : start] + before)
        self._slots.append(slot)
        self._before_next_slot = ""
        self._end_of_last_slot = end

    def _read_transfer_params(self) -> None:
        start = self._scanner.position
        if self._scanner.value() is None:
            self._cut(start, self._scanner.position, None)
        else:
            self._has_transfer_params = True

    def _read_options(self, key: str) -> None:
        """Reads options of the whole request, and puts null in their place: encoders apply them.

        vLLM 0.32 makes an item's hash of its uuid and these, by which the connector would find no ticket
        (`get_mm_hashes` of vllm/multimodal/processing/inputs.py).
        """
        scanner = self._scanner
        start = scanner.position
        self._options[key] = scanner.value()
        self._before_next_slot += scanner.text[self._end_of_last_slot : start] + "null"
        self._end_of_last_slot = scanner.position

    def _read_messages(self) -> None:
        scanner = self._scanner
        start = scanner.position
        end_of_first_turn = 0
        for index in scanner.elements():
            self._last_message = f"messages[{index}]"
            role = self._read_message(self._last_message) if scanner.peek() == "{" else scanner.value()
            if role == "user" and not end_of_first_turn:
                end_of_first_turn = scanner.position
        self._conversation = (start, end_of_first_turn or scanner.position)

    def _read_message(self, param: str) -> object:
        """Returns the message's role."""
        scanner = self._scanner
        role: object = None
        seen: set[str] = set()
        for key in scanner.members():
            self._check_once(key, seen, f"{param}.{key}")
            if key == "content" and scanner.peek() == "[":
                for index in scanner.elements():
                    self._read_part(f"{param}.content[{index}]")
            elif key == "role":
                role = scanner.value()
            else:
                scanner.value()
        return role

    def _read_part(self, param: str) -> None:
        scanner = self._scanner
        if scanner.peek() != "{":
            scanner.value()
            return
        start = scanner.position
        fields: dict[str, Any] = {}
        others: dict[str, str] = {}
        for key in scanner.members():
            value_start = scanner.position
            fields[key] = scanner.value()
            if key not in _REPLACED_FIELDS:
                others[key] = f"{json.dumps(key)}: {scanner.text[value_start : scanner.position]}"
        url_key, is_replaced = _url_key(fields), False
        if fields.get("type") in _EMBEDS_TYPES or (url_key and fields.get(url_key) is None and fields.get("uuid")):
            self._embeds_param = self._embeds_param or param
        elif url_key:
            if len(self._slots) - self._slots.count(None) >= self._max_items:
                raise TooManyItems(f"more than {self._max_items} images and videos: send fewer, or raise --max-items")
            self._cut(start, scanner.position, _found(url_key, fields, param, tuple(others.values())))
            is_replaced = True
        if self._several_tenants and not is_replaced and fields.get("uuid") is not None:
            # vLLM's caches go by it, whatever the media: one tenant could use, or choose, what another one gets.
            raise _bad("media of several tenants are cached here: leave it out", f"{param}.uuid")
        if self._embeds_param and any(self._slots):
            raise _bad("vLLM does not take media by URL beside embeddings in one request", self._embeds_param)


def _url_key(fields: dict[str, Any]) -> str | None:
    """Returns the key of the part's URL if it is an image or a video; without a type, its keys say what it is."""
    kind = fields.get("type")
    if kind is None or fields.get("uuid") is not None:
        for key in ("image_url", "video_url"):
            if key in fields:
                return key
    return _URL_KEYS.get(kind) if isinstance(kind, str) else None


def _found(url_key: str, fields: dict[str, Any], param: str, other_fields: tuple[str, ...]) -> _FoundPart:
    """
    Raises:
        BadRequest: the part's URL or an option is missing or malformed.
    """
    kind, given = _KINDS[url_key], fields.get(url_key)
    source: Any
    source, inside = (given.get("url"), given) if isinstance(given, dict) and url_key != "video" else (given, {})
    where = f"{param}.{url_key}"
    for url in source if isinstance(source, list) and url_key == "video" else [source]:
        if not isinstance(url, str):
            raise _bad(f"its URL must be a string, not {type(url).__name__}", where)
        if not is_data_url(url) and len(url) > _MAX_URL_CHARS:
            raise _bad(f"a URL of {len(url)} characters is longer than {_MAX_URL_CHARS}", where)
    options = ImageOptions if kind == "image" else VideoOptions
    # What is in neither is left to the server, which ignores it.
    layer = part_layer(_parsed(options, inside, where), _parsed(options, fields, param), url_key, param)
    return _FoundPart(kind, where, source, layer, param, other_fields)


def _parsed(kind: type[ObjectT], value: object, param: str) -> ObjectT:
    """
    Raises:
        BadRequest: a field has a wrong value; `param` names it.
    """
    try:
        return kind.model_validate({} if value is None else value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join([param, *(str(each) for each in first["loc"])])
        raise _bad(problem_of(first), place) from None


def _item(part: _FoundPart, layer: Layer) -> MediaItem:
    try:
        item = media_item(part.kind, part.source, layer)
        for each in (item, *(item.frames or ())):
            (each.url or "").encode()
    except BadRequest as error:
        error.param = error.param or part.where
        raise
    except UnicodeEncodeError as error:
        raise _bad(str(error), part.where) from None
    return item


def _bad(message: str, param: str) -> BadRequest:
    error = BadRequest(f"{param}: {message}")
    error.param = param
    return error
