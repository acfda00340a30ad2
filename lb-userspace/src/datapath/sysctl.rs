//! Kernel settings of the network namespace, each recorded before it is changed.

use std::{fs, io, ops::RangeInclusive, path::PathBuf};

use super::state::StateFile;

/// Ports that the kernel does not hand out by itself.
const RESERVED_PORTS: &str = "net.ipv4.ip_local_reserved_ports";
/// Replies of a service to a process of this node come in by `lo` with one of the node's own addresses as source.
const ACCEPT_LOCAL: &str = "net.ipv4.conf.lo.accept_local";

/// A setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("sysctl {name}: {source}: run `sysctl -w {name}={wanted}` by other means")]
pub struct SysctlError {
    /// Its name.
    pub name: String,
    /// The value it should have.
    pub wanted: String,
    /// The kernel's word.
    pub source: io::Error,
}

/// Dots separate, so dots of device names are written as slashes, as sysctl(8) does it.
fn path(name: &str) -> PathBuf {
    let parts = name.split('.').map(|part| part.replace('/', "."));
    PathBuf::from("/proc/sys").join(parts.collect::<Vec<_>>().join("/"))
}

/// Reads a setting.
pub fn read(name: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path(name))?.trim().to_owned())
}

/// Sets a setting and records what it was, unless it is so already.
fn set(state: &StateFile, name: &str, wanted: &str) -> Result<(), SysctlError> {
    let failed = |source| SysctlError {
        name: name.to_owned(),
        wanted: wanted.to_owned(),
        source,
    };
    let before = read(name).map_err(failed)?;
    if before == wanted {
        return Ok(());
    }
    state
        .update(|changes| {
            // The first value counts: a later change is a change of our own.
            changes.sysctls.entry(name.to_owned()).or_insert(before);
        })
        .map_err(failed)?;
    fs::write(path(name), wanted).map_err(failed)
}

/// Sets what the datapath needs; `ports` are those of source translation. Faults, one for each setting.
pub fn apply(state: &StateFile, ports: Option<&RangeInclusive<u16>>) -> Vec<String> {
    let mut faults = Vec::new();
    if let Some(ports) = ports {
        // From the first value, so that a changed range replaces the old one.
        let first = state.get().sysctls.get(RESERVED_PORTS).cloned();
        let base = first.map_or_else(|| read(RESERVED_PORTS), Ok).unwrap_or_default();
        let wanted = merge(&base, ports);
        faults.extend(set(state, RESERVED_PORTS, &wanted).err());
    }
    faults.extend(set(state, ACCEPT_LOCAL, "1").err());
    faults.iter().map(ToString::to_string).collect()
}

/// Puts a recorded value back.
pub fn restore(name: &str, before: &str) -> io::Result<()> {
    // An empty list is written as a line: an empty write is none.
    fs::write(path(name), format!("{before}\n"))
}

/// A warning when the kernel drops packets whose reply would leave by another device.
pub fn rp_filter_warning(device: &str) -> Option<String> {
    let value = |scope: &str| {
        read(&format!("net.ipv4.conf.{}.rp_filter", scope.replace('.', "/")))
            .ok()?
            .parse::<u32>()
            .ok()
    };
    // The larger of the two is in force.
    let strict = value("all").unwrap_or(0).max(value(device).unwrap_or(0)) == 1;
    strict.then(|| {
        let name = device.replace('.', "/");
        format!(
            "device {device}: rp_filter is strict: packets of clients that are routed by another device are lost; \
             run `sysctl -w net.ipv4.conf.{name}.rp_filter=2`"
        )
    })
}

/// A port list (`80,8000-8010`) with a range added, sorted and without overlaps.
fn merge(list: &str, add: &RangeInclusive<u16>) -> String {
    let mut ranges: Vec<(u32, u32)> = list
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
            Some((first.parse().ok()?, last.parse().ok()?))
        })
        .chain([(u32::from(*add.start()), u32::from(*add.end()))])
        .collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if first <= previous.1 + 1 => previous.1 = previous.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    let text = |(first, last): &(u32, u32)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    };
    merged.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_lists_merge() {
        assert_eq!(merge("", &(16384..=32767)), "16384-32767");
        assert_eq!(
            merge("80,8000-8010", &(16384..=32767)),
            "80,8000-8010,16384-32767"
        );
        assert_eq!(merge("32768,20000-20001", &(16384..=32767)), "16384-32768");
        assert_eq!(merge("16384-32767", &(16384..=32767)), "16384-32767");
    }

    #[test]
    fn dots_of_device_names_survive() {
        assert_eq!(
            path("net.ipv4.conf.eth0/7.rp_filter").to_str(),
            Some("/proc/sys/net/ipv4/conf/eth0.7/rp_filter")
        );
    }
}
