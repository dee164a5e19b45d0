"""SPViT: gates and their gradients, super-networks, pruned networks, conversions, official keys and costs.

A case is told by what it holds: a plain network (``sd_source.*``), a whole network (``sd.*`` with an image and a
configuration), a gated MLP, a gated mixer, a list of keys, or the costs of networks.
"""

import json
import re
from collections import defaultdict
from contextlib import contextmanager
from unittest import mock

import torch
from safetensors.torch import load_file

from backbones.checkpoint import rename
from backbones.keys import BUFFERS
from backbones.spvit import SPViTDeiT, TokenAttention, TokenConv, collapse
from backbones.spvit_architecture import MIXERS, PUBLISHED_ARCHITECTURES, TAPS, Architecture
from backbones.spvit_layers import merged_kernel
from backbones.spvit_swin import SPViTSwin, WindowAttention, WindowConv, Windows
from efficiency import spvit
from efficiency.spvit_gates import GatedAttention, GatedMlp, GatedWindowAttention, drawn_gates, expected_gates

INPUTS = re.compile(r"x|mask|.*uniform.*|(.*\W)?grad_y(\W.*|_.*)?|thresholds_\w+|sd\w*\..*|ffn_indicator\.\d+")
drawn = set()  # names of the case at hand that belong to a pattern of drawn gates
COMPUTED = ("relative_position_index", "attn_mask")


def is_expected(name):
    return not INPUTS.fullmatch(name)


def tolerance(name):
    """Of drawn patterns, float32 training with batch norm over few tokens: up to 4e-6 off float64 here."""
    return 1e-5 if name in drawn else None


def run_case(meta, tensors, path):
    drawn.clear()
    names = set(tensors)
    if any(name.startswith("sd_source.") for name in names):
        return run_source(meta, tensors, path)
    if any(name.startswith(("sd.blocks.", "sd.layers.")) for name in names):
        return run_network(meta, tensors)
    if "sd.ffn_thresholds" in names:
        return run_mlp(tensors)
    if names:
        return run_mixer(meta, tensors)
    return run_keys(meta) if "keys" in meta else run_costs(meta)


def weights(tensors, prefix="sd."):
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return rename(state, BUFFERS)


# -- networks ---------------------------------------------------------------------------------------------------------


def unpruned(config):
    """The plain network of a configuration."""
    family = "swin" if "depths" in config else "deit"
    depths = config["depths"] if family == "swin" else [config["depth"]]
    heads = config["num_heads"] if family == "swin" else [config["num_heads"]]
    assert config.get("window_size", 7) == 7
    assert config["qkv_bias"]
    return Architecture.unpruned(
        family, config["embed_dim"], depths, heads, config["patch_size"], config["mlp_ratio"], config.get("alpha")
    )


def mixer_of(indicators):
    return MIXERS[int(sum(indicators))]


def numbers(name):
    return [int(number) for number in re.findall(r"\d+", name)]


def flat(nested):
    return [item for part in nested for item in part]


def make(architecture, config, **options):
    cls = SPViTSwin if architecture.family == "swin" else SPViTDeiT
    return cls(architecture=architecture, img_size=config["img_size"], num_classes=config["num_classes"], **options)


def run_network(meta, tensors):
    config, state = meta["config"], weights(tensors)
    assert config.get("norm_eps", 1e-6) == 1e-6
    plain = unpruned(config)
    if any("thresholds" in name for name in state):
        model = spvit.convert(make(plain, config), plain.alpha)
    else:
        indicators = config["msa_indicators"]
        indicators = flat(indicators) if plain.family == "swin" else indicators
        blocks = sorted((name for name in state if name.endswith("fc1.bias")), key=numbers)
        widths = [len(state[name]) for name in blocks]
        architecture = plain.with_blocks([mixer_of(each) for each in indicators], widths)
        collapsed = any(".bconv." in name for name in state)
        model = make(architecture, config, official_blocks=True, collapsed=collapsed)
        assert widths == meta.get("ffn_kept", widths)
        if not collapsed:
            assert sum(p.numel() for p in model.parameters()) == meta.get(
                "nparams", sum(map(torch.numel, model.parameters()))
            )
    assert set(state) == set(model.state_dict())
    model.load_state_dict(state)
    with torch.no_grad():
        computed = {"y": model.eval()(tensors["x"])}
        computed |= results_of_search(model, meta, tensors) if spvit.is_gated(model) else {}
        computed["y_f64"] = model.double()(tensors["x"].double())
        if not spvit.is_gated(model):
            torch.testing.assert_close(collapse(model)(tensors["x"].double()), computed["y_f64"], rtol=1e-9, atol=1e-12)
    return computed


def results_of_search(model, meta, tensors):
    config = meta["config"]
    found = spvit.found_architecture(model)
    types = meta["block_types"]
    assert [block.mixer for block in found.blocks] == (flat(types) if found.family == "swin" else types)
    before = weights(tensors)
    for name, tensor in model.state_dict().items():
        if name.endswith(spvit.INDICATORS):
            assert torch.equal(tensor, before[name]), name
    thresholds = torch.stack([block.attn.thresholds for block in spvit.blocks_of(model)])
    counted = spvit.cost(model, config["img_size"])
    assert found.macs(config["img_size"], config["num_classes"]) == counted.total
    y = model(tensors["x"])
    torch.testing.assert_close(spvit.prune(model)(tensors["x"]), y, rtol=1e-5, atol=1e-6)
    return {
        "kernel_indicators": expected_gates(thresholds).cumprod(1),
        "kernel_probs": thresholds.sigmoid(),
        "ffn_counts": torch.tensor([float(block.width) for block in found.blocks]),
        "flops": torch.stack([counted.total, counted.mixers, counted.feed_forward]),
        "bops_loss": spvit.target_loss(counted, config["target_flops"], config["loss_lambda"]).float(),
    }


def run_source(meta, tensors, path):
    """A plain network, and the pruned one of the same folder that was made of it."""
    config = meta["config"]
    model = make(unpruned(config), config).eval()
    model.load_state_dict(spvit.split_state_dict(weights(tensors, "sd_source.")))
    name = path.stem.replace("source", "pruned")
    pruned_meta, pruned = (path.with_name(f"{name}.json"), path.with_name(f"{name}.safetensors"))
    if pruned.exists():
        compare_pruned(model, tensors, json.loads(pruned_meta.read_text()), weights(load_file(pruned)))
    with torch.no_grad():
        return {"y_source": model(tensors["x"])} if "y_source" in tensors else {}


def compare_pruned(model, tensors, meta, expected):
    indicators = meta["config"]["msa_indicators"]
    mixers = [mixer_of(each) for each in (flat(indicators) if model.architecture.family == "swin" else indicators)]
    masks = [tensors[f"ffn_indicator.{i}"].ne(0).tolist() for i in range(len(mixers))]
    assert [sum(mask) for mask in masks] == meta["ffn_kept"]
    architecture = spvit.with_indicators(model.architecture.with_blocks(mixers, meta["ffn_kept"]), masks)
    state = spvit.prune_plain(model, architecture, official_blocks=True).state_dict()
    assert set(state) == set(expected)
    fresh = {name for name in meta["missing_keys"] if not name.endswith(COMPUTED)}
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    for name in set(state) - fresh - counters:
        assert torch.equal(state[name], expected[name]), name
    assert {name for name in state if re.search(r"head_probs|\.bn_\dx\d\.", name)} == fresh | counters


# -- layers -----------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(uniform):
    """Draw `uniform` in place of random numbers."""
    with mock.patch.object(torch, "rand_like", lambda tensor: uniform.to(tensor)):
        yield


def run_mlp(tensors):
    layer = GatedMlp(tensors["x"].shape[-1], len(tensors["sd.ffn_thresholds"]))
    layer.load_state_dict(weights(tensors))
    layer.eval()
    with torch.no_grad():
        gates = expected_gates(layer.ffn_thresholds)
        computed = {"y": layer(tensors["x"]), "sum": gates.sum(), "ffn_indicators": gates}
        units = gates.bool()
        hidden = layer.act(torch.nn.functional.linear(tensors["x"], layer.fc1.weight[units], layer.fc1.bias[units]))
        computed["y_pruned"] = torch.nn.functional.linear(hidden, layer.fc2.weight[:, units], layer.fc2.bias)
    with recorded(tensors["uniform"]):
        y = layer.train()(tensors["x"])
    total = expected_gates(layer.ffn_thresholds).sum()
    ((y * tensors["grad_y"]).sum() + total).backward()
    return computed | {
        "y_train": y,
        "sum_train": total,
        "grad_thresholds": layer.ffn_thresholds.grad,
        "grad_fc1": layer.fc1.weight.grad,
    }


def run_mixer(meta, tensors):
    x, state, swin = tensors["x"], weights(tensors), "sd.kernel_thresholds_full" in tensors
    dim, heads, alpha = meta["dim"], meta["num_heads"], meta["alpha"]
    if swin:
        side = meta["window_size"][0]
        # Windows beside each other make one map; with a mask they are those of shifted ones, which `x` is already.
        where = FixedWindows(side, side, side, 0, tensors["mask"].to(x.dtype) if "mask" in tensors else None)
        gated = GatedWindowAttention(dim, heads, side, alpha)
    else:
        where, gated = tuple(meta["window_size"]), GatedAttention(dim, heads, alpha)
    gated.load_state_dict(state)
    assert meta.get("theta", 1.5) == 1.5
    computed = {}
    if any("uniform" in name for name in tensors):
        computed |= train_mixer(gated, meta, tensors, x, where)
        gated.load_state_dict(state)
    x = x.unflatten(1, (side, side)) if swin else x
    gated.eval()
    for dtype, suffix in ((torch.float32, ""), (torch.float64, "_f64")):
        gated.to(dtype)
        for name, values in meta.get("thresholds", {}).items():
            thresholds = torch.tensor(values, dtype=dtype)
            with torch.no_grad():
                gated.thresholds.copy_(thresholds)
                y = gated(x.to(dtype), where if not swin else where.to(dtype))
            computed[f"y_search_{name}{suffix}"] = y.flatten(1, 2) if swin else y
            if not suffix:
                computed[f"indicators_{name}"] = expected_gates(thresholds).cumprod(0)
                computed[f"threshold_probs_{name}"] = thresholds.sigmoid()
        for name in meta.get("finetune_indicators", {}):
            y = fine_tuned(name, meta, state, x.to(dtype), where if not swin else where.to(dtype), swin)
            computed[f"y_finetune_{name}{suffix}"] = y.flatten(1, 2) if swin else y
    return computed | merged(gated.float(), swin)


class FixedWindows(Windows):
    """Windows that are given already, one after the other in the batch."""

    def split(self, x):
        return x

    def join(self, windows):
        return windows

    def to(self, dtype):
        return FixedWindows(self.height, self.width, self.side, 0, None if self.mask is None else self.mask.to(dtype))


def fine_tuned(name, meta, state, x, where, swin):
    """The layer of a pruned network that the official code calls by `name`, with the same weights."""
    dim, heads, family = meta["dim"], meta["num_heads"], "swin" if swin else "deit"
    if name == "skip":
        return x
    if name == "msa":
        layer = WindowAttention(dim, heads, meta["window_size"][0]) if swin else TokenAttention(dim, heads)
    else:
        options = {"whole_map": True} if swin else {}
        layer = (WindowConv if swin else TokenConv)(dim, heads, int(name[0]), TAPS[family], meta["alpha"], **options)
    layer.load_state_dict({key: state[key] for key in layer.state_dict()})
    with torch.no_grad():
        return layer.to(x.dtype).eval()(x, where)


@torch.no_grad()
def merged(layer, swin):
    """Heads mixed to the taps of a kernel, by number of the tap."""
    weight, _, _ = merged_kernel(layer, 3)
    order = [layer.taps.index(tap) for tap in range(9)]
    share = (layer.head_probs / layer.alpha).softmax(0)
    bias = torch.einsum("hd,ht->dt", layer.v.bias.unflatten(0, (layer.num_heads, -1)), share)
    out = torch.einsum("chd,ht->cdt", layer.proj.weight.unflatten(1, (layer.num_heads, -1)), share)
    return {
        "head_softmax": share,
        "v_merged": weight.flatten(2)[..., order],
        "v_bias_merged": bias,
        "proj_merged": out,
    }


def train_mixer(gated, meta, tensors, x, where):
    """Every drawn pattern: output, gates and gradients of ``sum(y * grad_y)``.

    Names say of which pattern a tensor is in what stands around ``uniform`` in that of its draw; without any, patterns
    are rows of the tensors.
    """
    state = {name: tensor.clone() for name, tensor in gated.state_dict().items()}
    with_cost = re.search(r"\+ ?sum", meta.get("notes", ""))  # the sum of the expected gates, as for a gated MLP
    computed, names, largest = {}, {}, defaultdict(float)
    for key, draws in tensors.items():
        if "uniform" not in key:
            continue
        start, end = key.split("uniform")
        grads = tensors.get(f"{start}grad_y{end}", tensors.get("grad_y"))
        rows = []
        for number, draw in enumerate(draws.view(-1, 3)):
            gated.load_state_dict(state)
            grad = grads[number] if grads.ndim > x.ndim else grads
            rows.append(train_pattern(gated, draw, x, where, grad, with_cost))
        for name in (name for name in tensors if is_expected(name) and name.startswith(start) and name.endswith(end)):
            wanted = canonical(name[len(start) : len(name) - len(end)])
            if wanted in rows[0]:
                found = torch.stack([row[wanted] for row in rows]) if draws.ndim == 2 else rows[0][wanted]
                computed[name] = found
                names[name] = wanted
                largest[wanted] = max(largest[wanted], float(found.abs().max()))
    drawn.update(names)
    # Officially an open gate is (1 + p) - p, not quite 1: a branch that is off leaves rounding errors.
    for name, wanted in names.items():
        if max(float(tensor.abs().max()) for tensor in (computed[name], tensors[name])) < 1e-6 * largest[wanted]:
            computed[name] = tensors[name]
    return computed


def canonical(name):
    """One spelling of a tensor of a pattern."""
    name = re.sub(r"\W", "_", name).removesuffix("_weight")
    name = re.sub(r"kernel_thresholds(_full)?$", "thresholds", name)
    return {"y_train": "y", "pattern": "gates", "sampled": "gates"}.get(name, name)


def train_pattern(gated, draw, x, where, grad, with_cost):
    gated.train().zero_grad()
    leaf = x.clone().requires_grad_()
    with recorded(draw):
        gates = drawn_gates(gated.thresholds, True).cumprod(0)
        y = gated(leaf.unflatten(1, (where.side, where.side)) if isinstance(where, Windows) else leaf, where)
    y = y.flatten(1, 2) if isinstance(where, Windows) else y
    indicators = expected_gates(gated.thresholds).cumprod(0)
    ((y * grad).sum() + (indicators.sum() if with_cost else 0)).backward()
    gradients = {"x": leaf.grad} | {name: parameter.grad.clone() for name, parameter in gated.named_parameters()}
    computed = {"y": y, "gates": gates, "indicators": indicators} | dict(gated.named_buffers())
    computed |= {f"grad_{name}": gradient for name, gradient in gradients.items()}
    return {canonical(name): tensor.detach().clone() for name, tensor in computed.items()}


# -- lists ------------------------------------------------------------------------------------------------------------


def architecture_of(name):
    """The published architecture that official configurations call `name`."""
    name = re.sub(r"(_ft)?(\.json|\.yaml)?$", "", name).replace("swin_tn", "swin_t")
    return PUBLISHED_ARCHITECTURES[name]


def run_keys(meta):
    """Names, shapes and number of parameters; index tables and masks are computed, not kept."""
    with torch.device("meta"):
        if "config" in meta:
            model = make_published(architecture_of(meta["config"]), any(".bconv." in name for name, _ in meta["keys"]))
        else:
            shapes = dict(meta["keys"])
            model = spvit.convert(make(full_size(shapes), {"img_size": 224, "num_classes": 1000}))
    own = [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]
    assert sorted(own) == sorted(key for key in meta["keys"] if not key[0].endswith(COMPUTED))
    assert sum(p.numel() for p in model.parameters()) == meta["total_parameters"]
    assert len(meta["keys"]) == meta["num_keys"]
    return {}


def make_published(architecture, collapsed):
    config = {"img_size": 224, "num_classes": 1000}
    return make(architecture, config, official_blocks=True, collapsed=collapsed)


def full_size(shapes):
    """The unpruned network whose parameters have `shapes`: all full-size ones have heads of 64 or 32 channels."""
    dim = shapes["patch_embed.proj.weight"][0]
    if "cls_token" in shapes:
        depth = len([name for name in shapes if name.endswith("norm1.bias")])
        return Architecture.unpruned("deit", dim, [depth], [dim // 64], 16)
    stages = [sum(name.startswith(f"layers.{i}.") and name.endswith("norm1.bias") for name in shapes) for i in range(4)]
    return Architecture.unpruned("swin", dim, stages, [dim * 2**i // 32 for i in range(4)], 4)


def run_costs(meta):
    for name, facts in meta.items():
        if isinstance(facts, dict) and "flops_all_on" in facts:
            check_super_network(name, facts)
        elif isinstance(facts, dict) and "flops_model_formula" in facts:
            check_pruned_network(name, facts)
    return {}


def check_super_network(name, facts):
    deit = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
    swin = {"tiny": (96, 6, 3), "small": (96, 18, 3), "base": (128, 18, 4)}
    family, size, _ = name.split("_")
    if family == "deit":
        plain = Architecture.unpruned("deit", deit[size][0], [12], [deit[size][1]], 16)
    else:
        dim, depth, heads = swin[size]
        plain = Architecture.unpruned("swin", dim, [2, 2, depth, 2], [heads * 2**i for i in range(4)], 4)
    with torch.device("meta"):
        model = make(plain, {"img_size": 224, "num_classes": 1000})
        parameters = sum(p.numel() for p in spvit.convert(model).parameters())
    assert parameters == facts["params"]
    check_flops(plain, facts["flops_all_on"])


def check_pruned_network(name, facts):
    architecture = architecture_of(name)
    types = facts["msa_types"]
    assert [block.mixer for block in architecture.blocks] == (types if isinstance(types[0], str) else flat(types))
    assert [block.width for block in architecture.blocks] == facts["ffn_kept"]
    check_flops(architecture, facts["flops_model_formula"])
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in make_published(architecture, c).parameters()) for c in (False, True)]
    assert sizes == [facts["params_unoptimised"], facts.get("params_bconv", facts.get("params_paramopt"))]


def check_flops(architecture, expected):
    """The official sums are rounded to float32 in every step."""
    costs = architecture.costs()
    mixers = sum(costs_of[block.mixer] for costs_of, block in zip(costs.mixers, architecture.blocks, strict=True))
    units = sum(unit * block.width for unit, block in zip(costs.unit, architecture.blocks, strict=True))
    found = torch.tensor([architecture.macs(), mixers, units], dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=5e-7, atol=0)
