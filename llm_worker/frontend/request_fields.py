"""The fields of OpenAI's, vLLM's and SGLang's requests, and which of the three rules each has here.

docs/api.md's tables are made from these (`docs/api_fields.py`). A field of those servers that is missing here would
count as unknown and be ignored: tests compare the names with the installed openai package and with lists of vLLM's and
SGLang's fields.
"""

from __future__ import annotations

from vitrine_vlm.llm_worker.frontend.field_rules import FieldTable, honoured, informative, refused

_FRAMES = "frames of a video are sampled by `video_url.fps`"
MEDIA_ARE_BYTES = "media are known by their bytes"
SIZES = "pictures are sized as the checkpoint's processor says"
TEXT_ONLY = "answers are free text"
_NO_BEAMS = "no beam search"
NO_TOOLS = "no tools"

_SIZE_FIELDS: FieldTable = {
    name: refused(note=SIZES)
    for name in ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "max_long_side_pixel")
} | {name: refused(note=SIZES) for name in ("min_dynamic_patch", "max_dynamic_patch")}
_FRAME_FIELDS: FieldTable = {
    name: refused(note=_FRAMES)
    for name in ("nframes", "num_frames", "min_frames", "max_frames", "video_start", "video_end", "sample_fps")
} | {name: refused(note=_FRAMES) for name in ("max_tokens_per_frame", "max_image_tokens")}

IMAGE_URL: FieldTable = {
    "url": honoured("`https:`, `http:`, `data:`, and `file:` below the encoders' allowed folder"),
    "detail": informative(str, note=SIZES),
    "content_hash": informative(str, note=MEDIA_ARE_BYTES),
    **_SIZE_FIELDS,
}
VIDEO_URL: FieldTable = {
    "url": IMAGE_URL["url"],
    "fps": honoured("frames a second that are looked at; the checkpoint's own rate where left out"),
    "detail": IMAGE_URL["detail"],
    "content_hash": IMAGE_URL["content_hash"],
    **_SIZE_FIELDS,
    **_FRAME_FIELDS,
}
_PART: FieldTable = {
    "type": honoured("`text`, `image_url` or `video_url`"),
    "text": refused(note="of a `text` part"),
    "image_url": refused(note="of an `image_url` part"),
    "video_url": refused(note="of a `video_url` part"),
    "uuid": informative(str, note=MEDIA_ARE_BYTES),
    "modalities": refused("image", note="pictures are pictures"),
    "prompt_cache_breakpoint": informative(note="the prefix cache works without"),
    "fps": refused(note="inside `video_url`"),
    **_SIZE_FIELDS,
    **_FRAME_FIELDS,
}
TEXT_PART: FieldTable = {**_PART, "text": honoured("of a `text` part")}
IMAGE_PART: FieldTable = {**_PART, "image_url": honoured("of an `image_url` part", inside=IMAGE_URL)}
VIDEO_PART: FieldTable = {**_PART, "video_url": honoured("of a `video_url` part", inside=VIDEO_URL)}
_MEDIA_PARTS = {"image_url": IMAGE_PART, "video_url": VIDEO_PART}
MESSAGE: FieldTable = {
    "role": honoured("`system` (or `developer`), `user`, `assistant`, `tool`"),
    "content": honoured("a string, or a list of parts", by_type={"text": TEXT_PART, **_MEDIA_PARTS}),
    "name": informative(str),
    "tool_call_id": informative(str, note="a tool's answer follows its call"),
    "tool_calls": refused([], note=NO_TOOLS),
    "tools": refused([], note=NO_TOOLS),
    "function_call": refused(note=NO_TOOLS),
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
    "structured_outputs": refused({}, note=TEXT_ONLY),
    "chat_template_kwargs": refused({}),
    "mm_processor_kwargs": refused({}, note=SIZES),
    "media_io_kwargs": refused({}, note=_FRAMES),
    "cache_salt": refused(note="one prefix cache for all"),
    "extra_key": refused(note="one prefix cache for all"),
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
    "parallel_tool_calls": informative(bool),
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
    "response_format": refused({"type": "text"}, note=TEXT_ONLY),
    "guided_json": refused(note=TEXT_ONLY),
    "guided_regex": refused(note=TEXT_ONLY),
    "guided_choice": refused(note=TEXT_ONLY),
    "guided_grammar": refused(note=TEXT_ONLY),
    "json_schema": refused(note=TEXT_ONLY),
    "regex": refused(note=TEXT_ONLY),
    "ebnf": refused(note=TEXT_ONLY),
    "repetition_detection": refused(),
    "thinking_token_budget": refused(),
    "custom_logit_processor": refused(),
    "custom_params": refused({}),
    "watermark": refused({}),
    "images_config": refused({}, note=SIZES),
    "return_hidden_states": refused(False),
    "return_routed_experts": refused(False),
    "routed_experts_start_len": refused(0),
    "routed_experts_prompt_start": refused(0),
    "return_cached_tokens_details": refused(False, note="`usage.prompt_tokens_details` has them"),
    "return_spec_tokens_details": refused(False),
    "return_token_offsets": refused(False),
    "add_special_tokens": informative(bool, note="prompts get no added tokens"),
    "guided_decoding_backend": informative(str),
    "guided_whitespace_pattern": informative(str),
    "custom_labels": informative(dict),
    "rid": informative(str, list, note="send the header `x-request-id`"),
    "spaces_between_special_tokens": informative(bool),
    "stream_interval": informative(int, note="every token is sent at once"),
}

CHAT: FieldTable = {
    "messages": honoured("the conversation, at least one", inside=MESSAGE),
    **_GENERATION,
    "max_completion_tokens": honoured("the newer name of `max_tokens`, which it overrides"),
    "top_logprobs": honoured("alternatives of each token, up to 20; needs `logprobs`"),
    "echo": refused(False),
    "tools": refused([], note=NO_TOOLS),
    "tool_choice": refused("none", "auto", note=NO_TOOLS),
    "functions": refused([], note=NO_TOOLS),
    "function_call": refused("none", "auto", note=NO_TOOLS),
    "add_generation_prompt": refused(True),
    "continue_final_message": refused(False),
    "chat_template": refused(note="the checkpoint's own"),
    "documents": refused([]),
    "audio": refused(note="no audio"),
    "modalities": refused(["text"], note="answers are text"),
    "web_search_options": refused(note="no search"),
    "input_ids": refused(note="send token ids to `/v1/completions`"),
    "task": refused(note="no such instructions"),
    "video_config": refused({}, note=_FRAMES),
    "use_audio_in_video": refused(False, note="no audio"),
    "max_dynamic_patch": refused(note=SIZES),
    "min_dynamic_patch": refused(note=SIZES),
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
    "reasoning_effort": informative(str, float),
    "separate_reasoning": informative(bool),
    "store": informative(bool, note="nothing is stored"),
    "stream_reasoning": informative(bool),
    "thinking": informative(),
    "verbosity": informative(str),
}

COMPLETION: FieldTable = {
    "prompt": honoured("text or token ids, or a list of several of either; each gets `n` choices, in order"),
    "media": honoured(
        "a list of `image_url` and `video_url` parts, in the order of the prompt's placeholders", by_type=_MEDIA_PARTS
    ),
    **_GENERATION,
    "echo": honoured("each choice begins with its prompt, in `logprobs`, too"),
    "suffix": refused("", note="no text behind the answer"),
    "prompt_embeds": refused(),
}

TOKENIZE: FieldTable = {
    "model": honoured("the served one where left out"),
    "prompt": honoured("text"),
    "messages": honoured("instead of `prompt`", inside=MESSAGE),
    "return_token_strs": honoured("the text of each token, too"),
    "add_special_tokens": _GENERATION["add_special_tokens"],
    "add_generation_prompt": refused(True),
    "continue_final_message": refused(False),
    "chat_template": CHAT["chat_template"],
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
    "media_io_kwargs": CHAT["media_io_kwargs"],
    "mm_processor_kwargs": CHAT["mm_processor_kwargs"],
    "tools": CHAT["tools"],
    "tool_choice": CHAT["tool_choice"],
    "reasoning_effort": CHAT["reasoning_effort"],
}
DETOKENIZE: FieldTable = {
    "model": TOKENIZE["model"],
    "tokens": honoured("token ids"),
    "skip_special_tokens": honoured("leave special tokens out; false where left out"),
}
