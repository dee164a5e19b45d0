"""Classification of clips: training step, evaluation over views, predictions, and weights for a detector."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tasks.core.errors import UserError
from tasks.video.classification import VideoClassification
from tasks.video.module import TemporalActionDetection

TINY_STPT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
CLASSES = ["jump", "run", "sit"]


def module_for(**options):
    torch.manual_seed(0)
    module = VideoClassification(**{"num_classes": 3, "backbone_options": TINY_STPT, **options})
    module.log = lambda *args, **kwargs: None
    data = SimpleNamespace(num_classes=3, class_names=CLASSES, clip_length=8, crop_size=32)
    module._trainer = SimpleNamespace(callbacks=[], datamodule=data)
    return module


def batch_for(size=3):
    clips = torch.randint(0, 256, (size, 3, 8, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"id": [f"v{i // 2}" for i in range(size)], "view": [i % 2 for i in range(size)], "clip": clips,
            "label": torch.arange(size) // 2}  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"mixup": 0, "cutmix": 0}, {"backbone": "i3d", "backbone_options": {"width": 0.05}}]
)
def test_a_step_trains_every_parameter(options):
    module = module_for(**options).train()
    module.training_step(batch_for(), 0).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("options", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}])
def test_mixed_clips(options):
    """All frames are mixed alike, the last clip of an odd batch is not, and targets are probabilities."""
    module, clips = module_for(**options), torch.zeros(3, 2, 4, 8, 8)
    clips[0] = 1
    np.random.seed(0)  # noqa: NPY002 (timm's mixup draws from the global generator)
    mixed, targets = module._mixed(clips.clone(), torch.tensor([0, 1, 2]))
    assert torch.equal(mixed[2], clips[2])
    assert torch.equal(mixed[0], mixed[0, :1, :1].expand_as(mixed[0]))
    share = mixed[0].mean().item()
    assert 0 < share < 1
    smooth = 0.1 / 3
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    torch.testing.assert_close(targets[0, 0].item(), share * 0.9 + smooth)
    torch.testing.assert_close(targets[2], torch.tensor([smooth, smooth, 0.9 + smooth]))


def test_views_of_a_video_are_averaged(monkeypatch):
    module = module_for()
    scores = torch.tensor([[3.0, 0, 0], [0, 5.0, 0], [0, 0, 9.0]]).log_softmax(1)
    monkeypatch.setattr(module.network, "forward", lambda clips: scores)
    module.evaluation_step(batch_for(), "val")
    module.evaluation_step({"id": []}, "val")
    # v0 has label 0 but its second view is surer of class 1; v1 has label 1 and is surely class 2
    results = module.evaluation_results("val")
    assert results == {"top1": 0.0, "top5": 100.0}
    scores[1] = torch.tensor([1.0, 0, 0]).log_softmax(0)
    module.evaluation_step(batch_for(), "val")
    assert module.evaluation_results("val")["top1"] == 50.0
    records = module.predict_step(batch_for(), 0)
    assert list(records) == ["v0@0000", "v0@0001", "v1@0000"]
    ((name, content),) = module.prediction_files(records)
    rows = content.decode().splitlines()
    assert name == "predictions.csv"
    assert rows[0] == "video,class_1,probability_1,class_2,probability_2,class_3,probability_3"
    assert rows[1].startswith("v0,jump,0.7")
    assert rows[2].startswith("v1,sit,0.99")
    assert module.predict_step({"id": []}, 0) == {}
    assert module.example_input().shape == (1, 3, 8, 32, 32)


def test_a_detector_starts_from_its_checkpoint(tmp_path):
    module = module_for()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "best.ckpt")
    detector = TemporalActionDetection(
        2, image_size=32, backbone_options=TINY_STPT, dim=64, num_levels=2, weights=str(tmp_path / "best.ckpt")
    )
    for name, tensor in detector.network.backbone.stages.state_dict().items():
        assert torch.equal(tensor, module.network.stages.state_dict()[name])
    with pytest.warns(UserWarning, match="head.weight"):
        other = module_for(num_classes=4, weights=str(tmp_path / "best.ckpt"))
    assert torch.equal(other.network.stages[0].embed.proj.weight, module.network.stages[0].embed.proj.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet50"}, "model.backbone: 'resnet50' was given, stpt or i3d"),
        ({"pretrained": True}, "model.pretrained"),
        ({"mixup": -1}, "model.mixup"),
        ({"drop_rate": 1.0}, "model.drop_rate"),
        ({"backbone_options": {"deepths": 3}}, "model.backbone: 'stpt' cannot be made"),
        ({"backbone": "i3d", "backbone_options": {}, "drop_path_rate": 0.1}, "cannot be made"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        module_for(**options)


def test_classes_must_be_those_of_the_data():
    with pytest.raises(UserError, match=r"model\.num_classes: 4"):
        module_for(num_classes=4).setup("fit")
