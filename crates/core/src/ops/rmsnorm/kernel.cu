// R: float or double. Y: what y and dy are. A warp takes a row.

extern "C" __global__ void __launch_bounds__(256)
rmsnorm_forward(const R* __restrict__ x, const R* __restrict__ w, Y* __restrict__ y, R* __restrict__ rstd, int rows, int width, R eps) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const R* from = x + (long long)row * width;
    Y* to = y + (long long)row * width;
    R sum = 0;
    #pragma unroll 8
    for (int j = lane; j < width; j += 32) sum += from[j] * from[j];
    const R r = (R)1 / root_of(warp_sum(sum) / (R)width + eps);
    if (lane == 0) rstd[row] = r;
    #pragma unroll 8
    for (int j = lane; j < width; j += 32) to[j] = As<Y>::of(from[j] * r * w[j]);
}

// Writes dx, or adds to what is there; dw comes as one row a block, [blocks, width], to be added in order.
extern "C" __global__ void __launch_bounds__(256)
rmsnorm_backward(const Y* __restrict__ dy, const R* __restrict__ x, const R* __restrict__ w, const R* __restrict__ rstd,
                 R* __restrict__ dx, R* __restrict__ dw, int rows, int width, int add) {
    const int first = blockIdx.x * ROWS, end = min(first + ROWS, rows), lane = threadIdx.x % 32;
    for (int row = first + threadIdx.x / 32; row < end; row += 8) {
        const long long at = (long long)row * width;
        R dot = 0;
        #pragma unroll 8
        for (int j = lane; j < width; j += 32) dot += (R)widen(dy[at + j]) * w[j] * x[at + j];
        const R r = rstd[row], c = warp_sum(dot) * r * r / (R)width;
        #pragma unroll 8
        for (int j = lane; j < width; j += 32) {
            const R d = r * ((R)widen(dy[at + j]) * w[j] - x[at + j] * c);
            dx[at + j] = add ? dx[at + j] + d : d;
        }
    }
    for (int j = threadIdx.x; j < width; j += 256) {
        R sum = 0;
        #pragma unroll 8
        for (int row = first; row < end; row++) {
            const long long at = (long long)row * width + j;
            sum += (R)widen(dy[at]) * x[at] * rstd[row];
        }
        dw[(long long)blockIdx.x * width + j] = sum;
    }
}
