"""LoRA: exact at the start, exact when merged, and files that other programs read. python -m pytest tests/test_lora.py"""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import lora
from model.mmdit import MMDiT, MMDiTConfig, position_ids, rope_table

TINY = MMDiTConfig(in_channels=16, vec_in_dim=24, context_in_dim=48, hidden_size=64, num_heads=2, depth=2,
                   depth_single_blocks=3, axes_dim=(4, 14, 14))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MMDiT(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.08)
    return model


def run(model):
    dtype = model.img_in.weight.dtype
    g = torch.Generator().manual_seed(1)
    txt, target, reference, pooled = (torch.randn(2, *shape, generator=g, dtype=torch.float64).to(dtype)
                                      for shape in ((7, 48), (12, 16), (10, 16), (24,)))
    ids = torch.cat([torch.zeros(7, 3)] + [position_ids(i, torch.arange(r), torch.arange(c))
                                           for i, r, c in ((0, 4, 3), (1, 2, 5))])
    pe = rope_table(ids, TINY.axes_dim, TINY.theta)
    with torch.no_grad():
        mods = model.modulations(torch.tensor([0.73, 0.21]), torch.tensor([2.5, 2.5]), pooled)
        return model(txt, target, reference, None, pe, mods)[0]


def randomise(model):
    g = torch.Generator().manual_seed(2)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.05, generator=g)


def test_equals_base_until_trained(model):
    before = run(model)
    lora.inject(model, rank=4, alpha=8)
    assert torch.equal(run(model), before)
    learns = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"lora_A", "lora_B"}
    with pytest.raises(ValueError, match="already carries"):
        lora.inject(model, rank=4, alpha=8)


def test_merge_equals_wrapped_in_double(model):
    model.double()
    before, names = run(model), set(model.state_dict())
    lora.inject(model, rank=4, alpha=8)
    randomise(model)
    wrapped = run(model)
    lora.merge(model)
    assert set(model.state_dict()) == names
    assert (wrapped - before).norm() > 1e-2 * before.norm()
    assert (run(model) - wrapped).norm() <= 1e-6 * wrapped.norm()


def test_merge_into_bf16_rounds_once(model):
    model.bfloat16()
    W = model.single_blocks[1].linear1.weight.double()
    lora.inject(model, rank=4, alpha=2)
    randomise(model)
    layer = model.single_blocks[1].linear1
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    exact = W + 0.5 * layer.lora_B.double() @ layer.lora_A.double()
    lora.merge(model)
    got = model.single_blocks[1].linear1.weight
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # half a unit in the last of 8 bits


def test_modulation_is_untouched(model):
    lora.inject(model, rank=4, alpha=4)
    assert isinstance(model.double_blocks[0].img_mod.lin, torch.nn.Linear)
    assert isinstance(model.double_blocks[1].txt_mod.lin, torch.nn.Linear)
    assert isinstance(model.single_blocks[2].modulation.lin, torch.nn.Linear)
    assert isinstance(model.final_layer.linear, torch.nn.Linear)
    assert len(lora.lora_layers(model)) == 2 * 8 + 3 * 2


def test_file_round_trip_is_bit_equal(model, tmp_path):
    lora.inject(model, rank=4, alpha=4)
    randomise(model)
    output = run(model)
    weights = {n: (layer.lora_A.clone(), layer.lora_B.clone()) for n, layer in lora.lora_layers(model).items()}
    lora.save(model, tmp_path / "lora.safetensors", {"stage": "2"})
    for layer in lora.lora_layers(model).values():
        layer.lora_B.data.zero_()
    metadata = lora.load(model, tmp_path / "lora.safetensors")
    assert metadata == {"stage": "2", "format": "pt"}
    for name, layer in lora.lora_layers(model).items():
        assert torch.equal(layer.lora_A, weights[name][0]) and torch.equal(layer.lora_B, weights[name][1])
    assert torch.equal(run(model), output)


def test_file_follows_the_diffusers_layout(model, tmp_path):
    lora.inject(model, rank=4, alpha=12)
    randomise(model)
    lora.save(model, tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    state = load_file(tmp_path / "lora.safetensors")
    assert len(state) == 2 * (2 * 12 + 3 * 5)
    qkv, linear1 = model.double_blocks[1].txt_attn.qkv, model.single_blocks[2].linear1
    for part, rows, layer in (
        ("transformer_blocks.1.attn.add_q_proj", slice(0, 64), qkv),
        ("transformer_blocks.1.attn.add_k_proj", slice(64, 128), qkv),
        ("transformer_blocks.1.attn.add_v_proj", slice(128, 192), qkv),
        ("transformer_blocks.0.attn.to_out.0", slice(None), model.double_blocks[0].img_attn.proj),
        ("transformer_blocks.0.attn.to_add_out", slice(None), model.double_blocks[0].txt_attn.proj),
        ("transformer_blocks.0.ff.net.0.proj", slice(None), model.double_blocks[0].img_mlp[0]),
        ("transformer_blocks.0.ff_context.net.2", slice(None), model.double_blocks[0].txt_mlp[2]),
        ("single_transformer_blocks.2.attn.to_v", slice(128, 192), linear1),
        ("single_transformer_blocks.2.proj_mlp", slice(192, 448), linear1),
        ("single_transformer_blocks.2.proj_out", slice(None), model.single_blocks[2].linear2),
    ):
        assert torch.equal(state[f"transformer.{part}.lora_A.weight"], layer.lora_A)
        assert torch.equal(state[f"transformer.{part}.lora_B.weight"], layer.lora_B[rows] * 3)  # alpha / rank


def test_parts_trained_apart_fuse_exactly(model, tmp_path):
    """q, k with their own A and rank, v absent: the delta of each part must come out, and v must stay."""
    g = torch.Generator().manual_seed(3)
    q, k = ((torch.randn(r, 64, generator=g), torch.randn(64, r, generator=g)) for r in (2, 5))
    name = "transformer.transformer_blocks.0.attn.to_"
    save_file({f"{name}{part}.lora_{X}.weight": tensor for part, factors in (("q", q), ("k", k))
               for X, tensor in zip("AB", factors)}, tmp_path / "apart.safetensors")
    W = model.double_blocks[0].img_attn.qkv.weight.detach().clone()
    other = model.single_blocks[0].linear1
    lora.load(model, tmp_path / "apart.safetensors")
    assert model.single_blocks[0].linear1 is other
    lora.merge(model)
    delta = model.double_blocks[0].img_attn.qkv.weight - W
    expected = torch.cat([q[1] @ q[0], k[1] @ k[0], torch.zeros(64, 64)])
    torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-5)


def test_wrong_files_are_refused_in_a_sentence(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="found none"):
        lora.load(model, tmp_path / "absent.safetensors")
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({"lora_unet_img_in.alpha": torch.ones(())}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="lora_unet_img_in.alpha"):
        lora.load(model, tmp_path / "foreign.safetensors")
    save_file({key.format("A"): torch.zeros(4, 32), key.format("B"): torch.zeros(64, 4)}, tmp_path / "size.safetensors")
    with pytest.raises(ValueError, match="made for another model"):
        lora.load(model, tmp_path / "size.safetensors")


def test_kontext_counts():
    """228 fused modules, 3,502,080 parameters per rank: computed from the official checkpoint's shapes."""
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig())
    lora.inject(model, rank=2, alpha=2)
    layers = lora.lora_layers(model)
    assert len(layers) == 228
    assert sum(p.numel() for layer in layers.values() for p in (layer.lora_A, layer.lora_B)) == 2 * 3_502_080
