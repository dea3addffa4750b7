"""Speed and memory beside diffusers and peft, with the same weights: side by side in one process, taking turns.

    python tests/bench.py                  both networks: denoising step, training step, physical limit, memory; the miniature
    python tests/bench.py --compile        adds torch.compile, of the repeated blocks on their side (needs a C++ compiler; minutes)
    python tests/bench.py --quick          a minute, to see that everything runs; the figures mean little

A ratio is ours over theirs, of medians. Where other programs use the cores too, wall-clock times of two threads say nothing:
with --threads 1 the process's own processor time is taken instead, which they hardly change. On a machine with
CUDA the same command also times the kernels against torch's attention, FlashAttention (where installed) and the roofline;
that part was written where there is no GPU and has never run on one.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import lora  # noqa: E402
from model.connector import ConnectorConfig  # noqa: E402
from model.mmdit import MMDiTConfig, position_ids  # noqa: E402
from model.spatial_head import SpatialHeadConfig  # noqa: E402
from spatialdiff import PRESETS, Condition, Preset, SpatialDiff, losses  # noqa: E402
from train import Recipe, optimizers  # noqa: E402


@dataclass(frozen=True)
class Size:
    """A network and its tokens; `targets`: the ratios to stay below."""

    mmdit: MMDiTConfig
    text: int
    grid: tuple[int, int]  # tokens of the target; the reference has as many
    queries: int
    targets: dict[str, float]


SIZES = {
    "mid": Size(MMDiTConfig(64, 768, 512, 768, 4.0, 6, 4, 8, (16, 56, 56)), 64, (16, 24), 256,
                {"eager": 0.95, "compiled": 0.88, "train": 0.90, "limit": 1.12}),
    "nano": Size(MMDiTConfig(64, 128, 128, 128, 4.0, 4, 2, 6, (8, 12, 12)), 16, (8, 12), 64,
                 {"eager": 0.60, "compiled": 0.45, "train": 0.70}),
}  # fmt: skip
TARGET_PICTURE = 0.40
RANK = 64
PEER_LORA = (r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
             r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)")  # every linear layer of the blocks but modulation
ROWS: list[dict] = []
CLOCK = time.perf_counter


def report(size: str, what: str, ours: float, theirs: float | None = None, target: float | None = None, unit="ms", note=""):
    """Keeps and prints one row: ours, theirs (or a limit), their ratio, and whether it stays below the target."""
    ratio = ours / theirs if theirs else None
    ROWS.append({"size": size, "what": what, "ours": ours, "theirs": theirs, "ratio": ratio, "target": target, "unit": unit, "note": note})
    numbers = [f"{ours:9.1f}", f"{theirs:9.1f}" if theirs else " " * 9, f"{ratio:7.2f}" if ratio else " " * 7]
    verdict = f"<= {target:.2f} {'yes' if ratio <= target else 'NO '}" if target else " " * 11
    print(f"{size:5} {what:44} {' '.join(numbers)}  {verdict} {unit:8} {note}".rstrip(), flush=True)


def alternate(sides: dict, runs: int, turn: float = 0.1, clock=None) -> dict[str, float]:
    """Median milliseconds of each side's call; the sides take turns of at least `turn` seconds, in both orders."""
    clock = clock or CLOCK
    repeat = {}
    for name, side in sides.items():
        side()
        began = clock()
        side()
        repeat[name] = max(1, round(turn / (clock() - began)))
    times = {name: [] for name in sides}
    for i in range(runs):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            began = clock()
            for _ in range(repeat[name]):
                sides[name]()
            times[name].append((clock() - began) / repeat[name] * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors born inside the block that live at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()).data_ptr() not in old and storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.free, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def free(self, size: int):
        self.now -= size


class Products(TorchFunctionMode):
    """Every matrix product and attention of a step, to be done again alone with the same tensors."""

    KINDS = (F.linear, F.scaled_dot_product_attention, torch.addmm, torch.mm, torch.matmul, Tensor.addmm_, Tensor.matmul, Tensor.__matmul__)

    def __init__(self):
        super().__init__()
        self.calls, self.flop, self.attention = [], 0.0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.KINDS:
            self.calls.append((func, args, kwargs or {}))
            if func is F.scaled_dot_product_attention:
                self.attention.append(self.calls[-1])
                self.flop += 4.0 * args[0].numel() * args[1].shape[-2]
            else:
                inner = args[1 if "addmm" in func.__name__ else 0].shape[-1]
                self.flop += 2.0 * out.numel() * inner
        return out


# ---- the two sides --------------------------------------------------------------------------------------------------


def make(name: str, scale: float = 1):
    """Our model with random weights, and the inputs of one step: condition, packed latents, time. `scale`: of N."""
    size = SIZES[name]
    c = size.mmdit
    preset = Preset(
        name=name, mmdit=c, lora_rank=RANK, lora_alpha=RANK,
        connector=ConnectorConfig(192, c.hidden_size, c.hidden_size, c.num_heads, 2, size.queries),
        spatial_head=SpatialHeadConfig(c.hidden_size),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    model = SpatialDiff(preset).eval().requires_grad_(False)
    for key, p in model.named_parameters():
        p.normal_(1.0, 0.1, generator=generator) if key.endswith(".scale") else p.normal_(0, 0.5 * c.hidden_size**-0.5, generator=generator)
    grid = (size.grid[0], round(size.grid[1] * scale))
    n = grid[0] * grid[1]
    cond = Condition(draw(1, round(size.text * scale), c.context_in_dim), draw(1, c.vec_in_dim), draw(1, n, 64), None, grid)
    return model, cond, draw(1, n, 64), torch.tensor([0.7])


def our_step(model: SpatialDiff, cond: Condition, x: Tensor, t: Tensor):
    """A denoising step as in `spatialdiff.sample`: rotations and modulations are made before the loop."""
    with torch.inference_mode():
        pe, mods = model.rope(cond), model.mmdit.modulations(t, torch.ones(1), cond.pooled)

    @torch.inference_mode()
    def step() -> Tensor:
        return model.mmdit(cond.txt, x, cond.reference, None, pe, mods)[0]

    return step


def peer_velocity(peer, cond: Condition, x: Tensor, t: Tensor):
    """A function that returns the velocity as diffusers' FluxKontextPipeline computes it in its loop."""
    rows, cols = map(torch.arange, cond.grid)
    fixed = {
        "encoder_hidden_states": cond.txt, "pooled_projections": cond.pooled, "timestep": t, "guidance": torch.ones(1),
        "txt_ids": torch.zeros(cond.txt.shape[1], 3), "img_ids": torch.cat((position_ids(0, rows, cols), position_ids(1, rows, cols))),
    }  # fmt: skip
    return lambda: peer(hidden_states=torch.cat((x, cond.reference), dim=1), **fixed, return_dict=False)[0][:, : x.shape[1]]


class Apart(nn.Module):
    """A frozen linear layer with one LoRA for each of its parts (q, k, v, mlp), as diffusers and peft have them."""

    def __init__(self, base: nn.Linear, pairs: list[tuple[Tensor, Tensor]]):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.cat([A for A, _ in pairs]))  # (parts * rank, in)
        self.Bs = nn.ParameterList(B.clone() for _, B in pairs)  # (rows of the part, rank) each

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.A).chunk(len(self.Bs), dim=-1)
        parts = [F.linear(h, B) for h, B in zip(low, self.Bs)]
        return self.base(x) + (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])


def same_lora(model: SpatialDiff, peer) -> None:
    """Puts peft's LoRA on the peer and the same numbers on ours."""
    from peft import LoraConfig

    peer.requires_grad_(False)
    peer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PEER_LORA, init_lora_weights="gaussian"))
    theirs = {name: p for name, p in peer.named_parameters() if p.requires_grad}
    for name, layer in lora.trained_linears(model.mmdit).items():
        parts = [part.removeprefix("transformer.") for part, _ in lora.file_modules("transformer.", name, layer)]
        pairs = [[theirs[f"{part}.lora_{x}.default.weight"].detach() for x in "AB"] for part in parts]
        model.mmdit.set_submodule(name, Apart(layer, pairs))
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model.mmdit, peer)]
    assert counts[0] == counts[1], f"Both sides must learn the same number of parameters: {counts}."


def trainer(module: nn.Module, loss):
    """One optimisation step as in train.py (AdamW of its recipe); returns the loss."""
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    opts = optimizers(None, params, Recipe(), amp=False)

    def step() -> Tensor:
        value = loss()
        value.backward()
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        return value.detach()

    return step


def peer_trainer(peer, loss):
    params = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, Recipe.lr, Recipe.betas, weight_decay=Recipe.weight_decay, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def check(what: str, ours: Tensor, theirs: Tensor, bound: float) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"      {what}: largest difference {error:.1e} of the largest value")
    if not error <= bound:
        sys.exit(f"{what}: ours and diffusers differ by {error:.1e}, more than {bound:.0e}; a comparison of speed means nothing.")


# ---- what is measured -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def matrix_rate(dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of the better of two square products."""
    products = {n: (torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)) for n in (1024, 2048)}
    times = alternate({n: lambda a=a, b=b: a @ b for n, (a, b) in products.items()}, 7)
    return max(2 * n**3 / ms / 1e6 for n, ms in times.items())


def denoising(name: str, args, fp32_rate: float) -> None:
    from peers import transformer_peer

    size = SIZES[name]
    model, cond, x, t = make(name)
    peer = transformer_peer(model.mmdit).requires_grad_(False)
    ours = our_step(model, cond, x, t)
    theirs = torch.no_grad()(peer_velocity(peer, cond, x, t))
    check(f"{name} velocity", ours(), theirs(), 1e-4)
    with torch.inference_mode(), Products() as products:
        ours()

    def limit(calls=products.calls):
        with torch.inference_mode():
            for func, a, kwargs in calls:
                func(*a, **kwargs)

    sides = {"ours": ours, "theirs": theirs, "limit": limit, "attention": lambda: limit(products.attention)}
    if args.compile:
        compiled, compiled_peer = deepcopy(model), deepcopy(peer)
        compiled.mmdit.compile_layers()
        compiled_peer.compile_repeated_blocks(fullgraph=True)
        sides["compiled"] = our_step(compiled, cond, x, t)
        sides["theirs compiled"] = torch.no_grad()(peer_velocity(compiled_peer, cond, x, t))
        check(f"{name} velocity, ours compiled", sides["compiled"](), theirs(), 1e-4)
        check(f"{name} velocity, theirs compiled", sides["theirs compiled"](), theirs(), 1e-4)
    half, c16 = deepcopy(model).bfloat16(), replace(cond, **{k: getattr(cond, k).bfloat16() for k in ("txt", "pooled", "reference")})
    sides["bf16"] = our_step(half, c16, x, t)
    ms = alternate(sides, args.runs)

    gflop = products.flop / 1e9
    share = lambda key: f"{gflop / ms[key] * 1e3:.0f} GFLOP/s, {gflop / ms[key] * 1e3 / fp32_rate:.0%} of the machine's"
    report(name, "denoising step / diffusers eager", ms["ours"], ms["theirs"], size.targets["eager"])
    if args.compile:
        report(name, "compiled / diffusers eager", ms["compiled"], ms["theirs"], size.targets["compiled"])
        report(name, "compiled / diffusers compiled", ms["compiled"], ms["theirs compiled"])
        report(name, "compiled / its products and attention alone", ms["compiled"], ms["limit"])
    report(name, "step / its products and attention alone", ms["ours"], ms["limit"], size.targets.get("limit"),
           note=f"{gflop:.1f} GFLOP; attention {ms['attention']:.1f} ms of it")
    report(name, "bf16 / our fp32", ms["bf16"], ms["ours"])
    for key, what in (("ours", "ours"), ("theirs", "diffusers"), ("limit", "products and attention alone")):
        report(name, f"rate: {what}", gflop / ms[key] * 1e3, fp32_rate, unit="GFLOP/s", note=share(key))
    peaks = []
    for step in (lambda: our_step(model, cond, x, t)(), theirs):
        with torch.no_grad(), PeakMemory() as memory:
            step()
        peaks.append(memory.peak / 1e6)
    report(name, "memory: peak of one step's tensors", *peaks, unit="MB")


def training(name: str, args) -> None:
    from peers import transformer_peer

    model, cond, x, t = make(name)
    peer = transformer_peer(model.mmdit)
    full = deepcopy(model)
    same_lora(model, peer)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    velocity = peer_velocity(peer, cond, (1 - t) * target + t * x, t)
    sides = {
        "ours": trainer(model, lambda: losses(model, cond, target, x, t, None)[0].mean()),
        "theirs": peer_trainer(peer, lambda: F.mse_loss(velocity(), x - target)),
    }
    first = [torch.stack([step() for _ in range(4)]) for step in sides.values()]
    check(f"{name} losses of four training steps", *first, 1e-4)
    c = model.preset.connector
    geometry = replace(cond, geometry=torch.randn(1, 64, c.in_dim, generator=torch.Generator().manual_seed(2)))
    depth = torch.randn(1, c.queries, 64, generator=torch.Generator().manual_seed(3))
    lora.inject(full.mmdit, RANK, RANK)
    full.connector.requires_grad_(True), full.spatial_head.requires_grad_(True)

    def method() -> Tensor:
        flow, gss = losses(full, geometry, target, x, t, depth)
        return flow.mean() + full.preset.gss_weight * gss

    sides["method"] = trainer(full, method)
    if args.compile:
        compiled, compiled_peer = deepcopy(model), deepcopy(peer)
        compiled.mmdit.compile_layers()
        compiled_peer.compile_repeated_blocks(fullgraph=True)
        sides["compiled"] = trainer(compiled, lambda: losses(compiled, cond, target, x, t, None)[0].mean())
        faster = peer_velocity(compiled_peer, cond, (1 - t) * target + t * x, t)
        sides["theirs compiled"] = peer_trainer(compiled_peer, lambda: F.mse_loss(faster(), x - target))
    ms = alternate(sides, args.runs)
    report(name, "training step, LoRA / diffusers + peft", ms["ours"], ms["theirs"], SIZES[name].targets["train"])
    if args.compile:
        report(name, "compiled training / diffusers + peft eager", ms["compiled"], ms["theirs"])
        report(name, "compiled training / theirs compiled", ms["compiled"], ms["theirs compiled"])
    report(name, f"our method: LoRA, Connector, {c.queries} spatial tokens, GSS", ms["method"], note="fused LoRA, as train.py")
    peaks = []
    for key in ("ours", "theirs"):
        with PeakMemory() as memory:
            sides[key]()
        peaks.append(memory.peak / 1e6)
    report(name, "memory: peak of one training step's tensors", *peaks, unit="MB")


def growth(name: str, args) -> None:
    """Memory and time of our step as the sequence grows: 896, 1792, 3584 tokens at mid."""
    peaks = {}
    for scale in (1, 2) if args.quick else (14 / 13, 28 / 13, 56 / 13):
        model, cond, x, t = make(name, scale)
        n = cond.txt.shape[1] + 2 * x.shape[1]
        step = our_step(model, cond, x, t)
        step()
        began = time.perf_counter()
        step()
        ms = (time.perf_counter() - began) * 1e3
        with torch.no_grad(), PeakMemory() as memory:
            our_step(model, cond, x, t)()
        peaks[n] = memory.peak
        report(name, f"memory at N = {n}", memory.peak / 1e6, unit="MB", note=f"{memory.peak / n / 1e3:.1f} kB a token; {ms:.0f} ms")
    (n0, p0), (n1, p1) = list(peaks.items())[0], list(peaks.items())[-1]
    report(name, "memory: growth / growth of N (1: linear)", p1 / p0, n1 / n0, 1.05, unit="times")


def children() -> float:
    """Processor seconds of the programs that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


PIPELINE = """
import sys, torch
from PIL import Image
from diffusers import FluxKontextPipeline
pipe = FluxKontextPipeline.from_pretrained(sys.argv[1], text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
pipe.set_progress_bar_config(disable=True)
c = pipe.transformer.config
embeds = torch.randn(1, 24, c.joint_attention_dim), torch.randn(1, c.pooled_projection_dim)
image = pipe(Image.open(sys.argv[2]), prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[1], num_inference_steps=2, guidance_scale=1.0,
             height=128, width=128, max_area=128 * 128, _auto_resize=False).images[0]
image.save(sys.argv[3])
"""


def pictures(args) -> None:
    """From the command to the picture, cold: the miniature's sample.py, and diffusers' pipeline at its size with random
    weights from disk. Theirs has less to do: no text encoders and no geometry."""
    import diffusers
    import numpy as np
    from PIL import Image
    from peers import transformer_peer
    from spatialdiff import build

    preset = PRESETS["nano"]
    v = preset.vae
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(v.ch_mult), up_block_types=("UpDecoderBlock2D",) * len(v.ch_mult),
            block_out_channels=[v.ch * m for m in v.ch_mult], layers_per_block=v.num_res_blocks, latent_channels=v.z_channels,
            norm_num_groups=v.groups, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
        )  # fmt: skip
        diffusers.FluxKontextPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, None, None, None, None,
            transformer_peer(build(preset, "mmdit")),
        ).save_pretrained(folder / "pipeline")  # fmt: skip
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)).save(folder / "in.png")
        (folder / "pipeline.py").write_text(PIPELINE)
        commands = {
            "ours": [sys.executable, ROOT / "sample.py", "--output", folder / "ours.png"],
            "theirs": [sys.executable, folder / "pipeline.py", folder / "pipeline", folder / "in.png", folder / "theirs.png"],
        }

        def run(command) -> None:
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, 
                                  env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())})
            if done.returncode:
                sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")

        ms = alternate({name: lambda c=c: run(c) for name, c in commands.items()}, args.picture_runs, clock=children if args.threads == 1 else time.perf_counter)
    report("nano", "command to picture / diffusers' pipeline", ms["ours"], ms["theirs"], TARGET_PICTURE)


# ---- kernels, on a CUDA machine -------------------------------------------------------------------------------------

ROOFLINES = {"A100": (312, 2.04), "H100": (989, 3.35), "H200": (989, 4.8), "B200": (2250, 8.0)}  # dense bf16 TFLOP/s, TB/s


def gpu_time(step, runs: int) -> float:
    """Median milliseconds of one call, the cache flushed before each."""
    cold = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(runs + 3):
        cold.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def kernels(args) -> None:
    """Each kernel, forward and backward, at Kontext's width, against torch and the GPU's roofline."""
    from kernels.attention import attention_reference, attention_triton
    from kernels.modulate import modulate_reference, modulate_triton, residual_modulate_reference, residual_modulate_triton
    from kernels.rope import qk_norm_rope_reference, qk_norm_rope_triton

    gpu = torch.cuda.get_device_name()
    tflops, bandwidth = next((peak for key, peak in ROOFLINES.items() if key in gpu), (None, None))
    print(f"{gpu}: roofline {tflops} TFLOP/s bf16, {bandwidth} TB/s")
    new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    H, D, text = 24, 128, 512
    C = H * D
    for N in (3584, 9728):
        attentions = {"triton": attention_triton, "torch SDPA": attention_reference}
        try:
            from flash_attn import flash_attn_func
            attentions["FlashAttention"] = flash_attn_func
        except ImportError:
            pass
        qkv = new(1, N, 3, H, D)
        streams, scales = [new(1, n, 3, H, D) for n in (text, N - text)], [new(D) for _ in range(4)]
        pe = torch.randn(N, D // 2, 2, device="cuda")
        x, y, mods = new(1, N, C), new(1, N, C), [new(1, 1, C) for _ in range(3)]
        MB = N * C * 2 / 1e6  # of one activation
        table = [  # name, {side: function}, inputs, FLOP forward, MB forward, backward
            ("attention", {k: lambda f=f: f(*qkv.unbind(2)) for k, f in attentions.items()}, [qkv], 4 * N * N * C, 4 * MB, 8 * MB),
            ("qk_norm_rope", {k: lambda f=f: f(streams, scales, pe) for k, f in
                              (("triton", qk_norm_rope_triton), ("torch", qk_norm_rope_reference))}, streams + scales, 0, 6 * MB, 8 * MB),
            ("modulate", {k: lambda f=f: f(x, *mods[:2]) for k, f in (("triton", modulate_triton), ("torch", modulate_reference))},
             [x, *mods[:2]], 0, 2 * MB, 3 * MB),
            ("residual_modulate", {k: lambda f=f: f(x, mods[0], y, *mods[1:]) for k, f in
                                   (("triton", residual_modulate_triton), ("torch", residual_modulate_reference))},
             [x, y, *mods], 0, 4 * MB, 6 * MB),
        ]  # fmt: skip
        for what, sides, inputs, flop, forward_mb, backward_mb in table:
            for side, function in sides.items():
                out = [o for o in (function(),) for o in (o if isinstance(o, tuple) else (o,))]
                gradients = [torch.randn_like(o) for o in out]
                backward = lambda: torch.autograd.grad(out, inputs, gradients, retain_graph=True)
                for direction, step, ops, mb in (("forward", torch.no_grad()(function), flop, forward_mb),
                                                 ("backward", backward, 2.5 * flop, backward_mb)):  # fmt: skip
                    ms = gpu_time(step, args.runs)
                    limit = max(ops / tflops / 1e9, mb / bandwidth / 1e3) if tflops else None
                    rate = f"{ops / ms / 1e9:.0f} TFLOP/s" if ops else f"{mb / ms / 1e3:.2f} TB/s"
                    report(f"{N}", f"{what} {direction}, {side} / roofline", ms, limit, note=rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(SIZES), help="this network only (the miniature's picture goes with nano)")
    parser.add_argument("--runs", type=int, default=15, help="turns of each side (default 15)")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile of the repeated blocks")
    parser.add_argument("--quick", action="store_true", help="3 turns, the growth of memory at two lengths, one picture")
    parser.add_argument("--threads", type=int, help="default: torch's; 1: processor time instead of the clock on the wall")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    args.runs, args.picture_runs = (3, 1) if args.quick else (args.runs, 5)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.threads == 1:
        global CLOCK
        CLOCK = time.process_time
    torch.manual_seed(0)
    rates = {str(dtype)[6:]: matrix_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; matrix products: "
          + ", ".join(f"{rate:.0f} GFLOP/s {dtype}" for dtype, rate in rates.items()) + f"; medians of {args.runs} turns"
          + " of processor time" * (args.threads == 1))
    print(f"{'':5} {'':44} {'ours':>9} {'theirs':>9} {'ratio':>7}  target")
    for name in [args.only] if args.only else SIZES:
        denoising(name, args, rates["float32"])
        training(name, args)
        if name == "mid":
            growth(name, args)
    if args.only != "mid":
        pictures(args)
    if torch.cuda.is_available():
        kernels(args)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rates": rates, "rows": ROWS}, indent=1))


if __name__ == "__main__":
    main()
