"""The sample configurations learn to find actions, from the command line a user types."""

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("config", "epochs", "least"),
    # enough of each to tell a model that learns from one that does not
    [("stpt", 2, 0.30), ("afsd_frames", 1, 0.15)],
)
def test_sample_finds_actions_in_unseen_videos(config, epochs, least, fit_sample):
    pytest.importorskip("av")
    _, metrics = fit_sample("video", config, "--trainer.max_epochs", str(epochs))
    assert metrics["val/mAP"] >= least
