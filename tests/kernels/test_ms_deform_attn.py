from pathlib import Path

import pytest
import torch
from comparison import DEVICE, DTYPES, check_kernels, counted_launches, poisoned_memory
from safetensors.torch import load_file
from torch.nn.functional import linear

from kernels.dispatch import choose_path
from kernels.ms_deform_attn import (
    ms_deform_attn,
    ms_deform_attn_backward_op,
    ms_deform_attn_op,
    ms_deform_attn_reference,
)

GOLDEN = Path(__file__).parent.parent / "goldens" / "faseg" / "msdeform_attn.safetensors"
SHAPES = [(3, 5), (2, 4)]
FORWARD, BACKWARD = "ms_deform_attn_fwd_kernel", "ms_deform_attn_bwd_kernel"


def inputs(dtype=torch.float64, batch=2, num_queries=4, num_heads=2, head_dim=3, num_points=2, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    length = sum(height * width for height, width in shapes)
    value = torch.randn(batch, length, num_heads, head_dim, generator=generator, dtype=torch.float64)
    layout = (batch, num_queries, num_heads, len(shapes), num_points)
    locations = torch.rand(*layout, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2  # some lie outside
    weights = torch.rand(*layout, generator=generator, dtype=torch.float64)
    return value.to(dtype), shapes, locations.to(dtype), weights.to(dtype)


def by_loops(value, shapes, locations, weights):
    """Apply the definition, one sample and one pixel corner at a time."""
    batch, _, num_heads, head_dim = value.shape
    output = value.new_zeros(batch, locations.shape[1], num_heads, head_dim)
    for b, q, h, level, p in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape)).tolist():
        start = sum(height * width for height, width in shapes[:level])
        height, width = shapes[level]
        x = float(locations[b, q, h, level, p, 0]) * width - 0.5
        y = float(locations[b, q, h, level, p, 1]) * height - 0.5
        for row in range(height):
            for column in range(width):
                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                pixel = value[b, start + row * width + column, h]
                output[b, q, h] += weights[b, q, h, level, p] * share * pixel
    return output.flatten(2)


def test_equals_the_definition():
    arguments = inputs()
    output = ms_deform_attn(*arguments)
    assert output.shape == (2, 4, 6)
    torch.testing.assert_close(output, by_loops(*arguments), rtol=1e-12, atol=1e-12)


def test_gradients():
    value, shapes, locations, weights = inputs()
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, x, w), leaves)


def test_spatial_shapes_may_be_a_tensor():
    value, shapes, locations, weights = inputs()
    expected = ms_deform_attn(value, shapes, locations, weights)
    assert torch.equal(ms_deform_attn(value, torch.tensor(shapes), locations, weights), expected)


def test_half_precision_values_keep_precise_locations():
    value, shapes, locations, weights = inputs(torch.float32)
    expected = ms_deform_attn(value.bfloat16().float(), shapes, locations, weights)
    output = ms_deform_attn(value.bfloat16(), shapes, locations, weights)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": lambda v: v[0]}, ValueError, r"value has shape \(23, 2, 3\), expected \(B, S, heads, d\)"),
        ({"value": lambda v: v[:, 1:]}, ValueError, r"value has 22 positions, but spatial_shapes"),
        ({"value": lambda v: v.long()}, TypeError, "value is torch.int64, expected a floating point tensor"),
        ({"locations": lambda x: x[..., :1]}, ValueError, r"expected \(B, Lq, heads, levels, points, 2\)"),
        ({"locations": lambda x: x[:, :, :, :1]}, ValueError, r"\(2, 2, 1\), expected \(2, 2, 2\)"),
        ({"weights": lambda w: w[:, :1]}, ValueError, "attention_weights has shape"),
    ],
)
def test_bad_arguments(change, error, message):
    value, shapes, locations, weights = inputs()
    arguments = {"value": value, "locations": locations, "weights": weights}
    arguments |= {name: edit(arguments[name]) for name, edit in change.items()}
    with pytest.raises(error, match=message):
        ms_deform_attn(arguments["value"], shapes, arguments["locations"], arguments["weights"])


def test_levels_need_a_pixel():
    value, _, locations, weights = inputs()
    with pytest.raises(
        ValueError, match=r"spatial_shapes is \[\(0, 4\), \(23, 1\)\], expected heights and widths of at"
    ):
        ms_deform_attn(value, [(0, 4), (23, 1)], locations, weights)


def test_all_on_one_device():
    value, shapes, locations, weights = inputs()
    with pytest.raises(ValueError, match="attention_weights is on meta, expected cpu as value"):
        ms_deform_attn(value, shapes, locations, weights.to("meta"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "num_queries", "num_heads", "head_dim", "num_points", "shapes"),
    [
        (2, 7, 2, 20, 3, SHAPES),
        (1, 63, 1, 60, 1, [(1, 1), (9, 7), (2, 1)]),
        (3, 1, 3, 1, 2, [(5, 4)]),
        (1, 5, 1, 32, 4, [(10, 10), (5, 5), (3, 3)]),
        (1, 100, 1, 8, 1, [(4, 100)]),
    ],
)
def test_kernels(batch, num_queries, num_heads, head_dim, num_points, shapes, dtype, kernels_required):
    value, _, locations, weights = inputs(torch.float64, batch, num_queries, num_heads, head_dim, num_points, shapes)
    # In half precision the reference rounds away the place in the pixel; kernels keep locations in float32.
    locations = locations.to(DEVICE, torch.float32)

    def of_precise_locations(form):
        return lambda value, weights: form(value, shapes, locations, weights)

    tensors = {"value": value, "weights": weights}
    forms = (of_precise_locations(ms_deform_attn), of_precise_locations(ms_deform_attn_reference))
    check_kernels(*forms, tensors, dtype, launches={FORWARD, BACKWARD})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_with_gradients_of_locations(dtype, kernels_required):
    value, shapes, locations, weights = inputs(torch.float64, 2, 5, 2, 20, 3)
    check_kernels(
        lambda value, locations, weights: ms_deform_attn(value, shapes, locations, weights),
        lambda value, locations, weights: ms_deform_attn_reference(value, shapes, locations, weights),
        {"value": value, "locations": locations, "weights": weights},
        dtype,
        launches={FORWARD, BACKWARD},
    )


def test_kernels_with_fixed_point_gradients(kernels_required):
    value, shapes, locations, weights = inputs(torch.float64, 2, 5, 2, 20, 3)
    reads = []

    def scaled(form, size):
        def run(value, locations, weights):
            reads.append(torch.are_deterministic_algorithms_enabled())
            return form(value, shapes, locations, weights) * size

        return run

    torch.use_deterministic_algorithms(True)
    try:
        for size in (1e-6, 1, 1e8):
            check_kernels(
                scaled(ms_deform_attn, size),
                scaled(ms_deform_attn_reference, size),
                {"value": value, "locations": locations, "weights": weights},
                torch.float32,
                launches={FORWARD, BACKWARD},
            )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(reads)


def gradient_of_value(arguments, upstream):
    value, shapes, locations, weights = arguments
    leaf = value.detach().requires_grad_()
    return torch.autograd.grad(ms_deform_attn(leaf, shapes, locations, weights), leaf, upstream)[0]


def test_fixed_point_gradients_do_not_depend_on_the_order(kernels_required, monkeypatch):
    value, shapes, locations, weights = (
        tensor.to(DEVICE) if torch.is_tensor(tensor) else tensor for tensor in inputs(torch.float32, 1, 60, 1, 4, 2)
    )
    upstream = torch.randn(1, 60, 4, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    shuffled = (value, shapes, locations[:, order], weights[:, order])
    torch.use_deterministic_algorithms(True)
    try:
        in_order = gradient_of_value((value, shapes, locations, weights), upstream)
        assert torch.equal(gradient_of_value(shuffled, upstream[:, order]), in_order)
        upstream[0, 3, 1] = torch.inf
        assert not gradient_of_value(shuffled, upstream[:, order]).isfinite().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("batch", "num_queries", "num_points"), [(0, 4, 2), (2, 0, 2), (2, 4, 0)])
def test_nothing_to_sample(batch, num_queries, num_points, kernels_required):
    value, shapes, locations, weights = inputs(torch.float32, batch, num_queries, num_points=num_points)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (value, locations, weights)]
    with poisoned_memory():
        output = ms_deform_attn(leaves[0], shapes, *leaves[1:])
        gradients = torch.autograd.grad(output.sum(), leaves)
    assert torch.equal(output, output.new_zeros(batch, num_queries, 6))
    assert all(torch.equal(gradient, torch.zeros_like(leaf)) for gradient, leaf in zip(gradients, leaves, strict=True))


def test_kernels_take_places_far_outside(kernels_required):
    value, shapes, locations, weights = inputs(torch.float32)
    far = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30])
    locations[:, 0, :, :, 0, 0] = far[:2]
    locations[:, 1, :, :, 1, 1] = far[2:]
    locations[:, 2] = torch.nan
    output = ms_deform_attn(value.to(DEVICE), shapes, locations.to(DEVICE), weights.to(DEVICE)).cpu()
    weights = weights.masked_fill((locations.abs() > 2).any(-1) | locations.isnan().any(-1), 0.0)
    expected = ms_deform_attn_reference(value, shapes, locations.nan_to_num(0.5).clamp(-1, 2), weights)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_kernels_take_tensors_that_are_not_contiguous(kernels_required):
    tensors = [tensor for tensor in inputs(torch.float32) if torch.is_tensor(tensor)]
    turned = [tensor.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    results = []
    for value, locations, weights in ([tensor.to(DEVICE) for tensor in tensors], turned):
        leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
        output = ms_deform_attn(leaves[0], SHAPES, *leaves[1:])
        results.append((output, *torch.autograd.grad(output.mT, leaves, torch.ones_like(output).mT.contiguous())))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_float64_takes_the_reference(kernels_required):
    value, shapes, locations, weights = (t.to(DEVICE) if torch.is_tensor(t) else t for t in inputs())
    with counted_launches() as counts:
        assert ms_deform_attn(value.float(), shapes, locations, weights.float()).dtype == torch.float32
        assert ms_deform_attn(value, shapes, locations, weights).dtype == torch.float64
    assert not counts


@pytest.mark.golden
@pytest.mark.parametrize("setting", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_official_values(dtype, setting, monkeypatch):
    if setting == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    tensors = {name: tensor.to(DEVICE) for name, tensor in load_file(GOLDEN).items()}
    shapes = tensors["in.spatial_shapes"].tolist()
    offsets = tensors["out.sampling_offsets"]
    weights = tensors["out.attention_weights"].to(dtype)
    points = tensors["in.reference_points"].double()[:, :, None, :, None]
    locations = (points + offsets / tensors["in.spatial_shapes"].flip(1)[:, None]).to(dtype)
    boxes = tensors["in.reference_boxes"].double()[:, :, None, :, None]
    in_boxes = (boxes[..., :2] + offsets / offsets.shape[4] * boxes[..., 2:] * 0.5).to(dtype)
    layers = {name: tensor.to(dtype) for name, tensor in tensors.items() if name.startswith("sd.")}
    value = linear(tensors["in.value"].to(dtype), layers["sd.value_proj.weight"], layers["sd.value_proj.bias"])
    padded = value.masked_fill(tensors["in.padding_mask"][..., None], 0.0)
    cases = {"output": (value, locations), "output_padding": (padded, locations), "output_boxes": (value, in_boxes)}
    for name, (case_value, case_locations) in cases.items():
        with counted_launches() if setting == "triton" else monkeypatch.context() as counts:
            output = ms_deform_attn(case_value.unflatten(2, (weights.shape[2], -1)), shapes, case_locations, weights)
        if setting == "triton":
            assert set(counts) == ({FORWARD} if dtype == torch.float32 else set())
        output = linear(output, layers["sd.output_proj.weight"], layers["sd.output_proj.bias"]).double()
        error = (output - tensors[f"out.{name}"]).abs().max() / tensors[f"out.{name}"].abs().max()
        assert error <= (1e-9 if dtype == torch.float64 else 2e-6), name


def test_operators(kernels_required):
    value, shapes, locations, weights = inputs(torch.float32, 1, 3)
    flat = [size for shape in shapes for size in shape]
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (value, locations, weights)]
    torch.library.opcheck(ms_deform_attn_op, (leaves[0], flat, *leaves[1:]))
    value, locations, weights = (leaf.detach() for leaf in leaves)
    grad = torch.ones(1, 3, 6, device=DEVICE)
    torch.library.opcheck(ms_deform_attn_backward_op, (grad, value, flat, locations, weights))


@pytest.mark.parametrize("setting", ["auto", "reference", None])
def test_cpu_tensors_take_the_reference(monkeypatch, setting):
    monkeypatch.delenv("FRUGAL_KERNELS", raising=False)
    if setting:
        monkeypatch.setenv("FRUGAL_KERNELS", setting)
    assert choose_path("op", torch.zeros(1), has_triton=True) == "reference"


def test_unknown_setting(monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", "fast")
    with pytest.raises(ValueError, match="FRUGAL_KERNELS='fast': expected auto, reference or triton"):
        choose_path("op", torch.zeros(1), has_triton=True)


def test_triton_needs_a_cuda_tensor_or_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("FRUGAL_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="op got a cpu tensor: expected cuda"):
        choose_path("op", torch.zeros(1), has_triton=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_path("op", torch.zeros(1), has_triton=True) == "triton"
