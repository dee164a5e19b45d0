"""SPViT on the digits, from the command lines a user types: a dense network, the search, the fine-tuning."""

import pytest

from backbones.spvit_architecture import Architecture


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_pruned_network_is_as_good_as_the_dense_one(fit_sample, tmp_path):
    dense, dense_metrics = fit_sample("classification", "deit")
    weights = str(dense / "checkpoints/best.ckpt")
    searched, _ = fit_sample("classification", "spvit_search", "--model.weights", weights)
    for name in ("architecture.json", "pruned.safetensors"):
        (tmp_path / name).write_bytes((searched / name).read_bytes())
    _, metrics = fit_sample("classification", "spvit_finetune")
    found = Architecture.read(tmp_path / "architecture.json")
    plain = Architecture.unpruned("deit", 64, [4], [4], 8)
    assert found.macs(32, 10) == pytest.approx(2.2e6, rel=0.02)
    assert found.macs(32, 10) <= 0.7 * plain.macs(32, 10)
    assert dense_metrics["val/top1"] >= 0.94
    assert metrics["val/top1"] >= dense_metrics["val/top1"] - 0.02
