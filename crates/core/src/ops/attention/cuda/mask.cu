// The number of the first entry of every cell: the bits of CELLS cells a block, the sums of blocks in order, then each cell's own.

INLINE u32 bits_of(const u64* cells, int count, int first) {
    u32 sum = 0;
    #pragma unroll
    for (int i = 0; i < CELLS / 256; i++) if (first + i < count) sum += __popcll(cells[first + i]);
    return sum;
}

extern "C" __global__ void __launch_bounds__(256)
count_cells(const u64* __restrict__ cells, u32* __restrict__ sums, int count) {
    __shared__ u32 scratch[32];
    const u32 sum = block_sum(bits_of(cells, count, blockIdx.x * CELLS + threadIdx.x * (CELLS / 256)), scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// What stands before this thread's number in its block.
INLINE u32 before_in_block(u32 own, u32* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 sum = own;
    #pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const u32 other = __shfl_up_sync(FULL, sum, o);
        if (lane >= o) sum += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) sum += scratch[w];
    return sum - own;
}

// One block: sums become what stands before them; the total goes to `total`.
extern "C" __global__ void __launch_bounds__(256)
scan_sums(u32* __restrict__ sums, u32* __restrict__ total, int blocks) {
    __shared__ u32 scratch[32];
    u32 done = 0;
    for (int base = 0; base < blocks; base += 256) {
        const int i = base + threadIdx.x;
        const u32 own = i < blocks ? sums[i] : 0, before = before_in_block(own, scratch);
        if (i < blocks) sums[i] = done + before;
        done += block_sum(own, scratch);
    }
    if (threadIdx.x == 0) *total = done;
}

extern "C" __global__ void __launch_bounds__(256)
number_cells(const u64* __restrict__ cells, const u32* __restrict__ sums, u32* __restrict__ first, int count) {
    __shared__ u32 scratch[32];
    const int base = blockIdx.x * CELLS + threadIdx.x * (CELLS / 256);
    u32 at = sums[blockIdx.x] + before_in_block(bits_of(cells, count, base), scratch);
    for (int i = 0; i < CELLS / 256; i++)
        if (base + i < count) {
            first[base + i] = at;
            at += __popcll(cells[base + i]);
        }
}

// Each row attends its own chunk up to itself, which the host has counted (`own` in all), and whole earlier ones.
INLINE double tokens_of(u32 entries, long long own, long long rows, long long chunk) {
    return (double)(own + ((long long)entries - rows) * chunk) / (double)(rows > 0 ? rows : 1);
}
extern "C" __global__ void mean_tokens(const u32* __restrict__ entries, double* __restrict__ mean, long long own, long long rows, long long chunk) {
    *mean = tokens_of(*entries, own, rows, chunk);
}

// Row `at`, a query of a kv head.
struct Query {
    int i, own;
    long long row;
    METHOD Query(long long at, int queries, int chunk)
        : i((int)(at % queries)), own(i / chunk), row((at / queries * ceil_div(queries, 64) + i / 64) * ceil_div(queries, chunk)) {}
    METHOD bool has(u64 cell) const { return cell >> (i & 63) & 1; }
};

extern "C" __global__ void __launch_bounds__(128)
count_chunks(const u64* __restrict__ cells, u32* __restrict__ counts, long long rows, int queries, int chunk) {
    const long long at = (long long)blockIdx.x * 128 + threadIdx.x;
    if (at >= rows) return;
    const Query q(at, queries, chunk);
    u32 count = 0;
    for (int c = 0; c <= q.own; c++) count += q.has(cells[q.row + c]);
    counts[at] = count;
}

// Of queries behind the first chunk: how many attend n chunks, and parts [blocks, 3] of a block: the sum of attended over visible chunks; of every
// query the sum of |bias| of the chunks before its own, and the largest. `wide`: the bias is f64.
extern "C" __global__ void __launch_bounds__(128)
figures(const u64* __restrict__ cells, const u32* __restrict__ first, const void* __restrict__ bias, u32* histogram, double* __restrict__ parts,
        int wide, long long rows, int queries, int chunk) {
    __shared__ double scratch[32];
    const long long at = (long long)blockIdx.x * 128 + threadIdx.x;
    double density = 0, sum = 0, top = 0;
    if (at < rows) {
        const Query q(at, queries, chunk);
        u32 count = 0;
        for (int c = 0; c <= q.own; c++) {
            const u64 cell = cells[q.row + c];
            if (!q.has(cell)) continue;
            count++;
            if (!bias || c == q.own) continue;
            const u32 entry = first[q.row + c] + __popcll(cell & ((1ull << (q.i & 63)) - 1));
            const double b = wide ? ((const double*)bias)[entry] : (double)((const float*)bias)[entry], size = b < 0 ? -b : b;
            sum += size;
            top = larger(top, size);
        }
        if (q.own > 0) {
            density = (double)count / (double)(q.own + 1);
            atomicAdd(histogram + count, 1u);
        }
    }
    density = block_sum(density, scratch);
    sum = block_sum(sum, scratch);
    top = block_max(top, scratch);
    if (threadIdx.x < 3) parts[blockIdx.x * 3ll + threadIdx.x] = threadIdx.x == 0 ? density : threadIdx.x == 1 ? sum : top;
}

// One block: out [4 + counts] = density, sum, maximum, tokens, and the histogram.
extern "C" __global__ void __launch_bounds__(256)
gather_figures(const u32* __restrict__ histogram, const double* __restrict__ parts, const u32* __restrict__ entries, double* __restrict__ out,
               int blocks, int counts, long long own, long long rows, long long chunk) {
    __shared__ double scratch[32];
    double density = 0, sum = 0, top = 0;
    for (int i = threadIdx.x; i < blocks; i += 256) {
        density += parts[i * 3ll];
        sum += parts[i * 3ll + 1];
        top = larger(top, parts[i * 3ll + 2]);
    }
    density = block_sum(density, scratch);
    sum = block_sum(sum, scratch);
    top = block_max(top, scratch);
    if (threadIdx.x == 0) {
        out[0] = density;
        out[1] = sum;
        out[2] = top;
        out[3] = tokens_of(*entries, own, rows, chunk);
    }
    for (int n = threadIdx.x; n < counts; n += 256) out[4 + n] = (double)histogram[n];
}
