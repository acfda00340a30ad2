//! Loads the kernel programs against pinned maps: makes the maps, or adopts those of an earlier agent after
//! comparing them with what this one expects; those of the layout before are copied ([`adopt`](super::adopt)). Pins lie under `<pin>/v<SCHEMA>/{maps,programs,links}`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::MapInfo,
    programs::{Program, ProgramError},
};
use lb_common::{
    maps::{ABI_VERSION, Meta, SCHEMA},
    slot::{Bucket4, Bucket6, SECRET_WORDS, TableSettings},
};

use super::{
    Capacities, MapError, adopt,
    batch::{Table, open_program, run_program},
    shape::{self, SHAPES},
};

/// The program on XDP.
pub const XDP_PROGRAM: &str = "weir_xdp";
/// The program on TC ingress.
pub const TC_INGRESS_PROGRAM: &str = "weir_tc_ingress";
/// The program on TC egress.
pub const TC_EGRESS_PROGRAM: &str = "weir_tc_egress";
/// The program that removes expired flows when it is run by the agent.
pub const SWEEP_PROGRAM: &str = "weir_sweep";
/// The program by which the agent says that it is alive.
pub const HEARTBEAT_PROGRAM: &str = "weir_heartbeat";
/// The program on the tracepoint of failed redirects.
pub const REDIRECT_ERR_PROGRAM: &str = "weir_redirect_err";
const PROGRAMS: [&str; 5] = [
    XDP_PROGRAM,
    TC_INGRESS_PROGRAM,
    TC_EGRESS_PROGRAM,
    SWEEP_PROGRAM,
    HEARTBEAT_PROGRAM,
];

/// Where the pins of this schema lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    /// Under `pin` (`/sys/fs/bpf/weir` unless configured).
    pub fn new(pin: &Path) -> Self {
        Self::of_schema(pin, SCHEMA)
    }
    /// Those of another schema.
    pub(super) fn of_schema(pin: &Path, schema: u32) -> Self {
        Self {
            root: pin.join(format!("v{schema}")),
        }
    }
    /// The directory of this schema.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// Maps, by name.
    pub fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }
    /// Programs, by name.
    pub fn programs(&self) -> PathBuf {
        self.root.join("programs")
    }
    /// Links, by kind and interface index.
    pub fn links(&self) -> PathBuf {
        self.root.join("links")
    }
}

/// Sizes that the maps get when they are first made.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// `[limits]`; flow entries, not connections (two entries each).
    pub limits: Capacities,
    /// Bytes of the event ring, a power of two and a multiple of the page size.
    pub events_bytes: u32,
}

/// Why the programs are not in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The binary was built without its kernel object.
    #[error("this binary holds no kernel programs: run `cargo xtask build-ebpf`, then build again")]
    NotBuilt,
    /// Another agent's maps.
    #[error("the pinned maps under {} were made by another version of Weir ({fault}): run `weir detach` \
             (it ends all flows), then start again", .pins.display())]
    Incompatible {
        /// Where.
        pins: PathBuf,
        /// What differs.
        fault: String,
    },
    /// The object and this agent disagree.
    #[error("kernel object: {0}: build agent and programs from the same source (`cargo xtask build-ebpf`)")]
    Object(String),
    /// The object could not be loaded.
    #[error("kernel object could not be loaded: {0:#}")]
    Load(#[from] Box<EbpfError>),
    /// A program was refused.
    #[error("program {name} was refused by the kernel: {source}")]
    Program {
        /// Its name.
        name: &'static str,
        /// With the verifier's log.
        source: Box<ProgramError>,
    },
    /// A map failed.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The pin directory failed.
    #[error("{}: {source}", .path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

/// Programs in the kernel and maps pinned; nothing attached yet.
#[derive(Debug)]
pub struct Loaded {
    /// The programs.
    pub ebpf: Ebpf,
    /// Where everything is pinned.
    pub pins: Pins,
    /// The maps of an earlier agent were taken over.
    pub adopted: bool,
    /// What people should know.
    pub warnings: Vec<String>,
}

/// Makes or adopts the maps and loads the programs of `object` (an ELF file, aligned to 8 bytes). Packets go on being handled by the programs of an earlier
/// agent until [`super::attach::Attacher`] replaces them.
pub fn load(object: &[u8], pin: &Path, sizes: &Sizes) -> Result<Loaded, LoadError> {
    load_over(object, pin, sizes, &[])
}

/// As [`load`]. `filters` are devices that carry programs as filters of a clsact qdisc, which have no pins to be found by
/// when an earlier layout is adopted.
pub fn load_over(object: &[u8], pin: &Path, sizes: &Sizes, filters: &[String]) -> Result<Loaded, LoadError> {
    if object.is_empty() {
        return Err(LoadError::NotBuilt);
    }
    let pins = Pins::new(pin);
    for directory in [pins.maps(), pins.programs(), pins.links()] {
        fs::create_dir_all(&directory).map_err(|source| LoadError::Pin {
            path: directory,
            source,
        })?;
    }
    let adopted = adopt(&pins)?;
    let earlier = adopt::find(pin)?;
    let enlarged = match &earlier {
        Some(earlier) if !adopted => earlier.sizes(sizes)?,
        _ => *sizes,
    };
    let mut loader = EbpfLoader::new();
    let maps = pins.maps();
    for shape in SHAPES {
        loader.map_pin_path(shape.name, maps.join(shape.name));
        if let Some(entries) = shape.size.of(&enlarged.limits) {
            loader.map_max_entries(shape.name, entries);
        }
    }
    loader.map_max_entries("EVENTS", sizes.events_bytes);
    let mut ebpf = loader.load(object).map_err(Box::new)?;
    let mut warnings = Vec::new();
    for shape in SHAPES {
        let path = maps.join(shape.name);
        let info = match MapInfo::from_pin(&path) {
            Ok(info) => info,
            Err(e) => return Err(LoadError::Object(format!("map {} is missing ({e})", shape.name))),
        };
        if let Some(fault) = mismatch(shape, &info) {
            return Err(LoadError::Object(fault));
        }
        let wanted = shape.size.of(&sizes.limits);
        if let Some(wanted) = wanted.filter(|wanted| *wanted != info.max_entries()) {
            warnings.push(format!(
                "map {} keeps its {} entries: {wanted} (limits.{}) takes effect after `weir detach`",
                shape.name,
                info.max_entries(),
                shape.size.setting()
            ));
        }
    }
    for name in PROGRAMS {
        load_program(&mut ebpf, name, &pins)?;
    }
    seed_table(&maps)?;
    // Nothing is forwarded by it: a kernel without tracepoints serves all the same.
    if let Err(e) = load_program(&mut ebpf, REDIRECT_ERR_PROGRAM, &pins) {
        warnings.push(format!("frames that XDP cannot redirect are not counted: {e}"));
    }
    let meta: Table<u32, Meta> = Table::open(&maps, "META")?;
    let mut hz = meta.get(&0)?.map_or(0, |m| m.hz);
    let now = earlier.as_ref().map_or(Ok(0), |_| clock(&pins))?;
    if let Some(earlier) = earlier.as_ref().filter(|_| !adopted) {
        hz = earlier.copy_maps(&maps, now)?;
    }
    // Last of all: a set of maps without this stamp is known to be incomplete.
    meta.put(
        &0,
        &Meta {
            schema: SCHEMA,
            abi: ABI_VERSION,
            hz,
            _pad: 0,
        },
    )?;
    if let Some(earlier) = &earlier {
        warnings.extend(earlier.take_over(&mut ebpf, &pins, filters, now)?);
    }
    Ok(Loaded {
        ebpf,
        pins,
        adopted: adopted || earlier.is_some(),
        warnings,
    })
}

/// The flow clock.
fn clock(pins: &Pins) -> Result<u32, LoadError> {
    let path = pins.programs().join(SWEEP_PROGRAM);
    open_program(&path)
        .and_then(|program| run_program(std::os::fd::AsFd::as_fd(&program), &[0; 64]))
        .map_err(|source| LoadError::Pin { path, source })
}

/// Chooses the key of the flow tables' hash, once for each set of maps: strangers must not know which flows share a bucket.
fn seed_table(maps: &Path) -> Result<(), LoadError> {
    let table: Table<u32, TableSettings> = Table::open(maps, "TABLE")?;
    if table.get(&0)?.is_some_and(|settings| settings.buckets4 != 0) {
        return Ok(());
    }
    let mut bytes = [0; size_of::<[u64; SECRET_WORDS]>()];
    fill_random(&mut bytes).map_err(|source| LoadError::Pin {
        path: "/dev/urandom".into(),
        source,
    })?;
    let mut secret = [0; SECRET_WORDS];
    for (word, bytes) in secret.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    let buckets4 = Table::<u32, Bucket4>::open(maps, "FLOWS4")?.capacity;
    let buckets6 = Table::<u32, Bucket6>::open(maps, "FLOWS6")?.capacity;
    Ok(table.put(
        &0,
        &TableSettings {
            secret,
            buckets4,
            buckets6,
        },
    )?)
}

/// Random bytes of the kernel's.
fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, bytes)
}

/// Whether there is a complete set of maps to adopt. Remains of a start that was cut short are removed.
fn adopt(pins: &Pins) -> Result<bool, LoadError> {
    let maps = pins.maps();
    let incompatible = |fault: String| LoadError::Incompatible {
        pins: pins.root().to_owned(),
        fault,
    };
    let stamp = match MapInfo::from_pin(maps.join("META")) {
        Ok(info) => {
            if let Some(fault) = shape::find("META").and_then(|shape| mismatch(shape, &info)) {
                return Err(incompatible(fault));
            }
            Table::<u32, Meta>::open(&maps, "META")?
                .get(&0)?
                .unwrap_or_default()
        }
        Err(_) => Meta::default(),
    };
    if stamp.schema == 0 {
        // No stamp: nothing was ever attached to these maps, so nobody misses them.
        if entries(&pins.links())?.is_empty() {
            for path in entries(&maps)? {
                fs::remove_file(&path).map_err(|source| LoadError::Pin { path, source })?;
            }
            return Ok(false);
        }
        return Err(incompatible(
            "programs are attached, but the maps are incomplete".to_owned(),
        ));
    }
    if (stamp.schema, stamp.abi) != (SCHEMA, ABI_VERSION) {
        return Err(incompatible(format!(
            "schema {} layout {}, this one has schema {SCHEMA} layout {ABI_VERSION}",
            stamp.schema, stamp.abi
        )));
    }
    for shape in SHAPES {
        let info = MapInfo::from_pin(maps.join(shape.name))
            .map_err(|e| incompatible(format!("map {} cannot be opened: {e}", shape.name)))?;
        if let Some(fault) = mismatch(shape, &info) {
            return Err(incompatible(fault));
        }
    }
    Ok(true)
}

/// How a map differs from its shape.
fn mismatch(shape: &shape::Shape, info: &MapInfo) -> Option<String> {
    let kind = info.map_type().ok();
    if kind != Some(shape.kind) || info.key_size() != shape.key || info.value_size() != shape.value {
        return Some(format!(
            "map {} is {kind:?} with keys of {} and values of {} bytes, expected {:?}, {} and {}",
            shape.name,
            info.key_size(),
            info.value_size(),
            shape.kind,
            shape.key,
            shape.value
        ));
    }
    None
}

/// The verifier gives up with EAGAIN when a signal arrives while it works, which takes seconds: so often it is asked.
const LOAD_ATTEMPTS: usize = 5;

fn load_program(ebpf: &mut Ebpf, name: &'static str, pins: &Pins) -> Result<(), LoadError> {
    let missing = || LoadError::Object(format!("program {name} is missing or of another type"));
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    let refused = |source| LoadError::Program {
        name,
        source: Box::new(source),
    };
    for attempt in 1..=LOAD_ATTEMPTS {
        let result = match program {
            Program::Xdp(xdp) => xdp.load(),
            Program::SchedClassifier(tc) => tc.load(),
            Program::RawTracePoint(tracepoint) => tracepoint.load(),
            _ => return Err(missing()),
        };
        match result {
            Err(ProgramError::LoadError { io_error, .. })
                if attempt < LOAD_ATTEMPTS && io_error.raw_os_error() == Some(libc::EAGAIN) => {}
            other => {
                other.map_err(refused)?;
                break;
            }
        }
    }
    let (path, fresh) = (
        pins.programs().join(name),
        pins.programs().join(format!("{name}_new")),
    );
    remove_if_there(&fresh)?;
    program.pin(&fresh).map_err(|e| LoadError::Pin {
        path: fresh.clone(),
        source: io::Error::other(e),
    })?;
    fs::rename(&fresh, &path).map_err(|source| LoadError::Pin { path, source })
}

/// Removes a file; a missing one is fine.
fn remove_if_there(path: &Path) -> Result<(), LoadError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(LoadError::Pin {
            path: path.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}

/// The files of a directory; none when it does not exist.
pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let failed = |source| LoadError::Pin {
        path: directory.to_owned(),
        source,
    };
    match fs::read_dir(directory) {
        Ok(found) => found
            .map(|entry| entry.map(|e| e.path()).map_err(failed))
            .collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(failed(e)),
    }
}
