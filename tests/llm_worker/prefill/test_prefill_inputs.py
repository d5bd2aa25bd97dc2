"""What a worker cannot answer that has its prompts computed elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.llm_worker.frontend.serving import serving
from tests.llm_worker.prefill.test_client import connected
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.generation.generation import Generator
from vitrine_vlm.llm_worker.generation.layout_cache import LayoutCache
from vitrine_vlm.llm_worker.generation.request_inputs import PromptContext
from vitrine_vlm.llm_worker.prefill.prefill_inputs import PrefillInputs


async def test_log_probabilities_of_the_prompt_are_refused(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    async with connected(tmp_path, "shm") as (prefill_worker, client), serving(qwen3_vl_folder) as worker:
        context = PromptContext(worker.engine, worker.prompt_config, None)
        generator = Generator(context, partial(PrefillInputs, client, LayoutCache()), 4)
        asked = GenerationRequest("request", [1, 2], (), SamplingParams(prompt_logprobs=0))
        with pytest.raises(BadRequest, match="prefill workers") as refused:
            async for _ in generator.generate(asked):
                pass
        assert refused.value.param == "prompt_logprobs"
        assert prefill_worker.requests == []
        await worker.until_idle()
