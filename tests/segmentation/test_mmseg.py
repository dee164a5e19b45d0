"""Segmentors of mmsegmentation in this task: equal to ours and to mmsegmentation's own, trained and evaluated alike."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from backbones import CheckpointError, create_features
from backbones.checkpoint import rename
from backbones.keys import BUFFERS
from tasks.core.errors import UserError
from tasks.core.optim import build_optimizer
from tasks.segmentation.mmseg_models import MODELS
from tasks.segmentation.mmseg_module import MMSegmentation, MMSegmentationConfig
from tasks.segmentation.semantic_fpn import MMSEGMENTATION_KEYS, SemanticFPNNetwork
from tasks.segmentation.weights import load_mmseg_weights, load_weights

mmseg = pytest.importorskip("mmseg", reason="the extra openmmlab is not installed")

GOLDENS = [
    Path(__file__).parents[1] / "goldens",
    *map(Path, filter(None, os.environ.get("FRUGAL_GOLDENS", "").split(":"))),
]
UPERNET = "mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py"
SEGFORMER = "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"
SMALL = {
    "semantic_fpn": {"neck": {"out_channels": 16}, "decode_head": {"in_channels": [16] * 4, "channels": 16}},
    "upernet": {"decode_head": {"channels": 16}, "auxiliary_head": {"channels": 8}},
    "segformer": {"decode_head": {"channels": 16}},
    "mask2former": {"decode_head": {"num_queries": 8, "train_cfg": {"num_points": 64}}},
}


def small(segmentor, num_classes=5, backbone="test_resnet", **options):
    return MMSegmentation(num_classes, segmentor, backbone, options=SMALL[segmentor], **options)


def images(*size, count=2):
    return torch.randint(0, 256, (count, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def labels(*size, count=2):
    mask = torch.randint(0, 5, (count, *size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    mask[:, :9] = 255
    return mask


def equal(a, b):
    b = b.state_dict()
    return all(torch.equal(v, b[k]) for k, v in a.state_dict().items())


def read(name):
    """The model of one of mmsegmentation's own configurations, from the file itself."""
    from tasks.core.openmmlab import install

    install()
    from mmengine.config import Config

    return Config.fromfile(Path(mmseg.__file__).parent / ".mim/configs" / name).model


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segmentor", "config"),
    [
        ("semantic_fpn", "sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py"),
        ("upernet", UPERNET.removeprefix("mmseg::")),
        ("segformer", SEGFORMER.removeprefix("mmseg::")),
        ("mask2former", "mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py"),
    ],
)
def test_settings_are_those_of_mmsegmentations_configurations(segmentor, config):
    official = read(config).to_dict()
    channels = (official.get("neck") or official["decode_head"])["in_channels"]

    def same(ours, theirs, path):
        """Every setting here is theirs; theirs that are not here are defaults, as the parameters below show."""
        for name, value in ours.items():
            if isinstance(value, dict):
                same(value, theirs[name], f"{path}.{name}")
            elif (path, name, value) != (f"{path}", "type", "BN"):  # theirs is synchronised
                found = theirs.get(name, False)
                assert value == (list(found) if isinstance(found, tuple) else found), f"{path}.{name}"

    ours = MODELS[segmentor](channels, 150)
    same({k: v for k, v in ours.items() if k != "data_preprocessor"}, official, segmentor)
    from tasks.segmentation.mmseg_network import import_mmseg

    import_mmseg()
    from mmengine.config import ConfigDict
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS as REGISTRY

    shapes = []
    for model in (ours, official):
        heads = {name: model[name] for name in ("neck", "decode_head", "auxiliary_head") if name in model}
        with DefaultScope.overwrite_default_scope("mmseg"), torch.device("meta"):
            built = {name: REGISTRY.build(ConfigDict(head)) for name, head in heads.items()}
        shapes.append({f"{n}.{k}": tuple(t.shape) for n, head in built.items() for k, t in head.state_dict().items()})
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("segmentor", MODELS)
def test_a_step_of_training_reaches_every_parameter_and_any_size_gives_scores(segmentor):
    network = small(segmentor).network
    losses = network(images(70, 45), labels(70, 45))
    assert all("loss" in name for name in losses)
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert network.eval()(images(70, 45)).shape == (2, 5, 70, 45)


def test_semantic_fpn_is_ours_with_the_same_file(tmp_path):
    theirs = MMSegmentation(5, "semantic_fpn", "resnet18").network
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(0.01 * torch.randn_like(tensor))
    weights = {k.replace("backbone.body.", "backbone."): v for k, v in theirs.segmentor.state_dict().items()}
    assert {"decode_head.conv_seg.weight", "decode_head.scale_heads.3.4.bn.running_var"} <= weights.keys()
    torch.save({"meta": {"CLASSES": ("wall",)}, "state_dict": weights}, tmp_path / "fpn.pth")
    ours = SemanticFPNNetwork(create_features("resnet18"), 5)
    report = load_weights(ours, tmp_path / "fpn.pth")
    assert (report.missing, report.unexpected, report.mismatched, report.ignored) == ([], [], {}, [])
    x = images(64, 96)
    with torch.no_grad():
        upsampled = F.interpolate(ours.eval()(x), size=(64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(theirs.eval()(x), upsampled)


@pytest.mark.parametrize("backbone", ["lit_ti", "lit_s", "litv2_s", "litv2_m", "litv2_b"])
def test_released_semantic_fpn_has_the_names_and_shapes_of_both_networks(backbone):
    """The authors' backbone below mmsegmentation's own neck and head."""
    file = f"{backbone.replace('_', '-')}.{'det' if backbone == 'lit_ti' else 'seg'}-backbone.keys.json"  # Ti: one file
    found = [path for root in GOLDENS if (path := root / backbone.partition("_")[0] / file).exists()]
    if not found:
        pytest.skip(f"{file} is in no folder of FRUGAL_GOLDENS")
    official = {f"backbone.{key}": tuple(shape) for key, shape in json.loads(found[0].read_text())["keys"]}
    from tasks.segmentation.mmseg_network import import_mmseg

    import_mmseg()
    from mmengine.config import ConfigDict
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS as REGISTRY

    theirs = read("sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py")
    with torch.device("meta"):
        features = create_features(backbone)
        ours = SemanticFPNNetwork(features, 150)
    theirs.neck.in_channels = features.channels
    named = MODELS["semantic_fpn"](features.channels, 150)
    heads = {}
    for origin, model in (("theirs", theirs), ("named", named)):
        with DefaultScope.overwrite_default_scope("mmseg"), torch.device("meta"):
            parts = {part: REGISTRY.build(ConfigDict(model[part])) for part in ("neck", "decode_head")}
        heads[origin] = torch.nn.ModuleDict(parts).state_dict()
    official |= {key: tuple(tensor.shape) for key, tensor in heads["theirs"].items()}
    inside = {f"backbone.{key}": tensor for key, tensor in features.state_dict().items()} | heads["named"]
    assert {key: tuple(tensor.shape) for key, tensor in rename(inside, BUFFERS).items()} == official
    renamed = rename(dict.fromkeys(official), MMSEGMENTATION_KEYS)
    assert renamed.keys() == rename(ours.state_dict(), BUFFERS).keys()
    shapes = dict(zip(renamed, official.values(), strict=True))
    assert shapes == {key: tuple(tensor.shape) for key, tensor in rename(ours.state_dict(), BUFFERS).items()}
    if backbone == "litv2_s":
        assert sum(p.numel() for p in ours.parameters()) == 31_449_486


def test_configurations_of_mmsegmentation_give_what_it_computes(tmp_path):
    module = MMSegmentationConfig(150, SEGFORMER)
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS as REGISTRY
    from mmseg.structures import SegDataSample

    model = read(SEGFORMER.removeprefix("mmseg::"))
    model.backbone.init_cfg = None
    del model.data_preprocessor["size"]  # the crop of training
    with DefaultScope.overwrite_default_scope("mmseg"):
        theirs = REGISTRY.build(model)
    theirs.load_state_dict(module.network.segmentor.state_dict(), strict=False)
    image, size = images(64, 80, count=1), (100, 120)
    sample = SegDataSample(metainfo={"img_shape": (64, 80), "ori_shape": size})
    with torch.no_grad():
        batch = theirs.data_preprocessor({"inputs": [image[0].flip(0)], "data_samples": [sample]}, False)  # OpenCV's
        expected = theirs.eval().predict(**batch)[0].seg_logits.data
        actual = next(module.eval().scores(image, [size]))
    torch.testing.assert_close(actual, expected)


# -- configurations ---------------------------------------------------------------------------------------------------


def test_the_number_of_classes_is_the_datas_and_no_weights_are_fetched():
    module = MMSegmentationConfig(7, UPERNET)
    heads = module.network.segmentor.decode_head, module.network.segmentor.auxiliary_head
    assert [head.num_classes for head in heads] == [7, 7]
    assert "SyncBatchNorm" not in {type(part).__name__ for part in module.network.modules()}
    assert module.evaluation.mode == "whole"


def test_sliding_windows_and_class_weights_come_from_the_configuration():
    from tasks.core.openmmlab.config import read_model
    from tasks.segmentation.mmseg_config import evaluation_of, set_classes
    from tasks.segmentation.mmseg_network import import_mmseg

    import_mmseg()
    model = read_model("mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py", "mmseg", False)
    assert evaluation_of(model).mode == "whole"
    model = read_model("mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py", "mmseg", False)
    slide = evaluation_of(model)
    assert (slide.mode, slide.window, slide.stride) == ("slide", (1024, 1024), (768, 768))
    model = {"decode_head": {"num_classes": 3, "out_channels": 1, "loss_decode": {"class_weight": [1.0, 2.0, 3.0]}}}
    model["other"] = {"num_classes": 3, "loss_cls": {"class_weight": [1.0, 1.0, 1.0, 0.1]}}
    set_classes(model, 2)
    assert model["decode_head"] == {"num_classes": 2, "out_channels": None, "loss_decode": {"class_weight": None}}
    assert model["other"]["loss_cls"]["class_weight"] == [1.0, 1.0, 0.1]


def test_configuration_files_run_only_when_that_is_allowed(tmp_path):
    file, evidence = tmp_path / "own.py", tmp_path / "ran"
    base = Path(mmseg.__file__).parent / ".mim/configs/_base_/models/segformer_mit-b0.py"
    file.write_text(f"{base.read_text()}\nopen({str(evidence)!r}, 'w').close()\n")
    with pytest.raises(UserError, match=r"own\.py: a configuration of mmseg is a Python program .*allow_config_code"):
        MMSegmentationConfig(5, str(file))
    assert not evidence.exists()
    module = MMSegmentationConfig(5, str(file), allow_config_code=True)
    assert evidence.exists()
    assert module.hparams["model"]["decode_head"]["type"] == "SegformerHead"


@pytest.mark.parametrize(
    ("config", "text", "message"),
    [
        ("none.py", None, r"none\.py: no such file; expected a configuration of mmseg"),
        ("mmseg::../../../__init__.py", None, "leads out of the configurations of mmseg"),
        ("own.py", "1 / 0", r"own\.py: cannot be read: division by zero"),
        ("own.py", "data = dict()", r"own\.py: has no dictionary 'model' with a 'type'"),
        ("own.py", "model = dict(type='os.system')", r"class 'os\.system' is outside the packages"),
        ("own.py", "model = dict(type='mmseg.apis.init_model', config='x')", "'mmseg.apis.init_model' is outside"),
        ("own.py", "model = dict(type='Unknown')", "mmsegmentation cannot build 'Unknown'"),
        (
            "own.py",
            "model = dict(type='EncoderDecoder', backbone=dict(type='Nothing'), decode_head={})",
            "cannot build .*Nothing",
        ),
        ("own.py", "model = dict(type='SiLogLoss')", "cannot build 'SiLogLoss': only EncoderDecoder"),
        (
            "own.py",
            "model = dict(type='X', data_preprocessor=dict(type='Y'))",
            "data_preprocessor 'Y' is not supported",
        ),
    ],
)
def test_configurations_that_cannot_be_used(config, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / config).write_text(text)
    with pytest.raises(UserError, match=message):
        MMSegmentationConfig(5, config, allow_config_code=True)


def test_unknown_segmentors_and_options():
    with pytest.raises(UserError, match=r"model\.segmentor.*'pspnet'.*semantic_fpn, upernet, segformer, mask2former"):
        MMSegmentation(5, "pspnet", "test_resnet")
    with pytest.raises(UserError, match=r"model\.options\.head: there is no such group; expected one of .*decode_head"):
        MMSegmentation(5, "upernet", "test_resnet", options={"head": {"channels": 3}})
    with pytest.raises(UserError, match=r"mmsegmentation cannot build 'EncoderDecoder': .*chanels"):
        MMSegmentation(5, "upernet", "test_resnet", options={"decode_head": {"chanels": 3}})


# -- weights ----------------------------------------------------------------------------------------------------------


def test_files_of_every_origin(tmp_path):
    source, target = small("upernet"), small("upernet")
    weights = source.network.segmentor.state_dict()
    contents = {
        "mmsegmentation model": {"meta": {}, "state_dict": weights},
        "mmsegmentation model, timm or torchvision names": {
            "state_dict": {key.replace("backbone.body.", "backbone."): tensor for key, tensor in weights.items()}
        },
        "our checkpoint": {"state_dict": source.state_dict() | {"other": torch.ones(1)}},
        "our network": source.network.state_dict(),
    }
    for layout, content in contents.items():
        with torch.no_grad():
            for tensor in target.network.parameters():
                tensor.zero_()
        torch.save(content, tmp_path / "w.pth")
        report = load_mmseg_weights(target.network.segmentor, tmp_path / "w.pth")
        assert report.layout == layout
        assert (report.missing, report.unexpected, report.mismatched) == ([], [], {})
        assert equal(source.network, target.network)


def test_a_backbone_alone_and_a_file_that_does_not_fit(tmp_path):
    import timm

    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), tmp_path / "b.pth")
    module = small("segformer", weights=str(tmp_path / "b.pth"))
    assert torch.equal(module.network.segmentor.backbone.body.conv1[0].weight, model.conv1[0].weight)
    torch.save({"a": torch.ones(1)}, tmp_path / "no.pth")
    with pytest.raises(CheckpointError, match=r"no\.pth does not fit"):
        small("segformer", weights=str(tmp_path / "no.pth"))


# -- the command line -------------------------------------------------------------------------------------------------


def test_training_evaluation_report_and_predictions(tiny_ade20k, tiny_options, run_cli, tmp_path):
    options = tiny_options(tiny_ade20k)
    arguments = {"segmentor": "upernet", "backbone": "test_resnet", "options": SMALL["upernet"]}
    options["model"] = {"class_path": "MMSegmentation", "init_args": arguments | {"optim": {"lr": 1e-3}}}
    (tmp_path / "mm.yaml").write_text(yaml.safe_dump(options))
    outcome = run_cli("fit", "-c", "mm.yaml")
    assert outcome.code == 0, outcome.err
    checkpoint = next(tmp_path.rglob("best.ckpt"))
    report = (checkpoint.parents[1] / "report.md").read_text()
    assert "val/mIoU" in report
    assert "Worst images" in report
    assert run_cli("predict", "-c", "mm.yaml", "--ckpt_path", checkpoint, "--output", "out").code == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 13
    module = MMSegmentation.load_from_checkpoint(checkpoint)
    assert module.hparams["segmentor"] == "upernet"


def test_a_checkpoint_of_a_configuration_needs_no_file(tmp_path):
    base = Path(mmseg.__file__).parent / ".mim/configs/_base_/models/segformer_mit-b0.py"
    (tmp_path / "own.py").write_text(base.read_text())
    module = MMSegmentationConfig(5, str(tmp_path / "own.py"), allow_config_code=True)
    arguments = dict(module.hparams)
    (tmp_path / "own.py").unlink()
    again = MMSegmentationConfig(**arguments)
    again.load_state_dict(module.state_dict())
    assert equal(module.network, again.network)


@pytest.mark.parametrize("name", ["mmseg", "upernet_litv2_s"])
def test_listed_configurations(name, resolved):
    config = resolved(name)
    options = config["model"]["init_args"]
    assert config["data"]["init_args"]["crop_size"] == [512, 512]
    if name == "mmseg":
        expected = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 5e-4, "min_lr": 1e-4, "power": 0.9}
        assert options["config"] == UPERNET
        assert config["trainer"]["max_steps"] == 80_000
    else:
        expected = {"optimizer": "adamw", "lr": 6e-5, "weight_decay": 0.01, "power": 1.0, "warmup_steps": 1500}
        assert config["trainer"]["max_steps"] == 160_000
    assert {key: options["optim"][key] for key in expected} == expected
    module = MMSegmentation(3, "segformer", "test_resnet", options=SMALL["segformer"], optim=options["optim"])
    assert build_optimizer(module.network, module.optim).param_groups
