"""Types of fields in JSON requests, stricter than pydantic's own."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator
from pydantic_core import ErrorDetails

_MAX_PROBLEM_LENGTH = 300


def _whole_number(value: object) -> object:
    """Takes 16.0 for 16: some languages write no integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Strict: "5" and true are no numbers, and 1 is not true.
WholeNumber = Annotated[StrictInt, BeforeValidator(_whole_number)]
Number = Annotated[float, Field(strict=True)]


class RequestObject(BaseModel):
    """An object in a request's body."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: object) -> object:
        """Drops fields that are null, as some clients write fields that were not set."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


def problem_of(error: ErrorDetails) -> str:
    """What is wrong with a field, by pydantic's error."""
    if error["type"] == "extra_forbidden":
        return "it is not supported here: leave it out"
    # Some messages repeat the value, which may be long.
    return error["msg"].removeprefix("Value error, ")[:_MAX_PROBLEM_LENGTH]
