"""Tensors as fewer bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloru_flwr.lowrank.codecs import Codec, CodecError, _matrix, _Places, _rows, _unmatrix

SHAPES = {"a": (4, 33), "b": (65, 4, 1, 1), "c.bias": (17,), "scalar": (), "none": (0, 3), "one": (1, 1), "d": (6, 6)}
CODECS = [
    f"{sparse}{numbers}{lossless}"
    for sparse in ("", "topk:0.3+", "topk:0.02+")
    for numbers in ("float32", "float16", "bfloat16", "int8", "int4")
    for lossless in ("", "+zstd")
]


def tensors(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def kept(tensor, codec):
    """What of a tensor is sent at all: the largest magnitudes."""
    count = min(tensor.numel(), max(1, math.ceil(codec.keep * tensor.numel())))
    out = torch.zeros(tensor.numel())
    places = tensor.flatten().abs().sort(descending=True, stable=True).indices[:count]
    out[places] = tensor.flatten()[places]
    return out.view(tensor.shape)


@pytest.mark.parametrize("name", CODECS)
def test_what_comes_back_is_as_near_as_the_format_says_and_of_the_size_that_was_told(name):
    codec, given_ = Codec.parse(name), tensors()
    data = codec.encode(given_, seed=3)
    told = codec.size(SHAPES.values())
    assert len(data) <= told if codec.lossless else len(data) == told
    back = codec.decode(data, SHAPES)
    again, arrived = codec.transmit(given_, seed=3)
    assert again == data
    assert all(torch.equal(arrived[key], back[key]) for key in back)
    assert list(back) == list(given_)
    for key, tensor in given_.items():
        wanted = kept(tensor, codec) if tensor.numel() else tensor
        assert back[key].shape == tensor.shape
        assert back[key].dtype == torch.float32
        assert torch.equal(back[key] == 0, wanted == 0) or codec.numbers.startswith("int")
        if codec.numbers in ("float16", "bfloat16"):
            assert torch.equal(back[key], wanted.to(getattr(torch, codec.numbers)).float())
        elif codec.numbers == "float32":
            assert torch.equal(back[key], wanted)
        elif tensor.numel():
            step = tensor.abs().max() / (127 if codec.numbers == "int8" else 7)
            assert (back[key] - wanted).abs().max() <= 1.001 * step
            assert torch.equal(back[key][wanted == 0], wanted[wanted == 0])


def test_each_row_has_a_scale_of_its_own():
    rows = torch.tensor([[1.0, 0.3, -0.7], [1e-6, 2e-6, -3e-6], [0.0, 0.0, 0.0], [4e9, 1e9, 0.0]])
    codec = Codec("int8")
    for tensor in (torch.cat([rows, rows], 1), torch.cat([rows, rows], 1).T):
        (back,) = codec.decode(codec.encode({"x": tensor}, 0), {"x": tensor.shape}).values()
        axis = 1 if tensor.shape[0] == 4 else 0
        error = (back - tensor).abs().amax(axis)
        assert (error <= tensor.abs().amax(axis) / 126).all()


@pytest.mark.parametrize("numbers", ["int8", "int4"])
def test_rounding_is_unbiased_also_at_the_ends_of_the_range(numbers):
    codec, x = Codec(numbers), torch.tensor([[-1.0, -0.93, -0.5003, -0.01, 0.0, 0.26, 0.77, 0.999, 1.0]])
    mean, draws = torch.zeros(9), 4000
    for seed in range(draws):
        mean += codec.decode(codec.encode({"x": x}, seed), {"x": x.shape})["x"][0] / draws
    step = 1 / (126.999 if numbers == "int8" else 6.999)
    assert (mean - x[0]).abs().max() < 5 * 0.5 * step / math.sqrt(draws)
    assert mean[4] == 0


def test_rounding_of_a_large_tensor_is_unbiased_and_covers_every_block():
    x = torch.full((3, 150_001), 0.305)
    x[:, 0] = 1
    codec = Codec("int8")
    (back,) = codec.decode(codec.encode({"x": x}, 5), {"x": x.shape}).values()
    step = 1 / 126.999
    assert set((back[:, 1:] / step).round().long().unique().tolist()) == {38, 39}
    for part in back[:, 1:].flatten().split(30_000):
        assert float(part.mean()) == pytest.approx(0.305, abs=5 * 0.5 * step / math.sqrt(len(part)))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others():
    for name in ("int8", "topk:0.5+int4"):
        codec, given_ = Codec.parse(name), tensors()
        assert codec.encode(given_, 1) == codec.encode(given_, 1)
        assert codec.encode(given_, 1) != codec.encode(given_, 2)


def test_what_is_not_finite_stays_so_in_its_row_and_harms_no_other():
    x = torch.randn(4, 40)
    x[1, 3], x[2, 7] = math.nan, -math.inf
    for numbers in ("int8", "int4"):
        (back,) = Codec(numbers).decode(Codec(numbers).encode({"x": x}, 0), {"x": x.shape}).values()
        assert not back[1].isfinite().any()
        assert not back[2].isfinite().any()
        assert (back[[0, 3]] - x[[0, 3]]).abs().max() < 1
    sparse = Codec.parse("topk:0.1+float32")
    (back,) = sparse.decode(sparse.encode({"x": x}, 0), {"x": x.shape}).values()
    assert back[1, 3].isnan()
    assert back[2, 7] == -math.inf


def test_the_smallest_numbers_there_are_become_zero_rather_than_something_that_is_not_finite():
    x = torch.full((1, 8), 1e-45)
    (back,) = Codec("int8").decode(Codec("int8").encode({"x": x}, 0), {"x": x.shape}).values()
    assert torch.equal(back, torch.zeros(1, 8))


@given(st.integers(1, 600), st.data())
@settings(max_examples=150, deadline=None)
def test_any_places_come_back(count, data):
    wanted = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    code = _Places(count, len(wanted))
    written = code.write(torch.tensor(wanted))
    assert len(written) == code.size
    assert code.read(written.numpy()).tolist() == wanted


def test_places_take_about_two_bits_and_the_logarithm_of_the_gap():
    assert _Places(100_000, 1_000).size * 8 / 1_000 == pytest.approx(2 + math.log2(100), abs=0.6)
    dense, half = Codec.parse("float16"), Codec.parse("topk:0.5+float16")
    assert half.size([(100, 100)]) == dense.size([(100, 100)]) / 2 + 10_000 / 8, "one bit a place is less here"


def test_equal_magnitudes_are_chosen_from_the_front():
    codec = Codec("float32", keep=0.5)
    (back,) = codec.decode(codec.encode({"x": torch.ones(7)}, 0), {"x": (7,)}).values()
    assert back.tolist() == [1, 1, 1, 1, 0, 0, 0]


@given(st.lists(st.integers(0, 7), max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_matrix_has_the_fewer_rows_and_turns_back(shape):
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    if not tensor.numel():
        assert _rows(shape) == 0
        return
    matrix = _matrix(tensor)
    assert len(matrix) == _rows(shape) <= matrix.shape[1]
    assert torch.equal(_unmatrix(matrix.flatten(), tuple(shape)), tensor)


@given(st.sampled_from(CODECS), st.data())
@settings(max_examples=200, deadline=None)
def test_bytes_of_somebody_else_raise_codec_errors_or_give_tensors_of_the_shapes(name, data):
    codec, shapes = Codec.parse(name), {"a": (5, 9), "b": (11,)}
    good = bytearray(codec.encode(tensors(shapes), 0))
    change = data.draw(st.integers(0, 2))
    if change == 0:
        good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    elif change == 1:
        good = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        good = bytearray(data.draw(st.binary(max_size=300)))
    try:
        back = codec.decode(bytes(good), shapes)
    except CodecError:
        return
    assert {key: tuple(tensor.shape) for key, tensor in back.items()} == shapes


def test_a_frame_that_would_grow_is_not_expanded():
    import zstandard

    bomb = b"\x01" + zstandard.ZstdCompressor().compress(bytes(10**7))
    with pytest.raises(CodecError, match="10000000 bytes where there should be 180"):
        Codec("float32", lossless=True).decode(bomb, {"a": (45,)})


def test_zstd_never_costs_more_than_a_byte_and_pays_where_numbers_repeat():
    noise, same = torch.randn(50, 50), torch.zeros(50, 50)
    codec = Codec("float32", lossless=True)
    assert len(codec.encode({"x": noise}, 0)) <= 10_001
    assert len(codec.encode({"x": same}, 0)) < 100


@pytest.mark.parametrize(
    "name", ["float32", "int8", "topk:0.05+int4", "topk:0.1+float32+zstd", "bfloat16+zstd", "topk:0.12345649+int8"]
)
def test_a_codec_is_called_what_it_was_called(name):
    assert str(Codec.parse(name)) == name
    assert Codec.parse(str(Codec.parse(name))) == Codec.parse(name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("int9", "'int9' is not known, expected float32"),
        ("float8", "float16"),
        ("topk", "'topk' is not known"),
        ("topk:0", "expected a share"),
        ("topk:1.5", "expected a share"),
        ("topk:0.00001", "from 0.0001 to 1"),
        ("topk:nan+int8", "'topk:nan' is not known"),
        ("int8+int4", "stands twice"),
        ("zstd+zstd", "stands twice"),
        ("int8:3", "is not known|takes no number"),
        ("", "is not known"),
    ],
)
def test_a_codec_that_makes_no_sense_is_told(name, told):
    with pytest.raises(CodecError, match=told):
        Codec.parse(name)


def test_float32_alone_is_exact():
    assert Codec().is_exact
    assert not Codec("float32", keep=0.5).is_exact
    assert not Codec("bfloat16").is_exact
    assert Codec("float32", lossless=True).is_exact
