"""LoRA on the MMDiT (stage 2): W + (alpha / rank) * B A on every linear layer of the blocks except modulation.

It is trained on the fused official modules (`qkv`, `linear1`) and saved unfused under diffusers' names, which
diffusers (`FluxKontextPipeline.load_lora_weights`) and ComfyUI read:

    transformer.<diffusers module>.lora_A.weight  (rank, in)
    transformer.<diffusers module>.lora_B.weight  (out, rank), with alpha / rank multiplied in

A fused module's A is copied to each of its parts and its B cut by rows, so nothing is lost either way.

`load` also reads what other programs write, for any linear layer (modulation, embedders and final layer too):

    prefix             module                             matrices                        alpha
    transformer.       diffusers' name                    lora_A, lora_B                  <module>.alpha or the header's
    lora_unet_         BFL's name with _ for . (kohya)    lora_down, lora_up              <module>.alpha
    diffusion_model.   BFL's name (ComfyUI)               lora_down, lora_up or A, B      <module>.alpha

Without an alpha, alpha = rank.
"""

import json
import math
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.weights import FLUX_DIFFUSERS, read_tensors, save_tensors, translate

READ = ("kohya (lora_unet_<BFL module>.lora_down/up.weight), BFL dotted (diffusion_model.<BFL module>.lora_down/up.weight "
        "or lora_A/B.weight) and PEFT / diffusers (transformer.<diffusers module>.lora_A/B.weight)")
LAYOUTS = {  # the first row whose pattern any key of the file matches says what the file is; None: it is read
    r"\.(query|key)_norm\.scale$|\.norm_(added_)?[qk]\.weight$": "a control LoRA that replaces norm scales",
    r"\.lora_B\.bias$": "a LoRA with biases (lora_B.bias), such as BFL's control LoRAs",
    r"\.dora_scale$|\.lora_magnitude_vector": "a DoRA (dora_scale)",
    r"\.lokr_": "a LoKr file (lokr_*)",
    r"\.hada_": "a LoHa file (hada_*)",
    r"\.lora_mid\.": "a LoRA with a middle factor (lora_mid)",
    r"\.diff(_b)?$": "a file of whole differences (diff, diff_b)",
    r"^lora_unet_": None,
    r"^diffusion_model\.": None,
    r"^lora_transformer_": "a OneTrainer file (lora_transformer_)",
    r"^lycoris_": "a LyCORIS file (lycoris_)",
    r"^base_model\.model\.": "a fal file (base_model.model.)",
    r"^transformer\..+\.lora_(down|up)\.": "diffusers' names with lora_down / lora_up, on whose alpha programs disagree",
    r"^transformer\.": None,
    r"": "a file of bare names, without a prefix",
}
TEXT_ENCODERS = ("lora_te", "text_encoder")  # kohya: lora_te1_, lora_te3_; diffusers: text_encoder.; ComfyUI: text_encoders.
HALVES_SWAPPED = "final_layer.adaLN_modulation.1"  # BFL: rows of shift, then of scale; diffusers: scale first


class LowRank(torch.autograd.Function):
    """y = x W^T + b + s h B^T with h = x A^T, all of one dtype; W and b are frozen. Backward, for the gradient d of y:

        dh = s d B      dx = d W + dh A      dA = dh^T x      dB = s d^T h

    What autograd does by itself, but sums are added up inside the products, so that the low-rank part never exists at y's
    size, which saves time where memory is slow.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        rows = x.flatten(0, -2)
        h = rows @ A.mT
        ctx.save_for_backward(rows, h, W, A, B)
        ctx.scale = scale
        return F.linear(rows, W, b).addmm_(h, B.mT, alpha=scale).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor):
        x, h, W, A, B = ctx.saved_tensors
        rows = d.flatten(0, -2)
        dh = ctx.scale * (rows @ B)
        dx = (rows @ W).addmm_(dh, A).unflatten(0, d.shape[:-1]) if ctx.needs_input_grad[0] else None
        return dx, None, None, dh.mT @ x, ctx.scale * (rows.mT @ h), None


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

    @property
    def weight(self) -> Tensor:  # the MMDiT asks its embedders for their dtype
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        tensors = (x, self.base.weight, self.base.bias, self.lora_A, self.lora_B)
        return LowRank.apply(*(None if t is None else t.to(dtype) for t in tensors), self.scale)

    def merged(self) -> nn.Linear:
        """The plain layer with weight W + scale * B A: the sum in fp32 (or W's dtype, if wider), rounded to it once."""
        W = self.base.weight
        dtype = torch.promote_types(W.dtype, torch.float32)
        delta = self.scale * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))
        self.base.weight = nn.Parameter((W.to(dtype) + delta).to(W.dtype), requires_grad=False)
        return self.base


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer: every (possibly wrapped) linear layer."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, LoRALinear)) and not name.endswith(".base")}


def trained_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the blocks, without modulation."""
    return {name: layer for name, layer in linears(model).items()
            if name.startswith(("double_blocks.", "single_blocks.")) and not name.endswith(("mod.lin", "modulation.lin"))}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in linears(model).items() if isinstance(layer, LoRALinear)}


def file_modules(layout: str, name: str, layer: nn.Linear) -> list[tuple[str, int]]:
    """(name in a file of that layout, output rows) of a BFL module; in diffusers' of each part of a fused one: q, k and v
    take the model's width, mlp the rest."""
    if layout == "lora_unet_":
        return [(layout + name.replace(".", "_"), layer.out_features)]
    if layout == "diffusion_model.":
        return [(layout + name, layer.out_features)]
    parts = [layout + part for part in translate(name, FLUX_DIFFUSERS)]
    rows = [layer.in_features] * (len(parts) - 1)
    return list(zip(parts, rows + [layer.out_features - sum(rows)]))


def swap_halves(B: Tensor) -> Tensor:
    return B.roll(len(B) // 2, 0)


@torch.no_grad()
def inject(model: nn.Module, rank: int, alpha: float) -> None:
    """Freezes the whole MMDiT and wraps the linear layers of its blocks; only the fp32 `lora_A`, `lora_B` learn.

    Raises ValueError when the model already carries a LoRA.
    """
    if lora_layers(model):
        raise ValueError("The model already carries a LoRA; merge it before injecting another one.")
    model.requires_grad_(False)
    for name, layer in trained_linears(model).items():
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
        parts = file_modules("transformer.", name, layer.base)
        B = layer.lora_B * layer.scale
        B = swap_halves(B) if name == HALVES_SWAPPED else B
        for (part, _), B_part in zip(parts, B.split([rows for _, rows in parts])):
            state[f"{part}.lora_A.weight"] = layer.lora_A.detach().clone()
            state[f"{part}.lora_B.weight"] = B_part.contiguous()
    return state


def save(model: nn.Module, path: Path, metadata: dict[str, str] | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Writes `lora_state_dict` as safetensors, atomically. metadata: free text; fp32 keeps the LoRA bit for bit."""
    state = {key: tensor.to(dtype) for key, tensor in lora_state_dict(model).items()}
    if not state:
        raise ValueError("The model carries no LoRA to save; call inject first.")
    save_tensors(path, state, metadata)


@torch.no_grad()
def load(model: nn.Module, path: Path) -> dict[str, str]:
    """Puts a LoRA file on the model, in place of any it carries; returns the file's metadata. The inverse of `save`.

    The scale goes into B, so alpha = rank afterwards. Parts of a fused module that were trained apart (different A) are
    fused exactly by stacking their ranks, B block-diagonal; parts that the file leaves out stay unchanged. Freezes the
    model as `inject` does. Warns of keys it has no use for, text encoders' among them. FileNotFoundError, or ValueError
    for a file of another kind, no usable key, or shapes that do not fit; the model is then as it was.
    """
    state, metadata = read_tensors(path)
    text = [key for key in state if key.startswith(TEXT_ENCODERS)]
    state = {key: tensor for key, tensor in state.items() if key not in text}
    layout = find_layout(state, path)
    peft = read_header(state, metadata, path) if layout == "transformer." else {}
    count, loaded = len(state), {}
    for name, layer in linears(model).items():
        base = layer.base if isinstance(layer, LoRALinear) else layer
        As, Bs = zip(*(take(state, module, rows, base.in_features, peft, path)
                       for module, rows in file_modules(layout, name, base)))
        shared = all(torch.equal(A, As[0]) for A in As)
        A, B = (As[0], torch.cat(Bs)) if shared else (torch.cat(As), torch.block_diag(*Bs))
        B = swap_halves(B) if layout == "transformer." and name == HALVES_SWAPPED else B
        loaded[name] = (base, A, B)
    if not any(len(A) for _, A, _ in loaded.values()):
        raise ValueError(f"{path} adapts no layer of this model: none of its {count} keys ({examples(state)}) names one in "
                         f"a layout that is read: {READ}.")
    if state:
        warnings.warn(f"{path}: {len(state)} of {count} keys belong to no layer of this model and are not used: "
                      f"{examples(state)}.")
    if text:
        warnings.warn(f"{path}: {len(text)} keys adapt text encoders and are ignored; only the transformer is adapted here.")

    model.requires_grad_(False)
    for name, (base, A, B) in loaded.items():
        if len(A):
            layer = LoRALinear(base, rank=len(A), alpha=len(A))
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
            base = layer
        model.set_submodule(name, base)
    return metadata


def find_layout(state: dict[str, Tensor], path: Path) -> str:
    """The prefix of a layout that is read. ValueError that names the kind of any other file."""
    for pattern, what in LAYOUTS.items():
        found = [key for key in state if re.search(pattern, key)]
        if found and what is None:
            return re.match(pattern, found[0]).group()
        if found:
            raise ValueError(f"{path} is {what}: {examples(found)}. That cannot be read; convert it to one of: {READ}.")
    raise ValueError(f"{path} holds no LoRA tensors for the transformer. Expected one of: {READ}.")


def read_header(state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> dict:
    """PEFT's settings of the transformer's LoRA that diffusers keeps in the file's header, or {}."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    if any(key.endswith(".alpha") for key in state):
        raise ValueError(f"{path} states its alpha twice, in alpha tensors and in the header's lora_adapter_metadata; "
                         "diffusers refuses such a file too. Remove one of them.")
    try:
        header = json.loads(metadata["lora_adapter_metadata"])
        peft = {key.removeprefix("transformer."): value for key, value in header.items() if key.startswith("transformer.")}
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"{path}: the header's lora_adapter_metadata is not a JSON object.") from None
    if peft.get("use_dora"):
        raise ValueError(f"{path} is a DoRA (use_dora in its header). It cannot be read.")
    return peft


def take(state: dict[str, Tensor], module: str, rows: int, columns: int, peft: dict, path: Path) -> tuple[Tensor, Tensor]:
    """Takes the LoRA of one module of the file out of `state`: A (rank, columns) and B (rows, rank) in fp32, its scale
    multiplied into B; rank 0 if the file has none."""
    pair = ("lora_A", "lora_B") if any(f"{module}.lora_{x}.weight" in state for x in "AB") else ("lora_down", "lora_up")
    A, B = (state.pop(f"{module}.{factor}.weight", None) for factor in pair)
    if A is None and B is None:
        return torch.empty(0, columns), torch.empty(rows, 0)
    if A is None or B is None:
        raise ValueError(f"{path}: {module} has only one of {pair[0]} and {pair[1]}. Copy or download the file again.")
    if A.ndim != 2 or A.shape[1] != columns or B.shape != (rows, len(A)) or not len(A):
        raise ValueError(f"{path}: the LoRA of {module} has {pair[0]} {tuple(A.shape)} and {pair[1]} {tuple(B.shape)}, but "
                         f"this model needs (rank, {columns}) and ({rows}, rank); it was made for another model.")
    A, B = A.float(), B.float()
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(f"{path}: the LoRA of {module} holds values that are not finite. Copy or download the file again.")
    rank = len(A)
    if f"{module}.alpha" in state:
        alpha = state.pop(f"{module}.alpha").tolist()
    else:  # PEFT's rule: the first pattern that fits the end of the name, else the common value
        name = module.removeprefix("transformer.")
        patterns = (peft.get("alpha_pattern") or {}).items()
        fits = [value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", name)]
        alpha = fits[0] if fits else peft.get("lora_alpha", rank)
    alpha = alpha[0] if isinstance(alpha, list) and len(alpha) == 1 else alpha
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{path}: the alpha of {module} must be one finite number, it is {alpha}.")
    scale = alpha / (math.sqrt(rank) if peft.get("use_rslora") else rank)
    return A, B * scale


def examples(keys) -> str:
    keys = list(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
