"""Video backbones: sizes, windows, gradients, cost, and the contract that the task of video relies on."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import nn

from backbones import create, create_video_features, load_checkpoint
from backbones.i3d import I3D, I3DFeatures
from backbones.macs import count_macs
from backbones.same_padding import SameConv1d, SameMaxPool3d
from backbones.stpt import STPT, PooledAttention, STPTFeatures
from backbones.video_features import FrameFeatures

TINY_STPT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}
TINY = {
    "stpt": TINY_STPT,
    "i3d": {"width": 0.05},
    "test_resnet": {"frames_per_pass": 3},
}
CLASSIFIERS = {"stpt": TINY_STPT, "i3d": {"width": 0.05}}
every = pytest.mark.parametrize("name", TINY)
classifiers = pytest.mark.parametrize("name", CLASSIFIERS)


def features(name, **options):
    torch.manual_seed(0)
    model = create_video_features(name, **{**TINY[name], **options})
    for key, parameter in model.named_parameters():
        if key.endswith("weight") and not parameter.any():  # timm's residual branches start at zero
            nn.init.ones_(parameter)
    return model


def clip(*size, channels=3, batch=2):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(sum(size)))


def up(size, stride):
    return -(-size // stride)


# -- the contract -----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("size", [(16, 64, 64), (13, 40, 66), (5, 33, 32)])
def test_maps_of_any_clip(name, size):
    model = features(name).eval()
    assert model.strides == [(4, 16, 16), (8, 32, 32)]
    with torch.no_grad():
        maps = model(clip(*size))
    expected = [(2, width, *map(up, size, stride)) for width, stride in zip(model.channels, model.strides, strict=True)]
    assert [tuple(x.shape) for x in maps] == expected
    assert all(x.isfinite().all() for x in maps)


@every
def test_every_parameter_and_pixel_receives_a_gradient(name):
    model = features(name).train()
    pixels = clip(16, 64, 64).requires_grad_()
    sum((x * torch.randn_like(x)).sum() for x in model(pixels)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert pixels.grad.any()


@every
def test_the_coarse_map_alone(name):
    model, both = features(name, maps="coarse").train(), features(name)
    assert (model.channels, model.strides) == (both.channels[1:], both.strides[1:])
    (coarse,) = model.eval()(clip(9, 40, 40))
    both.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(both.eval()(clip(9, 40, 40))[1], coarse)
    coarse.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@every
def test_clips_do_not_influence_each_other(name):
    model, pixels = features(name).double().eval(), clip(9, 40, 40).double()
    with torch.no_grad():
        for together, alone in zip(model(pixels), model(pixels[1:]), strict=True):
            torch.testing.assert_close(together[1:], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stpd", {}, "unknown backbone 'stpd'"),
        ("stpt", {"norm": "none"}, "norm='none'"),
        ("i3d", {"maps": "fine"}, "maps='fine'"),
        ("i3d", {"drop_path_rate": 0.1}, "no residual paths"),
        ("i3d", {"taps": ["Mixed_4e"]}, "taps"),
        ("stpt", {"depths": (1, 1)}, "depths has 2 values"),
        ("stpt", {"num_heads": (5, 1, 1, 1)}, "num_heads=5 does not divide"),
        ("stpt", {"kv_ratios": ((3, 2, 2),) * 4}, "does not divide the window"),
        ("test_resnet", {"frames_per_pass": 0}, "frames_per_pass=0"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_video_features(name, **options)


@pytest.mark.parametrize("name", ["stpt", "i3d"])
def test_there_are_no_weights_to_download(name):
    with pytest.raises(RuntimeError, match="no weights"):
        create_video_features(name, pretrained=True)


# -- STPT -------------------------------------------------------------------------------------------------------------


def test_size_and_cost_of_stpt():
    with torch.device("meta"):
        model = STPTFeatures()
        stages = [sum(p.numel() for p in stage.embed.parameters()) for stage in model.stages]
        blocks = [sum(p.numel() for p in stage.blocks[0].parameters()) for stage in model.stages]
        macs = count_macs(model, torch.zeros(1, 3, 256, 96, 96))
    assert stages == [42_624, 498_240, 1_991_808, 7_964_928]
    assert blocks == [120_096, 461_376, 1_807_488, 7_109_376]
    assert sum(p.numel() for p in model.parameters()) == 45_643_872
    assert macs / 1e9 == pytest.approx(105.93, abs=0.005)


def plain_attention(layer, x, window):
    """One query after the other: what `PooledAttention` says it computes."""
    heads, ratio = layer.num_heads, layer.ratio
    weights, biases = layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)
    q, k, v = (x @ weight.T + bias for weight, bias in zip(weights, biases, strict=True))
    output = torch.zeros_like(x)
    starts = torch.cartesian_prod(*(torch.arange(0, n, w) for n, w in zip(x.shape[1:4], window, strict=True)))
    for t, y, z in starts.tolist():
        here = (slice(None), *(slice(s, s + w) for s, w in zip((t, y, z), window, strict=True)))
        keys = []
        for name, part in (("k", k), ("v", v)):
            tokens = part[here]
            if layer.reduces:
                pool = getattr(layer, f"{name}_pool").weight  # (C, 1, 3, 3, 3)
                padded = nn.functional.pad(tokens, (0, 0, 1, 1, 1, 1, 1, 1))
                patches = padded.unfold(1, 3, ratio[0]).unfold(2, 3, ratio[1]).unfold(3, 3, ratio[2])
                tokens = getattr(layer, f"{name}_norm")(torch.einsum("bthwcijk,cijk->bthwc", patches, pool[:, 0]))
            keys.append(tokens.flatten(1, 3).unflatten(2, (heads, -1)).transpose(1, 2))
        queries = q[here].flatten(1, 3).unflatten(2, (heads, -1)).transpose(1, 2)
        scores = queries @ keys[0].mT / queries.shape[-1] ** 0.5
        output[here] = (scores.softmax(-1) @ keys[1]).transpose(1, 2).reshape(output[here].shape)
    return layer.proj(output)


@pytest.mark.parametrize("ratio", [(2, 2, 2), (1, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("size", [(8, 4, 4), (5, 7, 3), (2, 1, 9)])
@pytest.mark.parametrize("window", [(4, 2, 4), None])
def test_attention_in_windows_and_global(window, size, ratio):
    torch.manual_seed(0)
    layer = PooledAttention(8, 2, window, ratio).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain_attention(layer, x, window or size), rtol=1e-9, atol=1e-9)


def test_gradients_of_stpt_are_those_of_the_function():
    """One directional derivative in float64, through parameters and clip, where no window divides a map."""
    torch.manual_seed(0)
    model, pixels = STPT(num_classes=5, **TINY_STPT).double(), clip(7, 36, 40).double()
    weights = torch.randn(2, 5, dtype=torch.float64)
    step, directions = 1e-6, {key: torch.randn_like(p) for key, p in model.named_parameters()}
    (model(pixels) * weights).sum().backward()
    slope = sum((p.grad * directions[key]).sum() for key, p in model.named_parameters())
    values = []
    for sign in (1, -1):
        moved = {key: p + sign * step * directions[key] for key, p in model.named_parameters()}
        values.append((torch.func.functional_call(model, moved, pixels) * weights).sum())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), slope, rtol=1e-4, atol=1e-6)


def test_a_pretrained_classifier_starts_a_detector(tmp_path):
    torch.manual_seed(0)
    classifier, detector = STPT(num_classes=5, **TINY_STPT), STPTFeatures(**TINY_STPT)
    save_file(classifier.state_dict(), tmp_path / "stpt.safetensors")
    report = load_checkpoint(detector, tmp_path / "stpt.safetensors")
    assert set(report.missing) == {"norm2.weight", "norm2.bias", "norm3.weight", "norm3.bias"}
    assert not report.unexpected
    pixels = clip(8, 32, 32)
    maps = detector.eval().forward_stages(pixels)
    torch.testing.assert_close(maps[-1], classifier.eval().forward_features(pixels))


# -- I3D --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "gmacs", "params"), [(3, 81.66, 12_287_264), (2, 75.19, 12_265_312)])
def test_size_and_cost_of_i3d(channels, gmacs, params):
    with torch.device("meta"):
        model = I3DFeatures(in_chans=channels)
        macs = count_macs(model, torch.zeros(1, channels, 256, 96, 96))
    assert model.channels == [832, 1024]
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.005)
    assert sum(p.numel() for p in model.parameters()) == params


def test_weights_of_i3d_have_their_official_names(tmp_path):
    state = {key: tuple(tensor.shape) for key, tensor in I3D(width=1.0).to("meta").state_dict().items()}
    assert state["Conv3d_1a_7x7.conv3d.weight"] == (64, 3, 7, 7, 7)
    assert state["Mixed_4f.b1b.bn.running_mean"] == (320,)
    assert state["logits.conv3d.weight"] == (400, 1024, 1, 1, 1)
    assert len(state) == 57 * 6 + 2
    official = I3D(num_classes=7, width=0.05)
    for buffer in official.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    torch.save(official.state_dict(), tmp_path / "rgb_imagenet.pt")
    for norm in ("batch", "frozen"):
        model = create_video_features("i3d", width=0.05, norm=norm)
        report = load_checkpoint(model, tmp_path / "rgb_imagenet.pt")
        assert not report.missing
        assert not report.mismatched
        assert torch.equal(model.get_submodule("Mixed_5c.b0.bn").running_var, official.Mixed_5c.b0.bn.running_var)


def test_frozen_norms_are_constants():
    model = features("i3d", norm="frozen")
    expected = features("i3d").eval()(clip(8, 32, 32))
    for frozen, plain in zip(model.train()(clip(8, 32, 32)), expected, strict=True):
        torch.testing.assert_close(frozen, plain)
    assert not [name for name, _ in model.named_parameters() if ".bn." in name]


@pytest.mark.parametrize("size", [7, 8, 9, 1])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (3, 1), (1, 1), (7, 4)])
def test_same_padding(size, kernel, stride):
    """As many outputs as strides fit, the padding that is odd behind: a kernel of 3 and stride 2 pads behind alone."""
    conv = SameConv1d(1, 1, kernel, stride, bias=False)
    nn.init.ones_(conv.weight)
    output = conv(torch.ones(1, 1, size))
    assert output.shape[2] == up(size, stride)
    total = max((up(size, stride) - 1) * stride + kernel - size, 0)
    first = min(kernel - total // 2, size)
    assert output[0, 0, 0] == first
    pooled = SameMaxPool3d((1, 1, kernel), stride=(1, 1, stride))(torch.arange(float(size)).view(1, 1, 1, 1, size))
    assert pooled[0, 0, 0, 0, 0] == first - 1


# -- frames -----------------------------------------------------------------------------------------------------------


def test_passes_over_frames_change_nothing():
    results = []
    for frames_per_pass in (1, 100):
        model = features("test_resnet", frames_per_pass=frames_per_pass).double().eval()
        pixels = clip(11, 40, 40).double().requires_grad_()
        maps = model(pixels)
        sum(x.square().sum() for x in maps).backward()
        results.append([*maps, pixels.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    seen = results[0][-1].abs().amax(dim=(0, 1, 3, 4)) > 0
    assert seen.nonzero().flatten().tolist() == [2, 6, 10]


def test_frame_features_are_those_of_the_image_backbone():
    model = features("test_resnet").double().eval()
    pixels = clip(8, 40, 40).double()
    fine, coarse = model(pixels)
    maps = [model.features(pixels[:, :, frame]) for frame in (2, 6)]
    torch.testing.assert_close(fine, torch.stack([x[2] for x in maps], dim=2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(coarse[:, :, 0], (maps[0][3] + maps[1][3]) / 2, rtol=1e-9, atol=1e-9)


def test_norms_of_unread_maps_are_left_out():
    class Pyramid(nn.Module):
        channels, strides = [1, 2, 3, 4], [4, 8, 16, 32]

        def __init__(self):
            super().__init__()
            for i in range(4):
                self.add_module(f"norm{i}", nn.LayerNorm(i + 1))

    assert [name for name, _ in FrameFeatures(Pyramid()).features.named_parameters()] == [
        "norm2.weight", "norm2.bias", "norm3.weight", "norm3.bias",
    ]  # fmt: skip


# -- timm's methods ---------------------------------------------------------------------------------------------------


@classifiers
def test_classifiers(name):
    torch.manual_seed(0)
    model = create(name, num_classes=5, **CLASSIFIERS[name]).eval()
    pixels = clip(8, 48, 40)
    x = model.forward_features(pixels)
    assert model(pixels).shape == (2, 5)
    assert torch.equal(model.forward_head(x), model(pixels))
    assert model.forward_head(x, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model(pixels).shape == (2, 3)
    model.reset_classifier(0)
    assert model(pixels).shape == (2, model.num_features)
    assert model.get_classifier() is not None
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "max")
    assert timm.get_pretrained_cfg(name).input_size == (3, *{"stpt": (96, 96), "i3d": (224, 224)}[name])
    assert [level["reduction"] for level in model.feature_info][-2:] == [16, 32]
    assert [level["temporal_reduction"] for level in model.feature_info][-2:] == [4, 8]
    assert {level["module"] for level in model.feature_info} <= {key for key, _ in model.named_modules()}


@classifiers
def test_layer_groups_follow_the_forward_pass(name):
    model = create(name, num_classes=5, **CLASSIFIERS[name])
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert sorted(groups) == sorted(key for key, _ in model.named_parameters())
    order = []
    for path, module in model.named_modules():
        if path and list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, path=path: order.append(path))
    model(clip(8, 32, 32))
    layers = [groups[key] for path in order for key in groups if key.rpartition(".")[0] == path]
    assert layers == sorted(layers)
    assert len(set(layers)) > 6
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(coarse) == sorted(groups)
    assert not model.no_weight_decay()


@classifiers
def test_checkpointing_changes_nothing(name):
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        options = {"drop_path_rate": 0.3} if name == "stpt" else {}
        model = create(name, num_classes=5, **CLASSIFIERS[name], **options)
        model.train(name == "stpt")  # batch normalisation would count a recomputed clip twice
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        scores = model(clip(8, 32, 32))
        scores.square().sum().backward()
        results.append([scores, *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# -- precision and compilers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@classifiers
def test_half_precision(name, dtype):
    torch.manual_seed(0)
    model = create(name, num_classes=5, **CLASSIFIERS[name]).eval()
    pixels = clip(8, 40, 40)
    exact = model(pixels)
    with torch.autocast("cpu", dtype):
        mixed = model(pixels)
    half = model.to(dtype)(pixels.to(dtype))
    assert half.dtype == mixed.dtype == dtype
    for scores in (mixed, half):
        assert (scores.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.slow
def test_export_and_compilation_of_stpt():
    torch.manual_seed(0)
    model, pixels = STPT(num_classes=5, **{**TINY_STPT, "depths": (1, 1, 1, 1)}).eval(), clip(6, 40, 40)
    expected = model(pixels)
    exported = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    more = clip(6, 40, 40, batch=3)
    torch.testing.assert_close(exported(more), model(more), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(pixels)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
