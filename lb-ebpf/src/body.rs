//! The packet's kernel bodies: the one module with raw packet pointers.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, xdp_md},
    helpers::{
        bpf_l4_csum_replace, bpf_skb_change_head, bpf_skb_change_tail, bpf_skb_pull_data,
        bpf_xdp_adjust_tail, bpf_xdp_get_buff_len,
    },
};
use lb_ebpf::{
    csum,
    packet::{Header, Hook, MAX_OFFSET, Packet},
};

/// Bytes of a frame that hold all headers that are ever read.
const HEADERS: u32 = 256;
/// The mark of packets that a program of ours has sent on, so that the next one on their way leaves them alone.
const DONE: u32 = 0x0800_0000;

/// A frame at XDP.
pub struct Xdp {
    ctx: *mut xdp_md,
}

/// A frame at TC.
pub struct Skb<const EGRESS: bool> {
    skb: *mut __sk_buff,
}

/// The frame's bounds, read anew each time: kept in registers the compiler would widen them by an instruction that the
/// verifier takes for arithmetic on a pointer.
///
/// # Safety
/// Both point to the fields of the kernel's context.
#[inline(always)]
unsafe fn bounds(data: *const u32, end: *const u32) -> (usize, usize) {
    // SAFETY: by the contract.
    unsafe { (data.read_volatile() as usize, end.read_volatile() as usize) }
}

/// Bounds check of a piece of the frame, in the shape that the verifier follows.
#[inline(always)]
fn piece<H>(data: usize, end: usize, offset: usize) -> Option<*mut H> {
    // Changes nothing: an offset is less than 4 × MAX_OFFSET, being the end of a piece that began below it. But where
    // the compiler puts it on the stack, the verifier of kernel 6.1 would forget what it has compared it with.
    let offset = offset & (4 * MAX_OFFSET - 1);
    if offset > MAX_OFFSET {
        return None;
    }
    let start = data + offset;
    if start + size_of::<H>() > end {
        None
    } else {
        Some(start as *mut H)
    }
}

// === impl Xdp ===

impl Xdp {
    #[inline(always)]
    pub const fn new(ctx: *mut xdp_md) -> Self {
        Self { ctx }
    }

    #[inline(always)]
    fn at<H: Header>(&self, offset: usize) -> Option<*mut H> {
        // SAFETY: the kernel's context of this program run.
        let (data, end) = unsafe { bounds(&raw const (*self.ctx).data, &raw const (*self.ctx).data_end) };
        piece(data, end, offset)
    }
}

impl Packet for Xdp {
    const HOOK: Hook = Hook::Xdp;

    #[inline(always)]
    fn get<H: Header>(&self, offset: usize) -> Option<&H> {
        // SAFETY: inside the frame (checked), any bytes are an `H`. Words in a frame may be misaligned, which every
        // machine that BPF runs on and the verifier accept.
        self.at(offset).map(|h| unsafe { &*h })
    }

    #[inline(always)]
    fn get_mut<H: Header>(&mut self, offset: usize) -> Option<&mut H> {
        // SAFETY: as in `get`; the frame belongs to this run, and `&mut self` to the caller.
        self.at(offset).map(|h| unsafe { &mut *h })
    }

    #[inline(always)]
    fn segment_size(&self) -> usize {
        0
    }

    #[inline(always)]
    fn is_multi_buffer(&self) -> bool {
        // SAFETY: the kernel's context of this program run.
        unsafe {
            let (data, end) = bounds(&raw const (*self.ctx).data, &raw const (*self.ctx).data_end);
            bpf_xdp_get_buff_len(self.ctx) != end.wrapping_sub(data) as u64
        }
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        // SAFETY: the kernel's context of this program run.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn pull(&mut self, _length: usize) -> bool {
        true
    }

    #[inline(always)]
    fn fix_checksum(&mut self, offset: usize, pseudo: u16, other: u16, zero_is_none: bool) -> bool {
        let Some(check) = self.get_mut::<u16>(offset) else {
            return false;
        };
        if zero_is_none && *check == 0 {
            return true;
        }
        let new = csum::apply(*check, pseudo as u32 + other as u32);
        *check = if zero_is_none && new == 0 { 0xffff } else { new };
        true
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> bool {
        // SAFETY: the kernel's context of this program run.
        unsafe {
            let delta = length as i32 - bpf_xdp_get_buff_len(self.ctx) as i32;
            bpf_xdp_adjust_tail(self.ctx, delta) == 0
        }
    }

    #[inline(always)]
    fn grow_head(&mut self, _bytes: usize) -> bool {
        false
    }
}

// === impl Skb ===

impl<const EGRESS: bool> Skb<EGRESS> {
    #[inline(always)]
    pub const fn new(skb: *mut __sk_buff) -> Self {
        Self { skb }
    }

    /// Whether a program of ours has sent this packet on already.
    #[inline(always)]
    pub fn is_done(&self) -> bool {
        // SAFETY: the kernel's context of this program run.
        unsafe { (*self.skb).mark & DONE != 0 }
    }

    /// See [`Skb::is_done`].
    #[inline(always)]
    pub fn set_done(&mut self) {
        // SAFETY: the kernel's context of this program run.
        unsafe { (*self.skb).mark |= DONE }
    }

    /// Makes the headers readable: a frame's bytes may lie in pages that programs cannot see.
    #[inline(always)]
    pub fn pull_headers(&mut self) -> bool {
        // SAFETY: the kernel's context of this program run.
        let length = unsafe { (*self.skb).len };
        self.at::<u32>(HEADERS as usize).is_some()
            || self.pull(if length < HEADERS { length } else { HEADERS } as usize)
    }

    #[inline(always)]
    fn at<H: Header>(&self, offset: usize) -> Option<*mut H> {
        // SAFETY: the kernel's context of this program run.
        let (data, end) = unsafe { bounds(&raw const (*self.skb).data, &raw const (*self.skb).data_end) };
        piece(data, end, offset)
    }
}

impl<const EGRESS: bool> Packet for Skb<EGRESS> {
    const HOOK: Hook = if EGRESS { Hook::Egress } else { Hook::Ingress };

    #[inline(always)]
    fn get<H: Header>(&self, offset: usize) -> Option<&H> {
        // SAFETY: as for `Xdp`.
        self.at(offset).map(|h| unsafe { &*h })
    }

    #[inline(always)]
    fn get_mut<H: Header>(&mut self, offset: usize) -> Option<&mut H> {
        // SAFETY: as for `Xdp`; the kernel unshares a frame before a program that writes to it runs.
        self.at(offset).map(|h| unsafe { &mut *h })
    }

    #[inline(always)]
    fn segment_size(&self) -> usize {
        // SAFETY: the kernel's context of this program run.
        unsafe { (*self.skb).gso_size as usize }
    }

    #[inline(always)]
    fn device(&self) -> u32 {
        // SAFETY: the kernel's context of this program run. At egress `ifindex` is the device the packet leaves by.
        unsafe {
            if EGRESS {
                (*self.skb).ifindex
            } else {
                (*self.skb).ingress_ifindex
            }
        }
    }

    #[inline(always)]
    fn pull(&mut self, length: usize) -> bool {
        // SAFETY: the kernel's context of this program run.
        unsafe { bpf_skb_pull_data(self.skb, length as u32) == 0 }
    }

    #[inline(always)]
    fn fix_checksum(&mut self, offset: usize, pseudo: u16, other: u16, zero_is_none: bool) -> bool {
        let mangled = if zero_is_none {
            BPF_F_MARK_MANGLED_0 as u64
        } else {
            0
        };
        // SAFETY: the kernel's context of this program run; a size of 0 says that `to` is a difference.
        unsafe {
            (pseudo == 0
                || bpf_l4_csum_replace(
                    self.skb,
                    offset as u32,
                    0,
                    pseudo as u64,
                    BPF_F_PSEUDO_HDR as u64 | mangled,
                ) == 0)
                && (other == 0 || bpf_l4_csum_replace(self.skb, offset as u32, 0, other as u64, mangled) == 0)
        }
    }

    #[inline(always)]
    fn truncate(&mut self, length: usize) -> bool {
        // SAFETY: the kernel's context of this program run.
        unsafe { bpf_skb_change_tail(self.skb, length as u32, 0) == 0 && self.pull(length) }
    }

    #[inline(always)]
    fn grow_head(&mut self, bytes: usize) -> bool {
        // SAFETY: the kernel's context of this program run.
        unsafe { bpf_skb_change_head(self.skb, bytes as u32, 0) == 0 && self.pull_headers() }
    }
}
