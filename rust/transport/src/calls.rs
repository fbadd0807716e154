//! The host's record of its calls: which exist, what has arrived for each, how each ended.
//!
//! A call has exactly one [`Outcome`]. It can be decided here (cancelled, peer died) before the
//! worker has finished with the call; the call's slot stays taken until the worker has, so that a
//! slot never speaks of two calls at once, and what arrives late is recognised and dropped.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::assemble::Frame;
use crate::control::Progress;
use crate::error::{Error, Result, Violation};
use crate::flow::{self, WINDOW};
use crate::notify::Notifier;
use crate::record::{FIRST, Header, Kind, LAST};
use crate::segment::SLOTS;

/// How a call ended.
#[derive(Debug)]
pub enum Outcome {
    /// The handler returned.
    Ended,
    /// The handler raised; the frame says what.
    Failed(Frame),
    /// A ping's answer.
    Pong(Progress),
    /// A shutdown's answer.
    Acknowledged,
    /// Cancelled on this side.
    Cancelled,
    /// The channel ended first.
    Lost(End),
}

/// How a channel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The worker is gone.
    PeerDied,
    /// The worker broke the format.
    Violated(Violation),
    /// Closed on this side.
    Closed,
}

impl From<End> for Error {
    fn from(end: End) -> Self {
        match end {
            End::PeerDied => Self::PeerDied,
            End::Violated(violation) => Self::Protocol(violation),
            End::Closed => Self::Closed,
        }
    }
}

/// The next thing that happened to a call.
#[derive(Debug)]
pub enum Event {
    /// One item of the answer.
    Data(Frame),
    /// The end; nothing follows.
    Done(Outcome),
}

/// Credit is published when so much of it has come together, which is never more than the worker
/// can do without: it stops a whole window behind.
const CREDIT_STEP: u64 = WINDOW / 4;
/// Questions on the control plane that may be without an answer.
const MAX_QUESTIONS: usize = 1024;

/// What of the worker's still belongs to a call.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// A slot, from opening until the worker's last frame.
    Slot(u32),
    /// An answer on the control plane, which comes once.
    Answer,
    #[default]
    Nothing,
}

#[derive(Default)]
struct Call {
    held: Held,
    /// Whether the request is out; before, the worker can't know the call.
    sent: bool,
    frames: VecDeque<Frame>,
    outcome: Option<Outcome>,
    /// Nobody will ask for the outcome any more.
    abandoned: bool,
    received: u64,
    consumed: u64,
    /// How much of `consumed` the worker was told.
    published: u64,
    next_sequence: u32,
    waiter: Option<Arc<Notifier>>,
}

impl Call {
    /// Whether there is an outcome, or was one before somebody took it.
    fn is_decided(&self) -> bool {
        self.outcome.is_some() || self.abandoned
    }

    fn has_news(&self) -> bool {
        !self.frames.is_empty() || self.is_decided()
    }

    fn slot(&self) -> Option<u32> {
        match self.held {
            Held::Slot(slot) => Some(slot),
            Held::Answer | Held::Nothing => None,
        }
    }

    fn release_slot(&mut self) -> Option<u32> {
        let slot = self.slot();
        if slot.is_some() {
            self.held = Held::Nothing;
        }
        slot
    }

    /// Notes that a frame was taken; says what to tell the worker of that, if it is time to.
    fn consume(&mut self, frame: &Frame) -> Option<SlotUpdate> {
        self.consumed += flow::cost(frame.body.len());
        if self.consumed - self.published < CREDIT_STEP {
            return None;
        }
        self.published = self.consumed;
        let bytes = self.consumed;
        self.slot().map(|slot| SlotUpdate::Consumed { slot, bytes })
    }

    fn notify(&self, id: u64, me: Option<&Arc<Notifier>>) {
        if let Some(waiter) = &self.waiter {
            waiter.notify(id, me.is_some_and(|me| Arc::ptr_eq(me, waiter)));
        }
    }
}

/// What the caller of [`Calls`] has to tell the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotUpdate {
    /// So much of the slot's answer has been consumed.
    Consumed { slot: u32, bytes: u64 },
    /// The slot's call is cancelled.
    Cancelled { slot: u32, call: u64 },
}

/// See the module's text.
pub struct Calls {
    table: BTreeMap<u64, Call>,
    /// Calls in the table that have a waiter.
    waited_for: usize,
    questions: usize,
    next_id: u64,
    free_slots: Vec<u32>,
    end: Option<End>,
    space_waiters: Vec<Arc<Notifier>>,
    /// Requests given up half sent, of which the worker is still to be told.
    pub withdrawn: Vec<(u64, u32)>,
    /// Frames that arrived for calls given up before.
    pub dropped_late: u64,
}

impl Calls {
    pub fn new() -> Self {
        Self {
            table: BTreeMap::new(),
            waited_for: 0,
            questions: 0,
            // A slot whose word for the cancelled call is zero names no call.
            next_id: 1,
            free_slots: (0..SLOTS).rev().collect(),
            end: None,
            space_waiters: Vec::new(),
            withdrawn: Vec::new(),
            dropped_late: 0,
        }
    }

    pub fn end(&self) -> Option<End> {
        self.end
    }

    /// Calls that have no outcome yet; questions on the control plane are none.
    pub fn undecided(&self) -> Vec<u64> {
        let undecided = |call: &Call| call.slot().is_some() && !call.is_decided();
        self.table
            .iter()
            .filter(|(_, call)| undecided(call))
            .map(|(&id, _)| id)
            .collect()
    }

    /// Opens a call, or says that every slot is taken.
    pub fn open(&mut self) -> Result<Option<(u64, u32)>> {
        self.check_open()?;
        let Some(slot) = self.free_slots.pop() else {
            return Ok(None);
        };
        let id = self.insert(Call {
            held: Held::Slot(slot),
            ..Call::default()
        });
        Ok(Some((id, slot)))
    }

    /// Opens a question on the control plane; its id is the nonce.
    pub fn open_control(&mut self) -> Result<u64> {
        self.check_open()?;
        if self.questions >= MAX_QUESTIONS {
            return Err(Error::QueueFull);
        }
        self.questions += 1;
        Ok(self.insert(Call {
            held: Held::Answer,
            sent: true,
            ..Call::default()
        }))
    }

    /// Takes back a question that could not be sent.
    pub fn withdraw_question(&mut self, nonce: u64) {
        self.settle_question(nonce);
        self.abandon(nonce);
    }

    /// Whether this nonce's answer was still to come.
    fn settle_question(&mut self, nonce: u64) -> bool {
        let question = |call: &&mut Call| call.held == Held::Answer;
        let Some(call) = self.table.get_mut(&nonce).filter(question) else {
            return false;
        };
        call.held = Held::Nothing;
        self.questions -= 1;
        true
    }

    pub fn has_free_slot(&self) -> bool {
        !self.free_slots.is_empty()
    }

    fn check_open(&self) -> Result<()> {
        self.end.map_or(Ok(()), |end| Err(end.into()))
    }

    fn insert(&mut self, call: Call) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.table.insert(id, call);
        id
    }

    /// Whether the worker can still send something for the call.
    pub fn is_held(&self, id: u64) -> bool {
        self.table
            .get(&id)
            .is_some_and(|call| call.slot().is_some())
    }

    /// Whether the worker waits until more of some answer is read.
    pub fn is_reader_behind(&self) -> bool {
        let behind = |call: &Call| !call.is_decided() && call.received - call.published >= WINDOW;
        self.table.values().any(behind)
    }

    /// Whether the call can still be sent: it has no outcome yet.
    pub fn is_undecided(&self, id: u64) -> bool {
        self.table.get(&id).is_some_and(|call| !call.is_decided())
    }

    /// Notes that part of the request is with the worker, so that it will answer.
    pub fn mark_sent(&mut self, id: u64) {
        if let Some(call) = self.table.get_mut(&id) {
            call.sent = true;
        }
    }

    /// Says who is to be told when something happens to the call.
    pub fn set_waiter(&mut self, id: u64, waiter: Option<&Arc<Notifier>>) {
        if let Some(call) = self.table.get_mut(&id) {
            self.waited_for -= usize::from(call.waiter.is_some());
            self.waited_for += usize::from(waiter.is_some());
            call.waiter = waiter.cloned();
        }
    }

    /// Who is told; `None` when there is no such call any more.
    pub fn waiter(&self, id: u64) -> Option<Arc<Notifier>> {
        self.table.get(&id)?.waiter.clone()
    }

    /// Whether [`Self::take`] has something.
    pub fn has_news(&self, id: u64) -> bool {
        self.table.get(&id).is_none_or(Call::has_news)
    }

    fn other_waiters<'a>(
        &'a self,
        me: Option<&'a Arc<Notifier>>,
    ) -> impl Iterator<Item = &'a Arc<Notifier>> {
        let of_calls = self.table.values().filter_map(|call| call.waiter.as_ref());
        of_calls
            .chain(&self.space_waiters)
            .filter(move |waiter| !me.is_some_and(|me| Arc::ptr_eq(waiter, me)))
    }

    /// Whether anybody but `me` waits on this channel.
    pub fn has_other_waiter(&self, me: Option<&Arc<Notifier>>) -> bool {
        if self.waited_for == 0 && self.space_waiters.is_empty() {
            return false;
        }
        self.other_waiters(me).next().is_some()
    }

    /// Wakes somebody who can read the ring now that `me` stops: one thread, or the loops.
    pub fn wake_successor(&self, me: Option<&Arc<Notifier>>) {
        if let Some(thread) = self.other_waiters(me).find(|waiter| !waiter.is_loop()) {
            thread.ring();
        } else if !me.is_some_and(|me| me.is_loop()) {
            // Loops watch the same descriptors, so one that stops needs to tell no other.
            self.other_waiters(me).for_each(|waiter| waiter.ring());
        }
    }

    /// Registers somebody who waits for a free slot or for space in the request ring.
    pub fn add_space_waiter(&mut self, waiter: &Arc<Notifier>) {
        self.remove_space_waiter(waiter);
        self.space_waiters.push(Arc::clone(waiter));
    }

    /// Takes the registration back.
    pub fn remove_space_waiter(&mut self, waiter: &Arc<Notifier>) {
        self.space_waiters
            .retain(|other| !Arc::ptr_eq(other, waiter));
    }

    /// Checks that a record may come from the worker now, before its body is copied.
    pub fn admit(&self, header: &Header) -> Result<(), Violation> {
        if matches!(header.kind, Kind::Pad | Kind::Request) {
            return Err(Violation::Kind);
        }
        let call = self.table.get(&header.call).ok_or(Violation::UnknownCall)?;
        if call.slot() != Some(header.slot) || !call.sent {
            return Err(Violation::UnknownCall);
        }
        if header.sequence != call.next_sequence {
            return Err(Violation::Sequence);
        }
        let unread = call.received - call.consumed;
        if header.kind == Kind::Data && header.flags & FIRST != 0 && unread >= WINDOW {
            return Err(Violation::Window);
        }
        Ok(())
    }

    /// Hands a frame whose records were admitted to its call.
    pub fn deliver(&mut self, frame: Frame, me: Option<&Arc<Notifier>>) -> Result<(), Violation> {
        let header = frame.header;
        let call = self
            .table
            .get_mut(&header.call)
            .ok_or(Violation::UnknownCall)?;
        debug_assert!(header.flags & LAST != 0);
        call.next_sequence = call.next_sequence.wrapping_add(1);
        let late = call.is_decided();
        if late {
            self.dropped_late += 1;
        }
        if matches!(header.kind, Kind::Data | Kind::Answer) {
            // Late ones too: a worker can't send without end because nobody takes it.
            call.received += flow::cost(frame.body.len());
        }
        if header.kind.is_terminal() {
            self.free_slots.extend(call.release_slot());
        }
        if !late {
            match header.kind {
                Kind::Error => call.outcome = Some(Outcome::Failed(frame)),
                Kind::End => call.outcome = Some(Outcome::Ended),
                Kind::Answer => {
                    call.frames.push_back(frame);
                    call.outcome = Some(Outcome::Ended);
                }
                _ => call.frames.push_back(frame),
            }
            call.notify(header.call, me);
        }
        if header.kind.is_terminal() {
            self.forget_if_over(header.call);
            self.notify_space_waiters();
        }
        Ok(())
    }

    /// Takes an answer from the control plane. One to a question given up meanwhile is dropped.
    pub fn answer(
        &mut self,
        id: u64,
        outcome: Outcome,
        me: Option<&Arc<Notifier>>,
    ) -> Result<(), Violation> {
        if !self.settle_question(id) {
            return Err(Violation::Control);
        }
        if let Some(call) = self.table.get_mut(&id)
            && !call.is_decided()
        {
            call.outcome = Some(outcome);
            call.notify(id, me);
        }
        self.forget_if_over(id);
        Ok(())
    }

    /// Takes what happened next, if anything did.
    pub fn take(&mut self, id: u64) -> Option<(Event, Option<SlotUpdate>)> {
        let is_over = |call: &Call| call.abandoned && call.outcome.is_none();
        let Some(call) = self.table.get_mut(&id).filter(|call| !is_over(call)) else {
            // Given up, or taken to its end, by somebody else.
            return Some((Event::Done(Outcome::Cancelled), None));
        };
        if let Some(frame) = call.frames.pop_front() {
            let update = call.consume(&frame);
            return Some((Event::Data(frame), update));
        }
        let outcome = call.outcome.take()?;
        // The table keeps the call until the worker is done with it.
        call.abandoned = true;
        self.forget_if_over(id);
        Some((Event::Done(outcome), None))
    }

    /// Whether the call has its outcome, or had one.
    pub fn is_decided(&self, id: u64) -> bool {
        self.table.get(&id).is_none_or(Call::is_decided)
    }

    /// Takes the whole answer of a call, if that has arrived and is one frame and a good end.
    pub fn take_answer(&mut self, id: u64) -> Option<Frame> {
        let call = self.table.get_mut(&id)?;
        if call.frames.len() != 1 || !matches!(call.outcome, Some(Outcome::Ended)) {
            return None;
        }
        let frame = call.frames.pop_front();
        call.abandoned = true;
        self.forget_if_over(id);
        frame
    }

    /// Takes up to `limit` frames that `wanted` accepts, in order, from those that have arrived.
    pub fn take_frames(
        &mut self,
        id: u64,
        limit: usize,
        wanted: impl Fn(&Frame) -> bool,
    ) -> (Vec<Frame>, Option<SlotUpdate>) {
        let mut frames = Vec::new();
        let mut update = None;
        let Some(call) = self.table.get_mut(&id) else {
            return (frames, update);
        };
        while frames.len() < limit && call.frames.front().is_some_and(&wanted) {
            let Some(frame) = call.frames.pop_front() else {
                break;
            };
            update = call.consume(&frame).or(update);
            frames.push(frame);
        }
        (frames, update)
    }

    /// Decides the call's outcome as cancelled, unless it has one.
    pub fn cancel(&mut self, id: u64) -> Option<SlotUpdate> {
        let call = self.table.get_mut(&id)?;
        if call.is_decided() {
            return None;
        }
        call.frames.clear();
        call.outcome = Some(Outcome::Cancelled);
        call.notify(id, None);
        let told = match call.sent {
            true => call.slot(),
            false => {
                self.free_slots.extend(call.release_slot());
                None
            }
        };
        // Whoever is amid sending it is among them.
        self.notify_space_waiters();
        told.map(|slot| SlotUpdate::Cancelled { slot, call: id })
    }

    /// Gives the call up: cancels it if it is undecided, and nobody will ask for its outcome.
    pub fn abandon(&mut self, id: u64) -> Option<SlotUpdate> {
        let update = self.cancel(id);
        if let Some(call) = self.table.get_mut(&id) {
            call.frames.clear();
            call.abandoned = true;
        }
        self.set_waiter(id, None);
        self.forget_if_over(id);
        update
    }

    /// Ends the channel: every call without an outcome is lost; what arrived before stays.
    pub fn finish(&mut self, end: End) {
        if self.end.is_some() {
            return;
        }
        self.end = Some(end);
        for (&id, call) in &mut self.table {
            call.held = Held::Nothing;
            if !call.is_decided() {
                call.outcome = Some(Outcome::Lost(end));
                call.notify(id, None);
            }
        }
        self.questions = 0;
        self.table.retain(|_, call| !call.abandoned);
        self.waited_for = self
            .table
            .values()
            .filter(|call| call.waiter.is_some())
            .count();
        self.notify_space_waiters();
    }

    /// Tells everybody who waits for space to look again.
    pub fn notify_space_waiters(&mut self) {
        for waiter in self.space_waiters.drain(..) {
            waiter.notify(Notifier::SPACE, false);
        }
    }

    fn forget_if_over(&mut self, id: u64) {
        let over = |call: &Call| call.abandoned && call.held == Held::Nothing;
        if self.table.get(&id).is_some_and(over) {
            self.set_waiter(id, None);
            self.table.remove(&id);
        }
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests;
