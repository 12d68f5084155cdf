// R: float or double. Squares are summed in f64 in a fixed order: threads, blocks of PIECE elements, then blocks in order.

extern "C" __global__ void __launch_bounds__(512)
squares(const R* __restrict__ x, double* __restrict__ parts, long long n) {
    __shared__ double scratch[32];
    const long long first = (long long)blockIdx.x * PIECE, end = first + PIECE < n ? first + PIECE : n;
    double sum = 0;
    #pragma unroll 8
    for (long long i = first + threadIdx.x; i < end; i += 512) sum += (double)x[i] * (double)x[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// out = {norm, clip factor}: 1, or most / norm where that is less.
extern "C" __global__ void __launch_bounds__(512)
norm_of_parts(const double* __restrict__ parts, double* __restrict__ out, int count, double most) {
    __shared__ double scratch[32];
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += 512) sum += parts[i];
    sum = sqrt(block_sum(sum, scratch));
    if (threadIdx.x == 0) {
        out[0] = sum;
        out[1] = sum > most ? most / sum : 1.0;
    }
}
