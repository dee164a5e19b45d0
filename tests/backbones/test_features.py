"""Feature pyramids: shapes for any timm family and image size, frozen norms, names and errors."""

import pytest
import torch

from backbones import create, create_features
from backbones.lit_ti import LITTiDense
from backbones.positions import relative_index
from backbones.swin import SWIN_VARIANTS, SwinFeatures


def tiny_swin(**options):
    return SwinFeatures(embed_dim=8, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 4), window_size=3, **options)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "pvt_v2_b0", "mobilenetv3_small_050", "regnety_002"])
def test_any_timm_family_gives_strides_4_to_32(name):
    features = create_features(name)
    maps = features.eval()(torch.randn(1, 3, 96, 160))
    assert features.strides == [4, 8, 16, 32]
    assert [tuple(x.shape) for x in maps] == [
        (1, c, 96 // s, 160 // s) for c, s in zip(features.channels, features.strides, strict=True)
    ]


def test_every_parameter_receives_a_gradient():
    features = create_features("mobilenetv3_small_050")
    sum(x.mean() for x in features(torch.randn(2, 3, 64, 64))).backward()
    assert [name for name, p in features.named_parameters() if p.grad is None] == []


def test_channels_last_models_return_nchw():
    maps = create_features("swinv2_cr_tiny_ns_224", img_size=64).eval()(torch.randn(1, 3, 64, 64))
    assert [x.shape[1] for x in maps] == [96, 192, 384, 768]


def test_models_of_fixed_size_take_other_sizes_where_timm_can():
    maps = create_features("swinv2_tiny_window8_256").eval()(torch.randn(1, 3, 64, 96))
    assert maps[-1].shape[-2:] == (2, 3)


def test_levels_can_be_chosen():
    features = create_features("resnet18", out_indices=(0, 2))
    assert features.strides == [2, 8]
    assert len(features(torch.randn(1, 3, 32, 32))) == 2


def test_frozen_norm_of_resnet50_leaves_the_published_parameters():
    with torch.device("meta"):
        frozen, trained = create_features("resnet50", norm="frozen"), create_features("resnet50")
    assert sum(p.numel() for p in frozen.parameters()) == 23_454_912
    assert sum(p.numel() for p in trained.parameters()) == 23_508_032


def test_frozen_norm_ignores_batch_statistics():
    features = create_features("resnet18", norm="frozen").train()
    image = torch.randn(2, 3, 64, 64)
    before = {k: v.clone() for k, v in features.state_dict().items()}
    both, single = features(image)[-1][:1], features(image[:1])[-1]
    torch.testing.assert_close(both, single)
    assert all(torch.equal(before[k], v) for k, v in features.state_dict().items())


def test_drop_path_rate_reaches_the_model():
    def rates(features):
        return [m.drop_prob for m in features.modules() if type(m).__name__ == "DropPath"]

    assert max(rates(create_features("convnext_atto", drop_path_rate=0.25))) == pytest.approx(0.25)
    assert max(rates(create_features("swin_tiny_patch4_window7_224", drop_path_rate=0.3))) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_features("resnt50"), "unknown backbone 'resnt50'; nearest names: resnet50"),
        (lambda: create("resnet50.nothing"), "unknown weights 'resnet50.nothing'; timm has: .*resnet50.tv_in1k"),
        (lambda: create_features("vit_tiny_patch16_224"), r"'vit_tiny_patch16_224' has no feature pyramid.*\[16\]"),
        (lambda: create_features("resnet18", norm="group"), "norm='group': expected 'batch' or 'frozen'"),
        (lambda: create_features("resnet18", drop_path_rate=2.0), "drop_path_rate=2.0: expected a probability below 1"),
    ],
)
def test_names_and_options_that_cannot_be_used(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pretrained_without_network_names_the_model_and_the_way_out(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    with pytest.raises(RuntimeError, match=r"'resnet18' could not be downloaded.*local weight file"):
        create_features("resnet18", pretrained=True)


def test_create_is_timm_create_model():
    assert create("resnet18", num_classes=7).fc.out_features == 7


# -- Swin -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (42, 61), (97, 33)])
def test_swin_takes_any_size(size):
    maps = tiny_swin().eval()(torch.randn(1, 3, *size))
    expected, (height, width) = [], ((n + 3) // 4 for n in size)
    for _ in range(4):
        expected.append((height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    assert [tuple(x.shape[-2:]) for x in maps] == expected


def test_swin_agrees_with_timm_where_nothing_is_padded():
    import timm

    name = "swin_tiny_patch4_window7_224"
    reference = timm.create_model(name, num_classes=0).eval()
    features = create_features(name).eval()
    missing, unexpected = features.load_state_dict(reference.state_dict(), strict=False)
    assert set(missing) == {f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")}
    assert set(unexpected) == {"norm.weight", "norm.bias"}
    for i in range(4):
        setattr(features, f"norm{i}", torch.nn.Identity())
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = reference.forward_intermediates(image, intermediates_only=True)
        # timm drops the shift where one window covers the whole map, that is in the last stage
        for ours, theirs in list(zip(features(image), expected, strict=True))[:3]:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_swin_names_of_the_papers_build():
    counts = {}
    with torch.device("meta"):
        for name in SWIN_VARIANTS:
            counts[name] = sum(p.numel() for p in create_features(name).parameters())
    assert counts["swin_tiny_patch4_window7_224"] == 27_520_698
    assert counts["swin_base_patch4_window12_384"] == 86_880_376
    assert counts["swin_large_patch4_window12_384"] == 195_201_204


def test_swin_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain = tiny_swin().train()
    image = torch.randn(1, 3, 40, 40)
    gradients = []
    for enable in (False, True):
        plain.set_grad_checkpointing(enable)
        plain.zero_grad()
        sum(x.square().sum() for x in plain(image)).backward()
        gradients.append(plain.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_swin_matcher_numbers_layers_from_the_stem():
    from timm.models import group_parameters

    swin = tiny_swin()
    layers = group_parameters(swin, swin.group_matcher(), reverse=True)
    assert layers["patch_embed.proj.weight"] == 0
    assert layers["layers.0.blocks.0.norm1.weight"] == 1
    assert layers["layers.1.downsample.norm.weight"] == layers["layers.1.blocks.0.norm1.weight"] == 3
    assert layers["norm0.weight"] == max(layers.values())
    assert swin.no_weight_decay() == {n for n, _ in swin.named_parameters() if "bias_table" in n}


def test_relative_positions_of_a_window_of_two():
    assert relative_index(2, 2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


# -- LIT, LITv2 -------------------------------------------------------------------------------------------------------

OURS = ["lit_ti", "lit_s", "lit_m", "lit_b", "litv2_s", "litv2_m", "litv2_b", "litv2_b_384", "litv2_s_alpha05"]


def test_pyramids_of_every_lit_are_the_official_dense_networks():
    with torch.device("meta"):
        for name in OURS:
            for flavour in ("segmentation", "detection"):
                features = create_features(name, flavour=flavour)
                norms = {key.split(".")[0] for key in features.state_dict() if key.startswith("norm")}
                first = {"segmentation": 0, "detection": 1}[flavour]
                assert norms == (set() if name == "lit_ti" else {f"norm{i}" for i in range(first, 4)}), name
                assert features.strides == [4, 8, 16, 32]
                assert not any("head" in key or "cls_token" in key for key in features.state_dict())
    assert features.channels == [96, 192, 384, 768]


@pytest.mark.parametrize("name", ["lit_ti", "lit_s", "litv2_s"])
def test_options_of_pyramids_reach_lit(name):
    features = create_features(name, out_indices=(0, 2), norm="frozen", drop_path_rate=0.25).train()
    assert features.strides == [4, 16]
    rates = [m.drop_prob for m in features.modules() if type(m).__name__ == "DropPath"]
    assert 0 < max(rates) < 0.25  # the rate of the last stage, which is left out
    image = torch.randn(1, 3, 45, 61)
    maps = features(image)
    assert [x.shape[1] for x in maps] == features.channels
    sum(x.sum() for x in maps).backward()
    assert [n for n, p in features.named_parameters() if p.grad is None] == []
    buffers = {n for n, _ in features.named_buffers() if "norm_layer" in n}
    assert any(n.endswith("norm_layer.weight") for n in buffers)


def test_lit_has_no_weights_to_download():
    message = r"there are no weights of 'litv2_s' to download; set pretrained to false .* the option weights"
    for call in (create, create_features):
        with pytest.raises(RuntimeError, match=message):
            call("litv2_s", pretrained=True)


def test_a_flavour_that_does_not_exist():
    for name in ("litv2_s", "resnet18"):
        with pytest.raises(ValueError, match="flavour='pose': expected 'segmentation' or 'detection'"):
            create_features(name, flavour="pose")


def test_hvt_has_no_pyramid():
    with pytest.raises(ValueError, match=r"'hvt_s_1' has no feature pyramid: maps of strides \[4, 8, 16, 32\]"):
        create_features("hvt_s_1")


def test_lit_ti_resizes_positions_to_another_shape_unless_asked_for_the_official_rule():
    sizes = {"img_size": 64, "embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    ours, official = LITTiDense(**sizes).eval(), LITTiDense(**sizes, official_positions=True).eval()
    official.load_state_dict(ours.state_dict())
    for size, equal in (((32, 128), False), ((64, 64), True), ((48, 80), True), ((128, 128), True)):
        image = torch.randn(1, 3, *size)
        # 128 x 128 has as many tokens in stage 2 as the embedding in stage 1: official code stops there
        pairs = zip(ours(image), official(image), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == equal, size


@pytest.mark.parametrize("size", [(32, 32), (33, 63), (70, 41), (64, 128)])
def test_lit_ti_classifies_images_of_any_size(size):
    model = create("lit_ti", num_classes=3, img_size=64).eval()
    with torch.no_grad():
        scores, (tokens, maps) = model(torch.randn(2, 3, *size)), model.forward_intermediates(torch.randn(2, 3, *size))
    assert scores.shape == (2, 3)
    assert [tuple(x.shape[-2:]) for x in maps] == [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    assert tokens.shape == (2, 1 + (size[0] // 32) * (size[1] // 32), 512)
