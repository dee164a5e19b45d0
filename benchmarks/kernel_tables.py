"""The results of the kernel benchmark as Markdown: what ran where, a table per operation, and the targets."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.kernel_cases import LITV2_224, LITV2_1024, OPS
from benchmarks.kernel_cases.base import BOTH, FORWARD, OURS, REFERENCE, Case
from benchmarks.kernel_cases.others import COPY

Row = dict[str, Any]


class Target(NamedTuple):
    """Ours against others: `ratio` is theirs over ours, of seconds or of bytes, and has to be at least `wanted`."""

    text: str
    op: str
    wanted: float
    concerns: Callable[[Any], bool]
    others: Callable[[str, Case], bool]
    passes: tuple[str, ...] = (BOTH,)
    quantity: str = "seconds"


def _is_litv2(case: Case) -> bool:
    return case.name.startswith((LITV2_224, LITV2_1024))


def _is_composed(name: str, case: Case) -> bool:
    return case.candidates()[name].composed


TARGETS = (
    Target(
        "window_attention: the best composition takes 1.5× as long", "window_attention", 1.5, _is_litv2, _is_composed
    ),
    Target("hilo: the best composition takes 1.5× as long", "hilo", 1.5, _is_litv2, _is_composed),
    Target(
        "attention without bias or mask: flash takes 0.9× as long", "attention", 0.9,
        lambda case: not case.bias and not case.mask, lambda name, case: name == "SDPA flash", (FORWARD, BOTH),
    ),
    Target(
        "attention with a learned bias: any alternative takes 1.5× as long", "attention", 1.5,
        lambda case: case.bias, lambda name, case: name != OURS,
    ),
    Target(
        "hash_attention at 3136 tokens: flash takes 3× as long", "hash_attention", 3.0,
        lambda case: case.tokens == 3136, lambda name, case: name == "SDPA flash", (FORWARD, BOTH),
    ),
    Target(
        "ms_deform_attn: `grid_sample` takes 3× as long", "ms_deform_attn", 3.0,
        lambda case: True, lambda name, case: name == REFERENCE,
    ),
    Target(
        "ms_deform_attn: `grid_sample` takes 2× the memory", "ms_deform_attn", 2.0,
        lambda case: True, lambda name, case: name == REFERENCE, (BOTH,), "peak_bytes",
    ),
    Target(
        "quantize: a copy of as many bytes takes 1 / 1.3 as long", "quantize", 1 / 1.3,
        lambda case: True, lambda name, case: name == COPY, (FORWARD,),
    ),
)  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """The whole document."""
    on_gpu = results["options"]["device"].startswith("cuda")
    parts = ["# Kernels", _head(results, on_gpu)]
    parts += [f"## {op}\n\n{_table(found, on_gpu)}" for op, found in results["ops"].items()]
    if on_gpu:
        parts.append(f"## Targets\n\n{_targets(results['ops'])}")
    return "\n\n".join([*parts, _not_measured(results["ops"], on_gpu)]) + "\n"


def _head(results: dict[str, Any], on_gpu: bool) -> str:
    options, limits = results["options"], results["limits"]
    lines = [
        "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in results["machine"].items()) + ".",
        f"{options['dtype']}, batches × {options['batch_factor']:g}; {options['clock']}; medians of "
        f"{options['rounds']} calls in alternation, after compilation, autotuning and two more calls.",
        f"Limits measured here: a copy moves {limits['bytes_per_second'] / 1e9:.0f} GB/s (read and written), a matrix "
        f"product reaches {limits['flops_per_second'] / 1e12:.2f} TFLOP/s. *Of limit* is the least time that the bytes "
        "and matrix products of a pass need at these rates, over the time taken.",
        "*Ours* in the ratios is the row `frugal`: above 1, we are faster. Memory is the peak beside the inputs. Every "
        "result was first compared with the reference in float64.",
    ]
    if not on_gpu:
        lines.append(
            "**On this CPU the reference path of each operation runs, not its kernels** (Triton's interpreter is no "
            f"measure), with one image per batch and {options['threads']} thread(s)."
        )
    return "\n\n".join(lines)


def _table(found: list[Row], on_gpu: bool) -> str:
    measures = ["ms", "min, quartiles", "× ours", "of limit", *(["MB", "launch ms"] if on_gpu else [])]
    passes = list(dict.fromkeys(what for row in found for what in row.get("passes", ())))
    header = ["case", "candidate", *(f"{what} {measure}" for what in passes for measure in measures)]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for row in found:
        name = f"{row['case']}, batch {row['batch']}"
        if "left_out" in row:
            lines.append(f"| {name} | {row['left_out']} |" + " |" * (len(header) - 2))
            continue
        for candidate in next(iter(row["passes"].values()))["candidates"]:
            cells = [cell for what in passes for cell in _cells(row["passes"][what]["candidates"], candidate, on_gpu)]
            lines.append(f"| {name} | {candidate} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(rows: dict[str, Row], candidate: str, on_gpu: bool) -> list[str]:
    row, ours = rows[candidate], rows[OURS].get("seconds")
    if "seconds" not in row:
        verdict = f"wrong: {row['wrong']}" if "wrong" in row else row["failed"]
        return [verdict.replace("|", "\\|"), *[""] * (5 if on_gpu else 3)]
    fastest, low, high = (f"{1000 * row[name]:.3f}" for name in ("fastest", "quartile_1", "quartile_3"))
    cells = [f"{1000 * row['seconds']:.3f}", f"{fastest}, {low}–{high}"]
    cells.append(f"{row['seconds'] / ours:.2f}" if ours else "")
    cells.append(f"{100 * row['fraction']:.0f} %")
    return cells + ([f"{row['peak_bytes'] / 1e6:.1f}", f"{1000 * row['launch_seconds']:.3f}"] if on_gpu else [])


def _targets(ops: dict[str, list[Row]]) -> str:
    lines = ["| target | measured | met |", "|---|---|---|"]
    for target in TARGETS:
        if target.op not in ops:
            continue
        ratios = list(_ratios(target, ops[target.op]))
        measured = "; ".join(f"{name}: {'not measured' if not ratio else f'{ratio:.2f}×'}" for name, ratio in ratios)
        met = "yes" if min(ratio for _, ratio in ratios) >= target.wanted else "no"
        lines.append(f"| {target.text} | {measured} | {met} |")
    return "\n".join(lines)


def _ratios(target: Target, found: list[Row]) -> Iterator[tuple[str, float]]:
    """What the best of the others takes over what ours takes, for every case and pass of a target; 0 if unknown."""
    for case, row in zip(OPS[target.op], found, strict=True):
        if not target.concerns(case):
            continue
        for what in target.passes:
            rows = row.get("passes", {}).get(what, {}).get("candidates", {})
            ours = rows.get(OURS, {}).get(target.quantity)
            others = [
                other[target.quantity]
                for name, other in rows.items()
                if name != OURS and target.quantity in other and target.others(name, case)
            ]
            yield f"{row['case']}, {what}", min(others) / ours if ours and others else 0.0


def _not_measured(ops: dict[str, list[Row]], on_gpu: bool) -> str:
    lines = ["## Not measured", ""]
    if not on_gpu:
        lines += [
            "- The kernels, peak memory and the time of launching: they need a GPU.",
            "- `flex_attention`, `torch.compile` and the backends of attention that a CPU has not.",
        ]
    lines += [f"- {op}: it was not asked for, or not reached yet." for op in OPS if op not in ops]
    left_out = [(op, row) for op, found in ops.items() for row in found if "left_out" in row]
    lines += [f"- {op}, {row['case']}: {row['left_out']}." for op, row in left_out]
    without = [
        f"- {op}, {row['case']}, {what}, {name}: {candidate.get('failed') or 'wrong, ' + candidate['wrong']}"
        for op, found in ops.items()
        for row in found
        for what, numbers in row.get("passes", {}).items()
        for name, candidate in numbers["candidates"].items()
        if "seconds" not in candidate
    ]
    return "\n".join([*lines, *without] if len(lines) + len(without) > 2 else [*lines, "Nothing was left out."])
