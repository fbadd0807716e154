//! The shared segment of one worker incarnation: a control page, call slots and two rings.
//!
//! ```text
//!      0  control page   magic, version, ring capacity, CPU of the host
//!   4096  request ring   words: tail, head, consumer armed, producer armed, 128 bytes apart
//!   4608  reply ring     the same
//!   8192  call slots     SLOTS times 64 bytes: cancelled call, consumed bytes
//!  24576  request data   `capacity` bytes
//!     ..  reply data     `capacity` bytes
//! ```
//!
//! Words sit on lines of their own (128 bytes, as CPUs prefetch lines in pairs), so that the two
//! sides do not slow each other down by false sharing.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::error::{Error, Result, Violation};
use crate::platform::{self, Mapping};
use crate::ring::{self, Memory};
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Calls that one worker can have in flight.
pub const SLOTS: u32 = 256;

const MAGIC: u64 = u64::from_le_bytes(*b"inferpl\0");
const VERSION: u64 = 1;
const WORDS_STEP: usize = 128;
const REQUEST_WORDS: usize = 4096;
const REPLY_WORDS: usize = REQUEST_WORDS + 4 * WORDS_STEP;
const SLOTS_START: usize = 8192;
const SLOT_SIZE: usize = 64;
const DATA_START: usize = SLOTS_START + SLOTS as usize * SLOT_SIZE;

/// A mapped segment.
#[derive(Debug, Clone)]
pub struct Segment {
    mapping: Arc<Mapping>,
    capacity: usize,
}

impl Segment {
    /// Creates a segment whose rings take `capacity` bytes each. Returns its file too, to be
    /// inherited by the worker.
    pub fn create(capacity: usize) -> Result<(Self, std::os::fd::OwnedFd)> {
        if !ring::is_valid_capacity(capacity) {
            return Err(Error::Os(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                format!("ring capacity must be a power of two from 128 to 2^31, not {capacity}"),
            )));
        }
        let length = DATA_START + 2 * capacity;
        let file = platform::create_shared_memory(length)?;
        let segment = Self::map(&file, length, capacity)?;
        segment.word(0).store(MAGIC, Ordering::Relaxed);
        segment.word(8).store(VERSION, Ordering::Relaxed);
        segment.word(16).store(capacity as u64, Ordering::Relaxed);
        Ok((segment, file))
    }

    /// Maps a segment that the other side created, and checks that it is one of this format.
    pub fn open(file: BorrowedFd<'_>) -> Result<Self> {
        let length = platform::file_size(file)?;
        if length < DATA_START + 8 * 32 {
            return Err(Violation::Segment.into());
        }
        let capacity = (length - DATA_START) / 2;
        let segment = Self::map(file, length, capacity)?;
        let expected = [(0, MAGIC), (8, VERSION), (16, capacity as u64)];
        let matches =
            |&(at, value): &(usize, u64)| segment.word(at).load(Ordering::Relaxed) == value;
        if !ring::is_valid_capacity(capacity) || !expected.iter().all(matches) {
            return Err(Violation::Segment.into());
        }
        Ok(segment)
    }

    fn map(file: impl std::os::fd::AsFd, length: usize, capacity: usize) -> Result<Self> {
        let mapping = Arc::new(platform::map_shared(file.as_fd(), length)?);
        Ok(Self { mapping, capacity })
    }

    /// Memory of the ring from host to worker.
    pub fn requests(&self) -> RingMemory {
        RingMemory {
            segment: self.clone(),
            words: REQUEST_WORDS,
            data: DATA_START,
        }
    }

    /// Memory of the ring from worker to host.
    pub fn replies(&self) -> RingMemory {
        let data = DATA_START + self.capacity;
        RingMemory {
            segment: self.clone(),
            words: REPLY_WORDS,
            data,
        }
    }

    /// A call's slot. Host writes, worker reads.
    pub fn slot(&self, slot: u32) -> Slot<'_> {
        let at = SLOTS_START + (slot % SLOTS) as usize * SLOT_SIZE;
        Slot {
            cancelled: self.word(at),
            consumed: self.word(at + 8),
        }
    }

    /// The CPU on which a host's thread last waited for long, plus one. Host writes, worker reads.
    pub fn host_cpu(&self) -> &AtomicU64 {
        self.word(24)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= DATA_START);
        // SAFETY: in bounds (checked), aligned (the mapping is page aligned), valid while `self`
        // borrows the mapping; other processes reach the word through atomics only, and a hostile
        // one can do no more than change its value.
        unsafe { AtomicU64::from_ptr(self.mapping.start().add(at).cast()) }
    }

    fn flag(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= DATA_START);
        // SAFETY: as for `word`.
        unsafe { AtomicU32::from_ptr(self.mapping.start().add(at).cast()) }
    }
}

/// What the host tells the worker about one call, without a message.
#[derive(Debug, Clone, Copy)]
pub struct Slot<'a> {
    /// Id of the slot's call once that call is cancelled; ids are never reused, so a value left
    /// from an earlier call means nothing.
    pub cancelled: &'a AtomicU64,
    /// Bytes of the answer that the host's user has taken, see [`crate::flow`].
    pub consumed: &'a AtomicU64,
}

/// One ring's part of a segment.
#[derive(Debug, Clone)]
pub struct RingMemory {
    segment: Segment,
    words: usize,
    data: usize,
}

// SAFETY: the words lie in lines of their own, and `read` and `write` go to `data..data+capacity`,
// which the mapping covers.
unsafe impl Memory for RingMemory {
    fn tail(&self) -> &AtomicU64 {
        self.segment.word(self.words)
    }

    fn head(&self) -> &AtomicU64 {
        self.segment.word(self.words + WORDS_STEP)
    }

    fn consumer_armed(&self) -> &AtomicU32 {
        self.segment.flag(self.words + 2 * WORDS_STEP)
    }

    fn producer_armed(&self) -> &AtomicU32 {
        self.segment.flag(self.words + 3 * WORDS_STEP)
    }

    fn capacity(&self) -> usize {
        self.segment.capacity
    }

    unsafe fn write(&self, offset: usize, source: &[u8]) {
        debug_assert!(offset + source.len() <= self.segment.capacity);
        // SAFETY: the caller keeps the span inside the ring; raw pointers only, since the peer may
        // change the bytes at any time.
        unsafe {
            let target = self.segment.mapping.start().add(self.data + offset);
            target.copy_from_nonoverlapping(source.as_ptr(), source.len());
        }
    }

    unsafe fn read(&self, offset: usize, target: *mut u8, length: usize) {
        debug_assert!(offset + length <= self.segment.capacity);
        // SAFETY: as for `write`.
        unsafe {
            let source = self.segment.mapping.start().add(self.data + offset);
            target.copy_from_nonoverlapping(source, length);
        }
    }
}
