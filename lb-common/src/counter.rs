//! Counters and drop reasons: index and metric name, defined once.
//!
//! The indexes are part of pinned maps: new ones go to the end, and none is ever removed or moved. The maps have
//! [`COUNTER_SLOTS`] and [`DROP_SLOTS`] slots whatever is defined here, so that a new counter does not change their layout.

/// Slots for [`Counter`]s in the value of `STATS`.
pub const COUNTER_SLOTS: usize = 64;
/// Slots for [`DropReason`]s in the values of `DROPS` and `SERVICE_STATS`.
pub const DROP_SLOTS: usize = 48;

const _: () = {
    assert!(Counter::COUNT <= COUNTER_SLOTS);
    assert!(DropReason::COUNT <= DROP_SLOTS);
};

/// Declares an enum whose discriminant is an index into a per-CPU array and whose name is the metric label.
macro_rules! indexed {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $label:literal,)+ }) => {
        $(#[$meta])*
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vmeta])* $variant,)+ }

        impl $name {
            /// Every variant in index order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();
            /// The metric label.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }
    };
}

indexed! {
    /// What the datapath counts for the whole node. Every packet moves exactly one verdict: one of the first group, or `fragments_again`.
    Counter {
        /// Verdict: not ours, passed on untouched.
        Passed = "passed",
        /// Verdict of XDP: ours, left unmodified for the TC program of the same device.
        ToTc = "to_tc",
        /// Verdict: rewritten and sent out of the device it came in by.
        Transmitted = "transmitted",
        /// Verdict: rewritten and sent out of another device.
        Redirected = "redirected",
        /// Verdict of TC: rewritten and handed to the kernel's neighbour table to be sent.
        ToNeighbour = "to_neighbour",
        /// Verdict of TC: rewritten and delivered to a process of this node.
        ToNode = "to_node",
        /// Verdict: dropped; the reason is in `DROPS`.
        Dropped = "dropped",
        /// Flows created.
        FlowsCreated = "flows_created",
        /// Flows evicted by a new flow that needed their slot or source port: expired, closed or half-open ones.
        FlowsReclaimed = "flows_reclaimed",
        /// Flows that have been idle for too long.
        FlowsExpired = "flows_expired",
        /// SYNs sent to another backend because the first did not answer or refused.
        Resteered = "resteered",
        /// RSTs and ICMP errors of a refusing backend kept from the client while another backend is tried.
        RefusalsHidden = "refusals_hidden",
        /// RSTs sent to a peer on behalf of the service.
        ResetsSent = "resets_sent",
        /// ICMP echo requests to a VIP answered.
        EchoReplies = "echo_replies",
        /// ICMP errors translated.
        IcmpTranslated = "icmp_translated",
        /// "Fragmentation needed" and "packet too big" sent.
        TooBigSent = "too_big_sent",
        /// First fragments remembered.
        FragmentsTracked = "fragments_tracked",
        /// New flows that followed client-IP affinity.
        AffinityHits = "affinity_hits",
        /// Next hops of clients learnt anew.
        HopsRelearned = "hops_relearned",
        /// UDP flows moved away from a dead backend.
        FlowsMoved = "flows_moved",
        /// "Time exceeded" sent.
        TimeExceededSent = "time_exceeded_sent",
        /// Packets for a port of a routed VIP that no service has, refused: RST or "port unreachable" sent.
        UnusedPortsRefused = "unused_ports_refused",
        /// Verdict of TC: a later fragment that came before its first, sent round once more to wait for it.
        FragmentsAgain = "fragments_again",
    }
}

indexed! {
    /// Why a packet was dropped.
    DropReason {
        /// The service has no backend that may take new flows.
        NoBackend = "no_backend",
        /// The service's allow or deny list refuses the client.
        AclDenied = "acl_denied",
        /// TCP, not a SYN, and no flow is known: no translation can exist.
        NoFlow = "no_flow",
        /// The flow table is full of live flows.
        FlowTableFull = "flow_table_full",
        /// No SNAT port towards the backend is free.
        SnatPortsExhausted = "snat_ports_exhausted",
        /// The flow's backend is gone.
        BackendDead = "backend_dead",
        /// The time to live or hop limit ran out.
        TtlExpired = "ttl_expired",
        /// Longer than the MTU of the device it must leave by.
        MtuExceeded = "mtu_exceeded",
        /// The kernel refused to change or send the packet.
        RewriteFailed = "rewrite_failed",
        /// A header of service traffic is cut short or contradicts itself.
        Malformed = "malformed",
        /// Another CPU created the same flow at the same moment; the sender will send again.
        Raced = "raced",
        /// Hidden from the client because another backend is tried.
        RefusalHidden = "refusal_hidden",
        /// A late packet of a flow that has ended: idle for too long, or closed.
        FlowExpired = "flow_expired",
        /// The service holds its share of the flow table.
        ServiceShare = "service_share",
        /// For a port or protocol of a routed VIP that no service has, and not answered.
        UnusedPort = "unused_port",
        /// A later fragment for a VIP whose first did not come in time.
        FragmentEarly = "fragment_early",
        /// XDP sent it to another device, which could not take it. Counted for all XDP programs of the machine, besides the
        /// verdict, by a program on the kernel's tracepoint.
        RedirectFailed = "redirect_failed",
    }
}
