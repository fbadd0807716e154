//! The host's end of a channel.
//!
//! There is no thread behind it. Whoever waits first reads the reply ring for everybody (the
//! *leader*) and hands frames of other calls to their owners; the others sleep on a doorbell of
//! their own. A leader that leaves wakes one of them, who leads on. An event loop never leads: it
//! watches the descriptors and looks at the ring when one of them is readable.

mod counters;
mod lead;
#[cfg(not(loom))]
mod open;
mod send;

pub use counters::Counters;
pub use send::Outgoing;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::assemble::{Assembler, Frame};
use crate::calls::{Calls, End, Event, SlotUpdate};
use crate::control::Control;
use crate::error::{Error, Result, Violation};
use crate::notify::Notifier;
use crate::platform::{self, ControlSocket, Death, Doorbell};
use crate::ring::{Consumer, Producer, nudge};
use crate::segment::{RingMemory, Segment};
use crate::spin::{ALONE, Budget, CAP, HOST_PATIENCE, OF_LOOP, Spinner};
use crate::sync::{AtomicU64, Mutex, Ordering, TryLock};
use crate::{Patience, Settings, lock};
use counters::Tally;

/// A worker that sent something this recently is alive: ending a process takes longer. A model
/// must not depend on the clock.
const FRESH: Duration = Duration::from_micros(if cfg!(loom) { 0 } else { 100 });

struct Reader {
    ring: Consumer<RingMemory>,
    assembler: Assembler,
    spinner: Spinner,
    /// For callers who hold what others need meanwhile.
    brief_spinner: Spinner,
    loop_spinner: Spinner,
    control_open: bool,
    /// Rings of the doorbell so far.
    rings: u64,
    /// How far the worker had read when it was seen asleep in front of a request, and when that was.
    unread: Option<(u64, Instant)>,
}

/// See the module's text. Every method may be called from any thread.
pub struct Host {
    owner: u32,
    segment: Segment,
    request_memory: RingMemory,
    reply_memory: RingMemory,
    sender: Mutex<Producer<RingMemory>>,
    reader: TryLock<Reader>,
    calls: Mutex<Calls>,
    /// Wakes the worker for a request; rung by it for a reply, and for space.
    bell: Doorbell,
    /// Wakes the worker for space, credit and cancellation.
    space_bell: Doorbell,
    control: ControlSocket,
    /// What the worker is to inherit, until it has.
    #[cfg(not(loom))]
    worker_ends: Mutex<Option<[std::os::fd::OwnedFd; 4]>>,
    pub(crate) death: OnceLock<Death>,
    created: Instant,
    /// When the last batch of frames came, in nanoseconds since `created`.
    heard: AtomicU64,
    tally: Tally,
    frame_limit: usize,
}

impl Host {
    pub(crate) fn assemble(
        segment: Segment,
        control: ControlSocket,
        bell: Doorbell,
        space_bell: Doorbell,
        settings: Settings,
    ) -> Self {
        Self {
            owner: platform::fork_depth(),
            request_memory: segment.requests(),
            reply_memory: segment.replies(),
            sender: Mutex::new(Producer::new(segment.requests())),
            reader: TryLock::new(Reader {
                ring: Consumer::new(segment.replies()),
                assembler: Assembler::new(settings.frame_limit),
                spinner: Spinner::new(settings.wait, CAP, HOST_PATIENCE),
                brief_spinner: Spinner::new(settings.wait, ALONE, HOST_PATIENCE),
                loop_spinner: Spinner::new(settings.wait, OF_LOOP, HOST_PATIENCE),
                control_open: true,
                rings: 0,
                unread: None,
            }),
            segment,
            calls: Mutex::new(Calls::new()),
            bell,
            space_bell,
            control,
            #[cfg(not(loom))]
            worker_ends: Mutex::new(None),
            death: OnceLock::new(),
            created: Instant::now(),
            heard: AtomicU64::new(0),
            tally: Tally::default(),
            frame_limit: settings.frame_limit,
        }
    }

    /// Asks the heartbeat a question; its answer is the returned call's outcome.
    pub fn ask(&self, question: Control, waiter: Option<&Arc<Notifier>>) -> Result<u64> {
        self.check_owner()?;
        self.notice_death()?;
        let nonce = {
            let mut calls = lock(&self.calls);
            let nonce = calls.open_control()?;
            calls.set_waiter(nonce, waiter);
            nonce
        };
        if let Err(error) = self.control.send(&question.to_wire(nonce)) {
            lock(&self.calls).withdraw_question(nonce);
            return Err(error);
        }
        Ok(nonce)
    }

    /// What happened to the call next, if anything did. Never waits.
    pub fn poll(&self, call: u64) -> Result<Option<Event>> {
        self.check_owner()?;
        Ok(self.take(call))
    }

    /// Takes up to `limit` frames of the call that `wanted` accepts, in order, from those that
    /// have arrived. Never waits.
    pub fn poll_frames(
        &self,
        call: u64,
        limit: usize,
        wanted: impl Fn(&Frame) -> bool,
    ) -> Result<Vec<Frame>> {
        self.check_owner()?;
        Ok(self.update(|calls| calls.take_frames(call, limit, wanted)))
    }

    /// Waits for what happens to the call next.
    pub fn wait(&self, call: u64, patience: Patience<'_>) -> Result<Event> {
        self.wait_as(call, patience, || self.take(call))
    }

    /// Waits until the call is decided. Takes the answer if it is one frame and a good end; `None`
    /// leaves everything to [`Self::poll`] and [`Self::wait`].
    pub fn wait_for_answer(&self, call: u64, patience: Patience<'_>) -> Result<Option<Frame>> {
        self.wait_as(call, patience, || {
            let mut calls = lock(&self.calls);
            calls.is_decided(call).then(|| calls.take_answer(call))
        })
    }

    fn wait_as<T>(
        &self,
        call: u64,
        patience: Patience<'_>,
        mut goal: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        self.check_owner()?;
        let me = Notifier::of_thread()?;
        lock(&self.calls).set_waiter(call, Some(&me));
        let waited = self.wait_for(&me, patience, &mut goal, &mut || Ok(false));
        // In this order: a leader must not choose as its successor one that leaves too.
        lock(&self.calls).set_waiter(call, None);
        self.hand_over(Some(&me));
        waited
    }

    /// Spins until something happened to the call, as long as that pays; `false` when nothing did.
    /// For event loops, whose notifier stays the call's waiter.
    pub fn spin(&self, call: u64) -> Result<bool> {
        self.check_owner()?;
        let Some(notifier) = lock(&self.calls).waiter(call) else {
            return Ok(true);
        };
        let Some(mut reader) = self.try_lead() else {
            return Ok(false);
        };
        let mut budget = Budget::new(OF_LOOP);
        loop {
            let more = self.pump(&mut reader, Some(&notifier));
            if lock(&self.calls).has_news(call)
                || !(more || self.spin_in_loop(&mut reader))
                || budget.is_spent()
            {
                break;
            }
        }
        drop(reader);
        self.hand_over(Some(&notifier));
        Ok(lock(&self.calls).has_news(call))
    }

    fn spin_in_loop(&self, reader: &mut Reader) -> bool {
        let Reader {
            ring, loop_spinner, ..
        } = reader;
        let won = loop_spinner.spin(|| ring.is_ready(), || self.note_cpu(), || 0);
        self.tally.spins_won.add_alone(won.into());
        won
    }

    /// Spins for the answer to a call that was just sent, so briefly that the caller need not let
    /// anybody else go on meanwhile. Takes the answer if it is one frame and a good end. `None`
    /// leaves everything to [`Self::poll`] and [`Self::wait`].
    pub fn spin_for_answer(&self, call: u64) -> Result<Option<Frame>> {
        self.check_owner()?;
        let Some(mut reader) = self.try_lead() else {
            return Ok(None);
        };
        // An event loop that has armed the ring and still waits is woken below.
        reader.ring.disarm();
        let mut budget = Budget::new(ALONE);
        loop {
            let more = self.pump(&mut reader, None);
            if lock(&self.calls).is_decided(call) {
                break;
            }
            if !more {
                let Reader {
                    ring,
                    brief_spinner,
                    ..
                } = &mut *reader;
                if !brief_spinner.spin(|| ring.is_ready(), || (), || 0) {
                    break;
                }
                self.tally.spins_won.add_alone(1);
            }
            if budget.is_spent() {
                break;
            }
        }
        drop(reader);
        let mut calls = lock(&self.calls);
        self.hand_over_locked(&calls, None);
        Ok(calls.take_answer(call))
    }

    /// Says who is to be told when something happens to the call. Who waits for it nevertheless
    /// looks at it once more: what came before told nobody.
    pub fn set_waiter(&self, call: u64, waiter: &Arc<Notifier>) {
        if self.is_owned() {
            lock(&self.calls).set_waiter(call, Some(waiter));
        }
    }

    fn take(&self, call: u64) -> Option<Event> {
        self.update(|calls| {
            calls
                .take(call)
                .map_or((None, None), |(event, update)| (Some(event), update))
        })
    }

    /// Cancels the call: it ends here at once, and the worker is told. Does nothing to a call that
    /// has its outcome.
    pub fn cancel(&self, call: u64) {
        if self.is_owned() {
            self.update(|calls| ((), calls.cancel(call)));
        }
    }

    /// Cancels the call and forgets it: nobody will ask for its outcome.
    pub fn abandon(&self, call: u64) {
        if self.is_owned() {
            self.update(|calls| ((), calls.abandon(call)));
        }
    }

    /// Changes a call and tells the worker what it has to know of that.
    fn update<T>(&self, change: impl FnOnce(&mut Calls) -> (T, Option<SlotUpdate>)) -> T {
        let mut calls = lock(&self.calls);
        let (result, update) = change(&mut calls);
        let Some(update) = update else { return result };
        // Before unlocking: afterwards the slot may be another call's.
        match update {
            SlotUpdate::Consumed { slot, bytes } => {
                self.segment
                    .slot(slot)
                    .consumed
                    .store(bytes, Ordering::Release);
            }
            SlotUpdate::Cancelled { slot, call } => {
                self.segment
                    .slot(slot)
                    .cancelled
                    .store(call, Ordering::Release);
            }
        }
        drop(calls);
        if nudge(&self.reply_memory) {
            self.ring(&self.space_bell);
        }
        result
    }

    /// Ends the channel on this side and asks the worker to end. Calls without an outcome are lost,
    /// before the worker hears of it and could answer something else.
    pub fn close(&self) {
        if self.is_owned() {
            lock(&self.calls).finish(End::Closed);
            // Nobody reads the answer, and a worker that can't be told is for its owner to end.
            let _ = self.control.send(&Control::Shutdown.to_wire(0));
        }
    }

    /// How the channel ended, if it has. For a forked child it is closed.
    pub fn end(&self) -> Option<End> {
        if !self.is_owned() {
            return Some(End::Closed);
        }
        lock(&self.calls).end()
    }

    /// Waits until the worker process has ended; `false` when the time came first. A worker that
    /// was never watched counts as ended.
    pub fn wait_death(&self, until: Option<Instant>) -> Result<bool> {
        self.check_owner()?;
        let Some(death) = self.death.get() else {
            return Ok(true);
        };
        let [dead] = platform::wait([Some(death.source())], until, None)?;
        Ok(dead)
    }

    /// Calls that have no outcome yet. A forked child has none.
    pub fn in_flight(&self) -> Vec<u64> {
        if !self.is_owned() {
            return Vec::new();
        }
        lock(&self.calls).undecided()
    }

    /// Whether the worker is done with the call, whatever became of it here. Looks at what has
    /// arrived, without waiting: where nobody waits, nobody else does. To a forked child its worker
    /// owes nothing.
    pub fn is_over(&self, call: u64) -> Result<bool> {
        if !self.is_owned() {
            return Ok(true);
        }
        if lock(&self.calls).is_held(call) {
            self.try_withdrawals();
            if let Some(mut reader) = self.try_lead() {
                // As in `spin_for_answer`.
                reader.ring.disarm();
                self.pump_what_is_there(&mut reader, None);
            }
            self.hand_over(None);
        }
        Ok(!lock(&self.calls).is_held(call))
    }

    /// Whether the worker waits until more of some answer is read here.
    pub fn is_reader_behind(&self) -> bool {
        self.is_owned() && lock(&self.calls).is_reader_behind()
    }

    /// Counts so far.
    pub fn counters(&self) -> Counters {
        let dropped_late = match self.is_owned() {
            true => lock(&self.calls).dropped_late,
            false => 0,
        };
        self.tally.counters(dropped_late)
    }

    /// Fails with [`Error::Forked`] in a forked child. Comes before every lock: one that another
    /// thread held at the fork is never let go of in the child.
    pub fn check_owner(&self) -> Result<()> {
        if self.is_owned() {
            Ok(())
        } else {
            Err(Error::Forked)
        }
    }

    fn is_owned(&self) -> bool {
        platform::fork_depth() == self.owner
    }

    #[cfg(loom)]
    pub(crate) fn bell_source(&self) -> platform::Source<'_> {
        self.bell.source()
    }

    fn ring(&self, bell: &Doorbell) {
        self.tally.wakes_sent.add(1);
        bell.ring();
    }

    /// Before a new call: a worker that died unwatched must not take it.
    fn notice_death(&self) -> Result<()> {
        let Some(death) = self.death.get() else {
            return Ok(());
        };
        let heard = Duration::from_nanos(self.heard.load(Ordering::Relaxed));
        if self.created.elapsed().saturating_sub(heard) < FRESH {
            return Ok(());
        }
        let [dead] = platform::wait([Some(death.source())], Some(Instant::now()), None)?;
        if dead { Err(Error::PeerDied) } else { Ok(()) }
    }

    /// Ends the channel because of a violation, which whoever has a call here learns from its
    /// outcome. After the end it means nothing: what still arrives may be for forgotten calls.
    fn violated(&self, violation: Violation) {
        let mut calls = lock(&self.calls);
        if calls.end().is_none() {
            self.tally.violations.add(1);
            calls.finish(End::Violated(violation));
        }
    }

    fn finish(&self, end: End) {
        lock(&self.calls).finish(end);
    }
}
