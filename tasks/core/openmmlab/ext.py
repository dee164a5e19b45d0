# ruff: noqa: F401  (mmcv looks the operations up here)
"""What `mmcv._ext` is where mmcv's operations are not compiled: the same names and arguments in Python.

mmcv asks for every operation while it is imported, so an operation that is not here becomes a function that raises
`NotImplementedError` when it is called.
"""

from collections.abc import Callable
from typing import Any

from tasks.core.openmmlab.alignment import (
    border_align_backward,
    border_align_forward,
    deform_roi_pool_backward,
    deform_roi_pool_forward,
    rotated_feature_align_backward,
    rotated_feature_align_forward,
)
from tasks.core.openmmlab.deformable import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from tasks.core.openmmlab.focal import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from tasks.core.openmmlab.overlaps import (
    bbox_overlaps,
    box_iou_quadri,
    box_iou_rotated,
    points_in_polygons_forward,
)
from tasks.core.openmmlab.points import (
    ball_query_forward,
    chamfer_distance_backward,
    chamfer_distance_forward,
    furthest_point_sampling_forward,
    furthest_point_sampling_with_dist_forward,
    gather_points_backward,
    gather_points_forward,
    group_points_backward,
    group_points_forward,
    knn_forward,
    three_interpolate_backward,
    three_interpolate_forward,
    three_nn_forward,
)
from tasks.core.openmmlab.pooling import (
    roi_align_backward,
    roi_align_forward,
    roi_pool_backward,
    roi_pool_forward,
)
from tasks.core.openmmlab.reassembly import (
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
    masked_col2im_forward,
    masked_im2col_forward,
    psamask_backward,
    psamask_forward,
)
from tasks.core.openmmlab.rotated import (
    roi_align_rotated_backward,
    roi_align_rotated_forward,
)
from tasks.core.openmmlab.suppression import (
    nms,
    nms_match,
    nms_quadri,
    nms_rotated,
    softnms,
)


def get_compiler_version() -> str:
    """Return what compiled the operations."""
    return "not compiled"


def get_compiling_cuda_version() -> str:
    """Return the CUDA the operations were compiled with."""
    return "not available"


def __getattr__(name: str) -> Callable[..., Any]:
    """Return a function for an operation of mmcv that is not here; calling it raises `NotImplementedError`."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"mmcv's operation {name} is not compiled here and Frugal has no Python form of it: install mmcv with "
            "compiled operations to use it"
        )

    return missing
