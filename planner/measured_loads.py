"""Loads that were measured on H200s, beside which the planner's model is checked.

Their figures stand in docs/performance.md, docs/comparison.md and docs/crossover.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from vitrine_vlm.planner.loads import Load

# encoder: its clients read the embeddings. apart, turns, mps: a worker, on a GPU of its own, or on the encoder's, in
# time slices or by MPS. vllm: vLLM with its own tower; mode_m: vLLM and an encoder on one GPU in time slices.
System: TypeAlias = Literal["encoder", "apart", "turns", "mps", "vllm", "mode_m"]


@dataclass(frozen=True)
class MeasuredLoad:
    """requests_per_s: with `load.beside` of a worker it is the pictures beside. ttft_s: the median, None if unknown."""

    name: str
    system: System
    load: Load
    requests_per_s: float
    ttft_s: float | None = None
    transport: str = "cuda_ipc"


_HD, _FULL_HD, _UHD = (1280, 720), (1920, 1080), (3840, 2160)
_ENCODER = (
    MeasuredLoad("encoder, 560x560, 1 in flight", "encoder", Load(32, 1, 1), 130.7),
    MeasuredLoad("encoder, 560x560, 64", "encoder", Load(384, 64, 1), 337.3),
    MeasuredLoad("encoder, 1080p, 1", "encoder", Load(16, 1, 1, _FULL_HD), 26.4),
    MeasuredLoad("encoder, 1080p, 64", "encoder", Load(192, 64, 1, _FULL_HD), 32.3),
    MeasuredLoad("encoder, gRPC, 560x560, 1", "encoder", Load(32, 1, 1), 61.0, transport="grpc"),
    MeasuredLoad("encoder, gRPC, 560x560, 64", "encoder", Load(256, 64, 1), 120.7, transport="grpc"),
)
_STREAMS = Load(16, 16, 384, num_pictures=0, beside=8)
_WORKER = (
    MeasuredLoad("split on two GPUs, 560x560, 32, 1 token", "apart", Load(256, 32, 1), 91.0, 0.335),
    MeasuredLoad("split on two GPUs, 1080p, 8 beside 16 streams", "apart", _STREAMS, 12.2),
    MeasuredLoad("both on one GPU in time slices, 560x560, 32, 1 token", "turns", Load(256, 32, 1), 69.6, 0.447),
    MeasuredLoad("both on one GPU in time slices, 1080p, 8 beside 16 streams", "turns", _STREAMS, 8.15),
)


def _on_one_gpu(
    name: str, load: Load, turns: tuple[float, float], mps: tuple[float, float] | None = None
) -> list[MeasuredLoad]:
    """A load of Vitrine's halves on one GPU in time slices, and by MPS if measured: requests/s, and TTFT p50 in ms."""
    ways: list[tuple[str, System, tuple[float, float]]] = [("in time slices", "turns", turns)]
    if mps is not None:
        ways.append(("by MPS", "mps", mps))
    return [
        MeasuredLoad(f"both on one GPU {way}, {name}", system, load, figures[0], figures[1] / 1e3)
        for way, system, figures in ways
    ]


# Those of the comparison: by MPS of 2026-12-01, docs/comparison.md; in time slices of 2026-11-30, the same command.
_COMPARISON = (
    *_on_one_gpu("560x560, 32, 1 token, in the comparison", Load(192, 32, 1), (65.77, 447), (69.67, 440)),
    *_on_one_gpu("560x560, 32, 64 tokens", Load(128, 32, 64), (36.86, 238), (40.08, 146)),
    *_on_one_gpu("720p, 32, 64 tokens", Load(96, 32, 64, _HD), (19.25, 601), (20.10, 570)),
    *_on_one_gpu("1080p, 8, 64 tokens", Load(48, 8, 64, _FULL_HD), (7.16, 351), (7.12, 345)),
    *_on_one_gpu("1080p, 32, 64 tokens", Load(64, 32, 64, _FULL_HD), (8.38, 1796), (8.85, 1589)),
    *_on_one_gpu("4 x 560x560, 16, 64 tokens", Load(48, 16, 64, num_pictures=4), (12.65, 432), (12.84, 442)),
    *_on_one_gpu("560x560, one at a time", Load(12, 1, 1), (32.55, 31), (32.89, 30)),
    *_on_one_gpu("1080p, one at a time", Load(12, 1, 1, _FULL_HD), (9.46, 106), (9.49, 105)),
    *_on_one_gpu(
        "16 streams of 256 beside 8 x 1080p", Load(16, 16, 256, num_pictures=0, beside=8), (8.8, 571), (8.88, 119)
    ),
    *_on_one_gpu("text, 512 in, 128 out, 32", Load(96, 32, 128, (1, 1), 0, 512), (27.6, 201), (27.75, 169)),
    *_on_one_gpu("4 x 1080p, 1024 in, 64 out, 16", Load(48, 16, 64, _FULL_HD, 4, 1024), (1.96, 6114), (2.03, 5828)),
    *_on_one_gpu("560x560, 16, 64 tokens", Load(192, 16, 64), (28.64, 89)),
    *_on_one_gpu("4K, 16, 64 tokens", Load(32, 16, 64, _UHD), (1.37, 9362)),
    *_on_one_gpu("560x560, 64, 64 tokens", Load(448, 64, 64), (43.49, 516)),
    *_on_one_gpu("1080p, 64, 64 tokens", Load(128, 64, 64, _FULL_HD), (8.93, 4787)),
    *_on_one_gpu("560x560, 16, 512 tokens", Load(32, 16, 512), (5.31, 184)),
)


# `split` of the crossover, before the step behind a long one was prepared at its beginning; not measured again since.
CROSSOVER = tuple(
    MeasuredLoad(f"split on two GPUs, {name}", "apart", load, requests_per_s, ttft_ms / 1e3)
    for name, load, requests_per_s, ttft_ms in (
        ("text, 512 in, 128 out, 32", Load(96, 32, 128, (1, 1), 0, 512), 26.4, 201),
        ("560x560, 32, 64 tokens", Load(128, 32, 64), 38.4, 156),
        ("720p, 32, 64 tokens", Load(96, 32, 64, _HD), 23.9, 444),
        ("1080p, 32, 64 tokens", Load(64, 32, 64, _FULL_HD), 10.4, 1381),
        ("560x560, 64, 64 tokens", Load(448, 64, 64), 44.8, 541),
        ("1080p, 64, 64 tokens", Load(128, 64, 64, _FULL_HD), 11.0, 3735),
        ("4 x 560x560, 16, 64 tokens", Load(48, 16, 64, num_pictures=4), 14.9, 347),
    )
)


def _with_vllm(
    name: str, load: Load, own: tuple[float, float], mode_m: tuple[float, float]
) -> tuple[MeasuredLoad, MeasuredLoad]:
    """The same load with vLLM's own tower and in mode M: requests/s, and TTFT p50 in ms."""
    return (
        MeasuredLoad(f"vLLM, {name}", "vllm", load, own[0], own[1] / 1e3),
        MeasuredLoad(f"vLLM in mode M, {name}", "mode_m", load, mode_m[0], mode_m[1] / 1e3),
    )


_VLLM = (
    *_with_vllm("560x560, 32, 1 token", Load(192, 32, 1), (64.6, 475), (66.0, 458)),
    *_with_vllm("560x560, 32, 64 tokens", Load(128, 32, 64), (34.5, 374), (34.5, 510)),
    *_with_vllm("720p, 32, 64 tokens", Load(96, 32, 64, _HD), (19.4, 717), (19.5, 914)),
    *_with_vllm("1080p, 8, 64 tokens", Load(48, 8, 64, _FULL_HD), (7.09, 613), (6.77, 411)),
    *_with_vllm("1080p, 32, 64 tokens", Load(64, 32, 64, _FULL_HD), (9.76, 1629), (8.88, 2336)),
    *_with_vllm("4 x 560x560, 16, 64 tokens", Load(48, 16, 64, num_pictures=4), (12.8, 672), (11.7, 788)),
    *_with_vllm("560x560, one at a time", Load(12, 1, 1), (13.0, 77), (14.9, 64)),
    *_with_vllm("1080p, one at a time", Load(12, 1, 1, _FULL_HD), (6.07, 152), (8.16, 120)),
    *_with_vllm("text, 512 in, 128 out, 32", Load(96, 32, 128, (1, 1), 0, 512), (26.6, 356), (26.4, 279)),
    *_with_vllm(
        "16 streams of 256 beside 8 x 1080p", Load(16, 16, 256, num_pictures=0, beside=8), (0.27, 619), (0.40, 464)
    ),
)
MEASURED = (*_ENCODER, *_WORKER, *CROSSOVER, *_COMPARISON, *_VLLM)
