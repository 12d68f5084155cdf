// R: float or double.

extern "C" __global__ void __launch_bounds__(256)
embedding_forward(const R* __restrict__ w, const u32* __restrict__ ids, R* __restrict__ y, long long n, int width) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < n) y[at] = w[(long long)ids[at / width] * width + at % width];
}

// A block a token that occurs: tokens[block] stands at places[starts[block] .. starts[block + 1]], whose dy are added in order.
extern "C" __global__ void __launch_bounds__(256)
embedding_backward(const R* __restrict__ dy, const u32* __restrict__ tokens, const u32* __restrict__ starts,
                   const u32* __restrict__ places, R* __restrict__ dw, int width) {
    const u32 first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    for (int j = threadIdx.x; j < width; j += 256) {
        R sum = 0;
        #pragma unroll 4
        for (u32 p = first; p < end; p++) sum += dy[(long long)places[p] * width + j];
        dw[(long long)tokens[blockIdx.x] * width + j] += sum;
    }
}
