"""Finding the media of a request and putting their sizes in their place, without a service."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from vitrine_vlm.errors import BadRequest, TooManyItems
from vitrine_vlm.gateway.media_parts import ChatBody, parse_chat
from vitrine_vlm.service_runtime.memory_file import MemoryFile
from vitrine_vlm.types import MediaItem, MediaOptions

URL = "https://example.com/a.png"
DATA = "data:image/png;base64," + base64.b64encode(b"\x89PNG...").decode()


def body_of(*parts: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}], **fields}).encode()


def image(url: Any = URL, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **fields}


def replaced(chat: ChatBody) -> str:
    parts = [part.replaced({"image_grid_thw": [1, 2, 4]}, f"id-{index}") for index, part in enumerate(chat.parts)]
    return chat.replaced(parts, {"id-0": {"ticket": "00"}}).decode()


def test_a_body_that_takes_long_to_read_is_refused() -> None:
    parts = [{"type": "text", "text": ""}] * 33_000
    with pytest.raises(BadRequest, match="more than 65536 names of fields"):
        parse_chat(body_of(*parts), 4)
    assert not parse_chat(body_of(*parts[:32_000]), 4).parts


@pytest.mark.parametrize(
    ("part", "item"),
    [
        (image(), MediaItem("image", url=URL)),
        (image(DATA), MediaItem("image", data=b"\x89PNG...")),
        ({"type": "image_url", "image_url": URL}, MediaItem("image", url=URL)),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, MediaItem("image", url=URL)),
        ({"image_url": URL}, MediaItem("image", url=URL)),
        ({"type": "text", "image_url": URL, "uuid": "mine"}, MediaItem("image", url=URL)),
        ({"type": "video_url", "video_url": {"url": URL}}, MediaItem("video", url=URL)),
        (
            {"type": "video_url", "video_url": {"url": URL, "fps": 4}},
            MediaItem("video", url=URL, options=MediaOptions(fps=4.0)),
        ),
        ({"video_url": URL}, MediaItem("video", url=URL)),
    ],
)
def test_all_forms_of_media_that_vllm_takes(part: dict[str, Any], item: MediaItem) -> None:
    (found,) = parse_chat(body_of({"type": "text", "text": "a"}, part), 4).parts
    assert (found.item, found.param) == (item, "messages[0].content[1]")


def test_only_the_parts_change() -> None:
    begin = '{ "model":"m", "x": 1.0e-1, "messages": [ {"role":"system" ,"content":"\\u00e9"},\n {"content": [ "a", '
    end = ', {"type": "text", "text": "<é>"}], "role": "user"}], "seed": 12345678901234567890, "x": {"y": [1.50]} '
    part = '{"image_url" : {"url": "https://x/a"}, "detail":1.0e0, "type":"image_url", "uuid": "mine"}'
    chat = parse_chat(f"{begin}{part}{end}}}".encode(), 4)
    text = replaced(chat)
    new = '{"detail": 1.0e0, "type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 2, 4]}, "uuid": "id-0"}'
    assert text == f'{begin}{new}{end}, "ec_transfer_params": {{"id-0": {{"ticket": "00"}}}}}}'
    json.loads(text)


@pytest.mark.parametrize("order", [1, -1])
def test_options_of_the_request_become_null(order: int) -> None:
    options = [
        '"mm_processor_kwargs" : {"max_pixels": 9, "fps": 2}',
        '"media_io_kwargs": {"video": {"num_frames": -1}}',
    ]
    members = [options[0], f'"messages": {json.dumps([{"content": [image()]}])}', '"n": 1.0', options[1]]
    chat = parse_chat(("{" + ", ".join(members[::order]) + "}").encode(), 4)
    assert chat.parts[0].item == MediaItem("image", url=URL, options=MediaOptions(max_pixels=9))
    new = '{"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 2, 4]}, "uuid": "id-0"}'
    null = [
        '"mm_processor_kwargs" : null',
        f'"messages": [{{"content": [{new}]}}]',
        '"n": 1.0',
        '"media_io_kwargs": null',
    ]
    assert replaced(chat) == "{" + ", ".join(null[::order]) + ', "ec_transfer_params": {"id-0": {"ticket": "00"}}}'
    untouched = ("{" + ", ".join(options) + ', "messages": []}').encode()
    assert not parse_chat(untouched, 4).parts


def test_parts_of_all_messages_are_found_in_their_order() -> None:
    contents: list[Any] = [
        [image("https://x/0")],
        "text",
        None,
        [{"type": "text", "text": "a"}, image("https://x/1"), image()],
    ]
    messages = [{"role": "tool", "content": content} for content in contents]
    chat = parse_chat(json.dumps({"messages": messages}).encode(), 4)
    assert [part.param for part in chat.parts] == [
        f"messages[{place}]" for place in ("0].content[0", "3].content[1", "3].content[2")
    ]
    body = json.loads(replaced(chat))
    assert [part["uuid"] for part in (*body["messages"][0]["content"], *body["messages"][3]["content"][1:])] == [
        "id-0",
        "id-1",
        "id-2",
    ]


def test_parts_of_the_last_message_are_new() -> None:
    turns = [{"role": "user", "content": [image(), image()]}, {"role": "assistant", "content": "Yes."}]
    last = {"role": "user", "content": [image()]}
    for messages, expected in (([*turns, last], [0, 0, 1]), (turns[:1], [1, 1]), (turns, [0, 0])):
        chat = parse_chat(json.dumps({"messages": messages}).encode(), 4)
        assert [part.is_new for part in chat.parts] == expected


def test_transfer_params_of_null_are_replaced_and_others_refused() -> None:
    raw = b'{"ec_transfer_params": null, ' + body_of(image())[1:]
    assert replaced(parse_chat(raw, 4)).startswith('{"ec_transfer_params": {"id-0": {"ticket": "00"}}, "messages"')
    with pytest.raises(BadRequest) as caught:
        parse_chat(body_of(image(), ec_transfer_params={"a": {}}), 4)
    assert caught.value.param == "ec_transfer_params"


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 2, 2]}, "uuid": "u"}],
        [{"type": "image_url", "image_url": None, "uuid": "u"}],
        [{"type": "input_audio", "input_audio": {}}, {"type": "text", "text": "a"}, 5, None, "a", {"type": 5}, {}],
        [{"type": "video_embeds", "video_embeds": None, "uuid": "u"}],
    ],
)
def test_parts_without_a_url_are_left_alone(parts: list[Any]) -> None:
    assert not parse_chat(body_of(*parts, ec_transfer_params={"u": {}}), 4).parts


@pytest.mark.parametrize(
    ("part", "fields", "param"),
    [
        ({"type": "image_embeds", "image_embeds": {}, "uuid": "u"}, {}, "messages[0].content[1].uuid"),
        ({"type": "image_url", "image_url": None, "uuid": "u"}, {}, "messages[0].content[1].uuid"),
        ({"type": "audio_url", "audio_url": {"url": "x"}, "uuid": "u"}, {}, "messages[0].content[1].uuid"),
        ({"type": "text", "text": "a"}, {"ec_transfer_params": {"u": {}}}, "ec_transfer_params"),
    ],
)
def test_no_tenant_names_what_another_may_have_cached(part: dict[str, Any], fields: dict[str, Any], param: str) -> None:
    body = body_of({"type": "text", "text": "a"}, part, **fields)
    assert not parse_chat(body, 4).parts
    with pytest.raises(BadRequest) as caught:
        parse_chat(body, 4, several_tenants=True)
    assert caught.value.param == param
    assert parse_chat(body_of({**image(), "uuid": "mine"}), 4, several_tenants=True).parts, "replaced anyway"
    unnamed = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 6]}}
    assert not parse_chat(body_of(unnamed), 4, several_tenants=True).parts


@pytest.mark.parametrize("order", [1, -1])
def test_urls_beside_embeddings_are_refused(order: int) -> None:
    parts = [image(), {"type": "video_embeds", "video_embeds": {}, "uuid": "u"}][::order]
    with pytest.raises(BadRequest, match="embeddings") as caught:
        parse_chat(body_of(*parts), 4)
    assert caught.value.param == f"messages[0].content[{0 if order < 0 else 1}]"


@pytest.mark.parametrize(
    "part",
    [
        image(5),
        image(None),
        image(["a"]),
        {"type": "image_url"},
        {"type": "image_url", "image_url": 5},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": [URL]},
        image("https://" + "a" * 10_000),
        image("\ud800"),
        image("data:image/png;base64,@@@"),
        image("data:image/png;base64,é"),
        {"type": "video_url", "video_url": {"url": URL, "fps": "4"}},
        {"type": "video_url", "video_url": {"url": URL, "fps": True}},
        {"type": "video_url", "video_url": {"url": URL, "fps": 0}},
        {"type": "video_url", "video_url": {"url": URL, "fps": float("nan")}},
        {"type": "video_url", "video_url": {"url": URL, "fps": 10**400}},
    ],
    ids=lambda part: json.dumps(part)[:60],
)
def test_malformed_parts_are_refused_by_their_place(part: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat(body_of({"type": "text", "text": "a"}, part), 4)
    assert str(caught.value.param).startswith("messages[0].content[1]")


def test_too_many_items_are_refused() -> None:
    parse_chat(body_of(*[image()] * 4), 4)
    with pytest.raises(TooManyItems):
        parse_chat(body_of(*[image()] * 5), 4)


@pytest.mark.parametrize(
    "raw",
    [
        body_of("text", image(), image(DATA, max_pixels=4096), ec_transfer_params=None, cache_salt="\ud800"),
        body_of({"type": "video", "video": [URL, DATA], "fps": 2}, mm_processor_kwargs={"min_pixels": 4096}),
        body_of("text", cache_salt="a"),
    ],
)
def test_the_way_from_the_process_that_reads_large_bodies(raw: bytes) -> None:
    chat = parse_chat(raw, 4)
    with MemoryFile() as file:
        assert ChatBody.from_json(json.loads(json.dumps(chat.to_json(file.append))), file.read) == chat


@pytest.mark.parametrize(
    "text",
    [
        '{"messages": [{"content": [%s], "content": "a"}]}',
        '{"messages": [{"content": "a", "content": [%s]}]}',
        '{"messages": [{"content": [%s]}], "messages": []}',
    ],
)
def test_keys_that_are_there_twice_hide_no_media(text: str) -> None:
    with pytest.raises(BadRequest, match="twice"):
        parse_chat((text % json.dumps(image())).encode(), 4)


def test_the_key_of_a_conversation_is_that_of_its_first_turn() -> None:
    def key(*contents: Any, **fields: Any) -> bytes:
        messages = [{"role": "user" if index % 2 else "system", "content": each} for index, each in enumerate(contents)]
        return parse_chat(json.dumps({**fields, "messages": messages}).encode(), 4).affinity_key

    assert key("s", "u") == key("s", "u", "s2", "u2") == key("s", "u", "x", temperature=0.5)
    assert len({key("s", "u"), key("s", "v"), key("t", "u"), key("s"), key()}) == 5
    large = ["a" * 50_000 + end for end in ("x", "y")]
    assert key("s", large[0]) == key("s", large[0], "s2") != key("s", large[1])
    assert key(5) and key(None)
