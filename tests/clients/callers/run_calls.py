"""Runs in a client's own environment: reads calls from stdin, one JSON object a line, and answers each on stdout.

python run_calls.py MODULE

A call is {"function": name in MODULE, "arguments": {...}}; its answer {"value": ...}, or {"error": ...} with what the
client's exception says.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def describe(error: Exception) -> dict[str, Any]:
    """Names of the exception's classes, its text, and the attributes in which clients keep what a server answered."""
    attributes = {name: getattr(error, name, None) for name in ("status_code", "code", "param", "type")}
    return {
        "classes": [f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__],
        "message": str(error),
        **{name: value for name, value in attributes.items() if isinstance(value, str | int)},
    }


def main() -> None:
    # What clients print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    module = importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        call = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"value": getattr(module, call["function"])(**call["arguments"])}
        except Exception as error:
            answer = {"error": describe(error)}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # threads that clients leave behind would hold the process


if __name__ == "__main__":
    main()
