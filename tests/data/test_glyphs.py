import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedloru_flwr.data import DataConfig, DataError, load_central, load_client, partition_indices, validate
from fedloru_flwr.data import glyphs as drawing
from fedloru_flwr.data.glyphs import CHARACTERS, FONTS, read_glyphs
from fedloru_flwr.data.partitioning import partition
from fedloru_flwr.data.samples import GLYPH_CLASSES, GLYPH_COLUMNS, check
from fedloru_flwr.data.sources import encode, load_source

GLYPHS = DataConfig(dataset="glyphs", glyph_samples=1900, glyph_size=12, num_clients=5)
ENGLISH_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAGE = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def group_counts(config: DataConfig) -> list[Counter[int | str]]:
    """How many samples of each value of the partition column each client has."""
    groups = load_source(config).groups
    return [Counter(groups[index] for index in part) for part in partition_indices(config)]


# The images


def test_images_are_grey_bytes_in_the_size_and_number_asked_for() -> None:
    split = read_glyphs(replace(GLYPHS, glyph_samples=124, glyph_size=9))
    assert split.inputs.shape == (124, 1, 9, 9)
    assert split.inputs.dtype == torch.uint8
    assert split.class_names == tuple(CHARACTERS)
    assert split.groups == ()


def test_the_glyphs_are_a_source_of_62_classes_split_four_to_one() -> None:
    validate(GLYPHS)
    source = load_source(GLYPHS)
    assert (source.spec.input_shape, source.spec.num_classes) == ((1, 12, 12), 62)
    assert (len(source.train.labels), len(source.test.labels)) == (1520, 380)
    assert set(source.train.labels.bincount().tolist()) <= {24, 25}
    assert set(source.test.labels.bincount().tolist()) <= {6, 7}
    inputs = load_central(GLYPHS)[0].inputs
    assert (inputs.min(), inputs.max()) == (0, 1)
    assert load_client(GLYPHS, 4)[0].train.inputs.shape[1:] == (1, 12, 12)


def test_labels_are_numbered_digits_capitals_small_letters() -> None:
    assert len(CHARACTERS) == GLYPH_CLASSES
    assert CHARACTERS[0] + CHARACTERS[10] + CHARACTERS[36] == "0Aa"
    assert list(CHARACTERS) == sorted(set(CHARACTERS))


def test_classes_and_the_fonts_of_a_class_are_balanced_and_in_random_order() -> None:
    fonts, labels = drawing._deal(62 * 21 * 2 + 30, seed=0)
    assert sorted(Counter(np.bincount(labels)).items()) == [(42, 32), (43, 30)]
    pairs = Counter(zip(fonts.tolist(), labels.tolist(), strict=True))
    assert Counter(pairs.values()) == {2: 62 * 21 - 30, 3: 30}
    assert len(set(labels[:62])) < 50  # dealt in turns, they would be 62
    assert len(set(fonts[: 62 * 2])) == 21


def test_few_samples_still_have_every_class_and_font() -> None:
    split = read_glyphs(replace(GLYPHS, glyph_samples=124, partitioner="column:font-style"))
    assert Counter(Counter(split.labels).values()) == {2: 62}
    assert len(set(split.groups)) == len(FONTS)


def test_without_noise_the_ground_is_black_and_no_two_images_are_alike() -> None:
    images = read_glyphs(replace(GLYPHS, glyph_noise=0.0, glyph_size=20)).inputs.flatten(1)
    assert (images == 0).float().mean() > 0.6
    assert images.amax(1).min() > 60  # the thin strokes of an i
    assert len(images.unique(dim=0)) == len(images)


def test_noise_has_the_deviation_asked_for_and_leaves_the_drawing_as_it_is() -> None:
    plain = read_glyphs(replace(GLYPHS, glyph_noise=0.0)).inputs.float() / 255
    noisy = read_glyphs(replace(GLYPHS, glyph_noise=0.05)).inputs.float() / 255
    inside = (plain > 0.3) & (plain < 0.7)  # where nothing is clipped
    assert (noisy - plain)[inside].std() == pytest.approx(0.05, rel=0.03)
    assert abs((noisy - plain)[inside].mean()) < 0.002


def test_pixels_are_clipped_whatever_the_noise() -> None:
    values = read_glyphs(replace(GLYPHS, glyph_noise=100.0)).inputs
    assert ((values == 0) | (values == 255)).float().mean() > 0.99
    assert (values == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_the_maps_stay_within_their_ranges_and_reach_them() -> None:
    inverses = drawing._inverse_maps(5000, seed=0).astype(float)
    maps = np.linalg.inv(inverses[:, :, :2])
    shifts = -(maps @ inverses[:, :, 2:])[:, :, 0] / 2  # in sides
    assert np.abs(shifts).max() == pytest.approx(drawing.SHIFT, rel=0.01)
    angles = np.arctan2(maps[:, 1, 0], maps[:, 0, 0])
    assert np.abs(angles).max() == pytest.approx(drawing.ROTATION, rel=0.01)
    scales = np.hypot(maps[:, 0, 0], maps[:, 1, 0])
    assert (scales.min(), scales.max()) == pytest.approx(drawing.SCALE, rel=0.01)
    shears = (maps[:, 0, 0] * maps[:, 0, 1] + maps[:, 1, 0] * maps[:, 1, 1]) / scales**2
    assert np.abs(shears).max() == pytest.approx(drawing.SHEAR, rel=0.01)
    assert np.linalg.det(maps) == pytest.approx(scales**2)


def test_a_map_tells_where_in_the_glyph_a_pixel_comes_from() -> None:
    dot = torch.zeros(1, 8, 8)
    dot[0, 4:6, 2:4] = 1  # a pixel of the 4 x 4 image: row 2, column 1
    still = drawing._distort(dot, np.array([[[1, 0, 0], [0, 1, 0]]], dtype=np.float32))
    assert torch.allclose(still, torch.eye(4)[[3, 3, 1, 3]] * torch.tensor([0, 1, 0, 0]), atol=1e-6)
    right = drawing._distort(dot, np.array([[[1, 0, -0.5], [0, 1, 0]]], dtype=np.float32))
    assert torch.allclose(right, still.roll(1, 3), atol=1e-6)
    quarter_turn = drawing._distort(dot, np.array([[[0, 1, 0], [-1, 0, 0]]], dtype=np.float32))
    assert torch.allclose(quarter_turn, still.rot90(-1, (2, 3)), atol=1e-6)  # clockwise, since y goes down


# The fonts


def test_the_fonts_are_those_of_matplotlib_that_have_all_characters_as_text() -> None:
    from matplotlib.ft2font import FT2Font

    complete = set()
    for path in drawing._fonts_folder().glob("*.ttf"):
        font = FT2Font(str(path))
        charmap = font.get_charmap()
        found = [charmap.get(ord(character), 0) for character in CHARACTERS]
        if [font.get_glyph_name(index) for index in found] == [*ENGLISH_DIGITS, *CHARACTERS[10:]]:
            complete.add(path.name)
    assert {font.file for font in FONTS} == complete
    assert len(FONTS) == len(complete) == 21


def test_families_and_styles_are_those_of_the_files_but_for_computer_modern() -> None:
    from matplotlib.ft2font import FT2Font

    for font in FONTS:
        file = FT2Font(str(drawing._fonts_folder() / font.file))
        if font.file.startswith("cm"):
            assert (file.family_name, file.style_name) == (font.file.removesuffix(".ttf"), "Regular")
            assert font.family.startswith("Computer Modern ")
        else:
            assert (file.family_name, file.style_name) == (font.family, font.style)
    assert len({(font.family, font.style) for font in FONTS}) == len(FONTS)


def test_the_folder_of_the_fonts_is_matplotlibs() -> None:
    import matplotlib

    assert drawing._fonts_folder() == Path(matplotlib.get_data_path(), "fonts", "ttf")


def test_the_characters_of_a_font_differ_and_none_is_empty_or_cut_off() -> None:
    masters = drawing._masters(64)
    assert masters.shape == (len(FONTS), 62, 64, 64)
    for font, drawn in zip(FONTS, masters.reshape(len(FONTS), 62, -1), strict=True):
        for first, second in itertools.combinations(range(62), 2):
            pair = f"{CHARACTERS[first]} and {CHARACTERS[second]} of {font.file}"
            assert np.abs(drawn[first] - drawn[second]).sum() > 3, pair
    assert masters.max(axis=(2, 3)).min() > 0.9
    for edge in (masters[:, :, 0], masters[:, :, -1], masters[:, :, :, 0], masters[:, :, :, -1]):
        assert edge.max() < 0.02


def test_characters_keep_their_size_and_stand_on_the_baseline() -> None:
    lit = drawing._masters(100) > 0.5
    rows = {character: lit[0, CHARACTERS.index(character)].any(axis=1).nonzero()[0] for character in "Oox1p"}
    baseline = 100 * drawing.BASELINE
    assert rows["x"][-1] == pytest.approx(baseline, abs=2)
    assert rows["1"][-1] == pytest.approx(baseline, abs=2)
    assert rows["p"][-1] > baseline + 10
    assert len(rows["O"]) > 1.25 * len(rows["o"])


def test_a_missing_font_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drawing, "_fonts_folder", lambda: tmp_path)
    with pytest.raises(DataError, match=r"dataset = 'glyphs': .*DejaVuSans\.ttf cannot be read.*Reinstall matplotlib"):
        read_glyphs(GLYPHS)


# Reproducibility


def test_the_glyphs_follow_their_own_settings_only() -> None:
    first = read_glyphs(GLYPHS)
    torch.manual_seed(1)
    np.random.seed(1)
    again = read_glyphs(replace(GLYPHS, seed=7, num_clients=3, partitioner="column:font", test_fraction=0.5))
    assert torch.equal(first.inputs, again.inputs)
    assert first.labels == again.labels
    other = read_glyphs(replace(GLYPHS, glyph_seed=1))
    assert first.labels != other.labels
    assert (first.inputs != other.inputs).float().mean() > 0.5


def test_the_glyphs_do_not_depend_on_torchs_threads(one_thread: None) -> None:
    alone = read_glyphs(GLYPHS)
    torch.set_num_threads(3)
    assert torch.equal(alone.inputs, read_glyphs(GLYPHS).inputs)


SCRIPT = """
import hashlib, random
import numpy as np
import torch
from fedloru_flwr.data import DataConfig, load_central, partition_indices

def states():
    name, keys, *rest = np.random.get_state()
    return repr((random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()))

before = states(), torch.get_num_threads()
config = DataConfig(dataset="glyphs", glyph_samples=1900, glyph_size=12, num_clients=5, partitioner="column:style")
digest = hashlib.sha256(load_central(config)[0].inputs.numpy().tobytes())
for part in partition_indices(config):
    digest.update(part.tobytes() + b"|")
print(digest.hexdigest(), (states(), torch.get_num_threads()) == before)
"""


def test_every_process_generates_the_same_and_leaves_the_global_random_states_alone() -> None:
    seeded = "import random, numpy, torch; random.seed(9), numpy.random.seed(9), torch.manual_seed(9)\n"
    printed = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for script in (SCRIPT, seeded + SCRIPT)
    ]
    assert printed[0] == printed[1]
    assert printed[0].endswith(" True\n")


def test_the_source_is_generated_anew_for_other_glyphs_only() -> None:
    first = load_source(GLYPHS)
    assert load_source(replace(GLYPHS, seed=3, partitioner="dirichlet", num_clients=7)) is first
    changes = ({"glyph_seed": 1}, {"glyph_noise": 0.0}, {"glyph_size": 8}, {"glyph_samples": 200})
    for change in changes:
        assert load_source(replace(GLYPHS, **change)) is not load_source(GLYPHS), change
    digits = load_source(DataConfig())
    for change in changes:
        assert load_source(DataConfig(**change)) is digits, change


# The natural partitions


@pytest.mark.parametrize("column", GLYPH_COLUMNS)
def test_groups_are_the_fonts_of_the_samples(column: str) -> None:
    config = replace(GLYPHS, partitioner=f"column:{column}")
    fonts, _ = drawing._deal(config.glyph_samples, config.glyph_seed)
    values = {
        "font": [font.family for font in FONTS],
        "style": [font.style for font in FONTS],
        "font-style": [f"{font.family} {font.style}" for font in FONTS],
    }[column]
    assert read_glyphs(config).groups == tuple(values[font] for font in fonts)
    assert len(set(values)) == {"font": 7, "style": 7, "font-style": 21}[column]


@pytest.mark.parametrize("column", GLYPH_COLUMNS)
def test_any_number_of_clients_get_samples_of_as_few_values_as_possible(column: str) -> None:
    config = replace(GLYPHS, partitioner=f"column:{column}")
    counts = Counter(load_source(config).groups)
    for num_clients in (*range(1, 30), 50, 100, 150, 399, 400):
        clients = group_counts(replace(config, num_clients=num_clients))
        indices = np.concatenate(partition_indices(replace(config, num_clients=num_clients)))
        assert np.array_equal(np.sort(indices), np.arange(1520)), num_clients
        assert sum(clients, Counter()) == counts
        # Each value is whole, or each client has a single value.
        assert sum(map(len, clients)) == max(num_clients, len(counts)), num_clients
        sizes = [client.total() for client in clients]
        if num_clients >= len(counts):
            for value in counts:
                pieces = [client[value] for client in clients if value in client]
                assert max(pieces) - min(pieces) <= 1, (num_clients, value)
        if num_clients >= 5 * len(counts):
            assert max(sizes) <= 1.5 * min(sizes) + 1, num_clients


@pytest.mark.parametrize(
    ("values", "num_clients", "dealt"),
    [
        ("aaaaabbbbcccddeee", 2, ["aaaaaeee", "bbbbcccdd"]),
        ("aabbbbcc", 3, ["aa", "bbbb", "cc"]),
        ("aaaaaabbb", 3, ["aaa", "aaa", "bbb"]),
        ("aaaaaabbb", 4, ["aa", "aa", "aa", "bbb"]),
        ("aaaaaaabb", 4, ["aaa", "aa", "aa", "bb"]),
    ],
)
def test_values_are_grouped_or_divided_to_parts_of_about_one_size(
    values: str, num_clients: int, dealt: list[str]
) -> None:
    config = DataConfig(dataset="glyphs", partitioner="column:font", num_clients=num_clients)
    parts = partition(np.zeros(len(values), dtype=np.int64), values, config)
    assert ["".join(values[index] for index in part) for part in parts] == dealt


def test_the_values_of_other_sources_still_go_round_robin() -> None:
    config = DataConfig(dataset="hub:x", partitioner="column:font", num_clients=2)
    parts = partition(np.zeros(9, dtype=np.int64), list("aaaaabbcc"), config)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3, 4, 7, 8], [5, 6]]


def test_clients_go_to_the_values_in_proportion_to_their_samples() -> None:
    config = replace(GLYPHS, partitioner="column:font", num_clients=21)
    clients = Counter(value for client in group_counts(config) for value in client)
    assert clients == Counter(font.family for font in FONTS)  # all files have about as many samples


def test_a_value_is_divided_at_random_by_the_seed() -> None:
    config = replace(GLYPHS, partitioner="column:font", num_clients=40)
    first, again, other = (partition_indices(replace(config, seed=seed)) for seed in (0, 0, 1))
    assert all(map(np.array_equal, first, again))
    assert not any(map(np.array_equal, first, other))
    assert [len(part) for part in first] == [len(part) for part in other]
    assert first[0].max() > first[1].min()  # not the first samples of the value, then the next


def test_a_partition_by_font_is_skewed_in_font_but_not_in_label() -> None:
    config = DataConfig(dataset="glyphs", glyph_size=8, partitioner="column:font", num_clients=7)
    labels = load_source(config).train.labels.numpy()
    for part, fonts in zip(partition_indices(config), group_counts(config), strict=True):
        assert len(fonts) == 1
        shares = np.bincount(labels[part], minlength=62) / len(part)
        assert np.abs(shares - 1 / 62).max() < 0.6 / 62


def test_a_higher_minimum_is_met_by_samples_of_other_values() -> None:
    config = replace(GLYPHS, partitioner="column:font", num_clients=20, min_partition_size=76)
    parts = partition_indices(config)
    assert [len(part) for part in parts] == [76] * 20
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1520))


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "shards"])
def test_the_other_partitioners_take_glyphs(partitioner: str) -> None:
    parts = partition_indices(replace(GLYPHS, partitioner=partitioner, num_clients=100))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1520))


# Errors


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dataset": "glyph"}, ["dataset = 'glyph'", "did you mean 'glyphs'", "digits, local, hub:<name>, glyphs"]),
        ({"partitioner": "column:fonts"}, ["partitioner = 'column:fonts'", "did you mean 'font'", "column:font-style"]),
        ({"glyph_samples": 123}, ["glyph-samples = 123", "below 124", "62 classes", "at least 124"]),
        ({"glyph_size": 7}, ["glyph-size = 7", "below 8 pixels", "at least 8"]),
        ({"glyph_noise": -0.1}, ["glyph-noise = -0.1", "at least 0", "such as 0.06"]),
        ({"glyph_noise": float("inf")}, ["glyph-noise = inf", "not a finite number"]),
        ({"glyph_noise": float("nan")}, ["glyph-noise = nan", "not a finite number"]),
        ({"glyph_seed": -1}, ["glyph-seed = -1", "at least 0"]),
    ],
)
def test_an_impossible_setting_is_named_with_its_value_and_the_remedy(
    changes: dict[str, object], parts: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        check(replace(GLYPHS, **changes))
    for part in parts:
        assert part in str(error.value)


def test_the_smallest_settings_work() -> None:
    smallest = replace(GLYPHS, glyph_samples=124, glyph_size=8, glyph_noise=0.0)
    validate(smallest)
    source = load_source(smallest)
    assert source.train.labels.unique().tolist() == list(range(62))


def test_too_many_clients_for_the_samples_are_refused() -> None:
    with pytest.raises(DataError, match=r"num-clients = 761: .*there are 1520\. Use at most 760 clients"):
        validate(replace(GLYPHS, num_clients=761, partitioner="column:font"))


def test_listed_classes_fix_the_order_of_the_glyphs() -> None:
    split = {"train": read_glyphs(GLYPHS)}
    plain, _ = encode(split, GLYPHS)
    turned, _ = encode(split, replace(GLYPHS, classes=",".join(reversed(CHARACTERS))))
    assert torch.equal(turned["train"].labels, 61 - plain["train"].labels)


# The picture


def test_the_picture_of_the_page_is_what_its_snippet_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(
        r"^python - <<'END'\n(.*?)^END$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    kept = PAGE.parent / "images" / "glyphs.png"
    with Image.open(tmp_path / "glyphs.png") as drawn, Image.open(kept) as shown:
        difference = np.abs(np.asarray(drawn, dtype=float) - np.asarray(shown, dtype=float))
    assert difference.mean() < 2  # of 255: other versions of FreeType draw edges a little differently
    assert kept.stat().st_size < 150_000
