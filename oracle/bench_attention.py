"""Dense causal attention of PyTorch by cuDNN, by length: rows for the picture of `cargo run -p dash-core --example cuda_attention -- --sweep`.

usage: bench_attention.py        one NVIDIA GPU, torch 2.5 or later; 65,536 tokens in all, bf16, heads and widths as there

Prints rows `picture,line,x,y` without a header: TFLOP/s of forward, and of forward and backward, over the pairs that a causal mask leaves.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def median_ms(run, before=1):
    """Median of five after one that warms up, as the example takes it, or after more of those."""
    for _ in range(before):
        run()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[2]


def main():
    for t in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        for what, (h, g, d) in (("d 128", (32, 2, 128)), ("d 64", (16, 4, 64))):
            b = 65536 // t
            q, k, v = (torch.randn(b, n, t, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (h, g, g))
            dout = torch.randn_like(q)

            def forward():
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            def both():
                q.grad = k.grad = v.grad = None
                forward().backward(dout)

            with torch.no_grad():
                there = median_ms(forward)
            flop = 2.0 * d * b * h * t * (t + 1) / 2
            print(f"length forward,cuDNN {what},{t},{2 * flop / there / 1e9:.1f}")
            print(f"length both,cuDNN {what},{t},{7 * flop / median_ms(both) / 1e9:.1f}", flush=True)


if __name__ == "__main__":
    main()
