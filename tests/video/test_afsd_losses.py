"""AFSD's assignment and losses by hand; tests/goldens compares them with the official code."""

import pytest
import torch
import torch.nn.functional as F

from tasks.core.errors import UserError
from tasks.video.afsd.assignment import Targets, assign, overlaps, refined_labels
from tasks.video.afsd.head import AFSDOutput, BoundaryFeatures
from tasks.video.afsd.losses import (
    AFSDLossConfig,
    boundary_losses,
    detection_losses,
    focal_loss,
    giou_loss,
    refine,
    total_loss,
    triplet_loss,
)

POINTS = (torch.arange(4, dtype=torch.float64) + 0.5) / 4  # frames 2, 6, 10, 14 of 16
LEVELS = torch.tensor([0, 0, 0, 0])
NAMES = ["loc", "conf", "prop_loc", "prop_conf", "quality"]


def output_for(batch=2, classes=2, requires_grad=False):
    torch.manual_seed(0)
    shapes = ((2,), (classes + 1,), (2,), (classes + 1,), ())
    loc, *others = (torch.randn(batch, 4, *shape, dtype=torch.float64) for shape in shapes)
    leaves = [x.requires_grad_(requires_grad) for x in (loc.exp() * 4, *others)]
    return AFSDOutput(*leaves, points=POINTS, levels=LEVELS, boundaries=None, length=16)


def segments(*rows):
    return torch.tensor(rows, dtype=torch.float64).view(-1, 2)


# -- assignment -------------------------------------------------------------------------------------------------------


def test_the_shortest_instance_around_a_point_counts():
    targets = assign(POINTS, LEVELS, segments((0, 16), (6, 12), (4, 10)), torch.tensor([1, 2, 3]), 16)
    # the point at 6 lies on the boundary of the second, which is as short as the third
    assert targets.labels.tolist() == [1, 2, 2, 1]
    assert targets.distances.tolist() == [[2, 14], [0, 6], [4, 2], [14, 2]]


def test_no_instance_no_target():
    targets = assign(POINTS, LEVELS, segments(), torch.zeros(0, dtype=torch.long), 16)
    assert targets.labels.tolist() == [0, 0, 0, 0]
    between = assign(POINTS, LEVELS, segments((3, 5)), torch.tensor([2]), 16)
    assert between.labels.tolist() == [0, 0, 0, 0]


def test_ranges_of_the_levels():
    """Farther boundaries are 14, 10, 10, 14 frames away: more than the first and at most the second bound counts."""
    for bounds, expected in (((10, 14), [1, 0, 0, 1]), ((9, 10), [0, 1, 1, 0]), ((0, 16), [1, 1, 1, 1])):
        ranges = [(100, 200), bounds]
        targets = assign(POINTS, LEVELS + 1, segments((0, 16)), torch.tensor([1]), 16, ranges)
        assert targets.labels.tolist() == expected, bounds


def test_refined_labels():
    targets = Targets(segments((4, 4), (4, 4), (4, 4)), torch.tensor([1, 2, 0]))
    proposals = segments((4, 4), (1, 1), (4, 4))
    assert overlaps(proposals, targets.distances).tolist() == [1, 0.25, 1]
    assert refined_labels(proposals, targets, 0.5).tolist() == [1, 0, 0]
    poor = segments((1, 1), (0.5, 0.5), (4, 4))
    assert refined_labels(poor, targets, 0.5).tolist() == [0, 0, 0]
    assert refined_labels(poor, targets, 0.5, keep_best=True).tolist() == [1, 0, 0]
    background = Targets(targets.distances, torch.zeros(3, dtype=torch.long))
    assert refined_labels(poor, background, 0.5, keep_best=True).tolist() == [0, 0, 0]


# -- terms ------------------------------------------------------------------------------------------------------------


def test_overlap_of_segments():
    one, other = segments((4, 2)), segments((2, 4))  # -4..2 and -2..4: 4 of 8
    torch.testing.assert_close(overlaps(one, other), torch.tensor([0.5]).double())
    torch.testing.assert_close(giou_loss(one, other), torch.tensor([0.5]).double())
    apart = giou_loss(segments((4, -2)), segments((-2, 4)))  # -4..-2 and 2..4: the gap is half of the hull
    assert apart.item() > 1


def test_focal_loss_of_a_point():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    p = torch.tensor([0.5, 1 / (1 + torch.e**2)]) + 1e-6
    expected = -0.25 * (1 - p[0]) ** 2 * p[0].log() - 0.75 * (1 - p[1]) ** 2 * p[1].log()
    torch.testing.assert_close(focal_loss(logits, torch.tensor([0, 1])), expected)


def test_refinement_is_in_half_lengths():
    assert refine(segments((3, 1)), segments((0.5, -0.5))).tolist() == [[4, 0]]


def by_hand(output, i, targets, refined, smooth):
    """Unnormalised sums of clip `i`, point by point."""
    sums = dict.fromkeys(NAMES, 0.0)
    sums["conf"] = focal_loss(output.conf[i], targets.labels)
    sums["prop_conf"] = focal_loss(output.prop_conf[i], refined)
    for point in targets.labels.nonzero().flatten().tolist():
        loc, truth = output.loc[i, point], targets.distances[point]
        sums["loc"] = sums["loc"] + giou_loss(loc[None], truth[None])[0]
        final = loc + 0.5 * loc.sum() * output.prop_loc[i, point]
        iou = overlaps(final, truth).clamp(min=0)
        sums["quality"] = sums["quality"] + F.binary_cross_entropy_with_logits(output.quality[i, point], iou)
        if refined[point]:
            wanted = (truth - loc) / (0.5 * loc.sum())
            distance = F.smooth_l1_loss if smooth else F.l1_loss
            sums["prop_loc"] = sums["prop_loc"] + distance(output.prop_loc[i, point], wanted, reduction="sum")
    return sums


@pytest.mark.parametrize("per_clip", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_losses_of_a_batch(smooth, per_clip):
    output = output_for()
    config = AFSDLossConfig(refine_iou=0.3, smooth_l1=smooth, per_clip=per_clip)
    truth, labels = [segments((1, 9), (8, 16)), segments((5, 7))], [torch.tensor([0, 1]), torch.tensor([1])]
    losses = detection_losses(output, truth, labels, config)
    sums, counts = [], []
    for i in range(2):
        targets = assign(POINTS, LEVELS, truth[i], labels[i] + 1, 16)
        refined = refined_labels(output.loc[i], targets, 0.3)
        sums.append(by_hand(output, i, targets, refined, smooth))
        counts.append((int((targets.labels > 0).sum()), int((refined > 0).sum())))
    assert [count[0] for count in counts] == [4, 1]
    for name in NAMES:
        which = int(name.startswith("prop"))
        if per_clip:
            expected = sum(s[name] / max(c[which], 1) for s, c in zip(sums, counts, strict=True)) / 2
        else:
            expected = sum(s[name] for s in sums) / max(sum(c[which] for c in counts), 1)
        torch.testing.assert_close(losses[name], torch.as_tensor(expected).double(), rtol=1e-9, atol=1e-12)


def test_every_prediction_receives_a_gradient_from_clips_without_instances():
    output = output_for(requires_grad=True)
    losses = detection_losses(output, [segments()] * 2, [torch.zeros(0, dtype=torch.long)] * 2, AFSDLossConfig())
    assert [losses[name].item() for name in ("loc", "prop_loc", "quality")] == [0, 0, 0]
    total_loss(losses, AFSDLossConfig()).backward()
    gradients = [x.grad for x in (output.conf, output.prop_conf)]
    assert all(gradient.any() and gradient.isfinite().all() for gradient in gradients)
    assert all(x.grad is not None for x in (output.prop_loc, output.quality))


def test_gradient_of_the_quality_reaches_the_distances():
    output = output_for(requires_grad=True)
    losses = detection_losses(output, [segments((0, 16))] * 2, [torch.tensor([0])] * 2, AFSDLossConfig())
    assert torch.autograd.grad(losses["quality"], output.prop_loc)[0].any()


# -- boundaries -------------------------------------------------------------------------------------------------------


def boundaries(batch=2):
    torch.manual_seed(0)
    shapes = ((batch, 4, 16), (batch, 8, 4), (batch, 8, 4))
    return BoundaryFeatures(*(torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes))


def test_boundary_losses():
    features, masks = boundaries(), torch.rand(2, 2, 16).round()
    losses = boundary_losses(features, masks)
    for edge, name in enumerate(("start", "end")):
        expected = 0
        for feature, weight, step in zip(features, (1, 0.1, 0.1), (1, 4, 4), strict=True):
            half = feature[:, : feature.shape[1] // 2] if edge == 0 else feature[:, feature.shape[1] // 2 :]
            target = masks[:, edge, ::step].double()
            expected = expected + weight * F.binary_cross_entropy(half.tanh().mean(dim=1), target)
        torch.testing.assert_close(losses[name], expected)
    sum(losses.values()).backward()
    assert all(x.grad.any() for x in features)


def test_triplets_compare_the_cut_with_the_background():
    """The end of the first part is pulled to the start of the second and pushed from the start of the background."""
    features, parts = boundaries(batch=1), torch.tensor([[[0.0, 4], [8, 12], [5, 7]]])
    loss = triplet_loss(features, parts)
    loss.backward()
    assert all(x.grad.any() for x in features)
    with torch.no_grad():
        features.frame.zero_()
        features.frame[0, 2:, 3:6] = 5.0  # the end of the first part
        features.frame[0, :2, 7:10] = 5.0  # the start of the second
        near = triplet_loss(features, parts)
        features.frame[0, :2, 7:10] = 0.0
        features.frame[0, :2, 4:7] = 5.0
        far = triplet_loss(features, parts)
    assert near < far
    strides = {triplet_loss(features, parts, stride).item() for stride in (None, 4.0)}
    assert len(strides) == 1  # 16 frames, 4 steps
    assert triplet_loss(features, parts, 2.0).item() not in strides


def test_weights_of_the_terms():
    losses = {name: torch.tensor(float(10**i)) for i, name in enumerate((*NAMES, "start", "end", "triplet"))}
    config = AFSDLossConfig(loc_weight=2, cls_weight=3, triplet_weight=4)
    expected = 2 * 1 + 3 * 10 + 2 * 100 + 3 * 1000 + 3 * 10_000 + 100_000 + 1_000_000 + 4 * 10_000_000
    assert total_loss(losses, config).item() == expected


@pytest.mark.parametrize("options", [{"loc_weight": -1}, {"refine_iou": 1.5}])
def test_wrong_weights(options):
    with pytest.raises(UserError, match=f"loss.{next(iter(options))}"):
        AFSDLossConfig(**options)
