"""Runs a service and records its steps or batches: `python -m benchmarks.timeline.recorded_service FILE MODULE FLAGS`.

MODULE is `vitrine_vlm.encoder_service` or `vitrine_vlm.llm_worker`, FLAGS are its own. The service itself knows nothing
of it: two of its classes are wrapped here. FILE is written at its end, and emptied before. An encoder's ranks (--dp)
are not recorded, and of a worker's (--tp) the first alone.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timeline.recorder import Recorder
from benchmarks.timeline.span import Kind, write_spans
from vitrine_vlm.encoder_service.engine.batch import Batch, LaunchedBatch
from vitrine_vlm.encoder_service.models import VisionTower
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.runner import Runner
from vitrine_vlm.llm_worker.models.decoder import StepInputs

ENCODER, WORKER = "vitrine_vlm.encoder_service", "vitrine_vlm.llm_worker"


class RecordedRunner:
    """A `Runner` that records its steps: attention tables, decoder and last norm, without inputs and sampling."""

    def __init__(self, runner: Runner, recorder: Recorder) -> None:
        self._runner, self._recorder = runner, recorder

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        recorder, launched_s = self._recorder, self._recorder.clock()
        start = recorder.event()
        hidden_TC = self._runner(inputs)
        end = recorder.event()
        recorder.add(kind_of(inputs), len(inputs.slot_mapping_T), launched_s, recorder.clock(), start, end)
        return hidden_TC

    def wait_until_nearly_done(self) -> bool:
        return self._runner.wait_until_nearly_done()


def kind_of(inputs: StepInputs) -> Kind:
    num_decoding = sum(each.length == 1 for each in inputs.sequences)
    if num_decoding == len(inputs.sequences):
        return "decode"
    return "mixed" if num_decoding else "prompts"


def record_steps(recorder: Recorder) -> None:
    """Wraps the runner of every forward pass that is made from now on."""
    init = ForwardPass.__init__

    def recorded(self: ForwardPass, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        recorder.use(self.decoder.device)
        self._run_decoder = RecordedRunner(self._run_decoder, recorder)

    ForwardPass.__init__ = recorded  # type: ignore[method-assign]


def record_batches(recorder: Recorder) -> None:
    """Wraps the launch of batches."""
    launch = Batch.launch

    def recorded(
        self: Batch, tower: VisionTower, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> LaunchedBatch:
        if device.type == "cuda" and not recorder.is_ready:
            recorder.use(device)
        launched = launch(self, tower, device, clock)
        times = launched.started_at, launched.returned_at
        recorder.add("batch", len(self.patches_PX), *times, launched.start, launched.end)
        return launched

    Batch.launch = recorded  # type: ignore[method-assign]


def main() -> int:
    file, module, *flags = sys.argv[1:]
    write_spans(Path(file), [])  # where nothing is recorded, an earlier run's must not stay
    recorder = Recorder()
    if module == WORKER:
        record_steps(recorder)
    elif module == ENCODER:
        record_batches(recorder)
    else:
        raise SystemExit(f"{module} is neither {ENCODER} nor {WORKER}")
    service: Any = importlib.import_module(f"{module}.__main__")
    serve = service.serve

    async def recorded(config: object) -> None:
        try:
            await serve(config)
        finally:  # here, as the process ends without returning to `main`
            write_spans(Path(file), recorder.spans())

    service.serve = recorded
    sys.argv = [module, *flags]
    return int(service.main())


if __name__ == "__main__":
    sys.exit(main())
