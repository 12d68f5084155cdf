// R: what the logits are and what is computed in; X: what their gradient is. A block takes a row of logits [rows, stride], of which
// `vocab` count.

// nll = lse - logit[target], 0 where the target is IGNORE. Where dlogits are given they become (softmax - onehot) * factor.
extern "C" __global__ void __launch_bounds__(512)
cross_entropy(const R* __restrict__ logits, X* __restrict__ dlogits, const u32* __restrict__ targets, R* __restrict__ nll, int vocab,
              long long stride, R factor) {
    __shared__ R scratch[32];
    const R* row = logits + blockIdx.x * stride;
    X* out = dlogits + blockIdx.x * stride;
    const u32 target = targets[blockIdx.x];
    if (target == 0xffffffffu) {
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
