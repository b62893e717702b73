"""Frozen linear layers in 8 or 4 bits, by bitsandbytes, beside which factors are trained (QLoRA, arXiv 2305.14314)."""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

Quantised = Literal["int8", "nf4"]


class QuantisationError(ValueError):
    """Weights that cannot be quantised; says why and what would help."""


def check_installed(kind: str) -> None:
    """Refuse to go on without bitsandbytes.

    Raises:
        QuantisationError: it is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise QuantisationError(
            f"base-precision = {kind!r} needs the bitsandbytes library: pip install 'fedloru-flwr[quantised]', or use "
            "base-precision = 'bfloat16'"
        )


def quantised_linear(plain: nn.Linear, kind: Quantised) -> nn.Module:
    """A layer that computes about what this one does, from weights of few bits and the same bias.

    Args:
        plain: it is left as it is; its bias is shared.
        kind: ``"int8"`` (LLM.int8, arXiv 2208.07339) or ``"nf4"``.
    """
    check_installed(kind)
    import bitsandbytes

    sizes = (plain.in_features, plain.out_features)
    has_bias = plain.bias is not None
    layer: Any
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(*sizes, bias=has_bias, compute_dtype=plain.weight.dtype, quant_type="nf4")
    layer.weight = quantised_weight(plain.weight, kind)
    if has_bias:
        layer.bias = plain.bias
    return layer.train(plain.training)  # type: ignore[no-any-return]  # bitsandbytes ships no types


@torch.no_grad()
def quantised_weight(weight: Tensor, kind: Quantised) -> nn.Parameter:
    """Weights in few bits, on the device of the given ones."""
    import bitsandbytes

    values = weight.detach().cpu().clone()  # those that are on a device already are not quantised by moving there
    made: Any
    if kind == "int8":
        made = bitsandbytes.nn.Int8Params(values.half(), requires_grad=False, has_fp16_weights=False)
    else:
        made = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
    moved: nn.Parameter = made.to(weight.device)  # which quantises
    return moved
