"""AFSD's head and network: sizes, points, gradients, variants, and the names of official weights."""

import pytest
import torch
from torch import nn

from backbones import create_video_features
from backbones.checkpoint import rename
from backbones.i3d import I3DFeatures
from backbones.macs import count_macs
from backbones.stpt import STPTFeatures
from tasks.video.afsd.decoding import average, decode, fuse_activitynet
from tasks.video.afsd.head import AFSDHead
from tasks.video.afsd.keys import OFFICIAL_HEAD_KEYS
from tasks.video.afsd.network import AFSDNetwork
from tasks.video.afsd.windows import frame_windows, level_windows

TINY_STPT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


def head_for(channels=(5, 7), sides=(2, 1), **options):
    torch.manual_seed(0)
    return AFSDHead(channels, 3, sides=sides, dim=64, **options)


def inputs_for(steps=8, channels=(5, 7), sides=(2, 1), batch=2):
    torch.manual_seed(1)
    return [
        torch.randn(batch, width, -(-steps // (1 + i)), side, side)
        for i, (width, side) in enumerate(zip(channels, sides, strict=True))
    ]


@pytest.mark.parametrize(("steps", "levels"), [(64, [64, 32, 16, 8, 4, 2]), (13, [13, 7, 4, 2, 1, 1])])
def test_points_of_the_levels(steps, levels):
    output = head_for()(inputs_for(steps), 4 * steps)
    assert output.levels.bincount().tolist() == levels
    expected = torch.cat([(torch.arange(count) + 0.5) / count for count in levels])
    torch.testing.assert_close(output.points, expected)
    total = sum(levels)
    shapes = {name: tuple(getattr(output, name).shape) for name in output._fields[:5]}
    assert shapes == {
        "loc": (2, total, 2), "conf": (2, total, 4), "prop_loc": (2, total, 2), "prop_conf": (2, total, 4),
        "quality": (2, total),
    }  # fmt: skip
    assert [tuple(x.shape) for x in output.boundaries] == [(2, 64, 4 * steps), (2, 128, steps), (2, 128, steps)]
    assert (output.loc > 0).all()


def test_every_parameter_receives_a_gradient():
    head = head_for().train()
    output = head(inputs_for(64), 256)
    terms = [*output[:5], *output.boundaries]
    sum((x * torch.randn_like(x)).sum() for x in terms).backward()
    assert [key for key, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_clips_do_not_influence_each_other():
    head, inputs = head_for().double(), [x.double() for x in inputs_for()]
    together, alone = head(inputs, 32), head([x[1:] for x in inputs], 32)
    for one, other in zip(together[:5], alone[:5], strict=True):
        torch.testing.assert_close(one[1:], other, rtol=1e-9, atol=1e-9)


def test_boundary_features_are_those_of_the_predictions():
    for head, inputs in ((head_for(), inputs_for()), (head_for((7,), (1,)), inputs_for()[1:])):
        expected = head(inputs, 32).boundaries
        for one, other in zip(head.boundary_features(inputs, 32), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_distances_in_units_of_the_levels():
    heads = [head_for(scale_by_level=scaled).eval() for scaled in (False, True)]
    plain, scaled = (head(inputs_for(64), 256) for head in heads)
    torch.testing.assert_close(scaled.loc, plain.loc * (4 * 2**plain.levels)[:, None])


def test_small_initialisation_leaves_the_pyramid():
    plain, small = head_for(), head_for(small_init=True)
    assert torch.equal(plain.pyramid.levels[0].conv.weight, small.pyramid.levels[0].conv.weight)
    assert small.loc_tower[0].conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert plain.loc_tower[0].conv.weight.std().item() == pytest.approx((1 / (64 * 3)) ** 0.5, rel=0.05)
    assert not any(p.any() for name, p in small.named_parameters() if name.endswith("conv.bias"))


def test_half_precision_keeps_distances_precise():
    head, inputs = head_for(), inputs_for(64)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(inputs, 256)
    assert output.loc.dtype == output.points.dtype == torch.float32
    torch.testing.assert_close(output.loc, head(inputs, 256).loc, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AFSDHead([5], 3, sides=[1], dim=96), "dim=96: expected a multiple of 64"),
        (lambda: AFSDHead([5], 0, sides=[1], dim=64), "num_classes=0"),
        (lambda: AFSDHead([5], 3, dim=64), "expected one or two of each"),
        (lambda: head_for()(inputs_for(sides=(3, 1)), 32), "made for maps of 2 x 2, got 3 x 3"),
        (lambda: head_for()(inputs_for()[:1], 32), "reads 2 maps, got 1"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- windows ----------------------------------------------------------------------------------------------------------


def test_windows_of_a_proposal():
    """A proposal of frames 12 to 52 of 64, at the third of four points: 16 frames are one step."""
    centres = (torch.arange(4) + 0.5) / 4
    distances = torch.zeros(1, 4, 2)
    distances[0, 2] = torch.tensor([40 - 12.0, 52 - 40.0])
    # positions 2 - 1.75 and 2 + 0.75, length 2.5: at least 1 inwards and outwards
    assert level_windows(distances, centres, 64)[0, 2].tolist() == [-1, 1, 2, 4]
    # length 41: a quarter is 10.25, a tenth 4.1
    assert frame_windows(torch.tensor([12.0]), torch.tensor([52.0])).tolist() == [[8, 22, 42, 56]]


# -- the network ------------------------------------------------------------------------------------------------------


def test_cost_of_the_detectors():
    """Multiply-adds of STPT with the head, and of AFSD itself on RGB and on flow (arXiv 2103.13137)."""
    expected = {"stpt": (107.9, 45_643_872 + 23_021_621), "rgb": (84.22, None), "flow": (77.74, None)}
    for name, (gmacs, params) in expected.items():
        with torch.device("meta"):
            channels = 2 if name == "flow" else 3
            backbone = STPTFeatures() if name == "stpt" else I3DFeatures(in_chans=channels)
            network = AFSDNetwork(backbone, AFSDHead(backbone.channels, 20))
            macs = count_macs(network, torch.zeros(1, channels, 256, 96, 96))
        assert macs / 1e9 == pytest.approx(gmacs, abs=0.06)
        assert params is None or sum(p.numel() for p in network.parameters()) == params


@pytest.mark.parametrize("name", ["stpt", "i3d", "test_resnet"])
def test_detectors_on_every_backbone(name):
    torch.manual_seed(0)
    options = {"stpt": TINY_STPT, "i3d": {"width": 0.05}, "test_resnet": {}}[name]
    backbone = create_video_features(name, norm="frozen", **options)
    network = AFSDNetwork(backbone, AFSDHead(backbone.channels, 3, sides=(2, 1), dim=64)).double().eval()
    clips = torch.randint(0, 256, (2, 3, 16, 32, 32), dtype=torch.uint8)
    output, none = network(clips)
    assert none is None
    assert output.length == 16
    again, spliced = network(clips[:1], clips)
    torch.testing.assert_close(again.conf, output.conf[:1], rtol=1e-9, atol=1e-9)
    for one, other in zip(spliced, output.boundaries, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_pixels_are_normalised():
    class Eye(nn.Module):
        def forward(self, clips):
            self.seen = clips
            return [clips.new_zeros(1, 4, 2, 1, 1)]

    eye = Eye()
    AFSDNetwork(eye, AFSDHead([4], 1, sides=[1], dim=64))(torch.tensor([0, 255]).byte().view(1, 1, 2, 1, 1))
    assert eye.seen.flatten().tolist() == [-1, 1]


def test_sequences_of_features():
    network = AFSDNetwork(None, AFSDHead([6], 2, sides=[None], dim=64), frames_per_feature=4)
    output, spliced = network(torch.randn(2, 6, 16), torch.randn(1, 6, 16))
    assert output.length == output.boundaries.frame.shape[2] == 64
    assert spliced.frame.shape == (1, 64, 64)


def test_official_names_lead_to_every_weight():
    """A sample of official names of each kind; tests/goldens has all of those of the head for THUMOS14."""
    names = {
        "coarse_pyramid_detection.pyramids.1.0.conv3d.weight": "head.pyramid.levels.1.conv.weight",
        "coarse_pyramid_detection.pyramids.1.1.bias": "head.pyramid.levels.1.norm.bias",
        "coarse_pyramid_detection.loc_heads.3.scale": "head.scales.3",
        "coarse_pyramid_detection.conf_tower.1.0.conv1d.bias": "head.conf_tower.1.conv.bias",
        "coarse_pyramid_detection.conf_tower.0.1.weight": "head.conf_tower.0.norm.weight",
        "coarse_pyramid_detection.conf_proposal_branch.roi_conv.1.weight": "head.conf_branch.frame.norm.weight",
        "coarse_pyramid_detection.prop_loc_head.conv1d.weight": "head.prop_loc_head.weight",
        "coarse_pyramid_detection.center_head.conv1d.bias": "head.quality_head.bias",
        "coarse_pyramid_detection.deconv.3.conv1d.weight": "head.frame_feature.layers.1.conv.weight",
        "coarse_pyramid_detection.deconv.7.weight": "head.frame_feature.layers.2.norm.weight",
        "backbone._model.Mixed_4f.b1b.conv3d.weight": "backbone.Mixed_4f.b1b.conv3d.weight",
    }
    assert list(rename(dict.fromkeys(names, torch.zeros(1)), OFFICIAL_HEAD_KEYS)) == list(names.values())
    with torch.device("meta"):
        network = AFSDNetwork(I3DFeatures(), AFSDHead((832, 1024), 20))
    assert set(names.values()) <= network.state_dict().keys()


# -- decoding ---------------------------------------------------------------------------------------------------------


def test_decoding_by_hand():
    output = head_for((7,), (1,), num_levels=1)(inputs_for(2)[1:], 8)  # a single point, at frame 4
    output = output._replace(
        loc=torch.tensor([[[3.0, 1.0]]]).expand(2, -1, -1),
        prop_loc=torch.tensor([[[0.5, -0.25]]]).expand(2, -1, -1),
        conf=torch.tensor([[[0.0, 0, 0, 0]]]).expand(2, -1, -1),
        prop_conf=torch.tensor([[[0.0, 0, 0, 50]]]).expand(2, -1, -1),
        quality=torch.zeros(2, 1),
    )
    segments, scores = decode(output)
    # half the length is 2: distances 3 + 1 and 1 - 0.5
    assert segments.tolist() == [[[0.0, 4.5]]] * 2
    # the mean of 1/4 each and of 0, 0, 1, times 1/2
    torch.testing.assert_close(scores, torch.tensor([[[0.0625, 0.0625, 0.3125]]] * 2))


def test_fusion_of_two_streams():
    one, other = (head_for()(x, 32) for x in (inputs_for(), [2 * x for x in inputs_for()]))
    both = average([one, other])
    torch.testing.assert_close(both.conf, (one.conf + other.conf) / 2)
    torch.testing.assert_close(both.loc, (one.loc + other.loc) / 2)
    assert both.length == 32
    segments, scores = fuse_activitynet([one, other])
    torch.testing.assert_close(segments, (decode(one)[0] * decode(other)[0]).sqrt())
    assert torch.equal(scores, decode(both)[1])
