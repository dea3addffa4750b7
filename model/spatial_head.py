"""Spatial decoding head: what geometry-aware spatial supervision (GSS) reads from the spatial tokens, training only.

In: the spatial tokens s-hat that leave the MMDiT. Out, per token: a 2 x 2 patch of the VAE latent of the target's depth
(latent decoding supervision, LDS, the method) or a 16 x 16 pixel patch of the depth itself (EDS, the paper's ablation).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class SpatialHeadConfig:
    """Defaults: FLUX.1 Kontext with latent supervision."""

    dim: int = 3072  # width of the MMDiT
    out_dim: int = 64  # LDS: packed latent channels; EDS: 256 pixels of a patch


class SpatialHead(nn.Module):
    def __init__(self, config: SpatialHeadConfig):
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.dim)
        self.fc1 = nn.Linear(config.dim, config.dim)
        self.fc2 = nn.Linear(config.dim, config.out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Spatial tokens (B, K, dim) -> (B, K, out_dim)."""
        return self.fc2(F.silu(self.fc1(self.norm(tokens.to(self.norm.weight.dtype)))))

    @torch.no_grad()
    def start_at(self, mean: Tensor) -> None:
        """Sets the last bias to the mean depth target (out_dim,), so that training starts from it."""
        self.fc2.bias.copy_(mean)
