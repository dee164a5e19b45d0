"""The sample configurations train to their score, from the command line a user types."""

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("config", "steps", "least"),
    # the whole FASeg run, and enough of Mask2Former to tell a model that learns from one that does not
    [("faseg", 800, 0.60), ("mask2former", 400, 0.30)],
)
def test_sample_reaches_its_score_on_unseen_digits(config, steps, least, fit_sample):
    limits = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    _, metrics = fit_sample("segmentation", config, *limits)
    assert metrics["val/mIoU"] >= least
