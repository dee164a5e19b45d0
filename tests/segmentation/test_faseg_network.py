import pytest
import torch
from torch import nn

from tasks.core.errors import UserError
from tasks.segmentation.faseg.criterion import SetCriterion, semantic_segments
from tasks.segmentation.faseg.network import FASegNetwork

CHANNELS = [8, 16, 24, 32]
SMALL = {
    "hidden_dim": 64,
    "mask_dim": 16,
    "num_queries": 6,
    "num_heads": 4,
    "dim_feedforward": 32,
    "num_layers": 5,
    "encoder_layers": 1,
    "encoder_dim_feedforward": 32,
    "omega_rate": 4,
}
MASK2FORMER = {
    "dynamic_queries": False,
    "high_resolution": False,
    "conditional_positions": False,
    "mask_threshold": 0.5,
}


class PatchPyramid(nn.Module):
    """The smallest backbone: patches at strides 4, 8, 16, 32."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, stride, stride)
            for before, after, stride in zip([3, *CHANNELS], CHANNELS, (4, 2, 2, 2), strict=False)
        )

    def forward(self, image):
        maps = []
        for stage in self.stages:
            image = stage(image).relu()
            maps.append(image)
        return maps


def network(**options):
    torch.manual_seed(0)
    model = FASegNetwork(PatchPyramid(), CHANNELS, 5, **{**SMALL, **options})
    # At initialisation every encoder query samples alike; trained weights do not.
    for name, parameter in model.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def images(height=128, width=128, batch=2):
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.manual_seed(1))


def flat(outputs):
    predictions = [*outputs["aux_outputs"], {key: outputs[key] for key in ("pred_logits", "pred_masks")}]
    return [prediction[key] for prediction in predictions for key in ("pred_logits", "pred_masks")]


@pytest.mark.parametrize("options", [{}, MASK2FORMER], ids=["faseg", "mask2former"])
@pytest.mark.parametrize("size", [(128, 128), (70, 101), (32, 32), (1, 33)])
def test_output_shapes(options, size):
    model = network(**options)
    outputs = model(images(*size))
    height, width = ((side + 31) // 32 * 8 for side in size)
    assert len(outputs["aux_outputs"]) == SMALL["num_layers"]
    for prediction in [outputs, *outputs["aux_outputs"]]:
        assert prediction["pred_logits"].shape == (2, 6, 6)
        assert prediction["pred_masks"].shape == (2, 6, height, width)
    assert all(tensor.isfinite().all() for tensor in flat(outputs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        MASK2FORMER,
        {"dynamic_queries": False},
        {"high_resolution": False},
        {"conditional_positions": False},
        {"dynamic_queries": False, "conditional_positions": False},
        {"high_resolution": False, "conditional_positions": False},
        {"high_resolution": False, "dynamic_queries": False},
    ],
    ids=lambda options: "+".join(options) or "all",
)
def test_gradient_reaches_every_parameter(options):
    model = network(**options)
    criterion = SetCriterion(5, num_points=64)
    labels = torch.randint(0, 5, (2, 128, 128), generator=torch.manual_seed(2))
    criterion.total(criterion(model(images()), semantic_segments(labels))).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_gradient_exists_for_every_parameter_of_a_tiny_image():
    # Without windows the high-resolution layers get zero gradients, but not None: distributed training waits for all.
    model = network(omega_rate=32)
    sum(tensor.sum() for tensor in flat(model(images(32, 32)))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not model.decoder.layers[3].cross_attn.in_proj_weight.grad.any()
    assert model.decoder.layers[3].cross_attn.out_proj.bias.grad.any()


@pytest.mark.parametrize(
    "option", [{"dynamic_queries": False}, {"mask_threshold": 0.5}, {"omega_rate": 2}, {"conditional_positions": False}]
)
def test_options_change_the_prediction(option):
    full, changed = network(), network(**option)
    shared = {name: value for name, value in full.state_dict().items() if name in changed.state_dict()}
    changed.load_state_dict(shared)
    with torch.no_grad():
        assert not torch.allclose(full(images())["pred_masks"], changed(images())["pred_masks"], atol=1e-4)


def test_switches_own_exactly_their_parameters():
    def top_level(**options):
        return {name.rsplit(".", 1)[0] for name in network(**options).state_dict()}

    everything = top_level()
    assert everything - top_level(dynamic_queries=False) == {
        "decoder.query_pos_mlp.0",
        "decoder.query_pos_mlp.2",
    }
    assert everything - top_level(high_resolution=False) == {
        "pixel_decoder.input_proj.3.conv",
        "pixel_decoder.input_proj.3.norm",
        "pixel_decoder.pos_conv.3",
    }
    assert everything - top_level(conditional_positions=False) == {
        *(f"pixel_decoder.pos_conv.{level}" for level in range(4)),
        "pixel_decoder.input_proj.3.conv",
        "pixel_decoder.input_proj.3.norm",
    }


@pytest.mark.parametrize(
    ("options", "pixel_decoder", "decoder"),
    [({}, 6_112_448, 20_944_279), ({**MASK2FORMER, "num_layers": 9}, 6_035_904, 14_497_431)],
    ids=["faseg", "mask2former"],
)
def test_parameter_counts_of_the_published_models(options, pixel_decoder, decoder):
    with torch.device("meta"):
        model = FASegNetwork(nn.Identity(), [256, 512, 1024, 2048], 150, **options)
    assert sum(p.numel() for p in model.pixel_decoder.parameters()) == pixel_decoder
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder


def test_images_of_a_batch_do_not_influence_each_other():
    model = network().double()
    with torch.no_grad():
        together = model(images())["pred_masks"]
        apart = torch.cat([model(image[None])["pred_masks"] for image in images()])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, MASK2FORMER], ids=["faseg", "mask2former"])
def test_runs_in_float64(options):
    outputs = network(**options).double()(images())
    assert all(tensor.dtype == torch.float64 for tensor in flat(outputs))


@pytest.mark.parametrize("options", [{}, MASK2FORMER], ids=["faseg", "mask2former"])
def test_trains_under_bfloat16_autocast(options):
    model, criterion = network(**options), SetCriterion(5, num_points=64)
    dtypes = {}
    model.pixel_decoder.encoder.register_forward_hook(
        lambda _module, args, output: dtypes.update(inputs=args[0][0].dtype, outputs=output[0].dtype)
    )
    labels = torch.randint(0, 5, (2, 128, 128), generator=torch.manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images())
        losses = criterion(outputs, semantic_segments(labels))
    assert dtypes == {"inputs": torch.float32, "outputs": torch.float32}
    assert outputs["pred_masks"].dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    criterion.total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_few_steps_lower_the_loss():
    model, criterion = network(), SetCriterion(5, num_points=64)
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[:, :, 32:] = 3
    pictures = labels[:, None].expand(-1, 3, -1, -1) * 80
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    totals = []
    for _ in range(8):
        total = criterion.total(criterion(model(pictures), semantic_segments(labels)))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]


def test_exports_with_static_shapes():
    model = network().eval()
    with torch.no_grad():
        exported = torch.export.export(model, (images(),)).module()(images())
        expected = model(images())
    torch.testing.assert_close(exported["pred_masks"], expected["pred_masks"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 66}, "hidden_dim: 66 was given, a multiple of 4 and of num_heads"),
        ({"num_heads": 7}, r"hidden_dim: \d+ was given, a multiple of 4 and of num_heads \(7\) was expected"),
        ({"num_queries": 0}, "num_queries: 0 was given, at least 1"),
        ({"omega_rate": 0}, "omega_rate: 0 was given, at least 1"),
        ({"mask_threshold": 1.5}, "mask_threshold: 1.5 was given, a probability was expected"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(UserError, match=message):
        network(**options)


def test_masks_are_compared_at_some_point():
    with pytest.raises(UserError, match="num_points: 0 was given, at least 1 was expected"):
        SetCriterion(5, num_points=0)


def test_backbone_must_have_four_levels():
    with pytest.raises(ValueError, match=r"channels \[8, 16\]: expected four"):
        FASegNetwork(PatchPyramid(), [8, 16], 5, **SMALL)
