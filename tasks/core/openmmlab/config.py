"""Configuration files of OpenMMLab as plain values: dictionaries of models that can be checked, changed and saved."""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.core.errors import UserError
from tasks.core.openmmlab import missing_extra

# Packages whose classes a model may name by their full path; other names have to be registered.
TRUSTED = ("mmdet.models.", "mmseg.models.", "mmcv.cnn.", "mmcv.ops.", "mmengine.model.", "torch.nn.")
SCOPED = r"(mmdet|mmseg|mmcv|mmengine)\.\w+"  # a registered name of another package than the configuration's


def read_model(config: str, package: str, allow_code: bool) -> dict[str, Any]:
    """The dictionary `model` of a configuration file of `package` (mmdet or mmseg), all of its values plain.

    Reading the file executes it. Raises UserError unless that is allowed or the file is one of the package's own
    (``mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py``), and for a file without such a dictionary.
    """
    own = config.startswith(f"{package}::")
    path = _installed(config, package) if own else Path(config)
    if not path.is_file():
        raise UserError(f"model.config {config}: no such file; expected a configuration of {package} (.py)")
    if not (own or allow_code):
        raise UserError(
            f"model.config {config}: a configuration of {package} is a Python program that runs when it is read; "
            "if you trust it, say so with --model.allow_config_code true"
        )
    from mmengine.config import Config

    try:
        content = Config.fromfile(str(path)).to_dict()
    except Exception as error:  # whatever a program may raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model.config {config}: cannot be read: {reason}") from error
    model = content.get("model")
    if not isinstance(model, Mapping) or "type" not in model:
        raise UserError(f"model.config {config}: has no dictionary 'model' with a 'type'")
    return _plain(model)


def require_trusted(model: Mapping[str, Any]) -> None:
    """Raise UserError if `model` names a class by a path outside the packages of which models are made."""
    for part in dictionaries(dict(model)):
        name = part.get("type")
        if isinstance(name, str) and "." in name and not (name.startswith(TRUSTED) or re.fullmatch(SCOPED, name)):
            raise UserError(f"model.config: class {name!r} is outside the packages {', '.join(TRUSTED)}")


def forget_pretrained(model: dict[str, Any]) -> None:
    """Drop instructions to download weights: a module's `weights` names a file, which is read safely."""
    for part in dictionaries(model):
        start = part.get("init_cfg")
        if isinstance(start, Mapping) and str(start.get("type", "")).rpartition(".")[2].startswith("Pretrained"):
            part["init_cfg"] = None
        if isinstance(part.get("pretrained"), str):
            part["pretrained"] = None


def dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary inside `value`, through dictionaries and lists."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dictionaries(inner)


def merge(model: dict[str, Any], options: Mapping[str, Any], path: str = "model.options") -> None:
    """Put the leaves of nested `options` into `model`; raises UserError where there is no such group to open."""
    for name, value in options.items():
        inner = model.get(name)
        if isinstance(value, Mapping) and "type" not in value:
            if not isinstance(inner, dict):
                raise UserError(f"{path}.{name}: there is no such group; expected one of {', '.join(_groups(model))}")
            merge(inner, value, f"{path}.{name}")
        else:
            model[name] = _plain(value)


def _groups(model: Mapping[str, Any]) -> Sequence[str]:
    return [name for name, value in model.items() if isinstance(value, dict)]


def _installed(config: str, package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise missing_extra(package)
    folder = Path(spec.origin).parent / ".mim" / "configs"
    path = folder / config.removeprefix(f"{package}::")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"model.config {config}: leads out of the configurations of {package}")
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
