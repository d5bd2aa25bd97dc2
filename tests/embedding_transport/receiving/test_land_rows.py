"""Rows on a GPU land by one kernel; without a GPU it runs in Triton's interpreter (tests/__init__.py)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from vitrine_vlm.embedding_transport.receiving.land_rows import land_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("num_layers", [0, 3])
def test_rows_land_in_one_launch(num_layers: int) -> None:
    hidden, rows = 40, torch.randn(9, 40 * (1 + num_layers)).to(DEVICE)
    main = torch.zeros(20, hidden, device=DEVICE)
    deepstack = torch.zeros(num_layers, 20, hidden, device=DEVICE) if num_layers else None
    land_rows(rows[2:8], main[5:11], deepstack[:, 5:11] if deepstack is not None else None)
    assert torch.equal(main[5:11], rows[2:8, :hidden])
    assert not main[:5].any() and not main[11:].any()
    if deepstack is not None:
        for layer in range(num_layers):
            assert torch.equal(deepstack[layer, 5:11], rows[2:8, hidden * (1 + layer) : hidden * (2 + layer)])
        assert not deepstack[:, :5].any() and not deepstack[:, 11:].any()
