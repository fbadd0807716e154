//! The product of matrices that llama.cpp asks OpenBLAS for: the crate `gemm` on the OpenMP threads that llama.cpp has
//! already.
//!
//! `make` links this into llama-cpp-python, where ggml's BLAS backend takes the products of 32 rows and more: prompts,
//! and batches of texts to embed. An OpenBLAS would do, but a fresh machine has none; that of PyPI has threads of its
//! own, which get in the way of OpenMP's, and knows fewer CPUs.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

use gemm_common::Parallelism;
use gemm_f32::gemm::f32::get_gemm_fn;

// Values of cblas.h, https://netlib.org/blas/cblas.h.
const ROW_MAJOR: c_int = 101;
const NO_TRANS: c_int = 111;
// Of OpenBLAS's cblas.h.
const OPENMP: c_int = 2;

/// Rows of a part: a multiple of what the kernels for AVX-512, AVX2 and NEON compute together.
const BLOCK: usize = 48;

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
