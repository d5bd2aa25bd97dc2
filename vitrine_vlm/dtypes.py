"""The element types that travel, as torch has them."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Of rows: KV may also be in FP8.
ROW_DTYPES: dict[str, torch.dtype] = DTYPES | {"float8_e4m3fn": torch.float8_e4m3fn}
