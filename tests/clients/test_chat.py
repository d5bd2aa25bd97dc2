"""Real clients ask about pictures; transformers says what they must be answered."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.client_process import ClientError
from tests.clients.conftest import Call
from tests.clients.questions import Questions, data_url

CLIENTS = (
    "openai",
    "langchain",
    "litellm",
    "pydantic_ai",
    "node_openai",
    "node_ai_sdk",
    "node_ai_sdk_compatible",
)
# A number, and a sentence of several tokens.
QUESTIONS = {
    "text": ("What is written here?", ()),
    "one picture": ("How many shapes are green?", ("shapes",)),
    "two pictures": ("What shapes and colors are in this picture?", ("number", "shapes")),
}
SENTENCE = ("What shapes and colors are in this picture?", ("shapes",))


def asked(question: str, pictures: tuple[str, ...]) -> dict[str, Any]:
    return {"question": question, "pictures": [data_url(each) for each in pictures]}


@pytest.mark.parametrize("kind", QUESTIONS)
@pytest.mark.parametrize("client", CLIENTS)
def test_answers_are_those_of_transformers(call: Call, questions: Questions, client: str, kind: str) -> None:
    expected = questions.expected(*QUESTIONS[kind])
    answer = call(client, "ask", **asked(*QUESTIONS[kind]))
    assert answer["text"] == expected.text
    assert answer["finish_reason"] == "stop"
    used = (answer["prompt_tokens"], answer["completion_tokens"])
    assert used == (expected.prompt_tokens, expected.completion_tokens)


@pytest.mark.parametrize("client", CLIENTS)
def test_streams_have_text_usage_and_reason(call: Call, questions: Questions, client: str) -> None:
    expected = questions.expected(*SENTENCE)
    answer = call(client, "stream", **asked(*SENTENCE))
    assert "".join(answer["pieces"]) == expected.text
    assert len(answer["pieces"]) > 5
    assert answer["finish_reason"] == "stop"
    used = (answer["prompt_tokens"], answer["completion_tokens"])
    assert used == (expected.prompt_tokens, expected.completion_tokens)


def test_the_clients_own_accumulator_takes_the_chunks(call: Call, questions: Questions) -> None:
    assert call("openai", "accumulate", question=SENTENCE[0]) == questions.expected(SENTENCE[0]).text


@pytest.mark.parametrize("client", ["openai", "langchain", "litellm", "node_openai"])
def test_n_answers_to_one_question(call: Call, client: str) -> None:
    answers = call(client, "several", question="Hello", n=4)
    assert len(answers) == 4 and len(set(answers)) > 1
    assert call(client, "several", question="Hello", n=4) == answers, "the same seed"


@pytest.mark.parametrize("client", ["openai", "langchain", "litellm", "pydantic_ai", "node_openai", "node_ai_sdk"])
def test_logprobs_are_those_of_transformers(call: Call, questions: Questions, client: str) -> None:
    expected = questions.expected(SENTENCE[0], max_tokens=8)
    answer = call(client, "logprobs", question=SENTENCE[0])
    assert len(answer) > 3
    assert [token for token, _, _ in answer] == list(expected.tokens)
    for (_, own, top), values in zip(answer, expected.logprobs, strict=True):
        assert (own, *top) == pytest.approx(values, abs=1e-3)


@pytest.mark.parametrize("client", [each for each in CLIENTS if each != "node_ai_sdk_compatible"])
def test_responses_whole_and_streamed(call: Call, questions: Questions, client: str) -> None:
    expected = questions.expected(*SENTENCE)
    whole = call(client, "respond", **asked(*SENTENCE))
    streamed = call(client, "respond_stream", **asked(*SENTENCE))
    assert whole["text"] == "".join(streamed["pieces"]) == expected.text
    assert len(streamed["pieces"]) > 5
    for answer in (whole, streamed):
        used = (answer["prompt_tokens"], answer["completion_tokens"])
        assert used == (expected.prompt_tokens, expected.completion_tokens)


@pytest.mark.parametrize("client", ["openai", "node_openai"])
def test_models_are_listed(call: Call, client: str) -> None:
    assert call(client, "models") == ["vitrine-tiny-vlm"]


def test_litellms_provider_for_vllm(call: Call, questions: Questions) -> None:
    answer = call("litellm", "ask", **asked(*SENTENCE), provider="hosted_vllm")
    assert answer["text"] == questions.expected(*SENTENCE).text


LONG = "x " * 20_000
NO_SERVER = "http://127.0.0.1:9/v1"
# The class of the client's exceptions for: a wrong model, a wrong value, a prompt that is too long, no server.
ERRORS = {
    "openai": (
        "openai.NotFoundError",
        "openai.BadRequestError",
        "openai.BadRequestError",
        "openai.APIConnectionError",
    ),
    "langchain": (
        "openai.NotFoundError",
        "openai.BadRequestError",
        "langchain_core.ContextOverflowError",
        "openai.APIConnectionError",
    ),
    "litellm": (
        "litellm.NotFoundError",
        "litellm.BadRequestError",
        "litellm.ContextWindowExceededError",
        "litellm.InternalServerError",
    ),
    "pydantic_ai": (
        "pydantic_ai.ModelHTTPError",
        "pydantic_ai.ModelHTTPError",
        "pydantic_ai.ModelHTTPError",
        "pydantic_ai.ModelAPIError",
    ),
    "node_openai": ("NotFoundError", "BadRequestError", "BadRequestError", "APIConnectionError"),
    "node_ai_sdk": ("AI_APICallError",) * 4,
    "node_ai_sdk_compatible": ("AI_APICallError",) * 4,
}


@pytest.mark.parametrize("client", ERRORS)
def test_errors_are_the_clients_own(call: Call, client: str) -> None:
    wrong: list[dict[str, Any]] = [{"model": "other"}, {"temperature": 3}, {"question": LONG}, {"base_url": NO_SERVER}]
    found = []
    for arguments, expected in zip(wrong, ERRORS[client], strict=True):
        with pytest.raises(ClientError) as caught:
            call(client, "ask", **{"question": "Hello", **arguments})
        found.append(caught.value)
        assert expected in caught.value.classes, caught.value
    no_model, wrong_value, too_long, _ = found
    assert "other" in no_model.message and "temperature" in wrong_value.message
    assert "--max-model-len" in too_long.message
