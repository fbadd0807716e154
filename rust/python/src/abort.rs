//! The abort token, for Python and for native code.

use std::ffi::c_void;

use inferpool_transport::AbortToken;
use pyo3::prelude::*;

/// Set once a call, or the whole worker, should stop.
#[pyclass(frozen, name = "AbortToken", module = "inferpool._transport")]
pub struct PyAbortToken(Box<AbortToken>);

impl From<AbortToken> for PyAbortToken {
    fn from(token: AbortToken) -> Self {
        // Boxed, so that its address holds whatever becomes of the Python object's layout.
        Self(Box::new(token))
    }
}

#[pymethods]
impl PyAbortToken {
    #[pyo3(signature = (other, /))]
    fn union(&self, other: &Self) -> Self {
        self.0.union(&other.0).into()
    }

    fn is_set(&self) -> bool {
        self.0.look()
    }

    #[getter]
    fn cancelled(&self) -> bool {
        self.0.is_cancelled()
    }

    #[getter]
    fn callback(&self) -> usize {
        let poll: unsafe extern "C" fn(*mut c_void) -> bool = AbortToken::poll;
        poll as usize
    }

    #[getter]
    fn data(&self) -> usize {
        &raw const *self.0 as usize
    }
}
