"""The detectors behind one interface: gradients, records, and equality with mmdetection's own configurations."""

import importlib.util

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch import nn

from tasks.core.preprocess import NormalizeAndPad
from tasks.detection import mmdet_models, mmdet_queries
from tasks.detection.mmdet_models import MODELS, model_dict
from tasks.detection.mmdet_network import MMDetNetwork, build_detector
from tasks.detection.network import record
from tasks.detection.torchvision_detectors import DETECTORS, TorchvisionNetwork, freeze_unused_norms

needs_mmdet = pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="without the extra openmmlab")
CHANNELS = [8, 8, 16, 16]
SIZES = [(48, 64), (90, 70)]
SMALL_TWO_STAGE = {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0}
DENSE = {"bbox_head": {"feat_channels": 32}, "test_cfg": {"score_thr": 0.0, "max_per_img": 10}}
TWO_STAGE = {
    "train_cfg": {"rpn_proposal": {"max_per_img": 20}},
    "test_cfg": {"rpn": {"max_per_img": 20}, "rcnn": {"score_thr": 0.0, "max_per_img": 10}},
}
QUERIES = {"num_queries": 10, "test_cfg": {"max_per_img": 10}}
# For images with fewer positions than the published number of queries, and fewer samples.
SMALL = {
    "retinanet": DENSE,
    "fcos": DENSE,
    "atss": DENSE,
    "faster_rcnn": TWO_STAGE,
    "mask_rcnn": TWO_STAGE,
    "cascade_mask_rcnn": TWO_STAGE,
    "deformable_detr": QUERIES,
    "dino": QUERIES,
    "mask2former": {
        "panoptic_head": {"num_queries": 10},
        "train_cfg": {"num_points": 64},
        "test_cfg": {"max_per_image": 10},
    },
}


class Maps(nn.Module):
    """A backbone of four small convolutions."""

    def __init__(self):
        super().__init__()
        self.channels = CHANNELS
        self.convs = nn.ModuleList(nn.Conv2d(3, width, 3, stride=1, padding=1) for width in CHANNELS)

    def forward(self, images):
        return [conv(nn.functional.avg_pool2d(images, 4 * 2**i)) for i, conv in enumerate(self.convs)]


def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in ((64, 85), (64, 50))]


def targets(empty=False):
    found = []
    for height, width in ((64, 85), (64, 50)):
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[0, 4:40, 5:30] = masks[1, 30:60, 10:48] = 1
        boxes = torch.tensor([[5.0, 4, 30, 40], [10, 30, 48, 60]])
        full = {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks}
        found.append({name: value[:0] if empty else value for name, value in full.items()})
    return found


def torchvision_network(detector):
    options = {"score_thresh": 0.0, "detections_per_img": 10} if detector == "retinanet" else SMALL_TWO_STAGE
    return TorchvisionNetwork(Maps(), detector, 3, fpn_channels=16, head_convs=1, options=options)


def mmdet_network(detector, monkeypatch):
    for models in (mmdet_models, mmdet_queries):
        monkeypatch.setattr(models, "WIDTH", 32)
    backbone = Maps()
    if detector in ("deformable_detr", "dino"):
        backbone.convs[0].requires_grad_(False)  # they have no use for it; backbones are chains
    model = model_dict(detector, CHANNELS, 3, SMALL[detector])
    if detector in ("retinanet", "fcos", "atss"):
        backbone.convs[0].requires_grad_(False)
    for stage in model["train_cfg"]["rcnn"] if detector == "cascade_mask_rcnn" else ():
        stage["sampler"]["num"] = 16
    if detector in ("faster_rcnn", "mask_rcnn"):
        model["train_cfg"]["rcnn"]["sampler"]["num"] = 16
    return MMDetNetwork(build_detector(model, backbone), NormalizeAndPad())


@pytest.fixture(
    params=[("torchvision", name) for name in DETECTORS]
    + [pytest.param(("mmdet", name), marks=needs_mmdet) for name in MODELS],
    ids="-".join,
)
def network(request, monkeypatch):
    library, name = request.param
    torch.manual_seed(0)
    network = torchvision_network(name) if library == "torchvision" else mmdet_network(name, monkeypatch)
    if library == "torchvision" and name == "retinanet":
        network.detector.backbone.body.convs[0].requires_grad_(False)
    return network


def test_every_detector_keeps_the_interface(network):
    network.train()
    for empty in (False, True):  # every parameter has a gradient even without objects: DDP waits for it
        network.zero_grad()
        terms = network(images(), targets(empty))
        assert all("loss" in name for name in terms)
        loss = torch.stack(list(terms.values())).sum()
        assert loss.isfinite()
        loss.backward()
        untouched = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert not untouched

    network.eval()
    with torch.no_grad():
        assert network.predict([], []) == []
        records = network.predict(images(), SIZES)
    assert len(records) == 2
    assert any(len(found["scores"]) for found in records)
    for found, (height, width) in zip(records, SIZES, strict=True):
        count = len(found["scores"])
        assert found["boxes"].shape == (count, 4)
        assert (found["boxes"].dtype, found["scores"].dtype, found["labels"].dtype) == (
            np.float32,
            np.float32,
            np.int64,
        )
        assert (np.diff(found["scores"]) <= 0).all()
        assert set(found["labels"]) <= {0, 1, 2}
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= np.array([width, height, width, height]) + 0.01).all()
        assert (found["masks"] is not None) == network.with_masks
        for mask in found["masks"] or ():
            assert tuple(mask["size"]) == (height, width)
            assert rle.decode(mask).shape == (height, width)


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_torchvision_finds_what_it_learned_in_original_pixels(detector):
    """One object of class 2; the original image is twice as high and three times as wide."""
    torch.manual_seed(0)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 16:48, 8:40] = 255
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 16:48, 8:40] = 1
    target = {"boxes": torch.tensor([[8.0, 16, 40, 48]]), "labels": torch.tensor([2]), "masks": mask}
    options = {"box_batch_size_per_image": 16} if detector == "mask_rcnn" else {}
    levels = (2, 5) if detector == "mask_rcnn" else (3, 5)
    network = TorchvisionNetwork(
        Maps(), detector, 3, fpn_channels=16, levels=levels, anchor_scale=4.0, head_convs=1, head_norm=True,
        options=options,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(network([image], [target]).values()).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        found = network.predict([image], [(128, 192)])[0]
    assert found["labels"][0] == 2
    assert found["scores"][0] > 0.3
    np.testing.assert_allclose(found["boxes"][0], [24, 32, 120, 96], atol=12)
    if detector == "mask_rcnn":
        expected = np.zeros((128, 192), dtype=np.uint8)
        expected[32:96, 24:120] = 1
        decoded = rle.decode(found["masks"][0])
        assert (decoded & expected).sum() / (decoded | expected).sum() > 0.7


def test_images_are_normalised_then_padded_and_never_resized():
    prepare = NormalizeAndPad()
    grey = [torch.full((3, 40, 70), 128, dtype=torch.uint8), torch.full((3, 33, 64), 255, dtype=torch.uint8)]
    batch = prepare(grey)
    assert batch.shape == (2, 3, 64, 96)
    torch.testing.assert_close(batch[0, :, 0, 0], (128 - prepare.mean.flatten()) / prepare.std.flatten())
    assert not batch[0, :, 40:].any()
    assert not batch[0, :, :, 70:].any()
    assert not batch[1, :, 33:].any()
    padded = NormalizeAndPad([1.0, 2, 3], [1.0, 1, 2], size_divisor=1, bgr=True, pad_value=9)
    batch = padded([torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1), torch.zeros(3, 2, 2)])
    assert batch[0, :, 0, 0].tolist() == [29, 18, 3.5]
    assert batch[0, :, 1, 1].tolist() == [9, 9, 9]

    network = torchvision_network("retinanet").eval()
    seen = []
    network.detector.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with torch.no_grad():
        network.predict(images(), SIZES)
    assert seen == [(2, 3, 64, 96)]


def test_records_are_sorted_stably():
    boxes = torch.arange(12.0).view(3, 4)
    found = record(
        boxes, torch.tensor([0.5, 0.9, 0.5]), torch.tensor([3, 4, 5]), torch.zeros(3, 2, 2, dtype=torch.bool)
    )
    assert found["labels"].tolist() == [4, 3, 5]
    assert found["boxes"][0].tolist() == [4, 5, 6, 7]
    assert len(found["masks"]) == 3


def test_output_norms_of_unused_levels_rest():
    from backbones import create_features

    swin = create_features("swin_tiny_patch4_window7_224")
    freeze_unused_norms(swin, 1)
    assert [name for name, p in swin.named_parameters() if not p.requires_grad] == ["norm0.weight", "norm0.bias"]


OFFICIAL = {
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "faster_rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mask_rcnn": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade_mask_rcnn": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "fcos": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "atss": "atss/atss_r50_fpn_1x_coco.py",
    "mask2former": "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
    "deformable_detr": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
}


def settings(module, prefix=""):
    """Every number, name and plain list that mmdetection keeps in a detector and its parts, by where."""
    plain = (bool, int, float, str, type(None))
    found = {}

    def visit(value, where, depth):
        if isinstance(value, plain):
            found[where] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                visit(inner, f"{where}.{key}", depth)
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                visit(inner, f"{where}[{i}]", depth)
        elif isinstance(value, torch.Tensor):
            found[where] = value.tolist()
        elif type(value).__module__.startswith("mmdet.models.task_modules") and depth < 4:
            found[where] = type(value).__name__
            visit({k: v for k, v in vars(value).items() if k != "_cache"}, where, depth + 1)

    for name, part in module.named_modules():
        if name == "backbone" or name.startswith(("backbone.", "data_preprocessor")):
            continue
        found[f"{name}:"] = type(part).__name__
        # Arguments for the layers of transformers are compared where they arrive.
        skipped = ("init_cfg", "training", "layer_cfg", "self_attn_cfg", "cross_attn_cfg", "ffn_cfg")
        own = {k: v for k, v in vars(part).items() if not k.startswith("_") and k not in skipped}
        visit(own, name, 0)
    return found


@needs_mmdet
@pytest.mark.parametrize("name", MODELS)
def test_settings_are_those_of_the_published_configuration(name):
    """Every setting of every part, and every tensor's shape, of what mmdetection builds from its own file."""
    from tasks.core.openmmlab.config import forget_pretrained, read_model

    official = read_model(f"mmdet::{OFFICIAL[name]}", "mmdet", allow_code=False)
    official.pop("data_preprocessor")
    forget_pretrained(official)
    channels = [256, 512, 1024, 2048]
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.model.BaseModule.init_weights", lambda self: None)
        patch.setattr("mmdet.models.detectors.BaseDetector.init_weights", lambda self: None)
        theirs = build_detector(official)
        ours = build_detector(model_dict(name, channels, 80, {}), nn.Identity())
    expected, found = settings(theirs), settings(ours)
    renamed = {"LaterChannelMapper": "ChannelMapper"}
    found = {where: renamed.get(value, value) if isinstance(value, str) else value for where, value in found.items()}
    differing = {
        where: (expected.get(where, "-"), found.get(where, "-"))
        for where in expected.keys() | found.keys()
        if expected.get(where, "-") != found.get(where, "-")
    }
    assert differing == {}
    shapes = [
        {key: value.shape for key, value in detector.state_dict().items() if not key.startswith("backbone.")}
        for detector in (theirs, ours)
    ]
    assert shapes[0] == shapes[1]
