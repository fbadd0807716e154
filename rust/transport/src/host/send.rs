//! How requests leave: records as they fit, and waiting for space.

use std::sync::Arc;

use crate::assemble::fragment;
use crate::body::Gather;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::notify::Notifier;
use crate::record::{Header, Kind, LAST};
use crate::ring::Producer;
use crate::segment::RingMemory;
use crate::sync::Ordering;
use crate::{Patience, lock};

/// A request on its way, and how much of it is out.
#[derive(Debug, Default)]
pub struct Outgoing {
    opened: Option<(u64, u32)>,
    at: Option<usize>,
    done: bool,
}

impl Outgoing {
    /// Id of the call, once there is one.
    pub fn call(&self) -> Option<u64> {
        self.opened.map(|(call, _)| call)
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
        if body.total() > self.frame_limit {
            return Err(Error::TooLarge {
                size: body.total(),
                limit: self.frame_limit,
            });
        }
        if outgoing.done {
            return Ok(true);
        }
        let Some((call, slot)) = self.open_call(outgoing, waiter)? else {
            return Ok(false);
        };
        let mut sender = lock(&self.sender);
        let pushed = self.push_records(&mut sender, outgoing, (call, slot), body);
        drop(sender);
        match pushed {
            Err(Error::Protocol(violation)) => Err(self.violated(violation)),
            other => other,
        }
    }

    fn push_records(
        &self,
        sender: &mut Producer<RingMemory>,
        outgoing: &mut Outgoing,
        (call, slot): (u64, u32),
        body: &Gather<'_>,
    ) -> Result<bool> {
        if !self.push_withdrawals(sender)? {
            return Ok(false);
        }
        let total = body.total();
        while !outgoing.done {
            let (flags, window) = fragment(total, sender.max_body(), outgoing.at.unwrap_or(0));
            let end = window.end;
            let header = request_header(call, slot, flags, window.len(), total);
            // Held over the first push, so that neither a cancellation nor an answer comes between
            // the record and the note that it is out.
            let calls = lock(&self.calls);
            if let Some(end) = calls.end() {
                return Err(end.into());
            }
            let first = outgoing.at.is_none();
            if first && !calls.is_undecided(call) {
                return Err(Error::Cancelled);
            }
            let guard = first.then_some(calls);
            let pushed = sender.push(&header, |write| body.copy(window, write))?;
            let Some(ring) = pushed else { return Ok(false) };
            if let Some(mut calls) = guard {
                calls.mark_sent(call);
            }
            if ring {
                self.ring(&self.request_bell);
            }
            outgoing.at = Some(end);
            outgoing.done = end == total;
        }
        self.tally.frames_sent.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// Tells the worker of requests that were given up half sent: their last record is empty.
    fn push_withdrawals(&self, sender: &mut Producer<RingMemory>) -> Result<bool> {
        loop {
            let mut calls = lock(&self.calls);
            let Some(&(call, slot)) = calls.withdrawn.last() else {
                return Ok(true);
            };
            let header = request_header(call, slot, LAST, 0, 0);
            let Some(ring) = sender.push(&header, |_| ())? else {
                return Ok(false);
            };
            calls.withdrawn.pop();
            drop(calls);
            if ring {
                self.ring(&self.request_bell);
            }
        }
    }

    fn open_call(
        &self,
        outgoing: &mut Outgoing,
        waiter: Option<&Arc<Notifier>>,
    ) -> Result<Option<(u64, u32)>> {
        if outgoing.opened.is_none() {
            self.notice_death()?;
            let mut calls = lock(&self.calls);
            outgoing.opened = calls.open()?;
            if let Some((call, slot)) = outgoing.opened {
                self.segment.slot(slot).consumed.store(0, Ordering::Relaxed);
                calls.set_waiter(call, waiter);
            }
        }
        Ok(outgoing.opened)
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
        self.hand_over(&me);
        waited
    }

    /// Registers `waiter` to be told when there may be space; `false` when there is some already.
    pub fn await_space(&self, outgoing: &Outgoing, waiter: &Arc<Notifier>) -> Result<bool> {
        lock(&self.calls).add_space_waiter(waiter);
        if outgoing.opened.is_none() {
            return Ok(!self.may_send(outgoing));
        }
        let mut sender = lock(&self.sender);
        let length = sender.max_body();
        let armed = sender.arm(|ring| ring.fits(length));
        drop(sender);
        let armed = armed.map_err(|violation| self.violated(violation))?;
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
            Some(call) if outgoing.at.is_none() && !calls.is_undecided(call) => true,
            Some(_) => {
                drop(calls);
                let mut sender = lock(&self.sender);
                let length = sender.max_body();
                sender.fits(length).unwrap_or(true)
            }
        }
    }

    /// Gives a request up that is not all out. Once part of it is with the worker, the worker has
    /// to be told, as soon as there is space for that.
    pub fn withdraw(&self, outgoing: &Outgoing) {
        if let (Some((call, slot)), Some(_), false) = (outgoing.opened, outgoing.at, outgoing.done)
        {
            lock(&self.calls).withdrawn.push((call, slot));
        }
        if let Some(call) = outgoing.call() {
            self.abandon(call);
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
