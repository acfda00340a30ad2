//! The frame that a benchmark feeds again and again: shared by the benchmark's kernel program, which writes it into the
//! packet before every run of the body, and by the harness.

/// Bytes of the frame that are written before each run: more than all headers of the benchmarks.
pub const FRAME: usize = 96;
/// log2 of the flows that differ by their port alone.
pub const PORT_BITS: u32 = 14;
/// Port of the first flow of each address.
pub const FIRST_PORT: u16 = 1 << PORT_BITS;

/// The only value of the benchmark's map: the frame, and how it differs from flow to flow.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Template {
    /// The frame.
    pub frame: [u64; FRAME / 8],
    /// Byte offset of the 16-bit word of an address that says which block of ports the flow is in.
    pub address_at: u32,
    /// Byte offset of the port.
    pub port_at: u32,
    /// Flows to choose from at random; 0: each run is the next flow.
    pub flows: u32,
    /// Runs so far, or the next flow.
    pub runs: u32,
    /// Index of the program to measure in the benchmark's program array.
    pub program: u32,
    /// Explicit padding.
    pub _pad: u32,
}

impl Template {
    /// The flow of the next run.
    #[inline(always)]
    pub const fn next(&mut self) -> u32 {
        let run = self.runs;
        self.runs = run.wrapping_add(1);
        if self.flows == 0 {
            return run;
        }
        // A Weyl sequence through one round of mixing: no prefetcher guesses the next flow.
        let x = run.wrapping_mul(0x9e37_79b1);
        let x = (x ^ (x >> 15)).wrapping_mul(0x85eb_ca6b);
        (((x ^ (x >> 13)) as u64 * self.flows as u64) >> 32) as u32
    }
}

/// The address word of a flow, host order.
pub const fn address_word(flow: u32) -> u16 {
    (flow >> PORT_BITS) as u16
}

/// The port of a flow, host order.
pub const fn port(flow: u32) -> u16 {
    FIRST_PORT | (flow & ((1 << PORT_BITS) - 1)) as u16
}
