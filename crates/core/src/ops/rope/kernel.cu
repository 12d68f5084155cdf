// R: what x and the angles are and what is computed in; Y: what comes out. Element j of the first half pairs with element j of the
// second. `sign` is -1 for the gradient.
extern "C" __global__ void __launch_bounds__(256)
rope(const R* __restrict__ x, const R* __restrict__ angles, Y* __restrict__ y, long long pairs, int tokens, int heads, int half, int first, R sign) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= pairs) return;
    const int j = (int)(at % half);
    const long long row = at / half;
    const R* angle = angles + (long long)(first + (int)(row / heads % tokens)) * 2 * half + j;
    const R cosine = angle[0], sine = sign * angle[half];
    const long long from = row * 2 * half + j;
    const R a = x[from], b = x[from + half];
    y[from] = As<Y>::of(a * cosine - b * sine);
    y[from + half] = As<Y>::of(b * cosine + a * sine);
}
