// Routing: scores of the complete chunks before a token's own, alpha-entmax a head, w = mean over the group, and what follows from w; and
// the choices of a fixed number of chunks.
//
// Entmax has two passes. The first (solve) finds the threshold of every row and sets the bits of the support; once the entries are numbered,
// the second (emit) writes w and bias of every entry. Both compute p = [(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1)) by the same expression from
// the same scores, so they agree on the support.

// Sum and largest of eight neighbouring lanes.
INLINE float eight_sum(float x) {
    #pragma unroll
    for (int o = 4; o > 0; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
    return x;
}
INLINE float eight_max(float x) {
    #pragma unroll
    for (int o = 4; o > 0; o >>= 1) x = larger(x, __shfl_xor_sync(FULL, x, o));
    return x;
}

// The thresholds of four rows of `count` scores, a row for eight lanes, by Newton on the beta-norm from the left (as the op entmax): the steps of a row
// wait for each other's sums, so a warp has four rows on their way. `open` has a word of the lane's for every 256 scores of a row: which may be
// in the support. The threshold only rises, so what lies below it never comes back; MARGIN is more than it may be off by. All lanes call it; a row
// without scores has 0.
#define MARGIN 1e-3f
// What a step leaves is of the order of its square, so after one this small nothing is left that f32 holds.
#define ENOUGH 1e-5f
INLINE float threshold(const float* z, int count, float alpha, u32* open) {
    const int lane = threadIdx.x % 8, words = ceil_div(count, 256);
    const float share = alpha - 1.f, beta = 1.f / share;
    float top = NOTHING;
    #pragma unroll 4
    for (int c = lane; c < count; c += 8) top = fmaxf(top, z[c]);
    top = eight_max(top);
    float tau = -1.f;
    for (int w = 0; w < words; w++) {
        u32 bits = 0;
        #pragma unroll 4
        for (int c = w * 256 + lane, bit = 1; c < min(count, w * 256 + 256); c += 8, bit <<= 1)
            if ((z[c] - top) * share - tau > -MARGIN) bits |= bit;
        open[w * THREADS] = bits;
    }
    bool rising = count > 0;
    for (int step = 0; step < 100 && __any_sync(FULL, rising); step++) {
        float low = 0, high = 0;
        for (int w = 0; w < (rising ? words : 0); w++) {
            u32 bits = open[w * THREADS];
            for (u32 left = bits; left;) {
                const int k = 31 - __clz(left);
                left ^= 1u << k;
                const float u = (z[w * 256 + k * 8 + lane] - top) * share - tau;
                if (u > 0.f) {
                    const float below = SQUARES ? u : exp2_fast((beta - 1.f) * log2_fast(u));
                    low += below;
                    high += below * u;
                } else if (u < -MARGIN) bits ^= 1u << k;
            }
            open[w * THREADS] = bits;
        }
        low = eight_sum(low);
        high = eight_sum(high);
        const float norm = SQUARES ? sqrtf(high) : exp2_fast(share * log2_fast(high));
        const float next = tau + (norm - 1.f) * (SQUARES ? norm : exp2_fast((beta - 1.f) * log2_fast(norm))) / low;
        const float rise = next - tau;
        rising &= rise > 0.f && next <= 1.f;  // rounding ended the rise; the root lies below 0
        if (rising) tau = next;
        rising &= rise > ENOUGH;
    }
    return count > 0 ? tau + top * share : 0.f;
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
router_solve(const bf16* __restrict__ q, const bf16* __restrict__ kbar, float* __restrict__ taus, u64* __restrict__ cells, int t,
             int kv_heads, int group, int n, int chunk, int q_stride, int width, int slabs, float factor, float alpha) {
    extern __shared__ __align__(1024) u8 scratch[];
    float* scores = (float*)(scratch + SCORES);
    u32* open = (u32*)(scores + slabs * 16 * width) + threadIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Rows r = rows_of(t, kv_heads, group, n, width, slabs, 0, chunk);
    score(scores, scratch, q, kbar, r, q_stride, kv_heads, factor);
    const float share = alpha - 1.f, beta = 1.f / share, per_chunk = 1.f / chunk;
    const int all = r.tokens() * group;
    for (int base = warp * 4; base < all; base += WARPS * 4) {
        const int row = base + lane / 8, i = divided(row, r.per_group), h = row - i * group, token = r.first + i;
        const int own = row < all ? divided(token, per_chunk) : 0;
        const float* z = scores + (r.row_of(i) + h) * width;
        const float tau = threshold(z, own, alpha, open);
        if (row >= all) continue;
        const Cells to = cells_of(cells, 0, blockIdx.y, token, t, ceil_div(t, chunk));
        if (lane % 8 == 0) {
            taus[((long long)r.batch * t + token) * kv_heads * group + r.kv * group + h] = tau;
            if (h == 0) atomicOr((u64*)to.words + own, to.bit);
        }
        // the support of the group is what any head has in its own
        for (int w = 0; w * 256 < own; w++)
            for (u32 left = open[w * THREADS]; left;) {
                const int k = 31 - __clz(left), c = w * 256 + k * 8 + lane % 8;
                left ^= 1u << k;
                if (weight(z[c], share, tau, beta) > 0.f) atomicOr((u64*)to.words + c, to.bit);
            }
    }
}

// center: 0 nothing, 1 the mean of log w over the support. `own_bias`, a number a kv head, may be null. `heads`, p of every head of an entry,
// is written where it is not null; `weights` and `bias` where they are not. Where a block has fewer tokens than warps, several share a token.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
router_emit(const bf16* __restrict__ q, const bf16* __restrict__ kbar, const float* __restrict__ taus, const u64* __restrict__ cells,
            const u32* __restrict__ first, const float* __restrict__ own_bias, float* __restrict__ weights, float* __restrict__ bias,
            float* __restrict__ heads, int t, int kv_heads, int group, int n, int chunk, int q_stride, int width, int slabs, float factor,
            float alpha, float sigma, int center) {
    extern __shared__ __align__(1024) u8 scratch[];
    __shared__ float found[64];  // thresholds of the block's rows
    float* scores = (float*)(scratch + SCORES);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Rows r = rows_of(t, kv_heads, group, n, width, slabs, 0, chunk);
    const int tokens = r.tokens(), sharing = max(1, WARPS / tokens), part = warp % sharing;
    if (threadIdx.x < tokens * group) {
        const int i = divided(threadIdx.x, r.per_group);
        found[threadIdx.x] = taus[((long long)r.batch * t + r.first + i) * kv_heads * group + (r.kv - i) * group + threadIdx.x];
    }
    score(scores, scratch, q, kbar, r, q_stride, kv_heads, factor);
    const float share = alpha - 1.f, beta = 1.f / share, each = 1.f / group, inverse = 1.f / sigma;
    const float of_own = own_bias ? own_bias[r.kv] : 0.f;
    for (int i = warp / sharing; i < tokens; i += WARPS / sharing) {
        const int token = r.first + i, own = token / chunk;
        const float* rows = scores + r.row_of(i) * width;
        const float* tau = found + i * group;
        const Cells at = cells_of(cells, first, blockIdx.y, token, t, ceil_div(t, chunk));
        const auto mean_weight = [&](int c) {
            float sum = 0;
            for (int h = 0; h < group; h++) sum += weight(rows[h * width + c], share, tau[h], beta);
            return sum * each;
        };
        float mean = 0;
        if (center) {
            float logs = 0, count = 0;
            for (int c = lane; c < own; c += 32) {
                if (!at.has(c)) continue;
                logs += logf(mean_weight(c));
                count += 1.f;
            }
            logs = warp_sum(logs);
            count = warp_sum(count);
            mean = count > 0.f ? logs / count : 0.f;
        }
        for (int base = lane + part * 128; base <= own; base += 128 * sharing) {
            const Four four = four_of(at, base, own + 1, 0);
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                if (!four.has[k]) continue;
                const int c = base + 32 * k;
                const u32 entry = four.entry[k];
                const float w = c == own ? 0.f : mean_weight(c);
                if (weights) weights[entry] = w;
                if (bias) bias[entry] = c == own ? of_own : (logf(w) - mean) * inverse;
                if (heads)
                    for (int h = 0; h < group; h++)
                        heads[(long long)entry * group + h] = c == own ? 0.f : weight(rows[h * width + c], share, tau[h], beta);
            }
        }
    }
}

// w and bias = log w of the listed chunks before a query's own, whoever chose them: w is the mean over the group of softmax over their scores;
// both are 0 for the own chunk. `heads`, p of every head of an entry, is written where it is not null.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
router_listed(const bf16* __restrict__ q, const bf16* __restrict__ kbar, const u64* __restrict__ cells, const u32* __restrict__ first,
              float* __restrict__ weights, float* __restrict__ bias, float* __restrict__ heads, int t, int kv_heads, int group, int n,
              int chunk, int q_stride, int width, int slabs, float factor, float least) {
    extern __shared__ __align__(1024) u8 scratch[];
    float* scores = (float*)(scratch + SCORES);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Rows r = rows_of(t, kv_heads, group, n, width, slabs, 0, chunk);
    score(scores, scratch, q, kbar, r, q_stride, kv_heads, factor);
    for (int i = warp; i < r.tokens(); i += WARPS) {
        const int token = r.first + i, own = token / chunk;
        float* rows = scores + r.row_of(i) * width;
        const Cells at = cells_of(cells, first, blockIdx.y, token, t, ceil_div(t, chunk));
        for (int h = 0; h < group; h++) {
            const float* z = rows + h * width;
            float top = NOTHING, sum = 0;
            for (int c = lane; c < own; c += 32) if (at.has(c)) top = larger(top, z[c]);
            top = warp_max(top);
            for (int c = lane; c < own; c += 32) if (at.has(c)) sum += expf(z[c] - top);
            sum = warp_sum(sum);
            // the sum of the heads takes the place of the first one's scores
            for (int c = lane; c < own; c += 32) {
                if (!at.has(c)) continue;
                const float p = expf(z[c] - top) / sum;
                if (heads) heads[(long long)at.entry(c) * group + h] = p;
                rows[c] = h == 0 ? p : rows[c] + p;
            }
        }
        for (int c = lane; c <= own; c += 32) {
            if (!at.has(c)) continue;
            const u32 entry = at.entry(c);
            const float w = c == own ? 0.f : rows[c] / group;
            weights[entry] = w;
            bias[entry] = c == own ? 0.f : logf(larger(w, least));
            if (heads && c == own) for (int h = 0; h < group; h++) heads[(long long)entry * group + h] = 0.f;
        }
    }
}

// Warps that share the numbers of a token, where a block has fewer tokens than warps: of tokens `token`, `token + tokens`, .. a thread takes numbers
// `first`, `first + step`, ..
struct Team {
    int token, tokens, first, step;
    METHOD Team(int of_block) {
        const int warp = threadIdx.x / 32, members = max(1, WARPS / of_block);  // 1, 2, 4 or 8 of 8
        tokens = WARPS / members, token = warp % tokens, step = 32 * members, first = warp / tokens * 32 + threadIdx.x % 32;
    }
};

// Softmax of every row over its first `count(token)` scores, in their place, a warp a row; then of each token the sum of its heads, in the place of
// the first one's. All threads of the block call it, and find it there for all of them.
template <typename Count> INLINE void sums_of_softmax(float* scores, const Rows& r, int width, int group, Count count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = warp; i < r.tokens() * group; i += WARPS) {
        const int end = count(r.first + i / group);
        float* z = scores + (r.row_of(i / group) + i % group) * width;
        float top = NOTHING, sum = 0;
        for (int c = lane; c < end; c += 32) top = larger(top, z[c]);
        top = warp_max(top);
        for (int c = lane; c < end; c += 32) sum += z[c] = expf(z[c] - top);
        sum = warp_sum(sum);
        for (int c = lane; c < end; c += 32) z[c] /= sum;
    }
    __syncthreads();
    const Team team(r.tokens());
    for (int i = team.token; i < r.tokens(); i += team.tokens) {
        float* rows = scores + r.row_of(i) * width;
        for (int c = team.first; c < count(r.first + i); c += team.step) {
            float sum = rows[c];
            for (int h = 1; h < group; h++) sum += rows[h * width + c];
            rows[c] = sum;
        }
    }
    __syncthreads();
}

// Calls mark(c) for the `wanted` largest of the numbers x[c], none below zero, of those c below `count` that are open(c); ties go to the lower c.
template <typename Open, typename Mark> INLINE void largest(const float* x, int count, int wanted, Open open, Mark mark) {
    const int lane = threadIdx.x % 32;
    if (wanted <= 0) return;
    const auto at_least = [&](u32 bits) {
        int own = 0;
        #pragma unroll 4
        for (int c = lane; c < count; c += 32) own += open(c) && __float_as_uint(x[c]) >= bits;
        return __reduce_add_sync(FULL, own);
    };
    // the largest number that at least `wanted` reach: numbers of one sign are ordered as their bits
    u32 edge = 0;
    for (u32 bit = 1u << 30; bit; bit >>= 1) if (at_least(edge | bit) >= wanted) edge |= bit;
    int ties = wanted - at_least(edge + 1);
    for (int base = 0; base < count; base += 32) {
        const int c = base + lane;
        const u32 bits = c < count && open(c) ? __float_as_uint(x[c]) : 0u;
        const bool tied = c < count && open(c) && bits == edge;
        const u32 votes = __ballot_sync(FULL, tied);
        if (c < count && open(c) && (bits > edge || (tied && __popc(votes & ((1u << lane) - 1)) < ties))) mark(c);
        ties = max(0, ties - __popc(votes));
    }
}

// The `top` best chunks with the own one, by the group's softmax probabilities; `tops` [g, t], where it is given, has a number a query.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
router_top(const bf16* __restrict__ q, const bf16* __restrict__ kbar, u64* __restrict__ cells, int t, int kv_heads, int group, int n,
           int chunk, int q_stride, int width, int slabs, float factor, int top, const u32* __restrict__ tops) {
    extern __shared__ __align__(1024) u8 scratch[];
    float* scores = (float*)(scratch + SCORES);
    const Rows r = rows_of(t, kv_heads, group, n, width, slabs, 0, chunk);
    score(scores, scratch, q, kbar, r, q_stride, kv_heads, factor);
    sums_of_softmax(scores, r, width, group, [&](int token) { return token / chunk; });
    for (int i = threadIdx.x / 32; i < r.tokens(); i += WARPS) {
        const int token = r.first + i, own = token / chunk;
        float* rows = scores + r.row_of(i) * width;
        const Cells to = cells_of(cells, 0, blockIdx.y, token, t, ceil_div(t, chunk));
        const auto mark = [&](int c) { atomicOr((u64*)to.words + c, to.bit); };
        const int wanted = tops ? (int)tops[r.kv * t + token] : top;
        largest(rows, own, min(wanted - 1, own), [](int) { return true; }, mark);
        if (threadIdx.x % 32 == 0) mark(own);
    }
}

// The forced chunks, then the best by the scores of overlapping windows, `n` of them, one every `stride` tokens: the largest that touches a
// chunk, or where `sum` is set all of them, weighted by the strides that they share with it.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
router_windows(const bf16* __restrict__ q, const bf16* __restrict__ keys, u64* __restrict__ cells, int t, int kv_heads, int group, int n,
               int q_stride, int width, int slabs, float factor, int add, int stride, int chunk, int top,
               int length, int init, int local, int sum) {
    extern __shared__ __align__(1024) u8 scratch[];
    float* scores = (float*)(scratch + SCORES);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = ceil_div(t, chunk);
    const Rows r = rows_of(t, kv_heads, group, n, width, slabs, add, stride);
    float* all_pooled = scores + slabs * 16 * width;  // of a token a team
    score(scores, scratch, q, keys, r, q_stride, kv_heads, factor);
    sums_of_softmax(scores, r, width, group, [&](int token) { return r.visible(token); });
    // by a warp: marks what a token attends, by the numbers of its chunks
    const auto choose = [&](int i, const float* pooled) {
        if (i >= r.tokens()) return;
        const int token = r.first + i, own = token / chunk;
        const auto forced = [&](int c) { return c < init || c + local > own; };
        int open = 0;
        for (int c = lane; c <= own; c += 32) open += !forced(c);
        open = warp_sum(open);
        const Cells at = cells_of(cells, 0, blockIdx.y, token, t, chunks);
        const auto mark = [&](int c) { atomicOr((u64*)at.words + c, at.bit); };
        largest(pooled, own + 1, min(open, top - (own + 1 - open)), [&](int c) { return !forced(c); }, mark);
        for (int c = lane; c <= own; c += 32) if (forced(c)) mark(c);
    };
    const Team team(r.tokens());
    for (int base = 0; base < r.tokens(); base += team.tokens) {
        // of as many tokens as there are teams
        const int i = base + team.token;
        if (i < r.tokens()) {
            const int token = r.first + i, seen = r.visible(token);
            const float* rows = scores + r.row_of(i) * width;
            for (int c = team.first; c <= token / chunk; c += team.step) {
                const int from = c * chunk, to = from + chunk;
                float score = 0;
                for (int w = max(0, from + stride - length) / stride; w < min(seen, ceil_div(to, stride)); w++) {
                    const int strides = (min(to, w * stride + length) - max(from, w * stride)) / stride;
                    if (strides > 0) score = sum ? fmaf((float)strides, rows[w], score) : larger(score, rows[w]);
                }
                all_pooled[team.token * chunks + c] = score;
            }
        }
        __syncthreads();
        if (warp < team.tokens) choose(base + warp, all_pooled + warp * chunks);
        __syncthreads();  // the numbers of these tokens are no longer needed
    }
}
