"""Read weight files of any origin without running what is inside, and load what fits into a model."""

import argparse
import io
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from backbones.attention_keys import exchange_attention
from backbones.keys import BACKBONE_TABLES, BUFFERS, CLASSIFIER, COMPUTED, Table
from backbones.positions import resize_positions

# Where training programs keep the weights; averaged weights first, as timm does.
CONTAINER_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
TORCH_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
FORMATS = ".safetensors, .pth, .ckpt or .pkl"


class CheckpointError(RuntimeError):
    """A weight file that cannot be read, is refused, or does not fit the model: one line naming the file."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file, on the CPU, by their names in it.

    Reads safetensors, torch files (bare, ``{"model": ...}`` of detectron2, DeiT or timm, Lightning's
    ``{"state_dict": ...}``; an average of the weights is preferred where there is one) and detectron2's pickles of
    numpy arrays. ``module.`` of data-parallel training and ``_orig_mod.`` of torch.compile are stripped. Only tensors
    and plain values are ever constructed. Raises CheckpointError for a file that is missing, damaged, something else,
    or that asks to run code.
    """
    path = Path(path)
    return _strip_wrappers(_tensors(path, read_content(path)))


def read_content(path: Path) -> Any:
    """Read whatever a weight file holds, on the CPU; see `read_state_dict` for the formats and errors."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a weight file ({FORMATS}) was expected")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such weight file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if head[8:9] == b"{":
        return _guarded(path, lambda: load_file(path))
    if head.startswith((b"PK", TORCH_LEGACY_MAGIC)):
        # What is not used of a large checkpoint, such as the optimizer's state, is then never read.
        return _guarded(path, lambda: _load_torch(path, mmap=head.startswith(b"PK")))
    if head.startswith(b"\x80"):
        return _guarded(path, lambda: _load_pickle(path))
    raise CheckpointError(f"{path} is not a weight file ({FORMATS}): it starts with {head[:16]!r}")


def rename(state_dict: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Rename keys by the rows (pattern, replacement) of `table`, applied in order; a replacement of None drops the key.

    Raises CheckpointError when two keys get the same name.
    """
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, tensor in state_dict.items():
        new = _renamed_key(key, table)
        if new is None:
            continue
        if new in renamed:
            raise CheckpointError(f"keys {origin[new]} and {key} are both renamed to {new}")
        renamed[new], origin[new] = tensor, key
    return renamed


def _renamed_key(key: str, table: Table) -> str | None:
    for pattern, replacement in table:
        if re.search(pattern, key):
            if replacement is None:
                return None
            key = re.sub(pattern, replacement, key)
    return key


@dataclass(frozen=True)
class LoadReport:
    """What happened to each tensor when `path` was loaded; names are the model's, `unexpected` ones the renamed file's.

    `layout` names the key table that fitted. `mismatched` maps a name to the shapes in the file and in the model; these
    tensors, like the `missing` ones, keep their initial values. `ignored` are names of the file that the model has no
    use for: classifiers and other heads, ranges of Mesa. Tables that a network computes by itself are not mentioned.
    """

    path: Path
    layout: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A table of counts and first names."""
        shapes = [f"{name} {file} → {model}" for name, (file, model) in self.mismatched.items()]
        rows = [("missing", self.missing), ("unexpected", self.unexpected), ("other shape", shapes)]
        rows += [("ignored", self.ignored)] if self.ignored else []
        lines = [f"{self.path} ({self.layout})", f"  {'loaded':<12}{len(self.loaded):>6}"]
        lines += [f"  {what:<12}{len(names):>6}  {first_names(names)}".rstrip() for what, names in rows]
        return "\n".join(lines)


def first_names(names: Sequence[str], count: int = 3) -> str:
    """The first `count` names, comma-separated, and how many more there are."""
    more = f", … {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    tables: Mapping[str, Table] = BACKBONE_TABLES,
    backbone: str = "backbone.",
    min_backbone_match: float = 0.9,
) -> LoadReport:
    """Load a weight file into `model` under the key table, of those in `tables`, by which the most tensors fit.

    Position tables of another window or image size are resized; projections of softmax attention become those of the
    kind of attention that the model has (`backbones.attention_keys`). Tensors of another shape (a head for other
    classes) are left out with a warning. Raises CheckpointError, before anything is changed, when less than
    `min_backbone_match` of the tensors whose names begin with `backbone` (of the whole model if there are none) fit.
    """
    path = Path(path)
    state_dict = rename(read_state_dict(path), BUFFERS)
    target = model.state_dict()
    ranges = ranges_of_mesa(state_dict)
    state_dict = {name: tensor for name, tensor in state_dict.items() if name not in ranges}
    layout, renamed, replaced = _best_layout(state_dict, target, tables)
    fitting: dict[str, Tensor] = {}
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name in renamed.keys() & target.keys():
        tensor = resize_positions(model, name, renamed[name], target[name])
        if tensor.shape == target[name].shape:
            fitting[name] = tensor
        else:
            mismatched[name] = (tuple(tensor.shape), tuple(target[name].shape))
    unused = [name for name in renamed if name not in target and not name.endswith(COMPUTED)]
    ignored = _of_other_heads(unused, target)
    dropped = [name for name in state_dict if _renamed_key(name, tables[layout]) is None]
    report = LoadReport(
        path,
        layout,
        loaded=[name for name in target if name in fitting],
        missing=[name for name in target if name not in renamed and not name.endswith(COMPUTED)],
        unexpected=[name for name in unused if name not in ignored],
        mismatched={name: mismatched[name] for name in target if name in mismatched},
        ignored=[*ignored, *replaced, *dropped, *ranges],
    )
    _require_backbone(report, target, backbone, min_backbone_match)
    if report.mismatched:
        shapes = [f"{name} {file} in the file, {here} here" for name, (file, here) in report.mismatched.items()]
        warnings.warn(f"{path}: not loaded because of their shape: {first_names(shapes)}", stacklevel=2)
    model.load_state_dict(fitting, strict=False)
    return report


def ranges_of_mesa(names: Iterable[str]) -> list[str]:
    """Those of `names` that are running ranges of the official Mesa (arXiv 2111.11124); its networks are plain else.

    ``iteration``, ``clip_val`` and ``shift`` of one layer, or of its operands ``quant1`` and ``quant2``.
    """
    present = set(names := list(names))
    layers = {name.removesuffix("clip_val") for name in names if re.search(r"(^|\.)clip_val$", name)}
    parts = [{layer + part for part in ("iteration", "clip_val", "shift")} for layer in layers]
    ranges = {name for triple in parts if triple <= present for name in triple}
    return [name for name in names if name in ranges]


def _of_other_heads(names: Sequence[str], target: Mapping[str, Tensor]) -> list[str]:
    """Those of `names` that belong to a classifier of which the model has nothing."""
    found = {name: match[0] for name in names if (match := re.match(CLASSIFIER, name))}
    return [name for name, part in found.items() if not any(key.startswith(part) for key in target)]


def _require_backbone(report: LoadReport, target: Mapping[str, Tensor], prefix: str, min_match: float) -> None:
    inside = [name for name in target if name.startswith(prefix)] or list(target)
    wanted = {name for name in inside if not name.endswith(COMPUTED)}
    loaded = len(wanted.intersection(report.loaded))
    if loaded >= min_match * len(wanted):
        return
    absent = [name for name in report.missing if name in wanted]
    absent += [name for name in report.mismatched if name in wanted]
    raise CheckpointError(
        f"{report.path} does not fit: {loaded} of {len(wanted)} backbone tensors found, {min_match:.0%} needed; "
        f"not found: {first_names(absent)}; in the file but unused: {first_names(report.unexpected) or 'nothing'}"
    )


def _best_layout(
    state_dict: Mapping[str, Tensor], target: Mapping[str, Tensor], tables: Mapping[str, Table]
) -> tuple[str, dict[str, Tensor], list[str]]:
    best: tuple[int, str, dict[str, Tensor], list[str]] | None = None
    for layout, table in tables.items():
        try:
            renamed, replaced = exchange_attention(rename(state_dict, table), target)
        except CheckpointError:
            continue  # two keys with one name: the file has another layout
        fit = sum(name in target and tensor.shape == target[name].shape for name, tensor in renamed.items())
        if best is None or fit > best[0]:
            best = fit, layout, renamed, replaced
    if best is None:
        raise CheckpointError("no key table was given")
    return best[1:]


# -- containers -----------------------------------------------------------------------------------------------------


def _guarded(path: Path, load: Callable[[], Any]) -> Any:
    """Run a reader of `path`; whatever goes wrong inside becomes one CheckpointError."""
    try:
        return load()
    except Exception as error:
        # torch and our unpickler both write "GLOBAL module.name" for what they refuse.
        if blocked := re.search(r"GLOBAL ([\w.]+)|Trying to call reduce for unrecognized", str(error)):
            what = blocked[1] or "what it looks up itself"
            raise CheckpointError(
                f"{path} was refused: reading it would call {what}, which is not part of a weight file; "
                "save only tensors (a state dict), best as .safetensors"
            ) from error
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or incomplete: {reason}") from error


class _Unwanted:
    """Stands for what a file holds beside its weights and nobody reads; takes any arguments and state, keeps none."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


UNWANTED = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.logging.message_hub.MessageHub",
    "builtins.getattr",  # what it would return is never called: pickle may call what is allowed by name alone
)
NUMPY_CORE = ("core", "_core")  # before and since numpy 2


def _load_torch(path: Path, mmap: bool) -> Any:
    scalar, rebuild = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    allowed: list[Any] = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in NUMPY_CORE]
    # Training programs keep their arguments and scores beside the weights; these are plain values too. A yacs CfgNode
    # is a dict with flags and becomes an ordered one, whether or not yacs is installed; mmengine's is an ordered dict.
    allowed += [(OrderedDict, name) for name in ("yacs.config.CfgNode", "mmengine.config.config.ConfigDict")]
    # mmengine's log of scalars holds arrays and names functions of its class, which pickle looks up by getattr.
    allowed += [np.ndarray, *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in NUMPY_CORE)]
    allowed += [(_Unwanted, name) for name in UNWANTED]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that constructs arrays, tensors and built-in containers and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a global of the allow-list; raise UnpicklingError for any other."""
        match module.replace("numpy.core", "numpy._core"), name:
            case "numpy._core.multiarray", "_reconstruct":
                return np.empty(0).__reduce__()[0]
            case "numpy._core.multiarray", "scalar":
                return np.float64(0).__reduce__()[0]
            case "numpy._core.numeric", "_frombuffer":
                return _array_from_buffer
            case "numpy", ("ndarray" | "dtype") as which:
                return getattr(np, which)
            case "collections", "OrderedDict":
                return OrderedDict
            case "_codecs", "encode":
                return _encode_latin1
            case "torch._utils", "_rebuild_tensor_v2":
                return torch._utils._rebuild_tensor_v2
            case "torch.storage", "_load_from_bytes":
                return _storage_from_bytes
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _load_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


def _array_from_buffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode_latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _storage_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Follow container keys down to the mapping of names to tensors."""
    while isinstance(content, Mapping):
        inner = next((content[k] for k in CONTAINER_KEYS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a state dict was expected")
    tensors = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value.detach()
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; its keys are {first_names([str(k) for k in content], 5)}")
    return tensors


def _strip_wrappers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict
