"""Answers of the OpenAI API, whole or as streamed chunks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from vitrine_vlm.llm_worker.engine.request import TokenLogprobs
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, Started
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer

AnswerKind = Literal["chat", "completion"]


@dataclass(frozen=True)
class AnswerOptions:
    """What a request wants to see of its answer.

    return_token_ids, tokens_as_ids: extensions of OpenAI's fields; the latter is for log-probabilities.
    include_usage: in a last chunk, and null in the others; continuous_usage: so far, in every chunk.
    """

    return_token_ids: bool = False
    tokens_as_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


@dataclass
class AnswerWriter:
    """Writes one answer, whole or in chunks. `timings` and `token_ids` are extensions of OpenAI's fields."""

    kind: AnswerKind
    request_id: str
    model: str
    tokenizer: PromptTokenizer | None
    options: AnswerOptions = AnswerOptions()
    created: int = field(default_factory=lambda: int(time.time()))
    _text_offset: int = field(default=0, init=False)
    _num_prompt_tokens: int = field(default=0, init=False)
    _num_completion_tokens: int = field(default=0, init=False)

    def answer(self, deltas: list[Delta], finished: Finished) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finished.finish_reason}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs([each for delta in deltas for each in delta.logprobs])
        if self.options.return_token_ids:
            choice["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._body(kind, [choice]) | self._usage_and_timings(finished)

    def start(self, started: Started) -> None:
        """Is called before the first chunk of a stream."""
        self._num_prompt_tokens = started.num_prompt_tokens

    def role_chunk(self) -> dict[str, Any]:
        """The first chunk of a streamed chat, which names the role."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def delta_chunk(self, delta: Delta, finish_reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"finish_reason": finish_reason}
        if self.kind == "chat":
            choice["delta"] = {"content": delta.text} if delta.text else {}
        else:
            choice["text"] = delta.text
        choice["logprobs"] = self._logprobs(delta.logprobs)
        if self.options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        self._num_completion_tokens += len(delta.token_ids)
        return self._chunk(choice)

    def usage_chunk(self, finished: Finished) -> dict[str, Any]:
        """The last chunk, where the request asked for usage."""
        return self._body(self._chunk_kind, []) | self._usage_and_timings(finished)

    @staticmethod
    def _usage_and_timings(finished: Finished) -> dict[str, Any]:
        usage = _usage(finished.num_prompt_tokens, finished.num_completion_tokens)
        usage["prompt_tokens_details"] = {"cached_tokens": finished.num_cached_tokens}
        timings = {name: round(value, 3) for name, value in vars(finished.timings).items()}
        return {"usage": usage, "timings": timings}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        body = self._body(self._chunk_kind, [{"index": 0, "logprobs": None} | choice])
        if self.options.continuous_usage:
            body["usage"] = _usage(self._num_prompt_tokens, self._num_completion_tokens)
        elif self.options.include_usage:
            body["usage"] = None
        return body

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        if not logprobs:
            return None
        if self.kind == "chat":
            return {"content": [self._chat_logprob(each) for each in logprobs], "refusal": None}
        tokens = [self._text(each.token_id) for each in logprobs]
        *offsets, self._text_offset = accumulate(map(len, tokens), initial=self._text_offset)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [{self._text(token_id): value for token_id, value in each.top} for each in logprobs],
            "text_offset": offsets,
        }

    def _chat_logprob(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token_id, value) for token_id, value in logprobs.top]
        return self._token(logprobs.token_id, logprobs.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        # A token may be part of a character: then its bytes are exact, and its text is not.
        data = None if self.tokenizer is None else list(self.tokenizer.bytes_of(token_id))
        return {"token": self._text(token_id), "logprob": logprob, "bytes": data}

    def _text(self, token_id: int) -> str:
        """The token's text; without a tokenizer its id, so that different tokens have different texts."""
        if self.tokenizer is None or self.options.tokens_as_ids:
            return f"token_id:{token_id}"
        return self.tokenizer.text_of(token_id)


def _usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }
