"""Run by the Python that has vLLM: answers questions with vLLM's own vision tower, no connector and no server.

    python own_tower.py questions.json answers.json NUM_TOKENS

questions.json is {checkpoint folder: [chat messages]}, answers.json {checkpoint folder: [token ids]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(questions_file: str, answers_file: str, num_tokens: str) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=int(num_tokens))
    answers = {}
    for folder, conversations in json.loads(Path(questions_file).read_text()).items():
        llm = LLM(
            folder,
            dtype="float32",
            max_model_len=2048,
            enforce_eager=True,
            distributed_executor_backend="uni",
            seed=0,
        )
        outputs = llm.chat(conversations, sampling, use_tqdm=False)
        answers[folder] = [list(output.outputs[0].token_ids) for output in outputs]
        del llm
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
