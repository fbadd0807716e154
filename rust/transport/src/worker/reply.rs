//! How answers leave: frames of one call in order, as far as there is credit and space.

use std::sync::Arc;

use crate::abort::{AbortToken, is_cancelled};
use crate::assemble::fragment;
use crate::body::{Bytes, Gather};
use crate::error::{Error, Result};
use crate::flow::{self, WINDOW};
use crate::record::{Header, Kind, WHOLE};
use crate::ring::Producer;
use crate::segment::RingMemory;
use crate::sync::{Mutex, Ordering};
use crate::worker::{Outbox, Worker, park};
use crate::{Patience, lock, try_lock};

/// Where the answers to one request go. Frames carry the call's id and count up by construction.
pub struct ReplyPort {
    worker: Arc<Worker>,
    call: u64,
    slot: u32,
    /// Whether the caller waits for the end anyway.
    whole: bool,
    state: Mutex<ReplyState>,
}

#[derive(Default)]
struct ReplyState {
    next_sequence: u32,
    sent: u64,
    ended: bool,
    /// The frame that did not fit at once.
    partial: Option<Partial>,
    /// A first item that waits for the end, to leave in one record with it.
    held: Option<Bytes>,
}

/// A frame of which so many bytes are out.
struct Partial {
    kind: Kind,
    total: usize,
    at: usize,
}

impl Partial {
    /// Whether it may be the beginning of this one.
    fn is_of(&self, kind: Kind, total: usize) -> bool {
        self.kind == kind && self.total == total
    }
}

/// Bytes of the largest item that is held back; a larger one had better be on its way.
const HELD_BYTES: usize = 4096;

impl ReplyPort {
    /// For the request with this header.
    pub fn new(worker: Arc<Worker>, request: &Header) -> Self {
        Self {
            worker,
            call: request.call,
            slot: request.slot,
            whole: request.flags & WHOLE != 0,
            state: Mutex::default(),
        }
    }

    /// Id of the call.
    pub fn call(&self) -> u64 {
        self.call
    }

    /// Set when this call should stop.
    pub fn abort_token(&self) -> AbortToken {
        let worker = &self.worker;
        AbortToken::of_call(
            Arc::clone(&worker.vitals),
            worker.segment.clone(),
            self.slot,
            self.call,
        )
    }

    /// Whether this call was cancelled.
    pub fn is_cancelled(&self) -> bool {
        is_cancelled(&self.worker.segment, self.slot, self.call)
    }

    /// As [`Self::send`], if that takes no waiting at all, not even for another sender. `None` when
    /// it would; then call this or `send` again with the same arguments.
    pub fn try_send(&self, kind: Kind, body: &Gather<'_>) -> Option<Result<()>> {
        let mut state = try_lock(&self.state)?;
        let mut outbox = try_lock(&self.worker.outbox)?;
        let sent = self
            .check_size(body)
            .and_then(|()| self.check_sendable(&state, kind, body))
            .and_then(|()| self.advance(&mut state, &mut outbox.ring, kind, body));
        match sent {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// Sends one frame, waiting for the reader's window and for space in the ring. A wait that
    /// ends early ([`Error::WouldPark`], [`Error::Interrupted`]) is continued by calling again with
    /// the same arguments.
    ///
    /// The end of the call, or its failure, takes the place of an item that is half out.
    ///
    /// Errors: [`Error::Cancelled`] when the call was given up and the frame is not its last,
    /// [`Error::Closed`] after the last frame or on shutdown, [`Error::TooLarge`],
    /// [`Error::HalfSent`] when another frame is half out.
    pub fn send(&self, kind: Kind, body: &Gather<'_>, patience: Patience<'_>) -> Result<()> {
        self.check_size(body)?;
        let mut state = lock(&self.state);
        // Held while parked too: one sender at a time waits on the one doorbell.
        let mut outbox = lock(&self.worker.outbox);
        loop {
            self.check_sendable(&state, kind, body)?;
            if self.advance(&mut state, &mut outbox.ring, kind, body)? {
                return Ok(());
            }
            let Outbox { ring, spinner } = &mut *outbox;
            let length = ring.max_body();
            // A frame that has to leave whatever happens goes on waiting after a cancellation.
            let may_stop = state.partial.is_none() && !kind.is_terminal();
            let may_go_on = |ring: &mut Producer<RingMemory>| {
                Ok((may_stop && self.is_cancelled())
                    || (self.has_credit(&state, kind) && ring.fits(length)?))
            };
            let Patience::Park { until, gate } = patience else {
                if spinner.spin(|| may_go_on(ring).unwrap_or(true), || (), || 0) {
                    continue;
                }
                return Err(Error::WouldPark);
            };
            if ring.arm(|ring| Ok(self.worker.is_shutting_down() || may_go_on(ring)?))? {
                let worker = &self.worker;
                park(&worker.space_bell, &worker.wakers.outbox, until, gate)?;
            } else if self.worker.is_shutting_down() {
                // Nobody reads any more, so what does not fit now never will.
                state.ended = true;
            }
        }
    }

    fn check_size(&self, body: &Gather<'_>) -> Result<()> {
        let (size, limit) = (body.total(), self.worker.frame_limit);
        if size > limit {
            return Err(Error::TooLarge { size, limit });
        }
        Ok(())
    }

    fn check_sendable(&self, state: &ReplyState, kind: Kind, body: &Gather<'_>) -> Result<()> {
        if state.ended {
            return Err(Error::Closed);
        }
        if let Some(partial) = &state.partial
            && !partial.is_of(kind, body.total())
            && !kind.replaces(partial.kind)
        {
            return Err(Error::HalfSent);
        }
        // A frame that is partly out is finished, and a last frame always leaves.
        if state.partial.is_none() && !kind.is_terminal() {
            if self.is_cancelled() {
                return Err(Error::Cancelled);
            }
            if self.worker.is_shutting_down() {
                return Err(Error::Closed);
            }
        }
        Ok(())
    }

    /// Sends what can be sent now; `true` when the frame is out, or held back until the end.
    fn advance(
        &self,
        state: &mut ReplyState,
        outbox: &mut Producer<RingMemory>,
        kind: Kind,
        body: &Gather<'_>,
    ) -> Result<bool> {
        match (state.held.take(), kind) {
            (Some(item), Kind::End) => {
                return self.advance_held(state, outbox, Kind::Answer, item);
            }
            // There are more, so the first one need not wait any longer.
            (Some(item), Kind::Data) => {
                if !self.advance_held(state, outbox, kind, item)? {
                    return Ok(false);
                }
            }
            // A failure is all that its caller will learn of this answer.
            (Some(_), _) => {}
            (None, Kind::Data)
                if self.whole && state.next_sequence == 0 && state.partial.is_none() =>
            {
                if body.total() <= outbox.max_body().min(HELD_BYTES) {
                    state.held = Some(body.to_bytes());
                    return Ok(true);
                }
            }
            (None, _) => {}
        }
        self.advance_frame(state, outbox, kind, body)
    }

    fn advance_held(
        &self,
        state: &mut ReplyState,
        outbox: &mut Producer<RingMemory>,
        kind: Kind,
        item: Bytes,
    ) -> Result<bool> {
        let sent = self.advance_frame(state, outbox, kind, &Gather::of_body(&[&item]));
        if !matches!(sent, Ok(true)) {
            state.held = Some(item);
        }
        sent
    }

    fn advance_frame(
        &self,
        state: &mut ReplyState,
        outbox: &mut Producer<RingMemory>,
        kind: Kind,
        body: &Gather<'_>,
    ) -> Result<bool> {
        if !self.has_credit(state, kind) {
            return Ok(false);
        }
        let total = body.total();
        loop {
            let at = match &state.partial {
                Some(partial) if partial.is_of(kind, total) => partial.at,
                // What is out of another one counts no more once this one's beginning is.
                _ => 0,
            };
            let (flags, window) = fragment(total, outbox.max_body(), at);
            let header = Header {
                // A window is at most a quarter of a ring of at most 2 GiB.
                length: window.len() as u32,
                kind,
                flags,
                call: self.call,
                sequence: state.next_sequence,
                slot: self.slot,
                total: total as u64,
            };
            let end = window.end;
            let Some(ring) = outbox.push(&header, |write| body.copy(window, write))? else {
                return Ok(false);
            };
            if ring {
                self.worker.bell.ring();
            }
            if end == total {
                break;
            }
            state.partial = Some(Partial {
                kind,
                total,
                at: end,
            });
        }
        state.partial = None;
        state.next_sequence = state.next_sequence.wrapping_add(1);
        state.sent += flow::cost(total);
        self.worker.vitals.replies.fetch_add(1, Ordering::Relaxed);
        if kind.is_terminal() {
            state.ended = true;
            self.worker.vitals.finished.fetch_add(1, Ordering::Relaxed);
        }
        Ok(true)
    }

    fn has_credit(&self, state: &ReplyState, kind: Kind) -> bool {
        let consumed = self
            .worker
            .segment
            .slot(self.slot)
            .consumed
            .load(Ordering::Acquire);
        kind.is_terminal()
            || state.partial.is_some()
            || state.sent.saturating_sub(consumed) < WINDOW
    }
}
