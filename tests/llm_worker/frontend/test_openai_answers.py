"""Log-probabilities of tokens that are not whole characters."""

from __future__ import annotations

from pathlib import Path

from vitrine_vlm.llm_worker.engine.request import TokenLogprobs
from vitrine_vlm.llm_worker.frontend.openai_answers import AnswerOptions, AnswerWriter, TokenTexts
from vitrine_vlm.llm_worker.generation.events import Delta, Finished, StageTimings, Started
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

FINISHED = Finished("stop", 1, 0, 4, StageTimings())


def test_chat_logprobs_carry_bytes_that_make_up_the_text(qwen3_vl_folder: Path) -> None:
    tokenizer = PromptTokenizer(open_checkpoint(str(qwen3_vl_folder)))
    ids = tokenizer.encode("🐈")
    assert len(ids) == 4  # a token a byte
    deltas = [Delta([each], "", [TokenLogprobs(each, -1.0, ((each, -1.0), (ids[0], -2.0)))]) for each in ids]
    writer = AnswerWriter("chat", "id", "m", TokenTexts(tokenizer))
    for delta in deltas:
        writer.add(0, delta)
    writer.add(0, FINISHED)
    tokens = writer.answer()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == "🐈"
    assert [token["top_logprobs"][1]["bytes"] for token in tokens] == [[0xF0]] * 4


def test_parts_of_characters_have_different_texts_in_completions(qwen3_vl_folder: Path) -> None:
    """Evaluations look whether a token is the most probable one in a table by the tokens' texts."""
    tokenizer = PromptTokenizer(open_checkpoint(str(qwen3_vl_folder)))
    texts = TokenTexts(tokenizer)
    first, second, *_ = tokenizer.encode("🐈")
    assert texts.text(first) == texts.text(second) == "�"
    assert texts.top(TokenLogprobs(first, -3.0, ((second, -0.1),))) == {r"bytes:\xf0": -3.0, r"bytes:\x9f": -0.1}
    (letter,) = tokenizer.encode("a")
    assert texts.distinct(letter) == "a"


def test_without_a_tokenizer_ids_stand_for_text_and_bytes_are_unknown() -> None:
    writer = AnswerWriter("chat", "id", "m", TokenTexts(None), AnswerOptions(return_token_ids=True))
    writer.add(0, Started(2, 0, prompt_token_ids=[3, 4]))
    writer.add(0, Delta([7], "", [TokenLogprobs(7, -1.0)]))
    writer.add(0, FINISHED)
    answer = writer.answer()
    choice = answer["choices"][0]
    assert choice["logprobs"]["content"] == [
        {"token": "token_id:7", "logprob": -1.0, "bytes": None, "top_logprobs": []}
    ]
    assert (choice["token_ids"], answer["prompt_token_ids"]) == ([7], [3, 4])
