//! What the kernel and the process must offer before anything is loaded, said precisely when it is missing.

use std::{
    ffi::CString,
    fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use lb_common::limits::KERNEL_FLOOR;
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Bits of the capabilities that matter (linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Why the agent cannot work here.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// Old kernel.
    #[error("kernel {found} is too old: Weir needs {}.{} or newer; upgrade the kernel", KERNEL_FLOOR.0, KERNEL_FLOOR.1)]
    Kernel {
        /// `uname -r`.
        found: String,
    },
    /// Not enough rights.
    #[error("capability {} missing: run as root, or add it (docker: --cap-add, systemd: AmbientCapabilities=)", .names.join(", "))]
    Capabilities {
        /// The missing ones.
        names: Vec<&'static str>,
    },
    /// No bpffs.
    #[error("no BPF file system at {}: mounting it failed ({source}); run `mount -t bpf bpf {}` on the host \
             (docker: -v /sys/fs/bpf:/sys/fs/bpf:rshared)", .at.display(), .at.display())]
    Bpffs {
        /// Mount point.
        at: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// Something could not be read.
    #[error("{what}: {source}")]
    Read {
        /// What was asked.
        what: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
}

/// Checks kernel and capabilities, and mounts bpffs for `pin` if need be. RLIMIT_MEMLOCK is left
/// alone: the oldest kernel supported accounts maps to the memory cgroup.
pub fn preflight(pin: &Path) -> Result<(), PreflightError> {
    let name = nix::sys::utsname::uname().map_err(|e| PreflightError::Read {
        what: "uname",
        source: e.into(),
    })?;
    check_release(&name.release().to_string_lossy())?;
    let status = fs::read_to_string("/proc/thread-self/status").map_err(|source| PreflightError::Read {
        what: "/proc/thread-self/status",
        source,
    })?;
    check_capabilities(effective(&status).unwrap_or(0))?;
    ensure_bpffs(pin)
}

/// Whether a release such as `6.1.0-50-cloud-amd64` is new enough.
fn check_release(release: &str) -> Result<(), PreflightError> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= KERNEL_FLOOR => Ok(()),
        _ => Err(PreflightError::Kernel {
            found: release.to_owned(),
        }),
    }
}

/// The effective capability set in `/proc/…/status`.
fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn check_capabilities(set: u64) -> Result<(), PreflightError> {
    let has = |bit: u32| set & (1 << bit) != 0;
    let admin = has(CAP_SYS_ADMIN);
    let mut names = Vec::new();
    // CAP_SYS_ADMIN stands in for both of its later splits.
    if !has(CAP_BPF) && !admin {
        names.push("CAP_BPF");
    }
    if !has(CAP_PERFMON) && !admin {
        names.push("CAP_PERFMON");
    }
    if !has(CAP_NET_ADMIN) {
        names.push("CAP_NET_ADMIN");
    }
    // Gratuitous ARP and neighbour advertisements are raw frames.
    if !has(CAP_NET_RAW) {
        names.push("CAP_NET_RAW");
    }
    if names.is_empty() {
        Ok(())
    } else {
        Err(PreflightError::Capabilities { names })
    }
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC)
}

/// Makes sure that `pin` lies on a BPF file system, and exists.
fn ensure_bpffs(pin: &Path) -> Result<(), PreflightError> {
    let existing = pin.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    if !is_bpffs(existing) {
        // The usual place, or the parent of the pin directory when that is elsewhere.
        let usual = Path::new("/sys/fs/bpf");
        let at = if pin.starts_with(usual) {
            usual
        } else {
            pin.parent().unwrap_or(pin)
        };
        let failed = |source| PreflightError::Bpffs {
            at: at.to_owned(),
            source,
        };
        if !at.starts_with("/sys") {
            fs::create_dir_all(at).map_err(failed)?;
        }
        mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .map_err(|errno| failed(needs_admin(errno)))?;
    }
    fs::create_dir_all(pin).map_err(|source| PreflightError::Bpffs {
        at: pin.to_owned(),
        source,
    })?;
    writable(pin).map_err(|source| PreflightError::Bpffs {
        at: pin.to_owned(),
        source,
    })
}

/// Names the capability when mounting is refused for want of it.
fn needs_admin(errno: nix::Error) -> io::Error {
    if errno == nix::Error::EPERM {
        io::Error::new(
            io::ErrorKind::PermissionDenied,
            "CAP_SYS_ADMIN is needed to mount",
        )
    } else {
        errno.into()
    }
}

fn writable(path: &Path) -> io::Result<()> {
    let c_path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a NUL-terminated path that lives through the call.
    if unsafe { libc::access(c_path.as_ptr(), libc::W_OK) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_below_the_floor_are_refused_by_name() {
        for good in ["6.1.0-50-cloud-amd64", "6.18.44", "7.0-rc1", "10.0"] {
            check_release(good).unwrap();
        }
        for bad in ["5.15.0", "6.0.19", "4.19", "unknown", ""] {
            assert!(check_release(bad).unwrap_err().to_string().contains(bad));
        }
    }

    #[test]
    fn missing_capabilities_are_named() {
        let set = 1 << CAP_NET_ADMIN | 1 << CAP_BPF;
        let text = check_capabilities(set).unwrap_err().to_string();
        assert!(
            text.contains("CAP_PERFMON, CAP_NET_RAW") && !text.contains("CAP_BPF"),
            "{text}"
        );
        check_capabilities(1 << CAP_SYS_ADMIN | 1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW).unwrap();
        assert_eq!(
            effective("Name:\tx\nCapEff:\t000001fffeffffff\n"),
            Some(0x1ff_feff_ffff)
        );
    }
}
