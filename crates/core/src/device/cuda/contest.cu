// X: an element of an operand. Numbers between -1 and 1 that look random: no product of them is a sum of equal terms.
extern "C" __global__ void __launch_bounds__(256)
noise(X* __restrict__ x, long long n, u32 seed) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= n) return;
    u32 h = (u32)at * 0x9e3779b9u + (u32)(at >> 32) + seed * 0x85ebca6bu;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    x[at] = As<X>::of((float)(int)(h ^ (h >> 16)) * 0x1p-31f);
}

// Sets `found` where two results have other bits.
extern "C" __global__ void __launch_bounds__(256)
differ(const u32* __restrict__ a, const u32* __restrict__ b, long long words, u32* __restrict__ found) {
    bool other = false;
    for (long long at = (long long)blockIdx.x * 256 + threadIdx.x; at < words; at += (long long)gridDim.x * 256) other |= a[at] != b[at];
    if (other) *found = 1;
}
