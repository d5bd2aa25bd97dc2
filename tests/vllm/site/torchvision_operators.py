"""Declares torchvision's operators `nms` and `qnms` right before torchvision is imported.

torchvision's wheel on PyPI is built for CUDA. Its compiled operators cannot be loaded beside torch's CPU build, and
then its import fails at these two names alone. vLLM imports torchvision and calls neither of them here.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_libraries: list[Any] = []  # the declarations end with their object


class _BeforeTorchvision:
    """A finder that finds nothing; the import system asks it before it looks for torchvision."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(cls)
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.origin is not None:
                _declare_operators(Path(spec.origin).parent)
        return None


def _declare_operators(torchvision: Path) -> None:
    import torch

    try:
        torch.ops.load_library(torchvision / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


sys.meta_path.insert(0, _BeforeTorchvision)
