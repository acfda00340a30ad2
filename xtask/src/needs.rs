//! What each group of commands needs beside a Rust toolchain and a C compiler, and why.

use std::path::Path;

use clap::ValueEnum;

use crate::workspace;

/// Commands that need the same things. `setup` without a group installs them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// The BPF toolchain
    Build,
    /// clippy for the BPF target
    Lint,
    /// Namespaces and packets: tiers prog, kernel, net, control
    Test,
    /// Clients of HTTP that are not ours: tier l7
    L7,
    /// Real Docker engines: tier e2e, demo
    E2e,
    /// Other kernels: tier vm
    Vm,
    /// Peers and load generators of the benchmarks
    Bench,
}

/// How one sees that something is there.
#[derive(Clone, Copy, Debug)]
pub enum Sign {
    /// An executable on PATH, from whatever package or by hand.
    Program(&'static str),
    /// A file.
    File(&'static str),
}

/// One thing that is needed.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    pub group: Group,
    pub sign: Sign,
    /// The Debian package that brings it.
    pub package: &'static str,
    pub why: &'static str,
}

impl Sign {
    /// Whether it is there now.
    pub fn is_present(self) -> bool {
        match self {
            Self::Program(name) => workspace::find_program(name).is_some(),
            Self::File(path) => Path::new(path).exists(),
        }
    }
}

const fn program(group: Group, name: &'static str, package: &'static str, why: &'static str) -> Need {
    Need {
        group,
        sign: Sign::Program(name),
        package,
        why,
    }
}

const fn file(group: Group, path: &'static str, package: &'static str, why: &'static str) -> Need {
    Need {
        group,
        sign: Sign::File(path),
        package,
        why,
    }
}

/// Everything but the BPF toolchain, whose packages depend on the compiler that is found (`toolchain`), and the QEMU and the
/// kernels of the vm tier, which are unpacked and not installed (`vm`).
pub const NEEDS: &[Need] = {
    use Group::{Bench, Build, E2e, L7, Test, Vm};
    &[
        program(
            Build,
            "protoc",
            "protobuf-compiler",
            "compiles the messages of the etcd client",
        ),
        file(
            Build,
            "/usr/include/google/protobuf/descriptor.proto",
            "libprotobuf-dev",
            "types that the messages of the etcd client import",
        ),
        program(
            Test,
            "ip",
            "iproute2",
            "makes the namespaces and devices of the tests",
        ),
        program(Test, "ethtool", "ethtool", "sets offloads of the test devices"),
        program(Test, "tcpdump", "tcpdump", "shows packets when a test fails"),
        program(
            Test,
            "bpftool",
            "bpftool",
            "shows maps and programs as an operator sees them",
        ),
        program(
            Test,
            "nft",
            "nftables",
            "firewall rules that the datapath has to live with",
        ),
        program(
            Test,
            "nsenter",
            "util-linux",
            "runs programs in a test's namespace",
        ),
        program(Test, "sysctl", "procps", "reads and sets kernel settings"),
        program(L7, "curl", "curl", "a client that is not ours"),
        program(
            L7,
            "h2load",
            "nghttp2-client",
            "a client of HTTP/2 that is not ours",
        ),
        program(
            L7,
            "pebble",
            "pebble",
            "an authority of ACME, with its DNS server",
        ),
        program(L7, "ip", "iproute2", "makes the namespaces of the tests"),
        program(
            E2e,
            "ip",
            "iproute2",
            "makes the namespaces of the Docker engines",
        ),
        program(E2e, "ethtool", "ethtool", "sets offloads of the test devices"),
        program(E2e, "iptables", "iptables", "dockerd programs it"),
        program(
            E2e,
            "dockerd",
            "docker.io",
            "the Docker engines of the tests and of the demo",
        ),
        program(E2e, "docker", "docker.io", "builds the images of the tests"),
        program(
            E2e,
            "docker-compose",
            "docker-compose",
            "deploys the reference architecture's application as its users do",
        ),
        program(E2e, "containerd", "containerd", "dockerd runs containers by it"),
        program(E2e, "curl", "curl", "a client that is not ours"),
        program(E2e, "sysctl", "procps", "reads and sets kernel settings"),
        program(E2e, "etcd", "etcd-server", "the KV store of the tests"),
        program(
            E2e,
            "etcdctl",
            "etcd-client",
            "changes the KV store as an operator does",
        ),
        file(
            E2e,
            "/usr/share/doc/libfaketime/copyright",
            "libfaketime",
            "sets the clock of an agent, and nobody else's",
        ),
        program(Vm, "cpio", "cpio", "packs the guest's file system"),
        program(Vm, "depmod", "kmod", "orders the guest's modules"),
        program(Vm, "xz", "xz-utils", "unpacks the guest's modules"),
        program(Vm, "dash", "dash", "the guest's shell"),
        program(Vm, "ip", "iproute2", "makes devices in the guest"),
        program(Vm, "ethtool", "ethtool", "sets offloads of the guest's devices"),
        // Any busybox will do, and the package `busybox`, which many machines have, conflicts with this one.
        program(Vm, "busybox", "busybox-static", "the guest's tools"),
        program(Bench, "ip", "iproute2", "makes the namespaces of the benchmarks"),
        program(
            Bench,
            "ethtool",
            "ethtool",
            "sets offloads of the benchmark's devices",
        ),
        program(Bench, "nft", "nftables", "the kernel's own balancing, a peer"),
        program(Bench, "haproxy", "haproxy", "a peer"),
        program(
            Bench,
            "nginx",
            "nginx-light",
            "a peer, and the web server behind the balancer",
        ),
        file(
            Bench,
            "/usr/lib/nginx/modules/ngx_stream_module.so",
            "libnginx-mod-stream",
            "a peer: nginx balances TCP by it",
        ),
        program(Bench, "wrk", "wrk", "makes load"),
    ]
};

/// What of `groups` is missing, each package once.
pub fn missing(groups: &[Group]) -> Vec<Need> {
    select(NEEDS, groups, Sign::is_present)
}

fn select(needs: &[Need], groups: &[Group], is_present: impl Fn(Sign) -> bool) -> Vec<Need> {
    let mut found: Vec<Need> = Vec::new();
    for need in needs.iter().filter(|need| groups.contains(&need.group)) {
        if found.iter().all(|f| f.package != need.package) && !is_present(need.sign) {
            found.push(*need);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_absent_in_the_named_groups_is_missing_and_only_once() {
        let needs = [
            program(Group::Test, "ip", "iproute2", ""),
            program(Group::E2e, "ip", "iproute2", ""),
            program(Group::E2e, "dockerd", "docker.io", ""),
            program(Group::Vm, "cpio", "cpio", ""),
        ];
        let absent = |sign: Sign| !matches!(sign, Sign::Program("ip" | "cpio"));
        let packages = |groups: &[Group]| -> Vec<&str> {
            select(&needs, groups, absent)
                .iter()
                .map(|need| need.package)
                .collect()
        };
        assert_eq!(packages(&[Group::Test, Group::E2e]), ["iproute2"]);
        assert_eq!(packages(&[Group::Vm]), ["cpio"]);
        assert_eq!(packages(&[Group::Bench]), [""; 0]);
    }

    #[test]
    fn qemu_is_never_installed() {
        // An installed qemu-utils of another release would have to go.
        assert!(NEEDS.iter().all(|need| !need.package.contains("qemu")));
    }
}
