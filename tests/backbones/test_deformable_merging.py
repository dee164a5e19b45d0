import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from backbones.deformable_merging import DeformableConv2x2, DeformableTokenMerging, sample_2x2
from backbones.litv2 import LITv2


def merging(in_channels=3, out_channels=5, dtype=torch.float64, offset_std=1.0):
    torch.manual_seed(0)
    module = DeformableTokenMerging(in_channels, out_channels).to(dtype)
    nn.init.normal_(module.dconv.conv_offset.weight, std=offset_std)
    nn.init.normal_(module.dconv.conv_offset.bias, std=offset_std)
    module.norm_layer.running_mean.normal_()
    module.norm_layer.running_var.uniform_(0.4, 1.6)
    return module


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (2, 2), (3, 2)])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_equals_the_deformable_convolution_of_torchvision(size, batch):
    conv = merging().dconv
    x = torch.randn(batch, *size, 3, dtype=torch.float64, requires_grad=True)
    first = x.permute(0, 3, 1, 2).contiguous()
    expected = deform_conv2d(first, conv.conv_offset(first), conv.weight, conv.bias, stride=2).permute(0, 2, 3, 1)
    actual = conv(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(actual)
    sources = [x, *conv.parameters()]
    for gradient, reference in zip(
        torch.autograd.grad(actual, sources, upstream), torch.autograd.grad(expected, sources, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11)


def test_starts_as_a_plain_convolution():
    conv = DeformableConv2x2(3, 4)
    x = torch.randn(2, 6, 8, 3)
    plain = nn.functional.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(x), plain.permute(0, 2, 3, 1))
    assert conv.weight.abs().max() <= (4 * 3) ** -0.5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_by_finite_differences(batch, training):
    module = merging().train(training)
    x = torch.randn(batch, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


def test_gradient_of_a_whole_network_by_finite_differences():
    torch.manual_seed(0)
    network = LITv2(embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=3).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(network(x).sum(), x)
    step = 1e-6
    difference = network(x + step * direction).sum() - network(x - step * direction).sum()
    assert (gradient * direction).sum().item() == pytest.approx(difference.item() / (2 * step), rel=1e-6)


def test_samples_outside_the_map_are_zero():
    x = torch.ones(1, 4, 4, 2)
    offsets = torch.zeros(1, 2, 2, 8)
    assert torch.equal(sample_2x2(x, offsets), torch.ones(1, 2, 2, 8))
    assert torch.equal(sample_2x2(x, offsets - 10), torch.zeros(1, 2, 2, 8))
    half = sample_2x2(x, offsets - 0.5)  # the first row and column reach half a token out of the map
    assert half[0, 0, 0].tolist() == [0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_exploded_offsets_do_not_crash(value):
    x = torch.ones(1, 4, 4, 2)
    samples = sample_2x2(x, torch.full((1, 2, 2, 8), value))
    assert not (samples.isfinite() & (samples != 0)).any()


def test_float32_under_autocast():
    conv = merging(dtype=torch.float32).dconv
    x = torch.randn(2, 6, 6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = conv(x)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, conv(x))
