// R: float or double. Equations and names as in mod.rs; `scale`, the clip factor, lies on the device: where it is not finite, nothing changes.

INLINE bool finite(double x) { return x - x == 0; }

extern "C" __global__ void __launch_bounds__(256)
nesterov(const R* __restrict__ g, R* __restrict__ m, R* __restrict__ x, const double* __restrict__ scale, long long n, R b, R rest) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    const double factor = *scale;
    if (!finite(factor)) { x[at] = 0; return; }
    const R d = g[at] * (R)factor, first = b * m[at] + rest * d;
    m[at] = first;
    x[at] = b * first + rest * d;
}

extern "C" __global__ void __launch_bounds__(256)
divide(R* __restrict__ x, const double* __restrict__ norm, long long n, double smallest) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) x[at] *= (R)(1 / (*norm > smallest ? *norm : smallest));
}

extern "C" __global__ void __launch_bounds__(256)
blend(R* __restrict__ y, const R* __restrict__ x, long long n, R keep, R add) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) y[at] = keep * y[at] + add * x[at];
}

// `operand` gets p rounded to bf16 where it is given.
extern "C" __global__ void __launch_bounds__(256)
apply(R* __restrict__ p, bf16* __restrict__ operand, const R* __restrict__ x, const double* __restrict__ scale, long long n, R keep, R step) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= n || !finite(*scale)) return;
    const R to = keep * p[at] - step * x[at];
    p[at] = to;
    if (operand) operand[at] = As<bf16>::of(to);
}
