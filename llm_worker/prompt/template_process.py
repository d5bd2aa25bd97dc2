"""A process that renders templates of requests: `python -m vitrine_vlm.llm_worker.prompt.template_process`.

It reads the arguments of a rendering as a line of JSON from stdin, and writes the text, or why there is none, to
stdout. `{{ 9**(9**9) }}` takes hours, and nothing can stop a thread that is in the middle of it. This process ends by a
signal once a template has taken its CPU time, and can ask for little memory.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MAX_MEMORY_BYTES = 512 * 2**20
MAX_RENDERED_LENGTH = 8 * 1024 * 1024
# Templates of requests do not run before what serves other requests.
_NICENESS = 10


def _render(render: Callable[..., tuple[list[str], Any]], arguments: dict[str, Any]) -> dict[str, str]:
    try:
        texts, _ = render(**arguments)
    except MemoryError:
        return {"error": "chat_template: it takes too much memory: send a simpler one"}
    except Exception as error:  # templates may raise any exception
        # transformers repeats the whole prompt below the first line.
        return {"error": f"the chat template refuses these messages: {str(error).partition(chr(10))[0]}"}
    if len(texts[0]) > MAX_RENDERED_LENGTH:
        return {"error": f"chat_template: it wrote more than {MAX_RENDERED_LENGTH} characters"}
    return {"text": texts[0]}


def main() -> None:
    """Answers until stdin ends."""
    os.nice(_NICENESS)
    # Only now: its import takes seconds of CPU time, and a template that is ended costs the next one a new process.
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    for line in sys.stdin:
        arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, arguments.pop("cpu_s"))  # SIGPROF ends a process, also in native code
        answer = _render(render_jinja_template, arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
