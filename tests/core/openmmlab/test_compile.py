"""Operations of mmcv under torch.compile: they run and equal what they are without."""

import pytest
import torch

pytest.importorskip("mmcv", reason="the extra openmmlab is not installed")


@pytest.fixture(scope="module", autouse=True)
def ops():
    from tasks.core.openmmlab import install

    install()
    import mmcv.ops

    return mmcv.ops


def compare(function, *inputs):
    """Call `function` plainly and compiled; compare results and gradients of what requires one."""
    results = []
    for call in (function, torch.compile(function, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        trained = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(sum(o.square().sum() for o in outputs), trained) if trained else ()
        results.append((*outputs, *grads))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def rand(*shape, grad=False, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def test_suppression(ops):
    boxes = rand(30, 4) * 20
    boxes[:, 2:] += boxes[:, :2]
    compare(lambda b, s: ops.nms(b, s, 0.5), boxes, rand(30))
    compare(
        lambda b, s: ops.batched_nms(b, s, torch.arange(30) % 3, {"type": "nms", "iou_threshold": 0.5}), boxes, rand(30)
    )


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_pooling(ops, mode):
    regions = torch.tensor([[0.0, 1, 1, 6, 7], [1, 0, 2, 5, 5]])
    compare(lambda x: ops.roi_align(x, regions, 3, 1.0, 2, mode), rand(2, 3, 8, 8, grad=True))


def test_focal_loss(ops):
    target = torch.tensor([0, 2, 3, 1])
    compare(lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "mean"), rand(4, 3, grad=True))


def test_deformable_convolution(ops):
    layer = ops.ModulatedDeformConv2dPack(3, 4, 3, padding=1)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    compare(layer, rand(1, 3, 7, 7, grad=True))


def test_deformable_attention(ops):
    module = ops.MultiScaleDeformableAttention(16, 2, 2, 2, dropout=0.0, batch_first=True)
    shapes, starts = torch.tensor([[4, 4], [2, 2]]), torch.tensor([0, 16])

    def attend(query, value):
        return module(
            query,
            value=value,
            reference_points=torch.full((1, 5, 2, 2), 0.4),
            spatial_shapes=shapes,
            level_start_index=starts,
        )

    compare(attend, rand(1, 5, 16, grad=True), rand(1, 20, 16, grad=True, seed=1))
