// Scores of a block's rows over all the summaries or windows that they may choose among, in shared memory, [rows, width]. A block has `slabs`
// slabs of 16 rows (token, head), 16 / group whole tokens each.
//
// D: head width in shared memory; HEAD: as it is, a multiple of 8; SQUARES: 1 where alpha is 1.5.

#define THREADS 256
#define WARPS 8
#define TILE 64
#define PANELS ((D + 63) / 64)
#define OPERAND (TILE * PANELS * 128)

struct Rows {
    int batch, kv, first, t, group, n, width, slabs;
    int add, stride;  // a token sees the first (token + add) / stride of them
    METHOD int slab_tokens() const { return 16 / group; }
    METHOD int tokens() const { return min(slabs * slab_tokens(), t - first); }
    METHOD int row_of(int token) const { return token / slab_tokens() * 16 + token % slab_tokens() * group; }
    METHOD int visible(int token) const { return token + add < 0 ? 0 : min(n, (token + add) / stride); }
    METHOD int most() const { return visible(first + tokens() - 1); }
};

INLINE Rows rows_of(int t, int kv_heads, int group, int n, int width, int slabs, int add, int stride) {
    Rows r = {(int)blockIdx.y / kv_heads, (int)blockIdx.y % kv_heads, 0, t, group, n, width, slabs, add, stride};
    r.first = (gridDim.x - 1 - blockIdx.x) * slabs * r.slab_tokens();
    return r;
}

// A shared-memory tile of summaries from `base` on; what is beyond them is zero.
INLINE void load_keys(u32 to, const bf16* kbar, const Rows& r, int kv_heads, int base) {
    load_tile<TILE, HEAD, THREADS>(to, kbar, [&](int i) {
        return base + i < r.n ? kbar + (((long long)r.batch * r.n + base + i) * kv_heads + r.kv) * HEAD : (const bf16*)0;
    });
    copy_commit();
    copy_wait<0>();
}

// scores [rows, width] = factor q . kbar, as far as a token of the block sees. `scratch` holds two operands.
INLINE void score(float* scores, u8* scratch, const bf16* q, const bf16* kbar, const Rows& r, int q_stride, int kv_heads, float factor) {
    const u32 queries = shared_address(scratch), keys = queries + OPERAND;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    load_tile<TILE, HEAD, THREADS>(queries, q, [&](int row) {
        const int in_slab = row % 16, token = r.first + row / 16 * r.slab_tokens() + in_slab / r.group;
        const bool valid = row < r.slabs * 16 && in_slab < r.slab_tokens() * r.group && token < r.t;
        return valid ? q + ((long long)r.batch * r.t + token) * q_stride + (r.kv * r.group + in_slab % r.group) * HEAD : (const bf16*)0;
    });
    const int most = r.most();
    for (int base = 0; base < most; base += TILE) {
        __syncthreads();  // the shared-memory tile before has been read
        load_keys(keys, kbar, r, kv_heads, base);
        __syncthreads();
        for (int part = warp; part < r.slabs * 4; part += WARPS) {
            const int slab = part / 4, column = part % 4 * 16;
            float s[2][4] = {};
            multiply<TILE, TILE, D>(s, queries, slab * 16, keys, column);
            #pragma unroll
            for (int n = 0; n < 2; n++)
                #pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int at = base + column + n * 8 + lane % 4 * 2 + e % 2;
                    if (at < r.width) scores[(slab * 16 + lane / 4 + e / 2 * 8) * r.width + at] = s[n][e] * factor;
                }
        }
    }
    __syncthreads();
}

INLINE float power(float u, float beta) { return SQUARES ? u * u : exp2_fast(beta * log2_fast(u)); }

// p of a score; everything that asks whether a chunk is in the support goes through here.
INLINE float weight(float z, float share, float tau, float beta) {
    const float u = fmaf(z, share, -tau);
    return u > 0.f ? power(u, beta) : 0.f;
}

// One token of one kv head: its cells, and the numbers of its entries.
struct Cells {
    const u64* words;  // of its tile, a word a chunk
    const u32* first;
    u64 bit;
    METHOD bool has(int chunk) const { return words[chunk] & bit; }
    METHOD u32 entry(int chunk) const { return first[chunk] + __popcll(words[chunk] & (bit - 1)); }
};
// Of four chunks, 32 apart from `c` on, as far as they are below `count`: whether the token has them, and their entries. What does not depend on
// each other is asked for together, because one number of an entry is three loads that follow one another. An entry that is not there is `none`.
struct Four { bool has[4]; u32 entry[4]; };
INLINE Four four_of(const Cells& at, int c, int count, u32 none) {
    u64 words[4];
    u32 first[4];
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        const int chunk = c + 32 * k;
        words[k] = chunk < count ? at.words[chunk] : 0;
        first[k] = chunk < count ? at.first[chunk] : 0;
    }
    Four all;
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        all.has[k] = words[k] & at.bit;
        all.entry[k] = all.has[k] ? first[k] + __popcll(words[k] & (at.bit - 1)) : none;
    }
    return all;
}
INLINE Cells cells_of(const u64* cells, const u32* first, int batch_head, int token, int t, int chunks) {
    const long long row = ((long long)batch_head * ceil_div(t, 64) + token / 64) * chunks;
    return {cells + row, first ? first + row : 0, 1ull << (token & 63)};
}
