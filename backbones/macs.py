"""Multiply-adds of a network: products of matrices, convolutions and attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

COUNTED = (
    "matrix products, convolutions (deformable ones too) and attention only: normalisation, activations, "
    "interpolation and sampling are not counted"
)


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of one pass of `model`, in evaluation mode, over `example` (1, ...) on the model's device.

    On the meta device nothing is computed. Counted are `COUNTED`; an addition of a bias is none of them.
    """
    with evaluating(model), counting() as counter:
        model(example.clone())  # what inference mode made, autograd would refuse
    return macs_so_far(counter)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count what runs inside; `macs_so_far` reads the counter, inside and after."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention as one operation of unknown cost
    try:
        counter = FlopCounterMode(display=False, custom_mapping=_formulas())
        with torch.inference_mode(False), torch.enable_grad(), counter:  # the counter hooks into the graph
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def macs_so_far(counter: FlopCounterMode) -> int:
    """Multiply-adds that `counter` has seen."""
    return counter.get_total_flops() // 2


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode and afterwards every module, one by one, back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _formulas() -> dict[Any, Any]:
    """FLOPs by operation where torch's counter has no formula; operations that do not exist here are left out."""
    return {
        getattr(library, name): formula
        for library, name, formula in (
            (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", _attention_flops),
            (torch.ops.aten, "_scaled_dot_product_attention_math_for_mps", _attention_flops),
            (torch.ops.aten, "_scaled_dot_product_fused_attention_overrideable", _attention_flops),
            (torch.ops.torchvision, "deform_conv2d", _deform_conv_flops),
            (torch.ops.frugal, "attention", _attention_flops),
            (torch.ops.frugal, "window_attention", _window_attention_flops),
            (torch.ops.frugal, "hilo", _hilo_flops),
            (torch.ops.frugal, "hash_attention", _hash_attention_flops),
        )
        if hasattr(library, name)
    }


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """(..., Lq, d) times (..., Lk, d) transposed, times (..., Lk, dv)."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _window_attention_flops(
    query: Any, key: Any, value: Any, bias: Any, sizes: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Maps (B, ..., heads, d), padded to whole windows of `sizes[:3]` tokens; `sizes[3:6]` are those of the keys."""
    window = sizes[3 - len(query[1:-2]) : 3]
    windows = prod(-(-size // side) for size, side in zip(query[1:-2], window, strict=True))
    return 2 * query[0] * windows * query[-2] * prod(window) * prod(sizes[3:6]) * (query[-1] + value[-1])


def _hilo_flops(
    hi_qkv: Any, lo_q: Any, lo_kv: Any, window: int, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Heads (B, H, W, 3, h, d) within windows, and (B, H, W, l, d) to all of (B, H', W', 2, l, d)."""
    return 4 * (prod(hi_qkv) // 3 * window**2 + prod(lo_q) * lo_kv[1] * lo_kv[2])


def _hash_attention_flops(codes: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """(..., N, bits) transposed times (..., N, d), and (..., N, bits) times that."""
    return 4 * prod(codes) * value[-1]


def _deform_conv_flops(image: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Like a convolution of the sampled pixels; `out_shape` (B, C', h, w), `weight` (C', C / groups, kh, kw)."""
    return 2 * prod(out_shape) * prod(weight[1:])
