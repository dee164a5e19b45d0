"""Networks give the same outputs and gradients from PyTorch and from the kernels."""

import copy

import pytest
import torch
from comparison import DEVICE, check_error, counted_launches
from torch import nn

from backbones.hvt import HVT
from backbones.lit import LIT
from backbones.lit_ti import LITTi
from backbones.litv2 import LITv2
from backbones.stpt import STPT
from backbones.swin import SwinFeatures
from tasks.segmentation.faseg.network import FASegNetwork

ATTENTION = {"attention_fwd_kernel", "attention_bwd_q_kernel", "attention_bwd_kv_kernel"}
TOLERANCE = 1e-6
WINDOWS = {"window_attention_fwd_kernel", "window_attention_bwd_kv_kernel"}
DEFORMABLE = {"ms_deform_attn_fwd_kernel", "ms_deform_attn_bwd_kernel"}


def results(model, call):
    """Outputs of `call(model)` and the gradients of their sum of squares for every parameter, by name."""
    outputs = call(model)
    parameters = dict(model.named_parameters())
    loss = sum(output.square().sum() for output in outputs.values())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = {f"output {name}": output.detach() for name, output in outputs.items()}
    return found | {
        f"gradient of {name}": gradient
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    }


def check_network(model, call, launches, monkeypatch):
    """Fail unless exactly the kernels in `launches` run, and are about as near to float64 as PyTorch in float32."""
    model = model.to(DEVICE)
    monkeypatch.setenv("FRUGAL_KERNELS", "reference")
    truth = results(copy.deepcopy(model).double(), call)
    plain = results(model, call)
    monkeypatch.setenv("FRUGAL_KERNELS", "triton")
    with counted_launches() as counts:
        actual = results(model, call)
    assert set(counts) == launches
    assert actual.keys() == plain.keys() == truth.keys()
    for name, expected in truth.items():
        # Gradients that are zero but for rounding, and tensors that are exact by chance.
        check_error(name, actual[name], plain[name], expected, floor=TOLERANCE * max(1, float(expected.abs().max())))


class PatchPyramid(nn.Module):
    """The smallest backbone: patches at strides 4, 8, 16, 32."""

    def __init__(self, channels):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, stride, stride)
            for before, after, stride in zip([3, *channels], channels, (4, 2, 2, 2), strict=False)
        )

    def forward(self, image):
        maps = []
        for stage in self.stages:
            image = stage(image).relu()
            maps.append(image)
        return maps


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 5},
        {"num_layers": 3, "dynamic_queries": False, "high_resolution": False, "mask_threshold": 0.5},
    ],
    ids=["faseg", "mask2former"],
)
def test_faseg(options, kernels_required, monkeypatch):
    torch.manual_seed(0)
    model = FASegNetwork(
        PatchPyramid((4, 8, 8, 8)), (4, 8, 8, 8), 3, hidden_dim=16, mask_dim=8, num_queries=5, num_heads=2,
        dim_feedforward=16, encoder_layers=1, encoder_dim_feedforward=16, omega_rate=2, **options,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
            nn.init.normal_(parameter, std=0.1)
    image = torch.randint(0, 256, (1, 3, 32, 64), generator=torch.manual_seed(1)).to(DEVICE)

    def call(model):
        found = model(image.to(next(model.parameters()).dtype))
        stages = [*found["aux_outputs"], found]
        return {f"{key} {i}": stage[key] for i, stage in enumerate(stages) for key in ("pred_logits", "pred_masks")}

    check_network(model, call, ATTENTION | DEFORMABLE, monkeypatch)


TINY = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "num_classes": 3}
BACKBONES = {
    "litv2": (LITv2, {**TINY, "alpha": 0.5}, ATTENTION | WINDOWS),
    "litv2_hi_fi": (LITv2, {**TINY, "alpha": 0.0}, ATTENTION | WINDOWS),
    "lit": (LIT, {**TINY, "img_size": 64}, ATTENTION | {"attention_bwd_bias_kernel"}),
    "lit_ti": (
        LITTi,
        {
            "img_size": 64,
            "embed_dims": (8, 8, 8, 8),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 1, 2, 2),
            "num_classes": 3,
        },
        ATTENTION,
    ),
    "hvt": (HVT, {"img_size": 64, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}, ATTENTION),
    "swin": (
        SwinFeatures,
        {"embed_dim": 8, "depths": (2,), "num_heads": (1,), "window_size": 3},
        WINDOWS,
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name, kernels_required, monkeypatch):
    network, options, launches = BACKBONES[name]
    torch.manual_seed(0)
    model = network(**options).eval()
    images = torch.randn(2, 3, 32, 40, generator=torch.manual_seed(1)).to(DEVICE)

    def call(model):
        outputs = model(images.to(next(model.parameters()).dtype))
        return {str(i): output for i, output in enumerate(outputs if isinstance(outputs, list) else [outputs])}

    check_network(model, call, launches, monkeypatch)


def test_stpt(kernels_required, monkeypatch):
    """Windows that divide no map, with reduced keys."""
    torch.manual_seed(0)
    options = {"embed_dims": (8, 8, 8, 8), "windows": ((3, 2, 2), (2, 2, 2), None, None), "kv_ratios": ((1, 2, 1),) * 4}
    model = STPT(depths=(1, 1, 1, 1), num_heads=(1, 2, 1, 2), num_classes=3, **options).eval()
    clips = torch.randn(1, 3, 5, 20, 12, generator=torch.manual_seed(1)).to(DEVICE)

    def call(model):
        return {"scores": model(clips.to(next(model.parameters()).dtype))}

    check_network(model, call, ATTENTION | WINDOWS, monkeypatch)
