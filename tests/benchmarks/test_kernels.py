import copy
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from benchmarks import kernels
from benchmarks.__main__ import main
from benchmarks.kernel_cases import OPS
from benchmarks.kernel_cases.attention import AttentionCase, HashAttentionCase
from benchmarks.kernel_cases.base import BOTH, FORWARD, OURS, Candidate, Case
from benchmarks.kernel_cases.others import COPY, QUANTIZED, BoundaryCase, DeformableCase, QuantizeCase
from benchmarks.kernel_cases.windows import HiLoCase, WindowAttentionCase
from benchmarks.kernel_tables import TARGETS, report

SIZES = {"heads": 2, "queries": 5, "keys": 3, "dim": 8}
MAP = {"grid": (4, 6), "heads": 2, "dim": 8, "window": (2, 3)}
TINY = {
    "attention": [
        AttentionCase(name="plain", batch=2, **SIZES),
        AttentionCase(name="bias", batch=2, bias=True, **SIZES),
        AttentionCase(name="mask", batch=2, mask=True, **SIZES),
        AttentionCase(name="large", batch=2, large=True, **SIZES),
    ],
    "window_attention": [
        WindowAttentionCase(name="windows", batch=2, **MAP),
        WindowAttentionCase(name="bias", batch=2, bias=True, **MAP),
        WindowAttentionCase(name="shift", batch=2, shift=(1, 1), **MAP),
        WindowAttentionCase(name="shift and bias", batch=2, shift=(1, 2), bias=True, **MAP),
        WindowAttentionCase(
            name="reduced", batch=2, heads=2, dim=8, grid=(4, 4, 6), window=(4, 2, 3), kv_window=(2, 1, 2)
        ),
    ],
    "hilo": [HiLoCase(name="hilo", batch=2, grid=(4, 6), hi_heads=1, lo_heads=2, dim=8, window=2)],
    "hash_attention": [HashAttentionCase(name="hash", batch=2, heads=2, tokens=7, dim=8, bits=4)],
    "ms_deform_attn": [
        DeformableCase(name="maps", batch=2, heads=2, dim=4, points=2, maps=((2, 3), (4, 6)))
    ],
    "boundary_max_pool": [BoundaryCase(name="pool", batch=2, channels=4, length=20, proposals=3)],
    "quantize": [
        QuantizeCase(name=step, step=step, shape=(2, 5, 5) if step.startswith("softmax") else (5, 6), groups=2, batch=2)
        for step in QUANTIZED
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for op, cases in TINY.items():
        monkeypatch.setitem(OPS, op, cases)


def measured(tmp_path, *options):
    output = tmp_path / "kernels.json"
    assert main(["kernels", "--rounds", "3", "--device", "cpu", "--output", str(output), *options]) == 0
    return json.loads(output.read_text()), output.with_suffix(".md").read_text()


def test_tiny_cases_are_those_of_every_op():
    assert set(TINY) == set(OPS)


@pytest.mark.parametrize("op", TINY)
def test_every_candidate_is_right(op, tmp_path):
    results, _ = measured(tmp_path, "--op", op)
    for case, row in zip(TINY[op], results["ops"][op], strict=True):
        if case.large:
            assert row["left_out"] == "too large for a CPU"
            continue
        assert set(row["passes"]) == set(case.passes)
        for numbers in row["passes"].values():
            assert numbers["bytes"] > 0
            names = {name for name, candidate in case.candidates().items() if candidate.on_cpu}
            assert set(numbers["candidates"]) == names
            assert len(names) > 1
            for name, candidate in numbers["candidates"].items():
                if "flash" in name and "failed" in candidate:
                    continue  # refuses masks
                assert candidate["fastest"] <= candidate["quartile_1"] <= candidate["seconds"], name
                assert candidate["seconds"] <= candidate["quartile_3"]
                assert candidate["fraction"] == pytest.approx(numbers["least_seconds"] / candidate["seconds"])
                assert candidate.get("error", 0) < 1e-5
                assert ("error" in candidate) == case.candidates()[name].comparable


def test_files_and_table(tmp_path, capsys):
    results, text = measured(tmp_path, "--op", "attention", "quantize")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.md"]
    captured = capsys.readouterr()
    assert captured.out == text
    assert "attention: plain, forward+backward" in captured.err
    assert set(results) == {"machine", "options", "limits", "ops"}
    assert list(results["ops"]) == ["attention", "quantize"]
    row = results["ops"]["attention"][0]["passes"][BOTH]["candidates"][OURS]
    assert f"| plain, batch 1 | {OURS} |" in text
    assert f"{1000 * row['seconds']:.3f}" in text
    assert results["machine"]["device"] in text
    assert "On this CPU the reference path of each operation runs, not its kernels" in text
    assert "- hilo: it was not asked for, or not reached yet." in text
    assert "- attention, large: too large for a CPU." in text
    assert "## Targets" not in text


def test_least_work_of_attention(tmp_path):
    results, _ = measured(tmp_path, "--op", "attention")
    passes = results["ops"]["attention"][0]["passes"]  # one image
    q, kv, out = 2 * 5 * 8 * 4, 2 * 2 * 3 * 8 * 4, 2 * 5 * 8 * 4
    assert passes[FORWARD]["bytes"] == q + kv + out
    assert passes[BOTH]["bytes"] == 2 * (q + kv + out) + q + kv
    assert passes[FORWARD]["flops"] == 2 * 2 * (2 * 5 * 3 * 8)
    assert passes[BOTH]["flops"] == 3.5 * passes[FORWARD]["flops"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "atention"], "--op atention: expected one of attention, window_attention, hilo, "),
        (["--rounds", "0"], "--rounds 0: expected at least 1"),
        (["--batch", "0"], "--batch 0.0: expected a factor above 0"),
        (["--output", "kernels.txt"], "--output kernels.txt: expected a file that ends in .json"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert main(["kernels", "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@dataclass(frozen=True, kw_only=True)
class Doubling(Case):
    """x to 2 x, by candidates that a test names."""

    op: ClassVar[str] = "doubling"
    others: tuple = ()

    def inputs(self, draw):
        return {"x": draw.normal(self.batch, 3)}

    def reference(self, inputs):
        return 2 * inputs["x"]

    def candidates(self):
        return {OURS: Candidate(self.reference), **dict(self.others)}


def raising(error):
    def run(inputs):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (raising(TypeError("no such dtype\nmore")), {"failed": "no such dtype"}),
        (raising(torch.OutOfMemoryError("tried to allocate")), {"failed": "out of memory"}),
        (raising(RuntimeError("backend='inductor' raised:\nValueError: odd")), {"failed": "ValueError: odd"}),
        (raising(KeyError()), {"failed": "KeyError"}),
        (lambda inputs: 2.01 * inputs["x"], {"wrong": "output 0: relative error 0.005"}),
        (lambda inputs: 2 * inputs["x"] * torch.nan, {"wrong": "output 0: relative error nan"}),
    ],
)
def test_a_candidate_without_numbers_says_why(run, verdict, monkeypatch, tmp_path):
    monkeypatch.setitem(OPS, "doubling", [Doubling(name="case", batch=2, others=(("other", Candidate(run)),))])
    results, text = measured(tmp_path, "--op", "doubling")
    for what, numbers in results["ops"]["doubling"][0]["passes"].items():
        assert numbers["candidates"]["other"] == verdict
        assert "seconds" in numbers["candidates"][OURS]
        told = ", ".join(value if key == "failed" else f"wrong, {value}" for key, value in verdict.items())
        assert f"- doubling, case, {what}, other: {told}" in text


def test_another_shape_is_wrong():
    assert kernels.relative_error(torch.ones(2, 1), torch.ones(2)) == float("inf")


def test_gradients_are_checked(monkeypatch, tmp_path):
    def detached(inputs):
        return inputs["x"] + inputs["x"].detach()

    monkeypatch.setitem(OPS, "doubling", [Doubling(name="case", batch=2, others=(("other", Candidate(detached)),))])
    results, _ = measured(tmp_path, "--op", "doubling")
    passes = results["ops"]["doubling"][0]["passes"]
    assert "seconds" in passes[FORWARD]["candidates"]["other"]
    assert passes[BOTH]["candidates"]["other"] == {"wrong": "gradient of x: relative error 0.5"}


def test_the_forward_pass_is_that_of_inference(monkeypatch, tmp_path):
    seen = []

    def run(inputs):
        seen.append((inputs["x"].requires_grad, torch.is_grad_enabled()))
        return 2 * inputs["x"]

    monkeypatch.setitem(OPS, "doubling", [Doubling(name="case", batch=2, others=(("other", Candidate(run)),))])
    measured(tmp_path, "--op", "doubling")
    assert set(seen[: len(seen) // 2]) == {(False, False)}
    assert set(seen[len(seen) // 2 :]) == {(True, True)}


def test_an_op_that_fails_does_not_end_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(Doubling, "inputs", lambda self, draw: raising(ImportError("no module"))({}))
    monkeypatch.setitem(OPS, "doubling", [Doubling(name="case", batch=2)])
    results, text = measured(tmp_path, "--op", "doubling", "hash_attention")
    assert results["ops"]["doubling"] == [{"case": "case", "batch": 1, "left_out": "no module"}]
    assert "- doubling, case: no module." in text
    assert "passes" in results["ops"]["hash_attention"][0]


def test_an_interrupted_run_keeps_finished_ops(monkeypatch, tmp_path):
    monkeypatch.setattr(Doubling, "inputs", lambda self, draw: raising(KeyboardInterrupt())({}))
    monkeypatch.setitem(OPS, "doubling", [Doubling(name="case", batch=2)])
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, "--op", "hash_attention", "doubling")
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert list(results["ops"]) == ["hash_attention"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.md"]


def on_gpu(results, seconds):
    """What a GPU would have written, `seconds` by candidate, else 1 s; every call takes 8 bytes, ours 4."""
    results = copy.deepcopy(results)
    results["options"]["device"] = "cuda"
    for row in (row for found in results["ops"].values() for row in found):
        for numbers in row["passes"].values():
            for name, candidate in numbers["candidates"].items():
                spread = dict.fromkeys(("seconds", "fastest", "quartile_1", "quartile_3"), seconds.get(name, 1.0))
                candidate |= spread | {"peak_bytes": 4 if name == OURS else 8, "launch_seconds": 0.001, "fraction": 0.5}
    return results


def test_targets(tmp_path):
    results, _ = measured(tmp_path, "--op", "ms_deform_attn", "quantize")
    text = report(on_gpu(results, {OURS: 0.25, COPY: 0.2}))
    assert "| ms_deform_attn: `grid_sample` takes 3× as long | maps, forward+backward: 4.00× | yes |" in text
    assert "| ms_deform_attn: `grid_sample` takes 2× the memory | maps, forward+backward: 2.00× | yes |" in text
    assert "quantize, forward: 0.80×" in text
    assert text.count("| yes |") == 3
    slow = report(on_gpu(results, {OURS: 0.5, COPY: 0.2}))
    assert "| ms_deform_attn: `grid_sample` takes 3× as long | maps, forward+backward: 2.00× | no |" in slow
    assert slow.count("| no |") == 2


def test_a_target_without_numbers_is_not_met(tmp_path):
    results = on_gpu(measured(tmp_path, "--op", "ms_deform_attn")[0], {})
    results["ops"]["ms_deform_attn"][0]["passes"][BOTH]["candidates"][OURS] = {"failed": "out of memory"}
    assert report(results).count("| maps, forward+backward: not measured | no |") == 2


def test_every_target_is_about_a_case(monkeypatch):
    monkeypatch.undo()  # the real shapes
    for target in TARGETS:
        cases = [case for case in OPS[target.op] if target.concerns(case)]
        assert cases, target.text
        for case in cases:
            assert set(target.passes) <= set(case.passes)
            names = [name for name in case.candidates() if name != OURS and target.others(name, case)]
            assert names, (target.text, case.name)


def test_the_reason_of_refusing_attention_is_what_pytorch_warned_of():
    messages = [
        "Memory efficient kernel not used because: (Triggered internally at a.cpp)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at a.cpp)",
        "Flash attention kernel not used because: (Triggered internally at a.cpp)",
        "Flash Attention does not support non-null attn_mask. (Triggered internally at a.cpp)",
    ]
    error = RuntimeError("No available kernel. Aborting execution.")
    assert kernels.refusal(error, messages) == "Flash Attention does not support non-null attn_mask."
    assert kernels.refusal(error, []) == str(error)
    assert kernels.refusal(RuntimeError("out of range"), messages) == "out of range"
