//! A frame on the heap, as the model of the core sees one.

use lb_common::addr::{Addr16, Hop};
use lb_ebpf::{
    csum,
    packet::{Header, Hook, Packet},
};

use crate::world::mac_by_ifindex;

pub const XDP: u8 = 0;
pub const INGRESS: u8 = 1;
pub const EGRESS: u8 = 2;

/// A frame on the heap.
pub struct Frame<const HOOK: u8> {
    /// Words, so that the IP header (after two bytes of padding and the Ethernet header) is aligned as in the kernel.
    words: Vec<u64>,
    start: usize,
    end: usize,
    device: u32,
}

/// Room in front of the frame, and the two bytes that align the IP header.
const HEADROOM: usize = 128 + 2;

impl<const HOOK: u8> Frame<HOOK> {
    pub fn new(device: u32, frame: &[u8]) -> Self {
        let mut words = vec![0u64; (HEADROOM + frame.len()).div_ceil(8)];
        // SAFETY: the vector has that many bytes, and bytes need no alignment.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), words.len() * 8) };
        bytes[HEADROOM..HEADROOM + frame.len()].copy_from_slice(frame);
        Self {
            words,
            start: HEADROOM,
            end: HEADROOM + frame.len(),
            device,
        }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the vector has `words.len() * 8` initialized bytes.
        let all =
            unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast::<u8>(), self.words.len() * 8) };
        &all[self.start..self.end]
    }

    fn at<H: Header>(&self, offset: usize) -> Option<*const H> {
        let piece = self
            .bytes()
            .get(offset..offset.checked_add(size_of::<H>())?)?
            .as_ptr()
            .cast::<H>();
        assert!(piece.is_aligned(), "a header at offset {offset} is not aligned");
        Some(piece)
    }
}

impl<const HOOK: u8> Packet for Frame<HOOK> {
    const HOOK: Hook = match HOOK {
        XDP => Hook::Xdp,
        INGRESS => Hook::Ingress,
        _ => Hook::Egress,
    };

    fn get<H: Header>(&self, offset: usize) -> Option<&H> {
        // SAFETY: in bounds and aligned (`at`), and every bit pattern is an `H`.
        self.at(offset).map(|piece| unsafe { &*piece })
    }
    fn get_mut<H: Header>(&mut self, offset: usize) -> Option<&mut H> {
        self.at::<H>(offset)?;
        let start = self.start + offset;
        let base = self.words.as_mut_ptr().cast::<u8>();
        // SAFETY: in bounds and aligned (`at`), every bit pattern is an `H`, and `self` is borrowed mutably.
        Some(unsafe { &mut *base.add(start).cast::<H>() })
    }
    fn segment_size(&self) -> usize {
        0
    }
    fn is_for_device(&self) -> bool {
        HOOK != INGRESS || self.bytes().starts_with(&mac_by_ifindex(self.device))
    }
    fn device(&self) -> u32 {
        self.device
    }
    fn next_hop(&self, _to: &Addr16, _v6: bool, _ifindex: u32) -> Option<(Hop, Hop)> {
        // The rows' network has no routes.
        None
    }
    fn length(&self) -> usize {
        self.bytes().len()
    }
    fn rounds(&self) -> u32 {
        0
    }
    fn adjust_sum(&mut self, _delta: u32) {}
    fn pull(&mut self, length: usize) -> bool {
        length <= self.bytes().len()
    }
    fn fix_checksum(&mut self, offset: usize, pseudo: u16, other: u16, zero_is_none: bool) -> bool {
        let Some(check) = self.get_mut::<u16>(offset) else {
            return false;
        };
        if zero_is_none && *check == 0 {
            return true;
        }
        *check = csum::apply(*check, u32::from(pseudo) + u32::from(other));
        if zero_is_none && *check == 0 {
            *check = 0xffff;
        }
        true
    }
    fn truncate(&mut self, length: usize) -> bool {
        if length > self.bytes().len() {
            return false;
        }
        self.end = self.start + length;
        true
    }
    fn grow_head(&mut self, bytes: usize) -> bool {
        let Some(start) = self.start.checked_sub(bytes) else {
            return false;
        };
        self.start = start;
        true
    }
}
