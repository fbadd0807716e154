//! The module `inferpool._transport`: converts, releases the GIL, delegates.

mod abort;
mod event;
mod host;
mod message;
mod python;
mod sandbox;
mod worker;

/// Framed shared memory between a host and one worker process.
#[pyo3::pymodule]
mod _transport {
    #[pymodule_export]
    use crate::abort::PyAbortToken;
    #[pymodule_export]
    use crate::event::{PyBody, PyEvent, PyProgress};
    #[pymodule_export]
    use crate::host::{PyCall, PyHostChannel, PyLoopNotifier};
    #[pymodule_export]
    use crate::sandbox::{PyConfinement, confine, restrain};
    #[pymodule_export]
    use crate::worker::{PyRequest, PyWorkerChannel};
}
