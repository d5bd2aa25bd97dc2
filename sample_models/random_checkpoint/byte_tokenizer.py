"""The random checkpoints' tokenizer: one token per byte, the Qwen special tokens and a short ChatML template."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_NUM_BYTES = 256
_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL_TOKEN_IDS = {token: _NUM_BYTES + index for index, token in enumerate(_SPECIAL_TOKENS)}

_CHAT_TEMPLATE = """\
{%- if tools -%}
{{- '<|im_start|>system\\n<tools>\\n' -}}
{%- for tool in tools -%}
{{- tool | tojson + '\\n' -}}
{%- endfor -%}
{{- '</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type in ('video', 'video_url') -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '\\n' if message.content or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def printable_token_ids() -> list[int]:
    """Returns the ids of the newline and of the printable ASCII characters."""
    vocab = _byte_vocab()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # For a single ASCII character the pre-tokenizer returns the one letter that represents its byte.
    return [vocab[byte_level.pre_tokenize_str(char)[0][0]] for char in ["\n", *map(chr, range(32, 127))]]


def save_byte_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, loadable by AutoTokenizer.

    Args:
        vocab_size: the model's; ids above the special tokens decode to their number in hexadecimal and are never
            encoded from text, so that every token a model may choose has a text.
    """
    others = {f"{token_id:x}": token_id for token_id in range(_NUM_BYTES + len(_SPECIAL_TOKENS), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocab() | SPECIAL_TOKEN_IDS | others, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    write_tokenizer(tokenizer, folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer with Qwen's special tokens and the short ChatML template, loadable by AutoTokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def _byte_vocab() -> dict[str, int]:
    return {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
