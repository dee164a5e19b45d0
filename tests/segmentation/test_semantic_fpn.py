"""Semantic FPN and the preprocessing it shares: sizes, parameters, loss."""

import pytest
import torch
import torch.nn.functional as F

from backbones import create_features
from tasks.core.preprocess import IMAGENET_MEAN, IMAGENET_STD, NormalizeAndPad
from tasks.segmentation.labels import pixel_cross_entropy
from tasks.segmentation.semantic_fpn import FPN, SemanticFPNHead, SemanticFPNNetwork


def test_parameters_of_the_published_resnet50_model():
    with torch.device("meta"):
        network = SemanticFPNNetwork(create_features("resnet50"), 150)
    assert sum(p.numel() for p in network.parameters()) == 28_495_574


def test_any_size_and_backbone_gives_logits_at_a_quarter_of_the_padded_image():
    network = SemanticFPNNetwork(create_features("pvt_v2_b0"), 5).eval()
    images = torch.randint(0, 256, (2, 3, 70, 41), dtype=torch.uint8)
    assert network(images).shape == (2, 5, 24, 16)


def test_loss_is_cross_entropy_over_labelled_pixels_of_the_unpadded_image():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 16, 8)
    mask = torch.randint(0, 5, (2, 60, 31), dtype=torch.uint8)
    mask[0, :20] = 255
    upsampled = F.interpolate(logits, size=(64, 32), mode="bilinear", align_corners=False)[:, :, :60, :31]
    expected = F.cross_entropy(upsampled.movedim(1, -1)[mask != 255], mask[mask != 255].long())
    torch.testing.assert_close(pixel_cross_entropy(logits, mask), expected)
    assert pixel_cross_entropy(logits, torch.full_like(mask, 255)) == 0


def test_a_step_of_training_reaches_every_parameter():
    network = SemanticFPNNetwork(create_features("resnet18"), 5)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    pixel_cross_entropy(network(images), torch.randint(0, 5, (2, 64, 64), dtype=torch.uint8)).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_the_pyramid_adds_coarser_levels_from_the_top():
    fpn = FPN([2, 3], dim=4)
    fine, coarse = torch.randn(1, 2, 5, 7), torch.randn(1, 3, 3, 4)
    outputs = fpn([fine, coarse])
    merged = fpn.laterals[0](fine) + F.interpolate(fpn.laterals[1](coarse), size=(5, 7), mode="nearest")
    torch.testing.assert_close(outputs[0], fpn.outputs[0](merged))
    torch.testing.assert_close(outputs[1], fpn.outputs[1](fpn.laterals[1](coarse)))


def test_head_upsamples_level_i_i_times():
    head = SemanticFPNHead(4, 6, 3, num_levels=4, dropout=0.1)
    kinds = [[type(m).__name__ for m in level] for level in head.levels]
    step = ["Conv2d", "BatchNorm2d", "ReLU", "Upsample"]
    assert kinds == [step[:3], step, step * 2, step * 3]
    assert head([torch.randn(2, 4, 16 // s, 16 // s) for s in (1, 2, 4, 8)]).shape == (2, 3, 16, 16)


def test_preprocessing_normalises_then_pads_with_zeros():
    image = torch.randint(0, 256, (1, 3, 33, 64), dtype=torch.uint8)
    x = NormalizeAndPad()(image)
    assert x.shape == (1, 3, 64, 64)
    expected = (image[0, 1, 32, 63].item() - IMAGENET_MEAN[1]) / IMAGENET_STD[1]
    assert x[0, 1, 32, 63].item() == pytest.approx(expected, abs=1e-6)
    assert not x[:, :, 33:].any()
    assert NormalizeAndPad().state_dict() == {}
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\): expected \(B, 3, H, W\)"):
        NormalizeAndPad()(image[0, :, :8, :8])
