//! Puts frames together from their records.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ptr::NonNull;

use crate::body::PART_ALIGN;
use crate::error::Violation;
use crate::record::{FIRST, Header, Kind, LAST};
use crate::ring::{Consumer, Memory, Record};

/// Heap bytes aligned to [`PART_ALIGN`], filled once and then read.
#[derive(Debug)]
pub struct Body {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a `Body` owns its bytes alone, as a `Vec<u8>` does.
unsafe impl Send for Body {}
// SAFETY: shared access only reads.
unsafe impl Sync for Body {}

impl Body {
    /// Allocates without filling; `None` when memory is short. Untouched pages of a large body cost
    /// nothing, so a peer that declares much and sends little gains nothing.
    fn with_length(length: usize) -> Option<Self> {
        if length == 0 {
            return Some(Self::empty());
        }
        let layout = Layout::from_size_align(length, PART_ALIGN).ok()?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        Some(Self { start, length })
    }

    fn empty() -> Self {
        Self {
            start: NonNull::dangling(),
            length: 0,
        }
    }

    /// Bytes of the body.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether the body has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Start of the bytes, aligned to [`PART_ALIGN`]; dangling when empty.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: a `Body` leaves this module only when every byte has been written.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: allocated in `with_length` with this very layout.
            unsafe {
                let layout = Layout::from_size_align_unchecked(self.length, PART_ALIGN);
                dealloc(self.start.as_ptr(), layout);
            }
        }
    }
}

/// A whole frame, copied out of the ring.
#[derive(Debug)]
pub struct Frame {
    /// Header of the frame's last record.
    pub header: Header,
    /// The body, yet to be parsed.
    pub body: Body,
}

struct Partial {
    first: Header,
    body: Body,
    filled: usize,
}

/// Frames in the making, by call.
pub struct Assembler {
    partials: HashMap<u64, Partial>,
    limit: usize,
}

impl Assembler {
    /// Accepts frames of up to `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            partials: HashMap::new(),
            limit,
        }
    }

    /// Takes the record in; returns the frame that it completes, if it does. A request that the host
    /// gave up half sent comes out with an empty body. The caller has made
    /// sure that the record's call exists, which bounds the number of frames in the making.
    pub fn accept<M: Memory>(
        &mut self,
        ring: &Consumer<M>,
        record: &Record,
    ) -> Result<Option<Frame>, Violation> {
        let header = record.header;
        if header.kind == Kind::Request && header.flags == LAST && header.length == 0 {
            self.partials
                .remove(&header.call)
                .ok_or(Violation::Fragment)?;
            return Ok(Some(Frame {
                header,
                body: Body::empty(),
            }));
        }
        let mut partial = self.begin_or_continue(&header)?;
        let length = header.length as usize;
        if partial.filled + length > partial.body.len() {
            return Err(Violation::Fragment);
        }
        // SAFETY: checked just above; the body has `filled + length` bytes or more. The record
        // comes from the caller's last `peek`.
        unsafe { ring.copy_body(record, partial.body.as_mut_ptr().add(partial.filled)) };
        partial.filled += length;
        let complete = partial.filled == partial.body.len();
        if complete != (header.flags & LAST != 0) {
            return Err(Violation::Fragment);
        }
        if complete {
            return Ok(Some(Frame {
                header,
                body: partial.body,
            }));
        }
        self.partials.insert(header.call, partial);
        Ok(None)
    }

    fn begin_or_continue(&mut self, header: &Header) -> Result<Partial, Violation> {
        let known = self.partials.remove(&header.call);
        if header.flags & FIRST != 0 {
            if known.is_some() {
                return Err(Violation::Fragment);
            }
            let total = usize::try_from(header.total).map_err(|_| Violation::TooLarge)?;
            if total > self.limit {
                return Err(Violation::TooLarge);
            }
            let body = Body::with_length(total).ok_or(Violation::TooLarge)?;
            return Ok(Partial {
                first: *header,
                body,
                filled: 0,
            });
        }
        let partial = known.ok_or(Violation::Fragment)?;
        let same = partial.first.kind == header.kind
            && partial.first.sequence == header.sequence
            && partial.first.slot == header.slot
            && partial.first.total == header.total;
        if same && header.length > 0 {
            Ok(partial)
        } else {
            Err(Violation::Fragment)
        }
    }
}

/// The records that carry a body of `total` bytes when one record takes `max_body`: for each, its
/// flags and the window of the body.
pub(crate) fn fragment(total: usize, max_body: usize, at: usize) -> (u16, std::ops::Range<usize>) {
    let end = total.min(at + max_body);
    let first = if at == 0 { FIRST } else { 0 };
    let last = if end == total { LAST } else { 0 };
    (first | last, at..end)
}

#[cfg(test)]
mod tests;
