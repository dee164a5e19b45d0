import json
from pathlib import Path

import pytest
import torch
from comparison import DEVICE, DTYPES, counted_launches, poisoned_memory
from safetensors.torch import load_file

from kernels.quantize import (
    RunningRange,
    dequantize,
    dequantize_op,
    dequantize_reference,
    group_range,
    group_range_op,
    group_range_reference,
    quantize,
    quantize_op,
    quantize_reference,
    rounding_noise,
    update_range,
)

GOLDENS = Path(__file__).parent.parent / "goldens" / "mesa"
SHAPES = [
    ((5, 12), 3),
    ((2, 1, 63), 1),
    ((1, 7, 63), 7),
    ((2, 100, 192), 3),
    ((2, 3, 5, 20), 3),
    ((2, 6, 3, 60), 2),
    ((1, 2, 63, 65), 2),
    ((3, 1, 1, 1), 1),
    ((0, 4, 6), 2),
]


def activations(shape, groups, dtype=torch.float32):
    """Numbers, with span and shift of groups that do not cover all of them."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator).to(dtype)
    span = torch.rand(groups, generator=generator) + 3
    return x.to(DEVICE), span.to(DEVICE), (-0.5 * span).to(DEVICE)


def running_range(groups, dtype=torch.float32):
    return RunningRange(torch.ones(groups, dtype=dtype), torch.zeros(groups, dtype=dtype), torch.zeros(1))


def test_codes_by_hand():
    x = torch.tensor([[-2.0, -1.0, -0.99, 0.0, 0.5, 1.0, 1.4, 2.0]])
    span, shift = torch.tensor([2.0]), torch.tensor([-1.0])
    codes = quantize(x, span, shift, levels=5)
    assert codes.tolist() == [[0, 0, 0, 2, 3, 4, 4, 4]]
    assert dequantize(codes, span, shift, levels=5).tolist() == [[-1.0, -1.0, -1.0, 0.0, 0.5, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("shape", "group_of"),
    [
        ((3, 6), lambda index: index[1] // 2),
        ((2, 3, 6), lambda index: index[2] // 2),
        ((2, 6, 3, 4), lambda index: index[1] // 2),
    ],
)
def test_groups(shape, group_of):
    x, _, _ = activations(shape, 3, torch.float64)
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist()
    members = [[float(x[tuple(place)]) for place in places if group_of(place) == group] for group in range(3)]
    low, high = group_range(x, 3)
    assert low.tolist() == [min(member) for member in members]
    assert high.tolist() == [max(member) for member in members]
    span = torch.tensor([1.0, 10.0, 100.0], device=DEVICE)
    restored = dequantize(torch.full(shape, 255, dtype=torch.uint8, device=DEVICE), span, torch.zeros_like(span))
    assert all(restored[tuple(place)] == span[group_of(place)] for place in places)


def test_running_range():
    running = running_range(1)
    for number, (x, expected) in enumerate([([-1.0, 3.0], (4.0, -1.0)), ([0.0, 1.0], (3.7, -0.9)), ([], (3.7, -0.9))]):
        update_range(torch.tensor([x]).T, running)
        torch.testing.assert_close((running.span.item(), running.shift.item()), expected, rtol=1e-6, atol=0)
        assert running.updates.item() == min(number + 1, 2)
    update_range(torch.tensor([[torch.inf], [0.0]]), running)
    torch.testing.assert_close((running.span.item(), running.shift.item()), (3.7, -0.9), rtol=1e-6, atol=0)


def test_error_is_half_a_step():
    x, _, _ = activations((4, 50, 12), 3)
    running = RunningRange(*(tensor.to(DEVICE) for tensor in running_range(3)))
    update_range(x, running)
    for seed, steps in ((None, 0.5), (torch.tensor([3], device=DEVICE), 1.0)):
        restored = dequantize(quantize(x, running.span, running.shift, seed=seed), running.span, running.shift)
        error = (restored - x).unflatten(-1, (3, 4)).abs().amax((0, 1, 3)) / (running.span / 255)
        assert (error < steps + 1e-4).all()
        assert (error > 0.9 * steps).all()


def test_random_rounding_is_right_on_average():
    seed = torch.tensor([12345], device=DEVICE)
    x = torch.full((20_000, 1), 0.3, device=DEVICE)
    codes = quantize(x, torch.tensor([255.0], device=DEVICE), torch.zeros(1, device=DEVICE), seed=seed)
    assert abs(codes.float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5
    assert torch.equal(codes, quantize(x, *(torch.tensor([n], device=DEVICE) for n in (255.0, 0.0)), seed=seed))
    other = quantize(x, *(torch.tensor([n], device=DEVICE) for n in (255.0, 0.0)), seed=seed + 1)
    # as many as for independent noise
    assert abs((codes != other).float().mean().item() - 0.42) < 0.02


def test_rounding_noise_is_uniform():
    noise = rounding_noise(100_000, torch.tensor([7]))
    assert 0 < noise.min() < noise.max() < 1
    counts = torch.histc(noise, 64, 0, 1)
    assert ((counts - 100_000 / 64).square() / (100_000 / 64)).sum() < 110  # chi-squared, 63 degrees: p = 2e-4
    centred = noise - noise.mean()
    for lag in (1, 2, 64, 384):
        assert abs((centred[lag:] * centred[:-lag]).mean() / centred.square().mean()) < 0.015


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_kernels(kernels_required, shape, groups, dtype):
    x, span, shift = activations(shape, groups, dtype)
    for levels, seed in ((256, None), (16, None), (256, torch.tensor([99], device=DEVICE))):
        with poisoned_memory(), counted_launches() as counts:
            codes = quantize(x, span, shift, levels=levels, seed=seed)
            restored = dequantize(codes, span, shift, levels=levels, dtype=dtype)
        assert set(counts) == ({"quantize_kernel", "dequantize_kernel"} if x.numel() else set())
        assert torch.equal(codes, quantize_reference(x, span, shift, levels=levels, seed=seed))
        truth = dequantize_reference(codes, span.double(), shift.double(), levels=levels, dtype=torch.float64)
        torch.testing.assert_close(
            restored.double(), truth, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(torch.float32).eps
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [*SHAPES[:-1], ((3, 50, 192), 2), ((2, 2, 70, 90), 1)], ids=str)
def test_range_kernel(kernels_required, shape, groups, dtype, monkeypatch):
    monkeypatch.setattr("kernels.quantize_triton.PROGRAMS", 6)  # some see several tiles
    x, _, _ = activations(shape, groups, dtype)
    with poisoned_memory(), counted_launches() as counts:
        low, high = group_range(x, groups)
    assert set(counts) == {"group_range_kernel"}
    expected_low, expected_high = group_range_reference(x, groups)
    assert torch.equal(low, expected_low)
    assert torch.equal(high, expected_high)


def test_kernels_read_transposed_tensors(kernels_required):
    x, span, shift = activations((2, 5, 12), 3)
    view = x.transpose(1, 2).contiguous().transpose(1, 2)
    codes = quantize(view, span, shift)
    assert torch.equal(codes, quantize_reference(x, span, shift))
    assert torch.equal(dequantize(codes.transpose(0, 1), span, shift), dequantize(codes, span, shift).transpose(0, 1))
    assert torch.equal(torch.stack(group_range(view, 3)), torch.stack(group_range_reference(x, 3)))


@pytest.mark.parametrize("kernels", [True, False])
def test_constant_groups_and_nan(kernels, request):
    if kernels:
        request.getfixturevalue("kernels_required")
    x = torch.tensor([[2.0, 2.0, 3.0, torch.nan]], device=DEVICE)
    span, shift = torch.tensor([0.0, 1.0], device=DEVICE), torch.tensor([2.0, 2.5], device=DEVICE)
    codes = quantize(x, span, shift)
    assert codes.tolist() == [[0, 0, 128, 0]]
    torch.testing.assert_close(dequantize(codes, span, shift)[0, :2], x[0, :2])


def test_float64_takes_the_reference(kernels_required):
    x, span, shift = activations((2, 5, 12), 3, torch.float64)
    with counted_launches() as counts:
        group_range(x, 3)
        dequantize(quantize(x, span, shift), span, shift, dtype=torch.float64)
    assert not counts


@pytest.mark.parametrize(("shape", "groups"), [((2, 5, 12), 3), ((2, 4, 3, 5), 2)])
def test_registration(kernels_required, shape, groups):
    x, span, shift = activations(shape, groups)
    codes = quantize(x, span, shift)
    torch.library.opcheck(group_range_op, (x, groups))
    torch.library.opcheck(quantize_op, (x, span, shift, 256, None))
    torch.library.opcheck(quantize_op, (x, span, shift, 16, torch.tensor([1], device=DEVICE)))
    torch.library.opcheck(dequantize_op, (codes, span, shift, 256, torch.float16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(3)},
            ValueError,
            r"x has shape \(3,\), expected \(B, C\), \(B, N, C\) or \(B, heads, N, d\)",
        ),
        ({"x": torch.zeros(2, 5)}, ValueError, "x has 5 channels, expected a multiple of the 2 groups"),
        ({"x": torch.zeros(2, 5, 4, 4)}, ValueError, "x has 5 heads, expected a multiple of the 2 groups"),
        ({"x": torch.zeros(2, 4).long()}, TypeError, "x is torch.int64, expected a floating point tensor"),
        ({"span": torch.ones(4)}, ValueError, r"shapes \(4,\) and \(2,\), expected \(groups,\)"),
        ({"shift": torch.ones(2, device="meta")}, ValueError, "are on cpu and meta, expected cpu"),
        ({"levels": 257}, ValueError, "levels is 257, expected 2 to 256"),
        ({"seed": torch.zeros(1)}, ValueError, r"seed is torch.float32 \(1,\) on cpu, expected one int64"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"x": torch.zeros(2, 4), "span": torch.ones(2), "shift": torch.zeros(2)} | change
    with pytest.raises(error, match=message):
        quantize(**arguments)


def test_bad_codes_and_ranges():
    state = torch.ones(2)
    with pytest.raises(TypeError, match=r"codes is torch.float32, expected torch.uint8"):
        dequantize(torch.zeros(2, 4), state, state)
    with pytest.raises(TypeError, match=r"dtype is torch.int64, expected a floating point type"):
        dequantize(torch.zeros(2, 4).byte(), state, state, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected at least one element"):
        group_range(torch.zeros(0, 4), 2)
    with pytest.raises(ValueError, match=r"updates has shape \(2,\), expected one element"):
        update_range(torch.zeros(2, 4), RunningRange(state, state, state))


WITHOUT_NOISE = [path for path in sorted(GOLDENS.glob("quant_*.json")) if "noise fixed" in path.read_text()]


@pytest.mark.parametrize("path", WITHOUT_NOISE, ids=lambda path: path.stem)
def test_goldens(path):
    meta, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    groups, levels = meta["groups"], meta["level"]
    running = running_range(groups, tensors["clip_val_0"].dtype)
    tolerance = {"rtol": 4 * torch.finfo(running.span.dtype).eps, "atol": 0}
    for iteration in range(meta["iterations"]):
        x, expected = (tensors[f"{name}_{iteration}"] for name in ("x", "q"))
        update_range(x, running, decay=meta["ema_decay"])
        torch.testing.assert_close(running.span, tensors[f"clip_val_{iteration}"], **tolerance)
        torch.testing.assert_close(running.shift, tensors[f"shift_{iteration}"], **tolerance)
        codes = quantize(x, running.span, running.shift, levels=levels, upstream=True)
        if x.ndim == 4:  # the files group heads before the batch
            grouped = codes.transpose(0, 1).reshape(groups, -1)
        else:
            grouped = codes.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1).reshape(groups, -1)
        assert torch.equal(grouped, expected)
        restored = dequantize(codes, running.span, running.shift, levels=levels, dtype=x.dtype, upstream=True)
        torch.testing.assert_close(restored, tensors[f"x_restored_{iteration}"], **(tolerance | {"atol": 1e-6}))


@pytest.mark.parametrize("kernels", [True, False])
def test_what_wraps_upstream_is_clamped(kernels, request):
    if kernels:
        request.getfixturevalue("kernels_required")
    tensors = load_file(GOLDENS / "quant_edge_wraparound.safetensors")
    x, span, shift = (tensors[name].to(DEVICE) for name in ("x_1", "clip_val_1", "shift_1"))
    wrapped, clamped = quantize(x, span, shift, upstream=True), quantize(x, span, shift)
    outside = (x.unflatten(-1, (2, 4)) > (shift + 1.002 * span)[:, None]).flatten(-2)
    assert outside.any()
    assert (wrapped[outside] < 255).all()
    assert (clamped[outside] == 255).all()
    assert torch.equal(wrapped[~outside], clamped[~outside])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_upstream_noise_is_added_in_float32_at_least(dtype):
    """Officially positions are rounded to the type of x, then uniform noise is added in float32, and 1/2 subtracted."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    low, high = group_range(x, 2)
    seed = torch.tensor([5])
    codes = quantize(x, high - low, low, seed=seed, upstream=True)
    span, shift = ((state.repeat_interleave(32)) for state in (high - low, low))
    position = (x - shift) * (255 / span).to(dtype)
    wider = torch.promote_types(dtype, torch.float32)
    noise = rounding_noise(x.numel(), seed).view(x.shape)
    expected = (position.to(wider) + noise.to(wider) - 0.5).clamp(min=0).round() % 256
    assert torch.equal(codes, expected.to(torch.uint8))
