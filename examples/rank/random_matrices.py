r"""The theorem's random matrices, step by step: does a client's Hessian have the larger stable rank than the server's?

Run it whole (``python examples/rank/random_matrices.py [DIRECTORY]``, seconds), or cell by cell in an editor that knows
``# %%``. It prints its tables and leaves them, with pictures, in DIRECTORY (``runs/random-matrices``).
"""

# %% [markdown]
# A server has N points, a client M of them. FedLoRU's Theorem 3.2 (arXiv 2409.12371) says that, for many parameters,
# the Hessian of the loss on M points has the larger stable rank, ||H||_F^2 / ||H||_2^2. Two models of how a Hessian on
# few points departs from the true one give opposite answers. Neither is a network: see `fedloru rank` for those.
#
# Beside what is simulated stands what the theory gives as the number of parameters R grows, formulas and sources in
# `fedloru_flwr.rank.perturbation`: the squared Frobenius norm is exact for every R; the largest eigenvalue is that of
# the free convolution, an outlier outside of the bulk or the bulk's edge. The covariance model's is known where the
# bulk is one number. The two samples depend on each other: the client's points are among the server's.

# %%
import sys
from pathlib import Path

from rich.console import Console

from fedloru_flwr.rank import Population, pictures, simulate

POINTS = (10, 30, 100, 300, 1000)
SIZE = 300
HEADS = ("points", "stable rank", "limit", "largest eigenvalue", "limit", "squared norm", "exact", "larger than on all")


def show(title: str, population: Population, directory: Path) -> None:
    """Simulate nested samples; print, and leave, what was found beside what the theory gives."""
    found = simulate(population, POINTS, repeats=4)
    lines = [f"## {title}", "", "| " + " | ".join(HEADS) + " |", "|" + "---:|" * len(HEADS)]
    for one, share in zip(found.sampled, (*found.larger, None), strict=True):
        cells = [
            str(one.points),
            f"{one.stable_rank:.2f} ± {one.stable_rank_error:.2f}",
            "-" if one.limit.stable_rank is None else f"{one.limit.stable_rank:.2f}",
            f"{one.largest:.3f} ± {one.largest_error:.3f}",
            "-" if one.limit.largest is None else f"{one.limit.largest:.3f}",
            f"{one.squared_frobenius:.1f}",
            f"{one.limit.squared_frobenius:.1f}",
            "" if share is None else f"{100 * share:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    Console(width=160).print("\n".join(lines), markup=False, highlight=False)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "table.md").open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")
    for name, picture in pictures.of_simulation(found, title).items():
        (directory / name).write_bytes(picture)


# %% [markdown]
# **Additive**: the true Hessian has a few outliers, and a point adds symmetric noise of its own, which averages out. On
# few points noise fills the spectrum, so that the stable rank grows with the number of parameters: the claim.
# Noise that drowns the outliers altogether leaves a quarter of the number of parameters, on any number of points.


# %%
def main(directory: Path) -> None:
    """Both models."""
    (directory / "table.md").unlink(missing_ok=True)
    outliers = (5.0, 3.0, 2.0)
    show("Additive noise", Population(SIZE, outliers, sigma=10.0), directory)
    # %% [markdown]
    # **Covariance**: the Gauss-Newton part of a Hessian is a mean of outer products, one a point. On few points its
    # rank is bounded by their number, and the stable rank falls: the opposite of the claim.
    # %%
    show("Sample covariance", Population(SIZE, (), bulk=1.0, model="covariance"), directory)
    # %% [markdown]
    # With outliers that dominate, the covariance's stable rank still depends on the number of points, but weakly.
    # %%
    spiked = Population(SIZE, (60.0, 40.0), bulk=0.05, model="covariance")
    show("Sample covariance with outliers", spiked, directory)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/random-matrices"))
