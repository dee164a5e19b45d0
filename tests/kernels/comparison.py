"""Hold Triton kernels against the PyTorch reference of an operation.

    from comparison import DEVICE, DTYPES, check_kernels

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_kernels(dtype, kernels_required):
        tensors = {"q": torch.randn(...), "bias": torch.randn(...), "mask": None}
        check_kernels(op, op_reference, tensors, dtype, launches={"op_fwd_kernel", "op_bwd_kernel"})

Kernel and reference get `tensors` as keyword arguments, floating ones as leaves of `dtype` (use a closure for views of
a leaf, sizes and flags). The truth is the reference in float64 on the same rounded inputs. An output of the kernel may
be 2 times, a gradient 3 times, as far from it as the reference in `dtype` is.
"""

import contextlib
from collections import Counter

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Dot products and sums of bfloat16 are wrong in Triton's interpreter.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@contextlib.contextmanager
def poisoned_memory():
    """Fill what `torch.empty` and its relatives return with NaN (integers: their largest), so that gaps show."""

    def poisoning(make):
        def make_poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return make_poisoned

    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    places += [(torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided")]
    originals = [getattr(owner, name) for owner, name in places]
    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


@contextlib.contextmanager
def counted_launches():
    """Yield a Counter of the Triton kernels launched meanwhile, by the name of their function."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    counts = Counter()

    def counting(run):
        def run_counted(self, *args, **kwargs):
            if not kwargs.get("warmup"):
                counts[self.fn.__name__] += 1
            return run(self, *args, **kwargs)

        return run_counted

    originals = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}
    for kind, original in originals.items():
        kind.run = counting(original)
    try:
        yield counts
    finally:
        for kind, original in originals.items():
            kind.run = original


def outputs_and_gradients(function, tensors, dtype, no_grad=()):
    """Call `function` on `tensors` in `dtype`, and backward: {"output 0": ..., "gradient of q": ...}.

    Output gradients are random, the same at every call. Tensors named in `no_grad` are not differentiated.
    """
    arguments = {
        name: tensor.detach().to(DEVICE, dtype).requires_grad_(name not in no_grad)
        if torch.is_tensor(tensor) and tensor.is_floating_point()
        else (tensor.to(DEVICE) if torch.is_tensor(tensor) else tensor)
        for name, tensor in tensors.items()
    }
    result = function(**arguments)
    outputs = result if isinstance(result, tuple | list) else (result,)
    found = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    leaves = {name: leaf for name, leaf in arguments.items() if torch.is_tensor(leaf) and leaf.requires_grad}
    if not leaves:
        return found
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return found | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def check_kernels(kernel, reference, tensors, dtype, *, launches, no_grad=(), floor=1e-6):
    """Fail unless `kernel` launches exactly the Triton functions in `launches` and is as exact as `reference`.

    Where the reference is exact by chance, an error of `floor` and rounding of the largest number are allowed.
    """
    rounded = {
        name: tensor.to(dtype) if torch.is_tensor(tensor) and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    truth = outputs_and_gradients(reference, rounded, torch.float64, no_grad)
    plain = outputs_and_gradients(reference, rounded, dtype, no_grad)
    with poisoned_memory(), counted_launches() as counts:
        actual = outputs_and_gradients(kernel, rounded, dtype, no_grad)
    assert set(counts) == set(launches)
    for name, expected in truth.items():
        check_error(name, actual[name], plain[name], expected, floor)


def check_error(name, actual, plain, truth, floor=1e-6):
    """Fail unless `actual` is about as near to the float64 `truth` as `plain`, PyTorch in the same dtype."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
    if truth.numel() == 0:
        return
    assert bool(actual.isfinite().all()), f"{name}: {int((~actual.isfinite()).sum())} numbers are not finite"
    error = float((actual.double() - truth).abs().max())
    factor = 3 if name.startswith("gradient") else 2
    rounding = torch.finfo(plain.dtype).eps * float(truth.abs().max())
    allowed = factor * float((plain.double() - truth).abs().max()) + rounding + floor
    assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"
