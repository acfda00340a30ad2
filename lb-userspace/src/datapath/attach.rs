//! Puts the programs on devices and keeps them there: links are pinned, so they outlive the agent, and a new
//! program takes the place of the old one in the link, so that no packet passes between the two.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, RawTracePoint, SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, LinkError, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
        xdp::XdpLink,
    },
    util::KernelVersion,
};

use super::{
    load::{Loaded, Pins, REDIRECT_ERR_PROGRAM, TC_EGRESS_PROGRAM, TC_INGRESS_PROGRAM, XDP_PROGRAM},
    state::StateFile,
};
use crate::status::AttachmentStatus;

/// Priority of our filters where TCX does not exist: before everybody else's.
const FILTER_PRIORITY: u16 = 1;
/// Where the kernel tells of frames that XDP could not redirect.
const REDIRECT_ERR: &str = "xdp_redirect_err";
/// Handle of our filters: fixed, so that a restarted agent replaces its own in place.
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x5745);

/// `bpf.xdp` of the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpChoice {
    /// In the driver, or else generic with a warning.
    #[default]
    Auto,
    /// In the driver alone.
    Native,
    /// In the stack, on any device.
    Generic,
    /// Not at all: TC does everything.
    Off,
}

/// How TC programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcChoice {
    /// TCX from kernel 6.6 on, else filters of a clsact qdisc.
    #[default]
    Auto,
    /// TCX only.
    Tcx,
    /// Filters of a clsact qdisc.
    Clsact,
}

/// What a device is to carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceWish {
    /// Interface index.
    pub ifindex: u32,
    /// Interface name.
    pub name: String,
    /// XDP.
    pub xdp: XdpChoice,
    /// TC egress; ingress always is.
    pub egress: bool,
}

/// Why a device does not carry our programs.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel refused.
    #[error("device {device}: {what} could not be attached: {source}")]
    Program {
        /// Interface name.
        device: String,
        /// Which program, how.
        what: &'static str,
        /// The kernel's word.
        source: Box<ProgramError>,
    },
    /// The pin or the state file could not be written.
    #[error("device {device}: {}: {source}", .path.display())]
    Pin {
        /// Interface name.
        device: String,
        /// Where.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

/// What came of attaching.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// What people should know.
    pub warnings: Vec<String>,
    /// Everything is as wished.
    pub complete: bool,
}

/// Owns the loaded programs and their places.
#[derive(Debug)]
pub struct Attacher {
    ebpf: Ebpf,
    pins: Pins,
    state: StateFile,
    tcx: bool,
    attached: BTreeMap<u32, AttachmentStatus>,
}

impl Attacher {
    /// Of programs just loaded; attaches nothing.
    pub fn new(loaded: Loaded, state: StateFile, choice: TcChoice) -> Self {
        let tcx = match choice {
            TcChoice::Auto => {
                KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
            }
            TcChoice::Tcx => true,
            TcChoice::Clsact => false,
        };
        Self {
            ebpf: loaded.ebpf,
            pins: loaded.pins,
            state,
            tcx,
            attached: BTreeMap::new(),
        }
    }

    /// What is where, by interface index.
    pub fn attached(&self) -> &BTreeMap<u32, AttachmentStatus> {
        &self.attached
    }

    /// Puts the programs on a device, in place of those of an earlier agent. TC serves by itself where XDP is refused, whatever
    /// was wished. `program` is the XDP program that the device had before.
    pub fn attach(&mut self, wish: &DeviceWish, program: Option<u32>) -> Result<Attached, AttachError> {
        let mut warnings = Vec::new();
        self.attach_tc(wish, TcAttachType::Ingress)?;
        if wish.egress {
            self.attach_tc(wish, TcAttachType::Egress)?;
        }
        let (xdp, complete) = match self.attach_xdp(wish, &mut warnings) {
            Ok(mode) => (mode, true),
            Err(e) => {
                warnings = vec![xdp_refused(wish, &e, program)];
                ("-", false)
            }
        };
        let status = AttachmentStatus {
            device: wish.name.clone(),
            xdp: xdp.to_owned(),
            tc: if self.tcx { "tcx" } else { "clsact" }.to_owned(),
            why: String::new(),
        };
        self.attached.insert(wish.ifindex, status);
        Ok(Attached { warnings, complete })
    }

    /// Counts the frames that XDP could not redirect, or ceases to. The fault, if they cannot be counted.
    pub fn count_failed_redirects(&mut self, wanted: bool) -> Option<String> {
        let path = self.pins.links().join("redirect_err");
        // A link to a tracepoint keeps its program: that of an earlier agent goes first, so that nothing is counted twice.
        let _absent = fs::remove_file(&path);
        if !wanted {
            return None;
        }
        let program = self.ebpf.program_mut(REDIRECT_ERR_PROGRAM)?;
        let program: &mut RawTracePoint = program.try_into().ok()?;
        // It could not be loaded, which has been told.
        program.fd().ok()?;
        let attached = program.attach(REDIRECT_ERR).and_then(|id| program.take_link(id));
        let fault = match attached.map(FdLink::from) {
            Ok(link) => link.pin(&path).err().map(|e| e.to_string()),
            Err(e) => Some(root(&e)),
        };
        fault.map(|e| {
            format!(
                "frames that XDP cannot redirect are not counted: tracepoint {REDIRECT_ERR}: {e}: use a kernel with \
                 CONFIG_BPF_EVENTS, or look at `ethtool -S` of the devices"
            )
        })
    }

    /// Forgets a device: takes our programs off it if it still exists under this name, and removes the pins.
    pub fn forget(&mut self, ifindex: u32, name: Option<&str>) {
        let status = self.attached.remove(&ifindex);
        for path in self.link_pins(ifindex) {
            if let Err(e) = fs::remove_file(&path)
                && e.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), error = %e, "link pin could not be removed");
            }
        }
        // Filters are gone with their device; on a device that stays they are taken off by name.
        if let (Some(_), Some(name), false) = (status, name, self.tcx) {
            let device = name;
            for (direction, name) in [
                (TcAttachType::Ingress, TC_INGRESS_PROGRAM),
                (TcAttachType::Egress, TC_EGRESS_PROGRAM),
            ] {
                if let Err(e) = tc::qdisc_detach_program(device, direction, name) {
                    tracing::debug!(device, error = %e, "no filter to remove");
                }
            }
        }
    }

    /// Indexes of the devices that have link pins, of this agent or an earlier one.
    pub fn pinned_devices(&self) -> Vec<u32> {
        let paths = super::load::entries(&self.pins.links()).unwrap_or_default();
        let mut found: Vec<u32> = paths.iter().filter_map(|path| ifindex_of(path)).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    fn link_pins(&self, ifindex: u32) -> Vec<PathBuf> {
        ["xdp_native", "xdp_generic", "tc_ingress", "tc_egress"]
            .iter()
            .map(|kind| self.link(kind, ifindex))
            .collect()
    }

    fn link(&self, kind: &str, ifindex: u32) -> PathBuf {
        self.pins.links().join(format!("{kind}_{ifindex}"))
    }

    /// Attaches XDP as wished; which mode it became.
    fn attach_xdp(
        &mut self,
        wish: &DeviceWish,
        warnings: &mut Vec<String>,
    ) -> Result<&'static str, AttachError> {
        let (native, generic) = (
            self.link("xdp_native", wish.ifindex),
            self.link("xdp_generic", wish.ifindex),
        );
        // A device has room for one XDP program: the mode that is not wanted goes first.
        let unwanted: &[&PathBuf] = match wish.xdp {
            XdpChoice::Off => &[&native, &generic],
            XdpChoice::Native => &[&generic],
            XdpChoice::Generic => &[&native],
            XdpChoice::Auto => &[],
        };
        for path in unwanted {
            let _absent = fs::remove_file(path);
        }
        if wish.xdp == XdpChoice::Off {
            return Ok("-");
        }
        let program = program::<Xdp>(&mut self.ebpf, XDP_PROGRAM, wish)?;
        for (path, mode) in [(&native, "native"), (&generic, "generic")] {
            if let Some(link) = pinned(path)
                && replace_xdp(program, link).is_ok()
            {
                return Ok(mode);
            }
            // The link of a device that is gone, or none at all.
            let _absent = fs::remove_file(path);
        }
        let mut first = None;
        if wish.xdp != XdpChoice::Generic {
            match new_xdp(program, wish.ifindex, XdpMode::Driver) {
                Ok(link) => return pin(link, &native, wish).map(|()| "native"),
                Err(source) if wish.xdp == XdpChoice::Native => {
                    return Err(refused(wish, "native XDP", source));
                }
                Err(e) => first = Some(e),
            }
        }
        match (new_xdp(program, wish.ifindex, XdpMode::Skb), first) {
            (Ok(link), first) => {
                warnings.extend(first.map(|e| {
                    format!(
                        "device {}: native XDP is not possible ({}): generic XDP is used, which is slower",
                        wish.name,
                        root(&e)
                    )
                }));
                pin(link, &generic, wish).map(|()| "generic")
            }
            (Err(_), Some(native)) => Err(refused(wish, "XDP", native)),
            (Err(e), None) => Err(refused(wish, "generic XDP", e)),
        }
    }

    fn attach_tc(&mut self, wish: &DeviceWish, direction: TcAttachType) -> Result<(), AttachError> {
        let (name, kind) = match direction {
            TcAttachType::Egress => (TC_EGRESS_PROGRAM, "tc_egress"),
            _ => (TC_INGRESS_PROGRAM, "tc_ingress"),
        };
        if !self.tcx {
            return self.attach_filter(wish, direction, name);
        }
        let path = self.link(kind, wish.ifindex);
        let program = program::<SchedClassifier>(&mut self.ebpf, name, wish)?;
        if let Some(link) = pinned(&path)
            && replace_tc(program, link).is_ok()
        {
            return Ok(());
        }
        let _absent = fs::remove_file(&path);
        let id = program
            .attach_with_options(
                &wish.name,
                direction,
                TcAttachOptions::TcxOrder(LinkOrder::first()),
            )
            .map_err(|e| refused(wish, kind, e))?;
        let link = program.take_link(id).map_err(|e| refused(wish, kind, e))?;
        let link = FdLink::try_from(link).map_err(|e| refused(wish, kind, no_link(e)))?;
        pin(link, &path, wish)
    }

    /// The way of kernels before 6.6: a filter lives on the device, not in a link, so it needs no pin.
    fn attach_filter(
        &mut self,
        wish: &DeviceWish,
        direction: TcAttachType,
        name: &'static str,
    ) -> Result<(), AttachError> {
        let what = "TC filter";
        let own_qdisc = match tc::qdisc_add_clsact(&wish.name) {
            Ok(()) => true,
            Err(TcError::NetlinkError(e)) if e.raw_os_error() == Some(libc::EEXIST) => {
                let known = self.state.get().clsact;
                // A device that has been renamed keeps its qdisc.
                let before = self.attached.get(&wish.ifindex).map(|status| &status.device);
                let own = known.get(&wish.name).or_else(|| known.get(before?));
                own.copied().unwrap_or(false)
            }
            Err(e) => return Err(refused(wish, what, e.into())),
        };
        self.state
            .update(|changes| {
                changes.clsact.insert(wish.name.clone(), own_qdisc);
            })
            .map_err(|source| AttachError::Pin {
                device: wish.name.clone(),
                path: "state file".into(),
                source,
            })?;
        let program = program::<SchedClassifier>(&mut self.ebpf, name, wish)?;
        let old = SchedClassifierLink::attached(&wish.name, direction, FILTER_PRIORITY, FILTER_HANDLE, None)
            .map_err(|e| refused(wish, what, ProgramError::IOError(e)))?;
        let id = match program.attach_to_link(old) {
            Ok(id) => id,
            // There is none to replace.
            Err(_) => {
                let options = NlOptions {
                    priority: FILTER_PRIORITY,
                    handle: FILTER_HANDLE,
                    classid: None,
                };
                program
                    .attach_with_options(&wish.name, direction, TcAttachOptions::Netlink(options))
                    .map_err(|e| refused(wish, what, e))?
            }
        };
        // The filter shall outlive the agent, and dropping the link would remove it.
        std::mem::forget(program.take_link(id).map_err(|e| refused(wish, what, e))?);
        Ok(())
    }
}

/// Whether a link pin is of XDP.
pub(super) fn is_xdp_link(path: &Path) -> bool {
    kind_of(path).is_some_and(|kind| kind.starts_with("xdp"))
}

fn kind_of(path: &Path) -> Option<&str> {
    Some(path.file_name()?.to_str()?.rsplit_once('_')?.0)
}

/// Puts our program in the place of the one that a pinned link holds, whoever pinned it.
pub(super) fn replace_link(ebpf: &mut Ebpf, path: &Path) -> Result<(), ProgramError> {
    let other = |what: &'static str| ProgramError::IOError(io::Error::new(io::ErrorKind::NotFound, what));
    let link = pinned(path).ok_or_else(|| other("no link"))?;
    let name = match kind_of(path) {
        Some("tc_ingress") => TC_INGRESS_PROGRAM,
        Some("tc_egress") => TC_EGRESS_PROGRAM,
        Some("xdp_native" | "xdp_generic") => XDP_PROGRAM,
        _ => return Err(other("no kind of link that Weir has")),
    };
    match ebpf.program_mut(name) {
        Some(aya::programs::Program::Xdp(program)) => replace_xdp(program, link),
        Some(aya::programs::Program::SchedClassifier(program)) => replace_tc(program, link),
        _ => Err(other(name)),
    }
}

/// Puts our programs in the place of our filters on a device, where there are some.
pub(super) fn replace_filters(ebpf: &mut Ebpf, device: &str) {
    for (direction, name) in [
        (TcAttachType::Ingress, TC_INGRESS_PROGRAM),
        (TcAttachType::Egress, TC_EGRESS_PROGRAM),
    ] {
        let Some(aya::programs::Program::SchedClassifier(program)) = ebpf.program_mut(name) else {
            continue;
        };
        let old = SchedClassifierLink::attached(device, direction, FILTER_PRIORITY, FILTER_HANDLE, None)
            .map_err(ProgramError::IOError);
        match old
            .and_then(|old| program.attach_to_link(old))
            .and_then(|id| program.take_link(id))
        {
            // As in `attach_filter`.
            Ok(link) => std::mem::forget(link),
            Err(e) => tracing::debug!(device, error = %e, "no filter to replace"),
        }
    }
}

/// The interface index in the name of a link pin.
pub(super) fn ifindex_of(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.rsplit_once('_')?.1.parse().ok()
}

/// Why TC serves alone on a device where XDP was wished, and what to do. `program` is the one that was there before.
fn xdp_refused(wish: &DeviceWish, error: &AttachError, program: Option<u32>) -> String {
    let taken = match error {
        AttachError::Program { source, .. } => errno(source),
        AttachError::Pin { .. } => None,
    };
    let device = &wish.name;
    match (taken, program) {
        (Some(libc::EBUSY | libc::EEXIST), program) => format!(
            "device {device}: another XDP program{} is attached: TC alone serves, which is slower; take it off (`ip link set dev \
             {device} xdp off`) and Weir takes its place, or set `bpf.xdp = \"off\"`",
            program.map_or(String::new(), describe)
        ),
        _ => format!(
            "{error} ({}): TC alone serves, which is slower; set `bpf.xdp = \"off\"` to leave it at that",
            root(error)
        ),
    }
}

/// Number and name of a program.
fn describe(id: u32) -> String {
    let mut loaded = aya::programs::loaded_programs().flatten();
    let name = loaded
        .find(|program| program.id() == id)
        .and_then(|program| Some(format!(" `{}`", program.name_as_str()?)));
    format!(" (id {id}{})", name.unwrap_or_default())
}

/// The kernel's error number behind an error.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && let Some(number) = io.raw_os_error()
        {
            return Some(number);
        }
        next = error.source();
    }
    None
}

fn refused(wish: &DeviceWish, what: &'static str, source: ProgramError) -> AttachError {
    AttachError::Program {
        device: wish.name.clone(),
        what,
        source: Box::new(source),
    }
}

/// The last cause of an error: the kernel's own word.
fn root(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(next) = last.source() {
        last = next;
    }
    last.to_string()
}

/// A link that is none, or not of this kind.
fn no_link(error: LinkError) -> ProgramError {
    ProgramError::IOError(io::Error::other(error))
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str, wish: &DeviceWish) -> Result<&'a mut P, AttachError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let missing = || ProgramError::IOError(io::Error::new(io::ErrorKind::NotFound, name));
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| refused(wish, "program", missing()))?;
    program.try_into().map_err(|e| refused(wish, "program", e))
}

fn pinned(path: &Path) -> Option<FdLink> {
    path.exists()
        .then(|| PinnedLink::from_pin(path).ok().map(FdLink::from))
        .flatten()
}

fn pin(link: FdLink, path: &Path, wish: &DeviceWish) -> Result<(), AttachError> {
    match link.pin(path) {
        Ok(_pinned) => Ok(()),
        Err(e) => Err(AttachError::Pin {
            device: wish.name.clone(),
            path: path.to_owned(),
            source: io::Error::other(e),
        }),
    }
}

/// Attaches through a link. The loader's way around the link (netlink) is refused: it cannot be pinned.
fn new_xdp(program: &mut Xdp, ifindex: u32, mode: XdpMode) -> Result<FdLink, ProgramError> {
    let id = program.attach_to_if_index(ifindex, mode)?;
    FdLink::try_from(program.take_link(id)?).map_err(no_link)
}

fn replace_xdp(program: &mut Xdp, link: FdLink) -> Result<(), ProgramError> {
    let id = program.attach_to_link(XdpLink::try_from(link).map_err(no_link)?)?;
    // The pin holds the link; ours may go.
    drop(program.take_link(id)?);
    Ok(())
}

fn replace_tc(program: &mut SchedClassifier, link: FdLink) -> Result<(), ProgramError> {
    let id = program.attach_to_link(SchedClassifierLink::try_from(link).map_err(no_link)?)?;
    drop(program.take_link(id)?);
    Ok(())
}
