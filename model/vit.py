"""DINOv2 vision transformer: the image encoder inside VGGT (with registers) and inside Depth Anything (without).

In: ImageNet-normalised RGB pixels (B, 3, H, W), sides multiples of the patch size. Out: patch tokens (B, P, D).
Agrees with facebookresearch/dinov2 `DinoVisionTransformer`; parameters have its names. The one difference between its
users, whether the position table is resampled with antialiasing, is `ViTConfig.antialias`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViTConfig:
    """Defaults: DINOv2 ViT-L/14 with 4 registers, the first stage of VGGT-1B."""

    image_size: int = 518  # pixels; the size at which the position table is used as stored
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    registers: int = 4
    antialias: bool = True  # True in VGGT, False in Depth Anything
    layer_scale: float = 1.0  # initial value
    norm_eps: float = 1e-6


def normalize(images: Tensor) -> Tensor:
    """RGB in [0, 1], (..., 3, H, W), to zero mean and unit variance over ImageNet, in fp32."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images.float() - mean) / std


def rope_2d(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the two-axis rotary embedding, each (N, 2, head_dim / 4) in fp32.

    `positions` is (N, 2), row then column. The first half of a head rotates with the row, the second with the column.
    Always fp32: angles rounded to bf16 are off by up to 0.06 rad on VGGT's 37 x 37 grid.
    """
    pairs = head_dim // 4  # rotations per axis
    frequencies = theta ** -(torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs)
    angles = positions.float().unsqueeze(-1) * frequencies  # (N, 2, pairs)
    return angles.cos(), angles.sin()


def apply_rope_2d(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, H, N, head_dim). Within an axis channel j pairs with channel j + head_dim / 4 (rotate-half)."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, H, N, axis, pairs)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -2).flatten(-3).type_as(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        if qk_norm:
            self.q_norm = nn.LayerNorm(width // heads)
            self.k_norm = nn.LayerNorm(width // heads)
        self.qk_norm = qk_norm
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope_2d(q, rope), apply_rope_2d(k, rope)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale; with `qk_norm` and a rotary table it is VGGT's."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float, layer_scale: float, qk_norm: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, qk_norm)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # (B, P, D), row-major


class ViT(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, width = config, config.width
        grid = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, width))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, config.registers, width))
            nn.init.normal_(self.register_tokens, std=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # in the official files, never read
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, config.norm_eps, config.layer_scale) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def position_table(self, h: int, w: int) -> Tensor:
        """Position table for an h x w grid, (1, 1 + h·w, D): as stored at the native size, else resampled bicubically
        in fp32 to the target size. The class token's entry is never resampled."""
        grid = self.config.image_size // self.config.patch_size
        if (h, w) == (grid, grid):
            return self.pos_embed
        cls, patches = self.pos_embed.float().split((1, grid * grid), dim=1)
        patches = patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (1, D, grid, grid)
        patches = F.interpolate(patches, size=(h, w), mode="bicubic", antialias=self.config.antialias)
        return torch.cat((cls, patches.flatten(2).transpose(1, 2)), 1).type_as(self.pos_embed)

    def forward(self, pixels: Tensor, layers: Sequence[int] = (-1,)) -> list[Tensor]:
        """Patch tokens after the chosen blocks, each through the one shared final norm: a list of (B, P, D).

        `pixels` is (B, 3, H, W), ImageNet-normalised. `layers` are block indices, negative ones from the end; the
        result is in the same order. Blocks after the last chosen one are not run. ValueError if H or W is no multiple
        of the patch size.
        """
        patch, depth = self.config.patch_size, len(self.blocks)
        height, width = pixels.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"Expected picture sides that are multiples of {patch}, found {width} x {height}; resize it first.")
        layers = [range(depth)[layer] for layer in layers]

        x = self.patch_embed(pixels)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        x = x + self.position_table(height // patch, width // patch)
        if self.config.registers:  # they get no position
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), 1)

        outputs = {}
        for i, block in enumerate(self.blocks[: max(layers) + 1]):
            x = block(x)
            if i in layers:
                outputs[i] = self.norm(x)[:, 1 + self.config.registers :]
        return [outputs[i] for i in layers]
