"""The demo's rule, measured by a plain function."""

import re

_PIRATE = re.compile(
    r"\b(a+r+|arrr+|ahoy|aye|avast|matey|mateys|hearty|hearties|shipmates?|ye|yer|landlubbers?|scallywags?)\b",
    re.IGNORECASE,
)


def speaks_pirate(completion: str, row: dict) -> float:
    """1.0 if the completion has at least one word that only a pirate would say, else 0.0."""
    return float(_PIRATE.search(completion) is not None)
