"""`python -m vitrine_vlm.planner.measure HALF MODEL`: loads one half of a model and prints its costs as a JSON line.

One process a half, as in production: neither has the other's memory on the GPU. The measurements are those that an
encoder and a worker make at their start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch


def main(arguments: Sequence[str] | None = None) -> int:
    half, model, *flags = sys.argv[1:] if arguments is None else arguments
    found = measure_tower(model, flags) if half == "tower" else measure_decoder(model, flags)
    print(json.dumps(found))
    return 0


def measure_tower(model: str, flags: Sequence[str]) -> dict[str, object]:
    """The encoder's cost model, the width of its embeddings, and the device. flags: of `vitrine-encoder`."""
    from vitrine_vlm.encoder_service.app import load_model  # one half a process
    from vitrine_vlm.encoder_service.config import EncoderConfig

    config = EncoderConfig.from_command_line(["--model", model, *flags])
    loaded = load_model(config, lambda: False)
    cost, identity = loaded.cost, loaded.identity
    return {
        "model": identity.model,
        "gpu": _device_name(loaded.device),
        "row_nbytes": identity.row_nbytes,
        "tower": {"fixed_s": cost.fixed_s, "per_patch_s": cost.per_patch_s, "per_pair_s": cost.per_pair_s},
    }


def measure_decoder(model: str, flags: Sequence[str]) -> dict[str, object]:
    """The worker's cost model. flags: of `vitrine-llm`."""
    from vitrine_vlm.llm_worker.config import LlmConfig
    from vitrine_vlm.llm_worker.engine.cost_probes import measure_step_costs
    from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
    from vitrine_vlm.llm_worker.loading import choose_runner, engine_config, load_model

    # No encoder is asked: nothing is connected to.
    config = LlmConfig.from_command_line(["--model", model, "--encoders", "127.0.0.1:1", *flags])
    loaded = load_model(config, lambda: False)
    limits = engine_config(config, loaded.decoder)
    forward_pass = ForwardPass(loaded.decoder, limits, choose_runner(loaded.decoder, limits))
    costs = measure_step_costs(forward_pass, limits)
    return {
        "decode_s": costs.decode_s,
        "mixed_s": costs.mixed_s,
        "per_key_s": costs.per_key_s,
        "per_pair_s": costs.per_pair_s,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    sys.exit(main())
