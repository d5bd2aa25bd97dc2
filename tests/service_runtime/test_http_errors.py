"""HTTP statuses of all errors, and the table in docs/errors.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.embedding_transport.wire.test_grpc_status import ERRORS
from vitrine_vlm.embedding_transport.wire.grpc_status import STATUS_BY_CODE as GRPC_STATUS_BY_CODE
from vitrine_vlm.errors import Overloaded, VitrineError, WorkerUnavailable, as_vitrine_error
from vitrine_vlm.service_runtime.http_errors import STATUS_BY_CODE, error_response

DOCS = Path(__file__).parents[2] / "docs" / "errors.md"


def test_the_table_has_a_row_for_every_code_and_no_other() -> None:
    assert set(STATUS_BY_CODE) == {error.code for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_answers_are_in_openais_form(error: type[VitrineError]) -> None:
    response = error_response(error("what was wrong"))
    assert response.status == STATUS_BY_CODE[error.code]
    assert isinstance(response.text, str)
    body = json.loads(response.text)["error"]
    assert (body["message"], body["code"], body["param"]) == ("what was wrong", error.code, None)
    assert body["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    assert ("Retry-After" in response.headers) == (response.status in (429, 503))
    # Requests that are sent again must not come back over the same connection.
    assert (response.keep_alive is False) == (error is WorkerUnavailable)


def test_foreign_exceptions_keep_their_text_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    error = as_vitrine_error(RuntimeError("the password is swordfish"))
    assert "swordfish" not in str(error)
    assert "swordfish" in caplog.text


def test_the_docs_list_every_code_with_its_statuses() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+, \w+) \|", DOCS.read_text(), re.MULTILINE))
    assert rows == {code: f"{status}, {GRPC_STATUS_BY_CODE[code].name}" for code, status in STATUS_BY_CODE.items()}


def test_an_overload_has_retry_after_in_whole_seconds() -> None:
    assert error_response(Overloaded("full", retry_after_s=2.3)).headers["Retry-After"] == "3"
    assert error_response(Overloaded("full")).headers["Retry-After"] == "1"
