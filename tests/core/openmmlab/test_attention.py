"""Multi-scale deformable attention of mmcv and mmdet: which code runs, and equality with the official operation."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("mmdet", reason="the extra openmmlab is not installed")

GOLDENS = Path(__file__).parents[2] / "goldens" / "faseg"


@pytest.fixture(scope="module", autouse=True)
def operations():
    from tasks.core.openmmlab import install

    install()


class Recorder(TorchDispatchMode):
    """Collects the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def read_case(name):
    case = json.loads((GOLDENS / f"{name}.json").read_text())
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    return case["config"], {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def weights_of(tensors):
    return {name.removeprefix("sd."): value for name, value in tensors.items() if name.startswith("sd.")}


def close(actual, expected, tolerance):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.3g}"


def load_module(dtype):
    """Return mmcv's module with the official weights, and its inputs but for reference points."""
    from mmcv.ops import MultiScaleDeformableAttention

    config, tensors = read_case("msdeform_attn")
    sizes = (config["d_model"], config["n_heads"], config["n_levels"], config["n_points"])
    module = MultiScaleDeformableAttention(*sizes, dropout=0.0, batch_first=True)
    module.load_state_dict(weights_of(tensors))
    query = tensors["in.query"].to(dtype)
    inputs = {"query": query, "value": tensors["in.value"].to(dtype), "identity": torch.zeros_like(query)}
    inputs |= {name: tensors[f"in.{name}"] for name in ("spatial_shapes", "level_start_index")}
    return module.to(dtype), inputs, tensors


def test_module_equals_the_official_one():
    module, inputs, tensors = load_module(torch.float64)
    points = tensors["in.reference_points"]
    close(module(**inputs, reference_points=points), tensors["out.output"], 1e-9)
    padded = module(**inputs, reference_points=points, key_padding_mask=tensors["in.padding_mask"])
    close(padded, tensors["out.output_padding"], 1e-9)
    boxes = module(**inputs, reference_points=tensors["in.reference_boxes"])
    close(boxes, tensors["out.output_boxes"], 1e-9)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_module_runs_the_kernel_forward_and_backward(path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("FRUGAL_KERNELS", path)
    module, inputs, tensors = load_module(torch.float32)
    with Recorder() as recorder:
        output = module(**inputs, reference_points=tensors["in.reference_points"].float())
        output.square().sum().backward()
    kernels = {"frugal::ms_deform_attn", "frugal::ms_deform_attn_backward"}
    assert recorder.names & kernels == (kernels if path == "triton" else set())
    close(output, tensors["out.output"], 1e-5)
    grads = torch.cat([p.grad.flatten() for p in module.parameters()])

    module, inputs, _ = load_module(torch.float64)
    monkeypatch.setenv("FRUGAL_KERNELS", "reference")
    module(**inputs, reference_points=tensors["in.reference_points"]).square().sum().backward()
    close(grads, torch.cat([p.grad.flatten() for p in module.parameters()]), 1e-5)


def pixel_decoder(config):
    """Return mmdet's pixel decoder of Mask2Former with the sizes of a golden case."""
    from mmdet.registry import MODELS

    width, channels = config["conv_dim"], [config["in_channels"][f"res{stage}"] for stage in (2, 3, 4, 5)]
    attention = {"embed_dims": width, "num_heads": config["n_heads"], "num_levels": 3, "num_points": 4}
    layer = {
        "self_attn_cfg": {**attention, "dropout": 0.0, "batch_first": True},
        "ffn_cfg": {"embed_dims": width, "feedforward_channels": config["dim_feedforward"], "ffn_drop": 0.0},
    }
    import mmdet.models  # noqa: F401  (registers it)
    from mmengine.config import ConfigDict

    settings = {
        "type": "mmdet.MSDeformAttnPixelDecoder",
        "in_channels": channels,
        "feat_channels": width,
        "out_channels": config["mask_dim"],
        "num_outs": 4,
        "encoder": {"num_layers": config["enc_layers"], "layer_cfg": layer},
        "positional_encoding": {"num_feats": width // 2, "normalize": True},
    }
    return MODELS.build(ConfigDict(settings))


# mmdet's names of parts, and the official ones; FASeg's parts that Mask2Former lacks have none.
NAMES = [
    ("level_encoding.weight", "transformer.level_embed"),
    ("encoder.layers.", "transformer.encoder.layers."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ffn.layers.0.0.", ".linear1."),
    (".ffn.layers.1.", ".linear2."),
    ("lateral_convs.0.gn.", "adapter_1.norm."),
    ("lateral_convs.0.conv.", "adapter_1."),
    ("output_convs.0.gn.", "layer_1.norm."),
    ("output_convs.0.conv.", "layer_1."),
    ("mask_feature.", "mask_features."),
    *((f"input_convs.{i}.{part}.", f"input_proj.{i}.{j}.") for i in range(3) for j, part in enumerate(("conv", "gn"))),
]


def official_name(name):
    for ours, official in NAMES:
        name = name.replace(ours, official)
    return name


class Given(torch.nn.Module):
    """Positions of level after level, where FASeg's replace sines."""

    def __init__(self, positions):
        super().__init__()
        self.positions = itertools.cycle(positions)

    def forward(self, mask):
        return next(self.positions)


def load_pixel_decoder(dtype, images=2):
    config, tensors = read_case("pixel_decoder")
    decoder, weights = pixel_decoder(config), weights_of(tensors)
    decoder.load_state_dict({name: weights[official_name(name)] for name in decoder.state_dict()})
    decoder.postional_encoding = Given([tensors[f"out.pos.{level}"][:images].to(dtype) for level in range(3)])
    maps = [tensors[f"in.res{stage}"][:images].to(dtype) for stage in (2, 3, 4, 5)]
    return decoder.to(dtype), maps, tensors


def test_pixel_decoder_equals_the_official_one():
    decoder, maps, tensors = load_pixel_decoder(torch.float64)
    mask_features, levels = decoder(maps)
    # mmdet computes reference points in float32.
    close(mask_features, tensors["out.mask_features"], 1e-6)
    for number, level in enumerate(levels):
        close(level, tensors[f"out.multi_scale.{number}"], 1e-6)


def test_pixel_decoder_runs_the_kernel(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("FRUGAL_KERNELS", "triton")
    decoder, maps, tensors = load_pixel_decoder(torch.float32, images=1)
    with Recorder() as recorder, torch.no_grad():
        mask_features, _ = decoder(maps)
    assert "frugal::ms_deform_attn" in recorder.names
    assert "aten::grid_sampler_2d" not in recorder.names  # of mmcv's formula
    close(mask_features, tensors["out.mask_features"][:1], 1e-5)


def test_names_that_mmcv_calls_run_the_same(monkeypatch):
    """The function for GPUs, the formula for CPUs and the compiled operation's interface."""
    from mmcv.ops import multi_scale_deform_attn as mmcv_attention

    import kernels.ms_deform_attn as kernel
    from tasks.core.openmmlab import deformable, ext

    calls = []

    def counted(*args):
        calls.append(args)
        return kernel.ms_deform_attn(*args)

    monkeypatch.setattr(deformable, "ms_deform_attn", counted)
    generator = torch.Generator().manual_seed(0)
    shapes, starts = torch.tensor([[4, 5], [2, 3]]), torch.tensor([0, 20])
    tensors = [torch.rand(*s, dtype=torch.float64, generator=generator).requires_grad_()
               for s in ((2, 26, 2, 3), (2, 7, 2, 2, 3, 2), (2, 7, 2, 2, 3))]  # fmt: skip
    value, locations, weights = tensors
    by_formula = mmcv_attention.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    by_function = mmcv_attention.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    by_operation = ext.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=64)
    assert len(calls) == 3
    assert torch.equal(by_formula, by_function)
    assert torch.equal(by_formula, by_operation)

    grad = torch.rand(by_formula.shape, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad(by_formula, tensors, grad)
    buffers = [torch.zeros_like(t) for t in tensors]
    ext.ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, *buffers, im2col_step=64)
    for result, other, buffer in zip(expected, torch.autograd.grad(by_function, tensors, grad), buffers, strict=True):
        assert torch.equal(result, other)
        assert torch.equal(result, buffer)
