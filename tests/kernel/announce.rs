//! What the neighbours of a VIP are told, as they see it on the wire.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use weir::datapath::{
    announcements::AnnounceRequest,
    attach::{TcChoice, XdpChoice},
    net::NetConfig,
    uplinks::InterfaceName,
};

use crate::{
    agent::Agent,
    netns::{Netns, run},
};

/// All protocols (linux/if_ether.h).
const ETH_P_ALL: u16 = 3;
/// Longest wait for frames: a round is five seconds after the one before.
const PATIENCE: Duration = Duration::from_secs(15);

/// The VIPs of which announcements are seen on a device, one for each frame.
fn announcements(device: &'static str, peer: &Netns) -> Receiver<IpAddr> {
    let (to, from) = channel();
    peer.inside(move || {
        // SAFETY: no pointers are passed; the result is checked before use.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(ETH_P_ALL.to_be())) };
        assert!(raw >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the descriptor was just opened and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        let index = nix::net::if_::if_nametoindex(device).unwrap();
        // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
        let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        at.sll_family = libc::AF_PACKET as u16;
        at.sll_protocol = ETH_P_ALL.to_be();
        at.sll_ifindex = index.cast_signed();
        // SAFETY: `at` is live and of the size given.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                std::ptr::from_ref(&at).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        std::thread::spawn(move || {
            let mut frame = [0u8; 2048];
            loop {
                // SAFETY: the buffer is live and of the size given.
                let length =
                    unsafe { libc::recv(socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
                // An error tells that the link went down; frames come again when it is up.
                let Ok(length) = usize::try_from(length) else {
                    continue;
                };
                if announced(&frame[..length]).is_some_and(|vip| to.send(vip).is_err()) {
                    return;
                }
            }
        });
    });
    from
}

/// The address that a gratuitous ARP request or an unsolicited neighbour advertisement is about.
fn announced(frame: &[u8]) -> Option<IpAddr> {
    match frame.get(12..14)? {
        [0x08, 0x06] => {
            let (sender, target): ([u8; 4], [u8; 4]) = (
                frame.get(28..32)?.try_into().ok()?,
                frame.get(38..42)?.try_into().ok()?,
            );
            (sender == target).then_some(sender.into())
        }
        [0x86, 0xdd] if frame.get(20) == Some(&58) && frame.get(54) == Some(&136) => {
            let target: [u8; 16] = frame.get(62..78)?.try_into().ok()?;
            (frame[58] & 0x40 == 0).then_some(target.into())
        }
        _ => None,
    }
}

/// Waits until each of the VIPs was announced `count` times more.
#[track_caller]
fn await_frames(frames: &Receiver<IpAddr>, vips: &[IpAddr], count: u32) -> Duration {
    let began = Instant::now();
    let mut seen: BTreeMap<IpAddr, u32> = vips.iter().map(|vip| (*vip, 0)).collect();
    while seen.values().any(|seen| *seen < count) {
        let left = PATIENCE.saturating_sub(began.elapsed());
        let vip = frames
            .recv_timeout(left)
            .unwrap_or_else(|end| panic!("{end}: announcements: {seen:?}, not {count} of each"));
        seen.entry(vip).and_modify(|seen| *seen += 1);
    }
    began.elapsed()
}

#[test]
fn neighbours_are_told_of_vips_again_and_again() {
    let (node, peer) = (Netns::new(), Netns::new());
    run(&format!(
        "ip -n {} link add up0 type veth peer name p0 netns {}",
        node.name, peer.name
    ));
    node.ip("addr add 10.9.0.1/24 dev up0");
    // One of the VIPs is there before the agent.
    node.ip("addr add 192.0.2.80/32 dev up0");
    node.ip("link set up0 up");
    peer.ip("link set p0 up");
    let frames = announcements("p0", &peer);
    let vips: [IpAddr; 2] = ["192.0.2.80".parse().unwrap(), "2001:db8::80".parse().unwrap()];
    let config = NetConfig {
        interfaces: vec![InterfaceName::Named("up0".into())],
        xdp: XdpChoice::Off,
        announce: vips.iter().map(|vip| ("up0".to_owned(), *vip)).collect(),
        vips: vips.into(),
        ..NetConfig::default()
    };
    let (pin, state, peer_name) = (node.pin.clone(), node.state.clone(), peer.name.clone());
    node.block_on(async move {
        let agent = Agent::start(&pin, &state, config, &[], TcChoice::Auto);
        let announce = agent.announce.clone();
        tokio::task::spawn_blocking(move || {
            // At once, and five seconds later.
            await_frames(&frames, &vips, 5);
            let later = await_frames(&frames, &vips, 5);
            assert!(later > Duration::from_secs(3), "{later:?}");
            // A switch that has restarted knows nothing.
            run(&format!("ip -n {peer_name} link set p0 down"));
            run(&format!("ip -n {peer_name} link set p0 up"));
            await_frames(&frames, &vips, 5);
            // The operator wants one of them to be told now, long before the second round.
            let (reply, answer) = oneshot::channel();
            let vip = Some(vips[0]);
            announce.blocking_send(AnnounceRequest { vip, reply }).unwrap();
            assert_eq!(answer.blocking_recv().unwrap(), [("up0".to_owned(), vips[0])]);
            let at_once = await_frames(&frames, &vips[..1], 5);
            assert!(at_once < Duration::from_secs(3), "{at_once:?}");
            let (reply, answer) = oneshot::channel();
            let vip = Some("192.0.2.81".parse().unwrap());
            announce.blocking_send(AnnounceRequest { vip, reply }).unwrap();
            assert_eq!(answer.blocking_recv().unwrap(), []);
        })
        .await
        .unwrap();
        agent.kill().await;
    });
}
