"""The classifier: any model of timm or ours, made from plain options."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from backbones import create
from tasks.core.errors import UserError


def create_classifier(
    name: str,
    num_classes: int | None,
    *,
    img_size: int | None = None,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
    key: str = "model.backbone",
) -> nn.Module:
    """Create model `name` with `num_classes` outputs (None: as many as its weights have).

    `img_size` goes to models that are made for one size, such as ViT and Swin; others do not take it. `options` are
    further arguments of the model. Raises UserError, naming the option `key`, for what cannot be made.
    """
    arguments = {"pretrained": pretrained, **(options or {})}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if img_size is not None:
        arguments.setdefault("img_size", img_size)
    try:
        return create(name, **arguments)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] == "img_size" and "img_size" not in (options or {}):
            return create_classifier(name, num_classes, pretrained=pretrained, options=options, key=key)
        reason = f"has no option {unknown[1]!r}" if unknown else f"cannot be made: {error}"
        raise UserError(f"{key}: {name!r} {reason}") from error
    except (ValueError, RuntimeError, AssertionError) as error:  # says what is wrong with the name or a value
        raise UserError(f"{key}: {' '.join(str(error).split()) or f'{name!r} refuses its options'}") from error
