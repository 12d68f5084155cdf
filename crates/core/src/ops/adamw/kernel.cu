// R: float or double. MANY: rows of a table. Equations and names as in mod.rs; `scale`, the clip factor, lies on the device, so that no step
// waits for the gradient's norm.

// A parameter, its moments and gradient, n of each; `operand` gets p rounded to bf16 where it is given. Its first block is `first`.
struct Row {
    R *p, *m, *v;
    const R* g;
    bf16* operand;
    long long n, first;
    double keep, step;  // 1 - lr decay, lr / (1 - b1^k)
};
struct Rows { Row row[MANY]; };

extern "C" __global__ void __launch_bounds__(256)
adamw(const __grid_constant__ Rows all, int count, const double* __restrict__ scale, R b1, R b2, R c1, R c2, R root, R eps) {
    int i = 0;
    while (i + 1 < count && blockIdx.x >= all.row[i + 1].first) i++;
    const Row& r = all.row[i];
    const long long at = (blockIdx.x - r.first) * 256 + threadIdx.x;
    if (at >= r.n) return;
    const double factor = scale ? *scale : 1.0;
    if ((__double_as_longlong(factor) & 0x7ff0000000000000ll) == 0x7ff0000000000000ll) return;  // not finite
    const R d = r.g[at] * (R)factor, keep = (R)r.keep, step = (R)r.step;
    const R first = b1 * r.m[at] + c1 * d, second = b2 * r.v[at] + c2 * d * d;
    r.m[at] = first;
    r.v[at] = second;
    const R to = r.p[at] * keep - step * first / (root_of(second) * root + eps);
    r.p[at] = to;
    if (r.operand) r.operand[at] = As<bf16>::of(to);
}
