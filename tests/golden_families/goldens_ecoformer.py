"""EcoFormer: its attention layer, the fit of the hash functions, small PVTv2 and Twins, stage conversions, full sizes.

``sd.<official key>`` are weights. Names ending in ``_f64`` are the official code in float64 and are computed in float64
from the float32 inputs; the others are float32 results.
"""

import re

import timm
import torch
from safetensors.torch import load_file
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.twins import Twins

import backbones  # noqa: F401  (registers the networks)
from backbones.attention import global_attention
from backbones.attention_keys import exchange_attention
from backbones.checkpoint import rename
from backbones.ecoformer import EcoFormerAttention, KernelHashing
from backbones.ecoformer_networks import PVTv2, TwinsSVT
from backbones.keys import OFFICIAL_PVT
from efficiency import kernel_hashing
from efficiency.ecoformer import fit_at_next_pass
from efficiency.energy import Operations, count_operations, total

KINDS = {"ecoformer": "ecoformer", "EcoBlock": "ecoformer", "msa": "msa", "StandardBlock": "msa"}  # else the original
INPUTS = re.compile(r"x(_\w+)?|X|S0|A_init|anchor_index|perm\w*|grad_y|sd_(before|src)\..*|.*projection_matrix")


def is_expected(name):
    return not INPUTS.fullmatch(name)


def tolerance(name):
    """What is not float64 was computed in float32, where the order of summation matters more than 1e-6."""
    return None if name.endswith("_f64") else 2e-6


def run_case(meta, tensors, path):
    if not tensors:
        return check_keys(meta) if "keys" in meta else check_summary(meta)
    if "X" in tensors:
        return run_fit(meta, tensors)
    if "sd_src" in {name.partition(".")[0] for name in tensors}:
        return run_conversion(meta, tensors, path)
    if "config" in meta:
        return run_network(meta, tensors)
    return run_update(meta, tensors) if "perm" in tensors else run_layer(meta, tensors)


def weights_of(tensors, prefix="sd."):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def make_layer(meta, weights):
    options = {"qkv_bias": meta["qkv_bias"], "num_bits": meta["nbits"], "num_anchors": meta["m"]}
    layer = EcoFormerAttention(meta["dim"], meta["num_heads"], **options)
    layer.load_state_dict(weights)
    return layer.eval()


# -- attention --------------------------------------------------------------------------------------------------------


def run_layer(meta, tensors):
    computed = weights_of(tensors, "") | {}
    for suffix, dtype in (("", torch.float32), ("_f64", torch.float64)):
        layer = make_layer(meta, weights_of(tensors)).to(dtype)
        assert layer.hashing.fitted
        results = attend(layer, tensors["x"].to(dtype), tensors["grad_y"].to(dtype))
        computed |= {f"{name}{suffix}": value for name, value in results.items()}
    return computed


def attend(layer, x, grad):
    x = x.detach().requires_grad_()
    unit = layer.unit_queries(x)
    presign = layer.hashing(unit)
    outputs = []
    layer.proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    y = layer(x)
    (y * grad).sum().backward()
    heads = {"num_heads": layer.num_heads, "head_dim": layer.head_dim}
    return {
        "y": y,
        "qk_unit": unit,
        "presign": presign,
        "codes": presign.sign(),
        "v": split_heads(layer.to_v(x), **heads),
        "attn_out": split_heads(outputs[0], **heads),
        "grad_x": x.grad,
        **{f"grad_{name}_weight": getattr(layer, name).weight.grad for name in ("to_qk", "to_v", "proj")},
    }


def split_heads(x, num_heads, head_dim):
    return x.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)


# -- hash functions ---------------------------------------------------------------------------------------------------


def run_fit(meta, tensors):
    assert (meta["momentum"], meta["iteration_n"]) == (kernel_hashing.MOMENTUM, kernel_hashing.STEPS)
    assert meta["nesterov"]
    computed = {}
    for suffix, dtype in (("", torch.float32), ("_f64", torch.float64)):
        unit = tensors["X"].to(dtype)
        hashing = KernelHashing(meta["head_num"], meta["head_dim"], meta["nbits"], meta["m"]).to(dtype)
        hashing.A.copy_(tensors["A_init"])
        assert dense(kernel_hashing.SignedNeighbours(unit, meta["topk"])).equal(tensors["S0"].to(dtype))
        options = {"topk": meta["topk"], "learning_rate": meta["learning_rate"]}
        bits = kernel_hashing.fit_hash_functions(hashing, unit, tensors["anchor_index"], **options)
        presign = hashing(unit)
        results = {
            "anchor": hashing.anchor,
            "mvec": hashing.mvec,
            "A_final": hashing.A,
            "A_after_sgd": torch.stack([bit.candidate for bit in bits]),
            "accepted": torch.tensor([bit.accepted for bit in bits]),
            "presign_after": presign,
            "codes_after": presign.sign(),
        }
        computed |= {f"{name}{suffix}": value for name, value in results.items()}
        computed[f"relaxed_loss{suffix}"] = torch.stack([bit.relaxed_losses for bit in bits])
        losses = {"hard_loss_prev": "hard_loss_before", "hard_loss_cur": "hard_loss_after"}
        for name, field in losses.items():
            computed[f"{name}{suffix}"] = torch.tensor([getattr(bit, field) for bit in bits], dtype=torch.float64)
    return computed


def dense(similarity):
    """The matrix (B, heads, N, N) of the similarities."""
    batch, heads, num_tokens = similarity.shape
    matrix = similarity.weight.new_zeros(batch, heads, num_tokens, num_tokens)
    inside = similarity.index % num_tokens
    return matrix.scatter_add_(-1, inside, similarity.weight)


def run_update(meta, tensors):
    layer = make_layer(meta, weights_of(tensors, "sd_before."))
    fit_at_next_pass(layer, topk=meta["topk"])
    with torch.no_grad(), torch.random.fork_rng():
        drawn, torch.randperm = torch.randperm, lambda count: tensors["perm"][:count]
        try:
            y = layer(tensors["x"])
        finally:
            torch.randperm = drawn
        presign = layer.hashing(layer.unit_queries(tensors["x"]))
    state = {f"sd.{name}": value for name, value in layer.state_dict().items()}
    return {"y": y, "presign": presign, "codes": presign.sign(), **state}


# -- networks ---------------------------------------------------------------------------------------------------------


def make_network(meta, kind):
    """The small network of `meta` and the rows that rename its official keys."""
    config = dict(meta["config"])
    assert config.pop("qkv_bias")
    assert meta.get("norm_eps", 1e-6) == 1e-6
    image_size, patch_size, windows = config.pop("img_size"), config.pop("patch_size"), config.pop("wss", None)
    assert patch_size == 4
    if windows is not None:
        if kind == "source":
            network = Twins(img_size=image_size, wss=windows, **config)
            # the official last stage attends to all tokens, as timm's does within windows that hold them all
            for block in network.blocks[-1]:
                block.attn = global_attention(block.attn)
            return network, []
        cls, table = TwinsSVT, []
    else:
        cls, table = PVTv2, OFFICIAL_PVT
    if kind == "source":
        return PyramidVisionTransformerV2(**config), table
    return cls(attention=kind, num_bits=meta["nbits"], num_anchors=meta["m"], **config), table


def run_network(meta, tensors):
    name = (meta.get("attn_type") or meta["block_cls"]).split()[0]
    network, table = make_network(meta, KINDS.get(name, "source"))
    weights = rename(weights_of(tensors), table)
    weights, _ = exchange_attention(weights, network.state_dict())
    network.load_state_dict(weights)
    network.eval()
    assert all(layer.hashing.fitted for layer in network.modules() if isinstance(layer, EcoFormerAttention))
    computed = {f"sd.{key}": tensor for key, tensor in weights_of(tensors).items()}
    with torch.no_grad():
        computed["y"], maps = observed(network, tensors)
        computed |= maps
        computed["y_f64"] = network.double()(tensors["x"].double())
    if "nparams" in meta:
        assert sum(parameter.numel() for parameter in network.parameters()) == meta["nparams"]
    return computed


def observed(network, tensors):
    """The logits, and the tokens behind the modules whose official names follow ``feat.``."""
    modules = {f"norm{stage + 1}": module.norm for stage, module in enumerate(getattr(network, "stages", []))}
    modules |= dict(network.named_modules())
    maps = {}
    for name in (key.removeprefix("feat.") for key in tensors if key.startswith("feat.")):
        modules[name].register_forward_hook(lambda _m, _i, output, key=f"feat.{name}": maps.update({key: output}))
    return network(tensors["x"]), maps


def run_conversion(meta, tensors, path):
    """Both official conversions of the small source network, whose weights are in a case of their own."""
    source, table = make_network(meta, "source")
    whole = path.with_name(path.stem.replace("convert", "tiny_sra" if table else "tiny_svt") + ".safetensors")
    released = rename(weights_of(load_file(whole)), table)
    source.load_state_dict(exchange_attention(released, source.state_dict())[0])
    computed = {}
    with torch.no_grad():
        computed["y_source"] = source.eval()(tensors["x"])
        for kind, prefix, output in (("msa", "sd_msa.", "y_msa"), ("ecoformer", "sd_eco.", "y_eco")):
            network, _ = make_network(meta, kind)
            weights, unused = exchange_attention(released, network.state_dict())
            if kind == "msa":
                expected = rename(dict.fromkeys(meta["unused_source_keys_step1"]), table)
                assert sorted(unused) == sorted(expected)
            hashing = {k: v for k, v in rename(weights_of(tensors, prefix), table).items() if "fast_attention" in k}
            missing, unexpected = network.load_state_dict({**weights, **hashing}, strict=False)
            assert not unexpected
            assert all(name.endswith("projection_matrix") for name in missing)
            state, keys = network.state_dict(), weights_of(tensors, prefix)
            computed |= {f"{prefix}{key}": state[name] for name, key in rename({k: k for k in keys}, table).items()}
            computed[output] = network.eval()(tensors["x"])
            released = weights  # the second conversion starts from the first
    return computed


# -- full sizes -------------------------------------------------------------------------------------------------------


def registered(name, kind=None):
    """The network of an official name, on the meta device; original networks (kind "sra" or "svt") are timm's."""
    name = name.replace("alt_gvt", "twins_svt")
    name = name if name.endswith(("_msa", "_ecoformer")) or kind == "source" else f"{name}_{kind}"
    with torch.device("meta"):
        return timm.create_model(name)


def check_keys(meta):
    network = registered(meta["model"], KINDS.get(meta["variant"].split()[0], "source"))
    table = OFFICIAL_PVT if meta["model"].startswith("pvt") else []
    with torch.device("meta"):
        state = rename({name: torch.empty(shape) for name, shape in meta["keys"]}, table)
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    assert sorted(rename(dict.fromkeys(meta["buffer_keys"]), table)) == sorted(dict(network.named_buffers()))
    check_sizes(network, meta["total_parameters"], meta["total_buffers"])
    assert len(state) == meta["num_keys"]
    return {}


def check_summary(meta):
    for name, facts in meta.items():
        network = registered(name, "msa")
        check_sizes(network, facts["parameters"], facts["buffers"])
        counted = count_operations(network, (1, 3, 224, 224))
        base = sum(value.multiplications for key, value in counted.items() if not key.endswith(".attn"))
        assert base == facts["base_macs_mmcv"]
        prefix = "stages" if isinstance(network, PVTv2) else "blocks"
        for stage, expected in enumerate(facts["attn_mul_add_per_stage"]):
            layers = {k: v for k, v in counted.items() if k.startswith(f"{prefix}.{stage}.") and k.endswith(".attn")}
            assert total(layers) == Operations(*expected)
        assert total(counted) == Operations(int(facts["mul"]), int(facts["add"]))
        assert abs(total(counted).energy_pj / facts["energy_pJ"] - 1) < 1e-12
    return {}


def check_sizes(network, parameters, buffers):
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert sum(buffer.numel() for buffer in network.buffers()) == buffers
