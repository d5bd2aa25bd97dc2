"""Log-probabilities of tokens that are not whole characters."""

from __future__ import annotations

from pathlib import Path

from vitrine_vlm.llm_worker.engine.request import TokenLogprobs
from vitrine_vlm.llm_worker.frontend.openai_answers import AnswerOptions, AnswerWriter
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, StageTimings
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

FINISHED = Finished("stop", 1, 0, 4, StageTimings())


def test_chat_logprobs_carry_bytes_that_make_up_the_text(qwen3_vl_folder: Path) -> None:
    tokenizer = PromptTokenizer(open_checkpoint(str(qwen3_vl_folder)))
    ids = tokenizer.encode("🐈")
    assert len(ids) == 4  # a token a byte
    deltas = [Delta([each], "", [TokenLogprobs(each, -1.0, ((each, -1.0), (ids[0], -2.0)))]) for each in ids]
    content = AnswerWriter("chat", "id", "m", tokenizer).answer(deltas, FINISHED)["choices"][0]["logprobs"]
    tokens = content["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == "🐈"
    assert [token["top_logprobs"][1]["bytes"] for token in tokens] == [[0xF0]] * 4


def test_without_a_tokenizer_ids_stand_for_text_and_bytes_are_unknown() -> None:
    deltas = [Delta([7], "", [TokenLogprobs(7, -1.0)])]
    writer = AnswerWriter("chat", "id", "m", None, AnswerOptions(return_token_ids=True))
    choice = writer.answer(deltas, FINISHED)["choices"][0]
    assert choice["logprobs"]["content"] == [
        {"token": "token_id:7", "logprob": -1.0, "bytes": None, "top_logprobs": []}
    ]
    assert choice["token_ids"] == [7]
