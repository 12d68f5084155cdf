// X: what the logits are; R: what is computed in. A block takes a row of logits [rows, stride], of which `vocab` count.

// nll = lse - logit[target], 0 where the target is IGNORE. With `record` the row becomes (softmax - onehot) * factor.
extern "C" __global__ void __launch_bounds__(512)
cross_entropy(X* __restrict__ logits, const u32* __restrict__ targets, R* __restrict__ nll, int vocab, long long stride, R factor, int record) {
    __shared__ R scratch[32];
    X* row = logits + blockIdx.x * stride;
    const u32 target = targets[blockIdx.x];
    if (target == 0xffffffffu) {
        if (record) for (int j = threadIdx.x; j < vocab; j += 512) row[j] = As<X>::of((R)0);
        if (threadIdx.x == 0) nll[blockIdx.x] = 0;
        return;
    }
    R top = -INFINITY_OF_R;
    #pragma unroll 8
    for (int j = threadIdx.x; j < vocab; j += 512) top = larger(top, (R)widen(row[j]));
    top = block_max(top, scratch);
    R sum = 0;
    #pragma unroll 8
    for (int j = threadIdx.x; j < vocab; j += 512) sum += exp_of((R)widen(row[j]) - top);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) nll[blockIdx.x] = log_of(sum) + top - (R)widen(row[target]);
    if (!record) return;
    __syncthreads();  // the target's logit has been read
    const R inverse = factor / sum;
    #pragma unroll 8
    for (int j = threadIdx.x; j < vocab; j += 512) {
        const R p = exp_of((R)widen(row[j]) - top) * inverse;
        row[j] = As<X>::of(j == (int)target ? p - factor : p);
    }
}
