"""The report's three files, its figures, its costs and the callback that writes it."""

import io
import json
import math
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tasks.core.errors import UserError
from tasks.core.report import Picture, Report, Table, environment, figures, measure_cost, read_metrics_csv, write_report
from tasks.core.report.numbers import format_column

HOSTILE = "<script>alert(1)</script>"
PALETTE = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)


def png(colour=(10, 20, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def make_report():
    return Report(
        task="segmentation",
        config="faseg",
        title=f"FASeg {HOSTILE}",
        metrics={"train/loss": 2.5, "val/mIoU": 48.3125, "val/empty": math.nan, "val/inf": math.inf},
        cost={"params": 50_512_345, "macs": 36_700_000_000, "macs_kind": "one example", "step_time_ms": 12.5},
        tables=[Table("Per class", ["class", "IoU", "pixels"], [(HOSTILE, 12.345, 1234567), ("a|b", math.nan, 3)])],
        curves={"train/loss": [(0, 3.0), (10, math.nan), (20, 2.5)], "lr-AdamW": [(0, 1e-4), (20, 0.0)]},
        pictures=[Picture("Best cases", f"one {HOSTILE}", png()), Picture("Worst cases", "two", png((90, 0, 0)))],
        command=f"python -m tasks.segmentation fit -c {HOSTILE}.yaml",
        environment={"torch": "2.10", "device": HOSTILE},
        notes=[f"note {HOSTILE}"],
        monitor="val/mIoU",
    )


@pytest.fixture
def folder(tmp_path):
    assert write_report(make_report(), tmp_path / "run") == tmp_path / "run" / "report.html"
    return tmp_path / "run"


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_json_holds_every_number_and_is_strict(folder):
    found = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert found["task"] == "segmentation"
    assert found["config"] == "faseg"
    assert found["metrics"] == {"train/loss": 2.5, "val/mIoU": 48.3125, "val/empty": None, "val/inf": None}
    assert found["cost"] == {
        "params": 50_512_345, "macs": 36_700_000_000, "macs_kind": "one example", "step_time_ms": 12.5,
        "peak_memory_mb": None,
    }  # fmt: skip
    assert found["tables"][0]["rows"] == [[HOSTILE, 12.345, 1234567], ["a|b", None, 3]]
    assert found["curves"] == {"train/loss": [[0, 3.0], [10, None], [20, 2.5]], "lr-AdamW": [[0, 1e-4], [20, 0.0]]}
    assert [picture["file"] for picture in found["pictures"]] == ["report_files/01.png", "report_files/02.png"]


def test_json_takes_numpy_and_torch_scalars(tmp_path):
    report = Report("t", "c", "x", {"a": np.float32(0.5), "b": torch.tensor(2.0)})
    report.tables = [Table("t", ["n", "x"], [(np.int64(3), np.float64("nan"))])]
    write_report(report, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert found["metrics"] == {"a": 0.5, "b": 2.0}
    assert found["tables"][0]["rows"] == [[3, None]]


def test_html_shows_everything(folder):
    page = (folder / "report.html").read_text()
    for text in ["48.31", "val/mIoU", "12.35", "1,234,567", "50.51", "36.70", "Best cases", "Worst cases", "2.10"]:
        assert text in page
    assert page.count("data:image/png;base64,") == 2
    assert page.count("data:image/svg+xml;base64,") == 2  # loss and learning rate


def test_html_escapes_names(folder):
    page = (folder / "report.html").read_text()
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    assert page.count("<script") == 1


def test_html_asks_for_nothing_outside(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r"""\s(?:src|href|action)\s*=\s*(?!"data:)|url\(|@import|<link|https?://""", page)
    assert "default-src 'none'; img-src data:" in page


def test_markdown_links_the_pictures_and_escapes(folder):
    text = (folder / "report.md").read_text()
    assert "| metric | value |\n| :--- | ---: |\n| val/mIoU | 48.31 |" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | 12.35 | 1,234,567 |" in text
    assert r"| a\|b | – | 3 |" in text
    for file in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / file).read_bytes().startswith(b"\x89PNG")
    assert "<script" not in text.replace(f"    python -m tasks.segmentation fit -c {HOSTILE}.yaml", "")


def test_a_second_report_replaces_the_first(folder):
    report = make_report()
    report.pictures = report.pictures[:1]
    write_report(report, folder)
    assert [path.name for path in (folder / "report_files").iterdir()] == ["01.png"]
    assert not [path for path in folder.rglob("*") if path.suffix == ".part"]


def test_empty_report(tmp_path):
    write_report(Report("video", "", "nothing yet", {}), tmp_path)
    assert "nothing yet" in (tmp_path / "report.html").read_text()


def test_numbers_of_a_column_share_their_decimals():
    assert format_column([48.3125, 7.0, None, float("nan")]) == ["48.31", "7.00", "–", "–"]
    assert format_column([0.5, 0.12345, 0.00001]) == ["0.5000", "0.1235", "1.00e-05"]
    assert format_column(["a", 1234, 1234.5]) == ["a", "1,234", "1,234.50"]


# -- figures ----------------------------------------------------------------------------------------------------------


def test_panels_group_stages_and_drop_single_points():
    points = [(0, 1.0), (1, 0.5)]
    names = ["val/mIoU", "lr-AdamW/pg1", "train/loss_mask", "train/loss_step", "train/loss_epoch", "val/loss"]
    panels = figures.curve_panels({**dict.fromkeys(names, points), "val/once": points[:1]})
    assert [title for title, _ in panels] == ["loss", "loss terms", "mIoU", "learning rate"]
    assert all(svg.startswith(b"<?xml") for _, svg in panels)


def test_panels_are_reproducible():
    curves = {"train/loss": [(0, 1.0), (1, 0.5)]}
    assert figures.curve_panels(curves) == figures.curve_panels(curves)


def size(data):
    return Image.open(io.BytesIO(data)).size


def test_class_bars_stay_readable_for_many_classes():
    few = figures.class_bars({f"class {i}": i / 10 for i in range(10)}, "IoU")
    many = figures.class_bars({f"class {i}": float("nan") if i == 3 else i for i in range(1000)}, "IoU")
    assert size(few)[1] < size(many)[1] < 1500


@pytest.mark.parametrize("classes", [3, 30, 31, 150])
def test_confusion_matrix_for_few_and_many_classes(classes):
    counts = np.random.default_rng(0).integers(0, 50, (classes, classes))
    counts[1] = 0  # a class that does not occur
    width, height = size(figures.confusion_matrix(counts, [f"class {i}" for i in range(classes)]))
    assert max(width, height) < 2000


def test_most_confused_matrix_shows_the_classes_of_the_largest_confusions(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "_matrix", lambda share, classes: shown.append((share, classes)) or b"")
    counts = np.eye(100, dtype=int) * 8
    counts[70, 3] = 8  # half of class 70
    counts[5, 90] = 2  # a fifth of class 5
    figures.most_confused_matrix(counts, [f"class {i}" for i in range(100)])
    share, classes = shown[0]
    assert share.shape == (30, 30)
    assert {"class 3", "class 5", "class 70", "class 90"} <= set(classes)
    assert share[classes.index("class 70"), classes.index("class 3")] == 50
    assert share[classes.index("class 5"), classes.index("class 90")] == 20


def test_reliability_diagram_with_empty_bins():
    bins = np.zeros((15, 3))
    bins[:, 2] = np.nan
    empty = size(figures.reliability_diagram(bins))
    bins[14] = 100, 90, 0.97
    assert size(figures.reliability_diagram(bins)) == empty
    assert max(empty) < 1000


def test_long_and_equal_names_of_classes_stay_bars_of_their_own():
    words = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"
    long = figures.class_bars({f"{words} {i}": i for i in range(10)}, "IoU")
    assert size(long) == size(figures.class_bars({f"class {i}": i for i in range(10)}, "IoU"))
    assert figures._short(words) == "great white shark, white shark, man-eater, m…"


def test_overlay_tints_labels_and_leaves_ignored_pixels():
    image = np.full((2, 2, 3), 100, np.uint8)
    mixed = figures.overlay(image, np.array([[0, 1], [2, 255]]), PALETTE)
    assert mixed.tolist() == [[[160, 40, 40], [40, 160, 40]], [[40, 40, 160], [100, 100, 100]]]
    assert (image == 100).all()
    with pytest.raises(ValueError, match=r"expected 0\.\.2 or 255"):
        figures.overlay(image, np.full((2, 2), 3), PALETTE)


def test_side_by_side_with_everything_ignored_and_tall_images():
    image = np.zeros((60, 20, 3), np.uint8)
    for truth in (np.full((60, 20), 255), np.zeros((60, 20), int)):
        width, height = size(figures.side_by_side(image, truth, np.ones((60, 20), int), PALETTE, ["a", "b", "c"]))
        assert 0.3 < width / height < 1.2


def test_thumbnail_keeps_labels_whole():
    labels = np.random.default_rng(0).choice([0, 7, 255], (100, 50)).astype(np.uint8)
    small = figures.thumbnail(labels, 20)
    assert small.shape == (20, 10)
    assert set(np.unique(small)) <= {0, 7, 255}
    assert figures.thumbnail(np.zeros((10, 30, 3), np.uint8), 320).shape == (10, 30, 3)


# -- curves and cost --------------------------------------------------------------------------------------------------


def test_metrics_csv(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,val/mIoU\n0,0,3.5,\n0,9,,0.25\n0,10,nan,\n0,9,,0.5\n")
    curves = read_metrics_csv(path)
    assert curves["val/mIoU"] == [(9, 0.5)]
    assert curves["train/loss"][0] == (0, 3.5)
    assert math.isnan(curves["train/loss"][1][1])


@pytest.mark.parametrize(
    "text", ["epoch,loss\n0,1\n", "step,loss\n1,abc\n", "step,loss\n1.5,1\n", "step,loss\n1,2,3\n"]
)
def test_malformed_metrics_csv_names_the_line(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.csv, line 2"):
        read_metrics_csv(tmp_path / "metrics.csv")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_cost_counts_parameters_and_macs(context):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    network[0].weight.requires_grad_(False)
    network[1].eval()
    with context():
        cost = measure_cost(network, torch.zeros(1, 3, 16, 16))
    assert cost["params"] == 3 * 8 * 9 + 8 + 16 + 2048 * 10 + 10  # frozen ones too, no buffers
    assert cost["macs"] == 3 * 8 * 9 * 256 + 2048 * 10
    assert cost["step_time_ms"] > 0
    assert cost["peak_memory_mb"] > 10
    assert "forward pass of one example (1×3×16×16)" in cost["step_time_kind"]
    assert "resident" in cost["peak_memory_kind"]
    assert network.training
    assert network[0].training
    assert not network[1].training


def test_cost_takes_a_measured_step_time():
    cost = measure_cost(nn.Linear(2, 2), torch.zeros(1, 2), step_time_ms=7.5)
    assert cost["step_time_ms"] == 7.5
    assert "training step" in cost["step_time_kind"]


def test_environment_is_not_private():
    found = environment()
    assert found["torch"] == torch.__version__
    text = " ".join(found.values())
    assert str(Path.home()) not in text
    assert platform.node() not in text.split()


class ParameterView(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 4))
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.query.expand(3, -1)) + x.sum()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_cost_is_measured_where_lightning_evaluates(mode):
    with mode():
        assert measure_cost(ParameterView(), torch.zeros(1, 2))["macs"] == 3 * 4 * 2
