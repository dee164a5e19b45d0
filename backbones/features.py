"""Backbones by name: any timm model, and feature pyramids of strides 4, 8, 16, 32 made from them."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import timm
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from backbones import lit, lit_ti, litv2
from backbones.staged import Flavour
from backbones.swin import SWIN_VARIANTS, SwinFeatures

PYRAMID_STRIDES = (4, 8, 16, 32)
DENSE_VARIANTS: dict[str, Callable[..., nn.Module]] = {
    **lit_ti.DENSE_VARIANTS,
    **lit.DENSE_VARIANTS,
    **litv2.DENSE_VARIANTS,
}


def create(name: str, **kwargs: Any) -> nn.Module:
    """Create a model of timm's registry, ours included; ``kwargs`` are those of ``timm.create_model``.

    Raises ValueError for a name that is not registered (with the nearest names) and RuntimeError when
    ``pretrained=True`` finds no weights to load.
    """
    _check_name(name)
    if kwargs.get("pretrained"):
        _require_weights(name)
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, AssertionError):
        raise  # arguments the model does not know
    except Exception as error:
        if not kwargs.get("pretrained"):
            raise
        raise RuntimeError(
            f"pretrained weights of {name!r} could not be downloaded ({type(error).__name__}); without network access "
            "set pretrained to false and load a local weight file (.safetensors, .pth, .pkl) into the backbone instead"
        ) from error


def create_features(
    name: str,
    *,
    pretrained: bool = False,
    out_indices: Sequence[int] | None = None,
    norm: Literal["batch", "frozen"] = "batch",
    drop_path_rate: float | None = None,
    flavour: Flavour = "segmentation",
    **kwargs: Any,
) -> nn.Module:
    """Create a backbone whose forward maps a normalised image (B, 3, H, W) to a list of NCHW maps.

    ``name`` is any timm model with maps of strides 4, 8, 16, 32; ``out_indices`` picks other levels of its
    ``feature_info``. ``norm="frozen"`` turns every batch normalisation into a fixed affine map whose weight, bias and
    statistics are buffers. ``drop_path_rate`` is stochastic depth (the model's default where None). Swin models take
    any image size and follow :mod:`backbones.swin`; LIT and LITv2 are those of their authors' segmentation or detection
    code, as ``flavour`` says (they differ in output norms and position tables; other models have one). The module has
    ``channels`` and ``strides`` (lists of int).

    Raises ValueError for an unknown name, one without such a pyramid and a rate outside 0..1, RuntimeError as `create`.
    """
    if norm not in ("batch", "frozen"):
        raise ValueError(f"norm={norm!r}: expected 'batch' or 'frozen'")
    if flavour not in ("segmentation", "detection"):
        raise ValueError(f"flavour={flavour!r}: expected 'segmentation' or 'detection'")
    if drop_path_rate is not None:
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate}: expected a probability below 1")
        kwargs["drop_path_rate"] = drop_path_rate
    _check_name(name)
    if name in DENSE_VARIANTS:
        if pretrained:
            _require_weights(name)
        dense = DENSE_VARIANTS[name](flavour=flavour, out_indices=out_indices, **kwargs)
        return freeze_batch_norm_2d(dense) if norm == "frozen" else dense
    if name.partition(".")[0] in SWIN_VARIANTS and out_indices is None:
        return _create_swin(name, pretrained, kwargs)

    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        kwargs = _any_size_arguments(name, kwargs)
    body = create(name, pretrained=pretrained, num_classes=0, **kwargs)
    info = getattr(body, "feature_info", [])
    indices = list(out_indices) if out_indices is not None else _pyramid_indices(name, info)
    features = TimmFeatures(body, indices)
    return freeze_batch_norm_2d(features) if norm == "frozen" else features


class TimmFeatures(nn.Module):
    """Levels ``indices`` of a timm model's ``feature_info`` as a list of NCHW maps; the model itself is ``body``."""

    def __init__(self, body: nn.Module, indices: Sequence[int]) -> None:
        super().__init__()
        info: Any = body.feature_info
        self.indices = [index % len(info) for index in indices]
        self.channels: list[int] = [info[index]["num_chs"] for index in self.indices]
        self.strides: list[int] = [info[index]["reduction"] for index in self.indices]
        # Layers behind the last level would be parameters without gradient.
        body.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)  # type: ignore[operator]
        self.body = body

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map a normalised image (B, 3, H, W) to maps (B, C_i, H / s_i, W / s_i)."""
        return self.body.forward_intermediates(  # type: ignore[operator]
            image, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass where the model supports it."""
        self.body.set_grad_checkpointing(enable)  # type: ignore[operator]


def _create_swin(name: str, pretrained: bool, kwargs: dict[str, Any]) -> SwinFeatures:
    """Swin pyramid of the variant ``name``; ImageNet weights come from timm's model of the same name."""
    features = SwinFeatures(*SWIN_VARIANTS[name.partition(".")[0]], **kwargs)
    if pretrained:
        weights = create(name, pretrained=True, num_classes=0).state_dict()
        # The classifier's final norm has no place here; the norms of the four outputs start from identity.
        features.load_state_dict({k: v for k, v in weights.items() if not k.startswith("norm.")}, strict=False)
    return features


def _any_size_arguments(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add timm's switch for images of any size where the model ``name`` has one."""
    for switch in ({"strict_img_size": False}, {"dynamic_img_size": True}):
        try:
            timm.create_model(name, **{**kwargs, **switch, "device": "meta"})
        except TypeError:
            continue
        return {**switch, **kwargs}
    return kwargs


def _pyramid_indices(name: str, info: Any) -> list[int]:
    strides = [level["reduction"] for level in info]
    if missing := [stride for stride in PYRAMID_STRIDES if stride not in strides]:
        raise ValueError(
            f"backbone {name!r} has no feature pyramid: maps of strides {list(PYRAMID_STRIDES)} are needed, "
            f"{missing} are missing (it has {sorted(set(strides))}); choose one such as resnet50, convnext_tiny or "
            "swin_tiny_patch4_window7_224"
        )
    return [max(i for i, s in enumerate(strides) if s == stride) for stride in PYRAMID_STRIDES]


def _require_weights(name: str) -> None:
    """Raise RuntimeError for a network whose weights timm does not know where to find."""
    config = timm.get_pretrained_cfg(name)
    if config is not None and not config.has_weights:
        raise RuntimeError(
            f"there are no weights of {name!r} to download; set pretrained to false and name the file of released or "
            "trained weights as the option weights"
        )


def _check_name(name: str) -> None:
    """Raise ValueError unless timm knows ``name``: ``model``, ``model.tag`` or ``hf-hub:`` / ``local-dir:`` names."""
    if name.startswith(("hf-hub:", "local-dir:")):
        return
    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        nearest = difflib.get_close_matches(model, timm.list_models(), n=4)
        raise ValueError(f"unknown backbone {name!r}" + (f"; nearest names: {', '.join(nearest)}" if nearest else ""))
    weights = timm.list_models(f"{model}.*", pretrained=True) if tag else []
    if tag and name not in weights:
        raise ValueError(f"unknown weights {name!r}; timm has: {', '.join(weights) or 'none for this model'}")
