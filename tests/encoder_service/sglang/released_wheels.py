"""The receiving side of released versions of SGLang: its files as they are, in a folder where they can be imported.

`receiver.py`, the addresses and the environment are the wheel's own files. Of the modules that these import, what the
receiver uses is cut out (the unpickler with its list of allowed names, `Modality`, `ImageData`), and names that it
only mentions are empty classes.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

_DISAGGREGATION = "sglang/srt/disaggregation"
# Whole files, where a version has them.
_WHOLE = (
    "sglang/srt/environ.py",
    "sglang/srt/utils/network.py",
    "sglang/srt/multimodal/modality.py",
    f"{_DISAGGREGATION}/encode_receiver.py",
    f"{_DISAGGREGATION}/encoder/receiver.py",
)
# Definitions cut out of large files, with the plain imports of the standard library and torch in front of them.
_CUT = {
    "sglang/srt/utils/common.py": {"SafeUnpickler", "safe_pickle_load", "safe_pickle_loads", "_safe_load_torch_storage"}
    | {"ImageData", "VideoData"},
    "sglang/srt/managers/schedule_batch.py": {"Modality"},
}
# What the receiver asks of its own process; the modules' real files start half of an engine.
_WRITTEN = {
    "psutil.py": "def virtual_memory():\n    raise OSError('not here')\n",
    "sglang/srt/debug_utils/cuda_coredump.py": "",
    "sglang/srt/managers/io_struct.py": """
from dataclasses import dataclass

@dataclass
class EncoderDispatchErrorReq:
    rid: str
    error_msg: str
    error_code: int
""",
    "sglang/srt/observability/trace.py": "def fastapi_telemetry_disabled_kwargs():\n    return {}\n",
    "sglang/srt/runtime_context.py": """
from types import SimpleNamespace

def get_disagg():
    return SimpleNamespace(encoder_transfer_backend="zmq_to_scheduler", encoder_urls=[])

def get_serving():
    return SimpleNamespace(host="127.0.0.1")

def get_parallel():
    return SimpleNamespace(tp_size=1, nnodes=1, pp_rank=0, tp_rank=0, tp_group=None)

get_device = get_exec = get_mm = get_model = None
""",
}


def download_wheel(version: str, folder: Path) -> Path:
    """From the package index. It is not installed: its sources are the same for all platforms."""
    platform = ["--platform", "manylinux_2_34_x86_64", "--python-version", "3.11", "--implementation", "cp"]
    flags = ["--no-deps", "--only-binary=:all:", *platform, "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *flags, f"sglang=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"SGLang {version} is needed for this test, and pip cannot load it:\n{done.stderr}"
    (wheel,) = folder.glob(f"sglang-{version}-*.whl")
    return wheel


def receiving_side(wheel: Path, folder: Path) -> None:
    """Writes a tree of importable modules; put `folder` on PYTHONPATH."""
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        sources = {name: files.read(name).decode() for name in (*_WHOLE, *_CUT) if name in names}
        identity = "sglang/srt/multimodal/cache/identity.py"
        if identity in names:  # the package's own __init__ brings its cache along
            sources["sglang/srt/multimodal/cache/__init__.py"] = files.read(identity).decode()
    for name, kept in _CUT.items():
        sources[name] = _cut(sources[name], kept)
    if "sglang/srt/multimodal/modality.py" in sources:
        sources["sglang/srt/managers/schedule_batch.py"] = "from sglang.srt.multimodal.modality import Modality\n"
    sources["sglang/srt/utils/__init__.py"] = "from sglang.srt.utils.common import *\n"
    sources |= _WRITTEN
    (receiver,) = (source for name, source in sources.items() if name.endswith("receiver.py"))
    for module, mentioned in _imported(receiver).items():
        name = f"{module.replace('.', '/')}.py"
        package = name.removesuffix(".py") + "/__init__.py"
        name = package if package in sources else name
        defined = sources.get(name, "")
        missing = [each for each in mentioned if f" {each}" not in defined]
        sources[name] = defined + "".join(f"\nclass {each}: ...\n" for each in missing)
    for name, source in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


def _imported(source: str) -> dict[str, list[str]]:
    """The names that a file imports from SGLang, by module."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sglang."):
            found.setdefault(node.module, []).extend(alias.name for alias in node.names)
    return found


def _cut(source: str, kept: set[str]) -> str:
    """The definitions with these names, under the file's own imports of the standard library and torch."""
    lines = source.splitlines()
    parts = ["from __future__ import annotations"]
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            known = all(each.split(".")[0] in sys.stdlib_module_names | {"torch"} for each in modules)
            wanted = known and modules != ["__future__"]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            wanted = node.name in kept
        else:
            wanted = False
        if wanted:
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
            parts.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "\n".join(parts) + "\n"
