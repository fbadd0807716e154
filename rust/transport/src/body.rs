//! The body of a frame: one message and any number of raw buffers beside it.
//!
//! ```text
//! u32 parts | u32 zero | u64 length of each part | part 0 | … | part 1 at a multiple of 64 | …
//! ```
//!
//! Part 0 follows the table at once; later parts start at multiples of [`PART_ALIGN`] from the
//! start of the body, which itself is aligned to it once received, so numpy can use them in place.

use std::ops::Range;

use smallvec::SmallVec;

use crate::error::Violation;

/// Alignment of every part but the first.
pub const PART_ALIGN: usize = 64;
/// Parts that a frame may have.
pub const MAX_PARTS: usize = 4096;

/// Bytes of a body; short ones need no memory of their own.
pub(crate) type Bytes = SmallVec<[u8; 128]>;

/// A body to be sent: borrowed pieces, in order, copied once, straight into the ring.
#[derive(Debug)]
pub struct Gather<'a> {
    table: SmallVec<[u8; 64]>,
    parts: &'a [&'a [u8]],
    total: usize,
}

impl<'a> Gather<'a> {
    /// Lays the parts out. `None` when there are more than [`MAX_PARTS`].
    pub fn new(parts: &'a [&'a [u8]]) -> Option<Self> {
        if parts.len() > MAX_PARTS {
            return None;
        }
        let mut table = SmallVec::with_capacity(table_size(parts.len()));
        table.extend_from_slice(&(parts.len() as u32).to_le_bytes());
        table.extend_from_slice(&0u32.to_le_bytes());
        for part in parts {
            table.extend_from_slice(&(part.len() as u64).to_le_bytes());
        }
        let mut total = table.len();
        for (index, part) in parts.iter().enumerate() {
            total = part_start(index, total) + part.len();
        }
        Some(Self {
            table,
            parts,
            total,
        })
    }

    /// A body without parts, as END frames have.
    pub fn empty() -> Self {
        Self {
            table: SmallVec::new(),
            parts: &[],
            total: 0,
        }
    }

    /// A body that was laid out before; `bytes` is one piece.
    pub(crate) fn of_body(bytes: &'a [&'a [u8]; 1]) -> Self {
        Self {
            table: SmallVec::new(),
            parts: bytes,
            total: bytes[0].len(),
        }
    }

    /// The body by itself, for [`Self::of_body`].
    pub(crate) fn to_bytes(&self) -> Bytes {
        let mut bytes = Bytes::with_capacity(self.total);
        self.copy(0..self.total, &mut |piece| bytes.extend_from_slice(piece));
        bytes
    }

    /// Bytes of the body.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Hands bytes `window` of the body to `write`, in order.
    pub fn copy(&self, window: Range<usize>, write: &mut dyn FnMut(&[u8])) {
        const ZEROS: [u8; PART_ALIGN] = [0; PART_ALIGN];
        let mut at = 0;
        let mut emit = |piece: &[u8]| {
            let piece_end = at + piece.len();
            let (start, end) = (window.start.max(at), window.end.min(piece_end));
            if start < end {
                write(&piece[start - at..end - at]);
            }
            at = piece_end;
            at
        };
        let mut end = emit(&self.table);
        for (index, part) in self.parts.iter().enumerate() {
            let padding = part_start(index, end) - end;
            emit(&ZEROS[..padding]);
            end = emit(part);
        }
    }
}

/// Where each part lies in a body.
pub type Spans = SmallVec<[Range<usize>; 2]>;

/// Reads the part table of a received body and checks every span against it.
pub fn parse(body: &[u8]) -> Result<Spans, Violation> {
    if body.is_empty() {
        return Ok(Spans::new());
    }
    let (count, rest) = body.split_first_chunk::<4>().ok_or(Violation::Body)?;
    let count = u32::from_le_bytes(*count) as usize;
    let lengths = rest.get(4..).ok_or(Violation::Body)?;
    if count > MAX_PARTS || lengths.len() < count * 8 {
        return Err(Violation::Body);
    }
    let mut parts = Spans::with_capacity(count);
    let mut end = table_size(count);
    for (index, length) in lengths.as_chunks::<8>().0[..count].iter().enumerate() {
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| Violation::Body)?;
        let start = part_start(index, end);
        end = start.checked_add(length).ok_or(Violation::Body)?;
        // At once, since the next start is rounded up from here.
        if end > body.len() {
            return Err(Violation::Body);
        }
        parts.push(start..end);
    }
    if end != body.len() {
        return Err(Violation::Body);
    }
    Ok(parts)
}

fn table_size(parts: usize) -> usize {
    8 + parts * 8
}

fn part_start(index: usize, end: usize) -> usize {
    if index == 0 {
        end
    } else {
        end.next_multiple_of(PART_ALIGN)
    }
}
