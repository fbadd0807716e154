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

/// Bytes of the largest body that needs no memory of its own.
const INLINE: usize = 128;

/// Bytes that are filled once and then read.
#[derive(Debug)]
pub struct Body(Memory);

#[derive(Debug)]
enum Memory {
    /// A short body, as most are: a stream's items come faster than memory can be had for each.
    Inline { length: u8, bytes: [u8; INLINE] },
    /// Aligned to [`PART_ALIGN`].
    Heap(Allocation, usize),
}

impl Body {
    /// Makes room without filling it; `None` when memory is short. Untouched pages of a large body
    /// cost nothing, so a peer that declares much and sends little gains nothing.
    pub(crate) fn with_length(length: usize) -> Option<Self> {
        if length <= INLINE {
            // At most INLINE, so the cast keeps the value.
            let (length, bytes) = (length as u8, [0; INLINE]);
            return Some(Self(Memory::Inline { length, bytes }));
        }
        Self::on_heap(length)
    }

    fn on_heap(length: usize) -> Option<Self> {
        let memory = Allocation::kept(length).or_else(|| Allocation::new(length))?;
        Some(Self(Memory::Heap(memory, length)))
    }

    pub(crate) fn empty() -> Self {
        let (length, bytes) = (0, [0; INLINE]);
        Self(Memory::Inline { length, bytes })
    }

    /// The same bytes at an address that stays when the body is moved, aligned to [`PART_ALIGN`];
    /// `None` when memory is short.
    pub fn settled(self) -> Option<Self> {
        match self.0 {
            Memory::Inline { .. } if !self.is_empty() => {
                let mut settled = Self::on_heap(self.len())?;
                // SAFETY: both have this many bytes, and they do not overlap.
                unsafe {
                    let target = settled.as_mut_ptr();
                    target.copy_from_nonoverlapping(self.as_slice().as_ptr(), self.len());
                }
                Some(settled)
            }
            _ => Some(self),
        }
    }

    /// Bytes of the body.
    pub fn len(&self) -> usize {
        match self.0 {
            Memory::Inline { length, .. } => length.into(),
            Memory::Heap(_, length) => length,
        }
    }

    /// Whether the body has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Start of the bytes.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        match &mut self.0 {
            Memory::Inline { bytes, .. } => bytes.as_mut_ptr(),
            Memory::Heap(memory, _) => memory.start.as_ptr(),
        }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match &self.0 {
            Memory::Inline { length, bytes } => &bytes[..usize::from(*length)],
            // SAFETY: the assembler lets a `Body` out only when every byte has been written.
            Memory::Heap(memory, length) => unsafe {
                std::slice::from_raw_parts(memory.start.as_ptr(), *length)
            },
        }
    }

    /// Start of the bytes, for whoever writes to them while others may read.
    ///
    /// # Safety
    /// The body is settled, and no slice of it is in use while its bytes are written.
    pub unsafe fn shared_ptr(&self) -> *mut u8 {
        match &self.0 {
            Memory::Inline { .. } => NonNull::dangling().as_ptr(),
            Memory::Heap(memory, _) => memory.start.as_ptr(),
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

    fn keep(&self) -> bool {
        let size = self.layout.size();
        if size < KEPT_FROM {
            return false;
        }
        let Ok(mut kept) = KEPT.try_lock() else {
            return false;
        };
        let total: usize = kept.iter().map(|memory| memory.layout.size()).sum();
        if total + size > KEPT_BYTES {
            return false;
        }
        let Self { start, layout } = *self;
        kept.push(Self { start, layout });
        true
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.keep() {
            return;
        }
        // SAFETY: allocated in `new` with this very layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_body_leaves_its_memory_to_the_next_of_its_size() {
        // No other test of this crate's library uses bodies of this size.
        let first = Body::with_length(KEPT_BYTES / 2).unwrap();
        let start = first.as_slice().as_ptr();
        assert_eq!(start as usize % PART_ALIGN, 0);
        drop(first);
        let second = Body::with_length(KEPT_BYTES / 2 - 5).unwrap();
        assert_eq!(second.as_slice().as_ptr(), start);
        assert_eq!(second.len(), KEPT_BYTES / 2 - 5);
        let third = Body::with_length(KEPT_BYTES / 2).unwrap();
        assert_ne!(third.as_slice().as_ptr(), start);
        drop((second, third));

        let mut short = Body::with_length(3).unwrap();
        // SAFETY: it has three bytes.
        unsafe { short.as_mut_ptr().copy_from(b"abc".as_ptr(), 3) };
        let settled = short.settled().unwrap();
        assert_eq!(settled.as_slice(), b"abc");
        assert_eq!(settled.as_slice().as_ptr() as usize % PART_ALIGN, 0);

        // No more is kept than the limit. In the same test, since what is kept is shared.
        let bodies: Vec<_> = (0..5).map(|_| Body::with_length(KEPT_BYTES / 3)).collect();
        drop(bodies);
        let kept = KEPT.lock().unwrap();
        let total: usize = kept.iter().map(|memory| memory.layout.size()).sum();
        assert!(total <= KEPT_BYTES);
    }
}
