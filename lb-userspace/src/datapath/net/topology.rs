//! What a look at the network says of the devices, as the plan reads it.

use std::{collections::BTreeMap, net::IpAddr};

use super::{Follower, NetConfig, View};
use crate::datapath::{DeviceInfo, Place, Topology, XdpSend, features, frames, netlink::OwnAddress};

impl Follower {
    /// The value to publish.
    pub(super) fn topology(
        &self,
        view: &View,
        config: &NetConfig,
        places: BTreeMap<IpAddr, Place>,
    ) -> Topology {
        let features = self.features.as_ref().map(|features| {
            features.read().unwrap_or_else(|e| {
                tracing::warn!(error = %e, "the kernel does not tell what drivers can do for XDP: frames go by TC");
                BTreeMap::new()
            })
        });
        let announced = self.task.state.get().addresses;
        // A VIP that we announce is no address of the node's own.
        let own: Vec<&OwnAddress> = view
            .addresses
            .iter()
            .filter(|own| !announced.iter().any(|(_, vip)| *vip == own.address))
            .collect();
        let devices = view
            .links
            .iter()
            .filter_map(|link| {
                let slot = self.slots.get(link.ifindex)?;
                let mode = self.task.attacher.attached().get(&link.ifindex);
                let mode = mode.map_or("-", |status| status.xdp.as_str());
                let info = DeviceInfo {
                    name: link.name.clone(),
                    ifindex: link.ifindex,
                    mac: link.mac,
                    mtu: link.mtu,
                    xdp: xdp_send(
                        mode,
                        link.veth,
                        features.as_ref().map(|all| all.get(&link.ifindex).copied()),
                    ),
                    bridge: link.bridge,
                    uplink: view.uplinks.devices.contains(&link.ifindex),
                    vlan_offload: frames::hides_tags(link, &view.links),
                    further_macs: frames::further_macs(link, &view.links, &view.further_macs),
                    addresses: own
                        .iter()
                        .filter(|own| {
                            own.ifindex == link.ifindex
                                && !own.unusable
                                && !link_local(own.address)
                                && !config.vips.contains(&own.address)
                        })
                        .map(|own| own.address)
                        .collect(),
                };
                Some((slot, info))
            })
            .collect();
        let mut node_addresses: Vec<IpAddr> = own.iter().map(|own| own.address).collect();
        node_addresses.sort_unstable();
        node_addresses.dedup();
        let loopback = view.links.iter().find(|link| link.loopback);
        Topology {
            devices,
            places,
            node_addresses,
            loopback_ifindex: loopback.map_or(0, |link| link.ifindex),
        }
    }
}

/// What XDP may send through a device: `mode` is how our program is on it, `features` are its driver's bits (`None`: the kernel
/// tells of no device, `Some(None)`: not of this one). Of old kernels it is known that a driver which takes our program natively
/// takes redirected frames as well. A veth takes frames only while somebody at its other end looks for them, and loses all others,
/// those sent back too; the kernel knows which.
fn xdp_send(mode: &str, veth: bool, features: Option<Option<u64>>) -> XdpSend {
    let has = |bit: u64| features.flatten().unwrap_or(0) & bit != 0;
    XdpSend {
        back: match mode {
            "native" => !veth || has(features::XMIT),
            mode => mode == "generic",
        },
        redirect: match features {
            Some(_) => has(features::XMIT),
            None => mode == "native" && !veth,
        },
        frags: has(features::XMIT_FRAGS),
    }
}

/// Of one link only: no source for packets that are routed.
fn link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdp_sends_through_drivers_that_take_it() {
        let send = |mode, features| {
            let send = xdp_send(mode, false, features);
            (send.back, send.redirect, send.frags)
        };
        let all = features::XMIT | features::XMIT_FRAGS;
        assert_eq!(send("native", Some(Some(all))), (true, true, true));
        assert_eq!(send("native", Some(Some(features::XMIT))), (true, true, false));
        assert_eq!(send("native", Some(Some(0))), (true, false, false));
        assert_eq!(send("generic", Some(None)), (true, false, false));
        assert_eq!(send("-", Some(Some(all))), (false, true, true));
        // Before 6.3.
        assert_eq!(send("native", None), (true, true, false));
        assert_eq!(send("generic", None), (true, false, false));
        assert_eq!(send("-", None), (false, false, false));
    }

    #[test]
    fn a_veth_takes_frames_when_the_kernel_says_so() {
        let send = |mode, features| {
            let send = xdp_send(mode, true, features);
            (send.back, send.redirect)
        };
        assert_eq!(send("native", Some(Some(features::XMIT))), (true, true));
        assert_eq!(send("native", Some(Some(0))), (false, false));
        assert_eq!(send("generic", Some(Some(0))), (true, false));
        assert_eq!(send("native", None), (false, false));
    }
}
