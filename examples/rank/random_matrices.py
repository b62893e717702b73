r"""The theorem's random matrices, step by step: does a client's Hessian have the larger stable rank than the server's?

Run it whole (``python examples/rank/random_matrices.py``, seconds), or cell by cell in an editor that knows ``# %%``.
"""

# %% [markdown]
# A server has N points, a client M of them. FedLoRU's Theorem 3.2 (arXiv 2409.12371) says that, for many parameters,
# the Hessian of the loss on M points has the larger stable rank, ||H||_F^2 / ||H||_2^2. Two models of how a Hessian on
# few points departs from the true one give opposite answers. Neither is a network: see `fedloru rank` for those.

# %%
from rich.console import Console
from rich.table import Table

from fedloru_flwr.rank import Population, simulate

POINTS = (10, 30, 100, 300, 1000)
SIZE = 300


def show(title: str, population: Population, console: Console) -> None:
    """Simulate nested samples, and print what was found beside what the theory gives."""
    found = simulate(population, POINTS, repeats=4)
    table = Table(title=title, title_justify="left")
    for heading in ("points", "stable rank", "theory", "largest eigenvalue", "theory", "larger than on all"):
        table.add_column(heading, justify="right")
    for one, share in zip(found.sampled, (*found.larger, None), strict=True):
        table.add_row(
            str(one.points),
            f"{one.stable_rank:.2f} ± {one.stable_rank_error:.2f}",
            "-" if one.limit.stable_rank is None else f"{one.limit.stable_rank:.2f}",
            f"{one.largest:.3f}",
            "-" if one.limit.largest is None else f"{one.limit.largest:.3f}",
            "" if share is None else f"{100 * share:.0f} %",
        )
    console.print(table)


# %% [markdown]
# **Additive**: the true Hessian has a few outliers, and a point adds symmetric noise of its own, which averages out. On
# few points noise fills the spectrum, so that the stable rank grows with the number of parameters: the claim.
# Noise that drowns the outliers altogether leaves a quarter of the number of parameters, on any number of points.


# %%
def main() -> None:
    """Both models."""
    console = Console()
    outliers = (5.0, 3.0, 2.0)
    show("Additive noise", Population(SIZE, outliers, sigma=10.0), console)
    # %% [markdown]
    # **Covariance**: the Gauss-Newton part of a Hessian is a mean of outer products, one a point. On few points its
    # rank is bounded by their number, and the stable rank falls: the opposite of the claim.
    # %%
    show("Sample covariance", Population(SIZE, (), bulk=1.0, model="covariance"), console)
    # %% [markdown]
    # With outliers that dominate, the covariance's stable rank still depends on the number of points, but weakly.
    # %%
    show("Sample covariance with outliers", Population(SIZE, (60.0, 40.0), bulk=0.05, model="covariance"), console)


if __name__ == "__main__":
    main()
