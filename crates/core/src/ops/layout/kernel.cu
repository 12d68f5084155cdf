// W: an unsigned integer as wide as an element (numbers only move); R: a number, for the sums of a gradient.

// out[i0, .., i4] = x at the strides; the last axis is the fastest.
extern "C" __global__ void __launch_bounds__(256)
permute(const W* __restrict__ x, W* __restrict__ out, long long n, int e1, int e2, int e3, int e4,
        long long s0, long long s1, long long s2, long long s3, long long s4) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    long long rest = at;
    const int i4 = (int)(rest % e4); rest /= e4;
    const int i3 = (int)(rest % e3); rest /= e3;
    const int i2 = (int)(rest % e2); rest /= e2;
    const int i1 = (int)(rest % e1); rest /= e1;
    out[at] = x[rest * s0 + i1 * s1 + i2 * s2 + i3 * s3 + i4 * s4];
}

// out[o, j, i] = x[o, index[j], i]
extern "C" __global__ void __launch_bounds__(256)
select(const W* __restrict__ x, const u32* __restrict__ index, W* __restrict__ out, long long total, int count, int n, int inner) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= total) return;
    const long long row = at / inner;
    out[at] = x[(row / count * n + index[row % count]) * inner + at % inner];
}

// The gradient: dx[o, k, i] is the sum of dy[o, j, i] over the places j of k, in order.
extern "C" __global__ void __launch_bounds__(256)
select_backward(const R* __restrict__ dy, const u32* __restrict__ starts, const u32* __restrict__ places, R* __restrict__ dx,
                long long total, int count, int n, int inner) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= total) return;
    const long long row = at / inner, outer = row / n;
    const int k = (int)(row % n);
    R sum = 0;
    for (u32 p = starts[k]; p < starts[k + 1]; p++) sum += (R)widen(dy[(outer * count + places[p]) * inner + at % inner]);
    dx[at] = sum;
}
