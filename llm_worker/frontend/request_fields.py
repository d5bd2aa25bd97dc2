"""The fields of OpenAI's, vLLM's and SGLang's requests, and which of the three rules each has here.

docs/api.md's tables are made from these (`docs/api_fields.py`). A field of those servers that is missing here would
count as unknown and be ignored: tests compare the names with the installed openai package and with lists of vLLM's and
SGLang's fields.
"""

from __future__ import annotations

from vitrine_vlm.llm_worker.frontend.field_rules import FieldTable, honoured, informative, refused
from vitrine_vlm.llm_worker.frontend.media_fields import MEDIA_OPTIONS, MEDIA_PARTS, ONE_PLACEHOLDER, TEXT_PART

_MM_PROCESSOR = "send `mm_processor_kwargs`"
SCHEMA = "the [JSON schema](#structured-output) of the answer"
_NO_BEAMS = "no beam search"

_FUNCTION_CALL: FieldTable = {
    "name": honoured("of the function"),
    "arguments": honoured("an object, also as JSON text"),
}
TOOL_CALL: FieldTable = {
    "id": honoured("given to the chat template"),
    "type": honoured("only `function`, also where left out"),
    "function": honoured("what was called", inside=_FUNCTION_CALL),
    "index": informative(int),
    "custom": refused(note="functions only"),
}
FUNCTION: FieldTable = {
    "name": honoured("letters, digits and `_.:/-`, up to 128"),
    "description": honoured("what it does"),
    "parameters": honoured("the JSON schema of its arguments, which are an object"),
    "strict": honoured("arguments follow the schema, whatever `tool_choice` is"),
}
TOOL: FieldTable = {
    "type": honoured("only `function`"),
    "function": honoured("see below", inside=FUNCTION),
    "custom": refused(note="functions only"),
    "defer_loading": refused(False, note="all tools are in the prompt"),
}
MESSAGE: FieldTable = {
    "role": honoured("`system` (or `developer`), `user`, `assistant`, `tool` (or `function`)"),
    "content": honoured("a string, or a list of parts", by_type={"text": TEXT_PART, **MEDIA_PARTS}),
    "name": honoured("given to the chat template"),
    "tool_call_id": honoured("given to the chat template; many have a tool's answers in the order of the calls"),
    "tool_calls": honoured("of the assistant", inside=TOOL_CALL),
    "tools": refused([], note="tools are the request's"),
    "function_call": honoured("the older form of one of `tool_calls`", inside=_FUNCTION_CALL),
    "reasoning": refused("", note="thoughts are no part of a prompt"),
    "reasoning_content": refused("", note="thoughts are no part of a prompt"),
    "refusal": refused("", note="send it as content"),
    "annotations": informative(list),
    "audio": refused(note="no audio"),
    "prefix": refused(False, note="an answer is a message of its own"),
    "phase": informative(str),
    "task": refused(note="no such instructions"),
}
STREAM_OPTIONS: FieldTable = {
    "include_usage": honoured("usage and timings in a last chunk; `usage` is null in the others"),
    "continuous_usage_stats": honoured("usage so far in every chunk"),
    "include_obfuscation": informative(bool),
}

NAMED_SCHEMA: FieldTable = {
    "name": informative(str),
    "description": informative(str),
    "schema": honoured(SCHEMA),
    "strict": honoured("schemas are enforced whether it is set or not"),
}
RESPONSE_FORMAT: FieldTable = {
    "type": honoured("`text`, `json_object` or `json_schema`"),
    "json_schema": honoured("of that type", inside=NAMED_SCHEMA),
}
_WHITESPACE = "whitespace between the parts of JSON is free"
STRUCTURED_OUTPUTS: FieldTable = {
    "json": honoured(f"{SCHEMA}, as an object or as text"),
    "regex": honoured("a regular expression of the whole answer"),
    "choice": honoured("a list of texts, one of which is the answer"),
    "grammar": honoured("a context-free grammar in GBNF or Lark's notation"),
    "json_object": honoured("any JSON object"),
    "structural_tag": refused(),
    "whitespace_pattern": refused(note=_WHITESPACE),
    "disable_any_whitespace": refused(False, note=_WHITESPACE),
    "disable_additional_properties": refused(False, note="`additionalProperties` in the schema says it"),
    "disable_fallback": informative(bool),
}

# Of all three routes.
COMMON: FieldTable = {
    "model": honoured("as `/v1/models` lists it"),
    "temperature": honoured("0 is greedy; the checkpoint's generation_config.json where left out"),
    "top_p": honoured("likewise"),
    "top_k": honoured("likewise; 0 or -1 keeps all tokens"),
    "seed": honoured("makes sampling repeatable, whatever else runs in the same batch"),
    "stop": honoured("one string or several; the text ends in front of the first that is complete"),
    "stop_token_ids": honoured("tokens that end a generation"),
    "ignore_eos": honoured("do not end at the model's own end tokens"),
    "stream": honoured("server-sent events"),
    "min_p": honoured("least probability, as a part of the most probable token's"),
    "repetition_penalty": honoured("on tokens of prompt and answer, above 1 against them"),
    "presence_penalty": honoured("-2 to 2, on tokens that the answer has"),
    "frequency_penalty": honoured("-2 to 2, likewise, as often as it has them"),
    "logit_bias": honoured("-100 to 100 by token id"),
    "min_tokens": honoured("no end before as many tokens"),
    "bad_words": honoured("strings that the answer never has, by their tokens"),
    "allowed_token_ids": honoured("the only tokens that the answer may have"),
    "include_stop_str_in_output": honoured("the text ends behind the stop string"),
    "no_stop_trim": honoured("likewise"),
    "skip_special_tokens": honoured("true where left out: the text has no special tokens"),
    "truncate_prompt_tokens": honoured("use the prompt's last tokens only; -1: as many as the context holds; no media"),
    "truncation_side": refused("left"),
    "structured_outputs": honoured("see below; one of its fields", inside=STRUCTURED_OUTPUTS),
    **MEDIA_OPTIONS,
    "cache_salt": honoured("what is cached is used again only by requests with the same salt; up to 1024 characters"),
    "extra_key": refused(note="send `cache_salt`"),
    "lora_path": refused(note="one model"),
    "session_params": refused({}, note="no sessions"),
    "kv_transfer_params": refused({}, note="`--role` says who computes prompts"),
    "ec_transfer_params": refused({}, note="the worker finds its encoders itself"),
    "bootstrap_host": refused(note="`--prefill-workers` says where"),
    "bootstrap_port": refused(note="`--prefill-workers` says where"),
    "bootstrap_room": refused(note="`--prefill-workers` says where"),
    "vllm_xargs": refused({}),
    "watermarking": refused(False),
    "moderation": refused(),
    "data_parallel_rank": informative(int),
    "routed_dp_rank": informative(int),
    "disagg_prefill_dp_rank": informative(int),
    "include_reasoning": informative(bool),
    "metadata": informative(dict),
    "mm_payload": informative(str),
    "priority": informative(int),
    "prompt_cache_key": informative(str),
    "prompt_cache_options": informative(dict),
    "prompt_cache_retention": informative(str),
    "request_id": informative(str, note="send the header `x-request-id`"),
    "return_mm_kwargs": informative(bool),
    "safety_identifier": informative(str),
    "service_tier": informative(str),
    "session_id": informative(str),
    "user": informative(str),
}
# Of chat and plain completions.
_GENERATION: FieldTable = {
    **COMMON,
    "max_tokens": honoured("most tokens to generate; the rest of the context where left out"),
    "logprobs": honoured("chat: a switch; completions: the number of alternatives, up to 20"),
    "stream_options": honoured("of a stream, see below", inside=STREAM_OPTIONS),
    "return_token_ids": honoured("`token_ids` of each choice, and `prompt_token_ids`"),
    "return_tokens_as_token_ids": honoured("tokens of log-probabilities are `token_id:N`"),
    "n": honoured("answers to each prompt, up to 128 in all; [how](#several-answers)"),
    "best_of": honoured("generate as many, send the `n` best"),
    "logprob_token_ids": refused([]),
    "prompt_logprobs": honoured("alternatives of each token of the prompt, up to 20; not with `--role decode`"),
    "stop_regex": refused([]),
    "use_beam_search": refused(False, note=_NO_BEAMS),
    "length_penalty": refused(1, note=_NO_BEAMS),
    "early_stopping": refused(False, note=_NO_BEAMS),
    "response_format": honoured("see below; [JSON](#structured-output)", inside=RESPONSE_FORMAT),
    "guided_json": STRUCTURED_OUTPUTS["json"],
    "guided_regex": STRUCTURED_OUTPUTS["regex"],
    "guided_choice": STRUCTURED_OUTPUTS["choice"],
    "guided_grammar": STRUCTURED_OUTPUTS["grammar"],
    "json_schema": STRUCTURED_OUTPUTS["json"],
    "regex": STRUCTURED_OUTPUTS["regex"],
    "ebnf": STRUCTURED_OUTPUTS["grammar"],
    "repetition_detection": refused(),
    "thinking_token_budget": refused(),
    "custom_logit_processor": refused(),
    "custom_params": refused({}),
    "watermark": refused({}),
    "images_config": refused({}, note=_MM_PROCESSOR),
    "return_hidden_states": refused(False),
    "return_routed_experts": refused(False),
    "routed_experts_start_len": refused(0),
    "routed_experts_prompt_start": refused(0),
    "return_cached_tokens_details": refused(False, note="`usage.prompt_tokens_details` has them"),
    "return_spec_tokens_details": refused(False),
    "return_token_offsets": refused(False),
    "add_special_tokens": informative(bool, note="prompts get no added tokens"),
    "guided_decoding_backend": informative(str),
    "guided_whitespace_pattern": STRUCTURED_OUTPUTS["whitespace_pattern"],
    "custom_labels": informative(dict),
    "rid": informative(str, list, note="send the header `x-request-id`"),
    "spaces_between_special_tokens": informative(bool),
    "stream_interval": informative(int, note="every token is sent at once"),
}

_TEMPLATE: FieldTable = {
    "chat_template_kwargs": honoured("variables of the chat template, which ignores those that it does not know"),
    "chat_template": honoured("a Jinja template of up to 64 KiB; only with `--trust-request-chat-template`"),
    "documents": honoured("objects for chat templates that read them"),
    "reasoning_effort": honoured("given to the chat template, which may not read it"),
    "add_generation_prompt": honoured("true where left out: the prompt ends where the answer's message begins"),
    "continue_final_message": honoured("the answer goes on with the last message"),
}

CHAT: FieldTable = {
    "messages": honoured("the conversation, at least one", inside=MESSAGE),
    **_GENERATION,
    "max_completion_tokens": honoured("the newer name of `max_tokens`, which it overrides"),
    "top_logprobs": honoured("alternatives of each token, up to 20; needs `logprobs`"),
    "echo": refused(False),
    "tools": honoured("functions that the answer may call; [how](#tools)", inside=TOOL),
    "tool_choice": honoured("`auto` where left out, `none`, `required`, one function, or `allowed_tools`"),
    "parallel_tool_calls": honoured("true where left out: one answer may have several calls"),
    "functions": honoured("the older form of `tools`; the answer has `function_call`", inside=FUNCTION),
    "function_call": honoured("the older form of `tool_choice`: `auto`, `none`, or one function's `name`"),
    **_TEMPLATE,
    "audio": refused(note="no audio"),
    "modalities": refused(["text"], note="answers are text"),
    "web_search_options": refused(note="no search"),
    "input_ids": refused(note="send token ids to `/v1/completions`"),
    "task": refused(note="no such instructions"),
    "video_config": refused({}, note=_MM_PROCESSOR),
    "use_audio_in_video": refused(False, note="no audio"),
    "max_dynamic_patch": refused(note=_MM_PROCESSOR),
    "min_dynamic_patch": refused(note=_MM_PROCESSOR),
    "return_prompt_token_ids": refused(False),
    "return_prompt_text": refused(False),
    "return_meta_info": refused(False),
    "return_input_ids_in_sglext": refused(False),
    "return_output_ids_in_sglext": refused(False),
    "return_sampling_mask": refused(False),
    "sampling_logprobs_mode": refused(),
    "return_flat_raw_output_top_logprobs": refused(False),
    "return_flat_raw_top_logprobs_b64": informative(bool),
    "prediction": informative(dict),
    "separate_reasoning": informative(bool),
    "store": informative(bool, note="nothing is stored"),
    "stream_reasoning": informative(bool),
    "thinking": informative(),
    "verbosity": informative(str),
}

COMPLETION: FieldTable = {
    "prompt": honoured("text or token ids, or a list of several of either; each gets `n` choices, in order"),
    "media": honoured(
        "a list of `image_url`, `video_url` and `video` parts, in the order of the prompt's placeholders",
        by_type=MEDIA_PARTS,
    ),
    **_GENERATION,
    "chat_template_kwargs": refused({}, note="prompts are whole: no template"),
    "parallel_tool_calls": informative(bool, note="no tools"),
    "echo": honoured("each choice begins with its prompt, in `logprobs`, too; with `max_tokens: 0` it ends there"),
    "suffix": refused("", note="no text behind the answer"),
    "prompt_embeds": refused(),
}

TOKENIZE: FieldTable = {
    "model": honoured("the served one where left out"),
    "prompt": honoured("text"),
    "messages": honoured("instead of `prompt`", inside=MESSAGE),
    "return_token_strs": honoured("the text of each token, too"),
    "add_special_tokens": _GENERATION["add_special_tokens"],
    **_TEMPLATE,
    "media_io_kwargs": informative(dict, note=ONE_PLACEHOLDER),
    "mm_processor_kwargs": informative(dict, note=ONE_PLACEHOLDER),
    "tools": CHAT["tools"],
    "tool_choice": CHAT["tool_choice"],
    "functions": refused([], note="send `tools`"),
    "function_call": refused("auto", "none", note="send `tool_choice`"),
    "truncate_prompt_tokens": refused(note="all tokens are returned"),
}
DETOKENIZE: FieldTable = {
    "model": TOKENIZE["model"],
    "tokens": honoured("token ids"),
    "skip_special_tokens": honoured("leave special tokens out; false where left out"),
}
