"""What a probe is: a maker of samples whose answer is known, at a place in a text of exactly so many tokens."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .material import Material


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens ids [N], int32, of which the last `answer` are the answer."""

    ids: np.ndarray
    answer: int


@dataclass(frozen=True)
class Probe(ABC):
    """A kind of question; its options are the fields of a frozen dataclass.

    name: what users call it.
    axis: what varies beside the length: "depth", 0 (begin) to 1 (right before the question), or "distance", in tokens.
    figure: the headline: "accuracy" (all tokens of the answer right) or "tokens_right" (the share of them).
    """

    name: ClassVar[str]
    axis: ClassVar[str] = "depth"
    figure: ClassVar[str] = "accuracy"

    @abstractmethod
    def make(self, material: Material, length: int, place: float, draw: np.random.Generator) -> Sample:
        """Return a sample of exactly `length` tokens with what is asked for at `place`."""

    @abstractmethod
    def check(self, material: Material, length: int, place: float, draw: np.random.Generator) -> None:
        """Raise ValueError where `make` could not."""

    def chance(self, material: Material) -> float | None:
        """Return what guessing without a look at the right place is expected to reach in `figure`; None: unknown."""
        return None

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        changed = [(f.name, getattr(self, f.name)) for f in fields if getattr(self, f.name) != f.default]
        return self.name + (f"({', '.join(f'{name}={value}' for name, value in changed)})" if changed else "")


@dataclass(frozen=True)
class Told:
    """A sample in words.

    facts: (depth, text), what stands in the haystack; of equal depths the first one comes first.
    question, answer: what ends the sample; the answer begins with the space it needs.
    intro: what begins it.
    """

    facts: list[tuple[float, str]]
    question: str
    answer: str
    intro: str = ""


class DepthProbe(Probe):
    """A probe that hides facts in a haystack at exact depths, and asks for one at the end: only `tell` is its own."""

    @abstractmethod
    def tell(self, depth: float, draw: np.random.Generator) -> Told:
        """Return the words of a sample that asks for a fact at `depth`; texts hang on `draw` alone, not on depth."""

    def make(self, material: Material, length: int, place: float, draw: np.random.Generator) -> Sample:
        told = self.tell(place, draw)
        facts = sorted(told.facts, key=lambda fact: fact[0])
        question, answer = material.split(told.question, told.answer)
        begin = material.prefix + material.encode(told.intro)
        texts = [material.encode(text) for _, text in facts]
        room = length - len(begin) - sum(map(len, texts)) - len(question) - len(answer)
        hay = material.filling(room, int(draw.integers(len(material.haystack))))
        cuts = [round(depth * room) for depth, _ in facts]
        parts: list[np.ndarray | list[int]] = [begin]
        for start, stop, text in zip([0, *cuts], cuts, texts, strict=False):
            parts += [hay[start:stop], text]
        parts += [hay[cuts[-1] :], question, answer]
        return Sample(np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]), len(answer))

    def check(self, material: Material, length: int, place: float, draw: np.random.Generator) -> None:
        if not 0 <= place <= 1:
            raise ValueError(
                f"a depth must lie between 0 (the begin) and 1 (right before the question), got {place}."
            )
        told = self.tell(place, draw)
        question, answer = material.split(told.question, told.answer)
        if not answer or material.tokenizer.unk_token_id in (*question, *answer):
            raise ValueError(
                f"the tokenizer has no tokens for {told.question + told.answer!r}, which {self} asks for; use the "
                "probe copy, which needs no words."
            )
        texts = [told.intro, *(text for _, text in told.facts)]
        words = (
            sum(len(material.encode(text)) for text in texts)
            + len(material.prefix)
            + len(question)
            + len(answer)
        )
        if length < words:
            raise ValueError(
                f"length={length} is too short for {self}, whose own words take {words} tokens; use {words} or more."
            )


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless the option is one of the known ones."""
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}.")


def check_count(name: str, value: int, least: int, most: int) -> None:
    """Raise ValueError unless the option is a whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}.")
