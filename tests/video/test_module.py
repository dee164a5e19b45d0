"""The LightningModule of temporal action detection: training step, evaluation, predictions, weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from backbones.checkpoint import CheckpointError, rename
from backbones.stpt import STPT
from tasks.core.errors import UserError
from tasks.video.afsd.keys import OFFICIAL_HEAD_KEYS
from tasks.video.module import TemporalActionDetection
from tasks.video.predictions import window_key
from tasks.video.segments import SegmentTable
from tasks.video.video_labels import VideoLabels
from tasks.video.weights import load_weights

TINY_STPT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
CLASSES = ["jump", "run", "sit"]


def module_for(**options):
    torch.manual_seed(0)
    options = {"num_classes": 3, "image_size": 32, "backbone_options": TINY_STPT, "dim": 64, "num_levels": 3, **options}
    module = TemporalActionDetection(**options)
    module.log = lambda *args, **kwargs: logged.append(args)
    logged = module.logged = []
    module._trainer = SimpleNamespace(
        callbacks=[],
        datamodule=SimpleNamespace(
            num_classes=3, class_names=CLASSES, splits=("train", "val"), clip_length=16, crop_size=32, feature_dim=None,
            frames_per_feature=1, thumbnails=lambda id, count: None,
            ground_truth=lambda split: SegmentTable.from_rows(
                [("a", "jump", 0.0, 1.0, 1.0), ("b", "run", 0.5, 1.5, 1.0)], ("a", "b"), CLASSES
            ),
        ),
    )  # fmt: skip
    return module


def batch_for(features=False, valid=(True, False)):
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 3, 16, 32, 32), dtype=torch.uint8, generator=generator)
    name = "features" if features else "clip"
    inputs = torch.randn(2, 6, 4, generator=generator) if features else clips
    masks = torch.zeros(2, 16)
    masks[:, 3:6] = 1
    return {
        "id": ["a", "b"], name: inputs, "offset": [0, 8], "fps": [10.0, 5.0], "duration": [2.0, 4.0], "valid": [16, 12],
        "segments": [torch.tensor([[2.0, 14]]), torch.zeros(0, 2)],
        "labels": [torch.tensor([1]), torch.zeros(0, dtype=torch.long)],
        "start_mask": masks, "end_mask": masks.flip(1),
        f"triplet_{name}": inputs.flip(2), "triplet_valid": torch.tensor(valid),
        "triplet_segments": torch.tensor([[[2.0, 7], [9, 14], [8, 9]], [[0.0, 0], [0, 0], [0, 0]]]),
    }  # fmt: skip


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["stpt", "i3d", "test_resnet", "features"])
def test_a_step_trains_every_parameter(backbone):
    options = {
        "stpt": {},
        "i3d": {"backbone_options": {"width": 0.05}},
        "test_resnet": {"backbone_options": {}, "grad_checkpointing": True},
        "features": {"feature_dim": 6, "frames_per_feature": 4},
    }[backbone]
    module = module_for(**{**({} if backbone == "features" else {"backbone": backbone}), **options})
    loss = module.training_step(batch_for(backbone == "features"), 0)
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    terms = ["loc", "conf", "prop_loc", "prop_conf", "quality", "start", "end", "triplet"]
    assert [name for name, _ in module.logged] == ["train/loss", *(f"train/loss_{term}" for term in terms)]


def test_steps_without_spliced_clips_and_instances():
    """Processes of one training must not differ in the parameters that get a gradient."""
    module, batch = module_for(), batch_for(valid=(False, False))
    batch["segments"], batch["labels"] = [torch.zeros(0, 2)] * 2, [torch.zeros(0, dtype=torch.long)] * 2
    module.training_step(batch, 0).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    assert "train/loss_triplet" not in [name for name, _ in module.logged]
    for name in [name for name in batch if name.startswith("triplet")]:
        del batch[name]
    assert module.training_step(batch, 0).isfinite()


def test_steps_without_classes(tmp_path):
    module = module_for(class_agnostic=True, class_scores=str(scores_file(tmp_path)))
    assert module.network.head.num_classes == 1
    assert module.training_step(batch_for(), 0).isfinite()


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_detections_are_in_seconds():
    module, batch = module_for().eval(), batch_for()
    module.post_processing.score_threshold = 0.0
    with torch.no_grad():
        (a, _, first), (b, offset, second) = module.detections(batch)
    assert (a, b, offset) == ("a", "b", 8.0)
    assert first["segments"].min() >= 0
    assert first["segments"].max() <= 16 / 10
    assert second["segments"].min() >= 8 / 5
    assert second["segments"].max() <= 24 / 5
    points = 4 + 2 + 1
    assert np.bincount(first["labels"]).tolist() == [points] * 3
    assert list(module.detections({"id": []})) == []


def test_frames_behind_the_end_of_a_video(monkeypatch):
    """The pixels that the backbone sees: the second clip has 12 frames."""
    batch = batch_for(valid=(False, False))
    for options, expected in (
        ({}, (-1, -1)),
        ({"padding": 127.5}, (0, 0)),
        ({"eval_padding": 255.0}, (-1, 1)),
    ):
        module, seen = module_for(**options), []
        module.network.backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        batch["clip"][1, :, 12:] = 0
        with torch.no_grad():
            module.training_step(batch, 0)
            list(module.detections(batch))
        assert tuple(clips[1, :, 12:].unique().item() for clips in seen) == expected
        for clips in seen:
            assert torch.equal(clips[0], batch["clip"][0] / 127.5 - 1)


def test_evaluation_and_predictions():
    module, batch = module_for().eval(), batch_for()
    module.setup("validate")
    with torch.no_grad():
        module.evaluation_step(batch, "val")
        results = module.evaluation_results("val")
        records = module.predict_step(batch, 0)
    assert {"mAP", "mAP@0.30", "mAP@0.70", "AR@10"} <= results.keys()
    assert all(0 <= float(value) <= 1 for value in results.values())
    assert list(records) == [window_key("a", 0), window_key("b", 8)]
    files = dict(module.prediction_files(records))
    assert files.keys() == {"predictions.json", *(f"{id}.{kind}" for id in "ab" for kind in ("csv", "srt", "png"))}
    assert json.loads(files["predictions.json"])["results"].keys() == {"a", "b"}
    assert module.example_input().shape == (1, 3, 16, 32, 32)


def scores_file(folder, scores=None, names=("sit", "run", "jump", "other")):
    path = folder / "scores.json"
    path.write_text(json.dumps({"class": names, "results": scores or {"a": [0.1, 0.2, 0.6, 0.1]}}))
    return path


def test_detections_get_the_class_of_their_video(tmp_path):
    module = module_for(class_agnostic=True, class_scores=str(scores_file(tmp_path)), clip_to_video=True)
    module.setup("validate")
    module._durations["a"] = 2.0
    record = {"segments": np.array([[1.0, 3], [4, 5]]), "scores": np.array([0.5, 0.25]), "labels": np.array([0, 0])}
    found = module.merge_detections("a", record)
    assert found["labels"].tolist() == [0]
    np.testing.assert_allclose(found["scores"], [0.3])
    assert found["segments"].tolist() == [[1, 2]]
    with pytest.raises(UserError, match="has no video 'b'"):
        module.merge_detections("b", record)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has no 'class' and 'results'"),
        ('{"class": ["a"], "results": {"v": [1, 2]}}', "2 scores of 'v'; expected 1"),
    ],
)
def test_wrong_class_scores(tmp_path, content, message):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UserError, match=message):
        VideoLabels.read(tmp_path / "scores.json")
    with pytest.raises(UserError, match=r"model\.class_scores: .* cannot be read"):
        VideoLabels.read(tmp_path / "none.json")
    labels = VideoLabels.read(scores_file(tmp_path))
    with pytest.raises(UserError, match="has no class 'swim'"):
        labels.arrange(["run", "swim"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "stpd"}, "model.backbone: unknown backbone 'stpd'"),
        ({"backbone_options": {"widht": 1}}, "model.backbone_options: 'stpt' cannot be made"),
        ({"dim": 96}, "model.dim=96"),
        ({"num_classes": 0}, "model.num_classes"),
        ({"padding": 256}, "model.padding: 256"),
        ({"class_scores": "x.json"}, "expected class_agnostic too"),
        ({"loss": {"level_ranges": [(0, 1)]}}, "model.loss.level_ranges"),
        ({"post_processing": {"sigma": -1}}, "sigma"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        module_for(**options)


def test_classes_must_be_those_of_the_data():
    with pytest.raises(UserError, match=r"model\.num_classes: 4"):
        module_for(num_classes=4).setup("fit")
    with pytest.raises(UserError, match="must name a file"):
        module_for(class_agnostic=True).setup("validate")


# -- weights ----------------------------------------------------------------------------------------------------------


def official_names(state):
    """Names of the official release, found by trying: each of ours comes from exactly one."""
    head, level = "coarse_pyramid_detection", {f"head.pyramid.levels.{i}": f"pyramids.{i}" for i in range(3)}
    parts = {
        **level, "head.loc_branch": "loc_proposal_branch", "head.conf_branch": "conf_proposal_branch",
        ".short.": ".cur_point_conv.", ".boundary.": ".lr_conv.", ".frame.": ".roi_conv.", ".fuse.": ".proposal_conv.",
        "head.quality_head": "center_head", **{f"head.frame_feature.layers.{i}": f"deconv@{i}" for i in range(3)},
    }  # fmt: skip
    official = {}
    for name, tensor in state.items():
        new = name
        for ours, theirs in parts.items():
            new = new.replace(ours, theirs)
        if name.startswith("head.scales."):
            new = f"loc_heads.{name.rpartition('.')[2]}.scale"
        new = new.removeprefix("head.")
        if new.startswith("deconv@"):
            _, i, kind, end = new.replace("@", ".").split(".")
            new = f"deconv.{3 * int(i) + (kind == 'norm')}." + ("conv1d." if kind == "conv" else "") + end
        elif ".conv." in new:
            new = new.replace(".conv.", ".0.conv3d." if tensor.ndim == 5 or ".0.conv" in new else ".0.conv1d.")
        elif ".norm." in new:
            new = new.replace(".norm.", ".1.")
        elif "_head." in new:
            new = new.replace("_head.", "_head.conv1d.")
        official[f"{head}.{new}"] = tensor
    return official


def test_official_checkpoints(tmp_path):
    source = module_for(backbone="i3d", backbone_options={"width": 0.05}).network
    state = source.state_dict()
    head = official_names({name: tensor for name, tensor in state.items() if name.startswith("head.")})
    backbone = {name.replace("backbone.", "backbone._model."): t for name, t in state.items() if "backbone." in name}
    assert rename({**head, **backbone}, OFFICIAL_HEAD_KEYS).keys() == state.keys()
    torch.save({**head, **backbone}, tmp_path / "checkpoint-15.ckpt")
    other = module_for(backbone="i3d", backbone_options={"width": 0.05}).network
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    report = load_weights(other, tmp_path / "checkpoint-15.ckpt")
    assert (report.layout, report.missing, report.unexpected) == ("official AFSD", [], [])
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_own_checkpoints_and_backbones(tmp_path):
    module = module_for()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "own.ckpt")
    assert load_weights(module_for().network, tmp_path / "own.ckpt").layout == "our checkpoint"
    classifier = STPT(num_classes=5, **TINY_STPT).state_dict()
    torch.save({"state_dict": {f"network.{name}": x for name, x in classifier.items()}}, tmp_path / "classifier.ckpt")
    save_file(classifier, tmp_path / "stpt.safetensors")
    for file, layout in (
        ("classifier.ckpt", "checkpoint of our classifier"),
        ("stpt.safetensors", "backbone alone, our names"),
    ):
        network = module_for(weights=str(tmp_path / file)).network
        assert torch.equal(network.backbone.stages[0].embed.proj.weight, classifier["stages.0.embed.proj.weight"])
        report = load_weights(network, tmp_path / file)
        assert report.layout == layout
        assert not report.unexpected
    images = module_for(backbone="test_resnet", backbone_options={}).network
    save_file(images.backbone.features.body.state_dict(), tmp_path / "resnet.safetensors")
    report = load_weights(images, tmp_path / "resnet.safetensors")
    assert report.layout == "backbone of images, timm or torchvision names"
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(images, tmp_path / "other.safetensors")


def test_checkpoints_need_nothing_else(tmp_path):
    module = module_for(loss={"loc_weight": 2.0}, post_processing={"sigma": 0.7}, weights=None)
    torch.save(
        {
            "state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams),
            "pytorch-lightning_version": "2.6.6",
        },
        tmp_path / "last.ckpt",
    )  # fmt: skip
    again = TemporalActionDetection.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.loss.loc_weight == 2
    assert again.post_processing.sigma == 0.7
    assert torch.equal(again.network.head.scales[0], module.network.head.scales[0])
