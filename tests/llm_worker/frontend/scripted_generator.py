"""A worker that answers what a test says: the random checkpoints cannot call tools by themselves."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from vitrine_vlm.llm_worker.generation.events import (
    Delta,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Observe,
)
from vitrine_vlm.llm_worker.generation.generation import Generator
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.types import Layout


@dataclass
class ScriptedGenerator:
    """The real generator, whose tokens are replaced by those of a script; answers take the scripts in turn.

    requests: what has been asked for.
    """

    generator: Generator
    scripts: Sequence[str]

    def __post_init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self._turns = cycle(self.scripts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    async def generate(
        self,
        request: GenerationRequest,
        observe: Observe = lambda event, answer=0: None,
        layouts: Sequence[Layout] | None = None,
    ) -> AsyncGenerator[GenerationEvent]:
        self.requests.append(request)
        tokenizer = self.generator.tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode(next(self._turns))
        num_tokens = min(len(ids), request.sampling.max_tokens or len(ids))
        detokenizer = tokenizer.detokenizer(request.skip_special_tokens)
        sampling = replace(request.sampling, max_tokens=num_tokens, stop_token_ids=frozenset(), grammar=None)
        script = iter(ids)
        async with aclosing(self.generator.generate(replace(request, sampling=sampling), observe, layouts)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    token_id = next(script)
                    logprobs = [replace(each, token_id=token_id) for each in event.logprobs]
                    yield Delta([token_id], detokenizer.push(token_id), logprobs)
                elif isinstance(event, Finished):
                    yield replace(event, finish_reason="stop" if num_tokens == len(ids) else "length")
                else:
                    yield event


def scripted(served: ServedModel, *scripts: str) -> ServedModel:
    return replace(served, generator=ScriptedGenerator(served.generator, scripts))  # type: ignore[arg-type]
