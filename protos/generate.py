"""Generates the stubs beside each .proto, or with --check only checks whether they are up to date.

It runs in the environment of protos/requirements.txt, which `make protos` creates, because the generator must be that
of the oldest gRPC and protobuf that Vitrine supports.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = sorted(path.relative_to(_ROOT) for path in (_ROOT / "vitrine_vlm/protos").rglob("*.proto"))
_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
_PLUGINS = ("mypy", "mypy_grpc")


def generate(folder: Path) -> list[Path]:
    """Writes the stubs of every .proto below `folder`, in folders as of the packages; returns their relative paths."""
    # The generator's plugins are beside the interpreter, whose folder need not be on PATH.
    plugins = [f"--plugin=protoc-gen-{name}={Path(sys.executable).parent / f'protoc-gen-{name}'}" for name in _PLUGINS]
    outputs = [
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
        *(f"--{name}_out=quiet:{folder}" for name in _PLUGINS),
    ]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *plugins, *outputs, *map(str, _SOURCES)]
    subprocess.run(command, cwd=_ROOT, check=True)
    return [source.with_name(source.stem + suffix) for source in _SOURCES for suffix in _SUFFIXES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a stub differs")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stubs = generate(folder)
        differing = [
            stub
            for stub in stubs
            if not (_ROOT / stub).exists() or not filecmp.cmp(folder / stub, _ROOT / stub, shallow=False)
        ]
        if check:
            for stub in differing:
                print(f"{stub} does not match its .proto: run make protos", file=sys.stderr)
            return 1 if differing else 0
        for stub in differing:
            shutil.copyfile(folder / stub, _ROOT / stub)
            print(f"wrote {stub}")
    print(f"{len(stubs)} stubs up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
