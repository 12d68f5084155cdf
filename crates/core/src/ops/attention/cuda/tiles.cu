// What the query side's kernels share: tiles in shared memory, the ring that brings keys and values, and who attends what.
//
// D: head width, 32, 64 or 128. LISTED: 1 where a bit matrix says who attends what, 0 for dense attention. CHUNK: tokens of a chunk, 16,
// 32, 64 or 128 (read only where LISTED). WARPS, SLABS: of a block, of a warp. SUB: keys whose scores exist at a time. `group`, the query
// heads of a kv head, is 1 to 16.
//
// Rows are (token, head of the group) pairs of one kv head. A warp has SLABS slabs of 16 rows, each of 16 / group whole tokens (the rest
// of the slab is empty), so that a fragment of keys or values serves all its slabs.

#define ROWS (WARPS * SLABS * 16)
#define KEYS 64
#define PANELS ((D + 63) / 64)
#define CHUNKS (CHUNK < KEYS ? KEYS / CHUNK : 1)
#define STAGE (KEYS * PANELS * 128)
#define MOST_SLOTS 16
#define NOTHING (-__int_as_float(0x7f800000))

// Blocks of keys and values on their way through a ring of slots in shared memory. The copy engine fills a slot; the last warp that
// has read it asks for the next block, so that warps with little to do in a block run ahead of the others by the length of the ring.
struct Ring {
    u32 slots, full;   // addresses: 2 * STAGE bytes a slot, a barrier of 8 bytes a slot
    u32* read;         // warps that have read a slot, ever
    int length, slot;
    u32 parity;

    METHOD void load(const Map* k, const Map* v, int at, int column, int row, int batch) const {
        const u32 to = slots + at * 2 * STAGE, barrier = full + 8 * at;
        barrier_expect(barrier, 2 * STAGE);
        #pragma unroll
        for (int panel = 0; panel < PANELS; panel++) {
            copy_box(to + panel * KEYS * 128, k, barrier, column + 64 * panel, row, batch);
            copy_box(to + STAGE + panel * KEYS * 128, v, barrier, column + 64 * panel, row, batch);
        }
    }
    METHOD u32 wait() const {
        barrier_wait(full + 8 * slot, parity);
        return slots + slot * 2 * STAGE;
    }
    // This lane's warp has read the slot: whether it was the last.
    METHOD bool last() const { return arrive_counted(read + slot) % WARPS == WARPS - 1; }
    METHOD void next() {
        if (++slot == length) { slot = 0; parity ^= 1; }
    }
};

// What the listed row of `token` adds to its scores of chunk `chunk`, in powers of two: the bias, or minus infinity.
INLINE float bias_of(const u64* cells, const u32* first, const float* bias, int chunks, int token, int chunk) {
    if (chunk >= chunks) return NOTHING;
    const int cell = token / 64 * chunks + chunk;
    const u64 word = cells[cell], bit = 1ull << (token & 63);
    if (!(word & bit)) return NOTHING;
    return bias ? bias[first[cell] + __popcll(word & (bit - 1))] * LOG2E : 0.f;
}

// The blocks of keys that a tile of tokens attends, ascending: how many. `list` has room for all.
INLINE int visited(unsigned short* list, int* scratch, const u64* cells, int chunks, int first, int end, int blocks) {
    int total = 0;
    for (int base = 0; base < blocks; base += WARPS * 32) {
        const int block = base + threadIdx.x;
        bool any = false;
        if (block < blocks) {
            for (int j = 0; j < CHUNKS; j++) {
                const int chunk = block * KEYS / CHUNK + j;
                if (chunk >= chunks) break;
                for (int tile = first / 64; tile * 64 < end; tile++) {
                    const int low = first > tile * 64 ? first - tile * 64 : 0, high = end < tile * 64 + 64 ? end - tile * 64 : 64;
                    const u64 below = high == 64 ? ~0ull : (1ull << high) - 1;
                    any |= (cells[tile * chunks + chunk] & below & ~((1ull << low) - 1)) != 0;
                }
            }
        }
        const u32 votes = __ballot_sync(FULL, any);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        __syncthreads();
        if (lane == 0) scratch[warp] = __popc(votes);
        __syncthreads();
        int before = total;
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) before += scratch[w];
            total += scratch[w];
        }
        if (any) list[before + __popc(votes & ((1u << lane) - 1))] = (unsigned short)block;
    }
    __syncthreads();
    return total;
}

// Rows of a tile of tokens from [b, t, heads, d] into shared memory; what a slab or the sequence does not have is zero.
INLINE void load_rows(u32 to, const bf16* from, int batch, int kv, int first, int t, int group, int stride) {
    const int slab_tokens = 16 / group;
    for (int i = threadIdx.x; i < ROWS * PANELS * 8; i += WARPS * 32) {
        const int row = i / (PANELS * 8), piece = i % (PANELS * 8), in_slab = row % 16;
        const int token = first + row / 16 * slab_tokens + in_slab / group;
        const bool valid = in_slab < slab_tokens * group && token < t && piece * 8 < D;
        const long long at = ((long long)batch * t + token) * stride + (kv * group + in_slab % group) * D + piece * 8;
        copy16(to + piece / 8 * (ROWS * 128) + swizzled(row, piece % 8), from + (valid ? at : 0), valid);
    }
}

// Fragment of 16 rows (a) or of 16 keys (b) for one step of 16 along the head width.
INLINE void rows_fragment(u32 (&a)[4], u32 rows, int slab, int step) {
    const int lane = threadIdx.x % 32;
    load4(a, rows + step / 4 * (ROWS * 128) + swizzled(slab * 16 + lane % 16, step % 4 * 2 + lane / 16));
}
INLINE void keys_fragment(u32 (&b)[4], u32 keys, int first, int step) {
    const int lane = threadIdx.x % 32;
    load4(b, keys + step / 4 * (KEYS * 128) + swizzled(first + lane % 8 + lane / 16 * 8, step % 4 * 2 + lane / 8 % 2));
}
// Fragment of 16 columns of the head width for one step of 16 along the keys.
INLINE void values_fragment(u32 (&b)[4], u32 values, int first, int columns) {
    const int lane = threadIdx.x % 32;
    load4_transposed(b, values + columns / 4 * (KEYS * 128) + swizzled(first + lane % 16, columns % 4 * 2 + lane / 16));
}
