// What the warps of wide_joint.cu do beside its loop over rows: turns, looking rows up and bringing them, adding to dq.

#define BATCH 64
#define LOADERS 2

// c [64, 64] = a^T b of two shared-memory tiles of 64 rows.
INLINE void product_of_transposed(float (&c)[32], u32 a, u32 b) {
    const u64 left = tile_descriptor_transposed(a, 8192), right = tile_descriptor_transposed(b, 8192);
    #pragma unroll
    for (int step = 0; step < 4; step++)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " R32 ", %32, %33, p, 1, 1, 1, 1;\n}"
            : C8(c, 0), C8(c, 8), C8(c, 16), C8(c, 24) : "l"(left + step * 128), "l"(right + step * 128), "r"(step > 0 ? 1 : 0));
}
// Four 8 x 8 matrices, as load4.
INLINE void store4(u32 at, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
// Adds floats of shared memory to those in memory; `bytes` is a multiple of 16.
INLINE void add_bulk(float* to, u32 from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
INLINE void add_bulk_join() { asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory"); }

// The tokens of tile `tile` that attend a chunk.
INLINE u64 attending(const u64* cells, int chunks, int t, int tile, int chunk) { return below_end(cells[tile * chunks + chunk], tile, t); }

// dq [numbers] += what the other chains added up, `rest` [chains - 1, numbers], in their order; four numbers a thread.
extern "C" __global__ void __launch_bounds__(256)
joint_sum(float4* __restrict__ dq, const float4* __restrict__ rest, long long fours, int chains) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= fours) return;
    float4 sum = dq[at];
    for (int chain = 1; chain < chains; chain++) {
        const float4 more = rest[(chain - 1) * fours + at];
        sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    dq[at] = sum;
}

// turns [pairs, tiles, chunks]: how many chunks of its chain before it a tile of tokens attends, `pairs` kv heads of sequences; a warp a tile.
extern "C" __global__ void __launch_bounds__(256)
joint_turns(const u64* __restrict__ all_cells, u32* __restrict__ turns, int rows, int t, int chunks, int chains) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, tiles = ceil_div(t, 64), tile = row % tiles;
    if (row >= rows) return;
    const u64* cells = all_cells + (long long)(row - tile) * chunks;
    const u32 chain = (FULL / ((1u << chains) - 1)) << lane % chains;  // its lanes: 32 is a multiple of `chains`
    u32 before = 0;
    for (int base = 0; base <= tile; base += 32) {
        const int chunk = base + lane;
        const u32 votes = chain & __ballot_sync(FULL, chunk <= tile && attending(cells, chunks, t, tile, chunk) != 0);
        if (chunk <= tile) turns[(long long)row * chunks + chunk] = before + __popc(votes & ((1u << lane) - 1));
        before += __popc(votes);
    }
}

// What the warps of a block hand on, of a slot of rows and of one of two pieces of dq.
struct Shared {
    u64 full[SLOTS], empty[SLOTS], ready[2], spent[2];
    float shifts[SLOTS][BATCH], inner[SLOTS][BATCH];
    int tokens[SLOTS][BATCH];
    u32 entries[SLOTS][BATCH], turns[SLOTS][BATCH];
    long long places[SLOTS][2][BATCH];  // where rows of q and of the output's gradient begin
    float sums[2][4][BATCH];            // of a row's ds, of each warp's keys
    int to[2][BATCH];
    u32 to_entries[2][BATCH], to_turns[2][BATCH];
    u32 number;
};

struct Block {
    int t, group, heads, chunks, batch, kv, pair, chunk, together, tiles, batches, total;
    const u64* cells;
    const u32 *before, *entries, *turns;
};

// A token that attends the chunk (-1 for none), its entry, twice how many chunks its tile of tokens attends before (and 1 where it is the tile's last
// token that attends this one), and the bias.
struct Token { int token; u32 entry, turn; float add; };
INLINE Token look_up(const Block& b, const float* bias, int i, int in) {
    const int place = i * b.together + in;
    Token found = {-1, 0, 0, 0.f};
    if (i >= b.batches || in >= b.together || place >= b.total) return found;
    int low = b.chunk, high = b.tiles - 1;  // the last tile with no more rows before it than `place`
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if ((int)b.before[middle] <= place) low = middle; else high = middle - 1;
    }
    const u64 bits = attending(b.cells, b.chunks, b.t, low, b.chunk);
    int rank = place - b.before[low], at = 0;
    #pragma unroll
    for (int width = 32; width > 0; width /= 2) {
        const int count = __popcll(bits >> at & ((1ull << width) - 1));
        if (rank >= count) { rank -= count; at += width; }
    }
    const int cell = low * b.chunks + b.chunk;
    found.token = low * 64 + at;
    found.entry = b.entries[cell] + __popcll(bits & ((1ull << at) - 1));
    found.turn = 2 * b.turns[cell] + (bits >> at == 1);
    if (bias) found.add = bias[found.entry] * LOG2E;
    return found;
}
// Tokens of a batch, a lane one (or two, with one head a kv head), become what a row has.
struct Row { int token; u32 entry, turn; float delta, shift; };
INLINE void look_up(Row (&rows)[2], const Block& b, const float* lse, const float* delta, const float* bias, int i) {
    const int lane = threadIdx.x % 32;
    const Token first = look_up(b, bias, i, lane);
    Token second = {-1, 0, 0, 0.f};
    if (b.together > 32) second = look_up(b, bias, i, lane + 32);
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = lane + 32 * half, in = r / b.group;
        const Token own = {__shfl_sync(FULL, first.token, in & 31), __shfl_sync(FULL, first.entry, in & 31),
                           __shfl_sync(FULL, first.turn, in & 31), __shfl_sync(FULL, first.add, in & 31)};
        const bool later = in >= 32;  // then it is r
        Row& row = rows[half];
        row.token = in >= b.together ? -1 : later ? second.token : own.token;
        row.entry = later ? second.entry : own.entry, row.turn = later ? second.turn : own.turn;
        row.delta = 0.f, row.shift = NOTHING;
        if (row.token < 0) continue;
        const long long line = ((long long)b.batch * b.t + row.token) * b.heads + b.kv * b.group + r % b.group;
        row.delta = delta[line];
        row.shift = (later ? second.add : own.add) - lse[line] * LOG2E;
    }
}

// By LOADERS warps, a batch each in turn.
INLINE void bring_rows(Shared& s, const Block& b, u32 slots, const bf16* q, const bf16* dout, const float* lse, const float* delta, const float* bias,
                       int q_stride) {
    const int first = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    Row rows[2];
    look_up(rows, b, lse, delta, bias, first);
    for (int i = first; i < b.batches; i += LOADERS) {
        const int slot = i % SLOTS, round = i / SLOTS;
        if (round > 0) barrier_wait(shared_address(s.empty + slot), (round - 1) & 1);
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = lane + 32 * half, token = rows[half].token, head = b.kv * b.group + r % b.group;
            const long long line = (long long)b.batch * b.t + token;
            s.tokens[slot][r] = token;
            s.entries[slot][r] = rows[half].entry;
            s.turns[slot][r] = rows[half].turn;
            s.places[slot][0][r] = token < 0 ? -1 : line * q_stride + head * HEAD;
            s.places[slot][1][r] = token < 0 ? -1 : (line * b.heads + head) * HEAD;
            s.inner[slot][r] = rows[half].delta;
            s.shifts[slot][r] = rows[half].shift;
        }
        __syncwarp();
        const u32 to = slots + slot * 2 * TILE;
        gather_by_warp(to, q, s.places[slot][0]);
        gather_by_warp(to + TILE, dout, s.places[slot][1]);
        copy_commit();
        look_up(rows, b, lse, delta, bias, i + LOADERS);  // the next batch's, while this one's rows come in
        copy_wait<0>();
        proxy_fence();
        barrier_arrive(shared_address(s.full + slot));
    }
}

// By two warps, a batch each in turn, a lane a token: the bias's gradient, and what the chunk adds to dq, when it is the tile's turn.
INLINE void add_rows(Shared& s, const Block& b, u32 pieces, float* dq, float* dbias, u32* done, int chains) {
    const int of = threadIdx.x / 32 - 4 - LOADERS, lane = threadIdx.x % 32;
    for (int i = of; i < b.batches; i += 2) {
        barrier_wait(shared_address(s.ready + of), i / 2 & 1);
        int token[2];
        u32 turn[2] = {}, same[2];
        #pragma unroll
        for (int u = 0; u < 2; u++) {
            const int place = lane + 32 * u, row = place * b.group;
            token[u] = place < b.together ? s.to[of][row] : -1;
            same[u] = __match_any_sync(FULL, token[u] < 0 ? -1 : token[u] / 64);
            if (token[u] >= 0) turn[u] = s.to_turns[of][row];
        }
        // the tokens of a tile go together; those of the next one need not have their turn yet
        bool before = i == 0, left[2] = {token[0] >= 0, token[1] >= 0};
        while (__any_sync(FULL, left[0] || left[1])) {
            bool last[2] = {};
            #pragma unroll
            for (int u = 0; u < 2; u++) {
                if (u == 1 && (b.together <= 32 || __any_sync(FULL, left[0]))) continue;  // a tile may have tokens in both
                const bool come = left[u] && acquire(done + token[u] / 64 * chains) >= turn[u] / 2;
                const u32 all = __ballot_sync(FULL, come);
                const bool now = come && (all & same[u]) == same[u];
                last[u] = now && turn[u] & 1;
                if (!now) continue;
                const long long line = ((long long)b.batch * b.t + token[u]) * b.heads + b.kv * b.group;
                add_bulk(dq + line * HEAD, pieces + of * 2 * TILE + (lane + 32 * u) * b.group * HEAD * 4, b.group * HEAD * 4);
                left[u] = false;
            }
            add_bulk_join();
            // a tile's first tokens may be in the batch before, of the other warp
            if (!before) barrier_wait(shared_address(s.spent + (of ^ 1)), (i - 1) / 2 & 1);
            before = true;
            __syncwarp();  // all lanes' sums are there
            #pragma unroll
            for (int u = 0; u < 2; u++)
                if (last[u]) release(done + token[u] / 64 * chains, turn[u] / 2 + 1);
        }
        #pragma unroll
        for (int u = 0; u < 2 && dbias; u++) {
            const int row = (lane + 32 * u) * b.group;
            if (token[u] < 0) continue;
            float sum = 0;
            for (int h = 0; h < b.group; h++)
                sum += s.sums[of][0][row + h] + s.sums[of][1][row + h] + (s.sums[of][2][row + h] + s.sums[of][3][row + h]);
            dbias[s.to_entries[of][row]] = sum;
        }
        barrier_arrive(shared_address(s.spent + of));
    }
}

// Sums over the warp's 16 keys of the 16 rows of which a lane has two keys' numbers each: lane l is left with rows 8 n + l % 4 * 2 and the next one,
// n = l / 4 with its three bits reversed.
INLINE void sum_keys(float (&x)[16]) {
    #pragma unroll
    for (int step = 0, left = 8; step < 3; step++, left /= 2) {
        const bool upper = threadIdx.x >> (4 - step) & 1;
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i >= left) continue;
            const float mine = upper ? x[i + left] : x[i], other = upper ? x[i] : x[i + left];
            x[i] = mine + __shfl_xor_sync(FULL, other, 16 >> step);
        }
    }
}

// A piece of dq [64, 64], rows HEAD wide. Rows that meet the same banks write their columns in different orders.
INLINE void write_piece(u8* piece, const float (&c)[32], float scale) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, turn = row & 3;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float x[16];
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int e = 0; e < 2; e++) x[2 * n + e] = c[4 * n + 2 * half + e] * scale;
        #pragma unroll
        for (int bit = 1; bit <= 2; bit *= 2)
            #pragma unroll
            for (int n = 0; n < 8; n++)
                #pragma unroll
                for (int e = 0; e < 2; e++)
                    if (!(n & bit)) {
                        const float a = x[2 * n + e], b = x[2 * (n + bit) + e];
                        x[2 * n + e] = turn & bit ? b : a;
                        x[2 * (n + bit) + e] = turn & bit ? a : b;
                    }
        #pragma unroll
        for (int n = 0; n < 8; n++)
            if ((n ^ turn) * 8 < HEAD)
                *(float2*)(piece + ((row + 8 * half) * HEAD + (n ^ turn) * 8 + lane % 4 * 2) * 4) = make_float2(x[2 * n], x[2 * n + 1]);
    }
}
