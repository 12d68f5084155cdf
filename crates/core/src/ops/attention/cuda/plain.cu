// Attention and routing with whole rows of scores in memory: any head width, chunk size and group, and the source that central
// differences check. R: float or double. Rows of scores are [b, h, t, m]; a warp takes a row. Above 400 lines: one unit to compile for each
// number, so that a process that needs one of these kernels does not wait for two compilations.

INLINE R power_of(R x, R e) { return e == (R)1 ? x : e == (R)2 ? x * x : pow_of(x, e); }
// p^(2 - alpha) on the support, 0 off it
INLINE R slope_of(R p, R alpha) { return p > (R)0 ? (alpha == (R)1 ? p : alpha == (R)2 ? (R)1 : alpha == (R)1.5 ? root_of(p) : pow_of(p, (R)2 - alpha)) : (R)0; }

// c = factor a b for every (batch, head) of the grid's last axis, each matrix at its own strides; head / div counts b's heads. Products
// of `repeats` neighbouring heads add up, in order.
extern "C" __global__ void __launch_bounds__(256)
product(const R* __restrict__ a, const R* __restrict__ b, R* __restrict__ c, int m, int n, int k, int heads, int div, int repeats, R factor,
        long long a_batch, long long a_head, long long a_repeat, long long a_row, long long a_column,
        long long b_batch, long long b_head, long long b_repeat, long long b_row, long long b_column,
        long long c_batch, long long c_head, long long c_row) {
    __shared__ R left[32][33], right[32][33];
    const int column = threadIdx.x % 32, part = threadIdx.x / 32, i0 = blockIdx.y * 32, j0 = blockIdx.x * 32;
    const int batch = blockIdx.z / heads, head = blockIdx.z % heads;
    R sum[4] = {};
    for (int r = 0; r < repeats; r++) {
        const R* from_a = a + batch * a_batch + head * a_head + r * a_repeat;
        const R* from_b = b + batch * b_batch + head / div * b_head + r * b_repeat;
        for (int k0 = 0; k0 < k; k0 += 32) {
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = part + 8 * e;
                left[row][column] = i0 + row < m && k0 + column < k ? from_a[(i0 + row) * a_row + (k0 + column) * a_column] : (R)0;
                right[row][column] = k0 + row < k && j0 + column < n ? from_b[(k0 + row) * b_row + (j0 + column) * b_column] : (R)0;
            }
            __syncthreads();
            #pragma unroll 8
            for (int i = 0; i < 32; i++)
                #pragma unroll
                for (int e = 0; e < 4; e++) sum[e] += left[part + 8 * e][i] * right[i][column];
            __syncthreads();
        }
    }
    #pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = i0 + part + 8 * e;
        if (row < m && j0 + column < n) c[batch * c_batch + head * c_head + row * c_row + j0 + column] = sum[e] * factor;
    }
}

// Which of m keys query i sees. 0: those up to itself; 1: the last x of them; 2: windows of x every y that have ended; 3: those up to
// itself in its listed chunks of x; 4: chunks of x before its own; 5: the listed ones of those; 6: the tokens of the chunks of x before its own.
struct Sees {
    int mode, x, y;
    METHOD int begin(int i) const { return mode == 1 ? max(i + 1 - x, 0) : 0; }
    METHOD int end(int i) const {
        return mode == 2 ? max(i + 1 + y - x, 0) / y : mode == 4 || mode == 5 ? i / x : mode == 6 ? i / x * x : i + 1;
    }
};

// Cells and entries of a kv head: see the mask.
struct Lists {
    const u64* cells;
    const u32* first;
    long long row;
    METHOD Lists(const u64* cells, const u32* first, int kv_row, int t, int chunk, int i)
        : cells(cells), first(first), row(((long long)kv_row * ceil_div(t, 64) + i / 64) * ceil_div(t, chunk)) {}
    METHOD bool has(int c, int i) const { return cells[row + c] >> (i & 63) & 1; }
    METHOD u32 entry(int c, int i) const { return first[row + c] + __popcll(cells[row + c] & ((1ull << (i & 63)) - 1)); }
};

// Scores become probabilities in place: softmax (alpha 1) or alpha-entmax over what the query sees, 0 elsewhere.
extern "C" __global__ void __launch_bounds__(256)
normalize(R* __restrict__ scores, const u64* __restrict__ cells, const u32* __restrict__ first, const R* __restrict__ bias,
          long long rows, int h, int group, int t, int m, int mode, int x, int y, R alpha) {
    const long long at = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (at >= rows) return;
    const int lane = threadIdx.x % 32, i = (int)(at % t);
    const Sees sees = {mode, x, y};
    const int begin = sees.begin(i), end = min(sees.end(i), m);
    const long long bh = at / t;
    const Lists lists(cells, first, (int)(bh / h * (h / group) + bh % h / group), t, mode == 3 || mode == 5 ? x : 1, i);
    R* z = scores + at * m;
    R top = -INFINITY_OF_R;
    for (int j = lane; j < m; j += 32) {
        bool seen = j >= begin && j < end;
        R s = z[j];
        if (seen && mode == 3) {
            seen = lists.has(j / x, i);
            if (seen && bias) s += bias[lists.entry(j / x, i)];
        } else if (seen && mode == 5) seen = lists.has(j, i);
        z[j] = seen ? s : -INFINITY_OF_R;
        if (seen) top = larger(top, s);
    }
    top = warp_max(top);
    if (top == -INFINITY_OF_R) {
        for (int j = lane; j < m; j += 32) z[j] = 0;
        return;
    }
    if (alpha == (R)1) {
        R sum = 0;
        for (int j = lane; j < m; j += 32) {
            z[j] = z[j] == -INFINITY_OF_R ? (R)0 : exp_of(z[j] - top);
            sum += z[j];
        }
        const R inverse = (R)1 / warp_sum(sum);
        for (int j = lane; j < m; j += 32) z[j] *= inverse;
        return;
    }
    // Newton on the beta-norm of the clipped scores, from the left: as the op entmax
    const R share = alpha - (R)1, beta = (R)1 / share;
    R tau = -1;
    for (int step = 0; step < 100; step++) {
        R low = 0, high = 0;
        for (int j = lane; j < m; j += 32) {
            const R u = (z[j] - top) * share - tau;
            if (u > (R)0) {
                const R below = power_of(u, beta - (R)1);
                low += below;
                high += below * u;
            }
        }
        low = warp_sum(low);
        const R norm = pow_of(warp_sum(high), share), next = tau + (norm - (R)1) * power_of(norm, beta - (R)1) / low;
        if (!(next > tau) || next > (R)1) break;
        tau = next;
    }
    for (int j = lane; j < m; j += 32) {
        const R u = (z[j] - top) * share - tau;
        z[j] = u > (R)0 ? power_of(u, beta) : (R)0;
    }
}

// dp becomes the scores' gradient times `factor` in place.
extern "C" __global__ void __launch_bounds__(256)
normalize_backward(const R* __restrict__ probabilities, R* __restrict__ gradients, long long rows, int m, R alpha, R factor) {
    const long long at = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (at >= rows) return;
    const int lane = threadIdx.x % 32;
    const R* p = probabilities + at * m;
    R* d = gradients + at * m;
    R inner = 0, sum = 0;
    for (int j = lane; j < m; j += 32) {
        const R r = slope_of(p[j], alpha);
        if (r != (R)0) inner += r * d[j];
        sum += r;
    }
    inner = warp_sum(inner);
    sum = warp_sum(sum);
    const R mean = sum == (R)0 ? (R)0 : inner / sum;
    for (int j = lane; j < m; j += 32) {
        const R r = slope_of(p[j], alpha);
        d[j] = r == (R)0 ? (R)0 : r * (d[j] - mean) * factor;
    }
}

// The gradient of the bias of every entry: the sum over the chunk's tokens and the group's heads of ds / factor. A thread a (b, g, i, chunk).
extern "C" __global__ void __launch_bounds__(256)
bias_backward(const R* __restrict__ ds, const u64* __restrict__ cells, const u32* __restrict__ first, R* __restrict__ dbias,
              long long all, int h, int group, int t, int chunk, R factor) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= all) return;
    const int chunks = ceil_div(t, chunk), g = h / group, c = (int)(at % chunks), i = (int)(at / chunks % t);
    const long long bg = at / chunks / t;
    if (c > i / chunk) return;
    const Lists lists(cells, first, (int)bg, t, chunk, i);
    if (!lists.has(c, i)) return;
    R sum = 0;
    for (int e = 0; e < group; e++) {
        const R* row = ds + (((bg / g * h + bg % g * group + e) * t) + i) * t;
        for (int j = c * chunk; j < min(c * chunk + chunk, i + 1); j++) sum += row[j];
    }
    dbias[lists.entry(c, i)] = sum / factor;
}

// ---- routing: a warp takes a (b, g, i) ------------------------------------------------------------------------------------

struct Query {
    long long at, bg;
    int lane, i, h, group, t, n;
    METHOD Query(int h, int group, int t, int n) : h(h), group(group), t(t), n(n) {
        at = (long long)blockIdx.x * 8 + threadIdx.x / 32;
        lane = threadIdx.x % 32;
        i = (int)(at % t);
        bg = at / t;
    }
    // the row of a head in [b, h, t, n]
    METHOD long long row(int head) const { return ((bg / (h / group) * h + bg % (h / group) * group + head) * t + i) * (long long)n; }
    METHOD u64* cells(u64* all, int chunk) const { return all + (bg * ceil_div(t, 64) + i / 64) * ceil_div(t, chunk); }
};

// w [b, g, t, n], the sum of the heads' p times `share`.
extern "C" __global__ void __launch_bounds__(256)
mean_of_heads(const R* __restrict__ p, R* __restrict__ w, long long queries, int h, int group, int t, int n, R share) {
    const Query q(h, group, t, n);
    if (q.at >= queries) return;
    for (int c = q.lane; c < n; c += 32) {
        R sum = 0;
        for (int e = 0; e < group; e++) sum += p[q.row(e) + c];
        w[q.at * n + c] = sum * share;
    }
}

// The bits of the chunks with a weight above zero and of the own one.
extern "C" __global__ void __launch_bounds__(256)
mark_support(const R* __restrict__ w, u64* __restrict__ cells, long long queries, int h, int group, int t, int n, int chunk) {
    const Query q(h, group, t, n);
    if (q.at >= queries) return;
    const int own = q.i / chunk;
    for (int c = q.lane; c <= own; c += 32)
        if (c == own || w[q.at * n + c] > (R)0) atomicOr(q.cells(cells, chunk) + c, 1ull << (q.i & 63));
}

// w, bias and p of the heads of every entry. center: 0 nothing, 1 the mean of log w over the support. A weight below `least` counts as that.
extern "C" __global__ void __launch_bounds__(256)
emit(const R* __restrict__ p, const R* __restrict__ w, const u64* __restrict__ cells, const u32* __restrict__ first,
     const R* __restrict__ own_bias, R* __restrict__ weights, R* __restrict__ bias, R* __restrict__ heads,
     long long queries, int h, int group, int t, int n, int chunk, R sigma, int center, R least) {
    const Query q(h, group, t, n);
    if (q.at >= queries) return;
    const int own = q.i / chunk;
    const Lists lists(cells, first, (int)q.bg, t, chunk, q.i);
    R logs = 0, count = 0;
    for (int c = q.lane; c < own; c += 32)
        if (lists.has(c, q.i)) {
            logs += log_of(w[q.at * n + c]);
            count += 1;
        }
    logs = warp_sum(logs);
    count = warp_sum(count);
    const R mean = center && count > (R)0 ? logs / count : (R)0;
    for (int c = q.lane; c <= own; c += 32) {
        if (!lists.has(c, q.i)) continue;
        const u32 entry = lists.entry(c, q.i);
        weights[entry] = c == own ? (R)0 : w[q.at * n + c];
        bias[entry] = c == own ? (own_bias ? own_bias[q.bg % (h / group)] : (R)0) : (log_of(larger(w[q.at * n + c], least)) - mean) / sigma;
        for (int e = 0; e < group; e++) heads[(long long)entry * group + e] = c == own ? (R)0 : p[q.row(e) + c];
    }
}

// The gradient of the scores from that of the bias. straight: p is softmax and w its sum over the heads, otherwise entmax and the mean.
// ds [b, h, t, n] is written in full; own [queries] gets the own chunk's gradient, squares [queries] the sum of squares. For a watcher,
// where they are given: the gradient of every entry's scores [entries, group], and the number of chunks with one [queries]. placebo: entmax's, with
// drawn numbers in its place.
// Above 60 lines: a query's passes over its chunks follow from each other: the mean, every head's gradient, what a watcher asks for.
extern "C" __global__ void __launch_bounds__(256)
route_backward(const R* __restrict__ p, const R* __restrict__ w, const u64* __restrict__ cells, const u32* __restrict__ first,
               const R* __restrict__ dbias, R* __restrict__ ds, R* __restrict__ own_sum, double* __restrict__ squares,
               R* __restrict__ scores, double* __restrict__ pairs, long long queries, int h, int group, int t, int n, int chunk, R sigma,
               int center, R alpha, int straight, R least, int placebo) {
    const Query q(h, group, t, n);
    if (q.at >= queries) return;
    const int own = q.i / chunk;
    const Lists lists(cells, first, (int)q.bg, t, chunk, q.i);
    R total = 0, count = 0;
    for (int c = q.lane; c < own; c += 32)
        if (lists.has(c, q.i)) {
            total += dbias[lists.entry(c, q.i)] / sigma;
            count += 1;
        }
    total = warp_sum(total);
    count = warp_sum(count);
    const R mean = center && count > (R)0 ? total / count : (R)0;
    double square = 0;
    for (int e = 0; e < group; e++) {
        const R* row = p + q.row(e);
        R* out = ds + q.row(e);
        R inner = 0, sum = 0;
        for (int c = q.lane; c < n; c += 32) {
            R d = 0;
            if (c < own && lists.has(c, q.i)) {
                const R dlogw = dbias[lists.entry(c, q.i)] / sigma - mean, weight = w[q.at * n + c];
                if (straight) {
                    d = weight > least ? row[c] * (dlogw / weight) : (R)0;
                } else {
                    const R r = slope_of(row[c], alpha);
                    d = r == (R)0 ? (R)0 : r / (weight * (R)group) * dlogw;
                    sum += r;
                }
            }
            inner += d;
            out[c] = d;
        }
        inner = warp_sum(inner);
        sum = warp_sum(sum);
        const R share = straight ? inner : sum == (R)0 ? (R)0 : inner / sum;
        for (int c = q.lane; c < n; c += 32) {
            const bool listed = c < own && lists.has(c, q.i);
            if (c < own && (straight || listed)) out[c] -= (straight ? row[c] : slope_of(row[c], alpha)) * share;
        }
        if (placebo) {
            const auto inside = [&](int c) { return lists.has(c, q.i) && row[c] > (R)0; };
            const Draw<R> draw = draw_of<R>(own, q.at * group + e, inside, [&](int c) { return out[c]; });
            for (int c = q.lane; c < own; c += 32) if (inside(c)) out[c] = draw.at(c);
        }
        for (int c = q.lane; c < n; c += 32) {
            const bool listed = c < own && lists.has(c, q.i);
            square += (double)out[c] * (double)out[c];
            if (scores && listed) scores[(long long)lists.entry(c, q.i) * group + e] = out[c];
        }
    }
    square = warp_sum(square);
    if (q.lane == 0) {
        squares[q.at] = square;
        own_sum[q.at] = dbias[lists.entry(own, q.i)];
        if (scores) for (int e = 0; e < group; e++) scores[(long long)lists.entry(own, q.i) * group + e] = 0;
    }
    if (pairs) {
        double touched = 0;
        for (int c = q.lane; c < own; c += 32) {
            bool any = false;
            for (int e = 0; e < group; e++) any |= ds[q.row(e) + c] != (R)0;
            touched += any;
        }
        touched = warp_sum(touched);
        if (q.lane == 0) pairs[q.at] = touched;
    }
}

// The indexer's loss. With z [b, g, t, t] its scores and P [b, g, t, t] the layer's softmax over the listed tokens, mean over the group: `parts`
// [queries] get `share` sum_c P_c (log P_c - log p_c), p_c the softmax of z added up by chunk. Where `upstream` is given, z becomes its gradient times
// `factor`, upstream share (p_c - P_c) softmax within c, 0 off the list. z is used up; each lane reads what it has written itself.
extern "C" __global__ void __launch_bounds__(256)
indexer_kl(R* z, const R* __restrict__ teacher, const u64* __restrict__ cells, const u32* __restrict__ first, R* __restrict__ parts,
           const R* __restrict__ upstream, long long queries, int h, int group, int t, int n, int chunk, R share, R factor) {
    const Query q(h, group, t, n);
    if (q.at >= queries) return;
    const Lists lists(cells, first, (int)q.bg, t, chunk, q.i);
    R* row = z + q.at * t;
    const R* from = teacher + q.at * t;
    // log sum exp of the chunk's scores
    const auto log_of_chunk = [&](int begin, int end) {
        R top = -INFINITY_OF_R, sum = 0;
        for (int j = begin + q.lane; j < end; j += 32) top = larger(top, row[j]);
        top = warp_max(top);
        for (int j = begin + q.lane; j < end; j += 32) sum += exp_of(row[j] - top);
        return top + log_of(warp_sum(sum));
    };
    R top = -INFINITY_OF_R, sum = 0, divergence = 0;
    for (int c = 0; c * chunk <= q.i; c++) {
        if (!lists.has(c, q.i)) continue;
        const R log = log_of_chunk(c * chunk, min(c * chunk + chunk, q.i + 1)), now = larger(top, log);
        sum = sum * exp_of(top - now) + exp_of(log - now);
        top = now;
    }
    const R all = top + log_of(sum), scaled = upstream ? *upstream * share * factor : (R)0;
    for (int c = 0; c * chunk < t; c++) {
        const int begin = c * chunk, end = min(begin + chunk, q.i + 1);
        if (begin > q.i || !lists.has(c, q.i)) {
            if (upstream) for (int j = begin + q.lane; j < min(begin + chunk, t); j += 32) row[j] = 0;
            continue;
        }
        const R log = log_of_chunk(begin, end);
        R of_layer = 0;
        for (int j = begin + q.lane; j < end; j += 32) of_layer += from[j];
        of_layer = warp_sum(of_layer);
        if (of_layer > (R)0) divergence += of_layer * (log_of(of_layer) - (log - all));
        if (!upstream) continue;
        const R gradient = (exp_of(log - all) - of_layer) * scaled;
        for (int j = begin + q.lane; j < min(begin + chunk, t); j += 32) row[j] = j < end ? gradient * exp_of(row[j] - log) : (R)0;
    }
    if (q.lane == 0) parts[q.at] = divergence * share;
}

// The largest of a row's scores that is not taken (a taken one is -1), ties to the lower chunk: its chunk, or -1. Scores are not negative.
INLINE int best(const R* score, int end, int lane) {
    R top = -1;
    int at = -1;
    for (int c = lane; c < end; c += 32)
        if (score[c] > top) {
            top = score[c];
            at = c;
        }
    #pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const R other = __shfl_xor_sync(FULL, top, o);
        const int place = __shfl_xor_sync(FULL, at, o);
        if (other > top || (other == top && place >= 0 && place < at)) {
            top = other;
            at = place;
        }
    }
    return at;
}

// The best chunks before the own one, and those that are forced: the first `init`, the last `local` up to the own one. `top` of them in all, or
// as many as `tops` [g, t] has for the query.
// Scores [b, g, t, n] are used up; not restricted, because lanes read what others have written (as of the shares below).
extern "C" __global__ void __launch_bounds__(256)
choose(R* scores, u64* __restrict__ cells, long long queries, int h, int group, int t, int n, int chunk, int top, int init, int local,
       const u32* __restrict__ tops) {
    const Query q(h, group, t, n);
    if (q.at >= queries) return;
    const int own = q.i / chunk;
    R* score = scores + q.at * n;
    u64* to = q.cells(cells, chunk);
    const u64 bit = 1ull << (q.i & 63);
    int forced = 0;
    for (int c = q.lane; c <= own; c += 32)
        if (c < init || c + local > own) {
            atomicOr(to + c, bit);
            if (c < n) score[c] = -1;
            forced++;
        }
    forced = (int)warp_sum((u32)forced);
    __syncwarp();
    const int wanted = tops ? (int)tops[q.bg % (h / group) * t + q.i] : top;
    for (int left = wanted - forced; left > 0; left--) {
        const int c = best(score, min(own + 1, n), q.lane);
        if (c < 0) break;
        if (q.lane == 0) {
            atomicOr(to + c, bit);
            score[c] = -1;
        }
        __syncwarp();
    }
}

// The score of every chunk [b, g, t, n] from those of the windows that touch it [b, g, t, m]: the largest, or (overlap) the sum by the whole
// strides that they share. What the query does not see is 0.
extern "C" __global__ void __launch_bounds__(256)
pool_windows(const R* __restrict__ windows, R* __restrict__ scores, long long all, int n, int m, int chunk, int length, int stride, int overlap) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= all) return;
    const int c = (int)(at % n), from = c * chunk, to = from + chunk;
    const R* row = windows + at / n * m;
    R score = 0;
    for (int w = max(from + stride - length, 0) / stride; w < min(m, ceil_div(to, stride)); w++) {
        const int strides = max(min(to, w * stride + length) - max(from, w * stride), 0) / stride;
        if (strides > 0) score = overlap ? score + (R)strides * row[w] : larger(score, row[w]);
    }
    scores[at] = score;
}

// ---- summaries: a warp takes a (b, chunk, kv head) -------------------------------------------------------------------------

INLINE R dot(const R* a, const R* b, int d) {
    R sum = 0;
    for (int e = threadIdx.x % 32; e < d; e += 32) sum += a[e] * b[e];
    return warp_sum(sum);
}

// a [b, n, g, chunk] and kbar [b, n, g, d].
extern "C" __global__ void __launch_bounds__(256)
summarize(const R* __restrict__ k, const R* __restrict__ qbar, R* __restrict__ kbar, R* weights, long long all, int t, int g, int n,
          int d, int chunk, R scale) {
    const long long at = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (at >= all) return;
    const int lane = threadIdx.x % 32, kv = (int)(at % g);
    const R* keys = k + ((at / g / n * t + at / g % n * chunk) * g + kv) * d;
    R* a = weights + at * chunk;
    R top = -INFINITY_OF_R, sum = 0;
    for (int j = 0; j < chunk; j++) {
        const R z = dot(qbar + kv * d, keys + (long long)j * g * d, d) * scale;
        if (lane == j % 32) a[j] = z;
        top = larger(top, z);
    }
    for (int j = lane; j < chunk; j += 32) {
        a[j] = exp_of(a[j] - top);
        sum += a[j];
    }
    const R inverse = (R)1 / warp_sum(sum);
    for (int j = lane; j < chunk; j += 32) a[j] *= inverse;
    __syncwarp();
    for (int e = lane; e < d; e += 32) {
        R out = 0;
        for (int j = 0; j < chunk; j++) out += a[j] * keys[(long long)j * g * d + e];
        kbar[at * d + e] = out;
    }
}

// Adds to dk [b, t, g, d]; dqbar comes as one row a chunk and kv head, to be added in order.
extern "C" __global__ void __launch_bounds__(256)
summarize_backward(const R* __restrict__ k, const R* __restrict__ qbar, const R* __restrict__ weights, const R* __restrict__ dkbar,
                   R* __restrict__ dk, R* __restrict__ dqbar, long long all, int t, int g, int n, int d, int chunk, R scale) {
    const long long at = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (at >= all) return;
    const int lane = threadIdx.x % 32, kv = (int)(at % g);
    const long long place = ((at / g / n * t + at / g % n * chunk) * g + kv) * d;
    const R *keys = k + place, *a = weights + at * chunk, *up = dkbar + at * d;
    R inner = 0;
    for (int j = 0; j < chunk; j++) inner += a[j] * dot(up, keys + (long long)j * g * d, d);
    for (int e = lane; e < d; e += 32) dqbar[at * d + e] = 0;
    for (int j = 0; j < chunk; j++) {
        const R* key = keys + (long long)j * g * d;
        const R dz = a[j] * (dot(up, key, d) - inner) * scale;
        for (int e = lane; e < d; e += 32) {
            dk[place + (long long)j * g * d + e] += a[j] * up[e] + dz * qbar[kv * d + e];
            dqbar[at * d + e] += dz * key[e];
        }
    }
}

// ---- landmark: one query head a kv head -----------------------------------------------------------------------------------

// bias = r - log sum exp of the chunk's scores for the listed chunks before the own one, 0 for that. Scores s [b, h, t, t] and r [b, h, t, n].
// A thread a (b, h, i, chunk) of `all`.
extern "C" __global__ void __launch_bounds__(256)
landmark(const R* __restrict__ s, const R* __restrict__ r, const u64* __restrict__ cells, const u32* __restrict__ first, R* __restrict__ bias,
         long long all, int t, int n, int chunk) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= all) return;
    const int chunks = ceil_div(t, chunk), c = (int)(at % chunks), i = (int)(at / chunks % t);
    const Lists lists(cells, first, (int)(at / chunks / t), t, chunk, i);
    if (c > i / chunk || !lists.has(c, i)) return;
    if (c == i / chunk) {
        bias[lists.entry(c, i)] = 0;
        return;
    }
    const R* z = s + at / chunks * t + c * chunk;
    R top = z[0], sum = 0;
    for (int j = 1; j < chunk; j++) top = larger(top, z[j]);
    for (int j = 0; j < chunk; j++) sum += exp_of(z[j] - top);
    bias[lists.entry(c, i)] = r[at / chunks * n + c] - (top + log_of(sum));
}

// s and r become their gradients: -softmax(s) dbias within a listed chunk and dbias, 0 elsewhere.
extern "C" __global__ void __launch_bounds__(256)
landmark_backward(R* __restrict__ s, R* __restrict__ r, const u64* __restrict__ cells, const u32* __restrict__ first, const R* __restrict__ dbias,
                  long long all, int t, int n, int chunk) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= all) return;
    const int chunks = ceil_div(t, chunk), c = (int)(at % chunks), i = (int)(at / chunks % t), end = min(chunk, t - c * chunk);
    const Lists lists(cells, first, (int)(at / chunks / t), t, chunk, i);
    const bool listed = c < i / chunk && lists.has(c, i);
    R* z = s + at / chunks * t + c * chunk;
    if (c < n) r[at / chunks * n + c] = listed ? dbias[lists.entry(c, i)] : (R)0;
    if (!listed) {
        for (int j = 0; j < end; j++) z[j] = 0;
        return;
    }
    R top = z[0], sum = 0;
    for (int j = 1; j < end; j++) top = larger(top, z[j]);
    #pragma unroll 1
    for (int j = 0; j < end; j++) sum += exp_of(z[j] - top);
    const R factor = -dbias[lists.entry(c, i)] / sum;
    #pragma unroll 1
    for (int j = 0; j < end; j++) z[j] = exp_of(z[j] - top) * factor;
}
