"""HiLo attention: kernels, paths and errors."""

import pytest
import torch
from comparison import DEVICE, DTYPES, check_kernels, counted_launches

from kernels.hilo import hilo, hilo_reference, lo_fi

KERNELS = {
    "window_attention_fwd_kernel",
    "window_attention_bwd_kv_kernel",
    "attention_fwd_kernel",
    "attention_bwd_q_kernel",
    "attention_bwd_kv_kernel",
}


def projections(batch=2, height=4, width=6, window=2, hi_heads=1, lo_heads=2, dim=20, dtype=torch.float32, pooled=None):
    generator = torch.Generator().manual_seed(0)
    pooled = pooled or (height // window, width // window)
    shapes = {
        "hi_qkv": (batch, height, width, 3, hi_heads, dim),
        "lo_q": (batch, height, width, lo_heads, dim),
        "lo_kv": (batch, *pooled, 2, lo_heads, dim),
    }
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"window": 1, "height": 3, "width": 5},
        {"window": 3, "height": 6, "width": 9, "hi_heads": 2, "lo_heads": 1, "dim": 32},
        {"height": 10, "width": 10, "pooled": (3, 3), "dim": 60, "batch": 1},
    ],
    ids=str,
)
def test_kernels(shape, dtype, kernels_required):
    window = shape.get("window", 2)
    check_kernels(
        lambda **tensors: hilo(**tensors, window=window),
        lambda **tensors: hilo_reference(**tensors, window=window),
        projections(**shape),
        dtype,
        launches=KERNELS,
    )


def test_packed_projections_are_neither_copied_nor_their_gradients_joined(kernels_required, monkeypatch):
    from kernels import attention_triton, window_attention_triton

    tensors = {name: tensor.to(DEVICE).requires_grad_() for name, tensor in projections().items()}
    seen, written = set(), set()

    def storages_of(tensors):
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def recording(launch):
        def record(*args):
            if launch.__name__ == "launch_forward":
                seen.update(storages_of(args[:3]))
            else:
                written.update(storages_of(args[-4:-1]))
            launch(*args)

        return record

    for module in (window_attention_triton, attention_triton):
        for name in ("launch_forward", "launch_backward"):
            monkeypatch.setattr(module, name, recording(getattr(module, name)))
    outputs = hilo(**tensors, window=2)
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), list(tensors.values()))
    assert seen == storages_of(tensors.values())
    assert written == storages_of(gradients)


@pytest.mark.parametrize("unused", ["hi", "lo"])
def test_one_output_may_be_unused(unused, kernels_required):
    tensors = {name: tensor.to(DEVICE).requires_grad_() for name, tensor in projections().items()}
    hi, lo = hilo(**tensors, window=2)
    (lo if unused == "hi" else hi).sum().backward()
    gradients = {name: tensor.grad.abs().sum().item() for name, tensor in tensors.items()}
    assert [name for name, total in gradients.items() if total == 0] == (
        ["hi_qkv"] if unused == "hi" else ["lo_q", "lo_kv"]
    )


@pytest.mark.parametrize("setting", ["reference", "triton"])
def test_paths_agree_with_their_parts(setting, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    tensors = {name: tensor.to(DEVICE) for name, tensor in projections(hi_heads=2).items()}
    with counted_launches() as counts:
        hi, lo = hilo(**tensors, window=2, scale=0.3)
    assert bool(counts) == (setting == "triton")
    expected = hilo_reference(**tensors, window=2, scale=0.3)
    torch.testing.assert_close((hi, lo), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lo_fi(tensors["lo_q"], tensors["lo_kv"], 0.3), lo, rtol=1e-5, atol=1e-5)
    assert hi.shape == (2, 4, 6, 40)


@pytest.mark.parametrize("setting", ["reference", "triton"])
def test_empty_batch(setting, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    tensors = {name: tensor.to(DEVICE).requires_grad_() for name, tensor in projections(batch=0).items()}
    hi, lo = hilo(**tensors, window=2)
    assert (hi.shape, lo.shape) == ((0, 4, 6, 20), (0, 4, 6, 40))
    (hi.sum() + lo.sum()).backward()
    assert tensors["lo_kv"].grad.shape == tensors["lo_kv"].shape


def test_reference_gradcheck():
    tensors = projections(batch=1, height=2, width=2, lo_heads=1, dim=3, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(lambda *x: hilo_reference(*x, 2), leaves)


def test_opcheck(kernels_required):
    tensors = [tensor.to(DEVICE).requires_grad_() for tensor in projections(batch=1, height=2, width=4).values()]
    torch.library.opcheck(torch.ops.frugal.hilo.default, (*tensors, 2, 0.5))
    outputs = torch.ops.frugal.hilo(*tensors, 2, 0.5)
    saved = [tensor.detach() for tensor in (*outputs[:2], *tensors)]
    rest = [tensor.detach() for tensor in outputs]
    torch.library.opcheck(torch.ops.frugal.hilo_backward.default, (*saved, 2, 0.5, *rest))


def test_autocast_casts():
    tensors = {name: tensor.requires_grad_() for name, tensor in projections().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hi, lo = hilo(**tensors, window=2)
    assert hi.dtype == lo.dtype == torch.bfloat16
    (hi.sum() + lo.sum()).backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hi_qkv": torch.zeros(2, 4, 6, 3, 20)}, ValueError, r"hi_qkv has shape .* expected \(B, H, W, 3, h, d\)"),
        ({"hi_qkv": torch.zeros(2, 4, 6, 2, 1, 20)}, ValueError, "expected 3 projections of a map"),
        ({"hi_qkv": torch.zeros(2, 4, 5, 3, 1, 20)}, ValueError, "that window=2 divides"),
        ({"lo_q": torch.zeros(2, 4, 4, 2, 20)}, ValueError, r"lo_q has shape .* expected \(2, 4, 6, 2, 20\)"),
        ({"lo_kv": torch.zeros(2, 2, 3, 2, 3, 20)}, ValueError, r"lo_kv has shape .* expected \(2, 2, 3, 2, 2, 20\)"),
        ({"lo_kv": torch.zeros(2, 2, 3, 2, 2, 20).half()}, TypeError, "lo_kv is torch.float16"),
        ({"lo_q": torch.zeros(2, 4, 6, 2, 20, device="meta")}, ValueError, "lo_q is on meta"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        hilo(**{**projections(), **changed}, window=2)
