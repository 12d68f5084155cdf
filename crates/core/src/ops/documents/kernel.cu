// W: an unsigned integer as wide as an element: numbers only move.

// out[j, i] = x[rows[j], i], 0 where rows[j] is none
extern "C" __global__ void __launch_bounds__(256)
take_rows(const W* __restrict__ x, const u32* __restrict__ rows, W* __restrict__ out, long long total, int width) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= total) return;
    const u32 row = rows[at / width];
    out[at] = row == FULL ? W(0) : x[(long long)row * width + at % width];
}

// out[rows[j], i] = x[j, i] where rows[j] is one; no two are the same
extern "C" __global__ void __launch_bounds__(256)
put_rows(const W* __restrict__ x, const u32* __restrict__ rows, W* __restrict__ out, long long total, int width) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= total) return;
    const u32 row = rows[at / width];
    if (row != FULL) out[(long long)row * width + at % width] = x[at];
}
