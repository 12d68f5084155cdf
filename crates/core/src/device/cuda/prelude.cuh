// In front of every source: types, and Hopper's instructions under names. There is no include path; nothing here needs a header.

typedef unsigned char u8;
typedef unsigned short bf16;  // its bits
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define FULL 0xffffffffu
#define LOG2E 1.4426950408889634f
#define NOTHING (-__int_as_float(0x7f800000))

// The first act of every thread of a kernel that is launched early: the next kernel's blocks may come, and everything asked for before this one has ended, and
// is seen, before it goes on.
INLINE void begin_early() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

// ---- numbers -------------------------------------------------------------------------------------------------------------

INLINE float widen(bf16 x) { return __uint_as_float((u32)x << 16); }
INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }

// {lo, hi} rounded to nearest, even: lo in the lower half
INLINE u32 pack(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
INLINE float low(u32 pair) { return __uint_as_float(pair << 16); }
INLINE float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Neighbours in one access: four floats or bf16, eight bf16. `at` is aligned to what it reads.
INLINE void take(float (&x)[4], const float* at) {
    const float4 v = *(const float4*)at;
    x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
}
INLINE void take(float (&x)[4], const bf16* at) {
    const uint2 v = *(const uint2*)at;
    x[0] = low(v.x); x[1] = high(v.x); x[2] = low(v.y); x[3] = high(v.y);
}
INLINE void take(float (&x)[8], const bf16* at) {
    const uint4 v = *(const uint4*)at;
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
    #pragma unroll
    for (int i = 0; i < 4; i++) { x[2 * i] = low(pairs[i]); x[2 * i + 1] = high(pairs[i]); }
}
INLINE void take(float (&x)[8], const float* at) {
    const float4 a = ((const float4*)at)[0], b = ((const float4*)at)[1];
    x[0] = a.x; x[1] = a.y; x[2] = a.z; x[3] = a.w; x[4] = b.x; x[5] = b.y; x[6] = b.z; x[7] = b.w;
}
template <typename T> INLINE void take(T (&x)[1], const T* at) { x[0] = *at; }
INLINE void take(float (&x)[1], const bf16* at) { x[0] = widen(*at); }
INLINE void put(float* at, const float (&x)[4]) { *(float4*)at = make_float4(x[0], x[1], x[2], x[3]); }
INLINE void put(bf16* at, const float (&x)[4]) { *(uint2*)at = make_uint2(pack(x[0], x[1]), pack(x[2], x[3])); }
INLINE void put(bf16* at, const float (&x)[8]) { *(uint4*)at = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])); }
template <typename T> INLINE void put(T* at, const T (&x)[1]) { *at = x[0]; }
INLINE void put(bf16* at, const float (&x)[1]) { *at = (bf16)pack(x[0], 0.f); }

template <typename T> struct As;
template <> struct As<bf16> { INLINE bf16 of(double x) { return (bf16)pack((float)x, 0.f); } INLINE bf16 of(float x) { return (bf16)pack(x, 0.f); } };
template <> struct As<float> { INLINE float of(double x) { return (float)x; } INLINE float of(float x) { return x; } };
template <> struct As<double> { INLINE double of(double x) { return x; } };

INLINE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
INLINE float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// within some units of the last place
INLINE float root_fast(float x) { float y; asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
INLINE double root_fast(double x) { return sqrt(x); }
INLINE float divide_fast(float a, float b) { float y; asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y; }
INLINE double divide_fast(double a, double b) { return a / b; }
INLINE float exp_of(float x) { return expf(x); }
INLINE double exp_of(double x) { return exp(x); }
INLINE float log_of(float x) { return logf(x); }
INLINE double log_of(double x) { return log(x); }
INLINE float root_of(float x) { return sqrtf(x); }
INLINE double root_of(double x) { return sqrt(x); }
INLINE float pow_of(float x, float e) { return powf(x, e); }
INLINE double pow_of(double x, double e) { return pow(x, e); }
template <typename T> INLINE T larger(T a, T b) { return a > b ? a : b; }
INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// h = mix(h + x): the output function of splitmix64, with its increment.
INLINE u64 mix(u64 h, u64 x) {
    u64 z = h + x + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// ---- sums and maxima: the order is fixed by the number of threads, so the bits are the same in every run ------------------

template <typename T> INLINE T warp_sum(T x) {
    #pragma unroll
    for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
    return x;
}
template <typename T> INLINE T warp_max(T x) {
    #pragma unroll
    for (int o = 16; o > 0; o >>= 1) x = larger(x, __shfl_xor_sync(FULL, x, o));
    return x;
}
// Every thread gets the sum; `scratch` holds a number a warp. All threads of the block call it.
template <typename T> INLINE T block_sum(T x, T* scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    return warp_sum(lane < warps ? scratch[lane] : (T)0);
}
template <typename T> INLINE T block_max(T x, T* scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    return warp_max(scratch[lane < warps ? lane : 0]);
}

// ---- shared memory and copies into it -------------------------------------------------------------------------------------

INLINE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes; where `valid` is false they become zero and `from` is not read
INLINE void copy16(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// 4 bytes, as copy16
INLINE void copy4(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> INLINE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

INLINE void barrier_init(u32 barrier, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
INLINE void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
INLINE void barrier_expect(u32 barrier, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"); }
INLINE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra over;\nbra again;\nover:\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}
// One more arrival at a counter in shared memory: how many came before. What the thread has read is read, what it sees is there.
INLINE u32 arrive_counted(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], 1;" : "=r"(before) : "r"(shared_address(counter)) : "memory");
    return before;
}
// makes barriers that were initialised visible to the copy engine
INLINE void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// ordinary writes to shared memory before, the copy engine's or wgmma's reads after
INLINE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

struct __align__(64) Map { u64 opaque[16]; };

// A box of 64 columns of a batch of matrices; completes on the barrier.
INLINE void copy_box(u32 to, const Map* map, u32 barrier, int column, int row, int batch) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(batch) : "memory");
}
// Contiguous bytes, a multiple of 16; completes on the barrier.
INLINE void copy_bulk(u32 to, const void* from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// ---- products of a warp: mma.sync m16n8k16, bf16 operands, f32 sums -------------------------------------------------------

// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
INLINE void load4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
INLINE void load4_transposed(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
INLINE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Byte offset of 16-byte piece `piece` of row `row` in a shared-memory tile of rows 128 bytes wide in the copy engine's 128-byte swizzle; a
// wider tile is several of these, one after the other. Eight rows at one piece touch all 32 banks.
INLINE u32 swizzled(int row, int piece) { return (u32)(row * 128 + ((piece ^ (row & 7)) << 4)); }

// A shared-memory tile of HEIGHT rows in panels of 64 columns, from memory: row i from `from(i)`, or zero where that is null. A row has ACROSS elements, a
// multiple of 8; what its panels hold beyond them is zero. `spare` is any address in memory. STEP threads call it, a thread for one piece of rows that
// lie equally far apart.
template <int HEIGHT, int ACROSS, int STEP, typename From> INLINE void load_tile(u32 to, const bf16* spare, From from) {
    constexpr int pieces = (ACROSS + 63) / 64 * 8, apart = STEP / pieces;
    static_assert(STEP % pieces == 0 && HEIGHT % apart == 0, "every thread has as many rows");
    const int piece = threadIdx.x % pieces, first = threadIdx.x / pieces;
    const bool inside = piece * 8 < ACROSS;
    to += piece / 8 * (HEIGHT * 128);
    #pragma unroll 4
    for (int k = 0; k < HEIGHT / apart; k++) {
        const int row = first + k * apart;
        const bf16* at = from(row);
        const bool valid = at && inside;
        copy16(to + swizzled(row, piece % 8), valid ? at + piece * 8 : spare, valid);
    }
}
// Fragments of a shared-memory tile of HEIGHT rows, for one step of 16 along its columns: 16 rows as the left operand, and as the right one.
template <int HEIGHT> INLINE void fragment(u32 (&a)[4], u32 tile, int first, int step) {
    const int lane = threadIdx.x % 32;
    load4(a, tile + step / 4 * (HEIGHT * 128) + swizzled(first + lane % 16, step % 4 * 2 + lane / 16));
}
template <int HEIGHT> INLINE void fragment_right(u32 (&b)[4], u32 tile, int first, int step) {
    const int lane = threadIdx.x % 32;
    load4(b, tile + step / 4 * (HEIGHT * 128) + swizzled(first + lane % 8 + lane / 16 * 8, step % 4 * 2 + lane / 8 % 2));
}
// 16 columns as the right operand, for one step of 16 along its rows.
template <int HEIGHT> INLINE void fragment_transposed(u32 (&b)[4], u32 tile, int first, int columns) {
    const int lane = threadIdx.x % 32;
    load4_transposed(b, tile + columns / 4 * (HEIGHT * 128) + swizzled(first + lane % 16, columns % 4 * 2 + lane / 16));
}
// c += a b^T of 16 rows of shared-memory tile `left` from `row` on and 8 N rows of shared-memory tile `right` from `first` on, both WIDTH columns wide.
template <int LEFT, int RIGHT, int WIDTH, int N> INLINE void multiply(float (&c)[N][4], u32 left, int row, u32 right, int first) {
    #pragma unroll
    for (int step = 0; step < WIDTH / 16; step++) {
        u32 a[4];
        fragment<LEFT>(a, left, row, step);
        #pragma unroll
        for (int n = 0; n < N / 2; n++) {
            u32 b[4];
            fragment_right<RIGHT>(b, right, first + n * 16, step);
            mma(c[2 * n], a, b[0], b[1]);
            mma(c[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// ---- products of four warps: wgmma m64nNk16 -------------------------------------------------------------------------------

// A shared-memory tile, 128-byte swizzle, at a multiple of 1024 bytes: rows of 64 elements, eight rows a group of 1024 bytes.
INLINE u64 tile_descriptor(u32 at) {
    return (u64)((at & 0x3ffff) >> 4) | ((u64)1 << 16) | ((u64)(1024 >> 4) << 32) | ((u64)1 << 62);
}
// A shared-memory tile whose outer axis is the product's inner one (read transposed): `panel_stride` bytes between panels of 64 columns.
INLINE u64 tile_descriptor_transposed(u32 at, int panel_stride) {
    return (u64)((at & 0x3ffff) >> 4) | ((u64)(panel_stride >> 4) << 16) | ((u64)(1024 >> 4) << 32) | ((u64)1 << 62);
}
INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> INLINE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define C8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define R32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"

// c [64, 64] += a b, a from shared memory or registers, b [16, 64] from shared memory (rows of b's transpose, 64 of them).
// The first product of a chain passes sum = 0.
INLINE void wgmma64_ss(float (&c)[32], u64 a, u64 b, int sum) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " R32 ", %32, %33, p, 1, 1, 0, 0;\n}"
        : C8(c, 0), C8(c, 8), C8(c, 16), C8(c, 24) : "l"(a), "l"(b), "r"(sum));
}
INLINE void wgmma64_rs(float (&c)[32], const u32 (&a)[4], u64 b, int sum) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " R32 ", {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
        : C8(c, 0), C8(c, 8), C8(c, 16), C8(c, 24) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(sum));
}
// The same with b read transposed: its rows are the product's inner axis.
INLINE void wgmma64_rs_transposed(float (&c)[32], const u32 (&a)[4], u64 b, int sum) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " R32 ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}"
        : C8(c, 0), C8(c, 8), C8(c, 16), C8(c, 24) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(sum));
}
