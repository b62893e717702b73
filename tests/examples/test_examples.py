"""The example apps: each runs as it stands, and gains low-rank training by few lines."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from app_runs import AppRun, config_of, load, modules_of, run_app, tree_of
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedloru_flwr.engines.flower import run_on_flower

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NAMES = ("quickstart-pytorch", "flowertune", "numpyclient", "trainer")
VARIANTS = ("plain", "fedloru")
NUM_SUPERNODES = 6
MOST_LINES = 15
# What an untrained model does not reach: chance is an accuracy of 0.1; the language model starts at a loss of 5.9.
LEAST_ACCURACY = {"quickstart-pytorch": 0.6, "numpyclient": 0.6, "trainer": 0.35}
MOST_LOSS = {"flowertune": 4.9}
# How much less the changed app sends: at most this share of the plain one's bytes.
MOST_BYTES = {"quickstart-pytorch": 0.33, "flowertune": 0.55, "numpyclient": 0.3, "trainer": 0.3}


def check_result(name: str, run: AppRun) -> None:
    last = config_of(EXAMPLES / name / "plain")["config"]["num-server-rounds"]
    assert list(run.losses) == list(range(last + 1)), run.output
    assert run.losses[last] < 0.85 * run.losses[0]
    if name in MOST_LOSS:
        assert run.losses[last] < MOST_LOSS[name]
    else:
        assert run.accuracies[0] < 0.25
        assert run.accuracies[last] > LEAST_ACCURACY[name]


def same_config(name: str) -> bool:
    plain, fedloru = (config_of(EXAMPLES / name / variant) for variant in VARIANTS)
    return plain["config"] == fedloru["config"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "trainer" else []) for name in NAMES]
)
def test_both_apps_learn_and_the_changed_one_sends_less(name, tmp_path):
    modules, path = set(sys.modules), list(sys.path)
    runs = {}
    for variant in VARIANTS:
        directory = EXAMPLES / name / variant
        before = tree_of(directory)
        runs[variant] = run_app(directory, NUM_SUPERNODES, tmp_path / variant)
        assert tree_of(directory) == before
        check_result(name, runs[variant])
    assert same_config(name)
    share = runs["fedloru"].bytes_sent / runs["plain"].bytes_sent
    assert share < MOST_BYTES[name]
    assert stated_share(name) == pytest.approx(share, abs=0.02)
    package = config_of(directory)["components"]["clientapp"].split(".")[0]
    assert not any(module.split(".")[0] == package for module in set(sys.modules) - modules)
    assert sys.path == path


def stated_share(name: str) -> float:
    """The share of bytes that the example's page and the index state."""
    (on_page,) = re.findall(r"sends (\d+) % of the bytes", (EXAMPLES / name / "README.md").read_text())
    (in_index,) = re.findall(rf"^\| \[`{name}`\].*\| (\d+) % \|$", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert on_page == in_index
    return int(on_page) / 100


def difference(name: str, *options: str) -> str:
    """What git says of an example's two apps, without what Python leaves."""
    command = ["git", "diff", "--no-index", *options, "plain", "fedloru"]
    with tempfile.TemporaryDirectory() as scratch:
        for variant in VARIANTS:
            shutil.copytree(EXAMPLES / name / variant, Path(scratch) / variant, ignore=shutil.ignore_patterns("__*__"))
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_few_lines_change_and_each_that_comes_is_marked(name):
    counts = [line.split("\t") for line in difference(name, "--numstat").splitlines()]
    added, removed = (sum(int(count[side]) for count in counts) for side in (0, 1))
    assert 0 < added <= MOST_LINES
    assert max(added, removed) <= MOST_LINES
    (stated,) = re.findall(
        rf"^\| \[`{name}`\].*\| \+(\d+) -(\d+) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE
    )
    assert stated == (str(added), str(removed))


def changed(diff: str) -> list[str]:
    """The lines that a difference adds and removes."""
    lines = [line for line in diff.splitlines() if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
    return [line for line in lines if line.strip("+-")]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_an_example_shows_its_difference(name):
    shown = re.findall(r"```diff\n(.*?)```", (EXAMPLES / name / "README.md").read_text(), re.DOTALL)
    assert changed("".join(shown)) == changed(difference(name))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_an_app_is_a_directory_that_flower_takes(name, variant):
    from flwr.cli.config_utils import load_and_validate

    directory = EXAMPLES / name / variant
    with modules_of(directory):
        config, _ = load_and_validate(directory / "pyproject.toml", check_module=True)
        components = config["tool"]["flwr"]["app"]["components"]
        assert isinstance(load(components["serverapp"]), ServerApp)
        assert isinstance(load(components["clientapp"]), ClientApp)
    needs_package = any(line.strip().startswith('"fedloru-flwr"') for line in (directory / "pyproject.toml").open())
    assert needs_package == (variant == "fedloru")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"), [("quickstart-pytorch", "fedloru"), *(("numpyclient", v) for v in VARIANTS)]
)
def test_an_app_runs_by_flwr_run_on_ray(name, variant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    outcome = run_on_flower(EXAMPLES / name / variant, {}, num_supernodes=4, ray_num_cpus=2, on_line=lines.append)
    assert outcome.completed, "\n".join(lines)
    rounds = [line for line in lines if re.match(r"round \d+: loss", line)]
    last = config_of(EXAMPLES / name / variant)["config"]["num-server-rounds"]
    assert len(rounds) == last + 1
    assert float(rounds[-1].rpartition(" ")[2]) > LEAST_ACCURACY[name]
