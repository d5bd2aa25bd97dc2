"""Public traces become the simulation's own; the samples are made up in the documented formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitrine_vlm.simulation.convert_trace import main
from vitrine_vlm.simulation.workload import read_trace

AZURE_LLM = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47.1805900,396,0
"""
AZURE_LMM = """TIMESTAMP,NumImages,ContextTokens,GeneratedTokens
2024-10-15T12:00:00.500Z,2,949,126
2024-10-15T12:00:00.250Z,0,770,491
2024-10-15T12:00:01.000Z,16,40,5
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 4052, "input_length": 2290, "output_length": 316, "hash_ids": [0, 3]}
"""


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(form: str, text: str, *options: str):  # type: ignore[no-untyped-def]
        source, trace = tmp_path / "source", tmp_path / "trace.jsonl"
        source.write_text(text)
        assert main([form, str(source), *options]) == 0
        trace.write_text(capsys.readouterr().out)
        return read_trace(trace)

    return run


def test_texts_keep_their_moments_and_tokens(convert) -> None:  # type: ignore[no-untyped-def]
    first, second = convert("azure-llm", AZURE_LLM)
    assert (first.at, first.num_text, first.num_generated, first.pictures) == (0.0, 374, 44, ())
    assert (second.at, second.num_generated) == (pytest.approx(0.5), 1)
    first, second = convert("mooncake", MOONCAKE, "--num-pictures", "1")
    assert (second.at, second.num_text, second.num_generated) == (pytest.approx(3.052), 2290, 316)
    assert len(second.pictures) == 1 and first.pictures != second.pictures


def test_pictures_are_a_part_of_the_context_where_the_trace_counts_them(convert) -> None:  # type: ignore[no-untyped-def]
    requests = convert("azure-lmm", AZURE_LMM)
    assert [len(request.pictures) for request in requests] == [0, 2, 16]
    for request, num_context in zip(requests, (770, 949, 40), strict=True):
        assert request.num_text + sum(picture.num_tokens for picture in request.pictures) == num_context
    assert requests[0].at == 0.0 and requests[2].at == pytest.approx(0.75)
    assert requests == convert("azure-lmm", AZURE_LMM) != convert("azure-lmm", AZURE_LMM, "--seed", "1")


def test_what_is_no_such_trace_is_named_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    for form, text, line in (("azure-lmm", AZURE_LLM, "line 2"), ("mooncake", MOONCAKE + "{}", "line 3")):
        source.write_text(text)
        with pytest.raises(SystemExit):
            main([form, str(source)])
        assert line in capsys.readouterr().err
