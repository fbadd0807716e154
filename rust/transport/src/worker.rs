//! The worker's end of a channel.

#[cfg(not(loom))]
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::abort::{AbortToken, Vitals, is_cancelled};
use crate::assemble::{Assembler, Frame, fragment};
use crate::body::{Bytes, Gather};
use crate::error::{Error, Result, Violation};
use crate::flow::{self, WINDOW};
use crate::heartbeat::Heartbeat;
use crate::platform::{self, Bell, ControlSocket, Doorbell, Rings, SignalGate};
use crate::record::{Header, Kind, WHOLE};
use crate::ring::{Consumer, Producer, consumed};
use crate::segment::{RingMemory, SLOTS, Segment};
use crate::spin::{CAP, Parting, Spinner, WORKER_PATIENCE};
use crate::sync::{Mutex, Ordering};
use crate::{Patience, Settings, lock, try_lock};

/// The descriptors that a worker inherits.
#[cfg(not(loom))]
#[derive(Debug)]
pub struct Inherited {
    /// The shared segment.
    pub segment: OwnedFd,
    /// The control socket.
    pub control: OwnedFd,
    /// Wakes the host, and is rung by it for a new request.
    pub bell: OwnedFd,
    /// Rung by the host for space, credit and cancellation.
    pub space_bell: OwnedFd,
}

struct Outbox {
    ring: Producer<RingMemory>,
    spinner: Spinner,
}

struct Inbox {
    ring: Consumer<RingMemory>,
    assembler: Assembler,
    spinner: Spinner,
    parting: Parting,
    seen_unexpected: u64,
}

/// See the module's text. One thread receives; any thread may send.
pub struct Worker {
    segment: Segment,
    reply_memory: RingMemory,
    vitals: Arc<Vitals>,
    inbox: Mutex<Inbox>,
    outbox: Mutex<Outbox>,
    bell: Doorbell,
    space_bell: Doorbell,
    wakers: Arc<Wakers>,
    heartbeat: Mutex<Option<Heartbeat>>,
    /// Kept open after the heartbeat has ended: the host takes its closing for the end, and last
    /// frames may still follow.
    control: Arc<ControlSocket>,
    frame_limit: usize,
}

/// Wake the worker's own threads.
#[derive(Debug)]
pub(crate) struct Wakers {
    /// Whoever waits for a request.
    pub(crate) inbox: Bell,
    /// Whoever waits to send. Rung for good on shutdown.
    outbox: Bell,
}

impl Wakers {
    pub(crate) fn new() -> Result<Self> {
        let (inbox, outbox) = (Bell::new()?, Bell::new()?);
        Ok(Self { inbox, outbox })
    }

    pub(crate) fn shut_down(&self, vitals: &Vitals) {
        vitals.shutdown.store(true, Ordering::Relaxed);
        self.inbox.ring();
        self.outbox.ring();
    }
}

impl Worker {
    /// Attaches to what the host handed down and starts the heartbeat thread, which ends the
    /// process when the host, `host_pid`, dies.
    #[cfg(not(loom))]
    pub fn attach(inherited: Inherited, host_pid: i32, settings: Settings) -> Result<Arc<Self>> {
        let segment = Segment::open(inherited.segment.as_fd())?;
        let control = ControlSocket::from_fd(inherited.control);
        let bells = [inherited.bell, inherited.space_bell].map(Doorbell::from_fd);
        let worker = Self::assemble(segment, control, bells, settings)?;
        worker.start_heartbeat(host_pid)?;
        Ok(worker)
    }

    pub(crate) fn assemble(
        segment: Segment,
        control: ControlSocket,
        [bell, space_bell]: [Doorbell; 2],
        settings: Settings,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            inbox: Mutex::new(Inbox {
                ring: Consumer::new(segment.requests()),
                assembler: Assembler::new(settings.frame_limit),
                spinner: Spinner::new(settings.wait, CAP, WORKER_PATIENCE),
                parting: Parting::new(),
                seen_unexpected: 0,
            }),
            outbox: Mutex::new(Outbox {
                ring: Producer::new(segment.replies()),
                spinner: Spinner::new(settings.wait, CAP, WORKER_PATIENCE),
            }),
            reply_memory: segment.replies(),
            segment,
            vitals: Arc::default(),
            bell,
            space_bell,
            wakers: Arc::new(Wakers::new()?),
            heartbeat: Mutex::new(None),
            control: Arc::new(control),
            frame_limit: settings.frame_limit,
        }))
    }

    pub(crate) fn start_heartbeat(&self, host_pid: i32) -> Result<()> {
        let control = Arc::clone(&self.control);
        let (vitals, wakers) = (Arc::clone(&self.vitals), Arc::clone(&self.wakers));
        let heartbeat = Heartbeat::start(control, host_pid, vitals, wakers)?;
        *lock(&self.heartbeat) = Some(heartbeat);
        Ok(())
    }

    /// The next request if it is there already. Never waits.
    pub fn poll(&self) -> Result<Option<Frame>> {
        self.take_request(&mut lock(&self.inbox))
    }

    /// The next request, or `None` when there is something else to look at: the worker is to shut
    /// down, or [`Self::unexpected_control`] has grown.
    pub fn receive(&self, patience: Patience<'_>) -> Result<Option<Frame>> {
        let mut inbox = lock(&self.inbox);
        loop {
            let unexpected = self.unexpected_control();
            if self.is_shutting_down() || unexpected != inbox.seen_unexpected {
                inbox.seen_unexpected = unexpected;
                return Ok(None);
            }
            if let Some(frame) = self.take_request(&mut inbox)? {
                return Ok(Some(frame));
            }
            let Inbox {
                ring,
                spinner,
                parting,
                ..
            } = &mut *inbox;
            match patience {
                Patience::Spin => {
                    let ready = || ring.is_ready() || self.is_shutting_down();
                    let part = || parting.part_from(self.host_cpu());
                    if !spinner.spin(ready, part, || consumed(&self.reply_memory)) {
                        return Err(Error::WouldPark);
                    }
                }
                Patience::Park { until, gate } => {
                    if inbox.ring.arm()? {
                        let woken = park(&self.bell, &self.wakers.inbox, until, gate);
                        inbox.ring.disarm();
                        woken?;
                    }
                }
            }
        }
    }

    fn host_cpu(&self) -> Option<usize> {
        let cpu = self.segment.host_cpu().load(Ordering::Relaxed);
        usize::try_from(cpu).ok()?.checked_sub(1)
    }

    fn take_request(&self, inbox: &mut Inbox) -> Result<Option<Frame>> {
        while let Some(record) = inbox.ring.peek()? {
            let header = record.header;
            if header.kind != Kind::Request || header.slot >= SLOTS || header.sequence != 0 {
                return Err(Violation::Kind.into());
            }
            let frame = inbox.assembler.accept(&inbox.ring, &record)?;
            if inbox.ring.release(record) {
                self.bell.ring();
            }
            if frame.is_some() {
                self.vitals.requests.fetch_add(1, Ordering::Relaxed);
                return Ok(frame);
            }
        }
        Ok(None)
    }

    /// Whether the host asked the worker to end.
    pub fn is_shutting_down(&self) -> bool {
        self.vitals.shutdown.load(Ordering::Relaxed)
    }

    /// Control messages so far that made no sense and were dropped.
    pub fn unexpected_control(&self) -> u64 {
        self.vitals.unexpected_control.load(Ordering::Relaxed)
    }

    /// Ends the worker from within, as if the host had asked.
    pub fn shut_down(&self) {
        self.wakers.shut_down(&self.vitals);
    }

    /// Set when the worker shuts down.
    pub fn abort_token(&self) -> AbortToken {
        AbortToken::of_worker(Arc::clone(&self.vitals))
    }

    /// Ends the heartbeat thread and waits for it.
    pub fn join_heartbeat(&self) {
        if let Some(heartbeat) = lock(&self.heartbeat).take() {
            heartbeat.join();
        }
    }
}

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
    /// Progress within a frame that did not fit at once.
    at: Option<usize>,
    /// A first item that waits for the end, to leave in one record with it.
    held: Option<Bytes>,
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
            .and_then(|()| self.check_sendable(&state, kind))
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
    /// Errors: [`Error::Cancelled`] when the call was given up and the frame is not its last,
    /// [`Error::Closed`] after the last frame or on shutdown, [`Error::TooLarge`].
    pub fn send(&self, kind: Kind, body: &Gather<'_>, patience: Patience<'_>) -> Result<()> {
        self.check_size(body)?;
        let mut state = lock(&self.state);
        // Held while parked too: one sender at a time waits on the one doorbell.
        let mut outbox = lock(&self.worker.outbox);
        loop {
            self.check_sendable(&state, kind)?;
            if self.advance(&mut state, &mut outbox.ring, kind, body)? {
                return Ok(());
            }
            let Outbox { ring, spinner } = &mut *outbox;
            let length = ring.max_body();
            // A frame that has to leave whatever happens goes on waiting after a cancellation.
            let may_stop = state.at.is_none() && !kind.is_terminal();
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

    fn check_sendable(&self, state: &ReplyState, kind: Kind) -> Result<()> {
        if state.ended {
            return Err(Error::Closed);
        }
        // A frame that is partly out is finished, and a last frame always leaves.
        if state.at.is_none() && !kind.is_terminal() {
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
            (None, Kind::Data) if self.whole && state.next_sequence == 0 && state.at.is_none() => {
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
        loop {
            let at = state.at.unwrap_or(0);
            let (flags, window) = fragment(body.total(), outbox.max_body(), at);
            let header = Header {
                // A window is at most a quarter of a ring of at most 2 GiB.
                length: window.len() as u32,
                kind,
                flags,
                call: self.call,
                sequence: state.next_sequence,
                slot: self.slot,
                total: body.total() as u64,
            };
            let end = window.end;
            let Some(ring) = outbox.push(&header, |write| body.copy(window, write))? else {
                return Ok(false);
            };
            if ring {
                self.worker.bell.ring();
            }
            if end == body.total() {
                break;
            }
            state.at = Some(end);
        }
        state.at = None;
        state.next_sequence = state.next_sequence.wrapping_add(1);
        state.sent += flow::cost(body.total());
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
        kind.is_terminal() || state.at.is_some() || state.sent.saturating_sub(consumed) < WINDOW
    }
}

/// Sleeps until a doorbell is rung from outside or from within.
fn park(
    bell: &Doorbell,
    waker: &Bell,
    until: Option<Instant>,
    gate: Option<&SignalGate>,
) -> Result<()> {
    let [rung, woken] = platform::wait([Some(bell.source()), Some(waker.source())], until, gate)?;
    if rung && bell.drain() == Rings::Closed {
        return Err(Error::PeerDied);
    }
    if woken {
        waker.drain();
    }
    if rung || woken {
        Ok(())
    } else {
        Err(Error::TimedOut)
    }
}
