// R: float or double. Equations and names as in mod.rs; `scale`, the clip factor, lies on the device, so that no step waits for
// the gradient's norm. `operand` gets p rounded to bf16 where it is given.
extern "C" __global__ void __launch_bounds__(256)
adamw(R* __restrict__ p, R* __restrict__ m, R* __restrict__ v, const R* __restrict__ g, bf16* __restrict__ operand,
      const double* __restrict__ scale, long long n, R b1, R b2, R c1, R c2, R keep, R step, R root, R eps) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    const double factor = scale ? *scale : 1.0;
    if ((__double_as_longlong(factor) & 0x7ff0000000000000ll) == 0x7ff0000000000000ll) return;  // not finite
    const R d = g[at] * (R)factor;
    const R first = b1 * m[at] + c1 * d, second = b2 * v[at] + c2 * d * d;
    m[at] = first;
    v[at] = second;
    const R to = p[at] * keep - step * first / (root_of(second) * root + eps);
    p[at] = to;
    if (operand) operand[at] = As<bf16>::of(to);
}
