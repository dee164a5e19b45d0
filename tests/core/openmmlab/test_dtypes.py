"""Every operation of floating point numbers in float16 and float32 beside itself in float64, gradients included."""

import pytest
import torch

pytest.importorskip("mmcv", reason="the extra openmmlab is not installed")


@pytest.fixture(scope="module", autouse=True)
def ops():
    from tasks.core.openmmlab import install

    install()
    import mmcv.ops

    return mmcv.ops


def rand(*shape, seed=0):
    """Return numbers in 0..1 that float16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 257, shape, generator=generator, dtype=torch.float64) / 256


BOXES = torch.tensor([[1.0, 1, 6, 5], [2, 0, 4, 6], [0, 3, 5, 7]], dtype=torch.float64)
ROTATED = torch.tensor([[3.0, 3, 5, 4, 0.5], [2, 3, 2, 6, 0.25], [3, 5, 4, 4, -0.5]], dtype=torch.float64)
INDEX = torch.tensor([[[0, 2, 1], [3, 3, 0]]], dtype=torch.int32)
CALLS = {  # of operations and inputs of one dtype; the first input has a gradient where a gradient is defined
    "bbox_overlaps": (lambda ops, a, b: ops.bbox_overlaps(a, b), BOXES, BOXES + 1),
    "box_iou_rotated": (lambda ops, a, b: ops.box_iou_rotated(a, b), ROTATED, ROTATED + 1),
    "sigmoid_focal_loss": (
        lambda ops, x, w: ops.sigmoid_focal_loss(x, torch.tensor([0, 3, 2]), 2.0, 0.25, w, "none"),
        4 * rand(3, 3) - 2,
        rand(3, seed=1),
    ),
    "softmax_focal_loss": (
        lambda ops, x, w: ops.softmax_focal_loss(x, torch.tensor([0, 1, 2]), 2.0, 0.25, w, "none"),
        4 * rand(3, 3) - 2,
        rand(3, seed=1),
    ),
    "deform_conv2d": (
        lambda ops, x, offset, w: ops.deform_conv2d(x, offset, w, 1, 1),
        rand(1, 2, 4, 4),
        rand(1, 18, 4, 4, seed=1),
        rand(3, 2, 3, 3, seed=2),
    ),
    "carafe": (lambda ops, x, m: ops.carafe(x, m, 3, 1, 2), rand(1, 2, 3, 3), rand(1, 9, 6, 6, seed=1)),
    "psa_mask": (lambda ops, x: ops.PSAMask("collect", (3, 3))(x), rand(1, 9, 3, 3)),
    "masked_conv2d": (
        lambda ops, x, w, b: ops.masked_conv2d(x, torch.ones(1, 4, 4), w, b, 1),
        rand(1, 2, 4, 4),
        rand(3, 2, 3, 3, seed=1),
        rand(3, seed=2),
    ),
    "deform_roi_pool": (
        lambda ops, x, rois, offset: ops.deform_roi_pool(x, rois, offset, 2, 1.0, 2),
        rand(1, 2, 8, 8),
        torch.cat([torch.zeros(3, 1), BOXES], 1),
        rand(3, 2, 2, 2, seed=1),
    ),
    "border_align": (lambda ops, x, b: ops.border_align(x, b, 4), rand(1, 8, 8, 8), BOXES[None]),
    "rotated_feature_align": (
        lambda ops, x, b: ops.rotated_feature_align(x, b, 1.0, 5),
        rand(1, 2, 8, 8),
        ROTATED[0].expand(1, 8, 8, 5),
    ),
    "gather_points": (lambda ops, x: ops.gather_points(x, INDEX[0, :1]), rand(1, 2, 4)),
    "grouping_operation": (lambda ops, x: ops.grouping_operation(x, INDEX), rand(1, 2, 4)),
    "three_interpolate": (lambda ops, x, w: ops.three_interpolate(x, INDEX, w), rand(1, 2, 4), rand(1, 2, 3, seed=1)),
    "multi_scale_deformable_attention": (
        lambda ops, value, locations, weights: ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply(
            value, torch.tensor([[3, 4]]), torch.tensor([0]), locations, weights, 64
        ),
        rand(1, 12, 2, 3),
        rand(1, 5, 2, 1, 2, 2, seed=1),
        rand(1, 5, 2, 1, 2, seed=2),
    ),
}
WITHOUT_GRADIENT = {"bbox_overlaps", "box_iou_rotated", "masked_conv2d"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_narrow_types_follow_float64(ops, name, dtype):
    function, *inputs = CALLS[name]
    tolerance = 5e-3 if dtype == torch.float16 else 1e-5
    results = []
    for kind in (torch.float64, dtype):
        tensors = [t.to(kind) for t in inputs]
        leaf = tensors[0].requires_grad_(name not in WITHOUT_GRADIENT)
        output = function(ops, *tensors)
        assert output.dtype == kind
        grad = torch.autograd.grad(output.sum(), leaf)[0] if leaf.requires_grad else torch.zeros(1, dtype=kind)
        assert grad.dtype == kind
        results.append((output.detach().double(), grad.double()))
    for narrow, wide in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(narrow, wide, atol=tolerance * float(wide.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_soft_nms_keeps_its_type(ops, dtype):
    boxes = torch.cat([BOXES, BOXES + 0.5]).to(dtype)
    dets, keep = ops.soft_nms(boxes, rand(6).to(dtype), 0.3)
    assert dets.dtype == dtype
    assert keep.dtype == torch.long
