//! What a worker process gives up before it opens a model. Linux only.
//!
//! [`restrain`] is for every worker. [`confine`] is for one that parses files of unknown origin: it
//! may read what it was told, write its log, and reach no network and no other process. Both want a
//! process of one thread: Landlock restricts the calling thread and those that it starts later.
//!
//! What is reported as achieved was tried, not assumed.

mod calls;
mod files;

use std::fs::{File, read_dir};
use std::io;
use std::path::PathBuf;

use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs,
};

/// Descriptors that a worker may have open, if it may have so many at all.
const OPEN_FILES: u64 = 4096;

/// What root keeps of its powers: to read a model that is another user's, and to hold it in memory.
const KEPT: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::IPC_LOCK);

/// Paths that a confined process may open, beside those that every program needs. What does not
/// exist is passed over.
#[derive(Debug, Default)]
pub struct Openings {
    /// Files, and folders with all that they hold, to read.
    pub readable: Vec<PathBuf>,
    /// Files to read and write.
    pub writable: Vec<PathBuf>,
}

/// What [`confine`] achieved.
#[derive(Debug, PartialEq, Eq)]
pub struct Confinement {
    /// Opening a path that was not allowed fails.
    pub files: bool,
    /// Making a socket fails, and with it every other forbidden system call.
    pub calls: bool,
    /// Why something is missing; empty when nothing is.
    pub missing: Vec<String>,
}

/// Gives up new privileges, core dumps (they would hold prompts) and descriptors without bound.
pub fn restrain() -> io::Result<()> {
    set_no_new_privs(true)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    let inherited = getrlimit(Resource::Nofile);
    let bounded = |limit: Option<u64>| Some(limit.map_or(OPEN_FILES, |most| most.min(OPEN_FILES)));
    let bounded = Rlimit {
        current: bounded(inherited.current),
        maximum: bounded(inherited.maximum),
    };
    Ok(setrlimit(Resource::Nofile, bounded)?)
}

/// Gives up files, network and other processes, as far as the kernel can take them away.
pub fn confine(openings: &Openings) -> Confinement {
    let mut missing = Vec::new();
    // Other threads would stay free to open files, and to hand them to this one.
    if let Err(problem) = be_alone().and_then(|()| restrict_files(openings)) {
        missing.push(format!("Landlock: {problem}"));
    }
    let files = missing.is_empty();
    if let Err(problem) = restrict_calls() {
        missing.push(format!("seccomp: {problem}"));
    }
    let calls = missing.len() == usize::from(!files);
    Confinement {
        files,
        calls,
        missing,
    }
}

fn be_alone() -> Result<(), String> {
    let threads = read_dir("/proc/self/task").map(Iterator::count);
    match threads.map_err(|error| format!("the threads can't be counted: {error}"))? {
        1 => Ok(()),
        count => Err(format!("the process has {count} threads already")),
    }
}

fn restrict_files(openings: &Openings) -> Result<(), String> {
    files::restrict(openings).map_err(|error| error.to_string())?;
    require_denied(File::open("/"), "opening the root folder")
}

fn restrict_calls() -> Result<(), String> {
    // Root could freeze the file system of its model through a descriptor to read, and rename the host.
    give_up_powers().map_err(|error| error.to_string())?;
    calls::restrict().map_err(|error| error.to_string())?;
    require_denied(
        socket(AddressFamily::UNIX, SocketType::STREAM, None),
        "making a socket",
    )
}

fn give_up_powers() -> io::Result<()> {
    let own = capabilities(None)?;
    let rest = CapabilitySets {
        effective: own.effective & KEPT,
        permitted: own.permitted & KEPT,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, rest)?)
}

fn require_denied<T, E: Into<io::Error>>(attempt: Result<T, E>, what: &str) -> Result<(), String> {
    match attempt.map_err(Into::into) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(format!("{what} failed otherwise than it should: {error}")),
        Ok(_) => Err(format!("{what} is not denied")),
    }
}
