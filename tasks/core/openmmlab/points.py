"""Neighbours, samples and features of point clouds (B, N, 3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from tasks.core.openmmlab.precision import widen


def gather_points_forward(
    features: Tensor, indices: Tensor, output: Tensor, b: int, c: int, n: int, npoints: int
) -> None:
    """Write the columns `indices` (B, M) of `features` (B, C, N) into `output` (B, C, M)."""
    output.copy_(features.gather(2, _for_channels(indices, c)))


def gather_points_backward(
    grad_out: Tensor, indices: Tensor, grad_features: Tensor, b: int, c: int, n: int, npoints: int
) -> None:
    """Add the gradient of `gather_points_forward` to `grad_features`."""
    grad_features.scatter_add_(2, _for_channels(indices, c), grad_out)


def group_points_forward(
    features: Tensor, indices: Tensor, output: Tensor, b: int, c: int, n: int, npoints: int, nsample: int
) -> None:
    """Write the columns `indices` (B, M, samples) of `features` (B, C, N) into `output` (B, C, M, samples)."""
    output.copy_(features.gather(2, _for_channels(indices.flatten(1), c)).view(output.shape))


def group_points_backward(
    grad_out: Tensor, indices: Tensor, grad_features: Tensor, b: int, c: int, n: int, npoints: int, nsample: int
) -> None:
    """Add the gradient of `group_points_forward` to `grad_features`."""
    grad_features.scatter_add_(2, _for_channels(indices.flatten(1), c), grad_out.flatten(2))


def _for_channels(indices: Tensor, channels: int) -> Tensor:
    return indices.long()[:, None].expand(-1, channels, -1)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return (B, M, N) of (B, M, 3) and (B, N, 3), by differences: exactly 0 for equal points."""
    return (a[:, :, None] - b[:, None]).square().sum(-1)


def ball_query_forward(
    center_xyz: Tensor,
    xyz: Tensor,
    idx: Tensor,
    b: int,
    n: int,
    m: int,
    min_radius: float,
    max_radius: float,
    nsample: int,
) -> None:
    """Write the first `nsample` points of every ball into `idx` (B, M, nsample), filled up with the first of them.

    A point is in the ball of a centre at a distance from `min_radius` on and below `max_radius`, or 0. A ball without
    points leaves its row alone. PointNet++, arXiv 1706.02413.
    """
    distances = _squared_distances(*widen(center_xyz, xyz))
    inside = (distances == 0) | ((distances >= min_radius**2) & (distances < max_radius**2))
    # Points of the ball first, each kind in its order.
    order = inside.int().argsort(dim=-1, descending=True, stable=True)[..., :nsample]
    taken = inside.gather(-1, order)
    found = torch.where(taken, order, order[..., :1])
    found = torch.cat([found, found[..., :1].expand(-1, -1, nsample - found.shape[-1])], dim=-1)
    idx.copy_(torch.where(taken[..., :1], found.to(idx), idx))


def knn_forward(
    xyz: Tensor, center_xyz: Tensor, idx: Tensor, dist2: Tensor, b: int, n: int, m: int, nsample: int
) -> None:
    """Write the `nsample` nearest points of every centre into `idx` (B, M, nsample), and their squared distances."""
    _write_nearest(center_xyz, xyz, idx, dist2)


def three_nn_forward(target: Tensor, source: Tensor, dist2: Tensor, idx: Tensor, b: int, n: int, m: int) -> None:
    """Write the three nearest `source` points of every target into `idx` (B, N, 3), and their squared distances."""
    _write_nearest(target, source, idx, dist2)


def _write_nearest(centers: Tensor, points: Tensor, idx: Tensor, dist2: Tensor) -> None:
    distances, order = _squared_distances(*widen(centers, points)).sort(dim=-1, stable=True)
    count = idx.shape[-1]
    idx.copy_(order[..., :count])
    dist2.copy_(distances[..., :count])


def three_interpolate_forward(
    features: Tensor, indices: Tensor, weight: Tensor, output: Tensor, b: int, c: int, m: int, n: int
) -> None:
    """Write sums over three columns of `features` (B, C, M), by `indices` and `weight` (B, N, 3), into `output`."""
    columns = features.gather(2, _for_channels(indices.flatten(1), c)).unflatten(2, indices.shape[1:])
    output.copy_((columns * weight[:, None]).sum(-1))


def three_interpolate_backward(
    grad_out: Tensor, indices: Tensor, weight: Tensor, grad_features: Tensor, b: int, c: int, n: int, m: int
) -> None:
    """Add the gradient of `three_interpolate_forward` by `features` to `grad_features`."""
    grads = (grad_out[..., None] * weight[:, None]).flatten(2)
    grad_features.scatter_add_(2, _for_channels(indices.flatten(1), c), grads)


def furthest_point_sampling_forward(points_xyz: Tensor, temp: Tensor, output: Tensor, b: int, n: int, m: int) -> None:
    """Write `m` points into `output` (B, m): the first, then always the one furthest from those taken.

    `temp` (B, N) keeps the squared distance of every point from them.
    """
    (points,) = widen(points_xyz)
    rows = torch.arange(len(points), device=points.device)
    _sample_furthest(lambda last: (points - points[rows, last][:, None]).square().sum(-1), temp, output)


def furthest_point_sampling_with_dist_forward(
    points_dist: Tensor, temp: Tensor, output: Tensor, b: int, n: int, m: int
) -> None:
    """Do as `furthest_point_sampling_forward` with given distances (B, N, N)."""
    rows = torch.arange(len(points_dist), device=points_dist.device)
    _sample_furthest(lambda last: points_dist[rows, last], temp, output)


def _sample_furthest(distances_from: Callable[[Tensor], Tensor], temp: Tensor, output: Tensor) -> None:
    last = torch.zeros(len(output), dtype=torch.long, device=output.device)
    output[:, 0] = 0
    for step in range(1, output.shape[1]):
        temp.copy_(torch.minimum(temp, distances_from(last).to(temp)))
        last = temp.argmax(dim=1)
        output[:, step] = last


def chamfer_distance_forward(
    xyz1: Tensor, xyz2: Tensor, dist1: Tensor, dist2: Tensor, idx1: Tensor, idx2: Tensor
) -> None:
    """Write, for every point (B, N, 2) of one set, the nearest of the other and its squared distance."""
    distances = _squared_distances(*widen(xyz1, xyz2))
    for dist, idx, dim in ((dist1, idx1, 2), (dist2, idx2, 1)):
        nearest, index = distances.min(dim)
        dist.copy_(nearest), idx.copy_(index)


def chamfer_distance_backward(
    xyz1: Tensor,
    xyz2: Tensor,
    idx1: Tensor,
    idx2: Tensor,
    grad_dist1: Tensor,
    grad_dist2: Tensor,
    grad_xyz1: Tensor,
    grad_xyz2: Tensor,
) -> None:
    """Add the gradients of both distances of `chamfer_distance_forward` to those of the points."""
    for near, far, idx, grad, grad_near, grad_far in (
        (xyz1, xyz2, idx1, grad_dist1, grad_xyz1, grad_xyz2),
        (xyz2, xyz1, idx2, grad_dist2, grad_xyz2, grad_xyz1),
    ):
        index = idx.long()[..., None].expand(-1, -1, near.shape[-1])
        pull = 2 * grad[..., None] * (near - far.gather(1, index))
        grad_near += pull
        grad_far.scatter_add_(1, index, -pull)
