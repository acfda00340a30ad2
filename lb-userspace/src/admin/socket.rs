//! The agent's Unix socket: who may use it, and what happens to the one of an earlier agent.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use nix::unistd::{Group, chown};
use tokio::net::UnixListener;

/// Rights of the socket: its owner and its group.
pub const MODE: u32 = 0o660;

/// Why the socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// An agent answers on it.
    #[error("{}: an agent already answers here; stop it first, or choose another socket with --socket", .0.display())]
    InUse(PathBuf),
    /// Something else has this name.
    #[error("{}: exists and is not a socket; remove it, or choose another socket with --socket", .0.display())]
    NotASocket(PathBuf),
    /// The group does not exist.
    #[error(
        "group {0:?} of the admin socket does not exist; create it with `groupadd --system {0}` or leave it out"
    )]
    NoGroup(String),
    /// The system said no.
    #[error("{}: {action} failed: {source}; the directory must exist and be writable for the agent", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A listening socket. Its file goes when this is dropped, unless another agent has put its own there.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    inode: u64,
    listener: Option<UnixListener>,
}

impl Socket {
    /// Listens on `path` with [`MODE`], owned by `group` if one is given. Must run inside a tokio runtime.
    ///
    /// The file of an agent that is gone (nobody accepts connections) is replaced.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path, group: Option<&str>) -> Result<Self, SocketError> {
        let fail = |action| {
            move |source: io::Error| SocketError::Io {
                path: path.to_owned(),
                action,
                source,
            }
        };
        clear(path).map_err(|e| match e {
            Occupied::Answering => SocketError::InUse(path.to_owned()),
            Occupied::NotASocket => SocketError::NotASocket(path.to_owned()),
            Occupied::Io(source) => fail("looking at it")(source),
        })?;
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            fs::create_dir_all(dir).map_err(fail("making its directory"))?;
        }
        // Made under another name and moved into place: nobody can connect before the rights are set.
        let nascent = path.with_extension(format!("{}.new", std::process::id()));
        let _ = fs::remove_file(&nascent);
        let listener = UnixListener::bind(&nascent).map_err(fail("listening"))?;
        let made = settle(&nascent, path, group, fail);
        if made.is_err() {
            let _ = fs::remove_file(&nascent);
        }
        Ok(Self {
            path: path.to_owned(),
            inode: made?,
            listener: Some(listener),
        })
    }

    /// The listener, once.
    pub fn take(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Sets the rights of a fresh socket, moves it to its place and tells its inode.
fn settle<F>(
    nascent: &Path,
    path: &Path,
    group: Option<&str>,
    fail: impl Fn(&'static str) -> F,
) -> Result<u64, SocketError>
where
    F: FnOnce(io::Error) -> SocketError,
{
    fs::set_permissions(nascent, fs::Permissions::from_mode(MODE)).map_err(fail("setting its rights"))?;
    if let Some(name) = group {
        let group = Group::from_name(name)
            .ok()
            .flatten()
            .ok_or_else(|| SocketError::NoGroup(name.to_owned()))?;
        chown(nascent, None, Some(group.gid)).map_err(|e| fail("setting its group")(e.into()))?;
    }
    let inode = fs::symlink_metadata(nascent)
        .map_err(fail("looking at it"))?
        .ino();
    fs::rename(nascent, path).map_err(fail("moving it into place"))?;
    Ok(inode)
}

/// Why a path is not free.
enum Occupied {
    Answering,
    NotASocket,
    Io(io::Error),
}

/// Whether `path` may be taken: nothing there, or a socket on which nobody answers.
fn clear(path: &Path) -> Result<(), Occupied> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Occupied::Io(e)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(Occupied::NotASocket),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Occupied::Answering),
        // Refused: the file outlived its process. Anything else does not prove that nobody is there.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        Err(e) => Err(Occupied::Io(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_is_for_owner_and_group_and_goes_with_its_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/weir.sock");
        let socket = Socket::bind(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, MODE);
        assert_eq!(
            fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "no other file is left"
        );
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_living_agent_keeps_its_socket_and_a_dead_one_loses_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weir.sock");
        let first = Socket::bind(&path, None).unwrap();
        assert!(matches!(Socket::bind(&path, None), Err(SocketError::InUse(_))));
        drop(first);
        // A std listener leaves its file behind, as a killed agent does.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let second = Socket::bind(&path, None).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(second);
    }

    #[tokio::test]
    async fn dropping_does_not_remove_the_socket_of_a_successor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weir.sock");
        let mut first = Socket::bind(&path, None).unwrap();
        drop(first.take());
        let second = Socket::bind(&path, None).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn other_files_and_unknown_groups_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weir.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Socket::bind(&path, None),
            Err(SocketError::NotASocket(_))
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        let other = dir.path().join("other.sock");
        let refused = Socket::bind(&other, Some("no-such-group-of-weir"));
        assert!(matches!(refused, Err(SocketError::NoGroup(_))));
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing is left of the attempt"
        );
    }
}
