//! Follows the network of the node: attaches programs to devices as they come, keeps next hops resolved, announces
//! VIPs, and publishes what the plan needs as one value.

mod places;
mod topology;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use lb_common::maps::{Device, device_flags};
use rtnetlink::Handle;
use tokio::{
    sync::{mpsc, watch},
    time,
};

use super::{
    Topology, announce,
    announcements::{AnnounceRequest, Announcements, Presence},
    attach::{Attacher, DeviceWish, XdpChoice},
    features::Features,
    frames,
    heartbeat::{self, Heartbeat},
    netlink::{self, Change, Link, Neighbour, NetlinkError, OwnAddress, Route},
    slots::{self, Slots},
    state::StateFile,
    sysctl,
    uplinks::{self, Answers, InterfaceName, Uplinks},
    xdp::{Decision, RemoteBackends, decide},
};
use crate::status::AttachmentStatus;

/// Events that come within this time are handled together: a container start makes a dozen of them.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// Everything is looked at anew this often, for events that the kernel lost.
const RESYNC: Duration = Duration::from_secs(30);

/// What the configuration says of the network; may change while the agent runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetConfig {
    /// Where clients and remote backends are.
    pub interfaces: Vec<InterfaceName>,
    /// How XDP is attached there.
    pub xdp: XdpChoice,
    /// What decides whether it is attached at all.
    pub remote: RemoteBackends,
    /// VIPs to put on interfaces: (interface, VIP).
    pub announce: BTreeSet<(String, IpAddr)>,
    /// VIPs, whoever puts them on interfaces: never sources of translation.
    pub vips: BTreeSet<IpAddr>,
    /// Ports for source translation, kept from the node's own sockets.
    pub snat_ports: Option<RangeInclusive<u16>>,
}

/// What people should know of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetReport {
    /// Programs by device.
    pub attachments: Vec<AttachmentStatus>,
    /// What is wrong at the moment.
    pub faults: Vec<String>,
    /// Every interface of the configuration has its programs.
    pub attached: bool,
}

/// Everything the task needs.
#[derive(Debug)]
pub struct NetTask {
    /// The loaded programs.
    pub attacher: Attacher,
    /// Says that next hops are kept up to date.
    pub heartbeat: Heartbeat,
    /// What to undo on detach.
    pub state: StateFile,
    /// Slots of an earlier agent (`KernelMaps::devices`).
    pub devices: BTreeMap<u16, Device>,
    /// The configuration.
    pub config: watch::Receiver<NetConfig>,
    /// Addresses of backends.
    pub wanted: watch::Receiver<BTreeSet<IpAddr>>,
    /// What the operator wants to be announced again.
    pub requests: mpsc::Receiver<AnnounceRequest>,
    /// Where the network goes.
    pub topology: watch::Sender<Topology>,
    /// Where the report goes.
    pub report: watch::Sender<NetReport>,
}

/// One look at the kernel's tables.
struct View {
    links: Vec<Link>,
    addresses: Vec<OwnAddress>,
    neighbours: HashMap<(u32, IpAddr), Neighbour>,
    /// Unicast MACs that devices take besides their own.
    further_macs: BTreeSet<(u32, [u8; 6])>,
    /// Configured interfaces.
    uplinks: Uplinks,
}

impl View {
    fn link(&self, ifindex: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.ifindex == ifindex)
    }

    /// Whether containers of this node are on the device, and not other machines, as on an uplink that is a bridge.
    fn has_containers(&self, link: &Link) -> bool {
        link.bridge && !self.uplinks.devices.contains(&link.ifindex)
    }
}

/// What came of attaching to a device.
#[derive(Default)]
struct Carried {
    wish: Option<DeviceWish>,
    fault: Option<String>,
    warnings: Vec<String>,
    /// Worth another try, now and then, and when the XDP program changes that was there before.
    incomplete: bool,
    before: Option<u32>,
}

/// The task between two looks.
struct Follower {
    task: NetTask,
    handle: Handle,
    slots: Slots,
    /// What each device was last asked to carry.
    carried: BTreeMap<u32, Carried>,
    /// The devices that interfaces last were.
    answers: Answers,
    /// Whether XDP is wanted, by which configuration.
    decision: Option<(NetConfig, Decision)>,
    /// Whether failed redirects are counted; `None`: to be seen to.
    counts_failures: Option<(bool, Option<String>)>,
    /// What drivers can do; `None` where the kernel does not tell.
    features: Option<Features>,
    routes: HashMap<IpAddr, Option<Route>>,
    managed: BTreeSet<(u32, IpAddr)>,
    announcements: Announcements,
}

/// Runs until the channels close. The first [`Topology`] is published after the first look. Works in the network
/// namespace of the thread that polls it first; every worker of the runtime must be in the same one.
pub async fn run(task: NetTask) -> std::io::Result<()> {
    let (mut changes, others) = netlink::monitor()?;
    let handle = netlink::connect()?;
    let features = Features::open()?;
    if let Some(features) = &features {
        features.watch(others)?;
    }
    let (mut config, mut wanted) = (task.config.clone(), task.wanted.clone());
    let mut follower = Follower {
        slots: Slots::adopt(&task.devices),
        answers: last_answers(&task),
        task,
        handle,
        carried: BTreeMap::new(),
        decision: None,
        counts_failures: None,
        features,
        routes: HashMap::new(),
        managed: BTreeSet::new(),
        announcements: Announcements::default(),
    };
    let mut resync = time::interval(RESYNC);
    resync.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    let mut beat = time::interval(heartbeat::INTERVAL);
    beat.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        let mut request = None;
        let due = follower.announcements.next_due();
        tokio::select! {
            _ = beat.tick() => {
                follower.task.heartbeat.beat();
                continue;
            }
            _ = resync.tick() => follower.forget_failures(),
            changed = config.changed() => match changed {
                Ok(()) => follower.forget_failures(),
                Err(_) => return Ok(()),
            },
            changed = wanted.changed() => if changed.is_err() { return Ok(()) },
            Some(asked) = follower.task.requests.recv() => request = Some(asked),
            () = time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
            change = changes.recv() => {
                let Some(change) = change else {
                    return Err(std::io::Error::other("the kernel closed the netlink socket"));
                };
                follower.note(change);
                time::sleep(DEBOUNCE).await;
                while let Ok(change) = changes.try_recv() {
                    follower.note(change);
                }
            }
        }
        let (config, wanted) = (
            config.borrow_and_update().clone(),
            wanted.borrow_and_update().clone(),
        );
        if let Err(e) = follower.refresh(&config, &wanted).await {
            tracing::warn!(error = %e, "the network could not be read");
            follower
                .task
                .report
                .send_modify(|report| report.faults = vec![e.to_string()]);
        }
        if let Some(request) = request {
            follower.announce_again(request);
        }
    }
}

impl Follower {
    /// Lets everything that failed be tried again.
    fn forget_failures(&mut self) {
        for carried in self.carried.values_mut().filter(|carried| carried.incomplete) {
            carried.wish = None;
        }
        self.counts_failures.take_if(|(_, fault)| fault.is_some());
        self.routes.clear();
    }

    /// Forgets what a change makes doubtful.
    fn note(&mut self, change: Change) {
        match change {
            Change::Neighbours | Change::Features => {}
            Change::Routes => self.routes.clear(),
            Change::Gone(ifindex) => {
                self.routes.clear();
                // Another device may have the number already, and nothing of ours is on that one.
                if let Some(carried) = self.carried.get_mut(&ifindex) {
                    carried.wish = None;
                }
            }
        }
    }

    async fn look(&mut self, config: &NetConfig) -> Result<View, NetlinkError> {
        let links = netlink::links(&self.handle).await?;
        let default = match config.interfaces.contains(&InterfaceName::Auto) {
            true => netlink::default_devices(&self.handle).await?,
            false => Vec::new(),
        };
        let mut uplinks = uplinks::resolve(&config.interfaces, &links, &default, &mut self.answers);
        if let Some(answer) = self.answers.get(&InterfaceName::Auto) {
            let names = answer.iter().map(|(_, name)| name.clone()).collect();
            let kept = self.task.state.update(|changes| changes.default_devices = names);
            uplinks
                .faults
                .extend(kept.err().map(|e| format!("state file: {e}")));
        }
        Ok(View {
            addresses: netlink::addresses(&self.handle).await?,
            neighbours: netlink::neighbours(&self.handle).await?,
            further_macs: netlink::further_macs(&self.handle).await?,
            links,
            uplinks,
        })
    }

    async fn refresh(&mut self, config: &NetConfig, wanted: &BTreeSet<IpAddr>) -> Result<(), NetlinkError> {
        let view = self.look(config).await?;
        let mut faults = view.uplinks.faults.clone();
        faults.extend(sysctl::apply(&self.task.state, config.snat_ports.as_ref()));
        faults.extend(
            announce::apply(
                &self.handle,
                &view.links,
                &view.addresses,
                &self.task.state,
                &config.announce,
            )
            .await,
        );
        let present = announce::present(&view.links, &view.addresses, &config.announce);
        self.announcements.observe(present, Instant::now());
        faults.extend(self.announce_due());
        let decision = self.decide(config, &view).await?;
        self.attach(&view, &decision);
        let mut attached = !view.uplinks.incomplete;
        for (ifindex, carried) in &self.carried {
            faults.extend(carried.fault.clone());
            faults.extend(carried.warnings.iter().cloned());
            if view.uplinks.devices.contains(ifindex) {
                attached &= carried.fault.is_none();
                faults.extend(
                    view.link(*ifindex)
                        .and_then(|link| sysctl::rp_filter_warning(&link.name)),
                );
            }
        }
        faults.extend(self.count_failures(decision.choice != XdpChoice::Off));
        let mut places = BTreeMap::new();
        let mut hops = BTreeSet::new();
        self.routes.retain(|address, _| wanted.contains(address));
        for address in wanted {
            let (place, hop) = self.place(*address, &view, &mut faults).await?;
            places.insert(*address, place);
            hops.extend(hop);
        }
        faults.extend(self.manage(hops, &view).await);
        for link in view
            .links
            .iter()
            .filter(|link| self.slots.get(link.ifindex).is_some())
        {
            faults.extend(frames::too_many_macs(link, &view.links, &view.further_macs));
        }
        let topology = self.topology(&view, config, places);
        self.task
            .topology
            .send_if_modified(|current| replace(current, topology));
        let attachments = self.attachments(&view, &decision);
        let report = NetReport {
            attachments,
            faults,
            attached,
        };
        self.task.report.send_if_modified(|current| {
            for fault in report
                .faults
                .iter()
                .filter(|fault| !current.faults.contains(fault))
            {
                tracing::warn!("{fault}");
            }
            replace(current, report)
        });
        Ok(())
    }

    /// Tells the neighbours what they are due to be told.
    fn announce_due(&mut self) -> Vec<String> {
        let due = self.announcements.take_due(Instant::now());
        let tell = |presence: &Presence| {
            let fault = announce::tell_neighbours(presence).err()?;
            Some(format!(
                "VIP {}: its neighbours could not be told: {fault}",
                presence.address
            ))
        };
        due.iter().filter_map(tell).collect()
    }

    /// Tells the neighbours again what the operator asks for.
    fn announce_again(&mut self, request: AnnounceRequest) {
        let announce = &self.task.config.borrow().announce;
        let again = self.announcements.repeat(request.vip, Instant::now());
        let told = |(_, vip): &&(String, IpAddr)| again.iter().any(|presence| presence.address == *vip);
        let told = announce.iter().filter(told).cloned().collect();
        // A caller that has gone away needs no answer.
        let _ = request.reply.send(told);
    }

    /// Brings the programs to where they are wanted and takes them away from where they are not.
    fn attach(&mut self, view: &View, decision: &Decision) {
        let wishes: BTreeMap<u32, DeviceWish> = view
            .links
            .iter()
            .filter_map(|link| {
                let uplink = view.uplinks.devices.contains(&link.ifindex);
                let wish = DeviceWish {
                    ifindex: link.ifindex,
                    name: link.name.clone(),
                    xdp: if uplink && !link.loopback {
                        decision.choice
                    } else {
                        XdpChoice::Off
                    },
                    egress: !link.loopback,
                };
                (uplink || link.bridge || link.loopback).then_some((link.ifindex, wish))
            })
            .collect();
        let mut unwanted: BTreeSet<u32> = self.task.attacher.pinned_devices().into_iter().collect();
        unwanted.extend(self.carried.keys());
        unwanted.extend(self.task.attacher.attached().keys());
        for ifindex in unwanted
            .into_iter()
            .filter(|ifindex| !wishes.contains_key(ifindex))
        {
            tracing::info!(ifindex, "device is gone or no longer configured");
            let name = view.link(ifindex).map(|link| link.name.as_str());
            self.task.attacher.forget(ifindex, name);
            self.carried.remove(&ifindex);
        }
        self.slots.retain(|ifindex| wishes.contains_key(&ifindex));
        for (ifindex, wish) in wishes {
            let carried = self.carried.entry(ifindex).or_default();
            let before = view.link(ifindex).and_then(|link| link.xdp_program);
            let retry = carried.incomplete && carried.before != before;
            if carried.wish.as_ref() == Some(&wish) && !retry {
                continue;
            }
            *carried = match self.task.attacher.attach(&wish, before) {
                Ok(attached) => {
                    tracing::info!(device = %wish.name, "programs attached");
                    Carried {
                        wish: Some(wish),
                        fault: None,
                        warnings: attached.warnings,
                        incomplete: !attached.complete,
                        before,
                    }
                }
                Err(e) => Carried {
                    wish: Some(wish),
                    fault: Some(e.to_string()),
                    warnings: Vec::new(),
                    incomplete: true,
                    before,
                },
            };
        }
        for (ifindex, carried) in &mut self.carried {
            let link = view.links.iter().find(|link| link.ifindex == *ifindex);
            if let Some(link) = link.filter(|link| !link.loopback)
                && self.slots.assign(*ifindex, &link.name).is_none()
            {
                carried.fault = Some(format!("device {}: no slot is left: too many bridges", link.name));
            }
        }
    }

    /// Whether XDP is wanted: asked once at the start and once for each change of the configuration.
    async fn decide(&mut self, config: &NetConfig, view: &View) -> Result<Decision, NetlinkError> {
        if let Some((decided, decision)) = &self.decision
            && (&decided.interfaces, decided.xdp, &decided.remote)
                == (&config.interfaces, config.xdp, &config.remote)
        {
            return Ok(decision.clone());
        }
        let mut near = BTreeSet::new();
        for address in config.remote.services.keys() {
            let Some(route) = netlink::route(&self.handle, *address).await? else {
                continue;
            };
            let on_bridge = || {
                let link = view.link(route.ifindex);
                route.gateway.is_none() && link.is_some_and(|link| view.has_containers(link))
            };
            if route.local || on_bridge() {
                near.insert(*address);
            }
        }
        let decision = decide(config.xdp, &config.remote, |address| !near.contains(&address));
        tracing::info!(xdp = ?decision.choice, why = %decision.why, "XDP on the interfaces");
        self.decision = Some((config.clone(), decision.clone()));
        Ok(decision)
    }

    /// Sees to it that failed redirects are counted where XDP is wanted; the fault, if they are not.
    fn count_failures(&mut self, wanted: bool) -> Option<String> {
        match &self.counts_failures {
            Some((as_wanted, fault)) if *as_wanted == wanted => fault.clone(),
            _ => {
                let fault = self.task.attacher.count_failed_redirects(wanted);
                self.counts_failures = Some((wanted, fault.clone()));
                fault
            }
        }
    }

    /// The programs by device, and why XDP is there or not.
    fn attachments(&self, view: &View, decision: &Decision) -> Vec<AttachmentStatus> {
        let all = self.task.attacher.attached().iter();
        all.map(|(ifindex, status)| {
            let refused = self
                .carried
                .get(ifindex)
                .is_some_and(|carried| carried.incomplete);
            let why = match view.uplinks.devices.contains(ifindex) {
                false => String::new(),
                true if refused => "refused: see the faults".into(),
                true => decision.why.clone(),
            };
            AttachmentStatus {
                why,
                ..status.clone()
            }
        })
        .collect()
    }
}

/// What interfaces were when an agent last knew it. Without a record, `auto` may be any of the devices that it left programs on.
fn last_answers(task: &NetTask) -> Answers {
    let known = task.state.get().default_devices;
    let answer: Vec<(u32, String)> = if known.is_empty() {
        let devices = task.devices.values();
        let nics = devices.filter(|device| device.flags & device_flags::BRIDGE == 0);
        nics.map(|device| (device.ifindex, slots::name_of(device)))
            .filter(|(_, name)| !name.is_empty())
            .collect()
    } else {
        // By name: numbers may have changed.
        known.into_iter().map(|name| (0, name)).collect()
    };
    [(InterfaceName::Auto, answer)].into()
}

/// Replaces a value; whether it changed.
fn replace<T: PartialEq>(current: &mut T, next: T) -> bool {
    let changed = *current != next;
    if changed {
        *current = next;
    }
    changed
}
