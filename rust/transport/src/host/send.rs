//! How requests leave: records as they fit, and waiting for space.

use std::sync::Arc;

use crate::assemble::fragment;
use crate::body::Gather;
use crate::calls::Calls;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::notify::Notifier;
use crate::record::{FIRST, Header, Kind, LAST, WHOLE};
use crate::ring::{Producer, consumed};
use crate::segment::RingMemory;
use crate::sync::Ordering;
use crate::{Patience, lock, try_lock};

/// A request on its way, and how much of it is out.
#[derive(Debug, Default)]
pub struct Outgoing {
    opened: Option<(u64, u32)>,
    at: Option<usize>,
    done: bool,
    /// Whether it once had to wait.
    waited: bool,
    /// Flags beside those of its fragments.
    flags: u16,
    position: u64,
}

impl Outgoing {
    /// A request whose answer is of use only when it is complete.
    pub fn for_whole_answer() -> Self {
        Self {
            flags: WHOLE,
            ..Self::default()
        }
    }

    /// Id of the call, once there is one.
    pub fn call(&self) -> Option<u64> {
        self.opened.map(|(call, _)| call)
    }

    /// Whether it is all out.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Where in the ring its first record ends, once that is out.
    pub fn position(&self) -> Option<u64> {
        self.at.map(|_| self.position)
    }
}

impl Host {
    /// Sends a request, or as much of it as fits now; `true` when it is all out. Called again with
    /// the same arguments it goes on. `waiter` is told when the call has something, and when there
    /// may be space again.
    pub fn try_send(
        &self,
        outgoing: &mut Outgoing,
        body: &Gather<'_>,
        waiter: Option<&Arc<Notifier>>,
    ) -> Result<bool> {
        self.check_owner()?;
        let sent = self.send_with(&mut lock(&self.sender), outgoing, body, waiter);
        if !outgoing.waited && matches!(sent, Ok(false)) {
            outgoing.waited = true;
            self.tally.full_waits.add(1);
        }
        sent
    }

    /// As [`Self::try_send`], but gives up when another thread is sending; for a caller that must
    /// not wait even for that.
    pub fn try_send_at_once(
        &self,
        outgoing: &mut Outgoing,
        body: &Gather<'_>,
        waiter: Option<&Arc<Notifier>>,
    ) -> Result<bool> {
        self.check_owner()?;
        match try_lock(&self.sender) {
            Some(mut sender) => self.send_with(&mut sender, outgoing, body, waiter),
            None => Ok(false),
        }
    }

    fn send_with(
        &self,
        sender: &mut Producer<RingMemory>,
        outgoing: &mut Outgoing,
        body: &Gather<'_>,
        waiter: Option<&Arc<Notifier>>,
    ) -> Result<bool> {
        if body.total() > self.frame_limit {
            return Err(Error::TooLarge {
                size: body.total(),
                limit: self.frame_limit,
            });
        }
        if outgoing.done {
            return Ok(true);
        }
        if outgoing.opened.is_none() {
            self.notice_death()?;
        }
        let pushed = self.push_records(sender, outgoing, body, waiter);
        if let Err(Error::Protocol(violation)) = pushed {
            self.violated(violation);
        }
        pushed
    }

    fn push_records(
        &self,
        sender: &mut Producer<RingMemory>,
        outgoing: &mut Outgoing,
        body: &Gather<'_>,
        waiter: Option<&Arc<Notifier>>,
    ) -> Result<bool> {
        let total = body.total();
        loop {
            // Held over each push, so that neither a cancellation nor an answer comes between a
            // request's first record and the note that it is out.
            let mut calls = lock(&self.calls);
            if let Some(end) = calls.end() {
                return Err(end.into());
            }
            let opened = self.open_call(&mut calls, outgoing, waiter)?;
            let Some((call, slot)) = opened else {
                return Ok(false);
            };
            if !self.push_withdrawals(&mut calls, sender)? {
                return Ok(false);
            }
            if !calls.is_undecided(call) {
                return Err(Error::Cancelled);
            }
            let (flags, window) = fragment(total, sender.max_body(), outgoing.at.unwrap_or(0));
            let end = window.end;
            let header = request_header(call, slot, flags | outgoing.flags, window.len(), total);
            // Only the first needs the lock, and copying a large one takes long.
            let calls = match outgoing.at {
                None => Some(calls),
                Some(_) => None,
            };
            let pushed = sender.push(&header, |write| body.copy(window, write))?;
            let Some(ring) = pushed else { return Ok(false) };
            if let Some(mut calls) = calls {
                calls.mark_sent(call);
                outgoing.position = sender.position();
            }
            self.wake_for_request(ring);
            outgoing.at = Some(end);
            let fragmented = flags != FIRST | LAST;
            self.tally.fragments_sent.add_alone(fragmented.into());
            if end == total {
                outgoing.done = true;
                self.tally.frames_sent.add_alone(1);
                self.tally.bytes_sent.add_alone(total as u64);
                return Ok(true);
            }
        }
    }

    fn wake_for_request(&self, sleeps: bool) {
        if sleeps {
            self.ring(&self.bell);
        } else {
            self.tally.wakes_suppressed.add_alone(1);
        }
    }

    /// Tells the worker of requests that were given up half sent: their last record is empty.
    fn push_withdrawals(
        &self,
        calls: &mut Calls,
        sender: &mut Producer<RingMemory>,
    ) -> Result<bool> {
        while let Some(&(call, slot)) = calls.withdrawn.last() {
            let header = request_header(call, slot, LAST, 0, 0);
            let Some(ring) = sender.push(&header, |_| ())? else {
                return Ok(false);
            };
            calls.withdrawn.pop();
            self.wake_for_request(ring);
        }
        Ok(true)
    }

    fn open_call(
        &self,
        calls: &mut Calls,
        outgoing: &mut Outgoing,
        waiter: Option<&Arc<Notifier>>,
    ) -> Result<Option<(u64, u32)>> {
        if outgoing.opened.is_none() {
            outgoing.opened = calls.open()?;
            if let Some((call, slot)) = outgoing.opened {
                let consumed = self.segment.slot(slot).consumed;
                // The worker looks at the slot before it serves, and mostly it is still in its
                // cache: few answers are so long that anything was published.
                if consumed.load(Ordering::Relaxed) != 0 {
                    consumed.store(0, Ordering::Relaxed);
                }
                calls.set_waiter(call, waiter);
            }
        }
        Ok(outgoing.opened)
    }

    /// Whether the worker has read the request's first record, as far as it says. Holds after its
    /// death too.
    pub fn has_taken(&self, position: u64) -> bool {
        consumed(&self.request_memory) >= position
    }

    /// Waits until [`Self::try_send`] may get further.
    pub fn wait_to_send(&self, outgoing: &Outgoing, patience: Patience<'_>) -> Result<()> {
        self.check_owner()?;
        let me = Notifier::of_thread()?;
        let waited = self.wait_for(
            &me,
            patience,
            &mut || {
                // Before the look, so that a leader who leaves after it knows of this waiter.
                lock(&self.calls).add_space_waiter(&me);
                self.may_send(outgoing).then_some(())
            },
            &mut || Ok(!self.await_space(outgoing, &me)?),
        );
        lock(&self.calls).remove_space_waiter(&me);
        self.hand_over(Some(&me));
        waited
    }

    /// Registers `waiter` to be told when there may be space; `false` when there is some already.
    pub fn await_space(&self, outgoing: &Outgoing, waiter: &Arc<Notifier>) -> Result<bool> {
        self.check_owner()?;
        lock(&self.calls).add_space_waiter(waiter);
        if outgoing.opened.is_none() {
            return Ok(!self.may_send(outgoing));
        }
        let mut sender = lock(&self.sender);
        let length = sender.max_body();
        self.tally.arms.add(1);
        let armed = sender.arm(|ring| ring.fits(length));
        drop(sender);
        let armed = armed.inspect_err(|&violation| self.violated(violation))?;
        if !armed {
            // The flag was everybody's, and now it is down.
            lock(&self.calls).notify_space_waiters();
        }
        Ok(armed && !self.may_send(outgoing))
    }

    /// Whether [`Self::try_send`] would get further or fail.
    fn may_send(&self, outgoing: &Outgoing) -> bool {
        let calls = lock(&self.calls);
        match outgoing.call() {
            _ if calls.end().is_some() => true,
            None => calls.has_free_slot(),
            Some(call) if !calls.is_undecided(call) => true,
            Some(_) => {
                drop(calls);
                let mut sender = lock(&self.sender);
                let length = sender.max_body();
                sender.fits(length).unwrap_or(true)
            }
        }
    }

    /// Gives a request up that is not all out. Once part of it is with the worker, the worker has
    /// to be told: now, or as soon as somebody looks who finds space for that.
    pub fn withdraw(&self, outgoing: &Outgoing) {
        let Some((call, slot)) = outgoing.opened else {
            return;
        };
        if !self.is_owned() {
            return;
        }
        if outgoing.at.is_some() && !outgoing.done {
            lock(&self.calls).withdrawn.push((call, slot));
        }
        self.abandon(call);
        self.try_withdrawals();
    }

    /// Tells the worker of requests that were given up half sent, if that takes no waiting.
    pub(super) fn try_withdrawals(&self) {
        if lock(&self.calls).withdrawn.is_empty() {
            return;
        }
        // Whoever sends meanwhile tells it too, but for the last record.
        let Some(mut sender) = try_lock(&self.sender) else {
            return;
        };
        let pushed = self.push_withdrawals(&mut lock(&self.calls), &mut sender);
        if let Err(Error::Protocol(violation)) = pushed {
            self.violated(violation);
        }
    }
}

fn request_header(call: u64, slot: u32, flags: u16, length: usize, total: usize) -> Header {
    Header {
        // A record is at most a quarter of a ring of at most 2 GiB.
        length: length as u32,
        kind: Kind::Request,
        flags,
        call,
        sequence: 0,
        slot,
        total: total as u64,
    }
}
