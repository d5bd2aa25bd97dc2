"""Run by the Python that has vLLM: prints what its server's parser makes of lists of arguments, as JSON.

python parse_arguments.py '[["MODEL", "--port=1"], ["--config", "FILE"]]'
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:  # older ones
    from vllm.entrypoints.openai.cli_args import make_arg_parser


def _as_json(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def main(lists: str) -> None:
    parser = make_arg_parser(FlexibleArgumentParser())
    parsed = [vars(parser.parse_args(arguments)) for arguments in json.loads(lists)]
    print(json.dumps(parsed, default=_as_json))


main(sys.argv[1])
