"""Both segmentation methods on the backbones of this project and on others, and released Semantic FPN networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones import create, create_features
from tasks.core.errors import UserError
from tasks.segmentation.module import FASeg, SemanticFPN
from tasks.segmentation.semantic_fpn import SemanticFPNNetwork
from tasks.segmentation.weights import load_weights

NAMES = [
    "litv2_s", "lit_s", "lit_ti", "pvt_v2_b0", "pvt_v2_b0_ecoformer", "spvit_swin_t_l28_t32",
    "swin_tiny_patch4_window7_224",
]  # fmt: skip
CLASSES = 5
SMALL_FASEG = {
    "hidden_dim": 32, "mask_dim": 32, "num_heads": 4, "num_queries": 6, "num_layers": 5, "encoder_layers": 1,
    "dim_feedforward": 32, "num_points": 32,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [FASeg, SemanticFPN])
def test_a_step_of_training_and_a_prediction_at_an_odd_size(method, name):
    torch.manual_seed(0)
    options = SMALL_FASEG if method is FASeg else {}
    module = method(CLASSES, backbone=name, backbone_norm="batch", **options).train()
    images = torch.randint(0, 256, (1, 3, 70, 90), dtype=torch.uint8)
    batch = {"image": images, "mask": torch.randint(0, CLASSES, (1, 70, 90), dtype=torch.uint8)}
    module.training_step(batch, 0).backward()
    assert [n for n, p in module.network.backbone.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in module.network.backbone.parameters())
    module.eval()
    with torch.no_grad():
        (predicted,) = module.label_maps(list(images), [(35, 41)])
    assert predicted.shape == (35, 41)
    assert int(predicted.max()) < CLASSES


@pytest.mark.parametrize("name", ["litv2_s", "lit_ti", "hvt_s_1"])
def test_what_cannot_be_had_is_said_in_one_line(name):
    message = "no weights of 'li.*set pretrained to false and name the file of released or trained weights"
    if name == "hvt_s_1":
        message = "'hvt_s_1' has no feature pyramid"
    with pytest.raises(UserError, match=f"model.backbone: .*{message}"):
        SemanticFPN(CLASSES, backbone=name, pretrained=name != "hvt_s_1")


# -- released Semantic FPN --------------------------------------------------------------------------------------------


class ConvModule(nn.Module):
    """mmcv's: a convolution, and here either a norm and ReLU behind it, or neither."""

    def __init__(self, in_dim, dim, size, norm):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, size, padding=size // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(dim)

    def forward(self, x):
        x = self.conv(x)
        return torch.relu(self.bn(x)) if hasattr(self, "bn") else x


class OfficialSemanticFPN(nn.Module):
    """Neck and head as mmsegmentation names and computes them, around a backbone of ours."""

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        self.neck, self.decode_head = nn.Module(), nn.Module()
        self.neck.lateral_convs = nn.ModuleList(ConvModule(c, 256, 1, norm=False) for c in backbone.channels)
        self.neck.fpn_convs = nn.ModuleList(ConvModule(256, 256, 3, norm=False) for _ in backbone.channels)
        self.decode_head.scale_heads = nn.ModuleList([nn.Sequential(ConvModule(256, 128, 3, norm=True))])
        for steps in (1, 2, 3):
            layers = []
            for i in range(steps):
                layers += [
                    ConvModule(128 if i else 256, 128, 3, norm=True),
                    nn.Upsample(scale_factor=2, mode="bilinear"),
                ]
            self.decode_head.scale_heads.append(nn.Sequential(*layers))
        self.decode_head.conv_seg = nn.Conv2d(128, num_classes, 1)

    def forward(self, image):
        laterals = [conv(x) for conv, x in zip(self.neck.lateral_convs, self.backbone(image), strict=True)]
        for i in (3, 2, 1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:])
        maps = [conv(x) for conv, x in zip(self.neck.fpn_convs, laterals, strict=True)]
        parts = [head(x) for head, x in zip(self.decode_head.scale_heads, maps, strict=True)]
        return self.decode_head.conv_seg(sum(parts))


@pytest.mark.parametrize("name", ["litv2_s", "lit_s", "lit_ti", "resnet18"])
def test_released_semantic_fpn_networks_compute_the_same(name, tmp_path):
    torch.manual_seed(0)
    source = OfficialSemanticFPN(create_features(name), CLASSES).eval()
    for key, tensor in source.state_dict().items():
        if key.endswith(("running_mean", "running_var", "bn.weight", "conv_offset.weight")):
            tensor.uniform_(0.5, 1.5)
    state = {key.replace("backbone.body.", "backbone."): tensor for key, tensor in source.state_dict().items()}
    torch.save({"meta": {"CLASSES": ("a",)}, "state_dict": state, "optimizer": {}}, tmp_path / "fpn.pth")
    target = SemanticFPNNetwork(create_features(name), CLASSES).eval()
    report = load_weights(target, tmp_path / "fpn.pth")
    assert report.layout.startswith("mmsegmentation model")
    assert (report.missing, report.unexpected, report.mismatched, report.ignored) == ([], [], {}, [])
    image = torch.randint(0, 256, (1, 3, 64, 96))
    with torch.no_grad():
        torch.testing.assert_close(target(image), source(target.preprocess(image)))


@pytest.mark.parametrize(("name", "num_parameters"), [("litv2_s", 31_449_486)])
def test_parameters_of_released_semantic_fpn_networks(name, num_parameters):
    with torch.device("meta"):
        network = SemanticFPNNetwork(create_features(name), 150)
    assert sum(p.numel() for p in network.parameters()) == num_parameters


def test_a_classifier_starts_the_backbone_of_a_segmentation_network(tmp_path):
    source = create("lit_ti")
    torch.save({"model": source.state_dict(), "epoch": 299}, tmp_path / "lit_ti.pth")
    target = SemanticFPNNetwork(create_features("lit_ti"), CLASSES)
    report = load_weights(target, tmp_path / "lit_ti.pth")
    assert report.layout == "backbone alone, our names"
    assert [name for name in report.missing if name.startswith("backbone.")] == []
    assert report.unexpected == []
    assert len(report.ignored) == 5
    assert torch.equal(target.backbone.pos_embed4, source.pos_embed4)
