"""The scorer of the demo."""

import re

_PIRATE = re.compile(
    r"\b(a+r+|arrr+|ahoy|aye|avast|matey|mateys|hearty|hearties|shipmates?|ye|yer|landlubbers?|scallywags?)\b",
    re.IGNORECASE,
)


def speaks_pirate(completion: str, row: dict) -> float:
    """Return 1.0 if the completion has a word that only a pirate would say, else 0.0."""
    return float(_PIRATE.search(completion) is not None)
