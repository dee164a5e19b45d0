"""Frugal's backbones as OpenMMLab builds, initialises, freezes and trains them."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine", reason="the extra openmmlab is not installed")


@pytest.fixture(scope="module", autouse=True)
def registries():
    from mmengine.logging import MMLogger

    from tasks.core.openmmlab import install

    install()
    MMLogger.get_current_instance().setLevel("WARNING")


def build(**settings):
    from mmengine.registry import MODELS

    return MODELS.build({"type": "FrugalBackbone", **settings})


@pytest.mark.parametrize("name", ["lit_ti", "pvt_v2_b0_ecoformer", "test_resnet"])
def test_maps_equal_those_of_create_features(name):
    from backbones import create_features

    plain, backbone = create_features(name), build(name=name)
    backbone.features.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    maps = backbone.eval()(image)
    assert isinstance(maps, tuple)
    assert [m.shape[1] for m in maps] == backbone.channels == plain.channels
    assert backbone.strides == [4, 8, 16, 32]
    for result, expected in zip(maps, plain.eval()(image), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["lit_ti", "test_resnet"])
def test_out_indices_and_gradients(name):
    backbone = build(name=name, out_indices=(1, 3))
    assert len(backbone.channels) == len(backbone.strides) == 2
    maps = backbone(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == backbone.channels
    sum(m.square().sum() for m in maps).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_frozen_norms():
    backbone = build(name="test_resnet", norm="frozen").train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))[-1].sum().backward()
    assert before
    assert all(torch.equal(before[name], value) for name, value in backbone.named_buffers())


def test_arguments_of_the_network():
    rates = [m.drop_prob for m in build(name="lit_ti", drop_path_rate=0.3).modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


def test_flavour():
    from backbones import create_features

    keys = [set(create_features("lit_s", flavour=flavour).state_dict()) for flavour in ("segmentation", "detection")]
    assert keys[0] != keys[1]
    for flavour, expected in zip(("segmentation", "detection"), keys, strict=True):
        assert set(build(name="lit_s", flavour=flavour).features.state_dict()) == expected


def test_network_without_a_pyramid():
    with pytest.raises(ValueError, match="'hvt_ti_1' has no feature pyramid"):
        build(name="hvt_ti_1")


def test_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match="nearest names: litv2_s"):
        build(name="litv2_ss")


def test_initial_weights_stay_without_init_cfg():
    torch.manual_seed(0)
    backbone = build(name="test_resnet")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.init_weights()
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_pretrained_file(tmp_path):
    from backbones import create

    path = tmp_path / "classifier.pth"
    network = create("lit_ti")
    torch.save({"model": network.state_dict()}, path)
    backbone = build(name="lit_ti", init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    backbone.init_weights()
    weights = dict(network.named_parameters())
    copied = [name for name, p in backbone.features.named_parameters() if name in weights and p.equal(weights[name])]
    assert len(copied) > 0.9 * len(list(backbone.parameters()))
    assert backbone.init_cfg == {"type": "Pretrained", "checkpoint": str(path)}


def test_part_of_a_checkpoint_of_openmmlab(tmp_path):
    from backbones.checkpoint import CheckpointError

    path = tmp_path / "detector.pth"
    trained = build(name="test_resnet")
    state = {f"backbone.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"meta": {"epoch": 1}, "state_dict": {**state, "neck.weight": torch.zeros(1)}}, path)
    init_cfg = {"type": "Pretrained", "checkpoint": str(path), "prefix": "backbone."}
    backbone = build(name="test_resnet", init_cfg=init_cfg)
    backbone.init_weights()
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in backbone.state_dict().items())
    other = build(name="test_resnet", init_cfg=init_cfg | {"prefix": "neck"})
    with pytest.raises(CheckpointError, match=r"detector.pth has no neck.features\."):
        other.init_weights()


class Attack:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_files_never_run_code(tmp_path, capsys):
    """mmengine's own loader falls back to unpickling whatever is in a file; this one refuses it."""
    from backbones.checkpoint import CheckpointError

    path = tmp_path / "attack.pth"
    torch.save({"state_dict": Attack()}, path)
    for prefix in ({}, {"prefix": "backbone."}):
        backbone = build(name="test_resnet", init_cfg={"type": "Pretrained", "checkpoint": str(path), **prefix})
        with pytest.raises(CheckpointError, match=r"attack.pth"):
            backbone.init_weights()
    assert "this must not run" not in capsys.readouterr().out
