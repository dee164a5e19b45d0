"""Non-maximum suppression and overlaps beside plain loops and known areas."""

import math

import pytest
import torch

pytest.importorskip("mmcv", reason="the extra openmmlab is not installed")


@pytest.fixture(scope="module", autouse=True)
def ops():
    from tasks.core.openmmlab import install

    install()
    import mmcv.ops

    return mmcv.ops


def random_boxes(count, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40 + 2
    scores = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.cat([corner, corner + size], 1).to(dtype), scores.to(dtype)


def random_rotated(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 5, generator=generator) * torch.tensor([40, 40, 30, 30, 6.0])
    return values + torch.tensor([0, 0, 3, 3, -3.0]), torch.rand(count, generator=generator)


def iou(a, b, offset=0):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    areas = [(v[2] - v[0] + offset) * (v[3] - v[1] + offset) for v in (a, b)]
    return width * height / (sum(areas) - width * height)


def loop_nms(boxes, scores, threshold, offset=0, overlap=iou):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    for i in order:
        if all(overlap(boxes[j], boxes[i], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def loop_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    scores, rest, taken = list(scores), set(range(len(boxes))), []
    while rest:
        best = max(rest, key=lambda i: scores[i])
        rest.remove(best)
        taken.append((best, scores[best]))
        for i in list(rest):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == "gaussian":
                scores[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[i] *= 1 - overlap if method == "linear" else 0
            if scores[i] < min_score:
                rest.remove(i)
    return taken


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_nms(ops, offset, dtype):
    boxes, scores = random_boxes(60)
    scores = (torch.randperm(60) / 64).to(dtype)  # different numbers in every type
    boxes = boxes.round().to(dtype)
    dets, keep = ops.nms(boxes, scores, 0.4, offset=offset)
    assert keep.tolist() == loop_nms(boxes.tolist(), scores.tolist(), 0.4, offset)
    assert torch.equal(dets, torch.cat([boxes[keep], scores[keep, None]], 1))
    assert dets.dtype == dtype


def test_nms_with_limits(ops):
    boxes, scores = random_boxes(60)
    kept = [i for i in loop_nms(boxes.tolist(), scores.tolist(), 0.4) if scores[i] > 0.3]
    assert ops.nms(boxes, scores, 0.4, score_threshold=0.3, max_num=5)[1].tolist() == kept[:5]


def test_threshold_itself_is_kept_by_nms_and_not_by_nms_match(ops):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    assert ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5)[1].tolist() == [0, 1]
    matched = ops.nms_match(torch.cat([boxes, torch.tensor([[0.9], [0.8]])], 1), 0.5)
    assert [group.tolist() for group in matched] == [[0, 1]]


@pytest.mark.parametrize("function", ["nms", "soft_nms"])
def test_no_boxes(ops, function):
    dets, keep = getattr(ops, function)(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert keep.dtype == torch.long
    assert keep.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms(ops, method, offset, dtype):
    boxes, scores = random_boxes(50, seed=1, dtype=dtype)
    arguments = {"sigma": 0.4, "min_score": 0.02, "method": method, "offset": offset}
    dets, keep = ops.soft_nms(boxes, scores, 0.3, **arguments)
    expected = loop_soft_nms(boxes.tolist(), scores.tolist(), 0.3, **arguments)
    assert keep.tolist() == [i for i, _ in expected]
    assert torch.equal(dets[:, :4], boxes[keep])
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected], dtype=dtype))


def test_batched_soft_nms_takes_classes_by_themselves(ops):
    boxes, scores = random_boxes(60, seed=2)
    classes = torch.arange(60) % 3
    dets, keep = ops.batched_nms(boxes, scores, classes, {"type": "soft_nms", "iou_threshold": 0.3, "min_score": 0.01})
    for label in range(3):
        rows = (classes == label).nonzero().flatten()
        alone, kept = ops.soft_nms(boxes[rows], scores[rows], 0.3, min_score=0.01)
        mine = classes[keep] == label
        assert keep[mine].tolist() == rows[kept].tolist()
        torch.testing.assert_close(dets[mine], alone)


def test_axis_aligned_overlaps(ops):
    boxes, others = random_boxes(7)[0], random_boxes(5, seed=1)[0]
    for mode, area in (("iou", None), ("iof", 1)):
        for offset in (0, 1):
            result = ops.bbox_overlaps(boxes, others, mode, offset=offset)
            for i, a in enumerate(boxes.tolist()):
                for j, b in enumerate(others.tolist()):
                    expected = iou(a, b, offset)
                    if area:
                        areas = [(v[2] - v[0] + offset) * (v[3] - v[1] + offset) for v in (a, b)]
                        expected = expected * sum(areas) / (1 + expected) / areas[0]
                    assert result[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
            pairs = ops.bbox_overlaps(boxes[:5], others, mode, aligned=True, offset=offset)
            torch.testing.assert_close(pairs, result[:5].diagonal())


OCTAGON = 2 * (math.sqrt(2) - 1)  # area common to a unit square and itself turned by 45 degrees


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 1, 1, 0], [0, 0, 1, 1, math.pi / 4], OCTAGON / (2 - OCTAGON)),
        ([5, 5, 4, 2, 0.7], [5, 5, 4, 2, 0.7], 1),
        ([5, 5, 4, 2, 0.7], [5, 5, 4, 2, 0.7 + math.pi], 1),
        ([5, 5, 4, 2, 0.7], [5, 5, 2, 4, 0.7 + math.pi / 2], 1),
        ([0, 0, 4, 4, 0.3], [0, 0, 2, 2, 0.3], 0.25),
        ([0, 0, 4, 4, 0], [0, 0, 1, 1, 1], 1 / 16),
        ([0, 0, 2, 2, 0], [1, 0, 2, 2, 0], 1 / 3),
        ([0, 0, 2, 2, 0], [2, 0, 2, 2, 0], 0),
        ([0, 0, 2, 2, 0.1], [50, 9, 2, 2, 1], 0),
        ([0, 0, 0, 2, 0], [0, 0, 2, 2, 0], 0),
        ([1000, 1000, 4, 2, 0.2], [1000.001, 1000, 4, 2, 0.2000001], 0.9993),
    ],
)
def test_areas_of_rotated_boxes(ops, a, b, expected):
    a, b = (torch.tensor([box], dtype=torch.float64) for box in (a, b))
    for first, second in ((a, b), (b, a)):
        assert ops.box_iou_rotated(first, second).item() == pytest.approx(
            expected, abs=1e-4 if expected > 0.99 else 1e-7
        )
        assert ops.box_iou_rotated(first, second, clockwise=False).item() == pytest.approx(
            ops.box_iou_rotated(first * torch.tensor([1, 1, 1, 1, -1]), second * torch.tensor([1, 1, 1, 1, -1])).item()
        )


def test_rotated_boxes_without_angle_are_boxes(ops):
    boxes, others = random_boxes(9)[0], random_boxes(6, seed=3)[0]
    as_rotated = lambda v: torch.cat([(v[:, :2] + v[:, 2:]) / 2, v[:, 2:] - v[:, :2], torch.zeros(len(v), 1)], 1)  # noqa: E731
    as_quadri = lambda v: v[:, [0, 1, 2, 1, 2, 3, 0, 3]]  # noqa: E731
    for mode in ("iou", "iof"):
        expected = ops.bbox_overlaps(boxes, others, mode)
        torch.testing.assert_close(ops.box_iou_rotated(as_rotated(boxes), as_rotated(others), mode), expected)
        torch.testing.assert_close(ops.box_iou_quadri(as_quadri(boxes), as_quadri(others), mode), expected)
        turned = as_quadri(others)[:, [6, 7, 4, 5, 2, 3, 0, 1]]  # the other way round
        torch.testing.assert_close(ops.box_iou_quadri(as_quadri(boxes), turned, mode), expected)
    pairs = ops.box_iou_rotated(as_rotated(boxes)[:6], as_rotated(others), aligned=True)
    torch.testing.assert_close(pairs, ops.bbox_overlaps(boxes[:6], others, aligned=True))


def test_area_by_counting(ops):
    """Overlaps of random rotated boxes beside the share of a fine grid that is inside both."""
    boxes, others = random_rotated(6)[0], random_rotated(6, seed=1)[0]
    axis = torch.arange(-30, 80, 0.1)
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def inside(box):
        dx, dy = x - box[0], y - box[1]
        along = dx * box[4].cos() + dy * box[4].sin()
        across = dy * box[4].cos() - dx * box[4].sin()
        return (along.abs() <= box[2] / 2) & (across.abs() <= box[3] / 2)

    result = ops.box_iou_rotated(boxes, others, aligned=True)
    for value, a, b in zip(result, map(inside, boxes), map(inside, others), strict=True):
        assert value.item() == pytest.approx((a & b).sum().item() / (a | b).sum().item(), abs=5e-3)


def test_nms_rotated(ops):
    boxes, scores = random_rotated(40)
    overlap = lambda a, b, _: ops.box_iou_rotated(torch.tensor([a]), torch.tensor([b])).item()  # noqa: E731
    dets, keep = ops.nms_rotated(boxes, scores, 0.2)
    assert keep.tolist() == loop_nms(boxes.tolist(), scores.tolist(), 0.2, overlap=overlap)
    assert torch.equal(dets, torch.cat([boxes[keep], scores[keep, None]], 1))


def test_labels_keep_rotated_and_quadrilateral_boxes_apart(ops):
    rotated, scores = torch.tensor([[5.0, 5, 4, 2, 0.3]] * 3), torch.tensor([0.7, 0.9, 0.8])
    quadri = torch.tensor([[0.0, 0, 4, 0, 4, 4, 0, 4]] * 3)
    labels = torch.tensor([0.0, 1, 0])
    for function, boxes in ((ops.nms_rotated, rotated), (ops.nms_quadri, quadri)):
        assert function(boxes, scores, 0.5)[1].tolist() == [1]
        assert function(boxes, scores, 0.5, labels)[1].tolist() == [1, 2]


def test_points_in_polygons(ops):
    points = torch.tensor([[0.5, 0.5], [2, 1], [2.5, 2.5], [-1, 1], [0.5, 3.5]])
    polygons = torch.tensor([[0.0, 0, 4, 0, 4, 2, 0, 2], [2, 0, 4, 2, 2, 4, 0, 2]])
    inside = ops.points_in_polygons(points, polygons)
    assert inside.tolist() == [[1, 0], [1, 1], [0, 1], [0, 0], [0, 0]]
