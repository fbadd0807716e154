//! Flow control of one answer: how far the worker may run ahead of whoever reads it.
//!
//! The worker counts the cost of what it sent for a call, the host publishes the cost of what its
//! user took in the call's slot. A frame may leave while the difference is below [`WINDOW`], so an
//! unread stream holds at most one window and one frame of the host's memory.

/// Cost of unread frames at which the worker pauses.
pub const WINDOW: u64 = if cfg!(loom) { 256 } else { 1 << 20 };

/// Cost of a frame: its body, and what the host needs to keep it.
pub fn cost(total: usize) -> u64 {
    total as u64 + 128
}
