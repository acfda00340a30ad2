//! `weir detach`: takes everything of Weir off the node, whatever version made it. All flows end.

use std::{fs, io, path::Path};

use aya::programs::tc::{self, TcAttachType, TcError};
use rtnetlink::Handle;

use super::{
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
}

/// Removes links, filters, programs and maps pinned under `pin`, and undoes what `state` records. Must run in the
/// network namespace of the agent, and not beside it.
pub async fn detach(pin: &Path, state: &Path) -> io::Result<DetachReport> {
    let mut report = DetachReport::default();
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
    undo(&handle, &state, &mut report).await;
    if report.faults.is_empty() {
        state.remove()?;
    }
    Ok(report)
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
