"""The sample configurations train to their score, from the command line a user types."""

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("config", "steps", "least"),
    # the whole run of Mask R-CNN, and enough of RetinaNet's, which learns more slowly, to tell that it learns
    [
        ("mask_rcnn_litv2", 500, {"val/box_AP50": 0.80, "val/mask_AP50": 0.75}),
        ("retinanet_litv2", 250, {"val/box_AP50": 0.12}),
    ],
)
def test_sample_reaches_its_score_on_unseen_digits(config, steps, least, fit_sample):
    limits = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
    _, metrics = fit_sample("detection", config, *limits)
    for name, value in least.items():
        assert metrics[name] >= value, name
