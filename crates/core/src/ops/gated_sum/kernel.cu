// R: float or double; X: what branches, their gradients and y are, R or bf16. gates [rows, 3], branches and y [rows, width]; `lanes` neighbours
// share a row, AT_ONCE elements each at a time; width is a multiple of that.

// The sum over the lanes of a row.
INLINE R row_sum(R x, int lanes) {
    for (int other = lanes / 2; other > 0; other /= 2) x += __shfl_xor_sync(FULL, x, other);
    return x;
}

extern "C" __global__ void __launch_bounds__(256)
gated_sum_forward(const R* __restrict__ gates, const X* __restrict__ a, const X* __restrict__ b, const X* __restrict__ c, X* __restrict__ y,
                  int rows, int width, int lanes) {
    const long long row = ((long long)blockIdx.x * 256 + threadIdx.x) / lanes;
    if (row >= rows) return;
    const R p = gates[3 * row], q = gates[3 * row + 1], r = gates[3 * row + 2];
    for (int j = threadIdx.x % lanes * AT_ONCE; j < width; j += lanes * AT_ONCE) {
        const long long at = row * width + j;
        R of_a[AT_ONCE], of_b[AT_ONCE], of_c[AT_ONCE];
        take(of_a, a + at);
        take(of_b, b + at);
        take(of_c, c + at);
        #pragma unroll
        for (int e = 0; e < AT_ONCE; e++) of_a[e] = of_a[e] * p + of_b[e] * q + of_c[e] * r;
        put(y + at, of_a);
    }
}

extern "C" __global__ void __launch_bounds__(256)
gated_sum_backward(const R* __restrict__ dy, const R* __restrict__ gates, const X* __restrict__ a, const X* __restrict__ b,
                   const X* __restrict__ c, R* __restrict__ dgates, X* __restrict__ da, X* __restrict__ db, X* __restrict__ dc, int rows, int width,
                   int lanes) {
    const long long row = ((long long)blockIdx.x * 256 + threadIdx.x) / lanes;
    const bool valid = row < rows;  // all lanes of a warp take part in its sums
    const R p = valid ? gates[3 * row] : (R)0, q = valid ? gates[3 * row + 1] : (R)0, r = valid ? gates[3 * row + 2] : (R)0;
    R sum_a = 0, sum_b = 0, sum_c = 0;
    for (int j = threadIdx.x % lanes * AT_ONCE; valid && j < width; j += lanes * AT_ONCE) {
        const long long at = row * width + j;
        R d[AT_ONCE], x[AT_ONCE];
        take(d, dy + at);
        const auto branch = [&](R& sum, const X* from, X* to, R gate) {
            take(x, from + at);
            #pragma unroll
            for (int e = 0; e < AT_ONCE; e++) sum += x[e] * d[e], x[e] = d[e] * gate;
            put(to + at, x);
        };
        branch(sum_a, a, da, p);
        branch(sum_b, b, db, q);
        branch(sum_c, c, dc, r);
    }
    sum_a = row_sum(sum_a, lanes), sum_b = row_sum(sum_b, lanes), sum_c = row_sum(sum_c, lanes);
    if (!valid || threadIdx.x % lanes) return;
    dgates[3 * row] = sum_a, dgates[3 * row + 1] = sum_b, dgates[3 * row + 2] = sum_c;
}
