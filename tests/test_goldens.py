"""Equality with the outputs of official implementations.

Cases are `<family>/<case>.json` (tensors in a .safetensors file of the same stem) under tests/goldens and under every
root listed in the environment variable FRUGAL_GOLDENS, separated by ':'; on equal names the last root wins. The module
tests/golden_families/goldens_<family>.py computes them:

    run_case(meta, tensors, path) -> dict   the value of every expected tensor by its name in `tensors`;
                                            a case without tensors checks itself and returns {}
    is_expected(name) -> bool               optional: which tensors are outputs; default: names starting with "out."
    tolerance(name) -> float | None         optional: relative error allowed for a tensor; None: that of its type
"""

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
MODULES = HERE / "golden_families"
# Relative to the largest expected number; float32 files were rounded after a float64 computation.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}


def find_cases(roots):
    """Map `<family>/<case>` to the json file of the case."""
    cases = {}
    for root in roots:
        if not root.is_dir():
            raise FileNotFoundError(f"FRUGAL_GOLDENS: {root} is not a folder")
        for path in sorted(root.glob("*/**/*.json")):
            cases[str(path.relative_to(root).with_suffix(""))] = path
    return dict(sorted(cases.items()))


def golden_parameters(full=True):
    """Cases; `full` ones run a network of its real size."""
    roots = [HERE / "goldens", *(Path(r) for r in os.environ.get("FRUGAL_GOLDENS", "").split(":") if r)]
    cases = find_cases([root for root in roots if root.is_dir() or root != HERE / "goldens"])
    unsupported = sorted({name.split("/")[0] for name in cases if not module_of(name.split("/")[0]).exists()})
    supported = [
        pytest.param(name, path, id=name, marks=[pytest.mark.slow] if path.stem.startswith("full") else [])
        for name, path in cases.items()
        if name.split("/")[0] not in unsupported and (full or not path.stem.startswith("full"))
    ]
    reason = "no tests/golden_families/goldens_{}.py"
    return supported + [
        pytest.param(family, None, id=family, marks=pytest.mark.skip(reason=reason.format(family)))
        for family in unsupported
    ]


def module_of(family):
    return MODULES / f"goldens_{family}.py"


def compare(name, actual, expected, tolerance=None):
    """Fail unless `actual` equals `expected`: integers exactly, floating point to `tolerance`, else to TOLERANCE."""
    assert tuple(actual.shape) == tuple(expected.shape), f"{name}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    if not expected.is_floating_point():
        differing = int((actual.to(torch.int64) != expected.to(torch.int64)).sum())
        assert differing == 0, f"{name}: {differing} of {expected.numel()} integers differ"
        return
    if expected.numel() == 0:
        return
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in other places"
    actual, expected = actual.nan_to_num(), expected.nan_to_num()
    scale = expected.abs().max().double().clamp(min=1e-30)
    error = float((actual.double() - expected.double()).abs().max() / scale)
    allowed = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    assert error <= allowed, f"{name}: relative error {error:.3g} > {allowed:.0e}"


@pytest.mark.golden
@pytest.mark.parametrize(("name", "path"), golden_parameters())
def test_golden(name, path):
    check_golden(name, path)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "path"), golden_parameters(full=False))
def test_golden_with_triton(name, path, monkeypatch):
    """Every case again where the Triton kernels take all they can, which is float32."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FRUGAL_KERNELS", "triton")
    check_golden(name, path)


def check_golden(name, path):
    if str(MODULES) not in sys.path:
        sys.path.insert(0, str(MODULES))
    module = importlib.import_module(f"goldens_{name.split('/')[0]}")
    meta = json.loads(path.read_text())
    tensor_file = path.with_suffix(".safetensors")
    tensors = load_file(tensor_file) if tensor_file.exists() else {}
    computed = module.run_case(meta, tensors, path)
    is_expected = getattr(module, "is_expected", lambda key: key.startswith("out."))
    expected = [key for key in tensors if is_expected(key)]
    unknown = sorted(set(expected) - set(computed))
    assert not unknown, f"{name}: nothing was computed for {unknown}"
    tolerance = getattr(module, "tolerance", lambda key: None)
    for key in expected:
        compare(key, computed[key].detach(), tensors[key], tolerance(key))


def test_last_root_wins(tmp_path):
    for root in ("first", "second"):
        (tmp_path / root / "family" / "part").mkdir(parents=True)
        (tmp_path / root / "family" / "part" / "case.json").write_text("{}")
    cases = find_cases([tmp_path / "first", tmp_path / "second"])
    assert cases == {"family/part/case": tmp_path / "second" / "family" / "part" / "case.json"}


def test_unknown_root():
    with pytest.raises(FileNotFoundError, match="FRUGAL_GOLDENS: /nowhere is not a folder"):
        find_cases([Path("/nowhere")])


def test_family_without_module_is_one_skip(tmp_path, monkeypatch):
    (tmp_path / "unheard_of").mkdir()
    for case in ("one", "two"):
        (tmp_path / "unheard_of" / f"{case}.json").write_text("{}")
    monkeypatch.setenv("FRUGAL_GOLDENS", str(tmp_path))
    skips = [p for p in golden_parameters() if p.id.startswith("unheard_of")]
    assert [p.id for p in skips] == ["unheard_of"]
    assert skips[0].marks[0].name == "skip"


def test_outputs_must_be_computed_and_equal(tmp_path, monkeypatch):
    path = tmp_path / "case.json"
    path.write_text("{}")
    expected = {
        "out.x": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "out.n": torch.tensor([3]),
        "in.y": torch.ones(1),
    }
    save_file(expected, path.with_suffix(".safetensors"))
    for computed, message in [
        ({"out.x": expected["out.x"]}, r"nothing was computed for \['out.n'\]"),
        (expected | {"out.x": expected["out.x"] + 1e-8}, "out.x: relative error"),
        (expected | {"out.n": torch.tensor([4])}, "out.n: 1 of 1 integers differ"),
        (expected | {"out.n": torch.tensor([[3]])}, r"out.n: \(1, 1\) != \(1,\)"),
    ]:
        monkeypatch.setitem(sys.modules, "goldens_fake", SimpleNamespace(run_case=lambda *_, c=computed: c))
        with pytest.raises(AssertionError, match=message):
            check_golden("fake/case", path)
    monkeypatch.setitem(sys.modules, "goldens_fake", SimpleNamespace(run_case=lambda *_: expected))
    check_golden("fake/case", path)


def test_a_family_sets_its_tolerances(tmp_path, monkeypatch):
    path = tmp_path / "case.json"
    path.write_text("{}")
    expected = {"out.x": torch.ones(2, dtype=torch.float64), "out.y": torch.ones(2, dtype=torch.float64)}
    save_file(expected, path.with_suffix(".safetensors"))
    for off, error in (("out.x", None), ("out.y", "out.y: relative error")):
        computed = expected | {off: expected[off] + 1e-6}
        family = SimpleNamespace(
            run_case=lambda *_, c=computed: c, tolerance=lambda name: 1e-5 if name == "out.x" else None
        )
        monkeypatch.setitem(sys.modules, "goldens_fake", family)
        if error is None:
            check_golden("fake/case", path)
        else:
            with pytest.raises(AssertionError, match=error):
                check_golden("fake/case", path)
