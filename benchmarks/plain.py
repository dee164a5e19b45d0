"""LITv2 as a plain composition of PyTorch operations: what a direct transcription of the paper computes.

Attention is two matrix products and a softmax, depth-wise and deformable convolutions run channel-first on copies of
the tokens. The results are those of our modules; only speed and memory differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from backbones.deformable_merging import DeformableTokenMerging
from backbones.lit_stages import Stage
from backbones.litv2 import ConvFFN, HiLo


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of queries (..., Lq, d) to keys and values (..., Lk, d)."""
    return (q @ k.transpose(-2, -1) * scale).softmax(dim=-1) @ v


class PlainHiLo(HiLo):
    """HiLo with explicit attention matrices, for maps that the window divides."""

    def _attend(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        groups = [self._hi_fi(x)] if self.hi_heads else []
        if self.lo_heads:
            groups.append(self._lo_fi(x))
        return torch.cat(groups, dim=-1)

    def _hi_fi(self, x: Tensor) -> Tensor:
        """Attention within windows."""
        batch, height, width, _ = x.shape
        s, rows, columns = self.window_size, height // self.window_size, width // self.window_size
        windows = self.h_qkv(x).view(batch, rows, s, columns, s, -1).transpose(2, 3)
        qkv = windows.reshape(batch, rows * columns, s * s, 3, self.hi_heads, self.head_dim).permute(3, 0, 1, 4, 2, 5)
        out = attend(qkv[0], qkv[1], qkv[2], self.scale).transpose(2, 3).reshape(batch, rows, columns, s, s, -1)
        return self.h_proj(out.transpose(2, 3).reshape(batch, height, width, -1))

    def _lo_fi(self, x: Tensor) -> Tensor:
        """Attention to the pooled map."""
        batch, height, width, _ = x.shape
        q = self.l_q(x).reshape(batch, height * width, self.lo_heads, self.head_dim).transpose(1, 2)
        if self.window_size > 1:
            x = F.avg_pool2d(x.permute(0, 3, 1, 2).contiguous(), self.window_size).permute(0, 2, 3, 1)
        kv = self.l_kv(x.reshape(batch, -1, x.shape[-1])).view(batch, -1, 2, self.lo_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, self.scale).transpose(1, 2)
        return self.l_proj(out.reshape(batch, height, width, -1))


class PlainConvFFN(ConvFFN):
    """ConvFFN whose convolution runs channel-first."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map (B, H, W, C)."""
        hidden = self.dwconv.dwconv(self.fc1(x).permute(0, 3, 1, 2).contiguous())
        return self.fc2(self.act(hidden.permute(0, 2, 3, 1).contiguous()))


class PlainTokenMerging(DeformableTokenMerging):
    """Token merging by torchvision's deformable convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Merge the tokens of a map (B, H, W, C)."""
        x = x.permute(0, 3, 1, 2).contiguous()
        merged = deform_conv2d(x, self.dconv.conv_offset(x), self.dconv.weight, self.dconv.bias, stride=2)
        return self.act_layer(self.norm_layer(merged)).permute(0, 2, 3, 1).contiguous()


class PlainStage(Stage):
    """Blocks that see the whole batch at once."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks to a map (B, H, W, C)."""
        return self._blocks(x)


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    HiLo: PlainHiLo,
    ConvFFN: PlainConvFFN,
    DeformableTokenMerging: PlainTokenMerging,
    Stage: PlainStage,
}


def make_plain(network: nn.Module) -> nn.Module:
    """Let the modules of a LITv2 compute as a plain composition; weights and names stay."""
    for module in network.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
    return network
