//! Errors of the transport.

use thiserror::Error;

/// What the other side did that the format forbids. The channel is of no use afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Violation {
    /// A ring position ran backwards, is misaligned, or claims more than the ring holds.
    #[error("ring position out of range")]
    Position,
    /// A record's length passes the end of the ring or of what was published.
    #[error("record length out of range")]
    Length,
    /// A record kind or flag that does not exist, or is not allowed in this direction.
    #[error("unknown record kind or flags")]
    Kind,
    /// Fragments of a frame that do not add up to its declared total.
    #[error("fragments do not add up")]
    Fragment,
    /// A frame above the channel's limit.
    #[error("declared frame size above the limit")]
    TooLarge,
    /// A frame for a call that was never made, or that has ended.
    #[error("frame for an unknown call")]
    UnknownCall,
    /// A frame out of order within its call.
    #[error("frame out of sequence")]
    Sequence,
    /// More unread bytes for one call than its window allows.
    #[error("flow-control window exceeded")]
    Window,
    /// The part table of a frame's body is inconsistent.
    #[error("malformed frame body")]
    Body,
    /// A control message of the wrong size or kind, or an answer to no question.
    #[error("unexpected control message")]
    Control,
    /// The doorbell was rung more often than this side announced a sleep.
    #[error("doorbell rung without cause")]
    Doorbell,
    /// The segment has another size or format version than this build expects.
    #[error("segment format mismatch")]
    Segment,
}

/// Why an operation on a channel ended without a result.
#[derive(Debug, Error)]
pub enum Error {
    /// The other side broke the wire format.
    #[error("protocol violation: {0}")]
    Protocol(#[from] Violation),
    /// The deadline passed.
    #[error("timed out")]
    TimedOut,
    /// The wait would have to sleep, and the caller asked not to.
    #[error("would have to sleep")]
    WouldPark,
    /// A signal arrived while waiting; its handlers should run now.
    #[error("interrupted by a signal")]
    Interrupted,
    /// The call was cancelled on this side.
    #[error("the call was cancelled")]
    Cancelled,
    /// The other process is gone.
    #[error("the other process ended")]
    PeerDied,
    /// The channel was closed on this side.
    #[error("the channel is closed")]
    Closed,
    /// No space in the ring, or no free call slot, for as long as the caller would wait.
    #[error("the queue stayed full")]
    QueueFull,
    /// The frame is above the channel's limit.
    #[error("a frame of {size} bytes is above the limit of {limit}")]
    TooLarge {
        /// Bytes of the frame.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Part of another frame of the call is out, and only its rest may follow, or the call's end.
    #[error("another frame of this call is half sent; its rest comes first")]
    HalfSent,
    /// The handle was inherited through `fork`.
    #[error("this channel belongs to the process that made it, not to a forked child")]
    Forked,
    /// The operating system refused.
    #[error(transparent)]
    Os(#[from] std::io::Error),
}

#[cfg(not(loom))]
impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        match errno {
            rustix::io::Errno::INTR => Self::Interrupted,
            other => Self::Os(other.into()),
        }
    }
}

/// Result of an operation on a channel.
pub type Result<T, E = Error> = std::result::Result<T, E>;
