"""Weight files: containers, refusals, renaming, and loading what fits."""

import argparse
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from backbones import CheckpointError, create_features, load_checkpoint
from backbones.checkpoint import read_content, read_state_dict, rename
from backbones.keys import DETECTRON2_RESNET, TO_DETECTRON2_RESNET, TO_OFFICIAL_SWIN, prefixed
from backbones.swin import SwinFeatures

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def arrays(order="C"):
    return {k: np.array(v.numpy(), order=order) for k, v in WEIGHTS.items()}


def same(found):
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[k], v) for k, v in WEIGHTS.items())


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "trainer": {"iteration": 3, "hooks": {"best": np.float64(0.5)}}, "iteration": 3},
        {"state_dict": WEIGHTS, "hyper_parameters": {"lr": 0.1}, "epoch": 3},
        {"state_dict": WEIGHTS, "args": argparse.Namespace(model="x", lr=0.1)},
        {"model": {"a.weight": torch.zeros(1)}, "model_ema": WEIGHTS},
        {"model": {f"module.{k}": v for k, v in WEIGHTS.items()}},
        {f"module._orig_mod.{k}": v for k, v in WEIGHTS.items()},
    ],
    ids=["bare", "detectron2", "lightning", "timm", "average", "data parallel", "compiled"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_containers(tmp_path, content, zipped):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(tmp_path / "w.pth"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_arrays(tmp_path, protocol, order):
    content = {"model": arrays(order), "__author__": "someone", "score": np.float32(1)}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    assert same(read_state_dict(tmp_path / "w.pkl"))


def test_pickles_of_tensors(tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": WEIGHTS, "matching_heuristics": True}))
    assert same(read_state_dict(tmp_path / "w.pkl"))


def test_safetensors_by_content_not_by_name(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.bin")
    assert same(read_state_dict(tmp_path / "w.bin"))


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "hidden in a tensor"])
def test_code_in_a_file_is_named_and_never_runs(tmp_path, kind):
    evidence, file = tmp_path / "ran", tmp_path / "evil.pth"
    content = {"model": WEIGHTS, "hook": Payload(evidence)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content))
    elif kind == "hidden in a tensor":
        inner = tmp_path / "inner"
        torch.save(Payload(evidence), inner)

        class Storage:
            def __reduce__(self):
                return torch.storage._load_from_bytes, (inner.read_bytes(),)

        file.write_bytes(pickle.dumps({"model": Storage()}))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.pth was refused: reading it would call posix\.system"):
        read_state_dict(file)
    assert not evidence.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_mmengine_keeps_beside_the_weights_is_read_and_nothing_of_it_is_constructed(tmp_path, zipped):
    logging = pytest.importorskip("mmengine.logging")
    config = pytest.importorskip("mmengine.config")
    hub = logging.MessageHub("a training")
    hub.update_scalar("train/loss", 1.5)
    hub.update_info("iter", np.int64(3))
    content = {
        "meta": {"epoch": 12, "dataset_meta": config.ConfigDict(CLASSES=("wall",)), "best": np.float32(0.5)},
        "state_dict": WEIGHTS,
        "message_hub": hub.state_dict(),
        "hub": hub,  # earlier releases saved the object itself
        "param_schedulers": [{"base_values": np.array([1e-4, 1e-5])}],
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(tmp_path / "w.pth"))
    found = read_content(tmp_path / "w.pth")
    assert found["meta"] == {"epoch": 12, "dataset_meta": {"CLASSES": ("wall",)}, "best": 0.5}
    assert not isinstance(found["meta"]["dataset_meta"], config.ConfigDict)
    assert found["message_hub"]["runtime_info"]["iter"] == 3
    assert found["param_schedulers"][0]["base_values"].tolist() == [1e-4, 1e-5]
    for unwanted in (found["message_hub"]["log_scalars"]["train/loss"], found["hub"]):
        assert not isinstance(unwanted, logging.HistoryBuffer | logging.MessageHub)
        assert vars(unwanted) == {}


def test_getattr_of_a_file_gets_nothing_and_cannot_be_called(tmp_path):
    evidence = tmp_path / "ran"

    class Step:
        def __init__(self, call, *arguments):
            self.reduced = call, arguments

        def __reduce__(self):
            return self.reduced

        def __call__(self):
            """Pickle asks this of whatever it is to call when the file is read."""

    looked_up = Step(getattr, torch.serialization._get_layout, "__globals__")
    torch.save({"a": torch.ones(1), "x": looked_up}, tmp_path / "w.pth")
    assert vars(read_content(tmp_path / "w.pth")["x"]) == {}
    torch.save({"a": torch.ones(1), "x": Step(looked_up, f"touch {evidence}")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth was refused: reading it would call what it looks up itself"):
        read_content(tmp_path / "evil.pth")
    assert not evidence.exists()


def damaged(path, kind):
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=kind == "half a zip")
    content = path.read_bytes()
    if kind == "half a safetensors":
        save_file({"a": torch.randn(1000)}, path)
        content = path.read_bytes()
    path.write_bytes({"text": b"<html>not found</html>", "empty": b""}.get(kind, content[: len(content) // 2]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("half a zip", "is damaged or incomplete"),
        ("half a legacy file", "is damaged or incomplete"),
        ("half a safetensors", "is damaged or incomplete"),
        ("text", "is not a weight file .*<html>not found"),
        ("empty", "is not a weight file"),
    ],
)
def test_unusable_files(tmp_path, kind, message):
    damaged(tmp_path / "w.pth", kind)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state_dict(tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_pickle(tmp_path):
    whole = pickle.dumps({"model": arrays()})
    (tmp_path / "w.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"w\.pkl is damaged or incomplete"):
        read_state_dict(tmp_path / "w.pkl")


def test_folders_missing_files_and_other_content(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match=r"none\.pth: no such weight file"):
        read_state_dict(tmp_path / "none.pth")
    torch.save(torch.ones(2), tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match="holds a Tensor; a state dict was expected"):
        read_state_dict(tmp_path / "t.pth")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "n.pth")
    with pytest.raises(CheckpointError, match="holds no tensors; its keys are epoch, lr"):
        read_state_dict(tmp_path / "n.pth")


def test_rename_applies_rows_in_order_drops_and_refuses_collisions():
    state = {"x.1.w": torch.zeros(1), "x.2.w": torch.ones(1), "index": torch.zeros(1)}
    table = [(r"^x\.2\.", "y.3."), (r"^x\.1\.", "y.2."), (r"^index$", None)]
    assert list(rename(state, table)) == ["y.2.w", "y.3.w"]
    with pytest.raises(CheckpointError, match=r"x\.1\.w and x\.2\.w are both renamed to z\.w"):
        rename(state, [(r"^x\.\d\.", "z.")])


def test_prefixed_tables_leave_other_keys_alone():
    state = {"backbone.stem.conv1.norm.bias": torch.zeros(1), "stem.conv1.weight": torch.zeros(1)}
    renamed = rename(state, prefixed(DETECTRON2_RESNET, "backbone."))
    assert list(renamed) == ["backbone.body.bn1.bias", "stem.conv1.weight"]


def filled(features):
    return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in features.state_dict().items()}


def test_a_detectron2_resnet_loads(tmp_path):
    features = create_features("resnet26", norm="frozen")
    wanted = filled(features)
    official = rename(wanted, TO_DETECTRON2_RESNET)
    assert "stem.conv1.norm.weight" in official
    assert "res2.0.shortcut.norm.running_var" in official
    numpy_weights = {k: v.numpy() for k, v in official.items()}
    (tmp_path / "R.pkl").write_bytes(pickle.dumps({"model": numpy_weights, "matching_heuristics": True}))
    report = load_checkpoint(features, tmp_path / "R.pkl")
    assert report.layout == "detectron2 ResNet names"
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], {})
    assert all(torch.equal(v, wanted[k]) for k, v in features.state_dict().items())


def test_timm_and_torchvision_names_load_and_the_classifier_is_reported(tmp_path):
    model = timm.create_model("resnet18", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "r.pth")
    features = create_features("resnet18", norm="frozen")
    report = load_checkpoint(features, tmp_path / "r.pth")
    assert report.missing == []
    assert report.unexpected == ["body.fc.weight", "body.fc.bias"]
    torch.testing.assert_close(features.body.layer4[1].conv2.weight, model.layer4[1].conv2.weight)


def test_names_of_timm_feature_lists_load(tmp_path):
    flat = timm.create_model("convnext_atto", features_only=True)
    assert any(name.startswith("stages_0.") for name in flat.state_dict())
    torch.save(flat.state_dict(), tmp_path / "c.pth")
    report = load_checkpoint(create_features("convnext_atto"), tmp_path / "c.pth")
    assert [name for name in report.missing if "stages" in name] == []


def small_swin(window_size=4):
    return SwinFeatures(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=window_size)


def test_official_swin_names_load_with_their_merging_one_stage_earlier(tmp_path):
    features = small_swin()
    wanted = filled(features)
    official = rename(wanted, TO_OFFICIAL_SWIN)
    official["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    assert official["layers.0.downsample.norm.weight"].shape == (32,)
    torch.save({"model": official}, tmp_path / "s.pth")
    report = load_checkpoint(features, tmp_path / "s.pth")
    assert report.layout == "official Swin names"
    assert (report.missing, report.unexpected) == ([], [])
    assert all(torch.equal(v, wanted[k]) for k, v in features.state_dict().items())


def test_position_tables_of_another_window_are_resized(tmp_path):
    source, target = small_swin(4), small_swin(7)
    torch.save(source.state_dict(), tmp_path / "s.pth")
    report = load_checkpoint(target, tmp_path / "s.pth")
    assert report.mismatched == {}
    table = target.layers[1].blocks[0].attn.relative_position_bias_table
    assert table.shape == (169, 2)
    centre = source.layers[1].blocks[0].attn.relative_position_bias_table[24]
    torch.testing.assert_close(table[84], centre, rtol=1e-3, atol=1e-3)  # zero offset stays zero offset


class Network(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
        self.head = nn.Linear(4, num_classes)


def test_a_head_of_other_classes_is_left_out_with_a_warning(tmp_path):
    source, target = Network(5), Network(3)
    torch.save(source.state_dict(), tmp_path / "n.pth")
    before = target.head.weight.clone()
    with pytest.warns(UserWarning, match=r"head\.weight \(5, 4\) in the file, \(3, 4\) here"):
        report = load_checkpoint(target, tmp_path / "n.pth")
    assert report.mismatched == {"head.weight": ((5, 4), (3, 4)), "head.bias": ((5,), (3,))}
    assert torch.equal(target.head.weight, before)
    assert torch.equal(target.backbone[9].weight, source.backbone[9].weight)


def test_a_file_that_does_not_fit_raises_before_anything_changes(tmp_path):
    source, target = Network(), Network()
    kept = {
        k: v
        for k, v in source.state_dict().items()
        if k not in ("backbone.8.bias", "backbone.9.weight", "backbone.9.bias")
    }
    torch.save(kept | {"other.weight": torch.ones(1)}, tmp_path / "n.pth")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    message = (
        r"n\.pth does not fit: 17 of 20 backbone tensors found, 90% needed; not found: backbone\.8\.bias.*"
        r"in the file but unused: other\.weight"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(target, tmp_path / "n.pth")
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())
    assert len(load_checkpoint(target, tmp_path / "n.pth", min_backbone_match=0.8).loaded) == 19


def test_the_report_prints_counts_and_first_names(tmp_path):
    state = Network().state_dict()
    del state["head.weight"]
    torch.save(state | {f"extra.{i}": torch.ones(1) for i in range(5)}, tmp_path / "n.pth")
    text = str(load_checkpoint(Network(), tmp_path / "n.pth"))
    lines = text.splitlines()
    assert lines[0] == f"{tmp_path / 'n.pth'} (our names)"
    assert lines[1].split() == ["loaded", "21"]
    assert lines[2].split() == ["missing", "1", "head.weight"]
    assert lines[3].split()[:2] == ["unexpected", "5"]
    assert lines[3].endswith("extra.0, extra.1, extra.2, … 2 more")
