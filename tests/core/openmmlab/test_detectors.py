"""mmdet's own configurations, without compiled operations: losses, gradients and predictions on the CPU.

Networks are as in the configuration but for depth, width and the numbers of layers, samples and queries.
"""

import pytest
import torch
from small_models import CHANNELS, check_training, lower, read_model, register

mmdet = pytest.importorskip("mmdet", reason="the extra openmmlab is not installed")

SHAPES = [[3, 128, 128], [3, 120, 128]]
SMALL = {
    "feedforward_channels": 32, "fc_out_channels": 32, "conv_out_channels": 32, "num_layers": 2, "num_queries": 20,
    "max_per_img": 20, "num": 32, "nms_pre": 200, "num_blocks": 2,
}  # fmt: skip
DETECTORS = [
    "retinanet/retinanet_r50_fpn_1x_coco",
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
    "faster_rcnn/faster-rcnn_r50_fpn_soft-nms_1x_coco",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco",
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco",
    "carafe/mask-rcnn_r50_fpn-carafe_1x_coco",
    "dcn/faster-rcnn_r50_fpn_dpool_1x_coco",
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco",
    "fcos/fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco",
    "atss/atss_r50_fpn_1x_coco",
    "dyhead/atss_r50_fpn_dyhead_1x_coco",
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco",
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic",
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco",
    "deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco",
    "dino/dino-4scale_r50_8xb2-12e_coco",
]


@pytest.fixture(scope="module", autouse=True)
def mmdet_without_compiler():
    register("mmdet")


def shrink(model):
    """Make smaller in a configuration what decides only how much is computed."""
    model.backbone.update(base_channels=CHANNELS[0] // 4, init_cfg=None)
    feed(model, [CHANNELS[index] for index in model.backbone.out_indices])
    if "num_points" in (model.get("train_cfg") or {}):
        model.train_cfg.num_points = 64
    model.data_preprocessor.pop("batch_augments", None)  # pads to 1024 pixels
    lower(model, SMALL)
    return model


def feed(model, channels):
    for name in ("neck", "panoptic_head"):
        if name in model:
            part = model[name][0] if isinstance(model[name], list) else model[name]
            part.in_channels = channels


def run(config, panoptic=False):
    """Build a detector; return it after a backward pass, its losses and its predictions."""
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs

    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()  # networks whose batch normalisation is frozen overflow without
    batch = demo_mm_inputs(2, SHAPES, num_classes=80, with_mask=True, with_semantic=panoptic)
    batch = model.data_preprocessor(batch, training=True)
    losses = model(**batch, mode="loss")
    model.parse_losses(losses)[0].backward()
    with torch.no_grad():
        predictions = model.eval()(**batch, mode="predict")
    return model, losses, predictions


def check(model, losses, predictions):
    check_training(model, losses)
    for sample, shape in zip(predictions, SHAPES, strict=True):
        instances = sample.pred_instances
        assert instances.bboxes.shape == (len(instances), 4)
        assert instances.bboxes.isfinite().all()
        assert ((instances.scores >= 0) & (instances.scores <= 1)).all()
        if "masks" in instances:
            assert instances.masks.shape == (len(instances), *shape[1:])
            assert instances.masks.dtype == torch.bool


@pytest.mark.parametrize("name", DETECTORS)
def test_configuration_of_mmdet(name):
    panoptic = name.endswith("panoptic")
    model, losses, predictions = run(shrink(read_model(mmdet, name)), panoptic)
    check(model, losses, predictions)
    assert ("masks" in predictions[0].pred_instances) == ("mask" in name)
    assert ("pred_panoptic_seg" in predictions[0]) == panoptic


@pytest.mark.parametrize("backbone", ["lit_ti", "test_resnet"])
def test_backbone_of_frugal(backbone):
    from backbones import create_features

    config = shrink(read_model(mmdet, "retinanet/retinanet_r50_fpn_1x_coco"))
    config.backbone = {"type": "FrugalBackbone", "name": backbone}
    feed(config, create_features(backbone).channels)
    check(*run(config))
