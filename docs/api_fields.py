"""Writes the tables of fields in api.md from the worker's own rules, `llm_worker/frontend/request_fields.py`.

python docs/api_fields.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from vitrine_vlm.llm_worker.frontend import media_fields as media
from vitrine_vlm.llm_worker.frontend import request_fields as fields
from vitrine_vlm.llm_worker.frontend import responses_fields as responses
from vitrine_vlm.llm_worker.frontend.field_rules import Field, FieldTable, Rule

PAGE = Path(__file__).parent / "api.md"
_BEGIN, _END = "<!-- fields: begin -->", "<!-- fields: end -->"


def sections() -> Iterator[tuple[str, FieldTable]]:
    """A heading and the fields below it."""
    chat, completion = fields.CHAT, fields.COMPLETION
    yield "Chat, completions and responses", fields.COMMON
    shared = {name: field for name, field in chat.items() if completion.get(name) == field}
    yield "Chat and completions", {name: field for name, field in shared.items() if name not in fields.COMMON}
    yield "Chat", {name: field for name, field in chat.items() if name not in shared}
    yield "Completions", {name: field for name, field in completion.items() if name not in shared}
    yield "`stream_options`", fields.STREAM_OPTIONS
    yield "`response_format`", fields.RESPONSE_FORMAT
    yield "`json_schema` of `response_format`", fields.NAMED_SCHEMA
    yield "`structured_outputs`", fields.STRUCTURED_OUTPUTS
    yield "`messages`", fields.MESSAGE
    own = {"text": media.TEXT_PART} | media.MEDIA_PARTS
    parts = media.TEXT_PART | {name: part[name] for name, part in own.items()} | media.VIDEO_OPTIONS
    yield "`tools`", fields.TOOL
    yield "`function` of a tool, and `functions`", fields.FUNCTION
    yield "`tool_calls` of messages", fields.TOOL_CALL
    yield "Parts of `messages` and `media`", parts
    yield "`image_url`", media.IMAGE_URL
    yield "`video_url`", {name: rule for name, rule in media.VIDEO_URL.items() if rule != media.IMAGE_URL[name]}
    yield "`mm_processor_kwargs`", media.PROCESSOR_KWARGS
    yield "`media_io_kwargs.video`", media.VIDEO_IO
    yield "Responses", {name: rule for name, rule in responses.RESPONSES.items() if name not in fields.COMMON}
    yield "`input` of responses: messages", responses.INPUT_MESSAGE
    yield "`input` of responses: function calls", responses.INPUT_CALL
    yield "`input` of responses: outputs of function calls", responses.INPUT_CALL_OUTPUT
    yield "`tools` of responses", responses.RESPONSES_TOOL
    yield "Parts of `input`", responses.INPUT_TEXT | responses.INPUT_IMAGE | {"text": responses.INPUT_TEXT["text"]}
    yield "`text` of responses", responses.TEXT
    yield "`format` of `text`", responses.FORMAT
    yield "`/tokenize`", fields.TOKENIZE
    yield "`/detokenize`", fields.DETOKENIZE


def tables() -> str:
    return "\n\n".join(f"#### {heading}\n\n{_table(table)}" for heading, table in sections())


def _table(table: FieldTable) -> str:
    """A row for fields with the same rule and meaning: honoured ones, refused ones, informative ones."""
    rows: dict[Rule, dict[str, list[str]]] = {rule: defaultdict(list) for rule in Rule}
    for name, field in table.items():
        rows[field.rule][_meaning(field)].append(f"`{name}`")
    lines = ["| field | rule | meaning |", "|---|---|---|"]
    lines += [f"| {', '.join(names)} | {rule} | {meaning} |" for rule in Rule for meaning, names in rows[rule].items()]
    return "\n".join(lines)


def _meaning(field: Field) -> str:
    passing = " or ".join(f"`{json.dumps(each)}`" for each in field.neutral)
    return "; ".join(filter(None, [passing and f"passes as {passing}", field.note]))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of fields in docs/api.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the tables are out of date")
    check = parser.parse_args().check
    text = PAGE.read_text()
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    new = f"{before}{_BEGIN}\n{tables()}\n{_END}{after}"
    if check and new != text:
        print(f"{PAGE} is out of date: run python docs/api_fields.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
