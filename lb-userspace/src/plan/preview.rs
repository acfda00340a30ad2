//! What a change of wishes would do, found by planning it: the same rings, the same drains, no maps. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use super::{Inputs, Plan, Policy, Programmed, ROW_QUARANTINE, Scope, Sweep, address_of, plan};
use crate::{
    datapath::{Capacities, MapOp, Place, Topology},
    desired::{Desired, Retention},
    model::{Backend, BackendState, Rejection, Service, ServiceAddress},
};

/// What becomes of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceChange {
    /// Name for people.
    pub name: String,
    /// Address.
    pub address: ServiceAddress,
    /// It is new, gone, or neither.
    pub fate: Fate,
    /// Its settings are others.
    pub settings: bool,
    /// What becomes of its backends.
    pub backends: Vec<BackendChange>,
    /// Entries of its ring that name another backend then, and how many there are.
    pub moved: (usize, usize),
}

/// Whether a service was there before and is there after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Comes,
    Stays,
    Goes,
}

/// What becomes of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendChange {
    /// Takes new flows.
    Joins { address: SocketAddr, weight: u32 },
    /// Takes no new flows any more, and is gone after this time.
    Leaves { address: SocketAddr, drain: Duration },
    /// Takes no new flows; stays known.
    Drains { address: SocketAddr, reason: String },
    /// Takes another share of new flows.
    Weighs { address: SocketAddr, from: u32, to: u32 },
}

/// What a change would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preview {
    /// Services with a difference, in address order.
    pub services: Vec<ServiceChange>,
    /// What would not fit.
    pub rejections: Vec<Rejection>,
}

/// Plans `before`, and then `after` on top of it, for maps of this size.
pub fn preview(before: &Desired, after: &Desired, capacities: &Capacities, now: Instant) -> Preview {
    let mut dry = Dry::new(capacities, now);
    dry.settle(before);
    let old = dry.rings();
    dry.rejections.clear();
    dry.settle(after);
    let new = dry.rings();
    let addresses: BTreeSet<&ServiceAddress> = before.services.keys().chain(after.services.keys()).collect();
    let change = |address: &ServiceAddress| {
        let was = before.services.get(address).map(|wanted| &*wanted.service);
        let is = after.services.get(address).map(|wanted| &*wanted.service);
        let moved = moved(old.get(address), new.get(address));
        service_change(*address, was, is, moved)
    };
    Preview {
        services: addresses.into_iter().filter_map(change).collect(),
        rejections: dry.rejections,
    }
}

/// What is programmed, without maps.
struct Dry<'c> {
    programmed: Programmed,
    capacities: &'c Capacities,
    written: HashMap<u32, Vec<u32>>,
    rings: BTreeMap<ServiceAddress, Vec<u32>>,
    rejections: Vec<Rejection>,
    now: Instant,
}

impl<'c> Dry<'c> {
    fn new(capacities: &'c Capacities, now: Instant) -> Self {
        Self {
            programmed: Programmed::default(),
            capacities,
            written: HashMap::new(),
            rings: BTreeMap::new(),
            rejections: Vec::new(),
            now,
        }
    }

    /// Plans and records until this is programmed. Every backend is reachable here: whether it is, only its node knows.
    fn settle(&mut self, desired: &Desired) {
        let backends = desired
            .services
            .values()
            .flat_map(|wanted| &wanted.service.backends);
        let place = |backend: &Backend| {
            (
                backend.address.ip(),
                Place::Remote {
                    slot: 1,
                    mac: None,
                    uplink: false,
                },
            )
        };
        let topology = Topology {
            places: backends.map(place).collect(),
            loopback_ifindex: 1,
            ..Topology::default()
        };
        let policy = Policy {
            snat_addresses: vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)],
            own_vips: BTreeSet::new(),
            routed_vips: BTreeMap::new(),
            mark: 1,
            snat_port_min: 1,
            snat_port_max: 1,
            event_sample: 0,
            flow_share: 50,
            hz: 1,
            default_drain: Duration::ZERO,
            retention: Retention::default(),
            firewall: BTreeSet::new(),
        };
        // A second pass takes the rows that the first one had to leave in quarantine.
        for _ in 0..2 {
            let inputs = Inputs {
                desired,
                topology: &topology,
                capacities: self.capacities,
                policy: &policy,
                sweep: &Sweep::default(),
                asked: &BTreeMap::new(),
                may_remove: true,
                unclaimed: &BTreeSet::new(),
                now: self.now,
            };
            let plan = plan(&self.programmed, &inputs, Scope::All);
            self.record(plan);
            self.now += ROW_QUARANTINE * 2;
        }
    }

    fn record(&mut self, plan: Plan) {
        plan.notes.iter().for_each(|note| self.programmed.note(note));
        for step in plan.steps {
            match &step.op {
                MapOp::PutRing { row, ring } => drop(self.written.insert(*row, ring.clone())),
                MapOp::PutService { key, service } => {
                    match self.written.get(&service.ring_row) {
                        Some(ring) => self.rings.insert(address_of(key), ring.clone()),
                        None => self.rings.remove(&address_of(key)),
                    };
                }
                MapOp::DelService { key } => drop(self.rings.remove(&address_of(key))),
                _ => {}
            }
            self.programmed.record(&step.op, self.now);
        }
        self.rejections = plan.rejections.into_values().flatten().collect();
    }

    /// The rings with backends for ids.
    fn rings(&self) -> BTreeMap<ServiceAddress, Vec<Option<SocketAddr>>> {
        let slots = &self.programmed.slots;
        let named = |id: &u32| slots.get(id).map(|slot| slot.address);
        let ring =
            |(address, ring): (&ServiceAddress, &Vec<u32>)| (*address, ring.iter().map(named).collect());
        self.rings.iter().map(ring).collect()
    }
}

/// Entries of the larger ring whose packets go elsewhere. The index is a mask: the smaller one repeats itself.
fn moved(old: Option<&Vec<Option<SocketAddr>>>, new: Option<&Vec<Option<SocketAddr>>>) -> (usize, usize) {
    let (Some(old), Some(new)) = (old, new) else {
        let only = old.or(new).map_or(0, Vec::len);
        return (only, only);
    };
    let size = old.len().max(new.len());
    let differ = |at: &usize| old[at % old.len()] != new[at % new.len()];
    ((0..size).filter(differ).count(), size)
}

fn service_change(
    address: ServiceAddress,
    was: Option<&Service>,
    is: Option<&Service>,
    moved: (usize, usize),
) -> Option<ServiceChange> {
    let fate = match (was, is) {
        (None, _) => Fate::Comes,
        (Some(_), Some(_)) => Fate::Stays,
        (Some(_), None) => Fate::Goes,
    };
    let settings = matches!((was, is), (Some(was), Some(is)) if was.settings != is.settings);
    let of = |service: Option<&Service>| -> BTreeMap<SocketAddr, Backend> {
        let backends = service.into_iter().flat_map(|service| &service.backends);
        backends
            .map(|backend| (backend.address, backend.clone()))
            .collect()
    };
    let (old, new) = (of(was), of(is));
    let addresses: BTreeSet<_> = old.keys().chain(new.keys()).copied().collect();
    let backends: Vec<BackendChange> = addresses
        .into_iter()
        .filter_map(|address| backend_change(address, old.get(&address), new.get(&address)))
        .collect();
    let differs = fate != Fate::Stays || settings || !backends.is_empty() || moved.0 > 0;
    differs.then(|| ServiceChange {
        name: is.or(was).map(|service| service.name.clone()).unwrap_or_default(),
        address,
        fate,
        settings,
        backends,
        moved,
    })
}

fn backend_change(
    address: SocketAddr,
    old: Option<&Backend>,
    new: Option<&Backend>,
) -> Option<BackendChange> {
    let serves = |backend: &Backend| backend.state == BackendState::Active;
    match (old, new) {
        (old, Some(new)) if serves(new) && !old.is_some_and(serves) => Some(BackendChange::Joins {
            address,
            weight: new.weight,
        }),
        (Some(old), Some(new)) if serves(old) && !serves(new) => Some(BackendChange::Drains {
            address,
            reason: new.reason.clone(),
        }),
        (Some(old), Some(new)) if old.weight != new.weight => Some(BackendChange::Weighs {
            address,
            from: old.weight,
            to: new.weight,
        }),
        (Some(old), None) => Some(BackendChange::Leaves {
            address,
            drain: old.drain,
        }),
        _ => None,
    }
}

impl fmt::Display for Preview {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.services.is_empty() {
            writeln!(f, "no service changes")?;
        }
        for service in &self.services {
            let fate = match service.fate {
                Fate::Comes => ": new",
                Fate::Stays => "",
                Fate::Goes => ": goes",
            };
            writeln!(f, "{} {}{fate}", service.name, service.address)?;
            if service.settings {
                writeln!(f, "  settings change")?;
            }
            for backend in &service.backends {
                writeln!(f, "  {backend}")?;
            }
            let (moved, all) = service.moved;
            let share = moved as f64 * 100.0 / all.max(1) as f64;
            match service.fate {
                Fate::Stays => writeln!(f, "  ring: {moved} of {all} slots move ({share:.1} %)")?,
                Fate::Comes | Fate::Goes => writeln!(f, "  ring: {all} slots")?,
            }
        }
        for rejection in &self.rejections {
            writeln!(f, "would be refused: {rejection}")?;
        }
        Ok(())
    }
}

impl fmt::Display for BackendChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joins { address, weight } => write!(f, "joins  {address}, weight {weight}"),
            Self::Leaves { address, drain } => write!(f, "leaves {address}, old flows go on for {drain:?}"),
            Self::Drains { address, reason } => write!(f, "drains {address}: {reason}"),
            Self::Weighs { address, from, to } => write!(f, "weighs {address}: {to} instead of {from}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc, time::SystemTime};

    use super::*;
    use crate::{config::Config, desired::Wanted, ring};

    const CAPACITIES: Capacities = Capacities {
        services: 64,
        backends: 4096,
        ring_rows: 64,
        acl: 64,
        flows4: 64,
        flows6: 64,
    };

    /// One service whose backends are these last octets and weights.
    fn desired(backends: &[(u8, u32)]) -> Desired {
        let backend = |(octet, weight)| {
            format!("[[services.backends]]\naddress = \"10.0.0.{octet}:80\"\nweight = {weight}\n")
        };
        let backends: String = backends.iter().copied().map(backend).collect();
        let text = format!(
            "interfaces = \"lo\"\n[vips.a]\naddress = \"192.0.2.1\"\n[[services]]\nname = \"web\"\nlisten = \"80\"\n{backends}"
        );
        let config = Config::parse(Path::new("weir.toml"), &text).unwrap();
        let wish = config.services[0].wishes[0].clone();
        let service = Service {
            name: wish.name,
            address: wish.address,
            settings: wish.settings,
            backends: wish.backends,
            slow: BTreeMap::new(),
        };
        let wanted = Wanted {
            service: Arc::new(service),
            source: "etcd".into(),
            created: SystemTime::UNIX_EPOCH,
            kept_until: None,
        };
        Desired {
            services: [(wish.address, wanted)].into(),
            ..Desired::default()
        }
    }

    #[test]
    fn a_leaving_backend_moves_what_the_rings_say_that_it_moves() {
        let all: Vec<(u8, u32)> = (1..=5).map(|octet| (octet, 1)).collect();
        let (before, after) = (desired(&all), desired(&all[1..]));
        let preview = preview(&before, &after, &CAPACITIES, Instant::now());
        let [service] = &preview.services[..] else {
            panic!("{preview}")
        };
        let leaves = BackendChange::Leaves {
            address: ([10, 0, 0, 1], 80).into(),
            drain: Duration::from_secs(30),
        };
        assert_eq!(service.backends, [leaves]);
        // Counted by hand: the two rings over the same ids.
        let ring = |all: &[(u8, u32)]| {
            let member = |(octet, weight): &(u8, u32)| ring::Member {
                address: ([10, 0, 0, *octet], 80).into(),
                weight: *weight,
                id: u32::from(*octet),
            };
            ring::build(&all.iter().map(member).collect::<Vec<_>>(), 1).unwrap()
        };
        let (old, new) = (ring(&all), ring(&all[1..]));
        let moved = old.iter().zip(&new).filter(|(old, new)| old != new).count();
        assert_eq!(service.moved, (moved, old.len()));
        assert!(moved >= old.len() / 5 && moved < old.len() / 3, "{moved}");
        let text = preview.to_string();
        assert!(
            text.contains("leaves 10.0.0.1:80, old flows go on for 30s"),
            "{text}"
        );
    }

    #[test]
    fn services_come_and_go_and_weights_change() {
        let (none, two) = (Desired::default(), desired(&[(1, 1), (2, 1)]));
        let of = |before: &Desired, after: &Desired| preview(before, after, &CAPACITIES, Instant::now());
        assert_eq!(of(&two, &two).to_string(), "no service changes\n");
        let comes = of(&none, &two);
        assert_eq!(
            (comes.services[0].fate, comes.services[0].moved),
            (Fate::Comes, (16384, 16384))
        );
        assert_eq!(of(&two, &none).services[0].fate, Fate::Goes);
        let weighs = of(&two, &desired(&[(1, 3), (2, 1)])).services.remove(0);
        assert!(matches!(
            weighs.backends[..],
            [BackendChange::Weighs { from: 1, to: 3, .. }]
        ));
        // From a half to three quarters: a quarter of the ring.
        assert!(weighs.moved.0.abs_diff(4096) < 500, "{:?}", weighs.moved);
        // A larger ring is another shuffle; it is counted against the old one, repeated.
        let many: Vec<(u8, u32)> = (1..=40).map(|octet| (octet, 1)).collect();
        let larger = of(&two, &desired(&many)).services.remove(0);
        assert_eq!(larger.moved.1, 32768);
        assert!(larger.moved.0 > 30000, "{:?}", larger.moved);
        // What does not fit is told.
        let small = Capacities {
            services: 2,
            backends: 3,
            ..CAPACITIES
        };
        let refused = preview(&none, &desired(&many), &small, Instant::now()).rejections;
        assert!(refused[0].fault.contains("do not fit"), "{refused:?}");
    }
}
