//! Adoption of the maps of the layout before: an agent that finds them copies what they hold into maps of its own, puts its
//! programs in the place of the earlier ones, and copies what came meanwhile.
//!
//! No packet is lost on the way. First the maps are copied, all but the flows. Then the new programs take over link by
//! link, while their flow table is empty: a packet without a flow there is handed to the earlier program of its hook by
//! a tail call (`EARLIER`), untouched and not counted, and that goes on over its own maps, old flows and new ones alike. The
//! new XDP program passes such packets to TC, because a program for frames of several buffers cannot call one of another
//! kind; TC is complete. Then the flows are copied, pass after pass, and whichever is copied is the new programs' from
//! then on. When a pass finds but few, new flows are made by the new programs; what the earlier ones have made last comes with
//! the last pass, and their maps are removed.
//!
//! An agent that dies meanwhile leaves both sets of maps and the pinned `EARLIER`, so packets go on being handled; the next
//! one finds both sets and goes on.
//!
//! From one layout to the next: a value whose fields are the beginning of the new value needs nothing here, fields that are
//! appended are zero. The others are in [`Copy::of`] and in a module of the earlier layout's own ([`layout2`]).

mod flows;
pub mod layout2;
mod raw;

use std::{fs, io, path::Path, time::Duration};

use aya::Ebpf;
use lb_common::maps::{
    Backend, Cursor, Device, FragmentPorts, Meta, Settings, adopting, device_flags, earlier,
};

use self::{flows::Copying, raw::RawMap};
use super::{
    MapError, attach,
    batch::{Table, open_program},
    load::{LoadError, Pins, Sizes, TC_EGRESS_PROGRAM, TC_INGRESS_PROGRAM, entries},
    shape::{SHAPES, Shape, Size},
};

/// As few flows in one pass as can be copied while new ones are made elsewhere.
const FEW: u64 = 64;
/// Passes before the change, however many flows come meanwhile.
const PASSES: usize = 16;
/// How long a packet may be inside a program, where the kernel cannot tell when all have left.
const INSIDE: Duration = Duration::from_millis(50);

/// How a map is copied.
enum Copy {
    /// The value is the beginning of the new one.
    Same,
    /// The same, with zeros behind it, and this is done to it.
    Changed(fn(&mut [u8], u32)),
    /// Made anew.
    Not,
}

impl Copy {
    /// From layout 2 to layout 3.
    fn of(name: &str) -> Self {
        match name {
            // `FLOWS4` and `FLOWS6`: see `flows`. `CURSORS`: see `copy_cursors`. The rest begins empty or is written by `load`.
            "FLOWS4" | "FLOWS6" | "CURSORS" | "SERVICE_FLOWS" | "TABLE" | "EVENTS" | "EARLIER" | "META" => {
                Self::Not
            }
            "DEVICES" => Self::Changed(device),
            "FRAGMENTS" => Self::Changed(fragment),
            "SETTINGS" => Self::Changed(settings),
            _ => Self::Same,
        }
    }
}

/// Every device that is no bridge may be an uplink until the network is looked at.
fn device(value: &mut [u8], _now: u32) {
    let at = std::mem::offset_of!(Device, flags);
    if let Some(&[low, high]) = value.get(at..at + 2) {
        let mut flags = u16::from_ne_bytes([low, high]);
        if flags & device_flags::BRIDGE == 0 {
            flags |= device_flags::UPLINK;
        }
        value[at..at + 2].copy_from_slice(&flags.to_ne_bytes());
    }
}

/// Met now: earlier fragments have no time.
fn fragment(value: &mut [u8], now: u32) {
    let at = std::mem::offset_of!(FragmentPorts, seen);
    value[at..at + 4].copy_from_slice(&now.to_ne_bytes());
}

fn settings(value: &mut [u8], _now: u32) {
    let at = std::mem::offset_of!(Settings, adopting);
    value[at..at + 4].copy_from_slice(&adopting::ALL.to_ne_bytes());
}

/// Maps of the layout before, pinned beside ours.
#[derive(Debug)]
pub struct Earlier {
    pins: Pins,
    hz: u32,
}

/// The maps of the layout before, if there are any.
///
/// # Errors
/// They are of a layout that cannot be adopted.
pub fn find(pin: &Path) -> Result<Option<Earlier>, LoadError> {
    let pins = Pins::of_schema(pin, layout2::SCHEMA);
    let incompatible = |fault: String| LoadError::Incompatible {
        pins: pins.root().to_owned(),
        fault,
    };
    let meta = if pins.maps().join("META").exists() {
        Table::<u32, Meta>::open(&pins.maps(), "META")?
            .get(&0)?
            .unwrap_or_default()
    } else {
        Meta::default()
    };
    if (meta.schema, meta.abi) == (layout2::SCHEMA, layout2::ABI) {
        return Ok(Some(Earlier { pins, hz: meta.hz }));
    }
    if meta.schema != 0 {
        return Err(incompatible(format!(
            "schema {} layout {}, and only schema {} layout {} can be adopted",
            meta.schema,
            meta.abi,
            layout2::SCHEMA,
            layout2::ABI
        )));
    }
    if !entries(&pins.links())?.is_empty() {
        return Err(incompatible(
            "programs are attached, but the maps are incomplete".to_owned(),
        ));
    }
    // The rest of a start that was cut short, or of an adoption that was over.
    remove(&pins)?;
    Ok(None)
}

impl Earlier {
    /// Sizes for the new maps, such that all of these has room.
    pub fn sizes(&self, sizes: &Sizes) -> Result<Sizes, LoadError> {
        let mut sizes = *sizes;
        for shape in SHAPES {
            let limits = &mut sizes.limits;
            let limit = match (shape.name, shape.size) {
                ("SERVICES", _) => &mut limits.services,
                (_, Size::Backends) => &mut limits.backends,
                (_, Size::RingRows) => &mut limits.ring_rows,
                (_, Size::Acl) => &mut limits.acl,
                _ => continue,
            };
            *limit = (*limit).max(RawMap::open(&self.pins.maps(), shape.name)?.capacity);
        }
        Ok(sizes)
    }

    /// Copies all but the flows into maps that nothing is attached to yet, and hands the new programs the earlier ones.
    /// `now` is the flow clock.
    pub fn copy_maps(&self, to: &Path, now: u32) -> Result<u32, LoadError> {
        for shape in SHAPES {
            copy(shape, &self.pins.maps(), to, now)?;
        }
        copy_cursors(&self.pins.maps(), to)?;
        Ok(self.hz)
    }

    /// Puts the new programs in the place of the earlier ones, moves the flows, and removes the earlier maps. `filters`: devices
    /// whose programs are filters, not links.
    pub fn take_over(
        &self,
        ebpf: &mut Ebpf,
        pins: &Pins,
        filters: &[String],
        now: u32,
    ) -> Result<Vec<String>, LoadError> {
        let mut warnings = Vec::new();
        let programs: Table<u32, u32> = Table::open(&pins.maps(), "EARLIER")?;
        for (index, name) in [
            (earlier::INGRESS, TC_INGRESS_PROGRAM),
            (earlier::EGRESS, TC_EGRESS_PROGRAM),
        ] {
            let path = self.pins.programs().join(name);
            let program = open_program(&path).map_err(|source| LoadError::Pin { path, source })?;
            programs.put(&index, &(std::os::fd::AsRawFd::as_raw_fd(&program) as u32))?;
        }
        set_stage(pins, adopting::ALL)?;
        self.take_links(ebpf, pins, filters, &mut warnings)?;
        wait_for_packets();
        let mut copying = Copying::new(&self.pins.maps(), &pins.maps())?;
        let (mut copied, mut lost, mut passes) = (0, 0, 0);
        loop {
            let count = copying.pass()?;
            (copied, lost, passes) = (copied + count.copied, lost + count.lost, passes + 1);
            if count.copied < FEW || passes == PASSES {
                break;
            }
        }
        // Learnt by the earlier programs meanwhile.
        for name in ["AFFINITY", "FRAGMENTS"] {
            if let Some(shape) = super::shape::find(name) {
                copy(shape, &self.pins.maps(), &pins.maps(), now)?;
            }
        }
        for stage in [adopting::KNOWN, adopting::NONE] {
            set_stage(pins, stage)?;
            wait_for_packets();
            let count = copying.pass()?;
            (copied, lost) = (copied + count.copied, lost + count.lost);
        }
        for index in [earlier::INGRESS, earlier::EGRESS] {
            programs.remove(&index)?;
        }
        tracing::info!(flows = copied, passes, "maps of layout {} adopted", layout2::ABI);
        if lost != 0 {
            warnings.push(format!(
                "{lost} flows of an earlier version found no room and end: raise `limits.flows4` and `limits.flows6`"
            ));
        }
        remove(&self.pins)?;
        Ok(warnings)
    }

    /// TC first: when the new XDP program passes what it does not know, somebody must be there.
    fn take_links(
        &self,
        ebpf: &mut Ebpf,
        pins: &Pins,
        filters: &[String],
        warnings: &mut Vec<String>,
    ) -> Result<(), LoadError> {
        let mut links = entries(&self.pins.links())?;
        links.sort_by_key(|path| attach::is_xdp_link(path));
        for device in filters {
            attach::replace_filters(ebpf, device);
        }
        for from in links {
            if let Err(e) = attach::replace_link(ebpf, &from) {
                warnings.push(format!(
                    "{}: the program of an earlier version could not be replaced in its place: {e}: it is attached anew",
                    from.display()
                ));
                fs::remove_file(&from).map_err(|source| LoadError::Pin { path: from, source })?;
                continue;
            }
            let to = pins.links().join(from.file_name().unwrap_or_default());
            fs::rename(&from, &to).map_err(|source| LoadError::Pin { path: from, source })?;
        }
        Ok(())
    }
}

/// Copies a map.
fn copy(shape: &Shape, from: &Path, to: &Path, now: u32) -> Result<(), LoadError> {
    let how = Copy::of(shape.name);
    if matches!(how, Copy::Not) || !from.join(shape.name).exists() {
        return Ok(());
    }
    let (from, to) = (RawMap::open(from, shape.name)?, RawMap::open(to, shape.name)?);
    if from.kind != to.kind || from.key != to.key || from.value > to.value {
        return Err(LoadError::Object(format!(
            "map {} of the earlier layout is {:?} with keys of {} and values of {} bytes, which are not the beginning of {:?}, \
             {} and {}",
            shape.name, from.kind, from.key, from.value, to.kind, to.key, to.value
        )));
    }
    from.each(|key, mut values| {
        if let Copy::Changed(change) = how {
            for value in &mut values {
                value.resize(to.value, 0);
                change(value, now);
            }
        }
        to.put(key, &values)
    })?;
    Ok(())
}

/// Layout 2 had a cursor on each CPU. Sources are dealt out from behind the last of them.
fn copy_cursors(from: &Path, to: &Path) -> Result<(), LoadError> {
    let from = RawMap::open(from, "CURSORS")?;
    let backends: Table<u32, Backend> = Table::open(to, "BACKENDS")?;
    let to: Table<u32, Cursor> = Table::open(to, "CURSORS")?;
    from.each(|key, values| {
        let Some(id) = key.try_into().ok().map(u32::from_ne_bytes) else {
            return Ok(());
        };
        let cursors = values.iter().filter_map(|value| value.as_slice().try_into().ok());
        let last = cursors.map(u32::from_ne_bytes).max().unwrap_or(0);
        let count = backends.get(&id)?.map_or(1, |backend| backend.snat_count.max(1));
        let next = u64::from(last) * u64::from(count);
        to.put(
            &id,
            &Cursor {
                next,
                ..Cursor::default()
            },
        )
    })?;
    Ok(())
}

/// Tells the programs how far the adoption is.
fn set_stage(pins: &Pins, stage: u32) -> Result<(), MapError> {
    let table: Table<u32, Settings> = Table::open(&pins.maps(), "SETTINGS")?;
    let settings = table.get(&0)?.unwrap_or_default();
    table.put(
        &0,
        &Settings {
            adopting: stage,
            ..settings
        },
    )
}

/// Waits until every packet that is inside a program now has left it: programs run in read sections of RCU, and this
/// system call waits for a grace period.
fn wait_for_packets() {
    /// `MEMBARRIER_CMD_GLOBAL`.
    const GLOBAL: libc::c_int = 1;
    // SAFETY: three numbers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result != 0 {
        std::thread::sleep(INSIDE);
    }
}

/// Removes the pins of a schema.
fn remove(pins: &Pins) -> Result<(), LoadError> {
    // The stamp last: without it nobody would know what the rest is.
    for directory in [pins.links(), pins.programs(), pins.maps()] {
        let mut files = entries(&directory)?;
        files.sort_by_key(|path| path.ends_with("META"));
        for path in files {
            fs::remove_file(&path).map_err(|source| LoadError::Pin { path, source })?;
        }
    }
    for path in [pins.links(), pins.programs(), pins.maps(), pins.root().to_owned()] {
        match fs::remove_dir(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(LoadError::Pin { path, source });
            }
            _ => {}
        }
    }
    Ok(())
}
