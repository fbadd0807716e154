//! Messages of the control socket: fixed size, one datagram each.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | kind, see [`Control`] |
//! | 4..8 | zero |
//! | 8..16 | nonce; an answer carries its question's |
//! | 16..48 | [`Progress`], in PONG only |

use crate::error::Violation;

/// Bytes of a control message.
pub const SIZE: usize = 48;

/// What the worker has done so far. Each count only grows, so a supervisor can tell busy from
/// stuck by looking twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Requests taken from the ring.
    pub requests: u64,
    /// Frames sent, terminal ones included.
    pub replies: u64,
    /// Requests that have ended.
    pub finished: u64,
    /// Times that a model asked whether to abort; llama.cpp does between graph nodes.
    pub polls: u64,
}

/// A control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Host to worker: are you there?
    Ping,
    /// Worker to host: yes, and this far.
    Pong(Progress),
    /// Host to worker: end soon.
    Shutdown,
    /// Worker to host: will do.
    Ack,
}

impl Control {
    /// Encodes the message.
    pub fn to_wire(self, nonce: u64) -> [u8; SIZE] {
        let mut wire = [0; SIZE];
        let kind: u32 = match self {
            Self::Ping => 1,
            Self::Pong(_) => 2,
            Self::Shutdown => 3,
            Self::Ack => 4,
        };
        wire[0..4].copy_from_slice(&kind.to_le_bytes());
        wire[8..16].copy_from_slice(&nonce.to_le_bytes());
        if let Self::Pong(progress) = self {
            let counts = [
                progress.requests,
                progress.replies,
                progress.finished,
                progress.polls,
            ];
            for (chunk, count) in wire[16..].as_chunks_mut::<8>().0.iter_mut().zip(counts) {
                *chunk = count.to_le_bytes();
            }
        }
        wire
    }

    /// Decodes a datagram into the message and its nonce.
    pub fn from_wire(datagram: &[u8]) -> Result<(Self, u64), Violation> {
        let wire: &[u8; SIZE] = datagram.try_into().map_err(|_| Violation::Control)?;
        let words = wire.as_chunks::<8>().0;
        let word = |index: usize| u64::from_le_bytes(words[index]);
        let message = match word(0) {
            1 => Self::Ping,
            2 => Self::Pong(Progress {
                requests: word(2),
                replies: word(3),
                finished: word(4),
                polls: word(5),
            }),
            3 => Self::Shutdown,
            4 => Self::Ack,
            _ => return Err(Violation::Control),
        };
        Ok((message, word(1)))
    }
}
