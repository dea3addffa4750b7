"""Text encoders against formulas written here in float64, and tokenization.

    pytest tests/test_text.py
"""

import math

import pytest
import torch

from model.text import (
    CLIPConfig,
    CLIPText,
    T5Config,
    T5Encoder,
    build_word_tokenizer,
    load_tokenizer,
    relative_buckets,
    tokenize,
    unknown_words,
)

# first distance of each bucket of T5 (32 buckets, 128): recorded from transformers 5.23.0
FIRST_DISTANCES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
T5_TINY = T5Config(vocabulary=50, width=24, depth=2, heads=3, head_dim=10, mlp_hidden=40)
CLIP_TINY = CLIPConfig(vocabulary=50, length=9, width=24, depth=2, heads=3, mlp_hidden=40, eos_token_id=1)


def randomize(module):
    """Every parameter random, norm scales and biases too, so that none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.data.normal_(std=0.3, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return module.requires_grad_(False)


def bucket(distance):
    f = max(i for i, first in enumerate(FIRST_DISTANCES) if first <= abs(distance))
    return f + (16 if distance > 0 else 0)


def weights(module):
    return {key: value.double() for key, value in module.state_dict().items()}


def attention(q, k, v, heads, scale, bias):
    """q, k, v (L, H·D) in float64; softmax(scale · q kᵀ + bias) v, head by head."""
    outputs = []
    for h, (q, k, v) in enumerate(zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1))):
        scores = scale * q @ k.T + bias[h]
        p = (scores - scores.max(-1, keepdim=True).values).exp()
        outputs.append(p / p.sum(-1, keepdim=True) @ v)
    return torch.cat(outputs, -1)


def t5_reference(w, ids, heads):
    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]

    L = len(ids)
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = torch.stack([torch.stack([table[bucket(k - q)] for k in range(L)]) for q in range(L)]).permute(2, 0, 1)
    x = w["shared.weight"][ids]
    for i in range(2):
        p = f"encoder.block.{i}.layer.0."
        h = norm(x, p + "layer_norm")
        q, k, v = (h @ w[f"{p}SelfAttention.{name}.weight"].T for name in "qkv")
        x = x + attention(q, k, v, heads, 1.0, bias) @ w[p + "SelfAttention.o.weight"].T
        p = f"encoder.block.{i}.layer.1."
        h = norm(x, p + "layer_norm")
        g, u = (h @ w[f"{p}DenseReluDense.{name}.weight"].T for name in ("wi_0", "wi_1"))
        g = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        x = x + (g * u) @ w[p + "DenseReluDense.wo.weight"].T
    return norm(x, "encoder.final_layer_norm")


def clip_reference(w, ids, heads):
    w = {key.removeprefix("text_model."): value for key, value in w.items()}

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    L = len(ids)
    x = w["embeddings.token_embedding.weight"][ids] + w["embeddings.position_embedding.weight"][:L]
    causal = torch.full((L, L), -math.inf, dtype=torch.float64).triu(1).expand(heads, L, L)
    for i in range(2):
        p = f"encoder.layers.{i}."
        h = norm(x, p + "layer_norm1")
        q, k, v = (linear(h, f"{p}self_attn.{name}_proj") for name in "qkv")
        h = attention(q, k, v, heads, (x.shape[-1] // heads) ** -0.5, causal)
        x = x + linear(h, p + "self_attn.out_proj")
        h = linear(norm(x, p + "layer_norm2"), p + "mlp.fc1")
        x = x + linear(h / (1 + torch.exp(-1.702 * h)), p + "mlp.fc2")
    return norm(x, "final_layer_norm")


def test_buckets():
    buckets = relative_buckets(512, 32, 128)
    for q, k in ((0, 511), (511, 0), (300, 300), *((200, 200 + d) for d in range(-200, 200))):
        assert buckets[q, k] == bucket(k - q)


def test_t5_equals_the_formula():
    t5 = randomize(T5Encoder(T5_TINY))
    ids = torch.randint(0, 50, (2, 110), generator=torch.Generator().manual_seed(1))  # beyond the last bucket's 91
    ids[1, 70:] = 0  # padding takes part
    expected = torch.stack([t5_reference(weights(t5), row, 3) for row in ids])
    torch.testing.assert_close(t5(ids).double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(t5.double()(ids), expected, atol=1e-12, rtol=0)


def test_clip_equals_the_formula():
    clip = randomize(CLIPText(CLIP_TINY))
    ids = torch.tensor([[5, 7, 3, 1, 0, 0], [9, 1, 8, 1, 2, 2], [1, 4, 4, 4, 4, 4]])  # the first end token counts
    expected = torch.stack([clip_reference(weights(clip), row, 3)[end] for row, end in zip(ids, (3, 1, 0))])
    torch.testing.assert_close(clip(ids).double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(clip.double()(ids), expected, atol=1e-12, rtol=0)


def test_clip_end_token_by_largest_id():
    clip = randomize(CLIPText(CLIPConfig(vocabulary=50, length=9, width=24, depth=2, heads=3, mlp_hidden=40)))
    ids = torch.tensor([[48, 7, 2, 49, 49, 49], [48, 49, 8, 3, 2, 49]])
    expected = torch.stack([clip_reference(weights(clip), row, 3)[end] for row, end in zip(ids, (3, 1))])
    torch.testing.assert_close(clip(ids).double(), expected, atol=2e-5, rtol=0)


def test_clip_sees_nothing_after_the_end_token():
    clip = randomize(CLIPText(CLIP_TINY))
    a, b = clip(torch.tensor([[5, 7, 1, 0, 0, 0], [5, 7, 1, 9, 30, 4]]))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    build_word_tokenizer(["move the red cube", "to the left of", "Blue", "sphere"]).save(str(path))
    return load_tokenizer(path)


def test_word_ids(tokenizer):
    words = ["blue", "cube", "left", "move", "of", "red", "sphere", "the", "to"]  # alphabetical, after three specials
    assert tokenizer.get_vocab_size() == 12
    ids = tokenize(tokenizer, ["Move the RED cube, to the left of the blue sphere!", ""], 14)
    sentence = "move the red cube to the left of the blue sphere".split()
    assert ids.tolist() == [[3 + words.index(word) for word in sentence] + [1, 0, 0], [1] + [0] * 13]


def test_cut_prompt_warns_with_the_lost_words(tokenizer):
    with pytest.warns(UserWarning, match='longer than 6 tokens.*"left of the Sphere."'):
        ids = tokenize(tokenizer, ["move the cube to the left of the Sphere."], 6)
    assert ids.shape == (1, 6) and ids[0, -1] == 1 and 0 not in ids


def test_unknown_words(tokenizer):
    assert unknown_words(tokenizer, "Move the Zebra-like cube to the left of a sphere") == ["Zebra", "like", "a"]
    assert unknown_words(tokenizer, "move the cube") == []


def test_tokenizer_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="Expected a tokenizers JSON file"):
        load_tokenizer(tmp_path / "tokenizer.json")
