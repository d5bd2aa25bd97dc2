"""The fields of `/v1/responses`, as `request_fields.py` has those of the other routes."""

from __future__ import annotations

from vitrine_vlm.llm_worker.frontend.field_rules import FieldTable, honoured, informative, refused
from vitrine_vlm.llm_worker.frontend.media_fields import DETAIL, IMAGE_OPTIONS, MEDIA_ARE_BYTES
from vitrine_vlm.llm_worker.frontend.request_fields import COMMON, FUNCTION, NAMED_SCHEMA

_STATELESS = "nothing is stored: send the whole conversation as `input`"

_INPUT_PART: FieldTable = {
    "type": honoured("`input_text` (for the assistant `output_text`) or `input_image`"),
    "text": refused(note="of a text"),
    "image_url": refused(note="of an `input_image`"),
    "file_id": refused(note=_STATELESS),
    "detail": informative(str, note=DETAIL),
    "annotations": informative(list),
    "logprobs": informative(list),
    "prompt_cache_breakpoint": informative(note="the prefix cache works without"),
    "uuid": informative(str, note=MEDIA_ARE_BYTES),
    **{name: refused(note="of an `input_image`") for name in IMAGE_OPTIONS},
}
INPUT_TEXT: FieldTable = {**_INPUT_PART, "text": honoured("of a text")}
INPUT_IMAGE: FieldTable = {
    **_INPUT_PART,
    "image_url": honoured("of an `input_image`: its URL"),
    **IMAGE_OPTIONS,
}
_PARTS = {"input_text": INPUT_TEXT, "output_text": INPUT_TEXT, "input_image": INPUT_IMAGE}
INPUT_MESSAGE: FieldTable = {
    "type": honoured("`message`, also where left out"),
    "role": honoured("`system` (or `developer`), `user`, `assistant`"),
    "content": honoured("a string, or a list of parts", by_type=_PARTS),
    "id": informative(str),
    "phase": informative(str),
    "status": informative(str),
}
_ABOUT_CALLS: FieldTable = {
    "call_id": honoured("the same of a call and its output; given to the chat template"),
    "id": informative(str),
    "status": informative(str),
    "namespace": informative(str),
    "caller": informative(dict),
}
INPUT_CALL: FieldTable = {
    "type": honoured("`function_call`"),
    **_ABOUT_CALLS,
    "name": honoured("of the function"),
    "arguments": honoured("JSON text"),
    "async": refused(False),
}
INPUT_CALL_OUTPUT: FieldTable = {
    "type": honoured("`function_call_output`"),
    **_ABOUT_CALLS,
    "output": honoured("a string, or a list of parts", by_type=_PARTS),
    "name": informative(str),
}
RESPONSES_TOOL: FieldTable = {
    "type": honoured("only `function`"),
    **FUNCTION,
    "async": refused(False),
    "allowed_callers": refused(["direct"]),
    "defer_loading": refused(False, note="all tools are in the prompt"),
    "output_schema": informative(dict),
}
FORMAT: FieldTable = {
    "type": honoured("`text`, `json_object` or `json_schema`"),
    **NAMED_SCHEMA,
    "name": honoured("comes back in the response"),
    "description": honoured("comes back in the response"),
}
TEXT: FieldTable = {
    "format": honoured("see below; [JSON](#structured-output)", inside=FORMAT),
    "verbosity": informative(str),
}
RESPONSES: FieldTable = {
    "input": honoured(
        "text, or a list of messages, function calls and their outputs",
        by_type={"message": INPUT_MESSAGE, "function_call": INPUT_CALL, "function_call_output": INPUT_CALL_OUTPUT},
    ),
    "instructions": honoured("a system message in front of the others"),
    **COMMON,
    "max_output_tokens": honoured("most tokens to generate; the rest of the context where left out"),
    "include": honoured("only `message.output_text.logprobs`"),
    "top_logprobs": honoured("alternatives of each token, up to 20; needs `include`"),
    "text": honoured("see below", inside=TEXT),
    "metadata": honoured("comes back in the response"),
    "store": refused(False, note=_STATELESS),
    "previous_response_id": refused(note=_STATELESS),
    "conversation": refused(note=_STATELESS),
    "background": refused(False, note=_STATELESS),
    "previous_input_messages": refused([], note=_STATELESS),
    "prompt": refused(note="no prompt templates"),
    "context_management": refused([]),
    "truncation": refused("disabled"),
    "tools": honoured("functions that the answer may call; [how](#tools)", inside=RESPONSES_TOOL),
    "tool_choice": honoured("`auto` where left out, `none`, `required`, one function, or `allowed_tools`"),
    "parallel_tool_calls": honoured("true where left out: one answer may have several calls"),
    "chat_template_kwargs": refused({}, note="only in chat completions"),
    "enable_response_messages": refused(False),
    "access_programs": informative(dict),
    "image": informative(dict),
    "max_tool_calls": informative(int),
    "reasoning": informative(dict),
    "stream_options": informative(dict),
}
