"""Types of values in recipes and rows, which pydantic checks, and what it says of others."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic's below Python 3.12

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Steps = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)]  # below 1: of the run


def _without_nulls(message: Any) -> Any:  # which a table has for keys that other rows use
    kept = isinstance(message, dict) and {k: v for k, v in message.items() if v is not None}
    return kept or message


@with_config(ConfigDict(extra="forbid"))
class Message(TypedDict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


Messages = list[Annotated[Message, BeforeValidator(_without_nulls)]]


def reason(error: ValidationError) -> str:
    """What was expected; of several types, what was of each."""
    reasons = (e["msg"].removeprefix("Value error, ") for e in error.errors())
    joined = " or ".join(dict.fromkeys(x[0].lower() + x[1:] for x in reasons))
    return joined.replace(" or input should be ", " or ")
