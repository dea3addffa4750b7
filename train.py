"""Train SpatialDiff.

    python train.py --stage 1      the Connector alone, on the rendered world with the shipped miniature
    python train.py --stage 2      LoRA, Connector and spatial head with geometry-aware supervision
    python train.py --stage base   the miniature's own base, from nothing: autoencoder, VGGT, text encoders and MMDiT

With the official files (weights.md): python train.py --stage 1 --weights weights --output runs/kontext1, then
python train.py --stage 2 --weights weights --checkpoint runs/kontext1.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import scenes
from data import resize, save_png, side_by_side
from model import lora
from model.mmdit import MMDiT
from model.spatial_head import SpatialHead
from model.text import build_word_tokenizer
from model.vae import AutoEncoder
from model.vggt import VGGT
from model.weights import Source, digest, read_tensors, save_tensors, to_json
from spatialdiff import (
    PRESETS, Condition, Editor, Preset, SpatialDiff, build, choose_device, choose_preset, decode_image, default_folders,
    depth_target, encode_geometry, encode_image, encode_text, find_frozen, find_learned, load_model, load_part,
    load_tokenizers, losses, make_noise, sample, sample_times, to_uint8, to_unit,
)
from triples.encode import FileTriples
from triples.world import SHARD, SceneTriples, World, disparity, encode_scenes, load_images, mirror_shards, scene_shards

LOG_EVERY = 50
TIME_BINS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 1.0)  # the loss is logged in each


@dataclass(frozen=True)
class Recipe:
    """How one stage is optimised. Defaults: stages 1 and 2 of `kontext` (ours; the paper's notes give none)."""

    steps: int = 20_000
    batch: int = 8  # samples an optimiser step, by accumulation of `micro`
    micro: int = 1
    lr: float = 1e-4
    muon_lr: float = 0.0  # matrices inside the blocks learn by Muon with this rate; 0: AdamW for everything
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: int = 500
    decay_from: float = 1.0  # share of the steps after which the rate falls to 0.02 of itself along a cosine
    clip: float = 1.0
    ema: float = 0.0  # 0: off


# The miniature's come from trials on two CPU cores.
RECIPES = {
    ("kontext", "1"): Recipe(steps=10_000),
    ("kontext", "2"): Recipe(steps=20_000),
    ("tiny", "overfit"): Recipe(1500, 16, 16, 3e-3, 0.0, (0.9, 0.98), 0.0, 50, 0.5, 1.0, 0.98),
    ("nano", "vae"): Recipe(2500, 8, 8, 2e-3, 1e-3, (0.9, 0.98), 0.0, 50, 0.4, 1.0, 0.998),
    ("nano", "decoder"): Recipe(1200, 8, 8, 1e-3, 5e-4, (0.9, 0.98), 0.0, 50, 0.4, 1.0, 0.998),
    ("nano", "vggt"): Recipe(1200, 16, 16, 1e-3, 2e-3, (0.9, 0.98), 0.0, 50, 0.6, 1.0, 0.99),
    ("nano", "mmdit"): Recipe(16_000, 32, 32, 1e-3, 2e-3, (0.9, 0.98), 0.1, 60, 0.6, 1.0, 0.998),
    ("nano", "1"): Recipe(300, 32, 32, 1e-3, 0.0, (0.9, 0.99), 0.01, 40, 0.5, 1.0, 0.99),
    ("nano", "2"): Recipe(1200, 32, 32, 1e-3, 0.0, (0.9, 0.99), 0.01, 40, 0.4, 1.0, 0.998),
}


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), for matrices and, flattened to (out, in * k * k), filters.

    The update's size matches AdamW's: 0.2 * sqrt(larger side) (Moonlight). Matrices of equal shape go through the
    Newton-Schulz iteration together.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype  # of the iteration; bf16 is enough where the device multiplies it fast

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple, list] = {}
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(buffer, group["momentum"]).flatten(1)  # Nesterov
                    shapes.setdefault(tuple(update.shape), []).append((p, update))
            for shape, entries in shapes.items():
                updates = orthogonal(torch.stack([update for _, update in entries]).to(self.dtype)).float()
                for (p, _), update in zip(entries, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of the SVD of each matrix of x (n, rows, columns); coefficients as published with Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


# ---- what is trained: a task has the modules that learn, a loss for every batch, a sheet of samples, files at the end -


def batch_indices(count: int, batch: int, index: int, seed: int) -> Tensor:
    """Batch number `index` of endlessly shuffled epochs over `count` samples: a function of its number alone."""
    position = range(index * batch, (index + 1) * batch)
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for epoch in {p // count for p in position}
    }
    return torch.stack([orders[p // count][p % count] for p in position])


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the gradients of two pictures (B, C, H, W), down plus across."""
    d = a - b
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()


class VAETask:
    """Base, first part: the autoencoder, on pictures and (a quarter of each batch) depth maps. `decoder_only`:
    the decoder learns, from latents without noise; they stay what they are, and so does every network that knows them."""

    def __init__(self, preset: Preset, shards: list[Path], vae: AutoEncoder, device: torch.device, decoder_only: bool = False):
        self.preset, self.device, self.vae, self.decoder_only = preset, device, vae, decoder_only
        self.images, self.depths = load_images(shards)
        self.count = len(self.images)
        self.modules = nn.ModuleDict({"vae": self.vae})
        self.vae.encoder.requires_grad_(not decoder_only)

    def muon(self, name: str) -> bool:
        return ".conv_in." not in name and ".conv_out." not in name

    def pictures(self, indices: Tensor) -> Tensor:
        return to_unit(self.images[indices].to(self.device)) * 2 - 1

    def loss(self, i: Tensor, generator: torch.Generator) -> tuple[Tensor, dict]:
        quarter = len(i) // 4
        maps = self.depths[i[:quarter], None].to(self.device).float().expand(-1, 3, -1, -1)
        x = torch.cat((maps, self.pictures(i[quarter:])))
        mean, logvar = (m.float() for m in self.vae.encode_moments(x))
        logvar = logvar.clamp(-20, 10)
        noise = torch.randn(mean.shape, generator=generator).to(self.device)
        y = self.vae.decoder(mean if self.decoder_only else mean + (0.5 * logvar).exp() * noise).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = (y - x).abs().mean() + 0.5 * gradient_l1(y, x) + 10 * F.mse_loss(y, x) + 1e-3 * kl
        return loss, {"psnr": -10 * math.log10(F.mse_loss(y[quarter:], x[quarter:]).item() / 4), "kl": kl.item()}

    @torch.no_grad()
    def sheet(self) -> list:
        x = self.pictures(torch.arange(6))
        y = self.vae.decoder(self.vae.encode_moments(x)[0])
        return list(torch.cat((to_uint8(x), to_uint8(y)), dim=1).cpu().numpy())

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """New latents get unit scale first: the factor goes into the two layers beside the latent."""
        if self.decoder_only:
            return save_part(folder, "vae", self.vae)
        parts = self.pictures(torch.arange(256)).split(16)
        std = torch.cat([self.vae.encode_moments(part)[0] for part in parts]).std()
        z = self.preset.vae.z_channels
        self.vae.encoder.conv_out.weight[:z] /= std
        self.vae.encoder.conv_out.bias[:z] /= std
        self.vae.decoder.conv_in.weight *= std
        save_part(folder, "vae", self.vae)


class VGGTTask:
    """Base, second part: the small VGGT learns log depth through a linear head that is thrown away."""

    def __init__(self, preset: Preset, shards: list[Path], vggt: VGGT, device: torch.device):
        self.device, self.vggt = device, vggt
        self.images, self.depths = load_images(shards, raw_depth=True)
        self.count = len(self.images)
        self.patch = preset.vggt.vit.patch_size
        self.head = nn.Sequential(nn.LayerNorm(preset.vggt.out_width), nn.Linear(preset.vggt.out_width, self.patch**2))
        self.head.to(device)
        self.modules = nn.ModuleDict({"vggt": self.vggt, "head": self.head})

    def muon(self, name: str) -> bool:
        return "blocks" in name

    def predict(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true log depth (B, 1, H, W)."""
        x = to_unit(self.images[i].to(self.device))
        (tokens,), start = self.vggt(x)
        patches = self.head(tokens[:, 0, start:].float())  # (B, P, patch^2)
        predicted = F.fold(patches.mT.float(), x.shape[-2:], self.patch, stride=self.patch) + 2.0  # e^2: a mean depth
        return predicted, self.depths[i, None].to(self.device).float().log()

    def loss(self, i: Tensor, generator: torch.Generator) -> tuple[Tensor, dict]:
        predicted, truth = self.predict(i)
        loss = (predicted - truth).abs().mean() + 0.5 * gradient_l1(predicted, truth)
        return loss, {"absrel": ((predicted - truth).exp() - 1).abs().mean().item()}

    @torch.no_grad()
    def sheet(self) -> list:
        depth = torch.cat(self.predict(torch.arange(6)), dim=2)
        return list(to_uint8((2.0 - depth).expand(-1, 3, -1, -1)).cpu().numpy())

    def save(self, folder: Path) -> None:
        save_part(folder, "vggt", self.vggt)


class FlowTask:
    """The edit itself. What learns: base: text encoders and MMDiT; stage 1: the Connector; stage 2: LoRA, Connector and
    spatial head; overfit: everything."""

    def __init__(self, editor: Editor, triples: SceneTriples | FileTriples, stage: str, watch: list[scenes.Pair] | None):
        """watch: pairs of the sample sheet; None: the first triples, and the editor holds no encoders."""
        self.editor, self.triples, self.stage, self.watch = editor, triples, stage, watch
        self.count, self.device = len(triples), editor.model.mmdit.img_in.weight.device
        model, preset = editor.model, editor.preset
        parts = {"t5": editor.t5, "clip": editor.clip, "mmdit": model.mmdit}
        spatial = {"connector": model.connector, "spatial_head": model.spatial_head}
        mean_depth = triples.mean_depth()
        if model.connector is None:
            spatial = {}
        elif mean_depth is None:
            del spatial["spatial_head"]
        else:
            model.spatial_head.start_at(mean_depth)
        if stage == "1":
            parts = {}
        elif stage == "2":
            parts = {"mmdit": model.mmdit}
        if stage != "base":
            parts |= spatial
        self.modules = nn.ModuleDict(parts).requires_grad_(True)
        if stage == "2":
            lora.inject(model.mmdit, preset.lora_rank, preset.lora_alpha)

    def muon(self, name: str) -> bool:
        return (".layers." in name or "block" in name) and not any(k in name for k in ("mod.lin", "modulation", "bias"))

    def condition(self, i: Tensor) -> tuple[Condition, Tensor, Tensor | None]:
        """Of these samples: condition, target latents and what the spatial head must say."""
        editor, batch = self.editor, self.triples.batch(i)
        ready = lambda x: None if x is None else x.to(self.device).float()
        if batch.text is None:
            with torch.set_grad_enabled("t5" in self.modules):
                batch.text = encode_text(editor.t5, editor.clip, editor.tokenizers, batch.instructions, editor.preset)
        txt, pooled = (x.to(self.device) for x in batch.text)
        cond = Condition(txt, pooled, ready(batch.reference), ready(batch.geometry), batch.grid)
        return cond, ready(batch.target), ready(batch.depth)

    def loss(self, i: Tensor, generator: torch.Generator) -> tuple[Tensor, dict]:
        editor, (cond, target, depth) = self.editor, self.condition(i)
        noise = torch.randn(target.shape, generator=generator).to(self.device)
        t = sample_times(editor.preset, len(i), target.shape[1], generator).to(self.device)
        flow, gss = losses(editor.model, cond, target, noise, t, depth)
        logs = {"flow": flow.mean().item()} | ({} if depth is None else {"gss": gss.item()})
        for low, high in zip(TIME_BINS, TIME_BINS[1:]):
            inside = flow.detach()[(t > low) & (t <= high)]
            logs[f"{low}<t<{high}"] = inside.mean().item() if len(inside) else None
        return flow.mean() + editor.preset.gss_weight * gss, logs

    def sheet(self) -> list:
        """Columns of reference, edit, truth."""
        if self.watch is None:
            return self.triples_sheet()
        ref, tgt = (torch.from_numpy(np.stack([getattr(p, name) for p in self.watch])) for name in ("ref", "tgt"))
        edit = self.editor.edit(ref, [p.instruction for p in self.watch], [p.seed for p in self.watch])
        return list(torch.cat((ref, torch.from_numpy(edit), tgt), dim=1).numpy())

    @torch.no_grad()
    def triples_sheet(self) -> list:
        """As `sheet`, of the first triples of a file. The autoencoder is loaded for this alone."""
        editor, columns = self.editor, []
        vae = load_part(editor.preset, editor.sources["vae"], self.device, editor.model.mmdit.img_in.weight.dtype)
        for i in range(min(6, self.count)):
            cond, target, _ = self.condition(torch.tensor([i]))
            noise = make_noise(editor.preset, cond.grid, [i]).to(self.device)
            tokens, _ = sample(editor.model, cond, noise, editor.preset.steps, editor.preset.guidance_sample)
            rows = [decode_image(vae, x, cond.grid)[0].cpu().numpy() for x in (cond.reference, tokens, target)]
            column = np.concatenate(rows)
            height = 3 * editor.preset.side
            columns.append(resize(column, height, round(column.shape[1] * height / len(column))))
        return columns

    def save(self, folder: Path) -> None:
        facts = {"preset": self.editor.preset.name, "stage": self.stage}
        if self.stage == "base":
            self.editor.tokenizers[0].save(str(folder / "tokenizer.json"))
        for name, module in self.modules.items():
            if name == "mmdit" and self.stage == "2":
                lora.save(module, folder / "lora.safetensors", facts, torch.bfloat16)
            else:
                save_part(folder, name, module, facts)


def save_part(folder: Path, part: str, module: nn.Module, metadata: dict[str, str] | None = None) -> None:
    save_tensors(folder / f"{part}.safetensors", {k: v.bfloat16() for k, v in module.state_dict().items()}, metadata)


# ---- the loop -------------------------------------------------------------------------------------------------------


def rate(recipe: Recipe, step: int) -> float:
    """Factor on the learning rates: linear warm-up, constant, cosine to 0.02 from `decay_from` of the steps."""
    start = recipe.decay_from * recipe.steps
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if step <= start:
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - start) / (recipe.steps - start)))


def optimizers(task, params: dict[str, nn.Parameter], recipe: Recipe, amp: bool) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in params.items() if recipe.muon_lr and p.ndim >= 2 and task.muon(n)]
    others = [p for p in params.values() if all(p is not m for m in matrices)]
    made = [torch.optim.AdamW(others, recipe.lr, recipe.betas, weight_decay=recipe.weight_decay, fused=True)]
    if matrices:
        made.append(Muon(matrices, recipe.muon_lr, 0.95, recipe.weight_decay, torch.bfloat16 if amp else torch.float32))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return made


def save_checkpoint(path: Path, step: int, seconds: float, facts: dict, params: dict, ema: dict, opts: list) -> None:
    tensors = {f"param.{n}": p for n, p in params.items()} | {f"ema.{n}": p for n, p in ema.items()}
    for o, optimizer in enumerate(opts):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"opt.{o}.{i}.{key}": value for key, value in state.items()}
    save_tensors(path, tensors, {"step": str(step), "seconds": f"{seconds:.1f}", "facts": to_json(facts)})


def load_checkpoint(path: Path, facts: dict, params: dict, ema: dict, opts: list) -> tuple[int, float]:
    """Restores everything, bit for bit; returns the steps done and the seconds they took. ValueError if the run was started differently."""
    tensors, metadata = read_tensors(path)
    then, now = json.loads(metadata.get("facts", "{}")), json.loads(to_json(facts))
    if then != now:
        differing = ", ".join(sorted(key for key in then | now if then.get(key) != now.get(key)))
        raise ValueError(f"{path} belongs to another run: it differs in {differing}. Give the same options, or another --output.")
    with torch.no_grad():
        for prefix, group in (("param", params), ("ema", ema)):
            for name, tensor in group.items():
                tensor.copy_(tensors[f"{prefix}.{name}"])
    for o, optimizer in enumerate(opts):
        state: dict[int, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"opt.{o}."):
                _, _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), float(metadata.get("seconds", 0))


@torch.no_grad()
def swap(params: dict[str, Tensor], ema: dict[str, Tensor]) -> None:
    for name, average in ema.items():
        average_was = average.clone()
        average.copy_(params[name])
        params[name].copy_(average_was)


def train(task, recipe: Recipe, out: Path, facts: dict, args: argparse.Namespace) -> bool:
    """Trains `task.modules`; writes log, sheets and checkpoints to `out`. False if that was done already."""
    params = {n: p for n, p in task.modules.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in params.items()} if recipe.ema else {}
    opts = optimizers(task, params, recipe, args.amp)
    checkpoint = out / "checkpoint.safetensors"
    resumed = args.resume and checkpoint.is_file()
    done, before = load_checkpoint(checkpoint, facts, params, ema, opts) if resumed else (0, 0.0)
    log = continue_log(out / "log.jsonl", done)
    accumulate = recipe.batch // recipe.micro
    window, began = [], time.time()
    seconds = lambda: before + time.time() - began

    for step in range(done, recipe.steps):
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate(recipe, step)
        for micro in range(accumulate):
            number = step * accumulate + micro  # data order, noise and times depend on this alone: resuming is exact
            generator = torch.Generator().manual_seed(args.seed * 1_000_000_007 + number)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                loss, logs = task.loss(batch_indices(task.count, recipe.micro, number, args.seed), generator)
            (loss / accumulate).backward()
            window.append({"loss": loss.item(), **logs})
        norm = torch.nn.utils.clip_grad_norm_(params.values(), recipe.clip)
        if not norm.isfinite():
            raise ValueError(f"Step {step + 1}: the gradient is not finite. The last checkpoint in {out} is whole; a lower --rate may help.")
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        if ema:
            beta = min(recipe.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.values()), list(params.values()), 1 - beta)

        last = step + 1 == recipe.steps
        if (step + 1) % LOG_EVERY == 0 or last:
            means = {key: mean([w[key] for w in window if w.get(key) is not None]) for key in window[-1]}
            log.write(json.dumps({"step": step + 1, "seconds": round(seconds(), 1), **means}) + "\n")
            log.flush()
            pace = (time.time() - began) / (step + 1 - done)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in means.items() if value is not None and "<" not in key)
            print(f"step {step + 1}/{recipe.steps}  {shown}  {pace:.2f} s/step  {pace * (recipe.steps - step - 1) / 60:.1f} min left")
            window = []
        if (step + 1) % args.save_every == 0 or last:
            save_checkpoint(checkpoint, step + 1, seconds(), facts, params, ema, opts)
            swap(params, ema)
            task.modules.eval()
            save_png(out / f"sheet-{step + 1:06}.png", side_by_side(task.sheet()))
            if args.keep:
                task.save(out / f"step-{step + 1:06}")
            task.modules.train()
            swap(params, ema)
    swap(params, ema)  # the averages are the result
    task.modules.eval()
    return done < recipe.steps


def continue_log(path: Path, done: int):
    """The log opened to append to, cut back to `done` steps: what came after the checkpoint is done again."""
    lines = path.read_text().splitlines(True) if done and path.is_file() else []
    fresh = path.with_suffix(".tmp")
    fresh.parent.mkdir(parents=True, exist_ok=True)
    fresh.write_text("".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= done))
    fresh.replace(path)
    return open(path, "a")


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


# ---- command line ---------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to train").add_argument
    what("--stage", choices=("base", "1", "2"))
    what("--part", choices=tuple(LEARNED), help="of stage base, this part only (default: vae, vggt, mmdit); decoder: of the "
         "autoencoder in --weights, its latents stay as they are")
    what("--preset", choices=tuple(PRESETS), help="default: that of --weights; nano without, and for stage base")
    what("--overfit", action="store_true", help="instead: learn one pair by heart, a check of the whole method (a minute)")
    what("--no-ism", action="store_true", help="stage 2 without spatial tokens: LoRA alone (the paper's ablation)")
    what("--gss", default="lds", choices=("lds", "eds", "none"), help="depth supervision: latent (paper), pixels, none")
    what("--lambda", dest="gss_weight", type=float, help="weight of the depth supervision (paper: 0.01)")
    files = parser.add_argument_group("files").add_argument
    files("--weights", type=Path, help="folder of the frozen networks, official files in any arrangement (default weights/nano); stage base: "
          "of the networks to go on from, instead of from nothing")
    files("--checkpoint", type=Path, help="stage 2: folder of stage 1's Connector (default: stage1 in --weights)")
    files("--output", type=Path, help="log, sheets, checkpoint and the trained parts (default runs/STAGE)")
    files("--cache", type=Path, default=Path("runs/cache"), help="rendered scenes, and encodings (default runs/cache)")
    files("--resume", action="store_true", help="go on from the checkpoint in --output, bit for bit")
    data = parser.add_argument_group("data").add_argument
    data("--data", default="scenes", metavar="FILE.jsonl", help="triples (see data.py); default: the rendered world")
    data("--no-cache", action="store_true", help="triples of a file: encode every batch anew; the encoders stay in memory")
    data("--level", nargs="+", default=["plain"], choices=scenes.LEVELS, help="difficulty of the rendered scenes, one or "
         "several; one named twice counts twice")
    data("--mirror", nargs="+", default=[], choices=scenes.LEVELS, metavar="LEVEL", help="those of --level to be seen in a "
         "mirror as well, left and right exchanged in their words")
    data("--move-shards", type=int, nargs="+", metavar="N", help="stage base: moves from the first N files of each level only, one number or "
         "one for each, to leave stage 2 some to learn")
    data("--shards", type=int, default=32, help=f"rendered files of {SHARD} scenes, of each level (default 32)")
    loop = parser.add_argument_group("optimisation").add_argument
    loop("--steps", type=int, help="optimiser steps (default: the recipe's)")
    loop("--batch", type=int, help="samples an optimiser step")
    loop("--micro", type=int, help="samples a forward pass; gradients are accumulated to --batch")
    loop("--rate", type=float, default=1.0, help="factor on the recipe's learning rates, e.g. 0.5 to go on from --weights (default 1)")
    loop("--seed", type=int, default=0)
    loop("--recompute", action="store_true", help="activation checkpointing: less memory, more time")
    loop("--compile", action="store_true", help="torch.compile the transformer (needs a C++ compiler)")
    loop("--attention", default="auto", choices=kernels.ATTENTION, help="auto: on a GPU the faster of Triton and SDPA, timed once; "
         "SDPA on a CPU and with --compile")
    loop("--device", help="default: cuda if there is one, else cpu")
    loop("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint and sample sheet")
    loop("--keep", action="store_true", help="also keep the trained parts of every checkpoint, in OUTPUT/step-N")
    args = parser.parse_args()
    if not (args.stage or args.overfit):
        parser.error("say what to train: --stage base, --stage 1, --stage 2 or --overfit")
    if args.overfit and args.stage:
        parser.error("--overfit is a training of its own; leave --stage out.")
    for name in ("steps", "batch", "micro", "shards", "save_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}.")
    if args.no_ism and args.stage == "1":
        parser.error("--no-ism is for --stage 2: stage 1 trains the spatial tokens' Connector and nothing else.")
    if args.data != "scenes" and args.stage not in ("1", "2"):
        parser.error(f"--data {args.data}: files of triples are for --stage 1 and 2; the rest learns from the rendered world.")
    if args.keep and args.stage not in ("1", "2"):
        parser.error("--keep is for --stage 1 and 2.")
    if args.part and args.stage != "base":
        parser.error("--part is for --stage base.")
    if args.part == "decoder" and not args.weights:
        parser.error("--part decoder needs --weights: the folder with the autoencoder.")
    if args.rate <= 0:
        parser.error(f"--rate must be above 0, not {args.rate}.")
    if args.stage != "base" or not args.move_shards:
        args.move_shards = [args.shards]
    if len(args.move_shards) not in (1, len(args.level)):
        parser.error(f"--move-shards takes one number or one for each of the {len(args.level)} levels, not {len(args.move_shards)}.")
    if not set(args.mirror) <= set(args.level):
        parser.error(f"--mirror {' '.join(args.mirror)}: only levels of --level, {' '.join(args.level)}, can be mirrored.")
    if args.overfit:
        args.stage, args.preset = "overfit", "tiny"
    args.output = args.output or Path("runs") / {"1": "stage1", "2": "stage2"}.get(args.stage, args.stage)
    args.ism = args.stage != "base" and not args.no_ism
    args.start = args.weights if args.stage == "base" else None
    if args.stage in ("base", "1") or args.no_ism:
        args.gss = "none"
    return args


def init_base(mmdit: MMDiT) -> None:
    """Fresh weights to train from nothing. Important: every block starts as the identity (adaLN-Zero, DiT)."""
    for name, p in mmdit.named_parameters():
        if name.endswith(("mod.lin.weight", "modulation.lin.weight", "adaLN_modulation.1.weight", "final_layer.linear.weight")):
            nn.init.zeros_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim == 2:
            nn.init.xavier_uniform_(p)


# Parts of stage base and the networks that learn in them.
LEARNED = {"vae": ("vae",), "decoder": ("vae",), "vggt": ("vggt",), "mmdit": ("mmdit", "t5", "clip")}


def begin(preset: Preset, part: str, args: argparse.Namespace) -> nn.Module:
    """A network to train in stage base: fresh, or the one in --weights."""
    if not args.start:
        return build(preset, part, args.device)
    return load_part(preset, find_frozen(preset, args.start, (part,))[part], args.device).train().requires_grad_(True)


def base_editor(preset: Preset, vae: AutoEncoder, args: argparse.Namespace) -> Editor:
    """Text encoders and MMDiT to train, around an autoencoder. The word-level tokenizer knows the words of the levels and of
    --weights alone, so that a word never seen in training is refused."""
    words = {word for level in args.level for word in scenes.vocabulary(level)}
    tokenizer = build_word_tokenizer(words, load_tokenizers(preset, args.start)[0] if args.start else None)
    if (count := max(tokenizer.get_vocab().values()) + 1) > preset.t5.vocabulary:
        raise ValueError(f"The words need {count} ids, more than the {preset.t5.vocabulary} of preset {preset.name}: take fewer levels.")
    model = SpatialDiff(preset).to(args.device)
    if args.start:
        model.mmdit = begin(preset, "mmdit", args)
    else:
        init_base(model.mmdit)
    return Editor(preset, vae, begin(preset, "t5", args), begin(preset, "clip", args), None, (tokenizer,) * 2, model, {})


def stage_sources(preset: Preset, args: argparse.Namespace) -> dict[str, Source]:
    """Where the frozen networks are, and for stage 2 stage 1's Connector."""
    found = {}
    if args.stage == "2" and args.ism:
        if not (args.checkpoint / "connector.safetensors").is_file():
            raise FileNotFoundError(f"Stage 2 starts from stage 1's Connector, expected {args.checkpoint}/connector.safetensors.")
        found = find_learned(preset, args.checkpoint, asked=True)
        if "lora" in found:
            raise ValueError(f"{args.checkpoint} is of a stage 2: its Connector goes with its LoRA, and stage 2 begins a LoRA. Give "
                             "--checkpoint the folder of a stage 1; to go on with a stopped stage 2, its --output and --resume.")
    found |= find_frozen(preset, args.weights, ("mmdit", "vae", "t5", "clip") + ("vggt",) * args.ism)
    for name, source in found.items():
        print(f"{name:13}{source}")
    return found


def stage_model(preset: Preset, sources: dict[str, Source], args: argparse.Namespace) -> SpatialDiff:
    """Stage 1 starts a Connector, stage 2 takes stage 1's and starts a spatial head."""
    model = load_model(preset, sources, args.device, args.dtype)
    if args.ism:
        model.connector = (model.connector or build(preset, "connector", args.device)).float()
        out_dim = 256 if args.gss == "eds" else preset.spatial_head.out_dim
        model.spatial_head = SpatialHead(replace(preset.spatial_head, out_dim=out_dim)).to(args.device)
    return model


def facts_at_start(task, recipe: Recipe, args: argparse.Namespace) -> None:
    def count(parameters) -> str:
        return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"

    precision = "bf16 autocast" if args.amp else "fp32 (this CPU has no bf16 matrix instructions)"
    print(f"device       {args.device} ({args.why}), {torch.get_num_threads()} CPU threads, {precision}; kernels: {kernels.describe(args.device)}")
    for name, module in task.modules.items():
        learned = [p for p in module.parameters() if p.requires_grad]
        print(f"{name:13}{count(module.parameters())} parameters, {count(learned)} learned")
    print(f"data         {task.count} samples; batch {recipe.batch} as {recipe.batch // recipe.micro} x {recipe.micro}")
    print(f"recipe       {recipe.steps} steps, lr {recipe.lr}" + (f", Muon {recipe.muon_lr}" if recipe.muon_lr else ""))
    print(f"output       {args.output}")


def main() -> None:
    args = parse()
    preset = choose_preset(args.preset or ("nano" if args.stage == "base" else None), args.weights)
    args.weights, _ = default_folders(preset, args.weights, None)
    args.checkpoint = args.checkpoint or args.weights / "stage1"
    args.device, args.dtype, args.why = choose_device(preset, args.device, None)  # dtype: of frozen weights
    kernels.choose(args.attention)
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    args.amp = args.device.type != "cpu" or fast_bf16
    torch.manual_seed(args.seed)
    if args.gss_weight is not None:
        preset = replace(preset, gss_weight=args.gss_weight)
    if args.overfit:
        return overfit(preset, args)
    if args.stage == "base" and preset.name == "kontext":
        raise ValueError("Stage base is the miniature's; kontext starts from the official weights: --stage 1.")
    parts = (args.part,) if args.part else ("vae", "vggt", "mmdit") if args.stage == "base" else (args.stage,)
    for part in parts:
        recipe = RECIPES.get((preset.name, part)) or RECIPES["nano", part]
        given = {name: getattr(args, name) for name in ("steps", "batch", "micro") if getattr(args, name) is not None}
        recipe = replace(recipe, **{"micro": min(recipe.micro, args.batch or recipe.micro)} | given)
        recipe = replace(recipe, lr=recipe.lr * args.rate, muon_lr=recipe.muon_lr * args.rate)
        if recipe.batch % recipe.micro:
            raise ValueError(f"--batch {recipe.batch} must be a multiple of --micro {recipe.micro}.")
        folder = args.output / part if args.stage == "base" else args.output
        if (folder / "checkpoint.safetensors").is_file() and not args.resume:
            raise ValueError(f"{folder} holds a training already: give --resume to go on with it, or another --output.")
        args.output.mkdir(parents=True, exist_ok=True)
        task, sources = make_task(preset, part, args)
        facts_at_start(task, recipe, args)
        facts = {"part": part, "preset": str(preset), "recipe": str(recipe), "samples": task.count}
        facts["networks"] = {name: source.digest() for name, source in sources.items()}
        facts |= {"level": " ".join(args.level), "mirror": " ".join(args.mirror)} | {name: getattr(args, name) for name in ("seed", "gss", "ism")}
        if args.data != "scenes":
            facts["data"] = digest(Path(args.data))
        made = LEARNED.get(part) or ["lora" if name == "mmdit" else name for name in task.modules]
        if train(task, recipe, folder, facts, args) or not all((args.output / f"{name}.safetensors").is_file() for name in made):
            task.save(args.output)  # once: what was trained on a part knows it by its sha256


def make_task(preset: Preset, part: str, args: argparse.Namespace):
    """The task, and the networks it starts from. Networks are looked for first, so that a missing file is found before
    anything is rendered or encoded; then data, then the task. With triples of a file the encoders are gone from memory
    before the model is loaded."""
    if part in "12":
        sources = stage_sources(preset, args)
    else:
        sources = find_frozen(preset, args.start, LEARNED[part]) if args.start else {}
    if part == "mmdit":
        if not (args.output / "vae.safetensors").is_file():
            raise FileNotFoundError(f"The MMDiT's autoencoder is taken from --output, expected {args.output}/vae.safetensors: train it "
                                    "there with --part vae, or copy it.")
        sources |= find_frozen(preset, args.output, ("vae",))
        editor = base_editor(preset, load_part(preset, sources["vae"], args.device), args)
    if args.data == "scenes":
        of_levels = [scene_shards(World(level, preset.side, shards=args.shards), args.cache) for level in args.level]
        moves = args.move_shards * (len(args.level) // len(args.move_shards))
        for i in map(args.level.index, args.mirror):
            of_levels.append(mirror_shards(of_levels[i]))
            moves.append(moves[i])
        shards = [shard for group in zip(*of_levels) for shard in group]  # the levels take turns
        if part in ("vae", "decoder"):
            return VAETask(preset, shards[:24], begin(preset, "vae", args), args.device, part == "decoder"), sources
        if part == "vggt":
            return VGGTTask(preset, shards[:24], begin(preset, "vggt", args), args.device), sources
        if part in "12":
            vae, t5, clip = (load_part(preset, sources[name], args.device, args.dtype) for name in ("vae", "t5", "clip"))
            vggt = load_part(preset, sources["vggt"], args.device, args.dtype) if args.ism else None
            model = stage_model(preset, sources, args)
            editor = Editor(preset, vae, t5, clip, vggt, load_tokenizers(preset, args.weights), model, sources)
        kinds = ("move",) if part in "12" else ("move", *scenes.OTHER_WORDINGS)
        hashes = {name: sources[name].digest()[:8] for name in ("vae", "vggt") if name in sources}
        with_moves = {path for paths, n in zip(of_levels, moves) for path in paths[:n]}
        triples = encode_scenes(shards, editor.vae, editor.vggt, preset, args.gss, kinds, args.amp, hashes, with_moves)
        watch = [scenes.make_pair(scenes.SPLITS["seen"][i], args.level[i % len(args.level)], "seen", preset.side, extras=False)
                 for i in range(8)]
    else:
        path, cache = Path(args.data), args.cache / Path(args.data).stem
        triples = FileTriples(path, preset, sources, args.weights, args.gss, args.device, args.dtype, None if args.no_cache else cache)
        editor, watch = Editor(preset, None, None, None, None, None, stage_model(preset, sources, args), sources), None
    task = FlowTask(editor, triples, "base" if part == "mmdit" else part, watch)
    editor.model.mmdit.checkpoint_blocks = args.recompute
    if args.compile:
        editor.model.mmdit.compile_layers()
    return task, sources


def overfit(preset: Preset, args: argparse.Namespace) -> None:
    """Trains everything on one rendered pair until sampling returns its target; exits with 1 if it does not."""
    pair = scenes.make_pair(args.seed, args.level[0], "seen", preset.side, extras=False)
    args.output.mkdir(parents=True, exist_ok=True)
    editor = base_editor(preset, build(preset, "vae", args.device), args)
    editor.vggt = build(preset, "vggt", args.device).eval()
    ref, tgt = (torch.from_numpy(picture)[None].to(args.device) for picture in (pair.ref, pair.tgt))
    with torch.no_grad():
        maps = disparity(torch.from_numpy(pair.tgt_depth)[None]).to(args.device)
        depth = depth_target(editor.vae, maps, editor.model.connector.grid, "lds")
        triples = SceneTriples(
            encode_image(editor.vae, ref), encode_image(editor.vae, tgt), torch.zeros(1, dtype=torch.long),
            [pair.instruction], encode_geometry(editor.vggt, ref, preset), depth,
        )
    task = FlowTask(editor, triples, "overfit", [pair])
    recipe = RECIPES["tiny", "overfit"]
    recipe = replace(recipe, steps=args.steps or recipe.steps)
    facts_at_start(task, recipe, args)
    train(task, recipe, args.output, {"part": "overfit", "recipe": str(recipe), "seed": args.seed}, args)
    cond = editor.condition(ref, [pair.instruction])
    tokens, _ = sample(editor.model, cond, make_noise(preset, cond.grid, [1]).to(args.device), preset.steps, preset.guidance_train)
    error = ((tokens - triples.target).norm() / triples.target.norm()).item()
    print(f"sampled latent: {error:.2%} from the target's (relative L2); at most 5% was expected")
    sys.exit(error > 0.05)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
