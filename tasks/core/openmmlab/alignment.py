"""Features read where predicted boxes are: within bins that moved, along borders, at centres and corners."""

import torch
from torch import Tensor

from tasks.core.openmmlab.precision import widen
from tasks.core.openmmlab.sampling import add_samples_gradient, parts_of, points_of_bins, sample


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Pool `rois` (n, 5) of `input` (B, C, H, W) into averages `output` (n, C, h, w) over bins moved by `offset`.

    `offset` is empty or (n, 2, h, w), x first, in parts of `gamma` times the region's size; otherwise as `roi_align`
    with `aligned`. Deformable convolution, arXiv 1703.06211, equation 5.
    """
    features, boxes, moves = widen(input, rois, offset)
    geometry = (output.shape[2:], spatial_scale, sampling_ratio, gamma)
    for rows in parts_of(boxes, _numbers_gathered(features, boxes, *geometry[:3])):
        output[rows] = _pool_moved(features, boxes[rows], _of(moves, rows), *geometry).to(output.dtype)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Write the gradients of `deform_roi_pool_forward` by `input` and `offset`."""
    grad, features, boxes, moves = widen(grad_output, input, rois, offset)
    geometry = (grad.shape[2:], spatial_scale, sampling_ratio, gamma)
    features = features.detach().requires_grad_()
    total = torch.zeros_like(features)
    for rows in parts_of(boxes, _numbers_gathered(features, boxes, *geometry[:3])):
        part = _of(moves, rows).detach().requires_grad_()
        with torch.enable_grad():
            pooled = _pool_moved(features, boxes[rows], part, *geometry)
        leaves = [features, part] if part.numel() else [features]
        grads = torch.autograd.grad(pooled, leaves, grad[rows])
        total += grads[0]
        if part.numel():
            grad_offset[rows] = grads[1].to(grad_offset.dtype)
    grad_input.copy_(total)


def _of(moves: Tensor, rows: Tensor) -> Tensor:
    """Return the moves of some regions, or the empty tensor that stands for none."""
    return moves[rows] if moves.numel() else moves


def _numbers_gathered(
    features: Tensor, boxes: Tensor, size: tuple[int, ...], spatial_scale: float, sampling_ratio: int
) -> int:
    """Return how many numbers the largest of `boxes` gathers."""
    samples = sampling_ratio**2
    if sampling_ratio <= 0 and len(boxes):
        sides = (boxes[:, 3:] - boxes[:, 1:3]).amax(0) * spatial_scale
        samples = int((sides / sides.new_tensor(size[::-1])).ceil().prod())
    return features.shape[1] * size[0] * size[1] * samples


def _pool_moved(
    features: Tensor,
    boxes: Tensor,
    moves: Tensor,
    size: tuple[int, ...],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    starts = boxes[:, 1:3] * spatial_scale - 0.5
    sides = (boxes[:, 3:] - boxes[:, 1:3]) * spatial_scale
    bins = sides / sides.new_tensor(size[::-1])
    counts = bins.ceil().long() if sampling_ratio <= 0 else torch.full_like(bins, sampling_ratio, dtype=torch.long)
    y, has_y = points_of_bins(starts[:, 1], bins[:, 1], size[0], counts[:, 1])  # (n, h, samples), (n, samples)
    x, has_x = points_of_bins(starts[:, 0], bins[:, 0], size[1], counts[:, 0])
    y, x = y[:, :, None, :, None], x[:, None, :, None, :]
    if moves.numel():
        move = gamma * sides[..., None, None] * moves  # (n, 2, h, w)
        x, y = x + move[:, 0, :, :, None, None], y + move[:, 1, :, :, None, None]
    y, x = torch.broadcast_tensors(y, x)
    share = has_y[:, :, None] & has_x[:, None]
    share = share / counts.prod(1).clamp(min=1)[:, None, None]
    samples = sample(features, boxes[:, 0], y.flatten(1), x.flatten(1)).unflatten(1, y.shape[1:])
    return (samples * share[:, None, None, :, :, None]).sum((3, 4)).movedim(-1, 1)


def border_align_forward(input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int) -> None:
    """Write the largest of `pool_size` + 1 samples along every side of `boxes` (B, n, 4) into `output` (B, C, n, 4).

    `input` (B, 4 * C, H, W) has C channels for the top, left, bottom and right each; the first two start from
    (x1, y1), the others from (x2, y2). `argmax_idx` receives the numbers of the samples. BorderDet, arXiv 2007.11056.
    """
    features, corners = widen(input, boxes)
    planes, y, x = _border_points(corners, input.shape[1] // 4, pool_size)  # (B, C, n, 4), (B, C, n, 4, points)
    maps = features.flatten(0, 1)[:, None]  # every channel of every image as an image
    values = sample(maps, planes.flatten(), *(v.flatten(0, -2) for v in (y, x))).view(y.shape)
    best = values.argmax(-1, keepdim=True)
    output.copy_(values.gather(-1, best).squeeze(-1))
    argmax_idx.copy_(best.squeeze(-1))


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    """Add the gradient of `border_align_forward` by `input` to `grad_input` (B, 4 * C, H, W)."""
    grad, corners = widen(grad_output, boxes)
    planes, y, x = _border_points(corners, grad.shape[1], pool_size)
    best = argmax_idx.long()[..., None]
    y, x = (v.gather(-1, best).flatten(0, -2) for v in (y, x))
    total = torch.zeros_like(grad_input, dtype=grad.dtype).flatten(0, 1)[:, None]
    add_samples_gradient(total, grad.flatten()[:, None, None], planes.flatten(), y, x)
    grad_input += total.view(grad_input.shape).to(grad_input)


def _border_points(boxes: Tensor, channels: int, pool_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the plane (image, side, channel) and the samples y and x of all sides.

    Planes are (B, C, n, 4), samples (B, C, n, 4, points).
    """
    batch, count, _ = boxes.shape
    steps = torch.arange(pool_size + 1, device=boxes.device) / pool_size
    x1, y1, x2, y2 = (v[..., None] for v in boxes.unbind(-1))  # (B, n, 1)
    along_x, along_y = (x2 - x1) * steps, (y2 - y1) * steps
    still = torch.zeros_like(along_x)
    x = torch.stack([x1 + along_x, x1 + still, x2 - along_x, x2 + still], dim=2)  # (B, n, 4, points)
    y = torch.stack([y1 + still, y1 + along_y, y2 + still, y2 - along_y], dim=2)
    shape = (batch, channels, count, 4, pool_size + 1)
    image, side, channel = (torch.arange(size, device=boxes.device) for size in (batch, 4, channels))
    planes = (image[:, None, None] * 4 + side) * channels + channel[:, None]  # (B, C, 4)
    planes = planes[:, :, None].expand(shape[:-1])
    return planes, y[:, None].expand(shape), x[:, None].expand(shape)


def rotated_feature_align_forward(
    features: Tensor, best_bboxes: Tensor, output: Tensor, spatial_scale: float, points: int
) -> None:
    """Write `features` (B, C, H, W) plus samples at the box (y, x, w, h, angle) of every pixel into `output`.

    `best_bboxes` is (B, H, W, 5); `points` is 1, the centre, or 5, with the corners. R3Det, arXiv 1908.05612, 3.3.
    """
    maps, boxes = widen(features, best_bboxes)
    batch, y, x = _box_points(boxes * boxes.new_tensor([spatial_scale] * 4 + [1]), points)
    samples = sample(maps, batch, y.flatten(1), x.flatten(1)).unflatten(1, y.shape[1:])  # (B, H, W, points, C)
    output.copy_(maps + samples.sum(-2).movedim(-1, 1))


def rotated_feature_align_backward(
    grad_output: Tensor, best_bboxes: Tensor, grad_input: Tensor, spatial_scale: float, points: int
) -> None:
    """Write the gradient of `rotated_feature_align_forward` by `features` into `grad_input`."""
    grad, boxes = widen(grad_output, best_bboxes)
    batch, y, x = _box_points(boxes * boxes.new_tensor([spatial_scale] * 4 + [1]), points)
    total = grad.clone()
    grads = grad.movedim(1, -1)[..., None, :].expand(*y.shape, grad.shape[1])
    add_samples_gradient(total, grads.flatten(1, 3), batch, y.flatten(1), x.flatten(1))
    grad_input.copy_(total)


def _box_points(boxes: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image (B,) and the points y and x (B, H, W, points) of boxes (B, H, W, 5) in pixels."""
    center_y, center_x, width, height, angle = (v[..., None] for v in boxes.unbind(-1))
    signs = boxes.new_tensor([[0, 0], [1, 1], [-1, 1], [-1, -1], [1, -1]])[:points] / 2
    dx, dy = width * signs[:, 0], height * signs[:, 1]
    y = center_y + dx * angle.sin() + dy * angle.cos()
    x = center_x + dx * angle.cos() - dy * angle.sin()
    return torch.arange(len(boxes), device=boxes.device), y, x
