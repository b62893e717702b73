"""What a run will cost, told before it starts: bytes, memory and transfer times, from shapes alone.

The figures in bytes come from a rehearsal: the run's own rules for who takes part, who lacks what and what a message
holds, with shapes in place of numbers. See `plan`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloru_flwr.plan.planning import Bandwidth, MethodPlan, Plan, plan

__all__ = ["Bandwidth", "MethodPlan", "Plan", "plan"]


def __getattr__(name: str) -> Any:
    # Lazily: the command's other parts need none of it.
    if name in __all__:
        from fedloru_flwr.plan import planning

        return getattr(planning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
