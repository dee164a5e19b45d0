"""What the golden cases of LIT, LITv2 and HVT share.

A case holds ``sd.<official key>`` and ``x`` (float32) and the official float64 output ``y``; where present, ``y_f32``
is the output of the float32 network, ``grad.<name>`` is the float64 gradient of ``sum(y * w)``, and all other tensors
are intermediate results. A list of keys has no tensors.
"""

import copy

import torch

from backbones.deformable_merging import DeformableTokenMerging


def is_expected(name):
    return name not in ("x", "w") and not name.startswith("sd.")


def tolerance(name):
    """Sampling positions amplify the rounding of float32: the official code itself is off by up to 2e-5."""
    return 5e-5 if name == "y_f32" else None


def run_model(model, tensors, capture=(), forward=None):
    """Compute every expected tensor of a case with `model`, whose state-dict keys are the official ones.

    `capture` maps names of intermediate results to submodules whose output, tokens or a channel-last map, is taken as
    (B, L, C). `forward` is what to call in place of the model, as ``forward(model, x)``. A model that returns several
    maps gives ``stage{i}``, i from its `out_indices`, and the last one as ``y``.
    """
    forward = forward or (lambda network, x: network(x))
    weights = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("sd.")}
    model.load_state_dict(weights)
    single = copy.deepcopy(model).eval()
    model = model.double().eval()
    computed, hooks = {}, []
    for name, module in dict(capture).items():
        hooks.append(module.register_forward_hook(_keep(computed, name)))
    x = tensors["x"].double().requires_grad_()
    computed |= _outputs(model, forward(model, x))
    for hook in hooks:
        hook.remove()
    if "w" in tensors:
        _misread_gradients(model)
        (forward(model, x) * tensors["w"].double()).sum().backward()
        computed["grad.x"] = x.grad
        computed |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        computed["y_f32"] = _outputs(single, forward(single, tensors["x"]))["y"]
    return computed


def _misread_gradients(model):
    """Repeat a fault of PyTorch that is in the golden gradients of networks with token merging.

    For a batch of one, the CPU's batch-norm backward in evaluation mode takes a gradient that is channel-last in memory
    for a channel-first one. The last token merging of the official networks, which transpose behind it, runs into that;
    ours do not: tests/backbones/test_deformable_merging.py compares their gradients with finite differences.
    """
    merging = [module for module in model.modules() if isinstance(module, DeformableTokenMerging)]
    for module in merging[-1:]:
        module.norm_layer.register_forward_hook(_misread_gradient)


def _misread_gradient(_module, _args, output):
    def misread(gradient):
        wrong = gradient.permute(0, 2, 3, 1).contiguous().view(gradient.shape)
        return wrong.contiguous(memory_format=torch.channels_last)  # as ours is, so that it is read rightly

    output.register_hook(misread)


def _keep(computed, name):
    def hook(_module, _args, output):
        computed[name] = output.flatten(1, -2)

    return hook


def _outputs(model, output):
    if isinstance(output, torch.Tensor):
        return {"y": output}
    maps = {f"stage{i}": x for i, x in zip(model.out_indices, output, strict=True)}
    return maps | {"y": output[-1]}


def check_keys(model, meta):
    """Compare keys, shapes, buffers and sizes of `model` (on the meta device) with the official list; return {}."""
    state = model.state_dict()
    assert sorted([name, list(tensor.shape)] for name, tensor in state.items()) == sorted(meta["keys"])
    parameters = dict(model.named_parameters())
    assert sorted(state.keys() - parameters.keys()) == sorted(meta["buffers"])
    assert len(state) == meta["num_tensors"]
    assert sum(p.numel() for p in parameters.values()) == meta["num_params"]
    buffers = sum(tensor.numel() for name, tensor in state.items() if name not in parameters)
    assert buffers == meta["num_buffer_elements"]
    return {}
