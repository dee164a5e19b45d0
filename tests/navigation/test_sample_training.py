"""The sample configuration trains to its score in houses it has not seen, and without the instruction it does not."""

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sample_reaches_its_score_in_unseen_houses(fit_sample):
    _, metrics = fit_sample("navigation", "orist", "--data.root", "houses")
    assert metrics["val_unseen/SR"] >= 0.85


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_blind_agent_does_not(fit_sample):
    """After a third of the training; after all of it the measured rate is 0.10."""
    steps = ["--trainer.max_steps", "300", "--trainer.val_check_interval", "300"]
    _, metrics = fit_sample("navigation", "orist", "--data.root", "houses", "--model.use_instruction", "false", *steps)
    assert metrics["val_unseen/SR"] < 0.4
