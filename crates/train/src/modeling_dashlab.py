"""Models that DashLab exports, in plain PyTorch: a Llama decoder whose attention is dense, top-k (also with
a bias), DashAttention, token-level entmax, InfLLM v2, NSA or random chunks. Loaded by `transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

Written to be read and to agree: scores of every new token with every kept one exist. Shapes: q [b, h, t, d] of the new tokens;
k, v [b, g, T, d] of all; chunks of s tokens, n = ceil(T / s). Row i of a sequence is its token number i, padding left out, on
whichever side it stands: positions and chunks are those of the sequence alone. Above 400 lines: one file travels with the weights
of every export.
"""
import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast


class DashLabConfig(PretrainedConfig):
    """Llama keys, and `dashlab.attention`: the attention table of the exported config.toml."""

    model_type = "dashlab"
    max_position_embeddings = None  # rotary angles that are stretched ask for it before the file's own is set
    keys_to_ignore_at_inference = ["past_key_values", "cache"]


class DashLabCache:
    """What later tokens read of earlier ones. Of each layer, by name, [b, g, rows, ..]: keys and values, summaries of chunks, pooled
    windows. `lengths` [b] counts the tokens of each sequence, `columns` those with the padding."""

    is_compileable, is_linear = False, ()

    def __init__(self, layers):
        self.layers, self.lengths, self.columns = [{} for _ in range(layers)], None, 0

    def get_seq_length(self, layer_idx=0):
        return self.columns

    def reorder_cache(self, beams):
        self.layers = [{name: x[beams] for name, x in layer.items()} for layer in self.layers]
        self.lengths = self.lengths[beams]


class Frame:
    """Where the new tokens stand: `real` [b, t] is false for padding, `pos` [b, t] the number of a token in its sequence, `before` and
    `after` [b] the lengths of the sequences without and with them, `total` the largest."""

    def __init__(self, b, t, mask, cache, device):
        columns = 0 if cache is None else cache.columns
        if mask is not None and (mask.dim() != 2 or mask.shape[1] not in (t, columns + t)):
            raise ValueError(f"attention_mask {tuple(mask.shape)} is not [b, {columns + t}], one number a token")
        self.real = torch.ones(b, t, dtype=torch.bool, device=device) if mask is None else mask[:, -t:].bool()
        self.before = torch.zeros(b, dtype=torch.long, device=device) if columns == 0 else cache.lengths
        self.pos = (self.before[:, None] + self.real.long().cumsum(1) - 1).clamp_min(0)
        self.after = self.before + self.real.sum(1)
        self.total = int(self.after.max())
        self.aligned = bool(self.real.all()) and int(self.before.min()) == int(self.before.max())
        self.p = self.pos[:, None, :, None]

    def held(self, x):
        """x [b, t, c] with the last token's row in the place of padding behind it, where `generate` looks for what comes next."""
        column = torch.arange(x.shape[1], device=x.device) * self.real
        return x if self.aligned else x.gather(1, column.cummax(1).values.unsqueeze(-1).expand_as(x))

    def keep(self, kept, name, x):
        """All rows of a name, with those of the new tokens x [b, n, t, d]."""
        old = kept.get(name)
        if self.aligned:
            kept[name] = x if old is None else torch.cat([old, x], 2)
        else:
            new = x.new_zeros(x.shape[0], x.shape[1], self.total, x.shape[3])
            if old is not None:
                new[:, :, : old.shape[2]] = old
            row, token = self.real.nonzero(as_tuple=True)
            new[row, :, self.pos[row, token]] = x[row, :, token]
            kept[name] = new
        return kept[name]

    def pool(self, kept, name, x, length, stride, f):
        """f of every window of `length` rows of x, one window a `stride`: [b, g, windows, length, d] to [b, g, windows, d]. A window that is
        complete is pooled once. What a shorter sequence has of windows that a longer one has completed is of no meaning, not
        visible to any of its tokens, and made again when it is complete."""
        count = lambda n: max(0, (int(n) - length) // stride + 1)
        old, first, end = kept.get(name), count(self.before.min()), count(self.after.max())
        if old is None or end > first:
            part = x[:, :, first * stride : (end - 1) * stride + length] if end > first else x[:, :, :0]
            new = f(part.unfold(2, length, stride).transpose(-1, -2)) if end > first else part
            kept[name] = new if old is None else torch.cat([old[:, :, :first], new], 2)
        return kept[name]


def wide(x):
    """At least float32: choices and softmax are not left to half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def entmax(scores, alpha):
    """alpha-entmax over the last axis; minus infinity gives 0, and a row of nothing else zeros (Peters et al. 2019)."""
    none = torch.isinf(scores).all(-1, keepdim=True)
    scores = scores.masked_fill(none, 0.0)
    if alpha == 1.0 or scores.shape[-1] == 0:
        return torch.softmax(scores, -1).masked_fill(none, 0.0)
    beta = 1.0 / (alpha - 1.0)
    x = (alpha - 1.0) * (scores - scores.amax(-1, keepdim=True))
    low = -torch.ones_like(x[..., :1])
    high = torch.zeros_like(low)
    for _ in range(60):
        tau = 0.5 * (low + high)
        above = (x - tau).clamp_min(0.0).pow(beta).sum(-1, keepdim=True) >= 1.0
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    return (x - 0.5 * (low + high)).clamp_min(0.0).pow(beta).masked_fill(none, 0.0)


def per_head(x, heads):
    """[b, g, ...] -> [b, h, ...]: a query head reads its group's key/value head."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def group_sum(p, g):
    b, h = p.shape[:2]
    return p.reshape(b, g, h // g, *p.shape[2:]).sum(2)


def scaled(q, k):
    return wide(q @ per_head(k, q.shape[1]).transpose(-1, -2)) * q.shape[-1] ** -0.5


def read(q, k, v, allowed, bias=None, alpha=1.0):
    """Attention to the keys where `allowed` is true; a query without any gets 0."""
    z = scaled(q, k)
    if bias is not None:
        z = z + bias
    p = entmax(z.masked_fill(~allowed, float("-inf")), alpha)
    return p.to(v.dtype) @ per_head(v, q.shape[1])


def causal(f):
    """[b, 1, t, T]"""
    return torch.arange(f.total, device=f.p.device) <= f.p


def chunk_of(f, s):
    return torch.arange(f.total, device=f.p.device) // s


def chunks(f, s):
    """The numbers of all chunks [n], and the own one of each query [b, 1, t, 1]."""
    return torch.arange(-(-f.total // s), device=f.p.device), f.p // s


def tokens_of(chosen, f, s, heads):
    """Chosen chunks [b, g, t, n] as tokens [b, h, t, T], causal."""
    return per_head(chosen[..., chunk_of(f, s)], heads) & causal(f)


def best(scores, forced, visible, top):
    """The forced chunks, then the best visible ones, `top` in all; ties to the lower chunk."""
    key = scores.masked_fill(forced, float("inf")).masked_fill(~visible, float("-inf"))
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(key.shape[-1], device=key.device).expand_as(order))
    return (rank < top) & visible


def route(q, k, query, a, f, kept):
    """Scores of the complete chunks before a query's own, [b, h, t, n]; minus infinity elsewhere. And the own chunk. A chunk's summary is
    local attention of a learned query to its keys (arXiv 2605.18753, stage 0)."""
    g, d, s = k.shape[1], k.shape[3], a["chunk_size"]

    def summary(keys):
        weights = torch.softmax(wide((keys * query.reshape(1, g, 1, 1, d)).sum(-1)) * d**-0.5, -1)
        return (weights.to(keys.dtype).unsqueeze(-1) * keys).sum(-2)

    scores = a["gamma"] * scaled(q, f.pool(kept, "summaries", k, s, s, summary))
    chunk, own = chunks(f, s)
    scores = nn.functional.pad(scores, (0, len(chunk) - scores.shape[-1]), value=float("-inf"))
    return scores.masked_fill(chunk >= own, float("-inf")), chunk == own


def dash(q, k, v, query, diagonal, a, f, kept):
    h, g, s = q.shape[1], k.shape[1], a["chunk_size"]
    scores, own = route(q, k, query, a, f, kept)
    w = group_sum(entmax(scores, a["alpha"]), g) / (h // g)
    support = w > 0
    bias = torch.where(support, w, 1.0).log()
    if a["center"] != "none":
        mean = bias.sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp_min(1)
        bias = (bias - mean).masked_fill(~support, 0.0)
    # a model may have been trained with the gradient of a bias that is not there
    bias = bias / a["sigma"] if a.get("forward_bias", True) else torch.zeros_like(bias)
    if diagonal is not None:
        bias = bias + own * wide(diagonal).reshape(1, g, 1, 1)
    return read(q, k, v, tokens_of(support | own, f, s, h), per_head(bias[..., chunk_of(f, s)], h))


def topk(q, k, v, query, a, f, kept):
    h, g, d, s = q.shape[1], k.shape[1], k.shape[3], a["chunk_size"]
    query = k.new_zeros(g * d) if query is None else query
    scores, own = route(q, k, query, a, f, kept)
    mean = group_sum(entmax(scores, 1.0), h if a.get("per_head") else g)
    chunk, of = chunks(f, s)
    chosen = best(mean, own.expand_as(mean), (chunk <= of).expand_as(mean), a["top"])
    return read(q, k, v, tokens_of(chosen, f, s, h))


def topk_bias(q, k, v, query, a, f, kept):
    h, g, s = q.shape[1], k.shape[1], a["chunk_size"]
    scores, own = route(q, k, query, a, f, kept)
    chunk, of = chunks(f, s)
    mean = group_sum(entmax(scores, 1.0), g)
    chosen = best(mean, own.expand_as(mean), (chunk <= of).expand_as(mean), a["top"])
    earlier = chosen & ~own
    w = group_sum(entmax(scores.masked_fill(~per_head(earlier, h), float("-inf")), 1.0), g) / (h // g)
    bias = torch.where(earlier, w.clamp_min(1e-37), 1.0).log()
    return read(q, k, v, tokens_of(chosen, f, s, h), per_head(bias[..., chunk_of(f, s)], h))


def most(q, k, a, f):
    """The chunks with the most of softmax over the tokens before the own chunk."""
    g, s = k.shape[1], a["chunk_size"]
    chunk, own = chunks(f, s)
    p = group_sum(entmax(scaled(q, k).masked_fill(chunk_of(f, s) >= own, float("-inf")), 1.0), g)
    p = nn.functional.pad(p, (0, len(chunk) * s - p.shape[-1])).unflatten(-1, (len(chunk), s)).sum(-1)
    return best(p, (chunk == own).expand_as(p), (chunk <= own).expand_as(p), a["top"])


def landmark(q, k, v, query, a, f, kept):
    """Softmax over the chosen summaries and the own chunk's tokens; a chunk's share goes to its tokens by their softmax."""
    h, g, s = q.shape[1], k.shape[1], a["chunk_size"]
    r, own = route(q, k, query, a, f, kept)
    chunk, of = chunks(f, s)
    chosen = best(r, own.expand_as(r), (chunk <= of).expand_as(r), a["top"])
    inside = nn.functional.pad(scaled(q, k), (0, len(chunk) * s - k.shape[2]), value=float("-inf"))
    lse = inside.unflatten(-1, (len(chunk), s)).logsumexp(-1)
    bias = (r - lse).masked_fill(~chosen | own, 0.0)
    return read(q, k, v, tokens_of(chosen, f, s, h), bias[..., chunk_of(f, s)])


def mix(h, x):
    """The output function of splitmix64, with its increment, of h + x; 64 bits as signed numbers, whose products wrap."""
    signed = lambda n: n - (1 << 64)
    right = lambda n, by: (n >> by) & ((1 << (64 - by)) - 1)
    h = h + x + signed(0x9E3779B97F4A7C15)
    h = (h ^ right(h, 30)) * signed(0xBF58476D1CE4E5B9)
    h = (h ^ right(h, 27)) * signed(0x94D049BB133111EB)
    return h ^ right(h, 31)


def random_chunks(q, k, v, a, layer, f):
    """The own chunk, and of the earlier ones those whose hash of (seed, layer, kv head, position, chunk) is largest."""
    h, g, s = q.shape[1], k.shape[1], a["chunk_size"]
    chunk, own = chunks(f, s)
    number = lambda n: torch.tensor(n, device=q.device)
    key = mix(mix(number(0), number(a["seed"])), number(layer))
    key = mix(mix(mix(key, torch.arange(g, device=q.device)[:, None, None]), f.p), chunk)
    # as ranks: the largest number of 64 bits without a sign first
    order = torch.sort(key ^ (-(1 << 63)), dim=-1, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(len(chunk), device=q.device).expand_as(order))
    rank = rank.to(torch.float64)
    chosen = best(rank, (chunk == own).expand_as(rank), (chunk <= own).expand_as(rank), a["top"])
    return read(q, k, v, tokens_of(chosen, f, s, h))


def window_probabilities(q, keys, a, f):
    """Softmax over the windows whose last token is at or before the query, [b, h, t, windows]."""
    last = torch.arange(keys.shape[2], device=q.device) * a["stride"] + a["length"] - 1
    return entmax(scaled(q, keys).masked_fill(last > f.p, float("-inf")), 1.0)


def window_choice(p, g, a, f, pooling):
    """The chunks of each query by the probabilities of the windows that touch them, [b, g, t, n]."""
    s, p = a["chunk_size"], group_sum(p, g)
    chunk, own = chunks(f, s)
    first, start = torch.arange(p.shape[-1], device=p.device) * a["stride"], chunk[:, None] * s
    shared = torch.minimum(start + s, first + a["length"]) - torch.maximum(start, first)
    strides = shared.clamp_min(0) // a["stride"]
    if p.shape[-1] == 0:
        score = p.new_zeros(*p.shape[:3], len(chunk))
    elif pooling == "max":
        score = (p.unsqueeze(-2) * (strides > 0)).amax(-1)
    else:
        score = p @ strides.to(p.dtype).T
    visible = chunk <= own
    forced = ((chunk < a["init"]) | (chunk > own - a["local"])) & visible
    return best(score, forced.expand_as(score), visible.expand_as(score), a["top"])


def infllmv2(q, k, v, a, f, kept):
    h, g = q.shape[1], k.shape[1]
    keys = f.pool(kept, "windows", k, a["length"], a["stride"], lambda windows: windows.mean(-2))
    chosen = window_choice(window_probabilities(q, keys, a, f), g, a, f, "max")
    return read(q, k, v, tokens_of(chosen, f, a["chunk_size"], h))


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.c, self.a, self.layer = c, c.dashlab["attention"], layer
        h, g, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        linear = lambda heads, bias=False: nn.Linear(c.hidden_size, heads * d, bias=bias)
        bias, norm = c.dashlab.get("qkv_bias", False), c.dashlab.get("qk_norm", False)
        self.q_proj, self.k_proj, self.v_proj = linear(h, bias), linear(g, bias), linear(g, bias)
        self.q_norm, self.k_norm = (RMSNorm(d, c.rms_norm_eps) if norm else nn.Identity() for _ in "qk")
        self.o_proj = nn.Linear(h * d, c.hidden_size, bias=False)
        kind = self.a["kind"]
        if kind in ("dash", "topk-bias", "landmark") or (kind == "topk" and self.a.get("indexer")):
            self.indexer_q = nn.Parameter(torch.zeros(g * d))
        if self.a.get("diagonal"):
            self.diagonal = nn.Parameter(torch.zeros(g))
        if kind == "kl-indexer":
            self.index_q_proj, self.index_k_proj = linear(g), linear(g)
        if kind == "nsa":
            self.k_proj_compressed, self.v_proj_compressed = linear(g), linear(g)
            self.k_proj_window, self.v_proj_window = linear(g), linear(g)
            window = self.a["length"] * d
            self.compress_k = nn.Linear(d, g * window, bias=False)
            self.compress_v = nn.Linear(d, g * window, bias=False)
            self.compress_position = nn.Parameter(torch.zeros(g * window))
            self.branch_gate = nn.Linear(c.hidden_size, 3 * h, bias=False)

    def heads(self, x, projection):
        b, t, _ = x.shape
        return projection(x).reshape(b, t, -1, self.c.head_dim).transpose(1, 2)

    def compress(self, windows, weight, position=None):
        """[b, g, m, length, d] -> [b, g, m, d]"""
        g, length, d = windows.shape[1], *windows.shape[3:]
        if position is not None:
            windows = windows + position.reshape(g, 1, length, d)
        return torch.einsum("bgcx,gxd->bgcd", windows.flatten(-2), weight.reshape(g, length * d, d))

    def kl_indexer(self, x, q, k, v, rotate, f, kept):
        index_q, index_k = (rotate(self.heads(x, p)) for p in (self.index_q_proj, self.index_k_proj))
        chosen = most(index_q, f.keep(kept, "index_k", index_k), self.a, f)
        return read(q, k, v, tokens_of(chosen, f, self.a["chunk_size"], q.shape[1]))

    def nsa(self, x, q, k, v, rotate, f, kept):
        (b, h, t, _), g, a = q.shape, k.shape[1], self.a
        key = lambda windows: self.compress(windows, self.compress_k.weight, self.compress_position)
        value = lambda windows: self.compress(windows, self.compress_v.weight)
        keys = f.keep(kept, "k_compressed", rotate(self.heads(x, self.k_proj_compressed)))
        values = f.keep(kept, "v_compressed", self.heads(x, self.v_proj_compressed))
        keys = f.pool(kept, "windows_k", keys, a["length"], a["stride"], key)
        values = f.pool(kept, "windows_v", values, a["length"], a["stride"], value)
        p = window_probabilities(q, keys, a, f)
        compressed = p.to(q.dtype) @ per_head(values, h)
        chosen = read(q, k, v, tokens_of(window_choice(p, g, a, f, "overlap"), f, a["chunk_size"], h))
        k_window = f.keep(kept, "k_window", rotate(self.heads(x, self.k_proj_window)))
        v_window = f.keep(kept, "v_window", self.heads(x, self.v_proj_window))
        near = causal(f) & (torch.arange(f.total, device=q.device) > f.p - a["window"])
        window = read(q, k_window, v_window, near)
        gates = torch.sigmoid(self.branch_gate(x)).reshape(b, t, h, 3).transpose(1, 2)
        return sum(gates[..., i : i + 1] * part for i, part in enumerate((compressed, chosen, window)))

    def forward(self, x, rotate, f, kept):
        b, t, _ = x.shape
        q, k = rotate(self.q_norm(self.heads(x, self.q_proj))), rotate(self.k_norm(self.heads(x, self.k_proj)))
        v = self.heads(x, self.v_proj)
        k, v, a, kind = f.keep(kept, "k", k), f.keep(kept, "v", v), self.a, self.a["kind"]
        if kind == "dense":
            o = read(q, k, v, causal(f))
        elif kind == "token-entmax":
            o = read(q, k, v, causal(f), alpha=a["alpha"])
        elif kind == "dash":
            o = dash(q, k, v, self.indexer_q, getattr(self, "diagonal", None), a, f, kept)
        elif kind == "topk":
            o = topk(q, k, v, getattr(self, "indexer_q", None), a, f, kept)
        elif kind == "topk-bias":
            o = topk_bias(q, k, v, self.indexer_q, a, f, kept)
        elif kind == "mass":
            o = read(q, k, v, tokens_of(most(q, k, a, f), f, a["chunk_size"], q.shape[1]))
        elif kind == "kl-indexer":
            o = self.kl_indexer(x, q, k, v, rotate, f, kept)
        elif kind == "landmark":
            o = landmark(q, k, v, self.indexer_q, a, f, kept)
        elif kind == "random":
            o = random_chunks(q, k, v, a, self.layer, f)
        elif kind == "infllmv2":
            o = infllmv2(q, k, v, a, f, kept)
        elif kind == "nsa":
            o = self.nsa(x, q, k, v, rotate, f, kept)
        else:
            raise ValueError(f"dashlab.attention.kind {kind!r} is not known to this file")
        return self.o_proj(o.transpose(1, 2).reshape(b, t, -1))


def stretched(turns, rope):
    """Llama 3's scaling of the rotary frequencies (arXiv 2407.21783, section 3.4.3): long waves turn `factor` times more slowly."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    waves = rope["original_max_position_embeddings"] * turns / (2 * math.pi)
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return turns * (kept + (1 - kept) / factor)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = wide(x)
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rotate, f, kept):
        x = x + self.self_attn(self.input_layernorm(x), rotate, f, kept)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.angles = None

    def rotation(self, f, dtype):
        """Half-split rope at the positions of the frame. Angles are computed in float64 on the CPU, which every machine has."""
        d, rope = self.c.head_dim, getattr(self.c, "rope_parameters", None) or {}
        if self.angles is None or self.angles.shape[0] < f.total:
            theta = rope["rope_theta"] if "rope_theta" in rope else self.c.rope_theta
            turns = theta ** -(torch.arange(0, d, 2, device="cpu", dtype=torch.float64) / d)
            if rope.get("rope_type") == "llama3":
                turns = stretched(turns, rope)
            rows = max(f.total, self.c.max_position_embeddings)
            self.angles = torch.arange(rows, device="cpu", dtype=torch.float64)[:, None] * turns
        at = self.angles[f.pos.cpu()][:, None]
        cos, sin = at.cos().to(dtype).to(f.pos.device), at.sin().to(dtype).to(f.pos.device)

        def rotate(y):
            y1, y2 = y[..., : d // 2], y[..., d // 2 :]
            return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], -1)

        return rotate

    def forward(self, x, f, cache):
        """The states of the embedding, of every layer but the last, and of the last norm."""
        rotate, states = self.rotation(f, x.dtype), [x]
        for i, layer in enumerate(self.layers):
            x = layer(x, rotate, f, {} if cache is None else cache.layers[i])
            states.append(x)
        return [*states[:-1], self.norm(x)]


class DashLabForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DashLabConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["Block"]
    _is_stateful = True  # a cache cannot be rolled back, which assisted decoding would need

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # forward makes a cache of its own kind

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, cache=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        cache = past_key_values if cache is None else cache
        seen = 0 if cache is None else cache.get_seq_length()
        inputs = {"attention_mask": attention_mask, "past_key_values": cache, "use_cache": kwargs.get("use_cache")}
        inputs["logits_to_keep"] = kwargs.get("logits_to_keep", 1)
        if inputs_embeds is not None and seen == 0:
            return {"inputs_embeds": inputs_embeds, **inputs}
        columns = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
        return {"input_ids": input_ids[:, seen - columns :], **inputs}

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None,
        use_cache=None, output_hidden_states=None, return_dict=None, logits_to_keep=0, cache=None, **kwargs,
    ):  # fmt: skip
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = getattr(self.config, "use_cache", True) and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DashLabCache(self.config.num_hidden_layers)
        if not isinstance(cache, (DashLabCache, type(None))):
            raise ValueError(f"a {type(cache).__name__} has no room for summaries; leave past_key_values out")
        f = Frame(x.shape[0], x.shape[1], attention_mask, cache, x.device)
        if position_ids is not None and bool(((position_ids != f.pos) & f.real).any()):
            raise ValueError("positions follow from attention_mask, and position_ids are others")
        states = self.model(x, f, cache)
        if cache is not None:
            cache.lengths, cache.columns = f.after, cache.columns + x.shape[1]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(f.held(states[-1])[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        hidden = tuple(states) if output_hidden_states or self.config.output_hidden_states else None
        # by place, because the cache's field has another name in other versions of transformers
        out = CausalLMOutputWithPast(loss, logits, cache if use_cache else None, hidden)
        return out.to_tuple() if return_dict is False else out
