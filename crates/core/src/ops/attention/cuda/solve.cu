// What a row of entmax needs before it has weights: its threshold (forward), and the mean of do . v weighted by r = p^(2 - alpha) (backward).
// Scores are computed again in every round: no row of them is kept, so a row may have any length.

// The walk over the keys of a tile of rows, once a round.
struct Walk {
    Ring ring;
    int count;
    template <typename Load> METHOD void begin(Load load) {
        if (threadIdx.x == 0) for (int i = 0; i < ring.length && i < count; i++) load(i, (ring.slot + i) % ring.length);
    }
    template <typename Load> METHOD void next(int i, Load load) {
        __syncwarp();
        if (threadIdx.x % 32 == 0 && ring.last() && i + ring.length < count) load(i + ring.length, ring.slot);
        ring.next();
    }
};


// The threshold tau of (alpha - 1) z by Newton on the beta-norm from the left, as the op entmax; `powers.r` is unused, beta is powers.p.
// Above 60 lines: a round is a walk over all keys and then a step of Newton, both on the rows' registers.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
attention_solve(const bf16* __restrict__ q, const __grid_constant__ Map k, const __grid_constant__ Map v, float* __restrict__ taus, int t,
                int kv_heads, int group, int q_stride, int slots, float scale, int add, int stride,
               int width, float share, float power_p, float power_r) {
    extern __shared__ __align__(1024) u8 scratch[];
    const Reach reach = {add, stride, width};
    const Powers powers = {power_p, power_r};
    __shared__ u64 full[MOST_SLOTS];
    __shared__ u32 read[MOST_SLOTS];
    const u32 queries = shared_address(scratch);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int batch = blockIdx.y / kv_heads, kv = blockIdx.y % kv_heads, heads = kv_heads * group;
    const int slab_tokens = 16 / group, tile = WARPS * slab_tokens;
    const int first = (gridDim.x - 1 - blockIdx.x) * tile, end = min(first + tile, t);
    const int base_block = reach.begin(first) / KEYS;
    Walk walk = {{queries + ROWS * PANELS * 128, shared_address(full), read, slots, 0, 0},
                 max(0, ceil_div(reach.end(end - 1), KEYS) - base_block)};
    empty_slots(full, read, slots);
    load_rows(queries, q, batch, kv, first, t, group, q_stride);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    const auto load = [&](int i, int slot) { walk.ring.load(&k, &v, slot, kv * HEAD, (base_block + i) * KEYS, batch); };
    int last[2], begins[2];
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int place = lane / 4 + 8 * half, token = first + warp * slab_tokens + place / group;
        const bool valid = place < slab_tokens * group && token < t;
        last[half] = valid ? reach.end(token) - 1 : -1;
        begins[half] = reach.begin(token);
    }
    const float factor = scale * share;
    float top[2] = {NOTHING, NOTHING}, tau[2] = {-1.f, -1.f};
    for (int round = 0; round < 101; round++) {  // the first finds the largest score
        float low[2] = {}, high[2] = {};
        walk.begin(load);
        for (int i = 0; i < walk.count; i++) {
            const u32 keys = walk.ring.wait();
            const int block = base_block + i;
            const bool attends = (block * KEYS <= last[0] && block * KEYS + KEYS > begins[0]) || (block * KEYS <= last[1] && block * KEYS + KEYS > begins[1]);
            if (__any_sync(FULL, attends)) {
                float s[KEYS / 8][4] = {};
                multiply<ROWS, KEYS, D>(s, queries, warp * 16, keys, 0);
                #pragma unroll
                for (int half = 0; half < 2; half++)
                    #pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
                        #pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const int key = block * KEYS + n * 8 + lane % 4 * 2 + e;
                            const float x = s[n][2 * half + e] * factor;
                            if (key > last[half] || key < begins[half]) continue;
                            if (round == 0) top[half] = larger(top[half], x);
                            else {
                                const float u = x - top[half] - tau[half];
                                if (u > 0.f) {
                                    const float below = POWER == 1 ? u : exp2_fast((powers.p - 1.f) * log2_fast(u));
                                    low[half] += below;
                                    high[half] += below * u;
                                }
                            }
                        }
            }
            walk.next(i, load);
        }
        bool more = round == 0;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            if (round == 0) {
                top[half] = larger(top[half], __shfl_xor_sync(FULL, top[half], 1));
                top[half] = larger(top[half], __shfl_xor_sync(FULL, top[half], 2));
                continue;
            }
            const float sum = of_four(low[half]), of_powers = of_four(high[half]);
            const float norm = POWER == 1 ? sqrtf(of_powers) : exp2_fast(log2_fast(of_powers) / powers.p);
            const float rise = (norm - 1.f) * (POWER == 1 ? norm : exp2_fast((powers.p - 1.f) * log2_fast(norm))) / sum;
            // the root lies below 0; what is left to rise once steps are this small is below the rounding of the scores
            if (!(rise > 0.f) || tau[half] + rise > 1.f) continue;
            tau[half] += rise;
            more |= rise > 1e-6f;
        }
        if (!__syncthreads_or(more)) break;
    }
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int place = lane / 4 + 8 * half, token = first + warp * slab_tokens + place / group;
        if (place >= slab_tokens * group || token >= t || lane % 4) continue;
        taus[((long long)batch * t + token) * heads + kv * group + place % group] = top[half] == NOTHING ? 0.f : tau[half] + top[half];
    }
}

// The mean of do . v of every row, weighted by r. Above 60 lines: what a row needs is set up, summed over one walk and written by the same lanes.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
attention_means(const bf16* __restrict__ q, const __grid_constant__ Map k, const __grid_constant__ Map v, const bf16* __restrict__ dout,
                const float* __restrict__ taus, float* __restrict__ means, int t, int kv_heads, int group, int q_stride, int slots,
                float scale, int add, int stride,
               int width, float share, float power_p, float power_r) {
    extern __shared__ __align__(1024) u8 scratch[];
    const Reach reach = {add, stride, width};
    const Powers powers = {power_p, power_r};
    __shared__ u64 full[MOST_SLOTS];
    __shared__ u32 read[MOST_SLOTS];
    const u32 queries = shared_address(scratch), outs = queries + ROWS * PANELS * 128;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int batch = blockIdx.y / kv_heads, kv = blockIdx.y % kv_heads, heads = kv_heads * group;
    const int slab_tokens = 16 / group, tile = WARPS * slab_tokens;
    const int first = (gridDim.x - 1 - blockIdx.x) * tile, end = min(first + tile, t);
    const int base_block = reach.begin(first) / KEYS;
    Walk walk = {{outs + ROWS * PANELS * 128, shared_address(full), read, slots, 0, 0},
                 max(0, ceil_div(reach.end(end - 1), KEYS) - base_block)};
    empty_slots(full, read, slots);
    load_rows(queries, q, batch, kv, first, t, group, q_stride);
    load_rows(outs, dout, batch, kv, first, t, group, heads * HEAD);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    const auto load = [&](int i, int slot) { walk.ring.load(&k, &v, slot, kv * HEAD, (base_block + i) * KEYS, batch); };
    int last[2], begins[2];
    float tau[2], sum[2] = {}, inner[2] = {};
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int place = lane / 4 + 8 * half, token = first + warp * slab_tokens + place / group;
        const bool valid = place < slab_tokens * group && token < t;
        last[half] = valid ? reach.end(token) - 1 : -1;
        begins[half] = reach.begin(token);
        tau[half] = valid ? taus[((long long)batch * t + token) * heads + kv * group + place % group] : 0.f;
    }
    walk.begin(load);
    for (int i = 0; i < walk.count; i++) {
        const u32 keys = walk.ring.wait();
        const int block = base_block + i;
        const bool attends = (block * KEYS <= last[0] && block * KEYS + KEYS > begins[0]) || (block * KEYS <= last[1] && block * KEYS + KEYS > begins[1]);
        if (__any_sync(FULL, attends)) {
            #pragma unroll
            for (int sub = 0; sub < KEYS / SUB; sub++) {
                float s[SUB / 8][4] = {}, dp[SUB / 8][4] = {};
                scores<ROWS, KEYS>(s, dp, queries, outs, warp * 16, keys, keys + STAGE, sub * SUB);
                #pragma unroll
                for (int half = 0; half < 2; half++)
                    #pragma unroll
                    for (int n = 0; n < SUB / 8; n++)
                        #pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const int key = block * KEYS + sub * SUB + n * 8 + lane % 4 * 2 + e;
                            const float r = key > last[half] || key < begins[half] ? 0.f : share_of(s[n][2 * half + e], scale * share, tau[half], powers).r;
                            sum[half] += r;
                            inner[half] += r * dp[n][2 * half + e];
                        }
            }
        }
        walk.next(i, load);
    }
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int place = lane / 4 + 8 * half, token = first + warp * slab_tokens + place / group;
        const float all = of_four(sum[half]), of_all = of_four(inner[half]);
        if (place >= slab_tokens * group || token >= t || lane % 4) continue;
        means[((long long)batch * t + token) * heads + kv * group + place % group] = all > 0.f ? of_all / all : 0.f;
    }
}
