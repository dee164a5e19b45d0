"""Builders of the golden cases of FASeg's head, losses and inference."""

import re
from contextlib import contextmanager

import torch
from torch import nn

from backbones.checkpoint import rename
from kernels.ms_deform_attn import ms_deform_attn
from tasks.core.preprocess import NormalizeAndPad
from tasks.segmentation.faseg.criterion import Segments, SetCriterion
from tasks.segmentation.faseg.deformable_encoder import DeformableAttention, DeformableEncoder, reference_points
from tasks.segmentation.faseg.inference import (
    class_scores,
    instance_inference,
    panoptic_inference,
    resize_mask_logits,
    semantic_inference,
)
from tasks.segmentation.faseg.keys import HEAD_KEYS, OFFICIAL_HEAD_KEYS
from tasks.segmentation.faseg.matcher import HungarianMatcher, matching_costs
from tasks.segmentation.faseg.pixel_decoder import PixelDecoder, PixelDecoderOutput
from tasks.segmentation.faseg.points import point_sample
from tasks.segmentation.faseg.transformer_decoder import TransformerDecoder, select_windows


def load(module, tensors, official_prefix="", prefix=""):
    """Load the case's state dict, whose names lack `official_prefix`, into a float64 module under `prefix`."""
    state = {official_prefix + k[3:]: v.double() for k, v in tensors.items() if k.startswith("sd.")}
    renamed = rename(state, HEAD_KEYS)
    module.double().load_state_dict({key.removeprefix(prefix): value for key, value in renamed.items()})
    return module


def numbered(tensors, prefix):
    """Return the float64 tensors `<prefix>0`, `<prefix>1`, ... in order."""
    names = sorted(
        (k for k in tensors if re.fullmatch(re.escape(prefix) + r"\d+", k)), key=lambda k: int(k.split(".")[-1])
    )
    return [tensors[k].double() if tensors[k].is_floating_point() else tensors[k] for k in names]


def backbone_features(tensors):
    return [tensors[f"in.res{stage}"].double() for stage in (2, 3, 4, 5)]


def run_deformable_attention(meta, tensors, path):
    config = meta["config"]
    module = DeformableAttention(config["d_model"], config["n_heads"], config["n_levels"], config["n_points"])
    load(module, tensors)
    query, value = tensors["in.query"].double(), tensors["in.value"].double()
    shapes = [tuple(shape) for shape in tensors["in.spatial_shapes"].tolist()]
    computed = {}
    handles = [
        module.sampling_offsets.register_forward_hook(lambda _m, _i, out: computed.update(offsets=out)),
        module.attention_weights.register_forward_hook(lambda _m, _i, out: computed.update(weights=out)),
    ]
    points = tensors["in.reference_points"].double()
    computed["out.output"] = module(query, points, value, shapes)
    for handle in handles:
        handle.remove()
    layout = (*query.shape[:2], module.num_heads, module.num_levels, module.num_points)
    offsets = computed.pop("offsets").view(*layout, 2)
    weights = computed.pop("weights").view(*layout[:3], -1).softmax(-1).view(layout)
    computed.update({"out.sampling_offsets": offsets, "out.attention_weights": weights})

    if "in.padding_mask" in tensors:
        padding = tensors["in.padding_mask"]
        handle = module.value_proj.register_forward_hook(lambda _m, _i, out: out.masked_fill(padding[..., None], 0.0))
        computed["out.output_padding"] = module(query, points, value, shapes)
        handle.remove()
    if "in.reference_boxes" in tensors:  # FASeg has no boxes: only the operation and its projections are compared
        boxes = tensors["in.reference_boxes"].double()[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / module.num_points * boxes[..., 2:] * 0.5
        heads = module.value_proj(value).unflatten(2, (module.num_heads, -1))
        computed["out.output_boxes"] = module.output_proj(ms_deform_attn(heads, shapes, locations, weights))
    return computed


def run_deformable_encoder(meta, tensors, path):
    config = meta["config"]
    encoder = DeformableEncoder(
        config["d_model"],
        config["n_heads"],
        config["dim_feedforward"],
        config["num_layers"],
        config["levels"],
        config["n_points"],
    )
    load(encoder, tensors, "sem_seg_head.pixel_decoder.transformer.", "pixel_decoder.encoder.")
    maps = numbered(tensors, "in.src.")
    outputs = encoder(maps, numbered(tensors, "in.pos."))
    memory = torch.cat([level.flatten(2).transpose(1, 2) for level in outputs], dim=1)
    points = reference_points([tuple(level.shape[2:]) for level in maps], memory)
    return {
        "out.memory": memory,
        "out.reference_points": points[None, :, None].expand(memory.shape[0], -1, len(maps), -1),
    }


def pixel_decoder_of(config, tensors, prefix=""):
    """Build the pixel decoder that the config and the case's state dict (names under `prefix`) describe."""
    conditional = f"sd.{prefix}pos_linear.0.weight" in tensors
    channels = [config["in_channels"][f"res{stage}"] for stage in (2, 3, 4, 5)]
    conv_dim = config.get("conv_dim") or tensors[f"sd.{prefix}input_proj.0.0.weight"].shape[0]
    return PixelDecoder(
        channels,
        dim=conv_dim,
        mask_dim=config.get("mask_dim", conv_dim),
        num_heads=config.get("n_heads", config.get("nheads", 8)),
        num_layers=config.get("enc_layers", 0),
        dim_feedforward=config.get("enc_dim_feedforward", config.get("dim_feedforward", 1024)),
        num_levels=4 if conditional else 3,
        conditional_positions=conditional,
    )


def run_pixel_decoder(meta, tensors, path):
    if "sd.mask_features.weight" not in tensors:
        return run_projections(meta, tensors)
    decoder = load(pixel_decoder_of(meta["config"], tensors), tensors, "sem_seg_head.pixel_decoder.", "pixel_decoder.")
    outputs = decoder(backbone_features(tensors))
    computed = {"out.mask_features": outputs.mask_features}
    for level, (feature, position) in enumerate(zip(outputs.features, outputs.positions, strict=True)):
        computed[f"out.multi_scale.{level}"] = feature
        computed[f"out.pos.{level}"] = position
    return computed


def run_projections(meta, tensors):
    """Compute only the input projections and conditional positions, for cases that hold no other weights."""
    config = dict(meta.get("config", {}))
    features = numbered_features(tensors)
    if not isinstance(config.get("in_channels"), dict):
        config["in_channels"] = {f"res{stage}": f.shape[1] for stage, f in zip((2, 3, 4, 5), features, strict=True)}
    decoder = pixel_decoder_of(config, tensors).double()
    state = {"sem_seg_head.pixel_decoder." + k[3:]: v.double() for k, v in tensors.items() if k.startswith("sd.")}
    renamed = {k.removeprefix("pixel_decoder."): v for k, v in rename(state, HEAD_KEYS).items()}
    report = decoder.load_state_dict(renamed, strict=False)
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if key.startswith(("input_proj", "pos_conv"))]
    projected = [projection(feature) for projection, feature in zip(decoder.input_proj, features[::-1], strict=True)]
    positions = [conv(feature) for conv, feature in zip(decoder.pos_conv, projected, strict=True)]
    computed = {}
    for name in tensors:  # levels may be numbered from 1/32 to 1/4 or named res5 to res2
        match = re.fullmatch(r"out\.(\w+)\.(res)?(\d)", name)
        if match:
            level = 5 - int(match[3]) if match[2] else int(match[3])
            computed[name] = (positions if match[1].startswith("p") and "proj" not in match[1] else projected)[level]
    return computed


def numbered_features(tensors):
    """Return the backbone features res2..res5, also when a case numbers them from 1/32 to 1/4."""
    if "in.res2" in tensors:
        return backbone_features(tensors)
    prefix = next(k.removesuffix("0") for k in sorted(tensors) if re.fullmatch(r"in\.\w+\.0", k))
    return sorted(numbered(tensors, prefix), key=lambda feature: -feature.shape[-1])


@contextmanager
def record_layers(decoder):
    """Collect the inputs and outputs of every decoder layer as dicts, one per layer, in call order."""
    records, handles = [], []

    def hook(layer, args, output):
        names = ("tokens", "cross_pos", "self_pos", "key", "value", "blocked")
        record = dict(zip(names, args, strict=False), output=output[0], layer=layer)
        records.append(record)

    for layer in decoder.layers:
        handles.append(layer.register_forward_hook(hook))
    yield records
    for handle in handles:
        handle.remove()


def cross_attention_weights(record):
    """Recompute a layer's head-averaged cross-attention weights from its inputs."""
    query = record["tokens"] + record["cross_pos"]
    return record["layer"].cross_attn(query, record["key"], record["value"], record.get("blocked"), True)[1]


def layer_outputs(decoder, records):
    computed = {}
    for i, record in enumerate(records):
        computed[f"out.query_pos.{i}"] = record["cross_pos"].transpose(0, 1)
        computed[f"out.layer_output.{i}"] = record["output"].transpose(0, 1)
        weights = cross_attention_weights(record)
        if i % decoder.num_levels == 3:
            computed[f"out.highres_attn.{i}"] = weights
        else:
            computed[f"out.attn.{i}"] = weights
        if i % decoder.num_levels == 0:
            computed[f"out.window_index.{i}"] = select_windows(weights, decoder.omega_rate)
    return computed


def decoder_of(config, tensors, prefix=""):
    """Build the transformer decoder that the config and the case's state dict (names under `prefix`) describe."""
    dynamic = f"sd.{prefix}adapt_pos2d.0.weight" in tensors
    in_channels = config.get("in_channels")
    return TransformerDecoder(
        config["num_classes"],
        dim=config["hidden_dim"],
        mask_dim=config["mask_dim"],
        num_queries=config["num_queries"],
        num_heads=config["nheads"],
        dim_feedforward=config.get("dec_dim_feedforward", config.get("dim_feedforward")),
        num_layers=config["dec_layers"],
        omega_rate=config.get("omega_rate") or 32,
        mask_threshold=0.15 if dynamic else 0.5,
        dynamic_queries=dynamic,
        high_resolution=tensors[f"sd.{prefix}level_embed.weight"].shape[0] == 4,
        in_channels=in_channels if isinstance(in_channels, int) else None,
    )


def stacked(predictions):
    return {
        "out.pred_logits": torch.stack([logits for logits, _ in predictions]),
        "out.pred_masks": torch.stack([masks for _, masks in predictions]),
    }


def run_decoder(meta, tensors, path):
    decoder = load(decoder_of(meta["config"], tensors), tensors, "sem_seg_head.predictor.", "decoder.")
    inputs = PixelDecoderOutput(
        tensors["in.mask_features"].double().requires_grad_(),
        [x.requires_grad_() for x in numbered(tensors, "in.x.")],
        [p.requires_grad_() for p in numbered(tensors, "in.pos.")],
    )
    with record_layers(decoder) as records:
        predictions = decoder(inputs)
    computed = stacked(predictions) | layer_outputs(decoder, records)
    if any(name.startswith("out.grad.") for name in tensors):
        computed |= decoder_gradients(decoder, inputs, predictions)
    return computed


def decoder_gradients(decoder, inputs, predictions):
    loss = sum((logits**2).sum() + 0.1 * (masks**2).sum() for logits, masks in predictions)
    loss.backward()
    computed = {"out.grad.loss": loss.reshape(1), "out.grad.mask_features": inputs.mask_features.grad}
    for name, maps in (("x", inputs.features), ("pos", inputs.positions)):
        computed.update({f"out.grad.{name}.{level}": tensor.grad for level, tensor in enumerate(maps)})
    gradients = {f"decoder.{name}": p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    official = rename(gradients, OFFICIAL_HEAD_KEYS)
    return computed | {
        "out.grad.param." + name.removeprefix("sem_seg_head.predictor."): grad for name, grad in official.items()
    }


class HeadOnly(nn.Module):
    """Pixel decoder and transformer decoder without a backbone, named as in the whole network."""

    def __init__(self, pixel_decoder, decoder):
        super().__init__()
        self.pixel_decoder, self.decoder = pixel_decoder, decoder


def run_head(meta, tensors, path):
    config = dict(meta["config"])
    pixel_decoder = pixel_decoder_of(config, tensors, "pixel_decoder.")
    decoder = decoder_of(config, tensors, "predictor.")
    head = load(HeadOnly(pixel_decoder, decoder), tensors, "sem_seg_head.")
    pixels = head.pixel_decoder(backbone_features(tensors))
    with record_layers(head.decoder) as records:
        predictions = head.decoder(pixels)
    computed = stacked(predictions) | layer_outputs(head.decoder, records)
    computed["out.mask_features"] = pixels.mask_features
    for level, (feature, position) in enumerate(zip(pixels.features, pixels.positions, strict=True)):
        computed[f"out.multi_scale.{level}"] = feature
        computed[f"out.pos.{level}"] = position
    return computed


def queue_of(tensors):
    """Return a point source that hands out the given tensors in order and fails on a shape that was not expected."""
    remaining = list(tensors)

    def draw(num_rows, num_points, like):
        points = remaining.pop(0).to(like.dtype)
        assert points.shape == (num_rows, num_points, 2)
        return points

    draw.remaining = remaining
    return draw


def run_matcher(meta, tensors, path):
    config = meta["config"]
    points = numbered(tensors, "in.points.")
    draw = queue_of(points)
    matcher = HungarianMatcher(
        config["cost_class"], config["cost_mask"], config["cost_dice"], config["num_points"], draw
    )
    logits, masks = tensors["in.pred_logits"].double(), tensors["in.pred_masks"].double()
    labels = numbered(tensors, "in.target_labels.")
    targets = [target.double() for target in numbered(tensors, "in.target_masks.")]
    computed = {}
    for image, (queries, matched) in enumerate(matcher(logits, masks, labels, targets)):
        computed[f"out.match_pred.{image}"], computed[f"out.match_target.{image}"] = queries, matched
        predicted = point_sample(masks[image, None], points[image])[0]
        target = point_sample(targets[image][None], points[image])[0]
        costs = matching_costs(logits[image], predicted, labels[image], target)
        weights = (config["cost_class"], config["cost_mask"], config["cost_dice"])
        for name, cost in zip(("class", "mask", "dice"), costs, strict=True):
            computed[f"out.cost_{name}.{image}"] = cost
        computed[f"out.cost_total.{image}"] = sum(w * cost for w, cost in zip(weights, costs, strict=True))
    assert not draw.remaining
    return computed


def run_criterion(meta, tensors, path):
    config = meta["config"]
    num_aux = config["aux"]
    draw = queue_of([tensors["in." + name] for name in meta["random_call_order"]])
    criterion = SetCriterion(
        config["num_classes"],
        config["num_points"],
        config["oversample_ratio"],
        config["importance_sample_ratio"],
        config["no_object_weight"],
        config["class_weight"],
        config["mask_weight"],
        config["dice_weight"],
        draw,
    ).double()
    predictions = [
        {name: tensors[f"in.{name}.{layer}"].double().requires_grad_() for name in ("pred_logits", "pred_masks")}
        for layer in range(num_aux + 1)
    ]
    labels, masks = numbered(tensors, "in.target_labels."), numbered(tensors, "in.target_masks.")
    segments = [Segments(*pair) for pair in zip(labels, masks, strict=True)]

    order = [num_aux, *range(num_aux)]  # the final prediction comes first
    matches, chosen = [], []
    criterion.matcher.register_forward_hook(lambda _m, _i, out: matches.append(out))
    select_points = criterion.select_points
    criterion.select_points = lambda logits: chosen.append(select_points(logits)) or chosen[-1]
    losses = criterion({**predictions[-1], "aux_outputs": predictions[:-1]}, segments)
    total = criterion.total(losses)
    total.backward()
    assert not draw.remaining

    computed = {f"out.{name}": loss.reshape(1) for name, loss in losses.items()}
    computed["out.total_weighted"] = total.reshape(1)
    for layer, match, points in zip(order, matches, chosen, strict=True):
        computed[f"out.point_coords.{layer}"] = points
        for image, (queries, targets) in enumerate(match):
            computed[f"out.match_pred.{layer}.{image}"] = queries
            computed[f"out.match_target.{layer}.{image}"] = targets
        for name, prediction in predictions[layer].items():
            computed[f"out.grad.{name}.{layer}"] = prediction.grad
    return computed


def run_inference(meta, tensors, path):
    config = meta["config"]
    things = config["thing_classes"]
    options = (config["object_mask_threshold"], config["overlap_threshold"])
    computed = {}
    for image, (size, requested) in enumerate(zip(meta["image_sizes"], meta["requested_sizes"], strict=True)):
        size, output_size = tuple(size), tuple(requested or size)
        check_preprocessing(tensors, image, size)
        logits, masks = tensors["in.pred_logits"][image].double(), tensors["in.pred_masks"][image].double()
        scores = semantic_inference(logits, masks, size, output_size)
        computed[f"out.semantic.{image}"] = scores
        computed[f"out.argmax.{image}"] = scores.argmax(0)
        resized = resize_mask_logits(masks, size, output_size)
        computed[f"out.semantic_post_first.{image}.every2nd"] = class_scores(logits, resized)[:, ::2, ::2]
        panoptic, segments = panoptic_inference(logits, resized, things, *options)
        computed[f"out.panoptic.{image}"] = panoptic
        computed[f"out.panoptic_info.{image}"] = torch.tensor([list(map(int, segment)) for segment in segments])
        for name, classes in (("instance", things), ("instance_only", None)):
            instances = instance_inference(logits, resized, config["test_topk_per_image"], classes)
            for part, value in instances._asdict().items():
                computed[f"out.{name}_{part}.{image}"] = value
    return computed


def check_preprocessing(tensors, image, size):
    """Compare the padded corner (bottom right) with the official one, which the case stores as an input."""
    assert tuple(tensors[f"in.image.{image}"].shape[1:]) == size
    batch = NormalizeAndPad()(tensors[f"in.image.{image}"][None])
    assert batch[0, :, size[0] - 1, size[1] - 1].all()
    corner = tensors["in.normalised_padded_batch_corner"][image]
    assert torch.equal(batch[0, :, -corner.shape[1] :, -corner.shape[2] :], corner)
