//! Products beside those of plain loops.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ops::Range;

use proptest::prelude::*;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::{ComputeParams, F32, Part, Product, inferpool_mul_mat};

thread_local! {
    static PASSED_ON: Cell<Option<[i64; 9]>> = const { Cell::new(None) };
}

/// In ggml's place.
#[unsafe(no_mangle)]
extern "C" fn llamafile_sgemm(
    _params: *const ComputeParams,
    m: i64,
    n: i64,
    k: i64,
    _a: *const c_void,
    lda: i64,
    _b: *const c_void,
    ldb: i64,
    _c: *mut c_void,
    ldc: i64,
    a_type: c_int,
    b_type: c_int,
    c_type: c_int,
) -> bool {
    let types = [a_type, b_type, c_type].map(i64::from);
    let [a_type, b_type, c_type] = types;
    PASSED_ON.set(Some([m, n, k, lda, ldb, ldc, a_type, b_type, c_type]));
    n == 3
}

/// Bytes behind which there is no memory.
struct Bytes {
    mapping: *mut c_void,
    length: usize,
    data: *mut u8,
}

const PAGE: usize = 64 * 1024;

impl Bytes {
    fn new(content: &[u8]) -> Self {
        let length = content.len().next_multiple_of(PAGE) + PAGE;
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the mapping is new, `length` bytes long, and ends in a page that the content stays clear of.
        unsafe {
            let mapping =
                mmap_anonymous(std::ptr::null_mut(), length, flags, MapFlags::PRIVATE).unwrap();
            let end = mapping.byte_add(length - PAGE);
            mprotect(end, PAGE, MprotectFlags::empty()).unwrap();
            let data = end.cast::<u8>().sub(content.len());
            data.copy_from_nonoverlapping(content.as_ptr(), content.len());
            Self {
                mapping,
                length,
                data,
            }
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: nobody else has the mapping.
        unsafe { munmap(self.mapping, self.length).unwrap() };
    }
}

#[derive(Debug, Clone)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    /// Blocks between the rows of a and b, and floats between those of c.
    gaps: [usize; 3],
    threads: usize,
    seed: u32,
}

fn cases(m: Range<usize>, n: Range<usize>, k: Range<usize>) -> impl Strategy<Value = Case> {
    (m, n, k, [0..3usize, 0..3, 0..3], 1..5usize, any::<u32>()).prop_map(
        |(m, n, k, gaps, threads, seed)| Case {
            m,
            n,
            k,
            gaps,
            threads,
            seed,
        },
    )
}

impl Case {
    /// Random numbers: xorshift, <https://www.jstatsoft.org/v08/i14/>.
    fn numbers(&self, stream: u32) -> impl Iterator<Item = u32> {
        let mut state = self.seed.rotate_left(stream) | 1;
        std::iter::repeat_with(move || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        })
    }

    /// What `compute` makes of matrices without the gaps in its result, thread by thread.
    fn results(&self, a: &[u8], b: &[u8], compute: impl Fn(&Product, Part)) -> Vec<f32> {
        let (a, b) = (Bytes::new(a), Bytes::new(b));
        let c_stride = self.m + self.gaps[2];
        let length = (c_stride * self.n).saturating_sub(self.gaps[2]);
        let c = Bytes::new(&f32::NAN.to_ne_bytes().repeat(length));
        let product = Product {
            m: self.m,
            n: self.n,
            k: self.k,
            a: a.data,
            a_stride: self.k + self.gaps[0],
            b: b.data,
            b_stride: self.k + self.gaps[1],
            c: c.data.cast(),
            c_stride,
        };
        for index in 0..self.threads {
            let count = self.threads;
            compute(&product, Part { index, count });
        }
        // SAFETY: there are as many.
        let c = unsafe { std::slice::from_raw_parts(c.data.cast::<f32>(), length) };
        let rows = c.chunks(c_stride.max(1)).map(|row| row.split_at(self.m));
        rows.flat_map(|(row, gap)| {
            assert!(gap.iter().all(|float| float.is_nan()));
            row.to_vec()
        })
        .collect()
    }
}

/// Has [`inferpool_mul_mat`] compute a part; false if it passes that on.
fn ask(product: &Product, part: Part, types: [c_int; 2]) -> bool {
    let params = ComputeParams {
        ith: part.index as c_int,
        nth: part.count as c_int,
    };
    PASSED_ON.set(None);
    // SAFETY: the matrices are as large as they are said to be.
    let is_computed = unsafe {
        inferpool_mul_mat(
            &params,
            product.m as i64,
            product.n as i64,
            product.k as i64,
            product.a.cast(),
            product.a_stride as i64,
            product.b.cast(),
            product.b_stride as i64,
            product.c.cast(),
            product.c_stride as i64,
            types[0],
            types[1],
            F32,
        )
    };
    let is_passed_on = PASSED_ON.get().is_some();
    assert_eq!(is_computed, !is_passed_on || product.n == 3);
    !is_passed_on
}

fn check_floats(case: &Case) -> Result<(), TestCaseError> {
    let matrix = |stream, rows: usize, gap: usize| -> Vec<f32> {
        let numbers = case.numbers(stream);
        let count = (rows * (case.k + gap)).saturating_sub(gap);
        numbers
            .take(count)
            .map(|number| number as f32 / u32::MAX as f32 - 0.5)
            .collect()
    };
    let bytes = |floats: &[f32]| -> Vec<u8> {
        floats
            .iter()
            .flat_map(|float| float.to_ne_bytes())
            .collect()
    };
    let a = matrix(1, case.m, case.gaps[0]);
    let b = matrix(2, case.n, case.gaps[1]);
    let found = case.results(&bytes(&a), &bytes(&b), |product, part| {
        assert!(ask(product, part, [F32, F32]));
    });
    for (index, &found) in found.iter().enumerate() {
        let a = &a[index % case.m * (case.k + case.gaps[0])..];
        let b = &b[index / case.m * (case.k + case.gaps[1])..];
        let expected: f64 = (0..case.k).map(|l| f64::from(a[l]) * f64::from(b[l])).sum();
        prop_assert!(
            (f64::from(found) - expected).abs() < 1e-4,
            "{} is not {}",
            found,
            expected
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn products_of_floats_are_those_of_a_plain_loop(case in cases(256..400, 64..100, 0..300)) {
        check_floats(&case)?;
    }
}

#[test]
fn what_is_not_computed_is_passed_on_to_ggml() {
    const F16: c_int = 1;
    let zeros = [0f32; 300];
    let mut result = [0f32; 300];
    let mut product = |n| Product {
        m: 2,
        n,
        k: 4,
        a: zeros.as_ptr().cast(),
        a_stride: 5,
        b: zeros.as_ptr().cast(),
        b_stride: 6,
        c: result.as_mut_ptr(),
        c_stride: 7,
    };
    let part = Part { index: 0, count: 1 };
    for n in [3, 5] {
        assert!(!ask(&product(n), part, [F16, F16]));
        let passed_on = [2, n as i64, 4, 5, 6, 7, 1, 1, 0];
        assert_eq!(PASSED_ON.get(), Some(passed_on));
    }
    // Too few rows of activations, and of weights for each thread.
    let few = Product {
        m: 100,
        ..product(63)
    };
    assert!(!ask(&few, part, [F32, F32]));
    let few = Product {
        m: 100,
        ..product(64)
    };
    let part = Part { index: 0, count: 3 };
    assert!(!ask(&few, part, [F32, F32]));
}

#[cfg(target_arch = "x86_64")]
mod quantised {
    use super::*;
    use crate::quantised::{self, compute_rows, has_avx2, has_avx512};
    use crate::{Q4_1, Q8_0, Q8_1};

    /// Elements of a block.
    const BLOCK: usize = 32;

    /// A half float that is neither infinite nor NaN.
    fn half(random: u32) -> u16 {
        // The exponent is one of small numbers, for sums that a float can hold.
        (random & 0x83ff | ((random >> 16) % 16) << 10) as u16
    }

    fn float(half: u16) -> f32 {
        let mantissa = f32::from(half & 0x3ff);
        let value = match half >> 10 & 31 {
            0 => mantissa * 2f32.powi(-24),
            exponent => (1024.0 + mantissa) * 2f32.powi(i32::from(exponent) - 25),
        };
        if half >> 15 == 0 { value } else { -value }
    }

    /// A matrix of blocks of `head` half floats and `length` bytes.
    fn blocks(
        case: &Case,
        stream: u32,
        rows: usize,
        gap: usize,
        head: usize,
        length: usize,
    ) -> Vec<u8> {
        let mut numbers = case.numbers(stream);
        let count = (rows * (case.k + gap)).saturating_sub(gap);
        let mut bytes = Vec::new();
        for _ in 0..count {
            for number in numbers.by_ref().take(head) {
                bytes.extend(half(number).to_ne_bytes());
            }
            bytes.extend(
                numbers
                    .by_ref()
                    .take(length)
                    .map(|number| (number >> 8) as u8),
            );
        }
        bytes
    }

    fn halves(block: &[u8]) -> [f32; 2] {
        [0, 2].map(|at| float(u16::from_ne_bytes([block[at], block[at + 1]])))
    }

    /// A product of quantised matrices, rounded as it is said to be.
    fn expected(case: &Case, a: &[u8], b: &[u8], a_type: c_int) -> Vec<f32> {
        let is_packed = a_type == Q4_1;
        let (a_size, b_size, head) = if is_packed { (20, 36, 4) } else { (34, 34, 2) };
        let weight = |block: &[u8], index: usize| match is_packed {
            true if index < BLOCK / 2 => i32::from(block[head + index] & 15),
            true => i32::from(block[head + index - BLOCK / 2] >> 4),
            false => i32::from(block[head + index] as i8),
        };
        let mut results = Vec::new();
        for column in 0..case.n {
            for row in 0..case.m {
                let mut sum = 0f32;
                for block in 0..case.k {
                    let a = &a[(row * (case.k + case.gaps[0]) + block) * a_size..];
                    let b = &b[(column * (case.k + case.gaps[1]) + block) * b_size..];
                    let dot: i32 = (0..BLOCK)
                        .map(|index| weight(a, index) * i32::from(b[head + index] as i8))
                        .sum();
                    let ([a_scale, least], [b_scale, b_sum]) = (halves(a), halves(b));
                    sum = (a_scale * b_scale).mul_add(dot as f32, sum);
                    if is_packed {
                        sum = least.mul_add(b_sum, sum);
                    }
                }
                results.push(sum);
            }
        }
        results
    }

    fn check(case: &Case) -> Result<(), TestCaseError> {
        let formats = [
            ([Q4_1, Q8_1], 2, 16, has_avx2() || has_avx512()),
            ([Q8_0, Q8_0], 1, 32, has_avx512()),
        ];
        for (types, head, length, is_computed) in formats {
            let a = blocks(case, 1, case.m, case.gaps[0], head, length);
            let b = blocks(case, 2, case.n, case.gaps[1], head, BLOCK);
            let expected = expected(case, &a, &b, types[0]);
            let found = case.results(&a, &b, |product, part| {
                assert_eq!(ask(product, part, types), is_computed);
            });
            if is_computed {
                prop_assert_eq!(found, expected, "of {:?}", types);
            }
        }
        Ok(())
    }

    /// What other CPUs would do.
    fn check_eight_lanes(case: &Case) -> Result<(), TestCaseError> {
        let a = blocks(case, 1, case.m, case.gaps[0], 2, 16);
        let b = blocks(case, 2, case.n, case.gaps[1], 2, BLOCK);
        let found = case.results(&a, &b, |product, part| {
            let rows = part.of(case.m, 8);
            // SAFETY: the matrices are as large as they are said to be.
            unsafe { compute_rows::<quantised::Q4_1>(product, rows, 8) };
        });
        prop_assert_eq!(found, expected(case, &a, &b, Q4_1));
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn small_products_are_those_of_a_plain_loop(case in cases(0..70, 0..40, 0..20)) {
            check(&case)?;
        }

        #[test]
        fn long_rows_are_multiplied_panel_after_panel(case in cases(1..20, 1..20, 60..140)) {
            check(&case)?;
        }

        #[test]
        fn avx2_computes_the_same(case in cases(0..40, 0..20, 0..70)) {
            if has_avx2() {
                check_eight_lanes(&case)?;
            }
        }
    }

    #[test]
    fn weights_beyond_a_cache_are_multiplied_chunk_after_chunk() {
        let case = Case {
            m: 150,
            n: 35,
            k: 130,
            gaps: [0; 3],
            threads: 1,
            seed: 7,
        };
        check(&case).unwrap();
    }
}
