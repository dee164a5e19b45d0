"""Weights of detectors: names of the releases, every layout of a file, what torchvision's detectors take of them."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from backbones import CheckpointError, create_features
from backbones.litv2 import LITv2Dense
from tasks.core.preprocess import NormalizeAndPad
from tasks.detection.torchvision_detectors import TorchvisionNetwork
from tasks.detection.weights import load_weights

needs_mmdet = pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="without the extra openmmlab")
GOLDENS = [
    Path(__file__).parents[1] / "goldens",
    *map(Path, filter(None, os.environ.get("FRUGAL_GOLDENS", "").split(":"))),
]
SIZES = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "mlp_ratio": 1.0}


def features(flavour="detection", sizes=SIZES):
    return LITv2Dense(**sizes, flavour=flavour)


def mmdet_network(detector="retinanet", backbone=None, num_classes=3):
    from tasks.detection.mmdet_models import model_dict
    from tasks.detection.mmdet_network import MMDetNetwork, build_detector

    backbone = backbone or features()
    model = model_dict(detector, backbone.channels, num_classes, {})
    return MMDetNetwork(build_detector(model, backbone), NormalizeAndPad())


def torchvision_network(detector="retinanet", backbone=None):
    return TorchvisionNetwork(backbone or features(), detector, 3, fpn_channels=8)


def official_backbone(name):
    """Names and shapes of the authors' detection backbone, from its golden list."""
    file = f"{name.replace('_', '-')}.det-backbone.keys.json"
    found = [path for root in GOLDENS if (path := root / name.partition("_")[0] / file).exists()]
    if not found:
        pytest.skip(f"{file} is in no folder of FRUGAL_GOLDENS")
    return {key: tuple(shape) for key, shape in json.loads(found[0].read_text())["keys"]}


def equal(a, b):
    b = b.state_dict()
    return all(torch.equal(v, b[k]) for k, v in a.state_dict().items())


def nothing_wrong(report):
    return (report.missing, report.unexpected, report.mismatched) == ([], [], {})


# -- names of the releases --------------------------------------------------------------------------------------------


@needs_mmdet
@pytest.mark.parametrize("base", ["retinanet_r50_fpn", "mask-rcnn_r50_fpn"])
@pytest.mark.parametrize("backbone", ["lit_ti", "lit_s", "litv2_s", "litv2_m", "litv2_b"])
def test_names_and_shapes_are_those_of_the_authors_backbone_in_mmdetections_own_model(base, backbone):
    from tasks.detection.mmdet_models import model_dict
    from tasks.detection.mmdet_network import import_mmdet

    import_mmdet()
    import mmdet
    from mmdet.registry import MODELS
    from mmengine.config import Config, ConfigDict

    def built(model):  # without its backbone, and without data: only names and shapes are compared
        with torch.device("meta"):
            return MODELS.build(ConfigDict({**model, "backbone": {"type": torch.nn.Identity}}))

    with torch.device("meta"):
        ours = create_features(backbone, flavour="detection")
    theirs = Config.fromfile(f"{Path(mmdet.__file__).parent}/.mim/configs/_base_/models/{base}.py").model
    del theirs["data_preprocessor"]
    theirs.neck.in_channels = ours.channels
    official = {f"backbone.{key}": shape for key, shape in official_backbone(backbone).items()}
    official |= {key: tuple(t.shape) for key, t in built(theirs).state_dict().items()}
    detector = built(model_dict(base.partition("_")[0].replace("-", "_"), ours.channels, 80, {}))
    detector.backbone = ours
    assert {key: tuple(t.shape) for key, t in detector.state_dict().items()} == official
    if (base, backbone) == ("retinanet_r50_fpn", "litv2_s"):
        assert sum(p.numel() for p in detector.parameters()) == 38_014_252


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retinanet():
    return mmdet_network()


def contents(network):
    """Files with the weights of a detector of mmdetection, by what wrote them."""
    import numpy as np
    from mmengine.logging import MessageHub

    weights = network.detector.state_dict()
    hub = MessageHub("a training of detection")
    hub.update_scalar("train/loss", 0.5)
    ours = {f"network.detector.{key}": tensor for key, tensor in weights.items()}
    return {
        "mmcv": {"meta": {"CLASSES": ("cat",), "hook_msgs": {"best": np.float64(0.4)}}, "state_dict": weights},
        "mmengine": {"meta": {"dataset_meta": {}}, "state_dict": weights, "message_hub": hub.state_dict()},
        "data parallel": {"state_dict": {f"module.{key}": tensor for key, tensor in weights.items()}},
        "our checkpoint": {"state_dict": ours | {"other": torch.ones(1)}, "hyper_parameters": {}},
        "our network": network.state_dict(),
    }


@needs_mmdet
def test_whole_detectors_of_every_program(retinanet, tmp_path):
    target = mmdet_network()
    for name, content in contents(retinanet).items():
        with torch.no_grad():
            for tensor in target.parameters():
                tensor.zero_()
        torch.save(content, tmp_path / f"{name}.pth")
        report = load_weights(target, tmp_path / f"{name}.pth")
        assert nothing_wrong(report), f"{name}: {report}"
        assert report.layout == (name if name.startswith("our") else "mmdetection model")
        assert equal(retinanet, target), name


@needs_mmdet
def test_loaded_detectors_find_the_same(retinanet, tmp_path):
    torch.save({"state_dict": retinanet.detector.state_dict()}, tmp_path / "d.pth")
    target = mmdet_network()
    load_weights(target, tmp_path / "d.pth")
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    with torch.no_grad():
        a, b = (network.eval().predict([image], [(140, 180)])[0] for network in (retinanet, target))
    assert len(a["scores"]) == len(b["scores"])
    assert (a["boxes"] == b["boxes"]).all()


@needs_mmdet
def test_other_classes_keep_everything_but_the_classifier(retinanet, tmp_path):
    torch.save({"state_dict": retinanet.detector.state_dict()}, tmp_path / "d.pth")
    with pytest.warns(UserWarning, match=r"bbox_head\.retina_cls\.weight"):
        report = load_weights(mmdet_network(num_classes=5), tmp_path / "d.pth")
    assert set(report.mismatched) == {"bbox_head.retina_cls.weight", "bbox_head.retina_cls.bias"}
    assert (report.missing, report.unexpected) == ([], [])


@needs_mmdet
def test_a_detector_built_on_frugal_backbone_takes_the_same_files(tmp_path):
    from tasks.detection.mmdet_models import model_dict
    from tasks.detection.mmdet_network import MMDetNetwork, build_detector

    source = mmdet_network(backbone=create_features("pvt_v2_b0"))
    model = model_dict("retinanet", source.detector.backbone.channels, 3, {})
    model["backbone"] = {"type": "FrugalBackbone", "name": "pvt_v2_b0"}
    target = MMDetNetwork(build_detector(model), NormalizeAndPad())
    weights = source.detector.state_dict()
    timm_names = {key.replace("backbone.body.", "backbone."): tensor for key, tensor in weights.items()}
    for content in (weights, timm_names):
        torch.save({"state_dict": content}, tmp_path / "d.pth")
        with torch.no_grad():
            target.detector.backbone.features.body.patch_embed.proj.weight.zero_()
        assert nothing_wrong(load_weights(target, tmp_path / "d.pth"))
        found = target.detector.state_dict()
        assert all(torch.equal(t, found[k.replace("body.", "features.body.")]) for k, t in weights.items())


@needs_mmdet
def test_names_of_torchvisions_resnet_are_mmdetections(tmp_path):
    source, target = (mmdet_network(backbone=create_features("resnet18", norm="frozen")) for _ in range(2))
    weights = {key.replace("backbone.body.", "backbone."): t for key, t in source.detector.state_dict().items()}
    assert "backbone.layer1.0.conv1.weight" in weights
    torch.save({"state_dict": weights}, tmp_path / "d.pth")
    assert nothing_wrong(load_weights(target, tmp_path / "d.pth"))
    assert equal(source, target)


# -- backbones --------------------------------------------------------------------------------------------------------


@needs_mmdet
def test_a_classifier_fills_the_backbone(retinanet, tmp_path):
    from backbones.litv2 import LITv2

    source = LITv2(num_classes=7, **SIZES)
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "c.pth")
    for target, prefix in ((mmdet_network(), "backbone."), (torchvision_network(), "backbone.body.")):
        report = load_weights(target, tmp_path / "c.pth")
        norms = [f"{prefix}norm{i}.{leaf}" for i in (1, 2, 3) for leaf in ("weight", "bias")]
        assert [name for name in report.missing if name.startswith(prefix + "norm")] == norms
        assert report.unexpected == []
        loaded = target.detector.state_dict()[f"{prefix}layers.2.blocks.1.attn.l_q.weight"]
        assert torch.equal(loaded, source.layers[2].blocks[1].attn.l_q.weight)


@needs_mmdet
def test_detectors_of_torchvision_take_the_backbone_of_whole_models(retinanet, tmp_path):
    torch.save({"state_dict": retinanet.detector.state_dict()}, tmp_path / "d.pth")
    target = torchvision_network()
    report = load_weights(target, tmp_path / "d.pth")
    assert report.layout == "backbone alone, backbone of an mmdetection or mmsegmentation model"
    assert all(name.startswith("backbone.body.") for name in report.loaded)
    assert report.unexpected == []
    assert "bbox_head.retina_cls.weight" in report.ignored
    assert equal(retinanet.detector.backbone, target.detector.backbone.body)


def test_our_checkpoints_of_detectors_of_torchvision(tmp_path):
    source, target = torchvision_network("mask_rcnn"), torchvision_network("mask_rcnn")
    for content in (
        {"state_dict": {f"network.{key}": tensor for key, tensor in source.state_dict().items()}},
        source.state_dict(),
    ):
        with torch.no_grad():
            target.detector.backbone.fpn.inner_blocks[0][0].weight.zero_()
        torch.save(content, tmp_path / "o.ckpt")
        assert nothing_wrong(load_weights(target, tmp_path / "o.ckpt"))
        assert equal(source, target)


def test_a_backbone_of_timm_fills_that_of_torchvisions_detector(tmp_path):
    import timm

    model = timm.create_model("resnet18")
    torch.save(model.state_dict(), tmp_path / "b.pth")
    target = torchvision_network(backbone=create_features("resnet18", norm="frozen"))
    report = load_weights(target, tmp_path / "b.pth")
    assert not [name for name in report.missing if name.startswith("backbone.body.")]
    assert torch.equal(target.detector.backbone.body.body.conv1.weight, model.conv1.weight)


def test_weights_of_another_backbone_are_refused(tmp_path):
    import timm

    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"b\.pth does not fit: 0 of \d+ backbone tensors found"):
        load_weights(torchvision_network(), tmp_path / "b.pth")
