"""mmseg's own configurations, without compiled operations: losses, gradients and predictions on the CPU.

Networks are as in the configuration but for width and the numbers of layers, samples and queries.
"""

import pytest
import torch
from small_models import CHANNELS, check_training, lower, read_model, register, walk

mmseg = pytest.importorskip("mmseg", reason="the extra openmmlab is not installed")

SIZE = (128, 128)
ORIGINAL_SIZE = (100, 120)
NUM_CLASSES = 150
SMALL = {"channels": 32, "feedforward_channels": 32, "num_layers": 2, "num_queries": 20}
SEGMENTORS = [
    "sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512",
    "upernet/upernet_r50_4xb4-160k_ade20k-512x512",
    "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512",
    "mask2former/mask2former_r50_8xb2-160k_ade20k-512x512",
    "psanet/psanet_r50-d8_4xb4-80k_ade20k-512x512",
]


@pytest.fixture(scope="module", autouse=True)
def mmseg_without_compiler():
    register("mmseg")


def shrink(model):
    """Make smaller in a configuration what decides only how much is computed."""
    model.data_preprocessor.size = SIZE
    for holder in walk(model):
        if holder.get("type") == "SyncBN":
            holder.type = "BN"  # one process has nothing to synchronise
    lower(model, SMALL)
    if "num_points" in (model.decode_head.get("train_cfg") or {}):
        model.decode_head.train_cfg.num_points = 64
    model.backbone.pop("init_cfg", None)
    model.pop("pretrained", None)
    if model.backbone.type.startswith("ResNet"):
        model.backbone.update(base_channels=CHANNELS[0] // 4)
        feed(model, list(CHANNELS))
    return model


def feed(model, channels):
    if "neck" in model:
        model.neck.in_channels = channels
        return
    for head in (model.decode_head, model.get("auxiliary_head")):
        if head is not None:
            head.in_channels = channels[head.in_index] if isinstance(head.in_channels, int) else channels


def run(config):
    """Build a segmentor; return it after a backward pass, its losses and its predictions."""
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    labels = torch.randint(0, NUM_CLASSES, (2, 1, 8, 8)).repeat_interleave(16, -1).repeat_interleave(16, -2)
    shapes = {"img_shape": SIZE, "ori_shape": ORIGINAL_SIZE, "pad_shape": SIZE}
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=shapes) for label in labels]
    images = list(torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8))
    batch = model.data_preprocessor({"inputs": images, "data_samples": samples}, training=True)
    losses = model(**batch, mode="loss")
    model.parse_losses(losses)[0].backward()
    with torch.no_grad():
        predictions = model.eval()(**batch, mode="predict")
    return model, losses, predictions


def check(model, losses, predictions):
    check_training(model, losses)
    for sample in predictions:
        labels = sample.pred_sem_seg.data
        assert labels.shape == (1, *ORIGINAL_SIZE)
        assert 0 <= labels.min() <= labels.max() < NUM_CLASSES


@pytest.mark.parametrize("name", SEGMENTORS)
def test_configuration_of_mmseg(name):
    check(*run(shrink(read_model(mmseg, name))))


@pytest.mark.parametrize("backbone", ["lit_ti", "test_resnet"])
def test_backbone_of_frugal(backbone):
    from backbones import create_features

    config = shrink(read_model(mmseg, "sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512"))
    config.backbone = {"type": "FrugalBackbone", "name": backbone}
    feed(config, create_features(backbone).channels)
    check(*run(config))
