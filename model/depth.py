"""Depth Anything V2: the teacher of the depth supervision (GSS), frozen, used in training only.

In: pictures in [0, 1]. Out: disparity, inverse depth up to an unknown scale and shift, large = near; as a picture,
d_tgt of the paper. A DINOv2 backbone, read after four of its blocks, and a DPT neck and head. Agrees with transformers'
`DepthAnythingForDepthEstimation`; parameters have the names of the -hf files, except the backbone's, which are those of
model/vit.py (model/weights.py: DEPTH_HF).
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vit import ViT, ViTConfig, normalize


@dataclass(frozen=True)
class DepthConfig:
    vit: ViTConfig
    layers: tuple[int, ...]  # backbone blocks read, 0-based (V1 reads the last four)
    neck: tuple[int, ...]  # channels of the maps made of them, at 4, 2, 1 and 1/2 times the patch grid
    fusion: int  # channels while they are fused
    head: int = 32


DEPTH_CONFIGS = {
    "small": DepthConfig(
        ViTConfig(width=384, depth=12, heads=6, registers=0, antialias=False), (2, 5, 8, 11), (48, 96, 192, 384), 64
    ),
    "base": DepthConfig(
        ViTConfig(width=768, depth=12, heads=12, registers=0, antialias=False), (2, 5, 8, 11), (96, 192, 384, 768), 128
    ),
    "large": DepthConfig(
        ViTConfig(width=1024, depth=24, heads=16, registers=0, antialias=False), (4, 11, 17, 23), (256, 512, 1024, 1024), 256
    ),
}


class ResidualUnit(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.convolution2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a finer map to what came from the coarser ones and enlarges the sum to `size`. The coarsest map has nothing to
    be added to it: the files hold a `residual_layer1` for it too, which nothing reads."""

    def __init__(self, channels: int):
        super().__init__()
        self.residual_layer1 = ResidualUnit(channels)
        self.residual_layer2 = ResidualUnit(channels)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        if finer is not None:
            x = x + self.residual_layer1(finer)
        x = F.interpolate(self.residual_layer2(x), size, mode="bilinear", align_corners=True)
        return self.projection(x)


class Neck(nn.Module):
    """DPT neck: backbone maps, each (B, D, h, w), to the output of every fusion step, the last (B, F, 8h, 8w)."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        a, b, c, d = config.neck
        resizes = (
            nn.ConvTranspose2d(a, a, 4, stride=4),
            nn.ConvTranspose2d(b, b, 2, stride=2),
            nn.Identity(),
            nn.Conv2d(d, d, 3, stride=2, padding=1),  # odd sides are rounded up
        )
        projections = [nn.Conv2d(config.vit.width, n, 1) for n in config.neck]
        layers = [nn.Sequential(OrderedDict(projection=p, resize=r)) for p, r in zip(projections, resizes)]
        self.reassemble_stage = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.convs = nn.ModuleList(nn.Conv2d(n, config.fusion, 3, padding=1, bias=False) for n in config.neck)
        self.fusion_stage = nn.ModuleDict({"layers": nn.ModuleList(Fusion(config.fusion) for _ in config.neck)})

    def reassemble(self, maps: list[Tensor]) -> list[Tensor]:
        """Backbone maps to maps of the neck's channels, finest first, each at its own resolution."""
        return [layer(x) for layer, x in zip(self.reassemble_stage["layers"], maps)]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [conv(x) for conv, x in zip(self.convs, self.reassemble(maps))]
        x, *finer = maps[::-1]  # from the coarsest on; each step enlarges to the next map's size, the last to twice its own
        sizes = [m.shape[-2:] for m in finer] + [[2 * side for side in maps[0].shape[-2:]]]
        outputs = []
        for layer, add, size in zip(self.fusion_stage["layers"], [None, *finer], sizes):
            x = layer(x, add, size)
            outputs.append(x)
        return outputs


class Head(nn.Module):
    """(B, F, 8h, 8w) to disparity (B, H, W) of the given size, non-negative."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.conv1 = nn.Conv2d(config.fusion, config.fusion // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(config.fusion // 2, config.head, 3, padding=1)
        self.conv3 = nn.Conv2d(config.head, 1, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = F.interpolate(self.conv1(x), size, mode="bilinear", align_corners=True)
        return F.relu(self.conv3(F.relu(self.conv2(x)))).squeeze(1)


class DepthAnything(nn.Module):
    def __init__(self, config: DepthConfig):
        super().__init__()
        self.config = config
        self.backbone = ViT(config.vit)
        self.neck = Neck(config)
        self.head = Head(config)

    def backbone_maps(self, pixels: Tensor) -> list[Tensor]:
        """ImageNet-normalised pixels (B, 3, H, W) to the chosen blocks' patch tokens as maps, each (B, D, h, w)."""
        grid = [side // self.config.vit.patch_size for side in pixels.shape[-2:]]
        return [tokens.mT.unflatten(-1, grid) for tokens in self.backbone(pixels, self.config.layers)]

    def forward(self, images: Tensor) -> Tensor:
        """RGB in [0, 1], (B, 3, H, W), normalised here, to disparity (B, H, W) >= 0, large = near, without a unit.

        ValueError if H or W is no multiple of the patch size.
        """
        pixels = normalize(images).type_as(self.backbone.cls_token)
        return self.head(self.neck(self.backbone_maps(pixels))[-1], pixels.shape[-2:])


def input_size(height: int, width: int, vit: ViTConfig) -> tuple[int, int]:
    """Height and width at which a picture enters the network, the rule of the -hf files' processor: the side that changes
    least becomes the backbone's picture size, the other keeps the aspect to the nearest multiple, at least one, of the
    patch size (480 x 640: 518 x 686)."""
    scale = min(vit.image_size / height, vit.image_size / width, key=lambda s: abs(1 - s))
    h, w = (max(1, round(side * scale / vit.patch_size)) * vit.patch_size for side in (height, width))
    return h, w


def min_max(disparity: Tensor) -> Tensor:
    """Maps (B, H, W), each scaled by its own minimum and maximum to [-1, 1]; zeros where these differ by less than 1e-6.
    The rule of `scenes.disparity`, which rendered scenes use."""
    low, high = disparity.amin((1, 2), keepdim=True), disparity.amax((1, 2), keepdim=True)
    return torch.where(high - low < 1e-6, 0.0, 2 * (disparity - low) / (high - low) - 1)


@torch.no_grad()
def depth_image(model: DepthAnything, images: Tensor) -> Tensor:
    """d_tgt: pictures (B, H, W, 3) uint8 to disparity pictures (B, H, W) fp32, each from -1 (farthest) to +1 (nearest).

    Disparity as the network gives it, not inverted; min-max, as a small object at the front must not be clipped.
    """
    height, width = images.shape[1:3]
    x = images.permute(0, 3, 1, 2).float() / 255
    size = input_size(height, width, model.config.vit)
    if size != (height, width):
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    disparity = model(x).float().unsqueeze(1)
    return min_max(F.interpolate(disparity, (height, width), mode="bilinear", align_corners=True).squeeze(1))
