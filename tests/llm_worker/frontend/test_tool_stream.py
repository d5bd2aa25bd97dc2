"""Tool calls in an answer's text: what is one, and what only looks like one, however the text is cut."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from vitrine_vlm.llm_worker.frontend.tool_stream import Arguments, CallBegun, Content, Piece, ToolCallParser

NAMES = frozenset({"crop", "f"})
CROP = '<tool_call>\n{"name": "crop", "arguments": {"x": 1, "to": ["a", {}]}}\n</tool_call>'
ARGUMENTS = '{"x": 1, "to": ["a", {}]}'

WHOLE: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "Just text.": ("Just text.", []),
    "": ("", []),
    " \n": (" \n", []),
    "a < b, <tool and <tool_call": ("a < b, <tool and <tool_call", []),
    CROP: ("", [("crop", ARGUMENTS)]),
    f"Let me see.\n\n{CROP}": ("Let me see.", [("crop", ARGUMENTS)]),
    f"{CROP}\n{CROP}\n": ("", [("crop", ARGUMENTS)] * 2),
    f"{CROP}Done. {CROP} Yes. ": ("Done. Yes. ", [("crop", ARGUMENTS)] * 2),
    '<tool_call>{"name":"f","arguments":{}}</tool_call>': ("", [("f", "{}")]),
    '<tool_call>\n{"name": "f", "arguments": {"a": "}</tool_call>\\"{"}}\n</tool_call>': (
        "",
        [("f", '{"a": "}</tool_call>\\"{"}')],
    ),
    # Other orders and forms that can only mean one thing.
    '<tool_call>{"arguments": {"a": "é"}, "name": "f"}</tool_call>': ("", [("f", '{"a": "é"}')]),
    '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "f"}</tool_call>': ("", [("f", '{"a": "\\ud800"}')]),
    '<tool_call>{"name": "f"}</tool_call>': ("", [("f", "{}")]),
    '<tool_call>{"name": "f", "arguments": {"a" : 1.50 } , "id": 7}</tool_call>': ("", [("f", '{"a" : 1.50 }')]),
    # The model ended where its end tag should be.
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool': ("", [("f", "{}")]),
    # What only looks like a call.
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>': (
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        [],
    ),
    '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>': (
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        [],
    ),
    "The tag <tool_call> opens a call. \n": ("The tag <tool_call> opens a call. \n", []),
    "<tool_call>\n</tool_call>": ("<tool_call>\n</tool_call>", []),
    "<tool_call>{]}</tool_call>": ("<tool_call>{]}</tool_call>", []),
    '<tool_call>{"name": f</tool_call> \n x': ('<tool_call>{"name": f</tool_call> \n x', []),
    f"Now \n <tool_call>\n<tool_call> {CROP}": ("Now \n <tool_call>\n<tool_call>", [("crop", ARGUMENTS)]),
    "</tool_call>": ("</tool_call>", []),
}
# Where a stream has passed a call on before it turned out to be broken: content of a whole answer, and the stream's.
BROKEN: dict[str, tuple[str, list[tuple[str, str]]]] = {
    '<tool_call>\n{"name": "f", "arguments": {"x": 1,}}\n</tool_call>': ("", [("f", '{"x": 1,}')]),
    '<tool_call>\n{"name": "f", "arguments": {"x": 1': ("", [("f", '{"x": 1')]),
    '<tool_call>\n{"name": "f", "arguments": {"x": "1\n</tool_call> z': (" z", [("f", '{"x": "1\n')]),
    '<tool_call>\n{"name": "f", "arguments": {"x": 1]}</tool_call>': ("", [("f", '{"x": 1]}')]),
    '<tool_call>\n{"name": "f", "arguments": {"x": 1</tool_': ("", [("f", '{"x": 1</tool_')]),
}


def parse(texts: Iterable[str], streams_arguments: bool) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(NAMES, streams_arguments)
    pieces = [piece for text in texts for piece in parser.push(text)] + parser.finish()
    assert parser.num_calls == sum(isinstance(piece, CallBegun) for piece in pieces)
    return joined(pieces)


def joined(pieces: Iterable[Piece]) -> tuple[str, list[tuple[str, str]]]:
    content, calls = "", list[tuple[str, str]]()
    for piece in pieces:
        if isinstance(piece, Content):
            assert piece.text
            content += piece.text
        elif isinstance(piece, CallBegun):
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        else:
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return content, calls


@pytest.mark.parametrize("text", WHOLE)
@pytest.mark.parametrize("streams_arguments", [False, True])
def test_calls_and_content(text: str, streams_arguments: bool) -> None:
    assert parse([text], streams_arguments) == WHOLE[text]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_call_is_content_but_where_it_was_passed_on(text: str) -> None:
    assert parse([text], streams_arguments=False) == (text, [])
    assert parse([text], streams_arguments=True) == BROKEN[text]


@pytest.mark.parametrize("text", [*WHOLE, *BROKEN])
@pytest.mark.parametrize("streams_arguments", [False, True])
def test_every_split_gives_the_same(text: str, streams_arguments: bool) -> None:
    whole = parse([text], streams_arguments)
    assert parse(text, streams_arguments) == whole
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            assert parse([text[:first], text[first:second], text[second:]], streams_arguments) == whole


@pytest.mark.parametrize("streams_arguments", [False, True])
def test_random_texts_split_at_random(streams_arguments: bool) -> None:
    random_ = random.Random(3)
    pieces = [
        "<tool_call>",
        "</tool_call>",
        "\n",
        " ",
        "{",
        "}",
        '"',
        "\\",
        "<",
        '{"name": "f", "arguments": ',
        "1",
        ",",
    ]
    pieces += [CROP, "text", '"a": ', "[", "]", '{"name": "g"']
    for _ in range(3000):
        text = "".join(random_.choices(pieces, k=random_.randrange(14)))
        content, calls = parse([text], streams_arguments)
        cuts = sorted(random_.choices(range(len(text) + 1), k=5))
        parts = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(parts, streams_arguments) == parse(text, streams_arguments) == (content, calls)
        if not calls:
            assert content == text


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser(NAMES, streams_arguments=True)
    seen = [parser.push(character) for character in f"Hi {CROP}"]
    begun = next(index for index, pieces in enumerate(seen) if any(isinstance(each, CallBegun) for each in pieces))
    assert seen[begun] == [CallBegun(0, "crop"), Arguments(0, "{")]
    written = seen[begun + 1 : begun + len(ARGUMENTS)]
    assert written == [[Arguments(0, character)] for character in ARGUMENTS[1:]]
    assert not any(seen[begun + len(ARGUMENTS) :])


def test_text_that_may_begin_a_call_waits_and_other_text_does_not() -> None:
    parser = ToolCallParser(NAMES, streams_arguments=True)
    assert parser.push("a <tool") == [Content("a")]
    assert parser.push("box> b") == [Content(" <toolbox> b")]
    assert joined(parser.push("<tool_call> and")) == ("<tool_call> and", [])
    assert parser.push("<tool_call>") == []
    assert parser.finish() == [Content("<tool_call>")]
