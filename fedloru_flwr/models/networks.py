"""The built-in networks: a small CNN, a multilayer perceptron, CIFAR-style ResNets."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloru_flwr.lowrank import uniform
from fedloru_flwr.suggest import did_you_mean

Norm = Literal["group", "batch"]
MODELS = ("cnn", "mlp", "resnet10", "resnet18")


class SmallCNN(nn.Module):
    """Three 3x3 convolutions and two linear layers, for small images such as 8x8 digits.

    Args:
        input_shape: ``(channels, height, width)``, each side at least 4.
        num_classes: number of outputs.
        width: channels of the first convolution; the others have 2 and 4 times as many.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, width: int = 16) -> None:
        super().__init__()
        channels = input_shape[0]
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.fc1 = nn.Linear(4 * width * (input_shape[1] // 4) * (input_shape[2] // 4), 8 * width)
        self.fc2 = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        x = functional.relu(self.conv1(x))
        x = _halved(functional.relu(self.conv2(x)))
        x = _halved(functional.relu(self.conv3(x)))
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]  # nn.Module is untyped


def _halved(x: Tensor) -> Tensor:
    """``max_pool2d(x, 2)``; without gradients from maxima of whole slices, which a CPU forms several times as fast."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return functional.max_pool2d(x, 2)
    height, width = (size // 2 * 2 for size in x.shape[-2:])
    rows = torch.maximum(x[..., 0:height:2, :], x[..., 1:height:2, :])
    return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


class MLP(nn.Module):
    """A multilayer perceptron with ReLU between its layers.

    Args:
        input_shape: any shape; it is flattened.
        num_classes: number of outputs.
        hidden: widths of the hidden layers.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, hidden: tuple[int, ...] = (256, 256)) -> None:
        super().__init__()
        widths = (math.prod(input_shape), *hidden, num_classes)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, *input_shape)`` to logits ``(batch, num_classes)``."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)  # type: ignore[no-any-return]  # nn.Module is untyped


def _normalisation(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = _normalisation(norm, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = _normalisation(norm, channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), _normalisation(norm, channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels_in, h, w)`` to ``(batch, channels_out, h / stride, w / stride)``."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet for small images: 3x3 stem without pooling, four stages, average pooling, one linear layer.

    Args:
        input_shape: ``(channels, height, width)``.
        num_classes: number of outputs.
        blocks: blocks a stage; ``(1, 1, 1, 1)`` is ResNet-10, ``(2, 2, 2, 2)`` ResNet-18.
        width: channels of the first stage, doubled at each later one (64 in the paper).
        norm: ``"group"`` or ``"batch"`` (the FedLoRU authors' setting).
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        width: int = 64,
        norm: Norm = "group",
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], width, 3, 1, 1, bias=False)
        self.norm1 = _normalisation(norm, width)
        channels = width
        for stage, count in enumerate(blocks):
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(channels, width * 2**stage, stride, norm))
                channels = width * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to logits ``(batch, num_classes)``."""
        x = functional.relu(self.norm1(self.conv1(x)))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]  # nn.Module is untyped


def seeded_initialisation(model: nn.Module, seed: int) -> nn.Module:
    """Draw the weights of linear and convolutional layers anew from ``seed``, the same on every machine.

    Convolutions: ``U(-b, b)`` with ``b = sqrt(6 / fan_in)`` (He et al., arXiv 1502.01852); linear layers
    ``b = 1 / sqrt(fan_in)`` (torch's default); biases zero. Normalisation layers keep their ones and zeros.

    Returns:
        The model, changed in place. On the meta device there is nothing to draw.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_meta:
                fan_in = module.weight[0].numel()
                bound = math.sqrt((6.0 if isinstance(module, nn.Conv2d) else 1.0) / fan_in)
                module.weight.copy_(uniform(seed, "initial", name, shape=module.weight.shape, bound=bound))
                if module.bias is not None:
                    module.bias.zero_()
    return model


@dataclass(frozen=True)
class NetworkFactory:
    """Builds one of the built-in networks; equal factories build equal networks, weights included.

    Attributes:
        name: ``"cnn"``, ``"mlp"``, ``"resnet10"`` or ``"resnet18"``.
        input_shape: the shape of one sample.
        num_classes: number of outputs.
        width: channels of the first stage (cnn, resnet); 0 for the network's own default.
        hidden: widths of the hidden layers (mlp).
        norm: normalisation layers (resnet).
        seed: of the initial weights.

    Raises:
        ValueError: for an unknown name, norm or width, or a sample shape the network cannot take.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    width: int = 0
    hidden: tuple[int, ...] = (256, 256)
    norm: Norm = "group"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            told = f"model = {self.name!r} is not known, expected one of {', '.join(MODELS)}"
            raise ValueError(told + did_you_mean(self.name, MODELS))
        if self.name != "mlp" and (len(self.input_shape) != 3 or min(self.input_shape[1:]) < 4):
            raise ValueError(
                f"model = {self.name!r} takes images of shape (channels, height, width) with sides of at least 4, but "
                f"the data's samples have shape {self.input_shape}; use model = 'mlp' or another dataset"
            )
        if self.norm not in ("group", "batch"):
            raise ValueError(f"norm = {self.norm!r} is not known, expected 'group' or 'batch'")
        if self.width < 0 or any(width < 1 for width in self.hidden):
            raise ValueError(f"widths must be positive, got model-width = {self.width} and hidden = {self.hidden}")
        if self.num_classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes, got {self.num_classes}")

    def __call__(self) -> nn.Module:
        """Build the network."""
        model: nn.Module
        if self.name == "mlp":
            model = MLP(self.input_shape, self.num_classes, self.hidden)
        else:
            channels, height, width = self.input_shape
            image = (channels, height, width)
            if self.name == "cnn":
                model = SmallCNN(image, self.num_classes, self.width or 16)
            else:
                blocks = (1, 1, 1, 1) if self.name == "resnet10" else (2, 2, 2, 2)
                model = ResNet(image, self.num_classes, blocks, self.width or 64, self.norm)
        return seeded_initialisation(model, self.seed)
