"""Work on two streams, and as CUDA graphs on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from vitrine_vlm.gpu_kernels.auxiliary_stream import AuxiliaryStream
from vitrine_vlm.gpu_kernels.graph_capture import CudaGraphs


def test_on_a_cpu_one_piece_of_work_follows_the_other() -> None:
    done: list[str] = []
    AuxiliaryStream(torch.device("cpu")).run_both(partial(done.append, "auxiliary"), partial(done.append, "main"))
    assert done == ["auxiliary", "main"]


@pytest.mark.gpu
def test_a_graph_does_the_work_again_on_both_streams() -> None:
    device = torch.device("cuda")
    source, left, right = torch.zeros((3, 1 << 20), device=device).unbind()
    auxiliary_stream, graphs = AuxiliaryStream(device), CudaGraphs(device)

    def double() -> None:
        left.copy_(source * 2)

    def treble() -> None:
        right.copy_(source * 3)

    def work() -> None:
        auxiliary_stream.run_both(double, treble)
        left.add_(right)

    replay = graphs(work)
    source.fill_(4.0)
    replay()
    assert (left == 20).all() and (right == 12).all()
    assert graphs.num_graphs == 1
