"""HVT and the pooling of tokens in timm's Vision Transformers."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

from backbones import create_features, pool_tokens
from backbones.hvt import HVT
from backbones.token_pooling import pooled_blocks, pooled_length

SMALL = {"img_size": 64, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def plain_vit(**options):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, "patch_size": 8, **options})


def lengths(model, image):
    return [x.shape[1] for x in model.forward_intermediates(image, intermediates_only=True)]


def test_a_pooled_vit_equals_hvt():
    vit = pool_tokens(plain_vit(class_token=False, global_pool="avg", fc_norm=False), pool_block_width=2)
    hvt = HVT(**SMALL, patch_size=8, pool_block_width=2)
    assert list(hvt.state_dict()) == list(vit.state_dict())
    hvt.load_state_dict(vit.state_dict())
    assert torch.equal(hvt(IMAGE), vit(IMAGE))


def test_pooling_is_along_the_row_major_sequence_and_adds_the_embedding():
    model = HVT(**SMALL, patch_size=8, pool_block_width=4).eval()
    plain = HVT(**SMALL, patch_size=8, pool_block_width=0).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    (before,) = plain.forward_intermediates(IMAGE, [0], intermediates_only=True)
    (after,) = model.forward_intermediates(IMAGE, [0], intermediates_only=True)
    triples = torch.stack([before[:, start : 62 + start : 2] for start in range(3)])
    assert torch.equal(after, triples.amax(0) + model.blocks[0].pos_embed)


@pytest.mark.parametrize(("length", "kernel", "expected"), [(196, 3, 97), (97, 3, 48), (4, 2, 2), (2, 3, 1), (1, 3, 1)])
def test_lengths(length, kernel, expected):
    assert pooled_length(length, kernel, 2) == expected
    if length >= kernel:
        assert F.max_pool1d(torch.zeros(1, 1, length), kernel, 2).shape[2] == expected


def test_a_sequence_shorter_than_the_kernel_becomes_one_token():
    model = HVT(**SMALL, pool_block_width=1, pool_kernel_size=3).eval()  # 16 tokens at 64 px
    assert lengths(model, IMAGE) == [7, 3, 1, 1]
    assert lengths(model, IMAGE[..., :32, :32]) == [1, 1, 1, 1]
    assert model(IMAGE[..., :33, :47]).isfinite().all()


def test_sequences_of_another_length_get_the_embedding_resized_linearly():
    model = HVT(**SMALL, patch_size=8, pool_block_width=4).eval()
    with torch.no_grad():
        model.blocks[0].pos_embed.copy_(torch.arange(31.0)[None, :, None].expand(1, 31, 24))
    plain = HVT(**SMALL, patch_size=8, pool_block_width=0).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    wide = F.interpolate(IMAGE, (64, 128))
    (before,) = plain.forward_intermediates(wide, [0], intermediates_only=True)
    (after,) = model.forward_intermediates(wide, [0], intermediates_only=True)
    added = (after - F.max_pool1d(before.mT, 3, 2).mT)[0, :, 0]
    expected = ((torch.arange(63) + 0.5) * 31 / 63 - 0.5).clamp(0, 30)
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-5)


def test_pixels_that_fill_no_patch_are_left_out():
    model = HVT(**{**SMALL, "img_size": (35, 50)}, patch_size=8, pool_block_width=2).eval()
    image = torch.randn(1, 3, 35, 50)
    assert model.pos_embed.shape == (1, 24, 24)
    assert torch.equal(model(image), model(image[..., :32, :48]))


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({}, 1),
        ({"reg_tokens": 4}, 5),
        ({"reg_tokens": 3, "no_embed_class": True, "global_pool": "avg"}, 4),
        ({"class_token": False, "global_pool": "avg"}, 0),
        ({"class_token": False, "global_pool": "map"}, 0),
        ({"pos_embed": "none", "block_fn": ParallelScalingBlock}, 1),
    ],
)
def test_prefix_tokens_pass_by(options, prefix):
    model = plain_vit(**options).eval()
    names = list(model.state_dict())
    (before,) = copy.deepcopy(model).forward_intermediates(IMAGE, [0], output_fmt="NLC", intermediates_only=True)
    assert pool_tokens(model, pool_block_width=2) is model
    assert [name for name in model.state_dict() if name not in ("blocks.0.pos_embed", "blocks.2.pos_embed")] == names
    features, tokens = model.forward_intermediates(IMAGE)
    assert features.shape == (2, 15 + prefix, 24)
    assert [x.shape[1] for x in tokens] == [31, 31, 15, 15]
    assert torch.equal(tokens[0], F.max_pool1d(before.mT, 3, 2).mT + model.blocks[0].pos_embed)
    assert torch.equal(model.forward_features(IMAGE), features)
    assert model.forward_head(features, pre_logits=True).shape == (2, 24)
    assert model(IMAGE).shape == (2, 5)
    model.reset_classifier(7)
    assert model(IMAGE).shape == (2, 7)


def test_the_distillation_token_passes_by():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=3, num_classes=5).eval()
    pool_tokens(model, pool_block_width=2)
    assert model.blocks[0].pos_embed.shape == (1, 7, 192)
    assert model.forward_features(IMAGE).shape == (2, 3 + 2, 192)
    model.set_distilled_training()
    assert [tuple(x.shape) for x in model.train()(IMAGE)] == [(2, 5), (2, 5)]
    assert "dist_token" in model.no_weight_decay()


def test_layer_groups_and_weight_decay_include_the_new_embeddings():
    model = pool_tokens(plain_vit(), pool_block_width=2)
    assert model.no_weight_decay() == {"cls_token", "pos_embed", "blocks.0.pos_embed", "blocks.2.pos_embed"}
    groups = timm.models.group_parameters(model, model.group_matcher())
    (layer,) = [layer for layer, names in groups.items() if "blocks.2.pos_embed" in names]
    assert "blocks.2.mlp.fc1.weight" in groups[layer]


def test_another_input_size_resizes_the_embeddings():
    model = pool_tokens(plain_vit(), pool_block_width=2)
    model.set_input_size((64, 96))
    assert [block.pos_embed.shape[1] for block, _ in pooled_blocks(model)] == [47, 23]
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)


def test_copies_and_pickles_pool_too():
    model = pool_tokens(plain_vit(), pool_block_width=2).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.blocks[0].pos_embed.add_(1)
        assert lengths(other, IMAGE) == [31, 31, 15, 15]
        assert not torch.equal(other(IMAGE), model(IMAGE))


def test_what_cannot_be_pooled():
    pooled = pool_tokens(plain_vit(), pool_block_width=2)
    with pytest.raises(ValueError, match="PooledVisionTransformer: expected a VisionTransformer of timm whose tokens"):
        pool_tokens(pooled, pool_block_width=2)
    with pytest.raises(ValueError, match="ResNet: expected a VisionTransformer"):
        pool_tokens(timm.create_model("test_resnet"), pool_block_width=2)
    vit = plain_vit()
    with pytest.raises(ValueError, match="kernel_size=0: expected 1 or more"):
        pool_tokens(vit, pool_block_width=2, kernel_size=0)
    assert lengths(pool_tokens(vit, pool_block_width=2), IMAGE) == [31, 31, 15, 15]  # nothing was changed before


def test_pooled_tokens_are_no_maps():
    model = timm.create_model("hvt_s_2", features_only=True, img_size=64, embed_dim=24, num_heads=2)
    assert [tuple(x.shape) for x in model(IMAGE)] == [(2, 3, 24)] * 3
    with pytest.raises(ValueError, match="output_fmt='NCHW': pooled tokens are a sequence, not a map"):
        model.model.forward_intermediates(IMAGE, output_fmt="NCHW")
    with pytest.raises(ValueError, match="backbone 'hvt_s_2' has no feature pyramid"):
        create_features("hvt_s_2")
