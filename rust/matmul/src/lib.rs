//! Products of matrices for llama.cpp's CPU backend, where its own leave time: quantised weights with a few rows of
//! activations, as conversations at the same time have, and float weights with many.
//!
//! `requirements/llama-cpp.sh` compiles ggml so that each of its threads asks [`inferpool_mul_mat`] where it would ask
//! its own `llamafile_sgemm`, before it multiplies row by row.

mod floats;
#[cfg(target_arch = "x86_64")]
mod quantised;
#[cfg(test)]
mod tests;

use std::ffi::{c_int, c_void};
use std::ops::Range;

// Of ggml.h's enum ggml_type.
const F32: c_int = 0;
#[cfg(target_arch = "x86_64")]
const Q4_1: c_int = 3;
#[cfg(target_arch = "x86_64")]
const Q8_0: c_int = 8;
#[cfg(target_arch = "x86_64")]
const Q8_1: c_int = 9;

// By which a library that this is linked into can be told from others.
std::arch::global_asm!(".ident \"inferpool-matmul\"");

/// What ggml's struct of this name begins with: which part of the work is the calling thread's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ComputeParams {
    /// Its number.
    pub ith: c_int,
    /// How many threads there are.
    pub nth: c_int,
}

/// One of `count` parts of the work.
#[derive(Clone, Copy)]
struct Part {
    index: usize,
    count: usize,
}

impl Part {
    /// This part of `rows` rows: a multiple of `step` but for the last one.
    fn of(self, rows: usize, step: usize) -> Range<usize> {
        let steps = rows.div_ceil(step);
        let begin = |index: usize| (steps * index / self.count * step).min(rows);
        begin(self.index)..begin(self.index + 1)
    }
}

/// Row `j` of the `n` rows of `c` has the product of row `j` of `b` with each of the `m` rows of `a`.
///
/// Rows of `a` and `b` are of `k` blocks. Strides are in blocks too, that of `c` in floats.
struct Product {
    m: usize,
    n: usize,
    k: usize,
    a: *const u8,
    a_stride: usize,
    b: *const u8,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
}

unsafe extern "C" {
    fn llamafile_sgemm(
        params: *const ComputeParams,
        m: i64,
        n: i64,
        k: i64,
        a: *const c_void,
        lda: i64,
        b: *const c_void,
        ldb: i64,
        c: *mut c_void,
        ldc: i64,
        a_type: c_int,
        b_type: c_int,
        c_type: c_int,
    ) -> bool;
}

/// Computes the calling thread's part of a product as ggml's `llamafile_sgemm` does, or has that do it; false if neither
/// can, the same for all threads.
///
/// Row `j` of the `n` rows of `c`, which are `ldc` floats apart, gets the product of row `j` of `b` with each of the `m`
/// rows of `a`. Rows of `a` and `b` are of `k` blocks of their types, and `lda` and `ldb` blocks apart. A block of floats
/// has one.
///
/// # Safety
/// The matrices must be valid for their sizes, and nobody else may use what this thread has to compute.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn inferpool_mul_mat(
    params: *const ComputeParams,
    m: i64,
    n: i64,
    k: i64,
    a: *const c_void,
    lda: i64,
    b: *const c_void,
    ldb: i64,
    c: *mut c_void,
    ldc: i64,
    a_type: c_int,
    b_type: c_int,
    c_type: c_int,
) -> bool {
    let product = Product {
        m: m as usize,
        n: n as usize,
        k: k as usize,
        a: a.cast(),
        a_stride: lda as usize,
        b: b.cast(),
        b_stride: ldb as usize,
        c: c.cast(),
        c_stride: ldc as usize,
    };
    // SAFETY: the caller vouches for the parameters, and for matrices of these types.
    unsafe {
        let part = Part {
            index: (*params).ith as usize,
            count: (*params).nth as usize,
        };
        let is_computed = match (a_type, b_type, c_type) {
            (F32, F32, F32) => floats::compute(&product, part),
            #[cfg(target_arch = "x86_64")]
            (Q4_1, Q8_1, F32) => quantised::compute::<quantised::Q4_1>(&product, part),
            #[cfg(target_arch = "x86_64")]
            (Q8_0, Q8_0, F32) => quantised::compute::<quantised::Q8_0>(&product, part),
            _ => false,
        };
        is_computed
            || llamafile_sgemm(
                params, m, n, k, a, lda, b, ldb, c, ldc, a_type, b_type, c_type,
            )
    }
}
