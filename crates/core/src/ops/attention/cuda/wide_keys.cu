// Attention on wgmma, backward, key side: dk and dv of 128 keys, whose sums stay in registers. Dense, both warpgroups share the rows; with lists each
// has a chunk of 64 keys, its own rows and two of the slots. What attends a chunk may be a hundred tokens or all of them, so a block takes no more
// than `most` tokens of each of its chunks; where a chunk has more, blocks after it take those, and add to dk and dv when it is their turn: in the
// order of tokens, so that the same operands give the same bits. Blocks take their numbers as they start, so who waits waits for one that runs.

#define BATCH 64

#if LISTED
// tokens [pairs, chunks] that attend a chunk, a block 32 chunks of a kv head of a sequence: a warp every eighth tile, a lane a chunk.
extern "C" __global__ void __launch_bounds__(256)
wide_keys_count(const u64* __restrict__ all_cells, u32* __restrict__ tokens, int t, int chunks) {
    __shared__ u32 counts[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = blockIdx.x * 32 + lane, tiles = ceil_div(t, 64);
    const u64* cells = all_cells + (long long)blockIdx.y * tiles * chunks;
    u32 count = 0;
    if (chunk < chunks)
        for (int tile = blockIdx.x * 32 + warp; tile < tiles; tile += 8)
            count += __popcll(below_end(cells[(long long)tile * chunks + chunk], tile, t));
    counts[warp][lane] = count;
    __syncthreads();
    if (warp > 0 || chunk >= chunks) return;
    for (int other = 1; other < 8; other++) count += counts[other][lane];
    tokens[(long long)blockIdx.y * chunks + chunk] = count;
}
#endif

// Which keys of which kv head of a sequence a block has, and which part of the tokens: with lists by the number under which it starts. All kv heads'
// first chunks come first, which most tokens see; the parts behind the first ones come after all.
struct Work {
    int block, pair, part;
    METHOD Work(u32 number) {
        pair = LISTED ? number % gridDim.y : blockIdx.y;
        block = LISTED ? number / gridDim.y % gridDim.x : blockIdx.x;
        part = LISTED ? number / (gridDim.x * gridDim.y) : 0;
    }
};

// Above 60 lines: the warps that look up and load rows and the warpgroups that add up dk and dv are the two branches of one kernel, which meet at
// its barriers.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
wide_keys(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ dout,
               const float* __restrict__ lse, const float* __restrict__ delta, float* dk, float* dv,
               const u64* __restrict__ all_cells, const u32* __restrict__ all_first, const float* __restrict__ bias, int t,
               int kv_heads, int group, int q_stride, int kv_stride, int chunks, const u32* __restrict__ attend, u32* turns, int most, float scale) {
    extern __shared__ __align__(1024) u8 scratch[];
    __shared__ u32 number;
    __shared__ __align__(8) float shifts[SLOTS][BATCH];  // read two at a time, as are the next two
    __shared__ __align__(8) float inner[SLOTS][BATCH];
    __shared__ __align__(8) int tokens[SLOTS][BATCH];
    __shared__ long long places[SLOTS][2][BATCH];  // where rows of q and of the output's gradient begin
    __shared__ u64 full[SLOTS], empty[SLOTS];
    const u32 keys = shared_address(scratch), values = keys + 2 * TILE, slots = values + 2 * TILE;
    u32* before = (u32*)(scratch + (4 + 2 * SLOTS) * TILE);  // rows of a list before each 64 tokens, a list a warpgroup
    const int lane = threadIdx.x % 32;
    if (LISTED) {
        if (threadIdx.x == 0) number = atomicAdd(turns, 1u);
        __syncthreads();
    }
    const Work work(number);
    if (LISTED && work.part > 0) {
        const u32* of = attend + (long long)work.pair * chunks + work.block * 2;
        if (work.part * most >= max(of[0], work.block * 2 + 1 < chunks ? of[1] : 0u)) return;
    }
    const int block = work.block, pair = work.pair, part = work.part;
    const int key0 = block * 2 * KEYS;
    const int batch = pair / kv_heads, kv = pair % kv_heads, heads = kv_heads * group;
    const int together = BATCH / group, tiles = ceil_div(t, 64);
    const u64* cells = all_cells + (long long)pair * tiles * chunks;
    const u32* entries = all_first + (long long)pair * tiles * chunks;
    // of a list, the first token that is this block's, and how many are
    const int begin = part * most;
    const auto tokens_of = [&](const u32* before_tile) { return LISTED ? min(most, max(0, (int)before_tile[tiles] - begin)) : max(0, t - key0); };
    const auto word = [&](int list, int tile) -> u64 {
        const int chunk = key0 / CHUNK + list;
        return below_end(chunk < chunks ? cells[tile * chunks + chunk] : 0, tile, t);
    };
    empty_slots(full, empty, LISTED ? 4 : 8);
    if (threadIdx.x < CONSUMERS) {
        const int group_of = threadIdx.x / 128;
        for (int i = threadIdx.x % 128; i < 64 * PANELS * 8; i += 128) {
            const int row = i / (PANELS * 8), piece = i % (PANELS * 8), key = key0 + group_of * KEYS + row;
            const bool valid = key < t && piece * 8 < HEAD;
            const long long at = valid ? ((long long)batch * t + key) * kv_stride + kv * HEAD + piece * 8 : 0;
            const u32 to = group_of * TILE + piece / 8 * 8192 + swizzled(row, piece % 8);
            copy16(keys + to, k + at, valid);
            copy16(values + to, v + at, valid);
        }
        copy_commit();
    }
    const int first_tile = key0 / 64;
    if (LISTED) {
        // by a warp a list
        for (int list = threadIdx.x / 32 - 8; list >= 0 && list < 2; list += 4)
            count_rows(before + list * (tiles + 1), first_tile, tiles, [&](int tile) { return word(list, tile); });
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers();
        const int slot = threadIdx.x / 32 - 8, list = LISTED ? slot / 2 : 0;
        const u32* own = before + list * (tiles + 1);
        const int total = tokens_of(own), batches = ceil_div(total, together);
        // What is known of the two rows that a lane looks up of a batch.
        struct Row { int token; float delta, shift; };
        const auto look_up = [&](int i, int r) {
            const int place = begin + i * together + r / group;
            const bool valid = i < batches && r < together * group && place < begin + total;
            Row row = {-1, 0.f, NOTHING};
            if (!valid) return row;
            u64 bits = 0, before_it = 0;
            if (LISTED) {
                int low = first_tile, high = tiles - 1;  // the last tile with no more rows before it than `place`
                while (low < high) {
                    const int middle = (low + high + 1) / 2;
                    if ((int)own[middle] <= place) low = middle; else high = middle - 1;
                }
                bits = word(list, low);
                int rank = place - own[low], at = 0;
                #pragma unroll
                for (int width = 32; width > 0; width /= 2) {
                    const int count = __popcll(bits >> at & ((1ull << width) - 1));
                    if (rank >= count) { rank -= count; at += width; }
                }
                row.token = low * 64 + at;
                before_it = bits & ((1ull << at) - 1);
            } else {
                row.token = key0 + place;
            }
            const long long at = ((long long)batch * t + row.token) * heads + kv * group + r % group;
            row.delta = delta[at];
            float plus = 0.f;
            if (LISTED && bias) plus = bias[entries[row.token / 64 * chunks + key0 / CHUNK + list] + __popcll(before_it)] * LOG2E;
            row.shift = plus - lse[at] * LOG2E;
            return row;
        };
        const int first = LISTED ? slot % 2 : slot, step = LISTED ? 2 : SLOTS;
        Row rows[2] = {look_up(first, lane), look_up(first, lane + 32)};
        int round = 0;
        for (int i = first; i < batches; i += step, round++) {
            if (round > 0) barrier_wait(shared_address(empty + slot), (round - 1) & 1);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = lane + 32 * half;
                const int token = rows[half].token, head = kv * group + r % group;
                const long long line = (long long)batch * t + token;
                tokens[slot][r] = token;
                places[slot][0][r] = token < 0 ? -1 : line * q_stride + head * HEAD;
                places[slot][1][r] = token < 0 ? -1 : (line * heads + head) * HEAD;
                inner[slot][r] = rows[half].delta;
                shifts[slot][r] = rows[half].shift;
            }
            __syncwarp();
            const u32 to = slots + slot * 2 * TILE;
            gather_by_warp(to, q, places[slot][0]);
            gather_by_warp(to + TILE, dout, places[slot][1]);
            copy_commit();
            // the next batch is looked up while this one's rows come in
            #pragma unroll
            for (int half = 0; half < 2; half++) rows[half] = look_up(i + step, lane + 32 * half);
            copy_wait<0>();
            proxy_fence();
            barrier_arrive(shared_address(full + slot));
        }
    } else {
        more_registers();
        join_copies(threadIdx.x / 128);
        const int list = __shfl_sync(FULL, threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4;
        const int total = tokens_of(before + list * (tiles + 1)), batches = ceil_div(total, together);
        const float factor = scale * LOG2E;
        const u32 own_keys = keys + list * TILE, own_values = values + list * TILE;
        float acc_k[PANELS][32] = {}, acc_v[PANELS][32] = {};
        const int own = warp * 16 + lane / 4, key = key0 + list * KEYS + own;
        float x[32], dp[32];
        const auto slot_of = [&](int i) { return LISTED ? list * 2 + i % 2 : i % SLOTS; };
        const auto wait = [&](int i) { barrier_wait(shared_address(full + slot_of(i)), (LISTED ? i / 2 : i / SLOTS) & 1); };
        const bool ahead = D <= 64;  // the next scores are asked for early where there are registers for them
        if (ahead && batches > 0) {
            wait(0);
            wgmma_fence();
            product(x, own_keys, slots + slot_of(0) * 2 * TILE);
            product(dp, own_values, slots + slot_of(0) * 2 * TILE + TILE);
            wgmma_commit();
            wgmma_wait<0>();
        }
        for (int i = 0; i < batches; i++) {
            const int asked = i + 1 < batches ? i + 1 : i, slot = slot_of(i);  // behind the last batch the last one's again, for nothing
            const u32 queries = slots + slot * 2 * TILE, outs = queries + TILE, next = slots + slot_of(asked) * 2 * TILE;
            if (ahead && asked > i) wait(asked);
            if (!ahead) {
                wait(i);
                wgmma_fence();
                product(x, own_keys, queries);
                wgmma_commit();
                product(dp, own_values, outs);
                wgmma_commit();
                wgmma_wait<1>();
            }
            u32 p[4][4], ds[4][4];
            // tokens ascend, so only the first batches have keys behind a token; with more sums a branch here spills
            if (ahead && tokens[slot][0] < key0 + list * KEYS + KEYS - 1) {
                #pragma unroll
                for (int n = 0; n < 8; n++) {
                    const int2 token = *(const int2*)&tokens[slot][n * 8 + lane % 4 * 2];
                    #pragma unroll
                    for (int half = 0; half < 2; half++) {
                        if (key + 8 * half > token.x) x[n * 4 + 2 * half] = NOTHING;
                        if (key + 8 * half > token.y) x[n * 4 + 2 * half + 1] = NOTHING;
                    }
                }
            }
            #pragma unroll
            for (int n = 0; n < 8; n++) {
                const int r = n * 8 + lane % 4 * 2;
                const int2 token = *(const int2*)&tokens[slot][r];
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float2 shift = *(const float2*)&shifts[slot][r];
                    float& a = x[n * 4 + 2 * half];
                    float& b = x[n * 4 + 2 * half + 1];
                    a = !ahead && key + 8 * half > token.x ? 0.f : exp2_fast(fmaf(a, factor, shift.x));
                    b = !ahead && key + 8 * half > token.y ? 0.f : exp2_fast(fmaf(b, factor, shift.y));
                    p[n / 2][n % 2 * 2 + half] = pack(a, b);
                }
            }
            wgmma_fence();
            add_product(acc_v, p, outs);
            wgmma_commit();
            if (!ahead) wgmma_wait<1>();
            #pragma unroll
            for (int n = 0; n < 8; n++) {
                const float2 mean = *(const float2*)&inner[slot][n * 8 + lane % 4 * 2];
                #pragma unroll
                for (int half = 0; half < 2; half++)
                    ds[n / 2][n % 2 * 2 + half] = pack(x[n * 4 + 2 * half] * (dp[n * 4 + 2 * half] - mean.x),
                                                       x[n * 4 + 2 * half + 1] * (dp[n * 4 + 2 * half + 1] - mean.y));
            }
            wgmma_fence();
            if (ahead) {
                product(x, own_keys, next);
                product(dp, own_values, next + TILE);
            }
            add_product(acc_k, ds, queries);
            wgmma_commit();
            wgmma_wait<0>();
            __syncwarp();
            if (lane == 0) barrier_arrive(shared_address(empty + slot));
        }
        // asked for once more: through the loop it would take registers that the sums need
        const Work work(number);
        const int part = work.part, to_key = work.block * 2 * KEYS + list * KEYS + own;
        u32* turn = turns + 1 + (long long)work.pair * gridDim.x * 2 + work.block * 2 + list;
        if (part > 0 && total == 0) return;  // of a chunk with fewer parts than the one beside it
        if (part > 0) {
            if (threadIdx.x % 128 == 0)
                while (acquire(turn) != part) {}
            join_multipliers(list);
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at_key = to_key + 8 * half;
            if (at_key >= t) continue;
            const long long at = (((long long)(work.pair / kv_heads) * t + at_key) * kv_heads + work.pair % kv_heads) * HEAD + lane % 4 * 2;
            #pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                float2* to_k = (float2*)(dk + at + n * 8);
                float2* to_v = (float2*)(dv + at + n * 8);
                float2 more_k = make_float2(acc_k[n / 8][n % 8 * 4 + 2 * half] * scale, acc_k[n / 8][n % 8 * 4 + 2 * half + 1] * scale);
                float2 more_v = make_float2(acc_v[n / 8][n % 8 * 4 + 2 * half], acc_v[n / 8][n % 8 * 4 + 2 * half + 1]);
                if (part > 0) {
                    const float2 sum_k = __ldcg(to_k), sum_v = __ldcg(to_v);
                    more_k = make_float2(sum_k.x + more_k.x, sum_k.y + more_k.y), more_v = make_float2(sum_v.x + more_v.x, sum_v.y + more_v.y);
                }
                *to_k = more_k, *to_v = more_v;
            }
        }
        if (LISTED && part * most + total < (int)before[list * (tiles + 1) + tiles]) {
            join_multipliers(list);
            if (threadIdx.x % 128 == 0) release(turn, part + 1);
        }
    }
}
