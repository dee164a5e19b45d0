from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparison import DEVICE, DTYPES, check_kernels, counted_launches
from safetensors.torch import load_file

from kernels.quantize import RunningRange, quantize
from kernels.quantized_layers import (
    gelu_8bit,
    gelu_backward_8bit,
    gelu_backward_op,
    gelu_backward_reference,
    layer_norm_8bit,
    layer_norm_backward_8bit,
    layer_norm_backward_op,
    layer_norm_backward_reference,
    softmax_8bit,
    softmax_backward_8bit,
    softmax_backward_op,
    softmax_backward_reference,
)

GOLDENS = Path(__file__).parent.parent / "goldens" / "mesa"
SHAPES = [
    ((5, 12), 3),
    ((2, 1, 63), 7),
    ((3, 100, 20), 2),
    ((1, 9, 192), 3),
    ((2, 3, 5, 20), 3),
    ((2, 6, 3, 60), 2),
    ((1, 2, 1, 300), 1),
    ((2, 5, 1), 1),
]


def running_range(groups, dtype=torch.float32):
    state = RunningRange(torch.ones(groups, dtype=dtype), torch.zeros(groups, dtype=dtype), torch.zeros(1))
    return RunningRange(*(tensor.to(DEVICE) for tensor in state))


def quantised(shape, groups):
    """Codes of random numbers and their span and shift."""
    generator = torch.Generator().manual_seed(len(shape))
    codes = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    span = torch.rand(groups, generator=generator) + 1
    return codes, span, -0.4 * span


def tensors_of(op, shape, groups):
    """Arguments of a backward pass; those of the range keep their dtype."""
    codes, span, shift = quantised(shape, groups)
    tensors = {"grad": torch.randn(shape, generator=torch.Generator().manual_seed(5)), "codes": codes}
    if op == "layer_norm":
        x = torch.randn((*shape[:-1], 1), generator=torch.Generator().manual_seed(6))
        tensors |= {"mean": 0.1 * x, "rstd": 1 + x.square(), "weight": torch.linspace(0.5, 2, shape[-1])}
    return tensors, span.to(DEVICE), shift.to(DEVICE)


BACKWARD = {
    "softmax": (softmax_backward_8bit, softmax_backward_reference),
    "gelu": (gelu_backward_8bit, gelu_backward_reference),
    "layer_norm": (layer_norm_backward_8bit, layer_norm_backward_reference),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("op", BACKWARD)
def test_kernels(kernels_required, op, shape, groups, dtype):
    tensors, span, shift = tensors_of(op, shape, groups)
    kernel, reference = (partial(function, span=span, shift=shift) for function in BACKWARD[op])
    check_kernels(kernel, reference, tensors, dtype, launches={f"{op}_backward_kernel"}, no_grad=tensors)


@pytest.mark.parametrize("op", BACKWARD)
def test_kernels_see_several_tiles(kernels_required, op, monkeypatch):
    monkeypatch.setattr("kernels.quantize_triton.PROGRAMS", 3)
    tensors, span, shift = tensors_of(op, (1, 300, 65), 1)
    tensors["grad"] = tensors["grad"].transpose(1, 2).contiguous().transpose(1, 2)
    kernel, reference = (partial(function, span=span, shift=shift) for function in BACKWARD[op])
    check_kernels(kernel, reference, tensors, torch.float32, launches={f"{op}_backward_kernel"}, no_grad=tensors)


@pytest.mark.parametrize("op", BACKWARD)
def test_kernels_on_nothing(kernels_required, op):
    tensors, span, shift = tensors_of(op, (0, 4, 6), 2)
    kernel, reference = (partial(function, span=span, shift=shift) for function in BACKWARD[op])
    check_kernels(kernel, reference, tensors, torch.float32, launches=set(), no_grad=tensors)


@pytest.mark.parametrize("op", BACKWARD)
def test_float64_and_long_rows_take_the_reference(kernels_required, op, monkeypatch):
    monkeypatch.setattr("kernels.quantized_layers.MAX_COLUMNS", 5)
    for dtype in (torch.float64, torch.float32):
        if (op, dtype) == ("gelu", torch.float32):  # its rows may be of any length
            continue
        tensors, span, shift = tensors_of(op, (2, 4, 6), 2)
        tensors = {name: tensor if name == "codes" else tensor.to(dtype) for name, tensor in tensors.items()}
        with counted_launches() as counts:
            BACKWARD[op][0](**{name: tensor.to(DEVICE) for name, tensor in tensors.items()}, span=span, shift=shift)
        assert not counts


def on_grid(shape, groups):
    """Numbers which 8 bits hold exactly: the first update of a range takes their span and shift."""
    codes, span, shift = quantised(shape, groups)
    codes.view(-1, shape[-1])[0], codes.view(-1, shape[-1])[1] = 0, 255
    inner = (span.double() / 255).repeat_interleave(shape[-1] // groups)
    return codes * inner + shift.double().repeat_interleave(shape[-1] // groups)


@pytest.mark.parametrize("stochastic", [False, True])
def test_gradients_are_exact_where_8_bits_are(stochastic):
    x = on_grid((2, 3, 8), 2).to(DEVICE).requires_grad_()
    weight, bias = (torch.linspace(start, 1.5, 8, dtype=torch.float64, device=DEVICE) for start in (-1, 0.5))
    upstream = torch.randn_like(x)
    # the random rounding of a code which is a whole number to 1e-13 hits another one time in 1e13
    gelu = gelu_8bit(x, running_range(2, torch.float64), stochastic=stochastic)
    expected = F.gelu(x)
    assert torch.equal(gelu, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream) for y in (gelu, expected)))
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]
    norm = layer_norm_8bit(*leaves, running_range(2, torch.float64), eps=1e-3, stochastic=stochastic)
    expected = F.layer_norm(x, (8,), weight, bias, 1e-3)
    assert torch.equal(norm, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, upstream) for y in (norm, expected)))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("op", ["softmax", "gelu", "layer_norm"])
def test_gradients_are_near_and_right_on_average(op, kernels, request):
    if kernels:
        request.getfixturevalue("kernels_required")
    x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    affine = [torch.full((9,), 1.5, device=DEVICE), torch.zeros(9, device=DEVICE)]
    quantising = {"softmax": softmax_8bit, "gelu": gelu_8bit, "layer_norm": layer_norm_8bit}[op]
    exact = {"softmax": lambda x: F.softmax(x, -1), "gelu": F.gelu}.get(op, lambda x: F.layer_norm(x, (9,), *affine))
    extra = affine if op == "layer_norm" else []
    (expected,) = torch.autograd.grad(exact(x), x, upstream)
    torch.manual_seed(0)
    errors = []
    for _ in range(16):
        output = quantising(x, *extra, running_range(3))
        assert torch.equal(output, exact(x))
        errors.append(torch.autograd.grad(output, x, upstream)[0] - expected)
    single = errors[0].square().mean().sqrt()
    assert 1e-5 < single / expected.square().mean().sqrt() < 0.02
    assert torch.stack(errors).mean(0).square().mean().sqrt() < 0.5 * single


def test_backward_uses_the_range_of_its_own_forward():
    running = running_range(1)
    x = torch.linspace(-2, 2, 256, device=DEVICE)[:, None].requires_grad_()
    first = gelu_8bit(x, running, stochastic=False)
    gelu_8bit(100 * x, running, stochastic=False)
    torch.testing.assert_close(
        torch.autograd.grad(first.sum(), x), torch.autograd.grad(F.gelu(x).sum(), x), rtol=0, atol=1e-5
    )


def test_kept_bytes():
    x = torch.randn(4, 50, 64, device=DEVICE, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gelu_8bit(x, running_range(4))
        softmax_8bit(x, running_range(4))
    assert sum(t.numel() * t.element_size() for t in kept) == 2 * (x.numel() + 2 * 4 * 4)


def test_without_gradients_nothing_is_kept():
    running = running_range(2)
    x = torch.randn(2, 4, 6, device=DEVICE)
    weight = torch.ones(6, device=DEVICE)
    with torch.no_grad():
        gelu_8bit(x.clone().requires_grad_(), running)
    softmax_8bit(x, running)
    layer_norm_8bit(x, weight, weight, running)
    assert running.updates.item() == 0
    layer_norm_8bit(x, weight.requires_grad_(), weight, running).sum().backward()
    assert running.updates.item() == 1
    assert weight.grad is not None


def test_mixed_precision():
    x = torch.randn(2, 4, 6, device=DEVICE).half().requires_grad_()
    weight = torch.ones(6, device=DEVICE)
    output = layer_norm_8bit(x, weight, weight, running_range(2))
    assert output.dtype == torch.float32
    output.sum().backward()
    assert x.grad.dtype == torch.float16
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        softmax_8bit(x, running_range(2)).sum().backward()
    assert x.grad.dtype == torch.float16


@pytest.mark.parametrize(("shape", "groups"), [((2, 5, 12), 3), ((2, 4, 3, 5), 2)])
def test_registration(kernels_required, shape, groups):
    for op, registered in {"softmax": softmax_backward_op, "gelu": gelu_backward_op}.items():
        tensors, span, shift = tensors_of(op, shape, groups)
        grad, codes = (tensors[name].to(DEVICE) for name in ("grad", "codes"))
        torch.library.opcheck(registered, (grad, codes, span, shift, 256))
    tensors, span, shift = tensors_of("layer_norm", shape, groups)
    grad, codes, *others = (tensor.to(DEVICE) for tensor in tensors.values())
    torch.library.opcheck(layer_norm_backward_op, (grad, codes, span, shift, 256, *others))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(2, 3)}, ValueError, r"grad has shape \(2, 3\) on cpu, expected \(2, 4\) on cpu as codes"),
        ({"grad": torch.zeros(2, 4).byte()}, TypeError, "grad is torch.uint8, expected a floating point tensor"),
        ({"codes": torch.zeros(2, 4)}, TypeError, "codes is torch.float32, expected torch.uint8"),
        ({"span": torch.ones(3), "shift": torch.ones(3)}, ValueError, "codes has 4 channels, expected a multiple of"),
        ({"levels": 1}, ValueError, "levels is 1, expected 2 to 256"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"grad": torch.zeros(2, 4), "codes": torch.zeros(2, 4).byte(), "span": torch.ones(2)}
    arguments |= {"shift": torch.zeros(2)} | change
    with pytest.raises(error, match=message):
        softmax_backward_8bit(**arguments)
    with pytest.raises(error, match=message):
        gelu_backward_8bit(**arguments)
    with pytest.raises(error, match=message):
        layer_norm_backward_8bit(**arguments, mean=torch.zeros(2), rstd=torch.ones(2), weight=torch.ones(4))


def test_bad_layer_arguments():
    x, state = torch.zeros(2, 4), running_range(3)
    for function in (softmax_8bit, gelu_8bit):
        with pytest.raises(ValueError, match="x has 4 channels, expected a multiple of the 3 groups"):
            function(x, RunningRange(*(tensor.cpu() for tensor in state)))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\) as in x"):
        layer_norm_8bit(x, torch.ones(4), torch.ones(3), RunningRange(torch.ones(2), torch.ones(2), torch.zeros(1)))
    arguments = (torch.zeros(2, 4), torch.zeros(2, 4).byte(), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"expected 2, 2 and 4 numbers"):
        layer_norm_backward_8bit(*arguments, torch.zeros(3), torch.ones(2), torch.ones(4))


@pytest.mark.parametrize("precision", ["", "_f64"])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("layer", ["softmax", "gelu", "layernorm"])
def test_goldens(layer, kernels, precision, request):
    if kernels:
        request.getfixturevalue("kernels_required")
    tensors = {name: t.to(DEVICE) for name, t in load_file(GOLDENS / f"layer_{layer}.safetensors").items()}
    x, upstream, expected, number = (tensors[f"{name}{precision}"] for name in ("x0", "grad_y", "grad_x0", "y"))
    running = running_range(3, x.dtype)
    leaves = [x.requires_grad_()]
    options = {"stochastic": False}
    if layer == "layernorm":
        leaves += [tensors[f"sd.{name}"].to(x.dtype).requires_grad_() for name in ("weight", "bias")]
        options["eps"] = 1e-6
    function = {"softmax": softmax_8bit, "gelu": gelu_8bit, "layernorm": layer_norm_8bit}[layer]
    function(1.15 * x, *leaves[1:], running, **options)
    output = function(*leaves, running, **options)
    grads = torch.autograd.grad(output, leaves, upstream)
    assert running.updates.item() == 2
    tolerance = {"rtol": 0, "atol": 1e-12 if precision else 2e-6}
    torch.testing.assert_close(output, number, **tolerance)
    kept = "1" if layer == "softmax" else "0"  # softmax keeps its output
    codes = quantize(output if layer == "softmax" else x, running.span, running.shift).detach()
    codes = codes.transpose(0, 1).reshape(3, -1) if x.ndim == 4 else codes.reshape(-1, 3, 4).transpose(0, 1).flatten(1)
    assert torch.equal(codes, tensors[f"q{kept}{precision}"])
    torch.testing.assert_close(grads[0], expected, **tolerance)
    for name, grad in zip(("weight", "bias"), grads[1:], strict=False):
        torch.testing.assert_close(grad, tensors[f"grad_{name}{precision}"], **tolerance)
