import functools
import itertools
from math import prod

import pytest
import torch
from comparison import DEVICE, DTYPES, check_kernels, counted_launches

from kernels.window_attention import Geometry, window_attention, window_attention_reference

FORWARD = {"window_attention_fwd_kernel"}
FUSED = FORWARD | {"window_attention_bwd_kv_kernel"}  # the keys of a window fit one tile
SEPARATE = FUSED | {"window_attention_bwd_q_kernel"}
BIAS = {"window_attention_bwd_bias_kernel"}  # a large window with a bias


def inputs(
    grid=(4, 6),
    window=(2, 2),
    kv_grid=None,
    kv_window=None,
    batch=1,
    num_heads=2,
    head_dim=16,
    v_dim=None,
    bias=None,
    seed=0,
    **options,
):
    """Tensors and other arguments by name; `bias` is the number of heads of the bias."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    keys = (batch, *(kv_grid or grid), num_heads)
    tensors = {
        "q": draw(batch, *grid, num_heads, head_dim),
        "k": draw(*keys, head_dim),
        "v": draw(*keys, v_dim or head_dim),
        "bias": None if bias is None else draw(bias, prod(window), prod(kv_window or window)),
    }
    return tensors | {"window": window, "kv_window": kv_window} | options


REDUCED = {"grid": (3, 7, 5), "window": (3, 4, 3), "kv_grid": (2, 3, 4), "kv_window": (2, 2, 2)}
CASES = {
    "hi_fi": ({"grid": (4, 4), "batch": 2, "head_dim": 32}, FUSED),
    "one_token": ({"grid": (1, 1), "window": (1, 1)}, FUSED),
    "window_of_one": ({"grid": (5, 3), "window": (1, 1), "head_dim": 20}, FUSED),
    "row_of_many_groups": ({"grid": (2, 63), "head_dim": 20, "v_dim": 36}, FUSED),
    "odd_masked": ({"grid": (5, 7), "window": (2, 3), "head_dim": 60}, FUSED),
    "odd_unmasked": ({"grid": (5, 7), "window": (2, 3), "mask_padding": False, "scale": 0.5}, FUSED),
    "smaller_than_window": ({"grid": (3, 2), "window": (7, 7), "bias": 2}, FUSED),
    "swin": ({"grid": (7, 14), "window": (7, 7), "head_dim": 32, "bias": 2}, FUSED),
    "swin_shifted": ({"grid": (14, 7), "window": (7, 7), "bias": 2, "shift": (3, 3)}, FUSED),
    "small_windows_shifted": ({"grid": (6, 9), "window": (2, 3), "shift": (0, 2)}, FUSED),
    "one_bias": ({"batch": 2, "grid": (5, 4), "window": (3, 2), "num_heads": 3, "bias": 1}, FUSED),
    "unmasked_bias": ({"grid": (5, 3), "window": (2, 2), "bias": 2, "mask_padding": False}, FUSED),
    "large_window": ({"grid": (9, 9), "window": (9, 8), "num_heads": 1, "head_dim": 20}, SEPARATE),
    "large_window_bias": (
        {"grid": (10, 8), "window": (10, 8), "bias": 1, "shift": (4, 0)},
        SEPARATE | BIAS,
    ),
    "clip": ({"grid": (4, 4, 6), "window": (2, 4, 3), "shift": (1, 2, 1)}, FUSED),
    "clip_odd": ({"batch": 2, "grid": (3, 5, 4), "window": (2, 2, 4), "v_dim": 8}, FUSED),
    "clip_reduced": (REDUCED, FUSED),
    "clip_reduced_unmasked": (REDUCED | {"bias": 2, "mask_padding": False}, FUSED),
    "many_queries": (
        {"grid": (8, 10), "window": (8, 10), "kv_grid": (2, 5), "kv_window": (2, 5), "bias": 2},
        FUSED | BIAS,
    ),
    "largest_heads": ({"grid": (2, 4), "num_heads": 1, "head_dim": 128, "v_dim": 100}, FUSED),
    "small_heads": ({"head_dim": 3, "v_dim": 1}, FUSED),
}


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference(name, dtype):
    sizes, launches = CASES[name]
    # With one key the scores have no gradient: differences of sums of head_dim products remain.
    floor = 1e-5 if prod(sizes.get("window", (2, 2))) == 1 else 1e-6
    arguments = inputs(**sizes)
    check_kernels(window_attention, window_attention_reference, arguments, dtype, launches=launches, floor=floor)


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_a_packed_projection(dtype):
    generator = torch.Generator().manual_seed(3)
    packed = torch.randn(2, 5, 6, 3, 2, 20, generator=generator)
    bias = torch.randn(6, 2, 6, generator=generator)

    def attend(function, packed, bias):
        q, k, v = packed.unbind(3)
        v = v.mT.contiguous().mT
        return function(q, k, v, (3, 2), None, bias.transpose(0, 1), scale=0.3).transpose(1, 2)

    kernel, reference = (functools.partial(attend, f) for f in (window_attention, window_attention_reference))
    check_kernels(kernel, reference, {"packed": packed, "bias": bias}, dtype, launches=FUSED)


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize("shift", [None, (1, 0, 1)])
def test_maps_are_not_copied(shift, monkeypatch):
    from kernels import window_attention_triton

    packed = torch.randn(2, 2, 4, 6, 3, 2, 16, device=DEVICE, requires_grad=True)
    read = []

    def record(launch, *arguments):
        read.extend(tensor.data_ptr() for tensor in arguments if torch.is_tensor(tensor))
        launch(*arguments)

    for name in ("launch_forward", "launch_backward"):
        monkeypatch.setattr(
            window_attention_triton, name, functools.partial(record, getattr(window_attention_triton, name))
        )
    q, k, v = packed.unbind(4)
    doutput = torch.randn(2, 4, 2, 6, 2, 16, device=DEVICE).transpose(1, 2)
    for name in ("contiguous", "clone", "reshape"):
        monkeypatch.setattr(torch.Tensor, name, None)
    output = window_attention(q, k, v, (2, 2, 3), shift=shift)
    assert output.is_contiguous()
    gradients = torch.autograd.grad(output, (q, k, v), doutput)
    inputs_read = [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    assert read[:3] == inputs_read
    assert output.data_ptr() in read
    backward = read[read.index(doutput.data_ptr()) :]
    assert backward[1:4] == inputs_read
    assert {gradient.data_ptr() for gradient in gradients} <= set(backward)


@pytest.mark.parametrize("setting", ["triton", "reference"])
@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
def test_queries_without_a_key_get_zeros_and_give_no_gradient(setting, grid, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    arguments = inputs(grid=grid, bias=2)
    arguments["bias"][1, 2] = -torch.inf  # the second head's query at the lower left of a window
    leaves = [arguments[name].to(DEVICE).requires_grad_() for name in ("q", "k", "v", "bias")]
    call = functools.partial(window_attention, window=(2, 2))
    output = call(*leaves[:3], bias=leaves[3])
    assert bool((output[:, 1::2, ::2, 1] == 0).all())
    assert bool((output[:, 1::2, ::2, 0] != 0).all())
    torch.testing.assert_close(in_inference(*leaves[:3], (2, 2), bias=leaves[3]), output)
    dq, *gradients, dbias = torch.autograd.grad(output.square().sum() + output.sum(), leaves)
    assert all(bool(gradient.isfinite().all()) for gradient in (dq, *gradients, dbias))
    assert bool((dq[:, 1::2, ::2, 1] == 0).all())
    assert bool((dbias[1, 2] == 0).all())


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize("window", [(2, 2), (9, 9)])
def test_bias_without_a_gradient(window):
    tensors = inputs(grid=(3, 4), window=window, num_heads=1, bias=1)
    launches = FUSED if window == (2, 2) else SEPARATE
    check = functools.partial(check_kernels, window_attention, window_attention_reference, tensors, torch.float32)
    check(launches=launches, no_grad=("bias",))


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize("bias", [None, 2])
def test_large_scores_do_not_overflow(bias):
    tensors = inputs(window=(2, 3), bias=bias)
    tensors["q" if bias is None else "bias"] *= 100
    # Weights recomputed from a log-sum-exp of this size are off by its rounding.
    largest = tensors["q" if bias is None else "bias"].abs().max() * (1 if bias else tensors["k"].abs().max() * 4)
    floor = torch.finfo(torch.float32).eps * float(largest)
    check_kernels(
        window_attention, window_attention_reference, tensors, torch.float32, launches=FUSED, floor=max(floor, 1e-6)
    )


@pytest.mark.usefixtures("kernels_required")
def test_bias_may_be_more_precise():
    arguments = inputs(bias=2)
    bias = arguments["bias"].to(DEVICE).requires_grad_()
    halves = [arguments[name].to(DEVICE).half() for name in ("q", "k", "v")]
    output = window_attention(*halves, (2, 2), bias=bias)
    expected = window_attention_reference(*(half.double() for half in halves), (2, 2), bias=bias.double())
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), bias)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), bias)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected_gradient, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("setting", ["triton", "reference"])
def test_autocast(setting, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    arguments = inputs()
    arguments = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in arguments.items()}
    arguments["k"] = arguments["k"].half()
    dtype = torch.float16
    with torch.autocast(DEVICE, dtype):
        output = window_attention(**arguments)
    halves = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in arguments.items()}
    assert torch.equal(output, window_attention(**halves))


@pytest.mark.parametrize("setting", ["triton", "reference"])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"grid": (0, 6)}, {"num_heads": 0}], ids=str)
def test_empty_tensors(sizes, setting, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    arguments = inputs(bias=1, **sizes)
    check_kernels(window_attention, window_attention_reference, arguments, torch.float32, launches=set())


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize(("grid", "window"), [((3, 7), (2, 3)), ((9, 8), (9, 8))])
def test_repeats_bit_by_bit(grid, window):
    arguments = inputs(grid=grid, window=window, num_heads=1, bias=1)
    leaves = [arguments[name].to(DEVICE).requires_grad_() for name in ("q", "k", "v", "bias")]
    call = lambda: window_attention(*leaves[:3], window, bias=leaves[3])  # noqa: E731
    first, second = (torch.autograd.grad(call().square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def operator_arguments(requires_grad, **sizes):
    arguments = inputs(bias=1, **sizes)
    tensors = [arguments[name].to(DEVICE).requires_grad_(requires_grad) for name in ("q", "k", "v", "bias")]
    geometry = Geometry.of(
        *tensors[:2], arguments["window"], arguments["kv_window"] or arguments["window"], (0, 0), True
    )
    return (*tensors, [*geometry.window, *geometry.kv_window, *geometry.shift], True, 0.25)


@pytest.mark.usefixtures("kernels_required")
@pytest.mark.parametrize(
    "sizes",
    [
        {"grid": (1, 3), "num_heads": 1},
        {"grid": (2, 3, 2), "window": (2, 3, 2), "kv_grid": (1, 1, 2), "kv_window": (1, 2, 2), "num_heads": 1},
    ],
    ids=["map", "clip"],
)
def test_operators_are_well_defined(sizes):
    arguments = operator_arguments(True, **sizes)
    torch.library.opcheck(torch.ops.frugal.window_attention, arguments)
    arguments = operator_arguments(False, **sizes)
    output, lse = torch.ops.frugal.window_attention(*arguments)
    for bias_gradient in (True, False):
        backward = (torch.randn_like(output), *arguments, output, lse, bias_gradient)
        torch.library.opcheck(torch.ops.frugal.window_attention_backward, backward)


@pytest.mark.parametrize("setting", ["triton", "reference"])
def test_compiles_to_one_graph(setting, kernels_required, monkeypatch):
    monkeypatch.setenv("FRUGAL_KERNELS", setting)
    arguments = inputs(grid=(2, 6), window=(2, 3), bias=2, shift=(1, 1))
    leaves = [arguments[name].to(DEVICE).requires_grad_() for name in ("q", "k", "v", "bias")]
    call = lambda f: f(*leaves[:3], (2, 3), bias=leaves[3], shift=(1, 1))  # noqa: E731
    compiled = torch.compile(window_attention, backend="aot_eager", fullgraph=True)
    gradients = torch.autograd.grad(call(compiled).square().sum(), leaves)
    expected = torch.autograd.grad(call(window_attention).square().sum(), leaves)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0 if setting == "triton" else 1e-5)


DEFINED = {
    "masked": {"grid": (3, 4), "window": (2, 3)},
    "unmasked": {"grid": (3, 4), "window": (2, 3), "mask_padding": False},
    "shifted": {"grid": (4, 3), "window": (2, 3), "shift": (1, 2)},
    "reduced": {"grid": (2, 5, 3), "window": (2, 3, 3), "kv_grid": (1, 3, 2), "kv_window": (1, 2, 2), "v_dim": 2},
}


def in_inference(*args, **kwargs):
    with torch.no_grad():
        return window_attention(*args, **kwargs)


@pytest.mark.parametrize("function", [window_attention, window_attention_reference, in_inference])
@pytest.mark.parametrize("name", DEFINED)
def test_definition(name, function):
    """One query and one key at a time."""
    arguments = inputs(batch=2, head_dim=3, bias=2, **DEFINED[name])
    arguments = {name: value.double() if torch.is_tensor(value) else value for name, value in arguments.items()}
    q, k, v, bias = (arguments[name] for name in ("q", "k", "v", "bias"))
    grid, kv_grid, window = q.shape[1:-2], k.shape[1:-2], arguments["window"]
    kv_window = arguments["kv_window"] or window
    shift = arguments.get("shift", (0,) * len(grid))
    cells = lambda sizes: itertools.product(*map(range, sizes))  # noqa: E731
    expected = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for image, cell, head in itertools.product(range(2), cells(grid), range(2)):
        rolled = [(place - s) % size for place, s, size in zip(cell, shift, grid, strict=True)]
        corner = [place // side for place, side in zip(rolled, window, strict=True)]
        row = sum(
            (place % side) * prod(window[i + 1 :]) for i, (place, side) in enumerate(zip(rolled, window, strict=True))
        )
        weights, values = [], []
        for column, inside in enumerate(cells(kv_window)):
            place = [c * side + x for c, side, x in zip(corner, kv_window, inside, strict=True)]
            outside = any(x >= size for x, size in zip(place, kv_grid, strict=True))
            origin = [(x + s) % size for x, s, size in zip(place, shift, kv_grid, strict=True)]
            # a shift moves the map towards its beginning; what lands before it comes around the edge
            if any((a < s) != (b < s) for a, b, s in zip(cell, origin, shift, strict=True)):
                continue
            if outside and arguments.get("mask_padding", True):
                continue
            score = 0 if outside else 0.7 * (q[(image, *cell, head)] * k[(image, *origin, head)]).sum()
            weights.append((score + bias[head, row, column]).exp())
            values.append(torch.zeros_like(v[0, 0, 0, 0]) if outside else v[(image, *origin, head)])
        expected[(image, *cell, head)] = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
    torch.testing.assert_close(function(**arguments, scale=0.7), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [window_attention, window_attention_reference])
@pytest.mark.parametrize("name", DEFINED)
@pytest.mark.parametrize("bias", [None, 1, 2])
def test_reference_gradients(function, name, bias):
    arguments = inputs(head_dim=3, bias=bias, **DEFINED[name])
    leaves = {name: t.double().requires_grad_() for name, t in arguments.items() if torch.is_tensor(t)}
    fixed = {name: value for name, value in arguments.items() if name not in leaves}
    call = lambda *values: function(**dict(zip(leaves, values, strict=True)), **fixed)  # noqa: E731
    assert torch.autograd.gradcheck(call, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"head_dim": 130}, {"v_dim": 130}], ids=str)
def test_what_the_kernels_do_not_take_runs_in_pytorch(change, kernels_required):
    sizes = {name: size for name, size in change.items() if name != "dtype"}
    arguments = inputs(bias=2, **sizes)
    dtype = change.get("dtype", torch.float32)
    arguments = {name: t.to(DEVICE, dtype) if torch.is_tensor(t) else t for name, t in arguments.items()}
    with counted_launches() as counts:
        output = window_attention(**arguments)
    assert not counts
    torch.testing.assert_close(output, window_attention_reference(**arguments))


def test_a_shift_is_a_roll_and_a_mask():
    """Windows that nothing came around into are plain windows of the rolled map."""
    q, k, v = torch.randn(3, 1, 6, 6, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shifted = window_attention(q, k, v, (3, 3), shift=(1, 2)).roll((-1, -2), (1, 2))
    plain = window_attention(*(x.roll((-1, -2), (1, 2)) for x in (q, k, v)), (3, 3))
    torch.testing.assert_close(shifted[:, :3, :3], plain[:, :3, :3], rtol=0, atol=0)
    assert not torch.isclose(shifted[:, 3:], plain[:, 3:]).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": (2,)}, ValueError, r"window is \(2,\), expected \(h, w\) or \(t, h, w\)"),
        ({"window": (0, 2)}, ValueError, r"windows \(1, 0, 2\) and \(1, 0, 2\), expected at least one token"),
        ({"window": (2, 2, 2)}, ValueError, r"q has shape \(1, 4, 6, 2, 16\), expected \(B, T, H, W, heads, d\)"),
        ({"kv_window": (2, 2, 2)}, ValueError, r"kv_window is \(2, 2, 2\), expected 2 numbers like window"),
        (
            {"kv_window": (2, 3)},
            ValueError,
            r"k has \(1, 2, 2\) windows \(1, 2, 3\) on \(1, 4, 6\), expected \(1, 2, 3\)",
        ),
        ({"shift": (1,)}, ValueError, r"shift is \(1,\), expected 2 numbers"),
        ({"shift": (0, 2)}, ValueError, r"shift is \(0, 0, 2\), expected less than the window \(1, 2, 2\)"),
        ({"shift": (0, 1), "window": (2, 4)}, ValueError, r"needs windows that divide the grid, .* \(1, 2, 4\)"),
        ({"shift": (0, 1), "k": lambda k: k[:, :2], "v": lambda v: v[:, :2]}, ValueError, r"k has \(1, 1, 3\) windows"),
        ({"q": lambda q: q[0]}, ValueError, r"q has shape \(4, 6, 2, 16\), expected \(B, H, W, heads, d\)"),
        ({"q": lambda q: q.long()}, TypeError, "q is torch.int64, expected one floating dtype"),
        ({"k": lambda k: k.half()}, TypeError, "k is torch.float16, expected one floating dtype for q, k and v"),
        ({"k": lambda k: k[..., :8]}, ValueError, r"k has shape \(1, 4, 6, 2, 8\), expected \(1, 4, 6, 2, 16\)"),
        ({"v": lambda v: v[:, :3]}, ValueError, r"v has shape \(1, 3, 6, 2, 16\), expected \(1, 4, 6, 2, 16\)"),
        ({"bias": lambda b: b[0]}, ValueError, r"bias has shape \(4, 4\), expected \(1 or 2, 4, 4\)"),
        ({"bias": lambda b: b[..., :1]}, ValueError, r"bias has shape \(2, 4, 1\), expected"),
        ({"bias": lambda b: b > 0}, TypeError, "bias is torch.bool, expected a floating dtype"),
        ({"bias": lambda b: b.to("meta")}, ValueError, "bias is on meta, but q is on cpu"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = inputs(bias=2)
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(error, match=message):
        window_attention(**arguments)
