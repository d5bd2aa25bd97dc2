"""Several choices: to one prompt, to several, whole and streamed, by the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.llm_worker.frontend.serving import LocalWorker
from vitrine_vlm.llm_worker.frontend.openai_answers import TokenTexts

USER: list[Any] = [{"role": "user", "content": "Hello"}]


async def test_each_choice_of_a_chat_has_a_seed_of_its_own(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    asked: dict[str, Any] = {"model": worker.served.name, "messages": USER, "max_tokens": 8, "temperature": 1.5}
    together = await official.chat.completions.create(**asked, n=3, seed=5)
    alone = [await official.chat.completions.create(**asked, seed=5 + index) for index in range(3)]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in together.choices]
    assert texts == [each.choices[0].message.content for each in alone] and len(set(texts)) == 3
    usage, one = together.usage, alone[0].usage
    assert usage is not None and one is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (one.prompt_tokens, 24)


async def test_streamed_choices_are_those_of_the_whole_answer(
    official: openai.AsyncOpenAI, worker: LocalWorker
) -> None:
    asked: dict[str, Any] = {"model": worker.served.name, "messages": USER, "max_tokens": 8, "seed": 5, "n": 3}
    asked |= {"temperature": 1.5, "logprobs": True}
    whole = await official.chat.completions.create(**asked)
    stream = await official.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *chunks, last = [chunk async for chunk in stream]
    for expected in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == expected.index]
        assert own[0].delta.role == "assistant" and [each.delta.role for each in own[1:]] == [None] * (len(own) - 1)
        assert "".join(each.delta.content or "" for each in own) == expected.message.content
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [expected.finish_reason]
        tokens = [token.token for each in own if each.logprobs for token in each.logprobs.content or []]
        assert expected.logprobs is not None and expected.logprobs.content is not None
        assert tokens == [token.token for token in expected.logprobs.content]
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 24
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


async def test_several_prompts_are_answered_in_order(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    asked: dict[str, Any] = {"model": worker.served.name, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    prompts = ["Hello", "naïve 猫", "x"]
    alone = [await official.completions.create(**asked, prompt=prompt) for prompt in prompts]
    together = await official.completions.create(**asked, prompt=prompts)
    expected = [each.choices[0] for each in alone]
    assert [choice.text for choice in together.choices] == [choice.text for choice in expected]
    for choice, same in zip(together.choices, expected, strict=True):
        assert choice.logprobs is not None and same.logprobs is not None
        assert choice.logprobs.text_offset == same.logprobs.text_offset
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone if each.usage)
    tokenizer = worker.generator.tokenizer
    assert tokenizer is not None
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    by_ids = await official.completions.create(**asked, prompt=ids, n=2)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in expected for _ in range(2)]
    streamed = ["", "", ""]
    async for chunk in await official.completions.create(**asked, prompt=prompts, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in expected]


async def test_tokens_from_the_cache_are_those_of_earlier_requests(
    official: openai.AsyncOpenAI, worker: LocalWorker
) -> None:
    """The answers to one prompt share its KV, whichever of them are sent."""
    asked: dict[str, Any] = {"model": worker.served.name, "max_tokens": 4, "temperature": 1.5}
    for seed in range(4):
        prompt = f"{seed} naïve 猫 " * 20
        for is_cached in (False, True):
            usage = (await official.completions.create(**asked, prompt=prompt, n=1, best_of=4, seed=seed)).usage
            assert usage is not None and usage.prompt_tokens_details is not None
            assert bool(usage.prompt_tokens_details.cached_tokens) is is_cached


async def test_the_best_are_sent(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    asked: dict[str, Any] = {"model": worker.served.name, "prompt": "Hello", "max_tokens": 8, "temperature": 1.5}
    every = await official.completions.create(**asked, n=4, seed=1, logprobs=0)
    best = await official.completions.create(**asked, n=2, best_of=4, seed=1)
    means = {each.text: sum(each.logprobs.token_logprobs or []) for each in every.choices if each.logprobs}
    assert [choice.text for choice in best.choices] == sorted(means, key=lambda text: -means[text])[:2]
    assert best.choices[0].logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"), [({"n": 129}, "n"), ({"n": 3, "best_of": 2}, "best_of"), ({"best_of": 129}, "best_of")]
)
async def test_numbers_out_of_range(
    official: openai.AsyncOpenAI, worker: LocalWorker, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        body = {"model": worker.served.name, "prompt": "Hello", "stream": stream, **fields}
        with pytest.raises(openai.BadRequestError) as caught:
            await official.post("/completions", body=body, cast_to=object)
        assert caught.value.param == param


async def test_stop_strings_special_tokens_and_truncation(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    asked: dict[str, Any] = {"model": worker.served.name, "prompt": "Hello", "max_tokens": 12, "temperature": 0}

    async def text(**fields: Any) -> str:
        answer: str = (await official.completions.create(**{**asked, **fields})).choices[0].text
        return answer

    whole = await text()
    stop = whole[4:6]
    end = whole.index(stop)
    assert await text(stop=stop) == whole[:end]
    for name in ("include_stop_str_in_output", "no_stop_trim"):
        assert await text(stop=stop, extra_body={name: True}) == whole[: end + 2]
    tokenizer = worker.generator.tokenizer
    assert tokenizer is not None
    special = tokenizer.encode("<|im_start|>")[0]
    only = {"allowed_token_ids": [special], "ignore_eos": True}
    assert await text(extra_body=only) == ""
    assert await text(extra_body={**only, "skip_special_tokens": False}) == "<|im_start|>" * 12
    assert await text(prompt="Goodbye. Hello", extra_body={"truncate_prompt_tokens": 5}) == whole


async def test_echo_begins_with_the_prompt_and_its_logprobs(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    asked: dict[str, Any] = {"model": worker.served.name, "prompt": ["naïve 猫", "Hello"], "max_tokens": 4}
    asked |= {"temperature": 0, "logprobs": 1}
    plain = await official.completions.create(**asked)
    echoed = await official.completions.create(**asked, echo=True)
    tokenizer = worker.generator.tokenizer
    assert tokenizer is not None
    for prompt, alone, choice in zip(asked["prompt"], plain.choices, echoed.choices, strict=True):
        assert choice.text == prompt + alone.text
        logprobs, own, num = choice.logprobs, alone.logprobs, len(tokenizer.encode(prompt))
        assert logprobs is not None and logprobs.tokens is not None and logprobs.token_logprobs is not None
        assert own is not None and own.tokens is not None
        texts_of = TokenTexts(tokenizer)
        assert logprobs.tokens == [texts_of.distinct(each) for each in tokenizer.encode(prompt)] + own.tokens
        assert logprobs.token_logprobs[0] is None and all(each < 0 for each in logprobs.token_logprobs[1:])
        assert logprobs.top_logprobs is not None and logprobs.top_logprobs[0] is None
        # As evaluations read them: whether the prompt's end is what the model would have said.
        for token, value, top in list(
            zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
        )[1:]:
            assert top[token] == value
        length = sum(len(tokenizer.text_of(each)) for each in tokenizer.encode(prompt))
        assert logprobs.text_offset is not None and logprobs.text_offset[num] == length
    assert echoed.usage is not None and plain.usage is not None
    assert echoed.usage.completion_tokens == plain.usage.completion_tokens
    texts, offsets = ["", ""], [[], []]  # type: tuple[list[str], list[list[int]]]
    async for chunk in await official.completions.create(**asked, echo=True, stream=True):
        choice_ = chunk.choices[0]
        texts[choice_.index] += choice_.text
        offsets[choice_.index] += (choice_.logprobs.text_offset or []) if choice_.logprobs else []
    assert texts == [choice.text for choice in echoed.choices]
    assert offsets == [choice.logprobs.text_offset for choice in echoed.choices if choice.logprobs]


@pytest.mark.parametrize("several", [{}, {"n": 2}, {"best_of": 3}], ids=str)
async def test_without_tokens_the_answer_is_the_echoed_prompt(
    official: openai.AsyncOpenAI, worker: LocalWorker, several: dict[str, int]
) -> None:
    asked: dict[str, Any] = {"model": worker.served.name, "prompt": ["naïve 猫" * 8, "Hello"], "logprobs": 2, **several}
    asked |= {"echo": True, "temperature": 0}
    with_token = await official.completions.create(**asked, max_tokens=1)
    # The second time the prompt is in the prefix cache, and its log-probabilities are not.
    alone = await official.completions.create(**asked, max_tokens=0)
    assert alone.usage is not None and with_token.usage is not None
    assert (alone.usage.completion_tokens, alone.usage.prompt_tokens) == (0, with_token.usage.prompt_tokens)
    assert len(alone.choices) == len(with_token.choices) == 2 * several.get("n", 1)
    for choice, longer in zip(alone.choices, with_token.choices, strict=True):
        assert choice.text == asked["prompt"][choice.index // several.get("n", 1)]
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None and longer.logprobs is not None
        assert choice.logprobs.tokens is not None and longer.logprobs.tokens is not None
        assert choice.logprobs.tokens == longer.logprobs.tokens[:-1]
        values, expected = choice.logprobs.token_logprobs, longer.logprobs.token_logprobs
        assert values is not None and expected is not None
        # Which prompts share a step can move the last bits.
        assert values[1:] == pytest.approx(expected[1:-1], abs=1e-3) and values[0] is None
    texts = [""] * len(alone.choices)
    async for chunk in await official.completions.create(**asked, max_tokens=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in alone.choices]
    plain = await official.completions.create(**{**asked, "logprobs": None}, max_tokens=0)
    assert [choice.text for choice in plain.choices] == texts
    assert all(choice.logprobs is None for choice in plain.choices)


async def test_no_tokens_without_echo_are_refused(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    for echo in (False, None):
        with pytest.raises(openai.BadRequestError) as refused:
            await official.completions.create(model=worker.served.name, prompt="Hello", max_tokens=0, echo=echo)
        assert refused.value.param == "max_tokens" and "echo" in str(refused.value)


async def test_logprobs_and_tokens_of_the_prompt(official: openai.AsyncOpenAI, worker: LocalWorker) -> None:
    extra = {"prompt_logprobs": 2, "return_token_ids": True}
    asked: dict[str, Any] = {"model": worker.served.name, "max_tokens": 2, "temperature": 0, "extra_body": extra}
    completion = (await official.completions.create(**asked, prompt="Hello", n=2)).to_dict()
    chat = (await official.chat.completions.create(**asked, messages=USER)).to_dict()
    tokenizer = worker.generator.tokenizer
    assert tokenizer is not None
    choices: Any = completion["choices"]
    for holder in (*choices, chat):
        ids, logprobs = holder["prompt_token_ids"], holder["prompt_logprobs"]
        assert len(logprobs) == len(ids) and logprobs[0] is None
        for token_id, each in list(zip(ids, logprobs, strict=True))[1:]:
            assert each[str(token_id)]["logprob"] < 0 and len(each) in (2, 3)
            assert {1, 2} <= {value["rank"] for value in each.values()}
    assert choices[0]["prompt_token_ids"] == tokenizer.encode("Hello")
    streamed = [
        each.to_dict() async for each in await official.chat.completions.create(**asked, messages=USER, stream=True)
    ]
    assert streamed[0]["prompt_logprobs"] == chat["prompt_logprobs"]
    assert all("prompt_token_ids" not in each for each in streamed[1:])
