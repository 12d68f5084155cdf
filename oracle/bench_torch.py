"""Times PyTorch on the step that `train bench` times:
python bench_torch.py [--threads N] [--compile] [--bf16] [--against target/release/train]

The model of configs/bench-cpu.toml in plain PyTorch: Llama blocks with grouped queries and SDPA, tied head, AdamW (fused
where the build has it), clipping by norm; random tokens, median of steps after warm-up. Also: --attention T times SDPA
forward + backward at 8 heads, 2 kv heads, width 64. With --against, the steps of both take turns, a pair at a time, so that both
meet the same disturbances; the answer is the median of the pairs' ratios.
"""
import argparse
import json
import resource
import subprocess
import time

import torch
import torch.nn.functional as F
from torch import nn

LAYERS, WIDTH, HEADS, KV, FFN, VOCAB = 6, 256, 8, 2, 688, 4096


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        d = WIDTH // HEADS
        self.n1, self.n2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.q, self.k = nn.Linear(WIDTH, HEADS * d, bias=False), nn.Linear(WIDTH, KV * d, bias=False)
        self.v, self.o = nn.Linear(WIDTH, KV * d, bias=False), nn.Linear(HEADS * d, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, FFN, bias=False), nn.Linear(WIDTH, FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        a = self.n1(x)
        split = lambda y, n: y.view(b, t, n, -1).transpose(1, 2)

        def rope(y):
            y1, y2 = y.chunk(2, -1)
            return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], -1)

        q, k, v = rope(split(self.q(a), HEADS)), rope(split(self.k(a), KV)), split(self.v(a), KV)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(o.transpose(1, 2).reshape(b, t, -1))
        m = self.n2(x)
        return x + self.down(F.silu(self.gate(m)) * self.up(m))


class Llama(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        d = WIDTH // HEADS
        angle = torch.arange(t)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)[None]
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids, targets):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1))


def median(f, warmup, steps):
    times = []
    for i in range(warmup + steps):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return sorted(times[warmup:])[steps // 2]


def in_turn(step, binary, steps, set_):
    """Pairs of (PyTorch's, the binary's) milliseconds."""
    command = [binary, "bench", "--config", "configs/bench-cpu.toml", "--in-turn"] + [x for s in set_ for x in ("--set", s)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    pairs = []
    for i in range(steps + 2):
        start = time.perf_counter()
        step()
        mine = (time.perf_counter() - start) * 1e3
        time.sleep(0.3)  # OpenMP's threads spin for 0.2 s after their work
        other.stdin.write("\n")
        pairs.append((mine, float(other.stdout.readline())))
    other.stdin.close()
    other.wait()
    return pairs[2:]


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--attention", type=int)
    p.add_argument("--against", metavar="BINARY", help="path of `train`: steps in turn with it")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for that binary")
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.attention:
        q = torch.randn(1, 8, a.attention, 64, requires_grad=True)
        k, v = (torch.randn(1, 2, a.attention, 64, requires_grad=True) for _ in range(2))

        def run():
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(o, (q, k, v), o.detach())

        print(json.dumps({"torch_attention_ms": median(run, 2, a.steps) * 1e3, "t": a.attention}))
        raise SystemExit
    model = Llama(a.tokens)
    forward = torch.compile(model) if a.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step():
        ids = torch.randint(0, VOCAB, (a.batch, a.tokens + 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=a.bf16):
            loss = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if a.against:
        pairs = in_turn(step, a.against, a.steps, a.set)
        middle = lambda x: sorted(x)[len(x) // 2]
        ratios = sorted(mine / other for mine, other in pairs)
        print(json.dumps({"torch_ms": middle([p[0] for p in pairs]), "train_ms": middle([p[1] for p in pairs]),
                          "ratio": middle(ratios), "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
                          "pairs": a.steps, "compile": a.compile, "bf16": a.bf16, "threads": a.threads}))
        raise SystemExit
    seconds = median(step, 2, a.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"tokens_per_s": a.tokens * a.batch / seconds, "step_ms": seconds * 1e3, "peak_rss_mb": peak,
                      "compile": a.compile, "bf16": a.bf16, "threads": a.threads}))
