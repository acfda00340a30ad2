//! Kernel programs of `cargo xtask bench prog`, in an object of their own that nothing ships.
//!
//! The kernel's `repeat` feeds a program the packet that the run before has rewritten. So the program that is repeated
//! is one of these: it writes the original frame, of another flow each time, and then tail-calls the body to measure
//! or, for the cost of all that, an empty program.

#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, ProgramArray},
    helpers::bpf_skb_pull_data,
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use lb_ebpf::template::{FRAME, Template, address_word, port};

/// The harness writes the frame, the programs count their runs.
#[btf_map]
pub static TEMPLATE: Array<Template, 1> = Array::new();

/// XDP programs to measure; the harness fills it.
#[btf_map]
pub static XDP_PROGRAMS: ProgramArray<2> = ProgramArray::new();

/// TC programs to measure; the harness fills it.
#[btf_map]
pub static TC_PROGRAMS: ProgramArray<2> = ProgramArray::new();

/// TC_ACT_UNSPEC.
const TC_NEXT: i32 = -1;

/// Restores the frame and runs a program of [`XDP_PROGRAMS`].
#[xdp(frags)]
pub fn bench_xdp(ctx: XdpContext) -> u32 {
    // SAFETY: the kernel's context of this program run.
    let bounds = unsafe { (&raw const (*ctx.ctx).data, &raw const (*ctx.ctx).data_end) };
    if let Some(program) = restore(bounds) {
        // SAFETY: the context is this run's own, and there is nothing to drop.
        unsafe { XDP_PROGRAMS.tail_call(&ctx, program) }
    }
    xdp_action::XDP_ABORTED
}

/// What a run costs without a body.
#[xdp(frags)]
pub fn empty_xdp(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Restores the frame and runs a program of [`TC_PROGRAMS`].
#[classifier]
pub fn bench_tc(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the kernel's context of this program run.
    let bounds = unsafe {
        (*skb).mark = 0;
        bpf_skb_pull_data(skb, FRAME as u32);
        (&raw const (*skb).data, &raw const (*skb).data_end)
    };
    if let Some(program) = restore(bounds) {
        // SAFETY: the context is this run's own, and there is nothing to drop.
        unsafe { TC_PROGRAMS.tail_call(&ctx, program) }
    }
    TC_NEXT
}

/// What a run costs without a body.
#[classifier]
pub fn empty_tc(_ctx: TcContext) -> i32 {
    TC_NEXT
}

/// Writes the frame of the next flow; the program to run then.
#[inline(always)]
fn restore(bounds: (*const u32, *const u32)) -> Option<u32> {
    let template = TEMPLATE.get_ptr_mut(0)?;
    // SAFETY: one run at a time uses the map, by the harness's construction.
    let template = unsafe { &mut *template };
    let flow = template.next();
    // SAFETY: by the caller, fields of the kernel's context of this program run.
    let (data, end) = unsafe {
        (
            bounds.0.read_volatile() as usize,
            bounds.1.read_volatile() as usize,
        )
    };
    if data + FRAME > end {
        return None;
    }
    for (i, word) in template.frame.iter().enumerate() {
        // SAFETY: inside the frame, by the check above.
        unsafe { *((data + i * 8) as *mut u64) = *word }
    }
    put(data, end, template.address_at, address_word(flow))?;
    put(data, end, template.port_at, port(flow))?;
    Some(template.program)
}

/// Writes a word in network byte order.
#[inline(always)]
fn put(data: usize, end: usize, offset: u32, value: u16) -> Option<()> {
    let at = data + (offset as usize & 127);
    if at + 2 > end {
        return None;
    }
    // SAFETY: inside the frame, by the check above.
    unsafe { *(at as *mut u16) = value.to_be() }
    Some(())
}

/// The licence that the kernel asks for.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier refuses a program that could loop.
    loop {}
}
