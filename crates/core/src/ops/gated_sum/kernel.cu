// R: float or double. gates [rows, 3], branches and y [rows, width]; a warp a row, eight rows a block.

extern "C" __global__ void __launch_bounds__(256)
gated_sum_forward(const R* __restrict__ gates, const R* __restrict__ a, const R* __restrict__ b, const R* __restrict__ c, R* __restrict__ y,
                  int rows, int width) {
    const int lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32, first = row * width;
    if (row >= rows) return;
    const R p = gates[3 * row], q = gates[3 * row + 1], r = gates[3 * row + 2];
    for (int j = lane; j < width; j += 32) y[first + j] = a[first + j] * p + b[first + j] * q + c[first + j] * r;
}

extern "C" __global__ void __launch_bounds__(256)
gated_sum_backward(const R* __restrict__ dy, const R* __restrict__ gates, const R* __restrict__ a, const R* __restrict__ b,
                   const R* __restrict__ c, R* __restrict__ dgates, R* __restrict__ da, R* __restrict__ db, R* __restrict__ dc, int rows, int width) {
    const int lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32, first = row * width;
    if (row >= rows) return;
    const R p = gates[3 * row], q = gates[3 * row + 1], r = gates[3 * row + 2];
    R of_a = 0, of_b = 0, of_c = 0;
    for (int j = lane; j < width; j += 32) {
        const R d = dy[first + j];
        of_a += a[first + j] * d, of_b += b[first + j] * d, of_c += c[first + j] * d;
        da[first + j] = d * p, db[first + j] = d * q, dc[first + j] = d * r;
    }
    of_a = warp_sum(of_a), of_b = warp_sum(of_b), of_c = warp_sum(of_c);
    if (lane < 3) dgates[3 * row + lane] = lane == 0 ? of_a : lane == 1 ? of_b : of_c;
}
