//! What drivers can do for XDP, as the kernel tells it from 6.3 on (generic netlink, family `netdev`). Nothing else tells whether a
//! device takes frames that XDP redirects to it: the kernel says no only after the verdict, when the frame is lost.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
        socket, sockopt::ReceiveTimeout,
    },
    time::{TimeVal, TimeValLike as _},
};
use tokio::{io::unix::AsyncFd, sync::mpsc};

use super::netlink::Change;

/// The driver takes frames that XDP redirects to the device (`NETDEV_XDP_ACT_NDO_XMIT`).
pub const XMIT: u64 = 1 << 2;
/// It takes those of several buffers, too (`NETDEV_XDP_ACT_NDO_XMIT_SG`).
pub const XMIT_FRAGS: u64 = 1 << 6;

/// The family that tells of families, its request and its attributes (linux/genetlink.h).
const CTRL: u16 = 0x10;
const CTRL_GET_FAMILY: u8 = 3;
const CTRL_FAMILY_ID: u16 = 1;
const CTRL_FAMILY_NAME: u16 = 2;
const CTRL_GROUPS: u16 = 7;
const CTRL_GROUP_NAME: u16 = 1;
const CTRL_GROUP_ID: u16 = 2;
/// The family, its group of changes, its request and its attributes (linux/netdev.h).
const FAMILY: &[u8] = b"netdev\0";
const GROUP: &[u8] = b"mgmt\0";
const GET_DEVICES: u8 = 1;
const DEVICE_IFINDEX: u16 = 1;
const DEVICE_XDP: u16 = 3;
/// Kinds of messages that are no answers (linux/netlink.h).
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 1;
const DUMP: u16 = 0x300;
/// Bytes of the headers of netlink and generic netlink.
const NETLINK_HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
/// Bits of an attribute's kind that are none of its number.
const ATTRIBUTE_FLAGS: u16 = 0xc000;
/// Longest wait for the kernel's answer, which comes at once.
const PATIENCE_S: i64 = 5;

/// Asks the kernel of the namespace in which it was opened.
#[derive(Debug)]
pub struct Features {
    socket: OwnedFd,
    family: u16,
    group: Option<u32>,
}

impl Features {
    /// Opens a socket in the namespace of the calling thread; `None` on kernels that do not tell.
    ///
    /// # Errors
    /// The kernel refuses the socket, or does not answer.
    pub fn open() -> io::Result<Option<Self>> {
        let socket = open(SockFlag::SOCK_CLOEXEC)?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(PATIENCE_S))?;
        let request = message(
            CTRL,
            REQUEST,
            CTRL_GET_FAMILY,
            &attribute(CTRL_FAMILY_NAME, FAMILY),
        );
        send(socket.as_raw_fd(), &request, MsgFlags::empty())?;
        let mut buffer = vec![0; 65_536];
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        match read(&buffer[..length]).next() {
            Some((CTRL, body)) => {
                let (family, group) = read_family(body);
                let family = family.ok_or_else(|| io::Error::other("a family without a number"))?;
                Ok(Some(Self {
                    socket,
                    family,
                    group,
                }))
            }
            Some((ERROR, body)) if refusal(body) == Some(libc::ENOENT) => Ok(None),
            Some((ERROR, body)) => Err(io::Error::from_raw_os_error(refusal(body).unwrap_or(libc::EIO))),
            _ => Err(io::Error::other("no answer of generic netlink")),
        }
    }

    /// Bits of every device by interface index.
    ///
    /// # Errors
    /// The kernel refuses, or does not answer.
    pub fn read(&self) -> io::Result<BTreeMap<u32, u64>> {
        let request = message(self.family, REQUEST | DUMP, GET_DEVICES, &[]);
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())?;
        let (mut found, mut buffer) = (BTreeMap::new(), vec![0; 65_536]);
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (kind, body) in read(&buffer[..length]) {
                match kind {
                    DONE => return Ok(found),
                    ERROR => {
                        return Err(io::Error::from_raw_os_error(refusal(body).unwrap_or(libc::EIO)));
                    }
                    _ => found.extend(read_device(body)),
                }
            }
        }
    }

    /// Tells of changes until nobody listens any more.
    ///
    /// # Errors
    /// The kernel refuses the socket.
    pub fn watch(&self, changes: mpsc::WeakUnboundedSender<Change>) -> io::Result<()> {
        let Some(group) = self.group else { return Ok(()) };
        let socket = open(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
        // SAFETY: the option's value is one word, which lives through the call.
        let joined = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_NETLINK,
                libc::NETLINK_ADD_MEMBERSHIP,
                (&raw const group).cast(),
                size_of::<u32>() as libc::socklen_t,
            )
        };
        if joined != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is its own, and is closed by dropping it alone.
        let socket = unsafe { AsyncFd::register(socket)? };
        tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            while let Ok(mut ready) = socket.readable().await {
                // What it says is read anew as a whole, so that an overrun loses nothing.
                let got = ready.try_io(|socket| {
                    Ok(recv(
                        socket.get_ref().as_raw_fd(),
                        &mut buffer,
                        MsgFlags::empty(),
                    )?)
                });
                let Some(changes) = changes.upgrade() else { return };
                if got.is_ok() && changes.send(Change::Features).is_err() {
                    return;
                }
            }
        });
        Ok(())
    }
}

fn open(flags: SockFlag) -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        flags,
        SockProtocol::NetlinkGeneric,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(socket)
}

/// A request of generic netlink.
fn message(family: u16, flags: u16, command: u8, attributes: &[u8]) -> Vec<u8> {
    let length = NETLINK_HEADER + GENERIC_HEADER + attributes.len();
    let mut bytes = (length as u32).to_ne_bytes().to_vec();
    bytes.extend(family.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Sequence number and port: one question at a time, and the kernel fills in the port.
    bytes.extend([0; 8]);
    // Command, version, reserved.
    bytes.extend([command, 1, 0, 0]);
    bytes.extend(attributes);
    bytes
}

/// One attribute.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The messages of a datagram: kind and content, without the header of generic netlink where it has one.
fn read(datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
        let start = match kind {
            ERROR | DONE => NETLINK_HEADER,
            _ => NETLINK_HEADER + GENERIC_HEADER,
        };
        let body = rest.get(start..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// The error number of a refusal, positive.
fn refusal(body: &[u8]) -> Option<i32> {
    Some(-i32::from_ne_bytes(body.get(..4)?.try_into().ok()?))
}

/// The attributes of a message or of another attribute.
fn attributes(body: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body;
    std::iter::from_fn(move || {
        let length = u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & !ATTRIBUTE_FLAGS;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Number of the family, and of its group of changes.
fn read_family(body: &[u8]) -> (Option<u16>, Option<u32>) {
    let (mut family, mut found) = (None, None);
    for (kind, value) in attributes(body) {
        match kind {
            CTRL_FAMILY_ID => family = value.try_into().ok().map(u16::from_ne_bytes),
            CTRL_GROUPS => {
                for (_, group) in attributes(value) {
                    let of = |wanted| {
                        attributes(group)
                            .find(|(kind, _)| *kind == wanted)
                            .map(|(_, v)| v)
                    };
                    if of(CTRL_GROUP_NAME) == Some(GROUP) {
                        found = of(CTRL_GROUP_ID).and_then(|v| v.try_into().ok().map(u32::from_ne_bytes));
                    }
                }
            }
            _ => {}
        }
    }
    (family, found)
}

/// A device and its bits.
fn read_device(body: &[u8]) -> Option<(u32, u64)> {
    let of = |wanted| attributes(body).find(|(kind, _)| *kind == wanted).map(|(_, v)| v);
    let ifindex = u32::from_ne_bytes(of(DEVICE_IFINDEX)?.try_into().ok()?);
    let bits = u64::from_ne_bytes(of(DEVICE_XDP)?.try_into().ok()?);
    Some((ifindex, bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_apart_as_they_are_put_together() {
        let mut inner = attribute(CTRL_GROUP_ID, &7_u32.to_ne_bytes());
        inner.extend(attribute(CTRL_GROUP_NAME, GROUP));
        let mut body = attribute(CTRL_FAMILY_NAME, FAMILY);
        body.extend(attribute(CTRL_FAMILY_ID, &0x1d_u16.to_ne_bytes()));
        body.extend(attribute(CTRL_GROUPS | 0x8000, &attribute(1, &inner)));
        let mut datagram = message(CTRL, 0, 1, &body);
        let mut device = attribute(DEVICE_IFINDEX, &11_u32.to_ne_bytes());
        device.extend(attribute(DEVICE_XDP, &(XMIT | 3).to_ne_bytes()));
        datagram.extend(message(0x1d, 0, 1, &device));
        let read: Vec<_> = read(&datagram).collect();
        assert_eq!(read.len(), 2);
        assert_eq!(read_family(read[0].1), (Some(0x1d), Some(7)));
        assert_eq!(read_device(read[1].1), Some((11, XMIT | 3)));
    }

    #[test]
    fn what_is_cut_short_ends_the_walk() {
        let whole = message(CTRL, 0, 1, &attribute(DEVICE_IFINDEX, &[1, 0, 0, 0]));
        for length in 0..whole.len() {
            assert_eq!(read(&whole[..length]).count(), 0, "{length}");
        }
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(refusal(&(-libc::ENOENT).to_ne_bytes()), Some(libc::ENOENT));
    }

    #[test]
    fn the_kernel_answers() {
        // 6.3 and newer; an older one tells that it does not know.
        if let Some(features) = Features::open().unwrap() {
            assert!(features.read().unwrap().contains_key(&1), "no bits of lo");
        }
    }
}
