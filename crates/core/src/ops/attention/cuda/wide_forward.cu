// Attention on wgmma, forward. The next scores are on their way while p v is added and while the powers are computed.

// Above 60 lines: the warps that load and the warpgroups that compute are the two branches of one kernel, which meet at its barriers.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
wide_forward(const bf16* __restrict__ q, const __grid_constant__ Map k, const __grid_constant__ Map v, bf16* __restrict__ o,
                       float* __restrict__ lse, const u64* __restrict__ cells, const u32* __restrict__ first, const float* __restrict__ bias,
                       int t, int kv_heads, int group, int q_stride, int chunks, float scale) {
    extern __shared__ __align__(1024) u8 scratch[];
    __shared__ u64 full[SLOTS], empty[SLOTS];
    __shared__ float adds[LISTED ? SLOTS : 1][GROUPS * ROWS];
    __shared__ int on[SLOTS][GROUPS];
    const u32 queries = shared_address(scratch), slots = queries + GROUPS * TILE;
    const int lane = threadIdx.x % 32;
    empty_slots(full, empty, 4 * GROUPS);
    const Sides s = sides(cells, first, (unsigned short*)(scratch + (GROUPS + 2 * SLOTS) * TILE), t, kv_heads, group, chunks);
    if (threadIdx.x < CONSUMERS) {
        load_own(queries, q, s, q_stride);
        copy_commit();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers();
        const int slot = threadIdx.x / 32 - 4 * GROUPS;
        for (int i = slot, round = 0; i < s.count; i += SLOTS, round++) {
            if (round > 0) barrier_wait(shared_address(empty + slot), (round - 1) & 1);
            bring(i, slot, slots, full, adds, on, &k, &v, bias, s);
        }
    } else {
        more_registers();
        join_copies(threadIdx.x / 128);  // keys and values are on their way meanwhile
        const int own = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, row0 = warp * 16 + lane / 4;
        const int tokens[2] = {s.token(own * ROWS + row0), s.token(own * ROWS + row0 + 8)};
        const u32 rows = queries + own * TILE;
        const Walk walk = {full, empty, on, s.count, own, min(s.first + (own + 1) * s.together, t) - 1, s.list};
        const float factor = scale * LOG2E;
        float acc[PANELS][32] = {}, top[2] = {NOTHING, NOTHING}, sum[2] = {}, x[32], shrink[2];
        u32 p[4][4];
        // x: scores of block i to p, and what the sums so far shrink by
        const auto soften = [&](int i) {
            const int key0 = walk.block(i) * KEYS;
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int token = tokens[half];
                const float add = LISTED ? adds[i % SLOTS][own * ROWS + row0 + 8 * half] : 0.f;
                if (key0 + KEYS - 1 > token) {
                    #pragma unroll
                    for (int n = 0; n < 8; n++)
                        #pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (key0 + n * 8 + lane % 4 * 2 + e > token) x[n * 4 + 2 * half + e] = NOTHING;
                }
                float most = NOTHING;
                #pragma unroll
                for (int n = 0; n < 8; n++) most = fmaxf(most, fmaxf(x[n * 4 + 2 * half], x[n * 4 + 2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
                most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
                const float before = top[half], now = fmaxf(before, most * factor + add), base = now == NOTHING ? 0.f : now;
                shrink[half] = exp2_fast(before - base);
                top[half] = now;
                const float shift = add - base;
                float part = 0;
                #pragma unroll
                for (int n = 0; n < 8; n++)
                    #pragma unroll
                    for (int e = 0; e < 2; e++) part += x[n * 4 + 2 * half + e] = exp2_fast(fmaf(x[n * 4 + 2 * half + e], factor, shift));
                sum[half] = sum[half] * shrink[half] + part;
            }
        };
        const auto round_x = [&] {
            #pragma unroll
            for (int n = 0; n < 16; n++) p[n / 4][n % 4] = pack(x[2 * n], x[2 * n + 1]);
        };
        const auto shrink_sums = [&] {
            if (__all_sync(FULL, shrink[0] == 1.f && shrink[1] == 1.f)) return;  // most blocks raise no row's maximum
            #pragma unroll
            for (int panel = 0; panel < PANELS; panel++)
                #pragma unroll
                for (int n = 0; n < 32; n++) acc[panel][n] *= shrink[n / 2 % 2];
        };
        bool fresh = true;  // no scores are on their way
        for (int i = walk.next(0, s.count); i < s.count;) {
            if (fresh) {
                wgmma_fence();
                product(x, rows, slots + i % SLOTS * 2 * TILE);
                wgmma_commit();
                wgmma_wait<0>();
                soften(i);
                shrink_sums();
                round_x();
            }
            const int limit = min(s.count, i + SLOTS), after = walk.next(i + 1, limit);
            fresh = after == limit;
            if (!fresh) {
                wgmma_fence();
                product(x, rows, slots + after % SLOTS * 2 * TILE);
                wgmma_commit();
                add_product(acc, p, slots + i % SLOTS * 2 * TILE + TILE);
                wgmma_commit();
                wgmma_wait<1>();
                soften(after);
                if (sum[0] + sum[1] < 0.f) __trap();  // never: a branch on all powers keeps the wait for p v behind them
                wgmma_wait<0>();
                walk.leave(i);
                shrink_sums();
                round_x();
                i = after;
            } else {
                wgmma_fence();
                add_product(acc, p, slots + i % SLOTS * 2 * TILE + TILE);
                wgmma_commit();
                wgmma_wait<0>();
                walk.leave(i);
                i = walk.next(limit, s.count);
            }
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[half];
            total += __shfl_xor_sync(FULL, total, 1);
            total += __shfl_xor_sync(FULL, total, 2);
            if (tokens[half] < 0) continue;
            const float inverse = 1.f / total;
            const long long row = s.place(tokens[half], row0 + 8 * half);
            #pragma unroll
            for (int n = 0; n < HEAD / 8; n++)
                *(u32*)(o + row * HEAD + n * 8 + lane % 4 * 2) = pack(acc[n / 8][n % 8 * 4 + 2 * half] * inverse, acc[n / 8][n % 8 * 4 + 2 * half + 1] * inverse);
            if (lane % 4 == 0) lse[row] = (top[half] + log2_fast(total)) * (1.f / LOG2E);
        }
    }
}
