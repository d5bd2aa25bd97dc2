"""Answers of the OpenAI API, whole or as streamed chunks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import ItemsView, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from vitrine_vlm.llm_worker.engine.request import TokenLogprobs
from vitrine_vlm.llm_worker.frontend.chat_tool_calls import CallDeltas, choice_with_calls
from vitrine_vlm.llm_worker.frontend.tool_calls import OfferedTools
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, GenerationEvent, PromptLogprobs, Started
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer

AnswerKind = Literal["chat", "completion"]


@dataclass(frozen=True)
class AnswerOptions:
    """What a request wants to see of its answer.

    return_token_ids: of prompt and answer; an extension of OpenAI's fields, as prompt_logprobs is.
    echo: the answer begins with its prompt, in `logprobs`, too. num_answers: to each prompt.
    include_usage: in a last chunk, and null in the others; continuous_usage: so far, in every chunk.
    tools: that a chat's answer may call.
    """

    return_token_ids: bool = False
    prompt_logprobs: bool = False
    echo: bool = False
    num_answers: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    tools: OfferedTools | None = None


class TokenTexts:
    """Texts of tokens, for log-probabilities.

    Args:
        as_ids: shows ids instead of texts, as without a tokenizer, so that different tokens look different.
    """

    def __init__(self, tokenizer: PromptTokenizer | None, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        if self._tokenizer is None or self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.text_of(token_id)

    def distinct(self, token_id: int) -> str:
        """As plain completions have it: the bytes of a token that is a part of a character, so that texts differ."""
        text = self.text(token_id)
        if "\N{REPLACEMENT CHARACTER}" not in text or self._tokenizer is None:
            return text
        data = self._tokenizer.bytes_of(token_id)
        return text if text.encode() == data else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def joined(self, token_ids: Sequence[int]) -> str:
        """The text of all, special tokens included."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False) if self._tokenizer is not None else ""

    def top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens, and the token itself, as plain completions have them."""
        return {self.distinct(token_id): value for token_id, value in _with_itself(logprobs)}

    def prompt_logprob(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        """The same by token id, as vLLM has them of a prompt. rank: where it is known."""
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(logprobs.top, 1)}
        return {
            str(token_id): {"logprob": value, "rank": ranks.get(token_id), "decoded_token": self.text(token_id)}
            for token_id, value in _with_itself(logprobs)
        }

    def logprob(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        """A token's log-probability and its alternatives, as chat completions and responses have them."""
        top = [self._token(token_id, value) for token_id, value in logprobs.top]
        return self._token(logprobs.token_id, logprobs.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        # A token may be part of a character: then its bytes are exact, and its text is not.
        data = None if self._tokenizer is None else list(self._tokenizer.bytes_of(token_id))
        return {"token": self.text(token_id), "logprob": logprob, "bytes": data}


@dataclass
class _Choice:
    """One answer, as far as it has come. deltas: kept where it is written whole; calls: where it is streamed."""

    deltas: list[Delta] = field(default_factory=list)
    finished: Finished | None = None
    num_tokens: int = 0
    text_offset: int = 0
    has_begun: bool = False
    calls: CallDeltas | None = None


class AnswerWriter:
    """Writes the answers of one request, whole or in chunks, with `timings` and `token_ids` beside OpenAI's fields."""

    def __init__(
        self,
        kind: AnswerKind,
        request_id: str,
        model: str,
        texts: TokenTexts,
        options: AnswerOptions = AnswerOptions(),
    ) -> None:
        self.options = options
        self._kind, self._request_id, self._model, self._texts = kind, request_id, model, texts
        self._created = int(time.time())
        # By the first answer to each prompt.
        self._started: dict[int, Started] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self._choices: dict[int, _Choice] = defaultdict(_Choice)

    def add(self, answer: int, event: GenerationEvent) -> None:
        """Keeps an event for `answer`."""
        if isinstance(event, Started):
            self._started[answer] = event
        elif isinstance(event, PromptLogprobs):
            self._prompt_logprobs[answer] = event.logprobs
        elif isinstance(event, Delta):
            self._choices[answer].deltas.append(event)
        else:
            self._choices[answer].finished = event

    def answer(self) -> dict[str, Any]:
        """The whole response, once all answers have ended."""
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        choices = [self._whole(answer, choice) for answer, choice in sorted(self._choices.items())]
        prompt = self._prompt_fields(0) if self._kind == "chat" else {}
        return self._body(kind, choices) | prompt | self._usage_and_timings()

    def chunks(self, answer: int, event: GenerationEvent) -> Iterator[dict[str, Any]]:
        """The chunks that a stream sends for an event."""
        if isinstance(event, Started):
            self._started[answer] = event
            return
        if isinstance(event, PromptLogprobs):
            self._prompt_logprobs[answer] = event.logprobs
            return
        choice = self._choices[answer]
        first, choice.has_begun = not choice.has_begun, True
        prompt = self._prompt_fields(answer) if first else {}
        if first and self._kind == "chat":
            role = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield self._chunk(answer, role) | prompt
            prompt = {}
        elif first and self.options.echo:
            logprobs = self._logprobs(answer, self._echoed_logprobs(answer))
            echo = {"text": self._echoed(answer), "finish_reason": None, "logprobs": logprobs}
            yield self._chunk(answer, echo | prompt)
            prompt = {}
        if first and self.options.tools is not None:
            choice.calls = CallDeltas(self.options.tools)
        if isinstance(event, Delta):
            piece, *others = self._pieces(choice, event.text)
            yield self._delta_chunk(answer, event, prompt | piece | {"finish_reason": None})
            yield from (self._chunk(answer, other | {"finish_reason": None}) for other in others)
        else:
            choice.finished = event
            reason = event.finish_reason
            if choice.calls is not None:
                rest = choice.calls.finish()
                yield from (self._chunk(answer, {"delta": delta, "finish_reason": None}) for delta in rest)
                reason = choice.calls.finish_reason(reason)
            # In a chunk of its own, as OpenAI does: the last token would otherwise wait for it, a whole step.
            piece, *_ = self._pieces(choice, "")
            yield self._delta_chunk(answer, Delta(), prompt | piece | {"finish_reason": reason})

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, where the request asked for usage."""
        return self._body(self._chunk_kind, []) | self._usage_and_timings()

    def _whole(self, answer: int, choice: _Choice) -> dict[str, Any]:
        assert choice.finished is not None
        text = self._echoed(answer) + "".join(delta.text for delta in choice.deltas)
        body: dict[str, Any] = {"index": answer, "finish_reason": choice.finished.finish_reason}
        if self.options.tools is not None:
            body |= choice_with_calls(text, choice.finished.finish_reason, self.options.tools)
        elif self._kind == "chat":
            body["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            body |= {"text": text, **self._prompt_fields(answer)}
        logprobs = [each for delta in choice.deltas for each in delta.logprobs]
        body["logprobs"] = self._logprobs(answer, [*self._echoed_logprobs(answer), *logprobs])
        if self.options.return_token_ids:
            body["token_ids"] = [token_id for delta in choice.deltas for token_id in delta.token_ids]
        return body

    def _prompt_fields(self, answer: int) -> dict[str, Any]:
        """What vLLM says of the prompt: of a chat in the response, of completions in each choice."""
        fields: dict[str, Any] = {}
        if self.options.return_token_ids:
            fields["prompt_token_ids"] = self._prompt_of(answer)
        if self.options.prompt_logprobs:
            fields["prompt_logprobs"] = [
                each and self._texts.prompt_logprob(each) for each in self._prompt_logprobs[self._first(answer)]
            ]
        return fields

    def _prompt_of(self, answer: int) -> list[int]:
        return self._started[self._first(answer)].prompt_token_ids

    def _first(self, answer: int) -> int:
        """The first answer to the same prompt."""
        return answer - answer % self.options.num_answers

    def _echoed(self, answer: int) -> str:
        return self._texts.joined(self._prompt_of(answer)) if self.options.echo else ""

    def _echoed_logprobs(self, answer: int) -> list[TokenLogprobs | None]:
        return self._prompt_logprobs.get(self._first(answer), []) if self.options.echo else []

    def _pieces(self, choice: _Choice, text: str) -> list[dict[str, Any]]:
        """The text in the route's form, in at least one piece."""
        if self._kind == "completion":
            return [{"text": text}]
        if choice.calls is not None:
            return [{"delta": delta} for delta in choice.calls.push(text) or [{}]]
        return [{"delta": {"content": text} if text else {}}]

    def _delta_chunk(self, answer: int, delta: Delta, body: dict[str, Any]) -> dict[str, Any]:
        """The chunk of a delta, whose text is in `body` already."""
        choice = self._choices[answer]
        body["logprobs"] = self._logprobs(answer, delta.logprobs)
        if self.options.return_token_ids:
            body["token_ids"] = delta.token_ids
        choice.num_tokens += len(delta.token_ids)
        return self._chunk(answer, body)

    def _usage_and_timings(self) -> dict[str, Any]:
        finished = [each.finished for each in self._choices.values() if each.finished is not None]
        # Of several answers to a prompt only the first computes it.
        firsts = [self._choices[answer].finished for answer in self._started]
        usage = _usage(self._num_prompt_tokens, sum(each.num_completion_tokens for each in finished))
        usage["prompt_tokens_details"] = {"cached_tokens": sum(each.num_cached_tokens for each in firsts if each)}
        timings = {
            name: round(max(getattr(each.timings, name) for each in finished), 3) for name in vars(finished[0].timings)
        }
        return {"usage": usage, "timings": timings}

    @property
    def _num_prompt_tokens(self) -> int:
        return sum(started.num_prompt_tokens for started in self._started.values())

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._kind == "chat" else "text_completion"

    def _chunk(self, answer: int, choice: dict[str, Any]) -> dict[str, Any]:
        body = self._body(self._chunk_kind, [{"index": answer, "logprobs": None} | choice])
        if self.options.continuous_usage:
            num_tokens = sum(each.num_tokens for each in self._choices.values())
            body["usage"] = _usage(self._num_prompt_tokens, num_tokens)
        elif self.options.include_usage:
            body["usage"] = None
        return body

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._request_id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _logprobs(self, answer: int, logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any] | None:
        """Log-probabilities in the route's form. None, of an echoed prompt's first token, is only in completions."""
        if not logprobs:
            return None
        choice = self._choices[answer]
        if self._kind == "chat":
            return {"content": [self._texts.logprob(each) for each in logprobs if each], "refusal": None}
        ids = [each.token_id if each else self._prompt_of(answer)[0] for each in logprobs]
        lengths = (len(self._texts.text(each)) for each in ids)
        *offsets, choice.text_offset = accumulate(lengths, initial=choice.text_offset)
        return {
            "tokens": [self._texts.distinct(each) for each in ids],
            "token_logprobs": [each and each.logprob for each in logprobs],
            "top_logprobs": [each and self._texts.top(each) for each in logprobs],
            "text_offset": offsets,
        }


def _with_itself(logprobs: TokenLogprobs) -> ItemsView[int, float]:
    return (dict(logprobs.top) | {logprobs.token_id: logprobs.logprob}).items()


def _usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }
