//! Weights that are floats: the crate `gemm`.

use std::panic::catch_unwind;
use std::sync::LazyLock;

use gemm_common::Parallelism;
use gemm_common::cache::CACHE_INFO;
use gemm_f32::gemm::f32::get_gemm_fn;

use crate::{Part, Product};

/// Rows of `b` from which on `gemm` takes less time than ggml: measured on an AMD Zen 4.
const LEAST_ROWS: usize = 64;

/// Rows of `a` in a part: a multiple of the 64 that `gemm` computes together with AVX-512, and of the 16 with AVX2.
const STEP: usize = 64;

/// Bytes of L2 cache for each CPU. With half of it `gemm` divides by zero, or never ends.
const LEAST_L2: usize = 192 * 1024;

/// Whether `gemm` can do with what this machine says of its caches. A fourth level makes it panic.
static CACHES_ARE_KNOWN: LazyLock<bool> =
    LazyLock::new(|| catch_unwind(|| CACHE_INFO[1].cache_bytes >= LEAST_L2).unwrap_or(false));

/// Computes a part of `product`; false if ggml should do it.
///
/// # Safety
/// The matrices must be valid for their sizes, with blocks that are floats, and nobody else may use this part of `c`.
pub unsafe fn compute(product: &Product, part: Part) -> bool {
    let is_worth_it = product.n >= LEAST_ROWS && product.m >= STEP * part.count;
    if !is_worth_it || !*CACHES_ARE_KNOWN {
        return false;
    }
    let rows = part.of(product.m, STEP);
    // SAFETY: the rows are within `a`, and as many floats within each row of `c`. Those rows are columns to `gemm`.
    unsafe {
        get_gemm_fn()(
            rows.len(),
            product.n,
            product.k,
            product.c.add(rows.start),
            product.c_stride as isize,
            1,
            false,
            product.a.cast::<f32>().add(rows.start * product.a_stride),
            1,
            product.a_stride as isize,
            product.b.cast(),
            product.b_stride as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    true
}
