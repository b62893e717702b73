"""The forms in which a model's update can be held and sent."""

from typing import Literal

Form = Literal["full", "factors", "hadamard", "one-sided", "one-sided-orthonormal", "from-zero", "compressed"]
FORMS: tuple[Form, ...] = (
    "full",
    "factors",
    "hadamard",
    "one-sided",
    "one-sided-orthonormal",
    "from-zero",
    "compressed",
)
Family = Literal["lora", "loha"]
