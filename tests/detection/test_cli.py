"""From the command line: training, evaluation and predictions, and what is wrong in one sentence."""

import builtins
import importlib.util
import json
import sys

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tasks.detection.module import TorchvisionDetection

needs_mmdet = pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="without the extra openmmlab")
MASKS = {
    "model.init_args.detector": "mask_rcnn",
    "model.init_args.levels": [2, 5],
    "model.init_args.options": {"box_score_thresh": 0.001, "box_detections_per_img": 5, "box_batch_size_per_image": 8},
    "data.init_args.with_masks": True,
}
MMDET = {"model.class_path": "MMDetection", "model.init_args": {"backbone": "test_resnet", "backbone_norm": "batch"}}


def report_of(outcome):
    assert outcome.code == 0, outcome.err
    path = outcome.out.strip().splitlines()[-1].removeprefix("report: ")
    with open(path.replace(".html", ".json")) as file:
        return json.load(file)


def average_precision(truth, predictions, kind):
    """AP of a file of predictions by pycocotools."""
    coco = COCO(truth)
    evaluation = COCOeval(coco, coco.loadRes(str(predictions)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


@pytest.fixture
def trained(tiny_coco, tiny_detector_config, tmp_path):
    """Configuration and checkpoint of a Mask R-CNN that finds things."""
    config = tiny_detector_config(tiny_coco, changes=MASKS)
    return config, tmp_path / "runs/detection/tiny/version_0/checkpoints/last.ckpt"


def test_fit_validate_and_predict_agree(run_cli, trained, tiny_coco, tmp_path):
    config, checkpoint = trained
    fitted = report_of(run_cli("fit", "-c", config))
    headline = fitted["metrics"]
    assert headline.keys() >= {"val/box_AP", "val/box_AP50", "val/mask_AP", "val/mask_APs"}
    assert fitted["curves"].keys() >= {"train/loss", "train/loss_mask", "train/loss_objectness"}
    assert {table["title"] for table in fitted["tables"]} > {"Classes"}
    assert fitted["cost"]["macs"] > 0
    assert not any("Without" in note for note in fitted["notes"])

    validated = report_of(run_cli("validate", "-c", config, "--ckpt_path", checkpoint))
    names = {name for name in headline if name.startswith("val/")}
    assert {name: validated["metrics"][name] for name in names} == pytest.approx(
        {name: headline[name] for name in names}, nan_ok=True
    )

    outcome = run_cli("predict", "-c", config, "--ckpt_path", checkpoint, "--output", "out")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]
    predictions = tmp_path / "out/predictions.json"
    rows = json.loads(predictions.read_text())
    assert rows[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    truth = str(tiny_coco / "annotations/instances_val2017.json")
    for kind, name in (("bbox", "val/box_AP"), ("segm", "val/mask_AP")):
        found = average_precision(truth, predictions, kind)
        assert found == pytest.approx(validated["metrics"][name], abs=2e-3)  # boxes and scores are rounded

    module = TorchvisionDetection.load_from_checkpoint(checkpoint)
    assert module.network.with_masks
    assert module.num_classes == 10


def test_predictions_of_a_folder_are_named_by_path(run_cli, tiny_detector_config, tiny_coco, tmp_path):
    torch.manual_seed(0)
    images = tiny_coco / "val2017"
    outcome = run_cli("predict", "-c", tiny_detector_config(tiny_coco), f"--data.images={images}", "--output=out")
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {row["image_id"] for row in rows} <= {path.stem for path in images.iterdir()}
    assert len({row["image_id"] for row in rows}) > 1
    assert {row["category_id"] for row in rows} <= {1, 2, 4, 7, 13, 27, 44, 65, 70, 90}
    for row in rows:
        x, y, width, height = row["bbox"]
        assert min(x, y, width, height) >= 0
        assert x + width <= 48.01
        assert y + height <= 48.01
        assert "segmentation" not in row


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model.init_args.detector": "yolo"}, ["detector: expected", "'retinanet', 'faster_rcnn'", "got yolo"]),
        ({"model.init_args.backbone": "resnet5o"}, ["model.backbone: unknown backbone 'resnet5o'", "resnet50"]),
        ({"model.init_args.levels": [6, 7]}, ["model.levels: (6, 7) was given, 2 to 5 and 5 to 7"]),
        ({"model.init_args.options": {"score_thersh": 1}}, ["model.options.score_thersh", "score_thresh"]),
        ({"model.init_args.options": {"score_thresh": "low"}}, ["model.options.score_thresh: 'low' was given"]),
        ({"model.init_args.backbone_options": {"dephts": 2}}, ["model.backbone_options", "dephts"]),
        ({"model.init_args.weights": "nowhere.pth"}, ["nowhere.pth: no such weight file"]),
        ({"model.init_args.detector": "mask_rcnn", "model.init_args.levels": [2, 5], "model.init_args.options": {}},
         ["data.with_masks: false was given, but the model learns and predicts masks"]),
        ({"model.class_path": "Retinanet"}, ["model: no class 'Retinanet'"]),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(fails, tiny_detector_config, tiny_coco, changes, parts):
    fails("fit", "-c", tiny_detector_config(tiny_coco, changes=changes), parts=parts)


def test_weights_of_another_network(fails, tiny_detector_config, tiny_coco, tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    config = tiny_detector_config(tiny_coco, changes={"model.init_args.weights": "other.pth"})
    fails("validate", "-c", config, parts=["other.pth does not fit", "backbone"])


@needs_mmdet
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            {"detector": "yolo"},
            ["model.detector: 'yolo' was given, one of retinanet, faster_rcnn", "dino was expected"],
        ),
        (
            {"options": {"bbox_haed": {"num_classes": 3}}},
            ["model.options.bbox_haed: there is no such group", "bbox_head"],
        ),
        ({"options": {"bbox_head": {"type": "RetinaHaed"}}}, ["'RetinaNet'", "RetinaHaed"]),
    ],
)
def test_detectors_of_mmdetection_that_cannot_be(fails, tiny_detector_config, tiny_coco, arguments, parts):
    changes = {**MMDET, "model.init_args": {**MMDET["model.init_args"], **arguments}}
    fails("fit", "-c", tiny_detector_config(tiny_coco, changes=changes), parts=parts)


@pytest.mark.parametrize("name", ["mmengine", "mmdet"])
def test_a_missing_extra_is_named(fails, tiny_detector_config, tiny_coco, monkeypatch, name):
    find_spec, load = importlib.util.find_spec, builtins.__import__

    def find(module, *args):
        return None if module == name else find_spec(module, *args)

    def refuse(module, *args, **kwargs):
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(module, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(builtins, "__import__", refuse)
    # mmengine is needed to import these; its registry, which stays, takes our backbone only once.
    for module in [module for module in sys.modules if module.startswith("tasks.core.openmmlab")]:
        if name == "mmengine":
            monkeypatch.delitem(sys.modules, module)
    config = tiny_detector_config(tiny_coco, changes=MMDET)
    fails("fit", "-c", config, parts=[name, "pip install 'frugal-vision[openmmlab]'"])


# -- configurations of mmdetection ----------------------------------------------------------------------------------


@needs_mmdet
class TestConfig:
    """`MMDetectionConfig`: any file, when its code may run."""

    @pytest.fixture
    def small(self, tmp_path):
        """A configuration of a small RetinaNet for three classes, which says when it is read."""
        path = tmp_path / "small.py"
        path.write_text(
            "open('executed', 'w').close()\n"
            "model = dict(type='RetinaNet', data_preprocessor=dict(type='DetDataPreprocessor', mean=[1., 2., 3.],\n"
            "  std=[4., 5., 6.], bgr_to_rgb=False, pad_size_divisor=16),\n"
            "  backbone=dict(type='ResNet', depth=18, base_channels=8, out_indices=(1, 2, 3), norm_eval=True,\n"
            "    init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18')),\n"
            "  neck=dict(type='FPN', in_channels=[16, 32, 64], out_channels=16, num_outs=3),\n"
            "  bbox_head=dict(type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,\n"
            "    anchor_generator=dict(type='AnchorGenerator', octave_base_scale=2, scales_per_octave=1,\n"
            "      ratios=[1.0], strides=[8, 16, 32])),\n"
            "  train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),\n"
            "    sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1, debug=False),\n"
            "  test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5),\n"
            "    max_per_img=10))\n"
        )
        return path

    @pytest.fixture
    def config(self, small, tiny_detector_config, tiny_coco):
        def write(**arguments):
            arguments = {"config": "small.py", "optim": {"lr": 1e-3}, **arguments}
            changes = {"model.class_path": "MMDetectionConfig", "model.init_args": arguments}
            return tiny_detector_config(tiny_coco, changes=changes)

        return write

    def test_code_runs_only_when_allowed(self, fails, config, tmp_path):
        fails("fit", "-c", config(), parts=["small.py", "Python program", "--model.allow_config_code true"])
        assert not (tmp_path / "executed").exists()

    def test_trains_and_its_checkpoint_needs_no_file(self, run_cli, config, small, tmp_path):
        allowed = config(allow_config_code=True)
        fitted = report_of(run_cli("fit", "-c", allowed))
        assert (tmp_path / "executed").exists()
        checkpoint = tmp_path / "runs/detection/tiny/version_0/checkpoints/last.ckpt"
        validated = report_of(run_cli("validate", "-c", allowed, "--ckpt_path", checkpoint))
        assert validated["metrics"]["val/box_AP"] == fitted["metrics"]["val/box_AP"]

        small.unlink()
        from tasks.detection.module import MMDetectionConfig

        module = MMDetectionConfig.load_from_checkpoint(checkpoint)
        network = module.network
        assert network.detector.bbox_head.num_classes == 10
        assert network.preprocess.bgr
        assert network.preprocess.size_divisor == 16
        assert network.preprocess.mean.flatten().tolist() == [1, 2, 3]

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            ({"config": "nowhere.py"}, ["model.config nowhere.py: no such file"]),
            ({"config": "mmdet::nowhere.py"}, ["model.config mmdet::nowhere.py: no such file"]),
            ({"config": "mmdet::../../../x.py"}, ["leads out of the configurations of mmdet"]),
            ({"model": {"type": "os.system"}}, ["class 'os.system' is outside the packages"]),
            ({"model": {"type": "RetinaNet", "data_preprocessor": {"type": "MultiBranchDataPreprocessor"}}},
             ["data_preprocessor 'MultiBranchDataPreprocessor' is not supported"]),
            ({"model": {"type": "FPN", "in_channels": [8], "out_channels": 8, "num_outs": 1}}, ["no detector"]),
        ],
    )  # fmt: skip
    def test_files_that_cannot_be_used(self, fails, config, arguments, parts):
        fails("fit", "-c", config(**arguments), parts=parts)
