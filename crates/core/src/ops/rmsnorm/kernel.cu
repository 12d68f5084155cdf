// R: float or double. Y: what y and dy are. A warp takes a row. PIECES above 0: R is float, a row has a multiple of 4 columns and at most
// 128 PIECES, and stays in registers between its two uses; 0: any width, and rows are read twice.

#if PIECES
// columns of a lane: four of each piece
#define EACH_PIECE(i, j) _Pragma("unroll") for (int i = 0, j = threadIdx.x % 32 * 4; i < PIECES; i++, j += 128) if (j < width)

extern "C" __global__ void __launch_bounds__(256)
rmsnorm_forward(const float* __restrict__ x, const float* __restrict__ w, Y* __restrict__ y, float* __restrict__ rstd, int rows, int width, float eps) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    const long long at = (long long)row * width;
    float v[PIECES][4], sum = 0;
    EACH_PIECE(i, j) take(v[i], x + at + j);
    EACH_PIECE(i, j) for (int e = 0; e < 4; e++) sum += v[i][e] * v[i][e];
    const float r = 1.f / sqrtf(warp_sum(sum) / (float)width + eps);
    if (threadIdx.x % 32 == 0) rstd[row] = r;
    EACH_PIECE(i, j) {
        float by[4];
        take(by, w + j);
        for (int e = 0; e < 4; e++) v[i][e] *= r * by[e];
        put(y + at + j, v[i]);
    }
}

// A block takes `together` rows. Writes dx, or adds to what is there, and where `rounded` is given what dx is then, in bf16; dw comes as one
// row a block, [blocks, width], to be added in order.
extern "C" __global__ void __launch_bounds__(256)
rmsnorm_backward(const Y* __restrict__ dy, const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ rstd,
                 float* dx, bf16* __restrict__ rounded, float* __restrict__ dw, int rows, int width, int together, int add) {
    __shared__ __align__(16) float sums[8][PIECES * 128];
    const int first = blockIdx.x * together, end = min(first + together, rows), warp = threadIdx.x / 32;
    float of_w[PIECES][4] = {};
    for (int row = first + warp; row < end; row += 8) {
        const long long at = (long long)row * width;
        float g[PIECES][4], v[PIECES][4], old[PIECES][4], dot = 0;
        EACH_PIECE(i, j) take(g[i], dy + at + j);
        EACH_PIECE(i, j) take(v[i], x + at + j);
        if (add) EACH_PIECE(i, j) take(old[i], dx + at + j);
        const float r = rstd[row];
        EACH_PIECE(i, j) {
            float by[4];
            take(by, w + j);
            for (int e = 0; e < 4; e++) {
                of_w[i][e] += g[i][e] * v[i][e] * r;
                g[i][e] *= by[e];
                dot += g[i][e] * v[i][e];
            }
        }
        const float c = warp_sum(dot) * r * r / (float)width;
        EACH_PIECE(i, j) {
            for (int e = 0; e < 4; e++) {
                const float d = r * (g[i][e] - v[i][e] * c);
                v[i][e] = add ? old[i][e] + d : d;
            }
            put(dx + at + j, v[i]);
            if (rounded) put(rounded + at + j, v[i]);
        }
    }
    EACH_PIECE(i, j) put(&sums[warp][j], of_w[i]);
    __syncthreads();
    for (int j = threadIdx.x; j < width; j += 256) {
        float sum = 0;
        for (int k = 0; k < 8; k++) sum += sums[k][j];
        dw[(long long)blockIdx.x * width + j] = sum;
    }
}
#else
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

extern "C" __global__ void __launch_bounds__(256)
rmsnorm_backward(const Y* __restrict__ dy, const R* __restrict__ x, const R* __restrict__ w, const R* __restrict__ rstd,
                 R* __restrict__ dx, bf16* __restrict__ rounded, R* __restrict__ dw, int rows, int width, int together, int add) {
    const int first = blockIdx.x * together, end = min(first + together, rows), lane = threadIdx.x % 32;
    for (int row = first + threadIdx.x / 32; row < end; row += 8) {
        const long long at = (long long)row * width;
        R dot = 0;
        #pragma unroll 8
        for (int j = lane; j < width; j += 32) dot += (R)widen(dy[at + j]) * w[j] * x[at + j];
        const R r = rstd[row], c = warp_sum(dot) * r * r / (R)width;
        #pragma unroll 8
        for (int j = lane; j < width; j += 32) {
            R d = r * ((R)widen(dy[at + j]) * w[j] - x[at + j] * c);
            if (add) d += dx[at + j];
            dx[at + j] = d;
            if (rounded) rounded[at + j] = As<bf16>::of(d);
        }
    }
    for (int j = threadIdx.x; j < width; j += 256) {
        R sum = 0;
        #pragma unroll 4
        for (int row = first; row < end; row++) {
            const long long at = (long long)row * width + j;
            sum += (R)widen(dy[at]) * x[at] * rstd[row];
        }
        dw[(long long)blockIdx.x * width + j] = sum;
    }
}
#endif
