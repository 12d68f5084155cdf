// X: what x and y are; R: what the angles are and what is computed in. Element j of the first half pairs with element j of the
// second. `sign` is -1 for the gradient.
extern "C" __global__ void __launch_bounds__(256)
rope(const X* __restrict__ x, const R* __restrict__ cosines, const R* __restrict__ sines, X* __restrict__ y,
     long long pairs, int tokens, int heads, int half, int first, R sign) {
    const long long at = (long long)blockIdx.x * 256 + threadIdx.x;
    if (at >= pairs) return;
    const int j = (int)(at % half);
    const long long row = at / half;
    const int angle = (first + (int)(row / heads % tokens)) * half + j;
    const R cosine = cosines[angle], sine = sign * sines[angle];
    const long long from = row * 2 * half + j;
    const R a = (R)widen(x[from]), b = (R)widen(x[from + half]);
    y[from] = As<X>::of(a * cosine - b * sine);
    y[from + half] = As<X>::of(b * cosine + a * sine);
}
