//! The API over a real Unix socket, fed by real channels.

use std::{sync::Mutex, time::Duration};

use tokio::task::JoinHandle;

use super::{
    api::{Counters, Done, DrainRequest, EventRecord, FlowFilter, FlowList, Reading},
    client::{Client, ClientError},
    *,
};
use crate::reconcile::CommandError;

/// Answers with the fixture's numbers and remembers what flows were asked for.
#[derive(Default)]
struct Fixed {
    asked: Mutex<Option<FlowFilter>>,
}

impl Readings for Fixed {
    fn counters(&self, services: &[u32], backends: &[u32]) -> Result<Reading, ReadError> {
        assert_eq!((services, backends), (&[1, 2][..], &[11, 12, 13, 21, 22][..]));
        Ok(fixture::reading(5))
    }

    fn flows(&self, filter: &FlowFilter) -> Result<FlowList, ReadError> {
        *self.asked.lock().unwrap() = Some(filter.clone());
        let row = api::FlowRow {
            protocol: crate::model::Protocol::Tcp,
            client: "192.0.2.7:4000".parse().unwrap(),
            vip: "10.0.0.1:80".parse().unwrap(),
            backend: "172.17.0.2:8080".parse().unwrap(),
            snat: None,
            service_id: 1,
            backend_id: 11,
            service: String::new(),
            backend_name: String::new(),
            state: "established".into(),
            age_s: 9,
            idle_s: 1,
        };
        Ok(FlowList {
            flows: vec![row],
            more: false,
        })
    }
}

/// A serving API and the agent's ends of its channels.
struct Agent {
    client: Client,
    metrics: SocketAddr,
    status: watch::Sender<Status>,
    commands: mpsc::Receiver<Command>,
    requests: mpsc::Receiver<AnnounceRequest>,
    events: broadcast::Sender<maps::Event>,
    readings: Arc<Fixed>,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<Result<(), AdminError>>,
    dir: tempfile::TempDir,
}

async fn agent() -> Agent {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        socket: dir.path().join("weir.sock"),
        group: None,
        metrics: Some("127.0.0.1:0".parse().unwrap()),
    };
    let (status, receiver) = watch::channel(fixture::status());
    let (sender, commands) = mpsc::channel(4);
    let (announce, requests) = mpsc::channel(4);
    let (events, _) = broadcast::channel(4);
    let (readings, stop) = (Arc::new(Fixed::default()), CancellationToken::new());
    let context = Context {
        status: receiver,
        readings: readings.clone(),
        commands: sender,
        announce,
        shims: shims::Connected::default(),
        events: events.clone(),
        started: Instant::now(),
        stop: stop.clone(),
    };
    let admin = Admin::bind(&options).await.unwrap();
    let metrics = admin.metrics_address().unwrap();
    let serving = tokio::spawn(admin.serve(context));
    let client = Client::new(&options.socket);
    Agent {
        client,
        metrics,
        status,
        commands,
        requests,
        events,
        readings,
        stop,
        serving,
        dir,
    }
}

/// One HTTP/1.0 call over TCP: the whole answer.
async fn tcp(address: SocketAddr, request: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream
        .write_all(format!("{request} HTTP/1.0\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn status_and_counters_arrive_as_they_were() {
    let agent = agent().await;
    let status: Status = agent.client.get("/v1/status").await.unwrap();
    assert_eq!(
        serde_json::to_value(&status).unwrap(),
        serde_json::to_value(fixture::status()).unwrap()
    );
    let counters: Counters = agent.client.get("/v1/counters").await.unwrap();
    assert_eq!(counters.backends[&11].packets_in, 1_050);
    assert_eq!(counters.drops["no_flow"], 12);
    agent.status.send_modify(|s| s.services.clear());
    let status: Status = agent.client.get("/v1/status").await.unwrap();
    assert!(status.services.is_empty());
}

#[tokio::test]
async fn flows_are_filtered_by_name_and_named() {
    let agent = agent().await;
    let list: FlowList = agent
        .client
        .get("/v1/flows?service=web&backend=web%2Fweb-1&limit=7")
        .await
        .unwrap();
    assert_eq!(
        (
            list.flows[0].service.as_str(),
            list.flows[0].backend_name.as_str()
        ),
        ("web", "web-1")
    );
    let filter = FlowFilter {
        services: Some([1].into()),
        client: None,
        backends: Some([11].into()),
        limit: 7,
    };
    assert_eq!(*agent.readings.asked.lock().unwrap(), Some(filter));
    for wrong in [
        "/v1/flows?service=nothing",
        "/v1/flows?client=nobody",
        "/v1/flows?colour=red",
    ] {
        let refused = agent.client.get::<FlowList>(wrong).await;
        assert!(
            matches!(refused, Err(ClientError::Refused(_))),
            "{wrong}: {refused:?}"
        );
    }
}

fn body(backend: &str, all: bool) -> DrainRequest {
    DrainRequest {
        backend: backend.into(),
        all,
        deadline_ms: Some(1500),
    }
}

/// Starts a call; its answer is waited for later.
fn post(agent: &Agent, path: &'static str, body: DrainRequest) -> JoinHandle<Result<Done, ClientError>> {
    let client = agent.client.clone();
    tokio::spawn(async move { client.post::<Done>(path, &body).await })
}

#[tokio::test]
async fn a_drain_reaches_the_reconciler_and_its_answer_the_caller() {
    let mut agent = agent().await;
    // What was typed, what the reconciler is told, which backends are meant.
    for (typed, told, ids) in [
        ("web-2", "web-2", &[12][..]),
        ("#12", "web/172.17.0.3:8080", &[12]),
        ("172.17.0.3:8080", "172.17.0.3:8080", &[12]),
        ("dns/web-1", "dns/web-1", &[22]),
        ("web-1", "web-1", &[11, 22]),
    ] {
        let call = post(&agent, "/v1/drain", body(typed, true));
        let Command::Drain {
            backend,
            deadline,
            reply,
        } = agent.commands.recv().await.unwrap()
        else {
            panic!("not a drain")
        };
        assert_eq!(backend, told);
        assert_eq!(deadline, Some(Duration::from_millis(1500)));
        reply.send(Ok(1)).unwrap();
        let done = call.await.unwrap().unwrap();
        assert_eq!(
            done.backends.iter().filter_map(|b| b.id).collect::<Vec<_>>(),
            ids,
            "{typed}"
        );
    }
}

#[tokio::test]
async fn vips_are_announced_on_demand() {
    let mut agent = agent().await;
    let vip: std::net::IpAddr = "192.0.2.80".parse().unwrap();
    let query = |vip| api::AnnounceQuery { vip };
    for (answer, want) in [
        (vec![("eth0".to_owned(), vip)], Ok("192.0.2.80 eth0")),
        (Vec::new(), Err("192.0.2.80 is not on an interface")),
    ] {
        let client = agent.client.clone();
        let call = tokio::spawn(async move {
            client
                .post::<api::Announced>("/v1/announce", &query(Some(vip)))
                .await
        });
        let request = agent.requests.recv().await.unwrap();
        assert_eq!(request.vip, Some(vip));
        request.reply.send(answer).unwrap();
        match (call.await.unwrap(), want) {
            (Ok(done), Ok(want)) => {
                let one = &done.announced[0];
                assert_eq!(format!("{} {}", one.vip, one.interface), want);
            }
            (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{error}"),
            (got, want) => panic!("{got:?}, not {want:?}"),
        }
    }
}

#[tokio::test]
async fn a_drain_of_a_backend_that_is_gone_can_be_lifted() {
    let mut agent = agent().await;
    let call = post(&agent, "/v1/undrain", body("gone-1", false));
    let Command::Undrain { backend, reply } = agent.commands.recv().await.unwrap() else {
        panic!("not an undrain")
    };
    reply.send(Err(CommandError::Unknown(backend))).unwrap();
    let refused = call.await.unwrap().unwrap_err().to_string();
    assert!(refused.contains("gone-1"), "{refused}");
}

#[tokio::test]
async fn failures_and_ambiguity_come_back_with_a_remedy() {
    let mut agent = agent().await;
    let ambiguous = post(&agent, "/v1/drain", body("web-1", false)).await.unwrap();
    let ambiguous = ambiguous.unwrap_err().to_string();
    assert!(
        ambiguous.contains("--all") && ambiguous.contains("#11") && ambiguous.contains("#22"),
        "{ambiguous}"
    );
    let call = post(&agent, "/v1/drain", body("web-2", false));
    let Command::Drain { reply, .. } = agent.commands.recv().await.unwrap() else {
        panic!("not a drain")
    };
    let fault = MapError::Kernel {
        map: "BACKENDS",
        operation: "update",
        source: std::io::ErrorKind::ResourceBusy.into(),
    };
    reply.send(Err(fault.into())).unwrap();
    let failed = call.await.unwrap().unwrap_err().to_string();
    assert!(failed.contains("map BACKENDS: update failed"), "{failed}");
    let gone = {
        let client = agent.client.clone();
        drop(agent.commands);
        client
            .post::<Done>("/v1/resync", &())
            .await
            .unwrap_err()
            .to_string()
    };
    assert!(gone.contains("reconciler has ended"), "{gone}");
}

#[tokio::test]
async fn tcp_serves_metrics_and_health_but_changes_nothing() {
    let agent = agent().await;
    let metrics = tcp(agent.metrics, "GET /metrics").await;
    assert!(
        metrics.contains("text/plain; version=0.0.4") && metrics.contains("weir_ready 1"),
        "{metrics}"
    );
    assert!(tcp(agent.metrics, "GET /healthz").await.contains("200 OK"));
    assert!(tcp(agent.metrics, "GET /readyz").await.contains("200 OK"));
    for call in [
        "POST /v1/drain",
        "POST /v1/undrain",
        "POST /v1/resync",
        "POST /v1/announce",
        "GET /v1/flows",
        "GET /v1/status",
    ] {
        assert!(tcp(agent.metrics, call).await.contains("404 Not Found"), "{call}");
    }
}

#[tokio::test]
async fn an_agent_that_is_not_ready_says_why() {
    let agent = agent().await;
    agent.status.send_modify(|status| {
        status.ready = false;
        status.sources[0].last_full_read = None;
        status.sources[0].fault = Some("no such file: /run/docker.sock".into());
    });
    let answer = tcp(agent.metrics, "GET /readyz").await;
    assert!(
        answer.contains("503") && answer.contains("source docker: no such file"),
        "{answer}"
    );
    let Agent { status, metrics, .. } = agent;
    drop(status);
    let answer = tcp(metrics, "GET /healthz").await;
    assert!(answer.contains("503"), "{answer}");
}

#[tokio::test]
async fn events_stream_until_the_agent_stops_which_removes_the_socket() {
    let agent = agent().await;
    let (seen, mut records) = mpsc::unbounded_channel::<EventRecord>();
    let follower = tokio::spawn({
        let client = agent.client.clone();
        async move { client.follow("/v1/events", |r| seen.send(r).is_ok()).await }
    });
    let event = maps::Event {
        kind: maps::event_kind::RESTEER,
        service: 1,
        backend: 12,
        ..Default::default()
    };
    // Nobody hears an event before the stream is open: send until somebody does.
    while agent.events.send(event).is_err() {
        tokio::task::yield_now().await;
    }
    let record = records.recv().await.unwrap();
    assert_eq!(
        (record.kind.as_str(), record.service.as_deref()),
        ("resteer", Some("web"))
    );
    agent.stop.cancel();
    follower.await.unwrap().unwrap();
    agent.serving.await.unwrap().unwrap();
    assert_eq!(std::fs::read_dir(agent.dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_second_agent_is_refused_and_a_missing_one_is_told_how_to_start() {
    let agent = agent().await;
    let options = Options {
        socket: agent.dir.path().join("weir.sock"),
        group: None,
        metrics: None,
    };
    let refused = Admin::bind(&options).await.unwrap_err().to_string();
    assert!(refused.contains("an agent already answers"), "{refused}");
    let nobody = Client::new(&agent.dir.path().join("other.sock"));
    let error = nobody.get::<Status>("/v1/status").await.unwrap_err().to_string();
    assert!(
        error.contains("not running") && error.contains("weir run --config"),
        "{error}"
    );
}
