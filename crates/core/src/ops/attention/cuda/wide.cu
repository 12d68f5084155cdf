// Attention on wgmma: GROUPS warpgroups multiply, 64 rows (or 64 keys) each, and the four warps of another one bring what they need, 64 rows at a
// time, into a slot each. While one warpgroup has exponentials to compute the others multiply.
//
// D: head width in shared memory, 64 or 128; HEAD: as it is, a multiple of 8. LISTED: 1 where a bit matrix says who attends what, CHUNK tokens a
// chunk: 64. Else a query attends every key up to its own.

#define KEYS 64
#define PANELS ((D + 63) / 64)
#define TILE (64 * PANELS * 128)
#define SLOTS (GROUPS == 1 ? 3 : 4)
#define CONSUMERS (128 * GROUPS)
#define THREADS (CONSUMERS + 128)

// Of the registers that a block begins with (168 a thread with two groups, 128 with three, and with one, of which a multiprocessor has two blocks),
// those who bring give some to those who multiply.
#if GROUPS == 1
INLINE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 200;"); }
INLINE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 56;"); }
#elif GROUPS == 3
INLINE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 152;"); }
INLINE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 56;"); }
#else
INLINE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 224;"); }
INLINE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 56;"); }
#endif

// 64 rows of a shared-memory tile, by one warp: row i begins `places[i]` elements behind `from`, and is zero where that is negative.
INLINE void gather_by_warp(u32 to, const bf16* from, const long long* places) {
    constexpr int pieces = PANELS * 8, together = 32 / pieces;  // rows of one step; every eight rows the swizzle is the same again
    const int lane = threadIdx.x % 32, piece = lane % pieces, first = lane / pieces;
    const bf16* base = from + piece * 8;
    const bool inside = piece * 8 < HEAD;
    u32 at[8 / together];
    #pragma unroll
    for (int j = 0; j < 8 / together; j++) at[j] = to + piece / 8 * 8192 + swizzled(first + j * together, piece % 8);
    #pragma unroll 2
    for (int eight = 0; eight < 8; eight++)
        #pragma unroll
        for (int j = 0; j < 8 / together; j++) {
            const long long place = places[eight * 8 + j * together + first];
            copy16(at[j] + eight * 1024, place < 0 ? from : base + place, place >= 0 && inside);
        }
}

// Of a tile's 64 bits those of tokens below t.
INLINE u64 below_end(u64 bits, int tile, int t) { return t - tile * 64 < 64 ? bits & ((1ull << (t - tile * 64)) - 1) : bits; }

// Numbers of rows before each tile of tokens from the first on, and all of them, by a warp; word(tile) has a bit a row.
template <class Word> INLINE void count_rows(u32* before, int first, int tiles, const Word& word) {
    const int lane = threadIdx.x % 32;
    int total = 0;
    for (int c = first; c < tiles; c += 32) {
        const int own = c + lane < tiles ? __popcll(word(c + lane)) : 0;
        int sum = own;
        #pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            const int other = __shfl_up_sync(FULL, sum, o);
            if (lane >= o) sum += other;
        }
        if (c + lane < tiles) before[c + lane] = total + sum - own;
        total += __shfl_sync(FULL, sum, 31);
    }
    if (lane == 0) before[tiles] = total;
}

// What another block has written before it released `x` is there for whoever acquires it.
INLINE u32 acquire(const u32* at) {
    u32 x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
    return x;
}
INLINE void release(u32* at, u32 x) { asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(x) : "memory"); }

// Bytes that will complete on the barrier, without an arrival.
INLINE void barrier_expect_only(u32 barrier, int bytes) { asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"); }

// c [64, 64] = a b^T: both shared-memory tiles of 64 rows.
INLINE void product(float (&c)[32], u32 a, u32 b) {
    const u64 left = tile_descriptor(a), right = tile_descriptor(b);
    #pragma unroll
    for (int step = 0; step < D / 16; step++) {
        const int at = step / 4 * 512 + step % 4 * 2;
        wgmma64_ss(c, left + at, right + at, step > 0);
    }
}
// acc [64, D] += p b: p [64, 64] in registers, b a shared-memory tile of 64 rows.
INLINE void add_product(float (&acc)[PANELS][32], const u32 (&p)[4][4], u32 b) {
    const u64 right = tile_descriptor_transposed(b, 8192);
    #pragma unroll
    for (int step = 0; step < 4; step++)
        #pragma unroll
        for (int panel = 0; panel < PANELS; panel++)
            wgmma64_rs_transposed(acc[panel], p[step], right + panel * 512 + step * 128, 1);
}

// c [64, 64] = a b: a [64, 64] in registers, b a shared-memory tile of 64 rows of which D is 64: its transpose, or as it is.
INLINE void product_of_registers(float (&c)[32], const u32 (&a)[4][4], u32 b) {
    const u64 right = tile_descriptor(b);
    #pragma unroll
    for (int step = 0; step < 4; step++) wgmma64_rs(c, a[step], right + step * 2, step > 0);
}
INLINE void product_of_weights(float (&c)[32], const u32 (&p)[4][4], u32 b) {
    const u64 right = tile_descriptor_transposed(b, 8192);
    #pragma unroll
    for (int step = 0; step < 4; step++) wgmma64_rs_transposed(c, p[step], right + step * 128, step > 0);
}

// Joins the 128 threads of a warpgroup. No other barrier has this number.
INLINE void join_multipliers(int group_of) { asm volatile("bar.sync %0, 128;" ::"r"(group_of + 1) : "memory"); }
// By the 128 threads of a warpgroup: waits for what all of them copied, and makes it visible to wgmma.
INLINE void join_copies(int group_of) {
    copy_wait<0>();
    proxy_fence();
    join_multipliers(group_of);
}

// Empties the slots between the lanes that fill one and the `readers` arrivals of those who read it; the caller joins its threads. Of a warp that reads,
// one lane may arrive behind __syncwarp for all: what they have read is read. racecheck does not follow the others through __syncwarp and then names what
// is written into the slot next; in wide_joint, where every lane arrives, it names nothing (docs/log/cuda-attention.md).
INLINE void empty_slots(u64* full, u64* empty, int readers) {
    if (threadIdx.x < SLOTS) {
        barrier_init(shared_address(full + threadIdx.x), 32);
        barrier_init(shared_address(empty + threadIdx.x), readers);
    }
    barrier_fence();
}
