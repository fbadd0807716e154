//! The product of matrices that llama.cpp asks OpenBLAS for: the crate `gemm` on the OpenMP threads that llama.cpp has
//! already.
//!
//! `make` links this into llama-cpp-python, where ggml's BLAS backend takes the products of 32 rows and more: prompts,
//! and batches of texts to embed. An OpenBLAS would do, but a fresh machine has none; that of PyPI has threads of its
//! own, which get in the way of OpenMP's, and knows fewer CPUs.

use std::ffi::{c_int, c_uint, c_void};
use std::panic::catch_unwind;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

use gemm_common::Parallelism;
use gemm_common::cache::CACHE_INFO;
use gemm_f32::gemm::f32::get_gemm_fn;

// Values of cblas.h, https://netlib.org/blas/cblas.h.
const ROW_MAJOR: c_int = 101;
const NO_TRANS: c_int = 111;
// Of OpenBLAS's cblas.h.
const OPENMP: c_int = 2;

/// Rows of a part: a multiple of what the kernels for AVX-512, AVX2 and NEON compute together.
const BLOCK: usize = 48;

/// Bytes of L2 cache for each CPU. With half of it `gemm` divides by zero, or never ends.
const LEAST_L2: usize = 192 * 1024;

/// Whether `gemm` can do with what this machine says of its caches. A fourth level makes it panic.
static CACHES_ARE_KNOWN: LazyLock<bool> =
    LazyLock::new(|| catch_unwind(|| CACHE_INFO[1].cache_bytes >= LEAST_L2).unwrap_or(false));

static NUM_THREADS: AtomicU32 = AtomicU32::new(1);

#[link(name = "gomp")]
unsafe extern "C" {
    // What GCC makes of `#pragma omp parallel num_threads(n)`.
    fn GOMP_parallel(
        body: unsafe extern "C" fn(*mut c_void),
        data: *mut c_void,
        num_threads: c_uint,
        flags: c_uint,
    );
    fn omp_get_num_threads() -> c_int;
    fn omp_get_thread_num() -> c_int;
}

/// A matrix of floats in somebody else's memory.
#[derive(Clone, Copy)]
struct Operand {
    data: *const f32,
    row_stride: isize,
    column_stride: isize,
}

impl Operand {
    /// A matrix whose columns lie `leading` floats apart, or its transpose.
    fn new(data: *const f32, leading: c_int, trans: c_int) -> Self {
        let (row_stride, column_stride) = if trans == NO_TRANS {
            (1, leading as isize)
        } else {
            (leading as isize, 1)
        };
        Self {
            data,
            row_stride,
            column_stride,
        }
    }

    /// One element.
    ///
    /// # Safety
    /// It must lie in the matrix.
    unsafe fn get(&self, row: usize, column: usize) -> f32 {
        let offset = row as isize * self.row_stride + column as isize * self.column_stride;
        // SAFETY: the caller vouches for it.
        unsafe { *self.data.offset(offset) }
    }
}

/// `c = alpha * a * b + beta * c` with the columns of `c` one after the other.
struct Product {
    rows: usize,
    columns: usize,
    depth: usize,
    alpha: f32,
    a: Operand,
    b: Operand,
    beta: f32,
    c: *mut f32,
    c_stride: isize,
}

impl Product {
    /// Computes part `index` of `count`, which no other part overlaps.
    ///
    /// # Safety
    /// As for [`cblas_sgemm`]; nobody else computes this part.
    unsafe fn compute(&self, index: usize, count: usize) {
        let blocks = self.rows.div_ceil(BLOCK);
        let begin = (blocks * index / count * BLOCK).min(self.rows);
        let end = (blocks * (index + 1) / count * BLOCK).min(self.rows);
        if begin == end {
            return;
        }
        if !*CACHES_ARE_KNOWN {
            // SAFETY: the caller vouches for it.
            return unsafe { self.compute_plainly(begin, end) };
        }
        // SAFETY: `begin..end` lies within the rows of a and c; the caller vouches for those.
        unsafe {
            get_gemm_fn()(
                end - begin,
                self.columns,
                self.depth,
                self.c.add(begin),
                self.c_stride,
                1,
                self.beta != 0.0,
                self.a.data.offset(begin as isize * self.a.row_stride),
                self.a.column_stride,
                self.a.row_stride,
                self.b.data,
                self.b.column_stride,
                self.b.row_stride,
                self.beta,
                self.alpha,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }

    /// Computes the rows `begin..end` without `gemm`, which takes many times as long.
    ///
    /// # Safety
    /// As for [`cblas_sgemm`]; nobody else computes these rows, and there are as many.
    unsafe fn compute_plainly(&self, begin: usize, end: usize) {
        for column in 0..self.columns {
            for row in begin..end {
                // SAFETY: the caller vouches for the matrices and their sizes.
                unsafe {
                    let terms = (0..self.depth).map(|l| self.a.get(row, l) * self.b.get(l, column));
                    let product = self.alpha * terms.sum::<f32>();
                    let target = self.c.add(row + column * self.c_stride as usize);
                    *target = if self.beta == 0.0 {
                        product
                    } else {
                        product + self.beta * *target
                    };
                }
            }
        }
    }
}

/// One thread's part.
///
/// # Safety
/// `product` must point to a [`Product`] that lives until all threads of the team have returned.
unsafe extern "C" fn compute_part(product: *mut c_void) {
    // SAFETY: the caller vouches for the pointer; each thread of a team has a number of its own.
    unsafe {
        let index = omp_get_thread_num() as usize;
        (*product.cast::<Product>()).compute(index, omp_get_num_threads() as usize);
    }
}

/// `c = alpha * op(a) * op(b) + beta * c`, as <https://netlib.org/blas/sgemm.f> has it: `op(a)` is m by k, `op(b)` is
/// k by n, and `c`, which need not be initialised if `beta` is 0, is m by n.
///
/// # Safety
/// The matrices must be valid for their sizes and leading dimensions, and `c` must not overlap the others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cblas_sgemm(
    order: c_int,
    trans_a: c_int,
    trans_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: f32,
    a: *const f32,
    lda: c_int,
    b: *const f32,
    ldb: c_int,
    beta: f32,
    c: *mut f32,
    ldc: c_int,
) {
    let (a, b) = (Operand::new(a, lda, trans_a), Operand::new(b, ldb, trans_b));
    // Rows one after the other are the columns of the transposed product.
    let (rows, columns, a, b) = if order == ROW_MAJOR {
        (n, m, b, a)
    } else {
        (m, n, a, b)
    };
    let mut product = Product {
        rows: rows.max(0) as usize,
        columns: columns.max(0) as usize,
        depth: k.max(0) as usize,
        alpha,
        a,
        b,
        beta,
        c,
        c_stride: ldc as isize,
    };
    // SAFETY: the caller vouches for the matrices; the team has returned when the call does.
    unsafe {
        GOMP_parallel(
            compute_part,
            (&raw mut product).cast(),
            NUM_THREADS.load(Ordering::Relaxed),
            0,
        );
    }
}

/// How many threads compute a product from now on.
#[unsafe(no_mangle)]
pub extern "C" fn openblas_set_num_threads(num_threads: c_int) {
    NUM_THREADS.store(num_threads.max(1) as u32, Ordering::Relaxed);
}

/// Whose threads they are: OpenMP's.
#[unsafe(no_mangle)]
pub extern "C" fn openblas_get_parallel() -> c_int {
    OPENMP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_come_out_alike_without_gemm() {
        let values: Vec<f32> = (0..5000u16)
            .map(|n| f32::from(n % 89) / 89.0 - 0.5)
            .collect();
        for (trans, beta) in [(NO_TRANS, 0.0), (NO_TRANS, 0.5), (NO_TRANS + 1, 0.5)] {
            let mut results = [vec![1.0; 60 * 50], vec![1.0; 60 * 50]];
            for (plainly, c) in results.iter_mut().enumerate() {
                let product = Product {
                    rows: 50,
                    columns: 50,
                    depth: 55,
                    alpha: 2.0,
                    a: Operand::new(values.as_ptr(), 60, trans),
                    b: Operand::new(values.as_ptr(), 60, trans),
                    beta,
                    c: c.as_mut_ptr(),
                    c_stride: 60,
                };
                // SAFETY: 60 floats from column to column, or row to row, for at most 55 of them.
                unsafe {
                    if plainly == 1 {
                        product.compute_plainly(0, 50);
                    } else {
                        product.compute(0, 1);
                    }
                }
            }
            let [gemm, plain] = results;
            assert!(
                gemm.iter()
                    .zip(plain)
                    .all(|(one, other)| (one - other).abs() < 1e-3)
            );
        }
    }
}
