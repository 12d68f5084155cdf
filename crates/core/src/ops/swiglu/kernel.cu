// X: what gate, up and their gradients are; R: what is computed in. gate and up lie side by side, [rows, 2 f], and their gradients alike; f counts
// pieces of AT_ONCE elements. The products around it are other launches.

INLINE double sigmoid_of(double x) { return 1 / (1 + exp(-x)); }
// 2 units in the last place more or less, where gate is rounded to bf16 anyway
INLINE float sigmoid_of(float x) { return sizeof(X) == 2 ? __fdividef(1.f, 1.f + exp2_fast(-LOG2E * x)) : 1.f / (1.f + expf(-x)); }

extern "C" __global__ void __launch_bounds__(256)
swiglu_forward(const X* __restrict__ both, X* __restrict__ h, int rows, int f) {
    const int j = blockIdx.x * 256 + threadIdx.x;
    if (j >= f) return;
    for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
        const X* gate = both + (row * 2 * f + j) * AT_ONCE;
        R g[AT_ONCE], u[AT_ONCE];
        take(g, gate);
        take(u, gate + (long long)f * AT_ONCE);
        #pragma unroll
        for (int e = 0; e < AT_ONCE; e++) u[e] *= g[e] * sigmoid_of(g[e]);
        put(h + (row * f + j) * AT_ONCE, u);
    }
}

// dup = dh silu(gate), dgate = dh up s (1 + gate (1 - s)), and h again for the gradient of the last product's weight.
extern "C" __global__ void __launch_bounds__(256)
swiglu_backward(const X* __restrict__ dh, const X* __restrict__ both, X* __restrict__ dboth, X* __restrict__ h, int rows, int f) {
    const int j = blockIdx.x * 256 + threadIdx.x;
    if (j >= f) return;
    for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
        const long long gate = (row * 2 * f + j) * AT_ONCE, up = gate + (long long)f * AT_ONCE, at = (row * f + j) * AT_ONCE;
        R g[AT_ONCE], u[AT_ONCE], d[AT_ONCE], dg[AT_ONCE];
        take(g, both + gate);
        take(u, both + up);
        take(d, dh + at);
        #pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            const R s = sigmoid_of(g[e]), silu = g[e] * s;
            dg[e] = d[e] * u[e] * s * ((R)1 + g[e] * ((R)1 - s));
            d[e] *= silu;
            u[e] *= silu;
        }
        put(dboth + gate, dg);
        put(dboth + up, d);
        put(h + at, u);
    }
}
