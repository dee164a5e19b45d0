from pathlib import Path

import pytest
import torch
from comparison import DEVICE, DTYPES, check_kernels, counted_launches, poisoned_memory
from safetensors.torch import load_file

from kernels.boundary_max_pool import (
    boundary_max_pool,
    boundary_max_pool_backward_op,
    boundary_max_pool_op,
    boundary_max_pool_reference,
)

GOLDEN = Path(__file__).parent.parent / "goldens" / "tad" / "bmp" / "bmp.safetensors"
CASES = sorted({name.partition(".")[0] for name in load_file(GOLDEN)})
KERNELS = {"boundary_max_pool_fwd_kernel", "boundary_max_pool_bwd_kernel"}


def inputs(batch=2, channels=6, length=9, num_windows=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    feature = torch.randn(batch, channels, length, generator=generator, dtype=torch.float64)
    centre = torch.rand(batch, num_windows, 2, 1, generator=generator, dtype=torch.float64) * (length + 4) - 2
    reach = torch.rand(batch, num_windows, 2, 2, generator=generator, dtype=torch.float64) * length / 2
    windows = centre + reach * torch.tensor([-1.0, 0.8], dtype=torch.float64)  # some end before they start
    return feature.to(dtype), windows.flatten(2)


def by_loops(feature, windows):
    """Apply the definition, one maximum at a time."""
    batch, channels, length = feature.shape
    output = feature.new_zeros(batch, channels, windows.shape[1])
    for b, c, s in torch.cartesian_prod(*(torch.arange(n) for n in output.shape)).tolist():
        bounds = windows[b, s, :2] if c < channels // 2 else windows[b, s, 2:]
        first, last = (min(max(int(bound), 0), length - 1) for bound in bounds)
        output[b, c, s] = max(feature[b, c, first : max(last, first) + 1])
    return output


def test_equals_the_definition():
    arguments = inputs()
    assert torch.equal(boundary_max_pool(*arguments), by_loops(*arguments))


def test_gradients():
    feature, windows = inputs()
    assert torch.autograd.gradcheck(lambda x: boundary_max_pool(x, windows), [feature.requires_grad_()])


def special_numbers():
    """Ties, NaN and infinities in the feature; NaN, infinities and halves of the way in the windows."""
    feature = torch.tensor([[1, 3, 3, 2], [0, torch.nan, 5, torch.nan], [-torch.inf, -torch.inf, 1, 0], [7, 7, 7, 7]])
    windows = torch.tensor([[0, 3, 0, 1], [-0.9, 0.9, -torch.inf, torch.inf], [3.9, 1, torch.nan, 2], [1, 2, 1, 99]])
    return feature[None], windows[None]


def test_special_numbers():
    feature, windows = special_numbers()
    expected = torch.tensor([[3, 1, 2, 3], [torch.nan, 0, torch.nan, torch.nan], [-torch.inf, 1, 1, 1], [7, 7, 7, 7]])
    output = boundary_max_pool(feature.requires_grad_(), windows)
    torch.testing.assert_close(output, expected[None], rtol=0, atol=0, equal_nan=True)
    (gradient,) = torch.autograd.grad(output, feature, torch.ones_like(output))
    expected = torch.tensor([[1, 2, 0, 1], [1, 2, 0, 1], [1, 0, 3, 0], [3, 1, 0, 0]])
    assert torch.equal(gradient[0], expected.to(gradient))


def test_kernels_treat_special_numbers_alike(kernels_required):
    feature, windows = (tensor.to(DEVICE) for tensor in special_numbers())
    results = []
    for form in (boundary_max_pool, boundary_max_pool_reference):
        leaf = feature.clone().requires_grad_()
        output = form(leaf, windows)
        results.append((output, *torch.autograd.grad(output, leaf, torch.ones_like(output))))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "length", "num_windows"),
    [(2, 6, 9, 4), (1, 2, 1, 1), (1, 40, 63, 5), (1, 2, 100, 3), (1, 66, 3, 2), (2, 4, 5, 11)],
)
def test_kernels(batch, channels, length, num_windows, dtype, kernels_required):
    feature, windows = inputs(batch, channels, length, num_windows)
    check_kernels(
        lambda feature: boundary_max_pool(feature, windows.to(feature.device)),
        lambda feature: boundary_max_pool_reference(feature, windows.to(feature.device)),
        {"feature": feature},
        dtype,
        launches=KERNELS,
    )


@pytest.mark.parametrize(("batch", "channels", "num_windows"), [(0, 4, 3), (2, 4, 0), (2, 0, 3)])
def test_nothing_to_pool(batch, channels, num_windows, kernels_required):
    feature = torch.ones(batch, channels, 5, device=DEVICE, requires_grad=True)
    with poisoned_memory():
        output = boundary_max_pool(feature, torch.ones(batch, num_windows, 4, device=DEVICE))
        assert output.shape == (batch, channels, num_windows)
        (gradient,) = torch.autograd.grad(output.sum(), feature)
    assert torch.equal(gradient, torch.zeros_like(feature))


@pytest.mark.golden
@pytest.mark.parametrize("setting", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_official_values_and_corrected_gradients(case, setting, monkeypatch):
    if setting == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    tensors = {name: tensor.to(DEVICE) for name, tensor in load_file(GOLDEN).items() if name.startswith(f"{case}.")}
    feature = tensors[f"{case}.input"].requires_grad_()
    with counted_launches() if setting == "triton" else monkeypatch.context() as counts:
        output = boundary_max_pool(feature, tensors[f"{case}.segments"])
        (gradient,) = torch.autograd.grad(output, feature, tensors[f"{case}.grad_output"])
    assert setting == "reference" or set(counts) == KERNELS
    assert torch.equal(output, tensors[f"{case}.output"])
    torch.testing.assert_close(gradient, tensors[f"{case}.grad_input_correct"], rtol=1e-6, atol=1e-6)


def test_no_gradient_reaches_the_windows(kernels_required):
    feature, windows = (tensor.float().to(DEVICE).requires_grad_() for tensor in inputs())
    boundary_max_pool(feature, windows).sum().backward()
    assert windows.grad is None
    assert feature.grad is not None


def test_float64_takes_the_reference(kernels_required):
    with counted_launches() as counts:
        boundary_max_pool(*(tensor.to(DEVICE) for tensor in inputs()))
    assert not counts


def test_operators(kernels_required):
    feature, windows = (tensor.float().to(DEVICE) for tensor in inputs())
    torch.library.opcheck(boundary_max_pool_op, (feature.requires_grad_(), windows))
    output, positions = boundary_max_pool_op(feature.detach(), windows)
    torch.library.opcheck(boundary_max_pool_backward_op, (output, positions, feature.shape[2]))


@pytest.mark.parametrize(
    ("feature", "windows", "error", "message"),
    [
        ((2, 4), (2, 3, 4), ValueError, r"feature has shape \(2, 4\), expected \(B, C, T\)"),
        ((2, 5, 6), (2, 3, 4), ValueError, "C even and T at least 1"),
        ((2, 4, 0), (2, 3, 4), ValueError, "C even and T at least 1"),
        ((2, 4, 6), (1, 3, 4), ValueError, r"windows has shape \(1, 3, 4\), expected \(2, S, 4\)"),
        ((2, 4, 6), (2, 3, 2), ValueError, r"expected \(2, S, 4\)"),
        ((2, 4, 6), (12, 4), ValueError, r"expected \(2, S, 4\)"),
    ],
)
def test_bad_shapes(feature, windows, error, message):
    with pytest.raises(error, match=message):
        boundary_max_pool(torch.ones(feature), torch.ones(windows))


def test_bad_types_and_devices():
    with pytest.raises(TypeError, match=r"feature is torch\.int64, expected a floating point tensor"):
        boundary_max_pool(torch.ones(1, 2, 3).long(), torch.ones(1, 1, 4))
    with pytest.raises(TypeError, match=r"windows is torch\.int64"):
        boundary_max_pool(torch.ones(1, 2, 3), torch.ones(1, 1, 4).long())
    with pytest.raises(ValueError, match="windows is on meta, expected cpu as feature"):
        boundary_max_pool(torch.ones(1, 2, 3), torch.ones(1, 1, 4, device="meta"))
