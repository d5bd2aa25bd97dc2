"""Compiles grammars for the model's vocabulary, away from the event loops and the engine's thread."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from llguidance import LLMatcher, LLTokenizer

from vitrine_vlm.errors import Overloaded
from vitrine_vlm.llm_worker.engine.grammar import Grammar, num_characters
from vitrine_vlm.llm_worker.engine.grammar_checker import GrammarChecker
from vitrine_vlm.llm_worker.engine.grammar_matcher import GrammarMatcher
from vitrine_vlm.llm_worker.engine.grammar_source import GrammarError, parser_limits
from vitrine_vlm.service_runtime.queue_time import QueueTime

MAX_CHARACTERS = 256 * 1024
_NUM_THREADS = 2
_MAX_WAITING = 64
_MAX_CACHED = 64

# The digest of a cache scope, and a grammar.
_Key: TypeAlias = tuple[bytes, Grammar]


class GrammarCompiler:
    """Keeps the grammars that were used last. Safe on any thread.

    Args:
        tokenizer: of the model, with as many entries as its logits.
    """

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._checker = GrammarChecker()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._queue_time = QueueTime(_NUM_THREADS)
        self._compiled: OrderedDict[_Key, LLMatcher] = OrderedDict()
        self._compiling: dict[_Key, Future[LLMatcher]] = {}

    async def matcher(self, grammar: Grammar, scope: bytes = b"") -> GrammarMatcher:
        """Returns a new matcher for one answer.

        Args:
            scope: the digest of the request's cache scope: compiled grammars are used again within an equal one only.

        Raises:
            GrammarError: the grammar cannot be used.
            Overloaded: too many grammars wait to be compiled.
        """
        key = (scope, grammar)
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            # Shielded: other requests may wait for the same grammar.
            compiled = await asyncio.shield(asyncio.wrap_future(self._compile_once(key)))
        self._compiled[key] = compiled  # the last one now
        if len(self._compiled) > _MAX_CACHED:
            self._compiled.popitem(last=False)
        return GrammarMatcher(compiled.deep_copy(), self._tokenizer)

    def close(self) -> None:
        """Ends the threads and their processes."""
        self._threads.shutdown(cancel_futures=True)
        self._checker.close()

    def _compile_once(self, key: _Key) -> Future[LLMatcher]:
        compiling = self._compiling.get(key)
        if compiling is not None:
            return compiling
        _, grammar = key
        if (length := num_characters(grammar)) > MAX_CHARACTERS:
            raise GrammarError(f"the grammar has {length} characters: at most {MAX_CHARACTERS} are accepted")
        if len(self._compiling) >= _MAX_WAITING:
            raise Overloaded(
                f"{len(self._compiling)} grammars wait to be compiled: try again",
                self._queue_time.seconds(len(self._compiling)),
            )
        compiling = self._threads.submit(self._compile, grammar)
        self._compiling[key] = compiling
        compiling.add_done_callback(lambda _: self._compiling.pop(key, None))
        return compiling

    def _compile(self, grammar: Grammar) -> LLMatcher:
        with self._queue_time.work(1):
            source = self._checker.source(grammar)
            # Without the interpreter's lock, so that other threads run. No more work than its check was.
            compiled = LLMatcher(self._tokenizer, source, limits=parser_limits(), log_level=0)
        if compiled.is_error():
            raise GrammarError(compiled.get_error().partition("\n<")[0])
        return compiled
