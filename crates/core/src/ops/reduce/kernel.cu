// R: float or double.

// out[o, i] = sum over k of x[o, k, i], 32 columns and 8 strided parts a block, those of an o side by side; the parts are added in order.
extern "C" __global__ void __launch_bounds__(256)
sum_axis(const R* __restrict__ x, R* __restrict__ out, int n, int inner) {
    __shared__ R parts[8][32];
    const int across = (inner - 1) / 32 + 1, column = blockIdx.x % across * 32 + threadIdx.x % 32, part = threadIdx.x / 32;
    const long long o = blockIdx.x / across;
    const R* from = x + o * n * inner;
    R sum = 0;
    if (column < inner) {
        #pragma unroll 8
        for (int k = part; k < n; k += 8) sum += from[(long long)k * inner + column];
    }
    parts[part][threadIdx.x % 32] = sum;
    __syncthreads();
    if (part == 0 && column < inner) {
        for (int k = 1; k < 8; k++) sum += parts[k][threadIdx.x];
        out[o * inner + column] = sum;
    }
}

// The same, with the same bits, where columns fill the card: a thread one of the `columns` (o, i).
extern "C" __global__ void __launch_bounds__(256)
sum_columns(const R* __restrict__ x, R* __restrict__ out, long long columns, int n, int inner) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= columns) return;
    const long long o = at < inner ? 0 : at / inner;  // a division of 64 bits takes longer than a few sums
    const R* from = x + o * n * inner + (at - o * inner);
    R parts[8] = {};
    for (int first = 0; first < n; first += 8)
        #pragma unroll
        for (int part = 0; part < 8; part++)
            if (first + part < n) parts[part] += from[(long long)(first + part) * inner];
    R sum = parts[0];
    #pragma unroll
    for (int part = 1; part < 8; part++) sum += parts[part];
    out[at] = sum;
}

// The same where inner is 1: a block a row.
extern "C" __global__ void __launch_bounds__(512)
sum_row(const R* __restrict__ x, R* __restrict__ out, long long n) {
    __shared__ R scratch[32];
    const R* from = x + blockIdx.x * n;
    R sum = 0;
    #pragma unroll 8
    for (long long k = threadIdx.x; k < n; k += 512) sum += from[k];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// The gradient: dx[o, k, i] = dy[o, i].
extern "C" __global__ void __launch_bounds__(256)
repeat_axis(const R* __restrict__ dy, R* __restrict__ dx, long long total, int n, int inner) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at < total) dx[at] = dy[at / inner / n * inner + at % inner];
}

// Sets `found` where an element is infinite or NaN: x - x is 0 for every other number.
extern "C" __global__ void __launch_bounds__(256)
find_infinite(const R* __restrict__ x, u32* __restrict__ found, long long n) {
    bool bad = false;
    for (long long at = (long long)blockIdx.x * 256 + threadIdx.x; at < n; at += (long long)gridDim.x * 256) bad |= !(x[at] - x[at] == (R)0);
    if (bad) *found = 1;
}
