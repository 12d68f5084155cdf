// What attention's kernels share: shared-memory tiles, the ring that brings keys and values, who attends what, and a score's weight.
//
// D: head width in shared memory, 16, 32, 64 or 128; HEAD: as it is, a multiple of 8. LISTED: 1 where a bit matrix says who attends what;
// CHUNK: tokens of a chunk, 4 to 128 (read only where LISTED). SPAN: 1 where a query attends one range of keys (Reach); with neither, every
// key up to its own. POWER: what a row's scores become: 0 softmax, 1 entmax with alpha 1.5, 2 with any alpha. WARPS, SLABS: of a block, of a
// warp. SUB: keys whose scores exist at a time. `group`, the query heads of a kv head, is 1 to 16.
//
// Rows are (token, head of the group) pairs of one kv head. A warp has SLABS slabs of 16 rows, each of 16 / group whole tokens (the rest
// of the slab is empty), so that a fragment of keys or values serves all its slabs.

#define ROWS (WARPS * SLABS * 16)
#define KEYS 64
#define PANELS ((D + 63) / 64)
#define STAGE (KEYS * PANELS * 128)
#define MOST_SLOTS 16
// chunks of a block of keys; and those that a lane meets there, each PER columns apart: it has two keys in every eight
#define BLOCK_CHUNKS (CHUNK < KEYS ? KEYS / CHUNK : 1)
#define PER (CHUNK < 8 ? 8 : CHUNK)
#define CHUNKS (PER < KEYS ? KEYS / PER : 1)

// The lane's chunk number j of a block of keys, and of the sequence.
INLINE int chunk_in_block(int j) { return j * (PER / CHUNK) + (CHUNK < 8 ? threadIdx.x % 4 * 2 / CHUNK : 0); }
INLINE int chunk_at(int block, int j) { return block * KEYS / CHUNK + chunk_in_block(j); }

// The range of keys that a token attends: as many as `width` before `end`.
struct Reach {
    int add, stride, width;
    METHOD int end(int token) const { return !SPAN ? token + 1 : token + add < 0 ? 0 : (token + add) / stride; }
    METHOD int begin(int token) const { return !SPAN ? 0 : max(0, end(token) - width); }
    // the tokens that attend any of the keys first .. last: the first, and what is behind the last (or beyond the sequence)
    METHOD int first_token(int first) const { return !SPAN ? first : max(0, (first + 1) * stride - add); }
    METHOD int behind_token(int last, int t) const {
        return !SPAN ? t : (int)min((long long)t, max(0ll, ((long long)last + width + 1) * stride - add));
    }
};

// What a score becomes: p, its share of the row, and r, which p changes by: softmax p itself, entmax p^(2 - alpha).
// `shift` is lse in powers of two, less the bias, or the threshold of entmax; `factor` has the scale of scores and what entmax adds.
struct Share { float p, r; };
struct Powers { float p, r; };  // 1 / (alpha - 1), (2 - alpha) / (alpha - 1)
INLINE Share share_of(float score, float factor, float shift, Powers powers) {
    const float u = fmaf(score, factor, -shift);
    if (POWER == 0) {
        const float p = exp2_fast(u);
        return {p, p};
    }
    if (POWER == 1) {
        const float r = fmaxf(u, 0.f);
        return {r * r, r};
    }
    const float log = log2_fast(u);
    return {u > 0.f ? exp2_fast(powers.p * log) : 0.f, u > 0.f ? exp2_fast(powers.r * log) : 0.f};
}

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

// Empties the slots of a ring; the caller joins its threads.
INLINE void empty_slots(u64* full, u32* read, int slots) {
    if (threadIdx.x < slots) {
        barrier_init(shared_address(full + threadIdx.x), 1);
        read[threadIdx.x] = 0;
    }
    barrier_fence();
}

// The sum over the four lanes that have a row of a product.
INLINE float of_four(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

// What the listed row of `token` adds to its scores of chunk `chunk`, in powers of two: the bias, or minus infinity.
INLINE float bias_of(const u64* cells, const u32* first, const float* bias, int chunks, int token, int chunk) {
    if (chunk >= chunks) return NOTHING;
    const int cell = token / 64 * chunks + chunk;
    const u64 word = cells[cell], bit = 1ull << (token & 63);
    if (!(word & bit)) return NOTHING;
    return bias ? bias[first[cell] + __popcll(word & (bit - 1))] * LOG2E : 0.f;
}

// A block of keys is one chunk's: each lane looks up one token of its warp's slabs, a block ahead.
#define LANE_TOKENS (LISTED && CHUNK >= KEYS && SLABS <= 2)
struct Own { bool has; u32 entry; float add; };  // the token attends the chunk; its entry; the bias in powers of two, or minus infinity
INLINE Own own_of(const u64* cells, const u32* first, const float* bias, int t, int chunks, int token, int chunk) {
    Own own = {false, 0, NOTHING};
    if (token < 0 || chunk >= chunks) return own;
    const int cell = (blockIdx.y * ceil_div(t, 64) + token / 64) * chunks + chunk;  // of all kv heads; the host counts them in an int
    const u64 word = cells[cell], bit = 1ull << (token & 63);
    own.entry = first[cell] + __popcll(word & (bit - 1));
    own.has = word & bit;
    if (own.has) own.add = bias ? bias[own.entry] * LOG2E : 0.f;
    return own;
}

// The blocks of keys that a tile of tokens attends, ascending: how many. `list` has room for all.
INLINE int visited(unsigned short* list, int* scratch, const u64* cells, int chunks, int first, int end, int blocks) {
    int total = 0;
    for (int base = 0; base < blocks; base += WARPS * 32) {
        const int block = base + threadIdx.x;
        bool any = false;
        if (block < blocks) {
            for (int j = 0; j < BLOCK_CHUNKS; j++) {
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

// Rows of a tile of tokens from [b, t, heads, HEAD] into shared memory; what a slab or the sequence does not have is zero.
INLINE void load_rows(u32 to, const bf16* from, int batch, int kv, int first, int t, int group, int stride) {
    const int slab_tokens = 16 / group;
    load_tile<ROWS, HEAD, WARPS * 32>(to, from, [&](int row) {
        const int in_slab = row % 16, token = first + row / 16 * slab_tokens + in_slab / group;
        const bool valid = in_slab < slab_tokens * group && token < t;
        return valid ? from + ((long long)batch * t + token) * stride + (kv * group + in_slab % group) * HEAD : (const bf16*)0;
    });
}

// Scores and the gradients of weights: 16 rows of the shared-memory tiles `left` (scores) and `left_d` from `row` on, by SUB rows of `right` and `right_d`
// from `first` on. Queries and gradients of outputs are on one side, keys and values on the other.
template <int LEFT, int RIGHT>
INLINE void scores(float (&s)[SUB / 8][4], float (&dp)[SUB / 8][4], u32 left, u32 left_d, int row, u32 right, u32 right_d, int first) {
    #pragma unroll
    for (int step = 0; step < D / 16; step++) {
        u32 a[4], d[4];
        fragment<LEFT>(a, left, row, step);
        fragment<LEFT>(d, left_d, row, step);
        #pragma unroll
        for (int n = 0; n < SUB / 16; n++) {
            u32 b[4];
            fragment_right<RIGHT>(b, right, first + n * 16, step);
            mma(s[2 * n], a, b[0], b[1]);
            mma(s[2 * n + 1], a, b[2], b[3]);
            fragment_right<RIGHT>(b, right_d, first + n * 16, step);
            mma(dp[2 * n], d, b[0], b[1]);
            mma(dp[2 * n + 1], d, b[2], b[3]);
        }
    }
}
