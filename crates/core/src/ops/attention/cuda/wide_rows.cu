// Attention on wgmma, backward, query side: dq, and the gradient of the bias of every entry, as rows.cu. The next scores and dp are on their way while
// ds k is added.

// Above 60 lines: the warps that load and the warpgroups that compute are the two branches of one kernel, which meet at its barriers.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
wide_rows(const bf16* __restrict__ q, const __grid_constant__ Map k, const __grid_constant__ Map v, const bf16* __restrict__ dout,
                    const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dq, float* __restrict__ dbias,
                    const u64* __restrict__ cells, const u32* __restrict__ first, const float* __restrict__ bias, int t, int kv_heads,
                    int group, int q_stride, int chunks, float scale) {
    extern __shared__ __align__(1024) u8 scratch[];
    __shared__ u64 full[SLOTS], empty[SLOTS];
    __shared__ float adds[LISTED ? SLOTS : 1][GROUPS * ROWS], of_rows[LISTED ? SLOTS : 1][GROUPS * ROWS];
    __shared__ int on[SLOTS][GROUPS];
    const u32 queries = shared_address(scratch), outs = queries + GROUPS * TILE, slots = outs + GROUPS * TILE;
    const int lane = threadIdx.x % 32;
    empty_slots(full, empty, 4 * GROUPS);
    const Sides s = sides(cells, first, (unsigned short*)(scratch + (2 * GROUPS + 2 * SLOTS) * TILE), t, kv_heads, group, chunks);
    if (threadIdx.x < CONSUMERS) {
        load_own(queries, q, s, q_stride);
        load_own(outs, dout, s, s.heads * HEAD);
        copy_commit();
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers();
        const int slot = threadIdx.x / 32 - 4 * GROUPS;
        // the bias's gradient of block i, whose rows' sums the warpgroups have left
        const auto collect = [&](int i) {
            if (!LISTED || !dbias) return;
            for (int e = lane; e < GROUPS * s.together; e += 32) {
                const int row = e / s.together * ROWS + e % s.together * group, token = s.token(row), cell = token / 64 * chunks + s.list[i];
                if (token < 0) continue;
                const u64 bits = s.cells[cell], bit = 1ull << (token & 63);
                if (!(bits & bit)) continue;
                float sum = 0;
                for (int h = 0; h < group; h++) sum += of_rows[slot][row + h];
                dbias[s.entries[cell] + __popcll(bits & (bit - 1))] = sum;
            }
            __syncwarp();
        };
        int i = slot, round = 0;
        for (; i < s.count; i += SLOTS, round++) {
            if (round > 0) {
                barrier_wait(shared_address(empty + slot), (round - 1) & 1);
                collect(i - SLOTS);
            }
            bring(i, slot, slots, full, adds, on, &k, &v, bias, s);
        }
        if (round > 0) {
            barrier_wait(shared_address(empty + slot), (round - 1) & 1);
            collect(i - SLOTS);
        }
    } else {
        more_registers();
        join_copies(threadIdx.x / 128);  // keys and values are on their way meanwhile
        const int own = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, row0 = warp * 16 + lane / 4;
        const int tokens[2] = {s.token(own * ROWS + row0), s.token(own * ROWS + row0 + 8)};
        const u32 rows = queries + own * TILE, own_outs = outs + own * TILE;
        const Walk walk = {full, empty, on, s.count, own, min(s.first + (own + 1) * s.together, t) - 1, s.list};
        const float factor = scale * LOG2E;
        float low[2], inner[2], acc[PANELS][32] = {};
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const long long at = tokens[half] < 0 ? 0 : s.place(tokens[half], row0 + 8 * half);
            low[half] = tokens[half] < 0 ? 0.f : lse[at] * LOG2E;
            inner[half] = tokens[half] < 0 ? 0.f : delta[at];
        }
        u32 ds[4][4];
        float x[32], dp[32];
        bool fresh = true;  // no scores are on their way
        for (int i = walk.next(0, s.count); i < s.count;) {
            if (fresh) {
                wgmma_fence();
                product(x, rows, slots + i % SLOTS * 2 * TILE);
                product(dp, own_outs, slots + i % SLOTS * 2 * TILE + TILE);
                wgmma_commit();
                wgmma_wait<0>();
            }
            const int limit = min(s.count, i + SLOTS), after = walk.next(i + 1, limit);
            fresh = after == limit;
            const int asked = fresh ? i : after;  // this one's scores again, for nothing, so that there is one path
            const int key0 = walk.block(i) * KEYS;
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const float shift = (LISTED ? adds[i % SLOTS][own * ROWS + row0 + 8 * half] : 0.f) - low[half];
                float sum = 0;
                if (key0 + KEYS - 1 > tokens[half]) {
                    #pragma unroll
                    for (int n = 0; n < 16; n++)
                        if (key0 + n / 2 * 8 + lane % 4 * 2 + n % 2 > tokens[half]) x[n / 2 * 4 + 2 * half + n % 2] = NOTHING;
                }
                #pragma unroll
                for (int n = 0; n < 8; n++) {
                    float d[2];
                    #pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float p = exp2_fast(fmaf(x[n * 4 + 2 * half + e], factor, shift));
                        d[e] = p * (dp[n * 4 + 2 * half + e] - inner[half]);
                        if (LISTED) sum += d[e];
                    }
                    ds[n / 2][n % 2 * 2 + half] = pack(d[0], d[1]);
                }
                if (LISTED && dbias) {
                    sum += __shfl_xor_sync(FULL, sum, 1);
                    sum += __shfl_xor_sync(FULL, sum, 2);
                    if (lane % 4 == 0) of_rows[i % SLOTS][own * ROWS + row0 + 8 * half] = sum;
                }
            }
            wgmma_fence();
            product(x, rows, slots + asked % SLOTS * 2 * TILE);
            product(dp, own_outs, slots + asked % SLOTS * 2 * TILE + TILE);
            add_product(acc, ds, slots + i % SLOTS * 2 * TILE);
            wgmma_commit();
            wgmma_wait<0>();
            walk.leave(i);
            i = fresh ? walk.next(limit, s.count) : after;
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            if (tokens[half] < 0) continue;
            const long long row = s.place(tokens[half], row0 + 8 * half);
            #pragma unroll
            for (int n = 0; n < HEAD / 8; n++)
                *(float2*)(dq + row * HEAD + n * 8 + lane % 4 * 2) =
                    make_float2(acc[n / 8][n % 8 * 4 + 2 * half] * scale, acc[n / 8][n % 8 * 4 + 2 * half + 1] * scale);
        }
    }
}
