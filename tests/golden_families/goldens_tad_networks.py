"""AFSD's boundary pooling, losses, whole head, soft-NMS and test program, and OpenTAD's NMS.

A case is told by what it holds. Goldens are float32 outputs; all is computed in float64 here unless the head is whole.
"""

import math
import re

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from backbones.checkpoint import rename
from kernels.boundary_max_pool import boundary_max_pool
from tasks.video.afsd.assignment import ACTIVITYNET_RANGES, assign, overlaps, refined_labels
from tasks.video.afsd.decoding import average, decode
from tasks.video.afsd.head import AFSDHead, AFSDOutput
from tasks.video.afsd.keys import OFFICIAL_HEAD_KEYS
from tasks.video.afsd.losses import (
    AFSDLossConfig,
    boundary_losses,
    detection_losses,
    focal_loss,
    giou_loss,
    total_loss,
    triplet_loss,
)
from tasks.video.post_processing import PostProcessingConfig, hard_nms, soft_nms, suppress
from tasks.video.windows import boundary_masks, window_offsets

LOSSES = {
    "loc": "loss_l",
    "conf": "loss_c",
    "prop_loc": "loss_prop_l",
    "prop_conf": "loss_prop_c",
    "quality": "loss_ct",
}
OUTPUTS = ("loc", "conf", "prop_loc", "prop_conf", "center")


def run(meta, tensors, path):
    """Check a case of this module; None for one of another."""
    names = {name.rpartition(".")[2] for name in tensors}
    if "grad_input_correct" in names:
        check_pooling(tensors)
    elif isinstance(meta, dict) and "weight_rule" in meta and "params" in meta:
        check_head(meta, tensors)
    elif any(name.endswith(".target.conf_t") for name in tensors):
        check_losses(meta, tensors)
    elif isinstance(meta, dict) and any(name.startswith(("softnms", "nms.", "opentad.")) for name in meta):
        check_nms(meta, tensors)
    elif isinstance(meta, dict) and {"calls", "results", "videos"} <= meta.keys():
        check_test_program(meta, path)
    else:
        return None
    return {}


def cases_of(tensors):
    """Tensors by case and name; the case is what comes before the first full stop."""
    cases = {}
    for key, tensor in tensors.items():
        case, _, name = key.partition(".")
        cases.setdefault(case, {})[name] = tensor.double() if tensor.is_floating_point() else tensor
    return cases


def close(name, actual, expected, rtol=1e-6, atol=1e-6):
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


# -- boundary max pooling ---------------------------------------------------------------------------------------------


def check_pooling(tensors):
    for case, data in cases_of(tensors).items():
        feature = data["input"].requires_grad_()
        output = boundary_max_pool(feature, data["segments"])
        assert torch.equal(output, data["output"]), case
        output.backward(data["grad_output"])
        close(case, feature.grad, data["grad_input_correct"])


# -- losses -----------------------------------------------------------------------------------------------------------


def config_of(meta, levels):
    """ActivityNet's rules are told by its binary labels and points with levels."""
    if not levels:
        return AFSDLossConfig(refine_iou=meta["overlap_thresh"])
    return AFSDLossConfig(
        loc_weight=1.0, refine_iou=meta["overlap_thresh"], smooth_l1=True, per_clip=True, keep_best=True,
        level_ranges=[tuple(map(float, bounds)) for bounds in ACTIVITYNET_RANGES],
    )  # fmt: skip


def check_losses(meta, tensors):
    for case, data in cases_of(tensors).items():
        if case == "focal":
            logits = data["logits"].requires_grad_()
            loss = focal_loss(logits, data["target"])
            loss.backward()
            close(case, loss, meta["focal"]["loss_sum"])
            close(case, logits.grad, data["grad"])
        elif case == "iou":
            close("iou.calc_iou", overlaps(data["pred"], data["target"]), data["calc_iou"])
            close("iou.linear_iou", 1 - overlaps(data["pred"], data["target"]), data["linear_iou"])
            close("iou.giou", giou_loss(data["pred"], data["target"]), data["giou"])
        else:
            check_detection_losses(case, meta[case], data)


def check_detection_losses(case, meta, data):
    priors, length = data["in.priors"], meta["clip_length"]
    has_levels = priors.shape[1] == 2
    levels = priors[:, 1].long() if has_levels else torch.zeros(len(priors), dtype=torch.long)
    config = config_of(meta, has_levels)
    leaves = {name: data[f"in.{name}"].requires_grad_() for name in OUTPUTS}
    predictions = {name: leaf for name, leaf in leaves.items() if name != "center"}
    output = AFSDOutput(
        **predictions, quality=leaves["center"][..., 0], points=priors[:, 0], levels=levels, boundaries=None,
        length=length,
    )  # fmt: skip
    truth = [data[f"in.target{i}"] for i in range(len(output.loc))]
    segments, labels = [t[:, :2] * length for t in truth], [t[:, 2].long() for t in truth]
    for i, (clip, classes) in enumerate(zip(segments, labels, strict=True)):
        targets = assign(output.points, levels, clip, classes, length, config.level_ranges)
        assert torch.equal(targets.labels, data["target.conf_t"][i]), case
        refined = refined_labels(output.loc[i].detach(), targets, config.refine_iou, config.keep_best)
        assert torch.equal(refined, data["target.prop_conf_t"][i]), case
        if "target.gt_loc_t" in data:
            positive = targets.labels > 0
            close(case, targets.distances[positive], data["target.gt_loc_t"][i][positive], atol=1e-4)
    losses = detection_losses(output, segments, [classes - 1 for classes in labels], config)
    assert losses.keys() == LOSSES.keys()
    for name, official in LOSSES.items():
        close(f"{case}.{official}", losses[name], meta["losses"][official])
    weights = AFSDLossConfig(loc_weight=10.0)
    total = total_loss(losses, weights)
    close(case, total, next(value for key, value in meta.items() if key.startswith("total_")))
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        gradient = torch.zeros_like(leaves[name]) if gradient is None else gradient
        close(f"{case}.grad.{name}", gradient, data[f"grad.{name}"])


# -- the whole head ---------------------------------------------------------------------------------------------------


def sinusoidal(shape, step, offset, amplitude=1.0):
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return (amplitude * torch.sin(step * count + 1.3 * offset + 0.1)).float().view(shape)


def parameters_of(meta):
    """The parameters of the case by their official names, made by its rule."""
    parameters = {}
    for k, name, shape, rule, amplitude in meta["params"]:
        if name.endswith(".scale"):
            value = torch.tensor([1 + 0.05 * int(re.search(r"(\d+)\.scale$", name)[1])])
        elif rule.startswith("const"):
            value = torch.full(shape, float(rule.split()[-1]))
        else:
            value = sinusoidal(shape, 0.7, k, amplitude) + (1 if rule.startswith("1+") else 0)
        parameters[f"coarse_pyramid_detection.{name}"] = value
    return parameters


def inputs_of(meta):
    """Maps of the backbone, in the order of `input_rule`, which gives size, step and offset of each."""
    rule = r"\[([\d,]+)\]: *(?:value\[j\]=)?sin\(([\d.]+)\*j\+1\.3\*(\d+)\+0\.1\)"
    found = re.findall(rule, meta["input_rule"])
    assert found, meta["input_rule"]
    return [sinusoidal([int(n) for n in shape.split(",")], float(step), int(k)) for shape, step, k in found]


def check_head(meta, tensors):
    state = rename(parameters_of(meta), OFFICIAL_HEAD_KEYS)
    state = {name.removeprefix("head."): tensor for name, tensor in state.items()}
    squeezes = [state[f"pyramid.levels.{i}.conv.weight"] for i in range(6)]
    squeezes = [weight for weight in squeezes if weight.ndim == 5]
    activitynet = len(squeezes) == 1
    inputs = inputs_of(meta)[-len(squeezes) :]
    length = tensors["out.start.tanh_mean"].shape[-1]
    head = AFSDHead(
        [weight.shape[1] for weight in squeezes],
        len(state["conf_head.bias"]) - 1,
        sides=[weight.shape[-1] for weight in squeezes],
        dim=len(squeezes[0]),
        scale_by_level=activitynet,
    )
    assert sum(p.numel() for p in head.parameters()) == meta["n_params"]
    head.load_state_dict(state)
    with torch.no_grad():
        output = head(inputs, length)
        check_head_outputs(meta, tensors, output, length)
        if "triplet" in meta:
            segments = torch.tensor(meta["triplet"]["segments"])[None]
            boundaries = head.boundary_features(inputs, length)
            close("triplet", triplet_loss(boundaries, segments, 4.0), meta["triplet"]["loss"], 1e-4, 1e-4)


def check_head_outputs(meta, tensors, output, length):
    close("loc", output.loc[0], tensors["out.loc"], rtol=5e-4, atol=0)
    for name in ("conf", "prop_loc", "prop_conf"):
        close(name, getattr(output, name)[0], tensors[f"out.{name}"], rtol=0, atol=5e-4)
    close("center", output.quality[0], tensors["out.center"][:, 0], rtol=0, atol=5e-4)
    priors = torch.stack([output.points, output.levels.to(output.points)], dim=1)[:, : tensors["out.priors"].shape[1]]
    close("priors", priors, tensors["out.priors"], rtol=0)
    for name, feature in zip(("", "_loc_prop", "_conf_prop"), output.boundaries, strict=True):
        for edge, half in zip(("start", "end"), feature[0].chunk(2), strict=True):
            assert list(half.mT[None].shape) == meta[f"{edge}{name}"]
            close(name, half.tanh().mean(dim=0), tensors[f"out.{edge}{name}.tanh_mean"], rtol=0, atol=5e-4)
    truth = tensors["in.target"]
    segments, labels = truth[:, :2] * length, truth[:, 2].long() - 1
    masks = tensors["in.scores"][:, -2:]
    if "gt" in meta:
        starts_and_ends = boundary_masks(np.array(meta["gt"], dtype=np.float64)[:, :2], length)
        close("masks", torch.stack([torch.from_numpy(mask) for mask in starts_and_ends]), masks[0])
    activitynet = len(tensors["out.priors"][0]) == 2
    config = config_of({"overlap_thresh": meta.get("overlap_thresh", 0.6 if activitynet else 0.5)}, activitynet)
    losses = detection_losses(output, [segments], [labels], config) | boundary_losses(output.boundaries, masks)
    for name, official in (LOSSES | {"start": "loss_start", "end": "loss_end"}).items():
        close(official, losses[name], meta["losses"][official], rtol=1e-4, atol=1e-4)
    losses["triplet"] = torch.tensor(meta["triplet"]["loss"])
    if "total" in meta:
        close("total", total_loss(losses, config), meta["total"], rtol=1e-4, atol=1e-4)


# -- suppression ------------------------------------------------------------------------------------------------------


def check_nms(meta, tensors):
    for case, options in meta.items():
        data = {name.removeprefix(f"{case}."): tensor for name, tensor in tensors.items() if name.startswith(case)}
        data = {name: tensor.numpy() for name, tensor in data.items()}
        if case.startswith("opentad."):
            check_opentad(case, options, data)
            continue
        segments, scores = data["input"][:, :2], data["input"][:, 2]
        if case.startswith("softnms"):
            floor = options.get("score_threshold", 0.001)
            chosen, values = soft_nms(segments, scores, options["sigma"], options["top_k"], floor, keep_last=False)
            order = np.argsort(chosen)
            close(case, np.column_stack([segments[chosen], values])[order], data["output"])
        else:
            assert hard_nms(segments, scores, options["overlap"], options["top_k"]).tolist() == data["keep"].tolist()


def check_opentad(case, options, data):
    config = PostProcessingConfig(
        score_threshold=-1.0 if options["use_soft_nms"] else options["min_score"],
        method="soft" if options["use_soft_nms"] else "hard",
        per_class=options["multiclass"],
        sigma=options.get("sigma", 0.5),
        floor=options["min_score"],
        overlap=options.get("iou_threshold", 0.0),
        max_per_class=options["max_seg_num"],
        max_per_video=options["max_seg_num"],
        voting=None if options["multiclass"] else options.get("voting_thresh") or None,
    )
    record = {"segments": data["segs"], "scores": data["scores"], "labels": data["cls"]}
    left = suppress(record, config)
    assert left["labels"].tolist() == data["out_cls"].tolist(), case
    close(case, left["scores"], data["out_scores"])
    close(case, left["segments"], data["out_segs"])


# -- the official test programs ---------------------------------------------------------------------------------------


def network_outputs(calls, path):
    """The given outputs: the tensor file beside the case that has all of its calls and the fewest others."""
    tags = {call["tag"] for call in calls}
    found = []
    for file in sorted(path.parent.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            others = {name.rpartition(".")[0] for name in tensors.keys()}  # noqa: SIM118 (no dictionary)
        if tags <= others:
            found.append((len(others), file))
    assert found, f"{path}: no tensor file beside it has {sorted(tags)}"
    return load_file(min(found)[1])


def output_of(tensors, tag, length):
    data = {name: tensors[f"{tag}.{name}"].float()[None] for name in OUTPUTS}
    quality, steps = data.pop("center")[..., 0], data["loc"].shape[1]
    counts, count = [], length // 4
    while sum(counts) < steps:  # 126 points are 64 + 32 + ... + 2
        counts.append(count)
        count //= 2
    assert sum(counts) == steps
    points = torch.cat([(torch.arange(count) + 0.5) / count for count in counts])
    return AFSDOutput(**data, quality=quality, points=points, levels=None, boundaries=None, length=length)


def check_test_program(meta, path):
    tensors = network_outputs(meta["calls"], path)
    length, fps = meta["calls"][0]["shape"][2], meta["sample_fps"]
    streams = {}  # of one network each: the tags of its calls, one per window
    for call in meta["calls"]:
        streams.setdefault(call["tag"].partition(".")[0], []).append(call["tag"])
    windows = list(zip(*streams.values(), strict=True))
    for video, frames in meta["videos"].items():
        rows = []
        for offset in window_offsets(frames, length, length // 2):
            output = average([output_of(tensors, tag, length) for tag in windows.pop(0)])
            segments, scores = (x[0].double().numpy() for x in decode(output))
            points, labels = np.nonzero(scores > 0.01)
            rows.append(((segments[points] + offset) / fps, scores[points, labels], labels))
        segments, scores, labels = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        record = {"segments": segments, "scores": scores, "labels": labels}
        left = suppress(record, PostProcessingConfig(keep_last=False))
        expected = np.array(meta["results"][video])
        assert len(left["scores"]) == meta["counts"][video] == len(expected)
        assert left["labels"].tolist() == expected[:, 0].tolist(), video
        close(video, left["scores"], expected[:, 1], rtol=0, atol=1e-5)
        close(video, left["segments"], expected[:, 2:], rtol=0, atol=1e-5)
    assert not windows
