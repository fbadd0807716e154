//! Products beside those of a plain loop in f64.

use inferpool_blas::{cblas_sgemm, openblas_set_num_threads};
use proptest::prelude::*;

const ORDERS: [i32; 2] = [101, 102];
const TRANSPOSES: [i32; 3] = [111, 112, 113];

#[derive(Debug, Clone)]
struct Case {
    order: i32,
    trans: [i32; 2],
    /// m, n and k.
    size: [usize; 3],
    /// Floats between the rows, or columns, of a, b and c beyond their length.
    gaps: [usize; 3],
    alpha: f32,
    beta: f32,
    threads: i32,
    seed: u32,
}

fn cases() -> impl Strategy<Value = Case> {
    let size = prop_oneof![
        [0..4usize, 0..4usize, 0..4usize],
        [1..200usize, 1..70usize, 1..300usize]
    ];
    let factor = || prop_oneof![Just(0.0f32), Just(1.0), -2.0..2.0f32];
    (
        prop::sample::select(&ORDERS[..]),
        [
            prop::sample::select(&TRANSPOSES[..]),
            prop::sample::select(&TRANSPOSES[..]),
        ],
        size,
        [0..3usize, 0..3usize, 0..3usize],
        (factor(), factor()),
        -1..5i32,
        any::<u32>(),
    )
        .prop_map(
            |(order, trans, size, gaps, (alpha, beta), threads, seed)| Case {
                order,
                trans,
                size,
                gaps,
                alpha,
                beta,
                threads,
                seed,
            },
        )
}

/// A matrix as BLAS has it: where element (row, column) lies, and the floats.
struct Matrix {
    by_rows: bool,
    leading: usize,
    data: Vec<f32>,
}

impl Matrix {
    fn new(rows: usize, columns: usize, by_rows: bool, gap: usize, seed: u32) -> Self {
        let (lines, length) = if by_rows {
            (rows, columns)
        } else {
            (columns, rows)
        };
        let leading = length.max(1) + gap;
        let mut state = seed | 1;
        let data = std::iter::repeat_with(|| {
            // xorshift, https://www.jstatsoft.org/v08/i14/
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as f32 / u32::MAX as f32 - 0.5
        });
        Self {
            by_rows,
            leading,
            data: data.take(lines * leading).collect(),
        }
    }

    fn at(&self, row: usize, column: usize) -> usize {
        if self.by_rows {
            row * self.leading + column
        } else {
            column * self.leading + row
        }
    }

    fn get(&self, row: usize, column: usize) -> f64 {
        f64::from(self.data[self.at(row, column)])
    }
}

fn check(case: &Case) -> Result<(), TestCaseError> {
    let [m, n, k] = case.size;
    let by_rows = case.order == ORDERS[0];
    // A transposed matrix lies in memory the other way round.
    let is_plain = |trans| trans == TRANSPOSES[0];
    let a = Matrix::new(
        m,
        k,
        by_rows == is_plain(case.trans[0]),
        case.gaps[0],
        case.seed,
    );
    let b = Matrix::new(
        k,
        n,
        by_rows == is_plain(case.trans[1]),
        case.gaps[1],
        !case.seed,
    );
    let mut c = Matrix::new(m, n, by_rows, case.gaps[2], case.seed.rotate_left(16));
    if case.beta == 0.0 {
        c.data.fill(f32::NAN); // which nobody may read
    }
    let mut expected: Vec<f64> = c.data.iter().map(|&value| f64::from(value)).collect();
    for row in 0..m {
        for column in 0..n {
            let sum: f64 = (0..k).map(|l| a.get(row, l) * b.get(l, column)).sum();
            let kept = if case.beta == 0.0 {
                0.0
            } else {
                f64::from(case.beta) * c.get(row, column)
            };
            expected[c.at(row, column)] = f64::from(case.alpha) * sum + kept;
        }
    }
    openblas_set_num_threads(case.threads);
    // SAFETY: the matrices are as large as they are said to be.
    unsafe {
        cblas_sgemm(
            case.order,
            case.trans[0],
            case.trans[1],
            m as i32,
            n as i32,
            k as i32,
            case.alpha,
            a.data.as_ptr(),
            a.leading as i32,
            b.data.as_ptr(),
            b.leading as i32,
            case.beta,
            c.data.as_mut_ptr(),
            c.leading as i32,
        );
    }
    for (found, expected) in c.data.iter().zip(expected) {
        let found = f64::from(*found);
        let equal = (found - expected).abs() < 1e-4 || found.is_nan() && expected.is_nan();
        prop_assert!(equal, "{found} is not {expected}");
    }
    Ok(())
}

proptest! {
    #[test]
    fn products_are_those_of_a_plain_loop(case in cases()) {
        check(&case)?;
    }
}
