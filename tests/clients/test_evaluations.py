"""Evaluation harnesses read right numbers from the answers: transformers' of the same checkpoint in float32.

lm-evaluation-harness is called itself. lmms-eval 0.7 and VLMEvalKit (August 2026) bring torch and much else: their
request bodies are written down here, as `lmms_eval/models`, `lmms_eval/protocol.py` and `vlmeval/api` make them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any
from urllib.request import Request, urlopen

import openai
import pytest
import torch

from tests.clients.conftest import Call
from tests.clients.evaluated import as_jpeg, as_png, chat_prompt, greedy, jpeg, text, user, without_data
from tests.integration.media import picture
from vitrine_vlm.sample_models.reference import Media, Reference


def loglikelihood(reference: Reference, context: str, continuation: str) -> tuple[float, bool]:
    """By one forward pass."""
    ids = reference.tokenizer(context + continuation, return_tensors="pt", add_special_tokens=False)["input_ids"]
    num_context = len(reference.tokenizer(context, add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        logprobs = reference.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    following = ids[0, 1:]
    own = logprobs.gather(1, following[:, None])[:, 0]
    is_greedy = bool((logprobs.argmax(-1) == following)[num_context - 1 :].all())
    return float(own[num_context - 1 :].sum()), is_greedy


CONTEXTS = ("The capital of France is", "Question: 2 + 2 =\nAnswer:", "naïve 猫", "x")


@pytest.fixture(scope="session")
def pairs(random_reference: Reference) -> list[tuple[str, str]]:
    """Contexts with continuations that the model would choose, and others; one reaches over several KV blocks."""
    found = [(context, continuation) for context in CONTEXTS for continuation in (" Paris", " 4", " naïve 猫")]
    found += [(context, greedy(random_reference, context, [], 6)) for context in CONTEXTS]
    return [*found, ("A long context," * 20, " which goes on for several blocks of the cache" * 3)]


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"num_concurrent": 8}], ids=str)
def test_lm_evals_loglikelihoods(
    call: Call,
    random_server: dict[str, Any],
    random_reference: Reference,
    pairs: list[tuple[str, str]],
    options: dict[str, Any],
) -> None:
    tokenizer = str(random_reference.folder)
    answers = call("lm_eval", "loglikelihood", **random_server, tokenizer=tokenizer, pairs=pairs, **options)
    expected = [loglikelihood(random_reference, *pair) for pair in pairs]
    assert [is_greedy for _, is_greedy in answers] == [is_greedy for _, is_greedy in expected]
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_lm_evals_rolling_loglikelihoods(
    call: Call, random_server: dict[str, Any], random_reference: Reference
) -> None:
    texts = ["A text to be scored as a whole.", "naïve 猫 " * 30]
    answers = call("lm_eval", "rolling", **random_server, tokenizer=str(random_reference.folder), texts=texts)
    # The harness puts the end token in front.
    end = random_reference.tokenizer.eos_token
    expected = [loglikelihood(random_reference, end, text)[0] for text in texts]
    assert answers == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("context", CONTEXTS)
def test_loglikelihoods_of_prompts_alone(
    random_client: openai.OpenAI, random_server: dict[str, Any], random_reference: Reference, context: str
) -> None:
    """Bodies with `max_tokens: 0`, which need not cut a token off the end."""
    continuation = greedy(random_reference, context, [], 3) + "no"
    num_context = len(random_reference.tokenizer(context)["input_ids"])
    answer = random_client.completions.create(
        model=random_server["model"], prompt=context + continuation, echo=True, max_tokens=0, logprobs=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == context + continuation
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    own, top = logprobs.token_logprobs[num_context:], logprobs.top_logprobs[num_context:]
    is_greedy = all(value == max(each.values()) for value, each in zip(own, top, strict=True))
    expected, expected_greedy = loglikelihood(random_reference, context, continuation)
    assert sum(own) == pytest.approx(expected, abs=1e-3)
    assert is_greedy == expected_greedy


def test_lm_evals_generations(call: Call, random_server: dict[str, Any], random_reference: Reference) -> None:
    expected = [greedy(random_reference, context, []) for context in CONTEXTS]
    tokenizer = str(random_reference.folder)
    answers = call("lm_eval", "generate", **random_server, tokenizer=tokenizer, contexts=CONTEXTS, max_gen_toks=24)
    assert answers == expected
    until = [text[4:6] for text in expected]
    options = {"max_gen_toks": 24, "until": until, "do_sample": False}
    answers = call("lm_eval", "generate", **random_server, tokenizer=tokenizer, contexts=CONTEXTS, **options)
    assert answers == [text[: min(text.index(stop) for stop in until if stop in text)] for text in expected]


def test_lm_evals_chats(call: Call, random_server: dict[str, Any], random_reference: Reference) -> None:
    messages = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}],
    ]
    expected = [greedy(random_reference, chat_prompt(random_reference, each), []) for each in messages]
    assert call("lm_eval", "chat", **random_server, messages=messages, max_gen_toks=24) == expected
    media = picture(71, 96, 64)
    prompt = chat_prompt(random_reference, user({"type": "image"}, {"type": "text", "text": "What?"}))
    encoded = base64.b64encode(media.data).decode()
    answer = call(
        "lm_eval",
        "chat_about_picture",
        **random_server,
        question="What?",
        picture=encoded,
        max_gen_toks=24,
        until=["\n\n"],
    )
    assert answer == greedy(random_reference, prompt, [media]).split("\n\n")[0]


FRAMES = [picture(80 + number, 96, 64) for number in range(4)]
# The messages that lmms-eval 0.7 makes, and the pictures in them.
LMMS_EVAL: dict[str, tuple[list[dict[str, Any]], list[Media]]] = {
    "chat model, pictures": (user(as_png(FRAMES[0]), as_png(FRAMES[1]), text("Which?")), FRAMES[:2]),
    "chat model, a video as frames": (
        [{"role": "system", "content": [text("Be brief.")]}, *user(*map(as_png, FRAMES), text("What happens?"))],
        FRAMES,
    ),
    "async model, a video as frames with times": (
        user(
            *(each for time, frame in enumerate(FRAMES) for each in (text(f"<{time / 2:.1f} seconds>"), as_png(frame))),
            text("What happens?"),
        ),
        FRAMES,
    ),
    "simple model, text first": (user(text("What is it?"), as_png(FRAMES[2])), FRAMES[2:3]),
    "SGLang's model, a video as frames": (
        user(*(as_png(frame) | {"modalities": "video"} for frame in FRAMES), text("What happens?")),
        FRAMES,
    ),
}


@pytest.mark.parametrize("kind", LMMS_EVAL)
def test_lmms_evals_bodies(
    random_client: openai.OpenAI, random_server: dict[str, Any], random_reference: Reference, kind: str
) -> None:
    messages, media = LMMS_EVAL[kind]
    body: Any = {"messages": messages, "model": random_server["model"], "max_tokens": 24, "temperature": 0}
    answer = random_client.chat.completions.create(**body)
    prompt = chat_prompt(random_reference, without_data(messages))
    assert answer.choices[0].message.content == greedy(random_reference, prompt, media)
    inputs = random_reference.inputs(prompt, media)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (inputs["input_ids"].shape[1], 24)


def streamed_content(lines: Iterable[bytes]) -> str:
    """As VLMEvalKit's `_collect_streaming_content` reads a stream."""
    parts = []
    for line in lines:
        if line.startswith(b"data:"):
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                break
            parts.append(json.loads(data)["choices"][0]["delta"].get("content") or "")
    return "".join(parts).strip()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("detail", ["low", "high"])
def test_vlmevalkits_bodies(
    random_server: dict[str, Any], random_reference: Reference, detail: str, stream: bool
) -> None:
    media = [jpeg(90), jpeg(91)]
    messages = user(text("First:"), as_jpeg(media[0], detail=detail), text("second:"), as_jpeg(media[1], detail=detail))
    messages[0]["content"].append(text("Which?"))
    payload = {"model": random_server["model"], "messages": messages, "temperature": 0, "max_tokens": 24}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer unused"}
    body = json.dumps(payload | ({"stream": True} if stream else {})).encode()
    with urlopen(Request(f"{random_server['base_url']}/chat/completions", body, headers), timeout=60) as response:
        if stream:
            answer = streamed_content(response)
        else:
            answer = json.load(response)["choices"][0]["message"]["content"].strip()
    prompt = chat_prompt(random_reference, without_data(messages))
    assert answer == greedy(random_reference, prompt, media).strip()
