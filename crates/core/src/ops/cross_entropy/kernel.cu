// R: what the logits are and what is computed in; X: what their gradient is. A block takes a row of logits [rows, stride], of which
// `vocab` count. nll = lse - logit[target], 0 where the target is IGNORE. Where dlogits are given they become (softmax - onehot) * factor.
// PIECES above 0: R is float, a row has at most 4096 PIECES logits, which stay in registers; blocks go over rows, and the copy engine brings the next
// row while one is worked on. 0: any row, read three times.
#define IGNORE 0xffffffffu

#if PIECES
#define EACH_PIECE(i, j) _Pragma("unroll") for (int i = 0, j = threadIdx.x * 4; i < PIECES; i++, j += 4096)

extern "C" __global__ void __launch_bounds__(1024, 1)
cross_entropy(const float* __restrict__ logits, X* __restrict__ dlogits, const u32* __restrict__ targets, float* __restrict__ nll, int rows,
              int vocab, long long stride, float factor) {
    extern __shared__ __align__(128) u8 scratch[];  // the next row
    __shared__ float sums[32];
    __shared__ u64 arrived;
    const float* next = (const float*)scratch;
    const u32 barrier = shared_address(&arrived);
    const int bytes = ceil_div(vocab, 4) * 16;
    const auto bring = [&](int row) {
        if (threadIdx.x > 0 || row >= rows) return;
        barrier_expect(barrier, bytes);
        copy_bulk(shared_address(scratch), logits + row * stride, bytes, barrier);
    };
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_fence();
    }
    __syncthreads();
    bring(blockIdx.x);
    u32 parity = 0;
    for (int row = blockIdx.x; row < rows; row += gridDim.x, parity ^= 1) {
        const u32 target = targets[row];
        X* out = dlogits + row * stride;
        float x[PIECES][4], top = NOTHING, sum = 0, own = 0;
        barrier_wait(barrier, parity);
        EACH_PIECE(i, j) {
            if (j < vocab) take(x[i], next + j);
            for (int e = 0; e < 4; e++) {
                if (j + e >= vocab) x[i][e] = NOTHING;
                top = larger(top, x[i][e]);
            }
        }
        if (threadIdx.x == 0 && target != IGNORE) own = next[target];
        top = block_max(top, sums);  // its barriers come after every read of the row
        bring(row + gridDim.x);
        EACH_PIECE(i, j) for (int e = 0; e < 4; e++) {
            x[i][e] = exp2_fast((x[i][e] - top) * LOG2E);
            sum += x[i][e];
        }
        sum = block_sum(sum, sums);
        const bool counts = target != IGNORE;
        if (threadIdx.x == 0) nll[row] = counts ? logf(sum) + top - own : 0.f;
        if (!dlogits) continue;
        const float inverse = factor / sum;
        EACH_PIECE(i, j) {
            for (int e = 0; e < 4; e++) {
                x[i][e] = counts ? x[i][e] * inverse : 0.f;
                if ((u32)(j + e) == target) x[i][e] -= factor;
            }
            if (j + 3 < vocab) put(out + j, x[i]);
            else for (int e = 0; e < 4; e++) if (j + e < vocab) out[j + e] = As<X>::of(x[i][e]);
        }
    }
}
#else
extern "C" __global__ void __launch_bounds__(512)
cross_entropy(const R* __restrict__ logits, X* __restrict__ dlogits, const u32* __restrict__ targets, R* __restrict__ nll, int rows, int vocab,
              long long stride, R factor) {
    __shared__ R scratch[32];
    const R* row = logits + blockIdx.x * stride;
    X* out = dlogits + blockIdx.x * stride;
    const u32 target = targets[blockIdx.x];
    if (target == IGNORE) {
        if (dlogits) for (int j = threadIdx.x; j < vocab; j += 512) out[j] = As<X>::of((R)0);
        if (threadIdx.x == 0) nll[blockIdx.x] = 0;
        return;
    }
    R top = -INFINITY_OF_R;
    #pragma unroll 8
    for (int j = threadIdx.x; j < vocab; j += 512) top = larger(top, row[j]);
    top = block_max(top, scratch);
    R sum = 0;
    #pragma unroll 8
    for (int j = threadIdx.x; j < vocab; j += 512) sum += exp_of(row[j] - top);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) nll[blockIdx.x] = log_of(sum) + top - row[target];
    if (!dlogits) return;
    const R inverse = factor / sum;
    #pragma unroll 8
    for (int j = threadIdx.x; j < vocab; j += 512) {
        const R p = exp_of(row[j] - top) * inverse;
        out[j] = As<X>::of(j == (int)target ? p - factor : p);
    }
}
#endif
