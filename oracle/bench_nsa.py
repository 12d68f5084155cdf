"""Times the NSA kernels of https://github.com/XunhaoLai/native-sparse-attention-triton on what `train bench --ops` calls "all of nsa":

python bench_nsa.py CLONE [B,T,HEADS,KV_HEADS,WIDTH ...]        one NVIDIA GPU, torch with Triton, einops

Settings of the paper (arXiv 2502.11089): windows of 32 every 16, chunks of 64, 16 chosen of which the first and the last two always. Compression, attention
to windows with the choice, attention to the chosen chunks; forward and backward, bf16. Its sliding window needs another package and is left out, ours is in; its
gates and projections are left out, too. One line a shape: milliseconds of forward, of forward and backward, and of each part's both.
"""

import sys

import torch

from bench_attention import median_ms


def warm_ms(run):
    return median_ms(run, before=2)  # the first one compiles


def main():
    sys.path.insert(0, sys.argv[1])
    from native_sparse_attention.ops import compressed_attention, linear_compress, topk_sparse_attention

    length, stride, chunk, top = 32, 16, 64, 16
    for shape in sys.argv[2:] or ["1,32768,32,2,128"]:
        b, t, h, g, d = map(int, shape.split(","))
        draw = lambda *sizes: torch.randn(*sizes, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        q, k, v, dout = draw(b * t, h, d), draw(b * t, g, d), draw(b * t, g, d), draw(b * t, h, d).detach()
        weight = [(torch.randn(g, length * d, d, device="cuda") / (length * d) ** 0.5).bfloat16().requires_grad_() for _ in "kv"]
        ends = torch.arange(0, b * t + 1, t, device="cuda", dtype=torch.int32)

        def compress():
            ck, pooled = linear_compress(k, weight[0], ends, length, stride, None)
            cv, _ = linear_compress(v, weight[1], ends, length, stride, None)
            return ck, cv, pooled

        def windows(ck, cv, pooled):
            return compressed_attention(q, ck, cv, length, stride, chunk, top, ends, pooled, init_blocks=1, local_blocks=2)

        def forward():
            out, chosen = windows(*compress())
            return out + topk_sparse_attention(q, k, v, chosen, chunk, ends)

        def both(run, grad=dout):
            for x in [q, k, v, *weight]:
                x.grad = None
            torch.autograd.backward(run(), grad)

        with torch.no_grad():
            there = warm_ms(forward)
            ck, cv, pooled = compress()
            chosen = windows(ck, cv, pooled)[1]
        parts = {
            "compress": lambda: both(lambda: list(compress()[:2]), [torch.ones_like(ck), torch.ones_like(cv)]),
            "windows and choice": lambda: both(lambda: windows(ck.requires_grad_(), cv.requires_grad_(), pooled)[0]),
            "chosen chunks": lambda: both(lambda: topk_sparse_attention(q, k, v, chosen, chunk, ends)),
        }
        told = ", ".join(f"{name} {warm_ms(run):.2f}" for name, run in parts.items())
        print(f"b{b} t{t} h{h} g{g} d{d}: forward {there:.2f} ms, both {warm_ms(lambda: both(forward)):.2f} ms; {told}", flush=True)


if __name__ == "__main__":
    main()
