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

// (own + (entries - rows) chunk) / rows: each row attends its own chunk up to itself, which the host has counted, and whole earlier ones.
extern "C" __global__ void mean_tokens(const u32* __restrict__ entries, double* __restrict__ mean, long long own, long long rows, long long chunk) {
    *mean = (double)(own + ((long long)*entries - rows) * chunk) / (double)(rows > 0 ? rows : 1);
}

// By query: its chunks, and of those before its own the sum of |bias| and the largest. `wide`: the bias is f64.
extern "C" __global__ void __launch_bounds__(128)
figures(const u64* __restrict__ cells, const u32* __restrict__ first, const void* __restrict__ bias, u32* __restrict__ counts, double* __restrict__ sums,
        double* __restrict__ tops, int wide, long long rows, int queries, int chunk) {
    const long long at = (long long)blockIdx.x * 128 + threadIdx.x;
    if (at >= rows) return;
    const int i = (int)(at % queries), chunks = ceil_div(queries, chunk), own = i / chunk;
    const long long row = (at / queries * ceil_div(queries, 64) + i / 64) * chunks;
    u32 count = 0;
    double sum = 0, top = 0;
    for (int c = 0; c <= own; c++) {
        const u64 cell = cells[row + c];
        if (!(cell >> (i & 63) & 1)) continue;
        count++;
        if (!bias || c == own) continue;
        const u32 entry = first[row + c] + __popcll(cell & ((1ull << (i & 63)) - 1));
        const double b = wide ? ((const double*)bias)[entry] : (double)((const float*)bias)[entry], size = b < 0 ? -b : b;
        sum += size;
        top = larger(top, size);
    }
    counts[at] = count;
    sums[at] = sum;
    tops[at] = top;
}
