"""VGGT aggregator: the 3D visual geometry encoder (3D-VGE) of the method, frozen, its task heads left out.

In: pictures in [0, 1]. Out: S, the geometry tokens that the Connector reads. A DINOv2 stage makes patch tokens; rounds
of attention within each frame and over all frames follow. Agrees with facebookresearch/vggt `Aggregator`; parameters
have the names of VGGT-1B's model.safetensors without the prefix `aggregator.`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .vit import Block, ViT, ViTConfig, normalize, rope_2d


@dataclass(frozen=True)
class VGGTConfig:
    """Defaults: VGGT-1B. The width is that of the DINOv2 stage."""

    vit: ViTConfig = ViTConfig()
    depth: int = 24  # rounds of one frame block and one global block
    heads: int = 16
    mlp_ratio: float = 4.0
    registers: int = 4  # the aggregator's own, besides the camera token
    rope_theta: float = 100.0
    layer_scale: float = 0.01  # initial value
    norm_eps: float = 1e-5

    @property
    def out_width(self) -> int:
        """Width of the output tokens: frame half and global half."""
        return 2 * self.vit.width


class VGGT(nn.Module):
    def __init__(self, config: VGGTConfig):
        super().__init__()
        self.config, width = config, config.vit.width
        self.patch_embed = ViT(config.vit)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                Block(width, config.heads, config.mlp_ratio, config.norm_eps, config.layer_scale, qk_norm=True)
                for _ in range(config.depth)
            )

        self.frame_blocks = blocks()
        self.global_blocks = blocks()
        # dimension 1: the first frame's tokens, the tokens of every later frame
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, width))
        self.register_token = nn.Parameter(torch.empty(1, 2, config.registers, width))
        nn.init.normal_(self.camera_token, std=1e-6)
        nn.init.normal_(self.register_token, std=1e-6)

    def forward(self, images: Tensor, layers: Sequence[int] = (-1,)) -> tuple[list[Tensor], int]:
        """Outputs of the chosen rounds, each (B, S, N, 2·width), and the index at which their patch tokens start.

        `images`: RGB in [0, 1], (B, S, 3, H, W) for B scenes of S frames or (B, 3, H, W) for single pictures (S = 1);
        they are normalised here. `layers` are round indices, negative ones from the end (`range(depth)` for all); other
        rounds are not kept and rounds after the last chosen one are not run. N = 1 camera + registers + patches,
        row-major; channels: frame block, then global block, without a final norm. ValueError if H or W is no multiple
        of the patch size.
        """
        if images.ndim == 4:
            images = images.unsqueeze(1)
        B, S, _, H, W = images.shape
        layers = [range(self.config.depth)[layer] for layer in layers]

        pixels = normalize(images).type_as(self.camera_token).flatten(0, 1)
        (patches,) = self.patch_embed(pixels)  # (B·S, P, D)
        special = torch.cat((self.camera_token, self.register_token), 2)  # (1, 2, 1 + registers, D)
        special = special[:, [0] + [1] * (S - 1)].expand(B, -1, -1, -1).flatten(0, 1)
        x = torch.cat((special, patches), 1)  # (B·S, N, D)
        start, N = special.shape[1], x.shape[1]

        # special tokens sit at (0, 0), patches at (row + 1, column + 1), the same in every frame
        patch = self.config.vit.patch_size
        rows, columns = torch.arange(H // patch, device=x.device), torch.arange(W // patch, device=x.device)
        positions = torch.cat((torch.zeros(start, 2, device=x.device), torch.cartesian_prod(rows, columns) + 1))
        cos, sin = rope_2d(positions, self.config.vit.width // self.config.heads, self.config.rope_theta)
        frame_rope, global_rope = (cos, sin), (cos.repeat(S, 1, 1), sin.repeat(S, 1, 1))

        outputs = {}
        for i in range(max(layers) + 1):
            frame = self.frame_blocks[i](x, frame_rope)
            x = self.global_blocks[i](frame.view(B, S * N, -1), global_rope).view(B * S, N, -1)
            if i in layers:
                outputs[i] = torch.cat((frame, x), -1).view(B, S, N, -1)
        return [outputs[i] for i in layers], start
