// X: what gate, up and their gradients are; R: what is computed in. The products around it are other launches.

INLINE R sigmoid_of(R x) { return (R)1 / ((R)1 + exp_of(-x)); }

extern "C" __global__ void __launch_bounds__(256)
swiglu_forward(const X* __restrict__ gate, const X* __restrict__ up, X* __restrict__ h, long long n) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    const R g = (R)widen(gate[at]);
    h[at] = As<X>::of(g * sigmoid_of(g) * (R)widen(up[at]));
}

// dup = dh silu(gate), dgate = dh up s (1 + gate (1 - s)), and h again for the gradient of the last product's weight.
extern "C" __global__ void __launch_bounds__(256)
swiglu_backward(const X* __restrict__ dh, const X* __restrict__ gate, const X* __restrict__ up, X* __restrict__ dgate,
                X* __restrict__ dup, X* __restrict__ h, long long n) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    const R g = (R)widen(gate[at]), u = (R)widen(up[at]), d = (R)widen(dh[at]), s = sigmoid_of(g);
    h[at] = As<X>::of(g * s * u);
    dup[at] = As<X>::of(d * g * s);
    dgate[at] = As<X>::of(d * u * s * ((R)1 + g * ((R)1 - s)));
}
