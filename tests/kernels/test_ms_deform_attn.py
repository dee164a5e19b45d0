import pytest
import torch

from kernels.dispatch import choose_path
from kernels.ms_deform_attn import ms_deform_attn

SHAPES = [(3, 5), (2, 4)]


def inputs(dtype=torch.float64, batch=2, num_queries=4, num_heads=2, head_dim=3, num_points=2):
    generator = torch.Generator().manual_seed(0)
    length = sum(height * width for height, width in SHAPES)
    value = torch.randn(batch, length, num_heads, head_dim, generator=generator, dtype=torch.float64)
    layout = (batch, num_queries, num_heads, len(SHAPES), num_points)
    locations = torch.rand(*layout, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2  # some lie outside
    weights = torch.rand(*layout, generator=generator, dtype=torch.float64)
    return value.to(dtype), SHAPES, locations.to(dtype), weights.to(dtype)


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


def test_triton_cannot_be_insisted_on(monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="ms_deform_attn has no Triton kernels"):
        ms_deform_attn(*inputs())


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
