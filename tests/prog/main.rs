//! Packet rows: each runs one or more frames through the real programs by `BPF_PROG_TEST_RUN`, as XDP with TC behind
//! it and as TC alone, and leaves nothing unchecked: verdict, bytes, all counters, all flows.

mod flows;
mod foreign;
mod fragments;
mod icmp;
mod net;
mod policy;
mod rewrite;
mod tcp;

/// Each group of rows in the kernel and in the model.
macro_rules! groups {
    ($($group:ident),+) => {
        mod kernel { $(#[test] fn $group() { lb_tests::row::run_in_kernel(&crate::$group::rows()); })+ }
        mod model { $(#[test] fn $group() { lb_tests::row::run_in_model(&crate::$group::rows()); })+ }
    };
}

groups!(flows, foreign, fragments, icmp, policy, rewrite, tcp);
