"""What every network registered in `backbones` can do; a new one is tested without being named here.

Weights are those of small versions where `SMALL` knows the class; names, options and code paths are the registered
ones.
"""

import re
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import backbones  # noqa: F401  (registers the networks)
from backbones.published import PUBLISHED
from backbones.video_features import VIDEO_BACKBONES

REGISTERED = [
    name
    for name in timm.list_models()
    if timm.model_entrypoint(name).__module__.startswith("backbones.") and name not in VIDEO_BACKBONES
]
# Networks that differ from those here in nothing but what `SMALL` overrides.
LARGER = r"pvt_v2_b[1-4]_.*|twins_svt_(base|large)_.*|spvit_(deit|swin)_(sm|bs)_.*"
# Networks of any architecture, of which there are no published ones.
GENERAL = {"spvit_deit", "spvit_swin"}
NAMES = [name for name in REGISTERED if not re.fullmatch(LARGER, name)]
BLOCK = r"(?:(?:layers|stages)\.\d+\.)?(?<!pos_)blocks?\d*(?:\.\d+)+"
LIT_SIZES = {"depths": (1, 1, 2, 2)}
SMALL = {
    "HVT": {"depth": 4, "embed_dim": 24, "num_heads": 2},
    "LIT": {**LIT_SIZES, "embed_dim": 16, "num_heads": (1, 1, 4, 4)},
    "LITv2": {**LIT_SIZES, "embed_dim": 24, "num_heads": (1, 1, 12, 12)},  # as many as alpha's digits divide
    "PVTv2": {**LIT_SIZES, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "mlp_ratios": (2, 2, 2, 2)},
    "TwinsSVT": {**LIT_SIZES, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "mlp_ratios": (2, 2, 2, 2)},
    "LITTi": {**LIT_SIZES, "embed_dims": (8, 16, 24, 32), "num_heads": (1, 1, 2, 4)},
}
MIXERS = ("1x1", "3x3", "skip", "msa")
BLOCKS = [{"mixer": mixer, "width": width} for mixer, width in zip(MIXERS, (32, 24, 16, 8), strict=True)]
SPVIT = {"alpha": 1.0, "mlp_ratio": 2.0, "embed_dim": 24}
SMALL |= {
    "SPViTDeiT": {
        "architecture": {
            "family": "deit", "depths": [4], "num_heads": [2], "patch_size": 8, "blocks": BLOCKS, **SPVIT
        }
    },
    "SPViTSwin": {
        "architecture": {
            "family": "swin", "depths": [2, 2, 1, 1], "num_heads": [2, 2, 3, 4], "patch_size": 4,
            "blocks": [*BLOCKS, *BLOCKS[1::2]], **SPVIT,
        }
    },
}  # fmt: skip
CLASS_OF = {}
for _name in NAMES:
    with torch.device("meta"):
        CLASS_OF[_name] = type(timm.create_model(_name)).__name__
# One network per class, and LITv2 with both kinds of heads, for what is slow.
FEW = [*{cls: name for name, cls in CLASS_OF.items()}.values(), "litv2_s"]
every = pytest.mark.parametrize("name", NAMES)
some = pytest.mark.parametrize("name", FEW)


def make(name, seed=0, **options):
    """The network `name`, small, with 5 classes and offsets that are not zero."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{"num_classes": 5, **SMALL.get(CLASS_OF[name], {}), **options}).eval()
    for key, parameter in model.named_parameters():
        if "conv_offset" in key:
            nn.init.normal_(parameter, std=0.2)
    return model


def image(height=64, width=None, batch=2):
    generator = torch.Generator().manual_seed(height)
    return torch.randn(batch, 3, height, width or height, generator=generator)


def test_every_network_is_published_and_the_other_way_round():
    assert sorted(REGISTERED) == sorted([*PUBLISHED, *GENERAL])


# -- sizes and gradients ----------------------------------------------------------------------------------------------


@every
def test_any_size(name):
    model = make(name)
    native = model.pretrained_cfg["input_size"][1]
    with torch.no_grad():
        for height, width in [(native, native), (33, 47), (64, 96), (70, 90), (32, 32), (200, 36)]:
            scores = model(image(height, width))
            assert scores.shape == (2, 5)
            assert scores.isfinite().all(), (height, width)
        assert model(image(batch=5)).shape == (5, 5)


@pytest.mark.parametrize("name", [name for name in NAMES if CLASS_OF[name] not in ("LITv2", "PVTv2")])  # no positions
@pytest.mark.parametrize("size", [48, (64, 96), (67, 45)])
def test_any_img_size(name, size):
    model = make(name, img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert model(image(height, width)).shape == (2, 5)
    assert model(image(80, 56)).shape == (2, 5)


@every
def test_images_with_other_channels(name):
    model = make(name, in_chans=1)
    assert model(image()[:, :1]).shape == (2, 5)


@every
def test_samples_do_not_influence_each_other(name):
    model, images = make(name).double(), image(batch=5).double()
    together = model(images)
    torch.testing.assert_close(together[3:4], model(images[3:4]), rtol=1e-9, atol=1e-9)
    channels_last = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, together, rtol=1e-9, atol=1e-9)


@every
def test_every_parameter_receives_a_gradient(name):
    model = make(name).train()
    images = image(96).requires_grad_()
    (model(images) * torch.randn(2, 5)).sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    assert images.grad.abs().amax(dim=(0, 1)).gt(0).all()


# A gradient that passes the sign of EcoFormer's codes is no derivative.
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_ecoformer")])
def test_gradients_are_those_of_the_function(name):
    """One directional derivative in float64, through parameters and image."""
    model, images = make(name).double(), image(40, 56).double()
    weights = torch.randn(2, 5, dtype=torch.float64)
    step, directions = 1e-6, {key: torch.randn_like(p) for key, p in model.named_parameters()}
    (model(images) * weights).sum().backward()
    slope = sum((p.grad * directions[key]).sum() for key, p in model.named_parameters())
    values = []
    for sign in (1, -1):
        moved = {key: p + sign * step * directions[key] for key, p in model.named_parameters()}
        values.append((torch.func.functional_call(model, moved, images) * weights).sum())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), slope, rtol=1e-4, atol=1e-6)


# -- features ---------------------------------------------------------------------------------------------------------


@every
def test_features_only(name):
    model = make(name, features_only=True)
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    features = model(image(70, 90))
    assert len(features) == len(channels) >= 3
    for feature, width, stride in zip(features, channels, strides, strict=True):
        if str(model.output_fmt.value) == "NLC":
            assert feature.shape[::2] == (2, width)
        else:
            size = [
                -(-side // stride) if CLASS_OF[name] in ("PVTv2", "SPViTSwin") else side // stride for side in (70, 90)
            ]
            assert feature.shape == (2, width, *size)
    chosen = make(name, features_only=True, out_indices=(0, 1))
    assert [f.shape for f in chosen(image())] == [
        f.shape for f in make(name, features_only=True, out_indices=[0, 1])(image())
    ]
    assert len(list(chosen.parameters())) < len(list(make(name).parameters()))
    torch.stack([f.mean() for f in chosen(image())]).sum().backward()
    last = [key for key, parameter in chosen.named_parameters() if parameter.grad is None]
    assert last == []


@every
def test_intermediates_lead_to_the_features(name):
    model = make(name)
    options = {"output_fmt": "NLC"} if CLASS_OF[name] == "HVT" else {}
    final, maps = model.forward_intermediates(image(), **options)
    torch.testing.assert_close(final, model.forward_features(image()))
    assert len(maps) == len(model.feature_info)
    only = model.forward_intermediates(image(), indices=2, intermediates_only=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(only, maps[-2:], strict=True))
    early = model.forward_intermediates(image(), indices=[0, 1], stop_early=True, intermediates_only=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(early, maps[:2], strict=True))
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    pruned = model.forward_intermediates(image(), indices=[0, 1], intermediates_only=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(pruned, maps[:2], strict=True))


# -- classifier -------------------------------------------------------------------------------------------------------


@every
def test_the_classifier_can_be_replaced_and_left_out(name):
    model = make(name)
    features = model.forward_features(image())
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(before), model(image()))
    model.reset_classifier(3)
    assert model(image()).shape == (2, 3) == (2, model.num_classes)
    model.reset_classifier(0)
    assert torch.equal(model(image()), before)
    without = make(name, num_classes=0)
    without.load_state_dict(model.state_dict())
    assert torch.equal(without(image()), before)
    model.reset_classifier(3, global_pool="")
    assert torch.equal(model.forward_head(features, pre_logits=True), features)
    with pytest.raises((ValueError, AssertionError), match=r"global_pool|pooling"):
        model.reset_classifier(3, global_pool="median")


@every
def test_a_replaced_classifier_keeps_the_data_type(name):
    model = make(name).double()
    model.reset_classifier(3)
    assert model(image().double()).dtype == torch.float64


@every
def test_dropout_is_before_the_classifier_alone(name):
    model = make(name, drop_rate=0.5)
    features = model.forward_features(image())
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))
    assert not [key for key, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p and "head" not in key]


# -- training ---------------------------------------------------------------------------------------------------------


@every
def test_layer_groups_follow_the_forward_pass(name):
    model = make(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert sorted(groups) == sorted(key for key, _ in model.named_parameters())
    order = []
    for path, module in model.named_modules():
        if path and list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, path=path: order.append(path))
    model(image())
    layers = [groups[key] for path in order for key in groups if re.fullmatch(rf"{re.escape(path)}\.\w+", key)]
    # A module with submodules ends after them; within a layer the order is of no interest.
    assert layers == sorted(layers)
    blocks = len({match[0] for key in groups if (match := re.search(BLOCK, key))})
    assert blocks < len(set(layers)) <= 2 * blocks + 2
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(coarse) == sorted(groups)
    assert len(set(coarse.values())) <= len(set(layers))


@every
def test_layer_wise_learning_rates_and_weight_decay(name):
    model = make(name)
    exempt = model.no_weight_decay()
    keys = {key for key, _ in model.named_parameters()}
    expected = {
        "HVT": r"(.*\.)?pos_embed", "LIT": r".*relative_position_bias_table", "LITTi": r"cls_token",
        "TwinsSVT": r"pos_block.*", "SPViTDeiT": r"cls_token|pos_embed", "SPViTSwin": r".*relative_position_bias_table",
    }  # fmt: skip
    assert exempt == {key for key in keys if re.fullmatch(expected.get(CLASS_OF[name], "none"), key)}
    groups = param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=exempt, layer_decay=0.5)
    settings = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(settings) == len(keys)
    scales = {key: settings[id(p)][0] for key, p in model.named_parameters()}
    assert max(scales.values()) == scales["head.weight"] == 1
    assert min(scales.values()) == next(scale for key, scale in scales.items() if key.startswith("patch_embed"))
    for key, parameter in model.named_parameters():
        assert (settings[id(parameter)][1] == 0) == (parameter.ndim == 1 or key in exempt), key


@every
def test_checkpointing_changes_nothing(name):
    results = []
    for enable in (False, True):
        model = make(name, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        scores = model(image())
        scores.square().sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        results.append({"scores": scores, **gradients, **dict(model.named_buffers())})
    assert results[0].keys() == results[1].keys()
    assert [key for key, tensor in results[0].items() if not torch.equal(tensor, results[1][key])] == []


def test_checkpointing_recomputes(monkeypatch):
    """The test above would pass where the switch did nothing."""
    for name in FEW:
        calls = []
        model = make(name).train()
        model.set_grad_checkpointing()
        linear = next(module for key, module in model.named_modules() if key.endswith("mlp.fc1"))
        linear.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(image()).sum().backward()
        assert len(calls) == 2, name


@every
def test_drop_path_rises_linearly_over_the_blocks(name):
    model = make(name, drop_path_rate=0.3)
    paths = [(key, m.drop_prob) for key, m in model.named_modules() if isinstance(m, DropPath)]
    of_block = {re.sub(r"\.drop_path\d?$", "", key): [] for key, _ in paths}
    for key, rate in paths:
        of_block[re.sub(r"\.drop_path\d?$", "", key)].append(rate)
    assert all(len(set(rates)) == 1 for rates in of_block.values())
    count = sum(1 for key, _ in model.named_modules() if key.endswith(".mlp"))
    expected = [0.3 * i / (count - 1) for i in range(1, count)]  # the first block has none
    assert [rates[0] for rates in of_block.values()] == pytest.approx(expected)
    plain = [m.drop_prob for m in make(name).modules() if isinstance(m, DropPath)]
    assert not any(plain)


# -- precision, files, compilers --------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    model = make(name)
    exact = model(image())
    with torch.autocast("cpu", dtype):
        mixed = model(image())
    half = model.to(dtype)(image().to(dtype))
    assert half.dtype == mixed.dtype == dtype
    scale = exact.abs().max()
    assert (mixed.float() - exact).abs().max() < 0.1 * scale
    assert (half.float() - exact).abs().max() < 0.1 * scale


@every
def test_weights_survive_a_file(name, tmp_path):
    model, other = make(name), make(name, seed=1)
    assert not torch.equal(other(image()), model(image()))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(image()), model(image()))


def shallow(name):
    """The network with as few blocks as it has ways to go through them."""
    if CLASS_OF[name].startswith("SPViT"):
        return make(name)
    return make(name, **({"depth": 2} if CLASS_OF[name] == "HVT" else {"depths": (1, 1, 1, 1)}))


@some
def test_export(name):
    model, images = shallow(name), image()
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
    more = image(batch=3)
    torch.testing.assert_close(exported(more), model(more), rtol=1e-4, atol=1e-5)


@some
def test_compile_without_graph_breaks(name):
    model, images = shallow(name), image()
    expected = model(images)
    expected.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    scores = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    scores.square().sum().backward()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lit_ti", "litv2_s_alpha10", "spvit_deit_ti_l200_t10"])
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor(name):
    """Deformable convolutions, HiLo and merged kernels; the other networks, traced above, have no operations beside."""
    model, images = shallow(name), image()
    torch.compiler.reset()
    with torch.no_grad():
        scores = torch.compile(model, fullgraph=True)(images)
        torch.testing.assert_close(scores, model(images), rtol=1e-4, atol=1e-5)
