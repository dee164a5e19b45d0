"""Pooling of regions and features read at boxes, beside plain loops, torchvision and each other."""

import math

import pytest
import torch
import torchvision
from torch.autograd import gradcheck

pytest.importorskip("mmcv", reason="the extra openmmlab is not installed")
# Image, then two corners: inside, across every border, tiny, on whole pixels.
REGIONS = [
    [0.0, 3.2, 4.1, 17.7, 12.9], [1, -5, -3, 9, 40], [1, 8, 2, 8.4, 2.3], [0, 4, 4, 12, 8], [0, 15, 10, 60, 50]
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def ops():
    from tasks.core.openmmlab import install

    install()
    import mmcv.ops

    return mmcv.ops


@pytest.fixture
def maps():
    return torch.randn(2, 3, 11, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def bilinear(plane, y, x):
    """Sample (H, W) at a point: borders continue for one pixel."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = (min(max(v, 0), size - 1) for v, size in ((y, height), (x, width)))
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    above = plane[top, left] * (1 - dx) + plane[top, right] * dx
    below = plane[bottom, left] * (1 - dx) + plane[bottom, right] * dx
    return float(above * (1 - dy) + below * dy)


def loop_roi_align(maps, region, size, scale, ratio, aligned, reduce):
    image, *corners = region
    x1, y1, x2, y2 = (v * scale - (0.5 if aligned else 0) for v in corners)
    sides = [y2 - y1, x2 - x1] if aligned else [max(y2 - y1, 1), max(x2 - x1, 1)]
    bins = [side / bins for side, bins in zip(sides, size, strict=True)]
    counts = [ratio or math.ceil(side) for side in bins]
    result = torch.zeros(maps.shape[1], *size)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in result.shape)).tolist():
        channel, row, column = index
        samples = [
            bilinear(
                maps[int(image), channel],
                y1 + (row + (i + 0.5) / counts[0]) * bins[0],
                x1 + (column + (j + 0.5) / counts[1]) * bins[1],
            )
            for i in range(counts[0])
            for j in range(counts[1])
        ]
        result[channel, row, column] = reduce(samples)
    return result


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(ops, maps, mode, ratio, aligned):
    regions = torch.tensor(REGIONS, dtype=torch.float64)
    reduce = max if mode == "max" else lambda samples: sum(samples) / len(samples)
    result = ops.roi_align(maps, regions, (3, 2), 0.5, ratio, mode, aligned)
    for region, pooled in zip(REGIONS, result, strict=True):
        expected = loop_roi_align(maps, region, (3, 2), 0.5, ratio, aligned, reduce)
        torch.testing.assert_close(pooled.float(), expected)
    function = lambda x: ops.roi_align(x, regions, (3, 2), 0.5, ratio, mode, aligned)  # noqa: E731
    assert gradcheck(function, maps.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_region_of_no_size(ops, maps, mode):
    region = torch.tensor([[0.0, 4, 4, 4, 4]], dtype=torch.float64)
    maps.requires_grad_()
    pooled = ops.roi_align(maps, region, 2, 1.0, 0, mode, True)
    assert (pooled == (0 if mode == "avg" else -10000)).all()  # as the compiled operation
    pooled.sum().backward()
    assert (maps.grad == 0).all()


def test_regions_taken_in_parts(ops, maps, monkeypatch):
    from tasks.core.openmmlab import sampling

    rotated = torch.tensor([[0.0, 6, 5, 8, 4, 0.5], [1, 6, 5, 8, 4, -0.5]], dtype=torch.float64)
    regions = torch.tensor(REGIONS, dtype=torch.float64)
    offset = torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    maps.requires_grad_()
    calls = [
        lambda: ops.roi_align(maps, regions, 3, 0.5, 0, "max"),
        lambda: ops.roi_pool(maps, regions, 3, 0.5),
        lambda: ops.roi_align_rotated(maps, rotated, 3, 1.0),
        lambda: ops.deform_roi_pool(maps, regions, offset, 3, 0.5, 0, 0.1),
    ]

    def results(call):
        output = call()
        return output, *torch.autograd.grad(output.square().sum(), (maps, offset), allow_unused=True)

    whole = [results(call) for call in calls]
    monkeypatch.setattr(sampling, "CHUNK", 1)
    for call, expected in zip(calls, whole, strict=True):
        for part, all_at_once in zip(results(call), expected, strict=True):
            torch.testing.assert_close(part, all_at_once)


def test_roi_pool(ops, maps):
    regions = torch.tensor([*REGIONS, [0, 9, 9, 2, 2]], dtype=torch.float64)  # the last one ends before it starts
    result = ops.roi_pool(maps, regions, (3, 2), 0.5)
    for region, pooled in zip(regions.tolist(), result, strict=True):
        image, x1, y1, x2, y2 = (int(region[0]), *(v * 0.5 for v in (*region[1:3], region[3] + 1, region[4] + 1)))
        for row in range(3):
            for column in range(2):
                ends = []
                for start, end, index, bins, length in ((y1, y2, row, 3, 11), (x1, x2, column, 2, 14)):
                    size = (end - start) / bins
                    first, behind = math.floor(start + index * size), math.ceil(start + (index + 1) * size)
                    ends.append(slice(min(max(first, 0), length), min(max(behind, 0), length)))
                pixels = maps[image, :, ends[0], ends[1]].flatten(1)
                valid = x2 > x1 and y2 > y1 and pixels.shape[1]
                expected = pixels.amax(1) if valid else torch.zeros(3, dtype=torch.float64)
                assert torch.equal(pooled[:, row, column], expected)
    assert gradcheck(lambda x: ops.roi_pool(x, regions, (3, 2), 0.5), maps.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_rotated(ops, maps, ratio, clockwise, aligned):
    regions = torch.tensor(REGIONS, dtype=torch.float64)
    corners = regions[:, 1:]
    boxes = torch.cat([regions[:, :1], (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    still = torch.cat([boxes, torch.zeros(len(boxes), 1)], 1)
    arguments = ((3, 2), 0.5, ratio, aligned, clockwise)
    # Without `aligned`, small regions grow from their corner in one and from their centre in the other.
    large = slice(None) if aligned else torch.tensor([0, 1, 3, 4])
    expected = torchvision.ops.roi_align(maps, regions[large], (3, 2), 0.5, ratio, aligned)
    torch.testing.assert_close(ops.roi_align_rotated(maps, still[large], *arguments), expected)

    turned = torch.cat([boxes, torch.full((len(boxes), 1), 0.4)], 1)
    reverse = torch.cat([boxes, torch.full((len(boxes), 1), -0.4)], 1)
    result = ops.roi_align_rotated(maps, turned, *arguments)
    torch.testing.assert_close(result, ops.roi_align_rotated(maps, reverse, *arguments[:-1], not clockwise))
    function = lambda x: ops.roi_align_rotated(x, turned, *arguments)  # noqa: E731
    assert gradcheck(function, maps.requires_grad_(), fast_mode=True)


def test_quarter_turn(ops):
    """Seen counter-clockwise by a quarter, columns of the map from right to left are rows of the region."""
    maps = torch.arange(36.0).view(1, 1, 6, 6)
    region = torch.tensor([[0, 3.0, 3, 6, 6, math.pi / 2]])
    result = ops.roi_align_rotated(maps, region, 6, 1.0, 1, True, False)
    torch.testing.assert_close(result, maps.rot90(-1, (2, 3)), atol=1e-4, rtol=0)


def test_bins_that_moved(ops, maps):
    regions = torch.tensor(REGIONS[:2] + REGIONS[3:], dtype=torch.float64)
    offset = 0.3 * torch.randn(4, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ratio in (0, 2):
        expected = torchvision.ops.roi_align(maps, regions, (3, 2), 0.5, ratio, aligned=True)
        for still in (offset.new_zeros(0), torch.zeros_like(offset)):
            result = ops.deform_roi_pool(maps, regions, still, (3, 2), 0.5, ratio, 0.1)
            torch.testing.assert_close(result, expected)
    # Moving every bin by a part of the region moves the region.
    moved = torch.stack([torch.full((4, 3, 2), 0.25), torch.full((4, 3, 2), -0.5)], 1).double()
    sides = regions[:, 3:] - regions[:, 1:3]
    shift = torch.cat([0.1 * sides * torch.tensor([0.25, -0.5])] * 2, 1)
    other = torch.cat([regions[:, :1], regions[:, 1:] + shift], 1)
    expected = torchvision.ops.roi_align(maps, other, (3, 2), 0.5, 2, aligned=True)
    torch.testing.assert_close(ops.deform_roi_pool(maps, regions, moved, (3, 2), 0.5, 2, 0.1), expected)
    inputs = (maps.requires_grad_(), regions, offset.requires_grad_())
    assert gradcheck(lambda *args: ops.deform_roi_pool(*args, (3, 2), 0.5, 2, 0.1), inputs, fast_mode=True)
    assert gradcheck(lambda x: ops.deform_roi_pool(x, regions, offset.new_zeros(0), (3, 2), 0.5, 2), maps)


def test_border_align(ops):
    maps = torch.randn(2, 8, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[1.2, 0.7, 6.1, 5.3], [0, 2, 3, 4]], [[2, 2, 2.5, 6], [-0.5, 1, 9, 6]]], dtype=torch.float64)
    result = ops.border_align(maps, boxes, 4)
    assert result.shape == (2, 2, 2, 4)
    for image in range(2):
        for number, (x1, y1, x2, y2) in enumerate(boxes[image].tolist()):
            steps = [i / 4 for i in range(5)]
            sides = [
                [(y1, x1 + (x2 - x1) * t) for t in steps], [(y1 + (y2 - y1) * t, x1) for t in steps],
                [(y2, x2 - (x2 - x1) * t) for t in steps], [(y2 - (y2 - y1) * t, x2) for t in steps],
            ]  # fmt: skip
            for side, points in enumerate(sides):
                for channel in range(2):
                    plane = maps[image, 2 * side + channel]
                    expected = max(bilinear(plane, y, x) for y, x in points)
                    assert result[image, channel, number, side].item() == pytest.approx(expected)
    assert gradcheck(lambda x: ops.border_align(x, boxes, 4), maps.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("points", [1, 5])
def test_rotated_feature_align(ops, maps, points):
    generator = torch.Generator().manual_seed(2)
    boxes = torch.rand(2, 11, 14, 5, dtype=torch.float64, generator=generator)
    boxes = boxes * torch.tensor([88.0, 112, 40, 40, 3])  # y, x, w, h, angle of the image, eight times the map
    result = ops.rotated_feature_align(maps, boxes, 1 / 8, points)
    for row, column in ((0, 0), (5, 9), (10, 13)):
        y, x, w, h, angle = (boxes[1, row, column] * torch.tensor([1 / 8] * 4 + [1])).tolist()
        places = [(0, 0), (1, 1), (-1, 1), (-1, -1), (1, -1)][:points]
        for channel in range(3):
            expected = maps[1, channel, row, column].item()
            for i, j in places:
                dx, dy = i * w / 2, j * h / 2
                at = (y + dx * math.sin(angle) + dy * math.cos(angle), x + dx * math.cos(angle) - dy * math.sin(angle))
                expected += bilinear(maps[1, channel], *at)
            assert result[1, channel, row, column].item() == pytest.approx(expected)
    function = lambda x: ops.rotated_feature_align(x, boxes, 1 / 8, points)  # noqa: E731
    assert gradcheck(function, maps.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_narrow_types_follow_float64(ops, maps, dtype):
    regions = torch.tensor(REGIONS, dtype=torch.float64)
    boxes = torch.tensor([[0.0, 6, 5, 8, 4, 0.5]], dtype=torch.float64)
    tolerance = 2e-2 if dtype == torch.float16 else 1e-5
    for function, rois, extra in (
        (ops.roi_align, regions, (0.5, 2, "avg")),
        (ops.roi_align, regions, (0.5, 2, "max")),
        (ops.roi_pool, regions, (0.5,)),
        (ops.roi_align_rotated, boxes, (1.0, 2)),
    ):
        truth, narrow = maps.detach().clone().requires_grad_(), maps.detach().to(dtype).requires_grad_()
        expected, result = function(truth, rois, 3, *extra), function(narrow, rois.to(dtype), 3, *extra)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
        expected.sum().backward(), result.sum().backward()
        assert narrow.grad.dtype == dtype
        close = torch.isclose(narrow.grad.double(), truth.grad, atol=tolerance * 2, rtol=tolerance * 2)
        assert close.double().mean() > 0.97  # rounding of coordinates moves a few maxima
