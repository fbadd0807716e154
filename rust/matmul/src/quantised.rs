//! Quantised weights, in ggml's formats Q4_1 and Q8_0, on CPUs with AVX-512 VNNI or AVX2.
//!
//! A register holds four weights of each of 16 rows, or of 8. So they are unpacked once for up to 16 rows of activations,
//! these are read once for all the rows in a register, and nothing is added up across one.
//!
//! What comes out for a row of activations does not depend on how many there are, nor on the kernel: the products of a
//! block are added up in integers, and then to those of the blocks before it.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::{Part, Product};

/// Elements of a block, of weights or activations.
const BLOCK: usize = 32;
/// Rows of activations that are multiplied at once.
const WIDEST: usize = 16;
/// Blocks of a row that are multiplied before the next row's.
const PANEL: usize = 64;
/// Bytes of weights that stay in a CPU's cache for all of the activations.
const CHUNK: usize = 256 * 1024;
/// Bytes that a CPU fetches together.
const CACHE_LINE: usize = 64;

/// How blocks of weights look, and those of the activations that ggml multiplies them with.
pub trait Format {
    /// Bytes of a block of weights.
    const WEIGHTS: usize;
    /// Bytes of a block of activations.
    const ACTIVATIONS: usize;
    /// Where, in both, the elements begin. Before them are half floats, of which the first is the scale.
    const HEAD: usize;
    /// Whether weights are of four bits and count from a least one, the second half float; activations then have their
    /// scaled sum there. Otherwise weights are signed bytes.
    const IS_PACKED: bool;
}

/// <https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h>, `block_q4_1` and `block_q8_1`.
pub struct Q4_1;

impl Format for Q4_1 {
    const WEIGHTS: usize = 20;
    const ACTIVATIONS: usize = 36;
    const HEAD: usize = 4;
    const IS_PACKED: bool = true;
}

/// <https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h>, `block_q8_0`.
pub struct Q8_0;

impl Format for Q8_0 {
    const WEIGHTS: usize = 34;
    const ACTIVATIONS: usize = 34;
    const HEAD: usize = 2;
    const IS_PACKED: bool = false;
}

/// What a block of activations has beside its elements.
#[derive(Clone, Copy)]
struct Side {
    scale: f32,
    /// Their sum times the scale, if weights are packed.
    sum: f32,
    /// What their product with weights that are signed has too much if these are taken as unsigned, negated.
    offset: i32,
}

/// Some rows of weights, and of activations, as far as they are multiplied at once.
struct Tile {
    /// Of weights.
    rows: usize,
    blocks: usize,
    weights: *const u8,
    weights_stride: usize,
    activations: *const u8,
    activations_stride: usize,
    /// For each block those of all the rows of activations.
    sides: *const Side,
    results: *mut f32,
    results_stride: usize,
    /// Whether the results are there already, but for these blocks.
    goes_on: bool,
}

/// Multiplies as many rows of activations as it is made for with those of weights.
///
/// # Safety
/// The CPU must have the instructions, the tile must be valid, and nobody else may use its results.
type Multiply = unsafe fn(&Tile);

/// Computes a part of `product`; false if ggml should do it.
///
/// # Safety
/// The matrices must be valid for their sizes, with blocks as `F` has them, and nobody else may use this part of `c`.
pub unsafe fn compute<F: Format>(product: &Product, part: Part) -> bool {
    let lanes = if has_avx512() {
        16
    } else if F::IS_PACKED && has_avx2() {
        8
    } else {
        return false;
    };
    // SAFETY: the caller vouches for the product.
    unsafe { compute_rows::<F>(product, part.of(product.m, lanes), lanes) };
    true
}

pub fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
}

pub fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Computes the products with the rows `mine` of `a`, `lanes` of them at once.
///
/// # Safety
/// As for [`compute`]. With 16 lanes the CPU must have AVX-512 VNNI; with 8 it must have AVX2, FMA and F16C, and `F` must
/// be [`Q4_1`].
pub unsafe fn compute_rows<F: Format>(product: &Product, mine: Range<usize>, lanes: usize) {
    let chunk = if product.n == width(product.n) {
        mine.len()
    } else {
        CHUNK / (product.k * F::WEIGHTS).max(1)
    };
    let chunk = chunk.div_ceil(lanes).max(1) * lanes;
    let weights_stride = product.a_stride * F::WEIGHTS;
    let activations_stride = product.b_stride * F::ACTIVATIONS;
    let mut sides = [MaybeUninit::uninit(); PANEL * WIDEST];
    for first in mine.clone().step_by(chunk) {
        let end = mine.end.min(first + chunk);
        let mut column = 0;
        while column < product.n {
            let width = width(product.n - column);
            let multiply = kernel::<F>(lanes, width);
            for panel in (0..product.k.max(1)).step_by(PANEL) {
                let blocks = PANEL.min(product.k - panel);
                // SAFETY: rows, columns and blocks are within the matrices. CPUs with AVX-512 have F16C.
                unsafe {
                    let activations = product
                        .b
                        .add(column * activations_stride + panel * F::ACTIVATIONS);
                    for (index, side) in sides.iter_mut().take(blocks * width).enumerate() {
                        let row = activations.add(index % width * activations_stride);
                        let block = row.add(index / width * F::ACTIVATIONS);
                        side.write(self::side::<F>(block));
                    }
                    for row in (first..end).step_by(lanes) {
                        multiply(&Tile {
                            rows: lanes.min(end - row),
                            blocks,
                            weights: product.a.add(row * weights_stride + panel * F::WEIGHTS),
                            weights_stride,
                            activations,
                            activations_stride,
                            sides: sides.as_ptr().cast(),
                            results: product.c.add(column * product.c_stride + row),
                            results_stride: product.c_stride,
                            goes_on: panel > 0,
                        });
                    }
                }
            }
            column += width;
        }
    }
}

/// How many of `left` rows of activations are multiplied next.
fn width(left: usize) -> usize {
    if left < WIDEST { left.min(8) } else { WIDEST }
}

fn kernel<F: Format>(lanes: usize, width: usize) -> Multiply {
    macro_rules! of_width {
        ($multiply:ident $(, $format:ty)?) => {
            match width {
                1 => $multiply::<$($format,)? 1>,
                2 => $multiply::<$($format,)? 2>,
                3 => $multiply::<$($format,)? 3>,
                4 => $multiply::<$($format,)? 4>,
                5 => $multiply::<$($format,)? 5>,
                6 => $multiply::<$($format,)? 6>,
                7 => $multiply::<$($format,)? 7>,
                8 => $multiply::<$($format,)? 8>,
                _ => $multiply::<$($format,)? WIDEST>,
            }
        };
    }
    match lanes {
        16 => of_width!(multiply_avx512, F),
        _ => of_width!(multiply_avx2),
    }
}

/// # Safety
/// The CPU must have F16C, and the block must be one of `F`'s activations.
#[target_feature(enable = "f16c")]
unsafe fn side<F: Format>(block: *const u8) -> Side {
    // SAFETY: the caller vouches for the block, which is longer than this.
    let halves = unsafe { block.cast::<i32>().read_unaligned() };
    let halves = _mm_cvtph_ps(_mm_cvtsi32_si128(halves));
    let scale = _mm_cvtss_f32(halves);
    if F::IS_PACKED {
        let sum = _mm_cvtss_f32(_mm_movehdup_ps(halves));
        return Side {
            scale,
            sum,
            offset: 0,
        };
    }
    // SAFETY: as above.
    let elements = unsafe { block.add(F::HEAD).cast::<[i8; BLOCK]>().read() };
    let sum: i32 = elements.into_iter().map(i32::from).sum();
    Side {
        scale,
        sum: 0.0,
        offset: -128 * sum,
    }
}

/// Where the rows of weights of a tile are. If it has fewer, the last one counts for all that are missing.
fn rows<const LANES: usize>(tile: &Tile) -> [*const u8; LANES] {
    std::array::from_fn(|row| {
        tile.weights
            .wrapping_add(row.min(tile.rows - 1) * tile.weights_stride)
    })
}

/// Fetches the weights of the next tile while those of this one are multiplied, row after row. The CPU by itself sees 16
/// short rows, not that they lie one after the other; nor does it if they are fetched in another order.
struct Ahead {
    row: usize,
    offset: usize,
}

impl Ahead {
    const BEGIN: Self = Self { row: 0, offset: 0 };

    /// Fetches as much as a block of each of the rows has, which are those of this tile.
    #[inline(always)]
    fn fetch<F: Format, const LANES: usize>(&mut self, tile: &Tile, rows: &[*const u8; LANES]) {
        for _ in 0..(LANES * F::WEIGHTS).div_ceil(CACHE_LINE) {
            let next_tile = LANES * tile.weights_stride;
            let address = rows[self.row % LANES].wrapping_add(next_tile + self.offset);
            // SAFETY: it does nothing if nothing is there.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
            self.offset += CACHE_LINE;
            if self.offset >= tile.blocks * F::WEIGHTS {
                self.offset -= tile.blocks * F::WEIGHTS;
                self.row += 1;
            }
        }
    }
}

/// The 16 bytes `offset` behind each of the rows, transposed: four bytes of each of them, then the next four.
///
/// # Safety
/// The CPU must have AVX-512, and the bytes must be valid.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn transpose_16(rows: &[*const u8; 16], offset: usize) -> [__m512i; 4] {
    let load = |row: usize| {
        // SAFETY: the caller vouches for the bytes.
        unsafe { _mm_loadu_si128(rows[row].add(offset).cast()) }
    };
    let [r0, r1, r2, r3] = std::array::from_fn(|row| {
        let lower = _mm256_castsi128_si256(load(row));
        let upper = _mm256_castsi128_si256(load(row + 8));
        let lower = _mm256_inserti128_si256::<1>(lower, load(row + 4));
        let upper = _mm256_inserti128_si256::<1>(upper, load(row + 12));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lower), upper)
    });
    let (low01, low23) = (_mm512_unpacklo_epi32(r0, r1), _mm512_unpacklo_epi32(r2, r3));
    let (high01, high23) = (_mm512_unpackhi_epi32(r0, r1), _mm512_unpackhi_epi32(r2, r3));
    [
        _mm512_unpacklo_epi64(low01, low23),
        _mm512_unpackhi_epi64(low01, low23),
        _mm512_unpacklo_epi64(high01, high23),
        _mm512_unpackhi_epi64(high01, high23),
    ]
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn multiply_avx512<F: Format, const COLUMNS: usize>(tile: &Tile) {
    let rows = rows::<16>(tile);
    let mask = u16::MAX >> (16 - tile.rows);
    let mut ahead = Ahead::BEGIN;
    let mut sums = [_mm512_setzero_ps(); COLUMNS];
    // SAFETY: the caller vouches for the tile.
    unsafe {
        if tile.goes_on {
            for (column, sum) in sums.iter_mut().enumerate() {
                let results = tile.results.add(column * tile.results_stride);
                *sum = _mm512_maskz_loadu_ps(mask, results);
            }
        }
        for block in 0..tile.blocks {
            ahead.fetch::<F, 16>(tile, &rows);
            let begin = block * F::WEIGHTS;
            let [halves, ..] = transpose_16(&rows, begin);
            let scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves));
            let least = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(halves)));
            let first = transpose_16(&rows, begin + F::HEAD);
            let weights: [__m512i; 8] = if F::IS_PACKED {
                let low = _mm512_set1_epi8(15);
                std::array::from_fn(|word| match first.get(word) {
                    Some(&pairs) => _mm512_and_si512(pairs, low),
                    None => _mm512_and_si512(_mm512_srli_epi32::<4>(first[word - 4]), low),
                })
            } else {
                let second = transpose_16(&rows, begin + F::HEAD + BLOCK / 2);
                let sign = _mm512_set1_epi8(i8::MIN);
                std::array::from_fn(|word| {
                    let signed = *first.get(word).unwrap_or_else(|| &second[word - 4]);
                    _mm512_xor_si512(signed, sign)
                })
            };
            for (column, sum) in sums.iter_mut().enumerate() {
                let side = &*tile.sides.add(block * COLUMNS + column);
                let activations = tile
                    .activations
                    .add(column * tile.activations_stride + block * F::ACTIVATIONS + F::HEAD)
                    .cast::<i32>();
                let mut dot = _mm512_set1_epi32(if F::IS_PACKED { 0 } else { side.offset });
                for (word, &weights) in weights.iter().enumerate() {
                    let activations = activations.add(word).read_unaligned();
                    dot = _mm512_dpbusd_epi32(dot, weights, _mm512_set1_epi32(activations));
                }
                let scale = _mm512_mul_ps(scale, _mm512_set1_ps(side.scale));
                *sum = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot), *sum);
                if F::IS_PACKED {
                    *sum = _mm512_fmadd_ps(least, _mm512_set1_ps(side.sum), *sum);
                }
            }
        }
        for (column, &sum) in sums.iter().enumerate() {
            let results = tile.results.add(column * tile.results_stride);
            _mm512_mask_storeu_ps(results, mask, sum);
        }
    }
}

/// As [`transpose_16`], for eight rows.
///
/// # Safety
/// The CPU must have AVX2, and the bytes must be valid.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn transpose_8(rows: &[*const u8; 8], offset: usize) -> [__m256i; 4] {
    let load = |row: usize| {
        // SAFETY: the caller vouches for the bytes.
        unsafe { _mm_loadu_si128(rows[row].add(offset).cast()) }
    };
    let [r0, r1, r2, r3] = std::array::from_fn(|row| {
        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load(row)), load(row + 4))
    });
    let (low01, low23) = (_mm256_unpacklo_epi32(r0, r1), _mm256_unpacklo_epi32(r2, r3));
    let (high01, high23) = (_mm256_unpackhi_epi32(r0, r1), _mm256_unpackhi_epi32(r2, r3));
    [
        _mm256_unpacklo_epi64(low01, low23),
        _mm256_unpackhi_epi64(low01, low23),
        _mm256_unpacklo_epi64(high01, high23),
        _mm256_unpackhi_epi64(high01, high23),
    ]
}

/// For [`Q4_1`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_avx2<const COLUMNS: usize>(tile: &Tile) {
    let rows = rows::<8>(tile);
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(tile.rows as i32), lanes);
    let low = _mm256_set1_epi8(15);
    let to_floats = |words: __m256i| {
        let pairs = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(words, words));
        _mm256_cvtph_ps(_mm256_castsi256_si128(pairs))
    };
    let mut ahead = Ahead::BEGIN;
    let mut sums = [_mm256_setzero_ps(); COLUMNS];
    // SAFETY: the caller vouches for the tile.
    unsafe {
        if tile.goes_on {
            for (column, sum) in sums.iter_mut().enumerate() {
                let results = tile.results.add(column * tile.results_stride);
                *sum = _mm256_maskload_ps(results, mask);
            }
        }
        for block in 0..tile.blocks {
            ahead.fetch::<Q4_1, 8>(tile, &rows);
            let begin = block * Q4_1::WEIGHTS;
            let [halves, ..] = transpose_8(&rows, begin);
            let scale = to_floats(_mm256_and_si256(halves, _mm256_set1_epi32(0xffff)));
            let least = to_floats(_mm256_srli_epi32::<16>(halves));
            let packed = transpose_8(&rows, begin + Q4_1::HEAD);
            let weights: [__m256i; 8] = std::array::from_fn(|word| match packed.get(word) {
                Some(&pairs) => _mm256_and_si256(pairs, low),
                None => _mm256_and_si256(_mm256_srli_epi32::<4>(packed[word - 4]), low),
            });
            for (column, sum) in sums.iter_mut().enumerate() {
                let side = &*tile.sides.add(block * COLUMNS + column);
                let activations = tile
                    .activations
                    .add(column * tile.activations_stride + block * Q4_1::ACTIVATIONS + Q4_1::HEAD)
                    .cast::<i32>();
                // 16 products of 15 and -128 at most, which 16 bits can hold.
                let mut dots = _mm256_setzero_si256();
                for (word, &weights) in weights.iter().enumerate() {
                    let activations = _mm256_set1_epi32(activations.add(word).read_unaligned());
                    let pairs = _mm256_maddubs_epi16(weights, activations);
                    dots = _mm256_add_epi16(dots, pairs);
                }
                let dot = _mm256_madd_epi16(dots, _mm256_set1_epi16(1));
                let scale = _mm256_mul_ps(scale, _mm256_set1_ps(side.scale));
                *sum = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dot), *sum);
                *sum = _mm256_fmadd_ps(least, _mm256_set1_ps(side.sum), *sum);
            }
        }
        for (column, &sum) in sums.iter().enumerate() {
            let results = tile.results.add(column * tile.results_stride);
            _mm256_maskstore_ps(results, mask, sum);
        }
    }
}
