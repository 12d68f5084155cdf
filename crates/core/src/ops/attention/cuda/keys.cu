// Attention, backward, key side: dk and dv. A block owns 64 keys, 16 a warp, whose sums stay in registers while the rows that attend
// them pass by, ascending in token and head. D, LISTED and CHUNK as in tiles.cu; SUB: rows whose scores exist at a time.

#define KEYS 64
#define BATCH 64
#define THREADS 128
#define PANELS ((D + 63) / 64)
#define CHUNKS (CHUNK < KEYS ? KEYS / CHUNK : 1)
#define TILE (64 * PANELS * 128)
#define LIST 4096
#define NOTHING (-__int_as_float(0x7f800000))

// 64 rows of D elements, row i from `from(i)`, or zero where that is null.
template <typename From> INLINE void load_tile(u32 to, From from) {
    #pragma unroll 4
    for (int i = threadIdx.x; i < 64 * PANELS * 8; i += THREADS) {
        const int row = i / (PANELS * 8), piece = i % (PANELS * 8);
        const bf16* at = from(row);
        const bool valid = at && piece * 8 < D;
        copy16(to + piece / 8 * (64 * 128) + swizzled(row, piece % 8), valid ? at + piece * 8 : (const bf16*)from(-1), valid);
    }
}

INLINE void fragment(u32 (&a)[4], u32 tile, int first, int step) {
    const int lane = threadIdx.x % 32;
    load4(a, tile + step / 4 * (64 * 128) + swizzled(first + lane % 16, step % 4 * 2 + lane / 16));
}
INLINE void fragment_b(u32 (&b)[4], u32 tile, int first, int step) {
    const int lane = threadIdx.x % 32;
    load4(b, tile + step / 4 * (64 * 128) + swizzled(first + lane % 8 + lane / 16 * 8, step % 4 * 2 + lane / 8 % 2));
}
INLINE void fragment_transposed(u32 (&b)[4], u32 tile, int first, int columns) {
    const int lane = threadIdx.x % 32;
    load4_transposed(b, tile + columns / 4 * (64 * 128) + swizzled(first + lane % 16, columns % 4 * 2 + lane / 16));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_keys(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ dout,
               const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dk, float* __restrict__ dv,
               const u64* __restrict__ all_cells, const u32* __restrict__ all_first, const float* __restrict__ bias, int t,
               int kv_heads, int group, int q_stride, int kv_stride, int chunks, float scale) {
    extern __shared__ __align__(1024) u8 scratch[];
    __shared__ unsigned short list[LIST];  // tokens that attend, less `base`
    __shared__ float shifts[2][CHUNKS][BATCH], inner[2][BATCH];
    __shared__ int tokens[2][BATCH], before[LIST / 64 + 1];
    const u32 keys = shared_address(scratch), values = keys + TILE, rows = values + TILE;  // then two pairs of q and do
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, key0 = blockIdx.x * KEYS;
    const int batch = blockIdx.y / kv_heads, kv = blockIdx.y % kv_heads, heads = kv_heads * group;
    const int together = BATCH / group;  // tokens of a batch of rows
    const u64* cells = all_cells + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    const u32* entries = all_first + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    const auto key_row = [&](const bf16* x, int i) { return i >= 0 && key0 + i >= t ? (const bf16*)0 : x + ((long long)batch * t + (i < 0 ? 0 : key0 + i)) * kv_stride + kv * D; };
    load_tile(keys, [&](int i) { return key_row(k, i); });
    load_tile(values, [&](int i) { return key_row(v, i); });
    copy_commit();
    const float factor = scale * LOG2E;
    float acc_k[D / 8][4] = {}, acc_v[D / 8][4] = {};

    for (int base = key0 / 64 * 64; base < t; base += LIST) {
        // the tokens base .. base + LIST that attend: their number before each cell of 64, then the tokens
        const auto word = [&](int tile) -> u64 {
            if (tile * 64 >= t) return 0;
            u64 bits = LISTED ? 0 : ~0ull;
            if (LISTED)
                for (int j = 0; j < CHUNKS; j++) {
                    const int chunk = key0 / CHUNK + j;
                    if (chunk < chunks) bits |= cells[tile * chunks + chunk];
                }
            return t - tile * 64 < 64 ? bits & ((1ull << (t - tile * 64)) - 1) : bits;
        };
        __syncthreads();  // nobody reads the list of the round before
        if (warp == 0) {
            int total = 0;
            for (int c = 0; c < LIST / 64; c += 32) {
                const int own = __popcll(word(base / 64 + c + lane));
                int sum = own;
                #pragma unroll
                for (int o = 1; o < 32; o <<= 1) {
                    const int other = __shfl_up_sync(FULL, sum, o);
                    if (lane >= o) sum += other;
                }
                before[c + lane] = total + sum - own;
                total += __shfl_sync(FULL, sum, 31);
            }
            if (lane == 0) before[LIST / 64] = total;
        }
        __syncthreads();
        for (int c = warp; c < LIST / 64; c += 4) {
            const u64 bits = word(base / 64 + c);
            #pragma unroll
            for (int i = lane; i < 64; i += 32)
                if (bits >> i & 1) list[before[c] + __popcll(bits & ((1ull << i) - 1))] = (unsigned short)(c * 64 + i);
        }
        __syncthreads();
        const int count = before[LIST / 64], batches = ceil_div(count, together);
        const auto load = [&](int i) {
            if (i < batches) {
                const int slot = i % 2;
                const auto row_of = [&](const bf16* x, int r, int stride) {
                    const int place = i * together + (r < 0 ? 0 : r) / group;
                    if (r >= together * group || place >= count) return (const bf16*)0;
                    return x + ((long long)batch * t + base + list[place]) * stride + (kv * group + (r < 0 ? 0 : r) % group) * D;
                };
                load_tile(rows + slot * 2 * TILE, [&](int r) { return row_of(q, r, q_stride); });
                load_tile(rows + slot * 2 * TILE + TILE, [&](int r) { return row_of(dout, r, heads * D); });
                if (threadIdx.x < BATCH) {
                    const int r = threadIdx.x, place = i * together + r / group;
                    const bool valid = r < together * group && place < count;
                    const int token = valid ? base + list[place] : -1;
                    const long long at = ((long long)batch * t + token) * heads + kv * group + r % group;
                    const float low = valid ? lse[at] * LOG2E : 0.f;
                    tokens[slot][r] = token;
                    inner[slot][r] = valid ? delta[at] : 0.f;
                    for (int j = 0; j < CHUNKS; j++) {
                        float add = valid ? 0.f : NOTHING;
                        if (LISTED && valid) {
                            const int chunk = key0 / CHUNK + j, cell = token / 64 * chunks + chunk;
                            const u64 bit = 1ull << (token & 63), bits = chunk < chunks ? cells[cell] : 0;
                            add = !(bits & bit) ? NOTHING : bias ? bias[entries[cell] + __popcll(bits & (bit - 1))] * LOG2E : 0.f;
                        }
                        shifts[slot][j][r] = add - low;
                    }
                }
            }
            copy_commit();
        };
        load(0);
        for (int i = 0; i < batches; i++) {
            load(i + 1);
            copy_wait<1>();
            __syncthreads();
            const int slot = i % 2, j = CHUNK < KEYS ? warp * 16 / CHUNK : 0;
            const u32 queries = rows + slot * 2 * TILE, outs = queries + TILE;
            #pragma unroll 1
            for (int sub = 0; sub < BATCH / SUB; sub++) {
                float s[SUB / 8][4] = {}, dp[SUB / 8][4] = {};
                #pragma unroll
                for (int step = 0; step < D / 16; step++) {
                    u32 a[4], c[4];
                    fragment(a, keys, warp * 16, step);
                    fragment(c, values, warp * 16, step);
                    #pragma unroll
                    for (int n = 0; n < SUB / 16; n++) {
                        u32 b[4];
                        fragment_b(b, queries, sub * SUB + n * 16, step);
                        mma(s[2 * n], a, b[0], b[1]);
                        mma(s[2 * n + 1], a, b[2], b[3]);
                        fragment_b(b, outs, sub * SUB + n * 16, step);
                        mma(dp[2 * n], c, b[0], b[1]);
                        mma(dp[2 * n + 1], c, b[2], b[3]);
                    }
                }
                u32 p[SUB / 16][4], ds[SUB / 16][4];
                #pragma unroll
                for (int n = 0; n < SUB / 8; n++) {
                    const int r = sub * SUB + n * 8 + lane % 4 * 2;
                    #pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int key = key0 + warp * 16 + lane / 4 + 8 * half;
                        float w[2], d[2];
                        #pragma unroll
                        for (int e = 0; e < 2; e++) {
                            w[e] = key > tokens[slot][r + e] ? 0.f : exp2_fast(fmaf(s[n][2 * half + e], factor, shifts[slot][j][r + e]));
                            d[e] = w[e] * (dp[n][2 * half + e] - inner[slot][r + e]);
                        }
                        p[n / 2][n % 2 * 2 + half] = pack(w[0], w[1]);
                        ds[n / 2][n % 2 * 2 + half] = pack(d[0], d[1]);
                    }
                }
                #pragma unroll
                for (int step = 0; step < SUB / 16; step++)
                    #pragma unroll
                    for (int n = 0; n < D / 16; n++) {
                        u32 b[4];
                        fragment_transposed(b, outs, sub * SUB + step * 16, n);
                        mma(acc_v[2 * n], p[step], b[0], b[1]);
                        mma(acc_v[2 * n + 1], p[step], b[2], b[3]);
                        fragment_transposed(b, queries, sub * SUB + step * 16, n);
                        mma(acc_k[2 * n], ds[step], b[0], b[1]);
                        mma(acc_k[2 * n + 1], ds[step], b[2], b[3]);
                    }
            }
            __syncthreads();  // the slot may be filled again
        }
    }
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int key = key0 + warp * 16 + lane / 4 + 8 * half;
        if (key >= t) continue;
        const long long at = (((long long)batch * t + key) * kv_heads + kv) * D + lane % 4 * 2;
        #pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *(float2*)(dk + at + n * 8) = make_float2(acc_k[n][2 * half] * scale, acc_k[n][2 * half + 1] * scale);
            *(float2*)(dv + at + n * 8) = make_float2(acc_v[n][2 * half], acc_v[n][2 * half + 1]);
        }
    }
}
