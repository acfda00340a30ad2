//! Both bodies load and attach on the kernel that this runs on: `cargo xtask test vm` runs it on Debian's 6.1 and 6.12.
//! The packet rows (`prog`) run in the same guests; this is about what they leave out: the devices.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    net::UdpSocket,
    path::Path,
    process::Command,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    programs::{Program, ProgramError, RawTracePoint, SchedClassifier, TcAttachType, Xdp, XdpMode, tc},
    util::KernelVersion,
};
use nix::sched::{CloneFlags, unshare};
use weir::datapath::object;

/// The test's device, and its peer in the other namespace.
const DEVICE: &str = "weir0";
const DEVICE_ADDRESS: &str = "192.0.2.1";
const PEER: &str = "peer0";
const PEER_ADDRESS: &str = "192.0.2.2";

/// TCX exists from here on; before it, TC programs need the clsact qdisc.
const TCX: KernelVersion = KernelVersion::new(6, 6, 0);

/// Puts the calling thread, which is one test, into a network namespace that ends with it.
fn own_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace needs root");
    ip(&["link", "set", "lo", "up"]);
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .expect("iproute2 is there");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {}: {errors}", arguments.join(" "));
}

/// The object with all its programs through the verifier.
struct Loaded {
    object: Ebpf,
    programs: usize,
    /// What the verifier said of those that it refused.
    refused: Vec<String>,
}

/// The end of the verifier's log, which says why; all of it takes minutes on a serial console.
fn end(fault: &ProgramError) -> String {
    let text = format!("{fault:?}").replace("\\n", "\n");
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// One for all tests: the verifier of an emulated machine takes minutes for it.
static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(|| Mutex::new(load()));

fn loaded() -> MutexGuard<'static, Loaded> {
    // A test that failed has at worst left a program on a device of its own namespace.
    LOADED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn load() -> Loaded {
    let bytes = object::programs().unwrap();
    let btf = Btf::from_sys_fs().expect("the kernel describes its types");
    let mut loader = EbpfLoader::new();
    loader.btf(Some(&btf));
    // The guest is small and nothing is balanced: what the maps hold by default does not matter here.
    for map in ["FLOWS4", "FLOWS6", "RINGS", "BACKENDS", "SERVICES"] {
        loader.map_max_entries(map, 64);
    }
    let mut object = loader
        .load(bytes)
        .unwrap_or_else(|fault| panic!("the object does not load: {fault:?}"));
    let (mut programs, mut refused) = (0, Vec::new());
    for (name, program) in object.programs_mut() {
        let began = Instant::now();
        let result = match program {
            Program::Xdp(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            Program::RawTracePoint(program) => program.load(),
            other => panic!(
                "{name} is of a kind that this test does not know: {:?}",
                other.prog_type()
            ),
        };
        eprintln!("{name}: {:.1} s in the verifier", began.elapsed().as_secs_f64());
        programs += 1;
        refused.extend(result.err().map(|fault| format!("{name}: {}", end(&fault))));
    }
    Loaded {
        object,
        programs,
        refused,
    }
}

fn xdp<'a>(object: &'a mut Ebpf, name: &str) -> &'a mut Xdp {
    object
        .program_mut(name)
        .expect("the object has the program")
        .try_into()
        .unwrap()
}

fn tc<'a>(object: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    object
        .program_mut(name)
        .expect("the object has the program")
        .try_into()
        .unwrap()
}

/// A peer in a namespace of its own, with [`PEER`] in it, that sends every datagram back.
fn echoing_peer() {
    let (sender, namespace) = mpsc::channel();
    let (moved, go) = mpsc::channel::<()>();
    thread::spawn(move || {
        own_namespace();
        // SAFETY: gettid has no preconditions and cannot fail.
        let thread_id = unsafe { libc::gettid() };
        sender
            .send(format!("/proc/{}/task/{thread_id}/ns/net", std::process::id()))
            .unwrap();
        go.recv().unwrap();
        ip(&["addr", "add", &format!("{PEER_ADDRESS}/24"), "dev", PEER]);
        ip(&["link", "set", PEER, "up"]);
        let socket = UdpSocket::bind((PEER_ADDRESS, 9)).unwrap();
        sender.send(String::new()).unwrap();
        let mut buffer = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..length], from).unwrap();
        }
    });
    let path = namespace.recv().expect("the peer has a namespace");
    ip(&["link", "add", DEVICE, "type", "veth", "peer", "name", PEER]);
    ip(&["link", "set", PEER, "netns", &path]);
    ip(&["addr", "add", &format!("{DEVICE_ADDRESS}/24"), "dev", DEVICE]);
    ip(&["link", "set", DEVICE, "up"]);
    moved.send(()).unwrap();
    namespace.recv().expect("the peer listens");
}

/// Traffic that is nobody's service passes untouched through whatever is attached.
fn assert_foreign_traffic_passes() {
    let socket = UdpSocket::bind((DEVICE_ADDRESS, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut buffer = [0; 64];
    // Datagrams may be lost while the link comes up: it is asked again until an answer comes.
    let answer = (0..20).find_map(|_| {
        socket.send_to(b"foreign", (PEER_ADDRESS, 9)).ok()?;
        let length = socket.recv(&mut buffer).ok()?;
        Some(buffer[..length].to_vec())
    });
    assert_eq!(
        answer.as_deref(),
        Some(b"foreign".as_slice()),
        "no answer came through the programs"
    );
}

#[test]
fn the_kernel_has_what_weir_needs() {
    let kernel = KernelVersion::current().unwrap();
    assert!(
        kernel >= KernelVersion::new(6, 1, 0),
        "{kernel:?} is older than 6.1"
    );
    assert!(Path::new("/sys/kernel/btf/vmlinux").exists());
}

#[test]
fn the_verifier_accepts_every_program() {
    let loaded = loaded();
    assert!(loaded.refused.is_empty(), "{}", loaded.refused.join("\n"));
    assert!(loaded.programs > 0, "the object has no program");
}

#[test]
fn the_xdp_body_attaches_natively_and_passes_foreign_traffic() {
    own_namespace();
    echoing_peer();
    let mut loaded = loaded();
    let program = xdp(&mut loaded.object, "weir_xdp");
    let link = program
        .attach(DEVICE, XdpMode::Driver)
        .expect("veth has native XDP");
    assert_foreign_traffic_passes();
    program.detach(link).unwrap();
}

#[test]
fn failed_redirects_can_be_counted() {
    let mut loaded = loaded();
    let program: &mut RawTracePoint = loaded
        .object
        .program_mut("weir_redirect_err")
        .expect("the object has the program")
        .try_into()
        .unwrap();
    let link = program
        .attach("xdp_redirect_err")
        .expect("the tracepoint is there");
    program.detach(link).unwrap();
}

#[test]
fn the_tc_body_attaches_both_ways_and_passes_foreign_traffic() {
    own_namespace();
    echoing_peer();
    if KernelVersion::current().unwrap() < TCX {
        tc::qdisc_add_clsact(DEVICE).unwrap();
    }
    let mut loaded = loaded();
    for (name, direction) in [
        ("weir_tc_ingress", TcAttachType::Ingress),
        ("weir_tc_egress", TcAttachType::Egress),
    ] {
        let program = tc(&mut loaded.object, name);
        let link = program.attach(DEVICE, direction).unwrap();
        assert_foreign_traffic_passes();
        program.detach(link).unwrap();
    }
}
