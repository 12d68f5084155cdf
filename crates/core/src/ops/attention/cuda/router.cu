// Routing: scores of the complete chunks before a token's own, alpha-entmax a head, w = mean over the group, and what follows from w.
// A block has `slabs` slabs of 16 rows (token, head), 16 / group whole tokens each; their scores lie in shared memory, [rows, width].
//
// The first pass (solve) finds the threshold of every row and sets the bits of the support; once the entries are numbered, the second
// (emit) writes w and bias of every entry. Both compute p = [(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1)) by the same expression from the same
// scores, so they agree on the support.
//
// D: head width; SQUARES: 1 where alpha is 1.5.

#define THREADS 256
#define WARPS 8
#define TILE 64
#define PANELS ((D + 63) / 64)
#define NOTHING (-__int_as_float(0x7f800000))

struct Rows {
    int batch, kv, first, t, group, n, chunk, width, slabs;
    METHOD int slab_tokens() const { return 16 / group; }
    METHOD int tokens() const { return min(slabs * slab_tokens(), t - first); }
    METHOD int row_of(int token) const { return token / slab_tokens() * 16 + token % slab_tokens() * group; }
};

// scores [rows, width] = factor q . kbar; beyond the complete chunks there is nothing to read.
INLINE void score(float* scores, u8* scratch, const bf16* q, const bf16* kbar, const Rows& r, int q_stride, int kv_heads, float factor) {
    const u32 queries = shared_address(scratch), keys = queries + r.slabs * 16 * PANELS * 128;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = r.slabs * 16;
    for (int i = threadIdx.x; i < rows * PANELS * 8; i += THREADS) {
        const int row = i / (PANELS * 8), piece = i % (PANELS * 8), in_slab = row % 16;
        const int token = r.first + row / 16 * r.slab_tokens() + in_slab / r.group;
        const bool valid = in_slab < r.slab_tokens() * r.group && token < r.t && piece * 8 < D;
        const long long at = ((long long)r.batch * r.t + token) * q_stride + (r.kv * r.group + in_slab % r.group) * D + piece * 8;
        copy16(queries + piece / 8 * (rows * 128) + swizzled(row, piece % 8), q + (valid ? at : 0), valid);
    }
    const int visible = min(r.n, (r.first + r.tokens() - 1) / r.chunk);
    for (int base = 0; base < visible; base += TILE) {
        __syncthreads();  // the tile before has been read
        for (int i = threadIdx.x; i < TILE * PANELS * 8; i += THREADS) {
            const int row = i / (PANELS * 8), piece = i % (PANELS * 8);
            const bool valid = base + row < r.n && piece * 8 < D;
            const long long at = (((long long)r.batch * r.n + base + row) * kv_heads + r.kv) * D + piece * 8;
            copy16(keys + piece / 8 * (TILE * 128) + swizzled(row, piece % 8), kbar + (valid ? at : 0), valid);
        }
        copy_commit();
        copy_wait<0>();
        __syncthreads();
        for (int part = warp; part < r.slabs * 4; part += WARPS) {
            const int slab = part / 4, column = part % 4 * 16;
            float s[2][4] = {};
            #pragma unroll
            for (int step = 0; step < D / 16; step++) {
                u32 a[4], b[4];
                load4(a, queries + step / 4 * (rows * 128) + swizzled(slab * 16 + lane % 16, step % 4 * 2 + lane / 16));
                load4(b, keys + step / 4 * (TILE * 128) + swizzled(column + lane % 8 + lane / 16 * 8, step % 4 * 2 + lane / 8 % 2));
                mma(s[0], a, b[0], b[1]);
                mma(s[1], a, b[2], b[3]);
            }
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

// p of a score; both passes go through here.
INLINE float weight(float z, float share, float tau, float beta) {
    const float u = fmaf(z, share, -tau);
    return u > 0.f ? power(u, beta) : 0.f;
}

// The threshold of a row of `count` scores, by Newton on the beta-norm from the left (as the op entmax); a warp takes a row.
INLINE float threshold(const float* z, int count, float alpha) {
    const int lane = threadIdx.x % 32;
    const float share = alpha - 1.f, beta = 1.f / share;
    float top = NOTHING;
    for (int c = lane; c < count; c += 32) top = larger(top, z[c]);
    top = warp_max(top);
    float tau = -1.f;
    for (int step = 0; step < 100; step++) {
        float low = 0, high = 0;
        for (int c = lane; c < count; c += 32) {
            const float u = (z[c] - top) * share - tau;
            if (u > 0.f) {
                const float below = SQUARES ? u : exp2_fast((beta - 1.f) * log2_fast(u));
                low += below;
                high += below * u;
            }
        }
        low = warp_sum(low);
        high = warp_sum(high);
        const float norm = SQUARES ? sqrtf(high) : exp2_fast(share * log2_fast(high));
        const float next = tau + (norm - 1.f) * (SQUARES ? norm : exp2_fast((beta - 1.f) * log2_fast(norm))) / low;
        if (!(next > tau) || next > 1.f) break;  // rounding ended the rise; the root lies below 0
        tau = next;
    }
    return tau + top * share;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
router_solve(const bf16* __restrict__ q, const bf16* __restrict__ kbar, float* __restrict__ taus, u64* __restrict__ cells, int t,
             int kv_heads, int group, int n, int chunk, int q_stride, int width, int slabs, float factor, float alpha) {
    extern __shared__ __align__(1024) u8 scratch[];
    float* scores = (float*)(scratch + (slabs * 16 + TILE) * PANELS * 128);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = ceil_div(t, chunk);
    Rows r = {(int)blockIdx.y / kv_heads, (int)blockIdx.y % kv_heads, 0, t, group, n, chunk, width, slabs};
    r.first = (gridDim.x - 1 - blockIdx.x) * slabs * r.slab_tokens();
    score(scores, scratch, q, kbar, r, q_stride, kv_heads, factor);
    const float share = alpha - 1.f, beta = 1.f / share;
    for (int i = warp; i < r.tokens(); i += WARPS) {
        const int token = r.first + i, own = token / chunk;
        float* rows = scores + r.row_of(i) * width;
        float* out = taus + ((long long)r.batch * t + token) * kv_heads * group + r.kv * group;
        for (int h = 0; h < group; h++) {
            const float tau = own > 0 ? threshold(rows + h * width, own, alpha) : 0.f;
            if (lane == 0) out[h] = tau;
            // the sum of the heads takes the place of the first one's scores
            for (int c = lane; c < own; c += 32) {
                const float p = weight(rows[h * width + c], share, tau, beta);
                rows[c] = h == 0 ? p : rows[c] + p;
            }
        }
        u64* to = cells + ((long long)blockIdx.y * ceil_div(t, 64) + token / 64) * chunks;
        const u64 bit = 1ull << (token & 63);
        for (int c = lane; c <= own; c += 32) if (c == own || rows[c] > 0.f) atomicOr(to + c, bit);
    }
}

// center: 0 nothing, 1 the mean of log w over the support. `own_bias`, a number a kv head, may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
router_emit(const bf16* __restrict__ q, const bf16* __restrict__ kbar, const float* __restrict__ taus, const u64* __restrict__ cells,
            const u32* __restrict__ first, const float* __restrict__ own_bias, float* __restrict__ weights, float* __restrict__ bias, int t,
            int kv_heads, int group, int n, int chunk, int q_stride, int width, int slabs, float factor, float alpha, float sigma, int center) {
    extern __shared__ __align__(1024) u8 scratch[];
    float* scores = (float*)(scratch + (slabs * 16 + TILE) * PANELS * 128);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = ceil_div(t, chunk);
    Rows r = {(int)blockIdx.y / kv_heads, (int)blockIdx.y % kv_heads, 0, t, group, n, chunk, width, slabs};
    r.first = (gridDim.x - 1 - blockIdx.x) * slabs * r.slab_tokens();
    score(scores, scratch, q, kbar, r, q_stride, kv_heads, factor);
    const float share = alpha - 1.f, beta = 1.f / share, each = 1.f / group;
    for (int i = warp; i < r.tokens(); i += WARPS) {
        const int token = r.first + i, own = token / chunk;
        float* rows = scores + r.row_of(i) * width;
        const float* tau = taus + ((long long)r.batch * t + token) * kv_heads * group + r.kv * group;
        float logs = 0, count = 0;
        for (int c = lane; c < own; c += 32) {
            float sum = 0;
            for (int h = 0; h < group; h++) sum += weight(rows[h * width + c], share, tau[h], beta);
            rows[c] = sum * each;
            if (sum > 0.f) {
                logs += logf(rows[c]);
                count += 1.f;
            }
        }
        logs = warp_sum(logs);
        count = warp_sum(count);
        const float mean = center && count > 0.f ? logs / count : 0.f;
        const long long row = ((long long)blockIdx.y * ceil_div(t, 64) + token / 64) * chunks;
        const u64 below = (1ull << (token & 63)) - 1;
        for (int c = lane; c <= own; c += 32) {
            if (c < own && !(rows[c] > 0.f)) continue;
            const u32 entry = first[row + c] + __popcll(cells[row + c] & below);
            weights[entry] = c == own ? 0.f : rows[c];
            bias[entry] = c == own ? (own_bias ? own_bias[r.kv] : 0.f) : (logf(rows[c]) - mean) / sigma;
        }
    }
}
