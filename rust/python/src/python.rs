//! What every class needs: errors, arguments, and waiting without the GIL.

use std::time::{Duration, Instant};

use inferpool_transport::body::Gather;
use inferpool_transport::{Error, Patience, Settings, SignalGate, WaitPolicy};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use smallvec::SmallVec;

use crate::message::{self, Message};

pyo3::import_exception!(inferpool.errors, CallCancelled);
pyo3::import_exception!(inferpool.errors, CallTimeout);
pyo3::import_exception!(inferpool.errors, PayloadTooLarge);
pyo3::import_exception!(inferpool.errors, PeerDied);
pyo3::import_exception!(inferpool.errors, PoolClosed);
pyo3::import_exception!(inferpool.errors, ProtocolError);
pyo3::import_exception!(inferpool.errors, QueueFull);

/// Bytes of the largest body that is copied without giving the GIL away: giving it away costs more,
/// and other threads don't feel the few microseconds.
pub const SENT_AT_ONCE: usize = 64 * 1024;

/// A transport error on its way to Python.
pub struct Raised(Error);

impl From<Error> for Raised {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<Raised> for PyErr {
    fn from(Raised(error): Raised) -> Self {
        let text = error.to_string();
        match error {
            Error::Protocol(_) => ProtocolError::new_err(text),
            Error::TimedOut => CallTimeout::new_err(text),
            Error::Cancelled => CallCancelled::new_err(text),
            Error::PeerDied => PeerDied::new_err(text),
            Error::Closed | Error::Forked => PoolClosed::new_err(text),
            Error::QueueFull => QueueFull::new_err(text),
            Error::TooLarge { .. } => PayloadTooLarge::new_err(text),
            Error::HalfSent => PyValueError::new_err(text),
            Error::Os(error) => error.into(),
            // `patiently` deals with both; a plain OSError is the honest rest.
            Error::WouldPark | Error::Interrupted => PyOSError::new_err(text),
        }
    }
}

/// Reads the arguments that host and worker share.
pub fn settings(frame_limit: usize, wait: &str) -> PyResult<Settings> {
    let wait = match wait {
        "adaptive" => WaitPolicy::Adaptive,
        "park" => WaitPolicy::Park,
        other => {
            let text = format!("wait must be 'adaptive' or 'park', not {other:?}");
            return Err(PyValueError::new_err(text));
        }
    };
    Ok(Settings { frame_limit, wait })
}

/// The moment `timeout` seconds from now; `None` is never.
pub fn deadline(timeout: Option<f64>) -> PyResult<Option<Instant>> {
    let Some(seconds) = timeout else {
        return Ok(None);
    };
    if seconds.is_nan() || seconds < 0.0 {
        return Err(PyValueError::new_err("timeout must not be negative"));
    }
    // Beyond what the clock can count, never is close enough.
    let span = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    Ok(Instant::now().checked_add(span))
}

/// The longest sleep that a signal may fail to end, if it comes just before. Long enough that most
/// answers come within it, and short enough for whoever pressed Ctrl-C.
const NAP: Duration = Duration::from_millis(50);

/// Runs `attempt` without the GIL until it needs no more waiting: first spinning, then asleep, with
/// Python's signal handlers run in between.
pub fn patiently<T: Send>(
    py: Python<'_>,
    until: Option<Instant>,
    mut attempt: impl FnMut(Patience<'_>) -> Result<T, Error> + Send,
) -> PyResult<T> {
    match py.detach(|| attempt(Patience::Spin)) {
        Err(Error::WouldPark | Error::Interrupted) => {}
        result => return Ok(result.map_err(Raised)?),
    }
    // A gate costs two system calls, and most waits end before it is needed.
    let nap = Instant::now() + NAP;
    let mut gated = false;
    loop {
        // With nothing held back, since programs that a handler starts inherit what is.
        py.check_signals()?;
        // And once more, for signals that came before this: one that comes after it ends the sleep.
        let gate = gated.then(SignalGate::close);
        py.check_signals()?;
        let patience = Patience::Park {
            until: if gated {
                until
            } else {
                Some(until.map_or(nap, |until| until.min(nap)))
            },
            gate: gate.as_ref(),
        };
        match py.detach(|| attempt(patience)) {
            Err(Error::Interrupted) => {}
            Err(Error::TimedOut) if !gated && until.is_none_or(|until| until > nap) => gated = true,
            result => return Ok(result.map_err(Raised)?),
        }
    }
}

/// Buffers that Python lent, kept alive and in place while this is.
pub struct Parts(SmallVec<[Part; 1]>);

enum Part {
    Message(Message),
    Bytes(Py<PyBytes>),
    Buffer(PyBuffer<u8>),
}

impl<'py> FromPyObject<'_, 'py> for Parts {
    type Error = PyErr;

    /// Reads a pair of kind and plain payload, or a list of a message and the buffers beside it.
    fn extract(parts: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let mut held = SmallVec::new();
        if let Ok(pair) = parts.cast_exact::<PyTuple>() {
            held.push(Part::Message(message::encode(&pair)?));
            return Ok(Self(held));
        }
        for part in parts.try_iter()? {
            let part = part?;
            held.push(match part.cast_into::<PyBytes>() {
                Ok(bytes) => Part::Bytes(bytes.unbind()),
                Err(other) => {
                    let buffer = PyBuffer::get(&other.into_inner())?;
                    if !buffer.is_c_contiguous() {
                        return Err(PyValueError::new_err("buffers must be C-contiguous"));
                    }
                    Part::Buffer(buffer)
                }
            });
        }
        Ok(Self(held))
    }
}

impl Parts {
    /// Gives `use_body` the parts as one body, to be used without the GIL.
    pub fn with<T>(
        &self,
        py: Python<'_>,
        use_body: impl FnOnce(&Gather<'_>) -> PyResult<T>,
    ) -> PyResult<T> {
        let slices: SmallVec<[&[u8]; 4]> = self.0.iter().map(|part| part.as_slice(py)).collect();
        let gather = Gather::new(&slices)
            .ok_or_else(|| PayloadTooLarge::new_err("too many buffers in one payload"))?;
        use_body(&gather)
    }
}

impl Part {
    fn as_slice<'a>(&'a self, py: Python<'a>) -> &'a [u8] {
        match self {
            Self::Message(message) => message,
            Self::Bytes(bytes) => bytes.as_bytes(py),
            Self::Buffer(buffer) if buffer.len_bytes() == 0 => &[],
            Self::Buffer(buffer) => {
                let start = buffer.buf_ptr().cast::<u8>();
                // SAFETY: the exporter keeps `len_bytes` contiguous bytes in place while the buffer
                // is held. Python code that writes to them meanwhile gets torn data in its own
                // message, as it would with any other way of sending it.
                unsafe { std::slice::from_raw_parts(start, buffer.len_bytes()) }
            }
        }
    }
}
