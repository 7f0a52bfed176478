"""What all blocks of a recipe are: typed, closed and frozen; and the kinds of value that several of them hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from fedllm_sec.recipe.numbers import FINITE, as_written, need_number
from fedllm_sec.recipe.places import home, named, own_folder, printable

BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Place = Annotated[
    str, AfterValidator(named), AfterValidator(home)
]  # a path from the working directory, in which ~ is the home folder
Folder = Annotated[Place, AfterValidator(printable), AfterValidator(own_folder)]
MOST_CLASSES = 100_000  # of images: a model has an output for each
Count = Annotated[int, Field(ge=1, le=10**9)]  # of rows, steps, rounds or clients
Positive = Annotated[float, Field(ge=1e-12, le=1e12)]
Rate = Annotated[float, Field(ge=1e-12, le=1e6)]  # of learning
Schedule = Literal["constant", "linear", "cosine"]  # of a learning rate, down to a tenth
Word = Annotated[str, BeforeValidator(as_written)]  # a value of a table: {0: World} is written without quotes


class Section(BaseModel):
    model_config = ConfigDict(**FINITE, extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return need_number(value, cls.model_fields[str(info.field_name)].annotation)
