// Decides as `decide` of mod.rs does. state: how many norms there are, then they, the oldest first; a thread a norm.

INLINE bool finite(double x) { return x - x == 0; }

extern "C" __global__ void __launch_bounds__(WINDOW)
spike_guard(double* state, const double* __restrict__ norm, const double* __restrict__ factor, double* __restrict__ scale,
            double* __restrict__ exceeded, double limit) {
    __shared__ double norms[WINDOW], median;
    const double nan = __longlong_as_double(0x7ff8000000000000ll), n = *norm, f = *factor;
    if (!finite(f)) {
        if (threadIdx.x == 0) { *scale = f; *exceeded = nan; }
        return;
    }
    const int own = threadIdx.x, count = (int)state[0];
    const double x = state[1 + own];
    norms[own] = x;
    __syncthreads();
    // its place in order: equal norms stand as they came
    int place = 0;
    for (int i = 0; i < count; i++) place += norms[i] < x || (norms[i] == x && i < own);
    if (own < count && place == count / 2) median = x;
    __syncthreads();
    if (count == WINDOW) state[1 + own] = own + 1 < WINDOW ? norms[own + 1] : n;
    else if (own == count) state[1 + own] = n;
    if (own > 0) return;
    if (count < WINDOW) state[0] = count + 1;
    const bool out = count >= ENOUGH && n > limit * median;
    *scale = out ? nan : f;
    *exceeded = out ? median : nan;
}
