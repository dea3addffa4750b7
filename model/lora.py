"""LoRA on the MMDiT (stage 2): W + (alpha / rank) * B A on every linear layer of the blocks except modulation.

It is trained on the fused official modules (`qkv`, `linear1`) and saved unfused under diffusers' names, which
diffusers (`FluxKontextPipeline.load_lora_weights`) and ComfyUI read:

    transformer.<diffusers module>.lora_A.weight  (rank, in)
    transformer.<diffusers module>.lora_B.weight  (out, rank), with alpha / rank multiplied in

A fused module's A is copied to each of its parts and its B cut by rows, so nothing is lost either way.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.weights import FLUX_DIFFUSERS, read_tensors, save_tensors, translate


class LoRALinear(nn.Module):
    """A frozen linear layer and a learned low-rank difference; equal to the layer itself until B is trained."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in the LoRA paper's code

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return self.base(x) + F.linear(F.linear(x, A), B) * self.scale

    def merged(self) -> nn.Linear:
        """The plain layer with weight W + scale * B A: the sum in fp32 (or W's dtype, if wider), rounded to it once."""
        W = self.base.weight
        dtype = torch.promote_types(W.dtype, torch.float32)
        delta = self.scale * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))
        self.base.weight = nn.Parameter((W.to(dtype) + delta).to(W.dtype), requires_grad=False)
        return self.base


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer: the (possibly wrapped) linear layers of the blocks, without modulation."""
    found = {}
    for name, module in model.named_modules():
        if name.startswith(("double_blocks.", "single_blocks.")) and isinstance(module, (nn.Linear, LoRALinear)):
            if not name.endswith(("mod.lin", "modulation.lin", ".base")):
                found[name] = module
    return found


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in block_linears(model).items() if isinstance(m, LoRALinear)}


def diffusers_parts(name: str, layer: nn.Linear) -> list[tuple[str, int]]:
    """(diffusers module, output rows) for each part of a BFL module: q, k and v take the model's width, mlp the rest."""
    parts = translate(name, FLUX_DIFFUSERS)
    rows = [layer.in_features] * (len(parts) - 1)
    return list(zip(parts, rows + [layer.out_features - sum(rows)]))


@torch.no_grad()
def inject(model: nn.Module, rank: int, alpha: float) -> None:
    """Freezes the whole MMDiT and wraps the linear layers of its blocks; only the fp32 `lora_A`, `lora_B` learn.

    Raises ValueError when the model already carries a LoRA.
    """
    if lora_layers(model):
        raise ValueError("The model already carries a LoRA; merge it before injecting another one.")
    model.requires_grad_(False)
    for name, layer in block_linears(model).items():
        model.set_submodule(name, LoRALinear(layer, rank, alpha))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds every difference into its base weight and unwraps it, one layer at a time: plain official modules again.

    A bf16 base stays bf16, so each merged weight is rounded to 8 bits once.
    """
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merged())


@torch.no_grad()
def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA in fp32 under diffusers' names, unfused, the scale folded into B."""
    state = {}
    for name, layer in lora_layers(model).items():
        parts = diffusers_parts(name, layer.base)
        for (part, _), B in zip(parts, (layer.lora_B * layer.scale).split([rows for _, rows in parts])):
            state[f"transformer.{part}.lora_A.weight"] = layer.lora_A.detach().clone()
            state[f"transformer.{part}.lora_B.weight"] = B.contiguous()
    return state


def save(model: nn.Module, path: Path, metadata: dict[str, str] | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Writes `lora_state_dict` as safetensors, atomically. metadata: free text; fp32 keeps the LoRA bit for bit."""
    state = {key: tensor.to(dtype) for key, tensor in lora_state_dict(model).items()}
    if not state:
        raise ValueError("The model carries no LoRA to save; call inject first.")
    save_tensors(path, state, metadata)


@torch.no_grad()
def load(model: nn.Module, path: Path) -> dict[str, str]:
    """Puts a LoRA file in the layout of `save` on the model, in place of any it carries; returns the file's metadata.

    The inverse of `save`: rank from the file, alpha = rank. Parts of a fused module that were trained apart (different
    A) are fused exactly by stacking their ranks, B block-diagonal; parts that the file leaves out stay unchanged.
    Freezes the model as `inject` does. FileNotFoundError, or ValueError for keys or shapes that do not fit.
    """
    state, metadata = read_tensors(path)
    loaded = {}
    for name, layer in block_linears(model).items():
        base = layer.base if isinstance(layer, LoRALinear) else layer
        factors = []
        for part, rows in diffusers_parts(name, base):
            A = state.pop(f"transformer.{part}.lora_A.weight", torch.empty(0, base.in_features))
            B = state.pop(f"transformer.{part}.lora_B.weight", torch.empty(rows, 0))
            if A.shape[1] != base.in_features or B.shape != (rows, len(A)):
                raise ValueError(f"{path}: the LoRA of {part} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, but "
                                 f"this model needs (rank, {base.in_features}) and ({rows}, rank); it was made for "
                                 "another model.")
            factors.append((A.float(), B.float()))
        As, Bs = zip(*factors)
        shared = all(torch.equal(A, As[0]) for A in As)
        A, B = (As[0], torch.cat(Bs)) if shared else (torch.cat(As), torch.block_diag(*Bs))
        loaded[name] = (base, A, B)
    if state:
        raise ValueError(f"{path}: {len(state)} keys belong to no layer that takes a LoRA here, the first is "
                         f"{next(iter(state))}; expected transformer.<diffusers module>.lora_A.weight and .lora_B.weight.")
    if not any(len(A) for _, A, _ in loaded.values()):
        raise ValueError(f"{path} holds no LoRA tensors.")

    model.requires_grad_(False)
    for name, (base, A, B) in loaded.items():
        if len(A):
            layer = LoRALinear(base, rank=len(A), alpha=len(A))
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            base = layer
        model.set_submodule(name, base)
    return metadata
