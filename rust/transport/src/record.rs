//! The record header: 32 bytes before every record in a ring.
//!
//! | bytes | field | meaning |
//! |---|---|---|
//! | 0..4 | length | bytes of body in this record |
//! | 4..6 | kind | [`Kind`] |
//! | 6..8 | flags | [`FIRST`], [`LAST`], [`WHOLE`] |
//! | 8..16 | call | call id, unique within an incarnation |
//! | 16..20 | sequence | number of the frame within its call and direction, from 0 |
//! | 20..24 | slot | the call's slot in the control page |
//! | 24..32 | total | bytes of the whole frame's body, over all its fragments |
//!
//! Integers are little endian. A record takes a multiple of [`ALIGN`] bytes and never wraps.

use crate::error::Violation;

/// Alignment of records, and the size of a header.
pub const ALIGN: usize = 32;
/// Bytes of a header.
pub const HEADER: usize = 32;
/// Flag of a frame's first record.
pub const FIRST: u16 = 1;
/// Flag of a frame's last record.
pub const LAST: u16 = 2;
/// Flag of a request whose caller waits for the end of the answer anyway: an answer of one item
/// may come as [`Kind::Answer`].
pub const WHOLE: u16 = 4;

/// What a record carries. Zero is not a kind, so untouched memory never passes for a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Fills the space up to the end of the ring.
    Pad = 1,
    /// A call, host to worker.
    Request = 2,
    /// One item of an answer, worker to host.
    Data = 3,
    /// The call ended well; no body.
    End = 4,
    /// The call failed; the body says how.
    Error = 5,
    /// The only item of an answer, and its good end.
    Answer = 6,
}

impl Kind {
    /// Whether a frame of this kind is the last of its call.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::End | Self::Error | Self::Answer)
    }

    /// Whether a frame of this kind may begin while one of `other` of its call is half out, which is
    /// dropped then: a handler that fails amid an item has no more of it.
    pub(crate) fn replaces(self, other: Self) -> bool {
        matches!(self, Self::End | Self::Error) && other == Self::Data
    }

    fn from_wire(value: u16) -> Result<Self, Violation> {
        Ok(match value {
            1 => Self::Pad,
            2 => Self::Request,
            3 => Self::Data,
            4 => Self::End,
            5 => Self::Error,
            6 => Self::Answer,
            _ => return Err(Violation::Kind),
        })
    }
}

/// A record header, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of body in this record.
    pub length: u32,
    /// What the record carries.
    pub kind: Kind,
    /// [`FIRST`], [`LAST`] and [`WHOLE`].
    pub flags: u16,
    /// Call id.
    pub call: u64,
    /// Number of the frame within its call and direction.
    pub sequence: u32,
    /// The call's slot.
    pub slot: u32,
    /// Bytes of the whole frame's body.
    pub total: u64,
}

impl Header {
    /// A padding record that fills `space` bytes, header included.
    pub(crate) fn pad(space: usize) -> Self {
        Self {
            // A ring is at most 2 GiB, so the cast keeps the value.
            length: (space - HEADER) as u32,
            kind: Kind::Pad,
            flags: FIRST | LAST,
            call: 0,
            sequence: 0,
            slot: 0,
            total: (space - HEADER) as u64,
        }
    }

    /// Bytes that the record takes in the ring.
    pub fn span(&self) -> usize {
        span(self.length as usize)
    }

    /// Encodes to the wire form.
    pub fn to_wire(self) -> [u8; HEADER] {
        let mut wire = [0; HEADER];
        wire[0..4].copy_from_slice(&self.length.to_le_bytes());
        wire[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        wire[6..8].copy_from_slice(&self.flags.to_le_bytes());
        wire[8..16].copy_from_slice(&self.call.to_le_bytes());
        wire[16..20].copy_from_slice(&self.sequence.to_le_bytes());
        wire[20..24].copy_from_slice(&self.slot.to_le_bytes());
        wire[24..32].copy_from_slice(&self.total.to_le_bytes());
        wire
    }

    /// Decodes and checks what a header can say by itself.
    pub fn from_wire(wire: &[u8; HEADER]) -> Result<Self, Violation> {
        let [
            l0,
            l1,
            l2,
            l3,
            k0,
            k1,
            f0,
            f1,
            c0,
            c1,
            c2,
            c3,
            c4,
            c5,
            c6,
            c7,
            rest @ ..,
        ] = *wire;
        let [
            q0,
            q1,
            q2,
            q3,
            s0,
            s1,
            s2,
            s3,
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7,
        ] = rest;
        let header = Self {
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            kind: Kind::from_wire(u16::from_le_bytes([k0, k1]))?,
            flags: u16::from_le_bytes([f0, f1]),
            call: u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            sequence: u32::from_le_bytes([q0, q1, q2, q3]),
            slot: u32::from_le_bytes([s0, s1, s2, s3]),
            total: u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]),
        };
        let for_requests = if header.kind == Kind::Request {
            WHOLE
        } else {
            0
        };
        if header.flags & !(FIRST | LAST | for_requests) != 0 {
            return Err(Violation::Kind);
        }
        if u64::from(header.length) > header.total {
            return Err(Violation::Length);
        }
        Ok(header)
    }
}

/// Bytes that a record with `length` bytes of body takes in the ring.
pub(crate) fn span(length: usize) -> usize {
    HEADER + length.next_multiple_of(ALIGN)
}
