// Chunk summaries: a_j = softmax_j(qbar . k_j / sqrt d) over a complete chunk, kbar = sum a_j k_j; and their gradients. A warp takes one chunk
// of one kv head. HEAD: head width; CHUNK: tokens of a chunk. Keys are bf16 [b, t, g, HEAD], tokens `stride` apart; sums are f32.

#define EACH ((HEAD + 31) / 32)  // elements of a lane, some of them beyond the head
#define HELD ((CHUNK + 31) / 32)  // keys of a chunk whose scores a lane holds: 1 for chunks of up to 32

INLINE bool inside(int e) { return HEAD % 32 == 0 || threadIdx.x % 32 + 32 * e < HEAD; }

INLINE float dot(const float (&x)[EACH], const bf16* key) {
    float sum = 0;
    #pragma unroll
    for (int e = 0; e < EACH; e++) if (inside(e)) sum += x[e] * widen(key[threadIdx.x % 32 + 32 * e]);
    return warp_sum(sum);
}

// First key of the warp's chunk, or null where there is none; `at` is its number (batch, chunk, kv head).
INLINE const bf16* chunk_of(const bf16* k, long long& at, int& kv, int batches, int t, int kv_heads, int n, long long stride) {
    at = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (at >= (long long)batches * n * kv_heads) return 0;
    kv = (int)(at % kv_heads);
    const long long chunk = at / kv_heads % n, batch = at / kv_heads / n;
    return k + (batch * t + chunk * CHUNK) * stride + kv * HEAD;
}

// kbar in f32 and rounded to bf16, [b, n, g, HEAD]; a [b, n, g, CHUNK]. Lane l holds the scores of keys l, l + 32, ... and the others ask it:
// lanes exchange nothing through memory (ops/cuda/restricted.rs says why).
extern "C" __global__ void __launch_bounds__(256)
summary_forward(const bf16* __restrict__ k, const float* __restrict__ qbar, float* __restrict__ kbar, bf16* __restrict__ operand,
                float* __restrict__ weights, int batches, int t, int kv_heads, int n, int stride, float scale) {
    const int lane = threadIdx.x % 32;
    long long at;
    int kv;
    const bf16* keys = chunk_of(k, at, kv, batches, t, kv_heads, n, stride);
    if (!keys) return;
    float query[EACH], acc[EACH] = {}, own[HELD] = {}, top = NOTHING, sum = 0;
    #pragma unroll
    for (int e = 0; e < EACH; e++) if (inside(e)) query[e] = qbar[kv * HEAD + lane + 32 * e];
    #pragma unroll
    for (int part = 0; part < HELD; part++)
        #pragma unroll 4
        for (int i = 0; i < CHUNK / HELD; i++) {
            const float z = dot(query, keys + (long long)(part * 32 + i) * stride) * scale;
            if (lane == i) own[part] = z;
            top = larger(top, z);
        }
    #pragma unroll
    for (int part = 0; part < HELD; part++) {
        own[part] = lane < CHUNK ? expf(own[part] - top) : 0.f;
        #pragma unroll 4
        for (int i = 0; i < CHUNK / HELD; i++) sum += __shfl_sync(FULL, own[part], i);
    }
    const float inverse = 1.f / sum;
    #pragma unroll
    for (int part = 0; part < HELD; part++) {
        own[part] *= inverse;
        if (lane < CHUNK) weights[at * CHUNK + part * 32 + lane] = own[part];
        #pragma unroll 4
        for (int i = 0; i < CHUNK / HELD; i++) {
            const float a = __shfl_sync(FULL, own[part], i);
            #pragma unroll
            for (int e = 0; e < EACH; e++) if (inside(e)) acc[e] += a * widen(keys[(long long)(part * 32 + i) * stride + lane + 32 * e]);
        }
    }
    #pragma unroll
    for (int e = 0; e < EACH && inside(e); e++) {
        kbar[at * HEAD + lane + 32 * e] = acc[e];
        operand[at * HEAD + lane + 32 * e] = As<bf16>::of(acc[e]);
    }
}

// Adds to dk [b, t, g, HEAD]; dqbar comes as one row a chunk, [b, n, g, HEAD], to be added in order.
extern "C" __global__ void __launch_bounds__(256)
summary_backward(const bf16* __restrict__ k, const float* __restrict__ qbar, const float* __restrict__ weights, const float* __restrict__ dkbar,
                 float* __restrict__ dk, float* __restrict__ dqbar, int batches, int t, int kv_heads, int n, int stride, float scale) {
    const int lane = threadIdx.x % 32;
    long long at;
    int kv;
    const bf16* keys = chunk_of(k, at, kv, batches, t, kv_heads, n, stride);
    if (!keys) return;
    const long long chunk = at / kv_heads % n, batch = at / kv_heads / n;
    float query[EACH], up[EACH], acc[EACH] = {}, inner = 0;
    #pragma unroll
    for (int e = 0; e < EACH && inside(e); e++) {
        query[e] = qbar[kv * HEAD + lane + 32 * e];
        up[e] = dkbar[at * HEAD + lane + 32 * e];
    }
    for (int j = 0; j < CHUNK; j++) inner += weights[at * CHUNK + j] * dot(up, keys + (long long)j * stride);
    for (int j = 0; j < CHUNK; j++) {
        const bf16* key = keys + (long long)j * stride;
        const float a = weights[at * CHUNK + j], dz = a * (dot(up, key) - inner) * scale;
        float* to = dk + ((batch * t + chunk * CHUNK + j) * kv_heads + kv) * HEAD;
        #pragma unroll
        for (int e = 0; e < EACH && inside(e); e++) {
            to[lane + 32 * e] += a * up[e] + dz * query[e];
            acc[e] += dz * widen(key[lane + 32 * e]);
        }
    }
    #pragma unroll
    for (int e = 0; e < EACH; e++) if (inside(e)) dqbar[at * HEAD + lane + 32 * e] = acc[e];
}
