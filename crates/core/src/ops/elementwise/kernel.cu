// R: float or double.

INLINE R combine(int kind, R a, R b) { return kind == 0 ? a + b : kind == 1 ? a - b : a * b; }

// The broadcast of two operands over four axes, the last one the fastest; a stride of 0 repeats.
extern "C" __global__ void __launch_bounds__(256)
binary(const R* __restrict__ a, const R* __restrict__ b, R* __restrict__ out, long long n, int kind, int e1, int e2, int e3,
       int a0, int a1, int a2, int a3, int b0, int b1, int b2, int b3) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    long long rest = at;
    const int i3 = (int)(rest % e3); rest /= e3;
    const int i2 = (int)(rest % e2); rest /= e2;
    const int i1 = (int)(rest % e1); rest /= e1;
    out[at] = combine(kind, a[rest * a0 + (long long)i1 * a1 + (long long)i2 * a2 + (long long)i3 * a3],
                      b[rest * b0 + (long long)i1 * b1 + (long long)i2 * b2 + (long long)i3 * b3]);
}
extern "C" __global__ void __launch_bounds__(256)
binary_alike(const R* __restrict__ a, const R* __restrict__ b, R* __restrict__ out, long long n, int kind) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) out[at] = combine(kind, a[at], b[at]);
}

// 0: factor x, 1: e^x, 2: ln x, 3: 1 / (1 + e^-x), 4: x (1 - x), 5: 1 / x
extern "C" __global__ void __launch_bounds__(256)
unary(const R* __restrict__ x, R* __restrict__ y, long long n, int kind, R factor) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    const R v = x[at];
    y[at] = kind == 0 ? v * factor : kind == 1 ? exp_of(v) : kind == 2 ? log_of(v)
          : kind == 3 ? (R)1 / ((R)1 + exp_of(-v)) : kind == 4 ? v * ((R)1 - v) : (R)1 / v;
}

// The mask repeats over the leading axes.
extern "C" __global__ void __launch_bounds__(256)
mask_fill(const R* __restrict__ x, const u32* __restrict__ mask, R* __restrict__ y, long long n, long long period, R value) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) y[at] = mask[at % period] ? value : x[at];
}
extern "C" __global__ void __launch_bounds__(256)
fill(R* __restrict__ x, long long n, R value) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) x[at] = value;
}
extern "C" __global__ void __launch_bounds__(256)
add_into(R* __restrict__ sum, const R* __restrict__ x, long long n) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) sum[at] += x[at];
}
extern "C" __global__ void __launch_bounds__(256)
scale_by(R* __restrict__ x, const R* __restrict__ factor, long long n) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    const R by = *factor;
    if (at < n && by != (R)1) x[at] *= by;
}
extern "C" __global__ void __launch_bounds__(256)
of_float(const float* __restrict__ x, R* __restrict__ y, long long n) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) y[at] = (R)x[at];
}
extern "C" __global__ void __launch_bounds__(256)
to_float(const R* __restrict__ x, float* __restrict__ y, long long n) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) y[at] = (float)x[at];
}
extern "C" __global__ void __launch_bounds__(256)
same_kind(const R* __restrict__ x, R* __restrict__ y, long long n) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) y[at] = x[at];
}
// A thread eight elements, 16 bytes at a time where both sides allow it.
extern "C" __global__ void __launch_bounds__(256)
to_bf16(const R* __restrict__ x, bf16* __restrict__ y, long long n) {
    const long long at = ((long long)blockIdx.x * 256 + threadIdx.x) * 8;
    if (sizeof(R) == 4 && at + 8 <= n && (((u64)x | (u64)y) & 15) == 0) {
        float v[8];
        take(v, (const float*)x + at);
        put(y + at, v);
    } else {
        for (long long i = at; i < at + 8 && i < n; i++) y[i] = As<bf16>::of(x[i]);
    }
}
extern "C" __global__ void __launch_bounds__(256)
of_bf16(const bf16* __restrict__ x, R* __restrict__ y, long long n) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) y[at] = (R)widen(x[at]);
}
