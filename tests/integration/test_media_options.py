"""Options of media and lists of frames through real processes: answers are those of transformers with the same."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from tests.integration.fleet import Fleet
from tests.integration.media import clip, picture
from tests.integration.test_openai_client import part, user
from vitrine_vlm.sample_models.reference import Media, Reference

PICTURE = picture(77, 192, 128)
CLIP = clip(78, 96, 64, 40)
PROMPT = "<|im_start|>user\n{pads}What is it?<|im_end|>\n<|im_start|>assistant\n"
PADS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}


@pytest.fixture
def client(small_fleet: Fleet) -> Iterator[openai.OpenAI]:
    base_url = f"http://{small_fleet.worker_processes['shm'].addresses['http']}/v1"
    with openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, *parts: dict[str, Any], **fields: Any) -> tuple[str, int]:
    """The answer, and the number of the prompt's tokens."""
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model, messages=user(*parts, "What is it?"), max_tokens=16, temperature=0, extra_body=fields
    )
    assert answer.usage is not None
    return answer.choices[0].message.content or "", answer.usage.prompt_tokens


def expected(folder: Any, media: Media, **processor: Any) -> tuple[str, int]:
    """By transformers, whose processor for this kind of media has these attributes."""
    reference = Reference(folder)
    for name, value in processor.items():
        setattr(reference.image_processor if media.kind == "image" else reference.video_processor, name, value)
    inputs = reference.inputs(PROMPT.format(pads=PADS[media.kind]), [media])
    return reference.tokenizer.decode(reference.greedy(inputs, 16)[0]), inputs["input_ids"].shape[1]


def inside(media: Media, **options: Any) -> dict[str, Any]:
    found = part(media)
    found[found["type"]] |= options
    return found


def test_a_picture_is_as_large_as_asked_and_no_cache_mixes_it_up(client: openai.OpenAI, small_fleet: Fleet) -> None:
    sizes = {most: {"shortest_edge": 1024, "longest_edge": most} for most in (4096, 12288)}
    wanted = {most: expected(small_fleet.folder, PICTURE, size=size) for most, size in sizes.items()}
    whole = ask(client, part(PICTURE))
    assert len({whole, *wanted.values()}) == 3, "the options change nothing here"
    for _ in range(2):  # the second time from all caches
        for most, size in sizes.items():
            bounds = {"min_pixels": 1024, "max_pixels": most}
            assert ask(client, inside(PICTURE, **bounds)) == wanted[most]
            assert ask(client, part(PICTURE) | bounds) == wanted[most]
            assert ask(client, part(PICTURE), mm_processor_kwargs=bounds) == wanted[most]
            assert ask(client, part(PICTURE), mm_processor_kwargs={"images_kwargs": {"size": size}}) == wanted[most]
            assert ask(client, inside(PICTURE, **bounds), mm_processor_kwargs={"max_pixels": 2048}) == wanted[most]
        assert ask(client, part(PICTURE)) == whole
    # In one request: equal but for their options.
    small, large = (inside(PICTURE, min_pixels=1024, max_pixels=most) for most in sizes)
    text, num_tokens = ask(client, small, large, small, part(PICTURE))
    num_small, num_large, num_whole = (each - whole[1] for each in (wanted[4096][1], wanted[12288][1], whole[1]))
    num_vision = 24  # of the whole picture: 192x128 pixels in squares of 32
    assert num_tokens == whole[1] + 3 * (num_vision + 2) + 2 * num_small + num_large + num_whole
    assert ask(client, small, large, small, part(PICTURE)) == (text, num_tokens)
    assert ask(client, large, small, small, part(PICTURE))[1] == num_tokens


@pytest.mark.parametrize(
    ("fields", "own", "processor"),
    [
        ({"mm_processor_kwargs": {"fps": 4, "do_sample_frames": True}}, {}, {"fps": 4}),
        ({"media_io_kwargs": {"video": {"fps": 1, "num_frames": -1}}}, {}, {"fps": 1}),
        ({"mm_processor_kwargs": {"fps": 1}}, {"fps": 4}, {"fps": 4}),
        ({"mm_processor_kwargs": {"fps": [4]}}, {"max_frames": 6}, {"fps": 4, "max_frames": 6}),
    ],
)
def test_a_video_is_sampled_as_asked(
    client: openai.OpenAI,
    small_fleet: Fleet,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    own: dict[str, Any],
    processor: dict[str, Any],
) -> None:
    processor = dict(processor)
    monkeypatch.setattr("vitrine_vlm.sample_models.reference.VIDEO_FPS", processor.pop("fps"))
    wanted = expected(small_fleet.folder, CLIP, **processor)
    assert ask(client, inside(CLIP, **own), **fields) == wanted
    assert ask(client, part(CLIP) | own, **fields) == wanted
    assert ask(client, part(CLIP)) != wanted


def jpegs(number: int) -> list[str]:
    files = []
    for seed in range(number):
        file = io.BytesIO()
        Image.open(io.BytesIO(picture(seed, 96, 64).data)).save(file, "JPEG")
        files.append(base64.b64encode(file.getvalue()).decode())
    return files


def test_lists_of_frames(client: openai.OpenAI) -> None:
    frames = jpegs(6)
    urls = [f"data:image/jpeg;base64,{frame}" for frame in frames]
    listed = {"type": "video", "video": urls, "fps": 4}
    joined = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(frames)}}
    answer = ask(client, listed)
    # As Qwen's own example for vLLM has it: the rate of each video, and no sampling.
    assert ask(client, joined, mm_processor_kwargs={"fps": [4.0], "do_sample_frames": False}) == answer
    slow, fewer = ask(client, joined), ask(client, listed | {"video": urls[:4]})
    assert slow[1] == answer[1] and slow[0] != answer[0], "times are in the prompt"
    assert answer[1] - fewer[1] > 6, "three temporal patches of six tokens, then two"


def test_responses_and_completions_have_options_too(client: openai.OpenAI, small_fleet: Fleet) -> None:
    model, url = client.models.list().data[0].id, part(PICTURE)["image_url"]["url"]
    bounds = {"min_pixels": 1024, "max_pixels": 4096}
    wanted = expected(small_fleet.folder, PICTURE, size={"shortest_edge": 1024, "longest_edge": 4096})
    content: list[Any] = [
        {"type": "input_image", "image_url": url, "detail": "auto", **bounds},
        {"type": "input_text", "text": "What is it?"},
    ]
    for own, fields in ((bounds, {}), ({}, {"mm_processor_kwargs": bounds})):
        content[0] = {"type": "input_image", "image_url": url, "detail": "auto", **own}
        response = client.responses.create(
            model=model, input=[{"role": "user", "content": content}], max_output_tokens=16, temperature=0, store=False,
            extra_body=fields,
        )  # fmt: skip
        assert response.usage is not None and (response.output_text, response.usage.input_tokens) == wanted
    completion = client.completions.create(
        model=model, prompt=PROMPT.format(pads=PADS["image"]), max_tokens=16, temperature=0,
        extra_body={"media": [part(PICTURE) | bounds]},
    )  # fmt: skip
    assert completion.usage is not None
    assert (completion.choices[0].text, completion.usage.prompt_tokens) == wanted


@pytest.mark.parametrize(
    ("own", "fields", "param", "code"),
    [
        ({"max_pixels": 0}, {}, "messages.0.content.0.max_pixels", "invalid_request"),
        ({"max_pixels": 9, "min_pixels": 10}, {}, "messages.0.content.0.max_pixels", "invalid_request"),
        ({"resized_width": 64}, {}, "messages.0.content.0.resized_width", "invalid_request"),
        ({"nframes": 4}, {}, "messages.0.content.0.nframes", "invalid_request"),
        ({}, {"mm_processor_kwargs": {"max_frame_count": 8}}, "mm_processor_kwargs.max_frame_count", "invalid_request"),
        ({}, {"mm_processor_kwargs": {"do_resize": False}}, "mm_processor_kwargs.do_resize", "invalid_request"),
        ({}, {"media_io_kwargs": {"image": {"x": 1}}}, "media_io_kwargs.image.x", "invalid_request"),
        ({"min_pixels": 1 << 40, "max_pixels": 1 << 41}, {}, None, "media_too_large"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    client: openai.OpenAI, own: dict[str, Any], fields: dict[str, Any], param: str | None, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, part(PICTURE) | own, **fields)
    error: Any = caught.value.body
    assert 400 <= caught.value.status_code < 500 and (error["code"], error["param"]) == (code, param)
