"""mmdet's and mmseg's own configurations, made small enough to train a step on the CPU."""

from pathlib import Path

CHANNELS = (16, 32, 64, 128)  # of a ResNet-50 at a sixteenth of its width


def register(package):
    """Import the models of `package`, mmdet or mmseg, and take names of parts from it."""
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope

    from tasks.core.openmmlab import install

    install()
    import mmdet.models  # noqa: F401  (of mmseg too: parts of Mask2Former)
    import mmseg.models  # noqa: F401

    init_default_scope(package)
    MMLogger.get_current_instance().setLevel("WARNING")  # one line per parameter


def read_model(package, name):
    from mmengine.config import Config

    return Config.fromfile(Path(package.__file__).parent / ".mim/configs" / f"{name}.py").model


def walk(config):
    """Every group of a configuration."""
    yield config
    for value in config.values():
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, dict):
                yield from walk(inner)


def lower(config, numbers):
    """Set the `numbers` wherever their names stand."""
    for holder in walk(config):
        holder.update({key: value for key, value in numbers.items() if isinstance(holder.get(key), int)})


def check_training(model, losses):
    """Losses are finite, and so is the gradient of every parameter; those of the backbone are not all zero."""
    flat = [value for loss in losses.values() for value in (loss if isinstance(loss, list) else [loss])]
    assert flat
    assert all(loss.isfinite().all() for loss in flat)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert any(p.grad.abs().max() > 0 for name, p in trained.items() if name.startswith("backbone."))
