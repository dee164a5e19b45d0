import math

import pytest
import torch

from tasks.segmentation.faseg.pixel_decoder import PixelDecoderOutput, sine_positions
from tasks.segmentation.faseg.transformer_decoder import (
    Attention,
    TransformerDecoder,
    attention_mask,
    select_windows,
    split_windows,
)

SIZES = [(2, 3), (4, 6), (8, 12), (16, 24)]


def pixels(batch=1, dim=8, num_levels=4):
    generator = torch.manual_seed(3)
    maps = [torch.randn(batch, dim, *size, generator=generator) for size in SIZES[:num_levels]]
    positions = [torch.randn(batch, dim, *size, generator=generator) for size in SIZES[:num_levels]]
    return PixelDecoderOutput(torch.randn(batch, 4, *SIZES[3], generator=generator), maps, positions)


def decoder(**options):
    torch.manual_seed(0)
    settings = {"dim": 8, "mask_dim": 4, "num_queries": 3, "num_heads": 2, "dim_feedforward": 8, "num_layers": 5}
    return TransformerDecoder(2, **{**settings, "omega_rate": 3, **options})


def recorded_layers(model, inputs):
    calls = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _layer, args, _output: calls.append(args))
    model(inputs)
    return calls


def test_attention_equals_pytorch():
    torch.manual_seed(0)
    ours, theirs = Attention(8, 2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    blocked = torch.rand(2, 3, 5) < 0.4
    blocked[..., 0] = False
    expected, expected_weights = theirs(query, key, value, attn_mask=blocked.repeat_interleave(2, dim=0))
    for need_weights in (True, False):
        output, weights = ours(query, key, value, blocked, need_weights)
        torch.testing.assert_close(output, expected)
    assert weights is None
    torch.testing.assert_close(ours(query, key, value, blocked, True)[1], expected_weights)


def test_attention_to_nothing_is_the_bias():
    attention = Attention(8, 2)
    torch.nn.init.normal_(attention.out_proj.bias)
    empty = torch.zeros(2, 0, 8)
    output, _ = attention(torch.randn(2, 3, 8), empty, empty)
    assert torch.equal(output, attention.out_proj.bias.expand(2, 3, 8))


def test_attention_mask_blocks_improbable_cells_and_opens_full_rows():
    masks = torch.tensor([[-9.0, 9.0], [9.0, 9.0]])
    blocked = attention_mask(torch.stack([masks, masks - 99])[None], (2, 2), threshold=0.5)
    assert blocked.tolist() == [[[True, False, False, False], [False] * 4]]
    low = torch.full((1, 1, 1, 1), -1.0)  # probability 0.27
    wide = torch.cat([low, -low], dim=3)
    assert attention_mask(wide, (1, 2), 0.15).tolist() == [[[False, False]]]
    assert attention_mask(wide, (1, 2), 0.5).tolist() == [[[True, False]]]


def test_windows_are_cut_row_by_row():
    maps = torch.arange(24.0).reshape(1, 1, 4, 6)
    windows = split_windows(maps, (2, 3))
    assert windows.shape == (1, 6, 4, 1)
    assert windows[0, 1, :, 0].tolist() == [2, 3, 8, 9]
    assert windows[0, 3, :, 0].tolist() == [12, 13, 18, 19]


def test_windows_need_an_exact_grid():
    with pytest.raises(ValueError, match="5x6 map has no 2x3 grid of square windows"):
        split_windows(torch.zeros(1, 1, 5, 6), (2, 3))


def test_selected_windows_are_the_most_attended_best_first():
    weights = torch.tensor([[[0.1, 0.4, 0.2, 0.3], [0.0, 0.1, 0.6, 0.3]]])  # sums 0.1, 0.5, 0.8, 0.6
    assert select_windows(weights, 2).tolist() == [[2, 3]]
    assert select_windows(weights, 5).shape == (1, 0)


def test_high_resolution_layer_reads_the_selected_windows_with_the_static_query():
    model, inputs = decoder(), pixels()
    calls = recorded_layers(model, inputs)
    tokens, cross_pos, _, key, value, blocked, _ = calls[0]
    _, weights = model.layers[0].cross_attn(tokens + cross_pos, key, value, blocked, True)
    index = select_windows(weights, 3)[0]  # 2 of 6 cells
    fine = inputs.features[3] + model.level_embed.weight[3][:, None, None]
    windows = split_windows(fine, SIZES[0])[0]
    high = calls[3]
    torch.testing.assert_close(high[4], windows[index].flatten(0, 1)[None])
    torch.testing.assert_close(
        high[3] - high[4], split_windows(inputs.positions[3], SIZES[0])[0][index].flatten(0, 1)[None]
    )
    assert torch.equal(high[1][0], model.query_embed.weight)
    assert not torch.equal(high[2], high[1])  # self-attention keeps the dynamic query
    assert len(high) == 5  # no mask


def test_dynamic_query_comes_from_the_attention_of_the_layer_before():
    model, inputs = decoder(), pixels()
    calls = recorded_layers(model, inputs)
    tokens, cross_pos, _, key, value, blocked, _ = calls[1]
    _, weights = model.layers[1].cross_attn(tokens + cross_pos, key, value, blocked, True)
    focus = weights @ inputs.positions[1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(calls[2][1], model.query_pos_mlp(focus + model.query_embed.weight))
    torch.testing.assert_close(calls[4][1], calls[3][2])  # the 1/4 layer does not renew it


def test_without_dynamic_queries_every_layer_uses_the_learned_ones():
    model = decoder(dynamic_queries=False)
    for call in recorded_layers(model, pixels()):
        assert torch.equal(call[1][0], model.query_embed.weight)
        assert torch.equal(call[2][0], model.query_embed.weight)


def test_mask2former_cycles_through_three_levels():
    model = decoder(dynamic_queries=False, high_resolution=False)
    lengths = [call[4].shape[1] for call in recorded_layers(model, pixels(num_levels=3))]
    assert lengths == [6, 24, 96, 6, 24]


def test_projections_exist_only_for_other_channels():
    assert len(decoder(in_channels=8).input_proj) == 0
    projected = decoder(in_channels=12)
    assert len(projected.input_proj) == 4
    inputs = pixels()
    wide = [feature.repeat(1, 2, 1, 1)[:, :12] for feature in inputs.features]
    assert projected(inputs._replace(features=wide))[-1][0].shape == (1, 3, 3)


def test_sine_positions_vary_along_their_own_axis():
    encoding = sine_positions(torch.zeros(2, 8, 3, 5))
    assert encoding.shape == (2, 8, 3, 5)
    rows, columns = encoding[0, :4], encoding[0, 4:]
    assert torch.equal(rows[..., :1].expand(-1, -1, 5), rows)
    assert torch.equal(columns[:, :1].expand(-1, 3, -1), columns)
    # The last row is at phase 2 pi; the second pair of channels has a hundred times the wavelength.
    expected = torch.tensor([0.0, 1.0, math.sin(math.tau / 100), math.cos(math.tau / 100)])
    torch.testing.assert_close(rows[:, -1, 0], expected, atol=1e-5, rtol=0)
