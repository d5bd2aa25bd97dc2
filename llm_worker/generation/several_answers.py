"""Several answers in one request: to several prompts, and several to each of them.

The answers are numbered by prompt: with n answers each, those to prompt p are p * n, p * n + 1, and so on. The first to
a prompt computes it; the others begin with its second token, so that they find its KV in the prefix cache, and none of
its media is encoded again but one that reaches into the prompt's last, partial block. (A decode worker has the first
token before the KV.) Each draws with a seed of its own: the request's seed plus its number among the answers to the
prompt, as with vLLM.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from statistics import fmean

from vitrine_vlm.embedding_transport.receiving.event_stream import EventStream
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.generation.events import (
    AnswerEvent,
    Delta,
    Finished,
    GenerationRequest,
    Observe,
    PromptLogprobs,
    Started,
)
from vitrine_vlm.llm_worker.generation.generation import Generator
from vitrine_vlm.types import Layout

MAX_ANSWERS = 128


def check_num_answers(num_prompts: int, n: int, best_of: int) -> None:
    """
    Raises:
        BadRequest: a number is out of range.
    """
    if not 1 <= n <= MAX_ANSWERS:
        raise BadRequest(f"n is {n}: it must be between 1 and {MAX_ANSWERS}", "n")
    if not n <= best_of <= MAX_ANSWERS:
        raise BadRequest(f"best_of is {best_of}: it must be between n, {n}, and {MAX_ANSWERS}", "best_of")
    if num_prompts * best_of > MAX_ANSWERS:
        raise BadRequest(
            f"{num_prompts} prompts with {best_of} answers each are {num_prompts * best_of} answers: at most "
            f"{MAX_ANSWERS} are accepted in one request"
        )


async def generate_answers(
    generator: Generator, prompts: Sequence[GenerationRequest], n: int, best_of: int, observe: Observe
) -> AsyncGenerator[AnswerEvent]:
    """Yields the events of n answers to each prompt, as they come.

    These are one Started a prompt, PromptLogprobs where asked for, and of each answer Deltas and one Finished. Where
    `best_of` is larger than n, as many answers are generated, and those n follow in the end, best first and in
    one Delta each, whose tokens have the highest mean log-probability. Closing the iteration cancels everything.

    Args:
        prompts: requests for one answer each.
        n, best_of: 0 for 1 and n.
        observe: called with each event of all answers that are generated; with every Finished at the end.

    Raises:
        BadRequest: see `check_num_answers`.
        Overloaded: the engine cannot hold all answers now.
        VitrineError: why an answer failed, which ends the others.
    """
    n = n or 1
    best_of = best_of or n
    check_num_answers(len(prompts), n, best_of)
    generator.check_capacity(len(prompts) * best_of)
    if best_of == n or prompts[0].prompt_only:
        events = _Answers(generator, prompts, n, observe).events()
    else:
        events = _best(_Answers(generator, [_scored(each) for each in prompts], best_of, observe), prompts, n, best_of)
    async with aclosing(events):
        async for event in events:
            yield event


async def _best(
    answers: _Answers, prompts: Sequence[GenerationRequest], n: int, best_of: int
) -> AsyncGenerator[AnswerEvent]:
    deltas: dict[int, list[Delta]] = {}
    finished: dict[int, Finished] = {}
    async with aclosing(answers.events()) as events:
        async for answer, event in events:
            if isinstance(event, Started | PromptLogprobs):
                yield AnswerEvent(answer // best_of * n, event)
            elif isinstance(event, Delta):
                deltas.setdefault(answer, []).append(event)
            else:
                finished[answer] = event
    for number, prompt in enumerate(prompts):
        whole = {answer: _joined(deltas[answer]) for answer in range(number * best_of, (number + 1) * best_of)}
        best = sorted(whole, key=lambda answer: -_mean_logprob(whole[answer]))[:n]
        # The first one that is sent stands for the one that has computed the prompt.
        num_cached = finished[number * best_of].num_cached_tokens
        finished[best[0]] = replace(finished[best[0]], num_cached_tokens=num_cached)
        for place, answer in enumerate(best, number * n):
            delta = whole[answer]
            yield AnswerEvent(place, replace(delta, logprobs=[]) if prompt.sampling.logprobs is None else delta)
            yield AnswerEvent(place, finished[answer])


def _scored(request: GenerationRequest) -> GenerationRequest:
    """The request with log-probabilities of its tokens."""
    return replace(request, sampling=replace(request.sampling, logprobs=request.sampling.logprobs or 0))


def _joined(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        [token_id for delta in deltas for token_id in delta.token_ids],
        "".join(delta.text for delta in deltas),
        [each for delta in deltas for each in delta.logprobs],
    )


def _mean_logprob(delta: Delta) -> float:
    return fmean(each.logprob for each in delta.logprobs)


class _Answers:
    """The answers of one request, a task each, which emit into one stream."""

    def __init__(self, generator: Generator, prompts: Sequence[GenerationRequest], n: int, observe: Observe) -> None:
        self._generator, self._prompts, self._n, self._observe = generator, prompts, n, observe
        self._stream: EventStream[AnswerEvent] = EventStream(lambda event: None)

    async def events(self) -> AsyncGenerator[AnswerEvent]:
        finished: list[AnswerEvent] = []
        async with aclosing(self._stream.read(self._begin)) as events:
            async for event in events:
                if isinstance(event.event, Finished):
                    finished.append(event)
                    if len(finished) == len(self._prompts) * self._n:
                        for answer, each in finished:
                            self._observe(each, answer)
                else:
                    self._observe(event.event, event.answer)
                yield event

    async def _begin(self) -> None:
        for number in range(len(self._prompts)):
            self._stream.start(partial(self._first, number))

    async def _first(self, number: int) -> None:
        """Generates the first answer to a prompt, and starts the others once the prompt's KV is here."""
        layouts: list[Layout] = []
        first = self._prompts[number]
        num_deltas, has_started_others = 0, False
        async with aclosing(self._generator.generate(first)) as events:
            async for event in events:
                await self._stream.emit(AnswerEvent(number * self._n, event))
                if isinstance(event, Started):
                    layouts = event.layouts
                    if not first.media:  # so that a long text is not tokenized for each answer
                        first = replace(first, prompt=event.prompt_token_ids, truncate_prompt_tokens=None)
                elif isinstance(event, Delta):
                    num_deltas += 1
                if not has_started_others and (num_deltas == 2 or isinstance(event, Finished)):
                    has_started_others = True
                    for index in range(1, self._n):
                        self._stream.start(partial(self._other, first, number, index, layouts))

    async def _other(self, first: GenerationRequest, number: int, index: int, layouts: list[Layout]) -> None:
        seed = first.sampling.seed
        # Log-probabilities of the prompt come with the first answer, and would need the whole prompt computed again.
        seed_of_its_own = seed + index if seed is not None else None
        sampling = replace(first.sampling, seed=seed_of_its_own, prompt_logprobs=None)
        request = replace(first, request_id=f"{first.request_id}-{index}", sampling=sampling)
        async with aclosing(self._generator.generate(request, layouts=layouts)) as events:
            async for event in events:
                if not isinstance(event, Started):
                    await self._stream.emit(AnswerEvent(number * self._n + index, event))
