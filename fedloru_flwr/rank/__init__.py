"""The rank story, measured: curvature of clients and server, how alike clients are, and what accumulation builds."""

from typing import TYPE_CHECKING, Any

from fedloru_flwr.rank.operators import LossHessian, adapter_hessian, module_hessian
from fedloru_flwr.rank.perturbation import Population, limit, simulate
from fedloru_flwr.rank.products import ledger_ranks, matrix_rank, product_rank
from fedloru_flwr.rank.similarity import pair_similarities, similarities
from fedloru_flwr.rank.spectra import Spectrum, spectrum, stable_ranks

if TYPE_CHECKING:
    from fedloru_flwr.rank.command import Analysis, rank

__all__ = [
    "Analysis",
    "LossHessian",
    "Population",
    "Spectrum",
    "adapter_hessian",
    "ledger_ranks",
    "limit",
    "matrix_rank",
    "module_hessian",
    "pair_similarities",
    "product_rank",
    "rank",
    "similarities",
    "simulate",
    "spectrum",
    "stable_ranks",
]


def __getattr__(name: str) -> Any:
    # Lazily: the mathematics needs neither Flower nor the comparison's workers.
    if name in ("Analysis", "rank"):
        from fedloru_flwr.rank import command

        return getattr(command, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
