// Attention, backward, query side: dq, and the gradient of the bias of every entry. Scores are computed again, row by row as forward
// went; p = exp(z - lse), ds = p (do . v - delta), dq = scale sum ds k, dbias = sum of ds over the entry's keys and the group's heads. Entmax
// has r = p^(2 - alpha) in the place of the outer p, and for delta the mean of do . v weighted by r (attention_means in solve.cu).

// delta [rows] = o . do, a warp a row.
extern "C" __global__ void __launch_bounds__(256)
attention_delta(const bf16* __restrict__ o, const bf16* __restrict__ dout, float* __restrict__ delta, long long rows) {
    const long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    float sum = 0;
    #pragma unroll
    for (int i = threadIdx.x % 32; i < HEAD; i += 32) sum += widen(o[row * HEAD + i]) * widen(dout[row * HEAD + i]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) delta[row] = sum;
}

// Above 60 lines: thresholds, dq and the sums of the bias's gradient are registers of one loop over keys, from the first product to the last.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
attention_rows(const bf16* __restrict__ q, const __grid_constant__ Map k, const __grid_constant__ Map v, const bf16* __restrict__ dout,
               const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dq, float* __restrict__ dbias,
               const u64* __restrict__ all_cells, const u32* __restrict__ all_first, const float* __restrict__ bias, int t,
               int kv_heads, int group, int q_stride, int chunks, int slots, float scale, int add, int stride,
               int width, float share, float power_p, float power_r) {
    extern __shared__ __align__(1024) u8 scratch[];
    const Reach reach = {add, stride, width};
    const Powers powers = {power_p, power_r};
    __shared__ int counts[WARPS];
    __shared__ u64 full[MOST_SLOTS];
    __shared__ u32 read[MOST_SLOTS];
    __shared__ float of_rows[WARPS][BLOCK_CHUNKS][16];
    const u32 queries = shared_address(scratch), outs = queries + ROWS * PANELS * 128;
    Ring ring = {outs + ROWS * PANELS * 128, shared_address(full), read, slots, 0, 0};
    unsigned short* list = (unsigned short*)(scratch + 2 * ROWS * PANELS * 128 + slots * 2 * STAGE);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int batch = blockIdx.y / kv_heads, kv = blockIdx.y % kv_heads, heads = kv_heads * group;
    const int slab_tokens = 16 / group, tile = WARPS * SLABS * slab_tokens;
    const int first = (gridDim.x - 1 - blockIdx.x) * tile, end = min(first + tile, t);
    const u64* cells = all_cells + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    const u32* entries = all_first + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    empty_slots(full, read, slots);
    load_rows(queries, q, batch, kv, first, t, group, q_stride);
    load_rows(outs, dout, batch, kv, first, t, group, heads * HEAD);
    const int base_block = reach.begin(first) / KEYS, blocks = ceil_div(reach.end(end - 1), KEYS);
    const int count = LISTED ? visited(list, counts, cells, chunks, first, end, blocks) : max(0, blocks - base_block);

    int tokens[SLABS][2], begins[SLABS][2];  // as in forward.cu
    float shift[SLABS][2], inner[SLABS][2];  // lse in powers of two, or the threshold; delta
    #pragma unroll
    for (int m = 0; m < SLABS; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = lane / 4 + 8 * half, token = first + (warp * SLABS + m) * slab_tokens + row / group;
            const bool valid = row < slab_tokens * group && token < t;
            const long long at = ((long long)batch * t + token) * heads + kv * group + row % group;
            tokens[m][half] = valid ? reach.end(token) - 1 : -1;
            begins[m][half] = reach.begin(token);
            shift[m][half] = valid ? lse[at] * (POWER ? 1.f : LOG2E) : 0.f;
            inner[m][half] = valid ? delta[at] : 0.f;
        }
    const float factor = POWER ? scale * share : scale * LOG2E;
    float acc[SLABS][D / 8][4] = {};
    const auto load = [&](int i, int slot) { ring.load(&k, &v, slot, kv * HEAD, (LISTED ? list[i] : base_block + i) * KEYS, batch); };
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    if (threadIdx.x == 0) for (int i = 0; i < slots && i < count; i++) load(i, i);
    const int of_lane = first + warp * SLABS * slab_tokens + lane, lane_token = lane < SLABS * slab_tokens && of_lane < t ? of_lane : -1;
    const float per_group = 1.f / group;
    // the lane of a slab that looks up the token of a row of this one
    const auto source = [&](int half) { return (int)((lane / 4 + 8 * half + 0.5f) * per_group); };
    Own own, next = {false, 0, NOTHING};
    if (LANE_TOKENS && count > 0) next = own_of(all_cells, all_first, bias, t, chunks, lane_token, list[0] * KEYS / CHUNK);
    for (int i = 0; i < count; i++) {
        const int block = LISTED ? list[i] : base_block + i;
        own = next;
        if (LANE_TOKENS && i + 1 < count) next = own_of(all_cells, all_first, bias, t, chunks, lane_token, list[i + 1] * KEYS / CHUNK);
        const u32 keys = ring.wait(), values = keys + STAGE;
        float adds[SLABS][2][CHUNKS], summed[SLABS][2][CHUNKS] = {};
        bool on[SLABS], some = false;
        #pragma unroll
        for (int m = 0; m < SLABS; m++) {
            bool attends = false;
            #pragma unroll
            for (int half = 0; half < 2; half++)
                #pragma unroll
                for (int j = 0; j < CHUNKS; j++) {
                    const int token = tokens[m][half];
                    float add = 0.f;
                    if (LANE_TOKENS) add = __shfl_sync(FULL, own.add, m * slab_tokens + source(half));
                    else if (LISTED && token >= 0) add = bias_of(cells, entries, bias, chunks, token, chunk_at(block, j));
                    adds[m][half][j] = LISTED && token < 0 ? NOTHING : add;
                    attends |= adds[m][half][j] != NOTHING && block * KEYS <= token && (!SPAN || block * KEYS + KEYS > begins[m][half]);
                }
            on[m] = __any_sync(FULL, attends);
            some |= on[m];
        }
        #pragma unroll 1
        for (int sub = 0; some && sub < KEYS / SUB; sub++) {
            float s[SLABS][SUB / 8][4] = {}, dp[SLABS][SUB / 8][4] = {};
            #pragma unroll
            for (int step = 0; step < D / 16; step++) {
                u32 a[SLABS][4], d[SLABS][4];
                #pragma unroll
                for (int m = 0; m < SLABS; m++) {
                    fragment<ROWS>(a[m], queries, (warp * SLABS + m) * 16, step);
                    fragment<ROWS>(d[m], outs, (warp * SLABS + m) * 16, step);
                }
                #pragma unroll
                for (int n = 0; n < SUB / 16; n++) {
                    u32 b[4];
                    fragment_right<KEYS>(b, keys, sub * SUB + n * 16, step);
                    #pragma unroll
                    for (int m = 0; m < SLABS; m++)
                        if (SLABS == 1 || on[m]) {
                            mma(s[m][2 * n], a[m], b[0], b[1]);
                            mma(s[m][2 * n + 1], a[m], b[2], b[3]);
                        }
                    fragment_right<KEYS>(b, values, sub * SUB + n * 16, step);
                    #pragma unroll
                    for (int m = 0; m < SLABS; m++)
                        if (SLABS == 1 || on[m]) {
                            mma(dp[m][2 * n], d[m], b[0], b[1]);
                            mma(dp[m][2 * n + 1], d[m], b[2], b[3]);
                        }
                }
            }
            u32 ds[SLABS][SUB / 16][4];
            #pragma unroll
            for (int m = 0; m < SLABS; m++) {
                if (SLABS > 1 && !on[m]) continue;
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    // with spans a row may have nothing, and then no shift
                    if (!SPAN && block * KEYS + sub * SUB + SUB - 1 > tokens[m][half]) {
                        #pragma unroll
                        for (int n = 0; n < SUB / 8; n++)
                            #pragma unroll
                            for (int e = 0; e < 2; e++)
                                if (block * KEYS + sub * SUB + n * 8 + lane % 4 * 2 + e > tokens[m][half]) s[m][n][2 * half + e] = NOTHING;
                    }
                    #pragma unroll
                    for (int n = 0; n < SUB / 8; n++) {
                        const int j = PER < KEYS ? (sub * SUB + n * 8) / PER : 0;
                        float out[2];
                        #pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const int key = block * KEYS + sub * SUB + n * 8 + lane % 4 * 2 + e;
                            const bool outside = SPAN && (key > tokens[m][half] || key < begins[m][half]);
                            const float r = outside ? 0.f : share_of(s[m][n][2 * half + e], factor, shift[m][half] - adds[m][half][j], powers).r;
                            out[e] = r * (dp[m][n][2 * half + e] - inner[m][half]);
                            summed[m][half][j] += out[e];
                        }
                        ds[m][n / 2][n % 2 * 2 + half] = pack(out[0], out[1]);
                    }
                }
            }
            #pragma unroll
            for (int step = 0; step < SUB / 16; step++)
                #pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    u32 b[4];
                    fragment_transposed<KEYS>(b, keys, sub * SUB + step * 16, n);
                    #pragma unroll
                    for (int m = 0; m < SLABS; m++)
                        if (SLABS == 1 || on[m]) {
                            mma(acc[m][2 * n], ds[m][step], b[0], b[1]);
                            mma(acc[m][2 * n + 1], ds[m][step], b[2], b[3]);
                        }
                }
        }
        #pragma unroll
        for (int m = 0; m < SLABS; m++) {
            const int slab = warp * SLABS + m;
            if (!LISTED || !dbias || !on[m]) continue;
            #pragma unroll
            for (int half = 0; half < 2; half++)
                #pragma unroll
                for (int j = 0; j < CHUNKS; j++) {
                    float sum = summed[m][half][j];
                    sum += __shfl_xor_sync(FULL, sum, 1);
                    if (CHUNK > 4) sum += __shfl_xor_sync(FULL, sum, 2);  // else a chunk is two lanes of the four
                    if (lane % (CHUNK > 4 ? 4 : 2) == 0) of_rows[warp][chunk_in_block(j)][lane / 4 + 8 * half] = sum;
                }
            __syncwarp();
            const int place = lane - m * slab_tokens;
            if (LANE_TOKENS && own.has && place >= 0 && place < slab_tokens) {
                float sum = 0;
                for (int h = 0; h < group; h++) sum += of_rows[warp][0][place * group + h];
                float* to = dbias + own.entry;
                *to = CHUNK > KEYS && block % 2 == 1 ? *to + sum : sum;  // as below
            }
            for (int e = lane; !LANE_TOKENS && e < slab_tokens * BLOCK_CHUNKS; e += 32) {
                const int token = first + slab * slab_tokens + e % slab_tokens, chunk = block * KEYS / CHUNK + e / slab_tokens;
                const int cell = token / 64 * chunks + chunk;
                const u64 bit = 1ull << (token & 63);
                if (token >= t || chunk >= chunks || !(cells[cell] & bit)) continue;
                float sum = 0;
                for (int h = 0; h < group; h++) sum += of_rows[warp][e / slab_tokens][e % slab_tokens * group + h];
                float* to = dbias + entries[cell] + __popcll(cells[cell] & (bit - 1));
                // a chunk of 128 tokens is two blocks of keys, which this warp meets in order
                *to = CHUNK > KEYS && block % 2 == 1 ? *to + sum : sum;
            }
            __syncwarp();
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
            if (place >= slab_tokens * group || token >= t) continue;
            const long long row = ((long long)batch * t + token) * heads + kv * group + place % group;
            #pragma unroll
            for (int n = 0; n < HEAD / 8; n++)
                *(float2*)(dq + row * HEAD + n * 8 + lane % 4 * 2) = make_float2(acc[m][n][2 * half] * scale, acc[m][n][2 * half + 1] * scale);
        }
}
