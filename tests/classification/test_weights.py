"""Weight files of classifiers: our checkpoints, timm's and official names; a head for other classes is left out."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from backbones import CheckpointError
from backbones.checkpoint import rename
from backbones.keys import TO_OFFICIAL_SWIN
from tasks.classification.module import Classification
from tasks.classification.weights import load_weights


def equal(a, b, but=()):
    b = b.state_dict()
    return all(torch.equal(value, b[name]) for name, value in a.state_dict().items() if name not in but)


def networks(name, classes=(10, 10), **options):
    return [timm.create_model(name, num_classes=count, **options) for count in classes]


def test_a_checkpoint_of_ours(tmp_path):
    source, target = (Classification(10, "test_vit2", img_size=32) for _ in range(2))
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "best.ckpt")
    assert not equal(source.network, target.network)
    report = load_weights(target.network, tmp_path / "best.ckpt")
    assert (report.layout, report.missing, report.unexpected) == ("our checkpoint", [], [])
    assert equal(source.network, target.network)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2"])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}])
def test_weights_of_timm(tmp_path, name, wrap):
    source, target = networks(name)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    assert load_weights(target, tmp_path / "w.pth").missing == []
    assert equal(source, target)


def test_official_names_of_swin(tmp_path):
    options = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    source, target = networks("swin_tiny_patch4_window7_224", **options)
    state = {name.replace("head.fc.", "head."): value for name, value in source.state_dict().items()}
    official = rename(state, TO_OFFICIAL_SWIN)
    assert "layers.0.downsample.norm.weight" in official
    torch.save({"model": official}, tmp_path / "swin.pth")
    report = load_weights(target, tmp_path / "swin.pth")
    assert report.layout == "official Swin names"
    assert equal(source, target, but=("head.fc.weight", "head.fc.bias"))


@pytest.mark.parametrize("name", ["litv2_s", "hvt_s_1"])
def test_our_networks(tmp_path, name):
    options = {
        "litv2_s": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        "hvt_s_1": {"patch_size": 4, "img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2},
    }[name]
    source, target = networks(name, **options)
    torch.save({"model": source.state_dict(), "epoch": 299}, tmp_path / "official.pth")
    report = load_weights(target, tmp_path / "official.pth")
    assert (report.missing, report.unexpected) == ([], [])
    assert equal(source, target)


def test_a_head_for_other_classes_is_left_out_with_a_warning(tmp_path):
    source, target = networks("test_resnet", (10, 4))
    head = target.fc.weight.detach().clone()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=r"not loaded because of their shape: fc.weight \(10, \d+\) in the file"):
        report = load_weights(target, tmp_path / "w.safetensors")
    assert set(report.mismatched) == {"fc.weight", "fc.bias"}
    assert torch.equal(target.fc.weight, head)
    assert equal(source, target, but=("fc.weight", "fc.bias"))


def test_position_tables_of_another_image_size_are_resized(tmp_path):
    source, target = timm.create_model("test_vit2", img_size=64), Classification(1000, "test_vit2", img_size=32)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert source.pos_embed.shape != target.network.pos_embed.shape
    report = load_weights(target.network, tmp_path / "w.pth")
    assert (report.missing, report.mismatched) == ([], {})


def test_weights_of_another_network(tmp_path):
    source, target = networks("test_resnet")[0], networks("test_vit2")[0]
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w.pth does not fit"):
        load_weights(target, tmp_path / "w.pth")


def test_a_module_starts_from_a_file(tmp_path, monkeypatch):
    source = timm.create_model("test_vit2", num_classes=10, img_size=32)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    calls = []
    original = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **options: calls.append(options) or original(*args, **options)
    )
    # what a file replaces is not downloaded
    model = Classification(10, "test_vit2", img_size=32, pretrained=True, weights=str(tmp_path / "w.pth"))
    assert equal(source, model.network)
    assert not any(call.get("pretrained") for call in calls)
    assert "weights" not in model.hparams
