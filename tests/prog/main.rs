//! Packet rows: each runs one or more frames through the real programs by `BPF_PROG_TEST_RUN`, as XDP with TC behind
//! it and as TC alone, and leaves nothing unchecked: verdict, bytes, all counters, all flows.

mod devices;
mod errors;
mod flows;
mod foreign;
mod fragments;
mod frames;
mod icmp;
mod net;
mod policy;
mod rewrite;
mod tcp;
mod unused;

/// Each group of rows in the kernel and in the model.
macro_rules! groups {
    ($($group:ident),+) => {
        mod kernel { $(#[test] fn $group() { lb_tests::row::run_in_kernel(&crate::$group::rows()); })+ }
        mod model { $(#[test] fn $group() { lb_tests::row::run_in_model(&crate::$group::rows()); })+ }
    };
}

groups!(
    errors, flows, foreign, fragments, frames, icmp, policy, rewrite, tcp, unused
);

#[test]
fn rows_are_many_and_of_different_names() {
    let groups = [
        errors::rows(),
        devices::rows(),
        flows::rows(),
        foreign::rows(),
        fragments::rows(),
        frames::rows(),
        icmp::rows(),
        policy::rows(),
        rewrite::rows(),
        tcp::rows(),
        unused::rows(),
    ];
    let mut names: Vec<_> = groups.into_iter().flatten().map(|row| row.name).collect();
    let all = names.len();
    assert!(all >= 150, "only {all} rows");
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all, "two rows have the same name");
}

/// Two CPUs make the same flow at once: no test run can, so the model plays the other.
#[test]
fn the_loser_of_a_race_goes_by_the_winners_entry() {
    use lb_tests::row::{Expect, row};
    let rows: Vec<_> = net::ALL
        .iter()
        .map(|n| {
            let winner = n.conn2();
            row(
                format!("{n}: another CPU makes the flow first"),
                n.two().ring(&[1]).winner(winner.clone()),
            )
            .comes(
                lb_tests::world::NIC,
                &n.open(),
                Expect::send(lb_tests::world::NIC, &n.to_b2(&n.open()))
                    .to_backend(2, &n.open())
                    .flows(&[&winner]),
            )
        })
        .collect();
    lb_tests::row::run_in_model(&rows);
}
