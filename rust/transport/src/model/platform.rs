//! The operating system of a model: bells that are never lost, message queues, and sleeps that end
//! when one of them has something and not before.
//!
//! One lock stands for the kernel. It orders only those who make system calls, as the real one
//! does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use loom::sync::{Condvar, Mutex, MutexGuard};

use crate::control::SIZE;
use crate::error::Result;

loom::lazy_static! {
    static ref KERNEL: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
}

fn enter() -> MutexGuard<'static, ()> {
    KERNEL
        .0
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Something to wait for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    Rung(&'a Line),
    Filled(&'a Queue),
}

impl Source<'_> {
    fn is_ready(&self) -> bool {
        match self {
            Self::Rung(line) => line.0.load(Ordering::Relaxed) > 0,
            Self::Filled(queue) => !lock(queue).is_empty(),
        }
    }
}

/// Rings so far; used with the kernel's lock held.
#[derive(Debug, Clone, Default)]
pub(crate) struct Line(Arc<AtomicUsize>);

impl Line {
    pub(crate) fn ring(&self) {
        let _kernel = enter();
        self.0.fetch_add(1, Ordering::Relaxed);
        KERNEL.1.notify_all();
    }

    fn drain(&self) -> usize {
        let _kernel = enter();
        self.0.swap(0, Ordering::Relaxed)
    }
}

type Queue = Arc<std::sync::Mutex<VecDeque<[u8; SIZE]>>>;

fn lock(queue: &Queue) -> std::sync::MutexGuard<'_, VecDeque<[u8; SIZE]>> {
    queue
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[derive(Debug)]
pub(crate) struct Bell(Line);

impl Bell {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Line::default()))
    }

    pub(crate) fn ring(&self) {
        self.0.ring();
    }

    pub(crate) fn drain(&self) {
        self.0.drain();
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source::Rung(&self.0)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rings {
    Taken(usize),
    Closed,
}

#[derive(Debug)]
pub(crate) struct Doorbell {
    theirs: Line,
    ours: Line,
}

impl Doorbell {
    pub(crate) fn pair() -> (Self, Self) {
        let (one, other) = (Line::default(), Line::default());
        let ours = Self {
            theirs: one.clone(),
            ours: other.clone(),
        };
        let theirs = Self {
            theirs: other,
            ours: one,
        };
        (ours, theirs)
    }

    pub(crate) fn ring(&self) {
        self.theirs.ring();
    }

    pub(crate) fn drain(&self) -> Rings {
        Rings::Taken(self.ours.drain())
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source::Rung(&self.ours)
    }
}

pub(crate) enum Datagram {
    Received(usize),
    Nothing,
    #[cfg_attr(
        test,
        expect(dead_code, reason = "nobody closes a control socket in a model")
    )]
    Closed,
}

#[derive(Debug)]
pub(crate) struct ControlSocket {
    theirs: Queue,
    ours: Queue,
}

impl ControlSocket {
    pub(crate) fn pair() -> (Self, Self) {
        let (one, other) = (Queue::default(), Queue::default());
        let ours = Self {
            theirs: one.clone(),
            ours: other.clone(),
        };
        let theirs = Self {
            theirs: other,
            ours: one,
        };
        (ours, theirs)
    }

    pub(crate) fn send(&self, message: &[u8; SIZE]) -> Result<()> {
        let _kernel = enter();
        lock(&self.theirs).push_back(*message);
        KERNEL.1.notify_all();
        Ok(())
    }

    pub(crate) fn receive(&self, buffer: &mut [u8; SIZE]) -> Result<Datagram> {
        let _kernel = enter();
        Ok(match lock(&self.ours).pop_front() {
            Some(message) => {
                *buffer = message;
                Datagram::Received(SIZE)
            }
            None => Datagram::Nothing,
        })
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source::Filled(&self.ours)
    }
}

/// Rung when the process ends.
#[derive(Debug, Clone, Default)]
pub(crate) struct Death(pub(crate) Line);

impl Death {
    pub(crate) fn source(&self) -> Source<'_> {
        Source::Rung(&self.0)
    }
}

/// The host of a model never dies.
pub(crate) fn watch_process(_pid: i32, _control: &ControlSocket) -> Result<Death> {
    Ok(Death::default())
}

pub(crate) fn is_parent(_pid: i32) -> bool {
    true
}

pub(crate) fn exit_now(status: i32) -> ! {
    panic!("the worker exits with {status}");
}

pub(crate) fn current_cpu() -> Option<usize> {
    None
}

pub(crate) fn leave_cpu() {}

pub(crate) fn fork_depth() -> u32 {
    0
}

/// Models get no signals.
#[derive(Debug)]
pub struct SignalGate;

impl SignalGate {
    /// Does nothing.
    pub fn close() -> Self {
        Self
    }
}

/// A deadline that has not passed yet never does: what only the clock ends is a deadlock here.
pub(crate) fn wait<const N: usize>(
    sources: [Option<Source<'_>>; N],
    until: Option<Instant>,
    _gate: Option<&SignalGate>,
) -> Result<[bool; N]> {
    let only_look = until.is_some_and(|until| until <= Instant::now());
    let mut kernel = enter();
    loop {
        let ready = sources.map(|source| source.is_some_and(|source| source.is_ready()));
        if only_look || ready.contains(&true) {
            return Ok(ready);
        }
        kernel = KERNEL
            .1
            .wait(kernel)
            .unwrap_or_else(|poisoned| poisoned.into_inner());
    }
}
