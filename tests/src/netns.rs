//! Network namespaces of random names, their devices, and code and processes inside them. All gone on drop.

use std::{
    fs::File,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// `linux/ethtool.h`: set transmit checksumming.
const ETHTOOL_STXCSUM: u32 = 0x17;
/// `linux/ethtool.h`: set generic receive offload.
const ETHTOOL_SGRO: u32 = 0x2c;

/// Where pins are. Mounts the BPF file system if it is not mounted. Agents do so themselves, but of two that start at the
/// same time both would mount one, and the second would hide the pins of the first.
pub fn bpffs() -> Result<PathBuf> {
    const AT: &str = "/sys/fs/bpf";
    // Held until the end of this function, also against other processes.
    let lock = File::create("/run/weir-tests.lock").context("/run/weir-tests.lock")?;
    lock.lock()?;
    if statfs(AT)?.filesystem_type() != BPF_FS_MAGIC {
        mount(Some("bpf"), AT, Some("bpf"), MsFlags::empty(), Some("mode=0700")).context(AT)?;
    }
    Ok(AT.into())
}

/// A network namespace with `lo` up.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    path: PathBuf,
    file: File,
}

impl Namespace {
    /// Makes one; `role` is part of its name.
    pub fn new(role: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("weir-{role}-{:x}-{count}", std::process::id());
        std::fs::create_dir_all("/run/netns")?;
        let path = PathBuf::from("/run/netns").join(&name);
        File::create_new(&path).with_context(|| path.display().to_string())?;
        let bound = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("new network namespace: needs root")?;
            let own = "/proc/thread-self/ns/net";
            mount(Some(own), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>).context("bind mount")
        });
        if let Err(fault) = bound {
            let _ = std::fs::remove_file(&path);
            return Err(fault);
        }
        let file = File::open(&path)?;
        let namespace = Self { name, path, file };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Its name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` inside, on a thread of its own.
    ///
    /// # Panics
    /// If `work` does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).expect("a namespace that this process made");
            work()
        })
    }

    /// A command that will run inside. It sees the machine's file systems: bpffs and cgroups stay as they are.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let namespace = self
            .file
            .as_fd()
            .try_clone_to_owned()
            .expect("a file descriptor to spare");
        let mut command = Command::new(program);
        // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
        unsafe {
            command.pre_exec(move || Ok(setns(&namespace, CloneFlags::CLONE_NEWNET)?));
        }
        command
    }

    /// `ip <words>` inside.
    pub fn ip(&self, words: &str) -> Result<()> {
        let output = self
            .command("ip")
            .args(words.split_whitespace())
            .output()
            .context("ip (iproute2)")?;
        ensure!(
            output.status.success(),
            "{}: ip {words}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    /// Writes a sysctl, "net.ipv4.ip_forward".
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
        self.run(|| std::fs::write(&path, value))
            .with_context(|| format!("{name} = {value}"))
    }

    /// A veth pair: `device` here, `peer` there, both up.
    pub fn veth(&self, device: &str, there: &Self, peer: &str) -> Result<()> {
        self.ip(&format!(
            "link add {device} type veth peer name {peer} netns {}",
            there.name
        ))?;
        self.ip(&format!("link set {device} up"))?;
        there.ip(&format!("link set {peer} up"))
    }

    /// Sends a frame as it is out of a device.
    pub fn send_frame(&self, device: &str, frame: &[u8]) -> Result<()> {
        let ifindex = self.ifindex(device)?;
        self.run(|| {
            // SAFETY: no memory is involved.
            let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
            ensure!(raw >= 0, "packet socket: {}", std::io::Error::last_os_error());
            // SAFETY: the kernel just gave it to us.
            let socket = unsafe { OwnedFd::from_raw_fd(raw) };
            // SAFETY: integers and bytes, which may all be zero.
            let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            to.sll_family = libc::AF_PACKET as u16;
            to.sll_ifindex = ifindex.cast_signed();
            // SAFETY: frame and address outlive the call, and their sizes are right.
            let sent = unsafe {
                libc::sendto(
                    socket.as_raw_fd(),
                    frame.as_ptr().cast(),
                    frame.len(),
                    0,
                    (&raw const to).cast(),
                    size_of_val(&to) as libc::socklen_t,
                )
            };
            ensure!(
                sent == frame.len() as isize,
                "{device}: {}",
                std::io::Error::last_os_error()
            );
            Ok(())
        })
    }

    /// A bridge, up.
    pub fn bridge(&self, device: &str) -> Result<()> {
        self.ip(&format!("link add {device} type bridge"))?;
        self.ip(&format!("link set {device} up"))
    }

    /// An address, "192.0.2.1/24", without duplicate address detection.
    pub fn address(&self, device: &str, address: &str) -> Result<()> {
        let detection = if address.contains(':') { "nodad" } else { "" };
        self.ip(&format!("addr add {address} dev {device} {detection}"))
    }

    /// Interface index of a device.
    pub fn ifindex(&self, device: &str) -> Result<u32> {
        let name = std::ffi::CString::new(device)?;
        // SAFETY: a terminated string.
        let index = self.run(|| unsafe { libc::if_nametoindex(name.as_ptr()) });
        ensure!(index != 0, "{}: no device {device}", self.name);
        Ok(index)
    }

    /// Has the stack complete checksums before it sends through a veth (`ethtool -K DEVICE tx off`): XDP on the other
    /// end forwards frames as they are, and nobody completes them later.
    pub fn complete_checksums(&self, device: &str) -> Result<()> {
        self.ethtool(device, ETHTOOL_STXCSUM, 0)
    }

    /// Lets a veth take frames that XDP redirects to its other end (`ethtool -K DEVICE gro on`).
    pub fn take_redirected(&self, device: &str) -> Result<()> {
        self.ethtool(device, ETHTOOL_SGRO, 1)
    }

    fn ethtool(&self, device: &str, command: u32, value: u32) -> Result<()> {
        let mut setting = [command, value];
        // SAFETY: all zeros is a value of the C structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        ensure!(device.len() < request.ifr_name.len(), "{device}: too long a name");
        for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = setting.as_mut_ptr().cast();
        let request = std::sync::Mutex::new(Request(request));
        self.run(|| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
            let mut request = request.lock().expect("one thread");
            // SAFETY: `request` names a device and points to the two words that the command takes.
            let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request.0) };
            if done == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        })
        .with_context(|| format!("{}: ethtool {command:#x} {value} on {device}", self.name))
    }

    /// Attaches a program that passes everything. `XDP_TX` at one end of a veth needs a program at the other.
    pub fn pass_all(&self, device: &str) -> Result<Attached> {
        self.attach(device, &[insn(MOV, 0, 0, 0, XDP_PASS), insn(EXIT, 0, 0, 0, 0)])
    }

    /// Attaches a program that drops what comes in by TCP over IPv4 from or to a port, without a word to anybody: the
    /// ends of its connections do not learn that they are cut.
    pub fn black_hole(&self, device: &str, port: u16) -> Result<Attached> {
        let port = i32::from(port.to_be());
        self.attach(
            device,
            &[
                insn(LOAD_W, 2, 1, 0, 0),                          // r2 = data
                insn(LOAD_W, 3, 1, 4, 0),                          // r3 = data_end
                insn(MOV_REG, 4, 2, 0, 0),                         // r4 = r2 + Ethernet, IPv4 and ports
                insn(ADD, 4, 0, 0, 14 + 20 + 4),                   //
                insn(JGT_REG, 4, 3, 10, 0),                        // too short: pass
                insn(LOAD_H, 4, 2, 12, 0),                         // EtherType
                insn(JNE, 4, 0, 8, i32::from(0x0800_u16.to_be())), // not IPv4: pass
                insn(LOAD_B, 4, 2, 23, 0),                         // protocol
                insn(JNE, 4, 0, 6, 6),                             // not TCP: pass
                insn(LOAD_H, 4, 2, 34, 0),                         // source port
                insn(JEQ, 4, 0, 2, port),                          // ours: drop
                insn(LOAD_H, 4, 2, 36, 0),                         // destination port
                insn(JNE, 4, 0, 2, port),                          // not ours: pass
                insn(MOV, 0, 0, 0, XDP_DROP),                      //
                insn(EXIT, 0, 0, 0, 0),                            //
                insn(MOV, 0, 0, 0, XDP_PASS),                      // pass
                insn(EXIT, 0, 0, 0, 0),                            //
            ],
        )
    }

    /// Attaches an XDP program.
    fn attach(&self, device: &str, code: &[u64]) -> Result<Attached> {
        let index = self.ifindex(device)?;
        self.run(|| Attached::new(index, code))
            .with_context(|| format!("{}: XDP on {device}", self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// An `ifreq` on its way to the thread that uses it.
struct Request(libc::ifreq);
// SAFETY: it points to two words of the caller, who waits for that thread.
unsafe impl Send for Request {}

/// Verdicts of an XDP program (linux/bpf.h).
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;
/// Instructions of BPF (linux/bpf.h, linux/bpf_common.h).
const LOAD_W: u8 = 0x61;
const LOAD_H: u8 = 0x69;
const LOAD_B: u8 = 0x71;
const MOV: u8 = 0xb7;
const MOV_REG: u8 = 0xbf;
const ADD: u8 = 0x07;
const JEQ: u8 = 0x15;
const JNE: u8 = 0x55;
const JGT_REG: u8 = 0x2d;
const EXIT: u8 = 0x95;

/// One instruction: operation, destination and source register, offset, immediate value.
fn insn(operation: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    let mut bytes = [operation, source << 4 | destination, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
    bytes[4..8].copy_from_slice(&immediate.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// An XDP program on a device, detached on drop.
#[derive(Debug)]
pub struct Attached {
    _link: OwnedFd,
}

impl Attached {
    fn new(ifindex: u32, code: &[u64]) -> Result<Self> {
        let license = c"GPL";
        let mut load = [0u8; 72];
        load[0..4].copy_from_slice(&6u32.to_ne_bytes()); // BPF_PROG_TYPE_XDP
        load[4..8].copy_from_slice(&(code.len() as u32).to_ne_bytes());
        load[8..16].copy_from_slice(&(code.as_ptr() as u64).to_ne_bytes());
        load[16..24].copy_from_slice(&(license.as_ptr() as u64).to_ne_bytes());
        let program = bpf(5, &load).context("BPF_PROG_LOAD")?;
        let mut link = [0u8; 16];
        link[0..4].copy_from_slice(&(program.as_raw_fd() as u32).to_ne_bytes());
        link[4..8].copy_from_slice(&ifindex.to_ne_bytes());
        link[8..12].copy_from_slice(&37u32.to_ne_bytes()); // BPF_XDP
        let link = bpf(28, &link).context("BPF_LINK_CREATE")?;
        Ok(Self { _link: link })
    }
}

/// `bpf(2)` for commands that return a file descriptor.
fn bpf(command: libc::c_int, attributes: &[u8]) -> Result<OwnedFd> {
    // SAFETY: the kernel reads the attributes, which point to memory that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), attributes.len()) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the kernel just gave it to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Runs `work` on a thread of its own, which may change its namespaces.
fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests {
    use super::Namespace;

    #[test]
    fn a_namespace_has_devices_of_its_own_and_goes_away() {
        let (a, b) = (Namespace::new("a").unwrap(), Namespace::new("b").unwrap());
        a.veth("eth", &b, "peer").unwrap();
        a.complete_checksums("eth").unwrap();
        a.take_redirected("eth").unwrap();
        let _pass = b.pass_all("peer").unwrap();
        assert!(a.ifindex("eth").unwrap() > 1);
        assert!(a.ifindex("peer").is_err());
        let path = a.path.clone();
        drop(a);
        assert!(!path.exists());
    }
}
