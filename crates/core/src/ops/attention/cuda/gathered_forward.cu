// Attention on wgmma, forward, of lists of chunks of 64 keys, heads 40 to 64 wide: a warpgroup has a tile of TOKENS tokens with GROUP query heads each and
// multiplies, chunk by chunk, only the rows that attend it, gathered 64 at a time. So few products are in vain, and keys and values are read from shared memory
// once for 64 rows. Between its chunks a row's maximum, sum and output lie in shared memory. Every row meets its chunks ascending.

#define HEIGHT (TOKENS * GROUP)  // rows of a tile

// What the rows of a block look up, of every slot and warpgroup: the rows of the tile that attend the chunk, and what they add to their scores there.
struct Attending {
    float adds[SLOTS][GROUPS][HEIGHT];
    u8 rows[SLOTS][GROUPS][HEIGHT];
    int counts[SLOTS][GROUPS];
};
static_assert(HEIGHT <= 256, "a row of a tile is a byte");

struct Tiles {
    int t, chunks, batch, kv, heads, first;
    const u64* cells;
    const u32* entries;
};

// The keys and values of a chunk, by the copy engine, and who attends it, by the warp of a slot that the `readers` have left `round` times.
INLINE void bring_chunk(Attending& a, const Tiles& s, int chunk, int slot, int round, u32 slots, u64* full, u64* empty, const Map* k, const Map* v, const float* bias) {
    constexpr int each = TOKENS / 32;  // tokens of a lane
    const int lane = threadIdx.x % 32;
    int rank[GROUPS][each], all[GROUPS];
    float add[GROUPS][each];
    #pragma unroll
    for (int own = 0; own < GROUPS; own++) {
        const int token = s.first + own * TOKENS, cell = token / 64 * s.chunks + chunk, shift = token % 64;
        const u64 whole = token < s.t ? below_end(s.cells[cell], token / 64, s.t) : 0;
        const u64 bits = whole >> shift & (TOKENS == 64 ? ~0ull : (1ull << TOKENS % 64) - 1);
        const u32 entry = token < s.t ? s.entries[cell] + __popcll(whole & ((1ull << shift) - 1)) : 0;
        all[own] = __popcll(bits);
        #pragma unroll
        for (int u = 0; u < each; u++) {
            const u64 bit = 1ull << (lane + 32 * u);
            rank[own][u] = bits & bit ? __popcll(bits & (bit - 1)) : -1;
            add[own][u] = rank[own][u] >= 0 && bias ? bias[entry + rank[own][u]] * LOG2E : 0.f;
        }
    }
    if (round > 0) barrier_wait(shared_address(empty + slot), (round - 1) & 1);
    if (lane == 0) {
        const u32 to = slots + slot * 2 * TILE, barrier = shared_address(full + slot);
        barrier_expect_only(barrier, 2 * TILE);
        copy_box(to, k, barrier, s.kv * HEAD, chunk * KEYS, s.batch);
        copy_box(to + TILE, v, barrier, s.kv * HEAD, chunk * KEYS, s.batch);
    }
    #pragma unroll
    for (int own = 0; own < GROUPS; own++) {
        if (lane == 0) a.counts[slot][own] = all[own] * GROUP;
        #pragma unroll
        for (int u = 0; u < each; u++)
            #pragma unroll
            for (int head = 0; head < GROUP; head++)
                if (rank[own][u] >= 0) {
                    a.rows[slot][own][rank[own][u] * GROUP + head] = (u8)((lane + 32 * u) * GROUP + head);
                    a.adds[slot][own][rank[own][u] * GROUP + head] = add[own][u];
                }
    }
    barrier_arrive(shared_address(full + slot));
}

// A batch of a warpgroup: 64 rows, from 64 `part` on, of the `rows` that attend chunk number i of the block's list, which lies in a slot.
struct Batch {
    int i, slot;
    u32 parity;
    int part, rows;
    METHOD bool more() const { return (part + 1) * 64 < rows; }  // the chunk has another one
    METHOD void next_chunk() {
        i++, part = 0;
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
};

// Where the four numbers of lane `c` of a row's four, of its columns 16 j + 2 c and 16 j + 8 + 2 c and what follows each, lie in the tile of outputs: rows side
// by side use different halves of the banks.
INLINE float4* output_at(float4* outs, int row, int j, int c) { return outs + row * 16 + ((j ^ row) & 1) * 4 + c + j / 2 * 8; }

// Above 60 lines: the warps that load and the warpgroups that compute are the two branches of one kernel, which meet at its barriers.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gathered_forward(const bf16* __restrict__ q, const __grid_constant__ Map k, const __grid_constant__ Map v, bf16* __restrict__ o, float* __restrict__ lse,
                 const u64* __restrict__ all_cells, const u32* __restrict__ all_first, const float* __restrict__ bias, int t, int kv_heads, int q_stride,
                 int chunks, float scale) {
    extern __shared__ __align__(1024) u8 scratch[];
    __shared__ u64 full[SLOTS], empty[SLOTS];
    __shared__ Attending attending;
    __shared__ float2 states[GROUPS][HEIGHT];  // of a row: its maximum so far, in powers of two, and the sum of its weights over that of it
    u8* outputs = scratch + GROUPS * HEIGHT * 128;
    const u32 slots = shared_address(outputs + GROUPS * HEIGHT * 256);
    unsigned short* list = (unsigned short*)(outputs + GROUPS * HEIGHT * 256 + SLOTS * 2 * TILE);
    const int lane = threadIdx.x % 32;
    Tiles s;
    s.t = t, s.chunks = chunks, s.batch = blockIdx.y / kv_heads, s.kv = blockIdx.y % kv_heads, s.heads = kv_heads * GROUP;
    s.first = (gridDim.x - 1 - blockIdx.x) * GROUPS * TOKENS;  // the longest tiles first
    s.cells = all_cells + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    s.entries = all_first + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    const int own = threadIdx.x / 128, first = s.first + own * TOKENS;
    if (threadIdx.x < CONSUMERS) {
        const u32 to = shared_address(scratch) + own * HEIGHT * 128;
        for (int i = threadIdx.x % 128; i < HEIGHT * 8; i += 128) {
            const int row = i / 8, piece = i % 8, token = first + row / GROUP;
            const bool valid = token < t && piece * 8 < HEAD;
            const bf16* at = q + ((long long)s.batch * t + token) * q_stride + (s.kv * GROUP + row % GROUP) * HEAD + piece * 8;
            copy16(to + swizzled(row, piece), valid ? at : q, valid);
        }
        copy_commit();
        for (int i = threadIdx.x % 128; i < HEIGHT * 16; i += 128) ((float4*)(outputs + own * HEIGHT * 256))[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int i = threadIdx.x % 128; i < HEIGHT; i += 128) states[own][i] = make_float2(NOTHING, 0.f);
    }
    empty_slots(full, empty, CONSUMERS);
    const int end = min(s.first + GROUPS * TOKENS, t), count = visited(list, s.cells, chunks, s.first, end, ceil_div(end, KEYS));
    if (threadIdx.x >= CONSUMERS) {
        fewer_registers();
        const int slot = threadIdx.x / 32 - 4 * GROUPS;
        for (int i = slot, round = 0; i < count; i += SLOTS, round++) bring_chunk(attending, s, list[i], slot, round, slots, full, empty, &k, &v, bias);
    } else {
        more_registers();
        join_copies(own);
        const int warp = threadIdx.x / 32 % 4, row0 = warp * 16 + lane / 4;
        const u32 queries = shared_address(scratch) + own * HEIGHT * 128;
        float4* outs = (float4*)(outputs + own * HEIGHT * 256);
        const float factor = scale * LOG2E;
        float acc[32], x[32], tops[2], sums[2], shrink[2];
        float4 old[2][4];
        u32 p[4][4], a[4][4];
        // of the lane's two rows of the batch that is worked on: their place in the tile, or -1, and what they add to their scores; and of the next one
        int rows[2], next_rows[2];
        float adds[2], next_adds[2];
        const auto leave = [&](int slot) { barrier_arrive(shared_address(empty + slot)); };
        // waits for the first chunk from batch.i on, below `limit`, that has rows. A chunk that is held keeps its slot, so nobody may look SLOTS ahead of it
        const auto seek = [&](Batch& batch, int limit) {
            for (; batch.i < limit; batch.next_chunk()) {
                barrier_wait(shared_address(full + batch.slot), batch.parity);
                batch.rows = attending.counts[batch.slot][own];
                if (batch.rows > 0) return true;
                leave(batch.slot);
            }
            return false;
        };
        // looks up a batch's rows and asks for their scores
        const auto ask = [&](const Batch& batch) {
            const u8* of = attending.rows[batch.slot][own] + batch.part * 64;
            const float* of_adds = attending.adds[batch.slot][own] + batch.part * 64;
            const int left = batch.rows - batch.part * 64, row = warp * 16 + lane % 16 < left ? of[warp * 16 + lane % 16] : 0;
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const bool valid = row0 + 8 * half < left;
                next_rows[half] = valid ? of[row0 + 8 * half] : -1;
                next_adds[half] = valid ? of_adds[row0 + 8 * half] : NOTHING;
            }
            #pragma unroll
            for (int step = 0; step < 4; step++) load4(a[step], queries + swizzled(row, 2 * step + lane / 16));
            wgmma_fence();
            product_of_registers(x, a, slots + batch.slot * 2 * TILE);
            wgmma_commit();
        };
        // x: these scores to p, and what the rows' outputs so far shrink by
        const auto soften = [&](int key0) {
            float2 before[2];
            #pragma unroll
            for (int half = 0; half < 2; half++) before[half] = rows[half] >= 0 ? states[own][rows[half]] : make_float2(NOTHING, 0.f);
            if (key0 + KEYS > first) {
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int token = rows[half] >= 0 ? first + rows[half] / GROUP : t;
                    #pragma unroll
                    for (int n = 0; n < 8; n++)
                        #pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (key0 + n * 8 + lane % 4 * 2 + e > token) x[n * 4 + 2 * half + e] = NOTHING;
                }
            }
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float even = NOTHING, odd = NOTHING;
                #pragma unroll
                for (int n = 0; n < 8; n++) even = fmaxf(even, x[n * 4 + 2 * half]), odd = fmaxf(odd, x[n * 4 + 2 * half + 1]);
                float most = fmaxf(even, odd);
                most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
                most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
                tops[half] = fmaxf(before[half].x, most * factor + adds[half]);
            }
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const float base = tops[half] == NOTHING ? 0.f : tops[half], shift = adds[half] - base;
                shrink[half] = exp2_fast(before[half].x - base);
                float even = 0, odd = 0;
                #pragma unroll
                for (int n = 0; n < 8; n++) {
                    const float p0 = exp2_fast(fmaf(x[n * 4 + 2 * half], factor, shift)), p1 = exp2_fast(fmaf(x[n * 4 + 2 * half + 1], factor, shift));
                    even += p0;
                    odd += p1;
                    p[n / 2][n % 2 * 2 + half] = pack(p0, p1);
                }
                sums[half] = before[half].y * shrink[half] * 0.25f + (even + odd);  // a quarter of what was a lane
            }
        };
        const auto take_outputs = [&](int half) {
            #pragma unroll
            for (int j = 0; j < 4; j++) old[half][j] = *output_at(outs, max(rows[half], 0), j, lane % 4);
        };
        // what the rows leave for their next chunk: first what does not wait for p v
        const auto leave_states = [&] {
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                sums[half] += __shfl_xor_sync(FULL, sums[half], 1);
                sums[half] += __shfl_xor_sync(FULL, sums[half], 2);
                if (rows[half] >= 0 && lane % 4 == 0) states[own][rows[half]] = make_float2(tops[half], sums[half]);
            }
        };
        const auto leave_outputs = [&] {
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                if (rows[half] < 0) continue;
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float4 was = old[half][j];
                    const float* left = acc + 8 * j + 2 * half;
                    const float* right = left + 4;
                    const float by = shrink[half];
                    *output_at(outs, rows[half], j, lane % 4) =
                        make_float4(fmaf(was.x, by, left[0]), fmaf(was.y, by, left[1]), fmaf(was.z, by, right[0]), fmaf(was.w, by, right[1]));
                }
            }
        };
        constexpr bool roomy = GROUPS < 3;  // three warpgroups have fewer registers each
        Batch next = {0, 0, 0, 0, 0};
        bool fresh = true;  // no scores are on their way
        for (bool any = seek(next, count); any;) {
            if (fresh) {
                ask(next);
                wgmma_wait<0>();
            }
            const Batch batch = next;
            #pragma unroll
            for (int half = 0; half < 2; half++) rows[half] = next_rows[half], adds[half] = next_adds[half];
            join_multipliers(own);  // what the rows before these have left is there
            if (!roomy || warp * 16 < batch.rows - batch.part * 64) soften(list[batch.i] * KEYS);  // else the warp has none of the rows
            wgmma_fence();
            product_of_weights(acc, p, slots + batch.slot * 2 * TILE + TILE);
            wgmma_commit();
            take_outputs(0);
            if (roomy) take_outputs(1);
            leave_states();
            const int limit = min(count, batch.i + SLOTS);
            fresh = false;
            if (batch.more()) {
                next.part++;
            } else {
                next.next_chunk();
                fresh = !seek(next, limit);
            }
            if (!fresh) {
                ask(next);
                wgmma_wait<1>();
                if (!roomy) take_outputs(1);
                leave_outputs();
                wgmma_wait<0>();
                if (!batch.more()) leave(batch.slot);
            } else {
                wgmma_wait<0>();
                if (!roomy) take_outputs(1);
                leave_outputs();
                leave(batch.slot);
                any = seek(next, count);
            }
        }
        join_multipliers(own);
        for (int row = threadIdx.x % 128 / 4; row < HEIGHT; row += 32) {
            const int token = first + row / GROUP, c = lane % 4;
            if (token >= t) break;
            const float2 state = states[own][row];
            const float inverse = state.y > 0.f ? 1.f / state.y : 0.f;  // a list may be empty
            const long long place = ((long long)s.batch * t + token) * s.heads + s.kv * GROUP + row % GROUP;
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                const float4 out = *output_at(outs, row, j, c);
                bf16* at = o + place * HEAD + 16 * j + 2 * c;
                if (16 * j < HEAD) *(u32*)at = pack(out.x * inverse, out.y * inverse);
                if (16 * j + 8 < HEAD) *(u32*)(at + 8) = pack(out.z * inverse, out.w * inverse);
            }
            if (c == 0) lse[place] = (state.x + log2_fast(state.y)) * (1.f / LOG2E);
        }
    }
}
