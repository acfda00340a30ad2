//! One agent for each set of pins: a lock on the pin directory itself. Sockets and their directories differ between a unit and a
//! container; the directory in the BPF file system is the same object in every mount namespace that shows these pins.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// Attempts to lock a directory that `weir detach` removes meanwhile.
const ATTEMPTS: usize = 10;

/// Why the pins cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent has them.
    #[error(
        "an agent already uses the pins under {}{}: stop it first, or choose another `bpf.pin-path`",
        .pins.display(), .holder.map_or(String::new(), |pid| format!(" (process {pid})"))
    )]
    Held {
        /// The pin directory.
        pins: PathBuf,
        /// Its process, if it is visible from here.
        holder: Option<u32>,
    },
    /// The directory could not be opened or locked.
    #[error("{}: the pin directory could not be locked: {source}", .pins.display())]
    Io {
        /// The pin directory.
        pins: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
}

/// The lock on a pin directory. It ends when this is dropped, and with the process, however that ends.
#[derive(Debug)]
pub struct PinLock {
    _directory: Flock<File>,
}

impl PinLock {
    /// Locks the pin directory, which is made if it does not exist.
    ///
    /// # Errors
    /// Another agent, or another `weir detach`, holds it.
    pub fn take(pins: &Path) -> Result<Self, LockError> {
        let failed = |source| LockError::Io {
            pins: pins.to_owned(),
            source,
        };
        for _ in 0..ATTEMPTS {
            fs::create_dir_all(pins).map_err(failed)?;
            let directory = File::open(pins).map_err(failed)?;
            let inode = directory.metadata().map_err(failed)?.ino();
            let lock = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((_, Errno::EWOULDBLOCK)) => {
                    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
                    return Err(LockError::Held {
                        pins: pins.to_owned(),
                        holder: holder(&locks, inode),
                    });
                }
                Err((_, errno)) => return Err(failed(errno.into())),
            };
            // Between opening and locking the directory may have been removed and made anew.
            if fs::metadata(pins).is_ok_and(|now| now.ino() == inode) {
                return Ok(Self { _directory: lock });
            }
        }
        Err(failed(io::Error::other("it is removed again and again")))
    }
}

/// The process that holds a lock on a whole file, from the text of `/proc/locks`. Inodes of other file systems may have the same
/// number: with two candidates nobody is named.
fn holder(locks: &str, inode: u64) -> Option<u32> {
    let mut holders = locks.lines().filter_map(|line| {
        // 5: FLOCK  ADVISORY  WRITE 1234 00:1a:15 0 EOF
        let field: Vec<&str> = line.split_whitespace().collect();
        let of_inode = field.get(5)?.rsplit(':').next()?.parse() == Ok(inode);
        (field.get(1) == Some(&"FLOCK") && of_inode).then(|| field.get(4)?.parse().ok())?
    });
    let first = holders.next()?;
    holders.next().is_none().then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let pins = dir.path().join("weir");
        let lock = PinLock::take(&pins).unwrap();
        let refusal = PinLock::take(&pins).unwrap_err().to_string();
        assert!(refusal.contains("already uses the pins under"), "{refusal}");
        assert!(
            refusal.contains(&format!("process {}", std::process::id())),
            "{refusal}"
        );
        // Removed and made anew, it is another directory, which nobody has locked.
        fs::remove_dir(&pins).unwrap();
        let other = PinLock::take(&pins).unwrap();
        drop((lock, other));
        PinLock::take(&pins).unwrap();
    }

    #[test]
    fn holders_are_named_when_there_is_no_doubt() {
        let locks = "1: FLOCK  ADVISORY  WRITE 1234 00:1a:15 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 99 00:1a:15 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 7 00:1a:16 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 8 00:20:16 0 EOF\n";
        assert_eq!(holder(locks, 15), Some(1234));
        assert_eq!(holder(locks, 16), None);
        assert_eq!(holder(locks, 17), None);
    }
}
