// The op random_routing: of the chunks before a query's own those with the largest keys, which are hashes of (layer, kv head, position, chunk); see
// routing/random.rs. A warp a query of a kv head, for all sequences of the batch.

// `tops` [g, t], where it is given, has a number a query. Cells [b, g, tiles, chunks] are empty.
extern "C" __global__ void __launch_bounds__(256)
random_cells(u64* __restrict__ cells, const u32* __restrict__ tops, u64 layer, int batch, int kv_heads, int t, int chunk, int top) {
    const long long query = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (query >= (long long)kv_heads * t) return;
    const int kv = (int)(query / t), token = (int)(query % t), lane = threadIdx.x % 32;
    const int own = token / chunk, tiles = ceil_div(t, 64), chunks = ceil_div(t, chunk);
    const u64 place = mix(mix(layer, kv), token);
    const int wanted = min((tops ? (int)tops[query] : top) - 1, own);
    const auto reach = [&](u64 key) {
        int count = 0;
        for (int c = lane; c < own; c += 32) count += mix(place, c) >= key;
        return warp_sum(count);
    };
    // the largest key that at least `wanted` reach, bit by bit
    u64 edge = 0;
    for (u64 bit = 1ull << 63; bit && wanted > 0; bit >>= 1) if (reach(edge | bit) >= wanted) edge |= bit;
    const auto mark = [&](int c) {
        for (int b = 0; b < batch; b++)
            atomicOr(cells + ((long long)(b * kv_heads + kv) * tiles + token / 64) * chunks + c, 1ull << (token & 63));
    };
    int ties = wanted > 0 ? wanted - (edge + 1 ? reach(edge + 1) : 0) : 0;  // equal keys: the lower chunk
    for (int base = 0; base < own && wanted > 0; base += 32) {
        const int c = base + lane;
        const u64 key = c < own ? mix(place, c) : 0;
        const u32 votes = __ballot_sync(FULL, c < own && key == edge);
        if (c < own && (key > edge || (key == edge && __popc(votes & ((1u << lane) - 1)) < ties))) mark(c);
        ties = max(0, ties - __popc(votes));
    }
    if (lane == 0) mark(own);
}
