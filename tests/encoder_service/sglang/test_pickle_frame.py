"""The opcodes are those that pickletools reads: each value arrives as it was written."""

from __future__ import annotations

import io
import pickletools
from typing import Any

import pytest
import torch

from vitrine_vlm.encoder_service.sglang.frames import PartId, error_message, rows_message
from vitrine_vlm.encoder_service.sglang.pickle_frame import EnumMember, Global, Value, pickled_object
from vitrine_vlm.encoder_service.sglang.versions import receiver_class
from vitrine_vlm.errors import BadRequest, EncoderUnavailable, InternalError, NotAnImage, Overloaded
from vitrine_vlm.types import Layout

CLASS = Global("package.module", "Name")


def opcodes(data: bytes) -> list[tuple[str, Any]]:
    """Read without making any object."""
    return [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [("NONE", None)]),
        (True, [("NEWTRUE", None)]),
        (False, [("NEWFALSE", None)]),
        (0, [("BININT", 0)]),
        (-(2**31), [("BININT", -(2**31))]),
        (2**31, [("LONG1", 2**31)]),
        (-(2**40), [("LONG1", -(2**40))]),
        (0.1, [("BINFLOAT", 0.1)]),
        ("ünïcode\n", [("BINUNICODE", "ünïcode\n")]),
        ("\ud800", [("BINUNICODE", "\ud800")]),
        ([], [("EMPTY_LIST", None), ("MARK", None), ("APPENDS", None)]),
        ([1, "a"], [("EMPTY_LIST", None), ("MARK", None), ("BININT", 1), ("BINUNICODE", "a"), ("APPENDS", None)]),
        (CLASS, [("GLOBAL", "package.module Name")]),
        (
            EnumMember(CLASS, 2),
            [("GLOBAL", "package.module Name"), ("BININT", 2), ("TUPLE1", None), ("REDUCE", None)],
        ),
    ],
)
def test_a_value_is_written_as_it_is_read(value: Value, expected: list[tuple[str, Any]]) -> None:
    before = [("PROTO", 2), ("GLOBAL", "package.module Name"), ("EMPTY_TUPLE", None), ("NEWOBJ", None)]
    state = [("EMPTY_DICT", None), ("MARK", None), ("BINUNICODE", "key"), *expected, ("SETITEMS", None)]
    data = pickled_object(CLASS, {"key": value})
    assert opcodes(data) == [*before, *state, ("BUILD", None), ("STOP", None)]
    pickletools.dis(data, out=io.StringIO())  # also checks the stack


def names_in(data: bytes) -> set[str]:
    return {argument for name, argument in opcodes(data) if name == "GLOBAL"}


@pytest.mark.parametrize(
    ("version", "module"),
    [
        ("0.5.17", "sglang.srt.disaggregation.encode_receiver"),
        ("0.5.18.post1", "sglang.srt.disaggregation.encode_receiver"),
        ("0.5.19", "sglang.srt.disaggregation.encoder.receiver"),
        ("0.5.23", "sglang.srt.disaggregation.encoder.receiver"),
    ],
)
def test_the_class_is_that_of_the_version(version: str, module: str, caplog: pytest.LogCaptureFixture) -> None:
    assert receiver_class(version).name == Global(module, "EmbeddingData")
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.5.16", "0.5.24", "0.6.0", "1.0.0"])
def test_an_unknown_version_is_warned_of(version: str, caplog: pytest.LogCaptureFixture) -> None:
    receiver_class(version)
    assert f"SGLang {version} is unknown" in caplog.text and "0.5.17 to 0.5.23" in caplog.text


@pytest.mark.parametrize("version", ["", "0.5", "latest", "v0.5.20", "0.5.20 "])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match="--sglang-version"):
        receiver_class(version)


def test_rows_are_not_copied_and_their_dtype_is_named() -> None:
    rows_TW = torch.arange(12, dtype=torch.bfloat16).view(4, 3)
    part = PartId("r_local_part_0", 2, 0, "IMAGE")
    layouts = [Layout("image", (1, 2, 4), 2), Layout("image", (1, 2, 4), 2)]
    header, rows = rows_message(receiver_class("0.5.20"), part, layouts, rows_TW)
    assert isinstance(header, bytes) and isinstance(rows, memoryview)
    expected = {"sglang.srt.disaggregation.encoder.receiver EmbeddingData", "torch bfloat16"}
    assert names_in(header) == expected | {"sglang.srt.managers.schedule_batch Modality"}
    rows_TW[0, 0] = 7
    assert torch.equal(torch.frombuffer(rows, dtype=torch.bfloat16).view(4, 3), rows_TW)


def test_an_error_has_a_status_that_sglang_passes_on() -> None:
    part = PartId("r_local_part_0", 1, 0, "VIDEO")
    statuses = {400: [BadRequest("m"), NotAnImage("m")], 503: [Overloaded("m"), EncoderUnavailable("m")]}
    for status, errors in (statuses | {500: [InternalError("m")]}).items():
        for error in errors:
            (header,) = error_message(receiver_class("0.5.20"), part, error)
            assert isinstance(header, bytes)
            found = opcodes(header)
            assert found[found.index(("BINUNICODE", "error_code")) + 1] == ("BININT", status)
            assert found[found.index(("BINUNICODE", "error_msg")) + 1] == ("BINUNICODE", "m")
