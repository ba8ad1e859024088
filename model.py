"""A GPT in one file, whose MLP is a spline layer if you say so.

Read top to bottom: attention, the four kinds of MLP, the block of two residual lines, the configuration, the model.
The shape is nanoGPT's (https://github.com/karpathy/nanoGPT); a block is

    x = x + attention(norm(x))
    x = x + mlp(norm(x))            mlp = "kan": the norm and this line are LayerNorm + KANLayer

With one KANLayer the second line adds, for every channel, one learned function of each normalised input channel:
additive in its inputs, where an MLP mixes them. Four ways to mix: kan_pairs makes it a KANPairLayer, of functions of
two channels each; kan_gate multiplies the layer's output by 1 + W x, a matrix beside it, as SwiGLU has one; kan_swiglu
adds a narrow SwiGLU; kan_hidden > 0 makes it two layers, C -> H -> C.
With 8 control points, or 7 and a gate, or 3, a gate and a SwiGLU, it has the parameters of the 4x MLP: 8 * C * C.

Legend of shapes
    B  sequences in the batch    T  tokens in each    C  n_embd    H  n_head (in attention), kan_hidden (in the KAN)
    V  vocabulary size           S  cached tokens     D  C / n_head
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import kan_kernels
import kan_parameterizations
from kan_layer import KANLayer
from kan_pairs import KANPairLayer


def make_norm(config, size):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(size, elementwise_affine=False)
    return nn.LayerNorm(size, bias=False)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.qk_norm = config.qk_norm
        # Products of two normed vectors, over sqrt(D), are at most sqrt(D): too little where heads are small.
        self.q_gain = nn.Parameter(torch.empty(config.n_head)) if config.qk_gain else None

    def forward(self, x, rotation=None, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x)
        p = self.dropout if self.training else 0.0
        past = cache and cache.past(self.layer)
        if p == 0 and kan_kernels.has_attention(qkv, past):  # what follows, as one
            options = dict(qk_norm=self.qk_norm, gain=self.q_gain, past=past)
            y = kan_kernels.attention(qkv, self.n_head, *(rotation or ()), **options)
            return self.resid_dropout(self.c_proj(y))
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head).transpose(1, 3)  # (B, H, 3, T, D)
        qk, v = qkv.split((2, 1), dim=2)
        q, k = (qk if rotation is None else rotate(qk, *rotation)).unbind(2)  # (B, H, T, D) each
        v = v.squeeze(2)
        if self.qk_norm:
            q, k = F.rms_norm(q, (q.shape[-1],)), F.rms_norm(k, (k.shape[-1],))
        if self.q_gain is not None:
            q = q * self.q_gain[:, None, None].to(q.dtype)
        mask, causal = None, True
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, S + T, D)
            S = k.shape[2] - T
            causal = S == 0
            if S and T > 1:  # token i of these T sees the first S + i + 1
                mask = torch.ones(T, S + T, dtype=torch.bool, device=x.device).tril(S)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, dropout_p=p, is_causal=causal)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def rotary(positions, D):
    """(cos, sin) of rotary positions (Su et al., arXiv 2104.09864) in float32, each (T, D).

    They hold every angle twice, once for each half of D, the first half's sines negated.
    """
    halves = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32)
    angles = torch.outer(positions, 10000.0 ** (-halves / D))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x, cos, sin):
    """x (..., T, D) turned by rotary's angles, half against half."""
    y = x.float()
    return (y * cos + y.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class MLP(nn.Module):
    """Matrices and a nonlinearity: gelu (GPT-2), relu2 (arXiv 2109.08668), or gated: swiglu (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.c_fc = nn.Linear(config.n_embd, config.mlp_size, bias=False)
        self.c_gate = nn.Linear(config.n_embd, config.mlp_size, bias=False) if config.mlp == "swiglu" else None
        self.c_proj = nn.Linear(config.mlp_size, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, made_by=None):  # the second is for the KAN
        if self.kind == "gelu":
            x = F.gelu(self.c_fc(x))
        elif self.kind == "relu2":
            x = F.relu(self.c_fc(x)).square()
        else:
            x = F.silu(self.c_gate(x)) * self.c_fc(x)
        return self.dropout(self.c_proj(x))


class KAN(nn.Module):
    """KANLayer or KANPairLayer C -> C, or two, C -> H -> C, with a norm between; times 1 + W x if gated; plus a SwiGLU
    if so wished. The norm in front is the block's; made_by, (its input, the norm), is for a KANLayer, which can keep
    that in place of x.

    A product of two things that a token's channels say is what an additive layer can't make; a gate can, for one matrix
    product. It starts near 1, so that nothing is lost by it.
    """

    def __init__(self, config):
        super().__init__()
        C, H = config.n_embd, config.kan_hidden
        N, width = config.kan_control_points, config.kan_width
        Layer = KANPairLayer if config.kan_pairs else KANLayer
        options = dict(num_control_points=N, spline_width=width, impl=config.kan_impl)
        options["parameterization"] = config.kan_parameterization
        if kan_parameterizations.uses_smoothness(config.kan_parameterization):
            options["smoothness"] = config.kan_mu
        if H:
            # The first layer must not be zero: the second would see a constant and neither would learn.
            self.fc, self.ln = Layer(C, H, "random_normal", **options), make_norm(config, H)
        self.proj = Layer(H or C, C, config.kan_init, **options)
        self.c_gate = nn.Linear(C, C, bias=False) if config.kan_gate else None
        swiglu = replace(config, mlp="swiglu", mlp_hidden=0)
        self.beside = MLP(replace(swiglu, mlp_hidden=swiglu.mlp_size // 2)) if config.kan_swiglu else None
        self.dropout = nn.Dropout(config.dropout)
        self.two_layers = H > 0

    def forward(self, x, made_by=None):
        if self.two_layers:
            y = self.fc(x, made_by)
            y = self.proj(self.ln(y), (y, self.ln))
        else:
            y = self.proj(x, made_by)
        if self.c_gate is not None:
            y = y * (1 + self.c_gate(x))
        y = self.dropout(y)
        return y if self.beside is None else y + self.beside(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = KAN(config) if config.mlp == "kan" else MLP(config)

    def forward(self, x, rotation=None, cache=None):
        x = x + self.attn(self.ln_1(x), rotation, cache)
        h = self.ln_2(x)
        x = x + self.mlp(h, (x, self.ln_2))
        return x


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    mlp: str = "kan"  # kan, gelu, relu2, swiglu
    mlp_hidden: int = 0  # 0: 4 * n_embd, for swiglu 8/3 * n_embd, which is the same number of parameters
    kan_control_points: int = 8
    kan_pairs: bool = False  # surfaces over pairs of channels, of so many points along each axis, in place of curves
    kan_gate: bool = False  # a matrix C -> C beside the layer, whose output multiplies the layer's
    kan_swiglu: bool = False  # a SwiGLU of 4/3 * n_embd channels beside the layer, whose output is added
    kan_width: float = 4.0  # the curves' domain; 95% of a layer-normed input falls inside
    kan_hidden: int = 0  # 0: one KANLayer; else two, with so many channels between
    kan_init: str = "zero"  # of the layer that writes to the residual stream: zero, random_normal, identity
    kan_impl: str = "auto"
    kan_parameterization: str = "bspline"  # what is learned: control points, or coordinates of kan_parameterizations.py
    kan_mu: float | None = None  # of dct_scaled and whitened: how dear second differences are; None: by N
    position: str = "rope"  # rope, learned
    norm: str = "layernorm"  # layernorm, rmsnorm (without parameters)
    qk_norm: bool = False
    qk_gain: float = 0.0  # with qk_norm: where a head's learned gain begins, which multiplies q; 0: there is none
    zero_init: bool = False  # output projections of attention and MLP start at zero, as the KAN does
    logit_softcap: float = 0.0  # 0: off; else logits = cap * tanh(logits / cap)
    tie_head: bool = True

    def __post_init__(self):
        choices = dict(
            mlp=("kan", "gelu", "relu2", "swiglu"),
            kan_parameterization=kan_parameterizations.PARAMETERIZATIONS,
            position=("learned", "rope"),
            norm=("layernorm", "rmsnorm"),
        )
        least = dict(
            block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, mlp_hidden=0, kan_hidden=0, logit_softcap=0
        )
        for name, value in vars(self).items():
            if name in choices and value not in choices[name]:
                raise ValueError(f"{name} must be one of {', '.join(choices[name])}, got {value!r}")
            if name in least and not value >= least[name]:
                raise ValueError(f"{name} must be at least {least[name]}, got {value}")
        if self.kan_mu is not None and not 0 <= self.kan_mu < math.inf:
            raise ValueError(f"kan_mu must be at least 0, got {self.kan_mu}")
        if self.kan_mu is not None and not kan_parameterizations.uses_smoothness(self.kan_parameterization):
            raise ValueError(
                f"kan_mu = {self.kan_mu} is for kan_parameterization = dct_scaled and whitened, got "
                f"{self.kan_parameterization}; leave it out"
            )
        if self.qk_gain and not (self.qk_norm and 0 < self.qk_gain < math.inf):
            raise ValueError(
                f"qk_gain must be at least 0, and needs qk_norm, got {self.qk_gain}, qk_norm = {self.qk_norm}"
            )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} must be a multiple of n_head = {self.n_head}")
        if self.position == "rope" and (self.n_embd // self.n_head) % 2:
            raise ValueError(f"position = rope needs even heads, got n_embd / n_head = {self.n_embd // self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def mlp_size(self):
        """mlp_hidden, or for a large swiglu 8/3 * n_embd rounded up to a multiple of 8, which matrix units like."""
        if self.mlp_hidden or self.mlp != "swiglu":
            return self.mlp_hidden or 4 * self.n_embd
        size = 8 * self.n_embd // 3
        return size if self.n_embd < 512 else math.ceil(size / 8) * 8

    @property
    def padded_vocab_size(self):
        """Large vocabularies are rounded up to a multiple of 64 (50257 to 50304), which matrix units like."""
        return self.vocab_size if self.vocab_size < 1000 else math.ceil(self.vocab_size / 64) * 64


class KVCache:
    """Keys and values of the tokens so far: 2 * n_layer * B * C * block_size numbers."""

    def __init__(self, config, batch, device, dtype):
        shape, layers = (batch, config.n_head, config.block_size, config.n_embd // config.n_head), range(config.n_layer)
        self.k, self.v = ([torch.empty(shape, device=device, dtype=dtype) for _ in layers] for _ in "kv")
        self.length = 0  # tokens that all layers have seen; the model advances it
        rope = config.position == "rope"
        self.rotation = rotary(torch.arange(config.block_size, device=device), shape[-1]) if rope else None

    def past(self, layer):
        return self.k[layer], self.v[layer], self.length

    def extend(self, layer, k, v):
        end = self.length + k.shape[2]
        self.k[layer][:, :, self.length : end], self.v[layer][:, :, self.length : end] = k, v
        return self.k[layer][:, :, :end].to(k.dtype), self.v[layer][:, :, :end].to(v.dtype)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
                ln_f=make_norm(config, config.n_embd),
            )
        )
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        # A tied head is the embedding's own matrix, so there is one tensor to train, save and load.
        self.lm_head = None if config.tie_head else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every parameter by its name:

        wte, wpe, lm_head, c_attn, c_fc, c_gate     normal, std 0.02
        c_proj                                      normal, std 0.02 / sqrt(2 * n_layer), or zero (zero_init)
        ln                                          one
        q_gain                                      qk_gain
        kan_weight                                  KANLayer's own init; random_normal into the residual stream is
                                                    scaled by 1 / sqrt(2 * n_layer) as c_proj is
        """
        depth = 1 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            kind = name.rpartition(".")[2]
            if isinstance(module, KANLayer | KANPairLayer):
                module.reset_parameters()
                if kind == "proj" and module.init == "random_normal":
                    module.kan_weight.mul_(depth)
            elif kind == "c_proj":
                nn.init.normal_(module.weight, std=0.0 if self.config.zero_init else 0.02 * depth)
            elif kind in ("wte", "wpe", "lm_head", "c_attn", "c_fc", "c_gate"):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, CausalSelfAttention):
                if module.q_gain is not None:
                    module.q_gain.fill_(self.config.qk_gain)
            elif kind.startswith("ln"):
                if module.weight is not None:
                    nn.init.ones_(module.weight)
            else:
                assert not list(module.parameters(recurse=False)), f"no rule to initialise {name}"

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits and loss.

        With targets (B, T): logits (B, T, padded V) and the mean cross-entropy in nats. Without: logits of the last
        position only, (B, 1, V) in float32, and None. With a KVCache, idx continues the tokens it holds.
        Raises ValueError when the sequence is longer than block_size.
        """
        T, start = idx.shape[1], cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size = {self.config.block_size}; crop them")
        x = self.transformer.wte(idx)
        rotation = None
        if self.config.position == "learned":
            x = x + self.transformer.wpe(torch.arange(start, start + T, device=idx.device))
        elif cache is not None:
            rotation = [angles[start : start + T] for angles in cache.rotation]
        else:
            rotation = rotary(torch.arange(T, device=idx.device), self.config.n_embd // self.config.n_head)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        if cache is not None:
            cache.length += T
        x = self.transformer.ln_f(x if targets is not None else x[:, -1:])
        logits = F.linear(x, self.lm_head.weight if self.lm_head is not None else self.transformer.wte.weight)
        if self.config.logit_softcap:
            logits = self.config.logit_softcap * torch.tanh(logits.float() / self.config.logit_softcap)
        if targets is None:
            return logits[..., : self.config.vocab_size].float(), None
        # This turns them to float32; above, all of those would be returned and in memory too, 3.3 GB for gpt2_124m
        return logits, kan_kernels.cross_entropy(logits.flatten(0, 1), targets.flatten())

    # ------------------------------------------------------------------------------------------------------------------
    # What it consists of and what it costs

    def count_parameters(self):
        """Numbers of parameters by kind, "total", and "non_embedding": without token and position embeddings."""
        kinds = {
            ".ln": "norm",
            ".wte": "embedding",
            ".wpe": "position",
            ".lm_head": "head",
            ".attn": "attention",
            "": "mlp",
        }
        counts = dict.fromkeys(kinds.values(), 0)
        for name, p in self.named_parameters():
            counts[next(kind for part, kind in kinds.items() if part in f".{name}")] += p.numel()
        total = sum(counts.values())
        return {**counts, "total": total, "non_embedding": total - counts["embedding"] - counts["position"]}

    def flops_per_token(self, backward=True):
        """Floating point operations a token costs, a multiply-add being two, counted by what each module does.

        Attention is counted as if not causal, as PaLM (arXiv 2204.02311) does. The spline layer costs one or the other:
        "kan_lookup", 4*F*O forward and 6*F*O backward (of pairs 8*F*O), or "kan_hat_gemm", 2*N*F*O and 4*N*F*O (of
        pairs N^2 / 2 for N). Norms, softmax and nonlinearities are left out.
        """
        factor = 3 if backward else 1
        C = self.config.n_embd
        flops = dict.fromkeys(("attention", "mlp", "kan_lookup", "kan_hat_gemm"), 0)
        flops["head"] = factor * 2 * C * self.config.padded_vocab_size
        for module in self.modules():
            if isinstance(module, CausalSelfAttention):
                flops["attention"] += factor * (2 * 4 * C * C + 4 * C * self.config.block_size)
            elif isinstance(module, MLP):
                flops["mlp"] += factor * 2 * sum(p.numel() for p in module.parameters())
            elif isinstance(module, KAN) and module.c_gate is not None:
                flops["mlp"] += factor * 2 * C * C
            elif isinstance(module, KANLayer):
                edges = module.in_features * module.out_features
                flops["kan_lookup"] += edges * (10 if backward else 4)
                flops["kan_hat_gemm"] += edges * module.num_control_points * 2 * factor
            elif isinstance(module, KANPairLayer):
                flops["kan_lookup"] += module.in_features * module.out_features * (12 if backward else 4)
                flops["kan_hat_gemm"] += module.kan_weight.numel() * 2 * factor
        return flops

    def parameter_groups(self):
        """Parameters by how they are trained: "tables" (the splines), "matrices" (2-D, inside the blocks),
        "embeddings" (2-D, outside), "vectors" (norms). Every parameter is in exactly one."""
        groups = {"tables": [], "matrices": [], "embeddings": [], "vectors": []}
        for name, p in self.named_parameters():
            if name.endswith("kan_weight"):
                groups["tables"].append(p)
            elif p.dim() < 2:
                groups["vectors"].append(p)
            else:
                groups["matrices" if ".h." in name else "embeddings"].append(p)
        assert sum(map(len, groups.values())) == len(list(self.parameters()))
        return groups

    def kan_layers(self):
        return [module for module in self.modules() if isinstance(module, KANLayer | KANPairLayer)]

    # ------------------------------------------------------------------------------------------------------------------
    # Sampling

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) and max_new_tokens more: (B, T + max_new_tokens). Options as in stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **options)], dim=1)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, use_cache=True):
        """Yield max_new_tokens times the next token of each sequence, (B, 1), given idx (B, T), T >= 1.

        When the context is full it starts again from its last block_size / 2 tokens. Positions shift then, so every key
        and value changes; starting again once in a while, rather than sliding by one token, is what makes a cache pay.

        Args:
            temperature: 0 takes the most likely token.
            top_k, top_p: sample among the k most likely, or the fewest whose probability sums to p (arXiv 1904.09751).
            seed: of this call's own generator; None takes one from the global generator.
            use_cache: False computes the whole context for every token; the tokens are the same.

        Raises ValueError for an empty prompt or options out of range.
        """
        check_sampling(idx, temperature, top_k, top_p)
        device, was_training = idx.device, self.training
        generator = torch.Generator(device)
        generator.manual_seed(int(torch.randint(2**62, ()).item()) if seed is None else seed)
        self.eval()
        start, cache = 0, None
        try:
            for _ in range(max_new_tokens):
                if idx.shape[1] - start > self.config.block_size:
                    start, cache = idx.shape[1] - max(1, self.config.block_size // 2), None
                if use_cache and cache is None:
                    cache = KVCache(self.config, len(idx), device, self.transformer.wte.weight.dtype)
                seen = cache.length if cache is not None else 0
                logits, _ = self(idx[:, start + seen :], cache=cache)
                idx = torch.cat((idx, pick(logits[:, -1], temperature, top_k, top_p, generator)), dim=1)
                yield idx[:, -1:]
        finally:
            self.train(was_training)


def check_sampling(idx, temperature, top_k, top_p):
    if idx.shape[1] < 1:
        raise ValueError("the prompt is empty; begin with at least one token")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (the most likely token) or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def pick(logits, temperature, top_k, top_p, generator):
    """One token (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    logits = logits - logits.amax(-1, keepdim=True)  # no overflow, however cold
    probabilities = (logits / min(max(temperature, 1e-30), 1e30)).softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)  # the first is always kept
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)


def match_parameters(config, total):
    """The configuration nearest to `total` parameters, by the size of its MLP alone.

    An MLP gets another mlp_hidden, a two-layer KAN another kan_hidden (of pairs an even one), a one-layer KAN another
    kan_control_points.
    So an arm is made equal to another: match_parameters(GPTConfig(mlp="swiglu"), count(GPTConfig(mlp="kan"))).
    ValueError if the least is more than that.
    """
    knob = "mlp_hidden" if config.mlp != "kan" else "kan_hidden" if config.kan_hidden else "kan_control_points"
    step = 2 if knob == "kan_hidden" and config.kan_pairs else 1
    least = 2 if knob == "kan_control_points" else step
    power = 2 if knob == "kan_control_points" and config.kan_pairs else 1  # in which every count goes with its knob
    at = [count(replace(config, **{knob: value})) for value in (least, least + step)]
    each = (at[1] - at[0]) / ((least + step) ** power - least**power)
    wanted = least**power + (total - at[0]) / each
    below = int(max(0, wanted) ** (1 / power)) // step * step
    value = min(below, below + step, key=lambda value: abs(value**power - wanted))
    if value < least:
        raise ValueError(f"match_parameters = {total:,} can't be met: {knob} = {least} makes {at[0]:,} already")
    return replace(config, **{knob: value})


def count(config):
    """Parameters of the model a configuration describes, without making it."""
    with torch.device("meta"):
        return GPT(config).count_parameters()["total"]
