//! The network task as the agent runs it, started inside a namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    time::Duration,
};

use tokio::sync::watch;
use weir::datapath::{
    Topology,
    attach::{Attacher, TcChoice},
    bpf::KernelMaps,
    load::load,
    net::{self, NetConfig, NetReport, NetTask},
    preflight::preflight,
    state::StateFile,
};

use crate::{object, sizes};

/// Timeout for a state that the task has to reach. Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(30);

/// The running task and its channels.
pub struct Agent {
    pub config: watch::Sender<NetConfig>,
    pub wanted: watch::Sender<BTreeSet<IpAddr>>,
    pub topology: watch::Receiver<Topology>,
    pub report: watch::Receiver<NetReport>,
    pub adopted: bool,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Agent {
    /// Loads and starts. Call it on a runtime inside the namespace.
    pub fn start(pin: &Path, state: &Path, config: NetConfig, wanted: &[&str], tc: TcChoice) -> Self {
        preflight(pin).unwrap();
        let loaded = load(object(), pin, &sizes()).unwrap();
        let adopted = loaded.adopted;
        let devices = KernelMaps::open(&loaded.pins.maps())
            .unwrap()
            .devices()
            .unwrap_or_else(|_| BTreeMap::new());
        let state = StateFile::open(state).unwrap();
        let (config, config_in) = watch::channel(config);
        let (wanted, wanted_in) = watch::channel(wanted.iter().map(|a| a.parse().unwrap()).collect());
        let (topology_out, topology) = watch::channel(Topology::default());
        let (report_out, report) = watch::channel(NetReport::default());
        let task = tokio::spawn(net::run(NetTask {
            attacher: Attacher::new(loaded, state.clone(), tc),
            state,
            devices,
            config: config_in,
            wanted: wanted_in,
            topology: topology_out,
            report: report_out,
        }));
        Self {
            config,
            wanted,
            topology,
            report,
            adopted,
            task,
        }
    }

    /// Waits until the topology meets `condition`.
    pub async fn until(&mut self, what: &str, condition: impl FnMut(&Topology) -> bool) -> Topology {
        let mut topology = self.topology.clone();
        let found = tokio::time::timeout(PATIENCE, topology.wait_for(condition)).await;
        match found {
            Ok(topology) => topology.unwrap().clone(),
            Err(_) => {
                let report = self.report.borrow().clone();
                panic!("{what}: {:#?}\n{report:#?}", self.topology.borrow());
            }
        }
    }

    /// Waits until the report meets `condition`.
    pub async fn until_report(&mut self, what: &str, condition: impl FnMut(&NetReport) -> bool) -> NetReport {
        let mut report = self.report.clone();
        let found = tokio::time::timeout(PATIENCE, report.wait_for(condition)).await;
        match found {
            Ok(report) => report.unwrap().clone(),
            Err(_) => panic!("{what}: {:#?}", self.report.borrow()),
        }
    }

    /// Ends the task, as a crash would: nothing is cleaned up.
    pub async fn kill(self) {
        self.task.abort();
        let _aborted = self.task.await;
    }
}
