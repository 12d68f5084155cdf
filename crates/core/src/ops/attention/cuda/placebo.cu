// The placebo of a gradient: in the place of the gradients of a row of scores, normal numbers over the same chunks, less their mean, of the same
// norm. They are drawn from a hash of the gradient's bits and the row's place, so there is no state, and whoever has the seed can draw again.

INLINE u64 bits_of_number(float x) { return __float_as_uint(x); }
INLINE u64 bits_of_number(double x) { return __double_as_longlong(x); }

// By Box and Muller, of 64 bits.
INLINE float normal_of(u64 bits) {
    const float u = ((float)(u32)(bits >> 32) + 0.5f) * 0x1p-32f, angle = (float)(u32)bits * 0x1p-31f;
    return sqrtf(-2.f * logf(u)) * cospif(angle);
}

template <typename T> struct Draw {
    u64 seed;
    T mean, factor;
    METHOD T at(int c) const { return ((T)normal_of(mix(seed, c)) - mean) * factor; }
};

// Of a row of `end` scores, by a warp: `inside(c)` is whether its head has a probability above zero, `of(c)` the gradient there. A chunk alone has none:
// only zero adds up to zero.
template <typename T, typename Inside, typename Of>
INLINE Draw<T> draw_of(int end, u64 place, Inside inside, Of of) {
    const int lane = threadIdx.x % 32;
    Draw<T> draw = {0, 0, 1};
    T count = 0, square = 0, sum = 0, spread = 0;
    for (int c = lane; c < end; c += 32)
        if (inside(c)) {
            const T ds = of(c);
            draw.seed ^= mix(mix(place, c), bits_of_number(ds));
            count += 1;
            square += ds * ds;
        }
    #pragma unroll
    for (int o = 16; o > 0; o >>= 1) draw.seed ^= __shfl_xor_sync(FULL, draw.seed, o);
    draw.seed = mix(draw.seed, place);
    count = warp_sum(count);
    square = warp_sum(square);
    for (int c = lane; c < end; c += 32) if (inside(c)) sum += draw.at(c);
    draw.mean = warp_sum(sum) / larger(count, (T)1);
    for (int c = lane; c < end; c += 32) if (inside(c)) spread += draw.at(c) * draw.at(c);
    spread = warp_sum(spread);
    draw.factor = count > (T)1 && spread > (T)0 ? root_of(square / spread) : (T)0;
    return draw;
}
