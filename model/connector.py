"""Connector: aligns the geometry tokens S of VGGT to the MMDiT.

Learnable queries Q (l x d) read S (l' x d') through cross-attention layers; out come the spatial tokens Q-hat
(B, l, DiT width) that join the transformer's sequence. The paper gives l = 1024 and 8 layers; the rest is ours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mmdit import QKNorm


@dataclass(frozen=True)
class ConnectorConfig:
    """Defaults: the paper's sizes for FLUX.1 Kontext and VGGT-1B."""

    in_dim: int = 2048  # width of S
    out_dim: int = 3072  # width of the MMDiT
    width: int = 3072
    heads: int = 24  # of the MMDiT's head width
    depth: int = 8
    queries: int = 1024  # a square number: the queries form a grid over the picture
    mlp_ratio: float = 2.0  # 0 leaves the MLP out


class CrossAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.norm = QKNorm(width // heads)
        self.proj = zero_init(nn.Linear(width, width))
        self.mlp = None
        if mlp_ratio:
            hidden = int(width * mlp_ratio)
            self.norm2 = nn.LayerNorm(width)
            self.mlp = nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(approximate="tanh"), zero_init(nn.Linear(hidden, width))
            )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(self.norm1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, l, D)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, l', D)
        q, k = self.norm(q, k)
        x = x + self.proj(F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v).transpose(1, 2).flatten(2))
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


def zero_init(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Connector(nn.Module):
    def __init__(self, config: ConnectorConfig):
        super().__init__()
        c = self.config = config
        self.grid = round(c.queries**0.5)
        if self.grid**2 != c.queries:
            raise ValueError(f"The queries form a square grid, but {c.queries} is not a square number.")
        self.query = nn.Parameter(torch.empty(c.queries, c.width))
        nn.init.normal_(self.query, std=0.02)
        self.norm_in = nn.LayerNorm(c.in_dim)  # S is an un-normalised residual stream
        self.proj_in = nn.Linear(c.in_dim, c.width)
        self.blocks = nn.ModuleList(CrossAttentionBlock(c.width, c.heads, c.mlp_ratio) for _ in range(c.depth))
        self.proj_out = nn.Linear(c.width, c.out_dim)

    def forward(self, geometry: Tensor) -> Tensor:
        """Geometry tokens S (B, l', in_dim) -> spatial tokens (B, queries, out_dim)."""
        context = self.proj_in(self.norm_in(geometry.to(self.query.dtype)))
        x = self.query.expand(len(geometry), -1, -1)
        for block in self.blocks:
            x = block(x, context)
        return self.proj_out(x)
