// Routing, backward. With dlogw = dbias / sigma, less its mean over the support where the mean is differentiated, and r the slope of a head's
// weight p (entmax: p^(2 - alpha); straight through: p of softmax over the same scores, of every visible chunk; for the bias of a given
// list the same of the listed chunks alone):
// t = r / (sum over heads of p) dlogw on the support, ds = t - r (sum t / sum r), dq = factor sum ds kbar, dkbar = factor sum ds q.
//
// The query side goes over rows of scores, as forward; it writes dq and what the key side needs of a row. The key side computes scores again,
// TILE chunks and a segment of tokens a block; segments are added in order. Both round ds to two bf16, high and low, so that a product
// carries 16 bits of it. PLACEBO: 1 where numbers of placebo.cu take the place of ds; the query side then keeps what draws those of a row.
// Above 400 lines: both sides compute one gradient from the same pieces.

// SOFT: 1 where p is softmax, 0 where it is entmax. center: 1 where the mean is differentiated. straight, read where SOFT: 1 over what is visible, 2 over
// what is listed.
struct Settings { float factor, alpha, sigma; int center, straight; };
// A sum of p below which its logarithm is a constant, where what is listed was chosen by other means.
#define LEAST 1e-37f

// r of a score. `shift` is the threshold of entmax, or the logarithm of the sum of exponentials.
INLINE float slope(float z, float shift, const Settings& s) {
    if (SOFT) return expf(z - shift);
    const float share = s.alpha - 1.f, u = fmaf(z, share, -shift);
    return !(u > 0.f) ? 0.f : SQUARES ? u : exp2_fast((2.f - s.alpha) / share * log2_fast(u));
}

INLINE u32 high_part(float x, float y) { return pack(x, y); }
INLINE u32 low_part(float x, float y, u32 pair) { return pack(x - low(pair), y - high(pair)); }

// What tells how a head's weight follows its scores: the threshold of entmax, or the logarithm of a softmax's sum.
//
// Shifts [b, t, h] come from forward for entmax and are written for straight through, as are sums (the heads' sum of p) of every entry.
// Written: dq, means [b, t, h] (sum t / sum r), offsets [b, t, g] (the mean of dlogw), own [b, t, g] (dbias of the own chunk), squares [b, t, g]
// (sum of ds^2), and where they are not null scores [entries, group] (ds) and pairs [b, t, g] (chunks with a ds other than zero).
//
// Tokens are taken eight at a time. First what comes from above: `ratios` [8, width], dlogw over the heads' sum of p, 0 off the support, so that
// ds = r (ratio - sum t / sum r); where there are fewer tokens, several warps share one. Then ds takes the place of scores, four heads a warp.
#define QUAD 4
// 16 columns of dq that a warp makes, of 16 rows
#define PARTS ((4 * (D / 16) + WARPS - 1) / WARPS)

// Straight through: the shift of every head, the heads' sum of p of every entry, and where only what is listed counts the scores of what is not
// become minus infinity. By a warp; every lane comes to the same logarithm, so none reads what another one has written.
INLINE void soften(float* rows, float* shift, float* sums, const Cells& at, int seen, int width, int group, const Settings& s) {
    const int lane = threadIdx.x % 32;
    if (s.straight == 2)
        for (int c = lane; c < seen; c += 32) if (!at.has(c)) for (int h = 0; h < group; h++) rows[h * width + c] = NOTHING;
    for (int h = 0; h < group; h++) {
        const float* z = rows + h * width;
        float top = NOTHING, all = 0;
        for (int c = lane; c < seen; c += 32) top = larger(top, z[c]);
        top = warp_max(top);
        if (top != NOTHING) for (int c = lane; c < seen; c += 32) all += expf(z[c] - top);
        all = warp_sum(all);
        const float found = all > 0.f ? top + logf(all) : 0.f;
        if (lane == 0) shift[h] = found;
        for (int c = lane; c < seen; c += 32)
            if (at.has(c)) {
                const u32 entry = at.entry(c);
                const float p = slope(z[c], found, s), sum = h == 0 ? p : sums[entry] + p;
                sums[entry] = h + 1 == group && s.straight == 2 && sum <= LEAST * group ? 0.f : sum;
            }
    }
}

// Above 60 lines: the gradients of a tile's scores stay in shared memory from the first pass over them to the product that makes dq.
extern "C" __global__ void __launch_bounds__(THREADS, D == 128 ? 2 : 3)
router_rows(const bf16* __restrict__ q, const bf16* __restrict__ kbar, float* shifts, const u64* __restrict__ cells,
            const u32* __restrict__ first, float* sums, const float* __restrict__ dbias, float* __restrict__ dq,
            float* __restrict__ means, float* __restrict__ offsets, float* __restrict__ own_gradient, double* __restrict__ squares,
            float* __restrict__ kept, double* __restrict__ pairs, Draw<float>* __restrict__ draws, int t, int kv_heads, int group, int n, int chunk, int q_stride, int width,
            int slabs, float factor, float alpha, float sigma, int center, int straight, int stopped) {
    extern __shared__ __align__(1024) u8 scratch[];
    __shared__ float shift_of[WARPS][16], square_of[WARPS][16 / QUAD];
    const Settings s = {factor, alpha, sigma, center, straight};
    float* scores = (float*)(scratch + SCORES);
    float* ratios = scores + slabs * 16 * width;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = ceil_div(t, chunk);
    const Rows r = rows_of(t, kv_heads, group, n, width, slabs, 0, chunk);
    if (!stopped) score(scores, scratch, q, kbar, r, q_stride, kv_heads, s.factor);
    const int most = stopped ? 0 : r.most(), filled = min(width, ceil_div(most, 16) * 16);  // nothing comes back where it is stopped
    const int quads = ceil_div(group, QUAD);
    const float inverse = 1.f / s.sigma, heads_of = SOFT ? 1.f : (float)group;
    for (int round = 0; round < r.tokens(); round += WARPS) {
        const int here = min(WARPS, r.tokens() - round), sharing = WARPS / here, slot = warp / sharing, part = warp % sharing;
        if (slot < here) {
            const int token = r.first + round + slot, own = token / chunk, seen = stopped ? 0 : own;
            float* rows = scores + r.row_of(round + slot) * width;
            const Cells at = cells_of(cells, first, blockIdx.y, token, t, chunks);
            const long long place = ((long long)r.batch * t + token) * kv_heads + r.kv;
            if (!SOFT) {
                if (part == 0 && lane < group) shift_of[slot][lane] = shifts[place * group + lane];
            } else if (part == 0) {
                soften(rows, shift_of[slot], sums, at, seen, width, group, s);
                __syncwarp();
                if (lane < group) shifts[place * group + lane] = shift_of[slot][lane];
            }
            float offset = 0;
            if (s.center) {
                float count = 0;
                for (int base = lane; base < seen; base += 128) {
                    const Four four = four_of(at, base, seen, 0);
                    #pragma unroll
                    for (int k = 0; k < 4; k++)
                        if (four.has[k]) {
                            offset += dbias[four.entry[k]] * inverse;
                            count += 1.f;
                        }
                }
                offset = warp_sum(offset);
                count = warp_sum(count);
                offset = count > 0.f ? offset / count : 0.f;
            }
            const u32 entry = at.entry(own);
            // with softmax one warp alone has written the sums that it reads
            for (int base = lane + (SOFT ? 0 : part * 128); base < filled && (part == 0 || !SOFT); base += SOFT ? 128 : sharing * 128) {
                const Four four = four_of(at, base, seen, entry);  // the own chunk's entry stands for those that are not there
                float up[4], by[4];
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    up[k] = dbias[four.entry[k]];
                    by[k] = sums[four.entry[k]];
                }
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float divisor = by[k] * heads_of;
                    if (base + 32 * k < filled)
                        ratios[slot * width + base + 32 * k] = four.has[k] && divisor != 0.f ? (up[k] * inverse - offset) / divisor : 0.f;
                }
            }
            if (part == 0 && lane == 0) {
                offsets[place] = offset;
                own_gradient[place] = dbias[entry];
            }
        }
        __syncthreads();
        for (int unit = warp; unit < here * quads; unit += WARPS) {
            const int i = quads == 1 ? unit : unit / quads, h0 = (unit - i * quads) * QUAD, token = r.first + round + i;
            const int own = token / chunk, seen = stopped ? 0 : own;
            const long long place = ((long long)r.batch * t + token) * kv_heads + r.kv;
            float* rows = scores + (r.row_of(round + i) + h0) * width;
            const float* ratio = ratios + i * width;
            float shift[QUAD], sum[QUAD] = {}, inner[QUAD] = {}, square = 0;
            #pragma unroll
            for (int k = 0; k < QUAD; k++) shift[k] = h0 + k < group ? shift_of[i][h0 + k] : 0.f;
            for (int c = lane; c < seen; c += 32) {
                const float up = ratio[c];
                #pragma unroll
                for (int k = 0; k < QUAD; k++) {
                    if (h0 + k >= group) break;
                    const float slope_of = slope(rows[k * width + c], shift[k], s);
                    sum[k] += slope_of;
                    inner[k] += slope_of * up;
                }
            }
            #pragma unroll
            for (int k = 0; k < QUAD; k++) {
                if (h0 + k >= group) break;
                const float all = warp_sum(sum[k]), of_all = warp_sum(inner[k]);
                inner[k] = SOFT ? of_all : all == 0.f ? 0.f : of_all / all;  // a softmax sums to one
                if (lane == 0) means[place * group + h0 + k] = inner[k];
            }
            #pragma unroll
            for (int k = 0; PLACEBO && k < QUAD; k++) {
                if (h0 + k >= group) break;
                float* row = rows + k * width;
                const auto inside = [&](int c) { return slope(row[c], shift[k], s) > 0.f; };
                const auto of = [&](int c) { return slope(row[c], shift[k], s) * (ratio[c] - inner[k]); };
                const Draw<float> draw = draw_of<float>(seen, place * group + h0 + k, inside, of);
                if (lane == 0) draws[place * group + h0 + k] = draw;
                for (int c = lane; c < filled; c += 32) {
                    const float ds = c < seen && inside(c) ? draw.at(c) : 0.f;
                    row[c] = ds;
                    square += ds * ds;
                }
            }
            for (int c = lane; !PLACEBO && c < filled; c += 32) {
                const float up = ratio[c];
                #pragma unroll
                for (int k = 0; k < QUAD; k++) {
                    if (h0 + k >= group) break;
                    const float ds = c < seen ? slope(rows[k * width + c], shift[k], s) * (up - inner[k]) : 0.f;
                    rows[k * width + c] = ds;
                    square += ds * ds;
                }
            }
            square = warp_sum(square);
            if (lane == 0) square_of[i][h0 / QUAD] = square;
        }
        __syncthreads();
        if (threadIdx.x < here) {
            double sum = 0;
            for (int i = 0; i < quads; i++) sum += square_of[threadIdx.x][i];
            squares[((long long)r.batch * t + r.first + round + threadIdx.x) * kv_heads + r.kv] = sum;
        }
        // for a watcher
        for (int i = warp; kept && i < here; i += WARPS) {
            const int token = r.first + round + i, own = token / chunk;
            const float* rows = scores + r.row_of(round + i) * width;
            const Cells at = cells_of(cells, first, blockIdx.y, token, t, chunks);
            float touched = 0;
            for (int c = lane; c <= own; c += 32) {
                const bool listed = at.has(c);
                bool any = false;
                for (int h = 0; h < group; h++) {
                    const float ds = stopped || c == own ? 0.f : rows[h * width + c];
                    any |= ds != 0.f;
                    if (listed) kept[(long long)at.entry(c) * group + h] = ds;
                }
                touched += any;
            }
            touched = warp_sum(touched);
            if (lane == 0) pairs[((long long)r.batch * t + token) * kv_heads + r.kv] = touched;
        }
    }
    // dq: a warp makes neighbouring columns of one slab, whose gradients it rounds once
    const u32 keys = shared_address(scratch) + OPERAND;
    const int each = slabs * (D / 16) > 2 * WARPS ? 4 : slabs * (D / 16) > WARPS ? 2 : 1, slab = warp * each / (D / 16), column = warp * each % (D / 16);
    float acc[PARTS][2][4] = {};
    if (most > 0) request_keys(keys, kbar, r, kv_heads, 0);
    each_tile(keys, kbar, r, kv_heads, most, [&](int base, u32 tile) {
        if (slab >= slabs) return;
        const float* rows = scores + (slab * 16 + lane / 4) * width + base + lane % 4 * 2;
        #pragma unroll
        for (int step = 0; step < TILE / 16; step++) {
            if (base + step * 16 >= most) break;
            u32 high[4], low[4];
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                const bool there = e < 2 || base + step * 16 + 8 < width;  // a row may end with half a step
                const float2 x = there ? *(const float2*)(rows + e % 2 * 8 * width + step * 16 + e / 2 * 8) : make_float2(0.f, 0.f);
                high[e] = high_part(x.x, x.y);
                low[e] = low_part(x.x, x.y, high[e]);
            }
            #pragma unroll
            for (int p = 0; p < PARTS; p++) {
                if (p >= each) break;
                u32 b[4];
                fragment_transposed<TILE>(b, tile, step * 16, column + p);
                mma(acc[p][0], high, b[0], b[1]);
                mma(acc[p][1], high, b[2], b[3]);
                mma(acc[p][0], low, b[0], b[1]);
                mma(acc[p][1], low, b[2], b[3]);
            }
        }
    });
    if (slab >= slabs) return;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int in_slab = lane / 4 + 8 * half, i = divided(in_slab, r.per_group), token = r.first + slab * r.slab_tokens() + i;
        if (i >= r.slab_tokens() || token >= t) continue;
        float* to = dq + (((long long)r.batch * t + token) * kv_heads * group + (r.kv - i) * group + in_slab) * HEAD + column * 16 + lane % 4 * 2;
        #pragma unroll
        for (int p = 0; p < PARTS; p++)
            #pragma unroll
            for (int m = 0; m < 2; m++)
                if (p < each && (column + p) * 16 + m * 8 < HEAD)
                    *(float2*)(to + p * 16 + m * 8) = make_float2(acc[p][m][2 * half] * s.factor, acc[p][m][2 * half + 1] * s.factor);
    }
}

#define SIDE 128
#define APART (TILE + 8)  // of the ratios of two tokens, so that those which a warp reads together lie in different banks

// A block: 64 chunks of a kv head, 16 a warp, and the tokens of a segment. partial [segments, b, n, g, HEAD].
//
// While the scores of a batch of rows are computed again, the next batch is on its way: its queries, and of its tokens' entries dbias and sums,
// 4 bytes a copy, from the words of its cells, which were asked for a batch before. A thread asks for the pairs of one chunk and every second token.
// Above 60 lines: that order is one loop, and dkbar is registers.
extern "C" __global__ void __launch_bounds__(SIDE, D == 128 ? 2 : 3)
router_keys(const bf16* __restrict__ q, const bf16* __restrict__ kbar, const float* __restrict__ shifts, const u64* __restrict__ cells,
            const u32* __restrict__ first, const float* __restrict__ sums, const float* __restrict__ dbias, const float* __restrict__ means,
            const float* __restrict__ offsets, const Draw<float>* __restrict__ draws, float* __restrict__ partial, int batches, int t, int kv_heads, int group, int n, int chunk,
            int q_stride, float factor, float alpha, float sigma, int straight) {
    extern __shared__ __align__(1024) u8 scratch[];
    const Settings s = {factor, alpha, sigma, 0, straight};
    struct __align__(16) Row { float shift, mean; int seen, at; };  // chunks that it sees of this block's, where its token's ratios begin
    __shared__ Row rows[2][TILE];
    __shared__ float less[2][TILE];  // of a token: the mean of dlogw
    __shared__ __align__(16) Draw<float> drawn[2][TILE];
    const int together = TILE / group;
    const u32 keys = shared_address(scratch), queries = keys + OPERAND;
    float* ups = (float*)(scratch + 3 * OPERAND);  // [2, together, APART]; ratios in the end
    float* bys = ups + 2 * together * APART;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c0 = blockIdx.x * TILE;
    const int batch = blockIdx.y / kv_heads, kv = blockIdx.y % kv_heads, heads = kv_heads * group, chunks = ceil_div(t, chunk), tiles = ceil_div(t, 64);
    const float per_group = 1.f / group, per_chunk = 1.f / chunk, inverse = 1.f / s.sigma, heads_of = SOFT ? 1.f : (float)group;
    load_tile<TILE, HEAD, SIDE>(keys, kbar, [&](int i) {
        return c0 + i < n ? kbar + (((long long)batch * n + c0 + i) * kv_heads + kv) * HEAD : (const bf16*)0;
    });
    copy_commit();
    // tokens behind the first of these chunks, in equal segments
    const int from = (c0 + 1) * chunk, each = ceil_div(ceil_div(max(0, t - from), (int)gridDim.z), together) * together;
    const int begin = from + blockIdx.z * each, end = min(t, begin + each), rounds = ceil_div(max(0, end - begin), together);
    const int x = threadIdx.x % TILE, c = c0 + x;
    // the cells of chunk c that a batch of at most 64 tokens lies in, two at most
    struct Words { u64 bits[2]; u32 first[2]; };
    const auto look_up = [&](int i) {
        Words words;
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            const int tile = (begin + i * together) / 64 + k;
            const bool there = i < rounds && tile < tiles && c < chunks;
            const long long at = ((long long)blockIdx.y * tiles + tile) * chunks + c;
            words.bits[k] = there ? cells[at] : 0;
            words.first[k] = there ? first[at] : 0;
        }
        return words;
    };
    // whether this thread's chunk is one of the token's before its own
    const auto counts = [&](const Words& words, int i, int place) {
        const int token = begin + i * together + place, k = token / 64 - (begin + i * together) / 64;
        return token < end && c < divided(token, per_chunk) && ((k > 0 ? words.bits[1] : words.bits[0]) >> (token & 63) & 1);
    };
    const auto load = [&](int i, const Words& words) {
        if (i < rounds) {
            const int slot = i % 2, token0 = begin + i * together;
            load_tile<TILE, HEAD, SIDE>(queries + slot * OPERAND, q, [&](int row) {
                const int place = divided(row, per_group);
                const bool valid = place < together && token0 + place < end;
                return valid ? q + ((long long)batch * t + token0 + place) * q_stride + ((kv - place) * group + row) * HEAD : (const bf16*)0;
            });
            #pragma unroll 2
            for (int place = threadIdx.x / TILE; place < together; place += SIDE / TILE) {
                const bool has = counts(words, i, place);
                const int token = token0 + place, k = token / 64 > token0 / 64;
                const u64 before = (k ? words.bits[1] : words.bits[0]) & ((1ull << (token & 63)) - 1);
                const u32 entry = has ? (k ? words.first[1] : words.first[0]) + __popcll(before) : 0;
                copy4(shared_address(ups + (slot * together + place) * APART + x), dbias + entry, has);
                copy4(shared_address(bys + (slot * together + place) * APART + x), sums + entry, has);
            }
            if (threadIdx.x < TILE) {
                const int row = threadIdx.x, place = divided(row, per_group), token = token0 + place;
                const bool valid = place < together && token < end;
                const long long at = ((long long)batch * t + token) * heads + (kv - place) * group + row;
                Row& to = rows[slot][row];
                copy4(shared_address(&to.shift), shifts + (valid ? at : 0), valid);
                copy4(shared_address(&to.mean), means + (valid ? at : 0), valid);
                if (PLACEBO) copy16(shared_address(&drawn[slot][row]), draws + (valid ? at : 0), valid);
                to.seen = valid ? min(n, divided(token, per_chunk)) - c0 : 0;
                to.at = min(place, together - 1) * APART;
            } else if (x < together) {
                const bool valid = token0 + x < end;
                copy4(shared_address(&less[slot][x]), offsets + (valid ? ((long long)batch * t + token0 + x) * kv_heads + kv : 0), valid);
            }
        }
        copy_commit();
    };
    float acc[D / 8][4] = {};
    Words next = look_up(0);
    load(0, next);
    next = look_up(1);
    for (int i = 0; i < rounds; i++) {
        copy_wait<0>();
        __syncthreads();  // the batch is there, the one before has been read
        load(i + 1, next);
        next = look_up(i + 2);
        const int slot = i % 2;
        #pragma unroll 2
        for (int place = threadIdx.x / TILE; place < together; place += SIDE / TILE) {
            const int at = (slot * together + place) * APART + x;
            const float divisor = bys[at] * heads_of;
            ups[at] = divisor != 0.f ? (ups[at] * inverse - less[slot][place]) / divisor : 0.f;
        }
        __syncthreads();
        const u32 tile = queries + slot * OPERAND;
        const float* ratios = ups + slot * together * APART;
        const float* divisors = bys + slot * together * APART;
        #pragma unroll
        for (int m = 0; m < TILE / 16; m++) {
            float z[2][4] = {};
            multiply<TILE, TILE, D>(z, keys, warp * 16, tile, m * 16);
            float ds[4][2];  // by element of the fragment; 16 rows of the batch by two chunks a lane
            #pragma unroll
            for (int y = 0; y < 4; y++) {
                const int k = y / 2 * 8 + y % 2;
                const Row row = rows[slot][m * 16 + k + lane % 4 * 2];
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int own = warp * 16 + lane / 4 + half * 8;
                    float slope_of = slope(z[y / 2][half * 2 + y % 2] * s.factor, row.shift, s);
                    if (own >= row.seen || (SOFT && s.straight == 2 && divisors[row.at + own] == 0.f)) slope_of = 0.f;
                    float& to = ds[y / 2 * 2 + half][y % 2];
                    if (PLACEBO) to = slope_of > 0.f ? drawn[slot][m * 16 + k + lane % 4 * 2].at(c0 + own) : 0.f;
                    else to = slope_of * (ratios[row.at + own] - row.mean);
                }
            }
            u32 high[4], low[4];
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                high[e] = high_part(ds[e][0], ds[e][1]);
                low[e] = low_part(ds[e][0], ds[e][1], high[e]);
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
    }
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int own = c0 + warp * 16 + lane / 4 + 8 * half;
        if (own >= n) continue;
        float* to = partial + ((((long long)blockIdx.z * batches + batch) * n + own) * kv_heads + kv) * HEAD + lane % 4 * 2;
        #pragma unroll
        for (int m = 0; m < HEAD / 8; m++) *(float2*)(to + m * 8) = make_float2(acc[m][2 * half] * s.factor, acc[m][2 * half + 1] * s.factor);
    }
}
