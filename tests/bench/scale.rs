//! Memory and sweep time at full size: 1,000 services, 64 Ki backends, 1,000,000 connections.

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use lb_common::{
    addr::{Addr16, Be16, Hop},
    limits::{DEFAULT_FLOWS6, EVENTS_BYTES, MAX_ACL_ENTRIES, RING_ROW},
    maps::{Backend, NO_RING, Service, ServiceKey, Timeouts, backend_state, flow_state},
};
use lb_tests::{slots, world::Conn};
use weir::datapath::{
    Capacities, MapOp, Maps as _,
    bpf::KernelMaps,
    flow_table::FlowMaps,
    load::{Loaded, Sizes, load},
    object,
    preflight::preflight,
    sweep::Sweeper,
};

const SERVICES: u32 = 1_000;
const BACKENDS: u32 = 1 << 16;
const CONNECTIONS: u32 = 1_000_000;
/// Rows for the ring of each service, and half as many for those being filled.
const RING_ROWS: u32 = SERVICES + SERVICES / 2;
/// Ticks after which the connections of this benchmark are over.
const IDLE: u32 = 1 << 20;

pub fn run() -> Result<()> {
    let pin = Path::new("/sys/fs/bpf").join(format!("weir-scale-{:x}", std::process::id()));
    preflight(&pin)?;
    let result = measure(&pin);
    std::fs::remove_dir_all(&pin)?;
    result
}

fn measure(pin: &Path) -> Result<()> {
    let sizes = Sizes {
        limits: Capacities {
            services: SERVICES + 1,
            backends: BACKENDS + 1,
            ring_rows: RING_ROWS,
            acl: MAX_ACL_ENTRIES,
            flows4: CONNECTIONS,
            flows6: DEFAULT_FLOWS6,
        },
        events_bytes: EVENTS_BYTES,
    };
    let loaded = load(object::programs()?, pin, &sizes)?;
    let mut maps = KernelMaps::open(&loaded.pins.maps())?;
    program(&mut maps)?;
    memory(&loaded)?;
    sweeps(&loaded)
}

/// Writes every service with its ring and every backend.
fn program(maps: &mut KernelMaps) -> Result<()> {
    let start = std::time::Instant::now();
    for id in 1..=BACKENDS {
        let backend = Backend {
            hop: Hop::new([2, 0, 0, 0, 0, 1], 1),
            addr: Addr16::from(std::net::IpAddr::from((0x0a02_0000 | id).to_be_bytes())),
            port: Be16::new(80),
            state: backend_state::ACTIVE,
            epoch: 1,
            service: service_of(id),
            ..Backend::default()
        };
        maps.apply(&MapOp::PutBackend { id, backend })?;
    }
    for id in 1..=SERVICES {
        let own: Vec<u32> = (1..=BACKENDS).filter(|b| service_of(*b) == id).collect();
        let ring = own.iter().copied().cycle().take(RING_ROW).collect();
        maps.apply(&MapOp::PutRing { row: id - 1, ring })?;
        let timeouts = Timeouts {
            established: IDLE,
            syn: IDLE,
            closing: IDLE,
            udp: IDLE,
        };
        maps.apply(&MapOp::PutTimeouts {
            service: id,
            timeouts,
        })?;
        let key = ServiceKey {
            vip: Addr16::from(std::net::IpAddr::from((0xc633_0000 | id).to_be_bytes())),
            port: Be16::new(80),
            proto: 6,
        };
        let service = Service {
            id,
            generation: 1,
            ring_row: id - 1,
            previous_row: NO_RING,
            ..Service::default()
        };
        maps.apply(&MapOp::PutService { key, service })?;
    }
    println!(
        "{SERVICES} services, {BACKENDS} backends and {SERVICES} rings written in {:.2} s",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The service of a backend: they are dealt out.
const fn service_of(backend: u32) -> u32 {
    1 + backend % SERVICES
}

/// What the kernel accounts for each map.
fn memory(loaded: &Loaded) -> Result<()> {
    let rows: [(&str, &[&str], u32); 5] = [
        ("connection (IPv4, both directions)", &["FLOWS4"], CONNECTIONS),
        ("ring of 2^14 entries", &["RINGS"], RING_ROWS),
        ("backend", &["BACKENDS"], BACKENDS),
        (
            "backend's counters and port cursor, all CPUs",
            &["BACKEND_STATS", "CURSORS"],
            BACKENDS,
        ),
        (
            "service",
            &["SERVICES", "TIMEOUTS", "SERVICE_STATS", "VIPS"],
            SERVICES,
        ),
    ];
    println!("{:<48} {:>10} {:>10}", "memory of one", "bytes", "all, MiB");
    for (name, maps, count) in rows {
        let bytes = maps
            .iter()
            .map(|map| memlock(&loaded.pins.maps().join(map)))
            .sum::<Result<u64>>()?;
        println!(
            "{name:<48} {:>10.0} {:>10.1}",
            bytes as f64 / f64::from(count),
            bytes as f64 / f64::from(1 << 20)
        );
    }
    Ok(())
}

fn memlock(pin: &Path) -> Result<u64> {
    let map = MapData::from_pin(pin)?;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd()))?;
    let line = info.lines().find_map(|line| line.strip_prefix("memlock:"));
    Ok(line.context("the kernel tells no memlock")?.trim().parse()?)
}

/// Fills the table and sweeps it: once with all alive, once with half expired.
fn sweeps(loaded: &Loaded) -> Result<()> {
    let sweeper = Sweeper::open(&loaded.pins)?;
    let flows = FlowMaps::open(&loaded.pins.maps())?;
    let now = sweeper.now()?;
    let start = std::time::Instant::now();
    for n in 0..CONNECTIONS {
        slots::insert(&flows, &connection(n), now)?;
    }
    println!(
        "{CONNECTIONS} connections written in {:.2} s",
        start.elapsed().as_secs_f64()
    );
    let report = sweeper.sweep(None)?;
    ensure!(
        (report.total, report.expired) == (CONNECTIONS.into(), 0),
        "the sweep found {} connections and {} expired ones",
        report.total,
        report.expired
    );
    println!("sweep, none expired: {:.3} s", report.took.as_secs_f64());
    for n in 0..CONNECTIONS / 2 {
        let connection = connection(n);
        ensure!(slots::remove(&flows, &connection), "a connection is not there");
        slots::insert(&flows, &connection, now.wrapping_sub(2 * IDLE))?;
    }
    let report = sweeper.sweep(None)?;
    ensure!(
        report.expired == u64::from(CONNECTIONS / 2),
        "the sweep ended {} connections instead of {}",
        report.expired,
        CONNECTIONS / 2
    );
    println!(
        "sweep, half expired and ended: {:.3} s",
        report.took.as_secs_f64()
    );
    Ok(())
}

/// Connection number `n`: 2^14 ports of each client, a backend a client.
fn connection(n: u32) -> Conn {
    let (block, port) = (n >> 14, 0x4000 | (n & 0x3fff) as u16);
    let id = 1 + block;
    let service = service_of(id);
    let ip = |base: u32, host: u32| std::net::IpAddr::from((base | host).to_be_bytes());
    Conn {
        proto: 6,
        client: (ip(0x0a01_0000, block), port),
        vip: (ip(0xc633_0000, service), 80),
        backend: (ip(0x0a02_0000, id), 80),
        source: (ip(0xcb00_7101, 0), port),
        id,
        epoch: 1,
        service,
        state: flow_state::ANSWERED | flow_state::ESTABLISHED,
        hop: Hop::new([2, 0, 0, 0, 0, 1], 1),
    }
}
