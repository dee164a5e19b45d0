"""Every Triton kernel compiles for a GPU of compute capability 9.0, on a machine without one."""

import ast
import json
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("compile_for_sm90.py")
DTYPES = ("bfloat16", "float16", "float32")
OPS = [
    line.removeprefix("def run_").partition("(")[0]
    for line in SCRIPT.read_text().splitlines()
    if line.startswith("def run_")
]


def ships_ptxas():
    triton = find_spec("triton")
    return triton is not None and (Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()


def jit_functions(source):
    """Functions decorated with `triton.jit`, each with the names that it calls."""
    functions = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
            functions[node.name] = {call.id for call in calls if isinstance(call, ast.Name)}
    return functions


def kernels():
    """Names of the Triton functions in `kernels/` that are launched: no other one calls them."""
    functions = {}
    for path in (ROOT / "kernels").glob("*.py"):
        functions |= jit_functions(path.read_text())
    return set(functions) - set().union(*functions.values())


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """What `compile_for_sm90.py` prints, a dictionary for each compilation."""
    if not ships_ptxas():
        pytest.skip("needs Triton with its ptxas")
    environment = os.environ | {"FRUGAL_KERNELS": "triton", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    jobs = [f"{op}:{dtype}" for op in OPS for dtype in DTYPES]
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *jobs]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_all_kernels_compile(compilations):
    errors = [
        f"{row['job']}: {row['kernel']} {row['constants']}: {row['error']}" for row in compilations if "error" in row
    ]
    assert errors == []
    assert all(row["ptx"] > 0 for row in compilations)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_is_left_out(compilations, dtype):
    found = {row["kernel"] for row in compilations if row["job"].endswith(f":{dtype}")}
    assert kernels() - found == set()


@pytest.mark.slow
def test_a_configuration_of_every_launch_fits_the_shared_memory(compilations):
    fits = {}
    for row in compilations:
        launch = (row["job"], row["launch"], row["kernel"])
        fits[launch] = fits.get(launch, False) or row["fits"]
        if row.get("spilled"):
            warnings.warn(
                f"{row['job']}: {row['kernel']} {row['constants']} spills {row['spilled']} bytes", stacklevel=1
            )
    assert [launch for launch, fit in fits.items() if not fit] == []


def test_launched_functions_are_found():
    functions = jit_functions(
        "@triton.jit\ndef _helper(x): return x\n"
        "@triton.autotune(CONFIGS)\n@triton.jit(do_not_specialize=['n'])\ndef kernel(x):\n    tl.store(x, _helper(x))\n"
        "def launch(x): kernel[1](x)\n"
    )
    assert functions == {"_helper": set(), "kernel": {"_helper"}}
    assert {"attention_fwd_kernel", "hash_attention_context_kernel", "quantize_kernel"} <= kernels()
    assert all(name.endswith("_kernel") for name in kernels())
