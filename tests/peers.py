"""Tiny networks of diffusers and transformers that hold our random weights. Used by tests/test_parity.py.

Names are converted with the tables tests/data/manifests/keymap_*.tsv, which were made apart from model/weights.py: a row
is our name, the diffusers names (concatenated along dimension 0) and what else changes. Sizes follow our config; what
FLUX has fixed (epsilons, buckets, latent scale and shift) is written out, so that our defaults are compared too.
"""

from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

MANIFESTS = Path(__file__).parent / "data" / "manifests"


def randomize(module, std=0.08, seed=0):
    """Every parameter from N(0, std), norm scales from N(1, 0.1): fresh initialisations hide forgotten ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        scale = name.endswith(".scale") or ("norm" in name and name.endswith(".weight"))
        p.data.normal_(1.0 if scale else 0.0, 0.1 if scale else std, generator=generator)
    return module.eval()


def read_keymap(name):
    """{our name: (names in diffusers, operation)} of "transformer" or "vae"."""
    lines = (MANIFESTS / f"keymap_{name}.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return {ours: (theirs.split(","), op) for ours, theirs, op in rows}


def swap_halves(x):
    return torch.cat(x.chunk(2)[::-1])


def to_diffusers(tensors, keymap, shapes):
    """Our tensors under diffusers' names; `shapes`: of diffusers' tensors."""
    converted = {}
    for name, x in tensors.items():
        theirs, op = keymap[name]
        if op == "swap_halves":
            x = swap_halves(x)
        if op == "squeeze_1x1":
            x = x[:, :, 0, 0]
        converted |= zip(theirs, x.split([shapes[key][0] for key in theirs]), strict=True)
    return converted


def from_diffusers(tensors, keymap, names):
    """diffusers' tensors under our `names`."""
    converted = {}
    for name in names:
        theirs, op = keymap[name]
        x = torch.cat([tensors[key] for key in theirs])
        if op == "swap_halves":
            x = swap_halves(x)
        converted[name] = x[:, :, None, None] if op == "squeeze_1x1" else x
    return converted


def load(peer, tensors):
    peer.load_state_dict(tensors, strict=True)
    return peer.eval()


def shapes_of(module):
    return {name: x.shape for name, x in module.state_dict().items()}


def transformer_peer(ours):
    c = ours.config
    peer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=c.in_channels,
        num_layers=c.depth,
        num_single_layers=c.depth_single_blocks,
        attention_head_dim=c.hidden_size // c.num_heads,
        num_attention_heads=c.num_heads,
        joint_attention_dim=c.context_in_dim,
        pooled_projection_dim=c.vec_in_dim,
        guidance_embeds=c.guidance_embed,
        axes_dims_rope=c.axes_dim,
    )
    return load(peer, to_diffusers(ours.state_dict(), read_keymap("transformer"), shapes_of(peer)))


def vae_peer(ours):
    c = ours.config
    levels = len(c.ch_mult)
    peer = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=[c.ch * m for m in c.ch_mult],
        layers_per_block=c.num_res_blocks,
        latent_channels=c.z_channels,
        norm_num_groups=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return load(peer, to_diffusers(ours.state_dict(), read_keymap("vae"), shapes_of(peer)))


def t5_peer(ours):
    c = ours.config
    config = transformers.T5Config(
        vocab_size=c.vocabulary,
        d_model=c.width,
        d_kv=c.head_dim,
        d_ff=c.mlp_hidden,
        num_layers=c.depth,
        num_heads=c.heads,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
    )
    tensors = ours.state_dict()
    return load(transformers.T5EncoderModel(config), tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]})


def clip_peer(ours):
    c = ours.config
    config = transformers.CLIPTextConfig(
        vocab_size=c.vocabulary,
        hidden_size=c.width,
        intermediate_size=c.mlp_hidden,
        num_hidden_layers=c.depth,
        num_attention_heads=c.heads,
        max_position_embeddings=c.length,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=c.vocabulary - 2,
        eos_token_id=c.eos_token_id,
    )
    tensors = {name.removeprefix("text_model."): x for name, x in ours.state_dict().items()}  # files keep the prefix
    return load(transformers.CLIPTextModel(config), tensors)
