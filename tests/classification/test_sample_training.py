"""A sample configuration trains to its score, from the command line a user types."""

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sample_reaches_its_score_on_unseen_digits(fit_sample):
    _, metrics = fit_sample("classification", "litv2", timeout=1100)
    assert metrics["val/top1"] >= 0.97
