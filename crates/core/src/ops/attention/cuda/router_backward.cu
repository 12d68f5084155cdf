// Routing, backward. With dlogw = dbias / sigma, less its mean over the support where the mean is differentiated, and r the slope of a head's
// weight p (entmax: p^(2 - alpha); straight through: p of softmax over the same scores, of every visible chunk; for the bias of a given
// list the same of the listed chunks alone):
// t = r / (sum over heads of p) dlogw on the support, ds = t - r (sum t / sum r), dq = factor sum ds kbar, dkbar = factor sum ds q.
//
// The query side goes over rows of scores, as forward; it writes dq and what the key side needs of a row. The key side computes scores again,
// TILE chunks and a segment of tokens a block; segments are added in order. Both round ds to two bf16, high and low, so that a product
// carries 16 bits of it.

// center: 1 where the mean is differentiated. straight: 0 entmax, 1 softmax over what is visible, 2 softmax over what is listed.
struct Settings { float factor, alpha, sigma; int center, straight; };
// A sum of p below which its logarithm is a constant, where what is listed was chosen by other means.
#define LEAST 1e-37f

// r of a score. `shift` is the threshold of entmax, or the logarithm of the sum of exponentials.
INLINE float slope(float z, float shift, const Settings& s) {
    if (s.straight) return expf(z - shift);
    const float share = s.alpha - 1.f, u = fmaf(z, share, -shift);
    return !(u > 0.f) ? 0.f : SQUARES ? u : exp2_fast((2.f - s.alpha) / share * log2_fast(u));
}

INLINE u32 high_part(float x, float y) { return pack(x, y); }
INLINE u32 low_part(float x, float y, u32 pair) { return pack(x - low(pair), y - high(pair)); }

// Shifts [b, t, h] come from forward for entmax and are written for straight through, as are sums (the heads' sum of p) of every entry.
// Written: dq, means [b, t, h] (sum t / sum r), offsets [b, t, g] (the mean of dlogw), own [b, t, g] (dbias of the own chunk), squares [b, t, g]
// (sum of ds^2), and where they are not null scores [entries, group] (ds) and pairs [b, t, g] (chunks with a ds other than zero).
// Above 60 lines: the gradients of a tile's scores stay in shared memory from the first pass over them to the product that makes dq.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
router_rows(const bf16* __restrict__ q, const bf16* __restrict__ kbar, float* __restrict__ shifts, const u64* __restrict__ cells,
            const u32* __restrict__ first, float* __restrict__ sums, const float* __restrict__ dbias, float* __restrict__ dq,
            float* __restrict__ means, float* __restrict__ offsets, float* __restrict__ own_gradient, double* __restrict__ squares,
            float* __restrict__ kept, double* __restrict__ pairs, int t, int kv_heads, int group, int n, int chunk, int q_stride, int width,
            int slabs, float factor, float alpha, float sigma, int center, int straight, int stopped) {
    extern __shared__ __align__(1024) u8 scratch[];
    const Settings s = {factor, alpha, sigma, center, straight};
    float* scores = (float*)(scratch + 2 * OPERAND);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Rows r = rows_of(t, kv_heads, group, n, width, slabs, 0, chunk);
    if (!stopped) score(scores, scratch, q, kbar, r, q_stride, kv_heads, s.factor);
    const int most = stopped ? 0 : r.most();
    for (int i = warp; i < r.tokens(); i += WARPS) {
        const int token = r.first + i, own = token / chunk, seen = stopped ? 0 : own;  // nothing comes back where it is stopped
        float* rows = scores + r.row_of(i) * width;
        const Cells at = cells_of(cells, first, blockIdx.y, token, t, ceil_div(t, chunk));
        const long long place = ((long long)r.batch * t + token) * kv_heads + r.kv;
        float* shift = shifts + place * group;
        float offset = 0, count = 0;
        if (s.center) {
            for (int c = lane; c < seen; c += 32)
                if (at.has(c)) {
                    offset += dbias[at.entry(c)] / s.sigma;
                    count += 1.f;
                }
            offset = warp_sum(offset);
            count = warp_sum(count);
            offset = count > 0.f ? offset / count : 0.f;
        }
        float shift_of[16], sum[16], inner[16];
        #pragma unroll
        for (int h = 0; h < 16; h++) {
            shift_of[h] = h < group && !s.straight ? shift[h] : 0.f;
            sum[h] = inner[h] = 0;
        }
        const auto counts = [&](int c) { return s.straight != 2 || at.has(c); };
        if (s.straight) {
            // every lane comes to the same logarithm, so none reads what another one has written
            #pragma unroll
            for (int h = 0; h < 16; h++)
                if (h < group) {
                    const float* z = rows + h * width;
                    float top = NOTHING, all = 0;
                    for (int c = lane; c < seen; c += 32) if (counts(c)) top = larger(top, z[c]);
                    top = warp_max(top);
                    for (int c = lane; c < seen; c += 32) if (counts(c)) all += expf(z[c] - top);
                    all = warp_sum(all);
                    shift_of[h] = all > 0.f ? top + logf(all) : 0.f;
                    if (lane == 0) shift[h] = shift_of[h];
                }
            for (int c = lane; c < seen; c += 32)
                if (at.has(c)) {
                    float all = 0;
                    #pragma unroll
                    for (int h = 0; h < 16; h++) if (h < group) all += slope(rows[h * width + c], shift_of[h], s);
                    sums[at.entry(c)] = s.straight == 2 && all <= LEAST * group ? 0.f : all;
                }
        }
        // dlogw of four chunks and what divides it, 0 and 1 off the support; the own chunk's entry stands for those that are not there
        struct Up { float of[4], divisor[4]; Four four; };
        const u32 spare = at.entry(own);
        const auto upstream = [&](int base, int count) {
            Up up;
            up.four = four_of(at, base, count, spare);
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                up.of[k] = dbias[up.four.entry[k]];
                up.divisor[k] = sums[up.four.entry[k]];
            }
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                up.of[k] = up.four.has[k] ? up.of[k] / s.sigma - offset : 0.f;
                up.divisor[k] = up.four.has[k] ? s.straight ? up.divisor[k] : up.divisor[k] * group : 1.f;
            }
            return up;
        };
        for (int base = lane; base < seen; base += 128) {
            const Up up = upstream(base, seen);
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const int c = base + 32 * k;
                if (c >= seen) break;
                #pragma unroll
                for (int h = 0; h < 16; h++) {
                    if (h >= group) break;
                    const float slope_of = s.straight != 2 || up.four.has[k] ? slope(rows[h * width + c], shift_of[h], s) : 0.f;
                    sum[h] += slope_of;
                    inner[h] += slope_of == 0.f || up.divisor[k] == 0.f ? 0.f : slope_of / up.divisor[k] * up.of[k];
                }
            }
        }
        #pragma unroll
        for (int h = 0; h < 16; h++)
            if (h < group) {
                const float all = warp_sum(sum[h]), of_all = warp_sum(inner[h]);
                inner[h] = s.straight ? of_all : all == 0.f ? 0.f : of_all / all;  // a softmax sums to one
                if (lane == 0) means[place * group + h] = inner[h];
            }
        double square = 0, touched = 0;
        for (int base = lane; base < most; base += 128) {
            const Up up = upstream(base, min(own, most));
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const int c = base + 32 * k;
                if (c >= most) break;
                bool any = false;
                #pragma unroll
                for (int h = 0; h < 16; h++) {
                    if (h >= group) break;
                    const float slope_of = c < own && (s.straight != 2 || up.four.has[k]) ? slope(rows[h * width + c], shift_of[h], s) : 0.f;
                    const float ds = (slope_of == 0.f || up.divisor[k] == 0.f ? 0.f : slope_of / up.divisor[k] * up.of[k]) - slope_of * inner[h];
                    rows[h * width + c] = ds;
                    square += (double)ds * ds;
                    any |= ds != 0.f;
                    if (kept && up.four.has[k]) kept[(long long)up.four.entry[k] * group + h] = ds;
                }
                touched += any;
            }
        }
        square = warp_sum(square);
        touched = warp_sum(touched);
        if (lane == 0) {
            const u32 entry = at.entry(own);
            offsets[place] = offset;
            own_gradient[place] = dbias[entry];
            squares[place] = square;
            if (pairs) pairs[place] = touched;
            if (kept) for (int h = 0; h < group; h++) kept[(long long)entry * group + h] = 0.f;
        }
        if (kept && stopped)
            for (int c = lane; c < own; c += 32)
                if (at.has(c)) for (int h = 0; h < group; h++) kept[(long long)at.entry(c) * group + h] = 0.f;
    }
    // dq, 16 rows and 16 columns a part, up to four parts a warp
    const u32 keys = shared_address(scratch) + OPERAND;
    float acc[4][2][4] = {};
    for (int base = 0; base < most; base += TILE) {
        __syncthreads();  // gradients are there, the shared-memory tile before has been read
        load_keys(keys, kbar, r, kv_heads, base);
        __syncthreads();
        #pragma unroll
        for (int p = 0; p < 4; p++) {
            const int part = warp + p * WARPS, slab = part / (D / 16), column = part % (D / 16);
            if (part >= slabs * (D / 16)) break;
            #pragma unroll
            for (int step = 0; step < TILE / 16; step++) {
                u32 high[4], low[4], b[4];
                #pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int c = base + step * 16 + lane % 4 * 2 + e / 2 * 8;
                    const float* at = scores + (slab * 16 + lane / 4 + e % 2 * 8) * width + c;
                    const float x = c < most ? at[0] : 0.f, y = c + 1 < most ? at[1] : 0.f;
                    high[e] = high_part(x, y);
                    low[e] = low_part(x, y, high[e]);
                }
                fragment_transposed<TILE>(b, keys, step * 16, column);
                mma(acc[p][0], high, b[0], b[1]);
                mma(acc[p][1], high, b[2], b[3]);
                mma(acc[p][0], low, b[0], b[1]);
                mma(acc[p][1], low, b[2], b[3]);
            }
        }
    }
    #pragma unroll
    for (int p = 0; p < 4; p++) {
        const int part = warp + p * WARPS, slab = part / (D / 16), column = part % (D / 16);
        if (part >= slabs * (D / 16)) break;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int in_slab = lane / 4 + 8 * half, token = r.first + slab * r.slab_tokens() + in_slab / group;
            if (in_slab >= r.slab_tokens() * group || token >= t) continue;
            float* to = dq + (((long long)r.batch * t + token) * kv_heads * group + r.kv * group + in_slab % group) * HEAD + column * 16 + lane % 4 * 2;
            #pragma unroll
            for (int m = 0; m < 2; m++)
                if (column * 16 + m * 8 < HEAD) *(float2*)(to + m * 8) = make_float2(acc[p][m][2 * half] * s.factor, acc[p][m][2 * half + 1] * s.factor);
        }
    }
}

#define SIDE 128

// A block: 64 chunks of a kv head, 16 a warp, and the tokens of a segment. partial [segments, b, n, g, HEAD].
// Above 60 lines: while one batch of rows comes in, the scores of the one before are computed again and added to dkbar, which is registers.
extern "C" __global__ void __launch_bounds__(SIDE, 2)
router_keys(const bf16* __restrict__ q, const bf16* __restrict__ kbar, const float* __restrict__ shifts, const u64* __restrict__ cells,
            const u32* __restrict__ first, const float* __restrict__ sums, const float* __restrict__ dbias, const float* __restrict__ means,
            const float* __restrict__ offsets, float* __restrict__ partial, int batches, int t, int kv_heads, int group, int n, int chunk,
            int q_stride, float factor, float alpha, float sigma, int straight) {
    extern __shared__ __align__(1024) u8 scratch[];
    const Settings s = {factor, alpha, sigma, 0, straight};
    __shared__ float shift[2][TILE], mean[2][TILE];
    __shared__ int tokens[2][TILE];
    const u32 keys = shared_address(scratch), queries = keys + OPERAND;
    float2* upstream = (float2*)(scratch + 3 * OPERAND);  // of a batch's tokens, 64 chunks each: dlogw, and what divides it, 0 off the support
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c0 = blockIdx.x * TILE;
    const int batch = blockIdx.y / kv_heads, kv = blockIdx.y % kv_heads, heads = kv_heads * group, chunks = ceil_div(t, chunk);
    const int together = TILE / group;
    load_tile<TILE, HEAD, SIDE>(keys, kbar, [&](int i) {
        return c0 + i < n ? kbar + (((long long)batch * n + c0 + i) * kv_heads + kv) * HEAD : (const bf16*)0;
    });
    copy_commit();
    // tokens behind the first of these chunks, in equal segments
    const int from = (c0 + 1) * chunk, each = ceil_div(ceil_div(max(0, t - from), (int)gridDim.z), together) * together;
    const int begin = from + blockIdx.z * each, end = min(t, begin + each), rounds = ceil_div(max(0, end - begin), together);
    const auto load = [&](int i) {
        if (i < rounds) {
            const int slot = i % 2;
            load_tile<TILE, HEAD, SIDE>(queries + slot * OPERAND, q, [&](int row) {
                const int token = begin + i * together + row / group;
                const bool valid = row < together * group && token < end;
                return valid ? q + ((long long)batch * t + token) * q_stride + (kv * group + row % group) * HEAD : (const bf16*)0;
            });
            if (threadIdx.x < TILE) {
                const int row = threadIdx.x, token = begin + i * together + row / group;
                const bool valid = row < together * group && token < end;
                const long long at = ((long long)batch * t + token) * heads + kv * group + row % group;
                tokens[slot][row] = valid ? token : -1;
                shift[slot][row] = valid ? shifts[at] : 0.f;
                mean[slot][row] = valid ? means[at] : 0.f;
            }
        }
        copy_commit();
    };
    float acc[D / 8][4] = {};
    load(0);
    for (int i = 0; i < rounds; i++) {
        load(i + 1);
        // four pairs of a thread at a time: the loads of one follow one another. Entry 0 stands for those that are not there.
        for (int x = threadIdx.x; x < together * TILE; x += 4 * SIDE) {
            const int c = c0 + x % TILE, token0 = begin + i * together + x / TILE;  // then every SIDE / TILE tokens
            u64 words[4];
            u32 entry[4];
            float up[4], by[4], less[4];
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const int token = token0 + k * (SIDE / TILE);
                const bool valid = x + k * SIDE < together * TILE && token < end && c < token / chunk;
                const long long at = ((long long)blockIdx.y * ceil_div(t, 64) + token / 64) * chunks + c;
                words[k] = valid ? cells[at] : 0;
                entry[k] = valid ? first[at] : 0;
            }
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const int token = token0 + k * (SIDE / TILE);
                const u64 bit = 1ull << (token & 63);
                const bool has = words[k] & bit;
                entry[k] = has ? entry[k] + __popcll(words[k] & (bit - 1)) : 0;
                words[k] = has;
                up[k] = dbias[entry[k]];
                by[k] = sums[entry[k]];
                less[k] = offsets[((long long)batch * t + (has ? token : 0)) * kv_heads + kv];
            }
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                if (x + k * SIDE >= together * TILE) break;
                const float by_of = s.straight ? by[k] : by[k] * group;
                upstream[x + k * SIDE] = words[k] ? make_float2(up[k] / s.sigma - less[k], by_of) : make_float2(0.f, 0.f);
            }
        }
        copy_wait<1>();
        __syncthreads();
        const int slot = i % 2;
        const u32 tile = queries + slot * OPERAND;
        float z[TILE / 8][4] = {};
        multiply<TILE, TILE, D>(z, keys, warp * 16, tile, 0);
        #pragma unroll
        for (int m = 0; m < TILE / 16; m++) {
            u32 high[4], low[4];
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                float ds[2];
                #pragma unroll
                for (int x = 0; x < 2; x++) {
                    const int row = m * 16 + e / 2 * 8 + lane % 4 * 2 + x, own = warp * 16 + lane / 4 + e % 2 * 8, token = tokens[slot][row];
                    const bool visible = c0 + own < n && c0 + own < token / chunk && token >= 0;
                    const float2 up = visible ? upstream[row / group * TILE + own] : make_float2(0.f, 0.f);
                    const bool counts = visible && (s.straight != 2 || up.y != 0.f);
                    const float slope_of = counts ? slope(z[2 * m + e / 2][e % 2 * 2 + x] * s.factor, shift[slot][row], s) : 0.f;
                    ds[x] = (slope_of == 0.f || up.y == 0.f ? 0.f : slope_of / up.y * up.x) - slope_of * mean[slot][row];
                }
                high[e] = high_part(ds[0], ds[1]);
                low[e] = low_part(ds[0], ds[1], high[e]);
            }
            #pragma unroll
            for (int column = 0; column < D / 16; column++) {
                u32 b[4];
                fragment_transposed<TILE>(b, tile, m * 16, column);
                mma(acc[2 * column], high, b[0], b[1]);
                mma(acc[2 * column + 1], high, b[2], b[3]);
                mma(acc[2 * column], low, b[0], b[1]);
                mma(acc[2 * column + 1], low, b[2], b[3]);
            }
        }
        __syncthreads();  // the slot and the pairs may be written again
    }
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int c = c0 + warp * 16 + lane / 4 + 8 * half;
        if (c >= n) continue;
        float* to = partial + ((((long long)blockIdx.z * batches + batch) * n + c) * kv_heads + kv) * HEAD + lane % 4 * 2;
        #pragma unroll
        for (int m = 0; m < HEAD / 8; m++) *(float2*)(to + m * 8) = make_float2(acc[m][2 * half] * s.factor, acc[m][2 * half + 1] * s.factor);
    }
}
