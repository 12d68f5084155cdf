"""Models that DashLab exports, in plain PyTorch: a Llama decoder whose attention is dense, top-k, DashAttention, token-level
entmax, InfLLM v2 or NSA. Loaded by `transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

Written to be read and to agree, not to be fast: scores of every pair of tokens exist, and there is no key/value cache. Shapes:
q [b, h, t, d]; k, v [b, g, t, d]; chunks of s tokens, n = ceil(t / s).
"""
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput


class DashLabConfig(PretrainedConfig):
    """Llama keys, and `dashlab.attention`: the attention table of the exported config.toml."""

    model_type = "dashlab"


def entmax(scores, alpha):
    """alpha-entmax over the last axis; minus infinity gives 0, and a row of nothing else zeros (Peters et al. 2019)."""
    none = torch.isinf(scores).all(-1, keepdim=True)
    if alpha == 1.0:
        return torch.softmax(scores.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)
    beta = 1.0 / (alpha - 1.0)
    x = (alpha - 1.0) * (scores.masked_fill(none, 0.0) - scores.masked_fill(none, 0.0).amax(-1, keepdim=True))
    low = -torch.ones_like(x[..., :1])
    high = torch.zeros_like(low)
    for _ in range(60):
        tau = 0.5 * (low + high)
        above = (x - tau).clamp_min(0.0).pow(beta).sum(-1, keepdim=True) >= 1.0
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    p = (x - 0.5 * (low + high)).clamp_min(0.0).pow(beta)
    return p.masked_fill(none, 0.0)


def per_head(x, heads):
    """[b, g, ...] -> [b, h, ...]: a query head reads its group's key/value head."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def group_sum(p, g):
    b, h = p.shape[:2]
    return p.reshape(b, g, h // g, *p.shape[2:]).sum(2)


def scaled(q, k):
    return q @ per_head(k, q.shape[1]).transpose(-1, -2) * q.shape[-1] ** -0.5


def read(q, k, v, allowed, bias=None, alpha=1.0):
    """Attention to the keys where `allowed` is true; a query without any gets 0."""
    z = scaled(q, k)
    if bias is not None:
        z = z + bias
    return entmax(z.masked_fill(~allowed, float("-inf")), alpha) @ per_head(v, q.shape[1])


def causal(t, device):
    return torch.ones(t, t, dtype=torch.bool, device=device).tril()


def chunk_of(t, s, device):
    return torch.arange(t, device=device) // s


def tokens_of(chunks, t, s, heads):
    """Chosen chunks [b, g, t, n] as tokens [b, h, t, t], causal."""
    chosen = chunks[..., chunk_of(t, s, chunks.device)]
    return per_head(chosen, heads) & causal(t, chunks.device)


def best(scores, forced, visible, top):
    """The forced chunks, then the best visible ones, `top` in all; ties to the lower chunk."""
    key = scores.masked_fill(forced, float("inf")).masked_fill(~visible, float("-inf"))
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(key.shape[-1], device=key.device).expand_as(order))
    return (rank < top) & visible


def summaries(k, query, s):
    """Local attention of a learned query to each complete chunk's keys (arXiv 2605.18753, stage 0)."""
    b, g, t, d = k.shape
    keys = k[:, :, : t // s * s].reshape(b, g, t // s, s, d)
    a = torch.softmax((keys * query.reshape(1, g, 1, 1, d)).sum(-1) * d**-0.5, -1)
    return (a.unsqueeze(-1) * keys).sum(-2)


def route(q, k, query, a):
    """Scores of the complete chunks before a query's own, [b, h, t, n]; minus infinity elsewhere. And the own chunk."""
    t, s = q.shape[2], a["chunk_size"]
    n = -(-t // s)
    scores = a["gamma"] * scaled(q, summaries(k, query, s))
    scores = nn.functional.pad(scores, (0, n - scores.shape[-1]), value=float("-inf"))
    chunk, own = torch.arange(n, device=q.device), chunk_of(t, s, q.device)[:, None]
    return scores.masked_fill(chunk >= own, float("-inf")), chunk == own


def dash(q, k, v, query, diagonal, a):
    (b, h, t, _), g, s = q.shape, k.shape[1], a["chunk_size"]
    scores, own = route(q, k, query, a)
    w = group_sum(entmax(scores, a["alpha"]), g) / (h // g)
    support = w > 0
    bias = torch.where(support, w, 1.0).log()
    if a["center"] != "none":
        mean = bias.sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp_min(1)
        bias = (bias - mean).masked_fill(~support, 0.0)
    bias = bias / a["sigma"]
    if diagonal is not None:
        bias = bias + own * diagonal.reshape(1, g, 1, 1)
    bias = per_head(bias[..., chunk_of(t, s, q.device)], h)
    return read(q, k, v, tokens_of(support | own, t, s, h), bias)


def topk(q, k, v, query, a):
    (b, h, t, d), g, s = q.shape, k.shape[1], a["chunk_size"]
    query = torch.zeros(g * d, dtype=q.dtype, device=q.device) if query is None else query
    scores, own = route(q, k, query, a)
    mean = group_sum(entmax(scores, 1.0), g)
    chunk = torch.arange(own.shape[1], device=q.device)
    visible = (chunk <= chunk_of(t, s, q.device)[:, None]).expand_as(mean)
    return read(q, k, v, tokens_of(best(mean, own.expand_as(mean), visible, a["top"]), t, s, h))


class Windows:
    """Overlapping windows of `length` tokens every `stride`, and the chunks they touch."""

    def __init__(self, a, t, device):
        self.s, self.length, self.stride, self.a, self.t = a["chunk_size"], a["length"], a["stride"], a, t
        self.count = max(0, (t - self.length) // self.stride + 1)
        first = torch.arange(self.count, device=device) * self.stride
        self.visible = first + self.length <= torch.arange(t, device=device)[:, None] + 1
        self.n = -(-t // self.s)
        start = torch.arange(self.n, device=device)[:, None] * self.s
        low, high = torch.maximum(start, first), torch.minimum(start + self.s, first + self.length)
        self.strides = (high - low).clamp_min(0) // self.stride

    def cut(self, x):
        """[b, g, t, d] -> [b, g, windows, length, d]"""
        return x.unfold(2, self.length, self.stride).transpose(-1, -2)

    def probabilities(self, q, keys):
        return entmax(scaled(q, keys).masked_fill(~self.visible, float("-inf")), 1.0)

    def choose(self, p, g, pooling):
        a = self.a
        p = group_sum(p, g)
        if pooling == "max":
            score = (p.unsqueeze(-2) * (self.strides > 0)).amax(-1)
        else:
            score = p @ self.strides.to(p.dtype).T
        chunk, own = torch.arange(self.n, device=p.device), chunk_of(self.t, self.s, p.device)[:, None]
        visible = chunk <= own
        forced = ((chunk < a["init"]) | (chunk > own - a["local"])) & visible
        return best(score, forced.expand_as(score), visible.expand_as(score), a["top"])


def infllmv2(q, k, v, a):
    (b, h, t, _), g = q.shape, k.shape[1]
    w = Windows(a, t, q.device)
    if w.count == 0:
        p, w.strides = torch.zeros(b, h, t, 1, dtype=q.dtype, device=q.device), w.strides.new_zeros(w.n, 1)
    else:
        p = w.probabilities(q, w.cut(k).mean(-2))
    return read(q, k, v, tokens_of(w.choose(p, g, "max"), t, w.s, h))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.a = c, c.dashlab["attention"]
        h, g, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        linear = lambda heads: nn.Linear(c.hidden_size, heads * d, bias=False)
        self.q_proj, self.k_proj, self.v_proj = linear(h), linear(g), linear(g)
        self.o_proj = nn.Linear(h * d, c.hidden_size, bias=False)
        kind = self.a["kind"]
        if kind == "dash" or (kind == "topk" and self.a.get("indexer")):
            self.indexer_q = nn.Parameter(torch.zeros(g * d))
        if self.a.get("diagonal"):
            self.diagonal = nn.Parameter(torch.zeros(g))
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

    def compress(self, x, weight, position, w):
        g, d = x.shape[1], x.shape[3]
        if w.count == 0:
            return x[:, :, :0]
        windows = w.cut(x)
        if position is not None:
            windows = windows + position.reshape(g, 1, w.length, d)
        return torch.einsum("bgcx,gxd->bgcd", windows.flatten(-2), weight.reshape(g, w.length * d, d))

    def nsa(self, x, q, k, v, rotate):
        (b, h, t, _), g = q.shape, k.shape[1]
        w = Windows(self.a, t, q.device)
        keys = self.compress(rotate(self.heads(x, self.k_proj_compressed)), self.compress_k.weight, self.compress_position, w)
        values = self.compress(self.heads(x, self.v_proj_compressed), self.compress_v.weight, None, w)
        if w.count == 0:
            p, w.strides = q.new_zeros(b, h, t, 1), w.strides.new_zeros(w.n, 1)
            compressed = torch.zeros_like(q)
        else:
            p = w.probabilities(q, keys)
            compressed = p @ per_head(values, h)
        chosen = read(q, k, v, tokens_of(w.choose(p, g, "overlap"), t, w.s, h))
        near = causal(t, q.device) & ~causal(t, q.device).tril(-self.a["window"])
        window = read(q, rotate(self.heads(x, self.k_proj_window)), self.heads(x, self.v_proj_window), near)
        gates = torch.sigmoid(self.branch_gate(x)).reshape(b, t, h, 3).transpose(1, 2)
        return sum(gates[..., i : i + 1] * part for i, part in enumerate((compressed, chosen, window)))

    def forward(self, x, rotate):
        b, t, _ = x.shape
        q, k, v = self.heads(x, self.q_proj), self.heads(x, self.k_proj), self.heads(x, self.v_proj)
        q, k, kind = rotate(q), rotate(k), self.a["kind"]
        if kind == "dense":
            o = read(q, k, v, causal(t, x.device))
        elif kind == "token-entmax":
            o = read(q, k, v, causal(t, x.device), alpha=self.a["alpha"])
        elif kind == "dash":
            o = dash(q, k, v, self.indexer_q, getattr(self, "diagonal", None), self.a)
        elif kind == "topk":
            o = topk(q, k, v, getattr(self, "indexer_q", None), self.a)
        elif kind == "infllmv2":
            o = infllmv2(q, k, v, self.a)
        elif kind == "nsa":
            o = self.nsa(x, q, k, v, rotate)
        else:
            raise ValueError(f"dashlab.attention.kind {kind!r} is not known to this file")
        return self.o_proj(o.transpose(1, 2).reshape(b, t, -1))


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rotate):
        x = x + self.self_attn(self.input_layernorm(x), rotate)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        d = self.c.head_dim
        steps = torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d
        angle = torch.arange(ids.shape[1], device=x.device, dtype=torch.float64)[:, None] * self.c.rope_theta**-steps
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)

        def rotate(y):
            y1, y2 = y[..., : d // 2], y[..., d // 2 :]
            return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], -1)

        for layer in self.layers:
            x = layer(x, rotate)
        return self.norm(x)


class DashLabForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DashLabConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, **_):
        return {"input_ids": input_ids}

    def forward(self, input_ids, labels=None, **_):
        logits = self.lm_head(self.model(input_ids))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
