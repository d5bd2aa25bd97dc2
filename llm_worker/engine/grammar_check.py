"""A process that checks grammars: `python -m vitrine_vlm.llm_worker.engine.grammar_check`.

It reads a grammar a line from stdin, and writes what `grammar_source` makes of it to stdout. Some small grammars take
minutes and gigabytes, and nothing can stop a thread that is in the middle of one. This process ends by a signal once a
grammar has taken a second of its CPU time, and can ask for little memory.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from dataclasses import asdict
from typing import Any

from vitrine_vlm.llm_worker.engine.grammar import (
    ChoiceGrammar,
    EbnfGrammar,
    Grammar,
    JsonGrammar,
    RegexGrammar,
    ToolGrammar,
)
from vitrine_vlm.llm_worker.engine.grammar_source import GrammarError, grammar_source

MAX_CPU_S = 1.0
MAX_MEMORY_BYTES = 512 * 2**20
_KINDS: dict[str, type[Grammar]] = {
    each.__name__: each for each in (JsonGrammar, RegexGrammar, ChoiceGrammar, EbnfGrammar, ToolGrammar)
}


def grammar_to_json(grammar: Grammar) -> str:
    """The grammar in one line."""
    return json.dumps([type(grammar).__name__, asdict(grammar)])


def _grammar_from_json(line: str) -> Grammar:
    kind, fields = json.loads(line)
    if "tools" in fields:
        fields["tools"] = tuple(tuple(each) for each in fields["tools"])
    if "choices" in fields:
        fields["choices"] = tuple(fields["choices"])
    return _KINDS[kind](**fields)


def _check(line: str) -> dict[str, Any]:
    try:
        return {"source": grammar_source(_grammar_from_json(line))}
    except GrammarError as error:
        return {"error": str(error), "path": error.path}


def main() -> None:
    """Answers until stdin ends."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)  # SIGPROF ends a process, also in the middle of native code
        answer = _check(line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
