//! Products beside those of plain loops.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ops::Range;

use proptest::prelude::*;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::{ComputeParams, F32, Part, Product, Q4_1, Q8_0, Q8_1, floats, inferpool_mul_mat};

/// Elements of a block that is quantised.
const BLOCK: usize = 32;

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
        // SAFETY: the mapping is new, and as long as is asserted by its length.
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

#[cfg(target_arch = "x86_64")]
fn check_quantised(case: &Case) -> Result<(), TestCaseError> {
    use crate::quantised::{self, compute_rows, has_avx2, has_avx512};

    for (a_type, head, a_length) in [(Q4_1, 2, 16), (Q8_0, 1, 32)] {
        let a = blocks(case, 1, case.m, case.gaps[0], head, a_length);
        let b = blocks(case, 2, case.n, case.gaps[1], head, BLOCK);
        let expected = expected(case, &a, &b, a_type);
        let kernels = [(16, has_avx512()), (8, has_avx2() && a_type == Q4_1)];
        for (lanes, _) in kernels.into_iter().filter(|&(_, is_there)| is_there) {
            let found = case.results(&a, &b, |product, part| {
                let rows = part.of(case.m, lanes);
                // SAFETY: the matrices are as large as they are said to be.
                unsafe {
                    match a_type {
                        Q4_1 => compute_rows::<quantised::Q4_1>(product, rows, lanes),
                        _ => compute_rows::<quantised::Q8_0>(product, rows, lanes),
                    }
                }
            });
            prop_assert_eq!(&found, &expected, "type {}, {} lanes", a_type, lanes);
        }
    }
    Ok(())
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
        // SAFETY: the matrices are as large as they are said to be.
        assert!(unsafe { floats::compute(product, part) });
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

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn small_products_of_quantised_matrices_are_those_of_a_plain_loop(case in cases(0..70, 0..40, 0..20)) {
        check_quantised(&case)?;
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn long_rows_are_multiplied_panel_after_panel(case in cases(1..20, 1..20, 60..140)) {
        check_quantised(&case)?;
    }

    #[test]
    fn products_of_floats_are_those_of_a_plain_loop(case in cases(0..200, 64..100, 0..300)) {
        check_floats(&case)?;
    }
}

#[cfg(target_arch = "x86_64")]
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
    check_quantised(&case).unwrap();
}

/// What [`inferpool_mul_mat`] says, and what it passed on to ggml.
fn ask(n: i64, types: [c_int; 3]) -> (bool, Option<[i64; 9]>) {
    let params = ComputeParams { ith: 0, nth: 1 };
    let zeros = [0f32; 128 * 64];
    let mut result = [0f32; 128];
    PASSED_ON.set(None);
    // SAFETY: one row of a, n of b, one block each, which has 32 floats at most.
    let is_computed = unsafe {
        inferpool_mul_mat(
            &params,
            1,
            n,
            1,
            zeros.as_ptr().cast(),
            2,
            zeros.as_ptr().cast(),
            1,
            result.as_mut_ptr().cast(),
            1,
            types[0],
            types[1],
            types[2],
        )
    };
    (is_computed, PASSED_ON.get())
}

#[test]
fn what_is_not_computed_is_passed_on_to_ggml() {
    const F16: c_int = 1;
    for n in [3, 5] {
        let passed_on = [1, n, 1, 2, 1, 1, 1, 1, 0];
        assert_eq!(ask(n, [F16, F16, F32]), (n == 3, Some(passed_on)));
    }
    assert!(ask(63, [F32, F32, F32]).1.is_some());
    assert_eq!(ask(64, [F32, F32, F32]), (true, None));
}

#[cfg(target_arch = "x86_64")]
#[test]
fn quantised_matrices_are_multiplied_if_the_cpu_can() {
    use crate::quantised::{has_avx2, has_avx512};

    for n in [1, 17] {
        let (is_computed, passed_on) = ask(n, [Q4_1, Q8_1, F32]);
        assert_eq!((is_computed, passed_on.is_none()), (has_avx2(), has_avx2()));
        let (is_computed, passed_on) = ask(n, [Q8_0, Q8_0, F32]);
        assert_eq!(
            (is_computed, passed_on.is_none()),
            (has_avx512(), has_avx512())
        );
    }
}
