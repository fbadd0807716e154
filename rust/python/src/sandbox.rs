//! What a worker gives up.

use std::path::PathBuf;

use inferpool_sandbox::{Confinement, Openings};
use pyo3::prelude::*;

/// What `confine` achieved.
#[pyclass(frozen, name = "Confinement", module = "inferpool._transport")]
pub struct PyConfinement(Confinement);

#[pymethods]
impl PyConfinement {
    #[getter]
    fn files(&self) -> bool {
        self.0.files
    }

    #[getter]
    fn calls(&self) -> bool {
        self.0.calls
    }

    #[getter]
    fn missing(&self) -> Vec<String> {
        self.0.missing.clone()
    }
}

/// Gives up what no worker needs.
#[pyfunction]
pub fn restrain() -> PyResult<()> {
    Ok(inferpool_sandbox::restrain()?)
}

/// Gives up files, network and other processes.
#[pyfunction]
#[pyo3(signature = (*, readable, writable))]
pub fn confine(readable: Vec<PathBuf>, writable: Vec<PathBuf>) -> PyConfinement {
    PyConfinement(inferpool_sandbox::confine(&Openings { readable, writable }))
}
