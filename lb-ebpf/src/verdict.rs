//! What becomes of a packet.

use lb_common::counter::DropReason;

/// Service id of a drop that belongs to no service.
pub const NO_SERVICE: u32 = 0xff_ffff;

/// What becomes of a packet: every path through the pipeline ends in one, and `stats::finish` counts it.
///
/// One word (kind in bits 0–7, reason in 8–15, interface or service in 32–63), because functions that are kept out
/// of line may return no more.
#[must_use = "a verdict that is not returned is a lost packet"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Verdict(u64);

/// The readable form of a [`Verdict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Not ours: on it goes, untouched.
    Pass,
    /// XDP: ours, left unmodified for the TC program.
    ToTc,
    /// Rewritten: out of the device it came in by (XDP), or on its way as it was going (TC egress).
    Transmit,
    /// Rewritten: out of this device.
    Redirect(u32),
    /// Rewritten: out of this device, the kernel's neighbour table fills in the MACs.
    Neighbour(u32),
    /// Rewritten: to a process of this node.
    ToNode,
    /// Rewritten: to a process of this node, by way of the loopback device.
    ToNodeByLoopback,
    /// To the same device's ingress once more, untouched: it waits for another packet.
    Again,
    /// Untouched and not counted: a flow of the maps before these, whose programs decide.
    Earlier,
    /// Dropped; index of the reason and service id (or [`NO_SERVICE`]).
    Drop(u32, u32),
}

/// Kind of [`Verdict::open`] and [`Verdict::replace`].
const OPEN: u64 = 8;
/// Kind of [`Verdict::CREATED`].
const CREATED: u64 = 9;
/// Kind of [`Verdict::EXISTS`].
const EXISTS: u64 = 12;
/// Bit of [`Verdict::replace`].
const REPLACES: u64 = 1 << 16;

impl Verdict {
    /// See [`Action::Pass`].
    pub const PASS: Self = Self(0);
    /// See [`Action::ToTc`].
    pub const TO_TC: Self = Self(1);
    /// See [`Action::Transmit`].
    pub const TRANSMIT: Self = Self(2);
    /// See [`Action::ToNode`].
    pub const TO_NODE: Self = Self(5);
    /// See [`Action::ToNodeByLoopback`].
    pub const TO_NODE_BY_LOOPBACK: Self = Self(6);
    /// See [`Action::Again`].
    pub const AGAIN: Self = Self(10);
    /// See [`Action::Earlier`].
    pub const EARLIER: Self = Self(11);
    /// Inside the pipeline: a flow must be made, the tuple has none.
    pub const OPEN: Self = Self(OPEN);
    /// Inside the pipeline: the flow is there, the packet is now one of a known flow.
    pub const CREATED: Self = Self(CREATED);

    /// Inside the pipeline: another CPU has just made the flow.
    pub const EXISTS: Self = Self(EXISTS);

    /// See [`Action::Redirect`].
    #[inline(always)]
    pub const fn redirect(ifindex: u32) -> Self {
        Self(3 | (ifindex as u64) << 32)
    }

    /// See [`Action::Neighbour`].
    #[inline(always)]
    pub const fn neighbour(ifindex: u32) -> Self {
        Self(4 | (ifindex as u64) << 32)
    }

    /// See [`Action::Drop`].
    #[inline(always)]
    pub const fn drop(reason: DropReason, service: u32) -> Self {
        Self(7 | (reason as u64) << 8 | (service as u64) << 32)
    }

    /// Inside the pipeline: a flow must be made in place of the tuple's old one. `attempt` counts re-steers, `avoid` is
    /// the backend that failed, or 0.
    #[inline(always)]
    pub const fn replace(attempt: u32, avoid: u32) -> Self {
        Self(OPEN | REPLACES | (attempt as u64) << 8 | (avoid as u64) << 32)
    }

    /// The raw word.
    #[inline(always)]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// From the raw word.
    #[inline(always)]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// Whether this is [`Verdict::OPEN`] or [`Verdict::replace`].
    #[inline(always)]
    pub const fn opens(self) -> bool {
        self.0 & 0xff == OPEN
    }

    /// Of one that [`opens`](Self::opens): whether the tuple has an old flow.
    #[inline(always)]
    pub const fn replaces(self) -> bool {
        self.0 & REPLACES != 0
    }

    /// Of one that [`opens`](Self::opens): the number of re-steers.
    #[inline(always)]
    pub const fn attempt(self) -> u32 {
        (self.0 >> 8) as u32 & 0xff
    }

    /// Of one that [`opens`](Self::opens): the backend that failed, or 0.
    #[inline(always)]
    pub const fn avoid(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The readable form.
    #[inline(always)]
    pub const fn action(self) -> Action {
        let high = (self.0 >> 32) as u32;
        match self.0 & 0xff {
            0 => Action::Pass,
            1 => Action::ToTc,
            2 => Action::Transmit,
            3 => Action::Redirect(high),
            4 => Action::Neighbour(high),
            5 => Action::ToNode,
            6 => Action::ToNodeByLoopback,
            7 => Action::Drop((self.0 >> 8) as u32 & 0xff, high),
            10 => Action::Again,
            11 => Action::Earlier,
            // What is for the inside of the pipeline does not leave it.
            _ => Action::Pass,
        }
    }
}
