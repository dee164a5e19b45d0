"""Builders of the golden cases of backbones, whole networks, key lists, optimiser groups, checkpoints and metrics."""

import re
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from goldens_faseg_network import cross_attention_weights, record_layers
from safetensors.torch import save_file
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from backbones.checkpoint import read_state_dict, rename
from backbones.features import TimmFeatures, create_features
from backbones.keys import DETECTRON2_RESNET, OFFICIAL_SWIN, TO_DETECTRON2_RESNET, prefixed
from backbones.swin import SWIN_VARIANTS, SwinFeatures
from tasks.core.optim import OptimConfig, build_optimizer
from tasks.segmentation.faseg.inference import semantic_inference
from tasks.segmentation.faseg.keys import HEAD_KEYS, OFFICIAL_HEAD_KEYS
from tasks.segmentation.faseg.network import FASegNetwork
from tasks.segmentation.faseg.transformer_decoder import select_windows
from tasks.segmentation.metrics import SegmentationMetrics
from tasks.segmentation.weights import load_weights, official_key_table, official_state_dict

MASK2FORMER = {
    "num_layers": 9,
    "mask_threshold": 0.5,
    "dynamic_queries": False,
    "high_resolution": False,
    "conditional_positions": False,
}
SWIN_NAMES = {
    "tiny": "swin_tiny_patch4_window7_224",
    "small": "swin_small_patch4_window7_224",
    "base": "swin_base_patch4_window12_384",
    "large": "swin_large_patch4_window12_384",
}


def official_weights(tensors):
    return {name[3:]: tensor.double() for name, tensor in tensors.items() if name.startswith("sd.")}


def feature_outputs(features, tensors):
    maps = features.eval()(tensors["in.image"].double())
    return {f"out.res{stage}": x for stage, x in zip((2, 3, 4, 5), maps, strict=True)}


def run_swin(meta, tensors, path):
    names = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "drop_path_rate")
    features = SwinFeatures(**{name: meta["config"][name] for name in names if name in meta["config"]}).double()
    features.load_state_dict(rename(official_weights(tensors), OFFICIAL_SWIN))
    return feature_outputs(features, tensors)


def run_resnet(meta, tensors, path):
    """Build the narrow ResNet of the case from timm's parts: its own expansion and stem width."""
    config = meta["config"]
    widths, stem = config["bottleneck"], config["stem"]

    class Narrow(Bottleneck):
        expansion = config["out"][0] // widths[0]

    body = ResNet(Narrow, config["blocks"], num_classes=0, channels=tuple(widths))
    body.conv1, body.bn1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(stem)
    first = body.layer1[0]
    first.conv1 = nn.Conv2d(stem, widths[0], 1, bias=False)
    if stem == config["out"][0]:
        first.downsample = None
    else:
        first.downsample[0] = nn.Conv2d(stem, config["out"][0], 1, bias=False)
    features = TimmFeatures(body, [1, 2, 3, 4]).double()
    missing, unexpected = features.load_state_dict(rename(official_weights(tensors), DETECTRON2_RESNET), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return feature_outputs(features, tensors)


def network_of(name, num_classes, faseg, trained_norm):
    """Build the full-size network on the backbone `name`; ResNets have frozen norms unless `trained_norm`."""
    features = create_features(name, norm="batch" if trained_norm else "frozen")
    return FASegNetwork(features, features.channels, num_classes, **({} if faseg else MASK2FORMER))


def network_of_config(text):
    """Build the network of an official config, named anywhere in `text` by its path."""
    config = re.search(r"(\S*)\.yaml", text)[1].lower()
    cityscapes = "cityscapes" in config
    swin = re.search(r"swin_(tiny|small|base|large)", config)
    name = SWIN_NAMES[swin[1]] if swin else "resnet50"
    return network_of(
        name, 19 if cityscapes else 150, config.rpartition("/")[2].startswith("faseg"), trained_norm=cityscapes
    )


def network_of_keys(keys):
    """Build the network that a list of official keys and shapes describes."""
    num_classes = keys["sem_seg_head.predictor.class_embed.weight"]["shape"][0] - 1
    faseg = "sem_seg_head.predictor.adapt_pos2d.0.weight" in keys
    name = "resnet50"
    if "backbone.patch_embed.proj.weight" in keys:
        dim = keys["backbone.patch_embed.proj.weight"]["shape"][0]
        table = keys["backbone.layers.0.blocks.0.attn.relative_position_bias_table"]["shape"][0]
        depth = sum(re.fullmatch(r"backbone\.layers\.2\.blocks\.\d+\.norm1\.weight", key) is not None for key in keys)
        found = [
            variant
            for variant, (embed_dim, depths, _, window) in SWIN_VARIANTS.items()
            if (embed_dim, depths[2], (2 * window - 1) ** 2) == (dim, depth, table)
        ]
        (name,) = found
    return network_of(name, num_classes, faseg, "backbone.stem.conv1.norm.num_batches_tracked" in keys)


def run_keys(meta, tensors, path):
    with torch.device("meta"):
        network = network_of_keys(meta["keys"])
        official = official_state_dict(network)
    assert sorted(official) == sorted(meta["keys"])
    assert len(official) == meta["num_keys"]
    parameters = rename_parameters(network)
    for key, tensor in official.items():
        expected = meta["keys"][key]
        kind = "param" if key in parameters else "buffer"
        assert [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), kind] == [
            expected["shape"],
            expected["dtype"],
            expected["kind"],
        ], key
    count = sum(p.numel() for p in network.parameters())
    assert count == meta["num_parameters"]
    assert sum(t.numel() for t in official.values()) - count == meta["num_buffers_elems"]
    for module, expected in meta["params_by_module"].items():
        assert sum(p.numel() for key, p in parameters.items() if key.startswith(module + ".")) == expected, module
    return {}


def rename_parameters(network):
    """The network's parameters by their official names."""
    return rename(dict(network.named_parameters()), official_key_table(network))


def run_optimizer(meta, tensors, path):
    with torch.device("meta"):
        network = network_of_config(meta["config"])
    config = OptimConfig(
        lr=meta["base_lr"], weight_decay=0.05, lr_multipliers={"backbone": 0.1}, no_decay="norm_and_embedding"
    )
    groups = build_optimizer(network, config).param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(settings)
    computed = {key: list(settings[id(p)]) for key, p in rename_parameters(network).items()}
    assert computed == meta["params"]
    return {}


def run_checkpoints(meta, tensors, path):
    """Every file beside the json must give the same tensors, and these the expected official names."""
    layout = [*HEAD_KEYS, *prefixed(DETECTRON2_RESNET, "backbone.")]
    back = [*OFFICIAL_HEAD_KEYS, *prefixed(TO_DETECTRON2_RESNET, "backbone.")]
    files = sorted(file for file in path.parent.iterdir() if file.suffix != ".json")
    assert files
    loaded = {file.name: rename(read_state_dict(file), layout) for file in files}
    reference = next(iter(loaded.values()))
    for name, state in loaded.items():
        assert state.keys() == reference.keys(), name
        assert all(torch.equal(state[key], reference[key]) for key in reference), name
    assert sorted(rename(reference, back)) == sorted(set(meta["expected_keys"]) - {"criterion.empty_weight"})
    return {}


def run_miou(meta, tensors, path):
    num_classes = tensors["out.confusion_target_rows"].shape[0]
    results = {}
    for definition in ("detectron2", "mmseg"):
        metrics = SegmentationMetrics(num_classes, definition=definition)
        images = sum(name.startswith("in.label.") for name in tensors)
        for i in range(images):
            metrics.update(tensors[f"in.pred.{i}"], tensors[f"in.label.{i}"])
        results[definition] = metrics.compute()
    # The official matrix has a row and column more: predictions on ignored pixels.
    ignored = torch.zeros(num_classes, dtype=torch.int64)
    for i in range(images):
        ignored += torch.bincount(
            tensors[f"in.pred.{i}"][tensors[f"in.label.{i}"] == 255].long(), minlength=num_classes
        )
    full = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    full[:-1, :-1], full[:-1, -1] = metrics.confusion.T, ignored
    computed = {"out.confusion_target_rows": metrics.confusion, "out.confusion_pred_rows": full}
    names = ["mIoU", "fwIoU", "mAcc", "pAcc"]
    for definition, result in results.items():
        computed[f"out.iou_{definition}"] = 100 * result["IoU"]
        computed[f"out.acc_{definition}"] = 100 * result["Acc"]
    computed["out.summary_detectron2"] = 100 * torch.stack([results["detectron2"][name] for name in names])
    computed["out.summary_detectron2_before_2022_07"] = 100 * torch.stack([results["mmseg"][name] for name in names])
    computed["out.summary_mmseg"] = 100 * torch.stack([results["mmseg"][name] for name in ("mIoU", "mAcc", "pAcc")])
    return {name: in_float32(x, tensors[name]) if name.endswith("_mmseg") else x for name, x in computed.items()}


def in_float32(exact, official):
    """mmseg computes in float32: take its number where the exact one is within two steps of float32."""
    step = torch.finfo(torch.float32).eps
    assert torch.allclose(exact, official, rtol=2 * step, atol=0, equal_nan=True)
    return official


# -- full-size networks -----------------------------------------------------------------------------------------------

MASK_GAIN = 0.75


def fill(key, shape):
    """The value that the full-size cases give the official parameter `key`."""
    random = np.random.RandomState(zlib.crc32(key.encode()))
    noise = random.standard_normal(int(np.prod(shape)) if shape else 1).reshape(shape)
    leaf = key.rpartition(".")[2]
    if leaf == "running_var":
        value = 0.5 + 0.5 * np.abs(noise)
    elif leaf == "running_mean":
        value = 0.1 * noise
    elif leaf == "relative_position_bias_table":
        value = 0.3 * noise
    elif "sampling_offsets" in key:
        value = noise * (0.02 if leaf == "weight" else 2.0)
    elif leaf == "level_embed" or any(n in key for n in ("query_feat", "query_embed", "predictor.level_embed")):
        value = noise
    elif len(shape) == 1:
        value = 1 + 0.2 * noise if leaf == "weight" else 0.1 * noise
    else:
        value = noise / np.sqrt(np.prod(shape[1:]))
    if key.endswith("mask_embed.layers.2.weight"):
        value = value * MASK_GAIN
    return value.astype(np.float32)


def synthetic_image(height, width):
    """The RGB image (3, H, W) of the full-size cases."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([abs((4 * y) % 510 - 255), abs((3 * (x + y)) % 510 - 255), 255 * ((y // 40 + x // 56) % 2)])
    noise = np.random.RandomState(7).randint(0, 256, (3, height, width))
    return ((4 * base + noise) // 5).astype(np.uint8)


def filled_network(meta):
    """The network of the case with every parameter filled, loaded from a file of official names."""
    network = network_of_config(meta["description"])
    official = official_state_dict(network)
    assert len(official) == meta["state_key_count"]
    filled = {}
    for key, tensor in official.items():
        value = tensor
        if tensor.is_floating_point() and key != "criterion.empty_weight":
            value = torch.from_numpy(fill(key, tuple(tensor.shape)))
        filled[key] = value.contiguous()
    for key, checksum in meta["fill_crc32"].items():
        assert zlib.crc32(filled[key].numpy().tobytes()) == checksum, key
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "filled.safetensors"
        save_file(filled, file)
        report = load_weights(network, file)
    assert (report.missing, report.unexpected, report.mismatched) == ([], [], {}), str(report)
    return network.double().eval()


@torch.no_grad()
def run_full(meta, tensors, path):
    network = filled_network(meta)
    size = tuple(int(n) for n in re.search(r"(\d+)x(\d+) image", meta["description"]).groups())
    image = synthetic_image(*size)
    assert zlib.crc32(image.tobytes()) == meta["image_crc32"]
    assert image[0, 0, :8].tolist() == meta["image_first_row_red"]
    captured = {}
    network.backbone.register_forward_hook(lambda _m, _i, maps: captured.update(maps=maps))
    network.pixel_decoder.register_forward_hook(lambda _m, _i, out: captured.update(mask_features=out.mask_features))
    with record_layers(network.decoder) as records:
        output = network(torch.from_numpy(image)[None])
    predictions = [*output["aux_outputs"], output]
    logits = torch.stack([p["pred_logits"][0] for p in predictions])
    masks = torch.stack([p["pred_masks"][0] for p in predictions])
    scores = semantic_inference(logits[-1], masks[-1], size, tuple(meta["height_width_requested"]))
    mask_features = captured["mask_features"][0]
    computed = {
        "out.pred_logits_final_even": logits[-1, ::2],
        "out.pred_logits_slice": logits[:, :4, :8],
        "out.pred_masks_final_slice": masks[-1, ::10, ::8, ::8],
        "out.pred_masks_slice": masks[:, :3, ::16, ::16],
        "out.pred_logits_stats": torch.stack([statistics(x) for x in logits]),
        "out.pred_masks_stats": torch.stack([statistics(x) for x in masks]),
        "out.mask_features_stats": statistics(mask_features),
        "out.mask_features_slice": mask_features[:8, ::8, ::8],
        "out.sem_seg_stats": statistics(scores),
        "out.sem_seg_slice": scores[:12, ::24, ::24],
        "out.argmax": scores.argmax(0)[::6, ::6],
    }
    for stage, feature in zip((2, 3, 4, 5), captured["maps"], strict=True):
        computed[f"out.res{stage}_stats"] = statistics(feature)
        computed[f"out.res{stage}_slice"] = feature[0, :6, :4, :5]
    for i, record in enumerate(records):
        if f"out.window_index.{i}" in tensors:
            weights = cross_attention_weights(record)
            computed[f"out.window_index.{i}"] = select_windows(weights, network.decoder.omega_rate)
    return computed


def statistics(x):
    return torch.stack([x.mean(), x.std(), x.abs().max()])
