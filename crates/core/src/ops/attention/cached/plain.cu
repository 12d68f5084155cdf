// The same of any width, group, chunk size and element type R, by the equations: a block a (row, head) keeps its scores in memory.

extern "C" __global__ void __launch_bounds__(256)
decode_plain(const R* __restrict__ q, const R* __restrict__ k, const R* __restrict__ v, const u32* __restrict__ counts,
             const u32* __restrict__ chunks, const R* __restrict__ bias, R* scores, R* __restrict__ out, int t, int kv_heads, int group,
             int width, int capacity, int past, int chunk, int most, int window, int room, R scale) {
    __shared__ R scratch[32];
    const int row = blockIdx.x / group, h = blockIdx.x % group, query = row % t, kv = row / t % kv_heads, batch = row / t / kv_heads;
    const int position = past + query, begin = window && position + 1 > window ? position + 1 - window : 0;
    const int total = counts ? ((int)counts[row] - 1) * chunk + position % chunk + 1 : position + 1 - begin;
    const u32* list = counts ? chunks + (long long)row * most : 0;
    const auto key = [&](int i) { return list ? (int)list[i / chunk] * chunk + i % chunk : begin + i; };
    const long long stride = (long long)kv_heads * width, base = (long long)batch * capacity * stride + kv * width;
    const long long own = (((long long)batch * t + query) * kv_heads * group + kv * group + h) * width;
    R* z = scores + (long long)blockIdx.x * room;
    R top = -INFINITY_OF_R, sum = 0;
    for (int i = threadIdx.x; i < total; i += 256) {
        R dot = 0;
        for (int e = 0; e < width; e++) dot += q[own + e] * k[base + key(i) * stride + e];
        z[i] = dot * scale + (list && bias ? bias[(long long)row * most + i / chunk] : (R)0);
        top = larger(top, z[i]);
    }
    top = block_max(top, scratch);
    for (int i = threadIdx.x; i < total; i += 256) {
        z[i] = exp_of(z[i] - top);
        sum += z[i];
    }
    sum = block_sum(sum, scratch);
    __syncthreads();
    for (int e = threadIdx.x; e < width; e += 256) {
        R mixed = 0;
        for (int i = 0; i < total; i++) mixed += z[i] * v[base + key(i) * stride + e];
        out[own + e] = total > 0 ? mixed / sum : (R)0;
    }
}
