"""Random choices that are the same on every machine and Python version."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Choices drawn from a key.

    They use only `random.Random.random`, the one function of `random` whose sequence Python promises never to change.
    """

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        return int(self._random() * count)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def first(self, options: Sequence[T], probability: float) -> T:
        """The first of the options with that probability, else any."""
        return options[0] if self.chance(probability) else self.pick(options)

    def popular(self, options: Sequence[T]) -> T:
        """One of the options, the earlier the likelier: one draw in three is from the first tenth."""
        point = self._random()
        return options[int(len(options) * point * point)]

    def weighted(self, weights: Mapping[T, float]) -> T:
        """One of the keys, as often as its weight says."""
        point = self._random() * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0:
                return key
        return key

    def some(self, options: Sequence[T], count: int, weights: Sequence[float] | None = None) -> list[T]:
        """At most `count` of the options, each once, in random order; heavier ones tend to come first."""
        left = dict(enumerate(weights or [1.0] * len(options)))
        chosen: list[int] = []
        for _ in range(min(count, len(options))):
            chosen.append(self.weighted(left))
            del left[chosen[-1]]
        return [options[i] for i in chosen]


def point(*key: object) -> float:
    """A number in [0, 1) that stands for the key."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, key)).encode()).digest()[:6], "big") / 2**48
