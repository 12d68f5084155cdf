// R: float or double. MANY: rows of a table. Squares are summed in f64 in a fixed order: threads, blocks of PIECE elements, then blocks in order.

struct Row { const R* x; long long n, first; };  // a gradient, its elements, its first block
struct Rows { Row row[MANY]; };

extern "C" __global__ void __launch_bounds__(512)
squares(const __grid_constant__ Rows all, int count, double* __restrict__ parts) {
    __shared__ double scratch[32];
    int row = 0;
    while (row + 1 < count && blockIdx.x >= all.row[row + 1].first) row++;
    const R* x = all.row[row].x;
    const long long n = all.row[row].n, first = (blockIdx.x - all.row[row].first) * PIECE, end = first + PIECE < n ? first + PIECE : n;
    double sum = 0;
    #pragma unroll 8
    for (long long i = first + threadIdx.x; i < end; i += 512) sum += (double)x[i] * (double)x[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(512)
norm_of_parts(const double* __restrict__ parts, double* __restrict__ out, int count) {
    __shared__ double scratch[32];
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += 512) sum += parts[i];
    sum = sqrt(block_sum(sum, scratch));
    if (threadIdx.x == 0) *out = sum;
}

INLINE bool finite(double x) { return x - x == 0; }

// The formula of mod.rs; NaN where the norm is not finite.
extern "C" __global__ void clip_factor(const double* __restrict__ norm, double* __restrict__ out, double clip) {
    const double factor = clip / (*norm + 1e-6);
    *out = !finite(*norm) ? *norm - *norm : clip > 0 && factor < 1 ? factor : 1;
}
extern "C" __global__ void stop_unless_finite(const R* __restrict__ loss, double* __restrict__ factor) {
    if (!finite((double)*loss)) *factor = (double)*loss - (double)*loss;
}
