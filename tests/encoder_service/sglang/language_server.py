"""A language server of a released SGLang, as far as encoders see it. Run with `released_wheels` on PYTHONPATH.

Its own classes accept registrations and ask for /health, send /encode, register receivers for every rank and read what
comes. Only the tokenizer in front of them and the model behind are missing. Reads a task from stdin, as JSON:

    module          the wheel's receiver module
    bootstrap_port  where encoders register; num_encoders: how many are waited for
    requests        [{"rid", "images", "videos", "hashes"}], all sent at once
    tp_size         ranks, each with a receiver of its own
    delay_encode_s, delay_receivers_s   which of the two messages is late
    folder          where rows are saved

and writes one answer for each rank of each request to stdout.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import zmq
from safetensors.torch import save_file

_TIMEOUT_S = 60.0


class _Processor:
    """In place of the model's processor, which expands the prompt: keeps what it is given."""

    prefer_tokenized_input = False

    def __init__(self) -> None:
        self.embeddings: dict[Any, torch.Tensor] = {}
        self.meta: dict[str, Any] = {}

    def get_mm_data(self, prompt: str, embeddings: dict[Any, torch.Tensor], **meta: Any) -> SimpleNamespace:
        self.embeddings, self.meta = embeddings, meta
        return SimpleNamespace(input_ids=[1], mm_items=[])

    get_validated_mm_data = get_mm_data


def main() -> None:
    task = json.load(sys.stdin)
    theirs = importlib.import_module(task["module"])
    urls: list[str] = []
    theirs.EncoderBootstrapServer(
        "127.0.0.1", task["bootstrap_port"], urls=urls, health_check_interval=0.1, health_check_timeout=2.0
    )
    deadline = time.monotonic() + _TIMEOUT_S
    while len(urls) < task["num_encoders"]:
        assert time.monotonic() < deadline, f"only {urls} have registered"
        time.sleep(0.05)
    time.sleep(0.5)  # some health checks
    assert len(urls) == task["num_encoders"], f"only {urls} stayed registered"
    settings = SimpleNamespace(
        encoder_transfer_backend="zmq_to_scheduler", encoder_urls=[], host="127.0.0.1", tp_size=1, nnodes=1
    )
    tokenizer = theirs.MMReceiverHTTP(settings, encode_urls=urls)
    encode_in_thread = tokenizer._run_encode_in_thread

    def encode_late(*arguments: Any) -> None:
        time.sleep(task["delay_encode_s"])
        encode_in_thread(*arguments)

    tokenizer._run_encode_in_thread = encode_late
    for answers in [_request(theirs, tokenizer, task, each) for each in task["requests"]]:
        for answer in answers():
            print(json.dumps(answer), flush=True)


def _request(theirs: Any, tokenizer: Any, task: dict[str, Any], request: dict[str, Any]) -> Any:
    """Sends one request; returns a function that waits for its answers, one a rank."""
    rid = request["rid"]
    asked = SimpleNamespace(
        rid=rid,
        image_data=request["images"],
        video_data=request["videos"],
        audio_data=request.get("audios", []),
        mm_content_hashes=request.get("hashes"),
    )
    dispatch_errors: list[Any] = []
    old = hasattr(theirs, "WaitingImageRequest")  # up to 0.5.18
    if old:
        tokenizer._send_encode_request(asked)
    else:
        ready = tokenizer._send_encode_request(asked, on_dispatch_error=dispatch_errors.append)
    time.sleep(task["delay_receivers_s"])
    ranks = []
    for _ in range(task["tp_size"]):
        processor = _Processor()
        scheduled = SimpleNamespace(
            rid=rid, input_text="a prompt", input_ids=None, num_items_assigned=asked.num_items_assigned
        )
        make = theirs.WaitingImageRequest if old else theirs.WaitingZmqRequest
        own = {} if old else {"registration_runner": theirs._ReceiveRegistrationRunner("registration")}
        rank = make(
            rid=rid,
            recv_req=scheduled,
            mm_processor=processor,
            encoder_urls=asked.encoder_urls,
            model_type="qwen3_vl",
            host_name="127.0.0.1",
            receive_count=task["tp_size"],
            zmq_context=zmq.Context(),
            **own,
        )
        # Up to 0.5.18 it waits for the encoders' answers.
        threading.Thread(target=rank.send_encode_request, daemon=True).start()
        ranks.append((rank, processor))
    if not old:
        ready.set()

    def answers() -> list[dict[str, Any]]:
        deadline = time.monotonic() + _TIMEOUT_S
        while any(rank.status == 0 for rank, _ in ranks) and time.monotonic() < deadline:
            if dispatch_errors:  # what the scheduler does with one; an error over ZMQ may come first
                deadline = min(deadline, time.monotonic() + 1)
            for rank, _ in ranks:
                rank._try_recv_mm_data()
            time.sleep(0.005)
        found = []
        for number, (rank, processor) in enumerate(ranks):
            path = Path(task["folder"]) / f"{rid}-{number}.safetensors"
            save_file({each.name: rows.contiguous() for each, rows in processor.embeddings.items()}, path)
            meta = {
                key: value.tolist() if isinstance(value, torch.Tensor) else value
                for key, value in processor.meta.items()
            }
            found.append(
                {
                    "rid": rid,
                    "rank": number,
                    "status": rank.status.name,
                    "message": rank.error_msg,
                    "code": rank.error_code,
                    "meta": meta,
                    "rows": str(path),
                    "dispatch_errors": [[each.error_msg, each.error_code] for each in dispatch_errors],
                }
            )
        return found

    return answers


if __name__ == "__main__":
    main()
