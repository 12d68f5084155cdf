// Attention, backward, key side: dk and dv. A block owns 64 keys, 16 a warp (WARPS is 4, SLABS 1), whose sums stay in registers while the
// rows that attend them pass by, ascending in token and head. Where keys are few, as those of windows, blocks along z share the tokens of the same
// keys, and dk and dv are [shares, ..], to be added up. Definitions as in tiles.cu; SUB: rows whose scores exist at a time.

#define BATCH 64
#define THREADS 128
#define TILE STAGE
#define LIST 4096

// Above 60 lines: listing the tokens, loading their rows and adding to dk and dv work on the same list, slots and registers, a round at a time.
extern "C" __global__ void __launch_bounds__(THREADS, D == 128 ? 2 : 3)
attention_keys(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ dout,
               const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dk, float* __restrict__ dv,
               const u64* __restrict__ all_cells, const u32* __restrict__ all_first, const float* __restrict__ bias, int t,
               int kv_heads, int group, int q_stride, int kv_stride, int chunks, float scale, int count_keys, int add, int stride,
               int width, float share, float power_p, float power_r) {
    extern __shared__ __align__(1024) u8 scratch[];
    const Reach reach = {add, stride, width};
    const Powers powers = {power_p, power_r};
    __shared__ unsigned short list[LIST];  // tokens that attend, less `base`
    __shared__ float shifts[2][BLOCK_CHUNKS][BATCH], inner[2][BATCH];
    __shared__ int tokens[2][BATCH], begins[SPAN + 1][BATCH * SPAN + 1], before[LIST / 64 + 1];
    const u32 keys = shared_address(scratch), values = keys + TILE, rows = values + TILE;  // then two pairs of q and do
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, key0 = blockIdx.x * KEYS;
    const int batch = blockIdx.y / kv_heads, kv = blockIdx.y % kv_heads, heads = kv_heads * group;
    const int together = BATCH / group;  // tokens of a batch of rows
    const u64* cells = all_cells + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    const u32* entries = all_first + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    const auto key_row = [&](const bf16* x, int i) { return key0 + i >= count_keys ? (const bf16*)0 : x + ((long long)batch * count_keys + key0 + i) * kv_stride + kv * HEAD; };
    load_tile<KEYS, HEAD, THREADS>(keys, k, [&](int i) { return key_row(k, i); });
    load_tile<KEYS, HEAD, THREADS>(values, v, [&](int i) { return key_row(v, i); });
    copy_commit();
    const float factor = POWER ? scale * share : scale * LOG2E;
    float acc_k[D / 8][4] = {}, acc_v[D / 8][4] = {};

    const int behind = reach.behind_token(min(key0 + KEYS, count_keys) - 1, t), first = reach.first_token(key0) / 64 * 64;
    // Of a window the same number for each of its shares; else shares of all tokens, most of which the last keys have nothing of.
    const bool bounded = width < 0x7fffffff;
    const int share_of_tokens = ceil_div(ceil_div(bounded ? behind - first : t, (int)gridDim.z), 64) * 64;
    const int from = (bounded ? first : 0) + (int)blockIdx.z * share_of_tokens, begin = max(first, from), end = min(behind, from + share_of_tokens);
    for (int base = begin; base < end; base += LIST) {
        // the tokens base .. base + LIST that attend: their number before each cell of 64, then the tokens
        const auto word = [&](int tile) -> u64 {
            if (tile * 64 >= end) return 0;
            u64 bits = LISTED ? 0 : ~0ull;
            if (LISTED)
                for (int j = 0; j < BLOCK_CHUNKS; j++) {
                    const int chunk = key0 / CHUNK + j;
                    if (chunk < chunks) bits |= cells[tile * chunks + chunk];
                }
            return end - tile * 64 < 64 ? bits & ((1ull << (end - tile * 64)) - 1) : bits;
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
        // What a thread looks up of one row of a batch, in three steps a batch apart, because each asks for what the one before brought: the cell
        // of its token; its numbers; the slot. Where a block is one chunk's, of which all listed tokens have an entry.
        struct Asked { int token; u64 word; u32 first; };
        struct Found { int token; float low, inner, add; };
        const auto ask = [&](int i) {
            const int r = threadIdx.x, place = i * together + r / group;
            Asked asked = {-1, 0, 0};
            if (!LANE_TOKENS || r >= together * group || place >= count) return asked;
            asked.token = base + list[place];
            const int cell = asked.token / 64 * chunks + key0 / CHUNK;
            asked.word = cells[cell];
            asked.first = entries[cell];
            return asked;
        };
        const auto find = [&](const Asked& asked) {
            Found found = {asked.token, 0.f, 0.f, NOTHING};
            if (asked.token < 0) return found;
            const long long at = ((long long)batch * t + asked.token) * heads + kv * group + threadIdx.x % group;
            found.low = lse[at];
            found.inner = delta[at];
            found.add = bias ? bias[asked.first + __popcll(asked.word & ((1ull << (asked.token & 63)) - 1))] : 0.f;
            return found;
        };
        const auto write = [&](int slot, const Found& found) {
            if (threadIdx.x >= BATCH) return;
            tokens[slot][threadIdx.x] = found.token;
            inner[slot][threadIdx.x] = found.inner;
            shifts[slot][0][threadIdx.x] = (found.low - found.add) * LOG2E;
        };
        const auto load = [&](int i) {
            if (i < batches) {
                const int slot = i % 2;
                const auto row_of = [&](const bf16* x, int r, int stride) {
                    const int place = i * together + r / group;
                    if (r >= together * group || place >= count) return (const bf16*)0;
                    return x + ((long long)batch * t + base + list[place]) * stride + (kv * group + r % group) * HEAD;
                };
                load_tile<BATCH, HEAD, THREADS>(rows + slot * 2 * TILE, q, [&](int r) { return row_of(q, r, q_stride); });
                load_tile<BATCH, HEAD, THREADS>(rows + slot * 2 * TILE + TILE, dout, [&](int r) { return row_of(dout, r, heads * HEAD); });
                if (!LANE_TOKENS && threadIdx.x < BATCH) {
                    const int r = threadIdx.x, place = i * together + r / group;
                    const bool valid = r < together * group && place < count;
                    const int token = valid ? base + list[place] : -1;
                    const long long at = ((long long)batch * t + token) * heads + kv * group + r % group;
                    const float low = valid ? lse[at] * (POWER ? 1.f : LOG2E) : 0.f;
                    tokens[slot][r] = valid ? reach.end(token) - 1 : -1;
                    if (SPAN) begins[slot % (SPAN + 1)][r * SPAN] = valid ? reach.begin(token) : 0;
                    inner[slot][r] = valid ? delta[at] : 0.f;
                    for (int j = 0; j < BLOCK_CHUNKS; j++) {
                        float plus = valid ? 0.f : NOTHING;
                        if (LISTED && valid) {
                            const int chunk = key0 / CHUNK + j, cell = token / 64 * chunks + chunk;
                            const u64 bit = 1ull << (token & 63), bits = chunk < chunks ? cells[cell] : 0;
                            plus = !(bits & bit) ? NOTHING : bias ? bias[entries[cell] + __popcll(bits & (bit - 1))] * LOG2E : 0.f;
                        }
                        shifts[slot][j][r] = low - plus;
                    }
                }
            }
            copy_commit();
        };
        load(0);
        Asked asked = ask(0);
        if (LANE_TOKENS) write(0, find(asked));
        asked = ask(1);
        Found found = find(asked);
        asked = ask(2);
        for (int i = 0; i < batches; i++) {
            load(i + 1);
            if (LANE_TOKENS && i + 1 < batches) {
                write((i + 1) % 2, found);
                found = find(asked);
                asked = ask(i + 3);
            }
            copy_wait<1>();
            __syncthreads();
            const int slot = i % 2;
            const u32 queries = rows + slot * 2 * TILE, outs = queries + TILE;
            #pragma unroll 1
            for (int sub = 0; sub < BATCH / SUB; sub++) {
                float s[SUB / 8][4] = {}, dp[SUB / 8][4] = {};
                scores<KEYS, BATCH>(s, dp, keys, values, warp * 16, queries, outs, sub * SUB);
                u32 p[SUB / 16][4], ds[SUB / 16][4];
                #pragma unroll
                for (int n = 0; n < SUB / 8; n++) {
                    const int r = sub * SUB + n * 8 + lane % 4 * 2;
                    #pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int own = warp * 16 + lane / 4 + 8 * half, key = key0 + own;
                        const int j = CHUNK >= KEYS ? 0 : CHUNK >= 16 ? warp * 16 / CHUNK : own / CHUNK;
                        float w[2], d[2];
                        #pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const bool outside = key > tokens[slot][r + e] || (SPAN && key < begins[slot % (SPAN + 1)][(r + e) * SPAN]);
                            const Share of = share_of(s[n][2 * half + e], factor, shifts[slot][j][r + e], powers);
                            w[e] = outside ? 0.f : of.p;
                            d[e] = outside ? 0.f : of.r * (dp[n][2 * half + e] - inner[slot][r + e]);
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
                        fragment_transposed<BATCH>(b, outs, sub * SUB + step * 16, n);
                        mma(acc_v[2 * n], p[step], b[0], b[1]);
                        mma(acc_v[2 * n + 1], p[step], b[2], b[3]);
                        fragment_transposed<BATCH>(b, queries, sub * SUB + step * 16, n);
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
        if (key >= count_keys) continue;
        const long long part = (long long)blockIdx.z * (gridDim.y / kv_heads);  // the sequences of the parts before
        const long long at = (((part + batch) * count_keys + key) * kv_heads + kv) * HEAD + lane % 4 * 2;
        #pragma unroll
        for (int n = 0; n < HEAD / 8; n++) {
            *(float2*)(dk + at + n * 8) = make_float2(acc_k[n][2 * half] * scale, acc_k[n][2 * half + 1] * scale);
            *(float2*)(dv + at + n * 8) = make_float2(acc_v[n][2 * half], acc_v[n][2 * half + 1]);
        }
    }
}
