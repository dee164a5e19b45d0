import pytest
import torch
from torch import nn

from backbones.checkpoint import rename
from tasks.segmentation.faseg.keys import HEAD_KEYS, OFFICIAL_HEAD_KEYS
from tasks.segmentation.faseg.network import FASegNetwork


def head_keys(**options):
    with torch.device("meta"):
        model = FASegNetwork(nn.Identity(), [8, 8, 8, 8], 3, hidden_dim=32, **options)
    return dict.fromkeys(model.state_dict(), torch.zeros(0))


@pytest.mark.parametrize("options", [{}, {"dynamic_queries": False, "high_resolution": False, "num_layers": 9}])
def test_names_survive_the_way_to_official_ones_and_back(options):
    ours = head_keys(**options)
    official = rename(ours, OFFICIAL_HEAD_KEYS)
    assert len(official) == len(ours)
    assert all(key.startswith(("sem_seg_head.pixel_decoder.", "sem_seg_head.predictor.")) for key in official)
    assert list(rename(official, HEAD_KEYS)) == list(ours)


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("sem_seg_head.pixel_decoder.input_proj.3.1.weight", "pixel_decoder.input_proj.3.norm.weight"),
        ("sem_seg_head.pixel_decoder.adapter_1.norm.bias", "pixel_decoder.lateral.norm.bias"),
        ("sem_seg_head.pixel_decoder.layer_1.weight", "pixel_decoder.output.conv.weight"),
        ("sem_seg_head.adapter_1.weight", "pixel_decoder.lateral.conv.weight"),
        ("module.sem_seg_head.predictor.query_feat.weight", "decoder.query_feat.weight"),
        ("sem_seg_head.predictor.static_query.weight", "decoder.query_feat.weight"),
        ("sem_seg_head.predictor.mask_embed.layers.2.bias", "decoder.mask_embed.4.bias"),
        (
            "sem_seg_head.predictor.transformer_cross_attention_layers.12.multihead_attn.in_proj_weight",
            "decoder.layers.12.cross_attn.in_proj_weight",
        ),
        ("sem_seg_head.predictor.transformer_ffn_layers.0.linear1.weight", "decoder.layers.0.linear1.weight"),
    ],
)
def test_official_names(official, ours):
    assert list(rename({official: torch.zeros(0)}, HEAD_KEYS)) == [ours]


def test_loss_buffer_is_dropped():
    assert rename({"criterion.empty_weight": torch.zeros(4)}, HEAD_KEYS) == {}
