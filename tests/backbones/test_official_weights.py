"""Released files of LIT, LITv2 and HVT: every container and size leads to a network with the same outputs."""

import argparse
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones import CheckpointError, create, create_features, load_checkpoint
from backbones.checkpoint import read_content, read_state_dict
from backbones.hvt import HVT
from backbones.lit import LIT, LITDense
from backbones.lit_ti import LITTi, LITTiDense
from backbones.litv2 import LITv2, LITv2Dense

LIT_SIZES = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "mlp_ratio": 1.0}
TI_SIZES = {"embed_dims": (8, 12, 16, 24), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 3)}
HVT_SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2, "pool_block_width": 2}
FAMILIES = {
    "lit": lambda img_size=64, num_classes=7: LIT(img_size=img_size, num_classes=num_classes, **LIT_SIZES),
    "litv2": lambda img_size=64, num_classes=7: LITv2(num_classes=num_classes, **LIT_SIZES),
    "lit_ti": lambda img_size=64, num_classes=7: LITTi(num_classes=num_classes, img_size=img_size, **TI_SIZES),
    "hvt": lambda img_size=64, num_classes=7: HVT(img_size, num_classes=num_classes, **HVT_SIZES),
}
DENSE = {
    "lit": lambda **options: LITDense(**LIT_SIZES, **options),
    "litv2": lambda **options: LITv2Dense(**LIT_SIZES, **options),
    "lit_ti": lambda **options: LITTiDense(**{"img_size": 64, **TI_SIZES, **options}),
}


def randomised(model):
    """The model with no parameter or statistic left as it starts; some of them start at 0 or 1."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.5 + 0.1)
    return model.eval()


def output(model, *size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, *size, generator=generator))


def assert_equal_outputs(source, target, *size):
    expected, actual = output(source, *size), output(target, *size)
    assert expected.std() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def nothing_wrong(report):
    return (report.missing, report.unexpected, report.mismatched, report.ignored) == ([], [], {}, [])


# -- containers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cfg_node(monkeypatch):
    """yacs' class of configurations as a file holds it: a dict with flags; afterwards it cannot be imported."""

    class CfgNode(dict):
        def __init__(self, content):
            super().__init__(content)
            self.__dict__["__immutable__"] = False
            self.__dict__["__deprecated_keys__"] = set()

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    with monkeypatch.context() as patch:
        module = ModuleType("yacs.config")
        module.CfgNode = CfgNode
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        yield CfgNode


def containers(weights, cfg_node):
    training = {"optimizer": {"state": {}}, "lr_scheduler": {"t": 1}, "epoch": 299, "max_accuracy": 82.0}
    config = cfg_node({"MODEL": cfg_node({"NAME": "litv2-small", "NUM_HEADS": [3, 6]}), "AMP": "O1"})
    return {
        "bare": weights,
        "model": {"model": weights},
        "LIT training": {"model": weights, **training, "config": config, "amp": {}},
        "HVT training": {"model": weights, "scaler": {}, "args": argparse.Namespace(lr=5e-4, data_set="IMNET")},
        "data parallel": {f"module.{name}": tensor for name, tensor in weights.items()},
        "LIT training, data parallel": {
            "model": {f"module.{name}": tensor for name, tensor in weights.items()},
            "config": config,
        },
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_container_of_a_classifier(family, zipped, cfg_node, tmp_path, monkeypatch):
    source = randomised(FAMILIES[family]())
    files = {}
    for name, content in containers(source.state_dict(), cfg_node).items():
        files[name] = tmp_path / f"{name}.pth"
        torch.save(content, files[name], _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs.config")
    expected = output(source, 64, 64)
    for name, file in files.items():
        target = FAMILIES[family]()
        report = load_checkpoint(target, file)
        assert nothing_wrong(report), f"{name}: {report}"
        assert report.layout == "our names"
        assert torch.equal(output(target, 64, 64), expected), name


def test_a_yacs_configuration_becomes_plain_values(cfg_node, tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.ones(1)}, "config": cfg_node({"A": cfg_node({"B": [1, (2, "x")]})})}, file)
    config = read_content(file)["config"]
    assert config == {"A": {"B": [1, (2, "x")]}}
    assert not isinstance(config, cfg_node)
    assert list(read_state_dict(file)) == ["a"]


def test_other_classes_of_yacs_are_refused(cfg_node, tmp_path):
    cfg_node.__qualname__ = cfg_node.__name__ = "Other"
    sys.modules["yacs.config"].Other = cfg_node
    torch.save({"model": {"a": torch.ones(1)}, "config": cfg_node({})}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"refused: reading it would call yacs\.config\.Other"):
        read_state_dict(tmp_path / "w.pth")


def with_heads(features):
    """The weights of a detector or segmentation network of mmdetection and mmsegmentation around `features`."""
    weights = {f"backbone.{name}": tensor for name, tensor in features.state_dict().items()}
    return weights | {
        "neck.lateral_convs.0.conv.weight": torch.ones(4, 8, 1, 1),
        "decode_head.conv_seg.weight": torch.ones(3, 4, 1, 1),
        "bbox_head.retina_cls.bias": torch.ones(4),
    }


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("flavour", ["segmentation", "detection"])
def test_dense_networks_give_their_backbone(family, flavour, tmp_path):
    source, target = randomised(DENSE[family](flavour=flavour)), DENSE[family](flavour=flavour)
    content = {"meta": {"CLASSES": ("wall", "sky"), "epoch": 12}, "state_dict": with_heads(source), "optimizer": {}}
    torch.save(content, tmp_path / "d.pth")
    report = load_checkpoint(target, tmp_path / "d.pth")
    assert report.layout == "backbone of an mmdetection or mmsegmentation model"
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], {})
    assert len(report.ignored) == 3
    for a, b in zip(output(source, 70, 90), output(target, 70, 90), strict=True):
        assert torch.equal(a, b)


def test_index_tables_are_neither_read_nor_mentioned(tmp_path):
    source, target = randomised(FAMILIES["lit"]()), FAMILIES["lit"]()
    weights = source.state_dict()
    index = [name for name in weights if name.endswith("relative_position_index")]
    assert len(index) == 3
    for change in (torch.zeros_like, lambda x: x[:1]):
        torch.save(weights | {name: change(weights[name]) for name in index}, tmp_path / "w.pth")
        assert nothing_wrong(load_checkpoint(target, tmp_path / "w.pth"))
        assert all(torch.equal(target.state_dict()[name], weights[name]) for name in index)


def test_another_number_of_classes_loads_all_but_the_head(tmp_path):
    for family, make in FAMILIES.items():
        source, target = randomised(make(num_classes=7)), make(num_classes=3)
        torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
        before = target.head.weight.clone()
        with pytest.warns(UserWarning, match=r"head\.weight \(7, \d+\) in the file, \(3, \d+\) here"):
            report = load_checkpoint(target, tmp_path / "w.pth")
        assert set(report.mismatched) == {"head.weight", "head.bias"}, family
        assert torch.equal(target.head.weight, before)
        source.head = target.head = nn.Identity()
        assert_equal_outputs(source, target, 64, 64)


# -- other sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 96), (32, 32), (64, 96)])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_size_give_what_the_network_of_that_size_gives_for_it(family, size, tmp_path):
    source, target = randomised(FAMILIES[family](64)), FAMILIES[family](size)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    assert nothing_wrong(load_checkpoint(target, tmp_path / "w.pth"))
    assert_equal_outputs(source, target, *size)


def test_released_sizes_224_to_384(tmp_path):
    for name, changed in (("hvt_ti_1", 2), ("lit_ti", 4)):
        source, target = create(name), create(name, img_size=384)
        shapes = {key: tensor.shape for key, tensor in target.state_dict().items()}
        weights = source.state_dict()
        assert sum(weights[key].shape != shape for key, shape in shapes.items()) == changed
        torch.save({"model": weights}, tmp_path / "w.pth")
        report = load_checkpoint(target, tmp_path / "w.pth")
        assert nothing_wrong(report), f"{name}: {report}"


def test_class_token_positions_are_kept_apart(tmp_path):
    source, target = randomised(FAMILIES["lit_ti"](64)), FAMILIES["lit_ti"](128)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_checkpoint(target, tmp_path / "w.pth")
    assert torch.equal(target.pos_embed4[:, 0], source.pos_embed4[:, 0])
    assert target.pos_embed4.shape[1] == 1 + 4 * 4


def test_tables_of_a_rectangular_network_are_left_out_with_a_warning(tmp_path):
    torch.save(FAMILIES["lit"]((64, 96)).state_dict(), tmp_path / "w.pth")
    target = FAMILIES["lit"](64)
    with pytest.warns(UserWarning, match=r"relative_position_bias_table \(77, 4\) in the file, \(49, 4\) here"):
        report = load_checkpoint(target, tmp_path / "w.pth", min_backbone_match=0.8)
    assert all(name.endswith("relative_position_bias_table") for name in report.mismatched)


# -- from classification to dense prediction --------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["segmentation", "detection"])
@pytest.mark.parametrize("family", DENSE)
def test_classifiers_load_into_pyramids(family, flavour, tmp_path):
    source, target = randomised(FAMILIES[family]()), DENSE[family](flavour=flavour)
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    report = load_checkpoint(target, tmp_path / "w.pth")
    first = {"segmentation": 0, "detection": 1}[flavour]
    norms = [f"norm{i}.{leaf}" for i in range(first, 4) for leaf in ("weight", "bias")]
    assert report.missing == ([] if family == "lit_ti" else norms)
    assert (report.unexpected, report.mismatched) == ([], {})
    token = {"cls_token"} if family == "lit_ti" else set()
    assert set(report.ignored) == {"head.weight", "head.bias", "norm.weight", "norm.bias"} | token
    assert "ignored" in str(report)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, actual = source.forward_stages(image), target.eval().forward_stages(image)
    if family == "lit_ti":
        expected, actual = expected[0][:3], actual[0][:3]  # stage 4 goes without class token
    if family == "lit":
        expected, actual = expected[:2], actual[:2]  # the tables of stages 3 and 4 are resized twice
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, b)


def test_tables_become_those_of_the_official_base_image(tmp_path):
    source = create("lit_s", num_classes=5)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    for flavour, sides in (("segmentation", (63, 31)), ("detection", (99, 49))):
        target = create_features("lit_s", flavour=flavour)
        report = load_checkpoint(target, tmp_path / "w.pth")
        assert report.mismatched == {}
        for stage, old, new in ((2, 27, sides[0]), (3, 13, sides[1])):
            name = f"layers.{stage}.blocks.1.attn.relative_position_bias_table"
            table = source.state_dict()[name].T.reshape(1, -1, old, old)
            expected = F.interpolate(table, size=(new, new), mode="bicubic", align_corners=False)[0].flatten(1).T
            torch.testing.assert_close(target.state_dict()[name], expected)


def test_detection_weights_start_a_segmentation_backbone(tmp_path):
    source, target = randomised(DENSE["lit"](flavour="detection")), DENSE["lit"](flavour="segmentation")
    torch.save({"state_dict": with_heads(source)}, tmp_path / "d.pth")
    report = load_checkpoint(target, tmp_path / "d.pth")
    assert report.missing == ["norm0.weight", "norm0.bias"]
    assert (report.unexpected, report.mismatched) == ([], {})
