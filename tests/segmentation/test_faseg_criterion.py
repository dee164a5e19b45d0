import pytest
import torch
import torch.distributed as dist

from tasks.core.errors import UserError
from tasks.segmentation.faseg import criterion as criterion_module
from tasks.segmentation.faseg.criterion import Segments, SetCriterion, semantic_segments
from tasks.segmentation.faseg.matcher import HungarianMatcher
from tasks.segmentation.faseg.points import point_sample, uncertain_points, uniform_points


def halves(height=64, width=64):
    """Label map with class 1 left and class 3 right, and its perfect prediction by queries 0 and 2."""
    label = torch.ones(1, height, width, dtype=torch.uint8)
    label[..., width // 2 :] = 3
    masks = torch.full((1, 4, height // 4, width // 4), -20.0)
    masks[:, 0, :, : width // 8] = 20
    masks[:, 2, :, width // 8 :] = 20
    logits = torch.zeros(1, 4, 6)
    for query, category in enumerate((1, 5, 3, 5)):
        logits[0, query, category] = 20
    return label, {"pred_logits": logits, "pred_masks": masks, "aux_outputs": []}


def test_semantic_segments_split_classes_and_leave_ignored_pixels_out():
    label = torch.full((2, 33, 40), 255, dtype=torch.uint8)
    label[0, :10] = 4
    label[0, 10:20] = 0
    first, second = semantic_segments(label)
    assert first.labels.tolist() == [0, 4]
    assert first.masks.shape == (2, 64, 64)
    assert first.masks.sum(dim=(1, 2)).tolist() == [400, 400]
    assert first.masks[1, :10, :40].all()
    assert second.labels.shape == (0,)
    assert second.masks.shape == (0, 64, 64)


def test_perfect_prediction_costs_almost_nothing():
    label, outputs = halves()
    criterion = SetCriterion(5, num_points=256)
    losses = criterion(outputs, semantic_segments(label))
    assert losses["loss_ce"] < 1e-6
    assert losses["loss_mask"] < 0.7  # points on the boundary between the halves
    assert losses["loss_dice"] < 0.3
    swapped = {**outputs, "pred_logits": outputs["pred_logits"].flip(1)}
    assert criterion.total(criterion(swapped, semantic_segments(label))) > criterion.total(losses) + 1


def test_auxiliary_losses_are_named_and_weighted():
    label, outputs = halves()
    criterion = SetCriterion(5, num_points=32, class_weight=2.0, mask_weight=3.0, dice_weight=7.0)
    losses = criterion({**outputs, "aux_outputs": [outputs, outputs]}, semantic_segments(label))
    kinds = ("loss_ce", "loss_mask", "loss_dice")
    assert list(losses) == [kind + suffix for suffix in ("", "_0", "_1") for kind in kinds]
    weights = {"loss_ce": 2.0, "loss_mask": 3.0, "loss_dice": 7.0}
    by_hand = sum(weights[kind] * losses[kind + suffix] for kind in kinds for suffix in ("", "_0", "_1"))
    torch.testing.assert_close(criterion.total(losses), by_hand)


def test_ignored_image_teaches_only_no_object():
    _, outputs = halves()
    outputs["pred_masks"].requires_grad_()
    outputs["pred_logits"].requires_grad_()
    criterion = SetCriterion(5, num_points=32)
    losses = criterion(outputs, semantic_segments(torch.full((1, 64, 64), 255)))
    assert losses["loss_mask"] == 0
    assert losses["loss_dice"] == 0
    criterion.total(losses).backward()
    assert not outputs["pred_masks"].grad.any()
    assert outputs["pred_logits"].grad.any()


def test_state_dict_is_empty():
    assert SetCriterion(5).state_dict() == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_costs_that_are_not_finite_raise_one_clear_error(bad):
    label, outputs = halves()
    outputs["pred_logits"][0, 1, 2] = bad
    with pytest.raises(UserError, match="matching costs contain NaN or infinity"):
        SetCriterion(5, num_points=32)(outputs, semantic_segments(label))


def test_num_masks_is_averaged_over_ranks(monkeypatch):
    """The other of two ranks has six segments, this one two: both divide by four."""
    label, outputs = halves()
    outputs["pred_masks"] = outputs["pred_masks"] * 0.05
    source = torch.rand(2, 96, 2, generator=torch.manual_seed(0))

    def fixed_points(num_rows, num_points, like):
        return source[:num_rows, :num_points]

    criterion = SetCriterion(5, num_points=32, draw_points=fixed_points)
    alone = criterion(outputs, semantic_segments(label))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(6))
    assert criterion_module.dist is dist
    shared = criterion(outputs, semantic_segments(label))
    torch.testing.assert_close(shared["loss_mask"], alone["loss_mask"] / 2)
    torch.testing.assert_close(shared["loss_dice"], alone["loss_dice"] / 2)
    torch.testing.assert_close(shared["loss_ce"], alone["loss_ce"])


def test_matcher_takes_more_targets_than_queries():
    logits, masks = torch.randn(1, 2, 6), torch.randn(1, 2, 8, 8)
    targets = torch.rand(1, 5, 32, 32).round()[0]
    [(queries, matched)] = HungarianMatcher(num_points=64)(logits, masks, [torch.arange(5)], [targets])
    assert queries.tolist() == [0, 1]
    assert len(set(matched.tolist())) == 2


def test_point_sample_reads_pixel_centres_and_zero_outside():
    maps = torch.arange(6.0).reshape(1, 1, 2, 3)
    points = torch.tensor([[[0.5, 0.25], [5 / 6, 0.75], [1 / 3, 0.25], [-2.0, 0.5]]])
    torch.testing.assert_close(point_sample(maps, points), torch.tensor([[[1.0, 5.0, 0.5, 0.0]]]))


def test_uncertain_points_lie_where_the_mask_is_undecided():
    ramp = torch.linspace(-10, 10, 64).expand(1, 64, 64)
    torch.manual_seed(0)
    points = uncertain_points(ramp, num_points=400)
    assert points.shape == (1, 400, 2)
    uncertainty = point_sample(ramp[:, None], points)[0, 0].abs()
    assert uncertainty[:300].max() < 3  # the least decided 300 of 1200
    assert (uncertainty[:300].diff() >= 0).all()
    assert uncertainty[300:].max() > 9  # the rest is drawn anywhere


def test_all_points_may_be_uncertain_ones():
    draws = []

    def counting(num_rows, num_points, like):
        draws.append(num_points)
        return uniform_points(num_rows, num_points, like)

    points = uncertain_points(torch.randn(2, 8, 8), 16, importance_sample_ratio=1.0, draw_points=counting)
    assert points.shape == (2, 16, 2)
    assert draws == [48]


def test_segments_may_be_instances_of_one_class():
    _, outputs = halves()
    masks = torch.zeros(2, 64, 64)
    masks[0, :, :32] = 1
    masks[1, :, 32:] = 1
    losses = SetCriterion(5, num_points=64)(outputs, [Segments(torch.tensor([1, 1]), masks)])
    assert losses["loss_ce"] > 1  # query 2 says class 3
