"""Weights of whole networks: every layout leads to the same tensors, export is the way back."""

import pickle

import pytest
import torch
from safetensors.torch import load_file

from backbones import CheckpointError, create_features
from backbones.swin import SwinFeatures
from tasks.core.errors import UserError
from tasks.segmentation.faseg.network import FASegNetwork
from tasks.segmentation.semantic_fpn import SemanticFPNNetwork
from tasks.segmentation.weights import export_weights, load_weights, official_state_dict


def network(kind="swin", num_classes=5, **options):
    if kind == "swin":
        backbone = SwinFeatures(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=4)
    else:
        backbone = create_features(kind, norm="frozen")
    sizes = {"hidden_dim": 32, "mask_dim": 32, "num_queries": 4, "num_layers": 5, "encoder_layers": 1}
    return FASegNetwork(backbone, backbone.channels, num_classes, num_heads=4, dim_feedforward=16, **sizes, **options)


def equal(a, b):
    b = b.state_dict()
    return all(torch.equal(v, b[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("kind", ["swin", "resnet26"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_exported_weights_load_again(tmp_path, kind, suffix):
    source, target = network(kind), network(kind)
    assert not equal(source, target)
    export_weights(source, tmp_path / f"w{suffix}")
    report = load_weights(target, tmp_path / f"w{suffix}")
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], {})
    assert report.layout.startswith("official model")
    assert equal(source, target)
    assert [p.name for p in tmp_path.iterdir()] == [f"w{suffix}"]


def test_exported_names_are_official(tmp_path):
    export_weights(network(), tmp_path / "w.safetensors")
    names = load_file(tmp_path / "w.safetensors")
    assert "backbone.layers.0.downsample.reduction.weight" in names
    assert "backbone.layers.0.blocks.0.attn.relative_position_index" in names
    assert "sem_seg_head.predictor.query_feat.weight" in names
    assert names["criterion.empty_weight"].tolist() == pytest.approx([1, 1, 1, 1, 1, 0.1])


def old_names(state, pixel_decoder):
    renamed = {}
    for key, value in state.items():
        key = key.replace("query_feat", "static_query")
        renamed[key if pixel_decoder else key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")] = value
    return renamed


@pytest.mark.parametrize("layout", ["zoo pickle", "MaskFormer v1", "lightning", "network", "data parallel"])
def test_every_layout_of_a_whole_model(tmp_path, layout):
    source, target = network("resnet26"), network("resnet26")
    official, file = official_state_dict(source), tmp_path / "w.pth"
    if layout == "zoo pickle":
        arrays = {k: v.numpy() for k, v in old_names(official, True).items()}
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=2))
    elif layout == "MaskFormer v1":
        torch.save({"model": old_names(official, False)}, file)
    elif layout == "lightning":
        state = {f"network.{k}": v for k, v in source.state_dict().items()}
        torch.save({"state_dict": state | {"metrics.confusion": torch.zeros(1)}, "epoch": 1}, file)
    elif layout == "network":
        torch.save(source.state_dict(), file)
    else:
        torch.save({"model": {f"module.{k}": v for k, v in official.items()}}, file)
    report = load_weights(target, file)
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], {})
    assert equal(source, target)


@pytest.mark.parametrize(
    "make", [lambda: network("resnet18"), lambda: SemanticFPNNetwork(create_features("resnet18"), 5)]
)
def test_a_backbone_alone_fills_the_backbone(tmp_path, make):
    import timm

    model = timm.create_model("resnet18")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "b.pth")
    target = make()
    report = load_weights(target, tmp_path / "b.pth")
    assert report.layout == "backbone alone, timm or torchvision names"
    assert not [name for name in report.missing if name.startswith("backbone.")]
    assert torch.equal(target.backbone.body.conv1.weight, model.conv1.weight)


def test_other_classes_keep_everything_but_the_classifier(tmp_path):
    export_weights(network(num_classes=7), tmp_path / "w.pth")
    target = network(num_classes=5)
    with pytest.warns(UserWarning, match=r"decoder\.class_embed\.weight \(8, 32\) in the file, \(6, 32\) here"):
        report = load_weights(target, tmp_path / "w.pth")
    assert set(report.mismatched) == {"decoder.class_embed.weight", "decoder.class_embed.bias"}
    assert report.missing == []


def test_mask2former_weights_start_a_faseg_network(tmp_path):
    plain = network(dynamic_queries=False, high_resolution=False, conditional_positions=False)
    export_weights(plain, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"decoder\.level_embed\.weight"):
        report = load_weights(network(), tmp_path / "w.pth")
    assert {name.split(".")[1] for name in report.missing} == {"pos_conv", "input_proj", "query_pos_mlp"}


def test_weights_of_another_model_are_refused(tmp_path):
    export_weights(network("resnet26"), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth does not fit: 0 of \d+ backbone tensors found"):
        load_weights(network(), tmp_path / "w.pth")


def test_exports_that_have_no_official_name(tmp_path):
    for name in ("resnet18", "lit_s"):
        with pytest.raises(UserError, match="must be a bottleneck ResNet or a Swin"):
            export_weights(network(name), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.onnx: exported weights are written as"):
        export_weights(network(), tmp_path / "w.onnx")
