//! The packet's kernel bodies: the one module with raw packet pointers.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_FIB_LOOKUP_OUTPUT, xdp_md},
    helpers::{
        bpf_csum_update, bpf_fib_lookup, bpf_l4_csum_replace, bpf_skb_change_head, bpf_skb_change_tail,
        bpf_skb_pull_data, bpf_skb_vlan_pop, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len,
    },
};
use lb_common::addr::{Addr16, Hop};
use lb_ebpf::{
    csum,
    packet::{Header, Hook, MAX_OFFSET, Packet},
};

use crate::{kernel, maps::FIB};

/// Bytes of a frame that hold all headers that are ever read.
const HEADERS: u32 = 256;

/// Address families as `bpf_fib_lookup` takes them: in the first byte.
const AF_INET: u32 = u32::from_ne_bytes([2, 0, 0, 0]);
/// See [`AF_INET`].
const AF_INET6: u32 = u32::from_ne_bytes([10, 0, 0, 0]);
/// `pkt_type` of a frame that is addressed to the device it came by.
const PACKET_HOST: u32 = 0;
/// The VLAN's id in a tag.
const VLAN_ID: u32 = 0xfff;

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
    fn is_for_device(&self) -> bool {
        true
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
    fn next_hop(&self, to: &Addr16, v6: bool, ifindex: u32) -> Option<(Hop, Hop)> {
        let request = FIB.get_ptr_mut(0)?;
        // SAFETY: this CPU's own value, and the kernel's context of this program run.
        let words = unsafe {
            let words = &mut *request;
            *words = [0; 16];
            words[0] = if v6 { AF_INET6 } else { AF_INET };
            words[2] = ifindex;
            if v6 {
                (words[8], words[9], words[10], words[11]) = (to.0[0], to.0[1], to.0[2], to.0[3]);
            } else {
                words[8] = to.0[3];
            }
            if bpf_fib_lookup(self.ctx.cast(), request.cast(), 64, BPF_FIB_LOOKUP_OUTPUT) != 0 {
                return None;
            }
            &*request
        };
        if words[2] != ifindex {
            return None;
        }
        // struct bpf_fib_lookup: the source MAC is in bytes 52 to 57, the destination MAC in the last six.
        let to = Hop::from_words(words[14] >> 16 | words[15] << 16, (words[15] >> 16) as u16, 0);
        Some((to, Hop::from_words(words[13], words[14] as u16, 0)))
    }

    #[inline(always)]
    fn length(&self) -> usize {
        0
    }

    #[inline(always)]
    fn rounds(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn adjust_sum(&mut self, _delta: u32) {}

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
        unsafe { (*self.skb).mark & kernel::mark() == kernel::mark() }
    }

    /// See [`Skb::is_done`].
    #[inline(always)]
    pub fn set_done(&mut self) {
        // SAFETY: the kernel's context of this program run.
        unsafe { (*self.skb).mark |= kernel::mark() }
    }

    /// Id of the VLAN tag that the kernel keeps beside the frame. 0 tells a priority alone: the frame is the device's own.
    #[inline(always)]
    fn vlan(&self) -> Option<u32> {
        // SAFETY: the kernel's context of this program run.
        unsafe { ((*self.skb).vlan_present != 0).then(|| (*self.skb).vlan_tci & VLAN_ID) }
    }

    /// Counts one more round, for the next program that meets the frame.
    #[inline(always)]
    pub fn count_round(&mut self) {
        // SAFETY: the kernel's context of this program run.
        unsafe { (*self.skb).tc_index += 1 }
    }

    /// Takes off the tag that tells a priority alone, which another link's devices would not expect.
    #[inline(always)]
    pub fn drop_priority_tag(&mut self) {
        if self.vlan().is_some() {
            // SAFETY: the kernel's context of this program run. Nothing of the frame is referred to afterwards.
            let _ = unsafe { bpf_skb_vlan_pop(self.skb) };
        }
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
    fn is_for_device(&self) -> bool {
        // SAFETY: the kernel's context of this program run.
        let (kind, vlan) = unsafe { ((*self.skb).pkt_type, self.vlan()) };
        (EGRESS || kind == PACKET_HOST) && vlan.is_none_or(|id| id == 0)
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
    fn next_hop(&self, _to: &Addr16, _v6: bool, _ifindex: u32) -> Option<(Hop, Hop)> {
        None
    }

    #[inline(always)]
    fn length(&self) -> usize {
        // SAFETY: the kernel's context of this program run.
        unsafe { (*self.skb).len as usize }
    }

    #[inline(always)]
    fn rounds(&self) -> u32 {
        // SAFETY: the kernel's context of this program run.
        unsafe { (*self.skb).tc_index }
    }

    #[inline(always)]
    fn adjust_sum(&mut self, delta: u32) {
        // SAFETY: the kernel's context of this program run. It refuses where no NIC has told a sum.
        let _ = unsafe { bpf_csum_update(self.skb, csum::fold(delta) as u32) };
    }

    #[inline(always)]
    fn pull(&mut self, length: usize) -> bool {
        // SAFETY: the kernel's context of this program run.
        unsafe { bpf_skb_pull_data(self.skb, length as u32) == 0 }
    }

    #[inline(always)]
    fn fix_checksum(&mut self, offset: usize, pseudo: u16, other: u16, zero_is_none: bool) -> bool {
        if zero_is_none && self.get::<u16>(offset).is_some_and(|check| *check == 0) {
            // No checksum makes up for what has changed.
            self.adjust_sum(other as u32);
            return true;
        }
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
