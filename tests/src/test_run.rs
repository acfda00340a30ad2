//! `BPF_PROG_TEST_RUN` of a TC program with what the loader's own call lacks: the sum of the whole packet as a NIC tells it.

use std::{
    os::fd::{AsRawFd as _, BorrowedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, bail};

/// `bpf(2)` command.
const BPF_PROG_TEST_RUN: libc::c_int = 10;
/// The frame comes with CHECKSUM_COMPLETE, and the kernel answers EBADMSG if the sum is wrong afterwards (Linux 6.16).
const CHECKSUM_COMPLETE: u32 = 1 << 2;
/// Whether the kernel knows that flag.
static KNOWN: AtomicBool = AtomicBool::new(true);

/// `union bpf_attr` of the command.
#[repr(C)]
struct Attributes {
    program: u32,
    result: u32,
    input_size: u32,
    output_size: u32,
    input: u64,
    output: u64,
    repeat: u32,
    duration: u32,
    context_size: u32,
    context_out_size: u32,
    context: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    _pad: u32,
}

/// Runs a TC program on a frame; what it returned and the length of the frame afterwards.
pub fn test_run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    out: &mut [u8],
    context: &[u8],
    sums: bool,
) -> Result<(i32, usize)> {
    let sums = sums && KNOWN.load(Ordering::Relaxed);
    let mut attributes = Attributes {
        program: program.as_raw_fd().cast_unsigned(),
        result: 0,
        input_size: frame.len() as u32,
        output_size: out.len() as u32,
        input: frame.as_ptr() as u64,
        output: out.as_mut_ptr() as u64,
        repeat: 1,
        duration: 0,
        context_size: context.len() as u32,
        context_out_size: 0,
        context: context.as_ptr() as u64,
        context_out: 0,
        flags: if sums { CHECKSUM_COMPLETE } else { 0 },
        cpu: 0,
        batch: 0,
        _pad: 0,
    };
    // SAFETY: the kernel reads and writes the attributes and the buffers that they name, all of which outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_TEST_RUN,
            &raw mut attributes,
            size_of::<Attributes>(),
        )
    };
    if done == 0 {
        return Ok((attributes.result as i32, attributes.output_size as usize));
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EBADMSG) if sums => {
            bail!("the sum of the whole packet (CHECKSUM_COMPLETE) is wrong afterwards")
        }
        Some(libc::EINVAL) if sums => {
            // An older kernel, if the same frame runs without.
            let result = test_run(program, frame, out, context, false)?;
            KNOWN.store(false, Ordering::Relaxed);
            Ok(result)
        }
        _ => Err(error).context("BPF_PROG_TEST_RUN"),
    }
}

/// The flow clock now: the low 32 bits of the kernel's jiffies, which `/proc/timer_list` tells to root.
pub fn jiffies() -> Result<u32> {
    let text = std::fs::read_to_string("/proc/timer_list").context("/proc/timer_list")?;
    let Some(line) = text.lines().find_map(|l| l.trim().strip_prefix("jiffies:")) else {
        bail!("/proc/timer_list tells no jiffies");
    };
    Ok(line.trim().parse::<u64>()? as u32)
}
