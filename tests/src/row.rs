//! One case of the packet tests: what the maps hold, what comes in, what has to come of it. Nothing is left open:
//! the verdict, every byte, every counter of the node, of services and of backends, and every flow entry.

use std::fmt::Write as _;

use anyhow::Result;
use lb_common::{counter::Counter, counter::DropReason};

use crate::{
    kernel::{Counters, Program, Ran, with_kernel},
    model::Model,
    packet::{Packet, diff},
    world::{BRIDGE, Conn, FlowEntry, NODE, World, ifindex_of},
};

/// A body of the core with its maps.
pub trait Datapath {
    /// Makes the maps hold `world` and nothing else. Counters go on.
    fn set(&mut self, world: &World) -> Result<()>;
    /// Every flow entry, in key order.
    fn flows(&mut self) -> Result<Vec<FlowEntry>>;
    /// Everything that is counted; zeros may be left out.
    fn counters(&mut self) -> Result<Counters>;
    /// Whether the frames of TC shall come with the sum that a NIC told (CHECKSUM_COMPLETE), which must be right afterwards.
    fn check_sums(&mut self, _on: bool) {}
    /// Runs one frame that came in by (or is about to leave by) the device of a slot.
    fn run(&mut self, program: Program, slot: u16, frame: &[u8]) -> Result<Ran>;
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not ours.
    Pass,
    /// Out of the device of this slot, MACs and all.
    Send(u16),
    /// Out of the device of this slot, the kernel fills in the MACs. TC only.
    Neighbour(u16),
    /// Up the stack to a process of the node. TC only.
    Node,
    /// To a process of the node by way of the loopback device. TC only.
    Loopback,
    /// On its way out as the stack was sending it. TC egress only.
    Stack,
    /// To the same device's ingress once more. TC only.
    Again,
    /// Dropped for a reason, on behalf of a service.
    Drop(DropReason, Option<u32>),
}

/// What has to come of one packet.
#[derive(Clone, Debug)]
pub struct Expect {
    /// Verdict.
    pub outcome: Outcome,
    /// The frame afterwards; `None`: as it came.
    pub frame: Option<Packet>,
    /// Counters besides the verdict's own.
    pub moved: Counters,
    /// Connections in the flow tables afterwards; `None`: as before.
    pub conns: Option<Vec<Conn>>,
}

/// One packet of a row.
#[derive(Clone, Debug)]
pub struct Step {
    /// Slot of the device.
    pub device: u16,
    /// On its way out of the node (TC egress) rather than in.
    pub egress: bool,
    /// XDP leaves it to TC.
    pub needs_tc: bool,
    /// The packet.
    pub packet: Packet,
    /// What has to come of it.
    pub expect: Expect,
}

/// One case.
#[derive(Clone, Debug)]
pub struct Row {
    /// Says what is the case, as a sentence.
    pub name: String,
    /// The maps before.
    pub given: World,
    /// The packets, one after the other.
    pub steps: Vec<Step>,
    /// The only way that the row is about; `None`: both.
    pub only: Option<Body>,
}

/// The ways a packet may go through the datapath.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// XDP first, then TC if XDP leaves it to TC.
    XdpThenTc,
    /// TC alone.
    Tc,
}

/// A row of one name.
pub fn row(name: impl Into<String>, given: World) -> Row {
    Row {
        name: name.into(),
        given,
        steps: Vec::new(),
        only: None,
    }
}

// === impl Row ===

impl Row {
    /// A packet that comes in by a device; a NIC's XDP program does it alone.
    pub fn comes(mut self, device: u16, packet: &Packet, expect: Expect) -> Self {
        let needs_tc = matches!(
            expect.outcome,
            Outcome::Neighbour(_) | Outcome::Node | Outcome::Loopback | Outcome::Again
        );
        self.steps.push(Step {
            device,
            egress: false,
            needs_tc,
            packet: packet.clone(),
            expect,
        });
        self
    }
    /// A packet that comes in by a device; XDP leaves it to TC.
    pub fn comes_to_tc(mut self, device: u16, packet: &Packet, expect: Expect) -> Self {
        self.steps.push(Step {
            device,
            egress: false,
            needs_tc: true,
            packet: packet.clone(),
            expect,
        });
        self
    }
    /// A packet that is about to leave the node by a device.
    pub fn leaves(mut self, device: u16, packet: &Packet, expect: Expect) -> Self {
        self.steps.push(Step {
            device,
            egress: true,
            needs_tc: true,
            packet: packet.clone(),
            expect,
        });
        self
    }

    /// The row is about one way alone.
    pub fn only(mut self, body: Body) -> Self {
        self.only = Some(body);
        self
    }

    /// Runs the row; the text says all that was not as it had to be.
    pub fn run(&self, datapath: &mut dyn Datapath, body: Body) -> std::result::Result<(), String> {
        datapath
            .set(&self.given)
            .map_err(|e| format!("  set-up: {e:#}\n"))?;
        for (i, step) in self.steps.iter().enumerate() {
            step.run(datapath, body)
                .map_err(|fault| format!("  packet {} of {}:\n{fault}", i + 1, self.steps.len()))?;
        }
        Ok(())
    }
}

// === impl Expect ===

impl Expect {
    fn new(outcome: Outcome, frame: Option<&Packet>) -> Self {
        Self {
            outcome,
            frame: frame.cloned(),
            moved: Counters::new(),
            conns: None,
        }
    }
    /// Not ours: untouched and uncounted but for `passed`.
    pub fn pass() -> Self {
        Self::new(Outcome::Pass, None)
    }
    /// Sent as `frame` out of a device.
    pub fn send(device: u16, frame: &Packet) -> Self {
        Self::new(Outcome::Send(device), Some(frame))
    }
    /// Sent as `frame` (but for the MACs) by the neighbour table.
    pub fn neighbour(device: u16, frame: &Packet) -> Self {
        Self::new(Outcome::Neighbour(device), Some(frame))
    }
    /// Delivered to the node as `frame`.
    pub fn node(frame: &Packet) -> Self {
        Self::new(Outcome::Node, Some(frame))
    }
    /// Delivered to the node through `lo` as `frame`, addressed to that device.
    pub fn loopback(frame: &Packet) -> Self {
        Self::new(Outcome::Loopback, Some(&frame.clone().eth([0; 6], [0; 6])))
    }
    /// Leaves the node as the stack was sending it, as `frame`.
    pub fn stack(frame: &Packet) -> Self {
        Self::new(Outcome::Stack, Some(frame))
    }
    /// Sent to the same device's ingress once more, untouched.
    pub fn again() -> Self {
        Self::new(Outcome::Again, None)
    }
    /// Dropped on behalf of no service.
    pub fn drop_of_nobody(reason: DropReason) -> Self {
        Self::new(Outcome::Drop(reason, None), None)
    }
    /// Dropped on behalf of a service.
    pub fn drop(reason: DropReason, service: u32) -> Self {
        Self::new(Outcome::Drop(reason, Some(service)), None)
    }
    /// Another counter moves, by name.
    pub fn and(mut self, name: impl Into<String>, by: u64) -> Self {
        *self.moved.entry(name.into()).or_default() += by;
        self
    }
    /// Another counter of the node moves by one.
    pub fn count(self, counter: Counter) -> Self {
        self.and(counter.name(), 1)
    }
    /// The packet is counted as one of a client to a backend.
    pub fn to_backend(self, id: u32, packet: &Packet) -> Self {
        let bytes = packet.ip_len();
        self.and(format!("backend {id} packets_in"), 1)
            .and(format!("backend {id} bytes_in"), bytes)
    }
    /// The packet is counted as one of a backend to a client.
    pub fn to_client(self, id: u32, packet: &Packet) -> Self {
        let bytes = packet.ip_len();
        self.and(format!("backend {id} packets_out"), 1)
            .and(format!("backend {id} bytes_out"), bytes)
    }
    /// A flow is created.
    pub fn new_flow(self, service: u32, id: u32) -> Self {
        self.count(Counter::FlowsCreated)
            .and(format!("service {service} flows"), 1)
            .and(format!("backend {id} flows"), 1)
    }
    /// A handshake is finished.
    pub fn handshake(self, id: u32) -> Self {
        self.and(format!("backend {id} established"), 1)
    }
    /// These connections are known afterwards and no others.
    pub fn flows(mut self, conns: &[&Conn]) -> Self {
        self.conns = Some(conns.iter().map(|c| (*c).clone()).collect());
        self
    }

    /// The counter of the verdict and those of a drop.
    fn verdict_counters(&self, device: u16, body: Program) -> Counters {
        let mut all = self.moved.clone();
        let mut add = |name: String| *all.entry(name).or_default() += 1;
        match self.outcome {
            Outcome::Pass => add("passed".into()),
            Outcome::Again => add("fragments_again".into()),
            Outcome::Stack => add("transmitted".into()),
            Outcome::Send(to) if body != Program::Egress && to == device => add("transmitted".into()),
            Outcome::Send(_) => add("redirected".into()),
            Outcome::Neighbour(_) => add("to_neighbour".into()),
            Outcome::Node | Outcome::Loopback => add("to_node".into()),
            Outcome::Drop(reason, service) => {
                add("dropped".into());
                add(format!("drops {}", reason.name()));
                if let Some(id) = service {
                    add(format!("service {id} drops {}", reason.name()));
                }
            }
        }
        all
    }
}

// === impl Step ===

impl Step {
    fn run(&self, datapath: &mut dyn Datapath, body: Body) -> std::result::Result<(), String> {
        let frame = self.packet.build();
        // The bridge and lo have no XDP program, and no program sees what the node sends before TC egress.
        if body == Body::XdpThenTc && !self.egress && self.device != BRIDGE && self.device != NODE {
            let handed_on = self.needs_tc;
            let before = state(datapath)?;
            let ran = datapath
                .run(Program::Xdp, self.device, &frame)
                .map_err(|e| format!("    XDP: {e:#}\n"))?;
            let after = state(datapath)?;
            if !handed_on {
                return self.check(Program::Xdp, &frame, &ran, &before, &after);
            }
            let to_tc = Expect {
                outcome: Outcome::Pass,
                frame: None,
                moved: Counters::new(),
                conns: None,
            };
            let mut text = compare(&to_tc, Program::Xdp, self.device, &frame, &ran, &before, &after);
            let moved = difference(&before.0, &after.0);
            let expected = Counters::from([("to_tc".into(), 1)]);
            if moved != expected {
                text.push_str(&counters_diff(&expected, &moved));
            }
            if !text.is_empty() {
                return Err(format!("  XDP has to leave it to TC:\n{text}"));
            }
        }
        let program = if self.egress {
            Program::Egress
        } else {
            Program::Ingress
        };
        let before = state(datapath)?;
        // What the balancer makes by itself has no sum that a NIC could have told.
        let made = [
            "resets_sent",
            "too_big_sent",
            "time_exceeded_sent",
            "unused_ports_refused",
        ];
        datapath.check_sums(!made.iter().any(|name| self.expect.moved.contains_key(*name)));
        let ran = datapath
            .run(program, self.device, &frame)
            .map_err(|e| format!("    TC: {e:#}\n"))?;
        let after = state(datapath)?;
        self.check(program, &frame, &ran, &before, &after)
    }

    fn check(
        &self,
        program: Program,
        frame: &[u8],
        ran: &Ran,
        before: &State,
        after: &State,
    ) -> std::result::Result<(), String> {
        let mut text = compare(&self.expect, program, self.device, frame, ran, before, after);
        let moved = difference(&before.0, &after.0);
        let expected = self.expect.verdict_counters(self.device, program);
        if moved != expected {
            text.push_str(&counters_diff(&expected, &moved));
        }
        if text.is_empty() {
            Ok(())
        } else {
            Err(format!("  {program:?}:\n{text}"))
        }
    }
}

type State = (Counters, Vec<FlowEntry>);

fn state(datapath: &mut dyn Datapath) -> std::result::Result<State, String> {
    let counters = datapath
        .counters()
        .map_err(|e| format!("    counters: {e:#}\n"))?;
    let flows = datapath.flows().map_err(|e| format!("    flows: {e:#}\n"))?;
    Ok((counters, flows))
}

/// Verdict, bytes and flows.
fn compare(
    expect: &Expect,
    program: Program,
    device: u16,
    frame: &[u8],
    ran: &Ran,
    before: &State,
    after: &State,
) -> String {
    let mut text = String::new();
    let allowed = actions(expect.outcome, program, device);
    if !allowed.contains(&ran.action) {
        writeln!(
            text,
            "    verdict: expected {:?} ({:?}), found {}",
            expect.outcome,
            allowed,
            action_name(program, ran.action)
        )
        .expect("a string");
    }
    if let (Some(found), Outcome::Send(to) | Outcome::Neighbour(to)) = (ran.to, expect.outcome)
        && found != ifindex_of(to)
    {
        writeln!(text, "    device: expected {}, found {found}", ifindex_of(to)).expect("a string");
    }
    if !matches!(expect.outcome, Outcome::Drop(..)) {
        let mut expected = expect
            .frame
            .as_ref()
            .map_or_else(|| frame.to_vec(), Packet::build);
        if matches!(expect.outcome, Outcome::Neighbour(_)) && ran.frame.len() >= 12 {
            // The neighbour table writes them after the program.
            expected[..12].copy_from_slice(&ran.frame[..12]);
        }
        text.push_str(&diff(&expected, &ran.frame).unwrap_or_default());
    }
    let mut expected = match &expect.conns {
        None => before.1.clone(),
        Some(conns) => conns.iter().flat_map(Conn::entries).collect(),
    };
    expected.sort_by_key(|e| (e.src, e.dst, e.proto));
    for entry in &expected {
        if !after.1.contains(entry) {
            writeln!(text, "    flow missing: {entry}").expect("a string");
        }
    }
    for entry in &after.1 {
        if !expected.contains(entry) {
            writeln!(text, "    flow too many: {entry}").expect("a string");
        }
    }
    text
}

/// The return values that stand for an outcome.
fn actions(outcome: Outcome, program: Program, device: u16) -> &'static [i32] {
    // XDP: 1 drop, 2 pass, 3 transmit, 4 redirect. TC: -1 next program, 0 ok, 2 shot, 7 redirect.
    match (program, outcome) {
        (Program::Xdp, Outcome::Drop(..)) => &[1],
        (Program::Xdp, Outcome::Send(to)) if to == device => &[3],
        (Program::Xdp, Outcome::Send(_)) => &[4],
        (Program::Xdp, _) => &[2],
        (_, Outcome::Drop(..)) => &[2],
        (_, Outcome::Send(_) | Outcome::Neighbour(_) | Outcome::Loopback | Outcome::Again) => &[7],
        // Rewritten: programs after ours must not take it for somebody else's, but may see it.
        (_, Outcome::Node | Outcome::Stack) => &[-1, 0],
        (_, Outcome::Pass) => &[-1],
    }
}

fn action_name(program: Program, action: i32) -> String {
    let name = match (program, action) {
        (Program::Xdp, 1) => "XDP_DROP",
        (Program::Xdp, 2) => "XDP_PASS",
        (Program::Xdp, 3) => "XDP_TX",
        (Program::Xdp, 4) => "XDP_REDIRECT",
        (Program::Xdp, _) => "XDP ?",
        (_, -1) => "TC_ACT_UNSPEC",
        (_, 0) => "TC_ACT_OK",
        (_, 2) => "TC_ACT_SHOT",
        (_, 7) => "TC_ACT_REDIRECT",
        _ => "TC ?",
    };
    format!("{name} ({action})")
}

fn difference(before: &Counters, after: &Counters) -> Counters {
    after
        .iter()
        .map(|(name, value)| {
            (
                name.clone(),
                value.wrapping_sub(before.get(name).copied().unwrap_or(0)),
            )
        })
        .filter(|(_, moved)| *moved != 0)
        .collect()
}

fn counters_diff(expected: &Counters, found: &Counters) -> String {
    let mut text = String::new();
    let names: std::collections::BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    for name in names {
        let (want, have) = (expected.get(name).unwrap_or(&0), found.get(name).unwrap_or(&0));
        if want != have {
            writeln!(text, "    counter {name}: expected +{want}, found +{have}").expect("a string");
        }
    }
    text
}

/// Runs rows on both bodies in the kernel and fails with everything that was not as it had to be.
///
/// # Panics
/// If any row fails, with all faults in the message, or if the object does not load.
pub fn run_in_kernel(rows: &[Row]) {
    with_kernel(|kernel| run_rows(rows, kernel)).unwrap_or_else(|e| panic!("{e:#}"));
}

/// Runs rows on both bodies as the host compiles them.
///
/// # Panics
/// As [`run_in_kernel`].
pub fn run_in_model(rows: &[Row]) {
    run_rows(rows, &mut Model::default());
}

fn run_rows(rows: &[Row], datapath: &mut dyn Datapath) {
    let mut faults = Vec::new();
    for body in [Body::XdpThenTc, Body::Tc] {
        for row in rows.iter().filter(|row| row.only.is_none_or(|only| only == body)) {
            if let Err(fault) = row.run(datapath, body) {
                faults.push(format!("{body:?}: {}\n{fault}", row.name));
            }
        }
    }
    let runs = 2 * rows.len();
    assert!(
        faults.is_empty(),
        "{} of {runs} runs failed:\n{}",
        faults.len(),
        faults.join("\n")
    );
}
