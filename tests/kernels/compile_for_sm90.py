"""Compile the Triton kernels for compute capability 9.0, without a GPU: python compile_for_sm90.py OP:DTYPE ...

Runs operations on small tensors on the CPU, where a launch compiles its kernel and runs nothing. Prints a line of JSON
for each compilation. Not for the interpreter's process. The cases share out what there is to cover:
bfloat16 sizes of real models, with masks and biases, in the largest configuration of the autotuner that fits the GPU;
float16  sizes of 1 where that can be, which Triton turns into constants, in the smallest configuration;
float32  the narrowest heads in the smallest configuration, as others take minutes without matrix units.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import count
from math import prod
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[2]
TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes a program can have
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def leaf(*shape, dtype):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def differentiate(outputs, *leaves):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(output) for output in outputs])


def sizes(dtype, ones, *real):
    """Sizes to compile for in `dtype`; see the module."""
    return [ones] if dtype == torch.float16 else real


def width(dtype, real):
    """Channels of a head to compile for in `dtype`."""
    return 16 if dtype == torch.float32 else real


def run_attention(dtype):
    from kernels.attention import attention

    real = [(2, 4, 64, width(dtype, 32), True), *([(2, 4, 64, 32, False)] if dtype == torch.bfloat16 else [])]
    for batch, heads, length, dim, masked in sizes(dtype, (1, 1, 1, 1, True), *real):
        tensors = [leaf(batch, length, heads, dim, dtype=dtype) for _ in range(3)]
        biases = [leaf(1, heads, length, length, dtype=dtype)] if masked else []
        mask = torch.zeros(batch, 1, length, length, dtype=torch.bool) if masked else None
        output = attention(*(tensor.transpose(1, 2) for tensor in tensors), *biases, mask=mask)
        differentiate(output, *tensors, *biases)


def run_window_attention(dtype):
    from kernels.window_attention import window_attention

    ones = ((9, 9), (9, 9), 1, 1, None)  # a large window has several backward kernels
    swin = ((24, 24), (12, 12), 2, width(dtype, 32), (6, 6))
    hi_fi = ((4, 4), (2, 2), 2, 32, None)
    real = [swin, *([hi_fi] if dtype == torch.bfloat16 else [])]
    for grid, window, heads, dim, shift in sizes(dtype, ones, *real):
        tensors = [leaf(heads, *grid, heads, dim, dtype=dtype) for _ in range(3)]
        biases = [leaf(heads, prod(window), prod(window), dtype=dtype)] if prod(window) > 64 else []
        output = window_attention(*tensors, window, None, *biases, shift=shift)
        differentiate(output, *tensors, *biases)


def run_hash_attention(dtype):
    from kernels.hash_attention import hash_attention

    for batch, tokens, heads, bits, dim in sizes(dtype, (1, 1, 1, 1, 1), (2, 256, 2, 16, width(dtype, 64))):
        tensors = [leaf(batch, tokens, heads, size, dtype=dtype) for size in (bits, dim)]
        differentiate(hash_attention(*(tensor.transpose(1, 2) for tensor in tensors)), *tensors)


def run_ms_deform_attn(dtype):
    from kernels.ms_deform_attn import ms_deform_attn

    ones = (1, 1, 1, 1, 1, [(1, 1)])
    for batch, queries, heads, dim, points, maps in sizes(dtype, ones, (2, 16, 8, 32, 2, [(4, 4), (2, 2)])):
        value = leaf(batch, sum(height * width for height, width in maps), heads, dim, dtype=dtype)
        layout = (batch, queries, heads, len(maps), points)
        locations, weights = leaf(*layout, 2, dtype=torch.float32), leaf(*layout, dtype=dtype)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            differentiate(ms_deform_attn(value, maps, locations, weights), value, locations, weights)
        torch.use_deterministic_algorithms(False)


def run_boundary_max_pool(dtype):
    from kernels.boundary_max_pool import boundary_max_pool

    for batch, channels, length, proposals in sizes(dtype, (1, 2, 1, 1), (2, 64, 128, 16)):
        feature = leaf(batch, channels, length, dtype=dtype)
        differentiate(boundary_max_pool(feature, torch.zeros(batch, proposals, 4)), feature)


def run_quantize(dtype):
    from kernels.quantize import RunningRange, dequantize
    from kernels.quantized_layers import gelu_8bit, layer_norm_8bit, softmax_8bit

    for batch, length, channels, groups in sizes(dtype, (1, 1, 1, 1), (2, 196, 384, 2)):
        running = RunningRange(torch.ones(groups), torch.zeros(groups), torch.zeros(1))
        weight, bias = (leaf(channels, dtype=dtype) for _ in range(2))
        x, scores = leaf(batch, length, channels, dtype=dtype), leaf(batch, groups, length, length, dtype=dtype)
        for stochastic in (False, True):
            differentiate(gelu_8bit(x, running, stochastic=stochastic), x)
            differentiate(layer_norm_8bit(x, weight, bias, running, stochastic=stochastic), x, weight, bias)
            differentiate(softmax_8bit(scores, running, stochastic=stochastic), scores)
        dequantize(x.detach().byte(), running.span, running.shift, dtype=dtype)


OPS = {name.removeprefix("run_"): function for name, function in list(globals().items()) if name.startswith("run_")}


def resources(kernel):
    """Bytes of local memory of a thread, which spilled registers take; {} where no tool tells."""
    if not os.path.exists(CUOBJDUMP):
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", told)
    return {"spilled": int(found[1]) + int(found[2])} if found else {}


def compile_instead_of_running(job):
    """Let every launch compile its kernel and print what came out."""
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: TARGET
        )
    )
    compile_only, launches = JITFunction.run, count()

    def run(self, *args, grid, warmup, launch=None, **kwargs):
        row = {"job": job, "kernel": self.__name__, "launch": next(launches) if launch is None else launch}
        row["constants"] = {name: value for name, value in kwargs.items() if name.isupper() or name.startswith("num_")}
        try:
            kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
            row |= {"shared": kernel.metadata.shared, "ptx": len(kernel.asm["ptx"]), **resources(kernel)}
            row["fits"] = row["shared"] <= SHARED_MEMORY
        except Exception as error:
            row |= {"fits": False, "error": f"{type(error).__name__}: {error}"[-2000:]}
        print(json.dumps(row, default=str), flush=True)
        return row

    def run_until_one_fits(self, *args, **kwargs):
        launch = next(launches)
        configs = sorted(self.configs, key=lambda config: (prod(config.kwargs.values()), config.num_warps))
        for config in reversed(configs) if job.endswith("bfloat16") else configs:
            row = self.fn.run(*args, **kwargs, **config.all_kwargs(), launch=launch)
            if "error" in row or row["fits"]:
                return

    JITFunction.run, Autotuner.run = run, run_until_one_fits


def main(jobs):
    sys.path.insert(0, str(ROOT))
    dispatch = importlib.import_module("kernels.dispatch")
    dispatch.choose_path = lambda op, tensor, has_triton: "triton"  # before an operation imports it
    plain_run = JITFunction.run
    for job in jobs:
        op, _, dtype = job.partition(":")
        JITFunction.run = plain_run
        compile_instead_of_running(job)
        OPS[op](getattr(torch, dtype))


if __name__ == "__main__":
    main(sys.argv[1:])
