"""What each sub-command does and leaves behind."""

import csv
import json
import sys
from pathlib import Path

import cv2
import pytest
import torch
import yaml

NUM_VAL = 13
METRICS = ("mIoU", "fwIoU", "mAcc", "pAcc")


@pytest.fixture(scope="module")
def trained(tiny_options, tiny_ade20k, tmp_path_factory):
    """One short training in a process of its own arguments: the run folder, the configuration and what was printed."""
    import contextlib
    import io

    from tasks.core.cli import main
    from tasks.segmentation.data import SegmentationDataModule
    from tasks.segmentation.module import SegmentationModule

    root = tmp_path_factory.mktemp("trained")
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_options(tiny_ade20k)))
    out = io.StringIO()
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", ["frugal"])
        main(SegmentationModule, SegmentationDataModule, ["fit", "-c", str(config)])
    return root / "runs/segmentation/tiny/version_0", config, out.getvalue()


def read_report(folder):
    return json.loads((Path(folder) / "report.json").read_text())


def last_report(result):
    """The report that a command named in its last line."""
    line = result.out.rstrip().splitlines()[-1]
    assert line.startswith("report: ")
    return read_report(Path(line.removeprefix("report: ")).parent)


def metrics_of(report, stage):
    return {name: report["metrics"][f"{stage}/{name}"] for name in METRICS}


def test_fit_leaves_a_run_folder(trained):
    run, _, out = trained
    assert out.rstrip().splitlines()[-1] == "report: runs/segmentation/tiny/version_0/report.html"
    for name in ("report.html", "report.json", "report.md", "config.yaml", "metrics.csv"):
        assert (run / name).is_file(), name
    assert {path.name for path in run.rglob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    with (run / "metrics.csv").open() as file:
        assert {"train/loss", "val/mIoU"} <= set(csv.DictReader(file).fieldnames)


def test_report_of_a_training(trained):
    report = read_report(trained[0])
    assert (report["task"], report["config"]) == ("segmentation", "tiny")
    assert 0 <= report["metrics"]["val/mIoU"] <= 1
    cost = report["cost"]
    assert all(cost[name] > 0 for name in ("params", "macs", "step_time_ms", "peak_memory_mb")), cost
    assert len(report["curves"]["train/loss"]) == 2


def test_saved_configuration_names_the_number_of_classes_of_the_data(trained):
    saved = yaml.safe_load((trained[0] / "config.yaml").read_text())
    assert saved["model"]["init_args"]["num_queries"] == 8
    checkpoint = torch.load(next(trained[0].rglob("best.ckpt")), weights_only=True)
    assert checkpoint["hyper_parameters"]["num_classes"] == 11


def test_checkpoint_needs_nothing_else(trained):
    from tasks.segmentation.module import FASeg

    path = next(trained[0].rglob("best.ckpt"))
    saved = torch.load(path, weights_only=True)["state_dict"]
    options = yaml.safe_load(trained[1].read_text())["model"]["init_args"]
    loaded = FASeg.load_from_checkpoint(path, map_location="cpu").eval()
    built = FASeg(**options, num_classes=11).eval()
    built.load_state_dict(saved)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        for name, expected in built.network(image).items():
            if isinstance(expected, torch.Tensor):
                assert torch.equal(loaded.network(image)[name], expected)


@pytest.mark.parametrize("option", ["--model.weights", "--ckpt_path"])
def test_validation_repeats_the_metrics_of_the_training(run_cli, trained, option):
    run, config, _ = trained
    result = run_cli("validate", "-c", config, f"{option}={next(run.rglob('best.ckpt'))}")
    assert result.code == 0
    report = last_report(result)
    assert metrics_of(report, "val") == metrics_of(read_report(run), "val")
    assert report["cost"]["macs"] == read_report(run)["cost"]["macs"]
    untrained = last_report(run_cli("validate", "-c", config, "--seed_everything=1"))
    assert metrics_of(untrained, "val") != metrics_of(report, "val"), "the comparison above says nothing"


def test_test(run_cli, trained):
    run, config, _ = trained
    result = run_cli("test", "-c", config, f"--ckpt_path={next(run.rglob('best.ckpt'))}")
    assert result.code == 0
    # without a test split, the validation images are evaluated
    assert metrics_of(last_report(result), "test") == metrics_of(read_report(run), "val")


def test_predict_in_the_format_of_the_data(run_cli, trained, tiny_ade20k):
    run, config, _ = trained
    folder = tiny_ade20k / "images/validation"
    weights = next(run.rglob("best.ckpt"))
    args = [f"--model.weights={weights}", f"--data.images={folder}", "--output=out"]
    assert run_cli("predict", "-c", config, *args).code == 0
    written = sorted(Path("out").rglob("*"))
    assert [path.name for path in written] == [f"{path.stem}.png" for path in sorted(folder.iterdir())]
    for path in written:
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert (labels.shape, labels.dtype) == ((64, 64), "uint8")
        assert labels.min() >= 1
        assert labels.max() <= 11


def test_check(run_cli, tiny_config, tiny_ade20k, tmp_path):
    result = run_cli("check", "-c", tiny_config(tiny_ade20k))
    assert result.code == 0
    assert "share of labelled pixels" in result.out
    assert "background" in result.out
    assert "problem" not in result.out
    assert not (tmp_path / "runs").exists()


def test_configurations_compose(run_cli, tiny_config, tiny_ade20k, tmp_path):
    (tmp_path / "later.yaml").write_text("model:\n  init_args:\n    num_queries: 5\ntrainer:\n  max_steps: 7\n")
    result = run_cli(
        "fit", "-c", tiny_config(tiny_ade20k), "-c", "later.yaml", "--model.num_points=9", "--print_config"
    )
    assert result.code == 0
    printed = yaml.safe_load(result.out)
    network = printed["model"]["init_args"]
    assert (network["num_queries"], network["num_points"], network["hidden_dim"]) == (5, 9, 32)
    assert (printed["trainer"]["max_steps"], printed["trainer"]["val_check_interval"]) == (7, 2)


def test_configuration_beside_the_packages(run_cli):
    result = run_cli("fit", "-c", "configs/sample/faseg.yaml", "--print_config")
    assert result.code == 0
    assert yaml.safe_load(result.out)["data"]["class_path"].endswith("DigitScenes")


def test_resuming_says_where(run_cli, trained):
    run, config, _ = trained
    last = next(run.rglob("last.ckpt"))
    result = run_cli("fit", "-c", config, "--trainer.max_steps=4", f"--ckpt_path={last}")
    assert result.code == 0
    assert f"resuming {last}: epoch 0, step 2 of 4" in result.err


@pytest.mark.slow
def test_average_of_the_weights_is_evaluated_and_saved(run_cli, tiny_config, tiny_ade20k, tmp_path):
    # a decay this close to 1 keeps the average at its start
    changes = {"model.init_args.ema_decay": 0.999999, "model.init_args.optim.lr": 0.1}
    config = tiny_config(tiny_ade20k, changes=changes)
    result = run_cli("fit", "-c", config)
    assert result.code == 0
    best = next((tmp_path / "runs").rglob("best.ckpt"))
    checkpoint = torch.load(best, weights_only=True)
    name = "network.decoder.query_feat.weight"
    average, current = checkpoint["state_dict"][name], checkpoint["current_model_state"][name]
    assert (average - current).abs().max() > 0.01
    again = run_cli("validate", "-c", config, f"--model.weights={best}")
    assert metrics_of(last_report(again), "val") == metrics_of(last_report(result), "val")


def test_learning_rates_per_layer_reach_the_optimizer(run_cli, tiny_config, tiny_ade20k, tmp_path):
    changes = {
        "model.init_args.optim.layer_decay": 0.5,
        "model.init_args.optim.lr_multipliers": {"pixel_decoder": 0.3},
        "model.init_args.optim.schedule": "constant",
    }
    assert run_cli("fit", "-c", tiny_config(tiny_ade20k, changes=changes)).code == 0
    checkpoint = torch.load(next((tmp_path / "runs").rglob("last.ckpt")), weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    rates = {group["name"].removesuffix(" no decay"): group["lr"] for group in groups}
    assert rates["base"] == pytest.approx(1e-3)
    assert rates["pixel_decoder"] == pytest.approx(0.3e-3)
    backbone = [rate for name, rate in rates.items() if name.startswith("backbone layer")]
    assert len(backbone) > 2
    assert max(backbone) == pytest.approx(0.5e-3)


def test_semantic_fpn(run_cli, tiny_config, tiny_ade20k):
    model = {"class_path": "SemanticFPN", "init_args": {"backbone": "test_resnet"}}
    result = run_cli("fit", "-c", tiny_config(tiny_ade20k, changes={"model": model}))
    assert result.code == 0
    assert "val/mIoU" in last_report(result)["metrics"]


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("multi_scale_scores", ["--model.evaluation.short_sides=[64,96]", "--model.evaluation.max_long_side=128"]),
        (
            "sliding_window_scores",
            ["--model.evaluation.mode=slide", "--model.evaluation.window=[64,32]", "--model.evaluation.stride=[64,32]"],
        ),
    ],
)
def test_evaluation_by_several_views(run_cli, trained, monkeypatch, function, options):
    from tasks.segmentation import views

    calls = []
    original = getattr(views, function)
    monkeypatch.setattr(views, function, lambda *args: calls.append(args) or original(*args))
    run, config, _ = trained
    result = run_cli("validate", "-c", config, f"--model.weights={next(run.rglob('best.ckpt'))}", *options)
    assert result.code == 0
    assert len(calls) == NUM_VAL
    assert "val/mIoU" in last_report(result)["metrics"]
