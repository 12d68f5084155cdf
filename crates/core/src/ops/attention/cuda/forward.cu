// Attention, forward. The running maximum, sum and output of a row stay in registers while the keys pass by, ascending. Where POWER is set,
// `lse` is an input: every row's threshold, which solve.cu found.

// Above 60 lines: maxima, sums and outputs of a lane's rows are registers that every step of the loop over keys changes; a function a step would
// take and give back all of them.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
attention_forward(const bf16* __restrict__ q, const __grid_constant__ Map k, const __grid_constant__ Map v, bf16* __restrict__ o,
                  float* __restrict__ lse, const u64* __restrict__ all_cells, const u32* __restrict__ all_first,
                  const float* __restrict__ bias, int t, int kv_heads, int group, int q_stride, int chunks, int slots, float scale, int add, int stride, int width,
                  float share, float power_p, float power_r) {
    extern __shared__ __align__(1024) u8 scratch[];
    const Reach reach = {add, stride, width};
    const Powers powers = {power_p, power_r};
    __shared__ int counts[WARPS];
    __shared__ u64 full[MOST_SLOTS];
    __shared__ u32 read[MOST_SLOTS];
    const u32 queries = shared_address(scratch);
    Ring ring = {queries + ROWS * PANELS * 128, shared_address(full), read, slots, 0, 0};
    unsigned short* list = (unsigned short*)(scratch + ROWS * PANELS * 128 + slots * 2 * STAGE);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int batch = blockIdx.y / kv_heads, kv = blockIdx.y % kv_heads, heads = kv_heads * group;
    const int slab_tokens = 16 / group, tile = WARPS * SLABS * slab_tokens;
    // the longest tiles first
    const int first = (gridDim.x - 1 - blockIdx.x) * tile, end = min(first + tile, t);
    const u64* cells = all_cells + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    const u32* entries = all_first + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    empty_slots(full, read, slots);

    load_rows(queries, q, batch, kv, first, t, group, q_stride);
    const int base_block = reach.begin(first) / KEYS, blocks = ceil_div(reach.end(end - 1), KEYS);
    const int count = LISTED ? visited(list, counts, cells, chunks, first, end, blocks) : max(0, blocks - base_block);

    int tokens[SLABS][2], begins[SLABS][2];  // last and first key of the lane's rows: the token itself where SPAN is not set; -1 for none
    float threshold[SLABS][2];
    #pragma unroll
    for (int m = 0; m < SLABS; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = lane / 4 + 8 * half, token = first + (warp * SLABS + m) * slab_tokens + row / group;
            const bool valid = row < slab_tokens * group && token < t;
            tokens[m][half] = valid ? reach.end(token) - 1 : -1;
            begins[m][half] = reach.begin(token);
            if (POWER) threshold[m][half] = valid ? lse[((long long)batch * t + token) * heads + kv * group + row % group] : 0.f;
        }
    const float factor = POWER ? scale * share : scale * LOG2E;
    float acc[SLABS][D / 8][4] = {}, top[SLABS][2], sum[SLABS][2] = {};
    #pragma unroll
    for (int m = 0; m < SLABS; m++) top[m][0] = top[m][1] = NOTHING;

    const auto load = [&](int i, int slot) { ring.load(&k, &v, slot, kv * HEAD, (LISTED ? list[i] : base_block + i) * KEYS, batch); };
    float biases[SLABS][2][CHUNKS], next[SLABS][2][CHUNKS];
    const int of_lane = first + warp * SLABS * slab_tokens + lane, lane_token = lane < SLABS * slab_tokens && of_lane < t ? of_lane : -1;
    const float per_group = 1.f / group;
    // the lane of a slab that looks up the token of a row of this one
    const auto source = [&](int half) { return (int)((lane / 4 + 8 * half + 0.5f) * per_group); };
    Own own, next_own = {false, 0, NOTHING};
    auto look_up = [&](int i) {
        if (!LISTED || i >= count) return;
        if (LANE_TOKENS) {
            next_own = own_of(all_cells, all_first, bias, t, chunks, lane_token, list[i] * KEYS / CHUNK);
            return;
        }
        #pragma unroll
        for (int m = 0; m < SLABS; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++)
                #pragma unroll
                for (int j = 0; j < CHUNKS; j++)
                    next[m][half][j] = tokens[m][half] < 0 ? NOTHING : bias_of(cells, entries, bias, chunks, tokens[m][half], chunk_at(list[i], j));
    };
    copy_commit();
    copy_wait<0>();
    __syncthreads();  // queries, barriers and the list are there
    if (threadIdx.x == 0) for (int i = 0; i < slots && i < count; i++) load(i, i);
    look_up(0);
    for (int i = 0; i < count; i++) {
        #pragma unroll
        for (int m = 0; m < SLABS; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++)
                #pragma unroll
                for (int j = 0; j < CHUNKS; j++) biases[m][half][j] = LISTED && !LANE_TOKENS ? next[m][half][j] : 0.f;
        own = next_own;
        look_up(i + 1);
        const int block = LISTED ? list[i] : base_block + i;
        const u32 keys = ring.wait(), values = keys + STAGE;
        const bool any = !LANE_TOKENS || __any_sync(FULL, own.has);
        if (LANE_TOKENS && any) {
            #pragma unroll
            for (int m = 0; m < SLABS; m++)
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float add = __shfl_sync(FULL, own.add, m * slab_tokens + source(half));
                    biases[m][half][0] = tokens[m][half] < 0 ? NOTHING : add;
                }
        }
        #pragma unroll
        for (int sub = 0; sub < KEYS / SUB; sub++) {
            if (!any) break;
            const int key0 = block * KEYS + sub * SUB;
            bool on[SLABS], some = false;
            #pragma unroll
            for (int m = 0; m < SLABS; m++) {
                bool attends = false;
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    if (LISTED) {
                        #pragma unroll
                        for (int j = 0; j < (SUB < PER ? 1 : SUB / PER); j++)
                            attends |= biases[m][half][(PER < KEYS ? sub * SUB / PER : 0) + j] != NOTHING && key0 <= tokens[m][half];
                    } else attends |= key0 <= tokens[m][half] && (!SPAN || key0 + SUB > begins[m][half]);
                }
                on[m] = __any_sync(FULL, attends);
                some |= on[m];
            }
            if (!some) continue;
            float s[SLABS][SUB / 8][4] = {};
            #pragma unroll
            for (int step = 0; step < D / 16; step++) {
                u32 a[SLABS][4];
                #pragma unroll
                for (int m = 0; m < SLABS; m++)
                    fragment<ROWS>(a[m], queries, (warp * SLABS + m) * 16, step);
                #pragma unroll
                for (int n = 0; n < SUB / 16; n++) {
                    u32 b[4];
                    fragment_right<KEYS>(b, keys, sub * SUB + n * 16, step);
                    #pragma unroll
                    for (int m = 0; m < SLABS; m++)
                        if (!LISTED || on[m]) {
                            mma(s[m][2 * n], a[m], b[0], b[1]);
                            mma(s[m][2 * n + 1], a[m], b[2], b[3]);
                        }
                }
            }
            u32 p[SLABS][SUB / 16][4];
            #pragma unroll
            for (int m = 0; m < SLABS; m++) {
                if (LISTED && !on[m]) continue;
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int token = tokens[m][half], begin = begins[m][half];
                    if (key0 + SUB - 1 > token || (SPAN && key0 < begin)) {
                        #pragma unroll
                        for (int n = 0; n < SUB / 8; n++)
                            #pragma unroll
                            for (int i2 = 0; i2 < 2; i2++) {
                                const int key = key0 + n * 8 + lane % 4 * 2 + i2;
                                if (key > token || (SPAN && key < begin)) s[m][n][2 * half + i2] = NOTHING;
                            }
                    }
                    if (POWER) {
                        #pragma unroll
                        for (int n = 0; n < SUB / 8; n++)
                            p[m][n / 2][n % 2 * 2 + half] = pack(share_of(s[m][n][2 * half], factor, threshold[m][half], powers).p,
                                                                 share_of(s[m][n][2 * half + 1], factor, threshold[m][half], powers).p);
                        continue;
                    }
                    float most = NOTHING;
                    #pragma unroll
                    for (int j = 0; j < (SUB < PER ? 1 : SUB / PER); j++) {
                        constexpr int width = SUB < PER ? SUB / 8 : PER / 8;
                        float of_chunk = NOTHING;
                        #pragma unroll
                        for (int n = 0; n < width; n++)
                            of_chunk = fmaxf(of_chunk, fmaxf(s[m][j * width + n][2 * half], s[m][j * width + n][2 * half + 1]));
                        most = fmaxf(most, of_chunk * factor + biases[m][half][(PER < KEYS ? sub * SUB / PER : 0) + j]);
                    }
                    most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
                    const float before = top[m][half], now = fmaxf(before, most), base = now == NOTHING ? 0.f : now;
                    const float shrink = exp2_fast(before - base);
                    top[m][half] = now;
                    float part = 0;
                    #pragma unroll
                    for (int j = 0; j < (SUB < PER ? 1 : SUB / PER); j++) {
                        constexpr int width = SUB < PER ? SUB / 8 : PER / 8;
                        const float shift = biases[m][half][(PER < KEYS ? sub * SUB / PER : 0) + j] - base;
                        #pragma unroll
                        for (int n = j * width; n < (j + 1) * width; n++) {
                            const float p0 = exp2_fast(fmaf(s[m][n][2 * half], factor, shift)), p1 = exp2_fast(fmaf(s[m][n][2 * half + 1], factor, shift));
                            part += p0 + p1;
                            p[m][n / 2][n % 2 * 2 + half] = pack(p0, p1);
                        }
                    }
                    sum[m][half] = sum[m][half] * shrink + part;
                    if (__any_sync(FULL, before != now)) {
                        #pragma unroll
                        for (int n = 0; n < D / 8; n++) {
                            acc[m][n][2 * half] *= shrink;
                            acc[m][n][2 * half + 1] *= shrink;
                        }
                    }
                }
            }
            #pragma unroll
            for (int step = 0; step < SUB / 16; step++)
                #pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    u32 b[4];
                    fragment_transposed<KEYS>(b, values, sub * SUB + step * 16, n);
                    #pragma unroll
                    for (int m = 0; m < SLABS; m++)
                        if (!LISTED || on[m]) {
                            mma(acc[m][2 * n], p[m][step], b[0], b[1]);
                            mma(acc[m][2 * n + 1], p[m][step], b[2], b[3]);
                        }
                }
        }
        __syncwarp();
        if (lane == 0 && ring.last() && i + slots < count) load(i + slots, ring.slot);
        ring.next();
    }
    #pragma unroll
    for (int m = 0; m < SLABS; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int place = lane / 4 + 8 * half, token = first + (warp * SLABS + m) * slab_tokens + place / group;
            const float total = of_four(sum[m][half]);
            if (place >= slab_tokens * group || token >= t) continue;
            const float inverse = POWER ? 1.f : total > 0.f ? 1.f / total : 0.f;  // a range may be empty
            const long long row = ((long long)batch * t + token) * heads + kv * group + place % group;
            #pragma unroll
            for (int n = 0; n < HEAD / 8; n++)
                *(u32*)(o + row * HEAD + n * 8 + lane % 4 * 2) = pack(acc[m][n][2 * half] * inverse, acc[m][n][2 * half + 1] * inverse);
            if (!POWER && lane % 4 == 0) lse[row] = (top[m][half] + log2_fast(total)) * (1.f / LOG2E);
        }
}
