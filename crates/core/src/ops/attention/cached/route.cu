// Entmax routing of a few queries after kept tokens: scores of all complete chunks, then for each row (batch, kv head, query) the list of what it attends.
// STORED: what queries and summaries are stored in; R: what is computed in, float or double; SQUARES: alpha is 1.5; WARPS: of a block that solves a row.

// A warp a chunk: scores[row][head][n].
extern "C" __global__ void __launch_bounds__(256)
route_scores(const STORED* __restrict__ q, const STORED* __restrict__ kbar, R* __restrict__ scores, int t, int kv_heads, int group, int width,
             int n, R factor) {
    const int c = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
    if (c >= n) return;
    const int query = row % t, kv = row / t % kv_heads, batch = row / t / kv_heads;
    const STORED* key = kbar + (((long long)batch * n + c) * kv_heads + kv) * width;
    const STORED* queries = q + ((long long)(batch * t + query) * kv_heads + kv) * group * width;
    for (int h = 0; h < group; h++) {
        R dot = 0;
        for (int e = lane; e < width; e += 32) dot += (R)widen(queries[h * width + e]) * (R)widen(key[e]);
        dot = warp_sum(dot);
        if (lane == 0) scores[((long long)row * group + h) * n + c] = dot * factor;
    }
}

#if ROUNDED
// The same for up to 16 heads of a multiple of 8 up to 128: the heads are the rows of a product. A warp takes EACH times 8 chunks.
#define EACH 4
extern "C" __global__ void __launch_bounds__(256)
route_products(const bf16* __restrict__ q, const bf16* __restrict__ kbar, float* __restrict__ scores, int t, int kv_heads, int group, int width,
               int n, float factor) {
    const int first = (blockIdx.x * 8 + threadIdx.x / 32) * EACH * 8, lane = threadIdx.x % 32, row = blockIdx.y;
    if (first >= n) return;
    const int query = row % t, kv = row / t % kv_heads, batch = row / t / kv_heads, column = lane % 4 * 2, stride = kv_heads * width;
    const bf16* queries = q + ((long long)(batch * t + query) * kv_heads + kv) * group * width;
    const bf16* keys = kbar + (long long)batch * n * stride + kv * width;
    float s[EACH][4] = {};
    #pragma unroll
    for (int step = 0; step < 8; step++) {
        if (step * 16 >= width) break;
        u32 a[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int h = lane / 4 + i % 2 * 8, at = step * 16 + i / 2 * 8 + column;
            a[i] = h < group && at < width ? *(const u32*)(queries + h * width + at) : 0;
        }
        #pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int c = first + k * 8 + lane / 4, at = step * 16 + column;
            const bf16* key = keys + (long long)c * stride;
            const u32 left = c < n ? *(const u32*)(key + at) : 0, right = c < n && at + 8 < width ? *(const u32*)(key + at + 8) : 0;
            mma(s[k], a, left, right);
        }
    }
    #pragma unroll
    for (int k = 0; k < EACH; k++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int h = lane / 4 + i / 2 * 8, c = first + k * 8 + column + i % 2;
            if (h < group && c < n) scores[((long long)row * group + h) * n + c] = s[k][i] * factor;
        }
}
#endif

INLINE R power(R u, R beta) { return SQUARES ? u * u : pow_of(u, beta); }
INLINE R weight(R z, R share, R tau, R beta) {
    const R u = z * share - tau;
    return u > 0 ? power(u, beta) : (R)0;
}

// A team of warps for each head of a row: as many as the block's warps hold of the next power of two of heads.
struct Team {
    int size, head, first;  // warps of a team, the team's number, its first warp
    METHOD Team(int group) {
        int teams = 1;
        while (teams < group && teams < WARPS) teams *= 2;
        size = WARPS / teams;
        head = threadIdx.x / 32 / size;
        first = head * size;
    }
    // Every thread of the team gets the sum, or the largest, in the same order; all threads of the block call it.
    METHOD R sum(R x, R* scratch) const {
        x = warp_sum(x);
        put(x, scratch);
        R all = 0;
        for (int i = 0; i < size; i++) all += scratch[first + i];
        return all;
    }
    METHOD R largest(R x, R* scratch) const {
        x = warp_max(x);
        put(x, scratch);
        R all = scratch[first];
        for (int i = 1; i < size; i++) all = larger(all, scratch[first + i]);
        return all;
    }
    METHOD void put(R x, R* scratch) const {
        __syncthreads();
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
        __syncthreads();
    }
};

// The threshold of `count` scores on (alpha - 1) z, by Newton on the beta-norm from the left, as the op entmax; a row a team, `z` null where it has none. What a
// step leaves is of the order of its square, so after one as small as SMALL nothing is left.
INLINE R threshold(const Team& team, const R* z, int count, R alpha, R* scratch) {
    const int step = team.size * 32, own = threadIdx.x - team.first * 32;
    const R share = alpha - 1, beta = 1 / share;
    R top = -INFINITY_OF_R, tau = -1;
    if (!z) count = 0;
    #pragma unroll 8
    for (int c = own; c < count; c += step) top = larger(top, z[c]);
    top = team.largest(top, scratch);
    bool rising = count > 0;
    for (int round = 0; round < 100 && __syncthreads_or(rising); round++) {
        R low = 0, high = 0;
        #pragma unroll 8
        for (int c = own; c < (rising ? count : 0); c += step) {
            const R u = (z[c] - top) * share - tau;
            if (u <= 0) continue;
            const R below = SQUARES ? u : pow_of(u, beta - 1);
            low += below;
            high += below * u;
        }
        low = team.sum(low, scratch);
        high = team.sum(high, scratch + 32);
        if (!rising) continue;
        const R norm = SQUARES ? root_of(high) : pow_of(high, share);
        const R next = tau + (norm - 1) * (SQUARES ? norm : pow_of(norm, beta - 1)) / low, rise = next - tau;
        rising = rise > 0 && next <= 1;  // rounding ended the rise; the root lies below 0
        if (rising) tau = next;
        rising &= rise > (R)SMALL;
    }
    return count > 0 ? tau + top * share : (R)0;
}

// How many threads before this one have x; `all` gets how many have it. `counts` has a place a warp.
INLINE int before(bool x, int* counts, int& all) {
    const u32 votes = __ballot_sync(FULL, x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int sum = lane < WARPS ? counts[lane] : 0;
    #pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int left = __shfl_up_sync(FULL, sum, o);
        if (lane >= o) sum += left;
    }
    all = __shfl_sync(FULL, sum, 31);
    const int earlier = __shfl_sync(FULL, sum, (warp + 31) % 32);
    return (warp > 0 ? earlier : 0) + __popc(votes & ((1u << lane) - 1));
}

// Of each row the chunks with a weight, ascending, and its own; their number, weights (0 for the own one) and biases. `own_bias`, a number a kv head, may
// be null. center: 0 nothing, 1 the mean of log w over the support. A block a row.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
route_solve(const R* __restrict__ scores, const R* __restrict__ own_bias, u32* __restrict__ counts, u32* __restrict__ chunks,
            R* __restrict__ weights, R* __restrict__ bias, int t, int kv_heads, int group, int n, int chunk, int past, int most, R alpha,
            R sigma, int center) {
    __shared__ R tau[MOST_GROUP], scratch[64];
    __shared__ int places[32];
    const int row = blockIdx.x, own = (past + row % t) / chunk;
    const Team team(group);
    const R* rows = scores + (long long)row * group * n;
    const R share = alpha - 1, beta = 1 / share;
    for (int first = 0; first < group; first += WARPS / team.size) {
        const int h = first + team.head;
        const R found = threshold(team, h < group ? rows + (long long)h * n : 0, own, alpha, scratch);
        if (h < group && threadIdx.x == team.first * 32) tau[h] = found;
    }
    __syncthreads();
    const auto mean_weight = [&](int c) {
        R sum = 0;
        for (int h = 0; h < group; h++) sum += weight(rows[(long long)h * n + c], share, tau[h], beta);
        return sum / group;
    };
    R mean = 0;
    if (center) {
        R logs = 0, count = 0;
        for (int c = threadIdx.x; c < own; c += WARPS * 32) {
            const R w = mean_weight(c);
            if (w > 0) { logs += log_of(w); count += 1; }
        }
        logs = block_sum(logs, scratch);
        count = block_sum(count, scratch);
        mean = count > 0 ? logs / count : (R)0;
    }
    const long long to = (long long)row * most;
    int filled = 0;
    for (int first = 0; first < own; first += WARPS * 32) {
        const int c = first + threadIdx.x;
        const R w = c < own ? mean_weight(c) : (R)0;
        int all;
        const int place = filled + before(w > 0, places, all);
        if (w > 0) {
            chunks[to + place] = c;
            weights[to + place] = w;
            bias[to + place] = (log_of(w) - mean) / sigma;
        }
        filled += all;
    }
    if (threadIdx.x > 0) return;
    counts[row] = filled + 1;
    chunks[to + filled] = own;
    weights[to + filled] = 0;
    bias[to + filled] = own_bias ? own_bias[row / t % kv_heads] : (R)0;
}
