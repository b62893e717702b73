"""Many methods over seeds and client counts on the same workload: run, continued, and judged side by side."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloru_flwr.compare.command import Outcome, compare, report

__all__ = ["Outcome", "compare", "report"]


def __getattr__(name: str) -> Any:
    # Lazily: worker processes import this package for its worker alone.
    if name in __all__:
        from fedloru_flwr.compare import command

        return getattr(command, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
