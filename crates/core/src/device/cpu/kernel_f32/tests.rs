use super::*;
use crate::device::cpu::level::available;
use crate::rng::Rng;

/// Every instruction set that this processor has gives the bits of the triple loop, for every number of rows.
#[test]
fn every_instruction_set_gives_the_bits_of_the_triple_loop() {
    let mut rng = Rng::new(1);
    let k = 19;
    let mut ran = 0;
    for which in available().filter(|&which| which != Level::Baseline) {
        for (rows, cols) in (1..=MR).flat_map(|rows| (1..=NR).map(move |cols| (rows, cols))) {
            // A's rows, its columns, and neither next to each other
            for (strides, accumulate, prefetch) in [
                ((k, 1), false, false),
                ((k, 1), true, false),
                ((1, rows), true, false),
                ((k, 1), true, true),
                ((1, rows), false, true),
                ((2 * k, 2), true, false),
            ] {
                agrees(&mut rng, which, (rows, cols, k), strides, accumulate, prefetch);
                ran += 1;
            }
        }
    }
    assert!(ran > 0 || available().count() == 1);
}

fn agrees(
    rng: &mut Rng,
    which: Level,
    (rows, cols, k): (usize, usize, usize),
    (rs_a, cs_a): (usize, usize),
    accumulate: bool,
    prefetch: bool,
) {
    let mut draw = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<f32>>();
    // as narrow a panel as holds the columns: the AVX2 kernel has code of its own for 16
    let rs_b = cols.next_multiple_of(16);
    let (a, b, start) = (draw(2 * rows * k), draw(k * rs_b), draw(rows * NR));
    let mut c = start.clone();
    let (a_at, b_at, c_at) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    let operands = Operands { a: a_at, rs_a, cs_a, b: b_at, rs_b, c: c_at, rs_c: NR, accumulate, prefetch };
    // SAFETY: a holds 2 x rows x k, b k x rs_b, c rows x 32; the processor has this level.
    unsafe { run_f32(which, rows, cols, k, operands) };
    for (i, j) in (0..rows * NR).map(|e| (e / NR, e % NR)) {
        let mut want = if accumulate || j >= cols { start[i * NR + j] } else { 0.0 };
        if j < cols {
            for p in 0..k {
                want = a[i * rs_a + p * cs_a].mul_add(b[p * rs_b + j], want);
            }
        }
        assert_eq!(c[i * NR + j], want, "{which:?} {rows} x {cols} at {i}, {j}");
    }
}
