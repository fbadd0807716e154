//! Which system calls fail: seccomp.
//!
//! A list of what is denied, not of what is allowed: the interpreter, numpy and OpenMP change too
//! much for the latter. Landlock rules over what is opened by path; here is what it does not know, or
//! knows on newer kernels only.

use std::collections::BTreeMap;
use std::process::id;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

const EPERM: SeccompAction = SeccompAction::Errno(libc::EPERM as u32);
const ENOSYS: SeccompAction = SeccompAction::Errno(libc::ENOSYS as u32);

// Newer than what the crate libc knows; the same number on every architecture.
const SYS_SETXATTRAT: c_long = 463;
const SYS_REMOVEXATTRAT: c_long = 466;
const SYS_OPEN_TREE_ATTR: c_long = 467;
const SYS_FILE_SETATTR: c_long = 469;

/// These have the kernel send a signal of one's choice to any process of the same user, when
/// something happens to a descriptor: `F_SETOWN`, `F_SETSIG`, `F_SETOWN_EX`.
const SIGNALLING_FCNTL: [u64; 3] = [8, 10, 15];
/// The same for sockets: `FIOSETOWN`, `SIOCSPGRP`. And those that change a file's flags, for which
/// it need not be opened to be written: `FS_IOC_SETFLAGS` and `FS_IOC_SETVERSION`, each of two sizes,
/// `FS_IOC_FSSETXATTR`, `FAT_IOCTL_SET_ATTRIBUTES`.
const DENIED_IOCTL: [u64; 8] = [
    0x8901,
    0x8902,
    0x4008_6602,
    0x4004_6602,
    0x4008_7602,
    0x4004_7602,
    0x401c_5820,
    0x4004_7211,
];

/// Denied whatever their arguments.
const DENIED: &[c_long] = &[
    // The network, and local sockets. What the worker inherits is connected.
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    // Other programs.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setattr,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    // Memory and queues that have names beside the file system.
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_msgget,
    libc::SYS_msgsnd,
    libc::SYS_msgrcv,
    libc::SYS_msgctl,
    libc::SYS_semget,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_semctl,
    libc::SYS_mq_open,
    libc::SYS_mq_unlink,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Properties of files, which Landlock leaves alone.
    libc::SYS_truncate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchmodat2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    SYS_SETXATTRAT,
    SYS_REMOVEXATTRAT,
    SYS_FILE_SETATTR,
    libc::SYS_utimensat,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_inotify_init1,
    libc::SYS_fanotify_init,
    // Parts of the kernel with a large surface, which no worker has a use for.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    SYS_OPEN_TREE_ATTR,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_personality,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
];

/// Denied too, where the architecture still has them beside their successors.
#[cfg(target_arch = "x86_64")]
const DENIED_OLD: &[c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_inotify_init,
    libc::SYS_modify_ldt,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_kexec_file_load,
];
#[cfg(not(target_arch = "x86_64"))]
const DENIED_OLD: &[c_long] = &[];

/// Restricts every thread of this process, and all that they start.
pub(crate) fn restrict() -> Result<(), seccompiler::Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    for (rules, answer) in [(denied(id())?, EPERM), (absent(), ENOSYS)] {
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, answer, arch)?;
        apply_filter_all_threads(&BpfProgram::try_from(filter)?)?;
    }
    #[cfg(target_arch = "x86_64")]
    apply_filter_all_threads(&without_x32())?;
    Ok(())
}

fn denied(own: u32) -> Result<Rules, BackendError> {
    let mut rules: Rules = [DENIED, DENIED_OLD]
        .concat()
        .into_iter()
        .map(|call| (call, Vec::new()))
        .collect();
    let own = u64::from(own);
    let process =
        |operator, value| SeccompCondition::new(0, SeccompCmpArgLen::Dword, operator, value);
    let other = SeccompRule::new(vec![process(SeccompCmpOp::Ne, own)?])?;
    rules.insert(libc::SYS_kill, vec![other.clone()]);
    rules.insert(libc::SYS_tgkill, vec![other]);
    // The host's limits are the same user's; 0 is the caller.
    let other = [
        process(SeccompCmpOp::Ne, own)?,
        process(SeccompCmpOp::Ne, 0)?,
    ];
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(other.into())?]);
    // Threads yes, processes no: they would outlive this one.
    let thread = libc::CLONE_THREAD as u64;
    let no_thread = SeccompCmpOp::MaskedEq(thread);
    let flags = SeccompCondition::new(0, SeccompCmpArgLen::Qword, no_thread, 0)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![flags])?]);
    // An inherited datagram socket could be used to write to any other.
    let address = SeccompCondition::new(4, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, 0)?;
    rules.insert(libc::SYS_sendto, vec![SeccompRule::new(vec![address])?]);
    rules.insert(libc::SYS_fcntl, commands(&SIGNALLING_FCNTL)?);
    rules.insert(libc::SYS_ioctl, commands(&DENIED_IOCTL)?);
    rules.insert(libc::SYS_openat, modes(2)?);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, modes(1)?);
    Ok(rules)
}

/// Rules for what opens a file, whose flags are in this argument. Landlock asks for no right where a
/// file is opened neither to be read nor to be written (mode 3), which is enough for `ioctl`; and
/// before Linux 6.2 for none to cut a file off that is opened so, or only to be read.
fn modes(argument: u8) -> Result<Vec<SeccompRule>, BackendError> {
    let neither = libc::O_ACCMODE as u64;
    let cut = libc::O_TRUNC as u64;
    let rule = |mask, flags| {
        let masked = SeccompCmpOp::MaskedEq(mask);
        let is = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, masked, flags)?;
        SeccompRule::new(vec![is])
    };
    // Reading is mode 0.
    Ok(vec![rule(neither, neither)?, rule(neither | cut, cut)?])
}

/// A rule for each of these second arguments.
fn commands(commands: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |&command| {
        let is = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, command)?;
        SeccompRule::new(vec![is])
    };
    commands.iter().map(rule).collect()
}

/// Their flags are in memory, out of a filter's sight; libc then takes `clone` and `openat`.
fn absent() -> Rules {
    [libc::SYS_clone3, libc::SYS_openat2]
        .map(|call| (call, Vec::new()))
        .into()
}

/// The same system calls have other numbers there, and pass as the same architecture.
#[cfg(target_arch = "x86_64")]
fn without_x32() -> BpfProgram {
    const X32_SYSCALL_BIT: u32 = 0x4000_0000;
    let statement = |code, jt, jf, k| seccompiler::sock_filter { code, jt, jf, k };
    vec![
        statement((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, 0),
        statement(
            (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16,
            0,
            1,
            X32_SYSCALL_BIT,
        ),
        statement((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, ENOSYS.into()),
        statement(
            (libc::BPF_RET | libc::BPF_K) as u16,
            0,
            0,
            SeccompAction::Allow.into(),
        ),
    ]
}
