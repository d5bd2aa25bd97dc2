"""Has templates of requests rendered by processes that are ended where one takes too much."""

from __future__ import annotations

import json
import weakref
from typing import Any

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.limited_processes import LimitedProcesses, TookTooMuch

# The module imports transformers, which takes a while: only the process does.
_MODULE = "vitrine_vlm.llm_worker.prompt.template_process"


class TemplateRenderer:
    """Renders templates in `LimitedProcesses`, which end with it. Safe on any thread.

    Args:
        cpu_s: CPU time of one template, seconds.
    """

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        self._processes = LimitedProcesses(_MODULE, cpu_s)
        weakref.finalize(self, self._processes.close)

    def render(self, **arguments: Any) -> str:
        """Returns what transformers' `render_jinja_template` makes of these arguments.

        Raises:
            BadRequest: the template refuses them, or takes more time or memory, or writes more, than it may.
        """
        try:
            answer = json.loads(self._processes.ask(json.dumps(arguments | {"cpu_s": self._cpu_s})))
        except TookTooMuch as error:
            limit = f"more than {self._cpu_s:g} s" if error.is_time else "too much memory"
            raise BadRequest(f"chat_template: it takes {limit}: send a simpler one", "chat_template") from error
        if "error" in answer:
            raise BadRequest(answer["error"], "chat_template")
        text: str = answer["text"]
        return text
