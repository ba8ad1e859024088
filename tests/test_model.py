"""The GPT: sizes, causality, initialisation, what it costs, and sampling with and without its cache."""

import math
from dataclasses import replace

import pytest
import torch

from model import GPT, GPTConfig, KVCache, count, match_parameters, pick

SMALL = GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16, position="learned")
CPU_RECIPE = GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, position="learned")
KINDS = ["kan", "gelu", "relu2", "swiglu"]
MODERN = dict(
    position="rope", norm="rmsnorm", qk_norm=True, qk_gain=2.0, zero_init=True, logit_softcap=15.0, tie_head=False
)
VARIANTS = [
    *(replace(SMALL, mlp=mlp) for mlp in KINDS),
    replace(SMALL, kan_hidden=24),
    replace(SMALL, kan_gate=True, kan_control_points=7),
    replace(SMALL, kan_gate=True, kan_swiglu=True, kan_control_points=3),
    replace(SMALL, kan_pairs=True, kan_control_points=4),
    replace(SMALL, kan_pairs=True, kan_hidden=24, kan_control_points=4),
    replace(SMALL, **MODERN),
    replace(SMALL, mlp="swiglu", **MODERN),
]


def stirred(config):
    """A model whose every parameter matters, also those that start at zero."""
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("config", VARIANTS)
def test_no_token_sees_a_later_one(config):
    model = stirred(config)
    idx = torch.randint(11, (2, 16))
    changed = idx.clone()
    changed[:, 9:] = torch.randint(11, (2, 7))
    a, b = model(idx, idx)[0], model(changed, idx)[0]
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert not torch.allclose(a[:, 9:], b[:, 9:])


@pytest.mark.parametrize("config", VARIANTS)
def test_it_can_learn_one_batch_by_heart(config):
    torch.manual_seed(1)
    model = GPT(config)
    groups = model.parameter_groups()
    tables = groups.pop("tables")
    optimizer = torch.optim.AdamW([dict(params=tables, lr=3e-3), dict(params=sum(groups.values(), []), lr=1e-2)])
    idx = torch.randint(11, (2, 17))
    first = None
    for _ in range(250):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert first > 2 and loss.item() < 0.1


def test_a_new_model_is_indifferent():
    for config in VARIANTS:
        idx = torch.randint(11, (8, 16))
        assert abs(GPT(config)(idx, idx.roll(1))[1].item() - math.log(11)) < 0.5


def test_initialisation_by_name():
    model = GPT(replace(SMALL, mlp="gelu", n_embd=256, n_head=4))
    state = dict(model.named_parameters())
    for name, std in (
        ("transformer.wte.weight", 0.02),
        ("transformer.h.0.attn.c_attn.weight", 0.02),
        ("transformer.h.1.mlp.c_fc.weight", 0.02),
        ("transformer.h.1.mlp.c_proj.weight", 0.02 / 2),
        ("transformer.h.0.attn.c_proj.weight", 0.02 / 2),
    ):
        assert abs(state[name].std().item() / std - 1) < 0.1, name
    assert (state["transformer.h.0.ln_1.weight"] == 1).all()
    zero = dict(GPT(replace(SMALL, mlp="gelu", zero_init=True)).named_parameters())
    assert all((p == 0).all() for name, p in zero.items() if "c_proj" in name)
    gained = GPT(replace(SMALL, qk_norm=True, qk_gain=2.0)).transformer.h[0].attn.q_gain
    assert torch.equal(gained, torch.full((SMALL.n_head,), 2.0))
    kan = GPT(replace(SMALL, kan_hidden=24))
    assert (kan.transformer.h[0].mlp.proj.kan_weight == 0).all() and (kan.transformer.h[0].mlp.fc.kan_weight != 0).any()
    scaled = GPT(replace(SMALL, kan_init="random_normal", n_embd=512, n_head=2)).transformer.h[0].mlp.proj
    assert abs(scaled(torch.randn(500, 512)).std().item() * 2 - 1) < 0.05  # 1 / sqrt(2 * n_layer)


def test_eight_control_points_are_as_many_parameters_as_an_mlp():
    config = CPU_RECIPE
    assert count(config) == count(replace(config, mlp="gelu")) == 804_096
    counts = GPT(config).count_parameters()
    assert counts["mlp"] == 4 * 8 * 128 * 128 and counts["position"] == 64 * 128 and counts["head"] == 0
    assert counts["total"] == sum(counts[k] for k in ("embedding", "position", "attention", "mlp", "norm", "head"))
    assert (
        count(GPTConfig(mlp="gelu", position="learned")) == 124_373_760
    )  # GPT-2 without its biases, vocabulary padded to 50,304


def test_a_large_swiglu_is_a_multiple_of_8_wide():
    config = GPTConfig(n_head=2, n_layer=1, mlp="swiglu", kan_gate=True)
    sizes = {C: replace(config, n_embd=C).mlp_size for C in (64, 128, 256, 768, 1024)}
    assert sizes == {64: 170, 128: 341, 256: 682, 768: 2048, 1024: 2736}
    assert replace(config, n_embd=1024, mlp_hidden=2731).mlp_size == 2731
    for C, half in ((128, 170), (1024, 1368)):
        with torch.device("meta"):
            beside = GPT(replace(config, mlp="kan", n_embd=C, kan_swiglu=True)).transformer.h[0].mlp.beside
        assert beside.c_fc.out_features == half


@pytest.mark.parametrize(
    "arm",
    [
        dict(mlp="gelu"),
        dict(mlp="swiglu"),
        dict(mlp="kan"),
        dict(mlp="kan", kan_hidden=5),
        dict(mlp="kan", kan_gate=True),
        dict(mlp="kan", kan_gate=True, kan_swiglu=True),
        dict(mlp="kan", kan_pairs=True),
        dict(mlp="kan", kan_pairs=True, kan_hidden=6, kan_control_points=4),
    ],
)
@pytest.mark.parametrize("total", [300_000, 804_096, 2_376_960])
def test_match_parameters(arm, total):
    config = replace(CPU_RECIPE, **arm)
    if total == 300_000 and arm["mlp"] == "kan" and not config.kan_hidden:
        with pytest.raises(ValueError, match="300,000 can't be met: kan_control_points = 2 makes"):
            match_parameters(config, total)
        return
    matched = match_parameters(config, total)
    one_control_point = 4 * 128 * 128  # more of any knob's other units
    assert abs(count(matched) - total) <= one_control_point / 2
    assert replace(matched, mlp_hidden=0, kan_hidden=0, kan_control_points=8) == replace(
        config, mlp_hidden=0, kan_hidden=0, kan_control_points=8
    )


@pytest.mark.parametrize("total", [2_780, 2_918, 4_321])
def test_matched_surfaces_are_the_nearest(total):
    config = GPTConfig(vocab_size=30, n_layer=1, n_head=2, n_embd=8, block_size=8, kan_pairs=True)
    sizes = {N: count(replace(config, kan_control_points=N)) for N in range(2, 20)}
    N = match_parameters(config, total).kan_control_points
    assert abs(sizes[N] - total) == min(abs(size - total) for size in sizes.values())


def test_flops_by_structure():
    C, T, L, V, config = 128, 64, 4, 65, CPU_RECIPE
    kan, mlp = GPT(config).flops_per_token(), GPT(replace(config, mlp="gelu")).flops_per_token()
    assert kan["kan_lookup"] == L * 10 * C * C and kan["kan_hat_gemm"] == L * 6 * 8 * C * C and kan["mlp"] == 0
    assert mlp["mlp"] == L * 6 * 8 * C * C and mlp["kan_lookup"] == mlp["kan_hat_gemm"] == 0
    assert kan["head"] == 6 * C * V and kan["attention"] == L * 3 * (8 * C * C + 4 * C * T)
    assert GPT(config).flops_per_token(backward=False)["kan_lookup"] == L * 4 * C * C


@pytest.mark.parametrize("config", VARIANTS)
def test_parameter_groups_hold_every_parameter_once(config):
    model = GPT(config)
    groups = model.parameter_groups()
    every = [id(p) for group in groups.values() for p in group]
    assert sorted(every) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() == 3 + config.kan_pairs for p in groups["tables"])
    assert all(p.dim() == 2 for p in groups["matrices"])
    assert len(groups["tables"]) == (0 if config.mlp != "kan" else 2 * (2 if config.kan_hidden else 1))


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("options", [dict(), dict(temperature=0), dict(top_k=3, temperature=1.5), dict(top_p=0.7)])
def test_the_cache_changes_nothing(config, options):
    model, idx = stirred(config), torch.randint(11, (3, 5))
    # 40 tokens: the context of 16 fills and starts again several times.
    a = model.generate(idx, 40, seed=3, **options)
    b = model.generate(idx, 40, seed=3, use_cache=False, **options)
    assert a.shape == (3, 45) and (a == b).all() and (a[:, :5] == idx).all()


@pytest.mark.parametrize("config", VARIANTS)
def test_cached_logits_are_equal(config):
    model, idx = stirred(config), torch.randint(11, (2, 16))
    whole = model(idx, idx)[0][..., :11]
    for parts in ([1] * 16, [16], [7, 1, 8], [3, 13]):
        cache, position = KVCache(config, 2, idx.device, torch.float32), 0
        for size in parts:
            logits, _ = model(idx[:, position : position + size], cache=cache)
            position += size
            torch.testing.assert_close(logits[:, 0], whole[:, position - 1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="block_size = 16"):
        model(idx[:, :1], cache=cache)


def test_a_seed_is_the_calls_own():
    model, idx = stirred(SMALL), torch.zeros(1, 1, dtype=torch.long)
    before = torch.get_rng_state()
    a = model.generate(idx, 30, seed=1)
    assert (torch.get_rng_state() == before).all()
    assert (model.generate(idx, 30, seed=1) == a).all() and (model.generate(idx, 30, seed=2) != a).any()
    assert (model.generate(idx, 30) != model.generate(idx, 30)).any()


def test_generate_restores_the_mode():
    model = GPT(replace(SMALL, dropout=0.5)).train()
    a = model.generate(torch.zeros(1, 1, dtype=torch.long), 5, seed=1)
    assert model.training and (model.generate(torch.zeros(1, 1, dtype=torch.long), 5, seed=1) == a).all()


def test_top_k_and_top_p_keep_what_they_should():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    shares = lambda **o: (
        torch.bincount(
            pick(logits, **{"temperature": 1.0, "top_k": None, "top_p": None, **o}, generator=generator).flatten(),
            minlength=4,
        )
        / len(logits)
    )
    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_p=0.4), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(shares(top_k=9)[3:], torch.tensor([0.05]), atol=0.02, rtol=0)
    cold = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    torch.testing.assert_close(shares(temperature=0.5), cold / cold.sum(), atol=0.03, rtol=0)
    assert torch.equal(shares(temperature=1e-46), torch.tensor([1.0, 0, 0, 0]))  # 0 in float32
    for hot in (1e300, float("inf")):
        torch.testing.assert_close(shares(temperature=hot, top_k=2), torch.tensor([0.5, 0.5, 0, 0]), atol=0.03, rtol=0)


def test_padded_vocabulary_is_never_sampled():
    model = stirred(replace(SMALL, vocab_size=1001))
    assert model.transformer.wte.weight.shape[0] == 1024
    assert model(torch.zeros(1, 4, dtype=torch.long))[0].shape == (1, 1, 1001)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1), "temperature must be"),
        (dict(top_k=0), "top_k must be"),
        (dict(top_p=0.0), "top_p must be"),
        (dict(top_p=1.5), "top_p must be"),
    ],
)
def test_sampling_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GPT(SMALL).generate(torch.zeros(1, 1, dtype=torch.long), 1, **options)
    with pytest.raises(ValueError, match="empty"):
        GPT(SMALL).generate(torch.zeros(1, 0, dtype=torch.long), 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mlp="moe"), "mlp must be one of kan, gelu, relu2, swiglu, got 'moe'"),
        (dict(n_head=3), "n_embd = 16 must be a multiple of n_head = 3"),
        (dict(position="sinus"), "position must be one of"),
        (dict(n_layer=0), "n_layer must be at least 1"),
        (dict(dropout=1.0), "dropout must be"),
        (dict(position="rope", n_head=16), "rope needs even heads"),
        (dict(kan_hidden=-1), "kan_hidden must be at least 0, got -1"),
        (dict(qk_gain=2.0), "qk_gain must be at least 0, and needs qk_norm, got 2.0, qk_norm = False"),
        (dict(qk_gain=-1.0, qk_norm=True), "qk_gain must be at least 0"),
    ],
)
def test_configuration_errors(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


def test_sequences_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match="17 tokens do not fit block_size = 16"):
        GPT(SMALL)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("mlp", ["kan", "swiglu"])
def test_the_whole_model_compiles_in_one_graph(mlp):
    model, idx = stirred(replace(SMALL, mlp=mlp, **MODERN)), torch.randint(11, (2, 16))
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True)(idx, idx)[1], model(idx, idx)[1], rtol=1e-5, atol=1e-5
    )


def test_bfloat16_autocast_is_close():
    for config in VARIANTS:
        model, idx = stirred(config), torch.randint(11, (4, 16))
        exact = model(idx, idx)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, loss = model(idx, idx)
            assert abs(loss / exact[1] - 1) < 0.05
            # With a cache: within 8% of the largest logit. Measured 3% at worst, 0.5% typically; curves as rough as
            # these, with noise at every knot, magnify what rounding does to their inputs.
            cache = KVCache(config, 4, idx.device, torch.float32)
            for position in range(16):
                logits, _ = model(idx[:, position : position + 1], cache=cache)
                assert (logits[:, 0] - rounded[:, position]).abs().max() < 0.08 * rounded.abs().max()
