"""Losses, convolutions, reassembly and point clouds beside formulas, loops and PyTorch's layers."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

pytest.importorskip("mmcv", reason="the extra openmmlab is not installed")


@pytest.fixture(scope="module", autouse=True)
def ops():
    from tasks.core.openmmlab import install

    install()
    import mmcv.ops

    return mmcv.ops


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TARGET = torch.tensor([0, 2, 3, 1, 2])  # 3 is background, of three classes


@pytest.mark.parametrize("gamma", [2.0, 0.5, 0.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(ops, gamma, weighted):
    logits, weight = randn(5, 3, seed=1) * 3, torch.tensor([0.5, 2, 1], dtype=torch.float64) if weighted else None
    p, labels = logits.sigmoid(), F.one_hot(TARGET, 4)[:, :3].bool()
    of_target = torch.where(labels, p, 1 - p)
    alpha = torch.where(labels, 0.3, 0.7)
    expected = -alpha * (1 - of_target) ** gamma * of_target.log()
    if weighted:
        expected *= torch.tensor([0.5, 1, 1, 2, 1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, TARGET, gamma, 0.3, weight, "none"), expected)
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, TARGET, gamma, 0.3, weight, "mean"), expected.sum() / 5)
    function = lambda x: ops.sigmoid_focal_loss(x, TARGET, gamma, 0.3, weight, "none")  # noqa: E731
    assert gradcheck(function, logits.requires_grad_())


@pytest.mark.parametrize("gamma", [2.0, 0.5, 0.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_focal_loss(ops, gamma, weighted):
    logits, weight = randn(5, 3, seed=1) * 3, torch.tensor([0.5, 2, 1], dtype=torch.float64) if weighted else None
    target = torch.tensor([0, 2, 1, 1, -1])  # a negative one costs nothing
    p = logits.softmax(1).gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    scale = torch.tensor([0.5, 1, 2, 2, 0] if weighted else [1.0, 1, 1, 1, 0])
    expected = -0.3 * (1 - p) ** gamma * p.log() * scale
    torch.testing.assert_close(ops.softmax_focal_loss(logits, target, gamma, 0.3, weight, "none"), expected)
    total = lambda x: ops.softmax_focal_loss(x, target, gamma, 0.3, weight, "sum")  # noqa: E731
    assert gradcheck(total, logits.requires_grad_())


def test_focal_losses_of_sure_predictions_are_finite(ops):
    logits = torch.tensor([[90.0, -90, 0], [-90, 90, 0]]).requires_grad_()
    for function in (ops.sigmoid_focal_loss, ops.softmax_focal_loss):
        loss = function(logits, torch.tensor([0, 0]), 0.5, 0.25, None, "sum")
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


CONVOLUTIONS = [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (1, 2, 2, 2, 3)]  # stride, padding, dilation, groups, offset groups


@pytest.mark.parametrize("setting", CONVOLUTIONS)
def test_deformable_convolution(ops, setting):
    stride, padding, dilation, groups, deform_groups = setting
    x, weight, bias = randn(2, 6, 5, 7), randn(4, 6 // groups, 3, 3, seed=1), randn(4, seed=2)
    plain = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    shape = (2, 9 * deform_groups, *plain.shape[2:])
    offset, mask = 0.7 * randn(shape[0], 2 * shape[1], *shape[2:], seed=3), randn(*shape, seed=4)
    torch.testing.assert_close(ops.deform_conv2d(x, torch.zeros_like(offset), weight, *setting), plain)
    result = ops.modulated_deform_conv2d(x, torch.zeros_like(offset), torch.ones_like(mask), weight, bias, *setting)
    torch.testing.assert_close(result, plain + bias[:, None, None])

    inputs = [t.requires_grad_() for t in (x, offset, weight)]
    assert gradcheck(lambda *args: ops.deform_conv2d(*args, *setting), inputs, fast_mode=True)
    inputs = [t.requires_grad_() for t in (x, offset, mask, weight, bias)]
    assert gradcheck(lambda *args: ops.modulated_deform_conv2d(*args, *setting), inputs, fast_mode=True)
    without_bias = lambda *args: ops.modulated_deform_conv2d(*args, None, *setting)  # noqa: E731
    assert gradcheck(without_bias, inputs[:-1], fast_mode=True)


def test_offset_by_a_pixel_moves_the_image(ops):
    x, weight = randn(1, 2, 6, 6), randn(3, 2, 3, 3, seed=1)
    offset = torch.zeros(1, 9, 2, 6, 6, dtype=torch.float64)
    offset[:, :, 1] = 1  # y and x of every position
    moved = F.conv2d(F.pad(x, (0, 1))[..., 1:], weight, padding=1)
    result = ops.deform_conv2d(x, offset.flatten(1, 2), weight, 1, 1)
    torch.testing.assert_close(result[..., 1:-1], moved[..., 1:-1])


def test_offsets_of_a_larger_map_are_read_row_after_row(ops):
    """As the compiled operation reads them, of which DyHead makes use."""
    x, weight = randn(2, 2, 4, 4), randn(3, 2, 3, 3, seed=1)
    offset, mask = randn(2, 18, 8, 8, seed=2), randn(2, 9, 8, 8, seed=3)
    inputs = [t.requires_grad_() for t in (x, offset, mask, weight)]
    result = ops.modulated_deform_conv2d(*inputs, None, 1, 1)
    small = (t.flatten(1)[:, : t.shape[1] * 16].view(2, -1, 4, 4) for t in (offset, mask))
    torch.testing.assert_close(result, ops.modulated_deform_conv2d(x, *small, weight, None, 1, 1))
    assert gradcheck(lambda *args: ops.modulated_deform_conv2d(*args, None, 1, 1), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_deformable_convolution_of_narrow_types(ops, dtype):
    layer = ops.ModulatedDeformConv2dPack(4, 4, 3, padding=1)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = layer.double()(x.double())
    result = layer.to(dtype)(x.to(dtype).requires_grad_())
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=2e-2 if dtype == torch.float16 else 1e-4, rtol=1e-2)
    result.sum().backward()
    assert layer.weight.grad.dtype == dtype
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_masked_convolution(ops):
    layer = ops.MaskedConv2d(3, 4, (3, 5), padding=(1, 2)).double()
    x = randn(1, 3, 6, 7)
    mask = (randn(1, 6, 7, seed=1) > 0.3).to(torch.uint8)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=(1, 2)) * mask
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask), expected)
        assert (layer(x, torch.zeros_like(mask)) == 0).all()


@pytest.mark.parametrize(("kernel", "groups", "scale"), [(3, 1, 2), (5, 2, 3)])
def test_carafe(ops, kernel, groups, scale):
    features, masks = randn(2, 4, 4, 5), randn(2, groups * kernel**2, 4 * scale, 5 * scale, seed=1)
    result = ops.carafe(features, masks, kernel, groups, scale)
    padded = F.pad(features, [kernel // 2] * 4)
    for image, channel, row, column in torch.cartesian_prod(*(torch.arange(n) for n in (2, 4, 3, 4))).tolist():
        y, x = scale * row + 1, scale * column
        window = padded[image, channel, row : row + kernel, column : column + kernel]
        group = channel // (4 // groups)
        weights = masks[image, group * kernel**2 : (group + 1) * kernel**2, y, x].view(kernel, kernel)
        torch.testing.assert_close(result[image, channel, y, x], (window * weights).sum())
    torch.testing.assert_close(ops.carafe_naive(features, masks, kernel, groups, scale), result)
    inputs = [features.requires_grad_(), masks.requires_grad_()]
    assert gradcheck(lambda *args: ops.carafe(*args, kernel, groups, scale), inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_psa_mask(ops, kind):
    height, width, mask = 3, 4, (5, 3)
    x = randn(2, 15, height, width)
    result = ops.PSAMask(kind, mask)(x)
    expected = torch.zeros(2, height * width, height, width, dtype=torch.float64)
    for y, x_, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (height, width, *mask))).tolist():
        other_y, other_x = y + i - 2, x_ + j - 1
        if 0 <= other_y < height and 0 <= other_x < width:
            value = x[:, i * 3 + j, y, x_]
            if kind == "collect":
                expected[:, other_y * width + other_x, y, x_] = value
            else:
                expected[:, y * width + x_, other_y, other_x] = value
    assert torch.equal(result, expected)
    assert gradcheck(ops.PSAMask(kind, mask), x.requires_grad_())


@pytest.fixture
def clouds():
    return randn(2, 12, 3), randn(2, 5, 3, seed=1)


def test_neighbours(ops, clouds):
    points, centers = clouds
    distances = torch.cdist(centers, points)
    nearest = distances.argsort(dim=-1)
    assert torch.equal(ops.knn(4, points, centers).transpose(1, 2), nearest[..., :4].int())
    dist, index = ops.three_nn(centers, points)
    assert torch.equal(index, nearest[..., :3].int())
    torch.testing.assert_close(dist, distances.gather(-1, nearest[..., :3]))

    for low, high in ((0, 1.2), (0.5, 2.0)):
        result = ops.ball_query(low, high, 4, points, centers)
        for image, number in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
            row = distances[image, number]
            inside = ((row >= low) & (row < high)).nonzero().flatten().tolist()[:4]
            filled = inside + [inside[0] if inside else 0] * (4 - len(inside))
            assert result[image, number].tolist() == filled
    few = ops.ball_query(0, 100.0, 15, points, centers)  # more than there are
    assert few[0, 0].tolist() == [*range(12), 0, 0, 0]


def test_gathered_points(ops, clouds):
    features = randn(2, 4, 12, seed=2).requires_grad_()
    index = torch.randint(0, 12, (2, 5), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    groups = torch.randint(0, 12, (2, 5, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    weight = randn(2, 5, 3, seed=3)
    for image in range(2):
        gathered, grouped = ops.gather_points(features, index), ops.grouping_operation(features, groups)
        assert torch.equal(gathered[image], features[image][:, index[image].long()])
        assert torch.equal(grouped[image], features[image][:, groups[image].long()])
        mixed = ops.three_interpolate(features, groups, weight)
        torch.testing.assert_close(mixed[image], (grouped[image] * weight[image]).sum(-1))
    assert gradcheck(lambda x: ops.gather_points(x, index), features)
    assert gradcheck(lambda x: ops.grouping_operation(x, groups), features)
    assert gradcheck(lambda x: ops.three_interpolate(x, groups, weight), features)


def test_furthest_points(ops, clouds):
    points, _ = clouds
    distances = torch.cdist(points, points).square()
    result = ops.furthest_point_sample_with_dist(distances, 5)
    for image in range(2):
        taken = [0]
        while len(taken) < 5:
            taken.append(int(distances[image, taken].amin(0).argmax()))
        assert result[image].tolist() == taken
    # mmcv allocates the buffers of the other form on a GPU only.
    from tasks.core.openmmlab import ext

    by_points, buffer = torch.zeros(2, 5, dtype=torch.int32), torch.full((2, 12), 1e10)
    ext.furthest_point_sampling_forward(points, buffer, by_points, b=2, n=12, m=5)
    assert torch.equal(by_points, result)


def test_chamfer_distance(ops):
    a, b = randn(2, 6, 2).float().requires_grad_(), randn(2, 4, 2, seed=1).float().requires_grad_()
    from tasks.core.openmmlab import ext

    squared = torch.cdist(a, b).square()
    dist1, dist2, idx1, idx2 = (torch.zeros(2, n, dtype=t) for t in (torch.float32, torch.int32) for n in (6, 4))
    ext.chamfer_distance_forward(a.detach(), b.detach(), dist1, dist2, idx1, idx2)
    torch.testing.assert_close(dist1, squared.amin(2))
    torch.testing.assert_close(dist2, squared.amin(1))
    weights = torch.rand(2, 6), torch.rand(2, 4)
    ((squared.amin(2) * weights[0]).sum() + (squared.amin(1) * weights[1]).sum()).backward()
    grads = torch.zeros(2, 6, 2), torch.zeros(2, 4, 2)
    ext.chamfer_distance_backward(a.detach(), b.detach(), idx1, idx2, *weights, *grads)
    torch.testing.assert_close(grads[0], a.grad)
    torch.testing.assert_close(grads[1], b.grad)
