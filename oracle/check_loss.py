"""Recomputes the validation loss of a finished run, independently: python check_loss.py RUN_DIR [--cache DIR] [--json]

Above 400 lines: one file, so that it can be read and run alone.
Needs numpy and Python 3.11, nothing of DashLab and no PyTorch: it reads config.toml, metrics.jsonl, the newest checkpoint
(state.json, model.safetensors) and the validation shards by their formats, chooses the validation windows by the rule in
`crates/data/src/loader.rs`, and runs a decoder in f64 that is written here once more from the equations. It compares loss,
perplexity, bits per byte, chunk density and attended tokens with the last `val` line of metrics.jsonl.

The run computes in f32, so the loss may differ by the rounding of f32 and by choices at the edge of a router's support:
1e-6 of the loss (measured: 1e-8 and less), 1e-3 of density and attended tokens. Exit status 1 where a figure is further off.

Shapes: x [b, t, c]; q [b, h, t, d]; k, v [b, g, t, d] with h = g * group; chunks of s tokens, n = ceil(t / s).
"""
import argparse
import json
import math
import struct
import sys
import tomllib
from pathlib import Path

import numpy as np

LOSS, SHARE = 1e-6, 1e-3  # allowed, relative


# files
def safetensors(path):
    """Length of the header (u64), a JSON header with dtype, shape and offsets, then the data."""
    raw = path.read_bytes()
    size = struct.unpack_from("<Q", raw)[0]
    header = json.loads(raw[8 : 8 + size])
    kinds = {"F32": "<f4", "F64": "<f8"}
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = np.frombuffer(raw[8 + size + begin : 8 + size + end], kinds[entry["dtype"]])
            out[name] = data.reshape(entry["shape"]).astype(np.float64)
    return out


class Shard:
    """The format in `crates/data/src/shard/mod.rs`: 72 bytes of header, tokens, document starts, text bytes of each token."""

    def __init__(self, path):
        raw = path.read_bytes()
        if raw[:8] != b"DASHTOKS":
            sys.exit(f"{path}: is no token shard")
        _, width, tokens, documents = struct.unpack_from("<IIQQ", raw, 8)
        counted = struct.unpack_from("<I", raw, 36)[0] == 1
        self.tokens = np.frombuffer(raw, {2: "<u2", 4: "<u4"}[width], tokens, 72).astype(np.int64)
        end = 72 + -(-tokens * width // 8) * 8 + 8 * documents
        if len(raw) != end + (4 * tokens if counted else 0):
            sys.exit(f"{path}: has {len(raw)} bytes, its header announces another number")
        self.bytes = np.frombuffer(raw, "<u4", tokens, end).astype(np.int64) if counted else None


def validation_windows(shards, seq_len, wanted):
    """(ids [w, t], targets [w, t], bytes of text behind the targets): evenly spaced windows of t + 1 tokens that start every t."""
    all_windows = [(s, i * seq_len) for s in shards for i in range((len(s.tokens) - 1) // seq_len)]
    wanted = min(wanted, len(all_windows))
    chosen = [all_windows[i * len(all_windows) // wanted] for i in range(wanted)]
    tokens = np.stack([s.tokens[at : at + seq_len + 1] for s, at in chosen])
    counted = all(s.bytes is not None for s in shards)
    text = sum(int(s.bytes[at + 1 : at + seq_len + 1].sum()) for s, at in chosen) if counted else None
    return tokens[:, :-1], tokens[:, 1:], text


# attention
def softmax(z):
    top = z.max(-1, keepdims=True)
    p = np.exp(z - np.where(np.isfinite(top), top, 0.0))
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def entmax(z, alpha):
    """p_i = ((alpha - 1) z_i - tau)_+ ^ (1 / (alpha - 1)) with the tau at which they add up to 1; minus infinity gives 0."""
    if z.shape[-1] == 0:
        return z
    top = z.max(-1, keepdims=True)
    some = np.isfinite(top)
    x = np.where(np.isfinite(z), (alpha - 1) * (z - np.where(some, top, 0.0)), -np.inf)
    power = lambda tau: np.maximum(x - tau, 0.0) ** (1 / (alpha - 1))
    low, high = -np.ones_like(top), np.zeros_like(top)
    for _ in range(100):
        tau = (low + high) / 2
        enough = power(tau).sum(-1, keepdims=True) >= 1
        low, high = np.where(enough, tau, low), np.where(enough, high, tau)
    return np.where(some, power((low + high) / 2), 0.0)


def heads_of(x, h):
    return np.repeat(x, h // x.shape[1], 1)


def scores(q, k):
    return np.einsum("bhtd,bhud->bhtu", q, heads_of(k, q.shape[1])) / math.sqrt(q.shape[-1])


def read(q, k, v, allowed, bias=0.0, weigh=softmax):
    p = weigh(np.where(allowed, scores(q, k) + bias, -np.inf))
    return np.einsum("bhtu,bhud->bhtd", p, heads_of(v, q.shape[1]))


def group_mean(p, g):
    b, h = p.shape[:2]
    return p.reshape(b, g, h // g, *p.shape[2:]).mean(2)


class Places:
    """Who is where in a sequence of t tokens."""

    def __init__(self, t, s=None):
        token = np.arange(t)
        self.causal = token[None] <= token[:, None]
        if s:
            self.own_chunk = token // s
            self.n = -(-t // s)
            chunk = np.arange(self.n)
            self.visible = chunk[None] <= self.own_chunk[:, None]
            self.own = chunk[None] == self.own_chunk[:, None]

    def tokens(self, chunks, h):
        """A choice [b, g, t, n] as keys [b, h, t, t]."""
        return heads_of(chunks[..., self.own_chunk], h) & self.causal


def best(score, forced, visible, top):
    """The forced chunks, then the best, `top` in all; of equals the lower."""
    key = np.where(forced, np.inf, np.where(visible, score, -np.inf))
    order = np.argsort(-key, -1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(key.shape[-1]), order.shape), -1)
    return (rank < top) & visible


def tops(a, g, t):
    """How many chunks a query attends, [g, t, 1]: `top`, or the layer's part of another run's budget as whole numbers whose sums over
    positions and kv heads are those of its means."""
    if "means" not in a:
        return np.full((g, t, 1), a["top"])
    sums = np.concatenate([[0.0], np.cumsum(a["means"])])
    return np.diff(np.floor(sums + (np.arange(g)[:, None] + 0.5) / g))[..., None].astype(int)


def mix(h, x):
    """The output function of splitmix64, with its increment, of h + x."""
    h = h + np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def chunk_scores(q, k, query, a, places):
    """gamma q . kbar / sqrt d for complete chunks before the own one, else minus infinity: [b, h, t, n]."""
    (b, g, t, d), s = k.shape, a["chunk_size"]
    chunks = k[:, :, : t // s * s].reshape(b, g, t // s, s, d)
    weights = softmax(np.einsum("bgnsd,gd->bgns", chunks, query.reshape(g, d)) / math.sqrt(d))
    z = a["gamma"] * scores(q, np.einsum("bgns,bgnsd->bgnd", weights, chunks))
    z = np.concatenate([z, np.full((*z.shape[:3], places.n - z.shape[3]), -np.inf)], -1)
    return np.where(places.visible & ~places.own, z, -np.inf)


def dash(q, k, v, p, a):
    (h, t), g = q.shape[1:3], k.shape[1]
    places = Places(t, a["chunk_size"])
    w = group_mean(entmax(chunk_scores(q, k, p["indexer_q"], a, places), a["alpha"]), g)
    support = w > 0
    bias = np.log(np.where(support, w, 1.0))
    if a["center"] != "none":
        bias = np.where(support, bias - bias.sum(-1, keepdims=True) / np.maximum(support.sum(-1, keepdims=True), 1), 0.0)
    # with forward_bias = false only its gradient is left
    bias = bias / a["sigma"] if a.get("forward_bias", True) else 0.0 * bias
    if a["diagonal"]:
        bias = bias + places.own * p["diagonal"].reshape(1, g, 1, 1)
    chunks = support | places.own
    return read(q, k, v, places.tokens(chunks, h), heads_of(bias[..., places.own_chunk], h)), chunks


def topk(q, k, v, p, a):
    (h, t, d), g = q.shape[1:], k.shape[1]
    places = Places(t, a["chunk_size"])
    query = p["indexer_q"] if a["indexer"] else np.zeros(g * d)
    mean = group_mean(softmax(chunk_scores(q, k, query, a, places)), g)
    chunks = best(mean, places.own, places.visible, tops(a, g, t))
    return read(q, k, v, places.tokens(chunks, h)), chunks


def topk_bias(q, k, v, p, a):
    (h, t, d), g = q.shape[1:], k.shape[1]
    places = Places(t, a["chunk_size"])
    z = chunk_scores(q, k, p["indexer_q"], a, places)
    chunks = best(group_mean(softmax(z), g), places.own, places.visible, tops(a, g, t))
    chosen = chunks & ~places.own
    w = group_mean(softmax(np.where(heads_of(chosen, h), z, -np.inf)), g)
    bias = np.where(chosen, np.log(np.where(chosen, np.maximum(w, 1e-300), 1.0)), 0.0)
    return read(q, k, v, places.tokens(chunks, h), heads_of(bias[..., places.own_chunk], h)), chunks


def moba(q, k, v, a):
    h = q.shape[1]
    k, v = heads_of(k, h), heads_of(v, h)
    places = Places(q.shape[2], a["chunk_size"])
    z = chunk_scores(q, k, np.zeros(h * k.shape[3]), a, places)
    chunks = best(softmax(z), places.own, places.visible, tops(a, h, q.shape[2]))
    return read(q, k, v, places.tokens(chunks, h)), chunks


def mass(q, k, v, a):
    """The chunks with the most of softmax over the tokens before the own chunk."""
    (h, t), g, s = q.shape[1:3], k.shape[1], a["chunk_size"]
    places = Places(t, s)
    earlier = places.own_chunk[None] < places.own_chunk[:, None]
    p = group_mean(softmax(np.where(earlier, scores(q, k), -np.inf)), g)
    p = np.concatenate([p, np.zeros((*p.shape[:3], places.n * s - t))], -1)
    share = p.reshape(*p.shape[:3], places.n, s).sum(-1)
    chunks = best(share, places.own, places.visible, tops(a, g, t))
    return read(q, k, v, places.tokens(chunks, h)), chunks


def kl_indexer(x, q, k, v, p, a, rotate):
    """`mass` by the indexer's own queries and keys."""
    (h, t), g, s = q.shape[1:3], k.shape[1], a["chunk_size"]
    places = Places(t, s)
    index_q, index_k = (rotate(split(x @ p[f"index_{i}_proj.weight"].T, g)) for i in "qk")
    _, chunks = mass(index_q, index_k, index_k, a)
    return read(q, k, v, places.tokens(chunks, h)), chunks


def landmark(q, k, v, p, a):
    """Softmax over the chosen summaries and the own chunk's tokens; a chunk's share goes to its tokens by their softmax."""
    (h, t, d), g, s = q.shape[1:], k.shape[1], a["chunk_size"]
    places = Places(t, s)
    # per query head, and the learned query of its kv head
    query = np.repeat(p["indexer_q"].reshape(g, d), h // g, 0)
    k, v = heads_of(k, h), heads_of(v, h)
    r = chunk_scores(q, k, query, a, places)
    chunks = best(r, places.own, places.visible, tops(a, h, t))
    z = scores(q, k)
    padded = np.concatenate([z, np.full((*z.shape[:3], places.n * s - t), -np.inf)], -1)
    inside = padded.reshape(*z.shape[:3], places.n, s)
    top = inside.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(inside - top).sum(-1, keepdims=True)))[..., 0]
    bias = np.where(chunks & ~places.own, r - lse, 0.0)
    return read(q, k, v, places.tokens(chunks, h), bias[..., places.own_chunk]), chunks


def random_chunks(q, k, v, a, layer):
    """The own chunk, and of the earlier ones those whose hash of (seed, layer, kv head, position, chunk) is largest."""
    (b, h, t, _), g = q.shape, k.shape[1]
    places = Places(t, a["chunk_size"])
    with np.errstate(over="ignore"):
        key = mix(mix(np.uint64(0), a["seed"]), layer)
        key = mix(mix(mix(key, np.arange(g)[:, None, None]), np.arange(t)[:, None]), np.arange(places.n))
    # of unequal 64-bit numbers, as ranks: f64 would round some of them alike
    rank = np.empty_like(key, float)
    np.put_along_axis(rank, np.argsort(key, -1, kind="stable"), np.arange(places.n, dtype=float), -1)
    chunks = np.broadcast_to(best(rank, places.own, places.visible, tops(a, g, t)), (b, g, t, places.n))
    return read(q, k, v, places.tokens(chunks, h)), chunks


class Windows:
    """Windows of `length` tokens that start every `stride`; visible once their last token is at or before the query."""

    def __init__(self, t, a):
        self.a, self.places, s = a, Places(t, a["chunk_size"]), a["chunk_size"]
        self.starts = np.arange(0, t - a["length"] + 1, a["stride"])
        self.visible = self.starts[None] + a["length"] - 1 <= np.arange(t)[:, None]
        chunk = np.arange(self.places.n)[:, None] * s
        shared = np.minimum(chunk + s, self.starts + a["length"]) - np.maximum(chunk, self.starts)
        self.strides = np.maximum(shared, 0) // a["stride"]  # [n, m]

    def cut(self, x):
        """[b, g, t, d] -> [b, g, m, length, d]"""
        at = self.starts[:, None] + np.arange(self.a["length"])
        return x[:, :, at]

    def weights(self, q, keys):
        return softmax(np.where(self.visible, scores(q, keys), -np.inf)) * self.visible.any(-1, keepdims=True)

    def choose(self, p, g, pool):
        a, places = self.a, self.places
        chunk, own = np.arange(places.n)[None], places.own_chunk[:, None]
        forced = ((chunk < a["init"]) | (chunk > own - a["local"])) & places.visible
        return best(pool(group_mean(p, g) * (p.shape[1] // g)), forced, places.visible, a["top"])


def infllmv2(q, k, v, a):
    (h, t), g = q.shape[1:3], k.shape[1]
    w = Windows(t, a)
    p = w.weights(q, w.cut(k).mean(3))
    pool = lambda p: np.stack([(p * (touch > 0)).max(-1, initial=0.0) for touch in w.strides], -1)
    chunks = w.choose(p, g, pool)
    return read(q, k, v, w.places.tokens(chunks, h)), chunks


def nsa(x, q, k, v, p, a, rotate):
    (b, h, t, d), g = q.shape, k.shape[1]
    w = Windows(t, a)
    of = lambda name: split(x @ p[name].T, g)
    weight = lambda name: p[name].reshape(g, a["length"] * d, d)
    flat = lambda windows: windows.reshape(*windows.shape[:3], -1)
    keys = w.cut(rotate(of("k_proj_compressed.weight"))) + p["compress_position"].reshape(g, 1, a["length"], d)
    keys = np.einsum("bgmx,gxd->bgmd", flat(keys), weight("compress_k.weight"))
    values = np.einsum("bgmx,gxd->bgmd", flat(w.cut(of("v_proj_compressed.weight"))), weight("compress_v.weight"))
    weights = w.weights(q, keys)
    chunks = w.choose(weights, g, lambda p: p @ w.strides.T)
    near = w.places.causal & (np.arange(t)[:, None] - np.arange(t)[None] < a["window"])
    branches = [
        np.einsum("bhtm,bhmd->bhtd", weights, heads_of(values, h)),
        read(q, k, v, w.places.tokens(chunks, h)),
        read(q, rotate(of("k_proj_window.weight")), of("v_proj_window.weight"), near),
    ]
    gates = 1 / (1 + np.exp(-(x @ p["branch_gate.weight"].T)))
    gates = gates.reshape(b, t, h, 3).transpose(3, 0, 2, 1)[..., None]
    return sum(gate * branch for gate, branch in zip(gates, branches)), chunks


def split(x, heads):
    """[b, t, heads * d] -> [b, heads, t, d]"""
    b, t, _ = x.shape
    return x.reshape(b, t, heads, -1).transpose(0, 2, 1, 3)


def attention(x, p, m, a, layer):
    """[b, t, c] -> ([b, t, h * d], chosen chunks [b, g, t, n] where there are chunks)"""
    if "budget" in a:
        a = a | {"means": a["budget"][layer][: x.shape[1]]}
    b, t, _ = x.shape
    d = m["head_dim"]
    turns = m["rope_theta"] ** (-np.arange(0, d, 2) / d)
    if scaling := m.get("rope_scaling"):
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        waves = scaling["original_positions"] * turns / (2 * np.pi)
        turns = turns * (np.clip((waves - low) / (high - low), 0, 1) * (1 - 1 / scaling["factor"]) + 1 / scaling["factor"])
    angle = np.arange(t)[:, None] * turns
    cos, sin = np.cos(angle), np.sin(angle)

    def rotate(y):
        low, high = y[..., : d // 2], y[..., d // 2 :]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    heads = (("q", m["heads"]), ("k", m["kv_heads"]), ("v", m["kv_heads"]))
    q, k, v = (split(x @ p[f"{name}_proj.weight"].T + p.get(f"{name}_proj.bias", 0), n) for name, n in heads)
    if "q_norm.weight" in p:
        q, k = norm(q, p["q_norm.weight"], m["norm_eps"]), norm(k, p["k_norm.weight"], m["norm_eps"])
    q, k, kind, chunks = rotate(q), rotate(k), a["kind"], None
    if kind == "dense":
        o = read(q, k, v, Places(t).causal)
    elif kind == "token-entmax":
        o = read(q, k, v, Places(t).causal, weigh=lambda z: entmax(z, a["alpha"]))
    elif kind == "dash":
        o, chunks = dash(q, k, v, p, a)
    elif kind == "topk" and a.get("per_head"):
        o, chunks = moba(q, k, v, a)
    elif kind == "mass":
        o, chunks = mass(q, k, v, a)
    elif kind == "kl-indexer":
        o, chunks = kl_indexer(x, q, k, v, p, a, rotate)
    elif kind == "landmark":
        o, chunks = landmark(q, k, v, p, a)
    elif kind == "topk":
        o, chunks = topk(q, k, v, p, a)
    elif kind == "topk-bias":
        o, chunks = topk_bias(q, k, v, p, a)
    elif kind == "random":
        o, chunks = random_chunks(q, k, v, a, layer)
    elif kind == "infllmv2":
        o, chunks = infllmv2(q, k, v, a)
    elif kind == "nsa":
        o, chunks = nsa(x, q, k, v, p, a, rotate)
    else:
        sys.exit(f"model.attention.kind {kind!r} is not known to this script")
    return o.transpose(0, 2, 1, 3).reshape(b, t, -1), chunks


# the decoder
def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def forward(ids, targets, p, m, a):
    """Cross-entropy of every token [b, t] in nats, and the chosen chunks of every layer."""
    x, routed = p["model.embed_tokens.weight"][ids], []
    for i in range(m["layers"]):
        here = f"model.layers.{i}."
        layer = {name[len(here) :]: value for name, value in p.items() if name.startswith(here)}
        own = {name.removeprefix("self_attn."): value for name, value in layer.items()}
        o, chunks = attention(norm(x, layer["input_layernorm.weight"], m["norm_eps"]), own, m, a, i)
        routed.append(chunks)
        x = x + o @ layer["self_attn.o_proj.weight"].T
        y = norm(x, layer["post_attention_layernorm.weight"], m["norm_eps"])
        gate = y @ layer["mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    x = norm(x, p["model.norm.weight"], m["norm_eps"])
    logits = x @ p.get("lm_head.weight", p["model.embed_tokens.weight"]).T
    top = logits.max(-1, keepdims=True)
    log_sum = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
    return log_sum - np.take_along_axis(logits, targets[..., None], -1)[..., 0], routed


def attended(chunks, s):
    """(sum over queries past the first chunk of chosen / visible chunks, their number, tokens of the chosen chunks summed over all
    queries, their number) of one layer."""
    b, g, t, _ = chunks.shape
    count, own = chunks.sum(-1), np.arange(t) // s
    later = own > 0
    tokens = (count - 1) * s + np.arange(t) % s + 1
    return (count / (own + 1))[..., later].sum(), b * g * later.sum(), tokens.sum(), b * g * t


def span_tokens(a, t):
    """Mean keys of NSA's other two branches."""
    query = np.arange(t)
    starts = np.arange(0, t - a["length"] + 1, a["stride"])
    windows = (starts[None] + a["length"] - 1 <= query[:, None]).sum(-1)
    return (np.minimum(query + 1, a["window"]) + windows).mean()


def recomputed(run, cache=None):
    """The figures of the newest checkpoint, and the step that it was saved at."""
    config = tomllib.loads((run / "config.toml").read_text())
    checkpoint = max((run / "checkpoints").glob("step-*"))
    state = json.loads((checkpoint / "state.json").read_text())
    m, d, a = config["model"], config["data"], dict(config["model"]["attention"])
    if d.get("document_mask"):
        sys.exit(f"{run}: was trained with data.document_mask, which this script does not know")
    m["head_dim"] = m["head_dim"] or m["width"] // m["heads"]
    for knob, value in (state.get("knobs") or {}).items():
        if value is not None:
            a[knob] = value  # a schedule or a controller moved it
    yoke = run / "yoke.json"
    if yoke.is_file() and "budget" in (took := json.loads(yoke.read_text())):
        fits = [p for p in took["budget"]["lengths"] if p["length"] >= d["seq_len"]]
        a["budget"] = min(fits, key=lambda p: p["length"])["layers"]
    folder = Path(cache or d["cache"]) / state["data_hash"].split("+")[0]
    shards = [Shard(path) for path in sorted(folder.glob("val-*.shard"))]
    if not shards:
        sys.exit(f"{folder}: holds no validation shard; --cache names the folder of prepared corpora (data.cache)")
    p, t = safetensors(checkpoint / "model.safetensors"), d["seq_len"]
    ids, targets, text = validation_windows(shards, t, d["batch_size"] * config["eval"]["batches"])
    nats, sums = [], np.zeros((m["layers"], 4))
    for at in range(0, len(ids), 4):
        nll, routed = forward(ids[at : at + 4], targets[at : at + 4], p, m, a)
        nats.append(nll)
        for layer, chunks in enumerate(routed):
            if chunks is not None:
                sums[layer] += attended(chunks, a["chunk_size"])
    nats = np.concatenate(nats)
    out = {"loss": nats.mean(), "perplexity": math.exp(nats.mean()), "tokens": nats.size}
    if text:
        out["bits_per_byte"] = nats.sum() / math.log(2) / text
    if sums.any():
        density, rows, tokens, queries = sums.T
        out["density"] = (density / np.maximum(rows, 1)).mean() if rows.all() else 1.0
        out["attended_tokens"] = (tokens / queries).mean() + (span_tokens(a, t) if a["kind"] == "nsa" else 0.0)
    else:
        out["density"], out["attended_tokens"] = 1.0, (t + 1) / 2
    return state["step"], a["kind"], {key: float(value) for key, value in out.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--cache", type=Path, help="folder of prepared corpora, where the run's data.cache is relative to another place")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    step, kind, ours = recomputed(args.run, args.cache)
    lines = map(json.loads, (args.run / "metrics.jsonl").read_text().splitlines())
    told = [line for line in lines if line["split"] == "val" and line["step"] == step]
    if not told:
        sys.exit(f"{args.run}: metrics.jsonl has no validation at step {step}, the newest checkpoint's")
    if "loss" not in told[-1]:
        sys.exit(f"{args.run}: the validation at step {step} has no loss")
    rows, good = {}, True
    for key, value in ours.items():
        if key in told[-1]:
            off = abs(value - told[-1][key]) / max(abs(value), 1e-300)
            # of density and attended tokens a choice at the edge of a support moves some
            bound = SHARE if key in ("density", "attended_tokens") else 0.0 if key == "tokens" else LOSS
            # an error of the loss is so many times as large in its exponential
            good &= off <= (bound * max(1.0, ours["loss"]) if key == "perplexity" else bound)
            rows[key] = {"run": told[-1][key], "recomputed": value, "off": off}
    if args.json:
        print(json.dumps({"run": str(args.run), "kind": kind, "step": step, "agrees": bool(good), **rows}))
    else:
        print(f"{args.run}: {kind}, step {step}: {'agrees' if good else 'DIFFERS'}")
        for key, row in rows.items():
            print(f"  {key:16} run {row['run']:<20.15g} recomputed {row['recomputed']:<20.15g} off {row['off']:.1e}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
