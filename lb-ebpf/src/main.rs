//! The kernel programs: entries and the panic handler, no logic.

#![no_std]
#![no_main]
#![feature(core_intrinsics, asm_experimental_arch)]
#![allow(
    internal_features,
    reason = "BPF has atomic operations, but the target's `AtomicU64` does not"
)]

mod body;
mod kernel;
mod maps;

use aya_ebpf::{
    bindings::{__sk_buff, xdp_action, xdp_md},
    helpers::{bpf_redirect, bpf_redirect_neigh},
    macros::{classifier, raw_tracepoint, xdp},
    programs::{RawTracePointContext, TcContext, XdpContext},
};
use lb_common::{counter::DropReason, maps::earlier};
use lb_ebpf::{packet::Packet, pipeline, tables::Tables as _, verdict::Action};

use body::{Skb, Xdp};
use kernel::Kernel;

/// "Not decided here": other programs and the stack go on (TC_ACT_UNSPEC, TCX_NEXT).
const TC_NEXT: i32 = -1;
/// Up the stack (TC_ACT_OK, TCX_PASS).
const TC_OK: i32 = 0;
/// Dropped (TC_ACT_SHOT, TCX_DROP).
const TC_DROP: i32 = 2;
/// `bpf_redirect` to the receiving side of a device.
const INGRESS: u64 = 1;

/// The fast path on a NIC: flows between remote parties. It reads headers only, which lie in a frame's first buffer.
#[xdp(frags)]
pub fn weir_xdp(ctx: XdpContext) -> u32 {
    xdp(ctx.ctx)
}

/// The complete path, for packets that come in by a NIC, a bridge or `lo`.
#[classifier]
pub fn weir_tc_ingress(ctx: TcContext) -> i32 {
    tc::<false>(ctx.skb.skb)
}

/// The complete path, for packets that this node's processes send.
#[classifier]
pub fn weir_tc_egress(ctx: TcContext) -> i32 {
    tc::<true>(ctx.skb.skb)
}

/// Never attached: the agent runs it to read the flow clock.
#[xdp]
pub fn weir_sweep(_ctx: XdpContext) -> u32 {
    Kernel.now()
}

/// Never attached: the agent runs it every few seconds, and the programs know that next hops are kept up to date.
#[xdp]
pub fn weir_heartbeat(_ctx: XdpContext) -> u32 {
    kernel::heartbeat()
}

/// Counts the frames that the kernel could not redirect: it says so after the verdict, and to tracepoints alone. It
/// sees those of all XDP programs of the machine.
#[raw_tracepoint(tracepoint = "xdp_redirect_err")]
pub fn weir_redirect_err(_ctx: RawTracePointContext) -> i32 {
    Kernel.count_drop(DropReason::RedirectFailed as u32);
    0
}

#[inline(always)]
fn xdp(ctx: *mut xdp_md) -> u32 {
    let mut packet = Xdp::new(ctx);
    match pipeline::process(&mut packet, Kernel).action() {
        Action::Transmit => xdp_action::XDP_TX,
        // SAFETY: a helper without memory arguments.
        Action::Redirect(ifindex) => unsafe { bpf_redirect(ifindex, 0) as u32 },
        Action::Drop(..) => xdp_action::XDP_DROP,
        _ => xdp_action::XDP_PASS,
    }
}

#[inline(always)]
fn tc<const EGRESS: bool>(skb: *mut __sk_buff) -> i32 {
    let mut packet = Skb::<EGRESS>::new(skb);
    if packet.is_done() || !packet.pull_headers() {
        return TC_NEXT;
    }
    let action = pipeline::process(&mut packet, Kernel).action();
    match action {
        Action::Pass | Action::ToTc => return TC_NEXT,
        Action::Earlier => {
            let index = if EGRESS { earlier::EGRESS } else { earlier::INGRESS };
            // SAFETY: nothing here has to be dropped. Where there is no such program, the packet goes on as a foreign one.
            unsafe { maps::EARLIER.tail_call(&TcContext::new(skb), index) };
            return TC_NEXT;
        }
        Action::Drop(..) => return TC_DROP,
        Action::ToNode => return TC_OK,
        Action::Again => {
            packet.count_round();
            // SAFETY: a helper without memory arguments.
            return unsafe { bpf_redirect(packet.device(), INGRESS) as i32 };
        }
        _ => {
            packet.set_done();
            packet.drop_priority_tag();
        }
    }
    // SAFETY: helpers without memory arguments (a null parameter block of length 0).
    unsafe {
        match action {
            Action::Transmit if EGRESS => TC_OK,
            Action::Transmit => bpf_redirect(packet.device(), 0) as i32,
            Action::Redirect(ifindex) => bpf_redirect(ifindex, 0) as i32,
            Action::Neighbour(ifindex) => bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32,
            Action::ToNodeByLoopback => bpf_redirect(kernel::loopback(), INGRESS) as i32,
            _ => TC_NEXT,
        }
    }
}

/// The licence that the kernel asks for before it lends GPL-only helpers.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier refuses a program that could loop.
    loop {}
}
