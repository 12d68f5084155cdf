// Scores of a block's rows over all the summaries or windows that they may choose among, in shared memory, [rows, width]. A block has `slabs`
// slabs of 16 rows (token, head), 16 / group whole tokens each. `width` is a multiple of 8.
//
// D: head width in shared memory; HEAD: as it is, a multiple of 8; SQUARES: 1 where alpha is 1.5.

#define THREADS 256
#define WARPS 8
#define TILE 64
#define PANELS ((D + 63) / 64)
#define OPERAND (TILE * PANELS * 128)
#define SCORES (3 * OPERAND)  // where scores begin in shared memory: behind the queries and two tiles of summaries

// x / d rounded down for 0 <= x < 2^22, from 1 / d: what is added is further from a whole quotient than the product's rounding.
INLINE int divided(int x, float inverse) { return (int)(((float)x + 0.5f) * inverse); }

struct Rows {
    int batch, kv, first, t, group, n, width, slabs;
    int add, stride;  // a token sees the first (token + add) / stride of them
    float per_group, per_slab;  // 1 / group, 1 / (tokens of a slab)
    METHOD int slab_tokens() const { return 16 / group; }
    METHOD int tokens() const { return min(slabs * slab_tokens(), t - first); }
    METHOD int row_of(int token) const {
        const int slab = divided(token, per_slab);
        return slab * 16 + (token - slab * slab_tokens()) * group;
    }
    METHOD int visible(int token) const { return token + add < 0 ? 0 : min(n, (token + add) / stride); }
    METHOD int most() const { return visible(first + tokens() - 1); }
};

INLINE Rows rows_of(int t, int kv_heads, int group, int n, int width, int slabs, int add, int stride) {
    Rows r = {(int)blockIdx.y / kv_heads, (int)blockIdx.y % kv_heads, 0, t, group, n, width, slabs, add, stride};
    r.per_group = 1.f / group;
    r.per_slab = 1.f / r.slab_tokens();
    r.first = (gridDim.x - 1 - blockIdx.x) * slabs * r.slab_tokens();
    return r;
}

// Asks for a shared-memory tile of summaries from `base` on; what is beyond them is zero.
INLINE void request_keys(u32 to, const bf16* kbar, const Rows& r, int kv_heads, int base) {
    load_tile<TILE, HEAD, THREADS>(to, kbar, [&](int i) {
        return base + i < r.n ? kbar + (((long long)r.batch * r.n + base + i) * kv_heads + r.kv) * HEAD : (const bf16*)0;
    });
    copy_commit();
}

// Calls use(base, tile) for the shared-memory tiles of summaries that the block sees, of which the first was asked for; the next is on its way
// meanwhile. All threads call it; it ends with what was written to shared memory before being there for all of them.
template <typename Use> INLINE void each_tile(u32 keys, const bf16* kbar, const Rows& r, int kv_heads, int most, Use use) {
    for (int i = 0; i * TILE < most; i++) {
        copy_wait<0>();
        __syncthreads();  // the tile is there for all, and the one before has been read
        if ((i + 1) * TILE < most) request_keys(keys + (i + 1) % 2 * OPERAND, kbar, r, kv_heads, (i + 1) * TILE);
        use(i * TILE, keys + i % 2 * OPERAND);
    }
    copy_wait<0>();
    __syncthreads();
}

// scores [rows, width] = factor q . kbar, as far as a token of the block sees. `scratch` holds three operands.
INLINE void score(float* scores, u8* scratch, const bf16* q, const bf16* kbar, const Rows& r, int q_stride, int kv_heads, float factor) {
    const u32 queries = shared_address(scratch), keys = queries + OPERAND;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    load_tile<TILE, HEAD, THREADS>(queries, q, [&](int row) {
        const int in_slab = row % 16, i = divided(in_slab, r.per_group), token = r.first + row / 16 * r.slab_tokens() + i;
        const bool valid = row < r.slabs * 16 && i < r.slab_tokens() && token < r.t;
        return valid ? q + ((long long)r.batch * r.t + token) * q_stride + (r.kv - i) * r.group * HEAD + in_slab * HEAD : (const bf16*)0;
    });
    const int most = r.most();
    request_keys(keys, kbar, r, kv_heads, 0);
    each_tile(keys, kbar, r, kv_heads, most, [&](int base, u32 tile) {
        for (int part = warp; part < r.slabs * 4; part += WARPS) {
            const int slab = part / 4, column = part % 4 * 16;
            if (base + column >= most) continue;
            float s[2][4] = {};
            multiply<TILE, TILE, D>(s, queries, slab * 16, tile, column);
            float* to = scores + (slab * 16 + lane / 4) * r.width + base + column + lane % 4 * 2;
            #pragma unroll
            for (int n = 0; n < 2; n++) {
                if (base + column + n * 8 >= r.width) break;
                *(float2*)(to + n * 8) = make_float2(s[n][0] * factor, s[n][1] * factor);
                *(float2*)(to + n * 8 + 8 * r.width) = make_float2(s[n][2] * factor, s[n][3] * factor);
            }
        }
    });
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
