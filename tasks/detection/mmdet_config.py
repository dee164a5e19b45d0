"""Any configuration file of mmdetection as plain values: its model with the number of classes of the data at hand."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.core.errors import UserError
from tasks.detection.mmdet_network import MMDetNetwork, build_detector, import_mmdet
from tasks.detection.network import NormalizeAndPad

INSTALLED = "mmdet::"  # configurations that come with mmdetection
# Packages whose classes a checkpoint may name by their full path; other names have to be registered.
TRUSTED = ("mmdet.models.", "mmcv.cnn.", "mmcv.ops.", "mmengine.model.", "torch.nn.")


def read_model(config: str, allow_code: bool) -> dict[str, Any]:
    """The dictionary `model` of a configuration file, all of its values plain.

    Reading the file executes it. Raises UserError unless that is allowed or the file is one of mmdetection's own
    (``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py``), and for a file without such a dictionary.
    """
    own = config.startswith(INSTALLED)
    path = _installed(config) if own else Path(config)
    if not path.is_file():
        raise UserError(f"model.config {config}: no such file; expected a configuration of mmdetection (.py)")
    if not (own or allow_code):
        raise UserError(
            f"model.config {config}: a configuration of mmdetection is a Python program that runs when it is read; "
            "if you trust it, say so with --model.allow_config_code true"
        )
    import_mmdet()
    from mmengine.config import Config

    try:
        content = Config.fromfile(str(path))
        model = content.get("model")
        plain = content.to_dict().get("model") if isinstance(model, Mapping) else None
    except Exception as error:  # whatever a program may raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model.config {config}: cannot be read: {reason}") from error
    if not isinstance(plain, Mapping) or "type" not in plain:
        raise UserError(f"model.config {config}: has no dictionary 'model' with a 'type'")
    return _plain(plain)


def network_of(model: Mapping[str, Any], num_classes: int) -> MMDetNetwork:
    """The network that `model` describes, with `num_classes` classes and without pretrained weights.

    Raises UserError for classes that are not mmdetection's, for another preprocessor than of plain detectors and for
    what mmdetection refuses.
    """
    import_mmdet()
    for name in _types(model):
        if "." in name and not name.startswith(TRUSTED):
            raise UserError(f"model.config: class {name!r} is outside the packages {', '.join(TRUSTED)}")
    own = copy.deepcopy(dict(model))
    prepare = _preprocessing(own.pop("data_preprocessor", None) or {})
    _forget_pretrained(own)
    with_classes(own, num_classes)
    return MMDetNetwork(build_detector(own), prepare, touch=True)


def with_classes(model: dict[str, Any], num_classes: int) -> None:
    """Set the number of classes of every head of `model` that has the number of its main head."""
    heads = {name: part for name, part in model.items() if name not in ("backbone", "neck", "train_cfg", "test_cfg")}
    numbers = [value for part in _dictionaries(heads) for key, value in part.items() if key in _COUNTS]
    if not numbers:
        return
    before = numbers[0]
    for part in _dictionaries(heads):
        for key in _COUNTS:
            if part.get(key) == before:
                part[key] = num_classes
                if key == "num_things_classes":
                    part["num_stuff_classes"] = 0
                loss = part.get("loss_cls")
                if isinstance(loss, dict) and isinstance(weights := loss.get("class_weight"), list):
                    loss["class_weight"] = [weights[0]] * num_classes + [weights[-1]]


_COUNTS = ("num_classes", "num_things_classes")


def _installed(config: str) -> Path:
    spec = importlib.util.find_spec("mmdet")
    if spec is None or spec.origin is None:
        import_mmdet()  # says what to install
        raise AssertionError
    folder = Path(spec.origin).parent / ".mim" / "configs"
    path = folder / config.removeprefix(INSTALLED)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"model.config {config}: leads out of the configurations of mmdetection")
    return path


def _plain(value: Any) -> Any:
    """Dictionaries, lists, numbers and names; classes become their full names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, type) or callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return value


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dictionaries(inner)


def _types(model: Mapping[str, Any]) -> Iterator[str]:
    for part in _dictionaries(dict(model)):
        if isinstance(part.get("type"), str):
            yield part["type"]


def _forget_pretrained(model: dict[str, Any]) -> None:
    """Drop instructions to download weights; `weights` of the module names a file."""
    for part in _dictionaries(model):
        start = part.get("init_cfg")
        if isinstance(start, dict) and str(start.get("type", "")).rpartition(".")[2].startswith("Pretrained"):
            part["init_cfg"] = None
        if isinstance(part.get("pretrained"), str):
            part["pretrained"] = None


def _preprocessing(options: Mapping[str, Any]) -> NormalizeAndPad:
    """What mmdetection's preprocessor of plain detectors does; its augmentations of whole batches are left out.

    It expects OpenCV's order of channels, we read RGB: whichever way it turns them, the network wants RGB.
    """
    kind = str(options.get("type", "DetDataPreprocessor")).rpartition(".")[2]
    if kind != "DetDataPreprocessor":
        raise UserError(f"model.config: data_preprocessor {kind!r} is not supported, only DetDataPreprocessor")
    return NormalizeAndPad(
        mean=options.get("mean") or (0.0, 0.0, 0.0),
        std=options.get("std") or (1.0, 1.0, 1.0),
        size_divisor=options.get("pad_size_divisor", 1),
        bgr=not (options.get("bgr_to_rgb") or options.get("rgb_to_bgr")),
        pad_value=options.get("pad_value", 0),
    )
