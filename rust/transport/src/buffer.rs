//! The memory that frames are received into.
//!
//! Memory fresh from the kernel costs a page fault for every 4 KiB, which takes longer than copying
//! them. Large buffers are therefore kept for the next large frame, up to [`KEPT_BYTES`] in all.

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;
use std::sync::Mutex;

use crate::body::PART_ALIGN;

/// Smaller buffers are left to the allocator, which keeps them itself.
const KEPT_FROM: usize = 128 * 1024;
/// Bytes that this process keeps at most.
const KEPT_BYTES: usize = 32 * 1024 * 1024;

static KEPT: Mutex<Vec<Allocation>> = Mutex::new(Vec::new());

/// Heap bytes aligned to [`PART_ALIGN`], filled once and then read.
#[derive(Debug)]
pub struct Body {
    /// `None` when empty.
    memory: Option<Allocation>,
    length: usize,
}

impl Body {
    /// Allocates without filling; `None` when memory is short. Untouched pages of a large body cost
    /// nothing, so a peer that declares much and sends little gains nothing.
    pub(crate) fn with_length(length: usize) -> Option<Self> {
        if length == 0 {
            return Some(Self::empty());
        }
        let memory = Allocation::kept(length).or_else(|| Allocation::new(length))?;
        Some(Self {
            memory: Some(memory),
            length,
        })
    }

    pub(crate) fn empty() -> Self {
        Self {
            memory: None,
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
        let start = self.memory.as_ref().map(|memory| memory.start);
        start.unwrap_or(NonNull::dangling()).as_ptr()
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the assembler lets a `Body` out only when every byte has been written.
        unsafe { std::slice::from_raw_parts(self.as_mut_ptr(), self.length) }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            memory.keep();
        }
    }
}

#[derive(Debug)]
struct Allocation {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an `Allocation` owns its bytes alone, as a `Vec<u8>` does.
unsafe impl Send for Allocation {}
// SAFETY: shared access only reads.
unsafe impl Sync for Allocation {}

impl Allocation {
    fn new(length: usize) -> Option<Self> {
        let layout = Layout::from_size_align(length, PART_ALIGN).ok()?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        Some(Self { start, layout })
    }

    /// A kept allocation that fits, and is not wasted on so few bytes.
    fn kept(length: usize) -> Option<Self> {
        if length < KEPT_FROM {
            return None;
        }
        // Nobody waits for this lock, least of all in a child that was forked while it was held.
        let mut kept = KEPT.try_lock().ok()?;
        let fits = |memory: &Self| (length..=2 * length).contains(&memory.layout.size());
        let index = kept.iter().position(fits)?;
        Some(kept.swap_remove(index))
    }

    fn keep(self) {
        let size = self.layout.size();
        if size < KEPT_FROM {
            return;
        }
        if let Ok(mut kept) = KEPT.try_lock() {
            let total: usize = kept.iter().map(|memory| memory.layout.size()).sum();
            if total + size <= KEPT_BYTES {
                kept.push(self);
            }
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_body_leaves_its_memory_to_the_next_of_its_size() {
        // No other test of this crate's library uses bodies of this size.
        let first = Body::with_length(KEPT_BYTES / 2).unwrap();
        let start = first.as_mut_ptr();
        assert_eq!(start as usize % PART_ALIGN, 0);
        drop(first);
        let second = Body::with_length(KEPT_BYTES / 2 - 5).unwrap();
        assert_eq!(second.as_mut_ptr(), start);
        assert_eq!(second.len(), KEPT_BYTES / 2 - 5);
        let third = Body::with_length(KEPT_BYTES / 2).unwrap();
        assert_ne!(third.as_mut_ptr(), start);
        drop((second, third));

        // No more is kept than the limit. In the same test, since what is kept is shared.
        let bodies: Vec<_> = (0..5).map(|_| Body::with_length(KEPT_BYTES / 3)).collect();
        drop(bodies);
        let kept = KEPT.lock().unwrap();
        let total: usize = kept.iter().map(|memory| memory.layout.size()).sum();
        assert!(total <= KEPT_BYTES);
    }
}
