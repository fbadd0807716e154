//! Puts frames together from their records.

use std::collections::HashMap;

use crate::buffer::Body;
use crate::error::Violation;
use crate::record::{FIRST, Header, Kind, LAST};
use crate::ring::{Consumer, Memory, Record};

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
    /// gave up half sent comes out with an empty body. The caller has made sure that the record's
    /// call exists, which bounds the number of frames in the making.
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
        // Hashing takes longer than all else here, and there is mostly nothing to look up.
        let known = match self.partials.is_empty() {
            true => None,
            false => self.partials.remove(&header.call),
        };
        if header.flags & FIRST != 0 {
            if known.is_some_and(|partial| !header.kind.replaces(partial.first.kind)) {
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

#[cfg(not(loom))]
#[cfg(test)]
mod tests;
