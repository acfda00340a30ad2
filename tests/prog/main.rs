//! Packet rows: each runs one or more frames through the real programs by `BPF_PROG_TEST_RUN`, as XDP with TC behind
//! it and as TC alone, and leaves nothing unchecked: verdict, bytes, all counters, all flows.

mod devices;
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

groups!(devices, flows, foreign, fragments, icmp, policy, rewrite, tcp);

#[test]
fn rows_are_many_and_of_different_names() {
    let groups = [
        devices::rows(),
        flows::rows(),
        foreign::rows(),
        fragments::rows(),
        icmp::rows(),
        policy::rows(),
        rewrite::rows(),
        tcp::rows(),
    ];
    let mut names: Vec<_> = groups.into_iter().flatten().map(|row| row.name).collect();
    let all = names.len();
    assert!(all >= 150, "only {all} rows");
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all, "two rows have the same name");
}
