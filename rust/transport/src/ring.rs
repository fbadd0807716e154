//! A single-producer single-consumer ring of records, generic over its memory.
//!
//! # Guarantees
//! - Records arrive whole, once, in order. Neither side ever blocks here: a full ring and an empty
//!   one are return values, and waiting is built on [`Producer::arm`] and [`Consumer::arm`].
//! - Each side keeps its own position in private memory and only publishes a copy; what the peer
//!   publishes is checked before it is used. A peer that scribbles over the shared words can make
//!   this side report a [`Violation`], lose or garble records; it cannot make it access memory
//!   outside the ring.
//!
//! # Non-guarantees
//! - A record's bytes may change under a hostile peer until they are copied out. Headers are
//!   therefore copied once and checked in the copy, and bodies are parsed from a copy only.
//!
//! # Ordering
//! Positions are monotonic `u64` byte counts; the offset in the ring is the position modulo the
//! capacity, a power of two.
//!
//! - SYNC POINT A: the producer's release store of `tail` pairs with the consumer's acquire load.
//!   The record's bytes happen before the consumer's copy of them.
//! - SYNC POINT B: the consumer's release store of `head` pairs with the producer's acquire load.
//!   The consumer's copy happens before the producer overwrites the space.
//! - SYNC POINT C (and D with the roles exchanged): the sleeper stores its armed flag, fences, then
//!   reads the position; the other side stores the position, fences, then reads the flag. With
//!   both fences sequentially consistent at least one of them sees the other's store, so either
//!   the sleeper does not sleep or the other side rings.
//! - SYNC POINT E: the producer's release store of its armed flag pairs with the acquire exchange
//!   that takes it down. What the producer noted before, that one more ring is due, happens before
//!   the ring. A consumer notes that under a lock, which whoever counts rings has too.

use crate::error::Violation;
use crate::record::{ALIGN, FIRST, HEADER, Header, Kind, span};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// The memory of one ring: four shared words and a data area.
///
/// # Safety
/// The words must be shared by exactly one [`Producer`] and one [`Consumer`]; `write` and `read`
/// must stay inside `capacity` bytes of data, whatever else holds.
pub unsafe trait Memory {
    /// Position up to which records are published.
    fn tail(&self) -> &AtomicU64;
    /// Position up to which records are consumed.
    fn head(&self) -> &AtomicU64;
    /// 1 while the consumer sleeps until something is published.
    fn consumer_armed(&self) -> &AtomicU32;
    /// 1 while the producer sleeps until space is freed.
    fn producer_armed(&self) -> &AtomicU32;
    /// Bytes of data; a power of two, at least 4 times [`ALIGN`], at most 2 GiB.
    fn capacity(&self) -> usize;
    /// Copies `source` to `offset`.
    ///
    /// # Safety
    /// `offset + source.len()` must not pass the capacity, and the span must belong to the caller
    /// by the ring's protocol.
    unsafe fn write(&self, offset: usize, source: &[u8]);
    /// Copies `length` bytes from `offset` to `target`.
    ///
    /// # Safety
    /// As for `write`; `target` must be valid for `length` bytes of writes.
    unsafe fn read(&self, offset: usize, target: *mut u8, length: usize);
}

/// Checks a capacity that came from a configuration or a peer.
pub fn is_valid_capacity(capacity: usize) -> bool {
    capacity.is_power_of_two() && (4 * ALIGN..=1 << 31).contains(&capacity)
}

/// Bytes that a record takes at most, header included. The other side copies one out while this one
/// writes the next; with records of 1 MiB an array of that size took half as long again.
const RECORD: usize = 128 * 1024;

/// An empty ring starts over for frames of at least this part of it, 64 KiB of 4 MiB. Each look at
/// the other side's position takes a cache line from it, which a stream of short ones has no need of.
const START_OVER: u64 = 64;

/// Bytes of body that fit into one record: with half the ring, a record and the padding before it
/// always fit into an empty ring; with a quarter, both sides can be at work in a small one too.
fn max_body(capacity: usize) -> usize {
    (capacity / 4).min(RECORD).saturating_sub(HEADER).max(ALIGN)
}

/// The writing end.
#[derive(Debug)]
pub struct Producer<M> {
    memory: M,
    tail: u64,
    /// Last value of the peer's position that passed the checks.
    head: u64,
}

impl<M: Memory> Producer<M> {
    /// Takes the writing end of a fresh ring.
    pub fn new(memory: M) -> Self {
        Self {
            memory,
            tail: 0,
            head: 0,
        }
    }

    /// Bytes of body that fit into one record.
    pub fn max_body(&self) -> usize {
        max_body(self.memory.capacity())
    }

    /// Position up to which records are published.
    pub fn position(&self) -> u64 {
        self.tail
    }

    /// Writes one record if there is space for it, and says whether the consumer wants a ring of
    /// its doorbell; `None` means that the ring is full. `fill` writes the body through the
    /// callback it gets, in order and in full.
    pub fn push(
        &mut self,
        header: &Header,
        fill: impl FnOnce(&mut dyn FnMut(&[u8])),
    ) -> Result<Option<bool>, Violation> {
        debug_assert!(header.length as usize <= self.max_body());
        let space = header.span();
        let capacity = self.memory.capacity();
        let mut offset = self.tail as usize & (capacity - 1);
        let to_end = capacity - offset;
        let padded = space > to_end || self.starts_over(header, offset)?;
        let padding = if padded { to_end } else { 0 };
        if !self.has_space(padding + space)? {
            return Ok(None);
        }
        if padded {
            // SAFETY: the span up to the end of the ring is free, and a header fits because
            // offsets are multiples of ALIGN.
            unsafe { self.memory.write(offset, &Header::pad(padding).to_wire()) };
            offset = 0;
        }
        // SAFETY: `space` bytes from `offset` are free and do not pass the end.
        unsafe { self.memory.write(offset, &header.to_wire()) };
        let mut at = offset + HEADER;
        let end = at + header.length as usize;
        fill(&mut |piece| {
            // A caller that writes too much would leave the record; the check keeps it inside.
            let piece = &piece[..piece.len().min(end - at)];
            // SAFETY: `at..end` lies within the record's free space.
            unsafe { self.memory.write(at, piece) };
            at += piece.len();
        });
        debug_assert_eq!(at, end);
        self.tail += (padding + space) as u64;
        // SYNC POINT A
        self.memory.tail().store(self.tail, Ordering::Release);
        // SYNC POINT C
        fence(Ordering::SeqCst);
        Ok(Some(take_flag(self.memory.consumer_armed())))
    }

    /// Whether the frame that this record begins is to be written at the ring's beginning rather
    /// than from `offset` on: the ring is empty, and there is room for the frame. What was used last
    /// is still in the caches, and its pages are known to the CPU.
    fn starts_over(&mut self, header: &Header, offset: usize) -> Result<bool, Violation> {
        let capacity = self.memory.capacity();
        let long = header.flags & FIRST != 0 && header.total >= capacity as u64 / START_OVER;
        // This record must have room. If headers of further ones have none, the frame waits for it.
        let needed = header.total.max(header.span() as u64);
        Ok(long && needed <= offset as u64 && self.has_space(capacity)?)
    }

    /// Whether a record with `length` bytes of body would fit now, padding included.
    pub fn fits(&mut self, length: usize) -> Result<bool, Violation> {
        let capacity = self.memory.capacity();
        let to_end = capacity - (self.tail as usize & (capacity - 1));
        let space = span(length);
        let padding = if space > to_end { to_end } else { 0 };
        self.has_space(padding + space)
    }

    /// Announces that this side will sleep until `ready`, which depends on what the consumer does
    /// before it calls [`Consumer::release`] or [`nudge`]. `false` means that it is ready already,
    /// and the announcement is taken back.
    pub fn arm(
        &mut self,
        ready: impl FnOnce(&mut Self) -> Result<bool, Violation>,
    ) -> Result<bool, Violation> {
        // SYNC POINT E
        self.memory.producer_armed().store(1, Ordering::Release);
        // SYNC POINT D
        fence(Ordering::SeqCst);
        if ready(self)? {
            self.disarm();
            return Ok(false);
        }
        Ok(true)
    }

    /// Takes the announcement back.
    pub fn disarm(&self) {
        lower(self.memory.producer_armed());
    }

    fn has_space(&mut self, needed: usize) -> Result<bool, Violation> {
        let capacity = self.memory.capacity() as u64;
        if needed as u64 <= capacity - (self.tail - self.head) {
            return Ok(true);
        }
        // SYNC POINT B
        let head = self.memory.head().load(Ordering::Acquire);
        if head < self.head || head > self.tail || !head.is_multiple_of(ALIGN as u64) {
            return Err(Violation::Position);
        }
        self.head = head;
        Ok(needed as u64 <= capacity - (self.tail - self.head))
    }
}

/// A record that was published and not yet released.
#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// The header, copied and checked.
    pub header: Header,
    offset: usize,
}

/// The reading end.
#[derive(Debug)]
pub struct Consumer<M> {
    memory: M,
    head: u64,
    /// Last value of the peer's position that passed the checks.
    tail: u64,
}

impl<M: Memory> Consumer<M> {
    /// Takes the reading end of a fresh ring.
    pub fn new(memory: M) -> Self {
        Self {
            memory,
            head: 0,
            tail: 0,
        }
    }

    /// Position up to which records are consumed.
    pub fn position(&self) -> u64 {
        self.head
    }

    /// Whether a look with [`Self::peek`] is worth it. Cheap enough to spin on.
    pub fn is_ready(&self) -> bool {
        self.tail != self.head || self.memory.tail().load(Ordering::Relaxed) != self.head
    }

    /// The next record, padding skipped, or `None` when nothing is published.
    pub fn peek(&mut self) -> Result<Option<Record>, Violation> {
        if self.head == self.tail && !self.refresh()? {
            return Ok(None);
        }
        let mut record = self.record_at_head()?;
        if record.header.kind == Kind::Pad {
            let space = record.header.span();
            if space != self.memory.capacity() - record.offset {
                return Err(Violation::Length);
            }
            self.head += space as u64;
            // A record follows in the same publication. If padding could stand alone, a peer that
            // publishes nothing else would keep this side reading and `head` from being told.
            record = self.record_at_head()?;
            if record.header.kind == Kind::Pad {
                return Err(Violation::Length);
            }
        }
        Ok(Some(record))
    }

    fn record_at_head(&self) -> Result<Record, Violation> {
        let capacity = self.memory.capacity();
        let offset = self.head as usize & (capacity - 1);
        let mut wire = [0; HEADER];
        // SAFETY: positions are multiples of ALIGN, so a header fits before the end.
        unsafe { self.memory.read(offset, wire.as_mut_ptr(), HEADER) };
        let header = Header::from_wire(&wire)?;
        let space = header.span();
        if space > capacity - offset || space as u64 > self.tail - self.head {
            return Err(Violation::Length);
        }
        Ok(Record { header, offset })
    }

    /// Copies the body of a record to `target`.
    ///
    /// # Safety
    /// `target` must be valid for `record.header.length` bytes of writes, and `record` must be what
    /// the last [`Self::peek`] of this consumer returned.
    pub unsafe fn copy_body(&self, record: &Record, target: *mut u8) {
        let length = record.header.length as usize;
        // SAFETY: `peek` checked that the record ends before the ring and the published part do.
        unsafe { self.memory.read(record.offset + HEADER, target, length) };
    }

    /// Frees the record that the last [`Self::peek`] returned, and says whether the producer wants
    /// a ring of its doorbell.
    pub fn release(&mut self, record: Record) -> bool {
        self.head += record.header.span() as u64;
        // SYNC POINT B
        self.memory.head().store(self.head, Ordering::Release);
        nudge(&self.memory)
    }

    /// Announces that this side will sleep until something is published. `false` means that
    /// something is, and the announcement is taken back.
    pub fn arm(&mut self) -> Result<bool, Violation> {
        self.memory.consumer_armed().store(1, Ordering::Relaxed);
        // SYNC POINT C
        fence(Ordering::SeqCst);
        if self.head != self.tail || self.refresh()? {
            self.disarm();
            return Ok(false);
        }
        Ok(true)
    }

    /// Takes the announcement back.
    pub fn disarm(&self) {
        lower(self.memory.consumer_armed());
    }

    fn refresh(&mut self) -> Result<bool, Violation> {
        // SYNC POINT A
        let tail = self.memory.tail().load(Ordering::Acquire);
        if tail < self.tail
            || tail - self.head > self.memory.capacity() as u64
            || !tail.is_multiple_of(ALIGN as u64)
        {
            return Err(Violation::Position);
        }
        self.tail = tail;
        Ok(tail != self.head)
    }
}

/// To be called on the consumer's side after a store that a sleeping producer waits for; says
/// whether the producer wants a ring of its doorbell.
pub fn nudge(memory: &impl Memory) -> bool {
    // SYNC POINT D
    fence(Ordering::SeqCst);
    take_flag(memory.producer_armed())
}

/// How far the consumer says that it has read. Nothing may depend on it but what is told of calls, and
/// for how long a bounded spin goes on.
pub fn consumed(memory: &impl Memory) -> u64 {
    memory.head().load(Ordering::Relaxed)
}

/// How far the consumer has read, if it sleeps though there is more. For a short while that is
/// nothing unusual: it may be about to take its flag down.
pub fn asleep_before(memory: &impl Memory) -> Option<u64> {
    let head = memory.head().load(Ordering::Relaxed);
    let unread = head != memory.tail().load(Ordering::Relaxed);
    (unread && memory.consumer_armed().load(Ordering::Relaxed) == 1).then_some(head)
}

/// Takes down one's own armed flag. The other side looks at it after each record, so a store to a
/// flag that is down already would cost it a cache miss.
fn lower(flag: &AtomicU32) {
    if flag.load(Ordering::Relaxed) != 0 {
        flag.store(0, Ordering::Relaxed);
    }
}

/// Takes down the other side's armed flag; `true` means that it was up. The load keeps the common
/// case, nobody sleeping, free of a locked instruction. An exchange that fails writes nothing, so a
/// flag that its owner took down and put up again is never overwritten by what was seen before.
fn take_flag(flag: &AtomicU32) -> bool {
    let is_up = flag.load(Ordering::Relaxed) == 1;
    // SYNC POINT E
    is_up
        && flag
            .compare_exchange(1, 0, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
}
