//! Random scripts: whichever write fails, the maps end as without.

use std::{collections::BTreeMap, fmt::Write};

use proptest::prelude::*;
use weir::datapath::fake::Fault;

use crate::script::run;

/// One thing that happens; numbers are made to fit when the script is written.
#[derive(Clone, Debug)]
enum Event {
    Put { container: u8, state: u8 },
    Remove { container: u8 },
    Drain { container: u8, deadline: u8 },
    Undrain { drain: u8 },
    Sweep { flows: u8 },
    Wait { seconds: u8 },
    Place { address: u8, place: u8 },
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..8u8, 0..6u8).prop_map(|(container, state)| Event::Put { container, state }),
        3 => (0..8u8).prop_map(|container| Event::Remove { container }),
        1 => (0..8u8, 0..9u8).prop_map(|(container, deadline)| Event::Drain { container, deadline }),
        1 => any::<u8>().prop_map(|drain| Event::Undrain { drain }),
        2 => any::<u8>().prop_map(|flows| Event::Sweep { flows }),
        2 => (1..40u8).prop_map(|seconds| Event::Wait { seconds }),
        1 => (0..4u8, 0..4u8).prop_map(|(address, place)| Event::Place { address, place }),
        1 => Just(Event::Restart),
    ]
}

/// Container 0–3 serve one service, 4–7 another at the same addresses.
fn put(container: u8, state: u8) -> String {
    let settings = [
        "",
        ",weight=3",
        ",draining,drain=5",
        ",unready",
        ",weight=0,drain=7",
        ",drain=3",
    ];
    let (name, service) =
        [("web", "203.0.113.1:80/tcp"), ("dns", "203.0.113.2:53/udp")][usize::from(container / 4)];
    let backend = format!("10.0.0.{}:80{}", container % 4 + 1, settings[usize::from(state)]);
    format!("docker put c{container} {container} {name} {service} {backend}\n")
}

fn script(events: &[Event]) -> String {
    let mut text = "device 1 eth0 192.0.2.9\ndevice 2 docker0 172.17.0.1 bridge\n".to_owned();
    for address in 1..=4 {
        writeln!(text, "place 10.0.0.{address} remote 1").unwrap();
    }
    text += "docker reset\n";
    let mut present = BTreeMap::new();
    let mut drains = Vec::new();
    for event in events {
        match event {
            Event::Put { container, state } => {
                present.insert(*container, *state);
                text += &put(*container, *state);
            }
            Event::Remove { container } => {
                present.remove(container);
                writeln!(text, "docker remove c{container}").unwrap();
            }
            Event::Drain { container, deadline } if present.contains_key(container) => {
                let drain = format!("c{container}");
                writeln!(text, "drain {drain} {deadline}s").unwrap();
                if !drains.contains(&drain) {
                    drains.push(drain);
                }
            }
            Event::Undrain { drain } if !drains.is_empty() => {
                let drain = drains.remove(usize::from(*drain) % drains.len());
                writeln!(text, "undrain {drain}").unwrap();
            }
            Event::Drain { .. } | Event::Undrain { .. } => {}
            Event::Sweep { flows } => {
                text += "sweep";
                for address in (0..4).filter(|bit| flows >> bit & 1 == 1) {
                    write!(text, " 10.0.0.{}:80={flows}", address + 1).unwrap();
                }
                text += "\n";
            }
            Event::Wait { seconds } => writeln!(text, "wait {seconds}s").unwrap(),
            Event::Place { address, place } => {
                let place = ["remote 1", "bridge 2", "node", "unroutable"][usize::from(*place)];
                writeln!(text, "place 10.0.0.{} {place}", address + 1).unwrap();
            }
            // The new agent hears of the containers one by one, and of the complete list never.
            Event::Restart => {
                drains.clear();
                text += "restart docker\n";
                text.extend(present.iter().map(|(container, state)| put(*container, *state)));
            }
        }
        // Every state on the way counts, not only the last.
        text += "expect\nend\n";
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn random_changes_end_the_same_whichever_write_fails(
        events in proptest::collection::vec(event(), 1..14),
        write: prop::sample::Index,
        after: bool,
    ) {
        let text = script(&events);
        let clean = run("random", &text, None);
        let fault = if after { Fault::After } else { Fault::Before };
        let write = write.index(clean.writes as usize) as u64;
        let faulty = run("random", &text, Some((write, fault)));
        prop_assert!(
            clean.blessed == faulty.blessed,
            "write {} failing ({:?}): without:\n{}\nwith:\n{}", write, fault, clean.blessed, faulty.blessed
        );
    }
}
