// R: float or double. A block takes a row.

extern "C" __global__ void __launch_bounds__(256)
softmax_forward(const R* __restrict__ x, R* __restrict__ p, int width) {
    __shared__ R scratch[32];
    const R* from = x + (long long)blockIdx.x * width;
    R* to = p + (long long)blockIdx.x * width;
    R top = from[0];
    for (int j = threadIdx.x; j < width; j += 256) top = larger(top, from[j]);
    top = block_max(top, scratch);
    if (top == -INFINITY_OF_R) {  // nothing to choose from: all zero
        for (int j = threadIdx.x; j < width; j += 256) to[j] = 0;
        return;
    }
    R sum = 0;
    for (int j = threadIdx.x; j < width; j += 256) sum += exp_of(from[j] - top);
    const R inverse = (R)1 / block_sum(sum, scratch);
    for (int j = threadIdx.x; j < width; j += 256) to[j] = exp_of(from[j] - top) * inverse;
}

extern "C" __global__ void __launch_bounds__(256)
softmax_backward(const R* __restrict__ dy, const R* __restrict__ p, R* __restrict__ dx, int width) {
    __shared__ R scratch[32];
    const long long row = (long long)blockIdx.x * width;
    R dot = 0;
    for (int j = threadIdx.x; j < width; j += 256) dot += dy[row + j] * p[row + j];
    dot = block_sum(dot, scratch);
    for (int j = threadIdx.x; j < width; j += 256) dx[row + j] = p[row + j] * (dy[row + j] - dot);
}
