// A few queries and the kept keys of their sequences, bf16, split over the keys: a warp walks a share of a row's keys, 16 at a time, in copies
// of its own, four warps add up in shared memory, and `decode_combine` adds the splits in a fixed order. A row is (batch, kv head, query); all heads of
// its group are the 16 rows of one product, so keys and values are read once. D: head width, padded; LISTED: keys of listed chunks, not of a range.

#define PANELS ((D + 63) / 64)
#define TILE (16 * PANELS * 128)  // bytes of 16 keys, or of their values
#define PIECES (D / 8)
#define STAGES 3
#define WARPS 4
#define LEAST 2  // steps of a warp: fewer splits of a short walk have less to add up

// Keys of a row in the order in which they are walked.
struct Walk {
    const u32* chunks;  // LISTED: ascending, the query's own last
    int chunk, begin, total;
    // whether 16 keys from a multiple of 16 on follow each other
    METHOD bool whole() const { return !LISTED || chunk % 16 == 0; }
    METHOD int entry(int i) const { return LISTED ? (int)((u32)i / (u32)chunk) : 0; }
    METHOD int key(int i) const {
        if (!LISTED) return begin + i;
        const int e = entry(i);
        return (int)chunks[e] * chunk + i - e * chunk;
    }
};

INLINE Walk walk_of(const u32* counts, const u32* chunks, int row, int position, int chunk, int most, int window) {
    if (!LISTED) {
        const int begin = window && position + 1 > window ? position + 1 - window : 0;
        return {0, 1, begin, position + 1 - begin};
    }
    return {chunks + (long long)row * most, chunk, 0, ((int)counts[row] - 1) * chunk + position % chunk + 1};
}

// How many of the splits have something to do.
INLINE int splits_of(const Walk& w, int splits) { return max(1, min(splits, ceil_div(w.total, 16 * WARPS * LEAST))); }

// 16 rows of keys and of values from the walk's place `first` on, a multiple of 16.
INLINE void load_16(u32 to, const bf16* keys, const bf16* values, const Walk& w, int first, int stride, int width) {
    constexpr int apart = 32 / PIECES;
    const int lane = threadIdx.x % 32, piece = lane % PIECES;
    const auto rows = [&](auto key) {
        #pragma unroll
        for (int i = 0; i < 16 / apart; i++) {
            const int row = lane / PIECES + i * apart;
            const bool valid = first + row < w.total && piece * 8 < width;
            const long long source = valid ? (long long)key(row) * stride + piece * 8 : 0;
            const u32 place = to + piece / 8 * (16 * 128) + swizzled(row, piece % 8);
            copy16(place, keys + source, valid);
            copy16(place + TILE, values + source, valid);
        }
    };
    if (w.whole()) {
        const int begin = w.key(first);
        rows([&](int row) { return begin + row; });
    } else {
        rows([&](int row) { return w.key(first + row); });
    }
}

// Biases of a lane's keys of the step from the walk's place `first` on.
INLINE void biases(float (&more)[2][2], const float* bias, const Walk& w, int first) {
    const int column = threadIdx.x % 4 * 2;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = w.whole() ? first : first + i / 2 * 8 + column + i % 2;
        more[i / 2][i % 2] = LISTED && bias && at < w.total ? bias[w.entry(at)] * LOG2E : 0.f;
    }
}

// Above 60 lines: one walk over the keys with its sums in registers, and their sum over the warps.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
decode_split(const bf16* q, const bf16* k, const bf16* v, const u32* counts,
             const u32* chunks, const float* bias, float* __restrict__ sums, float* __restrict__ outs, int t,
             int kv_heads, int group, int width, int capacity, int past, int chunk, int most, int window, float scale) {
    begin_early();
    extern __shared__ __align__(1024) u8 scratch[];
    __shared__ float of_warps[WARPS][16][2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
    const int query = row % t, kv = row / t % kv_heads, batch = row / t / kv_heads, stride = kv_heads * width;
    const Walk w = walk_of(counts, chunks, row, past + query, chunk, most, window);
    const int splits = splits_of(w, gridDim.x);
    if (blockIdx.x >= splits) return;
    const long long base = (long long)batch * capacity * stride + kv * width;
    const float* own_bias = bias ? bias + (long long)row * most : 0;
    // the queries of the group as the left operand
    u32 a[D / 16][4];
    const bf16* queries = q + ((long long)(batch * t + query) * kv_heads + kv) * group * width;
    #pragma unroll
    for (int step = 0; step < D / 16; step++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int h = lane / 4 + i % 2 * 8, column = step * 16 + i / 2 * 8 + lane % 4 * 2;
            a[step][i] = h < group && column < width ? *(const u32*)(queries + h * width + column) : 0;
        }
    const u32 tiles = shared_address(scratch) + warp * (STAGES * 2 * TILE);
    const int steps = ceil_div(w.total, 16), each = ceil_div(steps, splits * WARPS);
    const int from = min(steps, ((int)blockIdx.x * WARPS + warp) * each), count = min(steps, from + each) - from;
    const auto load = [&](int i) {
        if (i < count) {
            load_16(tiles + i % STAGES * (2 * TILE), k + base, v + base, w, (from + i) * 16, stride, width);
        }
        copy_commit();
    };
    #pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load(i);
    float o[D / 8][4] = {}, top[2] = {NOTHING, NOTHING}, sum[2] = {}, more[2][2], later[2][2];
    biases(later, own_bias, w, from * 16);
    for (int i = 0; i < count; i++) {
        #pragma unroll
        for (int e = 0; e < 4; e++) more[e / 2][e % 2] = later[e / 2][e % 2];
        biases(later, own_bias, w, (from + i + 1) * 16);
        copy_wait<STAGES - 2>();
        __syncwarp();
        load(i + STAGES - 1);
        const u32 keys = tiles + i % STAGES * (2 * TILE), values = keys + TILE;
        float s[2][4] = {};
        #pragma unroll
        for (int step = 0; step < D / 16; step++) {
            u32 b[4];
            fragment_right<16>(b, keys, 0, step);
            mma(s[0], a[step], b[0], b[1]);
            mma(s[1], a[step], b[2], b[3]);
        }
        float high[2] = {NOTHING, NOTHING};
        #pragma unroll
        for (int n = 0; n < 2; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                const int at = (from + i) * 16 + n * 8 + lane % 4 * 2 + e % 2;
                s[n][e] = at < w.total ? s[n][e] * scale + more[n][e % 2] : NOTHING;
                high[e / 2] = larger(high[e / 2], s[n][e]);
            }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            high[half] = larger(high[half], __shfl_xor_sync(FULL, high[half], 1));
            high[half] = larger(high[half], __shfl_xor_sync(FULL, high[half], 2));
            const float next = larger(top[half], high[half]), keep = exp2_fast(top[half] - next);
            top[half] = next;
            sum[half] *= keep;
            #pragma unroll
            for (int n = 0; n < D / 8; n++) { o[n][2 * half] *= keep; o[n][2 * half + 1] *= keep; }
        }
        #pragma unroll
        for (int n = 0; n < 2; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][e] = exp2_fast(s[n][e] - top[e / 2]);
                sum[e / 2] += s[n][e];
            }
        const u32 p[4] = {pack(s[0][0], s[0][1]), pack(s[0][2], s[0][3]), pack(s[1][0], s[1][1]), pack(s[1][2], s[1][3])};
        #pragma unroll
        for (int columns = 0; columns < D / 16; columns++) {
            u32 b[4];
            fragment_transposed<16>(b, values, 0, columns);
            mma(o[2 * columns], p, b[0], b[1]);
            mma(o[2 * columns + 1], p, b[2], b[3]);
        }
        __syncwarp();
    }
    copy_wait<0>();
    __syncthreads();
    float* shared = (float*)scratch;  // [WARPS][16][D]
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(FULL, sum[half], 1);
        sum[half] += __shfl_xor_sync(FULL, sum[half], 2);
        const int h = lane / 4 + 8 * half;
        if (lane % 4 == 0) { of_warps[warp][h][0] = top[half]; of_warps[warp][h][1] = sum[half]; }
        #pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2*)(shared + (warp * 16 + h) * D + n * 8 + lane % 4 * 2) = make_float2(o[n][2 * half], o[n][2 * half + 1]);
    }
    __syncthreads();
    const long long to = ((long long)row * gridDim.x + blockIdx.x) * group;
    const int own = threadIdx.x;
    if (own < group) {
        float best = NOTHING, all = 0;
        #pragma unroll
        for (int n = 0; n < WARPS; n++) best = larger(best, of_warps[n][own][0]);
        #pragma unroll
        for (int n = 0; n < WARPS; n++) {
            const float share = best == NOTHING ? 0.f : exp2_fast(of_warps[n][own][0] - best);
            all += share * of_warps[n][own][1];
            of_warps[n][own][0] = share;
        }
        *(float2*)(sums + 2 * (to + own)) = make_float2(best, all);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * (D / 4); i += WARPS * 32) {
        const int h = i / (D / 4), column = i % (D / 4) * 4;
        float out[4] = {};
        #pragma unroll
        for (int n = 0; n < WARPS; n++) {
            float of_warp[4];
            take(of_warp, shared + (n * 16 + h) * D + column);
            #pragma unroll
            for (int e = 0; e < 4; e++) out[e] += of_warps[n][h][0] * of_warp[e];
        }
        if (column < width) put(outs + (to + h) * width + column, out);
    }
}

// The splits of a head, in an order that their number fixes: a block of AT warps a (row, head). A warp adds every AT-th split, a lane four columns, and then a
// thread a column the warps' sums. `splits` is at most 32 TURNS. Without any key 0; NaN stays NaN.
template <int AT, int TURNS>
INLINE void combine(const float* sums, const float* outs, const u32* counts, bf16* __restrict__ out, int t,
                    int kv_heads, int group, int width, int splits, int past, int chunk, int window) {
    constexpr int EACH = 32 / AT;  // of 32 splits a warp's own
    __shared__ __align__(16) float of_warps[AT][D];  // written four at a time
    const int row = blockIdx.x / group, h = blockIdx.x % group, query = row % t, kv = row / t % kv_heads, batch = row / t / kv_heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane * 4;
    const int used = splits_of(walk_of(counts, 0, row, past + query, chunk, 0, window), splits);
    const long long first = (long long)row * splits * group + h;
    float4 parts[EACH * TURNS];
    #pragma unroll
    for (int k = 0; k < EACH * TURNS; k++) {
        const int i = k * AT + warp;
        parts[k] = i < used && column < width ? *(const float4*)(outs + (first + (long long)i * group) * width + column) : make_float4(0, 0, 0, 0);
    }
    float share[TURNS], of_split[TURNS], best = NOTHING, all = 0;
    #pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int i = lane + k * 32;
        const float2 both = i < used ? *(const float2*)(sums + 2 * (first + (long long)i * group)) : make_float2(NOTHING, 0.f);
        share[k] = both.x;
        of_split[k] = both.y;
    }
    #pragma unroll
    for (int k = 0; k < TURNS; k++) best = larger(best, share[k]);
    best = warp_max(best);
    #pragma unroll
    for (int k = 0; k < TURNS; k++) {
        share[k] = share[k] == NOTHING ? 0.f : exp2_fast(share[k] - best);
        all += share[k] * of_split[k];
    }
    all = warp_sum(all);
    float sum[4] = {};
    #pragma unroll
    for (int k = 0; k < EACH * TURNS; k++) {
        const float own = __shfl_sync(FULL, share[k / EACH], k % EACH * AT + warp);
        sum[0] += own * parts[k].x;
        sum[1] += own * parts[k].y;
        sum[2] += own * parts[k].z;
        sum[3] += own * parts[k].w;
    }
    if (column < D) put(&of_warps[warp][column], sum);
    __syncthreads();
    if (threadIdx.x >= width) return;
    float whole = 0;
    #pragma unroll
    for (int i = 0; i < AT; i++) whole += of_warps[i][threadIdx.x];
    out[(((long long)batch * t + query) * kv_heads * group + kv * group + h) * width + threadIdx.x] = As<bf16>::of(all == 0.f ? 0.f : whole / all);
}

// Of up to 288 splits, where there are few heads and a multiprocessor has one, and of up to 64.
extern "C" __global__ void __launch_bounds__(512, 1)
decode_combine(const float* sums, const float* outs, const u32* counts, bf16* __restrict__ out, int t,
               int kv_heads, int group, int width, int splits, int past, int chunk, int window) {
    begin_early();
    combine<16, 9>(sums, outs, counts, out, t, kv_heads, group, width, splits, past, chunk, window);
}

extern "C" __global__ void __launch_bounds__(128, 4)
decode_combine_few(const float* sums, const float* outs, const u32* counts, bf16* __restrict__ out, int t,
                   int kv_heads, int group, int width, int splits, int past, int chunk, int window) {
    begin_early();
    combine<4, 2>(sums, outs, counts, out, t, kv_heads, group, width, splits, past, chunk, window);
}
