// Entmax routing of a few queries after kept tokens: scores of all complete chunks, then for each row (batch, kv head, query) the list of what it attends.
// STORED: what queries and summaries are stored in; R: what is computed in, float or double; SQUARES: alpha is 1.5; WARPS: of a block that solves a row; LIST: scores that
// it has shared memory for.

// A warp a chunk: scores[row][head][n].
extern "C" __global__ void __launch_bounds__(256)
route_scores(const STORED* q, const STORED* kbar, R* __restrict__ scores, int t, int kv_heads, int group, int width,
             int n, R factor) {
    begin_early();
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
// The same for up to 16 heads of a multiple of 8 up to 128: the heads are the rows of a product. A warp takes EACH times 8 chunks and asks for all it reads
// before it multiplies, in pieces of 8 elements: a step of the product has 2 + 2 of a lane's own, the same of q and of the summaries.
#define EACH 2
extern "C" __global__ void __launch_bounds__(128)
route_products(const bf16* q, const bf16* kbar, float* __restrict__ scores, int t, int kv_heads, int group, int width,
               int n, float factor) {
    begin_early();
    const int first = (blockIdx.x * 4 + threadIdx.x / 32) * EACH * 8, lane = threadIdx.x % 32, row = blockIdx.y;
    if (first >= n) return;
    const int query = row % t, kv = row / t % kv_heads, batch = row / t / kv_heads, column = lane % 4 * 8, stride = kv_heads * width;
    const bf16* queries = q + ((long long)(batch * t + query) * kv_heads + kv) * group * width;
    const bf16* keys = kbar + (long long)batch * n * stride + kv * width;
    const uint4 none = make_uint4(0, 0, 0, 0);
    uint4 b[EACH][4], a[2][4];
    #pragma unroll
    for (int k = 0; k < EACH; k++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = first + k * 8 + lane / 4, at = i * 32 + column;
            b[k][i] = c < n && at < width ? *(const uint4*)(keys + (long long)c * stride + at) : none;
        }
    #pragma unroll
    for (int half = 0; half < 2; half++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int h = lane / 4 + half * 8, at = i * 32 + column;
            a[half][i] = h < group && at < width ? *(const uint4*)(queries + h * width + at) : none;
        }
    #pragma unroll
    for (int k = 0; k < EACH; k++) {
        float s[4] = {};
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 left[4] = {a[0][i].x, a[1][i].x, a[0][i].y, a[1][i].y}, right[4] = {a[0][i].z, a[1][i].z, a[0][i].w, a[1][i].w};
            mma(s, left, b[k][i].x, b[k][i].y);
            mma(s, right, b[k][i].z, b[k][i].w);
        }
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int h = lane / 4 + i / 2 * 8, c = first + k * 8 + lane % 4 * 2 + i % 2;
            if (h < group && c < n) scores[((long long)row * group + h) * n + c] = s[i] * factor;
        }
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
    int heads, size, head, first;  // teams, warps of each, the team's number, its first warp
    METHOD Team(int group) {
        heads = 1;
        while (heads < group && heads < WARPS) heads *= 2;
        size = WARPS / heads;
        head = threadIdx.x / 32 / size;
        first = head * size;
    }
};

// A step of Newton from tau on the beta-norm, from sums of (alpha - 1) z - tau to the powers beta - 1 and beta: false where it was the last one. What a step
// leaves is of the order of its square, so after one as small as SMALL nothing is left.
INLINE bool step_of(R& tau, R low, R high, R share, R beta) {
    low = warp_sum(low);
    high = warp_sum(high);
    const R norm = SQUARES ? root_fast(high) : pow_of(high, share);
    const R next = tau + divide_fast((norm - 1) * (SQUARES ? norm : pow_of(norm, beta - 1)), low), rise = next - tau;
    if (!(rise > 0 && next <= 1)) return false;  // rounding ended the rise; the root lies below 0
    tau = next;
    return rise > (R)SMALL;
}

// The threshold, from the left, of `count` scores `at(i)`, scaled, less the largest: by Newton, as the op entmax, in one warp, which waits for nobody.
template <typename At> INLINE R newton(int count, R share, At at) {
    const R beta = 1 / share;
    R tau = -1;
    for (int round = 0; round < 100; round++) {
        R low = 0, high = 0;
        #pragma unroll 4
        for (int i = threadIdx.x % 32; i < count; i += 32) {
            const R u = at(i) - tau;
            if (!(u > 0)) continue;
            const R below = SQUARES ? u : pow_of(u, beta - 1);
            low += below;
            high += below * u;
        }
        if (!step_of(tau, low, high, share, beta)) break;
    }
    return tau;
}

#if SQUARES
// The same of at most 32 HELD scores, which stay in registers.
#define HELD 16
static_assert(32 * HELD * WARPS <= LIST, "a head's share of the list holds them");
INLINE R newton_of_few(const R* list, int count, R share) {
    R x[HELD], tau = -1;
    #pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = i * 32 + threadIdx.x % 32;
        x[i] = at < count ? list[at] : (R)-1;
    }
    for (int round = 0; round < 100; round++) {
        R low = 0, high = 0;
        #pragma unroll
        for (int i = 0; i < HELD; i++) {
            const R u = larger(x[i] - tau, (R)0);
            low += u;
            high += u * u;
        }
        if (!step_of(tau, low, high, share, 1 / share)) break;
    }
    return tau;
}
#endif

// The same of scores `z`, a head a team, null where it has none: no score more than 1 / (alpha - 1) below the largest has a weight, so the others are put
// into `list`, in an order that the number of threads fixes, and the team's first warp goes on with them. Where `room` does not hold them it goes over all
// scores. All threads of the block call it; those of the first warp get the threshold.
#define NEAR 8
INLINE R threshold(const Team& team, const R* z, int count, R share, R* list, int room, R* tops, int* found) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, step = team.size * 32, own = threadIdx.x - team.first * 32;
    R near[NEAR], top = -INFINITY_OF_R;
    #pragma unroll
    for (int i = 0; i < NEAR; i++) near[i] = own + i * step < count ? z[own + i * step] : -INFINITY_OF_R;
    const auto each = [&](auto use) {
        #pragma unroll
        for (int i = 0; i < NEAR; i++) use(near[i]);
        #pragma unroll 8
        for (int c = own + NEAR * step; c < count; c += step) use(z[c]);
    };
    each([&](R x) { top = larger(top, x); });
    top = warp_max(top);
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    top = warp_max(lane < team.size ? tops[team.first + lane] : -INFINITY_OF_R);
    int have = 0;
    each([&](R x) { have += (x - top) * share >= -1; });
    int until = have;
    #pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int left = __shfl_up_sync(FULL, until, o);
        if (lane >= o) until += left;
    }
    if (lane == 31) found[warp] = until;
    __syncthreads();
    const int of_lane = lane < team.size ? found[team.first + lane] : 0;
    const int all = __reduce_add_sync(FULL, of_lane), earlier = __reduce_add_sync(FULL, team.first + lane < warp ? of_lane : 0);
    int place = earlier + until - have;
    each([&](R x) {
        const R below = (x - top) * share;
        if (!(below >= -1)) return;
        if (place < room) list[place] = below;
        place++;
    });
    __syncthreads();
    if (warp != team.first || count == 0) return 0;
#if SQUARES
    if (all <= 32 * HELD) return newton_of_few(list, all, share) + top * share;
#endif
    const R tau = all <= room ? newton(all, share, [&](int i) { return list[i]; }) : newton(count, share, [&](int i) { return (z[i] - top) * share; });
    return tau + top * share;
}

// How many threads before this one have x; `all` gets how many have it. `counts` has a place a warp, which the next call but one may use again.
INLINE int before(bool x, int* counts, int& all) {
    const u32 votes = __ballot_sync(FULL, x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    const int of_lane = lane < WARPS ? counts[lane] : 0;
    all = __reduce_add_sync(FULL, of_lane);
    return __reduce_add_sync(FULL, lane < warp ? of_lane : 0) + __popc(votes & ((1u << lane) - 1));
}

// Of each row the chunks with a weight, ascending, and its own; their number, weights (0 for the own one) and biases. `own_bias`, a number a kv head, may
// be null. center: 0 nothing, 1 the mean of log w over the support. A block a row.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
route_solve(const R* scores, const R* own_bias, u32* __restrict__ counts, u32* __restrict__ chunks,
            R* __restrict__ weights, R* __restrict__ bias, int t, int kv_heads, int group, int n, int chunk, int past, int most, R alpha,
            R sigma, int center) {
    begin_early();
    extern __shared__ __align__(16) u8 scratch[];  // LIST scores
    __shared__ R tau[MOST_GROUP], of_warps[32];
    __shared__ int places[2][32];
    const int row = blockIdx.x, own = (past + row % t) / chunk;
    const Team team(group);
    const R* rows = scores + (long long)row * group * n;
    const R share = alpha - 1, beta = 1 / share;
    const int room = LIST / team.heads;
    for (int first = 0; first < group; first += team.heads) {
        const int h = first + team.head;
        const bool has = h < group;
        R* list = (R*)scratch + team.head * room;
        const R found = threshold(team, has ? rows + (long long)h * n : 0, has ? own : 0, share, list, room, of_warps, places[0]);
        if (has && threadIdx.x == team.first * 32) tau[h] = found;
    }
    __syncthreads();
    const auto mean_weight = [&](int c) {
        R sum = 0;
        #pragma unroll 8
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
        logs = block_sum(logs, of_warps);
        count = block_sum(count, of_warps);
        mean = count > 0 ? logs / count : (R)0;
    }
    const long long to = (long long)row * most;
    int filled = 0;
    for (int first = 0, turn = 0; first < own; first += WARPS * 32, turn ^= 1) {
        const int c = first + threadIdx.x;
        const R w = c < own ? mean_weight(c) : (R)0;
        int all;
        const int place = filled + before(w > 0, places[turn], all);
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
