"""Languages of letters in which every next letter can be checked, made from seeds.

A letter is followed by the one so many steps further on in a circle of 48. Which steps are likely
is the language's; their probabilities fall off like a power of the rank, so that much of the mass
lies on many letters and a top-K leaves a good share of it out. Every twelfth letter mostly ends.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
LETTERS = string.ascii_letters[:48]
FINAL = LETTERS[11::12]
_ENDS = 0.85  # the chance to end at a final letter


@dataclass(frozen=True)
class Language:
    """The likeliest steps in their order; what comes behind them are the other steps, upwards."""

    steps: tuple[int, ...] = (1,)
    exponent: float = 1.5  # of the rank, in the probability of a step
    longest: int = 22  # letters of a completion

    def ranked(self) -> list[int]:
        """All 48 steps, the likeliest first."""
        others = (step for step in range(1, len(LETTERS) + 1) if step not in self.steps)
        return [*self.steps, *others]

    def complete(self, first: str, generator: np.random.Generator) -> str:
        """The letters that follow the first one."""
        share = np.arange(1, len(LETTERS) + 1) ** -self.exponent
        steps = generator.choice(self.ranked(), self.longest, p=share / share.sum())
        letters = first
        for step in steps:
            if letters[-1] in FINAL and generator.random() < _ENDS:
                break
            letters += LETTERS[(LETTERS.index(letters[-1]) + step) % len(LETTERS)]
        return letters[1:]

    def rows(self, count: int, seed: int) -> list[Row]:
        """Prompts of one letter and their completions."""
        generator = np.random.default_rng(seed)
        firsts = generator.choice(list(LETTERS), count)
        return [{"prompt": str(x), "completion": self.complete(str(x), generator)} for x in firsts]


def shuffled(seed: int, count: int = 20) -> Language:
    """A language whose likeliest steps are the first so many in a random order."""
    return Language(tuple(int(x) for x in np.random.default_rng(seed).permutation(count) + 1))


def mixed(rows: Sequence[list[Row]]) -> list[Row]:
    """Rows of several languages, one of each in turn."""
    return [row for turn in zip(*rows, strict=True) for row in turn]


def alternating(count: int, teachers: Sequence[str]) -> list[Row]:
    """Prompts that are each scored by one of several teachers, in turn."""
    return [
        {"prompt": letter, "teacher": teacher}
        for _ in range(-(-count // (len(LETTERS) * len(teachers))))
        for letter in LETTERS
        for teacher in teachers
    ][:count]


def share_of_steps(text: str, step: int, first: str) -> float:
    """The share of a completion's letters, and of its end, that a rule of one step would give.

    A final letter has to be the last, and the last one has to be final.
    """
    right = list(_judged(first + text, step))
    return sum(right) / len(right)


def _judged(letters: str, step: int) -> Iterator[bool]:
    for one, following in zip(letters, [*letters[1:], ""], strict=True):
        if one in FINAL or not following:
            yield one in FINAL and not following
        else:
            known = one in LETTERS and following in LETTERS  # and no digit
            ahead = LETTERS.find(following) - LETTERS.find(one)
            yield known and ahead % len(LETTERS) == step


def counts_on(text: str, row: Row) -> float:
    """A scorer: the share of the completion that counts on by one and ends where it has to."""
    return share_of_steps(text, 1, row["prompt"])


RULES = (1, 2, 3, 4)  # steps that a system message can ask for


def _asked(letter: str, rule: int | None) -> list[dict[str, str]]:
    system = [] if rule is None else [{"role": "system", "content": str(rule)}]
    return [*system, {"role": "user", "content": letter}]


def instructed(count: int, seed: int) -> list[Row]:
    """Completions that count by a rule, which a system message tells in two of three."""
    generator, rows = np.random.default_rng(seed), []
    for number in range(count):
        rule, letter = int(generator.choice(RULES)), str(generator.choice(list(LETTERS)))
        completion = ruled(rule).complete(letter, generator)
        shown = rule if number % 3 else None
        rows.append({"prompt": _asked(letter, shown), "completion": completion})
    return rows


def ruled(rule: int) -> Language:
    """The language of a rule, less flat than that of claim 1."""
    return Language((rule,), exponent=2.0, longest=14)


def with_rules(count: int, rules: Sequence[int]) -> list[Row]:
    """Prompts of one letter, of which each has every rule as its privileged context, in turn."""
    pairs = [(letter, rule) for letter in LETTERS for rule in rules]
    copies = [pairs[number % len(pairs)] for number in range(count)]
    return [{"prompt": x, "privileged_context": str(rule), "rule": rule} for x, rule in copies]


def follows_rule(text: str, row: Row) -> float:
    """A scorer: the share of the completion that counts by its row's rule and ends as it has to."""
    return share_of_steps(text, row["rule"], row["prompt"])
