"""Mesa: the quantiser over some steps, single layers and a DeiT block with their gradients, and policy files.

A case holds inputs ``x0``, ``x1``, official weights ``sd_before.*`` and what the official layers made of them in the
second of two steps, whose inputs were 1.15 times as large in the first: output ``y``, gradients, codes ``q<i>`` of the
i-th quantiser in the order of the forward pass, with ``scale<i>`` and ``shift<i>``, what they restored in the order of
the backward pass, and the state ``sd.*`` after both steps. Names that end in ``_f64`` are a second run in float64,
``_noquant`` gradients are those of plain PyTorch.
"""

import copy
import itertools
import re

import torch
from torch import nn

import kernels.quantize
from backbones.checkpoint import ranges_of_mesa
from efficiency.mesa import Compressor, Signs, pack_bits, unpack_bits
from efficiency.mesa_layers import channel_groups, describe, units
from efficiency.mesa_policy import Setting, deploy, parse_policy
from kernels.quantize import RunningRange, dequantize, quantize, update_range

FIRST_STEP = 1.15  # times the inputs
half_precision = set()  # names of the case at hand


NOISE = re.compile(r"(noise|uniforms?|u|rand)(_.*)?")
INPUTS = re.compile(rf"sd_before\..*|{NOISE.pattern}|x(_?\d+)?(_f64)?|grad_y(_f64)?")


def is_expected(name):
    return not INPUTS.fullmatch(name)


def tolerance(name):
    return 2**-9 if name in half_precision else None


def run_case(meta, tensors, path):
    half_precision.clear()
    half_precision.update(name for name, tensor in tensors.items() if tensor.dtype == torch.float16)
    if not tensors:
        return check_policies(meta)
    if "packed_mask" in tensors:
        return run_relu(tensors)
    if "x_0" in tensors:
        return run_quantiser(meta, tensors)
    computed = run_layer(meta, tensors, "")
    if "x0_f64" in tensors:
        computed |= run_layer(meta, tensors, "_f64")
    return computed


# -- the quantiser ------------------------------------------------------------------------------------------------


def grouped(x, groups):
    """As the files have them: (groups, numbers), heads or channels before the batch."""
    if x.ndim == 4:
        return x.transpose(0, 1).reshape(groups, -1)
    return x.reshape(-1, groups, x.shape[-1] // groups).transpose(0, 1).reshape(groups, -1)


def ungrouped(x, shape):
    """The inverse of `grouped` for a tensor of some shape."""
    if len(shape) == 4:
        return x.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    groups = x.shape[0]
    return x.view(groups, -1, shape[-1] // groups).transpose(0, 1).reshape(shape)


def scale_of(span, levels):
    return ((levels - 1) / span.abs()).to(span.dtype)


def run_quantiser(meta, tensors):
    groups, levels = meta["groups"], meta["level"]
    dtype = tensors["x_0"].dtype
    running = RunningRange(torch.ones(groups, dtype=dtype), torch.zeros(groups, dtype=dtype), torch.zeros(1))
    computed = {}
    for step in range(meta["iterations"]):
        x = tensors[f"x_{step}"]
        update_range(x, running, decay=meta["ema_decay"])
        codes = quantise(x, running, levels, noise_of(tensors, step))
        restored = dequantize(codes, running.span, running.shift, levels=levels, dtype=dtype, upstream=True)
        computed |= {
            f"x_grouped_{step}": grouped(x, groups),
            f"clip_val_{step}": running.span.clone(),
            f"shift_{step}": running.shift.clone(),
            f"scale_{step}": scale_of(running.span, levels),
            f"q_{step}": grouped(codes, groups),
            f"x_restored_{step}": restored,
        }
    return computed | {"iteration_final": running.updates}


def noise_of(tensors, step):
    return next((t for name, t in tensors.items() if NOISE.fullmatch(name) and name.endswith(f"_{step}")), None)


def quantise(x, running, levels, noise):
    if noise is None:
        return quantize(x, running.span, running.shift, levels=levels, upstream=True)
    if noise.shape != x.shape:
        noise = ungrouped(noise, x.shape)
    own, kernels.quantize.rounding_noise = kernels.quantize.rounding_noise, lambda count, seed: noise.flatten()
    try:
        seed = torch.zeros(1, dtype=torch.int64)
        return quantize(x, running.span, running.shift, levels=levels, seed=seed, upstream=True)
    finally:
        kernels.quantize.rounding_noise = own


def run_relu(tensors):
    x = tensors["x"].clone().requires_grad_()
    network = nn.Sequential(nn.Identity(), nn.ReLU()).train()
    recorder = Recorder(network, None)
    y = network(x)
    (y * tensors["grad_y"]).sum().backward()
    (record,) = recorder.records
    assert isinstance(record[2].packed, Signs)
    packed = record[2].packed.data
    assert torch.equal(pack_bits(x <= 0), packed)
    return {
        "y": y,
        "grad_x": x.grad,
        "packed_mask": packed,
        "unpacked": unpack_bits(packed, x.shape[1]).to(torch.uint8),
    }


# -- layers -------------------------------------------------------------------------------------------------------


class Recorder(Compressor):
    """Keeps what was compressed: name of the layer, tensor, what stands for it."""

    def __init__(self, network, num_groups):
        super().__init__(describe(network, None), num_groups, group_size=32, upstream=True)
        self.records = []
        self.attach(network)

    def _compress(self, tensor, layer, tallies):
        kept = super()._compress(tensor, layer, tallies)
        if kept is not None:
            self.records.append((layer.name, tensor.detach().clone(), kept))
        return kept


class MatMul(nn.Module):
    def __init__(self, num_heads):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, a, b):
        return a @ b


class Block(nn.Module):
    """A block of DeiT whose attention is written out; names are the official ones."""

    def __init__(self, dim, hidden, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.norm1, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)
        self.mm1, self.softmax, self.mm2 = MatMul(num_heads), nn.Softmax(-1), MatMul(num_heads)
        self.proj, self.norm2 = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.softmax(self.mm1(q * self.scale, k.transpose(-2, -1)))
        x = x + self.proj(self.mm2(weights, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


def build(meta, tensors):
    """The layer or block that a case is about, told from its weights and inputs."""
    weights = {name[10:]: tensor for name, tensor in tensors.items() if name.startswith("sd_before.")}
    x, weight = tensors["x0"], weights.get("weight")
    if "qkv.weight" in weights:
        return Block(x.shape[-1], len(weights["fc1.weight"]), meta.get("num_heads", meta["quant_groups"]))
    if "x1" in tensors:
        return MatMul(x.shape[1])
    if "quant2.shift" in weights:
        return nn.Softmax(-1)
    if weight is None:
        return nn.GELU()
    if "running_mean" in weights:
        return nn.BatchNorm2d(len(weight), eps=meta.get("eps", 1e-5))
    if weight.ndim == 1:
        return nn.LayerNorm(len(weight), eps=meta.get("eps", 1e-5))
    if weight.ndim == 2:
        return nn.Linear(*weight.shape[::-1], bias="bias" in weights)
    return build_convolution(x, weight, weights.get("bias"), tensors["y"])


def build_convolution(x, weight, bias, y):
    """Stride, padding and dilation are those that give the output."""
    size, groups = weight.shape[2:], x.shape[1] // weight.shape[1]
    for stride, padding, dilation in itertools.product(range(1, 5), range(5), range(1, 4)):
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        if padding > dilation * size[0]:
            continue
        conv = nn.Conv2d(x.shape[1], len(weight), tuple(size), groups=groups, bias=bias is not None, **options)
        with torch.no_grad():
            conv.weight.copy_(weight)
            if bias is not None:
                conv.bias.copy_(bias)
            try:
                if conv(x).shape == y.shape and torch.allclose(conv(x), y, atol=1e-5):
                    return conv
            except RuntimeError:  # the kernel is larger than the map
                continue
    raise AssertionError("no stride, padding and dilation give the output")


def run_layer(meta, tensors, suffix):
    """Two steps of the compressed layer, and one plain one, in the precision of `suffix`."""
    dtype = torch.float64 if suffix else torch.float32
    layer = build(meta, tensors)
    own = layer.state_dict()
    layer.load_state_dict({name[10:]: t for name, t in tensors.items() if name[10:] in own and "before" in name})
    layer = layer.to(dtype).train()
    inputs = [tensors[f"x{i}{suffix}"] for i in range(2) if f"x{i}{suffix}" in tensors]
    grad_y = tensors[f"grad_y{suffix}"]
    _, plain = step(copy.deepcopy(layer), inputs, grad_y)
    network = nn.Sequential()
    network.add_module("layer", Several(layer))
    observed = observe(layer)
    recorder = Recorder(network, meta["quant_groups"])
    step(network, [FIRST_STEP * x for x in inputs], grad_y)
    scores = SoftmaxInputs(meta["quant_groups"], dtype)
    scores.update(observed)
    recorder.records.clear()
    y, gradients = step(network, inputs, grad_y)
    scores.update(observed)
    computed = {"y": y} | gradients | {f"{name}_noquant": value for name, value in plain.items()}
    found = quantisers(layer, observed, recorder, scores)
    computed |= codes_of(found, meta["quant_groups"])
    computed |= restored_of(found, meta["quant_groups"])
    computed = {f"{name}{suffix}": value for name, value in computed.items()}
    return computed if suffix else computed | state_of(layer, found, recorder)


class Several(nn.Module):
    """Passes a list of inputs on, since networks are called with one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return self.layer(*inputs)


def step(network, inputs, grad_y):
    """Output and gradients by name; a network of one layer gets a list."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    network.zero_grad()
    y = network(inputs) if isinstance(network, nn.Sequential) else network(*inputs)
    y.backward(grad_y)
    gradients = {f"grad_x{i}": x.grad for i, x in enumerate(inputs)}
    for name, parameter in network.named_parameters():
        gradients[f"grad_{name.removeprefix('layer.layer.')}"] = parameter.grad.clone()
    return y.detach(), gradients


def observe(layer):
    """Inputs and output of every layer in their order, refreshed by each forward pass: (module, inputs, output)."""
    observed = {}

    def hook(name):
        def keep(module, args, output):
            observed.pop(name, None)
            observed[name] = (module, [x.detach().clone() for x in args], output.detach().clone())

        return keep

    for name, module in layer.named_modules():
        if not list(module.children()):
            module.register_forward_hook(hook(name))
    return observed


class SoftmaxInputs:
    """The official softmax keeps its input, too, and has no use for it; our quantiser does the same here."""

    def __init__(self, groups, dtype):
        self.running = RunningRange(torch.zeros(groups, dtype=dtype), torch.zeros(groups, dtype=dtype), torch.zeros(1))
        self.codes = None

    def update(self, observed):
        for _, (x,), _ in (value for value in observed.values() if isinstance(value[0], nn.Softmax)):
            update_range(x, self.running)
            self.codes = quantize(x, self.running.span, self.running.shift, upstream=True)


def quantisers(layer, observed, recorder, scores):
    """The official quantisers: (layer, name of its state, codes, span, shift), in the order of the forward pass."""
    found = []
    for name, (module, inputs, output) in observed.items():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Softmax):
            found.append((name, f"{prefix}quant1.", scores.codes, scores.running.span, scores.running.shift))
            kept = [(f"{prefix}quant2.", output)]
        elif isinstance(module, MatMul):
            kept = [(f"{prefix}quant{i}.", x) for i, x in enumerate(inputs, 1)]
        else:
            kept = [(prefix, inputs[0])]
        for state, value in kept:
            codes = codes_for(value, recorder.records)
            whole = codes.packed.data.view(codes.shape).permute(codes.order).reshape(value.shape)
            found.append((name, state, whole, codes.packed.span, codes.packed.shift))
    return found


def codes_for(value, records):
    """What was kept for a tensor, whatever its shape was then."""
    fitting = [k for _, x, k in records if x.numel() == value.numel() and torch.equal(x.reshape(value.shape), value)]
    assert fitting, f"a tensor of shape {tuple(value.shape)} was not compressed"
    return fitting[-1]


def codes_of(found, groups):
    computed = {}
    for i, (_, _, codes, span, shift) in enumerate(found):
        computed |= {f"q{i}": grouped(codes, groups), f"scale{i}": scale_of(span, 256), f"shift{i}": shift}
    return computed


def restored_of(found, groups):
    """What each quantiser restores, the last layer's first."""
    by_layer = [list(members) for _, members in itertools.groupby(found, key=lambda quantiser: quantiser[0])]
    computed = {}
    for i, (_, _, codes, span, shift) in enumerate(itertools.chain(*reversed(by_layer))):
        restored = dequantize(codes, span, shift, dtype=span.dtype, upstream=True)
        computed[f"restored_grouped{i}"] = grouped(restored, groups)
    return computed


def state_of(layer, found, recorder):
    (updates,) = {float(running.updates) for running in recorder.ranges.values()}
    computed = {f"sd.{name}": value for name, value in layer.state_dict().items()}
    for _, state, _, span, shift in found:
        ranges = {"iteration": torch.tensor([updates]), "clip_val": span, "shift": shift}
        computed |= {f"sd.{state}{name}": value for name, value in ranges.items()}
    return computed


# What the official layers are made of.
PLAIN = {
    "Linear": lambda: nn.Linear(1, 1),
    "Conv2d": lambda: nn.Conv2d(1, 1, 1),
    "LayerNorm": lambda: nn.LayerNorm(1),
    "BatchNorm2d": lambda: nn.BatchNorm2d(1),
    "MatMul": nn.Identity,
    "Softmax": nn.Softmax,
    "GELU": nn.GELU,
    "ReLU": nn.ReLU,
}


# -- policies -----------------------------------------------------------------------------------------------------


def check_policies(meta):
    """Files are read and applied as officially; groups are the official ones where those are usable."""
    for case in meta.values():
        if "parsed" in case:
            check_policy(case)
    for kind, keys in meta.get("state_dict_keys", {}).items():
        ranges = ranges_of_mesa(keys)
        assert [key for key in keys if key not in ranges] == list(PLAIN[kind]().state_dict()), kind
    for name, case in meta.items():
        how, _, number = name.removeprefix("convert_by_").rpartition("_")
        if how in ("num_groups", "group_size") and number.isdigit():
            check_groups(how, int(number), case)
    return {}


def check_policy(case):
    rules = parse_policy(case["text"])
    assert {tag: rules.get(tag, []) for tag in case["parsed"]} == case["parsed"]
    tags = {}
    for name, unit in case["deployed"].items():
        tag, _, operand = unit["tag"].partition("-")
        tags[name.removesuffix(f".quant{operand}") if operand else name] = tag
    numbered = units(tags)
    assert numbered == {name: (unit["tag"], unit["index"]) for name, unit in case["deployed"].items()}
    expected = {
        name: Setting(unit["enable"], unit["level"], unit["ema_decay"]) for name, unit in case["deployed"].items()
    }
    assert deploy(rules, numbered) == expected


def check_groups(how, number, case):
    """Channels of a layer are not in the file: any that the official code divides without a rest will do."""
    for layer in case.values():
        official = layer["quant_groups"] if isinstance(layer, dict) else None
        if official:
            channels = official * (number if how == "group_size" else 32)
            wanted = number if how == "num_groups" else None
            assert channel_groups(channels, wanted, number if how == "group_size" else 32) == official
