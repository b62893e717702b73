"""Formulas that tests of several parts check against."""

from collections.abc import Mapping

from torch import Tensor

from fedloru_flwr.models import AdapterPlan
from fedloru_flwr.models.layout import Layout, nested_keys, personal_keys, shared_keys


def effective(
    plan: AdapterPlan, layout: Layout, values: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The plain model's tensors with ``W + s B' A' + s_p B_p A_p``, from the formulas in `layout`."""
    tensors = {**base, **{name: values[name] for name in plan.dense_leaves}}
    for layer in plan.layers:
        own = [values[key] for key in shared_keys(layer, layout.family)]
        if layout.family == "loha":
            w1_a, w1_b, w2_a, w2_b = own
            delta = (w1_a @ w1_b) * (w2_a @ w2_b)
        else:
            a, b = layer.as_matrices(*own)
            if layout.nested_rank:
                a_down, a_up, b_down, b_up = (values[key] for key in nested_keys(layer))
                a = a + layout.nested_scale * a_down @ a_up.flatten(1)
                b = b + layout.nested_scale * b_down.flatten(1) @ b_up
            delta = b @ a
        delta = layout.scale * delta
        if layout.personal_rank:
            a, b = layer.as_matrices(*(values[key] for key in personal_keys(layer)))
            delta = delta + layout.personal_scale * b @ a
        tensors[layer.weight_key] = tensors[layer.weight_key] + layer.as_weight(delta)
    return tensors
