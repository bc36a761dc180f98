"""Languages of letters in which every next letter can be checked, generated from seeds.

The 48 letters form a circle, and the next letter is a number of steps further. A language ranks the
steps, and their probabilities fall off like a power of the rank. Therefore much of the mass lies on
many letters, and a top-K leaves out a good share of it. Every twelfth letter mostly ends a
completion.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
LETTERS = string.ascii_letters[:48]
FINAL = LETTERS[11::12]
_END_PROBABILITY = 0.85  # at a final letter


@dataclass(frozen=True)
class Language:
    """A ranking of the steps: the given ones first, then all others in ascending order."""

    steps: tuple[int, ...] = (1,)
    exponent: float = 1.5  # the probability of a step is proportional to rank ** -exponent
    max_letters: int = 22  # of a completion

    def ranked(self) -> list[int]:
        """Return all 48 steps, the most likely first."""
        others = (step for step in range(1, len(LETTERS) + 1) if step not in self.steps)
        return [*self.steps, *others]

    def complete(self, first: str, generator: np.random.Generator) -> str:
        """Return a completion of a prompt of one letter."""
        share = np.arange(1, len(LETTERS) + 1) ** -self.exponent
        steps = generator.choice(self.ranked(), self.max_letters, p=share / share.sum())
        letters = first
        for step in steps:
            if letters[-1] in FINAL and generator.random() < _END_PROBABILITY:
                break
            letters += LETTERS[(LETTERS.index(letters[-1]) + step) % len(LETTERS)]
        return letters[1:]

    def rows(self, count: int, seed: int) -> list[Row]:
        """Return rows with prompts of one letter and their completions."""
        generator = np.random.default_rng(seed)
        firsts = generator.choice(list(LETTERS), count)
        return [{"prompt": str(x), "completion": self.complete(str(x), generator)} for x in firsts]


def shuffled(seed: int, count: int = 20) -> Language:
    """Return a language that ranks the steps 1 to count first, in a random order."""
    return Language(tuple(int(x) for x in np.random.default_rng(seed).permutation(count) + 1))


def mixed(rows: Sequence[list[Row]]) -> list[Row]:
    """Interleave the rows of several languages."""
    return [row for turn in zip(*rows, strict=True) for row in turn]


def alternating(count: int, teachers: Sequence[str]) -> list[Row]:
    """Return prompts that name one of several teachers in turn."""
    return [
        {"prompt": letter, "teacher": teacher}
        for _ in range(-(-count // (len(LETTERS) * len(teachers))))
        for letter in LETTERS
        for teacher in teachers
    ][:count]


def share_of_steps(text: str, step: int, first: str) -> float:
    """Return the share of letters, and of the end, that follow a rule of one step.

    The end is right if the last letter is final; a final letter anywhere else is wrong.
    """
    right = list(_is_right(first + text, step))
    return sum(right) / len(right)


def _is_right(letters: str, step: int) -> Iterator[bool]:
    for one, following in zip(letters, [*letters[1:], ""], strict=True):
        if one in FINAL or not following:
            yield one in FINAL and not following
        else:
            known = one in LETTERS and following in LETTERS  # not a digit or a mark
            ahead = LETTERS.find(following) - LETTERS.find(one)
            yield known and ahead % len(LETTERS) == step


def counts_on(text: str, row: Row) -> float:
    """Score the share of letters that are one step further; the end counts as one letter."""
    return share_of_steps(text, 1, row["prompt"])


RULES = (1, 2, 3, 4)  # steps that a system message can name


def _chat(letter: str, rule: int | None) -> list[dict[str, str]]:
    system = [] if rule is None else [{"role": "system", "content": str(rule)}]
    return [*system, {"role": "user", "content": letter}]


def instructed(count: int, seed: int) -> list[Row]:
    """Return rows that count by a rule; two of three name it in a system message."""
    generator, rows = np.random.default_rng(seed), []
    for number in range(count):
        rule, letter = int(generator.choice(RULES)), str(generator.choice(list(LETTERS)))
        completion = ruled(rule).complete(letter, generator)
        shown = rule if number % 3 else None
        rows.append({"prompt": _chat(letter, shown), "completion": completion})
    return rows


def ruled(rule: int) -> Language:
    """Return the language of a rule, which is less flat than that of claim 1."""
    return Language((rule,), exponent=2.0, max_letters=14)


def with_rules(count: int, rules: Sequence[int]) -> list[Row]:
    """Return prompts of one letter, each with every rule in turn as privileged context."""
    pairs = [(letter, rule) for letter in LETTERS for rule in rules]
    copies = [pairs[number % len(pairs)] for number in range(count)]
    return [{"prompt": x, "privileged_context": str(rule), "rule": rule} for x, rule in copies]


def follows_rule(text: str, row: Row) -> float:
    """Score the share of the completion that follows its row's rule, with the end in place."""
    return share_of_steps(text, row["rule"], row["prompt"])
