"""The FLUX side against diffusers and transformers, with the same random weights.    pytest tests/test_parity.py

Bounds are on the largest absolute difference unless said; outputs are of size 1 to 5. What each comparison gave is
printed with `pytest -s`.
"""

import numpy as np
import pytest
import torch

from model.connector import ConnectorConfig
from model.mmdit import MMDiT, MMDiTConfig, position_ids, rope_table, timestep_embedding
from model.spatial_head import SpatialHeadConfig
from model.text import CLIPConfig, CLIPText, T5Config, T5Encoder
from model.vae import AutoEncoder, VAEConfig, pack, unpack
from peers import (
    clip_peer, diffusers, from_diffusers, randomize, read_keymap, shapes_of, t5_peer, to_diffusers, transformer_peer,
    vae_peer,
)  # fmt: skip
from spatialdiff import Condition, Preset, SpatialDiff, encode_image, make_noise, sample, schedule

MMDIT = MMDiTConfig(16, 24, 48, 64, 4.0, 2, 2, 3, (4, 14, 14))
VAE = VAEConfig(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1, z_channels=4)
SCHEDULER = {  # scheduler/scheduler_config.json of FLUX.1-Kontext-dev
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
}  # fmt: skip
TARGET, REFERENCE, TEXT = (6, 4), (5, 4), 7  # token grids, text tokens


def difference(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours.detach().double() - theirs.detach().double()).abs().max().item()


def check(name, ours, theirs, bound):
    found = difference(ours, theirs)
    print(f"{name}: {found:.1e}")
    assert found <= bound, f"{name}: {found:.2e} > {bound:.0e}"


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(dtype=torch.float32):
    """txt, target, reference, pooled, t, guidance of a batch of two."""
    n, m = (h * w for h, w in (TARGET, REFERENCE))
    tensors = (draw(1, 2, TEXT, 48), draw(2, 2, n, 16), draw(3, 2, m, 16), draw(4, 2, 24))
    return [x.to(dtype) for x in (*tensors, torch.tensor([0.73, 0.21]), torch.tensor([2.5, 2.5]))]


def grid_ids(index, grid):
    return position_ids(index, *map(torch.arange, grid))


def ours_velocity(mmdit, txt, target, reference, pooled, t, guidance):
    ids = torch.cat((torch.zeros(TEXT, 3), grid_ids(0, TARGET), grid_ids(1, REFERENCE)))
    mods = mmdit.modulations(t, guidance, pooled)
    return mmdit(txt, target, reference, None, rope_table(ids, MMDIT.axes_dim, MMDIT.theta), mods)[0]


def peer_ids(index, grid):
    ids = diffusers.FluxKontextPipeline._prepare_latent_image_ids(2, *grid, "cpu", torch.float32)
    ids[:, 0] = index
    return ids


def peer_velocity(peer, txt, target, reference, pooled, t, guidance):
    out = peer(
        hidden_states=torch.cat((target, reference), dim=1),
        encoder_hidden_states=txt,
        pooled_projections=pooled,
        timestep=t,
        guidance=guidance,
        txt_ids=torch.zeros(TEXT, 3),
        img_ids=torch.cat((peer_ids(0, TARGET), peer_ids(1, REFERENCE))),
    ).sample
    return out[:, : target.shape[1]]


@pytest.fixture
def transformers_pair():
    mmdit = randomize(MMDiT(MMDIT))
    return mmdit, transformer_peer(mmdit)


@pytest.fixture
def vaes():
    vae = randomize(AutoEncoder(VAE))
    return vae, vae_peer(vae)


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_key_map_and_back_is_bit_identical(name):
    """Ours -> diffusers -> ours; and no tensor of diffusers is left out or made up."""
    module = randomize({"transformer": lambda: MMDiT(MMDIT), "vae": lambda: AutoEncoder(VAE)}[name]())
    peer = {"transformer": transformer_peer, "vae": vae_peer}[name](module)
    keymap, tensors = read_keymap(name), module.state_dict()
    theirs = to_diffusers(tensors, keymap, shapes_of(peer))
    assert shapes_of(peer) == {key: x.shape for key, x in theirs.items()}
    back = from_diffusers(theirs, keymap, tensors)
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], x) for key, x in tensors.items())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.float64, 1e-7)])
def test_transformer(transformers_pair, dtype, bound):
    ours, peer = (module.to(dtype) for module in transformers_pair)
    with torch.no_grad():
        check(f"transformer {dtype}", ours_velocity(ours, *inputs(dtype)), peer_velocity(peer, *inputs(dtype)), bound)


def test_transformer_gradients(transformers_pair):
    """Of every input and every parameter, in fp64, relative to the gradient's largest entry.

    Both codes keep the rotations, the time embedding and the rotated q and k in fp32, ours the normed q and k too. Each
    rounds by 2^-24 = 6e-8 of a value; the bound allows for 32 of them all adding up: 2^-19 = 2e-6.
    """
    ours, peer = (module.double() for module in transformers_pair)
    weights = draw(5, 2, TARGET[0] * TARGET[1], 16).double()
    ours_in, peer_in = ([x.requires_grad_() for x in inputs(torch.float64)] for _ in "ab")
    (ours_velocity(ours, *ours_in) * weights).sum().backward()
    (peer_velocity(peer, *peer_in) * weights).sum().backward()
    a = {name: p.grad for name, p in ours.named_parameters()}
    b = from_diffusers({name: p.grad for name, p in peer.named_parameters()}, read_keymap("transformer"), a)
    names = ("txt", "target", "reference", "pooled", "t", "guidance")
    a |= zip(names, [x.grad for x in ours_in])
    b |= zip(names, [x.grad for x in peer_in])
    relative = {name: difference(a[name], b[name]) / b[name].abs().max().item() for name in a}
    worst = max(relative, key=relative.get)
    print(f"gradients: {relative[worst]:.1e} at {worst}")
    assert relative[worst] <= 2**-19, worst


@pytest.mark.parametrize("training", [False, True])  # two formulations of attention on a CPU
def test_transformer_bf16(transformers_pair, training):
    """Relative error of the norm. diffusers rounds time and guidance to bf16 before and after the factor 1000; ours
    stays in fp32, so it is given what diffusers sees."""
    ours, peer = (module.bfloat16() for module in transformers_pair)
    *tensors, t, guidance = inputs(torch.bfloat16)
    with torch.no_grad():
        theirs = peer_velocity(peer, *tensors, t, guidance).float()
    with torch.set_grad_enabled(training):
        out = ours_velocity(ours, *tensors, *((x * 1000).float() / 1000 for x in (t, guidance))).detach().float()
    error = ((out - theirs).norm() / theirs.norm()).item()
    print(f"bf16: {error:.1e}")
    assert error <= 2e-2


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-5), (torch.float64, 1e-9)])
@torch.no_grad()
def test_autoencoder(vaes, dtype, bound):
    ours, peer = (module.to(dtype) for module in vaes)
    image, z = (x.to(dtype) for x in (draw(1, 2, 3, 64, 48).clamp(-1, 1), draw(2, 2, 4, 6, 8)))
    shift, scale = peer.config.shift_factor, peer.config.scaling_factor
    encoded = (peer.encode(image).latent_dist.mode() - shift) * scale
    check(f"VAE encode {dtype}", ours.encode(image), encoded, bound)
    check(f"VAE decode {dtype}", ours.decode(z), peer.decode(z / scale + shift).sample, bound)


@pytest.mark.parametrize("head_dim", [16, 10])  # heads * head_dim equals the width, and does not
@torch.no_grad()
def test_t5(head_dim):
    """160 tokens reach the last bucket (91); padding takes part: no mask. Scores are unscaled: larger weights would make
    the softmax amplify fp32 roundings beyond the bound."""
    ours = randomize(T5Encoder(T5Config(200, 64, 3, 4, head_dim, 128)), std=0.05)
    ids = torch.randint(2, 200, (2, 160), generator=torch.Generator().manual_seed(1))
    ids[1, 100:] = 0
    check("T5", ours(ids), t5_peer(ours)(input_ids=ids, attention_mask=None).last_hidden_state, 5e-6)


@pytest.mark.parametrize("eos", [2, 150])  # 2: the largest id, here 199; otherwise the first end token
@torch.no_grad()
def test_clip(eos):
    ours = randomize(CLIPText(CLIPConfig(200, 77, 64, 3, 4, 128, eos_token_id=eos)), std=0.15)
    ids = torch.randint(3, 150, (3, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 198  # start token
    for row, end in zip(ids, (76, 30, 40)):
        row[end:] = 199 if eos == 2 else eos
    ids[2, 20] = 2  # an id like any other
    check(f"CLIP eos {eos}", ours(ids), clip_peer(ours)(input_ids=ids).pooler_output, 5e-6)


@pytest.mark.parametrize("tokens, steps", [(12, 6), (256, 4), (1024, 30), (1053, 7), (4096, 28), (4150, 50)])
def test_schedule(tokens, steps):
    from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    check("sigmas", schedule(Preset(), steps, tokens), scheduler.sigmas, 1e-6)


def test_timestep_embedding():
    from diffusers.models.embeddings import Timesteps

    t = torch.cat((torch.linspace(0, 1, 101), torch.tensor([1.5, 2.5, 3.5, 7.0])))
    peer = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)
    check("timestep embedding", timestep_embedding(t), peer(1000 * t), 1e-6)


def test_packing_and_ids():
    pipeline, latent = diffusers.FluxKontextPipeline, draw(1, 2, 4, 12, 10)
    tokens = pipeline._pack_latents(latent, 2, 4, 12, 10)
    assert torch.equal(pack(latent), tokens)
    assert torch.equal(unpack(tokens, 12, 10), pipeline._unpack_latents(tokens, 96, 80, 8))
    assert torch.equal(grid_ids(1, (6, 5)), peer_ids(1, (6, 5)))


def test_rope_table():
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids, axes = torch.cat((grid_ids(0, (3, 98)), grid_ids(1, (98, 2)))), MMDiTConfig().axes_dim
    cos, sin = FluxPosEmbed(10_000, axes)(ids)  # each value twice, for both channels of a pair
    check("rotations", rope_table(ids, axes, 10_000), torch.stack((cos, sin), dim=-1)[:, ::2], 1e-7)


def test_edit_equals_the_kontext_pipeline(transformers_pair, vaes):
    """Six steps from the picture to the latents, everything but the text encoders."""
    connector = ConnectorConfig(in_dim=8, out_dim=64, width=64, heads=2, depth=1, queries=4)
    preset = Preset("parity", mmdit=MMDIT, vae=VAE, connector=connector, spatial_head=SpatialHeadConfig(64, 16))
    model = SpatialDiff(preset)
    model.mmdit, peer = transformers_pair
    grid, seeds = (4, 3), [1, 2]
    images = torch.randint(0, 256, (2, 64, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    txt, pooled, noise = draw(4, 2, TEXT, 48), draw(5, 2, 24), make_noise(preset, grid, seeds)
    with torch.inference_mode():
        cond = Condition(txt, pooled, encode_image(vaes[0], images), None, grid)
    ours, _ = sample(model, cond, noise, 6, 2.5)

    pipeline = diffusers.FluxKontextPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        vae=vaes[1],
        transformer=peer,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        image=images.permute(0, 3, 1, 2) / 255,
        prompt_embeds=txt,
        pooled_prompt_embeds=pooled,
        latents=noise,
        height=64,
        width=48,
        max_area=64 * 48,  # otherwise every request becomes one megapixel
        _auto_resize=False,
        num_inference_steps=6,
        guidance_scale=2.5,
        output_type="latent",
    ).images
    check("edit", ours, theirs, 5e-5)
    assert difference(ours, noise) > 0.1
