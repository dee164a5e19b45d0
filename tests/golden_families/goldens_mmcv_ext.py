"""mmcv's compiled operations, computed by `tasks.core.openmmlab` through mmcv's public functions.

The json of a case names a function or a module of `mmcv.ops`, as a rule with its arguments; these are tensors of the
case, values of the json or literals.
"""

import ast
import inspect
import re

import pytest
import torch

# Relative to the largest number; the operations of float32 goldens ran in float32.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
RESULTS = {"y", "dets", "keep", "group_indices", "group_lengths"}
PSA_TYPES = ("collect", "distribute")
_tolerances: dict[str, float] = {}  # of the last case: two cases have tensors of one name and different types


def is_expected(name):
    return name in RESULTS or name.startswith("grad_")


def tolerance(name):
    return _tolerances.get(name)


def run_case(meta, tensors, path):
    pytest.importorskip("mmcv", reason="the extra openmmlab is not installed")
    from tasks.core.openmmlab import install

    install()
    _tolerances.clear()
    _tolerances.update({name: TOLERANCES[t.dtype] for name, t in tensors.items() if t.is_floating_point()})

    tensors = {name: t.requires_grad_(f"grad_{name}" in tensors) for name, t in tensors.items()}
    results = name_results(call_operation(meta, tensors), tensors)
    leaves = {f"grad_{name}": t for name, t in tensors.items() if t.requires_grad}
    if leaves:
        grads = torch.autograd.grad((results["y"] * tensors["w"]).sum(), list(leaves.values()))
        results |= dict(zip(leaves, grads, strict=True))
    return results


def call_operation(meta, tensors):
    """Call what the json names; without arguments there, inputs come first and the rest of the json by name."""
    import mmcv.ops

    description = dict(meta["description"])
    text = description.pop("call")
    description.pop("note", None)
    name, has_arguments = re.search(r"mmcv\.ops\.(\w+)(\(?)", text).groups()
    if name == "multi_scale_deform_attn":
        formula = mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch
        return formula(*(tensors[key] for key in ("value", "shapes", "locations", "weights")))
    operation = getattr(mmcv.ops, name)
    inputs = [tensors[key] for key in inputs_of(meta)]
    if not has_arguments:
        return operation(*inputs, **description)
    call = ast.parse(text[text.index("mmcv.ops.") :], mode="eval").body
    arguments = [value_of(node, meta, tensors) for node in call.args]
    return operation(*arguments)(*inputs) if inspect.isclass(operation) else operation(*arguments)


def inputs_of(meta):
    """Return the names of the inputs; `dets` is one where there are no boxes."""
    results = RESULTS if "boxes" in meta["tensors"] else RESULTS - {"dets"}
    return [key for key in meta["tensors"] if key != "w" and key not in results and not key.startswith("grad_")]


def value_of(node, meta, tensors):
    """Return the value of an argument: a tensor, an entry of the json or a literal."""
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    if node.id == "type":  # of PSAMask, which only the name of the case tells
        return next(kind for kind in PSA_TYPES if kind in meta["case"])
    return tensors[node.id] if node.id in tensors else meta["description"][node.id]


def name_results(results, tensors):
    """Return the results by the names that the tensors of the case have."""
    if isinstance(results, torch.Tensor):
        return {"y": results}
    if isinstance(results, tuple):
        named = dict(zip(("dets", "keep"), results, strict=True))
    else:
        lengths = torch.tensor([len(group) for group in results])
        named = {"group_indices": torch.cat(results), "group_lengths": lengths}
    return named if "boxes" in tensors else {**named, "dets": tensors["dets"]}
