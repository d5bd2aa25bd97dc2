"""The table of stages that the launcher prints after an answer."""

from __future__ import annotations

from vitrine_vlm.deploy.launcher.ask import Answer

_STAGES = {
    "load": "encoder: get the file",
    "preprocess": "encoder: decode, resize, normalize, cut patches",
    "encode": "encoder: wait for a batch and run the vision tower",
    "ship": "between: rows readable in the worker",
    "land": "worker: copy rows into the input buffers",
    "prefill": "worker: run the prompt",
    "decode": "worker: run the tokens after the first",
}


def stage_table(answer: Answer) -> str:
    """Returns one line per stage, in milliseconds, then the client's times. Stages overlap, so the sum may differ."""
    lines = [f"{'stage':<12}{'ms':>9}   where"]
    for stage, where in _STAGES.items():
        duration_ms = answer.timings_ms.get(f"{stage}_ms")
        shown = "-" if duration_ms is None else f"{duration_ms:.2f}"
        lines.append(f"{stage:<12}{shown:>9}   {where}")
    lines.append(f"{'first token':<12}{answer.ttft_ms:>9.2f}   client: from request to the first text")
    lines.append(f"{'total':<12}{answer.total_ms:>9.2f}   client: from request to the end, {_tokens(answer)}")
    return "\n".join(lines)


def _tokens(answer: Answer) -> str:
    num_prompt = answer.usage.get("prompt_tokens", 0)
    num_completion = answer.usage.get("completion_tokens", 0)
    return f"{num_prompt} prompt tokens, {num_completion} generated ({answer.finish_reason})"
