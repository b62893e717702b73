"""The `glyphs`: characters drawn with the fonts that matplotlib ships, distorted and noisy; any number of them."""

import io
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from fedloru_flwr.data.samples import DataConfig, Split, fault, generator

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Font(NamedTuple):
    """A font file of matplotlib's, with its family and style as the file gives them."""

    file: str
    family: str
    style: str


# All fonts in matplotlib's mpl-data/fonts/ttf that give the 62 characters the glyphs named zero, one, ..., A, ..., z.
# That leaves out fonts of symbols (cmex10, cmsy10, STIXSizOneSymReg, ...) or of placeholders, and the old-style digits
# of cmmi10. The Computer Modern files call themselves by the name of the file, "Regular": here they have real names.
FONTS = (
    Font("DejaVuSans.ttf", "DejaVu Sans", "Book"),
    Font("DejaVuSans-Bold.ttf", "DejaVu Sans", "Bold"),
    Font("DejaVuSans-Oblique.ttf", "DejaVu Sans", "Oblique"),
    Font("DejaVuSans-BoldOblique.ttf", "DejaVu Sans", "Bold Oblique"),
    Font("DejaVuSansMono.ttf", "DejaVu Sans Mono", "Book"),
    Font("DejaVuSansMono-Bold.ttf", "DejaVu Sans Mono", "Bold"),
    Font("DejaVuSansMono-Oblique.ttf", "DejaVu Sans Mono", "Oblique"),
    Font("DejaVuSansMono-BoldOblique.ttf", "DejaVu Sans Mono", "Bold Oblique"),
    Font("DejaVuSerif.ttf", "DejaVu Serif", "Book"),
    Font("DejaVuSerif-Bold.ttf", "DejaVu Serif", "Bold"),
    Font("DejaVuSerif-Italic.ttf", "DejaVu Serif", "Italic"),
    Font("DejaVuSerif-BoldItalic.ttf", "DejaVu Serif", "Bold Italic"),
    Font("STIXGeneral.ttf", "STIXGeneral", "Regular"),
    Font("STIXGeneralBol.ttf", "STIXGeneral", "Bold"),
    Font("STIXGeneralItalic.ttf", "STIXGeneral", "Italic"),
    Font("STIXGeneralBolIta.ttf", "STIXGeneral", "Bold Italic"),
    Font("cmr10.ttf", "Computer Modern Roman", "Regular"),
    Font("cmb10.ttf", "Computer Modern Roman", "Bold"),
    Font("cmti10.ttf", "Computer Modern Roman", "Italic"),
    Font("cmss10.ttf", "Computer Modern Sans", "Regular"),
    Font("cmtt10.ttf", "Computer Modern Typewriter", "Regular"),
)

# All lengths are in sides of the square image.
EM = 0.75  # a font's size
BASELINE = 0.695  # from the top: ascenders and descenders then have the same space
ROTATION = np.deg2rad(12)
SCALE = (0.8, 1.1)
SHEAR = 0.15
SHIFT = 0.1

_FINE = 2  # glyphs are distorted at twice the resolution, then averaged, which keeps their edges smooth
_BATCH = 256  # samples distorted at a time


def read_glyphs(config: DataConfig) -> Split:
    """Generate the data set: ``glyph_samples`` grey images, light on dark, as uint8 of shape ``(n, 1, size, size)``.

    Classes are balanced to one sample, and so are the fonts of a class; the order is random. Each image is drawn by a
    random affine map about its centre: rotation, scale and shear, then a shift, all uniform. Gaussian noise of
    standard deviation ``glyph_noise`` is added and the sum clipped to [0, 1].

    Everything follows from the ``glyph_*`` settings, whatever the global random states and torch's threads. Groups
    are those of the partition column ``font``, ``style`` or ``font-style``, if ``config`` names one.

    Raises:
        DataError: a font is not where matplotlib should have it.
    """
    fonts, labels = _deal(config.glyph_samples, config.glyph_seed)
    masters = torch.from_numpy(_masters(config.glyph_size * _FINE))
    inverses = _inverse_maps(config.glyph_samples, config.glyph_seed)
    noise = generator("glyph-noise", config.glyph_seed)
    inputs = torch.empty(config.glyph_samples, 1, config.glyph_size, config.glyph_size, dtype=torch.uint8)
    for start in range(0, config.glyph_samples, _BATCH):
        batch = slice(start, start + _BATCH)
        pixels = _distort(masters[torch.from_numpy(fonts[batch]), torch.from_numpy(labels[batch])], inverses[batch])
        pixels += config.glyph_noise * torch.from_numpy(noise.standard_normal(pixels.shape, dtype=np.float32))
        inputs[batch] = pixels.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    groups = _groups(config.partition_column)
    return Split(
        inputs=inputs,
        labels=labels.tolist(),
        class_names=tuple(CHARACTERS),
        groups=tuple(groups[font] for font in fonts) if groups else (),
    )


def _groups(column: str) -> list[str]:
    """Return each font's value of the column, or nothing for no column."""
    if not column:
        return []
    return [{"font": f.family, "style": f.style, "font-style": f"{f.family} {f.style}"}[column] for f in FONTS]


def _deal(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a font and a class for each of ``count`` samples, int64, balanced and in random order."""
    rng = generator("glyph-classes", seed)
    classes, fonts = len(CHARACTERS), len(FONTS)
    turns = np.arange(count) // classes  # how many of its class came before
    labels = rng.permutation(classes)[np.arange(count) % classes]
    order = rng.permuted(np.tile(np.arange(fonts), (classes, 1)), axis=1)
    chosen = order[labels, turns % fonts]
    shuffled = rng.permutation(count)
    return chosen[shuffled], labels[shuffled]


def _inverse_maps(count: int, seed: int) -> np.ndarray:
    """Return float32 of shape (count, 2, 3): for ``(x, y, 1)`` in an image the place in the undistorted glyph.

    Both run from -1 to 1 over the image, y downwards.
    """
    rng = generator("glyph-maps", seed)
    angle, shear, across, down = rng.uniform(-1, 1, (4, count)) * np.array([[ROTATION], [SHEAR], [SHIFT], [SHIFT]])
    scale = rng.uniform(*SCALE, count)
    cos, sin = np.cos(angle), np.sin(angle)
    # rotation @ [[1, shear], [0, 1]] * scale, inverted
    inverse = np.array([[cos + shear * sin, sin - shear * cos], [-sin, cos]]) / scale  # (2, 2, count)
    shift = 2 * np.stack([across, down])  # the image is 2 wide
    offset = -(inverse * shift).sum(axis=1, keepdims=True)
    return np.concatenate([inverse, offset], axis=1).transpose(2, 0, 1).astype(np.float32)


def _distort(glyphs: Tensor, inverses: np.ndarray) -> Tensor:
    """Return the glyphs, float32 of shape (n, s, s), as their maps draw them: (n, 1, s / 2, s / 2)."""
    side = glyphs.shape[-1]
    places = (torch.arange(side, dtype=torch.float32) * 2 + 1) / side - 1  # the middle of each pixel
    x, y, one = torch.from_numpy(inverses).unbind(2)  # each (n, 2)
    grid = x[:, None, None] * places[:, None] + (y[:, None] * places[:, None] + one[:, None])[:, :, None]
    drawn = functional.grid_sample(glyphs[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return functional.avg_pool2d(drawn, _FINE)


@cache
def _fonts_folder() -> Path:
    spec = find_spec("matplotlib")  # finds it without the time that an import takes
    if spec is None or spec.origin is None:
        raise fault("dataset", "glyphs", "its fonts are those of matplotlib, which is not installed", "Install it")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


def _masters(side: int) -> np.ndarray:
    """Draw every character in every font, light on dark: float32 in [0, 1], shape (fonts, classes, side, side).

    A character stands on the font's baseline, the middle of its advance width in the middle of the image.
    """
    factor = -(-256 // side)  # drawn large and averaged: at that size, hinting to whole pixels does not show
    large = side * factor
    masters = np.empty((len(FONTS), len(CHARACTERS), side, side), dtype=np.float32)
    for row, font in enumerate(FONTS):
        path = _fonts_folder() / font.file
        try:
            # Not by name: where a file is missing, Pillow takes one of that name from the system. And in the basic
            # layout: the other one is not part of every Pillow.
            file = io.BytesIO(path.read_bytes())
            face = ImageFont.truetype(file, round(EM * large), layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            problem = f"matplotlib's font {path} cannot be read ({error})"
            raise fault("dataset", "glyphs", problem, "Reinstall matplotlib") from error
        for column, character in enumerate(CHARACTERS):
            image = Image.new("L", (large, large))
            ImageDraw.Draw(image).text((large / 2, BASELINE * large), character, fill=255, font=face, anchor="ms")
            masters[row, column] = np.asarray(image.reduce(factor))
    return masters / 255
