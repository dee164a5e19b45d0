"""Models of mmdetection and mmsegmentation: importing the packages, building a model, adding up its losses."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope, Registry
from torch import Tensor, nn

from tasks.core.errors import UserError
from tasks.core.openmmlab import missing_extra


@contextmanager
def importing(instead: str) -> Iterator[None]:
    """Around imports of mmdet and mmseg: raises UserError where one is not installed, naming what works without."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), f", or take class {instead}") from error
    # It would list how each parameter was initialised.
    MMLogger.get_current_instance().setLevel(logging.WARNING)


def build_model(
    package: str,
    registry: Registry,
    described: Mapping[str, Any],
    features: nn.Module | None,
    refuse: Callable[[nn.Module], str | None],
) -> Any:
    """Build and initialise what `described` says by the `registry` of `package`; `features` becomes its backbone.

    Raises UserError for what the package does not know or refuses, and where `refuse` gives a reason.
    """
    model = dict(copy.deepcopy(described))
    if features is not None:
        model["backbone"] = {"type": nn.Identity}
    try:
        # Only while it is built: another package's scope may be in use in this process.
        with DefaultScope.overwrite_default_scope(registry.scope):
            built = registry.build(ConfigDict(model))
            if reason := refuse(built):
                raise TypeError(reason)
            built.init_weights()
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model: {package} cannot build {model.get('type')!r}: {reason}") from error
    if features is not None:
        built.backbone = features
    return built


def loss_terms(
    losses: Mapping[str, Tensor | Sequence[Tensor]], touched: Iterable[nn.Parameter] = ()
) -> dict[str, Tensor]:
    """The terms to add up of what a model's `loss` returns; `touched` parameters take part in them, times 0."""
    # What has no "loss" in its name, such as an accuracy, is for logs.
    terms = {name: _mean(value) for name, value in losses.items() if "loss" in name}
    if first := [parameter.flatten()[0] for parameter in touched if parameter.requires_grad]:
        terms["loss_untouched"] = 0 * torch.stack(first).sum()
    return terms


def _mean(value: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value.mean()
    return torch.stack([part.mean() for part in value]).sum()
