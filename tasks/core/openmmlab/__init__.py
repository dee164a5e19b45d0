"""OpenMMLab's packages without compilers: mmcv's operations in Python, and Frugal's backbones in their registries.

Importing this package is enough, be it in Python or in a configuration of theirs:

    custom_imports = dict(imports=["tasks.core.openmmlab"])
"""

import importlib.util
import sys

from tasks.core.errors import UserError

__all__ = ["install", "missing_extra"]


def install() -> None:
    """Make `import mmcv.ops, mmdet, mmseg` work and register `FrugalBackbone`; doing it again changes nothing.

    Compiled operations are left alone. Without them the module `mmcv._ext` is `tasks.core.openmmlab.ext`, and
    multi-scale deformable attention is Frugal's kernel on every device. Raises `UserError` where the extra
    `openmmlab` is not installed.
    """
    missing = [name for name in ("mmengine", "mmcv") if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_extra(" and ".join(missing))
    if importlib.util.find_spec("mmcv._ext") is None:
        _provide_operations()
    from tasks.core.openmmlab import backbone  # noqa: F401  (registers itself)


def missing_extra(names: str, instead: str = "") -> UserError:
    """The error that packages are not installed; `instead` ends its sentence."""
    return UserError(
        f"{names} cannot be imported: install Frugal with its extra openmmlab, "
        f"pip install 'frugal-vision[openmmlab]'{instead}"
    )


def _provide_operations() -> None:
    import mmcv

    from tasks.core.openmmlab import ext
    from tasks.core.openmmlab.deformable import apply_ms_deform_attn, multi_scale_deformable_attn

    sys.modules["mmcv._ext"] = mmcv._ext = ext
    import mmcv.ops.multi_scale_deform_attn as attention

    # The module of both names calls the first on GPUs and the second on CPUs. Functions of the kernel's own autograd
    # take their place: the first would run every forward pass twice, the second would pass the kernel by.
    attention.MultiScaleDeformableAttnFunction.apply = apply_ms_deform_attn
    attention.multi_scale_deformable_attn_pytorch = multi_scale_deformable_attn


install()
