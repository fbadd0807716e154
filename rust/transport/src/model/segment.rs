//! The segment of a model: words and data under loom's eyes instead of in shared memory.

use std::sync::Arc;

use loom::cell::UnsafeCell;

use crate::record::ALIGN;
use crate::ring::Memory;
use crate::sync::{AtomicU32, AtomicU64};

/// Calls that one worker can have in flight: the fewest with which slots are reused.
pub const SLOTS: u32 = 2;

#[derive(Debug)]
struct Shared {
    tail: AtomicU64,
    head: AtomicU64,
    consumer_armed: AtomicU32,
    producer_armed: AtomicU32,
    cells: Vec<UnsafeCell<[u8; ALIGN]>>,
}

// SAFETY: loom checks every access to the cells, which is what the models are for.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// One ring's part.
#[derive(Debug, Clone)]
pub struct RingMemory(Arc<Shared>);

impl RingMemory {
    pub fn new(capacity: usize) -> Self {
        Self(Arc::new(Shared {
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            consumer_armed: AtomicU32::new(0),
            producer_armed: AtomicU32::new(0),
            cells: (0..capacity / ALIGN)
                .map(|_| UnsafeCell::new([0; ALIGN]))
                .collect(),
        }))
    }

    /// Splits `length` bytes from `offset` into the cells they lie in: the cell, where to start in
    /// it, and the span of the whole.
    fn pieces(
        offset: usize,
        length: usize,
    ) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let position = offset + at;
            let within = position % ALIGN;
            let piece = at..length.min(at + ALIGN - within);
            at = piece.end;
            (!piece.is_empty()).then_some((position / ALIGN, within, piece))
        })
    }
}

// SAFETY: the words are the ring's own; cells are indexed with bounds checks, and a piece never
// passes the end of its cell.
unsafe impl Memory for RingMemory {
    fn tail(&self) -> &AtomicU64 {
        &self.0.tail
    }

    fn head(&self) -> &AtomicU64 {
        &self.0.head
    }

    fn consumer_armed(&self) -> &AtomicU32 {
        &self.0.consumer_armed
    }

    fn producer_armed(&self) -> &AtomicU32 {
        &self.0.producer_armed
    }

    fn capacity(&self) -> usize {
        self.0.cells.len() * ALIGN
    }

    unsafe fn write(&self, offset: usize, source: &[u8]) {
        for (cell, within, piece) in Self::pieces(offset, source.len()) {
            let source = &source[piece];
            self.0.cells[cell].with_mut(|bytes| {
                // SAFETY: loom has checked that the cell is this thread's.
                unsafe { (&mut *bytes)[within..within + source.len()].copy_from_slice(source) }
            });
        }
    }

    unsafe fn read(&self, offset: usize, target: *mut u8, length: usize) {
        for (cell, within, piece) in Self::pieces(offset, length) {
            self.0.cells[cell].with(|bytes| {
                // SAFETY: loom has checked that nobody writes to the cell; the caller vouches for
                // the target.
                unsafe {
                    let source = &(&*bytes)[within..within + piece.len()];
                    target
                        .add(piece.start)
                        .copy_from_nonoverlapping(source.as_ptr(), source.len());
                }
            });
        }
    }
}

/// Two rings and the calls' slots.
#[derive(Debug, Clone)]
pub struct Segment {
    requests: RingMemory,
    replies: RingMemory,
    slots: Arc<Vec<(AtomicU64, AtomicU64)>>,
    host_cpu: Arc<AtomicU64>,
}

impl Segment {
    pub fn new(capacity: usize) -> Self {
        let slot = |_| (AtomicU64::new(0), AtomicU64::new(0));
        Self {
            requests: RingMemory::new(capacity),
            replies: RingMemory::new(capacity),
            slots: Arc::new((0..SLOTS).map(slot).collect()),
            host_cpu: Arc::new(AtomicU64::new(0)),
        }
    }

    pub fn requests(&self) -> RingMemory {
        self.requests.clone()
    }

    pub fn replies(&self) -> RingMemory {
        self.replies.clone()
    }

    pub fn host_cpu(&self) -> &AtomicU64 {
        &self.host_cpu
    }

    pub fn slot(&self, slot: u32) -> Slot<'_> {
        let (cancelled, consumed) = &self.slots[(slot % SLOTS) as usize];
        Slot {
            cancelled,
            consumed,
        }
    }
}

/// As production's.
#[derive(Debug, Clone, Copy)]
pub struct Slot<'a> {
    pub cancelled: &'a AtomicU64,
    pub consumed: &'a AtomicU64,
}
