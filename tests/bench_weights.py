"""What loading costs, and the full-size transformer on a machine with less memory than its weights.

    python tests/bench_weights.py --folder runs/bench             two files of 4 GB: time and memory beside safetensors alone
    python tests/bench_weights.py --folder runs/bench --kontext   24 GB under the official names, one denoising step

The files hold random weights and stay in the folder until you remove it; an existing one is used again.
"""

import argparse
import gc
import json
import struct
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))
from model.mmdit import MMDiTConfig  # noqa: E402
from model.weights import fill, identify  # noqa: E402
from spatialdiff import PRESETS, Condition, SpatialDiff, build, make_noise, sample  # noqa: E402

TWO_B, FOUR_B = (MMDiTConfig(depth=n, depth_single_blocks=5 * n) for n in (2, 4))  # 2.2 and 4.2 billion parameters


def memory(kind: str) -> float:
    """GB of this process: RssAnon is what it owns, RssFile what is mapped from files, VmHWM the peak of both."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(kind)]
    return int(line.split()[1]) * 1024 / 1e9


def write_random(path: Path, config: MMDiTConfig, fp8: bool = False) -> None:
    """A transformer of random weights as one safetensors file, streamed: 2^25 numbers, shifted for each tensor. bf16; or,
    as in the fp8 file that people use, matrices in fp8 with a scale each."""
    if path.is_file():
        return
    module = build(replace(PRESETS["kontext"], mmdit=config), "mmdit", "meta")
    tensors = {name: ("BF16", tuple(tensor.shape)) for name, tensor in module.state_dict().items()}
    if fp8:
        matrices = [name for name, (_, shape) in tensors.items() if len(shape) == 2]
        tensors |= {name: ("F8_E4M3", tensors[name][1]) for name in matrices}
        tensors |= {name.removesuffix("weight") + "scale_weight": ("F32", ()) for name in matrices} | {"scaled_fp8": ("F8_E4M3", (0,))}
    dtypes = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
    sizes = {name: dtypes[dtype].itemsize * torch.Size(shape).numel() for name, (dtype, shape) in tensors.items()}
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + sizes[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    numbers = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (name, (dtype, shape)) in enumerate(tensors.items()):
            scale = 1.0 if len(shape) < 2 or fp8 else 0.5 * shape[-1] ** -0.5
            data = (numbers.roll(9973 * i) * scale).to(dtypes[dtype]).view(torch.uint8).numpy()
            for left in range(sizes[name], 0, -len(data)):
                file.write(data[:left])
    path.with_suffix(".tmp").rename(path)


class Peak:
    """The most own memory (GB) while the block runs, above what there was before; looked at every millisecond."""

    def __enter__(self):
        gc.collect()
        self.before, self.most, self.running = memory("RssAnon"), 0.0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.most = max(self.most, memory("RssAnon") - self.before)
            time.sleep(0.001)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()


def ours(path: Path, config: MMDiTConfig, dtype: torch.dtype):
    return fill(build(replace(PRESETS["kontext"], mmdit=config), "mmdit", "meta", dtype), identify([path])[0])


def alone(path: Path, config: MMDiTConfig, dtype: torch.dtype) -> dict:
    """The same tensors in memory with safetensors and torch alone: no names, shapes or values are checked."""
    with safe_open(path, "pt") as file:
        held = {name: file.get_tensor(name).to(dtype, copy=True) for name in file.keys() if not name.endswith("scale_weight")}
        for name in file.keys():
            if name.endswith("scale_weight"):
                held[name.removesuffix("scale_weight") + "weight"].mul_(file.get_tensor(name))
    return held


def compare(path: Path, config: MMDiTConfig, dtype: torch.dtype, rounds: int = 9) -> tuple[float, float]:
    """Both, alternating: median time, then the peak of own memory. Returns our peak and the bytes of the tensors, GB."""
    (source,) = identify([path])
    size = dtype.itemsize * sum(torch.Size(shape).numel() for _, _, shape in source.weights.values()) / 1e9
    seconds, peaks = {ours: [], alone: []}, {}
    for _ in range(rounds):
        for read in seconds:
            began = time.perf_counter()
            held = read(path, config, dtype)
            seconds[read].append(time.perf_counter() - began)
            del held
    for read in seconds:
        with Peak() as peak:
            held = read(path, config, dtype)
        peaks[read] = peak.most
        del held
    mine, theirs = (sorted(seconds[read])[rounds // 2] for read in (ours, alone))
    print(f"{path.name}, {path.stat().st_size / 1e9:.2f} GB, into {str(dtype)[6:]}, {size:.2f} GB: ours {mine:.2f} s, safetensors alone "
          f"{theirs:.2f} s, ratio {mine / theirs:.2f}; peak of own memory {peaks[ours]:.2f} GB, alone {peaks[alone]:.2f} GB")
    return peaks[ours], size


@torch.inference_mode()
def kontext_step(path: Path) -> None:
    """One Euler step of a 64 x 64 picture with 512 text tokens, modulations first, as sample.py runs it."""
    preset = PRESETS["kontext"]
    began = time.perf_counter()
    (source,) = identify([path])
    print(f"{source}: {len(source.weights)} tensors")
    with torch.device("meta"):
        model = SpatialDiff(preset)
    model.connector = model.spatial_head = None
    model.mmdit = fill(build(preset, "mmdit", "meta", torch.bfloat16), source).eval()
    print(f"loaded and checked in {time.perf_counter() - began:.1f} s; own memory {memory('RssAnon'):.2f} GB, mapped {memory('RssFile'):.2f} GB")
    generator, grid = torch.Generator().manual_seed(0), (4, 4)
    cond = Condition(torch.randn(1, 512, 4096, generator=generator), torch.randn(1, 768, generator=generator),
                     torch.randn(1, 16, 64, generator=generator), None, grid)
    began = time.perf_counter()
    x, _ = sample(model, cond, make_noise(preset, grid, [0]), 1, preset.guidance_sample, drop=True)
    print(f"one step of 544 tokens in {time.perf_counter() - began:.1f} s; own memory {memory('RssAnon'):.2f} GB, mapped "
          f"{memory('RssFile'):.2f} GB, peak of both {memory('VmHWM'):.2f} GB; output mean |x| {x.abs().mean():.3f}, finite {bool(x.isfinite().all())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the random files are kept")
    parser.add_argument("--kontext", action="store_true", help="the full transformer: needs 24 GB of disk")
    args = parser.parse_args()
    if args.kontext:
        write_random(args.folder / "kontext.safetensors", MMDiTConfig())
        kontext_step(args.folder / "kontext.safetensors")
    else:
        write_random(args.folder / "bf16.safetensors", TWO_B)
        write_random(args.folder / "fp8.safetensors", FOUR_B, fp8=True)
        compare(args.folder / "bf16.safetensors", TWO_B, torch.bfloat16)
        compare(args.folder / "bf16.safetensors", TWO_B, torch.float32)
        compare(args.folder / "fp8.safetensors", FOUR_B, torch.bfloat16)


if __name__ == "__main__":
    main()
