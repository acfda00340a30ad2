//! `weir detach`: takes everything of Weir off the node, whatever version made it. All flows end.

use std::{collections::BTreeSet, fs, io, net::IpAddr, path::Path};

use aya::programs::tc::{self, TcAttachType, TcError};
use lb_common::{addr::Addr16, maps};
use rtnetlink::Handle;

use super::{
    batch::Table,
    load::{LoadError, TC_EGRESS_PROGRAM, TC_INGRESS_PROGRAM, entries},
    lock::PinLock,
    netlink,
    state::StateFile,
    sysctl,
};

/// What was taken away, and what could not be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DetachReport {
    /// For people, in order.
    pub done: Vec<String>,
    /// What is still there and why.
    pub faults: Vec<String>,
    /// VIPs that are no addresses of this node: what a router still sends here for them goes round in a loop.
    pub routed: BTreeSet<IpAddr>,
}

impl DetachReport {
    /// What to do about [`DetachReport::routed`], a line for each; nothing where the node does not forward.
    pub fn advice(&self) -> Vec<String> {
        let line = |vip: &IpAddr| {
            let (family, bits) = match vip {
                IpAddr::V4(_) => ("", 32),
                IpAddr::V6(_) => (" -6", 128),
            };
            format!(
                "VIP {vip} is no address of this node: while a router sends it here, this node sends it back; stop that \
                 by `ip{family} route add unreachable {vip}/{bits}`"
            )
        };
        self.routed.iter().map(line).collect()
    }
}

/// Removes links, filters, programs and maps pinned under `pin`, and undoes what `state` records. `vips` are those of the
/// configuration; those of the maps are known besides. Must run in the network namespace of the agent, and not beside it.
pub async fn detach(pin: &Path, state: &Path, vips: &BTreeSet<IpAddr>) -> io::Result<DetachReport> {
    let mut report = DetachReport {
        routed: vips.clone(),
        ..DetachReport::default()
    };
    // An agent with another socket would lose what it serves by, and put back half of it.
    let _alone = match pin.exists() {
        true => Some(PinLock::take(pin).map_err(io::Error::other)?),
        false => None,
    };
    let state = StateFile::open(state)?;
    let handle = netlink::connect()?;
    // First the way of the packets, then what the packets needed.
    for version in entries(pin).map_err(io::Error::other)? {
        let number = version
            .file_name()
            .and_then(|name| name.to_str()?.strip_prefix('v')?.parse::<u32>().ok());
        if number.is_none() {
            continue;
        }
        report.routed.extend(served(&version.join("maps")));
        for part in ["links", "programs", "maps"] {
            match remove_directory(&version.join(part)) {
                Ok(0) => {}
                Ok(count) => report.done.push(format!("{count} {part} unpinned")),
                Err(e) => report.faults.push(e.to_string()),
            }
        }
        if let Err(e) = fs::remove_dir(&version) {
            report.faults.push(format!("{}: {e}", version.display()));
        }
    }
    let _others_may_use_it = fs::remove_dir(pin);
    // Announced ones go with their addresses.
    let announced = state.get().addresses;
    undo(&handle, &state, &mut report).await;
    match netlink::addresses(&handle).await {
        Ok(own) => report.routed.retain(|vip| {
            !own.iter().any(|own| own.address == *vip)
                && !announced.iter().any(|(_, announced)| announced == vip)
        }),
        Err(e) => report.faults.push(e.to_string()),
    }
    if report.faults.is_empty() {
        state.remove()?;
    }
    Ok(report)
}

/// VIPs in the maps; none where they cannot be read, another version's perhaps.
fn served(maps: &Path) -> Vec<IpAddr> {
    let table = Table::<Addr16, maps::Vip>::open(maps, "VIPS").and_then(|table| table.all());
    let entries = table.unwrap_or_default().into_iter();
    entries.map(|(vip, _)| vip.into()).collect()
}

/// Removes the files of a directory and the directory; how many there were.
fn remove_directory(directory: &Path) -> Result<usize, LoadError> {
    let failed = |source| LoadError::Pin {
        path: directory.to_owned(),
        source,
    };
    let files = entries(directory)?;
    for file in &files {
        fs::remove_file(file).map_err(failed)?;
    }
    match fs::remove_dir(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(files.len()),
    }
}

async fn undo(handle: &Handle, state: &StateFile, report: &mut DetachReport) {
    let changes = state.get();
    let links = match netlink::links(handle).await {
        Ok(links) => links,
        Err(e) => return report.faults.push(e.to_string()),
    };
    // What was on a device that is gone went with it.
    let devices = netlink::by_name(&links);
    for (device, own_qdisc) in &changes.clsact {
        let Some(link) = devices.get(device.as_str()) else {
            continue;
        };
        for (direction, name) in [
            (TcAttachType::Ingress, TC_INGRESS_PROGRAM),
            (TcAttachType::Egress, TC_EGRESS_PROGRAM),
        ] {
            match tc::qdisc_detach_program(device, direction, name) {
                Ok(()) => report
                    .done
                    .push(format!("device {device}: filter {name} removed")),
                Err(TcError::IoError(e)) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => report.faults.push(format!("device {device}: filter {name}: {e}")),
            }
        }
        if *own_qdisc {
            match netlink::remove_empty_clsact(handle, link.ifindex).await {
                Ok(true) => report.done.push(format!("device {device}: clsact qdisc removed")),
                Ok(false) => report
                    .done
                    .push(format!("device {device}: clsact qdisc kept, others use it")),
                Err(e) => report.faults.push(format!("device {device}: {e}")),
            }
        }
    }
    for (device, address) in &changes.addresses {
        let Some(link) = devices.get(device.as_str()) else {
            continue;
        };
        match netlink::remove_address(handle, link.ifindex, *address).await {
            Ok(()) => report
                .done
                .push(format!("device {device}: address {address} removed")),
            Err(e) => report.faults.push(format!("device {device}: {e}")),
        }
    }
    for (device, address) in &changes.neighbours {
        let Some(link) = devices.get(device.as_str()) else {
            continue;
        };
        match netlink::remove_neighbour(handle, link.ifindex, *address).await {
            Ok(()) => report
                .done
                .push(format!("device {device}: neighbour {address} removed")),
            Err(e) => report.faults.push(format!("device {device}: {e}")),
        }
    }
    for (name, before) in &changes.sysctls {
        match sysctl::restore(name, before) {
            Ok(()) => report.done.push(format!("sysctl {name} restored")),
            Err(e) => report
                .faults
                .push(format!("sysctl {name}: {e}: it was `{before}`")),
        }
    }
}
