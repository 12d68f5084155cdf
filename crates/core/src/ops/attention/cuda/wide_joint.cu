// Attention on wgmma, backward, both sides at once, for lists of chunks of 64 keys and heads of up to 64: a block has a chunk, walks the rows that
// attend it, and so multiplies nothing in vain. dk and dv stay in registers; what the chunk adds to dq goes to memory through the copy engine. A
// tile of 64 tokens takes its chunks one after the other, ascending: `done` counts those that have added, and a block waits for the turn of its own.
// So sums have one order, and the same operands give the same bits. Blocks take their numbers as they start, the first chunks first: who waits
// waits for a block that runs. Chunks whose numbers leave the same rest by `chains` are a chain with sums and turns of its own, so that fewer wait
// for each other; `together` kv heads of sequences are worked on at a time, as many as the caches hold.

// Above 60 lines: dk, dv, scores and their gradients are registers of one loop over the rows.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
wide_joint(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ dout,
           const float* __restrict__ lse, const float* __restrict__ delta, float* dq, float* __restrict__ dbias, float* __restrict__ dk,
           float* __restrict__ dv, const u64* __restrict__ all_cells, const u32* __restrict__ all_first, const float* __restrict__ bias,
           const u32* __restrict__ all_turns, u32* done, float* rest, int t, int kv_heads, int group, int q_stride, int kv_stride, int chunks, int pairs,
           int together, int chains, float scale) {
    extern __shared__ __align__(1024) u8 scratch[];
    __shared__ Shared s;
    const u32 keys = shared_address(scratch), tile_ds = keys + TILE, slots = tile_ds + TILE, pieces = slots + SLOTS * 2 * TILE;
    u8* piece_bytes = scratch + (2 + 2 * SLOTS) * TILE;
    u32* before = (u32*)(piece_bytes + 4 * TILE);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Block b;
    b.t = t, b.group = group, b.heads = kv_heads * group, b.chunks = chunks, b.together = BATCH / group, b.tiles = ceil_div(t, 64);
    if (threadIdx.x == 0) {
        s.number = atomicAdd(done + pairs * b.tiles * chains, 1u);
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_address(s.ready + i), 128);
            barrier_init(shared_address(s.spent + i), 32);
        }
    }
    empty_slots(s.full, s.empty, 128);
    __syncthreads();
    const int set = s.number / (together * chunks), within = s.number % (together * chunks);
    const int width = min(together, pairs - set * together);  // the last set may be smaller
    b.pair = set * together + within % width, b.chunk = within / width, b.batch = b.pair / kv_heads, b.kv = b.pair % kv_heads;
    b.before = before;
    const long long first_cell = (long long)b.pair * b.tiles * chunks;
    b.cells = all_cells + first_cell, b.entries = all_first + first_cell, b.turns = all_turns + first_cell;
    const int key0 = b.chunk * KEYS;
    if (threadIdx.x < CONSUMERS) {
        for (int i = threadIdx.x; i < 64 * 8; i += 128) {
            const int row = i / 8, piece = i % 8, key = key0 + row;
            const bool valid = key < t && piece * 8 < HEAD;
            const long long at = valid ? ((long long)b.batch * t + key) * kv_stride + b.kv * HEAD + piece * 8 : 0;
            copy16(keys + swizzled(row, piece), k + at, valid);
            copy16(pieces + swizzled(row, piece), v + at, valid);  // until they are in registers
        }
        copy_commit();
    } else if (warp == 4) {
        count_rows(before, b.chunk, b.tiles, [&](int tile) { return attending(b.cells, chunks, t, tile, b.chunk); });
    }
    __syncthreads();
    b.total = before[b.tiles], b.batches = ceil_div(b.total, b.together);
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers();
        if (warp < 4 + LOADERS) bring_rows(s, b, slots, q, dout, lse, delta, bias, q_stride);
        else {
            const int chain = b.chunk % chains;
            const long long numbers = (long long)(pairs / kv_heads) * t * b.heads * HEAD;
            float* to = chain == 0 ? dq : rest + (chain - 1) * numbers;
            add_rows(s, b, pieces, to, dbias, done + b.pair * b.tiles * chains + chain, chains);
        }
    } else {
        more_registers();
        copy_wait<0>();
        proxy_fence();
        join_multipliers(0);
        u32 values[4][4];
        #pragma unroll
        for (int step = 0; step < 4; step++) fragment<64>(values[step], pieces, warp * 16, step);
        const float factor = scale * LOG2E;
        float acc_k[1][32] = {}, acc_v[1][32] = {}, x[32], dp[32];
        const int own = warp * 16 + lane / 4, key = key0 + own;
        for (int i = 0; i < b.batches; i++) {
            const int slot = i % SLOTS, of = i & 1;
            const u32 queries = slots + slot * 2 * TILE, outs = queries + TILE;
            barrier_wait(shared_address(s.full + slot), i / SLOTS & 1);
            wgmma_fence();
            product(x, keys, queries);
            wgmma_commit();
            product_of_registers(dp, values, outs);
            wgmma_commit();
            wgmma_wait<1>();
            // tokens ascend, so only the first batches have keys behind a token
            if (s.tokens[slot][0] < key0 + KEYS - 1) {
                #pragma unroll
                for (int n = 0; n < 8; n++) {
                    const int2 token = *(const int2*)&s.tokens[slot][n * 8 + lane % 4 * 2];
                    #pragma unroll
                    for (int half = 0; half < 2; half++) {
                        if (key + 8 * half > token.x) x[n * 4 + 2 * half] = NOTHING;
                        if (key + 8 * half > token.y) x[n * 4 + 2 * half + 1] = NOTHING;
                    }
                }
            }
            u32 p[4][4], ds[4][4];
            #pragma unroll
            for (int n = 0; n < 8; n++) {
                const float2 shift = *(const float2*)&s.shifts[slot][n * 8 + lane % 4 * 2];
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    float& left = x[n * 4 + 2 * half];
                    float& right = x[n * 4 + 2 * half + 1];
                    left = exp2_fast(fmaf(left, factor, shift.x));
                    right = exp2_fast(fmaf(right, factor, shift.y));
                    p[n / 2][n % 2 * 2 + half] = pack(left, right);
                }
            }
            wgmma_fence();
            add_product(acc_v, p, outs);
            wgmma_commit();
            wgmma_wait<1>();
            float sums[16];
            #pragma unroll
            for (int n = 0; n < 8; n++) {
                const float2 mean = *(const float2*)&s.inner[slot][n * 8 + lane % 4 * 2];
                sums[2 * n] = sums[2 * n + 1] = 0.f;
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float left = x[n * 4 + 2 * half] * (dp[n * 4 + 2 * half] - mean.x);
                    const float right = x[n * 4 + 2 * half + 1] * (dp[n * 4 + 2 * half + 1] - mean.y);
                    sums[2 * n] += left;
                    sums[2 * n + 1] += right;
                    ds[n / 2][n % 2 * 2 + half] = pack(left, right);
                }
            }
            join_multipliers(0);  // the tile of ds before this one has been read
            #pragma unroll
            for (int n = 0; n < 4; n++) store4(tile_ds + swizzled(warp * 16 + lane % 16, 2 * n + lane / 16), ds[n]);
            proxy_fence();
            float part[32];
            wgmma_fence();
            add_product(acc_k, ds, queries);
            wgmma_commit();
            if (dbias) sum_keys(sums);
            join_multipliers(0);
            wgmma_fence();
            product_of_transposed(part, tile_ds, keys);
            wgmma_commit();
            int token = 0;
            u32 entry = 0, turn = 0;
            if (threadIdx.x < BATCH) token = s.tokens[slot][threadIdx.x], entry = s.entries[slot][threadIdx.x], turn = s.turns[slot][threadIdx.x];
            wgmma_wait<0>();
            barrier_arrive(shared_address(s.empty + slot));
            if (i > 1) barrier_wait(shared_address(s.spent + of), (i / 2 - 1) & 1);
            if (threadIdx.x < BATCH) s.to[of][threadIdx.x] = token, s.to_entries[of][threadIdx.x] = entry, s.to_turns[of][threadIdx.x] = turn;
            if (dbias) {
                const int n = (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
                *(float2*)&s.sums[of][warp][n * 8 + lane % 4 * 2] = make_float2(sums[0], sums[1]);
            }
            write_piece(piece_bytes + of * 2 * TILE, part, scale);
            proxy_fence();
            barrier_arrive(shared_address(s.ready + of));
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at_key = key + 8 * half;
            if (at_key >= t) continue;
            const long long at = (((long long)b.batch * t + at_key) * kv_heads + b.kv) * HEAD + lane % 4 * 2;
            #pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                *(float2*)(dk + at + n * 8) = make_float2(acc_k[0][n * 4 + 2 * half] * scale, acc_k[0][n * 4 + 2 * half + 1] * scale);
                *(float2*)(dv + at + n * 8) = make_float2(acc_v[0][n * 4 + 2 * half], acc_v[0][n * 4 + 2 * half + 1]);
            }
        }
    }
}
