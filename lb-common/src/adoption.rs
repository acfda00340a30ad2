//! How far the adoption of maps of the layout before is.

/// Values of [`Settings::adopting`](crate::maps::Settings::adopting).
pub mod adopting {
    /// All flows are in these maps.
    pub const NONE: u32 = 0;
    /// Packets without a flow here are the earlier programs'.
    pub const ALL: u32 = 1;
    /// Those that may open a flow open it here; the others are the earlier programs'.
    pub const KNOWN: u32 = 2;
}

/// Indexes of `EARLIER`.
pub mod earlier {
    /// The program on TC ingress.
    pub const INGRESS: u32 = 0;
    /// The program on TC egress.
    pub const EGRESS: u32 = 1;
}
