"""docs/short_convolutions.py: the convolution, and that it is the GPT it begins as, and trains."""

import pytest
import torch
from conftest import as_options, assert_one_line, load_script
from safetensors.torch import load_file

from model import GPT, GPTConfig

short = load_script("docs/short_convolutions.py")


def test_three_tokens_back_channel_by_channel():
    conv = short.ShortConvolution(5).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(x), x, rtol=0, atol=0)
    with torch.no_grad():
        for w in conv.taps:
            w.normal_()
    want = x.clone()
    for t in range(7):
        for k in range(1, min(t, 3) + 1):
            want[:, t] += conv.taps[k - 1] * x[:, t - k]
    torch.testing.assert_close(conv(x), want)
    for T in (1, 2, 3):
        torch.testing.assert_close(conv(x[:, :T]), want[:, :T])


@pytest.mark.parametrize("mlp", ["kan", "swiglu"])
def test_it_begins_as_the_gpt_without(mlp):
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, mlp=mlp, kan_init="random_normal")
    models = []
    for kind in (GPT, short.ConvolvedGPT):
        torch.manual_seed(0)
        models.append(kind(config))
    idx = torch.randint(11, (2, 8))
    plain, convolved = (model(idx, idx)[0] for model in models)
    assert torch.equal(plain, convolved)
    taps = [p for name, p in models[1].named_parameters() if ".taps." in name]
    assert len(taps) == 2 * 2 * short.TAPS
    vectors = models[1].parameter_groups()["vectors"]
    assert all(any(p is v for v in vectors) for p in taps)


@pytest.mark.parametrize("mlp", ["kan", "swiglu"])
def test_it_trains(script, tiny, tmp_path, mlp):
    done = script("docs/short_convolutions.py", *as_options(tiny(mlp=mlp, optimizer="muon")))
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "run" / "latest" / "weights.safetensors")
    taps = [w for name, w in weights.items() if ".taps." in name]
    assert len(taps) == 2 * 2 * short.TAPS and all(w.abs().min() > 0 for w in taps)
    assert_one_line(script("sample.py", tmp_path / "run"), "sample.py")
