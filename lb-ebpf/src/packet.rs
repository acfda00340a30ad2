//! The packet as the core sees it. Its kernel bodies (the only raw packet pointers) are in the binary's `body`.

use lb_common::addr::{Addr16, Hop};

/// No piece of a frame that starts above this offset is ever read; tells the verifier that offsets are bounded.
pub const MAX_OFFSET: usize = 1 << 11;

/// Where a packet is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP: before the stack, remote backends only.
    Xdp,
    /// TC ingress of a NIC, a bridge or `lo`.
    Ingress,
    /// TC egress: packets of the node's own processes (and those that were forwarded already).
    Egress,
}

/// A plain piece of a frame.
///
/// # Safety
/// The type is `repr(C)`, has no padding and accepts every bit pattern.
pub unsafe trait Header: Copy + 'static {}

/// A frame, starting with its Ethernet header.
pub trait Packet {
    /// The hook, known at compile time so that each body keeps only its own code.
    const HOOK: Hook;

    /// The header at a byte offset, or `None` if the frame ends before its end.
    fn get<H: Header>(&self, offset: usize) -> Option<&H>;

    /// Like [`Packet::get`], to write.
    fn get_mut<H: Header>(&mut self, offset: usize) -> Option<&mut H>;

    /// Payload of one segment if the frame is several in one (GSO), else 0.
    fn segment_size(&self) -> usize;

    /// TC: whether the kernel takes the frame for one of this device: its MAC (ingress), and no VLAN tag, which it keeps
    /// beside the frame. XDP has to look by itself ([`crate::ingress`]).
    fn is_for_device(&self) -> bool;
    /// Whether parts of the frame lie in further buffers, where programs cannot read them.
    #[inline(always)]
    fn is_multi_buffer(&self) -> bool {
        false
    }

    /// Interface index of the device the frame is met at.
    fn device(&self) -> u32;

    /// XDP: asks the kernel for the next hop towards an address by a device: its MAC, and the MAC to send from. `None`: TC
    /// has to ask.
    fn next_hop(&self, to: &Addr16, v6: bool, ifindex: u32) -> Option<(Hop, Hop)>;

    /// Bytes of the frame, of all segments together if it is several in one. XDP: 0.
    fn length(&self) -> usize;

    /// How often the frame was sent round to wait for another (TC ingress).
    fn rounds(&self) -> u32;

    /// Changes the sum of the whole packet, if the NIC has told it, by what was changed and is in no checksum.
    fn adjust_sum(&mut self, delta: u32);

    /// Makes the first `length` bytes readable and writable. All headers must be fetched anew afterwards.
    fn pull(&mut self, length: usize) -> bool;

    /// Applies checksum differences (folded, RFC 1624) to the layer-4 checksum at `offset`.
    ///
    /// `pseudo` comes from the pseudo-header (addresses, length), `other` from the segment itself: a frame whose
    /// checksum hardware completes holds only the first. With `zero_is_none` (UDP) a zero stays and a computed zero
    /// becomes 0xffff. All headers must be fetched anew afterwards. False if the kernel refused.
    fn fix_checksum(&mut self, offset: usize, pseudo: u16, other: u16, zero_is_none: bool) -> bool;

    /// Cuts the frame to `length` bytes. All headers must be fetched anew afterwards. False if the kernel refused.
    fn truncate(&mut self, length: usize) -> bool;

    /// Puts `bytes` of undefined content in front of the frame. As [`Packet::truncate`]; TC only.
    fn grow_head(&mut self, bytes: usize) -> bool;
}
