// The query side on wgmma: a warpgroup has 64 rows: 64 / group whole tokens. With lists it meets every block of keys that one of its tokens attends.

#define ROWS 64

// The chunks of 64 keys, of `blocks`, that any of the tokens first .. end attends, ascending: how many. `list` has room for all; all threads call it.
INLINE int visited(unsigned short* list, const u64* cells, int chunks, int first, int end, int blocks) {
    __shared__ int counts[THREADS / 32];
    int total = 0;
    for (int base = 0; base < blocks; base += THREADS) {
        const int block = base + threadIdx.x;
        bool any = false;
        if (block < blocks)
            for (int tile = first / 64; tile * 64 < end; tile++) {
                const int low = first > tile * 64 ? first - tile * 64 : 0, high = end < tile * 64 + 64 ? end - tile * 64 : 64;
                const u64 below = high == 64 ? ~0ull : (1ull << high) - 1;
                any |= (cells[tile * chunks + block] & below & ~((1ull << low) - 1)) != 0;
            }
        const u32 votes = __ballot_sync(FULL, any);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        __syncthreads();
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        int before = total;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) before += counts[w];
            total += counts[w];
        }
        if (any) list[before + __popc(votes & ((1u << lane) - 1))] = (unsigned short)block;
    }
    __syncthreads();
    return total;
}

struct Sides {
    int batch, kv, heads, group, together, first, t, count;
    const u64* cells;
    const u32* entries;
    int chunks;
    unsigned short* list;
    METHOD int token(int row) const {  // of the block's rows, -1 for none
        const int in = row % ROWS, token = first + row / ROWS * together + in / group;
        return in < together * group && token < t ? token : -1;
    }
    METHOD long long place(int token, int row) const { return ((long long)batch * t + token) * heads + kv * group + row % ROWS % group; }
};

INLINE Sides sides(const u64* cells, const u32* entries, unsigned short* list, int t, int kv_heads, int group, int chunks) {
    Sides s;
    s.batch = blockIdx.y / kv_heads, s.kv = blockIdx.y % kv_heads, s.heads = kv_heads * group, s.group = group, s.t = t, s.chunks = chunks;
    s.together = ROWS / group;
    s.first = (gridDim.x - 1 - blockIdx.x) * GROUPS * s.together;  // the longest tiles first
    s.cells = cells + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    s.entries = entries + (long long)blockIdx.y * ceil_div(t, 64) * chunks;
    s.list = list;
    const int end = min(s.first + GROUPS * s.together, t), blocks = ceil_div(end, KEYS);
    s.count = LISTED ? visited(list, s.cells, chunks, s.first, end, blocks) : blocks;
    return s;
}

// By the warpgroups that multiply: their rows of a [b, t, heads, HEAD].
INLINE void load_own(u32 to, const bf16* from, const Sides& s, int stride) {
    for (int i = threadIdx.x % 128; i < ROWS * PANELS * 8; i += 128) {
        const int row = i / (PANELS * 8), piece = i % (PANELS * 8), own = threadIdx.x / 128, token = s.token(own * ROWS + row);
        const bool valid = token >= 0 && piece * 8 < HEAD;
        const bf16* at = from + ((long long)s.batch * s.t + token) * stride + (s.kv * s.group + row % s.group) * HEAD + piece * 8;
        copy16(to + own * TILE + piece / 8 * 8192 + swizzled(row, piece % 8), valid ? at : from, valid);
    }
}

// The keys and values of block i, by the copy engine, and what its rows add to their scores there (`bias` or minus infinity), by the warp of
// a slot.
INLINE void bring(int i, int slot, u32 slots, u64* full, float (*adds)[GROUPS * ROWS], int (*on)[GROUPS], const Map* k, const Map* v, const float* bias,
                  const Sides& s) {
    const int lane = threadIdx.x % 32, block = LISTED ? s.list[i] : i;
    if (lane == 0) {
        const u32 to = slots + slot * 2 * TILE, barrier = shared_address(full + slot);
        barrier_expect_only(barrier, 2 * TILE);
        #pragma unroll
        for (int panel = 0; panel < PANELS; panel++) {
            copy_box(to + panel * 8192, k, barrier, s.kv * HEAD + 64 * panel, block * KEYS, s.batch);
            copy_box(to + TILE + panel * 8192, v, barrier, s.kv * HEAD + 64 * panel, block * KEYS, s.batch);
        }
    }
    if (LISTED) {
        bool some[GROUPS] = {};
        #pragma unroll
        for (int part = 0; part < 2 * GROUPS; part++) {
            const int row = part * 32 + lane, token = s.token(row);
            float add = NOTHING;
            if (token >= 0) {
                const int cell = token / 64 * s.chunks + block;
                const u64 bits = s.cells[cell], bit = 1ull << (token & 63);
                if (bits & bit) add = bias ? bias[s.entries[cell] + __popcll(bits & (bit - 1))] * LOG2E : 0.f;
            }
            adds[slot][row] = add;
            some[part / 2] |= add != NOTHING;
        }
        #pragma unroll
        for (int of = 0; of < GROUPS; of++) {
            const bool any = __any_sync(FULL, some[of]);
            if (lane == 0) on[slot][of] = any;
        }
    }
    barrier_arrive(shared_address(full + slot));
}

// Walks the blocks that a warpgroup works on: waits for one, skips what none of its rows attends.
struct Walk {
    u64 *full, *empty;
    int (*on)[GROUPS];
    int count, own, last;  // of blocks; the warpgroup; its last token
    const unsigned short* list;
    // The next block from i on, below `limit`; or `limit`. A block that is held keeps its slot, so nobody may look SLOTS ahead of it.
    METHOD int next(int i, int limit) const {
        for (; i < limit; i++) {
            barrier_wait(shared_address(full + i % SLOTS), i / SLOTS & 1);
            if (LISTED ? on[i % SLOTS][own] : i * KEYS <= last) break;
            leave(i);
        }
        return i;
    }
    METHOD void leave(int i) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(empty + i % SLOTS));
    }
    METHOD int block(int i) const { return LISTED ? list[i] : i; }
};
