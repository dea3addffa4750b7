"""Edit one picture from the command line.

    python sample.py                                                      a rendered scene and its own instruction
    python sample.py --image x.png --prompt "move the red cube behind the blue sphere"
    python sample.py --image x.png --prompt "..." --weights weights      with the official files there, see weights.md

Writes the edit at the picture's own size, as a PNG that carries prompt, seed, steps, preset and weights as text.
"""

import time

START = time.perf_counter()  # before the slow imports

import argparse
import hashlib
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import kernels
import scenes
from data import open_image, resize, save_png, side_by_side, working_size
from evaluation.metrics import measure_depth
from model.text import unknown_words
from spatialdiff import (
    PRESETS, Condition, build, choose_device, choose_preset, decode_depth, decode_image, default_folders, encode_geometry,
    encode_image, encode_text, find_frozen, find_learned, load_model, load_part, load_tokenizers, make_noise, sample,
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    edit = parser.add_argument_group("edit")
    edit.add_argument("--image", type=Path, help="picture to edit, any format; default: a rendered scene, chosen by --seed")
    edit.add_argument("--prompt", help="instruction; default: the rendered scene's own")
    edit.add_argument("--seed", type=int, default=0, help="of the noise, and of the rendered scene (default 0)")
    edit.add_argument("--level", default="plain", choices=scenes.LEVELS, help="difficulty of the rendered scene")
    edit.add_argument("--steps", type=int, help="Euler steps; default: the preset's (FLUX: 30)")
    edit.add_argument("--guidance", type=float, help="guidance embedding; default: the preset's (FLUX: 2.5)")
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=tuple(PRESETS), help="default: that of --weights; nano without")
    model.add_argument("--weights", type=Path, help="folder of the networks, official files included, in any arrangement")
    model.add_argument("--checkpoint", type=Path, help="folder of Connector, spatial head and LoRA, or a LoRA file alone; "
                       "default: stage2 in --weights; without any: plain FLUX Kontext")
    model.add_argument("--no-ism", action="store_true", help="without spatial tokens (paper's ablation)")
    model.add_argument("--device", help="default: cuda if there is one, else cpu")
    model.add_argument("--attention", default="auto", choices=kernels.ATTENTION,
                       help="auto: on a GPU the faster of Triton and SDPA, timed once; SDPA on a CPU and with --compile")
    model.add_argument("--compile", action="store_true", help="torch.compile the transformer: pays from some dozens of steps on")
    model.add_argument("--dtype", help="bfloat16 or float32; default: bfloat16, of the small presets on a CPU float32")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("edit.png"), help="PNG to write (default edit.png)")
    output.add_argument("--compare", action="store_true",
                        help="also OUTPUT_compare.png: input, edit, truth if known; always with a rendered scene")
    output.add_argument("--depth", action="store_true",
                        help="also OUTPUT_depth.png: depth decoded from the spatial tokens of the last step, near is bright")
    return parser.parse_args()


def main() -> None:
    args = parse()
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    warnings.simplefilter("once")  # T5 and CLIP may cut the same words
    try:
        edit(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def edit(args: argparse.Namespace) -> None:
    # What is asked for, checked before anything is loaded.
    preset = choose_preset(args.preset, args.weights)
    weights, checkpoint = default_folders(preset, args.weights, args.checkpoint)
    steps = preset.steps if args.steps is None else args.steps
    guidance = preset.guidance_sample if args.guidance is None else args.guidance
    if steps < 1 or args.seed < 0:
        raise ValueError(f"--steps must be at least 1 and --seed at least 0, not {steps} and {args.seed}.")
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, since the edit carries its settings as PNG text; found {args.output}.")
    if args.image and args.output.resolve() == args.image.resolve():
        raise ValueError(f"--output would overwrite {args.image}, the picture to edit; give another name.")
    device, dtype, reason = choose_device(preset, args.device, args.dtype)
    kernels.choose(args.attention, device=device)

    prompt, pair = args.prompt, None  # pair: the rendered scene whose truth is known
    if args.image:
        picture = open_image(args.image)
    else:
        pair = scenes.make_pair(args.seed, args.level, size=preset.side, index=0, extras=False)
        picture = pair.ref
        if prompt is None:
            prompt = pair.instruction
        else:
            pair = None
    if not any(c.isalnum() for c in prompt or ""):
        raise ValueError('An edit needs an instruction: give --prompt "move the ... to the left of the ...".')

    sources = find_learned(preset, checkpoint, asked=args.checkpoint is not None)
    use_spatial = not args.no_ism and "connector" in sources
    sources |= find_frozen(preset, weights, ("t5", "clip", "vae", "mmdit") + ("vggt",) * use_spatial)
    tokenizers = load_tokenizers(preset, weights)
    if unknown := unknown_words(tokenizers[0], prompt):
        raise ValueError(f"The preset {preset.name} does not know the words: {', '.join(unknown)}. "
                         f"It knows {scenes.known_words(tokenizers[0].get_vocab())}.")
    if args.depth and not (use_spatial and "spatial_head" in sources):
        raise ValueError("--depth needs the spatial tokens and their head, but "
                         + (f"{checkpoint} does not hold both." if not args.no_ism else "--no-ism leaves them out."))
    sha256 = ThreadPoolExecutor(1).submit(  # of the weights, while the networks run
        lambda: hashlib.sha256("".join(source.digest() for source in sources.values()).encode()).hexdigest())

    # The facts.
    H, W = picture.shape[:2]
    h, w = working_size(H, W, preset.side**2, square=not preset.keep_aspect)
    grid = (h // 16, w // 16)
    parts = [part for part in sources if part != "lora" and (use_spatial or part not in ("connector", "spatial_head"))]
    count = {part: sum(p.numel() for p in build(preset, part, "meta").parameters()) for part in parts}
    held = max(count["t5"] + count["clip"], count.get("vggt", 0),
               count["mmdit"] + count.get("connector", 0) + count.get("spatial_head", 0)) + count["vae"]
    for part in parts + ["lora"] * ("lora" in sources):
        print(f"{part:13}{sources[part]}")
    print(f"model        preset {preset.name}: " + (
        f"SpatialDiff trained into {checkpoint}" if use_spatial else
        "spatial tokens left out, as asked" if "connector" in sources else
        f"plain FLUX Kontext, the paper's baseline{' with a LoRA' * ('lora' in sources)}: no Connector in {checkpoint}"))
    print(f"device       {device} ({reason}), {str(dtype).removeprefix('torch.')}, kernels: {kernels.describe(device)}")
    print("parameters   " + ", ".join(f"{part} {n / 1e6:.2f}M" for part, n in count.items())
          + f"; at most {held * dtype.itemsize / 1e9:.2f} GB of them at a time")
    print(f"edit         {W} x {H} pixels at {w} x {h}, {steps} steps, guidance {guidance}, seed {args.seed}, "
          f"{'with' if use_spatial else 'without'} spatial tokens")
    print(f"prompt       {prompt}")
    if args.image and preset.name == "nano":
        print("note         nano was trained on rendered scenes only; photographs need the official weights and --preset "
              "kontext, see weights.md")

    with torch.inference_mode():
        # Encode, and free each network before the next is loaded. The autoencoder stays: it is small.
        began = time.perf_counter()
        t5, clip = (load_part(preset, sources[part], device, dtype) for part in ("t5", "clip"))
        txt, pooled = encode_text(t5, clip, tokenizers, [prompt], preset)
        del t5, clip
        images = torch.from_numpy(resize(picture, h, w)).unsqueeze(0).to(device)  # (1, h, w, 3) uint8
        geometry = None
        if use_spatial:
            vggt = load_part(preset, sources["vggt"], device, dtype)
            geometry = encode_geometry(vggt, images, preset)
            del vggt
        vae = load_part(preset, sources["vae"], device, dtype)
        cond = Condition(txt, pooled, encode_image(vae, images), geometry, grid)
        free(device)
        encoded = time.perf_counter()

        # Denoise, and free the transformer.
        model = load_model(preset, {p: s for p, s in sources.items() if use_spatial or p in ('mmdit', 'lora')}, device, dtype)
        if args.compile:
            model.mmdit.compile_layers()
        noise = make_noise(preset, grid, [args.seed]).to(device)
        tokens, spatial = sample(model, cond, noise, steps, guidance, drop=True)
        depth = model.spatial_head(spatial) if args.depth else None  # (1, K, packed latent)
        queries = model.connector.grid if args.depth else 0
        del model, cond
        free(device)
        denoised = time.perf_counter()

        # Decode, back at the picture's own size.
        result = resize(decode_image(vae, tokens, grid)[0].cpu().numpy(), H, W)
        if args.depth:
            depth = resize(decode_depth(vae, depth, queries)[0].cpu().numpy(), H, W)
    ended = time.perf_counter()

    text = {"prompt": prompt, "seed": str(args.seed), "steps": str(steps), "guidance": str(guidance),
            "preset": preset.name, "spatial_tokens": "yes" if use_spatial else "no", "weights_sha256": sha256.result()}
    stem = args.output.with_suffix("")
    written = {args.output: result}
    if args.compare or not args.image:
        written[Path(f"{stem}_compare.png")] = side_by_side([p for p in (picture, result, pair and pair.tgt, depth) if p is not None])
    if args.depth:
        written[Path(f"{stem}_depth.png")] = depth
    for path, image in written.items():
        save_png(path, image, text)
    if args.depth and pair:
        found = measure_depth(depth[..., 0], pair)
        print(f"depth        off by {found['depth_rmse']:.3f} of a range of 2 (root mean square, after the best scale and shift); "
              + ("no object to compare the moved one with" if math.isnan(found["depth_order"]) else
                 f"before or behind the moved object: {found['depth_order']:.0%} of the others right"))
    print(f"time         encode {encoded - began:.2f} s, denoise {denoised - encoded:.2f} s, decode {ended - denoised:.2f} s, "
          f"{time.perf_counter() - START:.2f} s in all")
    print("wrote        " + ", ".join(map(str, written)))


def free(device: torch.device) -> None:
    """Gives the memory of deleted networks back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
