//! Which files may be opened: Landlock.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use thiserror::Error;

use crate::Openings;

/// The newest one that this was tried on. What an older kernel lacks of it, system call filters
/// cover, see `calls`; no Landlock at all is an error.
const TRIED: ABI = ABI::V7;

/// What libc, the loader, OpenMP and the interpreter read wherever they run.
const SYSTEM: &[&str] = &[
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/nix/store",
    "/gnu/store",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/random",
    "/dev/urandom",
    "/dev/zero",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/sys/fs/cgroup",
];
const SINK: &str = "/dev/null";

#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Rules(#[from] RulesetError),
    #[error("the kernel does not have it, or has it turned off")]
    Unavailable,
}

/// Restricts this thread, and all that it starts, to `openings`.
pub(crate) fn restrict(openings: &Openings) -> Result<(), Error> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = BitFlags::from(AccessFs::ReadFile) | AccessFs::WriteFile | AccessFs::Truncate;
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(TRIED))?
        .handle_access(AccessNet::from_all(TRIED))?
        .scope(Scope::from_all(TRIED))?
        .create()?
        .add_rules(path_beneath_rules(SYSTEM, read))?
        .add_rules(path_beneath_rules(&openings.readable, read))?
        .add_rules(path_beneath_rules(&openings.writable, write))?
        .add_rules(path_beneath_rules([SINK], write))?
        .restrict_self()?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(Error::Unavailable),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}
