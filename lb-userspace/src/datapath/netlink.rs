//! What the agent asks of rtnetlink, in its own words.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    net::{IpAddr, Ipv4Addr},
};

use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Error as RtError, Handle, MulticastGroup, RouteMessageBuilder,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkXdp},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
            NeighbourState,
        },
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType, RouteVia},
        tc::TcHandle,
    },
};
use tokio::sync::mpsc;

/// A request that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct NetlinkError {
    /// What was asked.
    pub what: String,
    /// The kernel's word.
    pub source: io::Error,
}

fn failed(what: impl Into<String>) -> impl FnOnce(RtError) -> NetlinkError {
    let what = what.into();
    move |error| {
        let source = match error {
            RtError::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other),
        };
        NetlinkError { what, source }
    }
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// MAC; zero where there is none.
    pub mac: [u8; 6],
    /// MTU, bytes.
    pub mtu: u32,
    /// A bridge.
    pub bridge: bool,
    /// One end of a virtual cable.
    pub veth: bool,
    /// A macvlan or ipvlan device.
    pub vlan_port: bool,
    /// The loopback device.
    pub loopback: bool,
    /// Switched on, with a carrier.
    pub up: bool,
    /// How often it has got a carrier: tells of a loss that was over before anybody looked.
    pub carrier_ups: u32,
    /// The bridge or bond that it belongs to.
    pub master: Option<u32>,
    /// The device that it lies on, of a VLAN or a macvlan.
    pub lower: Option<u32>,
    /// A VLAN of its lower device.
    pub vlan: bool,
    /// Its frames begin with an Ethernet header.
    pub ethernet: bool,
    /// The XDP program on it, whoever's it is.
    pub xdp_program: Option<u32>,
}

impl Link {
    /// Whether our programs can read its frames.
    pub fn serves(&self) -> bool {
        self.ethernet || self.loopback
    }
}

/// One of the node's addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnAddress {
    /// Device.
    pub ifindex: u32,
    /// Address.
    pub address: IpAddr,
    /// Not a source for connections that last: duplicate detection runs, it is deprecated, or (IPv6) temporary.
    pub unusable: bool,
}

/// An entry of the neighbour table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// MAC, when one is known.
    pub mac: Option<[u8; 6]>,
    /// The kernel keeps it fresh by itself.
    pub managed: bool,
    /// It never changes by itself.
    pub permanent: bool,
}

/// Where packets to an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// To this node itself.
    pub local: bool,
    /// Device they leave by.
    pub ifindex: u32,
    /// Next hop, unless the destination is on the link.
    pub gateway: Option<IpAddr>,
}

/// What happened, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Links, addresses or routes.
    Routes,
    /// A device is gone; another one may have its number by now.
    Gone(u32),
    /// Neighbours only.
    Neighbours,
    /// What drivers can do for XDP.
    Features,
}

/// A connection for requests in the namespace of the calling thread; its task runs on the current runtime.
pub fn connect() -> io::Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Listens in the namespace of the calling thread. The channel closes when the kernel's socket does; others may tell of changes
/// by it while it is open.
pub fn monitor() -> io::Result<(mpsc::UnboundedReceiver<Change>, mpsc::WeakUnboundedSender<Change>)> {
    let (connection, _handle, mut messages) = rtnetlink::new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Neigh,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv6Route,
    ])?;
    tokio::spawn(connection);
    let (changes, receiver) = mpsc::unbounded_channel();
    let others = changes.downgrade();
    tokio::spawn(async move {
        // The handle must live: the connection ends with its last one.
        let _handle = _handle;
        while let Some((message, _)) = messages.next().await {
            use rtnetlink::packet_core::NetlinkPayload::InnerMessage;
            let change = match message.payload {
                InnerMessage(RouteNetlinkMessage::NewNeighbour(n) | RouteNetlinkMessage::DelNeighbour(n)) => {
                    // Forwarding entries of bridges come by the same way and say nothing of addresses.
                    if n.header.family == AddressFamily::Bridge {
                        continue;
                    }
                    Change::Neighbours
                }
                InnerMessage(RouteNetlinkMessage::DelLink(link))
                    if link.header.interface_family != AddressFamily::Bridge =>
                {
                    Change::Gone(link.header.index)
                }
                // An overrun of the socket included: anything may have changed.
                _ => Change::Routes,
            };
            if changes.send(change).is_err() {
                return;
            }
        }
    });
    Ok((receiver, others))
}

/// Every device of the namespace.
pub async fn links(handle: &Handle) -> Result<Vec<Link>, NetlinkError> {
    let messages: Vec<_> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("list links"))?;
    Ok(messages
        .into_iter()
        .map(|message| {
            let mut link = Link {
                ifindex: message.header.index,
                name: String::new(),
                mac: [0; 6],
                mtu: 0,
                bridge: false,
                veth: false,
                vlan_port: false,
                loopback: message.header.flags.contains(LinkFlags::Loopback),
                ethernet: message.header.link_layer_type == LinkLayerType::Ether,
                xdp_program: None,
                carrier_ups: 0,
                up: message.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
                master: None,
                lower: None,
                vlan: false,
            };
            for attribute in message.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => link.name = name,
                    LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                    LinkAttribute::CarrierUpCount(count) => link.carrier_ups = count,
                    LinkAttribute::Address(bytes) => link.mac = bytes.try_into().unwrap_or_default(),
                    LinkAttribute::Xdp(parts) => {
                        link.xdp_program = parts.iter().find_map(|part| match part {
                            LinkXdp::ProgId(id)
                            | LinkXdp::DrvProgId(id)
                            | LinkXdp::SkbProgId(id)
                            | LinkXdp::HwProgId(id) => Some(*id).filter(|id| *id != 0),
                            _ => None,
                        });
                    }
                    LinkAttribute::LinkInfo(infos) => {
                        let is = |kinds: &[InfoKind]| {
                            infos
                                .iter()
                                .any(|i| matches!(i, LinkInfo::Kind(kind) if kinds.contains(kind)))
                        };
                        link.bridge = is(&[InfoKind::Bridge]);
                        link.vlan = is(&[InfoKind::Vlan]);
                        link.veth = is(&[InfoKind::Veth]);
                        link.vlan_port = is(&[InfoKind::MacVlan, InfoKind::MacVtap, InfoKind::IpVlan]);
                    }
                    LinkAttribute::Controller(master) => link.master = Some(master),
                    LinkAttribute::Link(lower) => link.lower = Some(lower),
                    _ => {}
                }
            }
            link
        })
        .collect())
}

/// Every address of the namespace.
pub async fn addresses(handle: &Handle) -> Result<Vec<OwnAddress>, NetlinkError> {
    let messages: Vec<_> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("list addresses"))?;
    Ok(messages
        .into_iter()
        .filter_map(|message| {
            let (mut local, mut other) = (None, None);
            let mut flags = AddressFlags::empty();
            for attribute in message.attributes {
                match attribute {
                    AddressAttribute::Local(address) => local = Some(address),
                    AddressAttribute::Address(address) => other = Some(address),
                    AddressAttribute::Flags(bits) => flags = bits,
                    _ => {}
                }
            }
            let mut unfit = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
            if message.header.family == AddressFamily::Inet6 {
                // Of IPv6 this bit says "temporary" (RFC 8981), of IPv4 "not the first of its subnet".
                unfit |= AddressFlags::Secondary | AddressFlags::Optimistic;
            }
            Some(OwnAddress {
                ifindex: message.header.index,
                // On point-to-point links the plain attribute is the peer's.
                address: local.or(other)?,
                unusable: flags.intersects(unfit),
            })
        })
        .collect())
}

/// The neighbour tables of both families, by device and address.
pub async fn neighbours(handle: &Handle) -> Result<HashMap<(u32, IpAddr), Neighbour>, NetlinkError> {
    let mut table = HashMap::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let request = handle.neighbours().get().set_address_family(family);
        let messages: Vec<_> = request
            .execute()
            .try_collect()
            .await
            .map_err(failed("list neighbours"))?;
        table.extend(messages.into_iter().filter_map(neighbour));
    }
    Ok(table)
}

fn neighbour(message: NeighbourMessage) -> Option<((u32, IpAddr), Neighbour)> {
    let usable = matches!(
        message.header.state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp
    );
    let permanent = matches!(
        message.header.state,
        NeighbourState::Permanent | NeighbourState::Noarp
    );
    let (mut address, mut mac, mut managed) = (None, None, false);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.try_into().ok(),
            NeighbourAttribute::ExtFlags(flags) => managed = flags.contains(NeighbourExtFlags::Managed),
            _ => {}
        }
    }
    let mac = mac.filter(|mac: &[u8; 6]| usable && *mac != [0; 6]);
    Some((
        (message.header.ifindex, address?),
        Neighbour {
            mac,
            managed,
            permanent,
        },
    ))
}

/// Unicast MACs that devices take besides their own, by device: those of macvlans on them, and what `bridge fdb add …
/// self` has added.
pub async fn further_macs(handle: &Handle) -> Result<BTreeSet<(u32, [u8; 6])>, NetlinkError> {
    let request = handle
        .neighbours()
        .get()
        .set_address_family(AddressFamily::Bridge);
    let messages: Vec<_> = request
        .execute()
        .try_collect()
        .await
        .map_err(failed("list forwarding entries"))?;
    Ok(messages
        .into_iter()
        .filter(|message| message.header.flags.contains(NeighbourFlags::Own))
        .filter_map(|message| {
            let mac = message.attributes.iter().find_map(|a| match a {
                NeighbourAttribute::LinkLayerAddress(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
                _ => None,
            })?;
            let group = mac[0] & 1 != 0;
            (!group).then_some((message.header.ifindex, mac))
        })
        .collect())
}

/// Makes the kernel resolve an address and keep the entry fresh (`NTF_EXT_MANAGED`, kernel 5.16).
pub async fn manage_neighbour(handle: &Handle, ifindex: u32, address: IpAddr) -> Result<(), NetlinkError> {
    let mut request = handle
        .neighbours()
        .add(ifindex, address)
        .state(NeighbourState::None)
        .replace();
    request
        .message_mut()
        .attributes
        .push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
    request
        .execute()
        .await
        .map_err(failed(format!("manage neighbour {address}")))
}

/// Removes a neighbour entry; a missing one is fine.
pub async fn remove_neighbour(handle: &Handle, ifindex: u32, address: IpAddr) -> Result<(), NetlinkError> {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = ifindex;
    let (family, destination) = match address {
        IpAddr::V4(v4) => (AddressFamily::Inet, NeighbourAddress::Inet(v4)),
        IpAddr::V6(v6) => (AddressFamily::Inet6, NeighbourAddress::Inet6(v6)),
    };
    message.header.family = family;
    message
        .attributes
        .push(NeighbourAttribute::Destination(destination));
    let result = handle.neighbours().del(message).execute().await;
    gone_is_fine(result.map_err(failed(format!("remove neighbour {address}"))))
}

/// Success also when what was to be removed is not there any more.
fn gone_is_fine(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(e)
            if matches!(
                e.source.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::EADDRNOTAVAIL | libc::ESRCH | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// The kernel's own lookup; `None`: there is no route.
pub async fn route(handle: &Handle, address: IpAddr) -> Result<Option<Route>, NetlinkError> {
    let full = if address.is_ipv4() { 32 } else { 128 };
    let message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(address, full)
        .map_err(|e| NetlinkError {
            what: format!("route to {address}"),
            source: io::Error::other(e),
        })?
        .build();
    let mut replies = std::pin::pin!(handle.route().get(message).execute());
    match replies.next().await {
        Some(Ok(reply)) => Ok(read_route(&reply)),
        Some(Err(RtError::NetlinkError(refusal)))
            if matches!(
                refusal.to_io().raw_os_error(),
                // No route, and routes that say `unreachable`, `prohibit`, `blackhole`.
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL)
            ) =>
        {
            Ok(None)
        }
        Some(Err(e)) => Err(failed(format!("route to {address}"))(e)),
        None => Ok(None),
    }
}

fn read_route(message: &RouteMessage) -> Option<Route> {
    let local = message.header.kind == RouteType::Local;
    if !local && message.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut ifindex, mut gateway) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(v4)) => gateway = Some(IpAddr::V4(*v4)),
            RouteAttribute::Gateway(RouteAddress::Inet6(v6)) => gateway = Some(IpAddr::V6(*v6)),
            RouteAttribute::Via(RouteVia::Inet(v4)) => gateway = Some(IpAddr::V4(*v4)),
            RouteAttribute::Via(RouteVia::Inet6(v6)) => gateway = Some(IpAddr::V6(*v6)),
            _ => {}
        }
    }
    Some(Route {
        local,
        ifindex: ifindex?,
        gateway,
    })
}

/// The devices of the IPv4 default route with the lowest metric: several where it has several next hops.
pub async fn default_devices(handle: &Handle) -> Result<Vec<u32>, NetlinkError> {
    let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let routes: Vec<_> = handle
        .route()
        .get(all)
        .execute()
        .try_collect()
        .await
        .map_err(failed("list routes"))?;
    let best = routes
        .iter()
        .filter(|r| r.header.destination_prefix_length == 0 && r.header.table == RouteHeader::RT_TABLE_MAIN)
        .filter_map(|r| {
            let metric = r.attributes.iter().find_map(|a| match a {
                RouteAttribute::Priority(metric) => Some(*metric),
                _ => None,
            });
            let devices = route_devices(r);
            (!devices.is_empty()).then(|| (metric.unwrap_or(0), devices))
        })
        .min();
    Ok(best.map_or_else(Vec::new, |(_, devices)| devices))
}

/// The devices that a route leaves by.
fn route_devices(message: &RouteMessage) -> Vec<u32> {
    if let Some(route) = read_route(message) {
        return vec![route.ifindex];
    }
    let several = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) if message.header.kind == RouteType::Unicast => {
            Some(hops.iter().map(|hop| hop.interface_index).collect())
        }
        _ => None,
    });
    several.unwrap_or_default()
}

/// Puts a host address (/32, /128) on a device, without a route and without duplicate detection; false: it was there.
pub async fn add_address(handle: &Handle, ifindex: u32, address: IpAddr) -> Result<bool, NetlinkError> {
    let full = if address.is_ipv4() { 32 } else { 128 };
    let mut request = handle.address().add(ifindex, address, full);
    let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
    request
        .message_mut()
        .attributes
        .push(AddressAttribute::Flags(flags));
    match request
        .execute()
        .await
        .map_err(failed(format!("add address {address}")))
    {
        Ok(()) => Ok(true),
        Err(e) if e.source.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Takes a host address off a device; a missing one is fine.
pub async fn remove_address(handle: &Handle, ifindex: u32, address: IpAddr) -> Result<(), NetlinkError> {
    use rtnetlink::AddressMessageBuilder;
    let message = match address {
        IpAddr::V4(v4) => AddressMessageBuilder::<Ipv4Addr>::new()
            .index(ifindex)
            .address(v4, 32)
            .build(),
        IpAddr::V6(v6) => AddressMessageBuilder::<std::net::Ipv6Addr>::new()
            .index(ifindex)
            .address(v6, 128)
            .build(),
    };
    let result = handle.address().del(message).execute().await;
    gone_is_fine(result.map_err(failed(format!("remove address {address}"))))
}

/// Removes the clsact qdisc of a device if no filter is left in it; whether it did.
pub async fn remove_empty_clsact(handle: &Handle, ifindex: u32) -> Result<bool, NetlinkError> {
    let index = ifindex.cast_signed();
    let mut filters = handle.traffic_filter(index);
    let left: usize =
        filters.get().ingress().execute().count().await + filters.get().egress().execute().count().await;
    if left > 0 {
        return Ok(false);
    }
    let mut request = handle.qdisc().del(index);
    request.message_mut().header.parent = TcHandle::CLSACT;
    gone_is_fine(request.execute().await.map_err(failed("remove the clsact qdisc")))?;
    Ok(true)
}

/// Devices by name.
pub fn by_name(links: &[Link]) -> BTreeMap<&str, &Link> {
    links.iter().map(|link| (link.name.as_str(), link)).collect()
}
