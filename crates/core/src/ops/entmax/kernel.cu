// R: float or double. A block takes a row. The solver is that of mod.rs: Newton on the beta-norm, from the left.

extern "C" __global__ void __launch_bounds__(256)
entmax_forward(const R* __restrict__ z, R* __restrict__ p, int width, R alpha) {
    __shared__ R scratch[32];
    const R* from = z + (long long)blockIdx.x * width;
    R* x = p + (long long)blockIdx.x * width;
    R top = from[0];
    for (int j = threadIdx.x; j < width; j += 256) top = larger(top, from[j]);
    top = block_max(top, scratch);
    if (top == -INFINITY_OF_R) {
        for (int j = threadIdx.x; j < width; j += 256) x[j] = 0;
        return;
    }
    const R factor = alpha - (R)1, beta = (R)1 / factor;
    const bool squares = alpha == (R)1.5;
    for (int j = threadIdx.x; j < width; j += 256) x[j] = (from[j] - top) * factor;
    R tau = -1;
    for (int step = 0; step < 100; step++) {
        R low = 0, high = 0;
        for (int j = threadIdx.x; j < width; j += 256) {
            const R u = x[j] - tau;
            if (u > 0) {
                const R power = squares ? u : beta == (R)1 ? (R)1 : pow_of(u, beta - (R)1);
                low += power;
                high += power * u;
            }
        }
        low = block_sum(low, scratch);
        high = block_sum(high, scratch);
        const R norm = squares ? root_of(high) : pow_of(high, factor);
        const R next = tau + (norm - (R)1) * (squares ? norm : pow_of(norm, beta - (R)1)) / low;
        if (!(next > tau) || next > (R)1) break;  // rounding ended the rise (the root lies below 0)
        tau = next;
    }
    for (int j = threadIdx.x; j < width; j += 256) {
        const R u = x[j] - tau;
        x[j] = u > 0 ? (squares ? u * u : pow_of(u, beta)) : (R)0;
    }
}

INLINE R slope(R p, R alpha) { return p == 0 ? (R)0 : alpha == (R)1.5 ? root_of(p) : alpha == (R)2 ? (R)1 : pow_of(p, (R)2 - alpha); }

extern "C" __global__ void __launch_bounds__(256)
entmax_backward(const R* __restrict__ dy, const R* __restrict__ p, R* __restrict__ dz, int width, R alpha) {
    __shared__ R scratch[32];
    const long long row = (long long)blockIdx.x * width;
    R inner = 0, sum = 0;
    for (int j = threadIdx.x; j < width; j += 256) {
        const R r = slope(p[row + j], alpha);
        inner += r * dy[row + j];
        sum += r;
    }
    inner = block_sum(inner, scratch);
    sum = block_sum(sum, scratch);
    const R mean = sum == 0 ? (R)0 : inner / sum;
    for (int j = threadIdx.x; j < width; j += 256) dz[row + j] = slope(p[row + j], alpha) * (dy[row + j] - mean);
}
