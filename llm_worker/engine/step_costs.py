"""Predicts how long a step takes, from measurements of the start that every step corrects."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vitrine_vlm.llm_worker.engine.chunk import Chunk

# Least weight of the newest step in the factor that corrects the measurements of the start.
_CORRECTION_RATE = 0.05
_CORRECTION_BOUNDS = (0.05, 20.0)


class StepSize(NamedTuple):
    """What the duration of a step depends on.

    num_decoding: sequences of one token. num_keys: tokens that these attend to.
    num_prompt_tokens: tokens of all other sequences. num_pairs: pairs of such a token and one that it attends to.
    """

    num_decoding: int = 0
    num_keys: int = 0
    num_prompt_tokens: int = 0
    num_pairs: int = 0

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> StepSize:
        num_decoding = num_keys = num_prompt_tokens = num_pairs = 0
        for _, start, stop, _, _ in chunks:
            if stop - start == 1:
                num_decoding += 1
                num_keys += stop
            else:
                num_prompt_tokens += stop - start
                num_pairs += causal_pairs(start, stop)
        return cls(num_decoding, num_keys, num_prompt_tokens, num_pairs)

    @property
    def num_tokens(self) -> int:
        return self.num_decoding + self.num_prompt_tokens


def causal_pairs(start: int, stop: int) -> int:
    """Pairs of one of the tokens [start, stop) and a token up to itself."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


class StepCosts:
    """seconds = correction * (seconds of so many tokens + per_key_s * keys + per_pair_s * pairs)

    correction: follows the steps that are computed, also where another process has a part of the GPU.
    """

    def __init__(
        self,
        decode_s: Mapping[int, float],
        mixed_s: Mapping[int, float],
        per_key_s: float = 0.0,
        per_pair_s: float = 0.0,
    ) -> None:
        """
        Args:
            decode_s: seconds by number of tokens, without attention, of steps that only decode; mixed_s: of others.
        """
        self.decode_s, self.mixed_s = dict(sorted(decode_s.items())), dict(sorted(mixed_s.items()))
        self.per_key_s, self.per_pair_s = per_key_s, per_pair_s
        self.correction = 1.0
        self._num_observed = 0
        self._decode, self._mixed = _Line(self.decode_s), _Line(self.mixed_s)

    @classmethod
    def unknown(cls) -> StepCosts:
        """Costs of nothing: only limits in tokens bound a step."""
        return cls({1: 0.0}, {1: 0.0})

    def seconds(self, size: StepSize) -> float:
        """Seconds that a step takes from its launch, or from the end of the one in front, to its end."""
        of_tokens = (self._mixed if size.num_prompt_tokens else self._decode).at(size.num_tokens)
        return self.correction * (of_tokens + self.per_key_s * size.num_keys + self.per_pair_s * size.num_pairs)

    def observe(self, size: StepSize, seconds: float) -> None:
        """Corrects the model by how long a step really took: by the mean of the first steps, slowly from then on."""
        expected = self.seconds(size)
        if expected > 0:
            self._num_observed += 1
            rate = max(_CORRECTION_RATE, 1 / self._num_observed)
            # A pause of the host is no cost: a step counts as twice as long as expected at most.
            corrected = self.correction * (1 + rate * (min(seconds / expected, 2.0) - 1))
            self.correction = min(max(corrected, _CORRECTION_BOUNDS[0]), _CORRECTION_BOUNDS[1])


class _Line:
    """Seconds at each number of tokens: straight between the measured ones, in proportion behind the last."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._sizes, self._seconds = list(seconds), list(seconds.values())

    def at(self, num_tokens: int) -> float:
        sizes, seconds = self._sizes, self._seconds
        index = bisect_left(sizes, num_tokens)
        if index == len(sizes):
            return seconds[-1] * num_tokens / sizes[-1]
        if index == 0:
            return seconds[0]
        part = (num_tokens - sizes[index - 1]) / (sizes[index] - sizes[index - 1])
        return seconds[index - 1] + part * (seconds[index] - seconds[index - 1])
