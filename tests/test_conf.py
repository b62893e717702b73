"""Every file in conf/ is valid, and the paper's settings run: in a tiny form, on stand-ins of the hub's schema."""

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

from fedloru_flwr import launch
from fedloru_flwr.compare.spec import read_spec
from fedloru_flwr.config import RunConfig, read_config_file
from fedloru_flwr.data import sources
from fedloru_flwr.rank.spec import read_rank_spec

CONF = Path(__file__).parent.parent / "conf"
LANGUAGE = sorted(CONF.glob("llm-*.toml"))
RUNS = [*sorted(CONF.glob("digits-*.toml")), *LANGUAGE]
ANALYSES = sorted(CONF.glob("rank-*.toml"))
COMPARISONS = sorted(path for path in CONF.rglob("*.toml") if path not in (*RUNS, *ANALYSES))
PAPER = sorted((CONF / "paper").glob("*.toml"))
QUICK = "fmnist.toml"
# Column and label names, channels and sides of the data sets on the hub; classes are few enough for a quick stand-in.
SCHEMAS = {
    "zalando-datasets/fashion_mnist": ("image", {"label": 10}, "L", 28),
    "uoft-cs/cifar10": ("img", {"label": 10}, "RGB", 32),
    "uoft-cs/cifar100": ("img", {"fine_label": 100, "coarse_label": 20}, "RGB", 32),
}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_run_is_valid(path):
    assert RunConfig.from_mapping(read_config_file(path))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: str(path.relative_to(CONF)))
def test_every_comparison_is_valid(path):
    assert read_spec(path).methods


@pytest.mark.parametrize("path", ANALYSES, ids=lambda path: path.name)
def test_every_analysis_is_valid(path):
    assert read_rank_spec(path).trainings


def stand_in(folder, name, per_class=3):
    """A folder in the hub's layout: Parquet files with images and class labels."""
    column, labels, mode, side = SCHEMAS[name]
    classes = max(labels.values())
    rng = np.random.default_rng(0)
    features = Features({column: Image(), **{key: ClassLabel(num_classes=count) for key, count in labels.items()}})
    for split in ("train", "test"):
        pixels = rng.integers(0, 256, (classes * per_class, side, side, len(mode)), dtype=np.uint8)
        images = []
        for one in pixels:
            file = io.BytesIO()
            Pillow.fromarray(one.squeeze()).save(file, format="png")
            images.append({"bytes": file.getvalue()})
        rows = {column: images}
        for key, count in labels.items():
            rows[key] = [index % count for index in range(len(images))]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.name == QUICK else pytest.mark.slow) for path in PAPER],
    ids=lambda path: path.name,
)
def test_the_papers_settings_run_on_a_stand_in(path, tmp_path):
    spec = read_spec(path)
    folder = stand_in(tmp_path / "hub", str(spec.settings["dataset"]).removeprefix("hub:"))
    sources._load_source.cache_clear()
    axes = {key: values[-1] for key, values in spec.axes.items()}
    assert set(axes) == {"num-clients", "fraction-train", "partitioner"}
    tiny = {
        "dataset": f"hub:{folder}",
        "num-clients": 4,
        "fraction-train": 0.5,
        "dirichlet-alpha": 5.0,
        "num-server-rounds": 1,
        "local-epochs": 1,
        "model-width": 8,
        "rank": 2,
        "alpha": 2.0,
        "output-dir": str(tmp_path / "runs"),
    }
    for method in spec.methods:
        settings = {**spec.settings, **axes, **method.settings, **tiny, "run-name": method.name}
        if "ranks" in settings:
            settings["ranks"] = "2:0.5,1:0.5"
        if settings["algorithm"] == "pfedloru":
            settings["local-epochs"] = 3
        summary = launch.run(None, settings, engine="in-process")
        assert summary["status"] == "finished", method.name
        assert summary["total_bytes_up"] > 0
