// X: what the product and the heads are; R: what is computed in. The product is [rows, heads + 2 kv_heads, d]: queries, keys and values of a token
// side by side. A thread takes AT_ONCE elements of the first half of a head and those of the second half that pair with them; `half` counts such
// pieces. Queries and keys are rotated by the angles [positions, d] (cosines, then sines), values only move.

struct Piece { long long row; int head, j; };

INLINE Piece piece_of(u32 at, int half, int all) { return {at / half / all, (int)(at / half % all), (int)(at % half) * AT_ONCE}; }

// {a, b} turned by the angles at `angle`, `d` wide
INLINE void rotate(R (&a)[AT_ONCE], R (&b)[AT_ONCE], const R* angle, int d, R sign) {
    R cosine[AT_ONCE], sine[AT_ONCE];
    take(cosine, angle);
    take(sine, angle + d / 2);
    #pragma unroll
    for (int e = 0; e < AT_ONCE; e++) {
        const R x = a[e], y = b[e], s = sign * sine[e];
        a[e] = x * cosine[e] - y * s;
        b[e] = y * cosine[e] + x * s;
    }
}

extern "C" __global__ void __launch_bounds__(256)
heads_of_product(const X* __restrict__ product, const R* __restrict__ angles, X* __restrict__ q, X* __restrict__ k, X* __restrict__ v, int pieces,
                 int tokens, int heads, int kv_heads, int half, int first) {
    const u32 at = blockIdx.x * 256 + threadIdx.x;
    if (at >= pieces) return;
    const int all = heads + 2 * kv_heads, d = 2 * half * AT_ONCE;
    const Piece p = piece_of(at, half, all);
    R a[AT_ONCE], b[AT_ONCE];
    const X* from = product + (p.row * all + p.head) * d + p.j;
    take(a, from);
    take(b, from + d / 2);
    if (p.head < heads + kv_heads) rotate(a, b, angles + (long long)(first + (int)(p.row % tokens)) * d + p.j, d, (R)1);
    X* to = p.head < heads ? q + (p.row * heads + p.head) * d
          : p.head < heads + kv_heads ? k + (p.row * kv_heads + p.head - heads) * d
          : v + (p.row * kv_heads + p.head - heads - kv_heads) * d;
    put(to + p.j, a);
    put(to + p.j + d / 2, b);
}

// The product's gradient, from those of the heads; one that is left out is zero.
extern "C" __global__ void __launch_bounds__(256)
product_of_heads(const R* __restrict__ dq, const R* __restrict__ dk, const R* __restrict__ dv, const R* __restrict__ angles, X* __restrict__ product,
                 int pieces, int tokens, int heads, int kv_heads, int half, int first) {
    const u32 at = blockIdx.x * 256 + threadIdx.x;
    if (at >= pieces) return;
    const int all = heads + 2 * kv_heads, d = 2 * half * AT_ONCE;
    const Piece p = piece_of(at, half, all);
    const R* from = p.head < heads ? dq : p.head < heads + kv_heads ? dk : dv;
    R a[AT_ONCE] = {}, b[AT_ONCE] = {};
    if (from) {
        from += p.head < heads ? (p.row * heads + p.head) * d
              : (p.row * kv_heads + (p.head - heads) % kv_heads) * d;
        take(a, from + p.j);
        take(b, from + p.j + d / 2);
    }
    if (p.head < heads + kv_heads) rotate(a, b, angles + (long long)(first + (int)(p.row % tokens)) * d + p.j, d, (R)-1);
    X* to = product + (p.row * all + p.head) * d + p.j;
    put(to, a);
    put(to + d / 2, b);
}
